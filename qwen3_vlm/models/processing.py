"""Qwen3VLMProcessor: conversations and pictures in, model inputs out.

The chat text has one `<image_patch>` per picture; the processor expands it to `num_image_tokens`
copies, the resampler's number of latents. The template marks the assistant's turns, so the mask of
what is graded comes from the template itself. It knows nothing of models.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import torch
from tokenizers import AddedToken
from transformers import AutoImageProcessor, AutoTokenizer, ProcessorMixin
from transformers.processing_utils import MultiModalData

IMAGE_TOKEN = "<image_patch>"

# Content is a string, or a list of {"type": "image"} and {"type": "text", "text": …} items.
_CONTENT = (
    "{%- macro render(content) -%}"
    "{%- if content is string -%}{{ content }}"
    "{%- else -%}{%- for item in content -%}"
    "{%- if item.type == 'image' -%}{{ '<image_patch>\\n' }}{%- else -%}{{ item.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
)
_CHATML = _CONTENT + (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{{ render(message.content) + '<|im_end|>' }}{%- endgeneration -%}{{ '\\n' }}"
    "{%- else -%}{{ render(message.content) + '<|im_end|>\\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
_PLAIN = _CONTENT + (
    "{%- for message in messages -%}"
    "{{ message.role.upper() + ': ' }}"
    "{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{{ render(message.content) + eos_token }}{%- endgeneration -%}{{ '\\n' }}"
    "{%- else -%}{{ render(message.content) + '\\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT: ' }}{%- endif -%}"
)

Message = Mapping[str, Any]


def default_chat_template(tokenizer: Any) -> str:
    """ChatML where the tokenizer has its two marks (Qwen, SmolLM2 …), plain "USER:" / "ASSISTANT:" elsewhere."""
    vocabulary = tokenizer.get_vocab()
    return _CHATML if "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary else _PLAIN


class Qwen3VLMProcessor(ProcessorMixin):
    """A tokenizer and an image processor.

    Args:
        image_processor: of the SigLIP or SigLIP2 tower.
        tokenizer: of the LLM; `<image_patch>` is added to it if it is not there.
        num_image_tokens: ids that one picture takes; the model's `num_latents`.
        chat_template: Jinja text that marks the assistant's turns with `{% generation %}`.
    """

    attributes: ClassVar[list[str]] = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 64,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
        tokenizer.padding_side = "left"  # generation reads on from the right end; training pads on its own
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.num_image_tokens = num_image_tokens
        template = chat_template or default_chat_template(tokenizer)
        super().__init__(image_processor, tokenizer, chat_template=template)  # type: ignore[no-untyped-call]

    @classmethod
    def from_bases(
        cls, llm: str | Path, vision_tower: str | Path, num_image_tokens: int = 64, trust_remote_code: bool = False
    ) -> "Qwen3VLMProcessor":
        """Join the LLM's tokenizer and the tower's image processor (hub ids or local folders)."""
        tokenizer = AutoTokenizer.from_pretrained(str(llm), trust_remote_code=trust_remote_code)
        image_processor = AutoImageProcessor.from_pretrained(str(vision_tower), backend="pil", trust_remote_code=False)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return cls(image_processor, tokenizer, num_image_tokens=num_image_tokens)

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """What the placeholder of picture `image_idx` becomes."""
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: Sequence[Any] | None = None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    def encode_conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Token ids of a finished conversation and what of it the assistant said.

        Args:
            messages: [{"role": "user" | "assistant" | "system", "content": text with `<image_patch>` marks}].

        Returns:
            ids (T,) with each placeholder expanded; mask (T,), 1 on answers and the token that ends them.
        """
        encoded = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = [], []
        for token, graded in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
            copies = self.num_image_tokens if token == self.image_token_id else 1
            ids += [token] * copies
            mask += [graded] * copies
        return ids, mask

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids (T,) that end where the assistant's answer begins, placeholders expanded."""
        ids = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=self.chat_template,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        return [copy for token in ids for copy in [token] * self._copies(token)]

    def pixel_values(self, images: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Pictures (RGB, Pillow) → the tower's inputs: `pixel_values` (I, C, H, W), for NaFlex mask and shapes too."""
        return dict(self.image_processor(list(images), return_tensors="pt"))

    def stop_token_ids(self) -> list[int]:
        """Ids that end an answer: the chat's own end mark and the tokenizer's end of text."""
        ids = [self.tokenizer.convert_tokens_to_ids("<|im_end|>")] if "<|im_end|>" in str(self.chat_template) else []
        return list(dict.fromkeys([*ids, self.tokenizer.eos_token_id]))

    def placeholders(self, input_ids: Sequence[int]) -> int:
        """How many pictures the expanded ids hold a place for."""
        runs = (len(list(run)) for token, run in groupby(input_ids) if token == self.image_token_id)
        return sum(length // self.num_image_tokens for length in runs)

    def _copies(self, token: int) -> int:
        return self.num_image_tokens if token == self.image_token_id else 1


__all__ = ["Qwen3VLMProcessor"]
