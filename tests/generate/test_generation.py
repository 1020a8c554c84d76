"""Whole answers of untrained models: everything decodes, seeds hold in any batch, the library's ways all work."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, LogitsProcessorList

from qwen3_vlm.errors import ModelError, TokenError, TokenSpaceError
from qwen3_vlm.generate.generation import (
    Segment,
    generate,
    generate_audio,
    generate_ids,
    generate_image,
    generate_segments,
    generate_text,
    pad_left,
    split_segments,
    task_of,
)
from qwen3_vlm.generate.grammar import Grammar, GrammarProcessor
from qwen3_vlm.generate.sampling import Choice, Sampler, Sampling
from qwen3_vlm.models.lora import add_lora, lora_parameters
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.tokenization.sequences import SEQUENCES, prompt_ids, unconditional_prompt
from qwen3_vlm.tokenization.token_space import ImageIdentity, TokenSpace
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
from tests.data.tiny_shards import tiny_space
from tests.generate.tiny_speaker import tiny_speaker
from tests.models.grown import FAMILIES
from tests.tokenization.plain_codecs import BlockColours, plain_pictures, plain_sounds, plain_uti


class Finer(BlockColours):
    """Another tokenizer, by its weights."""

    weights_sha256 = "f1e4" * 16


Speaker = tuple[TokenLM, UnifiedTokenizer]
HOT = Choice(1.5)
SAMPLING = Sampling(text=HOT, image=HOT, audio=HOT)
TEXTS = [
    "a red heart",
    "a blue car",
    "x",
    "two big apples above a green tree",
    "a dog",
    "a cat",
    "tree",
    "a small tree",
]


@pytest.fixture(scope="module")
def speaker(tiny_llm_dir: Path) -> Speaker:
    return tiny_speaker(tiny_llm_dir)


def grammar_of(speaker: Speaker, **more: Any) -> Grammar:
    return Grammar(speaker[0].token_space, **{"max_text": 12, "max_frames": 9, **more})


def prompts_of(speaker: Speaker, target: str) -> list[tuple[str, dict[str, Any]]]:
    """Eight prompts of unlike lengths for a target."""
    uti = speaker[1]
    if target == "text":
        pictures = [{"image": uti.encode_image(picture).ids} for picture in plain_pictures().values()]
        sounds = [{"audio": uti.encode_audio(sound[..., : 50 + 30 * n], rate).ids}
                  for n, (sound, rate) in enumerate(plain_sounds().values())]  # fmt: skip
        return [*(("i2t", ids) for ids in pictures), *(("a2t", ids) for ids in sounds)]
    task = {"image": "t2i", "audio": "t2a"}[target]
    return [(task, {"text": np.array(uti.encode_text(text))}) for text in TEXTS]


def test_answers_of_every_kind(speaker: Speaker) -> None:
    model, uti = speaker
    options: dict[str, Any] = {"grammar": grammar_of(speaker, min_frames=3), "sampling": SAMPLING, "seed": 5}
    picture = generate_image(model, uti, "a red heart", **options)
    assert isinstance(picture, Image.Image)
    assert picture.size == (16, 16)
    waveform, rate = generate_audio(model, uti, "a red heart", **options)
    assert (waveform.shape[0], rate) == (1, 8_000)
    assert waveform.shape[1] in [4 * frames for frames in range(3, 10)]
    for source in ({"image": picture}, {"audio": (waveform, rate)}):
        text = generate_text(model, uti, **source, **options)
        assert 0 < len(uti.encode_text(text)) <= 40  # twelve ids, each a piece of a word or a byte
    pictures = generate(
        model, uti, "image", [{"image": picture}, {"audio": (waveform, rate)}, {"text": "x"}], **options
    )
    assert [p.size for p in pictures] == [(16, 16)] * 3


@pytest.mark.parametrize("target", ["image", "audio", "text"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_eight_together_are_eight_alone(speaker: Speaker, target: str, guidance: float) -> None:
    model, _ = speaker
    prompts = prompts_of(speaker, target)
    sampling = Sampling(text=HOT, image=HOT, audio=(HOT, Choice(0.9, 8)), guidance=guidance)
    options: dict[str, Any] = {"grammar": grammar_of(speaker), "sampling": sampling}
    together = generate_ids(model, prompts, seed=100, batch_size=8, **options)
    in_threes = generate_ids(model, prompts, seed=100, batch_size=3, **options)
    alone = [generate_ids(model, [prompt], seed=100 + n, **options)[0] for n, prompt in enumerate(prompts)]
    found = [[segment.ids.tolist() for segment in answer] for answer in together]
    assert found == [[segment.ids.tolist() for segment in answer] for answer in alone]
    assert found == [[segment.ids.tolist() for segment in answer] for answer in in_threes]
    assert len({str(answer) for answer in found}) == 8
    for (segment,) in together:
        model.token_space.require_content(segment.ids, segment.modality)


def test_one_batch_may_hold_every_kind_of_answer(speaker: Speaker) -> None:
    model, _ = speaker
    prompts = [prompts_of(speaker, target)[n] for n, target in enumerate(("image", "audio", "text", "audio", "image"))]
    options: dict[str, Any] = {"grammar": grammar_of(speaker), "sampling": SAMPLING}
    together = generate_ids(model, prompts, **options)
    alone = [generate_ids(model, [prompt], seed=n, **options)[0] for n, prompt in enumerate(prompts)]
    assert [a[0].modality for a in together] == ["image", "audio", "text", "audio", "image"]
    assert [a[0].ids.tolist() for a in together] == [a[0].ids.tolist() for a in alone]


@pytest.mark.parametrize("target", ["image", "audio", "text"])
@pytest.mark.parametrize(
    "way",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 1.5},
        {"do_sample": True, "num_beams": 2, "temperature": 1.5, "top_k": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
    ],
    ids=lambda way: "-".join(map(str, way)) or "greedy",
)
def test_the_librarys_ways_of_generating(speaker: Speaker, target: Any, way: dict[str, Any]) -> None:
    """Each gives whole answers, the same whether the range alone is scored or everything."""
    model: Any = speaker[0]
    grammar = grammar_of(speaker)
    rows = [prompt_ids(model.token_space, *prompt) for prompt in prompts_of(speaker, target)[:3]]
    input_ids, attention_mask = pad_left(rows, grammar.pad_id)
    found = []
    for given in ({"grammar": grammar}, {}):
        torch.manual_seed(0)
        output = model.generate(
            input_ids,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([GrammarProcessor(grammar)]),
            generation_config=grammar.generation_config(target, **way),
            **given,
        )
        found.append(output[:, input_ids.shape[1] :])
    for answer in found[0]:
        (segment,) = split_segments(grammar, target, answer)
        model.token_space.require_content(segment.ids, target)
    assert torch.equal(*found)


@pytest.mark.parametrize("settings", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_samples_do_not_depend_on_the_cache(speaker: Speaker, settings: dict[str, Any]) -> None:
    model, _ = speaker
    prompts = prompts_of(speaker, "image")
    usual, other = (generate_ids(model, prompts, sampling=SAMPLING, **more) for more in ({}, settings))
    assert [a[0].ids.tolist() for a in usual] == [a[0].ids.tolist() for a in other]


def test_greedy_beams_of_one_is_the_sampler_at_temperature_0(speaker: Speaker) -> None:
    model: Any = speaker[0]
    grammar, greedy = grammar_of(speaker), Choice(0.0)
    prompts = prompts_of(speaker, "audio")[:2]
    rows = [prompt_ids(model.token_space, *prompt) for prompt in prompts]
    input_ids, mask = pad_left(rows, grammar.pad_id)
    output = model.generate(
        input_ids,
        attention_mask=mask,
        logits_processor=LogitsProcessorList([GrammarProcessor(grammar)]),
        generation_config=grammar.generation_config("audio"),
    )
    expected = [split_segments(grammar, "audio", row[input_ids.shape[1] :])[0].ids.tolist() for row in output]
    found = generate_ids(model, prompts, grammar=grammar, sampling=Sampling(audio=greedy))
    assert [answer[0].ids.tolist() for answer in found] == expected


def test_the_widest_beam_finds_the_likeliest_picture(tiny_llm_dir: Path) -> None:
    """Against all pictures of a tiny space, scored one by one from the model's own forward."""
    space = TokenSpace.build(plain_uti().token_space.text, ImageIdentity("few", "blocks", 3, (8, 8), (2, 2), "1" * 64))
    base = AutoModelForCausalLM.from_pretrained(tiny_llm_dir, dtype=torch.float32)
    model: Any = TokenLM.grow(base, space, seed=4).eval()
    grammar = Grammar(space)
    prompt = torch.tensor([prompt_ids(space, "t2i", {"text": np.array([5, 6])}).tolist()])
    first = space.range_of("image").first
    pictures = torch.cartesian_prod(*[torch.arange(first, first + 3)] * 4)  # (81, 4)
    whole = torch.cat([prompt.expand(81, -1), pictures], dim=1)
    with torch.no_grad():
        scores = model(whole).logits[:, prompt.shape[1] - 1 : -1, first : first + 3].log_softmax(-1)
    likelihood = scores.gather(2, (pictures - first)[..., None]).sum((1, 2))
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        grammar=grammar,
        logits_processor=LogitsProcessorList([GrammarProcessor(grammar)]),
        generation_config=grammar.generation_config("image", num_beams=27),
    )
    assert output[0, prompt.shape[1] : -1].tolist() == pictures[likelihood.argmax()].tolist()


def test_what_the_base_brings_along_bends_nothing(speaker: Speaker) -> None:
    model, uti = speaker
    expected = [generate_image(model, uti, text, seed=2).tobytes() for text in TEXTS[:2]]
    before = model.generation_config
    try:
        model.generation_config = type(before)(
            do_sample=True, temperature=0.01, top_k=1, top_p=0.1, repetition_penalty=9.0, no_repeat_ngram_size=1,
            num_beams=1, max_length=30, eos_token_id=7, pad_token_id=8,
        )  # fmt: skip
        found = [generate_image(model, uti, text, seed=2).tobytes() for text in TEXTS[:2]]
    finally:
        model.generation_config = before
    assert found == expected


def test_guidance_compares_with_the_empty_prompt(speaker: Speaker) -> None:
    """Greedy guided ids, worked out step by step with two plain forwards."""
    model, _ = speaker
    space = model.token_space
    source = {"text": np.array([5, 9, 17])}
    span = space.range_of("image")
    ids = [prompt_ids(space, "t2i", source).tolist(), unconditional_prompt(space, "t2i").tolist()]
    expected: list[int] = []
    for _ in range(16):
        with torch.no_grad():
            p, e = (model(torch.tensor([row + expected])).logits[0, -1, span.first : span.last + 1] for row in ids)
        p, e = p.log_softmax(-1), e.log_softmax(-1)
        expected.append(span.first + int((e + 3.0 * (p - e)).argmax()))
    sampling = Sampling(image=Choice(0.0), guidance=3.0)
    (answer,) = generate_ids(model, [("t2i", source)], sampling=sampling)
    assert answer[0].ids.tolist() == expected


def test_interleaved_answers(speaker: Speaker) -> None:
    model, uti = speaker
    grammar = grammar_of(speaker, then=[["image", "audio", "stop"], ["text"], ["stop"]])
    sampling = Sampling(text=HOT, switch=Choice(10.0))
    sources = [{"image": picture} for picture in plain_pictures().values()] * 8
    answers = generate_segments(model, uti, "text", sources, grammar=grammar, sampling=sampling)
    orders = {tuple(segment.modality for segment in answer) for answer in answers}
    assert orders == {("text",), ("text", "image", "text"), ("text", "audio", "text")}
    for segment in (segment for answer in answers for segment in answer):
        model.token_space.require_content(segment.ids, segment.modality)


def test_the_beginning_of_a_picture_may_be_given(speaker: Speaker) -> None:
    model: Any = speaker[0]
    grammar = grammar_of(speaker)
    first = model.token_space.range_of("image").first
    prompt = [*prompt_ids(model.token_space, "t2i", {"text": np.array([4])}).tolist(), *range(first, first + 10)]
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        grammar=grammar,
        logits_processor=LogitsProcessorList([Sampler(grammar, Sampling(), [0])]),
        generation_config=grammar.generation_config("image"),
    )
    assert output.shape[1] == len(prompt) + 7
    assert output[0, -1] == model.token_space.special("<|img_end|>")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_family(family: str, tied: bool) -> None:
    torch.manual_seed(0)
    uti = plain_uti()
    model = TokenLM.grow(FAMILIES[family](tie_word_embeddings=tied), uti.token_space).eval()
    pictures = generate(model, uti, "image", [{"text": text} for text in TEXTS], sampling=SAMPLING)
    assert len({picture.tobytes() for picture in pictures}) == 8


def test_a_bf16_base(tiny_llm_dir: Path) -> None:
    uti = plain_uti()
    base = AutoModelForCausalLM.from_pretrained(tiny_llm_dir, dtype=torch.bfloat16)
    model = TokenLM.grow(base, uti.token_space).eval()
    assert len(generate(model, uti, "image", [{"text": text} for text in TEXTS], sampling=SAMPLING)) == 8


# What is refused ------------------------------------------------------------------------------------------


def test_weights_that_are_no_numbers(tiny_llm_dir: Path) -> None:
    model, uti = tiny_speaker(tiny_llm_dir)
    with torch.no_grad():
        model.row_parameters()["embeddings"].fill_(torch.nan)
    with pytest.raises(ModelError, match="no numbers"):
        generate_image(model, uti, "a red heart")


def test_another_token_space(speaker: Speaker) -> None:
    model, _ = speaker
    with pytest.raises(TokenSpaceError, match="another token space"):
        generate_image(model, plain_uti(image=Finer()), "x")
    with pytest.raises(TokenSpaceError, match="another token space"):
        generate_ids(model, [("t2i", {"text": np.array([1])})], grammar=Grammar(tiny_space()))


def test_longer_than_the_model_can_read(speaker: Speaker) -> None:
    model, uti = speaker
    with pytest.raises(ModelError, match="the model reads 512"):
        generate_audio(model, uti, "a red heart", grammar=Grammar(model.token_space, max_frames=300))
    waveform, _ = generate_audio(model, uti, "a red heart", sampling=Sampling(audio=Choice(0.0)))  # as long as fits
    assert 0 < waveform.shape[1] < 512 // 2 * 4
    with pytest.raises(ModelError, match="the model reads 512"):
        generate_image(model, uti, "word " * 300)


def test_sources_that_are_none(speaker: Speaker) -> None:
    model, uti = speaker
    with pytest.raises(TokenError, match="Give a picture or a sound"):
        generate_text(model, uti)
    with pytest.raises(TokenError, match="not smell"):
        generate(model, uti, "text", [{"smell": 1}])
    with pytest.raises(TokenError, match="not nothing"):
        generate(model, uti, "text", [{}])
    with pytest.raises(TokenError, match="No task goes from text to text"):
        generate(model, uti, "text", [{"text": "a"}])
    assert {task_of(fmt.source, fmt.target) for fmt in SEQUENCES.values()} == {
        name for name, fmt in SEQUENCES.items() if not fmt.noise_rate
    }


def test_an_answer_that_was_cut_is_no_answer(speaker: Speaker) -> None:
    grammar = grammar_of(speaker)
    first = speaker[0].token_space.range_of("image").first
    with pytest.raises(TokenError, match="image is not whole"):
        split_segments(grammar, "image", torch.tensor([first, first + 1]))
    end = speaker[0].token_space.special("<|img_end|>")
    (segment,) = split_segments(grammar, "image", torch.tensor([first, end, grammar.pad_id, grammar.pad_id]))
    assert isinstance(segment, Segment)
    assert segment.ids.tolist() == [first]


def test_a_model_in_training_mode_answers_like_one_that_is_not(tiny_llm_dir: Path) -> None:
    """An adapter's dropout is off while it answers, no random number of torch's is drawn, the mode is put back."""
    model, uti = tiny_speaker(tiny_llm_dir)
    add_lora(model.language_model, rank=2, alpha=4, dropout=0.5)
    with torch.no_grad():
        for parameter in lora_parameters(model.language_model).values():
            parameter.add_(0.3)
    options: dict[str, Any] = {"grammar": grammar_of((model, uti)), "sampling": SAMPLING}
    prompts = [("t2i", {"text": np.array(uti.encode_text("a dog"))})]
    expected = generate_ids(model.eval(), prompts, **options)
    model.train()
    before = torch.get_rng_state()
    found = generate_ids(model, prompts, **options)
    assert found[0][0].ids.tolist() == expected[0][0].ids.tolist()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())


def test_an_empty_text_is_a_sentence(speaker: Speaker) -> None:
    with pytest.raises(TokenError, match="The text is empty"):
        generate_image(*speaker, "")
