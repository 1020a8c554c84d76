"""The model: a frozen tower, a connector and a frozen language model.

    pixel_values (I, C, H, W) ─ vision_tower → patches (I, P, Dv) ─ vision_ln? ─ resampler → latents (I, N, 512)
      ─ projector → image embeddings (I, N, D), put at the `<image_patch>` positions of the LLM's input

It knows token ids and pictures' pixels; it does not know chat templates, data sets or what is trained.

Shapes: B batch, I images in the batch, P patches, N latents, T tokens, S supervised tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput, can_return_tuple

from .configuration import Qwen3VLMConfig
from .logit_rules import apply_logit_rules, logit_rules
from .losses import chunked_cross_entropy, linear_cross_entropy, supervised_positions
from .precision import WidenedLinear
from .projector import MLPProjector
from .resampler import PerceiverResampler

CONNECTOR_MODULES = ("resampler", "projector", "vision_ln")


@dataclass
class Qwen3VLMModelOutputWithPast(BaseModelOutputWithPast):
    """`image_hidden_states` (I, N, D) are the projected image embeddings of this call, if there were images."""

    image_hidden_states: Tensor | None = None


@dataclass
class Qwen3VLMCausalLMOutputWithPast(ModelOutput):
    """`logits` is None while training with labels: the head then runs at supervised positions only."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


@dataclass(frozen=True)
class TokenLosses:
    """One entry per supervised token: `loss` (S,) in nats, the `row` (S,) and `position` (S,) that predicts it."""

    loss: Tensor
    row: Tensor
    position: Tensor


class Qwen3VLMPreTrainedModel(PreTrainedModel):
    config: Qwen3VLMConfig
    config_class = Qwen3VLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]  # the library's own models use tuples
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 (the base declares an instance variable)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @property
    def dtype(self) -> torch.dtype:
        """That of the language model's weights: the tower and the connector may have others."""
        table: Any = self.get_input_embeddings()
        return table.weight.dtype

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fresh connector weights; the bases' own classes take care of theirs."""
        std = self.config.initializer_range
        if isinstance(module, PerceiverResampler):
            init.normal_(module.latents, mean=0.0, std=std)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class Qwen3VLMModel(Qwen3VLMPreTrainedModel):
    """Tower, connector and language model without its head.

    `widened` is set where the bases are stored in 16 bits and multiplied in fp32 (see `precision`).
    """

    widened = False

    def __init__(self, config: Qwen3VLMConfig) -> None:
        super().__init__(config)
        vision_dim, llm_dim = config.vision_config.hidden_size, config.text_config.hidden_size
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.vision_ln = nn.LayerNorm(vision_dim) if config.vision_ln else None
        self.resampler = PerceiverResampler(
            vision_dim,
            latent_dim=config.latent_dim,
            num_latents=config.num_latents,
            depth=config.depth,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            ff_mult=config.ff_mult,
        )
        self.projector = MLPProjector(
            config.latent_dim, int(config.projector_hidden_size or 0), llm_dim, activation=config.projector_hidden_act
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def encode_patches(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, spatial_shapes: Tensor | None = None
    ) -> Tensor:
        """(I, C, H, W) pixels, or (I, P, C·p·p) with mask and shapes for a NaFlex tower → (I, P, Dv) patches.

        No graph is kept where the tower is frozen.
        """
        variable = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        arguments = {name: value for name, value in variable.items() if value is not None}
        trainable = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trainable):
            outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), **arguments)
        return outputs.last_hidden_state

    def connect(self, patch_embeddings: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """(I, P, Dv) patches, optional mask (I, P) → (I, N, D) image embeddings in the LLM's space."""
        patches = patch_embeddings.to(self.resampler.latents.dtype)
        if self.vision_ln is not None:
            patches = self.vision_ln(patches)
        return self.projector(self.resampler(patches, patch_mask))

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        patch_embeddings: Tensor | None = None,
        return_dict: bool = True,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Encode pictures once: `pooler_output` holds one (N, D) entry per image, ready for `mm_encoder_outputs`.

        Give pixels, or the tower's output (I, P, Dv) as `patch_embeddings`.
        """
        if (pixel_values is None) == (patch_embeddings is None):
            raise ValueError("Give exactly one of pixel_values and patch_embeddings.")
        patches = patch_embeddings
        if pixel_values is not None:
            patches = self.encode_patches(pixel_values, pixel_attention_mask, spatial_shapes)
        assert patches is not None  # one of the two was given
        embeddings = self.connect(patches, pixel_attention_mask)
        entries: Any = list(embeddings)  # one per image, as generate() repeats them for beams
        outputs = BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=entries)
        return outputs if return_dict else outputs.to_tuple()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        patch_embeddings: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> Qwen3VLMModelOutputWithPast:
        """See `Qwen3VLMForConditionalGeneration.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        given = [
            name
            for name, value in (
                ("pixel_values", pixel_values),
                ("patch_embeddings", patch_embeddings),
                ("mm_encoder_outputs", (mm_encoder_outputs or {}).get("image")),
            )
            if value is not None
        ]
        if len(given) > 1:
            raise ValueError(f"The pictures are given twice, as {' and as '.join(given)}; give them once.")
        encoded: Any = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None or patch_embeddings is not None:
            encoded = self.get_image_features(pixel_values, pixel_attention_mask, spatial_shapes, patch_embeddings)
        image_embeddings = None if encoded is None else torch.stack(list(encoded.pooler_output))
        inputs_embeds = self._inject(input_ids, inputs_embeds, image_embeddings)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return Qwen3VLMModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_embeddings,
        )

    def _inject(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, images: Tensor | None) -> Tensor:
        """Put (I, N, D) image embeddings at the placeholders, in row-then-position order → (B, T, D)."""
        if input_ids is None:
            if images is not None:
                raise ValueError("Pictures need input_ids: their place is where <image_patch> stands.")
            assert inputs_embeds is not None  # forward() has checked that one of the two is given
            return inputs_embeds
        is_image = input_ids == self.config.image_token_id  # (B, T)
        # <image_patch> may have no row of its own; its lookup is replaced anyway.
        table: Any = self.get_input_embeddings()
        text = table(input_ids.masked_fill(is_image, 0))
        if self.widened:
            text = text.float()
        if images is None:
            if input_ids.shape[1] > 1 and not torch.compiler.is_compiling() and bool(is_image.any()):
                raise ValueError(_count_mismatch(is_image, num_images=0, num_latents=self.config.num_latents))
            return self._touch_connector(text) if self.training else text
        if not torch.compiler.is_compiling() and int(is_image.sum()) != images.shape[0] * images.shape[1]:
            raise ValueError(_count_mismatch(is_image, images.shape[0], images.shape[1]))
        return text.masked_scatter(is_image.unsqueeze(-1), images.to(text.dtype))

    def _touch_connector(self, embeddings: Tensor) -> Tensor:
        """Add 0 × the connector's output, so that a rank whose batch has no picture still joins the gradient sync."""
        if not any(parameter.requires_grad for parameter in self.resampler.parameters()):
            return embeddings
        nothing = embeddings.new_zeros(1, 1, self.config.vision_config.hidden_size)
        return embeddings + 0.0 * self.connect(nothing).sum().to(embeddings.dtype)


class Qwen3VLMForConditionalGeneration(Qwen3VLMPreTrainedModel, GenerationMixin):
    """The model with the LLM's own head: it captions, answers and chats about pictures."""

    def __init__(self, config: Qwen3VLMConfig) -> None:
        super().__init__(config)
        self.model = Qwen3VLMModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=config.lm_head_bias)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{_embedding_name(self.model)}"}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """See `Qwen3VLMModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def encode_patches(self, *args: Any, **kwargs: Any) -> Tensor:
        """See `Qwen3VLMModel.encode_patches`."""
        return self.model.encode_patches(*args, **kwargs)

    def connector_parameters(self) -> dict[str, nn.Parameter]:
        """The add-on: name (without the `model.` prefix) → parameter."""
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if name.split(".", 1)[0] in CONNECTOR_MODULES
        }

    def connector_state_dict(self) -> dict[str, Tensor]:
        """The add-on's tensors, detached, under the names of `connector_parameters`."""
        return {name: parameter.detach() for name, parameter in self.connector_parameters().items()}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        patch_embeddings: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        added_loss: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> Qwen3VLMCausalLMOutputWithPast:
        """Next-token logits, and with `labels` the loss.

        Args:
            input_ids: (B, T); each image stands as N copies of `config.image_token_id`.
            attention_mask: (B, T), 1 for real tokens. Leave it out for packed rows.
            position_ids: (B, T); where they start again at 0 a packed sample begins, and none attends to another.
            pixel_values: (I, C, H, W), images in row-then-position order; a NaFlex tower takes
                (I, P, C·p·p) with `pixel_attention_mask` (I, P) and `spatial_shapes` (I, 2).
            patch_embeddings: (I, P, Dv), the tower's output, instead of pixels.
            mm_encoder_outputs: {"image": output of `get_image_features`}, instead of pixels.
            labels: (B, T), -100 where nothing is graded; shifted here.
            logits_to_keep: compute logits for the last so many positions only (0: all).
            num_items_in_batch: what the summed loss is divided by; None: the number of graded tokens.
            added_loss: last hidden states (B, T, D) → what is added to the loss.

        Raises:
            ValueError: placeholders and image embeddings do not agree in number; names the rows.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            patch_embeddings=patch_embeddings,
            mm_encoder_outputs=mm_encoder_outputs,
            **_without_cache(kwargs, self.training or labels is not None),
        )
        hidden = outputs.last_hidden_state
        loss = None if labels is None else self._loss(hidden, labels, num_items_in_batch)
        if loss is not None and added_loss is not None:
            loss = loss + added_loss(hidden)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._logits(hidden[:, kept, :]) if labels is None or not self.training else None
        return Qwen3VLMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    @torch.no_grad()
    def token_losses(self, *, labels: Tensor, **inputs: Any) -> TokenLosses:
        """The loss of every supervised token, for evaluation; `inputs` as in `forward`."""
        return self._token_losses(self.model(**inputs, use_cache=False).last_hidden_state, labels)

    def _loss(self, hidden: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        """The summed loss over `num_items`, or over the graded tokens where that is not given."""
        losses = self._token_losses(hidden, labels).loss
        return losses.sum() / (max(losses.numel(), 1) if num_items is None else num_items)

    def _token_losses(self, hidden: Tensor, labels: Tensor) -> TokenLosses:
        row, position, target = supervised_positions(labels.to(hidden.device))
        graded = hidden[row, position]  # (S, D)
        plain = isinstance(self.lm_head, nn.Linear) and self.lm_head.bias is None
        if plain and not logit_rules(self.config.text_config):
            loss = linear_cross_entropy(graded, self.lm_head.weight, target)
        else:
            loss = chunked_cross_entropy(graded, self._logits, target, self.config.text_config.vocab_size)
        return TokenLosses(loss, row, position)

    def _logits(self, hidden: Tensor) -> Tensor:
        """The head, followed by what the LLM's family does to its logits."""
        head: Any = self.lm_head
        logits = head(hidden if isinstance(head, WidenedLinear) else hidden.to(head.weight.dtype))
        return apply_logit_rules(logits, self.config.text_config)


def _embedding_name(model: Qwen3VLMModel) -> str:
    """Families call their embedding `embed_tokens`, `wte`, `word_embeddings` …: ask by identity."""
    table: Any = model.get_input_embeddings()
    named = model.language_model.named_parameters()
    return next(name for name, parameter in named if parameter is table.weight)


def _without_cache(kwargs: dict[str, Any], graded: bool) -> dict[str, Any]:
    """A cache is of no use where labels are graded, and packed positions are only recognised without one."""
    return {"use_cache": False, **kwargs} if graded else kwargs


def _count_mismatch(is_image: Tensor, num_images: int, num_latents: int) -> str:
    per_row = ", ".join(f"row {row}: {count}" for row, count in enumerate(is_image.sum(dim=1).tolist()))
    return (
        f"The text has {int(is_image.sum())} <image_patch> positions ({per_row}), but {num_images} pictures of "
        f"{num_latents} embeddings each were given, {num_images * num_latents} in all. "
        "Each picture needs exactly one expanded placeholder; the processor writes it."
    )


__all__ = ["Qwen3VLMForConditionalGeneration", "Qwen3VLMModel", "Qwen3VLMPreTrainedModel"]
