"""A connector as a model of lmms-eval 0.7 (https://github.com/EvolvingLMMs-Lab/lmms-eval): its picture benchmarks.

    lmms-eval --model qwen3_vlm --model_args pretrained=runs/stage1/connector --tasks mme --batch_size 8

`Qwen3VLMChat` gets messages; `Qwen3VLMSimple` (`--force_simple`) a text and a list of pictures, and also
the multiple-choice tasks, which ask for likelihoods. lmms-eval is no dependency of this package: it finds this module
through the entry point group `lmms_eval.models`, see `evaluate.lmms_eval_entry`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from PIL import Image

from qwen3_vlm.config import DataConfig
from qwen3_vlm.data.images import load_image
from qwen3_vlm.errors import ConfigError, DataError, ModelError
from qwen3_vlm.evaluate.captioning import Request, generate_answers
from qwen3_vlm.tokenization.exact import choose_device
from qwen3_vlm.train.add_ons import load_vlm
from qwen3_vlm.train.connector_files import INFO

MAX_NEW_TOKENS = 1024  # where a task does not say
AUTO_BATCH_SIZE = 8  # for --batch_size auto
_PASSED_ON = ("temperature", "top_p", "top_k", "num_beams", "do_sample", "repetition_penalty")
Message = dict[str, Any]


class Qwen3VLMChat(lmms):  # type: ignore[misc]  # lmms-eval has no annotations that we can see
    """See the module. The arguments are those of `--model_args`.

    Args:
        pretrained: connector directory or its hub id, or the folder that `qwen3-vlm export` wrote of one.
        llm, vision_tower: bases to use instead of those that the connector names.
        dtype: of the bases, such as "bfloat16"; by default that of the training.
        system_prompt: a text, or the path of a file that holds one.
        device, batch_size, max_batch_size: as lmms-eval passes them.

    Raises:
        ConfigError: `pretrained` is missing.
        AddOnError, BaseMismatchError, TamperedFileError, ModelError: see `load_vlm`.
    """

    is_simple: ClassVar[bool] = False

    def __init__(
        self,
        pretrained: str = "",
        llm: str | None = None,
        vision_tower: str | None = None,
        dtype: str | None = None,
        attn_implementation: str = "sdpa",
        system_prompt: str = "",
        trust_remote_code: bool = False,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
    ) -> None:
        super().__init__()
        if not pretrained:
            raise ConfigError("Say which connector: --model_args pretrained=DIR.")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        alone = device is not None and self._world_size == 1
        self.device = choose_device(str(device)) if alone else self.accelerator.device
        self.batch_size = AUTO_BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size)
        self.system_prompt = self._resolve_system_prompt(system_prompt)
        options: dict[str, Any] = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
        self.model, self.processor = _load(pretrained, llm, vision_tower, dtype, options)
        self.model.to(self.device)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer per request, cut where the task says; requests that are decoded alike share batches."""
        answers = [""] * len(requests)
        for settings, numbers in _alike([self._settings(request) for request in requests]):
            until, most, decoding = settings
            for start in range(0, len(numbers), self.batch_size):
                chunk = numbers[start : start + self.batch_size]
                asked = [self._request(self._messages(requests[number])) for number in chunk]
                texts = generate_answers(
                    self.model,
                    self.processor,
                    asked,
                    max_new_tokens=self._room(asked, most),
                    batch_size=self.batch_size,
                    decoding=dict(decoding),
                )
                for number, text in zip(chunk, texts, strict=True):
                    answers[number] = _cut(text, until)
                    context = requests[number].args[0]
                    self.cache_hook.add_partial("generate_until", (context, self._kwargs(requests[number])), text)
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered: the task, not the model, would have to say what follows an answer."""
        raise NotImplementedError("qwen3_vlm answers in one round; tasks of several rounds can't be run with it.")

    @torch.no_grad()
    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(Log-probability of the continuation in nats, whether it is what greedy decoding would say) of each."""
        return [self._likelihood(request) for request in requests]

    def _likelihood(self, request: Any) -> tuple[float, bool]:
        context, wanted, to_visual, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        text = wanted if isinstance(wanted, str) else str(wanted(doc))
        asked = self._request(_as_messages(context, to_visual(doc)))
        prompt = self.processor.encode_prompt(asked.messages)
        answer = self.tokenizer(text.lstrip(" "), add_special_tokens=False)["input_ids"]
        if not answer:
            raise DataError(f"Document {doc_id} of {task} asks how likely an empty answer is.")
        pixels = self.processor.pixel_values(asked.images) if asked.images else {}
        logits = self.model(
            input_ids=torch.tensor([prompt + answer], device=self.device),
            logits_to_keep=len(answer) + 1,
            **{name: value.to(self.device) for name, value in pixels.items()},
        ).logits[0, :-1]  # (answer, V): each row foretells one of its ids
        ids = torch.tensor(answer, device=self.device)
        scores = logits.float().log_softmax(-1).gather(1, ids[:, None])
        return float(scores.sum()), bool((logits.argmax(-1) == ids).all())

    def _messages(self, request: Any) -> list[Message]:
        """lmms-eval's messages of a request."""
        _, to_messages, _, doc_id, task, split = request.args
        messages: list[Message] = to_messages(self.task_dict[task][split][doc_id])
        return messages

    def _kwargs(self, request: Any) -> dict[str, Any]:
        return dict(request.args[2])

    def _settings(self, request: Any) -> tuple[tuple[str, ...], int, tuple[tuple[str, Any], ...]]:
        """How a request is decoded: where to stop, longest answer, fields of GenerationConfig."""
        given = self._kwargs(request)
        until = given.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(until)
        most = int(given.get("max_new_tokens") or given.get("max_gen_toks") or MAX_NEW_TOKENS)
        return stops, most, tuple(_decoding(given).items())

    def _request(self, messages: Sequence[Message]) -> Request:
        """lmms-eval's messages → ours: text with a mark for each picture.

        Raises:
            DataError: they hold something else than text and pictures.
        """
        found: list[Message] = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        pictures: list[Image.Image] = []
        for message in messages:
            parts = message["content"]
            parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
            lines = []
            for part in parts:
                if part["type"] == "text":
                    lines.append(str(part["text"]).replace(self.processor.image_token, "").replace("<image>", ""))
                else:
                    pictures.append(_picture(part))
                    lines.append(self.processor.image_token)
            found.append({"role": message["role"], "content": "\n".join(lines)})
        return Request(found, pictures)

    def _room(self, requests: Sequence[Request], most: int) -> int:
        """Tokens of the longest answer: what the task allows and the language model can still read."""
        positions = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if positions is None:
            return most
        longest = max(len(self.processor.encode_prompt(request.messages)) for request in requests)
        if longest >= positions:
            raise ModelError(f"A question takes {longest:,} tokens with its pictures; the model reads {positions:,}.")
        return min(most, positions - longest)


class Qwen3VLMSimple(Qwen3VLMChat):
    """The same with lmms-eval's older interface: one text and its pictures."""

    is_simple: ClassVar[bool] = True

    def _messages(self, request: Any) -> list[Message]:
        context, _, to_visual, doc_id, task, split = request.args
        return _as_messages(context, to_visual(self.task_dict[task][split][doc_id]))

    def _kwargs(self, request: Any) -> dict[str, Any]:
        return dict(request.args[1])


def _load(
    pretrained: str, llm: str | None, vision_tower: str | None, dtype: str | None, options: Mapping[str, Any]
) -> tuple[Any, Any]:
    """A connector with its bases, or the one folder that `export` makes of them."""
    folder = Path(pretrained)
    if (folder / INFO).is_file() or not (folder / "config.json").is_file():
        return load_vlm(pretrained, llm, vision_tower, dtype=dtype, **options)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import qwen3_vlm.models  # noqa: F401  # registers the classes

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype or "auto", **options)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=options["trust_remote_code"])
    return model.eval(), processor


def _as_messages(context: str, visuals: Sequence[Any] | None) -> list[Message]:
    """A text and its pictures, which come first, as messages of one turn."""
    content = [{"type": "image" if _is_picture(item) else "other", "url": item} for item in visuals or ()]
    return [{"role": "user", "content": [*content, {"type": "text", "text": context}]}]


def _is_picture(item: Any) -> bool:
    from qwen3_vlm.data.images import IMAGE_SUFFIXES

    return isinstance(item, Image.Image) or (isinstance(item, str) and item.lower().endswith(tuple(IMAGE_SUFFIXES)))


def _picture(part: Mapping[str, Any]) -> Image.Image:
    """Raises: DataError: it is no picture."""
    found = part.get("url")
    if part["type"] != "image" or not isinstance(found, (Image.Image, str, Path)):
        raise DataError(f"A task gives a part of the type {part['type']!r}; the model reads text and pictures.")
    if isinstance(found, Image.Image):
        return found.convert("RGB")
    return load_image(Path(found), max_pixels=DataConfig().max_image_pixels, name=str(found))


def _decoding(given: Mapping[str, Any]) -> dict[str, Any]:
    """lmms-eval's generation settings as fields of GenerationConfig; temperature 0 is greedy."""
    found = {name: given[name] for name in _PASSED_ON if given.get(name) is not None}
    temperature = float(found.get("temperature", 0.0))
    if temperature == 0 or found.get("do_sample") is False:
        return {name: value for name, value in found.items() if name in ("num_beams", "repetition_penalty")}
    return {**found, "do_sample": True}


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    places = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return text[: min(places)].strip() if places else text


def _alike(settings: Sequence[Any]) -> Iterator[tuple[Any, list[int]]]:
    """Each kind of settings, and the numbers of the requests that have it."""
    groups: dict[Any, list[int]] = {}
    for number, key in enumerate(settings):
        groups.setdefault(key, []).append(number)
    yield from groups.items()
