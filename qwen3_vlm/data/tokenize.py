"""From a manifest to a tokenized data set, on all cores or a cluster, and on from where it stopped.

    manifest.jsonl ──plan──> units ──workers──> shards/*.tar, *.index.npy, *.report.json
                                   ──gather──> stats.json, tokenize_errors.jsonl, dataset.json

A unit is done when its report is there and the hashes in it fit; everything is written under a temporary name
and renamed. So whatever moment a run is killed at, the next one does what is left and ends with the same bytes.
`dataset.json` comes last: where it is, the data set is complete.
"""

import contextlib
import functools
import os
import signal
import threading
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from qwen3_vlm.config import DataConfig
from qwen3_vlm.data import tokenize_plan as plans
from qwen3_vlm.data.manifest import open_manifest
from qwen3_vlm.data.shards import read_report, write_dataset
from qwen3_vlm.data.tokenize_plan import DEFAULT_FRACTIONS, Plan, Unit, make_plan
from qwen3_vlm.data.tokenize_report import ERRORS_NAME, STATS_NAME, Statistics, gather, write_errors, write_stats
from qwen3_vlm.data.worker_pool import Event, Tell, Work, WorkerPool
from qwen3_vlm.errors import ConfigError, DataError
from qwen3_vlm.fingerprint import fingerprint_file
from qwen3_vlm.folder_lock import FolderLock
from qwen3_vlm.storage import remove_leftovers
from qwen3_vlm.tokenization.token_space import FILE_NAME, HASH_NAME, TokenSpace
from qwen3_vlm.tokenization.uti_config import CONFIG_NAME, load_uti_config

if TYPE_CHECKING:
    from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer

DEFAULT_SHARD_RECORDS = 1_000
SHARD_SUFFIXES = (".tar", ".index.npy", ".report.json")
OWN_FILES = ("audit.json", STATS_NAME, ERRORS_NAME, plans.LINES_NAME)
UTI_FILES = (CONFIG_NAME, FILE_NAME, HASH_NAME)

Engine = Literal["processes", "ray"]


@dataclass(frozen=True, slots=True)
class TokenizeResult:
    """How a run ended. `total` and `dataset_sha256` are there when it is `finished`."""

    out: Path
    units: int
    units_done: int  # of all, by this run or an earlier one
    finished: bool
    total: Statistics | None = None
    splits: Mapping[str, Statistics] | None = None
    dataset_sha256: str = ""

    def table(self) -> str:
        """What to tell the user."""
        if not self.finished or self.total is None or self.splits is None:
            return (
                f"Stopped with {self.units_done:,} of {self.units:,} units done. Nothing is lost: "
                "the same command goes on from there."
            )
        return "\n".join([*_summary(self.total, self.splits), *_where(self.out, self.total)])


def tokenize_manifest(
    manifest: str | Path,
    out: str | Path,
    uti_config: str | Path,
    overrides: Sequence[str] = (),
    *,
    workers: int = 1,
    engine: Engine = "processes",
    shard_records: int = DEFAULT_SHARD_RECORDS,
    fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
    max_bad_fraction: float = 1.0,
    max_image_pixels: int | None = None,
    restart: bool = False,
    download: bool = True,
    progress: bool = False,
) -> TokenizeResult:
    """Tokenize what a manifest names into `out`, or go on with what is there.

    Args:
        uti_config: a uti.yaml, or a folder with one; `overrides` are `key=value` settings of it.
        workers: processes, or Ray actors; 0 works in this process.
        shard_records: lines of the manifest per shard.
        fractions: shares of "val" and "test"; a record's split follows from its id alone (`shards.split_of`).
        max_bad_fraction: stop when more of the manifest's records than this can't be used; 1 never stops.
        restart: remove what `out` holds of an earlier run.

    Raises:
        DataError: the manifest can't be used, `out` was begun with other settings, too many records are bad.
        ConfigError, ModelError, TokenSpaceError: the tokenizers can't be loaded, or are not those of `out`.
        StorageError: the disk is full, or another run is writing to `out`.
    """
    manifest, out = Path(manifest), Path(os.path.abspath(out))  # a worker on a cluster may stand elsewhere
    _check(workers, engine, max_bad_fraction)
    plans.complete_fractions(fractions)
    open_manifest(manifest).close()  # before anything is loaded or written
    with FolderLock() as lock:
        try:
            (out / "shards").mkdir(parents=True, exist_ok=True)
            lock.acquire(out)
        except OSError as error:
            raise DataError(f"{out} can't be used as a folder to write to: {error.strerror or error}.") from error
        for folder in (out, out / "shards"):
            remove_leftovers(folder)
        limits = {"max_image_pixels": max_image_pixels or DataConfig().max_image_pixels}
        plan = _prepare(
            manifest, out, uti_config, overrides, shard_records, fractions, limits, restart=restart, download=download
        )
        run = _Run(plan, workers, engine, max_bad_fraction, download, progress)
        try:
            with _interruptible():
                run.work()
        except KeyboardInterrupt:
            return TokenizeResult(out, plan.num_units, run.units_done, finished=False)
        finally:
            remove_leftovers(out / "shards")
        return _finish(plan)


def run_tokenize(
    manifest: Path,
    out: Path,
    uti_config: Path,
    overrides: Sequence[str] = (),
    *,
    workers: int | None = None,
    **settings: Any,
) -> bool:
    """What `qwen3-vlm data tokenize` does: tokenize with a progress bar and print what came out → is it finished?

    `workers` None takes one per core; for the rest and the errors see `tokenize_manifest`.
    """
    count = num_cores() if workers is None else workers
    result = tokenize_manifest(manifest, out, uti_config, overrides, workers=count, progress=True, **settings)
    print(result.table())
    return result.finished


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_worker(plan: Plan, download: bool) -> Work:
    """Load the data set's own tokenizers → the function that works off a unit; called once in each worker."""
    import torch

    from qwen3_vlm.data.tokenize_unit import tokenize_unit
    from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer

    torch.set_num_threads(1)
    uti = UnifiedTokenizer.open(plan.out, download=download)

    def work(unit: Unit, tell: Tell) -> tuple[int, int]:
        report = tokenize_unit(plan, unit, uti, tell)
        return int(report["records"]), len(report["errors"])

    return work


class _Run:
    """The units that are left, worked off by one of the engines."""

    def __init__(
        self, plan: Plan, workers: int, engine: Engine, max_bad_fraction: float, download: bool, progress: bool
    ) -> None:
        self.plan, self.workers, self.engine = plan, workers, engine
        self.max_bad = max_bad_fraction * plan.records
        self.start = functools.partial(open_worker, plan, download)
        self.progress = progress
        self.units_done = self.bad = 0

    def work(self) -> None:
        """Do all units that are not done.

        Raises:
            DataError: too many bad records, or a unit that kills its workers.
        """
        left, records_done = self._look()
        if not left:
            return
        with self._bar(records_done) as bar, contextlib.closing(self._events(left)) as events:
            for event in events:
                bar.update(event.count)
                if event.done:
                    self.units_done += 1
                    self._count_bad(event.result[1])

    def _look(self) -> tuple[list[Unit], int]:
        """Units to do (a few numbers each), and the records of those that are done."""
        left, records = [], 0
        for unit in self.plan.units():
            report = read_report(self.plan.out, unit.split, unit.number)
            if report is None or report.get("plan_sha256") != self.plan.sha256:
                left.append(unit)
                continue
            self.units_done += 1
            records += unit.records
            self._count_bad(len(report["errors"]))
        return left, records

    def _events(self, units: list[Unit]) -> Generator[Event[Unit], None, None]:
        if self.engine == "ray":
            from qwen3_vlm.data.tokenize_ray import run_on_ray

            yield from run_on_ray(self.start, units, self.workers)
        elif self.workers == 0:
            yield from _run_here(self.start, units)
        else:
            with WorkerPool[Unit](min(self.workers, len(units)), self.start) as pool:
                yield from pool.run(units)

    def _count_bad(self, count: int) -> None:
        self.bad += count
        if self.bad > self.max_bad:
            path = write_errors(self.plan)
            raise DataError(
                f"{self.bad:,} of {self.plan.records:,} records can't be used, more than max_bad_fraction allows "
                f"({self.max_bad / self.plan.records:g}). What is wrong with them stands in {path}."
            )

    def _bar(self, records_done: int) -> Any:
        from tqdm import tqdm

        # `initial` keeps resumed records out of the rate and of the time that is left.
        return tqdm(
            desc="tokenizing",
            total=self.plan.records,
            initial=records_done,
            unit="records",
            smoothing=0.1,
            disable=not self.progress,
        )


def _run_here(start: Any, units: Sequence[Unit]) -> Generator[Event[Unit], None, None]:
    import torch

    threads = torch.get_num_threads()
    try:
        work = start()
        for unit in units:
            result = work(unit, lambda count: None)
            yield Event(unit, unit.records)
            yield Event(unit, done=True, result=result)
    finally:
        torch.set_num_threads(threads)


# Before and after ------------------------------------------------------------------------------------------


def _prepare(
    manifest: Path,
    out: Path,
    uti_config: str | Path,
    overrides: Sequence[str],
    shard_records: int,
    fractions: Mapping[str, float],
    limits: Mapping[str, Any],
    *,
    restart: bool,
    download: bool,
) -> Plan:
    """The plan, after a look whether `out` may be gone on with; a fresh folder gets its uti.yaml and token space."""
    config = asdict(load_uti_config(uti_config, overrides))
    if restart and plans.read_plan_settings(out) is not None:
        _remove_earlier(out, keep=(CONFIG_NAME,) if Path(uti_config).resolve() in _places(out) else ())
    begun = plans.read_plan_settings(out)
    if begun is None:
        own = restart or Path(uti_config).resolve() in _places(out)
        _require_empty(out, None if own else config)
        uti = _open_tokenizer(uti_config, overrides, download=download)
        if (out / FILE_NAME).is_file() and not own:
            TokenSpace.load(out).require_same(uti.token_space, f"What {uti_config} loads, for {out}")
        uti.save(out)
    else:
        plans.require_same(out, plans.differences(asdict(load_uti_config(out)), config, "uti.yaml: "))
    about = {
        "limits": dict(limits),
        "uti_sha256": fingerprint_file(out / CONFIG_NAME),
        "token_space_sha256": TokenSpace.load(out).sha256,
    }
    plan = make_plan(manifest, out, fractions=fractions, shard_records=shard_records, settings=about, begun=begun)
    if begun is None:
        plans.write_plan(plan)
    return plan


def _open_tokenizer(uti_config: str | Path, overrides: Sequence[str], *, download: bool) -> "UnifiedTokenizer":
    from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer

    return UnifiedTokenizer.open(uti_config, overrides, download=download)


def _finish(plan: Plan) -> TokenizeResult:
    """Gather what the units found; dataset.json comes last."""
    plan.require_manifest()
    splits = gather(plan)
    write_errors(plan)
    total = write_stats(plan, splits)
    if not total.records:
        raise DataError(
            f"None of the {plan.records:,} records could be tokenized ({_reasons(total.reasons)}). "
            f"See {plan.out / ERRORS_NAME}."
        )
    sha256 = write_dataset(plan.out, TokenSpace.load(plan.out), settings=plan.settings)
    (plan.out / plans.LINES_NAME).unlink(missing_ok=True)
    return TokenizeResult(plan.out, plan.num_units, plan.num_units, True, total, splits, sha256)


def _check(workers: int, engine: str, max_bad_fraction: float) -> None:
    if engine not in ("processes", "ray"):
        raise ConfigError(f"engine is {engine!r}; it must be processes or ray.")
    if not 0 <= workers <= 10_000 or (engine == "ray" and not workers):
        raise ConfigError(f"workers is {workers}; at least one is needed (0 works in this process, without Ray).")
    if not 0 <= max_bad_fraction <= 1:
        raise ConfigError(f"max_bad_fraction is {max_bad_fraction}; it must lie in 0…1.")


def _require_empty(out: Path, config: Mapping[str, Any] | None) -> None:
    """Refuse a folder whose shards, or whose uti.yaml of other settings than `config`, would be written over."""
    found = next((path.name for path in _shard_files(out)), None)
    if found is not None:
        raise DataError(
            f"{out} holds shards ({found}) but no {plans.PLAN_NAME} that says what they are. Give another folder."
        )
    if config is not None and (out / CONFIG_NAME).is_file():
        lines = plans.differences(asdict(load_uti_config(out)), config)
        if lines:
            raise DataError(
                f"{out} holds another {CONFIG_NAME}, which would be written over:\n  "
                + "\n  ".join(lines)
                + "\nGive another folder, or write over it with --restart."
            )


def _remove_earlier(out: Path, keep: Sequence[str]) -> None:
    for path in [out / "dataset.json", *_shard_files(out)]:
        path.unlink(missing_ok=True)
    for name in (
        *OWN_FILES,
        *sorted(set(UTI_FILES) - set(keep)),
        plans.PLAN_NAME,
    ):  # the plan last: until then it holds
        (out / name).unlink(missing_ok=True)


def _shard_files(out: Path) -> Iterator[Path]:
    return (path for path in sorted((out / "shards").iterdir()) if path.name.endswith(SHARD_SUFFIXES))


def _places(out: Path) -> tuple[Path, ...]:
    return out.resolve(), (out / CONFIG_NAME).resolve()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: workers are ended, files are left whole."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# The summary -----------------------------------------------------------------------------------------------


def _summary(total: Statistics, splits: Mapping[str, Statistics]) -> Iterator[str]:
    columns = [*splits.items(), ("all", total)]
    yield f"{'':<18}" + "".join(f"{name:>14}" for name, _ in columns)
    rows: dict[str, list[str]] = {
        "records": [f"{found.records:,}" for _, found in columns],
        "left out": [f"{found.errors:,}" for _, found in columns],
    }
    for modality in ("text", "image", "audio"):
        if total.tokens[modality]:
            rows[f"{modality} ids"] = [f"{found.tokens[modality]:,}" for _, found in columns]
    if total.audio_samples:
        rows["hours of sound"] = [f"{found.audio_hours:,.3f}" for _, found in columns]
    yield from (f"{name:<18}" + "".join(f"{cell:>14}" for cell in cells) for name, cells in rows.items())
    for reason, count in sorted(total.reasons.items(), key=lambda item: (-item[1], item[0])):
        yield f"  {count:,} left out: {reason}"


def _where(out: Path, total: Statistics) -> Iterator[str]:
    if total.errors:
        yield f"What is wrong with them: {out / ERRORS_NAME}"
    yield f"Data set: {out} (lengths and counts in {STATS_NAME})"
    yield f"Next: qwen3-vlm data audit {out}"


def _reasons(reasons: Counter[str]) -> str:
    return ", ".join(f"{count:,} × {reason}" for reason, count in reasons.most_common(5))
