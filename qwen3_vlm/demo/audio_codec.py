"""Training the demo's tiny `DacModel`: espeak-ng speech alone, no language model near it.

The class has all the machinery; what differs from its usual training:
- **No discriminator.** Magnitudes at several resolutions (log-mel and linear) are enough for speech that a recogniser
  understands, at a hundredth of the compute.
- **Fan-in initialisation**, loud enough that Snake bends from the first layer on. The class draws every convolution
  with a spread of 0.02, which leaves next to nothing of the signal in thin layers.
- **Nothing trained at the full rate** but one convolution at each end: the residual units there stay zero. They would
  take two thirds of the time.
- **Codebooks are running means** of the latents they stand for, started from real latents, and an entry that nothing
  uses is put back among them. The class's own codebook loss chases latents that move away from it.
- **Throwaway heads** read espeak-ng's phonemes off the *first* codebook, and a rough spectrogram off all of them. The
  encoder learns from them long before the decoder can tell it anything, and ids that say what is spoken are easier
  to read and to write for a language model than ids that say how it sounds.

Shapes: B crops, S samples, F frames, K codebooks, M mel bands, D width of a codebook's entry.
"""

import copy
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DacConfig, DacModel
from transformers.audio_utils import mel_filter_bank
from transformers.models.dac.modeling_dac import Snake1d

from qwen3_vlm.demo.drawings import named_drawings
from qwen3_vlm.demo.muon import Muon, orthogonal_by_gram
from qwen3_vlm.demo.voices import (
    HELD_OUT_VOICE,
    SAMPLING_RATE,
    TRAINING_VOICES,
    Line,
    Utterance,
    phrase_is_held_out,
    vary,
)
from qwen3_vlm.demo.world import scenes
from qwen3_vlm.errors import ModelError

CARRIERS = ("{}", "a drawing of a {}", "this is a picture of the {}", "I can see the {} here")
SCALES = ((256, 64, 32), (512, 128, 64), (1024, 256, 80))  # (window, hop, mel bands)
MEL_HEAD = (512, 200, 64)
LOUDNESS = 0.07  # root mean square of the speech: the encoder starts with activations around 1, where Snake bends
FLOOR = 3e-4  # magnitudes below it sound like silence
COMMITMENT = 0.1  # weight of the squared distance to the picked entries, in units of their variance
DECAY = 0.3
MEMORY = (0.95, 0.98, 1000)  # of the running means: first, in the end, and after so many steps
DEAD = 0.1  # running uses per step below which an entry is given a new place


def codec_config(
    ratios: tuple[int, ...] = (10, 10, 2, 2), codebooks: int = 4, encoder: int = 16, decoder: int = 192
) -> DacConfig:
    """At 16 kHz; even ratios alone, so that F frames decode to exactly F hops."""
    return DacConfig(
        encoder_hidden_size=encoder,
        decoder_hidden_size=decoder,
        downsampling_ratios=list(ratios),
        n_codebooks=codebooks,
        codebook_size=1024,
        codebook_dim=8,
        sampling_rate=SAMPLING_RATE,
    )


def new_codec(config: DacConfig) -> DacModel:
    """Weights that keep a signal's size from layer to layer; residual branches start small."""
    model = DacModel(config)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            taps = module.kernel_size[0]
            if isinstance(module, nn.ConvTranspose1d):
                taps //= module.stride[0]
            gain = 0.3 if "res_unit" in name and name.endswith("conv2") else 0.8
            nn.init.normal_(module.weight, std=gain * (module.in_channels * taps) ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for quantizer in quantizers(model):
        nn.init.orthogonal_(quantizer.in_proj.weight)
        nn.init.normal_(quantizer.out_proj.weight, std=config.codebook_dim**-0.5)
        quantizer.codebook.weight.requires_grad_(False)
    nn.init.normal_(model.encoder.conv1.weight, std=LOUDNESS**-1 * model.encoder.conv1.kernel_size[0] ** -0.5)
    for unit in full_rate_units(model):
        nn.init.zeros_(unit.conv2.weight)
    nn.init.normal_(model.decoder.conv2.weight, std=0.1 * (7 * model.decoder.conv2.in_channels) ** -0.5)
    return model


def quantizers(codec: DacModel) -> list[Any]:
    """The codec's K `DacVectorQuantize`."""
    return list(codec.quantizer.quantizers)


class _SnakeOfOne(torch.autograd.Function):
    """x + sin²(x) in a third of the passes over memory that its parts would take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.twice = 2 * x
        return x + 0.5 - 0.5 * ctx.twice.cos()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient + gradient * ctx.twice.sin()


class FixedSnake(nn.Module):
    """`Snake1d` whose alpha stays at 1, where the class starts it."""

    def __init__(self, snake: Snake1d) -> None:
        super().__init__()
        self.alpha = nn.Parameter(snake.alpha, requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, C, S) → (B, C, S)."""
        return cast(Tensor, _SnakeOfOne.apply(hidden_states))


def full_rate_units(codec: DacModel) -> list[Any]:
    """The residual units that run 16,000 times a second."""
    blocks = (codec.encoder.block[0], codec.decoder.block[-1])
    return [getattr(block, f"res_unit{n}") for block in blocks for n in (1, 2, 3)]


def without_full_rate_units(codec: DacModel) -> DacModel:
    """A copy of the codec that computes the same in half the time: without them, and with a leaner Snake."""
    light = copy.deepcopy(codec)
    for name, module in list(light.named_modules()):
        if isinstance(module, Snake1d):
            light.set_submodule(name, FixedSnake(module))
    for block in (light.encoder.block[0], light.decoder.block[-1]):
        for n in (1, 2, 3):
            setattr(block, f"res_unit{n}", nn.Identity())
    return light


def with_full_rate_units(light: DacModel, whole: DacModel) -> DacModel:
    """`whole` with the weights of `light`."""
    whole = copy.deepcopy(whole)
    whole.load_state_dict({**whole.state_dict(), **light.state_dict()})
    return whole


def spoken_names() -> list[str]:
    """Every drawing's name once, sorted; "medium-light skin tone" and the like is said as it is written."""
    return sorted(set(named_drawings().values()))


def training_lines(seed: int) -> Iterator[Line]:
    """Captions of scenes that training may see, and names in and out of sentences, in the training voices."""
    rng = random.Random(f"codec-{seed}")
    captions = scenes(f"codec-{seed}")
    names = [name for name in spoken_names() if not phrase_is_held_out(name)]
    while True:
        text = next(captions).caption() if rng.random() < 0.5 else rng.choice(CARRIERS).format(rng.choice(names))
        yield vary(text, rng.choice(TRAINING_VOICES), rng)


def held_out_lines(count: int) -> list[Line]:
    """Lines no codec was trained on: captions of scenes with a held-out pair, and held-out names in the carrier
    sentences, in turn. Every third line is in the held-out voice, the others in the training voices, in turn.
    """
    captions = scenes("codec-held-out", unseen=True)
    names = [name for name in spoken_names() if phrase_is_held_out(name)]
    random.Random("codec-held-out").shuffle(names)
    lines = []
    for index in range(count):
        name = CARRIERS[1 + index // 2 % (len(CARRIERS) - 1)].format(names[index // 2])
        text = name if index % 2 else next(captions).caption()
        voice = TRAINING_VOICES[index // 3 % len(TRAINING_VOICES)] if index % 3 else HELD_OUT_VOICE
        lines.append(Line(text, voice, voice.words_per_minute, voice.pitch))
    return lines


@dataclass
class Corpus:
    """Speech in memory, each sample with the phoneme it belongs to."""

    waves: list[NDArray[np.int16]]
    labels: list[NDArray[np.uint8]]  # one per 10 ms
    phonemes: list[str]

    def crops(self, rng: random.Random, batch: int, samples: int) -> tuple[Tensor, Tensor]:
        """(B, 1, S) sound and (B, S / 160) phonemes; long clips are cropped more often, short ones padded."""
        sound = np.zeros((batch, samples), dtype=np.float32)
        labels = np.zeros((batch, samples // 160), dtype=np.int64)
        weights = [len(wave) for wave in self.waves]
        for row, index in enumerate(rng.choices(range(len(weights)), weights, k=batch)):
            start = rng.randrange(max(1, (weights[index] - samples) // 160 + 1))
            piece = self.waves[index][160 * start :][:samples]
            sound[row, : len(piece)] = piece / 32768
            said = self.labels[index][start:][: labels.shape[1]]
            labels[row, : len(said)] = said
        return torch.from_numpy(sound)[:, None], torch.from_numpy(labels)


def make_corpus(lines: int, seed: int) -> Corpus:
    """Speak `lines` lines: some 4 seconds and 50 ms of work each."""
    phonemes: dict[str, int] = {"": 0}
    waves, labels = [], []
    for line in islice(training_lines(seed), lines):
        spoken = line.speak()
        waves.append((spoken.wave * 32767).astype(np.int16))
        labels.append(_frame_labels(spoken, phonemes))
    return Corpus(waves, labels, list(phonemes))


def _frame_labels(spoken: Utterance, phonemes: dict[str, int]) -> NDArray[np.uint8]:
    """The phoneme of each 10 ms; new phonemes are entered."""
    labels = np.zeros(len(spoken.wave) // 160, dtype=np.uint8)
    for start, mnemonic in spoken.phonemes:
        name = mnemonic.strip("',_|")
        labels[start // 160 :] = phonemes.setdefault(name, len(phonemes))
    return labels


def log_mel_l1(decoded: NDArray[np.float32], sound: NDArray[np.float32]) -> float:
    """Mean absolute difference of the log10 mel magnitudes (1024 samples, hop 256, 80 bands)."""
    spectra = Spectra()
    with torch.no_grad():
        mels = [spectra.magnitudes(torch.from_numpy(wave)[None], SCALES[-1])[1] for wave in (decoded, sound)]
    return float((mels[0].add(FLOOR).log10() - mels[1].add(FLOOR).log10()).abs().mean())


@torch.inference_mode()
def round_trip(codec: DacModel, sound: NDArray[np.float32]) -> tuple[NDArray[np.float32], Tensor]:
    """What is left of a sound (S,) after ids, and the ids (K, F); padded to whole frames, cut to its length."""
    hop = codec.config.hop_length
    padded = F.pad(torch.from_numpy(sound), (0, -len(sound) % hop))[None, None]
    codes = codec.encode(padded).audio_codes
    decoded = codec.decode(audio_codes=codes).audio_values[0, : len(sound)]
    return decoded.numpy(), codes[0]


def phonemes_named_by_ids(codec: DacModel, known: int = 250, asked: int = 60) -> list[float]:
    """For each codebook, the share of held-out frames whose phoneme is named by their id alone.

    No head and no neighbours: an id means what it stands for most often in `known` training lines. That is what a
    language model's row for it can know by itself.
    """
    phonemes: dict[str, int] = {"": 0}
    seen = _coded_frames(codec, islice(training_lines(1), known), phonemes)
    codes, said = _coded_frames(codec, held_out_lines(asked), phonemes)
    shares = []
    for k in range(codec.config.n_codebooks):
        counts = np.zeros((codec.config.codebook_size, len(phonemes)), dtype=np.int64)
        np.add.at(counts, (seen[0][k], seen[1]), 1)
        shares.append(float((counts.argmax(1)[codes[k]] == said).mean()))
    return shares


def _coded_frames(
    codec: DacModel, lines: Iterable[Line], phonemes: dict[str, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids (K, F) and phonemes (F,) of all frames of the lines."""
    codes, said = [], []
    for line in lines:
        spoken = line.speak()
        labels = _frame_labels(spoken, phonemes)
        codes.append(round_trip(codec, spoken.wave)[1].numpy())
        centres = (np.arange(codes[-1].shape[1]) + 0.5) * codec.config.hop_length / 160
        said.append(labels[centres.astype(np.int64).clip(max=len(labels) - 1)])
    return np.concatenate(codes, 1), np.concatenate(said).astype(np.int64)


class Spectra(nn.Module):
    """Distances between two sounds in magnitudes at several resolutions."""

    def __init__(self) -> None:
        super().__init__()
        for window, bands in {(window, bands) for window, _, bands in (*SCALES, MEL_HEAD)}:
            filters = mel_filter_bank(window // 2 + 1, bands, 0.0, SAMPLING_RATE / 2, SAMPLING_RATE, norm=None)
            self.register_buffer(f"mel_{window}", torch.tensor(filters, dtype=torch.float32), persistent=False)
            self.register_buffer(f"window_{window}", torch.hann_window(window), persistent=False)

    def magnitudes(self, sound: Tensor, scale: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """(B, S) → linear (B, bins, frames) and mel (B, M, frames) magnitudes, full scale about 1."""
        window, hop, _ = scale
        shape: Tensor = getattr(self, f"window_{window}")
        spectrum = torch.stft(sound, window, hop, window=shape, return_complex=True)
        power = torch.view_as_real(spectrum).square().sum(-1)
        linear = (power + 1e-9).sqrt() / shape.sum() * 2
        return linear, torch.einsum("bft,fm->bmt", linear, getattr(self, f"mel_{window}"))

    def forward(self, decoded: Tensor, sound: Tensor) -> tuple[Tensor, Tensor]:
        """Mean log10-mel L1, and mean square-root-magnitude L1; both over all scales."""
        mel = linear = torch.zeros(())
        for scale in SCALES:
            linear_out, mel_out = self.magnitudes(decoded, scale)
            with torch.no_grad():
                linear_in, mel_in = self.magnitudes(sound, scale)
            mel = mel + F.l1_loss((mel_out + FLOOR).log10(), (mel_in + FLOOR).log10())
            linear = linear + F.l1_loss((linear_out + FLOOR).sqrt(), (linear_in + FLOOR).sqrt())
        return mel / len(SCALES), linear / len(SCALES)


class CodecTraining(nn.Module):
    """The codec with its losses, its running codebooks and the throwaway heads."""

    uses: Tensor  # (K, entries)
    sums: Tensor  # (K, entries, D)

    def __init__(self, codec: DacModel, phonemes: int, phoneme_weight: float, seed: int) -> None:
        super().__init__()
        self.codec = codec
        config = codec.config
        self.spectra = Spectra()
        self.phoneme_weight = phoneme_weight
        width = config.codebook_dim
        self.head = nn.Sequential(nn.Conv1d(width, 96, 3, padding=1), nn.GELU(), nn.Conv1d(96, phonemes, 1))
        self.steps_of_head, uneven = divmod(config.hop_length, MEL_HEAD[1])
        if uneven:
            raise ModelError(f"The codec's hop {config.hop_length} is not a multiple of the outline's, {MEL_HEAD[1]}.")
        outputs = self.steps_of_head * MEL_HEAD[2]
        self.mel_head = nn.Sequential(
            nn.Conv1d(config.hidden_size, 256, 3, padding=1), nn.GELU(), nn.Conv1d(256, outputs, 1)
        )
        self.steps = 0
        self.generator = torch.Generator().manual_seed(seed)
        shape = (config.n_codebooks, config.codebook_size)
        self.register_buffer("uses", torch.zeros(shape))
        self.register_buffer("sums", torch.zeros(*shape, width))

    def forward(self, sound: Tensor, phonemes: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The loss of (B, 1, S) sound with (B, S / 160) phonemes, and plain figures."""
        _, decoded, quantized, codes, latents = self.codec(sound, return_dict=False)
        mel, linear = self.spectra(decoded, sound[:, 0])
        width = self.codec.config.codebook_dim
        parts = latents.split(width, 1)
        books = [quantizer.codebook.weight for quantizer in quantizers(self.codec)]
        picked = [book[codes[:, k]].transpose(1, 2) for k, book in enumerate(books)]  # (B, D, F) each
        commitment = sum(
            F.mse_loss(part, entry) / entry.var().clamp(min=1e-4) for part, entry in zip(parts, picked, strict=True)
        )
        first = parts[0] + (picked[0] - parts[0]).detach()
        logits = self.head(first)
        target = phonemes[:, self._frame_centres(codes.shape[-1], phonemes.shape[1])]
        spoken = F.cross_entropy(logits, target)
        outline = self._outline_loss(quantized, sound[:, 0])
        loss = mel + 2 * linear + 0.5 * outline + COMMITMENT * commitment + self.phoneme_weight * spoken
        right = (logits.argmax(1) == target).float().mean()
        figures = {
            "mel": mel,
            "outline": outline,
            "linear": linear,
            "commitment": commitment,
            "phoneme": spoken,
            "phoneme_right": right,
        }
        self._last = (codes.detach(), [part.detach() for part in parts])
        return loss, {name: float(value.detach()) for name, value in figures.items()}

    def _outline_loss(self, quantized: Tensor, sound: Tensor) -> Tensor:
        """Log10-mel L1 of what a small head reads off the quantized latents, without the way through the decoder."""
        read = self.mel_head(quantized).unflatten(1, (self.steps_of_head, MEL_HEAD[2]))  # (B, steps, M, F)
        read = read.permute(0, 2, 3, 1).flatten(2)  # (B, M, F × steps)
        with torch.no_grad():
            target = (self.spectra.magnitudes(sound, MEL_HEAD)[1] + FLOOR).log10()[..., : read.shape[-1]]
        return F.l1_loss(read - 2, target)

    def _frame_centres(self, frames: int, labels: int) -> Tensor:
        hop = self.codec.config.hop_length / 160
        return ((torch.arange(frames) + 0.5) * hop).long().clamp(max=labels - 1)

    @torch.no_grad()
    def start_codebooks(self, sound: Tensor) -> None:
        """Each codebook's entries become latents of real sound, one codebook after the other."""
        residual = self.codec.encoder(sound)
        for k, quantizer in enumerate(quantizers(self.codec)):
            latents = quantizer.in_proj(residual).transpose(1, 2).flatten(0, 1)  # (B F, D)
            picks = torch.randint(len(latents), (len(quantizer.codebook.weight),), generator=self.generator)
            quantizer.codebook.weight.copy_(latents[picks])
            self.uses[k], self.sums[k] = 1.0, quantizer.codebook.weight
            residual = residual - quantizer(residual)[0]

    @torch.no_grad()
    def update_codebooks(self) -> float:
        """Entries move to the running mean of their latents; the share of entries in use."""
        codes, parts = self._last
        self.steps += 1
        memory = MEMORY[0] + (MEMORY[1] - MEMORY[0]) * min(1.0, self.steps / MEMORY[2])
        for k, quantizer in enumerate(quantizers(self.codec)):
            latents = parts[k].transpose(1, 2).flatten(0, 1)
            picked = codes[:, k].flatten()
            uses = torch.zeros_like(self.uses[k]).index_add_(0, picked, torch.ones(len(picked)))
            sums = torch.zeros_like(self.sums[k]).index_add_(0, picked, latents)
            self.uses[k].lerp_(uses, 1 - memory)
            self.sums[k].lerp_(sums, 1 - memory)
            dead = (self.uses[k] < DEAD * len(picked) / len(uses)).nonzero()[:, 0]
            picks = torch.randint(len(latents), (len(dead),), generator=self.generator)
            self.uses[k, dead] = len(picked) / len(uses)
            self.sums[k, dead] = latents[picks] * self.uses[k, dead, None]
            quantizer.codebook.weight.copy_(self.sums[k] / self.uses[k, :, None])
        return 1 - len(dead) / len(uses)


def optimizers(training: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions of some size, AdamW for everything else."""
    weights = [weight for weight in training.parameters() if weight.requires_grad]
    large = [weight for weight in weights if weight.ndim == 3 and min(weight.flatten(1).shape) >= 16]
    others = [weight for weight in weights if not any(weight is one for one in large)]
    return [
        Muon(large, muon_lr, DECAY, orthogonal_by_gram),
        torch.optim.AdamW(others, adam_lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]
