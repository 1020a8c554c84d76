"""What a run is made of: one frozen dataclass per concern, read from YAML plus `key=value` overrides.

Every field's comment is its documentation; `describe()` prints them all. Unknown keys, wrong types
and impossible values are refused with a sentence that names the key. It knows nothing of torch.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from qwen3_vlm.errors import ConfigError

MAX_CONFIG_BYTES = 1_000_000
Config = typing.TypeVar("Config")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The two frozen bases and the connector between them."""

    llm: str = "Qwen/Qwen3-8B-Base"  # hub id or local folder of any decoder-only causal LM
    vision_tower: str = "google/siglip2-so400m-patch14-384"  # hub id or local folder of a SigLIP / SigLIP2 tower
    connector: str | None = None  # connector directory to start from; None starts from fresh weights
    num_latents: int = 64  # vectors per image, N
    latent_dim: int = 512  # width inside the resampler
    depth: int = 2  # resampler layers
    num_heads: int = 8
    head_dim: int = 64
    ff_mult: int = 4  # resampler feed-forward width ÷ latent_dim
    projector_hidden_size: int | None = None  # None: 4 × the LLM's hidden size
    vision_ln: bool = False  # LayerNorm on the tower's output
    initializer_range: float = 0.02  # std of fresh connector weights
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the frozen bases; the connector is always fp32
    quantization: Literal["nf4"] | None = None  # of the decoder's frozen linear layers, where an adapter trains
    attn_implementation: str = "sdpa"  # of the LLM and the tower
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False  # run code that comes with a base from the hub

    def __post_init__(self) -> None:
        require_positive(self, "num_latents", "latent_dim", "depth", "num_heads", "head_dim", "ff_mult")
        require(self.initializer_range > 0, "initializer_range", self.initializer_range, "must be above 0")


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Where the records are and how they become batches."""

    train: tuple[str, ...] = ()  # LLaVA JSON, JSONL or WebDataset tars (files, folders or globs)
    eval: tuple[str, ...] = ()  # held-out records; empty: split off `train`
    image_root: str | None = None  # folder that image paths are relative to; None: the record file's folder
    eval_fraction: float = 0.02  # stratified by answer length, when `eval` is empty
    eval_max: int = 2000  # at most so many records are split off
    max_seq_len: int = 512  # tokens per sequence, image tokens included
    packing: bool = True  # several samples per sequence; false: padding with length grouping
    num_workers: int = 2  # processes that read and decode pictures; 0: in the training process
    max_image_pixels: int = 50_000_000  # a larger picture is refused as a decompression bomb
    max_bad_fraction: float = 0.01  # the run stops when more of the records seen so far are bad
    feature_cache: str | None = None  # folder for tower outputs on disk; None: encode each picture each time

    def __post_init__(self) -> None:
        require(0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "must lie between 0 and 1")
        require(0 <= self.max_bad_fraction <= 1, "max_bad_fraction", self.max_bad_fraction, "must lie in 0…1")
        require_positive(self, "eval_max", "max_seq_len", "max_image_pixels")
        require(self.num_workers >= 0, "num_workers", self.num_workers, "must be 0 or more")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The adapter on the language model, where a stage trains one."""

    rank: int = 16
    alpha: float = 32.0  # the update is scaled by alpha ÷ rank
    dropout: float = 0.05
    dora: bool = False  # a magnitude of its own for every row
    learning_rate: float | None = None  # of the adapter; None: optim.learning_rate
    kl_weight: float = 0.0  # in the loss: KL(base ‖ adapted) per token of samples without pictures and sounds
    max_text_kl: float = 0.5  # gate: nats per token that the text suite may move from the base
    max_perplexity_ratio: float = 1.5  # gate: perplexity on the text suite ÷ that of the base

    def __post_init__(self) -> None:
        require_positive(self, "rank", "alpha", "max_text_kl", "max_perplexity_ratio")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "must lie in 0…1")
        require(self.kl_weight >= 0, "kl_weight", self.kl_weight, "must be 0 or more")
        rate = self.learning_rate
        require(rate is None or rate > 0, "learning_rate", rate, "must be above 0")


@dataclass(frozen=True, slots=True)
class TrunkConfig:
    """How the language model's decoder goes on learning beside new rows: through an adapter, or whole."""

    training: Literal["lora", "full"] = "lora"  # full: every weight between embedding and head, and no adapter
    learning_rate: float | None = None  # of the whole decoder; None: optim.learning_rate

    def __post_init__(self) -> None:
        rate = self.learning_rate
        require(rate is None or rate > 0, "learning_rate", rate, "must be above 0")


@dataclass(frozen=True, slots=True)
class TextConfig:
    """Text alone, mixed in where the language model learns, so that text behaviour stays what it was."""

    # stage 2: conversations without pictures, in the formats of data.train; stage 4: JSON or JSONL of {"text": …}
    files: tuple[str, ...] = ()
    share: float = 0.1  # of all training samples; the files are gone through as often as that takes
    loss_weight: float = 1.0  # stage 4: what their losses are multiplied with; 0: they carry lora.kl_weight alone

    def __post_init__(self) -> None:
        require(0 < self.share < 1, "share", self.share, "must lie between 0 and 1")
        require(self.loss_weight >= 0, "loss_weight", self.loss_weight, "must be 0 or more")


@dataclass(frozen=True, slots=True)
class RowsConfig:
    """The new vocabulary rows of a token LM."""

    add_on: str | None = None  # trainable-rows directory to start from; None starts from fresh rows
    init: Literal["mean", "normal", "zero_head"] = "mean"  # fresh rows: the base rows' mean and spread, spread alone …
    head_learning_rate: float | None = None  # of an untied base's head rows; None: optim.learning_rate
    label_smoothing: float = 0.0
    z_loss: float = 0.0  # coefficient of (log Z)²

    def __post_init__(self) -> None:
        require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "must lie in 0…1")
        require(self.z_loss >= 0, "z_loss", self.z_loss, "must be 0 or more")
        rate = self.head_learning_rate
        require(rate is None or rate > 0, "head_learning_rate", rate, "must be above 0")


@dataclass(frozen=True, slots=True)
class TaskConfig:
    """How much of one task there is."""

    weight: float = 1.0  # share of the samples, relative to the other tasks
    loss_weight: float = 1.0  # what its losses are multiplied with
    ramp_from: float = 0.0  # share of all steps before which the task does not come at all …
    ramp_until: float = 0.0  # … and at which it has its full weight
    source_dropout: float = 0.0  # share of the samples whose source is left out; what guidance is told from
    folders: tuple[str, ...] = ()  # those of tokens.folders that serve it; (): all

    def __post_init__(self) -> None:
        require_positive(self, "weight", "loss_weight")
        require(0 <= self.source_dropout < 1, "source_dropout", self.source_dropout, "must lie in 0…1")
        require(0 <= self.ramp_from < 1, "ramp_from", self.ramp_from, "must lie in 0…1")
        require(self.ramp_from <= self.ramp_until <= 1, "ramp_until", self.ramp_until, "must lie in ramp_from…1")


@dataclass(frozen=True, slots=True)
class TokenDataConfig:
    """Tokenized data sets, and the tasks that are made of their records."""

    folders: tuple[str, ...] = ()  # of `qwen3-vlm data tokenize`, all of one token space
    train_split: str = "train"
    eval_split: str = "val"
    allow_unaudited: tuple[str, ...] = ()  # names of folders that may be used without a passing audit
    tasks: dict[str, TaskConfig] = field(default_factory=lambda: {"i2t": TaskConfig(), "a2t": TaskConfig()})
    max_seq_len: int = 2048  # ids; what is longer is left out and counted, never cut
    eval_max: int = 1000  # held-out records of each task that are graded
    num_workers: int = 2  # processes that read; 0: in the training process
    max_bad_fraction: float = 0.01  # the run stops when more of the records seen so far are bad

    def __post_init__(self) -> None:
        require(bool(self.tasks), "tasks", self.tasks, "must name at least one task")
        require(0 <= self.max_bad_fraction <= 1, "max_bad_fraction", self.max_bad_fraction, "must lie in 0…1")
        require_positive(self, "max_seq_len", "eval_max")
        require(self.num_workers >= 0, "num_workers", self.num_workers, "must be 0 or more")
        for name, task in self.tasks.items():
            known = not task.folders or {*task.folders} <= {*self.folders}
            require(known, f"tasks.{name}.folders", ", ".join(task.folders), "must be among tokens.folders")
        whole = [task.ramp_until for task in self.tasks.values()]
        names = ", ".join(self.tasks)
        require(min(whole) == 0, "tasks", names, "must have one without a ramp (ramp_until is 0), to begin with")


@dataclass(frozen=True, slots=True)
class OptimConfig:
    """How the trainable parameters move, and for how long."""

    batch_size: int = 4  # sequences per micro-batch and process
    accumulation: int = 4  # micro-batches per optimizer step and process
    learning_rate: float = 1e-4
    min_learning_rate: float = 0.0  # where the cosine ends
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    warmup_ratio: float = 0.03  # of all optimizer steps
    max_grad_norm: float = 1.0
    epochs: int = 1
    max_steps: int | None = None  # optimizer steps; None: all epochs
    mixed_precision: Literal["bf16", "no"] = "bf16"

    def __post_init__(self) -> None:
        require_positive(self, "batch_size", "accumulation", "learning_rate", "eps", "max_grad_norm", "epochs")
        require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "must lie in 0…1")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must be 0 or more")
        require(
            0 <= self.min_learning_rate <= self.learning_rate,
            "min_learning_rate",
            self.min_learning_rate,
            "must lie between 0 and learning_rate",
        )
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "must lie in 0…1")
        require(self.max_steps is None or self.max_steps > 0, "max_steps", self.max_steps, "must be above 0")


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """What is measured while training and at its end, and what the gates demand."""

    quick_every: int = 200  # optimizer steps between quick evaluations
    quick_samples: int = 200
    full_every: int | None = None  # optimizer steps between full evaluations; None: at the end only
    batch_size: int = 8
    ablation_samples: int = 256  # samples of the gate; fewer than 256 can't pass
    bootstrap_samples: int = 2000
    confidence: float = 0.95
    min_shuffle_gap: float = 0.05  # nats per token, shuffled − correct
    min_zero_gap: float = 0.05  # nats per token, zero − correct
    min_noise_gap: float = 0.05  # nats per token, noise − correct
    golden_samples: int = 64  # fixed stratified prompts decoded at every checkpoint
    golden_max_new_tokens: int = 64
    min_token_noise_gap: float = 0.15  # of token LMs, nats per token: uniform ids of the same range − correct …
    min_token_shuffle_gap: float = 0.10  # … the same ids in another order − correct …
    min_noise_win_rate: float = 0.85  # … and the share of samples that do better with their own ids
    min_shuffle_win_rate: float = 0.80
    decode_samples: int = 64  # pictures and sounds generated per task; each must decode

    def __post_init__(self) -> None:
        require_positive(self, "decode_samples")
        require_positive(self, "quick_every", "quick_samples", "batch_size", "ablation_samples")
        require_positive(self, "bootstrap_samples", "golden_samples", "golden_max_new_tokens")
        require(0 < self.confidence < 1, "confidence", self.confidence, "must lie between 0 and 1")


@dataclass(frozen=True, slots=True)
class SweepConfig:
    """The grid of `qwen3-vlm sweep`."""

    learning_rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4)
    vision_ln: tuple[bool, ...] = (False, True)
    gap_weight: float = 0.1  # score = eval loss − gap_weight · (Δshuffle + Δzero); lower is better

    def __post_init__(self) -> None:
        require(bool(self.learning_rates), "learning_rates", self.learning_rates, "must name at least one rate")
        require(bool(self.vision_ln), "vision_ln", self.vision_ln, "must name at least one setting")


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One training run."""

    stage: Literal["stage1_align", "stage2_sft", "stage3_rows", "stage4_mmpt"] = "stage1_align"
    output_dir: str = "runs/stage1_align"
    seed: int = 0
    save_every: int = 1000  # optimizer steps between checkpoints
    keep_checkpoints: int = 2  # older ones are removed
    log_every: int = 10  # optimizer steps between lines of metrics.jsonl
    tensorboard: bool = True
    resume: bool = True  # go on from the newest checkpoint in output_dir, if there is one
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    text: TextConfig = field(default_factory=TextConfig)
    rows: RowsConfig = field(default_factory=RowsConfig)
    tokens: TokenDataConfig = field(default_factory=TokenDataConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def __post_init__(self) -> None:
        require_positive(self, "save_every", "keep_checkpoints", "log_every")
        require(0 <= self.seed < 2**31, "seed", self.seed, "must lie in 0…2³¹−1")
        for section in UNREAD[self.stage]:
            if getattr(self, section) != type(getattr(self, section))():
                raise ConfigError(f"the stage {self.stage} does not read the section {section}; leave it out.")
        if self.stage == "stage2_sft" and self.text.loss_weight != 1:
            raise ConfigError("text.loss_weight is read by stage4_mmpt alone; in stage2_sft texts count like the rest.")
        if not self.text.files and self.text != TextConfig():
            raise ConfigError("the section text names no files; set text.files, or leave it out.")
        if self.stage == "stage4_mmpt" and self.lora.kl_weight and not self.text.files:
            raise ConfigError("lora.kl_weight is measured on the texts of text.files, which names none.")
        if self.model.quantization and "lora" in UNREAD[self.stage]:
            raise ConfigError(f"model.quantization is for stages with an adapter; {self.stage} has none, leave it out.")
        _check_trunk(self)


# Sections that a stage has no use for: set in vain, they would be a misunderstanding.
UNREAD: dict[str, tuple[str, ...]] = {
    "stage1_align": ("lora", "trunk", "text", "rows", "tokens"),
    "stage2_sft": ("trunk", "rows", "tokens", "sweep"),
    "stage3_rows": ("data", "lora", "trunk", "text", "sweep"),
    "stage4_mmpt": ("data", "sweep"),
}
_OF_ADAPTERS = ("rank", "alpha", "dropout", "dora", "learning_rate")  # in `lora`; the rest of it is about text


def _check_trunk(config: RunConfig) -> None:
    """Where the whole decoder trains there is no adapter, and nothing in 4 bits.

    Raises:
        ConfigError: settings of the one are given for the other.
    """
    if config.trunk.training != "full":
        if config.trunk.learning_rate is not None:
            raise ConfigError("trunk.learning_rate is for trunk.training: full; an adapter has lora.learning_rate.")
        return
    usual = LoraConfig()
    given = [f"lora.{name}" for name in _OF_ADAPTERS if getattr(config.lora, name) != getattr(usual, name)]
    if given:
        raise ConfigError(
            f"trunk.training is full, so there is no adapter for {', '.join(given)}; leave out what describes one "
            "(kl_weight and the limits on text drift are read)."
        )
    if config.model.quantization:
        raise ConfigError("trunk.training is full, and weights in 4 bits can't be trained; leave out quantization.")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply dotted `key=value` overrides (values are YAML too).

    Raises:
        ConfigError: the file is missing, too large or no YAML mapping; a key is unknown; a value
            has the wrong type or is out of range.
    """
    return parse_config(read_yaml(path), overrides, source=str(path))


def parse_config(tree: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "config") -> RunConfig:
    """Build a RunConfig from a plain mapping; see `load_config`."""
    return parse_as(RunConfig, tree, overrides, source)


def parse_as(
    cls: type[Config], tree: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "config"
) -> Config:
    """Build the dataclass `cls` from a plain mapping plus dotted `key=value` overrides.

    Raises:
        ConfigError: a key is unknown; a value has the wrong type or is out of range.
    """
    try:
        merged = _deep_copy(tree)
        for override in overrides:
            _apply_override(merged, override)
        return typing.cast(Config, _build(cls, merged, prefix="", source=source))
    except RecursionError as error:
        raise ConfigError(
            f"{source} contains itself (a YAML anchor inside its own value) or is nested too deep."
        ) from error


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON-serialisable mapping of a configuration; `parse_config(to_dict(c)) == c`."""
    return typing.cast(dict[str, Any], _tuples_to_lists(dataclasses.asdict(config)))


def dump_yaml(config: Any) -> str:
    """The resolved configuration as YAML text."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file of at most `MAX_CONFIG_BYTES`.

    Raises:
        ConfigError: it is missing, too large, not YAML or no mapping.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} has {size:,} bytes; a configuration has at most {MAX_CONFIG_BYTES:,}.")
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The configuration {path} can't be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2020-13-45
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; a configuration is a mapping of keys to values.")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"The override {override!r} is not of the form key=value, such as optim.learning_rate=1e-4.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"The value of the override {override!r} is not valid YAML.") from error
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"The override {override!r} goes below {name!r}, which holds a plain value.")
        node = child
    node[last] = value


def _build(cls: type, tree: Any, prefix: str, source: str) -> Any:
    """Make the dataclass `cls` from a mapping, refusing what it does not know."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{source}: {prefix.rstrip('.') or 'the top level'} must be a mapping, not {tree!r}.")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise ConfigError(f"{source}: unknown key {prefix}{key}.{_suggest(str(key), list(hints))}")
    values = {key: _convert(hints[key], value, f"{prefix}{key}", source) for key, value in tree.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {prefix}{error}") from error


def _convert(hint: Any, value: Any, key: str, source: str) -> Any:
    """Check `value` against the type `hint`; ints pass for floats, '1e-4' too (YAML 1.1 reads it as text)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, key + ".", source)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        inner = next(argument for argument in arguments if argument is not type(None))
        return _convert(inner, value, key, source)
    if origin is Literal:
        if value in arguments and type(value) is type(arguments[0]):
            return value
        raise ConfigError(f"{source}: {key} is {value!r}; it must be one of {', '.join(map(str, arguments))}.")
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{source}: {key} is {value!r}; it must be a mapping of names.")
        return {str(name): _convert(arguments[1], item, f"{key}.{name}", source) for name, item in value.items()}
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(arguments[0], item, key, source) for item in items)
    return _convert_scalar(hint, value, key, source)


def _convert_scalar(hint: type, value: Any, key: str, source: str) -> Any:
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = float("nan")
        if number == number and abs(number) != float("inf"):
            return number
    elif type(value) is hint:
        return value
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    raise ConfigError(f"{source}: {key} is {value!r}; it must be {names.get(hint, hint.__name__)}.")


def _suggest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f" Did you mean {close[0]}?" if close else f" Known keys: {', '.join(sorted(known))}."


def _deep_copy(node: Any) -> Any:
    return {str(key): _deep_copy(value) for key, value in node.items()} if isinstance(node, Mapping) else node


def _tuples_to_lists(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _tuples_to_lists(value) for key, value in node.items()}
    return [_tuples_to_lists(item) for item in node] if isinstance(node, (list, tuple)) else node


def require(condition: bool, key: str, value: object, rule: str) -> None:
    """Refuse a value: `ConfigError` "key is value; it rule"."""
    if not condition:
        raise ConfigError(f"{key} is {value!r}; it {rule}.")


def require_positive(config: Any, *keys: str) -> None:
    """Refuse the first of the fields that is not above 0."""
    for key in keys:
        require(getattr(config, key) > 0, key, getattr(config, key), "must be above 0")
