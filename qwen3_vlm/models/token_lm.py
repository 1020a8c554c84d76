"""TokenLM: a text-only causal LM over the whole token space, of which the new rows are trained.

    ids (B, T) ─ SplitEmbedding → (B, T, D) ─ the base's own decoder, frozen → hidden ─ SplitHead → scores
                 base rows | new rows                                          base rows | new rows

The base's tensors stay where they were loaded and are not copied. Its decoder may be trained too (`owns_trunk`), its
vocabulary rows never are. In training only graded positions reach the head, and the two blocks meet in the log-sum-exp
of their scores alone (`losses.split_cross_entropy`). In generation `score_range` names the ids that can come next, and
only their rows are multiplied.

It knows token ids and the token space; it knows no tokenizer, no data set and no stage.

Shapes: B batch, T tokens, S supervised tokens, D width, V vocabulary, N new rows, K tasks.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple

from qwen3_vlm.errors import ModelError
from qwen3_vlm.models.logit_rules import apply_logit_rules, logit_rules
from qwen3_vlm.models.losses import chunked_cross_entropy, split_cross_entropy, sums_by_group, supervised_positions
from qwen3_vlm.models.precision import compute_in_fp32, must_widen
from qwen3_vlm.models.vocabulary_rows import RowInit, SplitEmbedding, SplitHead, add_rows, fresh_rows
from qwen3_vlm.tokenization.sequences import GRADED
from qwen3_vlm.tokenization.token_space import TokenSpace

ScoreRange = tuple[int, int]  # global ids, the last one excluded


@dataclass
class TokenLMOutput(ModelOutput):
    """`logits` is None while training with labels. Task figures, by number in `GRADED`, come with `task_ids`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    task_losses: Tensor | None = None  # (K,) summed nats, detached, float64
    task_counts: Tensor | None = None  # (K,) graded tokens, int64


@dataclass(frozen=True)
class GradedTokens:
    """One entry per supervised token: `loss` (S,) in nats, the `row` (S,) and `position` (S,) that predicts it."""

    loss: Tensor
    row: Tensor
    position: Tensor


class TokenLM(PreTrainedModel, GenerationMixin):
    """See the module. Make one with `grow` (fresh rows) or `from_add_on` (trained rows)."""

    config: PreTrainedConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 (the base declares an instance variable)

    def __init__(self, llm: Any, token_space: TokenSpace) -> None:
        """Take over a causal LM whose vocabulary `add_rows` has grown; use `grow` for one that it has not."""
        config = copy.deepcopy(llm.config)
        config.vocab_size = token_space.vocab_size_total
        config.tie_word_embeddings = False  # no one matrix: what is tied is each block, by sharing its tensor
        super().__init__(config)
        self.token_space = token_space
        self.language_model = llm.base_model
        self.trunk_prefix = str(llm.base_model_prefix)  # the decoder's name inside the causal LM
        self.lm_head: SplitHead = llm.get_output_embeddings()
        self.generation_config = copy.deepcopy(llm.generation_config)
        self._no_split_modules = llm._no_split_modules
        self.owns_trunk = False  # the decoder's weights are no longer the base's, and belong to the add-on
        self.widened = must_widen(self.lm_head.weight)
        if self.widened:
            compute_in_fp32(self)

    @classmethod
    def grow(cls, llm: Any, token_space: TokenSpace, *, init: RowInit = "mean", seed: int = 0) -> "TokenLM":
        """Freeze a loaded causal LM and put fresh rows for every id beyond its own behind it, in place.

        Args:
            llm: any Hugging Face causal LM with a head without bias, tied or untied.
            init: see `fresh_rows`.

        Raises:
            ModelError: the base has another number of rows than the token space says, or a head with a bias.
            ConfigError: `init` does not fit the base.
        """
        base, used = token_space.text.vocab_size, token_space.text.tokenizer_size
        found = llm.get_input_embeddings().num_embeddings
        if found != base:
            raise ModelError(f"The base has {found:,} embedding rows; the token space was built for {base:,}.")
        count = token_space.vocab_size_total - base
        add_rows(llm, *fresh_rows(llm, count, num_used=used, init=init, seed=seed), num_used=used)
        return cls(llm, token_space)

    @classmethod
    def from_add_on(cls, source: str | Path, llm: str | Path | None = None, **options: Any) -> "TokenLM":
        """The base that an add-on was trained on, with the trained rows; see `row_files.load_token_lm`."""
        from qwen3_vlm.models.row_files import load_token_lm

        return load_token_lm(source, llm, **options)

    @property
    def dtype(self) -> torch.dtype:
        """That of the base's weights; the new rows are fp32 masters."""
        return self.lm_head.weight.dtype

    @property
    def tied(self) -> bool:
        """Whether one set of new rows serves embedding and head, as in the base."""
        return self.lm_head.rows is self.embedding.rows

    @property
    def embedding(self) -> SplitEmbedding:
        return self.language_model.get_input_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def row_parameters(self) -> dict[str, nn.Parameter]:
        """The add-on: "embeddings" and, for an untied base, "lm_head"; (N, D) each."""
        rows = {"embeddings": self.embedding.rows}
        return rows if self.tied else rows | {"lm_head": self.lm_head.rows}

    def init_weights(self) -> None:
        """Nothing: all weights are loaded or made before they come here."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        task_ids: Tensor | None = None,
        task_weights: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        score_range: ScoreRange | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        num_items_in_batch: Tensor | float | None = None,
        added_loss: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> TokenLMOutput:
        """Next-token scores, and with `labels` the loss.

        Args:
            input_ids: (B, T) global ids.
            attention_mask: (B, T), 1 for real tokens. Leave it out for packed rows.
            position_ids: (B, T); where they start again at 0 a packed sample begins, and none attends to another.
            labels: (B, T), −100 where nothing is graded; shifted here.
            task_ids: (B, T), the number of each token's task in `GRADED`.
            task_weights: (K,), what a task's losses are multiplied with; needs `task_ids`.
            logits_to_keep: compute scores for the last so many positions only (0: all).
            score_range: the global ids that can come next, the last excluded; all others score −∞ and are not computed.
            label_smoothing, z_loss: see `split_cross_entropy`.
            num_items_in_batch: what the summed loss is divided by; None: the number of graded tokens.
            added_loss: last hidden states (B, T, D) → what is added to the loss.
        """
        if labels is not None:
            kwargs = {"use_cache": False, **kwargs}  # packed positions are only recognised without one
        self.embedding.share_rows = labels is not None and self.tied and not logit_rules(self.config)
        outputs = self._decode(
            input_ids,
            inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        found: dict[str, Any] = {}
        if labels is not None:
            graded = self._grade(hidden, labels, label_smoothing, z_loss)
            found = self._reduce(graded, task_ids, task_weights, num_items_in_batch)
            if added_loss is not None:
                found["loss"] = found["loss"] + added_loss(hidden)
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            found["logits"] = self._scores(hidden[:, kept, :], score_range)
        return TokenLMOutput(
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **found,
        )

    @torch.no_grad()
    def token_losses(self, *, labels: Tensor, **inputs: Any) -> GradedTokens:
        """The loss of every supervised token, for evaluation: no smoothing, no weights; `inputs` as in `forward`."""
        ids, _, _ = inputs.pop("input_ids"), inputs.pop("task_ids", None), inputs.pop("task_weights", None)
        return self._grade(self._decode(ids, None, use_cache=False, **inputs).last_hidden_state, labels)

    def prepare_inputs_for_generation(self, input_ids: Any, grammar: Any = None, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As the library does it; a `grammar` tells from all ids so far which range has to be scored."""
        library: Any = super()
        inputs: dict[str, Any] = library.prepare_inputs_for_generation(input_ids, **kwargs)
        if grammar is not None:
            inputs["score_range"] = grammar.next_range(input_ids)
        return inputs

    def _decode(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, **kwargs: Any) -> Any:
        if self.widened and inputs_embeds is None:
            input_ids, inputs_embeds = None, self.embedding(input_ids)
        return self.language_model(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def _scores(self, hidden: Tensor, score_range: ScoreRange | None = None) -> Tensor:
        """(…, D) → (…, V); −∞ at the base's padding rows and outside `score_range`."""
        first, last = score_range or (0, self.config.vocab_size)
        return self.lm_head(hidden, first, last, rules=lambda scores: apply_logit_rules(scores, self.config))

    def _grade(self, hidden: Tensor, labels: Tensor, smoothing: float = 0.0, z_loss: float = 0.0) -> GradedTokens:
        row, position, target = supervised_positions(labels.to(hidden.device))
        graded = hidden[row, position]  # (S, D)
        head = self.lm_head
        if not logit_rules(self.config):
            options: Any = {"num_used": head.num_used, "label_smoothing": smoothing, "z_loss": z_loss}
            late = self.embedding.late_gradient() if self.tied else None
            loss = split_cross_entropy(graded, head.weight, head.rows, target, **options, late=late)
        else:
            if smoothing or z_loss:
                raise ValueError("label_smoothing and z_loss are not there for a head with a soft cap or a scale.")
            loss = chunked_cross_entropy(graded, self._scores, target, self.config.vocab_size)
        return GradedTokens(loss, row, position)

    def _reduce(
        self, graded: GradedTokens, task_ids: Tensor | None, weights: Tensor | None, num_items: Tensor | float | None
    ) -> dict[str, Any]:
        """The loss of the batch, and the sums of each task."""
        losses, found = graded.loss, {}
        if task_ids is not None:
            task = task_ids[graded.row, graded.position]  # (S,)
            sums, counts = sums_by_group(losses.detach(), task, len(GRADED))
            found = {"task_losses": sums, "task_counts": counts}
            if weights is not None:
                losses = losses * weights.to(losses)[task]
        elif weights is not None:
            raise ValueError("task_weights need task_ids.")
        return {"loss": losses.sum() / (max(losses.numel(), 1) if num_items is None else num_items), **found}


__all__ = ["GradedTokens", "ScoreRange", "TokenLM", "TokenLMOutput"]
