"""The public names: complete, sorted, lazy, and the same for the interpreter and for type checkers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qwen3_vlm
from qwen3_vlm import errors

SOURCE = Path(qwen3_vlm.__file__)


def names_for_type_checkers() -> set[str]:
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    return {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}


@pytest.mark.parametrize("name", qwen3_vlm.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(qwen3_vlm, name) is not None


def test_all_is_complete_and_sorted() -> None:
    assert list(qwen3_vlm.__all__) == sorted(qwen3_vlm.__all__)
    assert set(qwen3_vlm.__all__) == names_for_type_checkers() | {"__version__"}
    assert set(qwen3_vlm.__all__) <= set(dir(qwen3_vlm))


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Qwen4VLM'"):
        _ = qwen3_vlm.Qwen4VLM  # type: ignore[attr-defined]
    assert not hasattr(qwen3_vlm, "nothing")


def test_errors_are_all_public_and_all_ours() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and not name.startswith("_")}
    assert set(errors.__all__) == defined
    assert all(issubclass(getattr(errors, name), errors.Qwen3VLMError) for name in defined)
    assert all(name in (errors.__doc__ or "") for name in defined), "the tree in the docstring names each of them"


def test_the_package_is_typed() -> None:
    assert (SOURCE.parent / "py.typed").exists()


def test_python_dash_m_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "qwen3_vlm", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"qwen3-vlm {qwen3_vlm.__version__}\n")
