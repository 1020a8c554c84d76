"""The same units on a local Ray: the same bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_vlm.data.tokenize import tokenize_manifest
from tests.data.speaking_pictures import save_tokenizers, write_speaking_pictures
from tests.data.test_tokenize import contents

RAY = {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """In a process of its own: Ray opens sockets of its own kinds and leaves threads behind."""
    return subprocess.run(
        [sys.executable, "-m", "qwen3_vlm", "data", "tokenize", *map(str, arguments), "--engine", "ray"],
        capture_output=True,
        text=True,
        env=os.environ | RAY,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_writes_the_same_bytes_and_goes_on(tmp_path: Path) -> None:
    uti_file = save_tokenizers(tmp_path / "tokenizers")
    manifest = write_speaking_pictures(tmp_path / "data", 40)
    tokenize_manifest(manifest, tmp_path / "here", uti_file, workers=0, shard_records=8, download=False)
    out = tmp_path / "ray"
    first = run(manifest, out, "--uti", uti_file, "--workers", 2, "--shard-records", 8)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "40/40" in first.stderr
    assert contents(out) == contents(tmp_path / "here")
    (out / "shards" / "train-000001.report.json").unlink()
    (uti_file.parent / "llm" / "tokenizer.json").unlink()  # what an actor raises arrives as its sentence
    second = run(manifest, out, "--uti", uti_file, "--workers", 1, "--shard-records", 8)
    assert second.returncode == 1
    assert second.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in second.stderr
