"""Samples as long as LLaVA's, with random ids: what stage 1 reads, and the same with instructions mixed in.

Record counts and file sizes are those that the LLaVA repository publishes (docs/Data.md and the LLaVA-Pretrain
page): 558 K captions in 181 MB, 58 K conversations in 126 MB, 23 K descriptions in 20.5 MB, 77 K answers with
reasoning in 79.6 MB. Tokens per record follow from bytes per record (324, 2,172, 891, 1,034), less the
JSON around the text (about 60 bytes a turn and 120 a record) and the image path, at about 4.4 bytes per token;
questions and answers are parted as in the published examples. Spread within a kind is log-normal.
"""

import math
import random
from dataclasses import dataclass

from qwen3_vlm.data.collate import LoadedSample
from qwen3_vlm.data.encode import IGNORED, Sample

TURN_OVERHEAD = (3, 5, 2)  # ChatML: before the question, between question and answer, after the answer


@dataclass(frozen=True)
class Kind:
    """One kind of record; token counts are means over records, without chat marks."""

    name: str
    records: int
    turns: int
    question_tokens: float  # of all turns
    answer_tokens: float
    spread: float  # standard deviation of the log of the answer's length


CAPTIONS = Kind("caption", 558_128, 1, 10, 14, 0.45)
INSTRUCTIONS = (
    Kind("conversation", 57_669, 4, 75, 235, 0.35),
    Kind("description", 23_240, 1, 14, 120, 0.30),
    Kind("reasoning", 76_643, 1, 22, 150, 0.35),
)
MIXES = {"pretrain": (CAPTIONS,), "pretrain+instruct": (CAPTIONS, *INSTRUCTIONS)}


def make_samples(
    mix: str, count: int, *, image_tokens: int, image_token_id: int, text_ids: int, max_seq_len: int, seed: int = 0
) -> list[LoadedSample]:
    """`count` samples with one picture each, kinds in the proportion of their records (no luck of the draw).

    The pictures' features are left empty; whoever runs the step puts them in.
    """
    kinds, generator = MIXES[mix], random.Random(seed)
    total = sum(kind.records for kind in kinds)
    ends = [sum(kind.records for kind in kinds[: number + 1]) / total for number in range(len(kinds))]
    picked = [next(k for k, end in zip(kinds, ends, strict=True) if (i + 0.5) / count <= end) for i in range(count)]
    generator.shuffle(picked)
    samples = []
    for index, kind in enumerate(picked):
        ids, labels = _tokens(kind, image_tokens, image_token_id, text_ids, generator)
        ids, labels = ids[:max_seq_len], labels[:max_seq_len]
        answer = sum(label != IGNORED for label in labels)
        sample = Sample(f"{kind.name}-{index}", ids, labels, (), answer, f"synthetic:{index}")
        samples.append(LoadedSample(index, sample, None))
    return samples


def _tokens(
    kind: Kind, image_tokens: int, image_token_id: int, text_ids: int, generator: random.Random
) -> tuple[list[int], list[int]]:
    def text(count: int) -> list[int]:
        return [generator.randrange(text_ids) for _ in range(count)]

    ids: list[int] = []
    labels: list[int] = []
    factor = math.exp(generator.gauss(-(kind.spread**2) / 2, kind.spread))  # mean 1
    before, between, after = TURN_OVERHEAD
    for turn in range(kind.turns):
        question = text(before) + [image_token_id] * (image_tokens if turn == 0 else 0)
        question += text(max(1, round(kind.question_tokens / kind.turns)) + between)
        answer = text(max(1, round(kind.answer_tokens * factor / kind.turns)) + 1)  # and the mark that ends it
        ids += question + answer + text(after - 1)
        labels += [IGNORED] * len(question) + answer + [IGNORED] * (after - 1)
    return ids, labels
