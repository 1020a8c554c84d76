"""What `qwen3-vlm eval` is asked for, beyond the run and its checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from qwen3_vlm.config import require, require_positive


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """See the module."""

    samples: int = 200  # held-out records of each task to generate for
    gates: bool = True
    temperature: float = 0.0  # of pictures and sounds; 0: the likeliest id, which texts always are
    guidance: float = 1.0  # of tasks that were trained with source_dropout
    vision_tower: str | None = None  # judges pictures; None: the config's, where that is a folder
    recogniser: Path | None = None  # judges speech; None: the bundled one
    language: str = "en"  # of texts whose record names none
    top_p: float = 1.0  # of pictures and sounds
    sounds: int | None = None  # instead of `samples` where sounds are made, since a recogniser takes seconds for each

    def __post_init__(self) -> None:
        require_positive(self, "samples")
        require(self.temperature >= 0, "temperature", self.temperature, "must be 0 or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be above 0, at most 1")
        require(self.sounds is None or self.sounds > 0, "sounds", self.sounds, "must be above 0")

    def samples_of(self, target: str) -> int:
        """How many records to generate a text, an image or an audio for."""
        return self.sounds if target == "audio" and self.sounds is not None else self.samples
