"""The same units of work on a Ray cluster, as a Ray Data pipeline with one actor per worker.

Every node must see the manifest, its media and the output folder at the same paths; shards are written by the
actors themselves, so no ids travel. The bytes are those that processes on one machine write.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Generator, Sequence
from typing import Any

from qwen3_vlm.data.tokenize_plan import Unit
from qwen3_vlm.data.worker_pool import ONE_THREAD, Event, Work
from qwen3_vlm.errors import DataError, Qwen3VLMError

RETRIES = {"max_restarts": 1, "max_task_retries": 1}  # a unit that kills its worker is tried once more


class _Tokenizing:
    """An actor: opens the tokenizers once, then takes one unit at a time."""

    def __init__(self, start: Callable[[], Work]) -> None:
        os.environ.update(ONE_THREAD)
        self._work = start()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (split,), (number,), (first,), (records,) = (
            batch[name].tolist() for name in ("split", "number", "start", "records")
        )
        good, bad = self._work(Unit(split, number, first, records), lambda count: None)
        return {**batch, "good": [good], "bad": [bad]}


def run_on_ray(start: Callable[[], Work], units: Sequence[Unit], workers: int) -> Generator[Event[Unit], None, None]:
    """Work off units on the cluster that Ray is connected to, or on a local Ray that is shut down afterwards.

    RAY_ADDRESS names a running cluster, as for any Ray program.

    Raises:
        DataError: Ray is not installed, or a worker failed for good.
    """
    try:
        import ray
    except ImportError as error:
        raise DataError("The engine ray needs Ray: pip install 'qwen3-vlm[ray]'.") from error
    with _connected(workers):
        rows = [
            {"split": unit.split, "number": unit.number, "start": unit.start, "records": unit.records} for unit in units
        ]
        try:
            results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                _Tokenizing,
                fn_constructor_args=(start,),
                batch_size=1,
                num_cpus=1,
                ray_remote_args_fn=lambda: RETRIES,
                compute=ray.data.ActorPoolStrategy(size=min(workers, len(units))),
            )
            for row in results.iter_rows():
                unit = Unit(row["split"], row["number"], row["start"], row["records"])
                yield Event(unit, unit.records)
                yield Event(unit, done=True, result=(row["good"], row["bad"]))
        except ray.exceptions.RayError as error:
            raise _sentence(error) from error


@contextlib.contextmanager
def _connected(workers: int) -> Generator[None, None, None]:
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"include_dashboard": False, "configure_logging": False, "log_to_driver": False}
    here: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers + 1}  # one for Ray Data itself
    ray.init(runtime_env={"env_vars": ONE_THREAD}, **quiet, **here)
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before, level = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False  # there is one of ours
    logger.setLevel(logging.CRITICAL + 1)  # what went wrong is raised, and becomes one sentence
    try:
        yield
    finally:
        context.enable_progress_bars = before
        logger.setLevel(level)
        ray.shutdown()


def _sentence(error: BaseException) -> Qwen3VLMError:
    """Our own error out of Ray's wrapping, or a sentence about what Ray says."""
    cause: BaseException | None = error
    while cause is not None:
        inner = getattr(cause, "cause", None)
        if isinstance(inner, Qwen3VLMError):
            return inner
        cause = inner if isinstance(inner, BaseException) else cause.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return DataError(f"A Ray worker failed: {' '.join(lines[-1:])[:500]}")
