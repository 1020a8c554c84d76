"""What `qwen3-vlm eval` is asked for, beyond the run and its checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from qwen3_vlm.config import require, require_positive


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """See the module."""

    samples: int = 200  # held-out records of each task to generate for
    gates: bool = True
    temperature: float = 0.0  # of what is generated; 0: the likeliest id
    guidance: float = 1.0
    vision_tower: str | None = None  # judges pictures; None: the config's, where that is a folder
    recogniser: Path | None = None  # judges speech; None: the bundled one
    language: str = "en"  # of texts whose record names none

    def __post_init__(self) -> None:
        require_positive(self, "samples")
        require(self.temperature >= 0, "temperature", self.temperature, "must be 0 or more")
