"""The golden set of a token LM: files that play, items that compare, scores by task."""

import io
import json
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen3_vlm.errors import TokenError
from qwen3_vlm.evaluate.decode_success import Prompt
from qwen3_vlm.evaluate.golden import diff_golden, read_golden, read_items
from qwen3_vlm.evaluate.golden_media import read_media
from qwen3_vlm.evaluate.token_golden import TokenGoldenItem, choose_records, dump_token_golden, score_token_golden
from qwen3_vlm.tokenization.sequences import BOUNDARIES, sequence_format
from tests.evaluate.token_stubs import plain_records
from tests.tokenization.plain_codecs import plain_uti

UTI = plain_uti()
SPACE = UTI.token_space
RECORDS = plain_records(UTI, 6)
TASKS = ("i2t", "a2t", "t2i", "t2a")


class Model:
    """Answers with the target of the record that a prompt is of; record 0 gets the answer of record `first`."""

    def __init__(self, first: int = 0, cut: str = "") -> None:
        self.first, self.cut = first, cut

    def __call__(self, prompts: Sequence[Prompt]) -> list[Any]:
        return [self.answer(task, ids) for task, ids in prompts]

    def answer(self, task: str, given: Any) -> Any:
        source, target = sequence_format(task).source, sequence_format(task).target
        number = next(n for n, (_, ids) in enumerate(RECORDS) if np.array_equal(ids[source], given[source]))
        ids = RECORDS[number or self.first][1][target]
        return np.array(ids) if task == self.cut else np.array([*ids, SPACE.special(BOUNDARIES[target].end)])


def dump(folder: Path, model: Model, step: int = 7, tasks: Sequence[str] = TASKS) -> list[TokenGoldenItem]:
    return dump_token_golden(UTI, model, dict.fromkeys(tasks, RECORDS[:3]), folder, step=step, batch_size=2)


def test_a_dump_has_every_file_and_reads_back(tmp_path: Path) -> None:
    items = dump(tmp_path, Model())
    folder = tmp_path / "step-000007"
    assert [item.id for item in items[:3]] == ["i2t/r/0", "i2t/r/1", "i2t/r/2"]
    assert read_items(folder / "items.jsonl", TokenGoldenItem) == items
    assert sorted(path.suffix for path in folder.iterdir()) == [".jsonl", *[".png"] * 3, *[".wav"] * 3]
    assert len(list((tmp_path / "reference").iterdir())) == 12
    for item in items:
        assert (item.exact, item.match, item.error) == (True, 1.0, "")
        target = sequence_format(item.task).target
        number = int(item.id[-1])
        assert list(item.ids) == list(RECORDS[number][1][target])
        if target == "text":
            assert item.prediction == item.reference == f"a red heart {number}"
            assert not item.prediction_file
        else:
            assert item.prompt == f"a red heart {number}"
            generated, reference = folder / item.prediction_file, tmp_path / "reference" / item.reference_file
            assert generated.read_bytes() == reference.read_bytes()


def test_files_hold_what_the_tokenizers_decode(tmp_path: Path) -> None:
    items = {item.id: item for item in dump(tmp_path, Model())}
    picture = Image.open(tmp_path / "step-000007" / items["t2i/r/1"].prediction_file)
    assert np.array_equal(np.asarray(picture), np.asarray(UTI.decode_image(RECORDS[1][1]["image"])))
    source = Image.open(tmp_path / "reference" / items["i2t/r/1"].source_file)
    assert np.array_equal(np.asarray(source), np.asarray(picture))
    expected, rate = UTI.decode_audio(RECORDS[1][1]["audio"])
    with wave.open(str(tmp_path / "step-000007" / items["t2a/r/1"].prediction_file)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (rate, 1, expected.shape[1])
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
    np.testing.assert_allclose(samples, expected[0], atol=1e-4)


def test_two_dumps_compare_like_those_of_a_connector(tmp_path: Path) -> None:
    dump(tmp_path, Model(first=1), step=7)
    dump(tmp_path, Model(), step=8)
    paths = [tmp_path / f"step-00000{step}" / "items.jsonl" for step in (7, 8)]
    difference = diff_golden(*paths)
    assert [new.id for _, new in difference.changed] == [f"{task}/r/0" for task in TASKS]
    assert (difference.exact_a, difference.exact_b, difference.unchanged) == (8, 12, 8)
    assert "(now right)" in difference.to_text()
    assert diff_golden(*(path.parent for path in paths)) == difference
    assert read_golden(paths[0])[0].reference == "a red heart 0"


def test_what_does_not_decode_is_an_item_with_an_error(tmp_path: Path) -> None:
    items = dump(tmp_path, Model(cut="t2i"))
    broken = [item for item in items if item.error]
    assert [item.task for item in broken] == ["t2i"] * 3
    assert "have no <|img_end|>" in broken[0].error
    assert (broken[0].exact, broken[0].match, broken[0].prediction_file, broken[0].ids) == (False, 0.0, "", ())
    assert not list((tmp_path / "step-000007").glob("*.png"))
    scores = score_token_golden(items)
    assert (scores["t2i"]["n"], scores["t2i"]["decoded"], scores["t2i"]["match"]) == (3, 0, 0.0)


def test_scores_by_task(tmp_path: Path) -> None:
    items = dump(tmp_path, Model(first=2))
    scores = score_token_golden(items)
    assert list(scores) == list(TASKS)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert all(score["exact_match"] == pytest.approx(2 / 3) for score in scores.values())
    wrong, right = (np.asarray(RECORDS[number][1]["image"]) for number in (2, 0))
    assert scores["t2i"]["match"] == pytest.approx((2 + np.mean(wrong == right)) / 3)
    assert scores["i2t"]["cider_d"] > 0


def test_match_counts_missing_and_added_ids(tmp_path: Path) -> None:
    def shorter(prompts: Sequence[Prompt]) -> list[Any]:
        answers = Model()(prompts)
        return [np.array([*answer[:4], answer[-1]]) for answer in answers]

    items = dump_token_golden(UTI, shorter, {"t2a": RECORDS[:2]}, tmp_path, step=1)
    assert [item.match for item in items] == [pytest.approx(4 / len(ids["audio"])) for _, ids in RECORDS[:2]]


def test_ids_that_are_no_file_names_are_safe(tmp_path: Path) -> None:
    records = [("../../etc/\udce4 \x00", RECORDS[0][1])]
    items = dump_token_golden(UTI, Model(), {"t2i": records}, tmp_path / "golden", step=1)
    assert [path.name for path in tmp_path.iterdir()] == ["golden"]
    assert (tmp_path / "golden/step-000001" / items[0].prediction_file).is_file()
    assert items[0].id == "t2i/../../etc/? \x00"


def test_a_record_without_its_source_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(TokenError, match="has no text"):
        dump_token_golden(UTI, Model(), {"t2i": [("a", {"image": RECORDS[0][1]["image"]})]}, tmp_path, step=1)
    assert not list(tmp_path.glob("step-*"))


def test_the_choice_is_kept_by_task(tmp_path: Path) -> None:
    names, lengths = [f"s{number}" for number in range(40)], [1 + number for number in range(40)]
    chosen = {task: choose_records(task, names, lengths, tmp_path, count=8) for task in ("i2t", "t2i")}
    assert {path.name for path in tmp_path.iterdir()} == {"ids-i2t.json", "ids-t2i.json"}
    again = choose_records("i2t", names[::-1], lengths[::-1], tmp_path, count=8, seed=5)
    assert [names[::-1][place] for place in again] == [names[place] for place in chosen["i2t"]]


def test_media_are_read_for_what_they_are(tmp_path: Path) -> None:
    dump(tmp_path, Model(), tasks=("t2i", "t2a"))
    names = [f"step-000007/{path.name}" for path in sorted((tmp_path / "step-000007").iterdir())]
    media = read_media(tmp_path, names)
    assert len(media) == 6
    assert (
        sorted(entry.uri.split(";")[0] for entry in media.values()) == ["data:audio/wav"] * 3 + ["data:image/png"] * 3
    )
    assert all(entry.spectrum.startswith("data:image/png") == ("audio" in entry.uri[:12]) for entry in media.values())
    (tmp_path / "evil.png").write_bytes(b"<svg onload=alert(1)>")
    (tmp_path / "evil.wav").write_bytes(b"RIFF\0\0\0\0WAVEfmt ")
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
    (tmp_path / "empty.wav").write_bytes(stream.getvalue())
    (tmp_path.parent / "outside.png").write_bytes((tmp_path / names[1]).read_bytes())
    bad = ["evil.png", "evil.wav", "empty.wav", "../outside.png", "missing.png", "items.jsonl", "bad\0name.png", ""]
    assert read_media(tmp_path, bad) == {}


def test_a_page_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump(tmp_path, Model(), tasks=("t2i",))
    names = [f"step-000007/{path.name}" for path in sorted((tmp_path / "step-000007").glob("*.png"))]
    size = (tmp_path / names[0]).stat().st_size
    monkeypatch.setattr("qwen3_vlm.evaluate.golden_media.MAX_TOTAL_BYTES", size)
    assert next(iter(read_media(tmp_path, names))) == names[0]
    assert len(read_media(tmp_path, names)) < 3
    monkeypatch.setattr("qwen3_vlm.evaluate.golden_media.MAX_FILE_BYTES", 10)
    assert read_media(tmp_path, names) == {}
