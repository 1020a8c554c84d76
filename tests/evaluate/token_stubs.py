"""A model of tokens that reads, or does not, in a few lines; records that have something to be read."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qwen3_vlm.models.token_lm import GradedTokens
from qwen3_vlm.tokenization.sequences import BOUNDARIES, SEQUENCES
from qwen3_vlm.tokenization.token_space import TokenSpace
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
from tests.data.tiny_shards import tiny_space

SPACE: TokenSpace = tiny_space(384)
WORDS = 300  # text ids that answers are made of


def gist(ids: Any) -> int:
    """One number that depends on every id and on its place."""
    places = np.arange(1, len(ids) + 1)
    return int((np.asarray(ids, dtype=np.int64) * places * places).sum() % WORDS)


def told_records(count: int, modality: str = "image") -> list[tuple[str, dict[str, Any]]]:
    """Records whose text is the gist of their picture or sound, once or twice."""
    generator = np.random.default_rng(1)
    records = []
    for number in range(count):
        codes = np.stack([generator.integers(0, size, 5) for size in (4, 5, 6)])
        ids: dict[str, Any] = {
            "image": SPACE.image_to_global(generator.integers(0, 16, (2, 3))),
            "audio": SPACE.audio_to_global(codes),
        }
        ids["text"] = np.full(1 + number % 2, gist(ids[modality]))
        records.append((f"r{number}", ids))
    return records


class Reader(nn.Module):
    """Knows a source's gist. A graded token costs 1 where the target is what the source says, else `sight` more."""

    def __init__(self, sight: float, task: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace()
        self.sight, self.task = sight, task
        self.seen: list[Tensor] = []  # input ids of every row, padding left out

    def token_losses(self, *, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> GradedTokens:
        row, position = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        wrong = torch.tensor(
            [self._is_wrong(ids[mask.bool()]) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        )
        return GradedTokens(1.0 + self.sight * wrong[row].float(), row, position)

    def _is_wrong(self, ids: Tensor) -> bool:
        self.seen.append(ids)
        wanted, values = SEQUENCES[self.task], ids.numpy()
        source, target = (self._between(values, name) for name in (wanted.source, wanted.target))
        said, meant = (target, source) if wanted.target == "text" else (source, target)
        return not len(said) or int(said[0]) != gist(meant)

    def _between(self, values: Any, modality: Any) -> Any:
        start, end = (SPACE.special(name) for name in BOUNDARIES[modality][:2])
        return values[int(np.flatnonzero(values == start)[0]) + 1 : int(np.flatnonzero(values == end)[0])]


def plain_records(uti: UnifiedTokenizer, count: int) -> list[tuple[str, dict[str, Any]]]:
    """Records of a text, a picture and a sound of 5 to 8 frames, made by the tokenizers of the tests."""
    generator = np.random.default_rng(2)
    records = []
    for number in range(count):
        sound = generator.uniform(-1, 1, 20 + 4 * (number % 4)).astype(np.float32)
        ids = {
            "text": np.array(uti.encode_text(f"a red heart {number}")),
            "image": uti.encode_image(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).ids,
            "audio": uti.encode_audio(sound, 8000).ids,
        }
        records.append((f"r/{number}", ids))
    return records
