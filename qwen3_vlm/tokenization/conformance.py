"""Is this image tokenizer, or this audio codec, one that a token space can be built on?

Any adapter is put through one table of checks (`conformance_checks`), a third party's as well as our own. A check
that rests on another which failed is not run, so that one fault is told once. Beside the checks some figures are
reported that nothing depends on: agreement of batch sizes, quality and speed.

    report = run_conformance(my_tokenizer, "image")
    print(report.to_text()); assert report.passed
"""

import functools
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from qwen3_vlm.checks import Check
from qwen3_vlm.tokenization.conformance_checks import CHECKS, Row, check_sameness
from qwen3_vlm.tokenization.conformance_subjects import FaultError, Subject, subject_of
from qwen3_vlm.tokenization.quality import psnr, snr_db

if TYPE_CHECKING:
    from qwen3_vlm.tokenization.uti_config import UTIConfig

__all__ = ["ConformanceReport", "run_conformance", "run_conformance_for"]

Kind = Literal["image", "audio"]
PROCESS_SECONDS = 600  # for a new process to open the adapter and to encode one batch


@dataclass(frozen=True, slots=True)
class ConformanceReport:
    """All checks of one adapter, and figures that are not judged."""

    kind: str
    name: str  # the adapter's class
    rows: tuple[Check, ...]
    figures: dict[str, float | None] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Every check was run and passed."""
        return all(row.passed for row in self.rows)

    @property
    def failures(self) -> list[str]:
        """Names of the checks that failed."""
        return [row.name for row in self.rows if row.passed is False]

    def to_dict(self) -> dict[str, Any]:
        """What `json.dumps` takes."""
        rows = [{"check": row.name, "passed": row.passed, "detail": row.detail} for row in self.rows]
        return {"kind": self.kind, "name": self.name, "passed": self.passed, "checks": rows, "figures": self.figures}

    def to_text(self) -> str:
        """A line per check, then the figures and the verdict."""
        width = max(len(row.name) for row in self.rows)
        words = {True: "ok", False: "FAILED", None: "not run"}
        lines = [f"{self.kind}: {self.name}"]
        lines += [f"  {words[row.passed]:7}  {row.name:{width}}  {row.detail}" for row in self.rows]
        lines += [f"  {key}: {'none' if value is None else f'{value:.4g}'}" for key, value in self.figures.items()]
        done = sum(row.passed is True for row in self.rows)
        verdict = "conforms" if self.passed else f"does not conform: {', '.join(self.failures)}"
        return "\n".join([*lines, f"  {done} of {len(self.rows)} checks passed; it {verdict}."])


def run_conformance(
    adapter: Any,
    kind: Kind,
    *,
    opener: Callable[[], Any] | None = None,
    batch_size: int = 4,
    new_process: bool = True,
) -> ConformanceReport:
    """Run all checks on an adapter.

    Args:
        kind: "image" for an `ImageTokenizer`, "audio" for an `AudioCodec`.
        opener: opens the same adapter again, here and in a new process, so it must pickle; None pickles the adapter.
        batch_size: of the calls; from 2.
        new_process: false leaves out the check that starts one, which takes as long as opening the adapter.
    """
    if batch_size < 2:
        raise ValueError("batch_size must be 2 or more: neighbours are what is tested")
    subject = subject_of(adapter, kind, batch_size)
    state: dict[str, bool | None] = {}
    rows: list[Check] = []
    again: tuple[Row, ...] = (
        ("reopened", ("encode_neighbours",), functools.partial(_reopened, opener=opener)),
        ("other_process", ("reopened",), functools.partial(_other_process, opener=opener)),
    )
    for name, needs, run in (*CHECKS[kind], *again[: 2 if new_process else 1]):
        missing = [need for need in needs if not state[need]]
        row = Check(name, None, f"needs {', '.join(missing)}") if missing else _run(name, run, subject)
        state[name] = row.passed
        rows.append(row)
    usable = state["encode_result"] and state["decode_result"]
    return ConformanceReport(kind, type(adapter).__name__, tuple(rows), _figures(subject) if usable else {})


def run_conformance_for(config: "UTIConfig", *, download: bool = True) -> list[ConformanceReport]:
    """Open the image tokenizer and the audio codec that a uti.yaml names and check both, in this order."""
    from qwen3_vlm.tokenization.audio_codecs import open_audio_codec
    from qwen3_vlm.tokenization.image_tokenizers import open_image_tokenizer

    reports: list[ConformanceReport] = []
    if config.image is not None:
        open_image = functools.partial(open_image_tokenizer, config.image, download=download)
        reports.append(run_conformance(open_image(), "image", opener=open_image))
    if config.audio is not None:
        open_audio = functools.partial(open_audio_codec, config.audio, download=download)
        reports.append(run_conformance(open_audio(), "audio", opener=open_audio))
    return reports


def _run(name: str, run: Callable[[Subject], str], subject: Subject) -> Check:
    try:
        return Check(name, True, run(subject))
    except FaultError as failure:
        return Check(name, False, str(failure))
    except Exception as problem:  # whatever an adapter raises is its failure, to be told in its row
        reason = str(problem).strip().split("\n", 1)[0]
        return Check(name, False, f"{type(problem).__name__}: {reason}")


def _reopened(subject: Subject, opener: Callable[[], Any] | None) -> str:
    """Opened again (or sent through pickle), it is the same."""
    other = opener() if opener is not None else pickle.loads(pickle.dumps(subject.adapter))
    if other.weights_sha256 != subject.adapter.weights_sha256:
        raise FaultError(f"weights_sha256 is {other.weights_sha256[:12]}… the second time")
    check_sameness(subject, np.asarray(other.encode(subject.items.copy())), "after it was opened again")
    return "same weights_sha256, same ids"


def _other_process(subject: Subject, opener: Callable[[], Any] | None) -> str:
    """Opened in a new process, it gives the same ids there."""
    try:
        payload = pickle.dumps((opener, None) if opener is not None else (None, subject.adapter))
    except Exception as problem:  # pickle raises what the object's own methods raise
        raise FaultError(f"it can't be sent to a worker process ({problem}); give it a __reduce__") from problem
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_encode_elsewhere, args=(theirs, payload, subject.items), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(PROCESS_SECONDS):
            raise FaultError(f"no answer from a new process within {PROCESS_SECONDS} s")
        codes, problem_text = ours.recv()
    except EOFError as problem:
        raise FaultError("the new process died") from problem
    finally:
        ours.close()
        process.join(1)
        if process.is_alive():
            process.kill()
            process.join()
    if problem_text is not None:
        raise FaultError(f"in a new process: {problem_text}")
    check_sameness(subject, codes, "in a new process")
    return "same ids in a new process"


def _encode_elsewhere(connection: Connection, payload: bytes, items: NDArray[Any]) -> None:
    """Runs in the new process: sends (ids, None) or (None, what went wrong)."""
    try:
        opener, adapter = pickle.loads(payload)
        if opener is not None:
            adapter = opener()
        connection.send((np.asarray(adapter.encode(items)), None))
    except Exception as problem:  # told to the parent, whatever it is
        connection.send((None, f"{type(problem).__name__}: {problem}"))


def _figures(subject: Subject) -> dict[str, float | None]:
    """Not judged: do single calls agree with batches, how good and how fast is it (after the warm-up of the checks)."""
    items, count = subject.items, len(subject.items)
    start = time.perf_counter()
    codes = np.asarray(subject.adapter.encode(items.copy()))
    middle = time.perf_counter()
    decoded = np.asarray(subject.adapter.decode(codes))
    end = time.perf_counter()
    alone = np.concatenate([subject.adapter.encode(items[i : i + 1].copy()) for i in range(count)])
    figures: dict[str, float | None] = {"ids equal alone and in a batch": float(np.mean(alone == codes))}
    figures["encode, seconds per item"] = (middle - start) / count
    figures["decode, seconds per item"] = (end - middle) / count
    if subject.kind == "image":
        figures["PSNR of smooth and noisy pictures, dB"] = float(np.mean([*map(psnr, items, decoded)]))
    else:
        known = [value for value in map(snr_db, items, decoded) if value is not None]
        figures["SNR of tones and noise, dB"] = float(np.mean(known)) if known else None
    return figures
