"""One base for both tracks: it sees through a connector, draws and speaks through tokens, and is loaded once.

                     ┌ tower → connector ┐                       ┌ the base's own head      → words        `vlm`, `text`
    pictures, ids ───┤                   ├─ decoder (+ adapter) ─┤
                     └ SplitEmbedding ───┘                       └ SplitHead (base | rows)  → any ids      `token_lm`

`vlm`, `token_lm` and `text` are views: whole models to whatever calls them, made of the same modules, with an adapter
each. A view switches the decoder to its adapter, or to none, for every pass and under a lock. So requests with
different adapters can be mixed at will, from several threads too, which then take turns pass by pass.

`text` has no adapter: with connector and rows attached it gives the base's own scores, to the last bit.

It knows token ids and pixels; what a conversation is, `generate.chat` knows.

Shapes: B batch, I images, T tokens, D width, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qwen3_vlm.errors import ModelError
from qwen3_vlm.models.lora import lora_layers, lora_names, lora_parameters, require_lora, switch_lora
from qwen3_vlm.models.processing import Qwen3VLMProcessor
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.models.vlm import Qwen3VLMForConditionalGeneration
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer

__all__ = ["OmniModel", "SeeingModel", "SpeakingModel"]

_PICTURES = ("pixel_values", "patch_embeddings", "mm_encoder_outputs")
_BESIDE_PICTURES = ("pixel_attention_mask", "spatial_shapes")
_Method = TypeVar("_Method", bound=Callable[..., Any])
_View = TypeVar("_View", bound="SeeingModel | SpeakingModel")


class AdapterSwitch:
    """Which of a decoder's adapters acts, for one caller at a time."""

    def __init__(self, trunk: nn.Module) -> None:
        self.trunk = trunk
        self._layers = lora_layers(trunk)
        self._lock = RLock()

    @property
    def names(self) -> list[str]:
        return lora_names(self.trunk)

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Inside, the decoder has this adapter, or none; others wait."""
        with self._lock:
            switch_lora(self._layers, name)
            yield


def _with_own_adapter(method: _Method) -> _Method:
    """The method of a model as that of a view; its signature stays, since `generate` reads it."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.adapters.using(self.adapter):
            return method(self, *args, **kwargs)

    return call  # type: ignore[return-value]


class SeeingModel(Qwen3VLMForConditionalGeneration):
    """The view that reads pictures through the connector and answers in words; see `OmniModel.seeing`."""

    adapters: AdapterSwitch
    adapter: str | None
    _can_compile_fullgraph = False  # a lock is no part of a graph

    forward = _with_own_adapter(Qwen3VLMForConditionalGeneration.forward)
    token_losses = _with_own_adapter(Qwen3VLMForConditionalGeneration.token_losses)


class SpeakingModel(TokenLM):
    """The view that answers with ids of the whole token space; see `OmniModel.speaking`.

    It reads pictures too: `pixel_values` and the like, as in `Qwen3VLMForConditionalGeneration.forward`. Where they
    are given, and there alone, `<image_patch>` stands for them.
    """

    adapters: AdapterSwitch
    adapter: str | None
    eyes: Any  # Qwen3VLMModel over the same decoder
    _can_compile_fullgraph = False

    forward = _with_own_adapter(TokenLM.forward)
    token_losses = _with_own_adapter(TokenLM.token_losses)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Any,
        grammar: Any = None,
        pixel_values: Any = None,
        pixel_attention_mask: Any = None,
        spatial_shapes: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As `TokenLM` does it; pictures go along with the prompt alone."""
        given = {"pixel_values": pixel_values, "pixel_attention_mask": pixel_attention_mask}
        given |= {"spatial_shapes": spatial_shapes}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        return super().prepare_inputs_for_generation(input_ids, grammar, **kwargs)

    def _decode(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, **kwargs: Any) -> Any:
        pictures = {name: kwargs.pop(name, None) for name in (*_PICTURES, *_BESIDE_PICTURES)}
        if all(pictures[name] is None for name in _PICTURES):
            return super()._decode(input_ids, inputs_embeds, **kwargs)
        return self.eyes(input_ids=input_ids, inputs_embeds=inputs_embeds, **pictures, **kwargs)


class OmniModel:
    """Connector, rows and adapters around one base. Make one with `load_omni`.

    Args:
        vlm: the base with a connector.
        token_lm: the same base, not a copy, with new rows.
        processor: chat template, words and pixels of `vlm`.
        uti: the tokenizers behind `token_lm`'s ids.
        sees_with, speaks_with: the adapters of `vlm` and of `token_lm`; None: they have none.

    Raises:
        ModelError: the two do not share their base, or there is no such adapter.
        TokenSpaceError: `uti` has another token space than `token_lm`.
    """

    def __init__(
        self,
        vlm: Qwen3VLMForConditionalGeneration,
        token_lm: TokenLM,
        processor: Qwen3VLMProcessor,
        uti: UnifiedTokenizer,
        *,
        sees_with: str | None = None,
        speaks_with: str | None = None,
    ) -> None:
        trunk: Any = token_lm.language_model
        if vlm.model.language_model is not trunk or vlm.lm_head is not token_lm.lm_head.base:
            raise ModelError("The connector and the rows are around two bases in memory; one is needed for both.")
        token_lm.token_space.require_same(uti.token_space, "The tokenizer")
        self.processor = processor
        self.uti = uti
        self._vlm = vlm.eval()
        self._token_lm = token_lm.eval()
        self._switch = AdapterSwitch(trunk)
        for name in (sees_with, speaks_with):
            require_lora(trunk, name)
        self.sees_with = sees_with
        self.speaks_with = speaks_with

    @property
    def vlm(self) -> SeeingModel:
        """Pictures and words in, words out, with the connector's adapter where it has one."""
        return self.seeing(self.sees_with)

    @property
    def token_lm(self) -> SpeakingModel:
        """Ids of the token space in and out, with the rows' adapter where they have one."""
        return self.speaking(self.speaks_with)

    @property
    def text(self) -> SeeingModel:
        """The base as it was: words in, words out, no adapter."""
        return self.seeing(None)

    def seeing(self, adapter: str | None) -> SeeingModel:
        """A view of the VLM with one of the adapters, or with none; nothing is copied.

        Raises:
            ModelError: there is no adapter of that name.
        """
        return self._view(SeeingModel, self._vlm, adapter)

    def speaking(self, adapter: str | None) -> SpeakingModel:
        """A view of the TokenLM with one of the adapters, or with none; nothing is copied.

        Raises:
            ModelError: there is no adapter of that name.
        """
        view = self._view(SpeakingModel, self._token_lm, adapter)
        vars(view)["eyes"] = self._vlm.model  # not a submodule: the decoder is one already
        return view

    @property
    def adapters(self) -> list[str]:
        """Names of all adapters."""
        return self._switch.names

    @property
    def token_space(self) -> Any:
        return self._token_lm.token_space

    @property
    def device(self) -> torch.device:
        return self._vlm.device

    def to(self, device: str | torch.device) -> "OmniModel":
        """Move all of it, in place."""
        for model in (self._vlm, self._token_lm):
            model.to(torch.device(device))
        return self

    def sizes(self) -> dict[str, int]:
        """Bytes in memory of each part: llm, vision_tower, connector, rows, and each adapter by its name."""
        vlm: Any = self._vlm
        parts: dict[str, Any] = {
            "vision_tower": vlm.model.vision_tower.parameters(),
            "connector": vlm.connector_parameters().values(),
            "rows": self._token_lm.row_parameters().values(),
        }
        trunk = self._switch.trunk
        parts |= {f"adapter {name}": lora_parameters(trunk, name).values() for name in self.adapters}
        sizes = {name: _bytes(found) for name, found in parts.items()}
        whole = _bytes(parameter for model in (vlm, self._token_lm) for parameter in model.parameters())
        return {"llm": whole - sum(sizes.values()), **sizes}

    def _view(self, kind: type[_View], model: nn.Module, adapter: str | None) -> _View:
        require_lora(self._switch.trunk, adapter)
        view = kind.__new__(kind)
        vars(view).update(vars(model))  # the same modules and parameters, in the same tables
        view.adapters, view.adapter = self._switch, adapter
        return view


def _bytes(parameters: Iterable[Tensor]) -> int:
    """Of all of them together, each counted once."""
    once = {id(parameter): parameter for parameter in parameters}
    return sum(parameter.numel() * parameter.element_size() for parameter in once.values())
