"""Where the demo's files are, and how its command was called."""

import shlex
import sys
from pathlib import Path

BASES = Path(__file__).parent / "bases"
CONFIGS = Path(__file__).parents[2] / "configs"


def running_command() -> str:
    """How to call the command that is running: it may lie in a .venv that no shell knows of."""
    path = Path(sys.argv[0])
    if path.name != "qwen3-vlm" or not path.is_file():
        return "qwen3-vlm"
    path = path.absolute()
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))
