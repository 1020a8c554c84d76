"""Training the demo's tiny Qwen3: text alone, so that a connector can teach it to see.

A base that knows only finished captions cannot be steered from its input. So this one reads facts
before it writes: as plain text (`top left: small cat, blue`), and as *bags of keywords*: at the place
where the image will be, each vector is a sum of word embeddings of its own vocabulary (object, size,
place, background), mixed, scaled, shifted and noisy, in no fixed order. It never sees a picture or
anything made from one; it learns that those positions may hold a rough, superposed list of words.

Shapes: B samples, N slots, R regions, K keywords of a region, T tokens, D width.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from qwen3_vlm.demo.drawings import drawing_is_held_out, named_drawings
from qwen3_vlm.demo.muon import Muon, orthogonal_by_gram
from qwen3_vlm.demo.questions import fact_list, question_and_answer
from qwen3_vlm.demo.world import NAMES, PROMPTS, Scene, Thing, plural, scenes

END, START, PAD = "<|im_end|>", "<|im_start|>", "<|endoftext|>"
NAME_PROMPT = "Name the drawing."
EMBEDDING_ROWS = 1536  # more than the tokenizer's ids, as in the real Qwen3: spare rows for placeholders
TOKENIZER_IDS = 1500
QWEN_SPLIT = (  # Qwen2's own pre-tokenizer pattern
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_REGIONS, MAX_KEYWORDS = 3, 10
NAME_WEIGHT = 3  # of the tokens of an answer, those that only the picture can tell


def base_config(layers: int = 3) -> Qwen3Config:
    """128 wide, tied embeddings: 0.7 M parameters with 3 layers."""
    return Qwen3Config(
        vocab_size=EMBEDDING_ROWS,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.08,
    )


def deepened(folder: Path) -> Qwen3ForCausalLM:
    """A saved base with one more layer, which at first adds nothing; fp32."""
    shallow = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    depth = shallow.config.num_hidden_layers
    deep = Qwen3ForCausalLM(base_config(depth + 1))
    deep.load_state_dict(deep.state_dict() | shallow.state_dict())
    for silent in (deep.model.layers[depth].self_attn.o_proj, deep.model.layers[depth].mlp.down_proj):
        torch.nn.init.zeros_(silent.weight)
    return deep


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of Qwen's kind, in which every word of the world is one id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_IDS,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, additional_special_tokens=[START]
    )


def _tokenizer_corpus() -> Iterator[str]:
    """World text, so often that its words are merged first; then the drawings' names."""
    stream, rng = scenes("tokenizer"), random.Random(0)
    for _ in range(4000):
        scene = next(stream)
        yield f"user\nassistant\n{rng.choice(PROMPTS)}\n{NAME_PROMPT}\n{scene.caption()}"
        yield " ".join(question_and_answer(scene, rng)) + " \n " + fact_list(scene, rng)
    for name in NAMES:
        yield f" {name} {plural(name)}" * 300
    yield from named_drawings().values()


@dataclass
class Sample:
    """One conversation; with `regions`, keyword slots stand before the question."""

    question: str
    answer: str
    regions: list[list[str]] = field(default_factory=list)  # keywords of each region
    everywhere: list[str] = field(default_factory=list)  # keywords of all slots: the background


def _keywords_of(thing: Thing) -> list[str]:
    if thing.size == "whole":
        return [thing.name, "drawing"]
    return [thing.name, thing.size, thing.column, thing.row]


def scene_sample(scene: Scene, rng: random.Random) -> Sample:
    """A scene as keyword slots: describe it, or answer a question about it."""
    regions = [_keywords_of(thing) for thing in scene.things]
    question, answer = rng.choice(PROMPTS), scene.caption()
    if rng.random() < 0.12:
        question, answer = question_and_answer(scene, rng)
    return Sample(question, answer, regions, [scene.background])


def text_sample(scene: Scene, rng: random.Random) -> Sample:
    """A scene as plain text: facts in any order → caption, or facts and a question → answer."""
    if rng.random() < 0.6:
        return Sample(f"{fact_list(scene, rng)}\n{rng.choice(PROMPTS)}", scene.caption())
    question, answer = question_and_answer(scene, rng)
    context = scene.caption() if rng.random() < 0.5 else fact_list(scene, rng)
    return Sample(f"{context}\n{question}", answer)


def drawing_sample(name: str, rng: random.Random) -> Sample:
    """The words of a drawing's name, as slots in any order → the name."""
    words = name.split()
    rng.shuffle(words)
    return Sample(NAME_PROMPT, name, [words], [])


def samples(seed: str) -> Iterator[Sample]:
    """The endless stream of slot samples."""
    rng, stream = random.Random(seed), scenes(seed)
    names = [name for code, name in named_drawings().items() if not drawing_is_held_out(code, name)]
    while True:
        yield drawing_sample(rng.choice(names), rng) if rng.random() < 0.03 else scene_sample(next(stream), rng)


def text_samples(seed: str) -> Iterator[Sample]:
    """The endless stream of text-only samples."""
    rng, stream = random.Random(seed), scenes(seed)
    while True:
        yield text_sample(next(stream), rng)


class Encoder:
    """Samples to tensors for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids; remembered, since the world repeats itself."""
        if text not in self._cache:
            self._cache[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._cache[text]

    def name_ids(self) -> Tensor:
        """Ids of the objects' names, one and many."""
        return torch.tensor([self.ids(f" {form}")[0] for name in NAMES for form in (name, plural(name))])

    def prompt(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Ids before and after the slots."""
        newline = "\n" if sample.regions else ""
        return self.ids(f"{START}user\n"), self.ids(f"{newline}{sample.question}{END}\n{START}assistant\n")

    def batch(self, batch: list[Sample], slots: int) -> dict[str, Tensor]:
        """Padded ids with `slots` pad ids where the slots go, labels on answers, and the keyword ids."""
        rows, labels = [], []
        for sample in batch:
            before, after = self.prompt(sample)
            head = before + [0] * slots + after
            answer = self.ids(sample.answer) + self.ids(END)
            rows.append(head + answer)
            labels.append([-100] * len(head) + answer)
        width = max(map(len, rows))
        return {
            "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
            "labels": torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
            "regions": torch.stack([self._keywords(sample.regions, MAX_REGIONS) for sample in batch]),
            "everywhere": torch.stack([self._keywords([sample.everywhere], 1)[0] for sample in batch]),
        }

    def _keywords(self, regions: list[list[str]], count: int) -> Tensor:
        """(R, K) ids, −1 where there is none."""
        out = torch.full((count, MAX_KEYWORDS), -1)
        for row, words in enumerate(regions):
            ids = [i for word in words for i in self.ids(f" {word}")][:MAX_KEYWORDS]
            out[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        return out


def keyword_slots(embedding: Tensor, regions: Tensor, everywhere: Tensor, slots: int, roughness: float) -> Tensor:
    """Rough, superposed keyword sums: what a half-trained connector might put at the image's place.

    Each slot is a mixture of the regions and of emptiness, from sharp (one region per slot) to flat (all
    in each), with every keyword at a gain of its own, a weaker wrong word here and there, a common
    offset, noise and a scale. `roughness` 0 leaves clean sums, which is where training starts: the
    habit of copying a word from a slot forms there first. (B, R, K), (B, K) → (B, N, D).
    """
    batch, _, _ = regions.shape
    words = F.normalize(embedding, dim=-1)
    wrong = words.detach()[torch.randint(3, TOKENIZER_IDS, regions.shape)]
    wrong_gain = torch.rand(regions.shape) * (torch.rand(regions.shape) < 0.1) * 0.5 * roughness
    gain = (1 + roughness * (torch.rand(regions.shape) - 0.5)) * (regions >= 0)
    content = (words[regions.clamp(min=0)] * gain[..., None] + wrong * wrong_gain[..., None]).sum(2)  # (B, R, D)
    mixed = _mixture(batch, slots, (regions >= 0).any(-1), roughness) @ content
    bag = (words[everywhere.clamp(min=0)] * (everywhere >= 0)[..., None]).sum(1)  # (B, D)
    mixed = mixed + bag[:, None] * (1 - roughness * torch.rand(batch, slots, 1))
    unit = words.shape[-1] ** -0.5
    noise = roughness * 1.5 * torch.rand(batch, 1, 1) ** 2 * torch.randn_like(mixed)
    offset = roughness * 2 * torch.rand(batch, 1, 1) ** 2 * torch.randn(batch, 1, mixed.shape[-1])
    return (mixed + unit * (noise + offset)) * torch.exp(roughness * 0.4 * torch.randn(batch, 1, 1))


def _mixture(batch: int, slots: int, present: Tensor, roughness: float) -> Tensor:
    """(B, N, R) weights: each region leads at least one slot; the other slots follow any region or none."""
    regions = present.shape[1]
    leader = torch.randint(0, regions + 1, (batch, slots))  # the last one = empty
    order = torch.rand(batch, slots).argsort(-1)
    leader = torch.scatter(leader, 1, order[:, :regions], torch.arange(regions).expand(batch, regions))
    sharpness = 8 - roughness * 7 * torch.rand(batch, 1, 1)
    wobble = roughness * torch.rand(batch, 1, 1) * torch.randn(batch, slots, regions + 1)
    allowed = torch.cat([present, torch.ones(batch, 1, dtype=torch.bool)], 1)[:, None]
    logits = sharpness * F.one_hot(leader, regions + 1) + wobble
    return logits.masked_fill(~allowed, -torch.inf).softmax(-1)[..., :regions]


def optimizers(model: Qwen3ForCausalLM, adam_rate: float, muon_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for everything else; without a rate for Muon AdamW for everything."""
    layers = [p for p in model.model.layers.parameters() if p.ndim == 2] if muon_rate else []
    chosen = set(layers)
    rest = [p for p in model.parameters() if p not in chosen]
    adam = torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.01)
    return [adam, Muon(layers, muon_rate, 0.01, orthogonal_by_gram)] if layers else [adam]


def loss_of(
    model: Qwen3ForCausalLM, batch: dict[str, Tensor], slots: int, roughness: float, names: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Loss over the answers' tokens with the objects' names counted `NAME_WEIGHT` times; plain figures beside it."""
    embedding = model.model.embed_tokens.weight  # (V, D), tied to the head
    inputs = F.embedding(batch["input_ids"], embedding)
    if slots:
        vectors = keyword_slots(embedding, batch["regions"], batch["everywhere"], slots, roughness)
        inputs = torch.cat([inputs[:, :3], vectors, inputs[:, 3 + slots :]], 1)
    hidden = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    return answer_loss(model, hidden, batch["labels"], names)


def answer_loss(
    model: Qwen3ForCausalLM, hidden: Tensor, labels: Tensor, names: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """`loss_of`, from the hidden states (B, T, D) on; labels (B, T) are shifted here."""
    hidden, labels = hidden[:, :-1], labels[:, 1:]
    target = labels[labels >= 0]
    logits = model.lm_head(hidden[labels >= 0])
    losses = F.cross_entropy(logits, target, reduction="none")
    is_name = torch.isin(target, names)
    weight = 1 + (NAME_WEIGHT - 1) * is_name
    right = (logits.argmax(-1) == target).float()
    figures = {"loss": losses.mean().item(), "right": right.mean().item(), "names": right[is_name].mean().item()}
    return (losses * weight).sum() / weight.sum(), figures
