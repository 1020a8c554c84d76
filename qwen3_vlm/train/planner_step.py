"""What a planned step is made of: the model in a process, a micro-batch, the sizes of numbers.

The formulas over them stand in `planner_formulas`.
"""

from dataclasses import dataclass

from qwen3_vlm.train.planner_shapes import ConnectorShape, LoraShape, TextShape, TowerShape

FP32, BF16 = 4, 2
# QLoRA (arXiv:2305.14314, 3): 4 bits, a scale of 8 bits for 64 weights, one of 32 for 256 scales.
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8
LOSS_CHUNK_BYTES = 128 * 2**20  # models/losses.py: of fp32 scores, and on a GPU of fp32 weights, at one time
# Which parts of a model the stages train: `stages.STAGES` in the planner's words.
TRAINS = {
    "stage1_align": ("connector",),
    "stage2_sft": ("connector", "lora"),
    "stage3_rows": ("vocabulary_rows",),
    "stage4_mmpt": ("vocabulary_rows", "lora"),
}


@dataclass(frozen=True, slots=True)
class Model:
    """What there is in one process. What is not None beside the bases is trained, in fp32."""

    text: TextShape
    tower: TowerShape | None = None
    connector: ConnectorShape | None = None
    lora: LoraShape | None = None
    new_rows: int = 0
    full_trunk: bool = False  # the decoder trains, but for its embedding …
    copied_trunk: bool = False  # … beside a frozen copy of it, which the KL in the loss compares with


@dataclass(frozen=True, slots=True)
class HeldText:
    """The text-only samples of a micro-batch, which the KL in the loss holds at the base."""

    rows: float  # that have some, on average
    length: float  # the most text tokens of such a row
    predictions: float  # tokens that follow one of the same sample

    @property
    def positions(self) -> float:
        return self.rows * self.length


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of one process."""

    rows: int
    length: int  # positions of a row, padding included
    graded: int  # of all rows
    pictures: float = 0  # on average, as are samples
    tokens: int = 0  # real ones
    samples: float = 1
    masked: bool = True  # rows are packed or padded: attention gets a mask, and keys are repeated for each query head
    held: HeldText | None = None  # None: there is no KL in the loss

    @property
    def positions(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True, slots=True)
class Numerics:
    """Bytes per number: of stored frozen weights, of computing in the bases, of computing in what is trained."""

    base: int = BF16
    compute: int = BF16
    trained: int = BF16
    autocast: bool = True  # fp32 weights are cast to bf16 once per forward pass, and the copies kept until backward
    dropout_mask: int = 1  # per number: CUDA's kernel keeps a byte, a CPU a number
    linear: float | None = None  # of stored weights of the decoder's linear layers, where these are quantized
    block_bytes: int = LOSS_CHUNK_BYTES  # of a head's weights that the loss multiplies at one time
