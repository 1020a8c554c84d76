"""plan(config, cluster): what a run would need and cost, before anything is bought or loaded.

    config → model shapes, a micro-batch, the data set → for each way to run it (DDP or FSDP2, with or without
    gradient checkpointing): memory per device, does it fit, FLOPs, seconds per step, tokens per second, hours, price

The formulas stand in `planner_formulas`, what they are about in `planner_step`, the accelerators in
`planner_hardware`, the public sizes in `planner_shapes`.
What the data are like is assumed where it can't be read, said in the plan, and can be given. Nothing here needs torch.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qwen3_vlm.config import RunConfig, TaskConfig
from qwen3_vlm.errors import ConfigError
from qwen3_vlm.tokenization.sequences import OVERHEAD, SEQUENCES, TASK_FAMILIES
from qwen3_vlm.tokenization.token_space import TokenSpace
from qwen3_vlm.train import planner_formulas as formulas
from qwen3_vlm.train.planner_formulas import Memory
from qwen3_vlm.train.planner_hardware import Cluster
from qwen3_vlm.train.planner_shapes import ConnectorShape, LoraShape, read_text_shape, read_tower_shape
from qwen3_vlm.train.planner_step import BF16, FP32, NF4, TRAINS, Batch, HeldText, Model, Numerics

FILL = 0.98  # real tokens ÷ room of packed rows: `data.plan.fill_rate` of LLaVA-Pretrain's lengths
PADDED = 1.1  # longest ÷ mean length of a batch whose samples were sorted by length
MOST_ROWS = 4096  # the largest micro-batch that is looked for


@dataclass(frozen=True, slots=True)
class DataShape:
    """What the records are like, on average."""

    samples: int
    tokens: float  # of one sample, image tokens included
    graded: float
    pictures: float
    source: str  # where these figures are from
    held: float = 0.0  # share of samples that are text alone, at which a KL holds the base's text


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What a caller knows better; None leaves it to the planner."""

    samples: int | None = None
    tokens_per_sample: float | None = None
    graded_per_sample: float | None = None
    new_rows: int | None = None
    utilisation: float | None = None
    price: float | None = None  # of one accelerator for an hour


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run it, and what that takes."""

    strategy: str  # "one GPU", "DDP" or "FSDP2"
    checkpointing: bool
    memory: Memory
    memory_bytes: float
    fits: bool
    largest_batch_size: int  # rows of a micro-batch that would fit; 0: not even one
    executed_flops: float  # per optimizer step and device
    useful_flops: float
    step_seconds: float
    communication_share: float  # of the step's seconds, that no computing hides
    tokens_per_second: float  # real ones, all devices
    hours: float
    device_hours: float
    cost: float | None

    @property
    def name(self) -> str:
        return self.strategy + (" + checkpointing" if self.checkpointing else "")


@dataclass(frozen=True, slots=True)
class Plan:
    """What `plan` found."""

    stage: str
    llm: str
    vision_tower: str | None
    cluster: Cluster
    utilisation: float
    parameters: dict[str, tuple[int, int]]  # component → trainable, frozen
    data: DataShape
    epochs: int
    steps: int
    samples_per_step: float
    batch: Batch  # the usual one, which time follows from
    longest: Batch  # the one that has to fit
    ways: tuple[Way, ...]
    remarks: tuple[str, ...]

    @property
    def best(self) -> Way | None:
        """The quickest that fits; of those that are as quick to a hundredth, the simplest."""
        fitting = [way for way in self.ways if way.fits]
        least = min((way.hours for way in fitting), default=0.0)
        return next((way for way in fitting if way.hours <= 1.01 * least), None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        found["cluster"] = {"count": self.cluster.count, **asdict(self.cluster.device)}
        found["parameters"] = {
            name: {"trainable": trainable, "frozen": frozen} for name, (trainable, frozen) in self.parameters.items()
        }
        found["ways"] = [{"name": way.name, **tree} for way, tree in zip(self.ways, found["ways"], strict=True)]
        return {**found, "best": self.best.name if self.best else None}


def plan(config: RunConfig, cluster: Cluster, given: Assumptions | None = None) -> Plan:
    """What `config` would need on `cluster`.

    Raises:
        ConfigError: the planner has no formulas for the stage.
        ModelError: the sizes of a base can't be found.
    """
    given = given or Assumptions()
    space = _token_space(config)
    model = model_of(config, given.new_rows, space)
    data = data_of(config, given, space)
    numerics = numerics_of(config)
    usual, longest = batches_of(config, data)
    utilisation = given.utilisation or cluster.device.utilisation
    ways = []
    several = ("DDP",) if config.model.quantization else ("DDP", "FSDP2")  # 4 bits are not cut into shards
    for strategy in ("one GPU",) if cluster.count == 1 else several:
        for checkpointing in (False, True):
            setting = _Setting(config, model, numerics, data, cluster, strategy, checkpointing, utilisation)
            ways.append(_way(setting, usual, longest, given.price))
    samples_per_step = usual.samples * config.optim.accumulation * cluster.count
    return Plan(
        stage=config.stage,
        llm=config.model.llm,
        vision_tower=config.model.vision_tower if model.tower else None,
        cluster=cluster,
        utilisation=utilisation,
        parameters=formulas.parameters(model),
        data=data,
        epochs=config.optim.epochs,
        steps=_steps(config, data, samples_per_step),
        samples_per_step=samples_per_step,
        batch=usual,
        longest=longest,
        ways=tuple(ways),
        remarks=tuple(_remarks(config, given, space, data)),
    )


def model_of(config: RunConfig, new_rows: int | None = None, space: TokenSpace | None = None) -> Model:
    """The shapes of what the stage loads and trains.

    Raises:
        ConfigError, ModelError: see `plan`.
    """
    if config.stage not in TRAINS:
        raise ConfigError(f"The planner knows the stages {', '.join(TRAINS)}; {config.stage!r} is none of them.")
    parts, settings = TRAINS[config.stage], config.model
    text = read_text_shape(settings.llm)
    full = config.trunk.training == "full"
    adapted = "lora" in parts and not full
    lora = LoraShape(config.lora.rank, config.lora.dropout, config.lora.dora) if adapted else None
    if "connector" in parts:
        tower = read_tower_shape(settings.vision_tower)
        return Model(text, tower, ConnectorShape.of(settings, text, tower), lora)
    rows = new_rows or (space.vocab_size_total - space.text.vocab_size if space else ASSUMED_ROWS)
    copied = full and config.lora.kl_weight > 0
    return Model(text, lora=lora, new_rows=rows, full_trunk=full, copied_trunk=copied)


def numerics_of(config: RunConfig) -> Numerics:
    """As the trainer computes on a device with bf16 arithmetic: autocast where it is asked for."""
    base = BF16 if config.model.dtype == "bfloat16" else FP32
    linear = NF4 if config.model.quantization else None
    if config.optim.mixed_precision == "bf16":
        return Numerics(base, BF16, BF16, autocast=True, linear=linear)
    return Numerics(base, base, FP32, autocast=False, linear=linear)


# ------------------------------------------------------------------------------------------------------------ data

TEXT_TOKENS = 250  # of a text that is mixed in: as a conversation of LLaVA's mix
TEXT_MARKS = 10  # ChatML around a question and an answer
# What configs/uti.yaml makes: 64 specials, Janus's 16,384 picture codes, 4 × 1,024 of EnCodec at 75 frames a second.
ASSUMED_ROWS = 64 + 16_384 + 4 * 1024
ASSUMED_IDS: Mapping[str, float] = {
    "text": 15,
    "image": 576,
    "audio": 5 * 75 * 4,
}  # of one caption, picture, sound of 5 s


def data_of(config: RunConfig, given: Assumptions, space: TokenSpace | None = None) -> DataShape:
    """The data set as it is given, else as the stage's public one is.

    LLaVA-Pretrain: 558,128 records; 10 tokens asked and 14 answered follow from the size of its file (181 MB).
    llava_v1_5_mix665k: 665,298 records, 40,688 of them without a picture; 1.03 GB, so some 250 text tokens a record,
    and marks for five turns; that 110 are graded is a guess between its short and its long answers.
    """
    latents = config.model.num_latents
    if config.stage == "stage1_align":
        found = DataShape(558_128, latents + 25 + TEXT_MARKS, 15, 1, "LLaVA-Pretrain's records and lengths")
    elif config.stage == "stage2_sft":
        with_picture = 1 - 40_688 / 665_298
        tokens = with_picture * latents + 250 + 5 * TEXT_MARKS
        found = DataShape(665_298, tokens, 110, with_picture, "LLaVA-1.5's mix: records published, lengths estimated")
    else:
        tokens, graded, source = _task_means(config.tokens.tasks, space)
        found = DataShape(1_000_000, tokens, graded, 0, f"a million samples; {source}")
    if given.tokens_per_sample or given.graded_per_sample:
        found = replace(
            found,
            tokens=given.tokens_per_sample or found.tokens,
            graded=given.graded_per_sample or found.graded,
            source="lengths as given",
        )
    return replace(found, samples=given.samples or found.samples, held=_held_share(config, found))


def _held_share(config: RunConfig, data: DataShape) -> float:
    """Texts that are mixed in; in stage 2 records without a picture count, too."""
    if "lora" not in TRAINS[config.stage] or not config.lora.kl_weight:
        return 0.0
    mixed = config.text.share if config.text.files else 0.0
    alone = 1 - data.pictures if "connector" in TRAINS[config.stage] else 0.0
    return mixed + (1 - mixed) * alone


def _task_means(tasks: Mapping[str, TaskConfig], space: TokenSpace | None) -> tuple[float, float, str]:
    """Ids and graded ids of a sample, over the tasks' weights; the end of the target is graded too."""
    ids, source = dict(ASSUMED_IDS), "captions of 15 ids, pictures of 576, sounds of 5 s at 300 a second"
    if space is not None:
        source = "captions of 15 ids; pictures and sounds of 5 s as the token space has them"
        if space.image:
            ids["image"] = space.image.num_ids
        if space.audio:
            ids["audio"] = 5 * space.audio.ids_per_second
    means = [(settings.weight, *_task_ids(task, ids)) for task, settings in tasks.items()]
    total = sum(weight for weight, _, _ in means)
    tokens = sum(weight * (source_ids + target + OVERHEAD) for weight, source_ids, target in means) / total
    return tokens, sum(weight * (target + 1) for weight, _, target in means) / total, source


def _task_ids(task: str, ids: Mapping[str, float]) -> tuple[float, float]:
    """Source and target ids; a task that stands for several (copy, denoise) is their mean."""
    names = TASK_FAMILIES.get(task, (task,))
    if not SEQUENCES.keys() >= set(names):
        raise ConfigError(f"tokens.tasks names {task!r}; the tasks are {', '.join([*SEQUENCES, *TASK_FAMILIES])}.")
    chosen = [SEQUENCES[name] for name in names]
    sources, targets = [ids[form.source] for form in chosen], [ids[form.target] for form in chosen]
    return sum(sources) / len(chosen), sum(targets) / len(chosen)


def batches_of(config: RunConfig, data: DataShape, rows: int | None = None) -> tuple[Batch, Batch]:
    """(the usual micro-batch, which time follows from; the longest one, which has to fit)."""
    rows = rows or config.optim.batch_size
    token_stage = "vocabulary_rows" in TRAINS[config.stage]
    room = config.tokens.max_seq_len if token_stage else config.data.max_seq_len
    if not token_stage and config.data.packing:
        tokens = rows * room * FILL
        batch = _batch(rows, room, tokens, max(1.0, tokens / data.tokens), data)
        return batch, _full_of_text(batch)
    length = min(room, round(data.tokens * PADDED))
    usual = _batch(rows, length, rows * min(data.tokens, room), rows, data)
    longest = _batch(rows, room, rows * room, rows, data)
    longest = replace(longest, graded=min(longest.positions, round(data.graded / data.tokens * longest.positions)))
    return usual, _full_of_text(longest)


def _batch(rows: int, length: int, tokens: float, samples: float, data: DataShape) -> Batch:
    graded = min(rows * length, round(samples * data.graded))
    held = _held(rows, length, samples * data.held) if data.held else None
    return Batch(rows, length, graded, samples * data.pictures, round(tokens), samples, held=held)


def _held(rows: int, length: int, texts: float) -> HeldText:
    """So many texts, spread over the rows; in a row of their own where there are rows enough."""
    tokens, having = min(TEXT_TOKENS, length), min(rows, texts)
    return HeldText(having, min(length, texts / having * tokens), texts * (tokens - 1))


def _full_of_text(batch: Batch) -> Batch:
    """Where a KL holds texts: a batch in which they are all there is, as one may come."""
    held = HeldText(batch.rows, batch.length, batch.rows * (batch.length - 1))
    return replace(batch, held=held) if batch.held else batch


def _token_space(config: RunConfig) -> TokenSpace | None:
    """Of the first tokenized folder that is there."""
    if "vocabulary_rows" not in TRAINS.get(config.stage, ()):
        return None
    found = next((folder for folder in config.tokens.folders if (Path(folder) / "token_space.json").is_file()), None)
    return None if found is None else TokenSpace.load(found)


# ------------------------------------------------------------------------------------------------------------ ways


@dataclass(frozen=True, slots=True)
class _Setting:
    """What one way is computed from."""

    config: RunConfig
    model: Model
    numerics: Numerics
    data: DataShape
    cluster: Cluster
    strategy: str
    checkpointing: bool
    utilisation: float

    def memory(self, batch: Batch) -> Memory:
        """Of one device."""
        ranks = self.cluster.count
        found = formulas.step_memory(
            self.model,
            batch,
            self.numerics,
            checkpointing=self.checkpointing,
            gradients_stay=self.config.optim.accumulation > 1 or self.strategy == "DDP",
            shards=ranks if self.strategy == "FSDP2" else 1,
        )
        return replace(found, overhead=formulas.overhead_bytes(found, ranks))

    def fits(self, batch: Batch) -> bool:
        return self.memory(batch).total <= self.cluster.device.memory_bytes

    def seconds(self, batch: Batch) -> tuple[float, float]:
        """(of an optimizer step, of these the ones that communication adds)."""
        device, ranks = self.cluster.device, self.cluster.count
        compute = self.executed(batch) / (device.peak_flops * self.utilisation)
        if self.strategy == "FSDP2":  # gathers run ahead of the computing that needs them
            moved = formulas.gather_bytes(self.model, self.numerics, ranks) * self.config.optim.accumulation
            extra = max(0.0, moved / self.cluster.link_bytes - compute)
        elif self.strategy == "DDP":  # the last gradients come last: nothing is left to hide their sum
            extra = formulas.all_reduce_bytes(self.model, ranks) / self.cluster.link_bytes
        else:
            extra = 0.0
        return compute + extra, extra

    def executed(self, batch: Batch) -> float:
        """FLOPs of an optimizer step on one device; cached features leave out the tower."""
        found = formulas.executed_flops(self.model, batch, checkpointing=self.checkpointing)
        tower = found.tower if self.config.data.feature_cache else 0.0
        return (found.total - tower) * self.config.optim.accumulation

    def caching_seconds(self) -> float:
        """Of encoding each picture once, where features are cached."""
        if not self.config.data.feature_cache or self.model.tower is None:
            return 0.0
        flops = formulas.tower_flops(self.model.tower, 1) * self.data.samples * self.data.pictures
        return flops / (self.cluster.device.peak_flops * self.utilisation)


def _way(setting: _Setting, usual: Batch, longest: Batch, price: float | None) -> Way:
    accumulation, count = setting.config.optim.accumulation, setting.cluster.count
    memory = setting.memory(longest)
    step, communication = setting.seconds(usual)
    steps = _steps(setting.config, setting.data, usual.samples * accumulation * count)
    hours = (steps * step + setting.caching_seconds()) / 3600
    return Way(
        strategy=setting.strategy,
        checkpointing=setting.checkpointing,
        memory=memory,
        memory_bytes=memory.total,
        fits=setting.fits(longest),
        largest_batch_size=_largest(setting),
        executed_flops=setting.executed(usual),
        useful_flops=formulas.useful_flops(setting.model, usual) * accumulation,
        step_seconds=step,
        communication_share=communication / step,
        tokens_per_second=usual.tokens * accumulation * count / step,
        hours=hours,
        device_hours=hours * count,
        cost=None if price is None else hours * count * price,
    )


def _largest(setting: _Setting) -> int:
    """Rows of the largest micro-batch that fits, by bisection."""
    low, high = 0, MOST_ROWS + 1
    while high - low > 1:
        middle = (low + high) // 2
        if setting.fits(batches_of(setting.config, setting.data, middle)[1]):
            low = middle
        else:
            high = middle
    return low


def _steps(config: RunConfig, data: DataShape, samples_per_step: float) -> int:
    optim = config.optim
    return optim.max_steps or math.ceil(data.samples * optim.epochs / samples_per_step)


def _remarks(config: RunConfig, given: Assumptions, space: TokenSpace | None, data: DataShape) -> list[str]:
    """What the plan leaves out or takes for granted."""
    found = ["Reading data, evaluation, golden samples and checkpoints come on top."]
    if given.utilisation is None:
        found.append("Utilisation is an assumption; measure tokens per second once and give it with --utilisation.")
    if "vocabulary_rows" in TRAINS[config.stage] and space is None and given.new_rows is None:
        found.append(f"No tokenized folder is there: {ASSUMED_ROWS:,} new rows are assumed (--new-rows).")
    if config.lora.dora and "lora" in TRAINS[config.stage]:
        found.append("DoRA's products of whole matrices are not counted: it takes longer and a matrix more per layer.")
    if data.held:
        found.append(
            f"The base reads {data.held:.0%} of the samples once more, for lora.kl_weight; {TEXT_TOKENS} tokens each "
            "are assumed."
        )
    if config.trunk.training == "full":
        found.append("The base is loaded once more, beside the model, to measure the drift of text.")
    if config.data.feature_cache:
        found.append("The tower runs once per picture, before training (data.feature_cache).")
    return found
