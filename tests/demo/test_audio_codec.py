"""The shipped audio codec keeps its promises, and the recipe that made it does what it says."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DacModel

from qwen3_vlm.demo import audio_codec as recipe
from qwen3_vlm.demo.voices import HELD_OUT_VOICE, SAMPLING_RATE, TRAINING_VOICES, Wave, phrase_is_held_out, speak
from qwen3_vlm.errors import ModelError

FOLDER = Path(recipe.__file__).parent / "bases" / "audio_codec"
CLIPS = 6


@pytest.fixture(scope="module")
def codec() -> DacModel:
    return DacModel.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def clips() -> list[Wave]:
    pytest.importorskip("espeakng_loader")
    return [line.speak().wave for line in recipe.held_out_lines(CLIPS)]


def test_it_is_small_and_says_little(codec: DacModel) -> None:
    assert sum(parameter.numel() for parameter in codec.parameters()) <= 2_000_000
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4_000_000
    assert codec.config.sampling_rate == SAMPLING_RATE
    assert SAMPLING_RATE / codec.config.hop_length * codec.config.n_codebooks <= 200


def test_held_out_speech_comes_back(codec: DacModel, clips: list[Wave]) -> None:
    """Silence would be 1.2 away, a tone of the right loudness 0.6."""
    distances = [recipe.log_mel_l1(recipe.round_trip(codec, clip)[0], clip) for clip in clips]
    assert np.mean(distances) < 0.27
    assert max(distances) < 0.33


def test_ids_are_in_range_in_use_and_the_same_each_time(codec: DacModel, clips: list[Wave]) -> None:
    rounds = [[recipe.round_trip(codec, clip)[1] for clip in clips] for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*rounds, strict=True))
    codes = torch.cat(rounds[0], 1)
    assert codes.shape[0] == codec.config.n_codebooks
    assert 0 <= codes.min() <= codes.max() < codec.config.codebook_size
    assert all(len(row.unique()) > 150 for row in codes)


@pytest.mark.parametrize("samples", [1, 399, 400, 401, 12_345])
def test_any_length_comes_back_at_its_length(codec: DacModel, clips: list[Wave], samples: int) -> None:
    decoded, codes = recipe.round_trip(codec, clips[0][:samples])
    assert decoded.shape == (samples,)
    assert codes.shape[1] == -(-samples // codec.config.hop_length)


def test_silence_stays_silent(codec: DacModel) -> None:
    decoded, _ = recipe.round_trip(codec, np.zeros(SAMPLING_RATE, dtype=np.float32))
    assert np.abs(decoded).max() < 0.01


def test_held_out_lines_are_held_out() -> None:
    lines = recipe.held_out_lines(30)
    assert sum(line.voice == HELD_OUT_VOICE for line in lines) == 10
    assert {line.voice for line in lines} >= set(TRAINING_VOICES)
    names = [line.text for line in lines[1::2]]
    carriers = [carrier.removesuffix(" here").replace("{}", "") for carrier in recipe.CARRIERS[1:]]
    for text in names:
        (name,) = {text.removeprefix(c).removesuffix(" here") for c in carriers if text.startswith(c)}
        assert phrase_is_held_out(name)


def test_training_never_speaks_in_the_held_out_voice_or_of_a_held_out_name() -> None:
    held_out = {name for name in recipe.spoken_names() if phrase_is_held_out(name)}
    spoken = list(islice(recipe.training_lines(0), 400))
    assert HELD_OUT_VOICE not in {line.voice for line in spoken}
    forms = {carrier.format(name) for carrier in recipe.CARRIERS for name in held_out}
    assert not forms & {line.text for line in spoken}


def test_the_lighter_copy_computes_the_same_and_its_weights_fit_the_class() -> None:
    torch.manual_seed(0)
    whole = recipe.new_codec(recipe.codec_config(encoder=8, decoder=32)).eval()
    light = recipe.without_full_rate_units(whole).eval()
    sound = 0.1 * torch.randn(1, 1, 4000)
    with torch.no_grad():
        assert torch.allclose(light(sound).audio_values, whole(sound).audio_values, atol=1e-6)
        light.decoder.conv1.bias.add_(1)
        again = recipe.with_full_rate_units(light, whole)
        assert torch.allclose(light(sound).audio_values, again(sound).audio_values, atol=1e-6)


def test_snake_has_the_slope_of_its_formula() -> None:
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    light = recipe.without_full_rate_units(recipe.new_codec(recipe.codec_config(encoder=8, decoder=32)))
    snake = light.encoder.snake1
    assert isinstance(snake, recipe.FixedSnake)
    (slope,) = torch.autograd.grad(snake(x).sum(), x)
    assert torch.allclose(snake(x), x + x.sin() ** 2)
    assert torch.allclose(slope, 1 + 2 * x.sin() * x.cos())


def test_a_few_steps_train_and_refresh_the_codebooks() -> None:
    pytest.importorskip("espeakng_loader")
    torch.manual_seed(0)
    sound = torch.from_numpy(speak("two big turtles", TRAINING_VOICES[0])[:16000].copy())[None, None]
    light = recipe.without_full_rate_units(recipe.new_codec(recipe.codec_config(encoder=8, decoder=32)))
    training = recipe.CodecTraining(light, 5, 0.1, seed=0)
    training.start_codebooks(sound)
    before = [quantizer.codebook.weight.clone() for quantizer in recipe.quantizers(light)]
    optimizers = recipe.optimizers(training, 0.01, 1e-3)
    losses = []
    for _ in range(6):
        loss, figures = training(sound, torch.zeros(1, 100, dtype=torch.long))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        assert 0 <= training.update_codebooks() <= 1
        losses.append(figures["outline"])
    assert losses[-1] < losses[0]
    assert all(
        not torch.equal(old, quantizer.codebook.weight)
        for old, quantizer in zip(before, recipe.quantizers(light), strict=True)
    )


def test_a_hop_that_the_outline_does_not_divide_is_refused() -> None:
    with pytest.raises(ModelError, match="hop 320 is not a multiple"):
        recipe.CodecTraining(recipe.new_codec(recipe.codec_config((8, 10, 2, 2), encoder=8, decoder=32)), 3, 0.1, 0)


def test_one_id_of_the_first_codebook_names_the_phoneme(codec: DacModel) -> None:
    pytest.importorskip("espeakng_loader")
    shares = recipe.phonemes_named_by_ids(codec, known=30, asked=5)
    assert shares[0] > 0.7
    assert shares[0] > max(shares[1:]) + 0.2
