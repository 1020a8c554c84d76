"""README.md of an exported model: what its ids mean, how it is asked, what it was measured to do, what it can't."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from qwen3_vlm.checks import Check
from qwen3_vlm.models.lora import ADAPTER
from qwen3_vlm.models.trunk import TRUNK
from qwen3_vlm.tokenization.sequences import BOUNDARIES, SEQUENCES
from qwen3_vlm.tokenization.token_space import Content, TokenSpace

__all__ = ["model_card"]

_TASKS = {"i2t": "picture → words", "a2t": "sound → words", "t2i": "words → picture", "t2a": "words → sound"}
_CONTENT = {"text": "text", "image": "`<|image_…|>` × {ids}", "audio": "`<|audio_0_…|>` `<|audio_1_…|>` … per frame"}


def model_card(
    info: Mapping[str, Any],
    space: TokenSpace,
    gates: Sequence[Check],
    names: Sequence[str],
    kind: str,
    dtype: torch.dtype,
) -> str:
    """Markdown with the front matter that the hub reads.

    Args:
        info: trainable_rows.json.
        gates: those of evidence.json, judged by their figures.
        names: of the ids from `text_tokenizer_size` on, as the exported tokenizer has them.
        kind: class of the base.
        dtype: that the weights are exported in.
    """
    precision = str(dtype).removeprefix("torch.")
    blocks = "one matrix serves both" if not info["has_lm_head"] else "the head has its own"
    parts = [
        _front_matter(info, space),
        f"# {space.text.name} with {' and '.join(_abilities(space))}",
        f"An ordinary `{kind}`: the language model **{space.text.name}**, {_base_weights(info)}, with "
        f"{info['row_end'] - info['row_start']:,} vocabulary rows behind its own (ids {info['row_start']:,} to "
        f"{info['row_end'] - 1:,}; embedding and head: {blocks}). Nothing else was trained{_training(info)}. "
        f"Weights are {precision}.",
        _example(space, names),
        "## Ids\n\n" + _ranges(space, names),
        "## Prompts\n\nEach ends with the token after which the model goes on, until the end token of that segment.\n\n"
        + _prompts(space, names),
        "## Evidence\n\n" + _gates(gates),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(info, space, precision)),
        "## Identity\n\n" + _identity(info, space),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(info: Mapping[str, Any], space: TokenSpace) -> str:
    on_hub = "/" in space.text.name and info["base_llm"] == space.text.name
    base = f"base_model: {space.text.name}\n" if on_hub else ""
    return f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{base}tags:\n- qwen3-vlm\n---"


def _abilities(space: TokenSpace) -> list[str]:
    return ["pictures"] * (space.image is not None) + ["sound"] * (space.audio is not None) or ["special tokens"]


def _base_weights(info: Mapping[str, Any]) -> str:
    if TRUNK in info["files"]:
        return "its decoder trained further and its own vocabulary rows unchanged"
    return "with a LoRA adapter merged into its weights" if ADAPTER in info["files"] else "its weights unchanged"


def _training(info: Mapping[str, Any]) -> str:
    stage, step = info.get("stage"), info.get("step")
    if not isinstance(stage, str) or not isinstance(step, int):
        return ""
    return f" (stage `{' '.join(stage.split())}`, step {step:,})"


def _example(space: TokenSpace, names: Sequence[str]) -> str:
    target: Content = "image" if space.image is not None else "audio"
    specials = [*BOUNDARIES["text"][:2], BOUNDARIES[target].gen, BOUNDARIES[target].start]
    start, end, gen, begin = (_name(special, space, names) for special in specials)
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
prompt = "{start}a red heart{end}{gen}{begin}"
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
ids = model.generate(**inputs, max_new_tokens=1024)
```"""


def _name(special: str, space: TokenSpace, names: Sequence[str]) -> str:
    return names[space.special(special) - space.text.tokenizer_size]


def _ranges(space: TokenSpace, names: Sequence[str]) -> str:
    first = space.text.tokenizer_size
    rows = [["TEXT", f"0 – {first - 1:,}", "the base's own tokens"]]
    if first < space.text.vocab_size:
        ids = (first, space.text.vocab_size - 1)
        rows.append(["unused rows of the base", f"{ids[0]:,} – {ids[1]:,}", _named(names[0], names[ids[1] - first])])
    for name, span in list(space.ranges.items())[1:]:
        ends = (names[span.first - first], names[span.last - first])
        rows.append([name, f"{span.first:,} – {span.last:,}", _named(*ends)])
    return _table(["range", "ids", "tokens"], rows)


def _prompts(space: TokenSpace, names: Sequence[str]) -> str:
    def say(special: str) -> str:
        return f"`{_name(special, space, names)}`"

    count = space.image.num_ids if space.image is not None else 0
    rows = []
    for task, title in _TASKS.items():
        form = SEQUENCES[task]
        there = {"text": True, "image": space.image is not None, "audio": space.audio is not None}
        if there[form.source] and there[form.target]:
            source, target = BOUNDARIES[form.source], BOUNDARIES[form.target]
            content = _CONTENT[form.source].format(ids=count)
            prompt = f"{say(source.start)} {content} {say(source.end)} {say(target.gen)} {say(target.start)}"
            answer = f"{_CONTENT[form.target].format(ids=count)} {say(target.end)}"
            rows.append([title, prompt, answer])
    return _table(["task", "prompt", "answer"], rows)


def _gates(gates: Sequence[Check]) -> str:
    outcomes = {True: "passed", False: "**failed**", None: "–"}
    rows = [[gate.name.removeprefix("gate "), outcomes[gate.passed], gate.detail] for gate in gates]
    return _table(["gate", "outcome", "figures"], rows) + "\n\nAll figures are in `evidence.json`."


def _limits(info: Mapping[str, Any], space: TokenSpace, precision: str) -> list[str]:
    lines = [
        "Nothing here keeps ids in order: a free-running model may give a picture too few ids, or a sound's codebooks "
        "in the wrong order, and such ids do not decode. `qwen3-vlm generate` allows only what decodes.",
        "Pictures and sounds become ids, and ids become pictures and sounds, by the tokenizers that `uti.yaml` names.",
        "A string such as `<|img_start|>` in a text is that token. Encode text from others with "
        "`split_special_tokens=True`.",
        "Answers in words are not the base's: its weights were trained; `evidence.json` says how far they moved."
        if {ADAPTER, TRUNK} & {*info["files"]}
        else "With new ids allowed, answers in words can differ from the base's; over its own ids scores are the same.",
    ]
    if space.text.tokenizer_size < space.text.vocab_size:
        lines.append(
            "The base's unused rows keep its weights; `generation_config.json` suppresses them, `qwen3-vlm` scores −∞."
        )
    if precision != "float32":
        lines.append(f"What was trained in float32 is rounded to {precision} here.")
    return lines


def _identity(info: Mapping[str, Any], space: TokenSpace) -> str:
    rows = [
        ["token space", space.sha256],
        ["base", info["base_fingerprint"].get("sha256")],
        ["tokenizer of the base", info["tokenizer_fingerprint"].get("sha256")],
        ["trained rows", info["files"]["trainable_rows.pt"].get("sha256")],
    ]
    rows += [[name, part.weights_sha256] for name, part in _tokenizers(space)]
    return _table(["what", "sha256"], [[name, f"`{digest}`"] for name, digest in rows])


def _tokenizers(space: TokenSpace) -> list[tuple[str, Any]]:
    found = [("image tokenizer", space.image), ("audio codec", space.audio)]
    return [(f"{name} {part.name}", part) for name, part in found if part is not None]


def _named(first: str, last: str) -> str:
    return f"`{first}`" if first == last else f"`{first}` … `{last}`"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
