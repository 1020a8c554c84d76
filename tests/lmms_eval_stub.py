"""What lmms-eval 0.7.3 asks of a model class, where that package is not installed: its base class and its registry.

Written after lmms_eval/api/model.py, lmms_eval/api/instance.py and lmms_eval/models/registry_v2.py of that version,
with their names, abstract methods and checks. `install` leaves a real lmms-eval alone.
"""

import abc
import importlib.util
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


def install(monkeypatch: Any) -> bool:
    """Make `lmms_eval` importable; true where it is the real one."""
    if importlib.util.find_spec("lmms_eval") is not None:
        return True
    modules = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.api.instance": {"Instance": Instance},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return False


class CacheHook:
    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        pass


class lmms(abc.ABC):  # noqa: N801  # its name there
    is_simple: bool = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook()
        self.task_dict: dict[str, Any] = {}

    @staticmethod
    def _resolve_system_prompt(value: str) -> str:
        return value

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        arguments = dict(part.split("=", 1) for part in arg_string.split(",") if part)
        return cls(**arguments, **{key: value for key, value in (additional_config or {}).items() if value is not None})

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size


@dataclass
class Instance:
    request_type: str
    arguments: tuple[Any, ...]
    idx: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()
