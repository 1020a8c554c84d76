"""Who may import whom, read from the source; and that the cheap commands stay cheap."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qwen3_vlm"
BOTTOM = {"checks", "config", "errors", "fingerprint", "folder_lock", "storage"}
COMMANDS = BOTTOM | {"data", "demo", "evaluate", "generate", "models", "serve", "tokenization", "train"}
# Room → the rooms that it may import besides itself. A module that stands alone is a room of its own.
ALLOWED = {
    **dict.fromkeys(BOTTOM, BOTTOM),
    "models": BOTTOM | {"tokenization"},
    "tokenization": BOTTOM,
    "data": BOTTOM | {"tokenization"},
    "evaluate": BOTTOM | {"data", "models", "tokenization"},
    "generate": BOTTOM | {"models", "tokenization"},
    "train": BOTTOM | {"data", "evaluate", "generate", "models", "tokenization"},
    "serve": BOTTOM | {"data", "evaluate", "generate", "models", "tokenization", "train"},
    "demo": BOTTOM | {"data", "evaluate", "generate", "models", "tokenization", "train"},
    "cli": COMMANDS | {"cli_chat", "cli_data", "cli_eval", "cli_generate", "cli_plan", "cli_uti"},
    "cli_chat": COMMANDS | {"cli_uti"},
    "cli_data": COMMANDS,
    "cli_eval": COMMANDS,
    "cli_generate": COMMANDS | {"cli_uti"},
    "cli_plan": COMMANDS,
    "cli_uti": COMMANDS,
    "lmms_eval_model": BOTTOM | {"data", "evaluate", "models", "tokenization", "train"},
    "__init__": {"config", "errors", "evaluate", "generate", "models", "tokenization", "train"},  # behind __getattr__
    "__main__": {"cli"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute dotted names that a file imports anywhere, inside functions too, with their lines."""
    package = ("qwen3_vlm", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from qwen3_vlm import cli` names a room; `from qwen3_vlm.models import X` does not need X.
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_rooms_import_only_what_they_may(path: Path) -> None:
    room = room_of(path)
    assert room in ALLOWED, f"{name_of(path)} stands in a room without a rule; add {room} to ALLOWED."
    for module, line in imported_modules(path):
        parts = module.split(".")
        if parts[0] != "qwen3_vlm" or parts[1] == "__version__":
            continue
        assert parts[1] == room or parts[1] in ALLOWED[room], f"{name_of(path)}:{line} imports {module}"


def declared_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def ruff_order(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then the rest, as ruff's RUF022 sorts them."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    return kind, name


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_all_is_sorted_and_declared(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            assert names == sorted(set(names), key=ruff_order), (
                f"{name_of(path)}: __all__ is not sorted, or names one twice"
            )
            assert set(names) <= declared_names(tree), f"{name_of(path)}: __all__ names what is not there"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_depth_and_length(path: Path) -> None:
    assert len(path.relative_to(PACKAGE).parts) <= 2, f"{name_of(path)} is deeper than one folder in the package"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600, f"{name_of(path)} has more than 600 lines"


@pytest.mark.parametrize(
    "statement",
    [
        "import qwen3_vlm",
        "import qwen3_vlm.config, qwen3_vlm.errors, qwen3_vlm.storage",
        "from qwen3_vlm import Qwen3VLMError, load_config",
        "from qwen3_vlm.cli import main; main(['--help'])",
        "from qwen3_vlm.cli import main; main(['caption', '--help'])",
        "from qwen3_vlm.cli import main; main(['chat', '--help'])",
        "from qwen3_vlm.cli import main; main(['data', 'tokenize', '--help'])",
        "import qwen3_vlm.data.manifest, qwen3_vlm.data.manifest_import, qwen3_vlm.data.tokenize",
    ],
)
def test_cheap_things_do_not_import_torch(statement: str) -> None:
    heavy = "{'torch', 'transformers', 'accelerate', 'matplotlib'}"
    code = (
        f"import sys\ntry:\n    exec({statement!r})\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
    )
    code += f"loaded = {heavy} & set(sys.modules)\nassert not loaded, loaded\n"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert result.returncode == 0, result.stderr
