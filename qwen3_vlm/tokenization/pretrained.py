"""Load a tokenizer's model from a hub id or a folder: the right class, every weight, safetensors alone.

Ids are part of what a trained model is bound to, so a tokenizer that would run half-random is refused, with the
tensors named, and what was loaded is identified by one digest: every tensor's name, dtype, shape and bytes as
stored, and the settings that change ids without changing a shape. How the files are cut and where they lie
does not matter. At some 0.5 s per GB whole bytes are affordable here, unlike those of a language model.
"""

import dataclasses
import hashlib
import json
import re
from abc import ABC
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from qwen3_vlm.errors import ModelError
from qwen3_vlm.fingerprint import resolve_folder
from qwen3_vlm.storage import read_json
from qwen3_vlm.tokenization.exact import choose_device

if TYPE_CHECKING:
    from qwen3_vlm.tokenization.uti_config import AudioConfig, ImageConfig

__all__ = ["Adapter", "Loaded", "ModelKind", "load_model"]

_INDEX_SUFFIX = ".safetensors.index.json"
# Where a whole model keeps its tokenizer; Emu3 models were once stored without the leading `model.`
_INNER = re.compile(r"^(?:model\.)?vqmodel\.")


@dataclass(frozen=True, slots=True)
class ModelKind:
    """What a folder has to hold."""

    class_name: str
    type_name: str  # of its config.json: `model_type`, or `_class_name` in diffusers
    digest_keys: tuple[str, ...]  # settings that change ids but no tensor's shape; dotted into a mapping
    package: str = "transformers"
    whole_model: str | None = None  # `model_type` of a model that has one inside, configured under `vq_config`

    @property
    def type_key(self) -> str:
        return "model_type" if self.package == "transformers" else "_class_name"

    @property
    def file_stem(self) -> str:
        return "model" if self.package == "transformers" else "diffusion_pytorch_model"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with all its weights, in eval mode, where it came from, and what its weights are."""

    model: Any
    folder: Path
    tensor_digest: str
    settings: Mapping[str, Any]  # the kind's digest keys

    def digest(self, **more: Any) -> str:
        """sha256 of weights and settings; `more`: what else decides ids, such as the pixels' normalisation."""
        values = {"tensors": self.tensor_digest, "settings": {**self.settings, **more}}
        return hashlib.sha256(_canonical(values)).hexdigest()


class Adapter(ABC):
    """What the adapters of pictures and of sounds share: opening, and pickling by re-opening."""

    kind: ModelKind
    weights_sha256: str

    def __init__(self, config: "ImageConfig | AudioConfig", loaded: Loaded, device: torch.device) -> None:
        self.model, self.device, self.dtype = loaded.model, device, getattr(torch, config.dtype)
        self._config = dataclasses.replace(config, source=str(loaded.folder.resolve()), subfolder=None)

    @classmethod
    def open(cls, config: Any, *, download: bool) -> Self:
        """Load the model that the section of uti.yaml names.

        Raises:
            ModelError: it can't be loaded, or not be used as an adapter.
            ConfigError: a value of the config is not one that it can have.
        """
        device = choose_device(config.device)
        return cls(config, load_model(cls.kind, config, device, download=download), device)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """In another process the model is opened again; weights are not sent."""
        return _reopen, (type(self), self._config, self.weights_sha256)


def _reopen(adapter: type[Adapter], config: Any, weights_sha256: str) -> Adapter:
    opened = adapter.open(config, download=False)
    if opened.weights_sha256 != weights_sha256:
        raise ModelError(
            f"The {adapter.kind.class_name} in {config.source} is no longer the one that was opened before."
        )
    return opened


def load_model(kind: ModelKind, config: "ImageConfig | AudioConfig", device: torch.device, *, download: bool) -> Loaded:
    """The model of the config's source on `device`; weights stored in another dtype are converted to the config's.

    Raises:
        ModelError: it can't be had, is of another kind, or lacks or has more tensors than its class.
    """
    folder = _find_folder(config.source, config.subfolder, download)
    values, inside = _check_kind(kind, folder)
    files = _weight_files(folder, kind.file_stem)
    tensor_digest, own_names = _digest_tensors(files, folder, inside=inside)
    load = _load_transformers if kind.package == "transformers" else _load_diffusers
    try:
        with _quiet():
            model, info = load(kind, folder, values, inside, getattr(torch, config.dtype))
    except ModelError:
        raise
    except Exception as problem:  # the library reads the user's files: any error means that they are not what it needs
        raise ModelError(f"{folder} can't be loaded as {kind.class_name}: {_first_line(problem)}") from problem
    _check_complete(kind, folder, model, info, own_names)
    settings = {key: _setting(model.config, key) for key in kind.digest_keys}
    model = model.to(device).eval().requires_grad_(False)
    _leave_the_files(model)
    return Loaded(model, folder, tensor_digest, settings)


def _find_folder(source: str, subfolder: str | None, download: bool) -> Path:
    if subfolder is None:
        return resolve_folder(source, what="tokenizer", patterns=("*.json", "*.safetensors"), download=download)
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise ModelError(f"The subfolder {subfolder!r} must lie inside {source}.")
    patterns = (f"{subfolder}/*.json", f"{subfolder}/*.safetensors", "model_index.json")
    required = (f"{subfolder}/config.json",)
    folder = resolve_folder(source, what="tokenizer", patterns=patterns, required=required, download=download)
    if not (folder / subfolder).is_dir():
        raise ModelError(f"{source} has no folder {subfolder!r}.")
    return folder / subfolder


def _check_kind(kind: ModelKind, folder: Path) -> tuple[dict[str, Any], bool]:
    """The model's own part of config.json, and whether it lies inside a whole model."""
    config = read_json(folder / "config.json", error=ModelError)
    found = config.get(kind.type_key)
    if found == kind.type_name:
        return config, False
    if kind.whole_model is not None and found == kind.whole_model and isinstance(config.get("vq_config"), dict):
        return config["vq_config"], True
    wanted = f"{kind.class_name} ({kind.type_key} {kind.type_name!r})"
    known = f"{kind.type_key} {found!r}" if found is not None else f"no {kind.type_key} in its config.json"
    raise ModelError(f"{folder} does not hold a {wanted}: it has {known}. Is `type:` or `source:` wrong?")


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """The files that the library reads: the single one if there is one, else those that its index names."""
    single, index = folder / f"{stem}.safetensors", folder / (stem + _INDEX_SUFFIX)
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelError(
            f"{folder} holds no {single.name}. Only safetensors are read, since pickled weights can run code: "
            "convert them with the library's save_pretrained."
        )
    try:
        names = {Path(str(name)).name for name in read_json(index, error=ModelError)["weight_map"].values()}
    except (TypeError, KeyError, AttributeError) as problem:
        raise ModelError(f"{index} is not an index of safetensors files.") from problem
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ModelError(
            f"{folder} lacks {', '.join(missing[:3])}, which {index.name} names. Is the download complete?"
        )
    return [folder / name for name in sorted(names)]


def _digest_tensors(files: list[Path], folder: Path, *, inside: bool) -> tuple[str, set[str]]:
    """sha256 over all tensors in the order of their names, and these names."""
    from safetensors import SafetensorError, safe_open

    digest = hashlib.sha256()
    places: dict[str, tuple[Path, str]] = {}  # name in its own model → file, name there
    try:
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for stored_name in tensors.keys():  # noqa: SIM118 (it is not a mapping)
                    name = _own_name(stored_name, inside)
                    if name in places:
                        raise ModelError(f"{folder} holds the tensor {name} twice, in {file.name} too.")
                    if name is not None:
                        places[name] = (file, stored_name)
        for name, (file, stored_name) in sorted(places.items()):
            with safe_open(file, framework="pt") as tensors:
                dtype, tensor = tensors.get_slice(stored_name).get_dtype(), tensors.get_tensor(stored_name)
            digest.update(_canonical([name, str(dtype), list(tensor.shape)]))
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    except (OSError, SafetensorError) as problem:
        raise ModelError(
            f"{folder} has a damaged safetensors file ({_first_line(problem)}); fetch it again."
        ) from problem
    return digest.hexdigest(), set(places)


def _own_name(name: str, inside: bool) -> str | None:
    """A tensor's name in its own model; None for those of the rest of a whole model."""
    if not inside:
        return name
    return _INNER.sub("", name) if _INNER.match(name) else None


def _load_transformers(
    kind: ModelKind, folder: Path, config: dict[str, Any], inside: bool, dtype: torch.dtype
) -> tuple[Any, Mapping[str, Any]]:
    import transformers

    model_class = getattr(transformers, kind.class_name)
    more: dict[str, Any] = {"key_mapping": {_INNER.pattern: ""}} if inside else {}
    return model_class.from_pretrained(
        folder,
        config=model_class.config_class.from_dict(config),
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are listed, and refused by name
        **more,
    )


def _load_diffusers(
    kind: ModelKind, folder: Path, config: dict[str, Any], inside: bool, dtype: torch.dtype
) -> tuple[Any, Mapping[str, Any]]:
    try:
        import diffusers
    except ImportError as problem:
        raise ModelError(
            f"{kind.class_name} needs the package diffusers; install it with: pip install 'qwen3-vlm[diffusers]'"
        ) from problem
    return getattr(diffusers, kind.class_name).from_pretrained(
        folder,
        torch_dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        low_cpu_mem_usage=False,
        ignore_mismatched_sizes=True,
    )


def _leave_the_files(model: torch.nn.Module) -> None:
    """Copy what is mapped from the files: a folder that is written again must not change ids, or end the process."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _check_complete(kind: ModelKind, folder: Path, model: Any, info: Mapping[str, Any], names: set[str]) -> None:
    """Refuse a model with missing, misshapen or surplus tensors; `names` are its own in the files."""
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(key[0]) if isinstance(key, tuple | list) else str(key) for key in info["mismatched_keys"])
    surplus = sorted(names.intersection(info["unexpected_keys"])) or _kept_silent(model, names)
    for found, what in (
        (missing, "lacks {} tensors of its class, such as {}: it would run with random weights"),
        (mismatched, "has {} tensors of another shape than its config says, such as {}"),
        (surplus, "holds {} tensors that its class has no place for, such as {}: it is another model"),
    ):
        if found:
            raise ModelError(f"The {kind.class_name} in {folder} {what.format(len(found), ', '.join(found[:3]))}.")


def _kept_silent(model: Any, names: set[str]) -> list[str]:
    """Surplus tensors that the class does not report (Mimi's are to be passed over), where there are more than it has.

    Names in a file and in a model may differ in their first parts, so those without any counterpart are named.
    """
    own = tuple(model.state_dict())
    if len(names) <= len(own):
        return []
    return sorted(name for name in names if not any(key.endswith(name.split(".", 1)[-1]) for key in own))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' load reports and progress bars from the screen: what is wrong becomes one sentence."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _setting(config: Any, key: str) -> Any:
    """The value of a dotted key of a config, with the library's default filled in."""
    for part in key.split("."):
        config = config[part] if isinstance(config, Mapping) else getattr(config, part)
    return config


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def _first_line(problem: Exception) -> str:
    return str(problem).strip().split("\n", 1)[0] or type(problem).__name__
