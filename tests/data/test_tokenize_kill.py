"""kill -9 at random moments, and on again: the bytes are those of a run that nobody disturbed."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from qwen3_vlm.data.tokenize import tokenize_manifest
from tests.data.speaking_pictures import save_tokenizers, write_speaking_pictures
from tests.data.test_tokenize import contents

SHARD_RECORDS = 4
KILLS = int(os.environ.get("KILLS", "4"))  # KILLS=20 takes three minutes
RECORDS = 18 * KILLS + 52


class Run:
    """One `qwen3-vlm data tokenize` with two workers, in a session of its own."""

    def __init__(self, manifest: Path, out: Path, uti_file: Path) -> None:
        arguments = [manifest, out, "--uti", uti_file, "--workers", 2, "--shard-records", SHARD_RECORDS]
        self.shards = out / "shards"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qwen3_vlm", "data", "tokenize", *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def wait_for_work(self) -> None:
        """Until a file appears or disappears among the shards."""
        before = self._state()
        while self.process.poll() is None and self._state() == before:
            time.sleep(0.002)

    def _state(self) -> list[str]:
        return sorted(os.listdir(self.shards)) if self.shards.is_dir() else []

    def family(self) -> list[psutil.Process]:
        """The process and its workers."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def kill_group(self) -> None:
        """As when a container is ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def kill_parent(self) -> None:
        """Its workers must end by themselves, at once."""
        family = self.family()
        self.process.kill()
        self.process.communicate()
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive, "workers outlive their parent"

    def kill_worker(self) -> None:
        """As when the memory is full. The run goes on; then it is ended too."""
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                if "spawn_main" in " ".join(process.cmdline()):
                    process.kill()
                    break
        self.wait_for_work()
        self.kill_group()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_runs_end_with_the_bytes_of_an_undisturbed_one(tmp_path: Path) -> None:
    uti_file = save_tokenizers(tmp_path / "tokenizers")
    manifest = write_speaking_pictures(tmp_path / "data", RECORDS)
    text = manifest.read_text().splitlines()
    text[7] = '{"id": "r7", "text": "no JSON'  # there is something to say in reports and error lists too
    text[99] = text[98]
    manifest.write_text("\n".join(text) + "\n")
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10**9))
    print(f"KILL_SEED={seed}")  # shown if it fails
    generator = random.Random(seed)
    out = tmp_path / "killed"
    halves = 0
    for number in range(KILLS):
        run = Run(manifest, out, uti_file)
        if number < 2:  # anywhere, also while it reads the manifest and loads the tokenizers
            time.sleep(generator.uniform(0.1, 6.0))
        else:
            run.wait_for_work()
            time.sleep(generator.uniform(0, 0.4))
        generator.choice([run.kill_group, run.kill_group, run.kill_parent, run.kill_worker])()
        halves += bool(list(out.rglob("*.partial")))
        assert not (out / "dataset.json").exists(), "it was done before it was killed often enough"
    last = Run(manifest, out, uti_file)
    _, noise = last.process.communicate()
    assert last.process.returncode == 0, noise.decode()[-2000:]
    settings = {"shard_records": SHARD_RECORDS, "download": False}
    tokenize_manifest(manifest, tmp_path / "undisturbed", uti_file, workers=0, **settings)
    killed, undisturbed = contents(out), contents(tmp_path / "undisturbed")
    assert sorted(killed) == sorted(undisturbed)
    assert killed == undisturbed
    assert len([name for name in killed if name.endswith(".report.json")]) >= RECORDS // SHARD_RECORDS
    print(f"{halves} of {KILLS} kills left a half-written file behind")
