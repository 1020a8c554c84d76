"""Every error that this package raises on purpose.

    Qwen3VLMError
    ├── ConfigError            a YAML file, an override or an argument that can't be used
    ├── DataError              a data set, a file or a folder that can't be used
    │   └── RecordError        one bad record; training skips and lists it
    │       ├── ImageError     one picture that can't be read
    │       └── AudioError     one sound that can't be read
    ├── TokenSpaceError        a token space that is not valid, or not the one that is needed
    ├── TokenError             an input that can't become ids, or ids that can't become an input
    ├── ModelError             a model, a tokenizer or their inputs that do not fit each other
    │   └── DivergenceError    a training whose gradients are no longer finite
    ├── AddOnError             an add-on's folder that can't be used
    │   ├── BaseMismatchError  made for another base, tokenizer, template or token space
    │   └── TamperedFileError  its bytes are not those that were written
    ├── CheckpointError        a training state that can't be resumed
    ├── TrainabilityError      gradients did not reach exactly what the stage trains
    ├── StorageError           the disk is full or can't be written
    └── GateError              evidence that should be there is missing or fails

Messages are one or more plain sentences: what was given, why it can't be, what to do. The command
line prints the message and exits with 1.
"""

__all__ = [
    "AddOnError",
    "AudioError",
    "BaseMismatchError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "GateError",
    "ImageError",
    "ModelError",
    "Qwen3VLMError",
    "RecordError",
    "StorageError",
    "TamperedFileError",
    "TokenError",
    "TokenSpaceError",
    "TrainabilityError",
]


class Qwen3VLMError(Exception):
    """Base of all errors of this package."""


class ConfigError(Qwen3VLMError):
    """A configuration that can't be used; names the key."""


class DataError(Qwen3VLMError):
    """A data set that can't be used; names the file."""


class RecordError(DataError):
    """One record that can't be used. `reason` is a short countable kind such as "missing_image"."""

    def __init__(self, message: str, reason: str = "bad_record") -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["RecordError"], tuple[str, str]]:
        """Keep `reason` when the error crosses from a data worker to the main process."""
        return type(self), (str(self), self.reason)


class ImageError(RecordError):
    """One picture that can't be read; names the file."""


class AudioError(RecordError):
    """One sound that can't be read; names the file."""


class TokenSpaceError(Qwen3VLMError):
    """A token space that is not valid (names the field) or not the one needed (one line per difference)."""


class TokenError(Qwen3VLMError):
    """Text, a picture or a sound that can't become ids, or ids that can't be turned back.

    `reason` is a short countable kind such as "out_of_range" or "short_frame".
    """

    def __init__(self, message: str, reason: str = "bad_tokens") -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["TokenError"], tuple[str, str]]:
        """Keep `reason` when the error crosses from a worker to the main process."""
        return type(self), (str(self), self.reason)


class ModelError(Qwen3VLMError):
    """A model, tokenizer or input that does not fit the others."""


class DivergenceError(ModelError):
    """A training whose gradients are no longer finite; it was stopped before they reached a weight."""


class AddOnError(Qwen3VLMError):
    """An add-on's folder that can't be used; names it."""


class BaseMismatchError(AddOnError):
    """The add-on was made for another base; one line per difference."""


class TamperedFileError(AddOnError):
    """A file whose bytes are not those its metadata was written with."""


class CheckpointError(Qwen3VLMError):
    """A training state that can't be resumed; says why."""


class TrainabilityError(Qwen3VLMError):
    """Trainable parameters or gradients that are not those the stage declares."""


class StorageError(Qwen3VLMError):
    """A file that could not be written; nothing partial was left under its name."""


class GateError(Qwen3VLMError):
    """A gate that fails or whose evidence is missing."""
