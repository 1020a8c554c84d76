"""The golden set of a token LM: the same few prompts of every task, generated the same way at every checkpoint.

    golden/ids-i2t.json              which records; chosen once
    golden/reference/                pictures and sounds of the records, as the tokenizers give them back
    golden/step-000123/items.jsonl   one `TokenGoldenItem` per line, with the generated ids
    golden/step-000123/*.png, *.wav  what was generated

A dump is there whole or not at all. References are decoded from the record's own ids: that is the best that a model of
these ids can do, and what its output is held against.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from qwen3_vlm.errors import TokenError
from qwen3_vlm.evaluate.caption_scores import score_captions
from qwen3_vlm.evaluate.decode_success import Decoded, Decoder, Generate, decode_segment, prompt_of, read_segment
from qwen3_vlm.evaluate.golden import ITEMS_FILE, GoldenItem, choose_golden
from qwen3_vlm.evaluate.intervals import bootstrap_mean, wilson_interval
from qwen3_vlm.evaluate.token_losses import TokenRecord
from qwen3_vlm.storage import atomic_directory, atomic_write_bytes, atomic_write_text
from qwen3_vlm.tokenization.audit_page import png_bytes, wav_bytes
from qwen3_vlm.tokenization.sequences import Ids, sequence_format
from qwen3_vlm.tokenization.token_space import Content

REFERENCE_FOLDER = "reference"
ENDINGS = {"image": ".png", "audio": ".wav"}


@dataclass(frozen=True, slots=True)
class TokenGoldenItem(GoldenItem):
    """One prompt of one task and what was generated. A picture or sound is named in its text field by its ids' hash.

    Files of the source and the reference lie in golden/reference, that of the prediction beside the items; a text has
    none ("").
    """

    task: str = ""
    ids: tuple[int, ...] = ()  # as generated, up to the end token, excluded
    match: float = 0.0  # share of the reference's ids that stand at the same place
    source_file: str = ""
    reference_file: str = ""
    prediction_file: str = ""


def choose_records(
    task: str,
    sample_ids: Sequence[str],
    target_lengths: Sequence[int],
    folder: str | Path,
    *,
    count: int,
    seed: int = 0,
) -> list[int]:
    """Positions of a task's golden records, an equal share of each length; kept in `folder`, see `choose_golden`.

    Args:
        folder: golden/ of the run.
        target_lengths: ids of each record's target.

    Raises:
        DataError: the ids that are kept there can't be read or are not those of this data.
    """
    path = Path(folder) / f"ids-{task}.json"
    return choose_golden(sample_ids, target_lengths, count=count, seed=seed, path=path)


def dump_token_golden(
    tokenizer: Decoder,
    generate: Generate,
    records: Mapping[str, Sequence[TokenRecord]],
    folder: str | Path,
    *,
    step: int,
    batch_size: int = 16,
) -> list[TokenGoldenItem]:
    """Generate for every record of every task, and write golden/step-…/.

    What does not decode is an item with an `error`, not an exception: a checkpoint must not fail for it.

    Args:
        tokenizer: the UnifiedTokenizer.
        generate: should be deterministic, so that two dumps differ only where the model does.
        records: task → records with source and target, as (id, {modality: global ids}).
        folder: golden/ of the run.

    Raises:
        TokenError: a record lacks what its task needs.
        StorageError: the disk can't be written.
    """
    folder, items = Path(folder), []
    with atomic_directory(folder / f"step-{step:06d}") as temporary:
        for task, chosen in records.items():
            for start in range(0, len(chosen), batch_size):
                batch = chosen[start : start + batch_size]
                prompts = [prompt_of(tokenizer.token_space, task, ids) for _, ids in batch]
                for (name, ids), generated in zip(batch, generate(prompts), strict=True):
                    maker = _ItemMaker(tokenizer, task, name, ids, folder, temporary)
                    items.append(maker.make(np.asarray(generated), step))
        lines = [json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items]
        atomic_write_text(temporary / ITEMS_FILE, "".join(lines))
    return items


def score_token_golden(items: Sequence[TokenGoldenItem], confidence: float = 0.95) -> dict[str, Any]:
    """Task → its scores, JSON-serialisable: n, how many decoded, and

    - of texts exact match and CIDEr-D, those that did not decode left out;
    - of pictures and sounds the mean share of ids as in the reference (`match`, 0 for what did not decode), with its
      interval, and how many are the same throughout.
    """
    scores: dict[str, Any] = {}
    for task in dict.fromkeys(item.task for item in items):
        of_task = [item for item in items if item.task == task]
        decoded = [item for item in of_task if not item.error]
        counts = {"n": len(of_task), "decoded": len(decoded)}
        if sequence_format(task).target == "text":
            captions = score_captions([i.prediction for i in decoded], [i.reference for i in decoded], confidence)
            scores[task] = {**captions, **counts}
            continue
        exact = wilson_interval(sum(item.exact for item in of_task), len(of_task), confidence)
        match = bootstrap_mean([item.match for item in of_task], confidence=confidence)
        scores[task] = {
            **counts,
            "exact_match": exact.value,
            "exact_match_low": exact.low,
            "exact_match_high": exact.high,
            "match": match.value,
            "match_low": match.low,
            "match_high": match.high,
        }
    return scores


class _ItemMaker:
    """One record of one task: its texts, its files, its item."""

    def __init__(
        self,
        tokenizer: Decoder,
        task: str,
        name: str,
        ids: Mapping[str, npt.NDArray[Any]],
        folder: Path,
        temporary: Path,
    ) -> None:
        self.tokenizer, self.task, self.name, self.ids = tokenizer, task, name, ids
        self.references, self.temporary = folder / REFERENCE_FOLDER, temporary
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
        self.stem = f"{task}-{digest[:16]}"  # an id may be no name of a file

    def make(self, generated: npt.NDArray[Any], step: int) -> TokenGoldenItem:
        """Decode and write what was generated."""
        wanted = sequence_format(self.task)
        prompt, source_file = self._reference(wanted.source, "source")
        reference, reference_file = self._reference(wanted.target, "target")
        answer, prediction, prediction_file, error = np.empty(0, np.int32), "", "", ""
        try:
            answer = read_segment(self.tokenizer.token_space, wanted.target, generated)
            decoded = decode_segment(self.tokenizer, wanted.target, answer)
            prediction = _in_words(wanted.target, answer, decoded)
            prediction_file = self._write(decoded, self.temporary, wanted.target, self.stem)
        except TokenError as problem:
            error = str(problem)
        own = np.asarray(self.ids[wanted.target])
        return TokenGoldenItem(
            id=f"{self.task}/{self.name}".encode("utf-8", "replace").decode(),  # half characters can't be written
            step=step,
            prompt=prompt,
            reference=reference,
            prediction=prediction,
            exact=not error and prediction.split() == reference.split(),
            error=error,
            task=self.task,
            ids=tuple(map(int, answer)),
            match=_match(answer, own),
            source_file=source_file,
            reference_file=reference_file,
            prediction_file=prediction_file,
        )

    def _reference(self, modality: Content, role: str) -> tuple[str, str]:
        """The record's own segment in words, and its file, which is written once."""
        ids = np.asarray(self.ids[modality], dtype=np.int32)
        name = f"{self.stem}-{role}"
        if modality != "text" and (self.references / f"{name}{ENDINGS[modality]}").is_file():
            return _in_words(modality, ids), f"{name}{ENDINGS[modality]}"
        decoded = decode_segment(self.tokenizer, modality, ids)
        return _in_words(modality, ids, decoded), self._write(decoded, self.references, modality, name)

    def _write(self, decoded: Decoded, folder: Path, modality: Content, stem: str) -> str:
        """The name of the file that holds it; none for a text."""
        if isinstance(decoded, str):
            return ""
        name = f"{stem}{ENDINGS[modality]}"
        content = png_bytes(decoded) if isinstance(decoded, Image.Image) else wav_bytes(*decoded)
        atomic_write_bytes(folder / name, content)
        return name


def _in_words(modality: Content, ids: Ids, decoded: Decoded | None = None) -> str:
    """A text itself; of anything else its number of ids and their hash, so that two can be told apart."""
    if isinstance(decoded, str):
        return decoded
    digest = hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
    return f"<{modality} of {len(ids)} ids, {digest[:12]}>"


def _match(answer: Ids, own: npt.NDArray[Any]) -> float:
    """The share of the reference's ids that the answer has at the same place."""
    common = min(len(answer), len(own))
    return float((answer[:common] == own[:common]).sum() / max(len(own), len(answer)))
