"""Grids of words and rows of sounds: what they say, and the tasks made of them."""

import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from qwen3_vlm.demo.grid_tasks import bags, confusable, grid_batch, grid_inputs, word_id, written_loss
from qwen3_vlm.demo.paths import BASES
from qwen3_vlm.demo.text_base import Encoder, base_config, deepened
from qwen3_vlm.demo.word_grids import SOUNDS, VOICES, grids, made_up_word, scene_grid, spoken_row, spoken_rows
from qwen3_vlm.demo.world import NAMES, Scene, Thing, is_held_out, scenes

END = 2


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(BASES / "text"))


def leading(bag: list[tuple[str, float]]) -> str:
    return max(bag, key=lambda entry: entry[1])[0]


def test_a_grid_shows_each_thing_at_its_place() -> None:
    things = (Thing("cat", "big", "left", "top"), Thing("pig", "big", "right", "bottom"))
    grid = scene_grid(Scene("row", things, "blue"), random.Random(0))
    names = [{word for word, _ in bag} for bag in grid.places]
    cells = {name: [i for i, words in enumerate(names) if f" {name}" in words] for name in ("cat", "pig")}
    assert len(grid.places) == 64
    assert all(i // 8 < 5 and i % 8 < 5 for i in cells["cat"])
    assert all(i // 8 > 2 and i % 8 > 2 for i in cells["pig"])
    assert 9 <= len(cells["cat"]) <= 25
    assert grid.places[7] == [(" blue", 1.0)]


def test_a_phrase_is_its_sounds_in_order_in_frames_of_four_slots(encoder: Encoder) -> None:
    row = spoken_row("a small cat", random.Random(1))
    assert len(row.places) % 4 == 0
    heard = [leading(bag) for bag in row.places[::4]]
    order = [sound for before, sound in zip(["", *heard[:-1]], heard, strict=True) if sound != before]
    assert "".join(order).strip("_") == SOUNDS["a"] + SOUNDS["small"] + SOUNDS["cat"]
    assert all(str(index % 4) in {word for word, _ in bag} for index, bag in enumerate(row.places))
    voices = [{word for word, _ in bag} & set(VOICES) for bag in row.places]
    assert all(voice == voices[0] and len(voice) == 1 for voice in voices)


def test_every_name_has_sounds_and_every_word_is_one_id(encoder: Encoder) -> None:
    assert set(NAMES) <= set(SOUNDS)
    assert len(set(SOUNDS.values())) == len(SOUNDS)
    for word in (*VOICES, *(sound for said in SOUNDS.values() for sound in said)):
        assert 0 <= word_id(word, encoder.ids) < 1500
    assert made_up_word("cat 3 0 0") == made_up_word("cat 3 0 0") != made_up_word("cat 3 0 1")


def test_no_phrase_names_a_held_out_pair() -> None:
    texts = [row.text.split() for row in islice(spoken_rows(random.Random(0)), 600)]
    pairs = [frozenset((words[1], words[4])) for words in texts if len(words) == 5]
    assert len(pairs) > 100
    assert not any(is_held_out(pair) for pair in pairs)


@pytest.mark.parametrize("task", ["read", "write"])
def test_a_batch_has_the_shape_of_a_token_sequence(encoder: Encoder, task: str) -> None:
    samples = list(islice(spoken_rows(random.Random(3)), 3))
    batch = grid_batch(samples, task, "sounds", encoder.ids, END)
    for row, sample in enumerate(samples):
        said, count = encoder.ids(sample.text), len(sample.places)
        first, stop = batch.spans[row]
        assert stop - first == count
        graded = batch.labels[row] >= 0
        if task == "read":
            assert first == 1
            assert batch.labels[row][graded].tolist() == [*said, END]
            assert graded.nonzero()[0] == count + 4
        else:
            assert first == len(said) + 4
            assert not graded.any()
            assert batch.input_ids[row, 1 : 1 + len(said)].tolist() == said
        assert batch.is_cue[row].sum() == 4


def test_written_loss_is_the_divergence_from_the_bags(encoder: Encoder) -> None:
    samples = list(islice(grids(scenes("grids"), random.Random(0)), 2))
    batch = grid_batch(samples, "write", "grid", encoder.ids, END)
    torch.manual_seed(0)
    head = torch.randn(1536, 8)
    hidden = torch.randn(*batch.input_ids.shape, 8)
    found, _ = written_loss(hidden, head, batch, END)
    expected = []
    for row, (first, stop) in enumerate(batch.spans):
        for place in range(first, stop + 1):
            wanted = torch.zeros(1536, dtype=torch.float64)
            if place == stop:
                wanted[END] = 1
            else:
                words, gains = batch.words[row, place - first], batch.gains[row, place - first]
                wanted.index_add_(0, words, gains.double() / gains.double().sum())
            predicted = (head.double() @ hidden[row, place - 1].double()).log_softmax(0)
            some = wanted > 0
            expected.append((wanted[some] * (wanted[some].log() - predicted[some])).sum())
    assert found.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


def test_clean_places_are_the_sums_of_their_words(encoder: Encoder) -> None:
    samples = list(islice(spoken_rows(random.Random(3)), 2))
    batch = grid_batch(samples, "read", "sounds", encoder.ids, END)
    embedding = torch.randn(1536, 16, generator=torch.Generator().manual_seed(0))
    inputs = grid_inputs(embedding, batch, confusable(encoder.ids)["sounds"], roughness=0.0)
    words, gains = bags(samples[1].places, encoder.ids)
    unit = embedding / embedding.norm(dim=-1, keepdim=True)
    expected = (unit[words] * gains[..., None]).sum(1)
    first, stop = batch.spans[1]
    torch.testing.assert_close(inputs[1, first:stop], expected)
    torch.testing.assert_close(inputs[1, stop + 3], embedding[encoder.ids(samples[1].text)[0]])


def test_a_new_layer_says_nothing_at_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shallow = Qwen3ForCausalLM(base_config()).eval()
    shallow.save_pretrained(tmp_path)
    deep = deepened(tmp_path).eval()
    ids = torch.arange(20)[None]
    assert len(deep.model.layers) == len(shallow.model.layers) + 1
    torch.testing.assert_close(deep(ids).logits, shallow(ids).logits)
