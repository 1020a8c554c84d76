"""Labels on answers alone, and nothing cut inside."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_vlm.data.captions import Record, Turn, open_records
from qwen3_vlm.data.encode import IGNORED, LengthTable, SampleEncoder, lengths
from qwen3_vlm.data.records import parse_record
from qwen3_vlm.errors import RecordError
from tests.data.helpers import (
    END_TOKEN_ID,
    IMAGE_TOKEN_ID,
    ROLE_TOKEN_IDS,
    WordProcessor,
    caption_records,
    conversation,
    word_id,
    write_json,
)

USER, ASSISTANT = ROLE_TOKEN_IDS["user"], ROLE_TOKEN_IDS["assistant"]


def record(*texts: str, images: int = 0) -> Record:
    tree = {"id": "r", "image": [f"{number}.png" for number in range(images)], "conversations": conversation(*texts)}
    return parse_record(tree, "file[0]")


def encode(item: Record, max_seq_len: int = 100) -> Any:
    return SampleEncoder(WordProcessor(num_image_tokens=4), max_seq_len).encode(item)


def test_one_turn_by_hand() -> None:
    sample = encode(record("<image> what", "a cat", images=1))
    assert sample.input_ids == [
        USER, *[IMAGE_TOKEN_ID] * 4, word_id("what"), END_TOKEN_ID,
        ASSISTANT, word_id("a"), word_id("cat"), END_TOKEN_ID,
    ]  # fmt: skip
    assert sample.labels == [IGNORED] * 8 + [word_id("a"), word_id("cat"), END_TOKEN_ID]
    assert sample.answer_length == 2
    assert sample.dropped_turns == 0
    assert [ref.path.rsplit("/", 1)[1] for ref in sample.images] == ["0.png"]


def test_every_answer_of_a_conversation_is_labelled() -> None:
    sample = encode(record("one", "two", "three", "four five"))
    assert [label for label in sample.labels if label != IGNORED] == [
        word_id("two"), END_TOKEN_ID, word_id("four"), word_id("five"), END_TOKEN_ID,
    ]  # fmt: skip
    assert sample.answer_length == 3
    assert all(label in (IGNORED, token) for label, token in zip(sample.labels, sample.input_ids, strict=True))


def test_exchanges_that_do_not_fit_are_left_out_whole_with_their_pictures() -> None:
    long = record("<image> q", "a", "<image> q", "b", "q", "c", images=2)
    full = encode(long)
    exchange = [10, 10, 6]  # role, four for the picture, word, end; role, word, end
    assert len(full.input_ids) == sum(exchange)
    for limit, exchanges in ((26, 3), (25, 2), (20, 2), (19, 1), (10, 1)):
        sample = encode(long, limit)
        assert len(sample.input_ids) == sum(exchange[:exchanges])
        assert sample.dropped_turns == 6 - 2 * exchanges
        assert len(sample.images) == min(exchanges, 2)


def test_a_picture_or_the_only_answer_is_never_cut() -> None:
    for limit, reason in (
        (9, "truncates_answer"),
        (5, "truncates_answer"),
        (4, "truncates_image"),
        (1, "truncates_image"),
    ):
        with pytest.raises(RecordError, match=rf"file\[0\] takes 10 tokens; max_seq_len {limit} would cut") as caught:
            encode(record("<image> q", "a", images=1), limit)
        assert caught.value.reason == reason


def test_control_tokens_of_the_tokenizer_are_refused_in_text() -> None:
    with pytest.raises(RecordError, match=r"<\|secret\|>") as caught:
        encode(record("hello", "the word is <|secret|>"))
    assert caught.value.reason == "reserved_text"


def test_a_processor_that_loses_a_placeholder_is_found_out() -> None:
    processor = WordProcessor()
    processor.image_token = "<other>"  # what it then expands is not what stands in the text
    processor._words = lambda text: [word_id(word) for word in text.split()]  # type: ignore[method-assign]
    with pytest.raises(RecordError, match="0 image tokens for 1 pictures") as caught:
        SampleEncoder(processor, 100).encode(record("<image> q", "a", images=1))
    assert caught.value.reason == "placeholder_count"


def test_a_template_that_masks_everything_is_found_out() -> None:
    processor = WordProcessor()
    encode_conversation = processor.encode_conversation
    processor.encode_conversation = lambda messages: (encode_conversation(messages)[0], [0] * 99)  # type: ignore[method-assign]
    with pytest.raises(RecordError, match="no answer token") as caught:
        SampleEncoder(processor, 100).encode(record("q", "a"))
    assert caught.value.reason == "no_labels"


def test_prompts_for_generation() -> None:
    item = record("<image> q", "a b", "<image> r", "c", images=2)
    ids, reference, images = SampleEncoder(WordProcessor(), 100).encode_prompt(item)
    assert ids == [USER, *[IMAGE_TOKEN_ID] * 4, word_id("q"), END_TOKEN_ID, ASSISTANT]
    assert reference == "a b"
    assert images == item.images[:1]


def test_real_processor(tiny_vlm: tuple[Any, Any]) -> None:
    """The project's own processor: what is labelled decodes to the answers and their end marks."""
    processor = tiny_vlm[1]
    item = record("<image>\nwhat is it?", "a red heart", "where?", "left of a dog", images=1)
    sample = SampleEncoder(processor, 200).encode(item)
    labelled = [label for label in sample.labels if label != IGNORED]
    assert processor.tokenizer.decode(labelled) == "a red heart<|im_end|>left of a dog<|im_end|>"
    assert sample.answer_length == len(labelled) - 2
    assert sample.input_ids.count(processor.image_token_id) == processor.num_image_tokens


# The table of lengths


def table_of(folder: Path, **options: Any) -> LengthTable:
    trees = caption_records(50)
    trees[7]["conversations"][1]["value"] = ""
    trees[9]["image"] = ["k9.png", "k9.png"]
    records = open_records([str(write_json(folder / "a.json", trees))])
    return lengths(records, SampleEncoder(WordProcessor(), 30), **options)


def test_lengths_by_hand(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    # role, "What is it?", picture, end, role, 1 + n % 30 words, end
    expected = np.array([1 + 3 + 4 + 1 + 1 + (1 + number % 30) + 1 for number in range(50)])
    usable = (expected <= 30) & ~np.isin(np.arange(50), [7, 9])
    np.testing.assert_array_equal(table.usable, np.flatnonzero(usable))
    np.testing.assert_array_equal(table.tokens, np.where(usable, expected, 0))
    np.testing.assert_array_equal(table.answer_tokens, np.where(usable, 1 + np.arange(50) % 30, 0))
    np.testing.assert_array_equal(table.images, usable.astype(int))
    assert table.ids[3] == "k3"
    assert table.counts() == {"no_labels": 1, "placeholder_count": 1, "truncates_answer": int((expected > 30).sum())}
    assert table.reasons[9].origin == f"{tmp_path}/a.json[9]"
    assert table.reasons[20].id == "k20"


def test_worker_processes_and_the_cache_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = table_of(tmp_path)
    monkeypatch.setattr("qwen3_vlm.data.encode.WORK_RECORDS", 7)
    cache = tmp_path / "cache"
    for other in (table_of(tmp_path, num_workers=2), table_of(tmp_path, cache_dir=cache)):
        check_same(plain, other)
    monkeypatch.setattr(SampleEncoder, "encode", None)  # from here on only the cache can answer
    check_same(plain, table_of(tmp_path, cache_dir=cache))


def test_the_cache_notices_another_encoder_and_damage(tmp_path: Path) -> None:
    records = open_records([str(write_json(tmp_path / "a.json", caption_records(5)))])
    cache = tmp_path / "cache"
    few = lengths(records, SampleEncoder(WordProcessor(num_image_tokens=2), 30), cache)
    many = lengths(records, SampleEncoder(WordProcessor(num_image_tokens=3), 30), cache)
    np.testing.assert_array_equal(many.tokens - few.tokens, np.ones(5))
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    check_same(few, lengths(records, SampleEncoder(WordProcessor(num_image_tokens=2), 30), cache))


def test_progress_bar_can_be_shown(tmp_path: Path) -> None:
    check_same(table_of(tmp_path), table_of(tmp_path, progress=True))


def check_same(one: LengthTable, other: LengthTable) -> None:
    for name in ("tokens", "answer_tokens", "images", "dropped_turns"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.ids == other.ids
    assert one.reasons == other.reasons
    assert one.tokens.dtype == other.tokens.dtype == np.int32


def test_turns_are_what_the_processor_sees() -> None:
    seen: list[Any] = []
    processor = WordProcessor()
    encode_conversation = processor.encode_conversation
    processor.encode_conversation = lambda messages: seen.append(messages) or encode_conversation(messages)  # type: ignore[method-assign]
    SampleEncoder(processor, 100).encode(Record("x", (Turn("user", "q"), Turn("assistant", "a")), (), "here"))
    assert seen == [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]]
