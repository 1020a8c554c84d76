"""token_space.json under attack: random valid ones, thousands of broken ones, and what every id means.

`problems` is a validator of its own, written from the description of the format and not from the code: a
mutant may be accepted only if `problems` finds none, and must be accepted then. A refusal must name a
field that has to do with what is wrong.
"""

import copy
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vlm.errors import TokenError, TokenSpaceError
from qwen3_vlm.tokenization.token_space import AudioIdentity, ImageIdentity, TextIdentity, TokenSpace

Tree = dict[str, Any]
TEN = ["<|text_start|>", "<|text_end|>", "<|img_start|>", "<|img_end|>", "<|aud_start|>", "<|aud_end|>"]
TEN += ["<|gen_text|>", "<|gen_img|>", "<|gen_aud|>", "<|pad_mm|>"]
MOST = 2**31 - 1
STRUCTURAL, DOUBLE, BYTES = 9_000, 3_000, 3_000
SHA = "0123456789abcdef" * 4

# Valid trees, laid out by hand --------------------------------------------------------------------------------


def tree_of(
    text: int, special: int, image: int | None, audio: list[int] | None, extras: list[str] | None = None
) -> Tree:
    """A token_space.json from sizes alone."""
    ranges, start = {}, 0
    sizes = [("TEXT", text), ("SPECIAL", special)] + ([("IMAGE", image)] if image else [])
    for name, size in [*sizes, *((f"AUDIO_CB{k}", size) for k, size in enumerate(audio or []))]:
        ranges[name] = [start, start + size - 1]
        start += size
    picture = {"name": "tiny", "type": "janus_vqvae", "codebook_size": image, "resolution": [64, 48], "grid": [8, 6]}
    sound = {"name": "codec", "type": "dac", "codebook_sizes": audio, "sampling_rate_hz": 16000, "channels": 1}
    sound |= {"samples_per_frame": 320, "clip_seconds": 10.0, "num_codebooks": len(audio or [])}
    sound |= {"serialization": "flatten_by_time_interleaved_codebooks"}
    return {
        "version": "uti_v1",
        "base_text_model": "Qwen/Qwen3-8B-Base",
        "text_vocab_size": text,
        "text_tokenizer_size": max(1, text - 7),
        "text_tokenizer_sha256": SHA,
        "special_tokens": {name: text + index for index, name in enumerate([*TEN, *(extras or [])])},
        "ranges": ranges,
        "image_tokenizer": {**picture, "weights_sha256": SHA[::-1]} if image else None,
        "audio_codec": {**sound, "weights_sha256": SHA} if audio else None,
        "vocab_size_total": start,
    }


SEED_TREE = tree_of(151_936, 64, 16_384, [1024] * 4)
BASES = [
    SEED_TREE,
    tree_of(151_936, 64, 16_384, None),
    tree_of(320, 10, None, [4, 6, 5]),
    tree_of(2, 12, None, None, ["<|a|>", "<|b|>"]),
    tree_of(50, 13, 7, [2], ["<|think|>"]),
]

# The validator ------------------------------------------------------------------------------------------------


def whole(value: Any, least: int = 1) -> bool:
    return type(value) is int and least <= value <= MOST


def named(value: Any) -> bool:
    return type(value) is str and 1 <= len(value) <= 200 and value.isprintable()


def hashed(value: Any) -> bool:
    return type(value) is str and re.match(r"^[0-9a-f]{64}\Z", value) is not None


def list_of_wholes(value: Any, least: int, most: int) -> bool:
    return type(value) is list and least <= len(value) <= most and all(whole(part) for part in value)


IMAGE_FIELDS: dict[str, Callable[[Any], bool]] = {
    "name": named,
    "type": named,
    "codebook_size": whole,
    "resolution": lambda value: list_of_wholes(value, 2, 2),
    "grid": lambda value: list_of_wholes(value, 2, 2),
    "weights_sha256": hashed,
}
AUDIO_FIELDS: dict[str, Callable[[Any], bool]] = {
    "name": named,
    "type": named,
    "codebook_sizes": lambda value: list_of_wholes(value, 1, 256),
    "sampling_rate_hz": whole,
    "channels": whole,
    "samples_per_frame": whole,
    "clip_seconds": lambda value: type(value) is float and 0 < value <= 86_400,
    "weights_sha256": hashed,
    "num_codebooks": whole,
    "serialization": lambda value: value == "flatten_by_time_interleaved_codebooks",
}
FIELDS: dict[str, Callable[[Any], bool]] = {
    "version": lambda value: value == "uti_v1",
    "base_text_model": named,
    "text_vocab_size": whole,
    "text_tokenizer_size": whole,
    "text_tokenizer_sha256": hashed,
    "special_tokens": lambda value: isinstance(value, dict) and all(named(k) and whole(v, 0) for k, v in value.items()),
    "ranges": lambda value: isinstance(value, dict) and all(is_range(span) for span in value.values()),
    "image_tokenizer": lambda value: value is None or isinstance(value, dict),
    "audio_codec": lambda value: value is None or isinstance(value, dict),
    "vocab_size_total": whole,
}


def is_range(value: Any) -> bool:
    return (
        type(value) is list and len(value) == 2 and whole(value[0], 0) and whole(value[1], 0) and value[0] <= value[1]
    )


def field_problems(tree: Tree, fields: dict[str, Callable[[Any], bool]], prefix: str) -> list[set[str]]:
    unknown = [{f"{prefix}{name}"[:60]} for name in tree if name not in fields]
    wrong = [{f"{prefix}{name}"} for name, check in fields.items() if name not in tree or not check(tree[name])]
    return unknown + wrong


def problems(tree: Any) -> list[set[str]]:
    """What is wrong: for each broken rule the fields that it is about. Empty for a valid token space."""
    if not isinstance(tree, dict):
        return [{"JSON object"}]
    found = field_problems(tree, FIELDS, "")
    for key, fields in (("image_tokenizer", IMAGE_FIELDS), ("audio_codec", AUDIO_FIELDS)):
        if isinstance(tree.get(key), dict):
            found += field_problems(tree[key], fields, f"{key}.")
    broken = {field for rule in found for field in rule}
    for fields, follows in RULES.items():
        if not broken.intersection(fields):
            found += follows(tree)
    return found


def text_rule(tree: Tree) -> list[set[str]]:
    return [set(TEXT)] if tree["text_tokenizer_size"] > tree["text_vocab_size"] else []


def grid_rule(tree: Tree) -> list[set[str]]:
    image = tree["image_tokenizer"]
    finer = image and any(cells > pixels for cells, pixels in zip(image["grid"], image["resolution"], strict=True))
    return [set(GRID[1:])] if finer else []


def clip_rule(tree: Tree) -> list[set[str]]:
    sound = tree["audio_codec"]
    short = sound and sound["clip_seconds"] * sound["sampling_rate_hz"] < sound["samples_per_frame"]
    return [set(CLIP[1:])] if short else []


def count_rule(tree: Tree) -> list[set[str]]:
    sound = tree["audio_codec"]
    return [set(BOOKS[1:])] if sound and sound["num_codebooks"] != len(sound["codebook_sizes"]) else []


def first_ranges_rule(tree: Tree) -> list[set[str]]:
    return [{f"ranges.{name}"} for name in ("TEXT", "SPECIAL") if name not in tree["ranges"]]


def layout_rule(tree: Tree) -> list[set[str]]:
    """Every range follows from a size and the range before it; the special tokens stand at the start of theirs."""
    found, start = [], 0
    ranges, image, sound = tree["ranges"], tree["image_tokenizer"], tree["audio_codec"]
    sizes: dict[str, tuple[int | None, str]] = {"TEXT": (tree["text_vocab_size"], "text_vocab_size")}
    sizes["SPECIAL"] = (None, "special_tokens")
    if image:
        sizes["IMAGE"] = (image["codebook_size"], "image_tokenizer.codebook_size")
    for k, size in enumerate(sound["codebook_sizes"] if sound else []):
        sizes[f"AUDIO_CB{k}"] = (size, "audio_codec.codebook_sizes")
    for name, (size, source) in sizes.items():
        span = ranges.get(name)
        size = (span[1] - span[0] + 1 if span else 0) if size is None else size
        if span != [start, start + size - 1]:
            found.append({f"ranges.{name}"} | ({"special_tokens", source} if span else set()))
        start += size
    found += [{f"ranges.{name}"[:60]} for name in ranges if name not in sizes]
    if tree["vocab_size_total"] != start or start > MOST:
        found.append({"vocab_size_total"})
    return found + (special_rule(tree["special_tokens"], *ranges["SPECIAL"]) if "SPECIAL" in ranges else [])


def special_rule(specials: dict[str, int], first: int, last: int) -> list[set[str]]:
    by_id = sorted(specials, key=lambda name: specials[name])
    ids = [specials[name] for name in by_id]
    wrong = ids != list(range(first, first + len(ids))) or by_id[:10] != TEN or len(ids) > last - first + 1
    return [{"special_tokens", "ranges"}] if wrong else []


TEXT = ("text_tokenizer_size", "text_vocab_size")
GRID = ("image_tokenizer", "image_tokenizer.grid", "image_tokenizer.resolution")
BOOKS = ("audio_codec", "audio_codec.codebook_sizes", "audio_codec.num_codebooks")
CLIP = ("audio_codec", *(f"audio_codec.{name}" for name in ("clip_seconds", "sampling_rate_hz", "samples_per_frame")))
LAYOUT = ("ranges", "special_tokens", "vocab_size_total", TEXT[1], "image_tokenizer", "image_tokenizer.codebook_size")
LAYOUT += BOOKS[:2]
RULES: dict[
    tuple[str, ...], Callable[[Tree], list[set[str]]]
] = {  # rules between fields, where each is right in itself
    TEXT: text_rule,
    GRID: grid_rule,
    CLIP: clip_rule,
    BOOKS: count_rule,
    ("ranges",): first_ranges_rule,
    LAYOUT: layout_rule,
}


# Mutations ----------------------------------------------------------------------------------------------------

NESTED: Any = [[[{"a": [None]}]]]
JUNK = (None, True, False, 0, 1, -1, 2, 10**30, MOST, MOST + 1, 2**63, 0.0, 1.0, 1e308, 151936.0, "", "0", "1024")
JUNK += ("uti_v2", "\x00", "\ud800", "ß" * 300, [], {}, [0, 1], [1, 0], [[0, 1]], {"": None}, {"name": "x"}, NESTED)
JUNK += (float("nan"), float("inf"), -float("inf"), SHA, SHA.upper(), SHA + "\n", "x", 8.5, "TEXT", [1024] * 300)


def slots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a tree."""
    entries = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in entries:
        yield tree, key
        yield from slots(value)


def mutate(tree: Tree, rng: random.Random) -> Tree:
    """A copy with one thing changed at a random place."""
    tree = copy.deepcopy(tree)
    container, key = rng.choice(list(slots(tree)))
    MUTATIONS[rng.choice(list(MUTATIONS))](container, key, rng)
    return tree


def delete(container: Any, key: Any, rng: random.Random) -> None:
    del container[key]


def rename(container: Any, key: Any, rng: random.Random) -> None:
    if isinstance(container, dict):
        container[rng.choice([str(key) + "s", str(key).upper(), "", "TEXT", "IMAGE", "AUDIO_CB9", " " + str(key)])] = (
            container.pop(key)
        )
    else:
        container.insert(0, container.pop())


def duplicate(container: Any, key: Any, rng: random.Random) -> None:
    if isinstance(container, dict):
        container[f"{key}_2"] = copy.deepcopy(container[key])
    else:
        container.append(container[key])


def retype(container: Any, key: Any, rng: random.Random) -> None:
    value = container[key]
    choices: list[Callable[[Any], Any]] = [str, lambda v: [v], lambda v: {"value": v}, bool, lambda v: None, repr]
    if type(value) in (int, float):
        choices += [float, int, lambda v: v + 0.5, lambda v: str(v)]
    container[key] = rng.choice(choices)(value)


def step(container: Any, key: Any, rng: random.Random) -> None:
    value = container[key]
    if type(value) is int:
        container[key] = rng.choice([value + 1, value - 1, -value, value * 2, value + 1024, 0, 1])
    elif type(value) is float:
        container[key] = rng.choice([value + 1, -value, value / 1e6, value * 1e6, 0.01, 0.02])
    elif type(value) is str and value:
        index = rng.randrange(len(value))
        container[key] = value[:index] + rng.choice("0123abcXYZ |>\n\u202e") + value[index + 1 :]
    else:
        junk(container, key, rng)


def swap(container: Any, key: Any, rng: random.Random) -> None:
    other = rng.choice(list(container) if isinstance(container, dict) else list(range(len(container))))
    container[key], container[other] = container[other], container[key]


def junk(container: Any, key: Any, rng: random.Random) -> None:
    container[key] = copy.deepcopy(rng.choice(JUNK))


def insert(container: Any, key: Any, rng: random.Random) -> None:
    value = copy.deepcopy(rng.choice(JUNK))
    if isinstance(container, dict):
        container[rng.choice(["extra", "AUDIO_CB1", "<|new|>", "num_ids", "\ud83d", "x" * 300, "IMAGE"])] = value
    else:
        container.insert(rng.randrange(len(container) + 1), value)


MUTATIONS = {f.__name__: f for f in (delete, rename, duplicate, retype, step, swap, junk, insert)}


def mutants(count: int, times: int, seed: int) -> Iterator[Tree]:
    rng = random.Random(seed)
    for number in range(count):
        tree = BASES[number % len(BASES)]
        for _ in range(times):
            tree = mutate(tree, rng)
        yield tree


def judge(tree: Any) -> bool:
    """Whether the code accepts it; it must agree with `problems`, and name a field when it refuses."""
    found = problems(tree)
    try:
        space = TokenSpace.from_dict(tree)
    except TokenSpaceError as error:
        message = str(error)
        assert found, f"refused, though valid: {message}\n{tree}"
        fields = {shown for rule in found for field in rule for shown in (field, ascii(field)[1:-1])}
        assert any(field in message for field in fields), f"{message}\n names none of {fields}"
        message.encode("utf-8")  # can be printed
        assert len(message) < 40_000
        return False
    assert not found, f"accepted, though {found}: {tree}"
    assert space.to_dict() == tree
    assert json.loads(space.canonical_json()) == tree
    return True


def test_the_trees_that_are_mutated_are_valid() -> None:
    for tree in BASES:
        assert problems(tree) == []
        assert judge(tree)


@pytest.mark.parametrize(("count", "times"), [(STRUCTURAL, 1), (DOUBLE, 2)], ids=["one change", "two changes"])
def test_structural_mutants(count: int, times: int) -> None:
    """NaN, huge numbers, true for 1, nested junk, renamed, swapped, shifted: valid ones alone get in."""
    accepted = sum(judge(tree) for tree in mutants(count, times, seed=times))
    assert 0.005 * count < accepted < 0.5 * count  # names and hashes may change; sizes may not


@pytest.mark.parametrize("tree", JUNK, ids=lambda tree: repr(tree)[:20])
def test_what_is_no_tree_at_all(tree: Any) -> None:
    assert not judge(tree)


def byte_mutants(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    for number in range(count):
        place = rng.randrange(len(data))
        if number % 3 == 0:
            yield data[:place]
        elif number % 3 == 1:
            yield data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        else:
            other = rng.randrange(len(data))
            first, last = min(place, other), max(place, other)
            yield rng.choice(
                [data[:first] + data[last:], data[:last] + data[first:], data[:first] + b"\x00" + data[first:]]
            )


def unique(pairs: list[tuple[str, Any]]) -> Tree:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands there twice")
    return dict(pairs)


def test_mutants_of_the_bytes() -> None:
    """Cut short, bits flipped, pieces repeated or lost: not JSON, or judged as JSON."""
    for data in byte_mutants(json.dumps(SEED_TREE, indent=2).encode(), BYTES, seed=3):
        try:
            tree = json.loads(data, object_pairs_hook=unique)
            valid = not problems(tree)
        except ValueError:
            valid = False
        try:
            space = TokenSpace.from_json(data)
        except TokenSpaceError as error:
            assert not valid, f"refused, though valid: {error}"
            assert str(error).encode("utf-8")
        else:
            assert valid
            assert space.to_dict() == tree


def canonical(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True)


def test_the_hash_beside_it_guards_what_the_schema_can_not(tmp_path: Path) -> None:
    """With token_space.sha256 beside it no change of meaning passes, not even of a name."""
    TokenSpace.from_dict(SEED_TREE).save(tmp_path)
    file = tmp_path / "token_space.json"
    original = file.read_bytes()
    for data in itertools.chain(
        byte_mutants(original, 600, seed=4), (json.dumps(t).encode() for t in mutants(400, 1, 5))
    ):
        file.write_bytes(data)
        try:
            same = canonical(json.loads(data, object_pairs_hook=unique)) == canonical(SEED_TREE)
        except ValueError:
            same = False
        if same:
            assert TokenSpace.load(tmp_path).to_dict() == SEED_TREE
        else:
            with pytest.raises(TokenSpaceError, match=re.escape(str(file))):
                TokenSpace.load(tmp_path)


def test_a_key_that_stands_there_twice_is_named() -> None:
    text = json.dumps(SEED_TREE).replace('"text_vocab_size":', '"text_vocab_size": 5, "text_vocab_size":')
    with pytest.raises(TokenSpaceError, match="text_vocab_size"):
        TokenSpace.from_json(text)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 100_000])
def test_numbers_and_nesting_beyond_reason(value: str) -> None:
    text = json.dumps(SEED_TREE).replace('"vocab_size_total": 172480', f'"vocab_size_total": {value}')
    with pytest.raises(TokenSpaceError):
        TokenSpace.from_json(text)


# What an id means ---------------------------------------------------------------------------------------------


def space_of(text: int, special: int, image: tuple[int, int, int] | None, audio: tuple[int, ...] | None) -> TokenSpace:
    """Through `build`, from sizes; image is (codes, rows, columns)."""
    return TokenSpace.build(
        TextIdentity("Qwen/Qwen3-8B-Base", text, max(1, text - 7), SHA),
        ImageIdentity("tiny", "vq", image[0], (image[1] * 8, image[2] * 8), image[1:], SHA) if image else None,
        AudioIdentity("codec", "dac", audio, 16_000, 1, 320, 10.0, SHA) if audio else None,
        special_count=special,
    )


SEED = space_of(151_936, 64, (16_384, 24, 24), (1024,) * 4)
SPACES = st.builds(
    space_of,
    st.integers(1, 300),
    st.integers(10, 70),
    st.none() | st.tuples(st.integers(1, 300), st.integers(1, 4), st.integers(1, 4)),
    st.none() | st.lists(st.integers(1, 40), min_size=1, max_size=5).map(tuple),
)


def test_the_sizes_of_the_seed() -> None:
    expected = {"TEXT": (0, 151_935), "SPECIAL": (151_936, 151_999), "IMAGE": (152_000, 168_383)}
    assert {name: (span.first, span.last) for name, span in SEED.ranges.items() if name in expected} == expected
    audio = [SEED.range_of("audio", k) for k in range(4)]
    assert (audio[0].first, audio[3].last) == (168_384, 172_479)
    assert [span.first for span in audio] == [168_384, 169_408, 170_432, 171_456]
    assert all(span.size == 1024 for span in audio)
    assert SEED.vocab_size_total == 172_480
    assert [SEED.special(name) for name in TEN] == list(range(151_936, 151_946))
    assert SEED.to_dict()["ranges"]["AUDIO_CB3"] == [171_456, 172_479]


def sorts_of_range(space: TokenSpace) -> list[tuple[str, Any, int | None]]:
    """(name, modality, codebook) of every range, in the order of the ids."""
    names = [("TEXT", "text", None), ("SPECIAL", "special", None)] + ([("IMAGE", "image", None)] if space.image else [])
    return names + [(f"AUDIO_CB{k}", "audio", k) for k in range(space.audio.num_codebooks if space.audio else 0)]


@settings(max_examples=60, deadline=None)
@given(SPACES)
def test_every_id_has_one_meaning_and_every_meaning_one_id(space: TokenSpace) -> None:
    ids = np.arange(space.vocab_size_total)
    number, local = space.locate(ids)
    sorts = sorts_of_range(space)
    assert list(space.ranges) == [name for name, _, _ in sorts]
    seen: set[tuple[int, int]] = set(zip(number.tolist(), local.tolist(), strict=True))
    assert len(seen) == space.vocab_size_total
    back = []
    for index, (name, modality, codebook) in enumerate(sorts):
        span = space.range_of(modality, codebook)
        assert span == space.ranges[name]
        codes = np.arange(span.size)
        globals_ = space.to_global(codes, modality, codebook)
        assert space.from_global(globals_, modality, codebook).tolist() == codes.tolist()
        assert (number[globals_] == index).all()
        assert (local[globals_] == codes).all()
        assert space.modality_of(span.last) == (name, span.size - 1)
        back.append(globals_)
    assert np.concatenate(back).tolist() == ids.tolist()


def test_every_id_of_the_seed() -> None:
    ids = np.arange(SEED.vocab_size_total)
    number, local = SEED.locate(ids)
    firsts = np.array([span.first for span in SEED.ranges.values()])
    assert (firsts[number] + local == ids).all()
    assert (np.diff(number) >= 0).all()
    assert np.bincount(number).tolist() == [151_936, 64, 16_384, 1024, 1024, 1024, 1024]


INTEGERS = [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64]
TENSORS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=lambda dtype: dtype.__name__)
def test_all_integers_of_numpy(dtype: Any) -> None:
    """A code of one byte becomes an id of 152,000 and more without running over."""
    codes = np.array([0, 5, 127], dtype=dtype)
    ids = SEED.to_global(codes, "image")
    assert (ids.dtype, ids.tolist()) == (np.int64, [152_000, 152_005, 152_127])
    assert SEED.to_global(dtype(5), "image") == 152_005
    frames = SEED.audio_to_global(np.array([[1, 2], [3, 4], [5, 6], [7, 127]], dtype=dtype))
    assert frames.tolist() == [168_385, 169_411, 170_437, 171_463, 168_386, 169_412, 170_438, 171_583]
    if np.dtype(dtype).itemsize >= 4:
        assert SEED.from_global(ids.astype(dtype), "image").tolist() == [0, 5, 127]


@pytest.mark.parametrize("dtype", TENSORS, ids=str)
def test_all_integers_of_torch(dtype: torch.dtype) -> None:
    codes = torch.tensor([0, 5, 127]).to(dtype)
    ids = SEED.to_global(codes, "image")
    assert (ids.dtype, ids.tolist()) == (torch.int64, [152_000, 152_005, 152_127])
    assert SEED.from_global(ids, "image").tolist() == [0, 5, 127]


@settings(max_examples=60, deadline=None)
@given(SPACES, st.data())
def test_ints_numpy_and_torch_agree(space: TokenSpace, data: st.DataObject) -> None:
    _, modality, codebook = data.draw(st.sampled_from(sorts_of_range(space)))
    size = space.range_of(modality, codebook).size
    codes = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8))
    ids = [space.to_global(code, modality, codebook) for code in codes]
    assert all(type(value) is int for value in ids)
    array, tensor = np.array(codes), torch.tensor(codes)
    assert space.to_global(array, modality, codebook).tolist() == ids
    assert space.to_global(tensor, modality, codebook).tolist() == ids
    assert space.from_global(torch.tensor(ids), modality, codebook).tolist() == codes
    assert [space.from_global(value, modality, codebook) for value in ids] == codes
    number, local = space.locate(torch.tensor(ids))
    numbers, locals_ = space.locate(np.array(ids))
    assert (number.tolist(), local.tolist()) == (numbers.tolist(), locals_.tolist())


def kinds(values: Any) -> list[Any]:
    return [np.array(values), torch.tensor(values)]


@settings(max_examples=100, deadline=None)
@given(SPACES, st.data())
def test_ids_of_another_range_are_refused(space: TokenSpace, data: st.DataObject) -> None:
    _, modality, codebook = data.draw(st.sampled_from(sorts_of_range(space)))
    span = space.range_of(modality, codebook)
    wrong = data.draw(st.integers(-(2**40), span.first - 1) | st.integers(span.last + 1, 2**40))
    for ids in [wrong, *kinds([span.first, wrong, span.last])]:
        with pytest.raises(TokenError, match=f"{abs(wrong):,}") as caught:
            space.from_global(ids, modality, codebook)
        assert caught.value.reason == "out_of_range"
    for codes in [wrong - span.first, *kinds([0, wrong - span.first])]:
        with pytest.raises(TokenError):
            space.to_global(codes, modality, codebook)


@pytest.mark.parametrize("value", [-1, 172_480, 2**31, 2**63 - 1, -(2**63)])
def test_ids_outside_the_space_are_refused(value: int) -> None:
    for ids in [value, *kinds([value])]:
        with pytest.raises(TokenError):
            SEED.locate(ids)
    with pytest.raises(TokenError):
        SEED.modality_of(value)


NO_INTEGERS = [1.0, True, None, "152000", np.float64(1), np.array([1.0]), np.array([True]), np.array(["a"])]
NO_INTEGERS += [np.array([1, None]), torch.tensor([1.0]), torch.tensor([True]), torch.tensor([1j])]
NO_INTEGERS += [[[1], [2, 3]], float("nan"), 10**30, [10**30]]


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_what_is_no_integer_is_refused(value: Any) -> None:
    with pytest.raises(TokenError):
        SEED.to_global(value, "image")
    with pytest.raises(TokenError):
        SEED.locate(value)


CODES = np.random.default_rng(0).integers(0, 1024, (3, 4, 6))  # (B, K, F)


def test_sound_runs_frame_by_frame() -> None:
    ids = SEED.audio_to_global(CODES)
    by_hand = [[168_384 + 1024 * k + int(codes[k, f]) for f in range(6) for k in range(4)] for codes in CODES]
    assert ids.tolist() == by_hand
    assert SEED.audio_from_global(ids).tolist() == CODES.tolist()
    assert SEED.audio_from_global(torch.tensor(by_hand)).tolist() == CODES.tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 23))
def test_a_short_frame_is_refused(length: int) -> None:
    ids = SEED.audio_to_global(CODES[0])
    for part in (ids[:length], torch.from_numpy(ids[:length])):
        if length % 4:
            with pytest.raises(TokenError) as caught:
                SEED.audio_from_global(part)
            assert caught.value.reason == "short_frame"
        else:
            assert SEED.audio_from_global(part).tolist() == CODES[0, :, : length // 4].tolist()


@pytest.mark.parametrize("order", [order for order in itertools.permutations(range(4)) if order != (0, 1, 2, 3)])
def test_codebooks_out_of_order_are_refused(order: tuple[int, ...]) -> None:
    ids = SEED.audio_to_global(CODES[0]).reshape(6, 4)
    ids[3] = ids[3][list(order)]
    for wrong in (ids.reshape(-1), torch.from_numpy(ids.reshape(-1))):
        with pytest.raises(TokenError, match="AUDIO_CB"):
            SEED.audio_from_global(wrong)


def test_a_frame_that_slips_is_refused() -> None:
    """One id lost in the middle: all that follow are in the wrong codebook."""
    ids = SEED.audio_to_global(CODES[0])
    with pytest.raises(TokenError):
        SEED.audio_from_global(np.delete(ids, 5))
    with pytest.raises(TokenError):
        SEED.audio_from_global(np.delete(ids, [5, 10, 15, 20]))


def test_wrong_codebook_counts_are_refused() -> None:
    for shape in ((3, 6), (5, 6), (4,), ()):
        with pytest.raises(TokenError):
            SEED.audio_to_global(np.zeros(shape, np.int64))


def test_pictures_run_row_by_row() -> None:
    codes = np.arange(576).reshape(24, 24)
    ids = SEED.image_to_global(codes)
    assert ids.tolist() == [152_000 + 24 * row + column for row in range(24) for column in range(24)]
    assert SEED.image_from_global(ids).tolist() == codes.tolist()
    assert SEED.image_from_global(torch.from_numpy(ids)[None]).tolist() == [codes.tolist()]


@pytest.mark.parametrize("shape", [(24, 23), (25, 24), (576,), (12, 48), (), (0, 24)])
def test_a_wrong_grid_is_refused(shape: tuple[int, ...]) -> None:
    for codes in (np.zeros(shape, np.int64), torch.zeros(shape, dtype=torch.int64)):
        with pytest.raises(TokenError) as caught:
            SEED.image_to_global(codes)
        assert caught.value.reason == "wrong_grid"


@pytest.mark.parametrize("count", [0, 1, 575, 577, 1152])
def test_a_wrong_number_of_image_ids_is_refused(count: int) -> None:
    for ids in (np.full(count, 152_000), torch.full((count,), 152_000)):
        with pytest.raises(TokenError) as caught:
            SEED.image_from_global(ids)
        assert caught.value.reason == "wrong_grid"


def test_what_a_space_does_not_have_is_refused() -> None:
    bare = space_of(300, 64, None, None)
    for call in (
        lambda: bare.range_of("image"),
        lambda: bare.to_global(0, "audio", 0),
        lambda: bare.image_from_global(np.zeros(4, int)),
        lambda: bare.audio_from_global(np.zeros(4, int)),
        lambda: SEED.range_of("audio"),
        lambda: SEED.range_of("audio", 4),
        lambda: SEED.range_of("audio", -1),
        lambda: SEED.range_of("image", 0),
        lambda: SEED.special("<|im_end|>"),
    ):
        with pytest.raises(TokenError):
            call()
