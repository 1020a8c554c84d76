"""Measure the demo's DacModel on 240 held-out clips: word error rates before and after, log-mel L1, use of its ids.

python scripts/check_audio_codec.py --codec qwen3_vlm/demo/bases/audio_codec --out scripts/check_audio_codec.json
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DacModel

from qwen3_vlm.demo import audio_codec as recipe
from qwen3_vlm.demo.voices import HELD_OUT_VOICE, SAMPLING_RATE, Wave
from qwen3_vlm.evaluate.speech import Recogniser, word_error_rate, word_error_ratio


def main() -> None:
    """Speak, encode, decode, recognise, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codec", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=240)
    parser.add_argument("--transcripts", type=Path, help="transcripts of an earlier run of the same codec")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = recipe.held_out_lines(args.clips)
    sounds = [line.speak().wave for line in lines]
    codec = DacModel.from_pretrained(args.codec, dtype=torch.float32).eval()
    started = time.time()
    trips = [recipe.round_trip(codec, sound) for sound in sounds]
    seconds = sum(map(len, sounds)) / SAMPLING_RATE
    report: dict[str, Any] = {
        "clips": len(lines),
        "seconds": round(seconds, 1),
        "times_faster_than_real_time": round(seconds / (time.time() - started), 1),
        "parameters": sum(p.numel() for p in codec.parameters()),
        "ids_per_second": SAMPLING_RATE / codec.config.hop_length * codec.config.n_codebooks,
        "log10_mel_l1": float(np.mean([recipe.log_mel_l1(trip[0], s) for trip, s in zip(trips, sounds, strict=True)])),
        "codebooks": _use_of_ids(torch.cat([trip[1] for trip in trips], 1), codec.config.codebook_size),
        "phoneme_named_by_one_id_of_each_codebook": recipe.phonemes_named_by_ids(codec),
    }
    before, after = _transcripts(sounds, [trip[0] for trip in trips], args.transcripts)
    parts = {
        "all": range(len(lines)),
        "captions": [i for i in range(len(lines)) if i % 2 == 0],
        "names": [i for i in range(len(lines)) if i % 2],
        "held_out_voice": [i for i, line in enumerate(lines) if line.voice == HELD_OUT_VOICE],
    }
    for name, chosen in parts.items():
        said, first, second = ([texts[i] for i in chosen] for texts in ([line.text for line in lines], before, after))
        report[name] = {
            "original": word_error_rate(said, first).rate.to_dict(),
            "round_trip": word_error_rate(said, second).rate.to_dict(),
            "ratio": word_error_ratio(said, second, first).to_dict(),
        }
    report["examples"] = [
        {"said": lines[i].text, "voice": lines[i].voice.name, "original": before[i], "round_trip": after[i]}
        for i in range(12)
    ]
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "examples"}, indent=1))


def _transcripts(sounds: list[Wave], trips: list[Wave], earlier: Path | None) -> tuple[list[str], list[str]]:
    """What the recogniser hears in the originals and in the round trips."""
    if earlier:
        kept = json.loads(earlier.read_text())
        return kept["original"], kept["round_trip"]
    recogniser = Recogniser()
    return recogniser.transcribe(sounds), recogniser.transcribe(trips)


def _use_of_ids(codes: torch.Tensor, size: int) -> list[dict[str, float]]:
    """For each codebook: ids that occur, and the perplexity of their distribution."""
    use = []
    for row in codes:
        share = torch.bincount(row, minlength=size) / row.numel()
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        use.append({"ids_used": int((share > 0).sum()), "perplexity": round(float(entropy.exp()), 1)})
    return use


if __name__ == "__main__":
    main()
