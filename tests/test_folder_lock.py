"""One run at a time in a folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_vlm.errors import StorageError
from qwen3_vlm.folder_lock import FolderLock
from qwen3_vlm.train.train_utils import train
from tests.train.tiny_run import tiny_config, write_records

OTHER_RUN = """
import sys, time
from pathlib import Path
from qwen3_vlm.folder_lock import FolderLock
with FolderLock() as lock:
    lock.acquire(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", OTHER_RUN, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_before_it_touches_anything(
    tiny_llm_dir: Path, tiny_tower_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    being_written = folder / ".report.html.1-ab.partial"
    being_written.touch()
    (folder / "metrics.jsonl").write_text("{}\n")
    config = tiny_config(folder, tiny_llm_dir, tiny_tower_dir, write_records(tmp_path / "records", 4))
    other = hold(folder)
    try:
        for resume in (True, False):
            with pytest.raises(StorageError, match=f"Another run is writing to {folder}"):
                train(
                    tiny_config(
                        folder,
                        *map(Path, (config.model.llm, config.model.vision_tower)),
                        Path(config.data.train[0]),
                        resume=resume,
                    )
                )
        assert being_written.exists()
        assert (folder / "metrics.jsonl").read_text() == "{}\n"
    finally:
        other.kill()
        other.communicate()
    with FolderLock() as lock:  # a killed process leaves no lock behind
        lock.acquire(folder)


def test_the_lock_is_let_go_at_the_end(tmp_path: Path) -> None:
    with FolderLock() as lock:
        lock.acquire(tmp_path)
    other = hold(tmp_path)
    other.kill()
    other.communicate()


def test_systems_without_locks_go_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    with FolderLock() as lock:
        lock.acquire(tmp_path)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with FolderLock() as lock:
        lock.acquire(tmp_path)
