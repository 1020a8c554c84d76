"""How many of 10,000 pictures and 10,000 sounds of an untrained model can be decoded, with the grammar and without.

    python benchmarks/valid_ids.py                # ten minutes on two cores
    python benchmarks/valid_ids.py --samples 200  # a quick look

The token space, the codecs and the text base are the demo's own; the new rows are fresh, so the model's scores are
noise. Ids are sampled at temperature 1.5 and every answer goes through the strict `UnifiedTokenizer`, which refuses
ids of another range, codebooks out of order, short frames and wrong grids. With the grammar all have to pass. Without
it the library samples from the same model at the same temperature, as many ids at most; what stands before the first
end token (or all of it, where none came) is the answer.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import show, write_result
from torch import Tensor
from transformers import AutoModelForCausalLM

from qwen3_vlm.errors import TokenError
from qwen3_vlm.evaluate.intervals import wilson_interval
from qwen3_vlm.generate.generation import generate_ids, pad_left
from qwen3_vlm.generate.grammar import Grammar
from qwen3_vlm.generate.sampling import Choice, Sampling
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.tokenization.sequences import BOUNDARIES, prompt_ids
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer

ROOT = Path(__file__).parents[1]
TASKS = {"image": "t2i", "audio": "t2a"}


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    uti = open_tokenizer()
    base = AutoModelForCausalLM.from_pretrained(ROOT / "qwen3_vlm/demo/bases/text", dtype=torch.float32)
    model = TokenLM.grow(base, uti.token_space, seed=options.seed).eval()
    grammar = Grammar(uti.token_space, max_frames=options.max_frames)
    result: dict[str, Any] = {"settings": {name: str(value) for name, value in vars(options).items()}}
    for target in TASKS:
        prompts = make_prompts(uti, target, options.samples)
        result[target] = {
            "grammar": measure(uti, target, with_grammar(model, prompts, grammar, options)),
            "without": measure(uti, target, without_grammar(model, prompts[: options.without], grammar, options)),
        }
        report(target, result[target])
    write_result(options.out, result)
    if any(result[target]["grammar"]["decoded"] != options.samples for target in TASKS):
        raise SystemExit("An answer that the grammar let through can't be decoded.")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Which share of generated pictures and sounds can be decoded.")
    parser.add_argument("--samples", type=int, default=10_000, help="pictures, and as many sounds")
    parser.add_argument("--without", type=int, default=2_000, help="of them also generated without the grammar")
    parser.add_argument("--batch-size", type=int, default=500, help="answers generated at a time")
    parser.add_argument("--max-frames", type=int, default=8, help="longest sound")
    parser.add_argument("--temperature", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0, help="of the new rows, and of the first sample")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/valid_ids.json")
    return parser.parse_args()


def open_tokenizer() -> UnifiedTokenizer:
    """The demo's; the sources in its file are relative to the repository's folder."""
    bases = ROOT / "qwen3_vlm/demo/bases"
    sources = {"text.tokenizer": "text", "image.source": "image_tokenizer", "audio.source": "audio_codec"}
    overrides = [f"{key}={bases / name}" for key, name in sources.items()]
    return UnifiedTokenizer.open(ROOT / "configs/demo_uti.yaml", overrides)


def make_prompts(uti: UnifiedTokenizer, target: str, count: int) -> list[tuple[str, dict[str, Any]]]:
    """Random words of one to nine ids, so that rows of a batch are padded."""
    random = np.random.default_rng(0)
    size = uti.token_space.text.tokenizer_size
    return [(TASKS[target], {"text": random.integers(0, size, random.integers(1, 10))}) for _ in range(count)]


def with_grammar(
    model: TokenLM, prompts: Sequence[Any], grammar: Grammar, options: argparse.Namespace
) -> Iterator[list[int]]:
    """Answers without their end tokens."""
    choice = Choice(temperature=options.temperature)
    for start in range(0, len(prompts), options.batch_size):
        chunk = prompts[start : start + options.batch_size]
        settings: dict[str, Any] = {"sampling": Sampling(image=choice, audio=choice), "seed": options.seed + start}
        answers = generate_ids(model, chunk, grammar=grammar, batch_size=options.batch_size, **settings)
        yield from (answer[0].ids.tolist() for answer in answers)


def without_grammar(
    model: Any, prompts: Sequence[Any], grammar: Grammar, options: argparse.Namespace
) -> Iterator[list[int]]:
    """The same by the library's own sampling, up to the first end token."""
    space = model.token_space
    ends = {space.special(boundary.end) for boundary in BOUNDARIES.values()}
    torch.manual_seed(options.seed)
    for start in range(0, len(prompts), options.batch_size):
        rows = [prompt_ids(space, task, ids) for task, ids in prompts[start : start + options.batch_size]]
        input_ids, attention_mask = pad_left(rows, grammar.pad_id)
        first = "image" if prompts[start][0] == "t2i" else "audio"
        sampled = {"do_sample": True, "temperature": options.temperature, "top_k": 0}
        config = grammar.generation_config(first, **sampled)
        output: Tensor = model.generate(input_ids, attention_mask=attention_mask, generation_config=config)
        for row in output[:, input_ids.shape[1] :].tolist():
            stop = next((place for place, value in enumerate(row) if value in ends), len(row))
            yield row[:stop]


def measure(uti: UnifiedTokenizer, target: str, answers: Iterator[list[int]]) -> dict[str, Any]:
    """How many answers the tokenizer turns into a picture or a sound, and why it refuses the others."""
    started = time.perf_counter()
    found = list(answers)
    generated = time.perf_counter()
    reasons = Counter(refusal(uti, target, ids) for ids in found)
    decoded = reasons.pop("", 0)
    rate = wilson_interval(decoded, len(found))
    return {
        "answers": len(found),
        "decoded": decoded,
        "rate": rate.to_dict(),
        "refused": dict(reasons.most_common()),
        "different": len({tuple(ids) for ids in found}),
        "ids": {"least": min(map(len, found)), "most": max(map(len, found))},
        "seconds": {"generating": generated - started, "decoding": time.perf_counter() - generated},
    }


def refusal(uti: UnifiedTokenizer, target: str, ids: list[int]) -> str:
    """Why these ids are no picture or sound; empty: they are one."""
    try:
        if target == "image":
            return "" if uti.decode_image(ids).size == (64, 64) else "wrong_size"
        waveform, _ = uti.decode_audio(ids)
    except TokenError as error:
        return error.reason
    return "" if waveform.size and np.isfinite(waveform).all() else "no_sound"


def report(target: str, result: dict[str, Any]) -> None:
    rows = []
    for name, part in result.items():
        figures = f"{part['decoded']:,} of {part['answers']:,} decode ({part['rate']['value']:.2%})"
        refused = ", ".join(f"{count:,} {reason}" for reason, count in part["refused"].items())
        rows.append((name, f"{figures}{'; refused: ' * bool(refused)}{refused}"))
    show(f"{target}, untrained model", rows)


if __name__ == "__main__":
    main()
