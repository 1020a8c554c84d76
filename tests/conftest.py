"""Fixtures shared by all tests: tiny bases on disk, the model over them; one thread, no network."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.tiny import PASSED_GATE, TINY_CONNECTOR, save_tiny_llm, save_tiny_tower

Run = Callable[..., tuple[int, str, str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked slow go first, so that no worker is left with one when the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="session")
def tiny_tower_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture
def tiny_vlm(tiny_llm_dir: Path, tiny_tower_dir: Path) -> tuple[Any, Any]:
    """A fresh (model, processor) in fp32 with 4 latents per picture; its connector is not near zero."""
    from qwen3_vlm.models.bases import load_bases

    torch.manual_seed(2)
    model, processor = load_bases(
        tiny_llm_dir, tiny_tower_dir, dtype=torch.float32, initializer_range=0.2, **TINY_CONNECTOR
    )
    return model.eval(), processor


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the command line in this process → exit status, stdout, stderr."""
    from qwen3_vlm import cli

    monkeypatch.delenv(cli.DEBUG_VARIABLE, raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err + captured.out
        return int(stop.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def connector(tiny_vlm: tuple[Any, Any], tiny_llm_dir: Path, tiny_tower_dir: Path, tmp_path: Path) -> Path:
    """A connector directory with a gate that passed."""
    from qwen3_vlm.train.add_ons import save_connector
    from qwen3_vlm.train.identity import describe_bases

    model, processor = tiny_vlm
    return save_connector(
        tmp_path / "connector",
        model,
        describe_bases(tiny_llm_dir, tiny_tower_dir, processor),
        evidence={"format": 1, "gates": [PASSED_GATE]},
        details={"stage": "stage1_align", "step": 7, "dtype": "float32"},
    )


@pytest.fixture(scope="module")
def add_ons(tmp_path_factory: pytest.TempPathFactory, tiny_llm_dir: Path, tiny_tower_dir: Path) -> dict[str, Path]:
    """A connector and rows of one base, with an adapter each."""
    from tests.models.tiny_omni import save_connector_of, save_rows_of
    from tests.tokenization.plain_codecs import plain_uti

    home = tmp_path_factory.mktemp("add_ons")
    connector = save_connector_of(home / "connector", tiny_llm_dir, tiny_tower_dir)
    return {"connector": connector, "rows": save_rows_of(home / "rows", tiny_llm_dir, plain_uti())}


@pytest.fixture(scope="module")
def omni(add_ons: dict[str, Path]) -> Any:
    """Both in one model."""
    from qwen3_vlm.train.omni_files import load_omni
    from tests.tokenization.plain_codecs import plain_uti

    return load_omni(add_ons["connector"], add_ons["rows"], uti=plain_uti())


@pytest.fixture(scope="module")
def seer(add_ons: dict[str, Path]) -> tuple[Any, Any]:
    """The connector and its adapter alone."""
    from qwen3_vlm.train.add_ons import load_vlm

    return load_vlm(add_ons["connector"])


@pytest.fixture(scope="module")
def speaker(add_ons: dict[str, Path]) -> Any:
    """The rows and their adapter alone."""
    from qwen3_vlm.models.token_lm import TokenLM

    return TokenLM.from_add_on(add_ons["rows"])
