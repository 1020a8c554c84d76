"""What a stage declares is what is trainable, and what gradients reach."""

from typing import Any

import pytest
import torch

from qwen3_vlm.errors import ConfigError, TrainabilityError
from qwen3_vlm.train.stages import (
    STAGES,
    apply_stage,
    audit_gradients,
    check_trainable,
    format_table,
    get_stage,
    set_modes,
    strip_wrappers,
    trainable_parameters,
)

STAGE = STAGES["stage1_align"]


@pytest.fixture
def model(tiny_vlm: tuple[Any, Any]) -> Any:
    return tiny_vlm[0]


def give_gradients(model: Any) -> None:
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.ones_like(parameter)


def test_table_counts_by_hand(model: Any) -> None:
    rows = {row.component: (row.trainable, row.frozen, row.dtype) for row in apply_stage(model, STAGE)}
    # projector: 16 → 32 → 32 with biases
    assert rows["projector"] == (16 * 32 + 32 + 32 * 32 + 32, 0, "float32")
    assert rows["resampler"][0] > 0
    assert rows["resampler"][1] == rows["projector"][1] == 0
    assert rows["language_model"][0] == rows["vision_tower"][0] == 0
    assert sum(on + off for on, off, _ in rows.values()) == sum(p.numel() for p in model.parameters())
    text = format_table(apply_stage(model, STAGE))
    assert "language_model" in text
    assert text.splitlines()[-1].startswith("total")


def test_modes_frozen_parts_evaluate(model: Any) -> None:
    apply_stage(model, STAGE)
    assert model.training
    assert model.model.resampler.training
    assert not any(module.training for module in model.model.language_model.modules())
    assert not any(module.training for module in model.model.vision_tower.modules())


def test_gradient_checkpointing_stays_on_without_dropout(model: Any) -> None:
    language_model = model.model.language_model
    name = "activation_checkpointing_enable"  # the older name warns where this one is there
    getattr(language_model, name if hasattr(language_model, name) else "gradient_checkpointing_enable")()
    set_modes(model, STAGE)
    layers = model.model.language_model.layers
    assert all(layer.training and not layer.self_attn.training for layer in layers)


def test_half_precision_connectors_become_master_weights(model: Any) -> None:
    model.to(torch.bfloat16)
    apply_stage(model, STAGE)
    assert {parameter.dtype for parameter in trainable_parameters(model).values()} == {torch.float32}
    assert next(model.model.language_model.parameters()).dtype == torch.bfloat16


def test_wrong_freezing_is_named(model: Any) -> None:
    apply_stage(model, STAGE)
    model.model.language_model.norm.weight.requires_grad_(True)
    model.model.resampler.latents.requires_grad_(False)
    with pytest.raises(TrainabilityError) as caught:
        check_trainable(model, STAGE)
    assert "language_model.norm.weight is trainable" in str(caught.value)
    assert "resampler.latents is frozen" in str(caught.value)


def test_audit_passes_when_all_is_well(model: Any) -> None:
    apply_stage(model, STAGE)
    give_gradients(model)
    audit_gradients(model, STAGE)


def test_audit_names_each_problem(model: Any) -> None:
    apply_stage(model, STAGE)
    give_gradients(model)
    model.model.resampler.latents.grad = None
    model.model.vision_tower.post_layernorm.weight.grad = torch.ones(24)
    for parameter in model.model.projector.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(TrainabilityError) as caught:
        audit_gradients(model, STAGE)
    message = str(caught.value)
    assert "resampler.latents got no gradient" in message
    assert "vision_tower.post_layernorm.weight is frozen but has a gradient" in message
    assert "every gradient of projector is zero" in message
    assert "\n" not in message


def test_audit_refuses_gradients_that_are_not_finite(model: Any) -> None:
    apply_stage(model, STAGE)
    give_gradients(model)
    model.model.resampler.latents.grad[0, 0] = float("inf")
    with pytest.raises(TrainabilityError, match=r"gradient of resampler\.latents is not finite"):
        audit_gradients(model, STAGE)


def test_a_model_without_a_connector_is_refused(model: Any) -> None:
    del model.model.projector
    with pytest.raises(TrainabilityError, match="component projector is missing"):
        apply_stage(model, STAGE)


def test_names_without_wrappers() -> None:
    assert strip_wrappers("module._orig_mod.model.resampler.latents") == "resampler.latents"
    assert strip_wrappers("lm_head.weight") == "lm_head.weight"


def test_unknown_stage() -> None:
    with pytest.raises(ConfigError, match="stage1_align"):
        get_stage("stage9")
