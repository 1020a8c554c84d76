"""Decoding pictures: under the grammar, with and without the range-restricted head, against unconstrained `generate`.

    python benchmarks/decoding.py             # Qwen3-0.6B's shape, 151,936 + 20,544 ids, fp32; ten minutes on two cores
    python benchmarks/decoding.py --layers 4  # a quick look

One model in memory, several ways to decode the same number of ids from the same prompts, turn about, the best of each:

- *plain*: the matrices resized, `Qwen3ForCausalLM.generate`, no constraint: what one has without this package;
- *unconstrained*: `TokenLM.generate`, two blocks, no constraint;
- *masked*: under the grammar, all ids scored;
- *ranged*: under the grammar, only the rows of ids that can come multiplied.

The weights are shared by all ways (random: time does not depend on their values). Masked and ranged have to give the
same ids, and so does the plain model when it is given the grammar's processor.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import random_frozen, show, write_result
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, Qwen3Config, Qwen3ForCausalLM

from qwen3_vlm.generate.generation import pad_left
from qwen3_vlm.generate.grammar import Grammar, GrammarProcessor
from qwen3_vlm.generate.sampling import Sampler, Sampling
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.models.vocabulary_rows import add_rows
from qwen3_vlm.tokenization.sequences import prompt_ids
from qwen3_vlm.tokenization.token_space import AudioIdentity, ImageIdentity, TextIdentity, TokenSpace

BASE_ROWS, TOKENIZER_IDS, IMAGE_CODES, AUDIO_CODES = 151_936, 151_669, 16_384, (1024,) * 4
GOALS = {"masked": 1.0, "ranged": 1.15}  # speed over unconstrained `generate`, at the least
Way = Callable[[], Tensor]  # → (B, n) new ids


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    plain, model = build_models(options)
    result: dict[str, Any] = {"settings": {name: str(value) for name, value in vars(options).items()}}
    result["ids"] = model.token_space.vocab_size_total
    for batch_size in options.batch_sizes:
        result[f"batch_{batch_size}"] = compare(make_ways(plain, model, batch_size), options.rounds)
        report(batch_size, result[f"batch_{batch_size}"])
    write_result(options.out, result)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed of constrained decoding of image ids.")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--base-rows", type=int, default=BASE_ROWS)
    parser.add_argument("--side", type=int, default=6, help="a picture has side × side ids")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "decoding.json")
    return parser.parse_args()


def token_space(options: argparse.Namespace) -> TokenSpace:
    """The real sizes: with 64 specials 20,544 new ids."""
    used = min(TOKENIZER_IDS, options.base_rows)
    text = TextIdentity("Qwen/Qwen3-0.6B", options.base_rows, used, "0" * 64)
    pixels = (16 * options.side, 16 * options.side)
    image = ImageIdentity("vq", "janus_vqvae", IMAGE_CODES, pixels, (options.side, options.side), "1" * 64)
    audio = AudioIdentity("codec", "dac", AUDIO_CODES, 16_000, 1, 320, 2.0, "2" * 64)
    return TokenSpace.build(text, image, audio)


def build_models(options: argparse.Namespace) -> tuple[Any, TokenLM]:
    """The resized model and the TokenLM over the same tensors; fp32, tied."""
    space = token_space(options)
    settings: dict[str, Any] = {
        "hidden_size": options.width,
        "intermediate_size": 3 * options.width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": max(1, options.width // 64),
        "num_key_value_heads": max(1, options.width // 128),
        "head_dim": 128,
        "tie_word_embeddings": True,
        "attn_implementation": "sdpa",
    }
    config = Qwen3Config(vocab_size=space.vocab_size_total, **settings)
    plain = random_frozen(lambda: Qwen3ForCausalLM(config), torch.float32)
    with torch.device("meta"):
        base: Any = Qwen3ForCausalLM(Qwen3Config(vocab_size=options.base_rows, **settings))
    base.model.layers, base.model.norm, base.model.rotary_emb = (
        plain.model.layers,
        plain.model.norm,
        plain.model.rotary_emb,
    )
    table = plain.get_input_embeddings().weight.data
    shared = nn.Parameter(table[: options.base_rows], requires_grad=False)
    base.model.embed_tokens.weight = base.lm_head.weight = shared
    add_rows(base, table[options.base_rows :], None, num_used=space.text.tokenizer_size)
    model = TokenLM(base, space).eval()
    for each in (plain.eval(), model):
        each.generation_config = GenerationConfig()
    return plain, model


def make_ways(plain: Any, model: Any, batch_size: int) -> dict[str, Way]:
    """Each decodes one picture per row and its end token, or as many ids without constraint."""
    space = model.token_space
    grammar = Grammar(space)
    random = np.random.default_rng(0)
    rows = [prompt_ids(space, "t2i", {"text": random.integers(0, 1000, 12)}) for _ in range(batch_size)]
    input_ids, attention_mask = pad_left(rows, grammar.pad_id)
    free: dict[str, Any] = {"eos_token_id": None}

    def way(who: Any, processor: LogitsProcessor | None = None, ranged: bool = False, **changes: Any) -> Way:
        def run() -> Tensor:
            output: Tensor = who.generate(
                input_ids,
                attention_mask=attention_mask,
                logits_processor=LogitsProcessorList([] if processor is None else [processor]),
                generation_config=grammar.generation_config("image", **changes),
                **({"grammar": grammar} if ranged else {}),
            )
            return output[:, input_ids.shape[1] :]

        return run

    masks = GrammarProcessor(grammar)
    sampler = Sampler(grammar, Sampling(), range(batch_size))
    drawn: dict[str, Any] = {"do_sample": True, "top_k": 0}
    return {
        "greedy plain": way(plain, **free),
        "greedy unconstrained": way(model, **free),
        "greedy masked": way(model, masks),
        "greedy ranged": way(model, masks, ranged=True),
        "sampled plain": way(plain, **free, **drawn),
        "sampled unconstrained": way(model, **free, **drawn),
        "sampled masked": way(model, sampler),
        "sampled ranged": way(model, sampler, ranged=True),
        "greedy plain under the grammar": way(plain, masks),
    }


def compare(ways: dict[str, Way], rounds: int) -> dict[str, Any]:
    """Seconds per step of each way, turn about; the ids that have to be the same are."""
    ids = {name: way() for name, way in ways.items()}  # warms up
    require_same(ids, "greedy masked", "greedy ranged", "greedy plain under the grammar")
    require_same(ids, "sampled masked", "sampled ranged")
    lengths = {name: found.shape[1] for name, found in ids.items()}
    if len(set(lengths.values())) != 1:
        raise SystemExit(f"The ways decoded different numbers of ids: {lengths}")
    timed = [name for name in ways if "under the grammar" not in name]
    wall, cpu = dict.fromkeys(timed, float("inf")), dict.fromkeys(timed, float("inf"))
    for _ in range(rounds):
        for name in timed:
            begin, cpu_begin = time.perf_counter(), time.process_time()
            ways[name]()
            wall[name] = min(wall[name], (time.perf_counter() - begin) / lengths[name])
            cpu[name] = min(cpu[name], (time.process_time() - cpu_begin) / lengths[name])
    return {
        "steps": lengths["greedy plain"],
        "seconds_per_step": wall,
        "cpu_seconds_per_step": cpu,  # of all threads: tells a busy machine from slow code
        "speed": ratios(wall),
        "speed_by_cpu_seconds": ratios(cpu),
        "same_ids": True,
    }


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """How much faster masked and ranged decoding are."""
    return {
        f"{how} {name} over {other}": seconds[f"{how} {other}"] / seconds[f"{how} {name}"]
        for how in ("greedy", "sampled")
        for name in ("masked", "ranged")
        for other in ("unconstrained", "plain")
    }


def require_same(ids: dict[str, Tensor], *names: str) -> None:
    if any(not torch.equal(ids[names[0]], ids[name]) for name in names[1:]):
        raise SystemExit(f"Different ids came from {' and '.join(names)}.")


def report(batch_size: int, result: dict[str, Any]) -> None:
    seconds, cpu = result["seconds_per_step"], result["cpu_seconds_per_step"]
    rows = [(name, f"{1000 * seconds[name]:7.1f} ms a step, {1000 * cpu[name]:7.1f} ms of CPU") for name in seconds]
    show(f"{batch_size} at a time, {result['steps']} ids each", rows)
    by_cpu = result["speed_by_cpu_seconds"]
    rows = [
        (name, f"{value:.3f} × (by CPU seconds {by_cpu[name]:.3f}); goal: {GOALS[name.split()[1]]:g}")
        for name, value in result["speed"].items()
    ]
    show("speed", rows)


if __name__ == "__main__":
    main()
