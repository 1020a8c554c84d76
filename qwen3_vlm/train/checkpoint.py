"""Training state on disk: complete or not there, and enough to go on bit for bit.

A checkpoint is an add-on directory (so it can be used and verified as it is) plus

    optimizer.safetensors   `exp_avg/…`, `exp_avg_sq/…`, `step/…` of every trainable parameter
    state.json              step, position in the data, counters, lengths of the logs, RNG states, config

It is written under a temporary name and renamed, the newest good one is found again, torn ones are
passed over. JSON and safetensors only: nothing is unpickled.
"""

import base64
import json
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from qwen3_vlm.config import UNREAD
from qwen3_vlm.errors import CheckpointError, Qwen3VLMError
from qwen3_vlm.fingerprint import fingerprint_file
from qwen3_vlm.storage import atomic_directory, atomic_file, atomic_write_json, read_json, remove_leftovers
from qwen3_vlm.train.connector_files import TENSORS, read_info
from qwen3_vlm.train.stages import trainable_parameters

FORMAT = 2
OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{6,})")

# What may change between a run and its resumption without changing what is learned. Bases and data
# are compared by fingerprint, not by path; accumulation × ranks is compared as one figure.
_FREE = {
    "": {"output_dir", "save_every", "keep_checkpoints", "log_every", "tensorboard", "resume", "eval", "sweep"},
    "model": {"llm", "vision_tower", "connector", "attn_implementation", "gradient_checkpointing", "trust_remote_code"},
    "data": {"train", "eval", "image_root", "num_workers", "max_image_pixels", "max_bad_fraction", "feature_cache"},
    "lora": {"max_text_kl", "max_perplexity_ratio"},
    "trunk": set(),
    "text": {"files"},
    "rows": {"add_on"},
    "tokens": {"folders", "allow_unaudited", "eval_split", "eval_max", "num_workers", "max_bad_fraction"},
    "optim": {"accumulation"},
}
# Settings that older checkpoints do not have, and what was done without them.
_LATER = {
    "model.quantization": None,
    "lora.kl_weight": 0.0,
    "trunk.training": "lora",
    "trunk.learning_rate": None,
    "text.share": 0.1,
    "text.loss_weight": 1.0,
}


@dataclass(frozen=True, slots=True)
class SavedState:
    """A checkpoint that was found good. `values` is its state.json."""

    folder: Path
    step: int
    values: dict[str, Any]


class Checkpoints:
    """The `checkpoints/` folder of a run.

    Args:
        folder: made when the first checkpoint is saved.
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: str | Path, keep: int) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def save(
        self,
        step: int,
        values: Mapping[str, Any],
        optimizer_tensors: Mapping[str, Tensor],
        write_add_on: Callable[[Path], None],
    ) -> Path:
        """Write one checkpoint, then remove those that are too old.

        Args:
            write_add_on: fills the given folder with an add-on directory's files.

        Raises:
            StorageError: the disk is full or can't be written; earlier checkpoints are untouched.
        """
        final = self.folder / f"step-{step:06d}"
        with atomic_directory(final) as folder:
            write_add_on(folder)
            with atomic_file(folder / OPTIMIZER) as temporary:
                safetensors.torch.save_file(dict(optimizer_tensors), temporary)
            state = {
                "format": FORMAT,
                "step": step,
                **values,
                "files": {path.name: fingerprint_file(path) for path in sorted(folder.iterdir())},
            }
            atomic_write_json(folder / STATE, state, indent=None)
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def newest(self, warn: Callable[[str], None] = lambda line: None) -> SavedState | None:
        """The newest checkpoint whose files are whole, or None if there is no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints but every one is damaged.
        """
        remove_leftovers(self.folder)
        problems = []
        for folder in reversed(self._all()):
            try:
                return _read_checkpoint(folder)
            except Qwen3VLMError as problem:
                problems.append(str(problem))
                warn(f"The checkpoint {folder} is passed over: {problem}")
        if problems:
            raise CheckpointError(
                f"No checkpoint in {self.folder} is whole, so the run can't go on ({problems[0]}) "
                "Set resume=false to start again; the old run is then moved aside."
            )
        return None

    def _all(self) -> list[Path]:
        found = [(int(match[1]), path) for path in self.folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found)]


def require_same_run(saved: SavedState, current: Mapping[str, Any]) -> None:
    """Refuse to go on with settings that would make another run of it.

    Args:
        current: what `run_identity` gives now.

    Raises:
        CheckpointError: one line per difference.
    """
    then = saved.values.get("identity")
    if not isinstance(then, dict):
        raise CheckpointError(f"{saved.folder / STATE} does not say what run it belongs to.")
    then = _completed(then, current)
    lines = [
        f"{key}: {then.get(key)!r} in the checkpoint, {current.get(key)!r} now"
        for key in sorted(then.keys() | current.keys())
        if json.dumps(then.get(key)) != json.dumps(current.get(key))  # the order of tasks decides too
    ]
    if lines:
        raise CheckpointError(
            f"The run can't go on from {saved.folder} because its settings were changed:\n  "
            + "\n  ".join(lines)
            + "\nUse the old settings, or another output_dir."
        )


def _completed(then: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """The identity in a checkpoint, with settings that came later as they were before."""
    found = {key: value for key, value in _LATER.items() if key in current} | dict(then)
    if isinstance(tasks := found.get("tokens.tasks"), dict):
        found["tokens.tasks"] = {
            name: {**task, "folders": task.get("folders", [])} if isinstance(task, dict) else task
            for name, task in tasks.items()
        }
    return found


def run_identity(config: Mapping[str, Any], ranks: int, data_fingerprint: str) -> dict[str, Any]:
    """Flat mapping of everything that decides what a run learns (bases apart: the add-on's description has them)."""
    identity = {key: value for key, value in config.items() if key not in _FREE[""] and not isinstance(value, dict)}
    for section, free in _FREE.items():
        if section and section not in UNREAD[config["stage"]]:
            identity |= {f"{section}.{key}": value for key, value in config[section].items() if key not in free}
    if "tokens.tasks" in identity:
        identity["tokens.tasks"] = _tasks(config["tokens"])
    identity["micro-batches per step (optim.accumulation × processes)"] = config["optim"]["accumulation"] * ranks
    identity["data fingerprint"] = data_fingerprint
    return identity


def _tasks(tokens: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks, with their folders by number: where the data lie decides nothing."""
    places = list(tokens["folders"])
    return {
        name: {**task, "folders": [places.index(folder) for folder in task["folders"]]}
        for name, task in tokens["tasks"].items()
    }


def optimizer_tensors(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """The optimizer's state by parameter name, whole tensors on the CPU; collective under FSDP2."""
    state = _bare(optimizer).state
    return {
        f"{key}/{name}": whole(value)
        for name, parameter in trainable_parameters(model).items()
        for key, value in state.get(parameter, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: Any, saved: SavedState) -> None:
    """Put optimizer.safetensors back.

    Raises:
        CheckpointError: it does not hold exactly the state of the trainable parameters.
    """
    tensors = _read_tensors(saved.folder / OPTIMIZER)
    names = {id(parameter): name for name, parameter in trainable_parameters(model).items()}
    bare = _bare(optimizer)
    state, used = {}, set()
    for index, parameter in enumerate(entry for group in bare.param_groups for entry in group["params"]):
        name = names[id(parameter)]
        keys = [key for key in tensors if key.partition("/")[2] == name]
        used.update(keys)
        state[index] = {key.partition("/")[0]: _like(tensors[key], parameter) for key in keys}
    if used != set(tensors) or any(not entry for entry in state.values()) != (not tensors):
        raise CheckpointError(f"{saved.folder / OPTIMIZER} is not the state of this model's trainable parameters.")
    if tensors:
        bare.load_state_dict({"state": state, "param_groups": bare.state_dict()["param_groups"]})


def rng_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators of this process, as JSON."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 (the global generator is what libraries draw from)
    state = {
        "python": [version, list(words), gauss],
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        "torch": _encode(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Set the generators of this process to what `rng_state` gave.

    Raises:
        CheckpointError: it is no such state.
    """
    try:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        name, key, *rest = state["numpy"]
        np.random.set_state((name, np.asarray(key, dtype=np.uint32), *rest))  # noqa: NPY002
        torch.set_rng_state(_decode(state["torch"]))
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(_decode(state["cuda"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as problem:
        raise CheckpointError(f"The checkpoint's random states can't be restored ({problem}).") from problem


def whole(tensor: Tensor) -> Tensor:
    """A detached CPU tensor of what may be a shard (FSDP2: collective)."""
    full = getattr(tensor, "full_tensor", None)
    return (full() if full is not None else tensor).detach().cpu().contiguous()


def _read_checkpoint(folder: Path) -> SavedState:
    state = read_json(folder / STATE, error=CheckpointError)
    files = state.get("files")
    if state.get("format") not in (1, FORMAT) or not isinstance(state.get("step"), int) or not isinstance(files, dict):
        raise CheckpointError(f"{folder / STATE} is not of a format that this version reads.")
    if state["format"] == 1:  # it named the optimizer's file and connector.json, which names the rest
        files = files | {TENSORS: read_info(folder)["files"][TENSORS].get("sha256")}
    for name, digest in files.items():
        try:
            found = fingerprint_file(folder / Path(name).name)
        except OSError as problem:
            raise CheckpointError(f"{folder / name} can't be read: {problem.strerror or problem}.") from problem
        if found != digest:
            raise CheckpointError(f"{folder / name} is not what was written.")
    return SavedState(folder, state["step"], state)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as problem:
        raise CheckpointError(f"{path} can't be read ({problem}).") from problem


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """`value` cut into shards where the parameter is (FSDP2)."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor) and value.dim():
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def _encode(tensor: Tensor) -> str:
    return base64.b64encode(tensor.cpu().numpy().tobytes()).decode("ascii")


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
