"""Reading and writing of `word_grids` as training tasks of the text base.

    read   | start | P places | end | gen | start | text …| END        labels on the text
    write  | start | text …  | end | gen | start | P places | END     the bag of each place is predicted

The same shape as `tokenization.sequences`, so that new rows for its special tokens find their part: here it is played
by words of the base's own, rather noisy ones, since rows that begin at random are to find them too.

Shapes: B samples, P places (cells or slots), K keywords of a place, S predicted places, T tokens, D width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_vlm.demo.word_grids import MAX_KEYWORDS, SILENCE, SOUNDS, Bag, Described
from qwen3_vlm.demo.world import BACKGROUND_WORDS, NAMES, SIZE_WORDS

Ids = Callable[[str], list[int]]
IGNORED = -100


class Cues(NamedTuple):
    """Words in the part of the special tokens."""

    start: str
    end: str
    gen: str


CUES = {
    "text": Cues("Describe", " concisely", " see"),
    "grid": Cues(" image", " object", " draw"),
    "sounds": Cues(" ears", " are", " play"),
}


def word_id(word: str, ids: Ids) -> int:
    """The one id of a word of a bag."""
    if word.startswith("#"):
        return int(word[1:])
    (found,) = ids(word)
    return found


def bags(places: list[Bag], ids: Ids) -> tuple[Tensor, Tensor]:
    """(P, K) ids, and (P, K) gains: 0 where there is none."""
    full = [bag + [(SILENCE, 0.0)] * (MAX_KEYWORDS - len(bag)) for bag in places]
    words = torch.tensor([[word_id(word, ids) for word, _ in bag] for bag in full])
    return words, torch.tensor([[gain for _, gain in bag] for bag in full])


def confusable(ids: Ids) -> dict[str, Tensor]:
    """Ids that a rough bag may hold by mistake: other objects, sizes and backgrounds; other sounds."""
    words = [f" {word}" for word in (*NAMES, *SIZE_WORDS, *BACKGROUND_WORDS)]
    sounds = sorted({sound for said in SOUNDS.values() for sound in said})
    return {kind: torch.tensor([word_id(w, ids) for w in of]) for kind, of in (("grid", words), ("sounds", sounds))}


def rough_sums(embedding: Tensor, words: Tensor, gains: Tensor, wrong: Tensor, roughness: float) -> Tensor:
    """Bags as vectors: (B, P, K) ids and gains → (B, P, D).

    Gains wobble from keyword to keyword and from place to place, some places say little, other words of the same kind
    (`wrong`) are mixed in, up to about the strength of the right ones; then come noise, an offset and a scale that are
    common to a sample.
    """
    unit = F.normalize(embedding, dim=-1)
    batch, places, _ = words.shape
    gain = gains * (1 + roughness * 1.2 * (torch.rand(words.shape) - 0.5))
    dim = 1 - roughness * torch.rand(batch, places, 1) * (torch.rand(batch, places, 1) < 0.5)
    right = (F.embedding(words, unit) * (gain * dim)[..., None]).sum(2)
    others = wrong[torch.randint(len(wrong), (batch, places, 3))]
    share = torch.rand(batch, places, 3) * (torch.rand(batch, places, 3) < 0.6)
    strength = roughness * 0.9 * torch.rand(batch, 1, 1) * share
    mixed = right + (F.embedding(others, unit.detach()) * strength[..., None]).sum(2)
    size = unit.shape[-1] ** -0.5
    noise = roughness * torch.rand(batch, 1, 1) ** 2 * torch.randn_like(mixed)
    offset = roughness * 1.5 * torch.rand(batch, 1, 1) ** 2 * torch.randn(batch, 1, mixed.shape[-1])
    return (mixed + size * (noise + offset)) * torch.exp(roughness * 0.4 * torch.randn(batch, 1, 1))


class GridBatch(NamedTuple):
    """One batch of one task; `spans[b]` is where the places of a sample stand, [first, stop)."""

    input_ids: Tensor  # (B, T); anything where places or cues stand
    is_cue: Tensor  # (B, T)
    labels: Tensor  # (B, T), of the text that is read
    spans: list[tuple[int, int]]
    words: Tensor  # (B, P, K)
    gains: Tensor  # (B, P, K), 0 where there is none


def grid_batch(batch: list[Described], task: str, kind: str, ids: Ids, end: int) -> GridBatch:
    """`task` is "read" or "write", `kind` "grid" or "sounds"."""
    text, other = CUES["text"], CUES[kind]
    rows, cues, labels, spans = [], [], [], []
    for sample in batch:
        said, places = ids(sample.text), [0] * len(sample.places)
        before, after = (other, text) if task == "read" else (text, other)
        source, target = (places, said) if task == "read" else (said, places)
        start, *rest = (word_id(word, ids) for word in (before.start, before.end, after.gen, after.start))
        row = [start, *source, *rest, *target, end]
        first = 1 if task == "read" else len(source) + 4
        rows.append(row)
        cues.append([1, *[0] * len(source), 1, 1, 1])
        labels.append([IGNORED] * (len(source) + 4) + ([*said, end] if task == "read" else []))
        spans.append((first, first + len(places)))
    drawn = [bags(sample.places, ids) for sample in batch]
    return GridBatch(
        _padded([torch.tensor(row) for row in rows], 0),
        _padded([torch.tensor(row) for row in cues], 0, max(map(len, rows))).bool(),
        _padded([torch.tensor(row) for row in labels], IGNORED, max(map(len, rows))),
        spans,
        _padded([words for words, _ in drawn], 0),
        _padded([gains for _, gains in drawn], 0),
    )


def _padded(rows: list[Tensor], value: int, length: int | None = None) -> Tensor:
    """Rows of one tensor, all as long as the longest."""
    length = length or max(map(len, rows))
    out = rows[0].new_full((len(rows), length, *rows[0].shape[1:]), value)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out


def grid_inputs(embedding: Tensor, batch: GridBatch, wrong: Tensor, roughness: float) -> Tensor:
    """(B, T, D): text as it is, cues noisy, places as rough sums."""
    inputs = F.embedding(batch.input_ids, embedding)
    cues = F.normalize(inputs, dim=-1)
    size = cues.shape[-1] ** -0.5
    noise = roughness * torch.rand(len(cues), 1, 1) * size * torch.randn_like(cues)
    cues = (cues + noise) * torch.exp(roughness * 0.4 * torch.randn(*cues.shape[:2], 1))
    inputs = torch.where(batch.is_cue[..., None], cues, inputs)
    vectors = rough_sums(embedding, batch.words, batch.gains, wrong, roughness)
    is_place = torch.zeros(inputs.shape[:2], dtype=torch.bool)
    has_place = torch.zeros(vectors.shape[:2], dtype=torch.bool)
    for row, (first, stop) in enumerate(batch.spans):
        is_place[row, first:stop] = True
        has_place[row, : stop - first] = True
    return inputs.masked_scatter(is_place[..., None], vectors[has_place])


def written_loss(hidden: Tensor, head: Tensor, batch: GridBatch, end: int) -> tuple[Tensor, float]:
    """Of (B, T, D) hidden states: nats per place beyond the bags' own entropy, with the end; its mean for logs."""
    at, words, shares = [], [], []
    for row, (first, stop) in enumerate(batch.spans):
        at.append(hidden[row, first - 1 : stop])  # predicts the places and the end
        last = torch.zeros(1, MAX_KEYWORDS)
        last[0, 0] = 1.0
        words.append(torch.cat([batch.words[row, : stop - first], torch.full((1, MAX_KEYWORDS), end)]))
        shares.append(torch.cat([batch.gains[row, : stop - first], last]))
    share = torch.cat(shares)  # (S, K)
    share = share / share.sum(-1, keepdim=True)
    scores = F.linear(torch.cat(at), head).log_softmax(-1).gather(1, torch.cat(words))
    loss = -(share * (scores - share.clamp(min=1e-9).log())).sum(-1).mean()
    return loss, loss.item()
