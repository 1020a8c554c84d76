"""Generated segments: what decodes is counted, what does not is counted by its reason."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen3_vlm.errors import DataError, TokenError
from qwen3_vlm.evaluate.decode_success import Prompt, decode_segment, measure_decoding, read_segment, take_prompts
from qwen3_vlm.evaluate.intervals import wilson_interval
from tests.evaluate.token_stubs import plain_records
from tests.tokenization.plain_codecs import BlockColours, Steps, plain_uti

UTI = plain_uti()
SPACE = UTI.token_space
RECORDS = plain_records(UTI, 70)
ENDS = {
    name: SPACE.special(f"<|{short}_end|>") for name, short in (("text", "text"), ("image", "img"), ("audio", "aud"))
}
PAD = SPACE.special("<|pad_mm|>")


class Answers:
    """Gives one answer after another, whatever is asked, and remembers what was."""

    def __init__(self, answers: Iterable[Any]) -> None:
        self.answers, self.prompts = iter(answers), []

    def __call__(self, prompts: Sequence[Prompt]) -> list[Any]:
        self.prompts += prompts
        return [next(self.answers) for _ in prompts]


def whole(modality: str, number: int) -> np.ndarray:
    return np.array([*RECORDS[number][1][modality], ENDS[modality], PAD, PAD])


@pytest.mark.parametrize(("task", "modality"), [("t2i", "image"), ("t2a", "audio"), ("i2t", "text")])
def test_what_is_whole_decodes(task: str, modality: str) -> None:
    generate = Answers(whole(modality, number) for number in range(70))
    report = measure_decoding(UTI, task, RECORDS, generate, batch_size=10, settings={"temperature": 1.5})
    assert report.passed
    assert (report.tried, report.failures) == (64, {})
    assert report.rate == wilson_interval(64, 64)
    assert report.gates()[0]["name"] == f"{task}: decodes"
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()
    assert report.to_dict()["settings"] == {"temperature": 1.5}
    source = {"t2i": "text", "t2a": "text", "i2t": "image"}[task]
    assert [set(ids) for _, ids in generate.prompts] == [{source}] * 64, "a target is never given"


def test_failures_are_counted_by_reason() -> None:
    image, audio = (RECORDS[0][1][name] for name in ("image", "audio"))
    end = ENDS["image"]
    answers = [
        whole("image", 0),
        image,
        [end],
        [*image[:-1], end],
        [*image[:-1], audio[0], end],
        [*image, image[0], end],
    ]
    generate = Answers(np.array(answer) for answer in answers)
    report = measure_decoding(UTI, "t2i", RECORDS, generate, samples=6)
    assert report.failures == {"empty": 1, "no_end": 1, "out_of_range": 1, "wrong_grid": 2}
    assert report.rate.value == pytest.approx(1 / 6)
    assert not report.passed


def test_a_short_frame_and_a_codebook_out_of_order() -> None:
    audio = np.asarray(RECORDS[0][1]["audio"])
    for ids, reason in ((audio[:-1], "short_frame"), (np.roll(audio, 1), "out_of_range")):
        with pytest.raises(TokenError) as caught:
            read_segment(SPACE, "audio", np.array([*ids, ENDS["audio"]]))
        assert caught.value.reason == reason


def test_codecs_that_break_their_word() -> None:
    class Large(BlockColours):
        def decode(self, codes: Any) -> Any:
            return np.zeros((len(codes), 32, 32, 3), np.uint8)

    class Broken(Steps):
        def decode(self, codes: Any) -> Any:
            return super().decode(codes) * np.float32(np.nan)

    uti = plain_uti(Large(), Broken())
    for modality in ("image", "audio"):
        with pytest.raises(TokenError) as caught:
            decode_segment(uti, modality, np.asarray(RECORDS[0][1][modality]))  # type: ignore[arg-type]
        assert caught.value.reason == "bad_output"


def test_segments_come_back_as_they_were() -> None:
    for modality in ("text", "image", "audio"):
        ids = read_segment(SPACE, modality, whole(modality, 3))  # type: ignore[arg-type]
        assert ids.tolist() == list(RECORDS[3][1][modality])
    decoded = decode_segment(UTI, "image", RECORDS[3][1]["image"])
    assert isinstance(decoded, Image.Image)
    assert decoded.size == (16, 16)
    waveform, rate = decode_segment(UTI, "audio", RECORDS[3][1]["audio"])
    assert (waveform.shape, rate) == ((1, len(RECORDS[3][1]["audio"]) // 2 * 4), 8000)
    assert decode_segment(UTI, "text", RECORDS[3][1]["text"]) == "a red heart 3"


def test_prompts_are_those_of_records_that_have_one() -> None:
    records = [("a", {}), ("b", {"text": np.array([], np.int32)}), *RECORDS]
    prompts = take_prompts(SPACE, "t2i", records, 3)
    assert [ids["text"].tolist() for _, ids in prompts] == [list(ids["text"]) for _, ids in RECORDS[:3]]
    with pytest.raises(DataError, match="has what t2i begins with: text"):
        take_prompts(SPACE, "t2i", records[:2], 3)
    with pytest.raises(TokenError, match="no task"):
        take_prompts(SPACE, "t2x", records, 3)
