"""The planner's formulas against models that are there: parameters, counted FLOPs, the allocator's own bytes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from qwen3_vlm.models import losses, precision
from qwen3_vlm.models.lora import add_lora
from qwen3_vlm.train import planner_formulas as formulas
from qwen3_vlm.train.planner_shapes import (
    QWEN3,
    ConnectorShape,
    LoraShape,
    TextShape,
    TowerShape,
    read_tower_shape,
    text_shape,
    tower_shape,
)
from qwen3_vlm.train.planner_step import BF16, FP32, TRAINS, Batch, Model, Numerics
from qwen3_vlm.train.stages import FULL_TRUNK, STAGES, apply_stage, trainability_table

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# keras-hub, keras_hub/src/models/qwen3/qwen3_presets.py: counted there from the published weights.
PUBLISHED = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}
SO400M = "google/siglip2-so400m-patch14-384"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/plan_check.py, which builds the cases and measures them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import plan_check

    return plan_check


def count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_language_models_have_their_published_parameters(name: str) -> None:
    found = formulas.parameters(Model(QWEN3[name]))
    assert sum(frozen for _, frozen in found.values()) == PUBLISHED[name]


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_a_decoder_are_those_of_the_library(family: str, tied: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 3, "tie_word_embeddings": tied}
    config = AutoConfig.for_model(family, **sizes, **heads)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = formulas.parameters(Model(text_shape(config.to_dict(), family)))
    assert sum(frozen for _, frozen in found.values()) == count(model)


def test_parameters_of_towers_are_those_of_the_library() -> None:
    config = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
        patch_size=14, vision_use_head=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = SiglipVisionModel(config)
    shape = read_tower_shape(SO400M)
    assert shape == tower_shape(config.to_dict(), "so400m")
    assert formulas.tower_parameters(shape) == count(model)


def test_the_connector_of_qwen3_8b_has_82_445_824_parameters() -> None:
    text, tower = QWEN3["qwen3-8b"], read_tower_shape(SO400M)
    shape = ConnectorShape(tower.width, 512, 64, 2, 512, 4, 4 * text.width, text.width, False)
    assert formulas.resampler_parameters(shape) == 6_927_872
    assert formulas.projector_parameters(shape) == 75_517_952
    assert formulas.trainable_parameters(Model(text, tower, shape)) == 82_445_824


@pytest.mark.parametrize("dora", [False, True])
def test_parameters_of_an_adapter_are_those_of_peft(dora: bool) -> None:
    config = Qwen3Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    before = count(model)
    add_lora(model.model, rank=3, alpha=6.0, dora=dora)
    found = formulas.lora_parameters(text_shape(config.to_dict(), "tiny"), LoraShape(3, dora=dora))
    assert found == count(model) - before


def test_the_stages_train_what_the_trainer_declares() -> None:
    words = {"resampler": "connector", "projector": "connector"}
    for name, stage in STAGES.items():
        assert set(TRAINS[name]) == {words.get(component, component) for component in stage.required}, name


def test_the_loss_walks_in_blocks_of_this_size() -> None:
    assert formulas.LOSS_CHUNK_BYTES == losses.CHUNK_BYTES


def tiny_cases(check: Any, *, tied: bool = True) -> dict[str, Any]:
    """Name → how to build it."""
    text = check.text_config(256, 3, 4096, tied=tied)
    pictures = {"rows": 2, "length": 160, "graded": 40, "pictures": 4}
    ids = {"rows": 3, "length": 96, "codes": 1024}
    return {
        "connector": lambda: check.vlm_case("", text, **pictures),
        "connector, not packed": lambda: check.vlm_case("", text, packed=False, **pictures),
        "connector, recomputing": lambda: check.vlm_case("", text, checkpointing=True, **pictures),
        "adapter": lambda: check.vlm_case("", text, lora=LoraShape(8), **pictures),
        "adapter with dropout": lambda: check.vlm_case("", text, lora=LoraShape(8, 0.05), **pictures),
        "adapter, recomputing": lambda: check.vlm_case(
            "", text, lora=LoraShape(8, 0.05), checkpointing=True, **pictures
        ),
        "adapter, text held": lambda: check.hold_text(check.vlm_case("", text, lora=LoraShape(8), **pictures)),
        "text held, recomputing": lambda: check.hold_text(
            check.vlm_case("", text, lora=LoraShape(8, 0.05), checkpointing=True, **pictures)
        ),
        "rows": lambda: check.token_case("", text, graded=30, **ids),
        "rows, much graded": lambda: check.token_case("", text, graded=240, **ids),
        "rows, recomputing": lambda: check.token_case("", text, graded=240, checkpointing=True, **ids),
    }


CASES = (
    "connector",
    "connector, not packed",
    "connector, recomputing",
    "adapter",
    "adapter with dropout",
    "adapter, recomputing",
    "adapter, text held",
    "text held, recomputing",
    "rows",
    "rows, much graded",
    "rows, recomputing",
)


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_counted_and_bytes_those_allocated(check: Any, name: str) -> None:
    case = tiny_cases(check)[name]()
    table = {row.component: (row.trainable, row.frozen) for row in trainability_table(case.torch_model)}
    expected = formulas.parameters(case.model)
    assert {key: value for key, value in table.items() if sum(value)} == expected
    result = check.check(case)
    assert result["planned"]["flops"] == result["measured"]["flops"]
    assert result["ratio"]["bytes"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_decoder_that_trains(check: Any, checkpointing: bool) -> None:
    text = check.text_config(256, 3, 4096, tied=True)
    sizes = {"rows": 3, "length": 96, "codes": 1024, "graded": 30}
    case = check.token_case("", text, checkpointing=checkpointing, **sizes)
    apply_stage(case.torch_model, FULL_TRUNK)
    case.model = replace(case.model, full_trunk=True)
    table = {row.component: (row.trainable, row.frozen) for row in trainability_table(case.torch_model)}
    assert {key: value for key, value in table.items() if sum(value)} == formulas.parameters(case.model)
    result = check.check(case)
    assert result["planned"]["flops"] == result["measured"]["flops"]
    assert result["ratio"]["bytes"] == pytest.approx(1, abs=0.1)


def test_an_untied_base_has_two_sets_of_rows(check: Any) -> None:
    result = check.check(tiny_cases(check, tied=False)["rows"]())
    assert result["planned"]["flops"] == result["measured"]["flops"]
    assert result["ratio"]["bytes"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("lora", [None, LoraShape(8)])
def test_bytes_in_bf16_autocast_as_on_a_gpu(
    check: Any, monkeypatch: pytest.MonkeyPatch, lora: LoraShape | None
) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: True)
    text = check.text_config(128, 3, 512)
    sizes = {"rows": 1, "length": 192, "graded": 16, "pictures": 1, "side": 56}
    case = check.vlm_case("", text, dtype=torch.bfloat16, lora=lora, **sizes)
    case.numerics = Numerics(BF16, BF16, BF16, autocast=True, dropout_mask=FP32, block_bytes=losses.CACHE_BYTES)
    step = check.make_step(case)
    step()
    memory = formulas.step_memory(case.model, case.batch, case.numerics, checkpointing=False, gradients_stay=False)
    planned = memory.gradients + memory.casts + memory.activations + memory.working
    assert planned == pytest.approx(check.allocation_peak(step), rel=0.1)


def test_flops_of_the_full_size_on_the_meta_device(check: Any) -> None:
    """Qwen3-8B's decoder forward and backward, and SO400M's tower forward, counted without any memory."""
    from torch.utils.flop_counter import FlopCounterMode

    text, tower = QWEN3["qwen3-8b"], read_tower_shape(SO400M)
    config = Qwen3Config(
        vocab_size=8, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=4, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, attn_implementation="sdpa",
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
        patch_size=14, vision_use_head=False, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        trunk = Qwen3ForCausalLM(config).model.requires_grad_(False)
        eyes = SiglipVisionModel(vision).requires_grad_(False)
        inputs = torch.empty(2, 512, 4096, requires_grad=True)
        pixels = torch.empty(3, 3, 384, 384)
    with FlopCounterMode(display=False) as counter:
        trunk(
            inputs_embeds=inputs, attention_mask={"full_attention": None}, use_cache=False
        ).last_hidden_state.sum().backward()
    shape = TextShape(4096, 12_288, 4, 32, 8, 128, 8, True)
    batch = Batch(2, 512, 0)
    planned = formulas.executed_flops(Model(shape), batch, checkpointing=False, attention_backward=2.0)
    assert counter.get_total_flops() == pytest.approx(planned.language_model, rel=1e-4)  # and the rotary angles
    whole = formulas.executed_flops(Model(text), batch, checkpointing=False)
    assert whole.language_model == pytest.approx(text.layers / 4 * planned.language_model, rel=0.02)
    with FlopCounterMode(display=False) as counter:
        eyes(pixels)
    assert counter.get_total_flops() == formulas.tower_flops(tower, 3)


def test_useful_flops_and_peak_of_the_recorded_full_size_step(check: Any) -> None:
    ratio = check.check_full_size(BENCHMARKS / "results" / "full_size.json")["ratio"]
    assert ratio["useful_flops"] == pytest.approx(1, abs=1e-3)
    assert ratio["peak_bytes"] == pytest.approx(1, abs=0.05)
    assert ratio["over_the_model_bytes"] == pytest.approx(1, abs=0.1)
    assert ratio["trainable_parameters"] == 1


def test_recomputation_trades_bytes_for_flops_and_shards_cut_what_is_kept() -> None:
    text, tower = QWEN3["qwen3-8b"], read_tower_shape(SO400M)
    model = Model(text, tower, ConnectorShape(tower.width, 512, 64, 2, 512, 4, 16_384, text.width, False))
    batch, numerics = Batch(4, 512, 300, 20, 2007, 20), Numerics()
    kept = formulas.step_memory(model, batch, numerics, checkpointing=False)
    again = formulas.step_memory(model, batch, numerics, checkpointing=True)
    assert again.activations < kept.activations / 5
    assert again.total < kept.total
    flops = [formulas.executed_flops(model, batch, checkpointing=flag).total for flag in (False, True)]
    assert 1.2 < flops[1] / flops[0] < 1.5
    sharded = formulas.step_memory(model, batch, numerics, checkpointing=True, shards=8)
    assert sharded.frozen_weights == again.frozen_weights / 8
    assert sharded.optimizer == again.optimizer / 8
    assert sharded.gathered > 0 == again.gathered


def test_variable_towers_take_their_patches_from_the_processor() -> None:
    shape = read_tower_shape("google/siglip2-so400m-patch16-naflex")
    assert shape == TowerShape(1152, 4304, 27, 16, 0, 16, variable=True)
    assert shape.patches == 256
