"""Which phrase did stage 4 of the demo say? Without a recogniser: whose ids are its ids most like?

    python scripts/check_said_phrases.py runs/demo

Held-out phrases are said with the demo's own sampling. The ids of the first codebook are compared with those of all
their recordings: is its own the most similar one? And is each half of its own recording there, by 60 % of its ids in
their order? Of a phrase of two names, a half is a name. The same is asked of the next phrase's recording, which shares
no more than the words between: what chance would find. Prints one line per number of words.
"""

import argparse
import json
from collections import Counter, defaultdict
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import torch

from qwen3_vlm import TokenLM
from qwen3_vlm.data.shards import open_shards
from qwen3_vlm.demo.draw_run import OPTIONS
from qwen3_vlm.generate.generation import generate_ids
from qwen3_vlm.generate.sampling import Choice, Sampling

ENOUGH = 0.6  # of a half's ids


def first_codebook(ids: np.ndarray, codebooks: int) -> list[int]:
    """Whole frames alone."""
    frames: list[int] = ids[: len(ids) // codebooks * codebooks].reshape(-1, codebooks)[:, 0].tolist()
    return frames


def likeness(said: list[int], recorded: list[int]) -> SequenceMatcher[int]:
    return SequenceMatcher(None, said, recorded, autojunk=False)


def halves(said: list[int], recorded: list[int]) -> tuple[bool, bool]:
    """Whether the first and the second half of the recording is in what was said."""
    found = np.zeros(len(recorded))
    for block in likeness(said, recorded).get_matching_blocks():
        found[block.b : block.b + block.size] = 1
    first, second = np.array_split(found, 2)
    return bool(first.mean() >= ENOUGH), bool(second.mean() >= ENOUGH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of a finished `demo --later`")
    parser.add_argument("--phrases", type=int, default=OPTIONS.sounds)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = TokenLM.from_add_on(arguments.out / "draw_run" / "rows").eval()
    shards = open_shards(arguments.out / "draw_tokens" / "spoken_unseen", split="val")
    records = [shards[index] for index in range(arguments.phrases)]
    manifest = (arguments.out / "draw_data" / "manifest_spoken_unseen.jsonl").read_text(encoding="utf-8")
    written = [json.loads(line)["text"] for line in manifest.splitlines()]
    texts = [written[int(record.id.rpartition("-")[2])] for record in records]
    choice = Choice(temperature=OPTIONS.temperature, top_p=OPTIONS.top_p)
    answers = generate_ids(
        model,
        [("t2a", {"text": record.ids["text"]}) for record in records],
        sampling=Sampling(audio=choice, guidance=OPTIONS.guidance),
        batch_size=50,
    )
    codebooks = model.token_space.audio.num_codebooks
    said = [first_codebook(np.asarray(segments[0].ids), codebooks) for segments in answers]
    recorded = [first_codebook(np.asarray(record.ids["audio"]), codebooks) for record in records]
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    others = [*recorded[1:], recorded[0]]
    for text, mine, own, another in zip(texts, said, recorded, others, strict=True):
        scores = [likeness(mine, other).ratio() for other in recorded]
        nearest = {other for other, score in zip(texts, scores, strict=True) if score == max(scores)}
        found = counts[len(text.split())]
        found.update({"phrases": 1, "nearest": text in nearest})
        found.update(dict(zip(("first", "second"), halves(mine, own), strict=True)))
        found.update(dict(zip(("other first", "other second"), halves(mine, another), strict=True)))
    for words, found in sorted(counts.items()):
        print(
            f"{words} words: own recording nearest of {len(records)} in {found['nearest']} of {found['phrases']}; "
            f"its first half there in {found['first']}, its second in {found['second']}; "
            f"another's in {found['other first']} and {found['other second']}"
        )


if __name__ == "__main__":
    main()
