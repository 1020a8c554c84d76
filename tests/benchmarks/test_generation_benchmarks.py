"""The benchmarks of generation run end to end at a tiny size."""

from pathlib import Path

import pytest

from tests.benchmarks.test_benchmarks import run


@pytest.mark.slow
def test_valid_ids_counts_what_decodes(tmp_path: Path) -> None:
    sizes = ["--samples", 12, "--without", 6, "--batch-size", 8, "--max-frames", 2, "--threads", 1]
    result = run("valid_ids.py", tmp_path / "result.json", *sizes)
    for target, least, most in (("image", 64, 64), ("audio", 4, 8)):
        with_grammar, without = result[target]["grammar"], result[target]["without"]
        assert (with_grammar["answers"], with_grammar["decoded"], with_grammar["refused"]) == (12, 12, {})
        assert with_grammar["different"] == 12
        assert least <= with_grammar["ids"]["least"] <= with_grammar["ids"]["most"] <= most
        assert without["decoded"] + sum(without["refused"].values()) == without["answers"] == 6


@pytest.mark.slow
def test_decoding_compares_the_same_ids(tmp_path: Path) -> None:
    sizes = ["--layers", 1, "--width", 128, "--base-rows", 2000, "--side", 2, "--batch-sizes", 2, "--rounds", 1]
    result = run("decoding.py", tmp_path / "result.json", *sizes, "--threads", 1)
    assert result["ids"] == 2000 + 64 + 16_384 + 4 * 1024
    assert result["batch_2"]["steps"] == 2 * 2 + 1
    assert result["batch_2"]["same_ids"] is True
    assert all(value > 0 for value in result["batch_2"]["speed"].values())
