"""Every task by hand, then every property: labels, spans, ranges, the way back, and what is refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vlm.errors import TokenError
from qwen3_vlm.tokenization.sequences import (
    BOUNDARIES,
    IGNORED,
    SEQUENCES,
    DropCounter,
    build_sequence,
    parse_sequence,
    prompt_ids,
    replace_ids,
    sequence_lengths,
    task_names,
    unconditional_prompt,
)
from qwen3_vlm.tokenization.token_space import AudioIdentity, ImageIdentity, TextIdentity, TokenSpace

# Text 0–19; specials 20–83, named ones 20–29; image 84–99 (1 × 2 grid); audio codebooks 100–103 and 104–108.
SPACE = TokenSpace.build(
    TextIdentity("tiny", 20, 18, "0" * 64),
    ImageIdentity("tiny-vq", "janus_vqvae", 16, (8, 16), (1, 2), "1" * 64),
    AudioIdentity("tiny-codec", "dac", (4, 5), 16_000, 1, 320, 2.0, "2" * 64),
)
TEXT, IMAGE, AUDIO = [3, 7], [84, 99], [100, 108, 103, 104]
IDS = {"text": np.array(TEXT), "image": np.array(IMAGE), "audio": np.array(AUDIO)}
TEXT_START, TEXT_END, IMG_START, IMG_END, AUD_START, AUD_END, GEN_TEXT, GEN_IMG, GEN_AUD = range(20, 29)

BY_HAND = {  # what is given, what is learnt
    "a2t": ([AUD_START, *AUDIO, AUD_END, GEN_TEXT, TEXT_START], [*TEXT, TEXT_END]),
    "i2t": ([IMG_START, *IMAGE, IMG_END, GEN_TEXT, TEXT_START], [*TEXT, TEXT_END]),
    "t2a": ([TEXT_START, *TEXT, TEXT_END, GEN_AUD, AUD_START], [*AUDIO, AUD_END]),
    "t2i": ([TEXT_START, *TEXT, TEXT_END, GEN_IMG, IMG_START], [*IMAGE, IMG_END]),
    "a2i": ([AUD_START, *AUDIO, AUD_END, GEN_IMG, IMG_START], [*IMAGE, IMG_END]),
    "i2a": ([IMG_START, *IMAGE, IMG_END, GEN_AUD, AUD_START], [*AUDIO, AUD_END]),
    "copy_image": ([IMG_START, *IMAGE, IMG_END, GEN_IMG, IMG_START], [*IMAGE, IMG_END]),
    "copy_audio": ([AUD_START, *AUDIO, AUD_END, GEN_AUD, AUD_START], [*AUDIO, AUD_END]),
}


@pytest.mark.parametrize("task", BY_HAND)
def test_each_task_by_hand(task: str) -> None:
    prompt, learnt = BY_HAND[task]
    sequence = build_sequence(SPACE, task, IDS)
    assert sequence.input_ids.tolist() == prompt + learnt
    assert sequence.labels.tolist() == [IGNORED] * len(prompt) + learnt
    assert sequence.input_ids.dtype == sequence.labels.dtype == np.int32
    assert prompt_ids(SPACE, task, IDS).tolist() == prompt
    assert sequence.num_label_tokens == len(learnt)
    assert unconditional_prompt(SPACE, task).tolist() == [prompt[0], *prompt[-3:]]


def test_spans_by_hand() -> None:
    assert [tuple(span) for span in build_sequence(SPACE, "a2t", IDS).spans] == [
        ("source_start", "special", 0, 1),
        ("source", "audio", 1, 5),
        ("source_end", "special", 5, 6),
        ("gen", "special", 6, 7),
        ("target_start", "special", 7, 8),
        ("target", "text", 8, 10),
        ("target_end", "special", 10, 11),
    ]


def test_the_table_is_complete() -> None:
    assert set(SEQUENCES) == set(BY_HAND) | {"denoise_image", "denoise_audio"}
    assert task_names(["copy", "i2t", "copy_image", "denoise"]) == [
        "copy_image", "copy_audio", "i2t", "denoise_image", "denoise_audio"
    ]  # fmt: skip
    with pytest.raises(TokenError, match="There is no task 'x2y'"):
        task_names(["x2y"])


# Any space, any ids -----------------------------------------------------------------------------------------


@st.composite
def spaces(draw: Any) -> TokenSpace:
    sizes = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=5)))
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    text = draw(st.integers(1, 300))
    return TokenSpace.build(
        TextIdentity("t", text, text, "0" * 64),
        ImageIdentity(
            "i", "janus_vqvae", draw(st.integers(1, 500)), (rows * 8, columns * 8), (rows, columns), "1" * 64
        ),
        AudioIdentity("a", "dac", sizes, 16_000, 1, 320, 2.0, "2" * 64),
    )


@st.composite
def contents(draw: Any, space: TokenSpace) -> dict[str, np.ndarray]:
    assert space.image is not None
    assert space.audio is not None
    local = st.integers(0, 2**31)
    text = np.array(draw(st.lists(local, min_size=1, max_size=12))) % space.text.vocab_size
    seed = draw(local)
    generator = np.random.Generator(np.random.PCG64(seed))
    image = generator.integers(0, space.image.codebook_size, size=space.image.grid)
    frames = draw(st.integers(1, 9))
    audio = np.stack([generator.integers(0, size, size=frames) for size in space.audio.codebook_sizes])
    return {"text": text, "image": space.image_to_global(image), "audio": space.audio_to_global(audio)}


def positions_are_allowed(space: TokenSpace, modality: str, ids: np.ndarray) -> bool:
    """Position by position, without the token space's own arithmetic over arrays."""
    assert space.audio is not None
    names = {"text": ["TEXT"], "image": ["IMAGE"], "audio": [f"AUDIO_CB{k}" for k in range(space.audio.num_codebooks)]}
    return all(
        space.ranges[names[modality][place % len(names[modality])]].first
        <= value
        <= space.ranges[names[modality][place % len(names[modality])]].last
        for place, value in enumerate(ids.tolist())
    )


@settings(max_examples=60, deadline=None)
@given(st.data(), spaces(), st.sampled_from(sorted(SEQUENCES)), st.text(max_size=4))
def test_what_holds_of_every_sequence(data: st.DataObject, space: TokenSpace, task: str, key: str) -> None:
    ids = data.draw(contents(space))
    wanted = SEQUENCES[task]
    sequence = build_sequence(space, task, ids, noise_key=key)
    labelled = sequence.labels != IGNORED
    assert (sequence.labels[labelled] == sequence.input_ids[labelled]).all()
    assert np.flatnonzero(labelled).tolist() == list(range(sequence.span("target").start, len(sequence)))
    assert [span.start for span in sequence.spans] == [0, *[span.stop for span in sequence.spans[:-1]]]
    assert sequence.spans[-1].stop == len(sequence)
    for span in sequence.spans:
        part = sequence.input_ids[span.start : span.stop]
        if span.modality == "special":
            assert part.tolist()[0] in space.special_tokens.values()
        else:
            assert positions_are_allowed(space, span.modality, part)
    assert sequence.input_ids[: sequence.span("target").start].tolist() == (
        prompt_ids(space, task, ids, noise_key=key).tolist()
    )
    only_source = {wanted.source: ids[wanted.source]}
    assert (
        prompt_ids(space, task, only_source, noise_key=key).tolist()
        == sequence.input_ids[: sequence.span("target").start].tolist()
    )
    parsed = parse_sequence(space, sequence.input_ids)
    assert (parsed.source, parsed.target, parsed.spans) == (wanted.source, wanted.target, sequence.spans)
    assert parsed.target_ids.tolist() == ids[wanted.target].tolist()
    if not wanted.noise_rate:
        assert parsed.source_ids.tolist() == ids[wanted.source].tolist()


@settings(max_examples=30, deadline=None)
@given(st.data(), spaces(), st.sampled_from(sorted(SEQUENCES)))
def test_whole_or_not_at_all(data: st.DataObject, space: TokenSpace, task: str) -> None:
    ids = data.draw(contents(space))
    whole = build_sequence(space, task, ids)
    assert build_sequence(space, task, ids, max_len=len(whole)).input_ids.tolist() == whole.input_ids.tolist()
    with pytest.raises(TokenError) as caught:
        build_sequence(space, task, ids, max_len=data.draw(st.integers(0, len(whole) - 1)))
    assert caught.value.reason == "too_long"
    lengths = np.array([[len(ids[name]) for name in ("text", "image", "audio")], [0, 0, 0]])
    assert sequence_lengths(task, lengths).tolist() == [len(whole), 0]


# Noise ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data(), spaces(), st.sampled_from(["image", "audio"]), st.floats(0.0, 1.0), st.text())
def test_noise_stays_in_its_range_and_has_its_rate(
    data: st.DataObject, space: TokenSpace, modality: Any, rate: float, key: str
) -> None:
    ids = data.draw(contents(space))[modality].astype(np.int32)
    noisy = replace_ids(space, modality, ids, rate, key)
    assert positions_are_allowed(space, modality, noisy)
    assert noisy.tolist() == replace_ids(space, modality, ids, rate, key).tolist()
    changed = noisy != ids
    sizes = [1 if modality == "image" and space.range_of("image").size == 1 else 2] * len(ids)
    if modality == "audio":
        assert space.audio is not None
        sizes = [min(2, space.audio.codebook_sizes[place % space.audio.num_codebooks]) for place in range(len(ids))]
    wanted = max(1, round(rate * len(ids)))
    assert changed.sum() <= wanted
    assert changed.sum() == wanted or 1 in sizes  # a codebook of one code has no other


def test_noise_is_spread_evenly() -> None:
    """Places and replacements over many keys, against what uniform draws would give (5 standard deviations)."""
    big = TokenSpace.build(
        TextIdentity("t", 10, 10, "0" * 64),
        ImageIdentity("i", "janus_vqvae", 8, (40, 80), (5, 10), "1" * 64),
        AudioIdentity("a", "dac", (4, 5), 16_000, 1, 320, 2.0, "2" * 64),
    )
    ids = np.full(50, big.range_of("image").first + 3, dtype=np.int32)
    draws = np.stack([replace_ids(big, "image", ids, 0.2, f"key {number}") for number in range(2000)])
    changed = draws != ids
    assert (changed.sum(axis=1) == 10).all()
    assert np.abs(changed.mean(axis=0) - 0.2).max() < 5 * (0.2 * 0.8 / 2000) ** 0.5
    counts = np.bincount(draws[changed] - big.range_of("image").first, minlength=8) / changed.sum()
    assert counts[3] == 0
    assert np.abs(np.delete(counts, 3) - 1 / 7).max() < 5 * (1 / 7 / changed.sum()) ** 0.5


def test_denoising_learns_the_clean_ids() -> None:
    ids = {"image": np.array([90, 91])}
    sequences = [build_sequence(SPACE, "denoise_image", ids, noise_key=f"0/{epoch}/a") for epoch in range(8)]
    for sequence in sequences:
        assert sequence.labels.tolist() == [IGNORED] * 6 + [90, 91, IMG_END]
        assert (sequence.input_ids[1:3] != [90, 91]).sum() == 1
    assert len({tuple(sequence.input_ids.tolist()) for sequence in sequences}) > 1


def test_noise_is_the_same_on_every_machine() -> None:
    """Recorded once: PCG64's raw stream and sha256 do not change."""
    ids = np.arange(84, 100, dtype=np.int32)
    assert replace_ids(SPACE, "image", ids, 0.25, "a key").tolist() == RECORDED_NOISE


RECORDED_NOISE = [91, 85, 86, 87, 92, 89, 90, 89, 89, 93, 94, 95, 96, 97, 98, 99]


# Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", sorted(SEQUENCES))
def test_a_missing_modality_is_a_reason(task: str) -> None:
    for modality in {SEQUENCES[task].source, SEQUENCES[task].target}:
        with pytest.raises(TokenError) as caught:
            build_sequence(SPACE, task, {name: ids for name, ids in IDS.items() if name != modality})
        assert caught.value.reason == f"missing_{modality}"
        with pytest.raises(TokenError) as caught:
            build_sequence(SPACE, task, {**IDS, modality: np.empty(0, int)})
        assert caught.value.reason == f"empty_{modality}"


@pytest.mark.parametrize(
    ("modality", "ids", "reason"),
    [
        ("text", [20], "out_of_range"),
        ("text", [84], "out_of_range"),
        ("text", [1.0], "not_integer"),
        ("image", [84], "wrong_grid"),
        ("image", [84, 100], "out_of_range"),
        ("audio", [100], "short_frame"),
        ("audio", [104, 100], "out_of_range"),
    ],
)
def test_ids_of_another_kind_never_enter(modality: str, ids: list[Any], reason: str) -> None:
    for task, wanted in SEQUENCES.items():
        if modality in (wanted.source, wanted.target):
            with pytest.raises(TokenError) as caught:
                build_sequence(SPACE, task, {**IDS, modality: np.array(ids)})
            assert caught.value.reason == reason


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(sorted(BY_HAND)))
def test_a_sequence_that_was_changed_is_refused_or_another_valid_one(data: st.DataObject, task: str) -> None:
    """Whatever is removed, put in or exchanged: what parses is exactly what building its parts gives."""
    values = [value for part in BY_HAND[task] for value in part]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(values)))
        new = data.draw(st.integers(-2, SPACE.vocab_size_total + 1))
        stop = place + data.draw(st.integers(0, 2))
        values[place:stop] = [new] * data.draw(st.integers(0, 1))
    try:
        parsed = parse_sequence(SPACE, np.array(values, dtype=np.int64))
    except TokenError as error:
        assert error.reason in {
            "malformed", "out_of_range", "wrong_grid", "short_frame", "unknown_task",
            "empty_text", "empty_image", "empty_audio",
        }  # fmt: skip
        return
    pairs = {(wanted.source, wanted.target): name for name, wanted in SEQUENCES.items() if not wanted.noise_rate}
    prompt = prompt_ids(SPACE, pairs[parsed.source, parsed.target], {parsed.source: parsed.source_ids}).tolist()
    assert values == [*prompt, *parsed.target_ids.tolist(), SPACE.special(BOUNDARIES[parsed.target].end)]


@pytest.mark.parametrize(
    "values",
    [
        [],
        [AUD_START],
        [AUD_START, *AUDIO, IMG_END, GEN_TEXT, TEXT_START, *TEXT, TEXT_END],
        [AUD_START, *AUDIO, AUD_END, GEN_IMG, TEXT_START, *TEXT, TEXT_END],
        [AUD_START, *AUDIO, AUD_END, TEXT_START, *TEXT, TEXT_END],
        [AUD_START, *AUDIO, AUD_END, GEN_TEXT, TEXT_START, *TEXT],
        [AUD_START, *AUDIO, AUD_END, GEN_TEXT, TEXT_START, *TEXT, TEXT_END, TEXT_END],
        [*AUDIO, AUD_END, GEN_TEXT, TEXT_START, *TEXT, TEXT_END],
    ],
)
def test_boundaries_out_of_order(values: list[int]) -> None:
    with pytest.raises(TokenError, match="is due there") as caught:
        parse_sequence(SPACE, np.array(values, dtype=np.int64))
    assert caught.value.reason == "malformed"


@pytest.mark.parametrize("values", [np.zeros((2, 2), int), np.array([0.5]), np.array(["a"])])
def test_what_is_no_sequence(values: np.ndarray) -> None:
    with pytest.raises(TokenError, match="one list of ids"):
        parse_sequence(SPACE, values)


def test_a_pair_without_a_task_is_refused() -> None:
    values = [TEXT_START, *TEXT, TEXT_END, GEN_TEXT, TEXT_START, *TEXT, TEXT_END]
    with pytest.raises(TokenError, match="No task goes from text to text"):
        parse_sequence(SPACE, np.array(values))


def test_drops_are_counted() -> None:
    first, second = DropCounter(), DropCounter()
    first.add("t2i", "too_long")
    second.add("t2i", "too_long", 2)
    second.add("a2t", "missing_audio")
    first.merge(second)
    assert first.total == 4
    assert first.to_dict() == {"a2t": {"missing_audio": 1}, "t2i": {"too_long": 3}}
