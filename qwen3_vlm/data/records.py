"""What one record is, and how a JSON object in LLaVA's schema (or a plain caption) becomes one.

Two schemas: {"id", "image": str or list, "conversations": [{"from", "value"}, …]} of LLaVA-Pretrain and
LLaVA-Instruct ("messages" with "role" and "content" is read too), and {"image", "caption" or "text"}.
A user's text holds one "<image>" per picture. Where all are missing they are put before the first
user turn, each on a line of its own, as LLaVA does; any other mismatch is an error. A system's turn may come first.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen3_vlm.data.images import MAX_IMAGE_BYTES
from qwen3_vlm.errors import ImageError, RecordError

IMAGE_MARK = "<image>"
CAPTION_PROMPT = "Describe the image concisely."  # the user's text of a record that is only a caption
RESERVED_TEXT = ("<image_patch>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")  # would become control tokens
MAX_RECORD_BYTES = 4_000_000
MAX_TURNS = 1_000
MAX_TEXT_CHARACTERS = 1_000_000  # of one turn
MAX_IMAGES = 64
MAX_ID_CHARACTERS = 500

Role = Literal["user", "assistant", "system"]
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

# Before an answer stands a line break. More of them would make one token with it, other than what generation reads.
_BLANK_LINES = re.compile(r"\A\s*[\r\n]")


@dataclass(frozen=True, slots=True)
class Turn:
    """One message; the user's may hold "<image>" marks."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where the bytes of one picture are: a file, or a span inside a tar. Cheap to keep and to send."""

    path: str
    offset: int = 0
    size: int | None = None  # None: the whole file
    member: str = ""  # name inside the tar

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.path}/{self.member}" if self.member else self.path

    @property
    def key(self) -> tuple[str, int]:
        """The same for two references to the same place."""
        return self.path, self.offset

    def check_present(self) -> None:
        """Look whether the file is there, without reading it.

        Raises:
            ImageError: `missing_image`, or `unreadable_image` for what is no regular file.
        """
        if os.path.isfile(self.path):
            return
        if os.path.exists(self.path):
            raise ImageError(f"The picture {self.name} is not a regular file.", "unreadable_image")
        raise ImageError(f"The picture {self.name} does not exist.", "missing_image")

    def read_bytes(self) -> bytes:
        """The encoded picture.

        Raises:
            ImageError: `missing_image`, `unreadable_image` (not a regular file, cut off) or `image_too_large`.
        """
        self.check_present()
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(MAX_IMAGE_BYTES + 1 if self.size is None else min(self.size, MAX_IMAGE_BYTES + 1))
        except (OSError, ValueError) as error:
            raise ImageError(f"The picture {self.name} can't be read: {error}.", "unreadable_image") from error
        if self.size is not None and len(data) < min(self.size, MAX_IMAGE_BYTES + 1):
            raise ImageError(f"The picture {self.name} is cut off by the end of its tar.", "unreadable_image")
        return data


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation: turns alternate, begin with the user and end with an answer."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[ImageRef, ...]
    origin: str  # "file:line" or "file[index]", for messages
    system: str | None = None  # what stands before the first turn

    @property
    def preface(self) -> tuple[Turn, ...]:
        """The system's turn, where there is one."""
        return () if self.system is None else (Turn("system", self.system),)


def parse_record(
    tree: Any, origin: str, *, image_root: str = "", images: Sequence[ImageRef] | None = None, key: str = ""
) -> Record:
    """Check one decoded JSON object and make it a Record.

    `images` are given by the caller for tar members (the object's own "image" is then ignored), and
    `key` is the id to use where the object has none. Otherwise that id is a hash of the content, so that it
    does not depend on the order of records.

    Raises:
        RecordError: naming `origin`; reasons bad_record, bad_conversation, bad_image_path,
            placeholder_count, reserved_text, no_labels, too_large, missing_image.
    """
    if not isinstance(tree, Mapping):
        raise RecordError(f"{origin} is a JSON {type(tree).__name__}; a record is an object.")
    refs = tuple(_image_refs(tree, origin, image_root) if images is None else images)
    if len(refs) > MAX_IMAGES:
        raise RecordError(f"{origin} names {len(refs)} pictures; at most {MAX_IMAGES} are read.", "too_large")
    preface, turns = _turns(tree, origin, has_image=bool(refs))
    placed = _place_marks(turns, len(refs), origin)
    identity = _record_id(tree, key, [*preface, *placed], refs, image_root)
    return Record(identity, placed, refs, origin, preface[0].text if preface else None)


def resolve_image(name: str, image_root: str, origin: str) -> ImageRef:
    """Join a record's picture path to the image root, refusing any that leads out of it.

    Symbolic links inside the root are followed: they were put there by its owner.
    """
    root = os.path.abspath(image_root or ".")
    if not name or "\0" in name or len(name) > 4096:
        raise RecordError(f"{origin} has a picture path that is empty or impossible.", "bad_image_path")
    path = os.path.normpath(os.path.join(root, name))
    if os.path.commonpath([root, path]) != root or path == root:
        raise RecordError(f"{origin}: the picture path {name!r} leads out of the image root.", "bad_image_path")
    return ImageRef(path)


def _image_refs(tree: Mapping[str, Any], origin: str, image_root: str) -> list[ImageRef]:
    value = tree.get("image", tree.get("images"))
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecordError(f'{origin}: "image" must be a path or a list of paths.', "bad_image_path")
    return [resolve_image(name, image_root, origin) for name in names]


def _turns(tree: Mapping[str, Any], origin: str, has_image: bool) -> tuple[list[Turn], list[Turn]]:
    """The system's turn, if there is one, and the others."""
    messages = tree.get("conversations", tree.get("messages"))
    if messages is None:
        return [], _caption_turns(tree, origin, has_image)
    if not isinstance(messages, list):
        raise RecordError(f'{origin}: "conversations" must be a list.', "bad_conversation")
    if len(messages) > MAX_TURNS:
        raise RecordError(f"{origin} has {len(messages)} turns; at most {MAX_TURNS} are read.", "too_large")
    turns = [_turn(message, origin) for message in messages]
    preface = [turns.pop(0)] if turns and turns[0].role == "system" else []
    if any(IMAGE_MARK in turn.text for turn in preface):
        raise RecordError(f"{origin}: the system's turn holds {IMAGE_MARK}.", "placeholder_count")
    # As LLaVA does: an answer before the first question, and a question after the last answer, are left out.
    while turns and turns[0].role == "assistant":
        turns.pop(0)
    if any(turn.role != ("user", "assistant")[index % 2] for index, turn in enumerate(turns)):
        raise RecordError(f"{origin}: turns must alternate between user and assistant.", "bad_conversation")
    if turns and turns[-1].role == "user":
        turns.pop()
    if not turns:
        raise RecordError(f"{origin} has no answer to learn from.", "no_labels")
    for index, turn in enumerate(turns):
        if turn.role == "assistant" and not turn.text.strip():
            raise RecordError(f"{origin}: answer {index // 2 + 1} is empty.", "no_labels")
    return preface, turns


def _caption_turns(tree: Mapping[str, Any], origin: str, has_image: bool) -> list[Turn]:
    caption = tree.get("caption", tree.get("text"))
    if not isinstance(caption, str):
        raise RecordError(f'{origin} has neither "conversations" nor a "caption" or "text".', "bad_conversation")
    if not has_image:
        raise RecordError(f"{origin} is a caption without a picture.", "missing_image")
    if not caption.strip():
        raise RecordError(f"{origin}: the caption is empty.", "no_labels")
    return [Turn("user", CAPTION_PROMPT), Turn("assistant", _checked_text(caption.strip(), origin))]


def _turn(message: Any, origin: str) -> Turn:
    if not isinstance(message, Mapping):
        raise RecordError(f"{origin}: each turn must be an object.", "bad_conversation")
    speaker, text = message.get("from", message.get("role")), message.get("value", message.get("content"))
    if not isinstance(speaker, str) or speaker not in ROLES:
        known = ", ".join(ROLES)
        raise RecordError(f"{origin}: the speaker {str(speaker)[:40]!r} is none of {known}.", "bad_conversation")
    if not isinstance(text, str):
        raise RecordError(f"{origin}: the text of a turn must be a string.", "bad_conversation")
    role, text = ROLES[speaker], _checked_text(text, origin)
    return Turn(role, _BLANK_LINES.sub("", text) if role == "assistant" else text)


def _checked_text(text: str, origin: str) -> str:
    if len(text) > MAX_TEXT_CHARACTERS:
        raise RecordError(
            f"{origin}: a text has {len(text):,} characters; at most {MAX_TEXT_CHARACTERS:,}.", "too_large"
        )
    for reserved in RESERVED_TEXT:
        if reserved in text:
            raise RecordError(f"{origin}: the text holds {reserved}, which is a control token.", "reserved_text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(f"{origin}: the text is not valid Unicode.", "bad_record") from error
    return text


def _place_marks(turns: list[Turn], num_images: int, origin: str) -> tuple[Turn, ...]:
    in_answers = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "assistant")
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns) - in_answers
    if in_answers:
        raise RecordError(f"{origin}: an answer holds {IMAGE_MARK}.", "placeholder_count")
    if marks == 0 and num_images:
        turns = [Turn("user", f"{IMAGE_MARK}\n" * num_images + turns[0].text), *turns[1:]]
    elif marks != num_images:
        raise RecordError(f"{origin}: {marks} {IMAGE_MARK} marks for {num_images} pictures.", "placeholder_count")
    return tuple(turns)


def _record_id(
    tree: Mapping[str, Any], key: str, turns: Sequence[Turn], refs: Sequence[ImageRef], image_root: str
) -> str:
    given = tree.get("id")
    if isinstance(given, (str, int)) and not isinstance(given, bool) and 0 < len(str(given)) <= MAX_ID_CHARACTERS:
        return str(given).encode("utf-8", "replace").decode("utf-8")
    if key:
        return key
    root = Path(image_root or ".").absolute()
    names = [os.path.relpath(ref.path, root) for ref in refs]
    content = json.dumps([names, [[turn.role, turn.text] for turn in turns]])
    return "sha256-" + hashlib.sha256(content.encode()).hexdigest()[:24]
