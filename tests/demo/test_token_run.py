"""The second half of the guided run: its parts that need no training."""

import json
from pathlib import Path

import pytest

from qwen3_vlm.demo.dataset import DemoSizes, build
from qwen3_vlm.demo.facts import score
from qwen3_vlm.demo.token_run import (
    HELD_OUT,
    TRAINING,
    exact_share,
    read_manifest,
    results_table,
    token_config,
    tokenize_data,
    write_results,
)
from qwen3_vlm.train.token_source import check_token_folders, open_tokens


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    build(folder / "data", DemoSizes(train=24, unseen=6, seen=2, phrases=9, phrases_unseen=6))
    return folder


@pytest.mark.slow
def test_the_data_set_becomes_audited_tokens_for_every_task(out: Path) -> None:
    folders = tokenize_data(out, workers=0)
    assert [folder.name for folder in folders] == [*TRAINING, *HELD_OUT]
    config = token_config(out, folders)
    source = open_tokens(config, check_token_folders(config.tokens))
    assert set(source.tasks) == {"i2t", "a2t", "t2i", "t2a"}
    assert len(source.shares["i2t"].indices) == 24
    assert len(source.held_out["i2t"]) == 6
    assert len(source.shares["a2t"].indices) == 9
    trained = {source.train[int(index)].text for index in source.shares["i2t"].indices}
    assert not trained & {source.eval[int(index)].text for index in source.held_out["i2t"]}


def test_manifests_are_read_with_what_they_name(out: Path) -> None:
    pictures, phrases = (read_manifest(out / "data" / f"manifest_{name}.jsonl") for name in HELD_OUT)
    assert pictures[0]["image"].size == (64, 64)
    waveform, rate = phrases[0]["audio"]
    assert rate == 16_000
    assert waveform.shape[-1] > 1_000
    assert all(record["text"] for record in [*pictures, *phrases])


def test_results_become_tables(tmp_path: Path) -> None:
    caption = "a small cat left of a big apple on a blue background"
    scores = score([caption, "a small cat"], [caption, caption])
    results = {
        "i2t": scores,
        "t2i": scores,
        "a2t": exact_share(["a", "b"], ["a", "c"]),
        "t2a": exact_share(["a"], ["a"]),
    }
    write_results(tmp_path, results)
    sounds = json.loads((tmp_path / "results" / "held_out_sounds.json").read_text())
    assert [row["right, %"].split()[0] for row in sounds["rows"]] == ["50.0", "100.0"]
    assert results_table(results).row_count == 2 + 2 * len(scores.facts) + 2
