"""What an audit asks of each modality: the same ids every time, where they belong, and that they come back.

Pictures and sounds go through the same checks; what differs between them is in a `Side`. An item is a
picture (PIL or uint8 (H, W, 3)) or a sound (waveform, sampling rate).
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_vlm.errors import TokenError
from qwen3_vlm.tokenization.quality import SSIM_WINDOW, log_mel_l1, psnr, snr_db, ssim
from qwen3_vlm.tokenization.unified_tokenizer import Encoded, Sound, UnifiedTokenizer

BATCHES = ((2, "as given"), (3, "shuffled"), (5, "backwards"), (0, "shuffled"))  # (items per call, order); 0: all
HARD_TEXTS = (
    "",
    " two  spaces,\ttabs\r\nand lines\n\n",
    "e\u0301 is not é, and A\u030a is not Å",  # decomposed: a tokenizer that composes must not lose it
    "👩🏽‍🚀 🏳️‍🌈 🇩🇪 1️⃣ 👨‍👩‍👧",
    "NUL \x00, escape \x1b[0m, delete \x7f, private \ue000, last \U0010ffff",
    "שלום مرحبا \u202eright to left\u202c नमस्ते ไทย 日本語 𠜎",
    "<|im_end|><|img_start|> <|endoftext|></think>",  # plain text that looks like control
)
IMAGE_SIZES = ("codebook_size", "resolution", "grid", "weights_sha256")
AUDIO_SIZES = ("codebook_sizes", "sampling_rate_hz", "channels", "samples_per_frame", "weights_sha256")
LONE_SURROGATE = "half a character: \ud83d"


@dataclass(frozen=True, slots=True)
class Check:
    """One question and its answer; `detail` says what was looked at, or what is wrong."""

    modality: str
    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Item:
    """One picture or sound: what went in, what came out, and how close they are."""

    modality: str
    name: str
    ids: NDArray[np.int64]  # global, (n,)
    metadata: dict[str, Any]
    original: NDArray[Any]  # as the tokenizer takes it: uint8 (H, W, 3) or float32 (A, S)
    decoded: NDArray[Any]  # of the same shape
    figures: dict[str, float | None]


@dataclass
class Findings:
    """What came out for one modality."""

    checks: list[Check] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)  # name, reason, message


@dataclass(frozen=True, slots=True)
class Side:
    """What differs between pictures and sounds."""

    modality: str
    encode: Callable[[list[Any]], list[Encoded]]
    decode: Callable[[NDArray[np.int64], Mapping[str, Any] | None], NDArray[Any]]
    prepare: Callable[[Any], NDArray[Any]]  # what goes into the tokenizer, without filling
    count: Callable[[Any], int]  # ids that an item must have
    again: Callable[[NDArray[Any]], Any]  # a decoded item as one that can be encoded
    figures: Callable[[NDArray[Any], NDArray[Any]], dict[str, float | None]]
    wrong: Callable[[NDArray[np.int64]], dict[str, NDArray[np.int64]]]  # what must not be decoded, by what is wrong


def picture_side(uti: UnifiedTokenizer) -> Side:
    """Pictures, compared as the tokenizer sees them: fitted, with their borders."""
    span = uti.token_space.range_of("image")
    return Side(
        "image",
        encode=uti.encode_images,
        decode=lambda ids, metadata: np.asarray(uti.decode_image(ids, metadata, borders=True)),
        prepare=lambda item: uti.fit_image(item).pixels,
        count=lambda item: uti.token_space.image.num_ids if uti.token_space.image else 0,
        again=lambda pixels: pixels,
        figures=_picture_figures,
        wrong=lambda ids: {
            "an id above the range": np.append(ids[:-1], span.last + 1),
            "an id below the range": np.append(ids[:-1], span.first - 1),
            "an id too few": ids[:-1],
            "an id too many": np.append(ids, ids[-1]),
        },
    )


def sound_side(uti: UnifiedTokenizer) -> Side:
    """Sounds, compared at the codec's rate, without the silence that fills the last frame."""
    identity = uti.token_space.audio
    if identity is None:
        raise TokenError("This token space has no audio.", "no_audio")
    books, rate, frame = identity.num_codebooks, identity.sampling_rate_hz, identity.samples_per_frame
    last = uti.token_space.range_of("audio", books - 1).last

    def prepare(item: Sound) -> NDArray[Any]:
        sound = uti.prepare_audio(*item)
        return np.concatenate(sound.clips, axis=1)[:, : sound.samples]

    def count(item: Sound) -> int:
        return sum(clip.shape[1] for clip in uti.prepare_audio(*item).clips) // frame * books

    def wrong(ids: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        cases = {"an id above the range": np.append(ids[:-1], last + 1), "an id of text": np.append(ids[:-1], 0)}
        if books > 1:
            cases["a short last frame"] = ids[:-1]
            cases["codebooks out of order"] = np.concatenate([ids[books - 1 :: -1], ids[books:]])
        return cases

    return Side(
        "audio",
        encode=uti.encode_audios,
        decode=lambda ids, metadata: uti.decode_audio(ids, metadata)[0],
        prepare=prepare,
        count=count,
        again=lambda sound: (np.clip(sound, -1, 1), rate),
        figures=lambda original, decoded: {
            "snr_db": snr_db(original, decoded),
            "log_mel_l1": log_mel_l1(original, decoded, rate),
        },
        wrong=wrong,
    )


def examine(
    uti: UnifiedTokenizer, side: Side, items: Mapping[str, Any], second: Side, progress: Callable[[str], None]
) -> Findings:
    """All checks and figures of one modality.

    Args:
        second: the same side of another `UnifiedTokenizer` with nothing in common but the files.
    """
    findings = Findings()
    encoded: dict[str, Encoded] = {}
    for name, item in items.items():
        progress(f"{side.modality} {name}")
        try:
            encoded[name] = side.encode([item])[0]
        except TokenError as error:
            findings.refused.append({"name": name, "reason": error.reason, "message": str(error)})
    findings.checks.append(_anything(side, encoded, findings.refused))
    given = {name: items[name] for name in encoded}
    findings.checks += [
        _same_again(side, given, encoded),
        _same_in_batches(side, given, encoded, progress),
        _same_when_opened_anew(second, given, encoded),
        _in_range(uti, side, encoded),
        _shapes(side, given, encoded),
    ]
    decoded, problems = _decode_all(side, encoded)
    encoded = {name: encoded[name] for name in decoded}
    prepared = {name: side.prepare(item) for name, item in given.items()}
    findings.checks += [
        _decodes(side, decoded, prepared, problems),
        _metadata_suffices(second, encoded, decoded),
        _decodes_without_metadata(side, encoded, decoded),
        _refuses_wrong_ids(side, encoded),
    ]
    for name, found in encoded.items():
        if decoded[name].shape == prepared[name].shape and np.isfinite(decoded[name]).all():
            figures = {**side.figures(prepared[name], decoded[name]), "ids_kept": _ids_kept(side, found, decoded[name])}
            findings.items.append(
                Item(side.modality, name, found.ids, found.metadata, prepared[name], decoded[name], figures)
            )
    return findings


def examine_text(uti: UnifiedTokenizer, second: UnifiedTokenizer, texts: Sequence[str]) -> tuple[list[Check], int]:
    """The checks of text, and how many ids the texts have together; `HARD_TEXTS` are added."""
    given = [*texts, *HARD_TEXTS]
    ids: dict[str, list[int]] = {}
    problems = []
    for text in given:
        try:
            ids[text] = uti.encode_text(text)
        except TokenError as error:
            problems.append(str(error))
    span, size = uti.token_space.range_of("text"), uti.token_space.text.tokenizer_size
    lost = [repr(text)[:40] for text, found in ids.items() if uti.decode_text(found) != text]
    again = [repr(text)[:40] for text, found in ids.items() if uti.encode_text(text) != found]
    batches = [repr(text)[:40] for text, found in _batched(list(ids), uti.encode_texts) if found != ids[text]]
    anew = [repr(text)[:40] for text, found in ids.items() if second.encode_text(text) != found]
    outside = [
        repr(text)[:40] for text, found in ids.items() if not all(value in span and value < size for value in found)
    ]
    number = f"{len(given)} texts"
    return [
        _check("text", "every text can be encoded", problems, number),
        _check("text", "comes back as it was", lost, number),
        _check("text", "same ids again", again, number),
        _check("text", "same ids in a batch", batches, f"{number}; {_batch_words()}"),
        _check("text", "same ids when opened anew", anew, number),
        _check("text", "ids in range", outside, f"{span}, the tokenizer's own below {size:,}"),
        _refuses_half_characters(uti),
    ], sum(len(ids.get(text, ())) for text in texts)


def runtime_sizes(uti: UnifiedTokenizer) -> list[Check]:
    """Whether the loaded tokenizers report what the token space says."""
    space = uti.token_space
    rows = {"rows": space.text.vocab_size, "tokenizer_size": space.text.tokenizer_size}
    found = {"rows": space.range_of("text").size, "tokenizer_size": uti.text_tokenizer.identity.tokenizer_size}
    checks = [_sizes("text", rows, found)]
    if uti.image_tokenizer is not None:
        checks.append(_sizes_of("image", space.image, uti.image_tokenizer, IMAGE_SIZES))
    if uti.audio_codec is not None:
        checks.append(_sizes_of("audio", space.audio, uti.audio_codec, AUDIO_SIZES))
    return checks


def _picture_figures(original: NDArray[Any], decoded: NDArray[Any]) -> dict[str, float | None]:
    large = min(original.shape[:2]) >= SSIM_WINDOW
    return {"psnr_db": psnr(original, decoded), "ssim": ssim(original, decoded) if large else None}


def _anything(side: Side, encoded: Mapping[str, Encoded], refused: Sequence[Mapping[str, str]]) -> Check:
    detail = f"{len(encoded)} encoded, {len(refused)} refused"
    if refused:
        detail += f": {refused[0]['name']} ({refused[0]['message']})"
    return Check(side.modality, "there is something to check", bool(encoded), detail)


def _same_again(side: Side, items: Mapping[str, Any], encoded: Mapping[str, Encoded]) -> Check:
    bad = [name for name, item in items.items() if not _equal(side.encode([item])[0], encoded[name])]
    return _check(side.modality, "same ids again", bad, f"{len(items)} items")


def _same_in_batches(
    side: Side, items: Mapping[str, Any], encoded: Mapping[str, Encoded], progress: Callable[[str], None]
) -> Check:
    bad = []
    for name, found in _batched(list(items), lambda names: side.encode([items[name] for name in names])):
        progress(f"{side.modality} {name}, in batches")
        if not _equal(found, encoded[name]):
            bad.append(name)
    return _check(side.modality, "same ids in a batch", bad, f"{len(items)} items; {_batch_words()}")


def _same_when_opened_anew(second: Side, items: Mapping[str, Any], encoded: Mapping[str, Encoded]) -> Check:
    bad = [name for name, item in items.items() if not _equal(second.encode([item])[0], encoded[name])]
    return _check(second.modality, "same ids when opened anew", bad, f"{len(items)} items")


def _in_range(uti: UnifiedTokenizer, side: Side, encoded: Mapping[str, Encoded]) -> Check:
    spans = [span for name, span in uti.token_space.ranges.items() if name.startswith(side.modality.upper())]
    bad = [
        name
        for name, found in encoded.items()
        if not all(((part >= span.first) & (part <= span.last)).all()
                   for span, part in zip(spans, _by_codebook(found.ids, len(spans)), strict=True))
    ]  # fmt: skip
    return _check(side.modality, "ids in range", bad, ", ".join(str(span) for span in spans))


def _shapes(side: Side, items: Mapping[str, Any], encoded: Mapping[str, Encoded]) -> Check:
    bad = [
        name
        for name, item in items.items()
        if encoded[name].ids.dtype != np.int64 or encoded[name].ids.shape != (side.count(item),)
    ]
    lengths = sorted({len(found.ids) for found in encoded.values()})
    words = f"{lengths[0]:,}" + (f" to {lengths[-1]:,}" if len(lengths) > 1 else "") if lengths else "no"
    return _check(side.modality, "number of ids", bad, f"{words} ids, as the size of each item asks for")


def _decode_all(side: Side, encoded: Mapping[str, Encoded]) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """What each item's own ids decode to, and who refuses them."""
    decoded, problems = {}, []
    for name, found in encoded.items():
        try:
            decoded[name] = side.decode(found.ids, found.metadata)
        except TokenError as error:
            problems.append(f"{name} ({error})")
    return decoded, problems


def _decodes(
    side: Side,
    decoded: Mapping[str, NDArray[Any]],
    prepared: Mapping[str, NDArray[Any]],
    problems: Sequence[str],
) -> Check:
    bad = [*problems]
    for name, found in decoded.items():
        like = prepared[name]
        if found.shape != like.shape or found.dtype != like.dtype or not np.isfinite(found).all():
            bad.append(name)
    kinds = sorted({f"{array.dtype} {_shape(array.shape)}" for array in prepared.values()})
    words = ", ".join(kinds[:3]) + (" …" if len(kinds) > 3 else "")
    return _check(side.modality, "decodes to the original's shape", bad, words)


def _metadata_suffices(second: Side, encoded: Mapping[str, Encoded], decoded: Mapping[str, NDArray[Any]]) -> Check:
    """ids and metadata go through JSON to a tokenizer that has never seen the item."""
    bad = []
    for name, found in encoded.items():
        ids, metadata = json.loads(json.dumps([found.ids.tolist(), found.metadata], allow_nan=False))
        if not np.array_equal(second.decode(np.array(ids, dtype=np.int64), metadata), decoded[name]):
            bad.append(name)
    return _check(second.modality, "ids and metadata suffice, through JSON", bad, "decoded by a tokenizer opened anew")


def _decodes_without_metadata(side: Side, encoded: Mapping[str, Encoded], decoded: Mapping[str, NDArray[Any]]) -> Check:
    """As for ids that a model has generated: nothing is known but the ids."""
    bad = []
    for name, found in encoded.items():
        bare = side.decode(found.ids, None)
        if bare.ndim != decoded[name].ndim or bare.shape < decoded[name].shape or not np.isfinite(bare).all():
            bad.append(name)
    return _check(side.modality, "decodes without metadata", bad, "as generated ids are")


def _refuses_wrong_ids(side: Side, encoded: Mapping[str, Encoded]) -> Check:
    accepted, cases = [], {}
    for name, found in list(encoded.items())[:1]:
        cases = side.wrong(found.ids)
        accepted = [f"{name} with {what}" for what, ids in cases.items() if _decodable(side, ids)]
    return _check(side.modality, "refuses what is no " + side.modality, accepted, "; ".join(cases))


def _refuses_half_characters(uti: UnifiedTokenizer) -> Check:
    try:
        uti.encode_text(LONE_SURROGATE)
    except TokenError:
        return Check("text", "refuses half a character", True, "a lone surrogate")
    return Check("text", "refuses half a character", False, "a lone surrogate was encoded")


def _decodable(side: Side, ids: NDArray[np.int64]) -> bool:
    try:
        side.decode(ids, None)
    except TokenError:
        return False
    return True


def _ids_kept(side: Side, found: Encoded, decoded: NDArray[Any]) -> float | None:
    """The share of ids that encoding the decoded item gives again; None where that is refused."""
    try:
        again = side.encode([side.again(decoded)])[0].ids
    except TokenError:
        return None
    return float(np.mean(again == found.ids)) if again.shape == found.ids.shape else None


def _batched(items: list[Any], encode: Callable[[list[Any]], Iterable[Any]]) -> Iterator[tuple[Any, Any]]:
    """(item, what it became) for every way of cutting the list into batches."""
    for size, order in BATCHES:
        arranged = items[::-1] if order == "backwards" else list(items)
        if order == "shuffled":
            random.Random(size).shuffle(arranged)
        for start in range(0, len(arranged), size or max(1, len(arranged))):
            part = arranged[start : start + (size or len(arranged))]
            yield from zip(part, encode(part), strict=True)


def _batch_words() -> str:
    return "batches of " + ", ".join(f"{size or 'all'} {order}" for size, order in BATCHES)


def _by_codebook(ids: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
    return [ids[k::count] for k in range(count)]


def _equal(first: Encoded, second: Encoded) -> bool:
    return np.array_equal(first.ids, second.ids) and first.metadata == second.metadata


def _sizes_of(modality: str, expected: Any, found: Any, names: Sequence[str]) -> Check:
    return _sizes(modality, *({name: _value(source, name) for name in names} for source in (expected, found)))


def _value(source: Any, name: str) -> Any:
    value = getattr(source, name)
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _sizes(modality: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> Check:
    bad = [f"{key} is {found[key]}, not {value}" for key, value in expected.items() if found[key] != value]
    said = ", ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in expected.items() if "sha" not in key)
    return _check(modality, "the loaded tokenizer has the sizes of the token space", bad, said)


def _plain(value: Any) -> str:
    return _shape(value) if isinstance(value, tuple) else f"{value:,}"


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(f"{size:,}" for size in shape)


def _check(modality: str, name: str, bad: Sequence[str], detail: str) -> Check:
    """Passed if nothing is bad; else the first of what is."""
    if not bad:
        return Check(modality, name, True, detail)
    unique = list(dict.fromkeys(bad))
    more = f" and {len(unique) - 3} more" if len(unique) > 3 else ""
    return Check(modality, name, False, f"not so: {'; '.join(unique[:3])}{more}")
