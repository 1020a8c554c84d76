"""Choices against probabilities worked out by hand and against the library's own rules; seeds, guidance, codebooks."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from qwen3_vlm.errors import ConfigError, ModelError
from qwen3_vlm.generate.grammar import Grammar
from qwen3_vlm.generate.sampling import Choice, Sampler, Sampling, gumbel_noise
from tests.data.tiny_shards import tiny_space

SPACE = tiny_space()
TEXT_START, TEXT_END, IMG_START, IMG_END, AUD_START, AUD_END, GEN_TEXT, GEN_IMG, GEN_AUD, PAD = range(50, 60)
IMAGE = range(114, 130)
GRAMMAR = Grammar(SPACE)
IN_IMAGE = [GEN_IMG, IMG_START, 120, 121]
SCORES = torch.randn(1, SPACE.vocab_size_total, generator=torch.Generator().manual_seed(0)) * 2

PINNED = [116, 117, 115, 123, 122, 122, 126, 125, 122, 126, 125, 127]  # of the seeds 0 … 11


def chosen(sampler: Sampler, ids: list[list[int]], scores: Tensor) -> list[int]:
    """The one id per row that the sampler leaves."""
    result = sampler(torch.tensor(ids), scores)
    assert result.isfinite().sum(dim=1).tolist() == [1] * len(ids)
    return result.argmax(dim=1).tolist()


def draw(choice: Choice, count: int, ids: list[int] = IN_IMAGE, scores: Tensor = SCORES) -> list[int]:
    """One choice of each of `count` seeds."""
    sampling = Sampling(text=choice, image=choice, audio=choice, switch=choice)
    sampler = Sampler(GRAMMAR, sampling, range(count))
    return chosen(sampler, [ids] * count, scores.expand(count, -1))


@pytest.mark.parametrize(
    "choice", [Choice(), Choice(0.5), Choice(1.5), Choice(top_k=4), Choice(top_p=0.8), Choice(1.3, 9, 0.9)]
)
def test_frequencies_are_the_probabilities(choice: Choice) -> None:
    """Against the library's rules on the ids that may come."""
    rules: Any = LogitsProcessorList([TemperatureLogitsWarper(float(choice.temperature))])
    rules += [TopKLogitsWarper(choice.top_k)] if choice.top_k else []
    rules += [TopPLogitsWarper(choice.top_p)] if choice.top_p < 1 else []
    expected = rules(None, SCORES[:, 114:130].double()).softmax(-1)[0].numpy()
    found = np.bincount(np.array(draw(choice, 4000)) - 114, minlength=16)
    assert not found[expected == 0].any()
    possible = expected > 0
    assert stats.chisquare(found[possible], 4000 * expected[possible] / expected[possible].sum()).pvalue > 1e-3


def test_temperature_0_takes_the_likeliest() -> None:
    assert set(draw(Choice(0.0), 5)) == {114 + int(SCORES[0, 114:130].argmax())}


def test_a_sound_may_end_as_often_as_its_end_token_is_likely() -> None:
    at_frame_end = [GEN_AUD, AUD_START, 130, 134, 139]
    scores = torch.zeros(1, SPACE.vocab_size_total)
    scores[0, AUD_END] = math.log(4)  # as likely as the four codes of the first codebook together
    found = draw(Choice(), 2000, at_frame_end, scores)
    assert set(found) == {AUD_END, 130, 131, 132, 133}
    assert found.count(AUD_END) == pytest.approx(1000, abs=4 * math.sqrt(500))


def test_the_noise_is_that_of_its_formula() -> None:
    """Philox with the counter (·, first id, place, segment), written out; its raw bits are pinned."""
    position = GRAMMAR.positions(torch.tensor([IN_IMAGE]))[0]
    key = 0x0123456789ABCDEF0123456789ABCDEF
    bits = np.random.Philox(key=key, counter=[0, 114, 2, 1]).random_raw(16)
    assert bits[0] == np.random.Philox(key=key, counter=[0, 114, 2, 1]).random_raw()
    uniform = [((int(value) >> 12) + 0.5) / 2**52 for value in bits]
    np.testing.assert_allclose(gumbel_noise(key, position), [-math.log(-math.log(u)) for u in uniform], rtol=1e-12)


def test_the_noise_is_pinned() -> None:
    """A change here changes what every seed ever gave."""
    assert draw(Choice(1.5), 12) == PINNED


def test_a_seed_gives_the_same_alone_in_any_batch_and_behind_any_padding() -> None:
    scores = torch.randn(6, SPACE.vocab_size_total)
    rows = [
        IN_IMAGE,
        [IMG_START, 120],
        [GEN_TEXT, TEXT_START, 4, 5],
        [GEN_AUD, AUD_START, 130],
        [GEN_TEXT, TEXT_START],
        [IMG_START, IMG_END, PAD],
    ]
    padded = [[PAD] * (9 - len(ids)) + ids for ids in rows]
    warm = Choice(1.5)
    sampling = Sampling(text=warm, image=warm, audio=warm)
    together = chosen(Sampler(GRAMMAR, sampling, range(6)), padded, scores)
    for number, ids in enumerate(rows):
        alone = Sampler(GRAMMAR, sampling, [number])
        assert chosen(alone, [ids], scores[number : number + 1]) == [together[number]]
    assert together[5] == PAD


def test_seeds_and_places_have_nothing_in_common() -> None:
    first = GRAMMAR.positions(torch.tensor([IN_IMAGE]))[0]
    second = GRAMMAR.positions(torch.tensor([[*IN_IMAGE, 122]]))[0]
    later = GRAMMAR.positions(torch.tensor([[GEN_TEXT, *IN_IMAGE]]))[0]
    noises = [gumbel_noise(key, position) for key in (1, 2) for position in (first, second, later)]
    for index, noise in enumerate(noises):
        assert all(not np.isin(noise, other).any() for other in noises[:index])


def test_each_modality_and_codebook_has_its_own_choice() -> None:
    greedy, warm = Choice(0.0), Choice(50.0)
    sampling = Sampling(text=warm, image=greedy, audio=(greedy, warm, greedy))
    places = {
        "text": [GEN_TEXT, TEXT_START, 3],
        "image": IN_IMAGE,
        "first codebook": [GEN_AUD, AUD_START],
        "second codebook": [GEN_AUD, AUD_START, 130],
        "third codebook": [GEN_AUD, AUD_START, 130, 134],
    }
    kinds = {}
    for name, ids in places.items():
        found = chosen(Sampler(GRAMMAR, sampling, range(40)), [ids] * 40, SCORES.expand(40, -1))
        kinds[name] = len(set(found))
    assert (kinds["image"], kinds["first codebook"], kinds["third codebook"]) == (1, 1, 1)
    assert kinds["text"] > 20
    assert kinds["second codebook"] == 5


# Guidance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
def test_guidance_is_its_formula(guidance: float) -> None:
    prompted, empty = torch.randn(1, 145), torch.randn(1, 145)
    greedy = Choice(0.0)
    sampler = Sampler(GRAMMAR, Sampling(image=greedy, guidance=guidance), [0])
    found = chosen(sampler, [IN_IMAGE, [IMG_START, 120, 121, 122]], torch.cat([prompted, empty]))
    p, e = (scores[0, 114:130].double().log_softmax(-1) for scores in (prompted, empty))
    assert found == [114 + int((e + guidance * (p - e)).argmax())] * 2


def test_guided_frequencies() -> None:
    count = 3000
    prompted, empty = torch.randn(1, 145), torch.randn(1, 145)
    sampler = Sampler(GRAMMAR, Sampling(guidance=2.0), range(count))
    scores = torch.cat([prompted.expand(count, -1), empty.expand(count, -1)])
    found = chosen(sampler, [IN_IMAGE] * 2 * count, scores)
    assert found[:count] == found[count:]
    p, e = (scores[0, 114:130].double().log_softmax(-1) for scores in (prompted, empty))
    expected = (e + 2 * (p - e)).softmax(-1).numpy()
    counts = np.bincount(np.array(found[:count]) - 114, minlength=16)
    assert stats.chisquare(counts, count * expected / expected.sum()).pvalue > 1e-3


def test_no_difference_to_follow_is_no_guidance() -> None:
    twice = Sampler(GRAMMAR, Sampling(guidance=4.0), [3])
    once = Sampler(GRAMMAR, Sampling(), [3])
    assert chosen(twice, [IN_IMAGE] * 2, SCORES.expand(2, -1)) == chosen(once, [IN_IMAGE], SCORES) * 2


# What is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_choices_that_are_none(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is"):
        Choice(**values)


def test_as_many_choices_as_codebooks() -> None:
    with pytest.raises(ConfigError, match="must be one, or 3"):
        Sampler(GRAMMAR, Sampling(audio=(Choice(), Choice())), [0])
    with pytest.raises(ConfigError, match="audio is"):
        Sampling(audio=())
    with pytest.raises(ConfigError, match="guidance is"):
        Sampling(guidance=-1.0)


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 2), (2.0, 1), (2.0, 3)])
def test_each_row_needs_a_seed(guidance: float, rows: int) -> None:
    """Beams and `num_return_sequences` multiply rows: the sampler has no seeds for them."""
    with pytest.raises(ModelError, match="each sample needs one"):
        Sampler(GRAMMAR, Sampling(guidance=guidance), [0])(torch.tensor([IN_IMAGE] * rows), SCORES.expand(rows, -1))


def test_scores_that_are_no_numbers() -> None:
    with pytest.raises(ModelError, match="no numbers"):
        Sampler(GRAMMAR, Sampling(), [0])(torch.tensor([IN_IMAGE]), torch.full_like(SCORES, torch.nan))
