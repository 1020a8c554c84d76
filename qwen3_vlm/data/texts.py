"""Plain texts, one record each, as ids of the base's tokenizer: what a token LM reads so that it stays a text LM.

Files are JSON arrays or JSON Lines of objects with a "text". A text longer than a sequence is cut at its end; nothing
stands before or after it, as in the base's own pretraining.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen3_vlm.data.captions import JSON_SUFFIXES, expand_paths
from qwen3_vlm.data.encode import SkippedRecord
from qwen3_vlm.data.json_files import JsonFile
from qwen3_vlm.errors import DataError, RecordError, TokenError
from qwen3_vlm.fingerprint import fingerprint_dataset

Ids = npt.NDArray[np.int32]


class Texts(Sequence[Ids]):
    """`texts[i]` are the ids (T,) of text i. Cheap to send to worker processes.

    Args:
        paths: files, folders or globs.
        encode: text → ids.
        max_seq_len: ids that are kept of a text.

    Attributes:
        lengths: (n,) ids of each, 0 where it can't be used.
        unusable: those, and why.

    Raises:
        DataError: a file can't be used, or no text in them can.
    """

    def __init__(self, paths: Sequence[str], encode: Callable[[str], list[int]], max_seq_len: int) -> None:
        self._encode, self._max = encode, max_seq_len
        self._files = [_open(path) for path in expand_paths(paths)]
        self._places = [(number, row) for number, file in enumerate(self._files) for row in range(len(file))]
        self.unusable: list[SkippedRecord] = []
        self.lengths: npt.NDArray[np.int64] = np.array([self._length(index) for index in range(len(self))], np.int64)
        if not self.lengths.any():
            raise DataError(f"There is no text of two tokens or more in {', '.join(paths)}.")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        """The ids of one text.

        Raises:
            RecordError: it is none.
        """
        number, row = self._places[index]
        tree, origin = self._files[number].tree(row), self.origin(index)
        text = tree.get("text") if isinstance(tree, dict) else None
        if not isinstance(text, str):
            raise RecordError(f'{origin} has no "text".', "bad_record")
        try:
            ids = np.array(self._encode(text)[: self._max], dtype=np.int32)
        except TokenError as problem:
            raise RecordError(f"{origin}: {problem}", problem.reason) from problem
        if len(ids) < 2:
            raise RecordError(f"{origin} has fewer than two tokens, so nothing to predict.", "no_labels")
        return ids

    def origin(self, index: int) -> str:
        """Where a text stands, for messages."""
        number, row = self._places[index]
        return self._files[number].origin(row)

    @property
    def usable(self) -> npt.NDArray[np.int64]:
        """The texts that can be used."""
        return np.flatnonzero(self.lengths)

    @property
    def fingerprint(self) -> str:
        """Of the content of all files in their order."""
        parts = [(str(number), file.fingerprint) for number, file in enumerate(self._files)]
        return fingerprint_dataset(parts)

    def _length(self, index: int) -> int:
        try:
            return len(self[index])
        except RecordError as problem:
            origin = self.origin(index)
            self.unusable.append(SkippedRecord(index, origin, origin, problem.reason, str(problem)))
            return 0


def _open(path: Any) -> JsonFile:
    if path.suffix.lower() not in JSON_SUFFIXES:
        raise DataError(f"{path} is of an unknown kind; files of texts end in {', '.join(JSON_SUFFIXES)}.")
    return JsonFile(path, None)
