"""The spoken part of the demo's data set: files that the importers of a user's own data read."""

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_vlm.data.manifest import ManifestRecord, read_manifest
from qwen3_vlm.demo.dataset import DemoSizes, build
from qwen3_vlm.demo.voices import HELD_OUT_VOICE, VOICES, telling_is_held_out
from qwen3_vlm.demo.world import is_held_out

pytest.importorskip("espeakng_loader")
SIZES = DemoSizes(train=12, unseen=6, seen=2, spoken=5, spoken_unseen=3, phrases=12, phrases_unseen=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("spoken") / "data", SIZES)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_line_ties_a_picture_its_words_and_a_voice(folder: Path) -> None:
    for part, count in (("train", 5), ("unseen", 3), ("voice", 3)):
        lines = lines_of(folder / f"manifest_{part}.jsonl")
        assert len(lines) == count
        captions = {
            r["image"]: r["conversations"][1]["value"] for r in json.loads(llava_file(folder, part).read_text())
        }
        for line in lines:
            assert set(line) == {"id", "source", "modalities", "text", "task", "meta"}
            assert captions[line["modalities"]["image"]] == line["text"]
            with wave.open(str(folder / line["modalities"]["audio"])) as sound:
                assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (16000, 1, 2)
                assert 1 < sound.getnframes() / 16000 < 12


def llava_file(folder: Path, part: str) -> Path:
    return folder / ("train.json" if part == "train" else "heldout_unseen.json")


def test_the_held_out_voice_is_heard_in_its_own_part_alone(folder: Path) -> None:
    voices = {
        part: {line["meta"]["voice"] for line in lines_of(folder / f"manifest_{part}.jsonl")}
        for part in ("train", "unseen", "voice")
    }
    assert voices["voice"] == {HELD_OUT_VOICE.name}
    assert HELD_OUT_VOICE.name not in voices["train"] | voices["unseen"]


def test_phrases_are_short_and_have_no_picture(folder: Path) -> None:
    for part, count in (("phrases", 12), ("phrases_unseen", 6), ("phrases_voice", 6)):
        lines = lines_of(folder / f"manifest_{part}.jsonl")
        assert len(lines) == count
        assert all(list(line["modalities"]) == ["audio"] and "picture" not in line["meta"] for line in lines)
        assert {len(line["text"].split()) for line in lines} == {2, 3, 5}
        for line in lines:
            with wave.open(str(folder / line["modalities"]["audio"])) as sound:
                assert 0.2 < sound.getnframes() / 16000 < 2.5
                pcm = np.frombuffer(sound.readframes(sound.getnframes()), dtype="<i2")
            assert np.abs(pcm[:400]).max() > 300  # no silence around
            assert np.abs(pcm[-800:]).max() > 300


def test_held_out_phrases_are_not_heard_in_training(folder: Path) -> None:
    for part, unseen in (("phrases", False), ("phrases_unseen", True)):
        for line in lines_of(folder / f"manifest_{part}.jsonl"):
            voice, words = VOICES[line["meta"]["voice"]], line["text"].split()
            assert voice != HELD_OUT_VOICE
            pair = frozenset((words[1], words[-1])) if "and" in words else None
            assert (is_held_out(pair) if pair else telling_is_held_out(line["text"], voice)) == unseen
    voices = {line["meta"]["voice"] for line in lines_of(folder / "manifest_phrases_voice.jsonl")}
    assert voices == {HELD_OUT_VOICE.name}


def test_the_manifests_read_without_a_bad_line(folder: Path) -> None:
    for path in folder.glob("manifest_*.jsonl"):
        entries = [line.entry for line in read_manifest(path)]
        parts = ("phrases" not in path.name, "pictures" not in path.name)
        assert all(isinstance(entry, ManifestRecord) for entry in entries)
        assert all((bool(e.image), bool(e.audio)) == parts for e in entries if isinstance(e, ManifestRecord))


def test_pictures_have_a_manifest_without_voices(folder: Path) -> None:
    for part, count in (("pictures", 12), ("pictures_unseen", 6)):
        lines = lines_of(folder / f"manifest_{part}.jsonl")
        assert len(lines) == count
        assert all(list(line["modalities"]) == ["image"] and list(line["meta"]) == ["picture"] for line in lines)


def test_it_is_the_same_each_time_and_absent_unless_asked_for(folder: Path, tmp_path: Path) -> None:
    again = build(tmp_path / "again", SIZES)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in files)
    silent = build(tmp_path / "silent", DemoSizes(train=2, unseen=1, seen=1))
    assert not (silent / "audio").exists()
    assert not list(silent.glob("manifest_*"))
