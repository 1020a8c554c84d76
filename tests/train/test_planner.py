"""Plans from configs alone: which ways fit, how they scale, and what is said when nothing does."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from qwen3_vlm.cli_plan import format_plan
from qwen3_vlm.cli_plan import plan as command
from qwen3_vlm.config import RunConfig, load_config, parse_config
from qwen3_vlm.errors import ConfigError, ModelError
from qwen3_vlm.train.planner import ASSUMED_ROWS, Assumptions, Plan, plan
from qwen3_vlm.train.planner_hardware import DEVICES, parse_cluster
from qwen3_vlm.train.planner_shapes import read_text_shape, read_tower_shape

CONFIGS = Path(__file__).parents[2] / "configs"


def _app() -> typer.Typer:
    app = typer.Typer()
    app.command()(command)
    return app


def planned(name: str, gpus: str, *overrides: str, **given: Any) -> Plan:
    return plan(load_config(CONFIGS / name, overrides), parse_cluster(gpus), Assumptions(**given))


def test_stage_1_fits_a_gpu_of_40_gb_as_its_config_says() -> None:
    found = planned("stage1_align.yaml", "1xA100-40")
    assert [way.fits for way in found.ways] == [True, True]
    assert found.parameters["projector"] == (75_517_952, 0)
    assert sum(trainable for trainable, _ in found.parameters.values()) == 82_445_824
    assert found.best is not None
    assert not found.best.checkpointing
    assert not any(way.fits for way in planned("stage1_align.yaml", "1x4090").ways[:1])


def test_stage_2_has_an_adapter_and_fits_a_gpu_of_80_gb() -> None:
    found = planned("stage2_sft.yaml", "1xH100")
    assert found.parameters["lora"] == (16 * 36 * (4096 * 2 + 2 * 5120 + 8192 + 3 * 16_384), 0)
    assert any(way.fits for way in found.ways)


def test_a_decoder_in_4_bits_takes_a_quarter_and_is_not_sharded() -> None:
    plain, packed = (planned("stage2_sft.yaml", "8xH100", *more) for more in ((), ("model.quantization=nf4",)))
    assert [way.strategy for way in packed.ways] == ["DDP", "DDP"]
    linear = 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12_288)
    copied = [way for way in plain.ways if way.strategy == "DDP"]
    saved = [
        one.memory.frozen_weights - other.memory.frozen_weights for one, other in zip(copied, packed.ways, strict=True)
    ]
    assert saved == pytest.approx([linear * (2 - 0.515869140625)] * 2)


def test_stage_3_counts_rows_once_for_a_tied_base_and_twice_for_an_untied_one() -> None:
    tied = planned("stage3_rows.yaml", "1xA100")
    assert tied.parameters["vocabulary_rows"] == (ASSUMED_ROWS * 1024, 0)
    assert "vision_tower" not in tied.parameters
    untied = planned("stage3_rows.yaml", "1xH100", "model.llm=Qwen/Qwen3-8B-Base", new_rows=1000)
    assert untied.parameters["vocabulary_rows"] == (2 * 1000 * 4096, 0)


def test_a_decoder_that_trains_has_gradients_and_a_copy_where_text_is_held() -> None:
    tree = {"stage": "stage4_mmpt", "model": {"llm": "Qwen/Qwen3-0.6B-Base"}, "trunk": {"training": "full"}}
    text = {"lora": {"kl_weight": 1.0}, "text": {"files": ["t.jsonl"]}}
    found, held = (plan(parse_config({**tree, **more}), parse_cluster("8xH100")) for more in ({}, text))
    decoder = 596_049_920 - 151_936 * 1024  # all but the embedding, which is the head too
    assert found.parameters["language_model"] == (decoder, 151_936 * 1024)
    assert "lora" not in found.parameters
    trained = decoder + ASSUMED_ROWS * 1024
    assert found.ways[0].memory.optimizer == 8 * trained
    assert found.ways[0].memory.gradients == 4 * trained
    for one, other in zip(found.ways, held.ways, strict=True):  # whole on each device, sharded or not
        assert other.memory.frozen_weights - one.memory.frozen_weights == 2 * decoder


def test_time_follows_samples_and_devices_and_cost_the_price() -> None:
    one = planned("stage1_align.yaml", "1xH100", samples=558_000, price=2.0)
    twice = planned("stage1_align.yaml", "1xH100", samples=2 * 558_000)
    eight = planned("stage1_align.yaml", "8xH100", samples=558_000)
    way = one.ways[0]
    assert twice.ways[0].hours == pytest.approx(2 * way.hours, rel=1e-3)
    assert eight.ways[0].hours == pytest.approx(way.hours / 8, rel=0.02)
    assert way.cost == pytest.approx(2.0 * way.hours)
    assert way.tokens_per_second * way.hours * 3600 == pytest.approx(558_000 * one.data.tokens, rel=0.05)
    assert twice.ways[0].cost is None


@pytest.mark.parametrize(
    ("name", "texts"), [("stage2_sft.yaml", 0.2 + 0.8 * 40_688 / 665_298), ("stage4_mmpt.yaml", 0.2)]
)
def test_texts_that_are_held_at_the_base_cost_a_forward_pass_and_three_products(name: str, texts: float) -> None:
    mixed = ["text.files=[texts.jsonl]", "text.share=0.2"]
    free, held = (planned(name, "1xH100", *mixed, f"lora.kl_weight={weight}") for weight in (0, 1))
    layers = {"stage2_sft.yaml": (36, 4096, 1024, 12_288, 4096, 151_936)}
    layers["stage4_mmpt.yaml"] = (28, 2048, 1024, 3072, 1024, 151_936)
    number, query, keys, inner, width, words = layers[name]
    tokens = held.batch.samples * texts * 250
    assert held.batch.held is not None
    matrices = number * (2 * width * query + 2 * width * keys + 3 * width * inner)
    per_token = 2 * matrices + 4 * number * query * held.batch.held.length + 6 * width * words * 249 / 250
    steps = load_config(CONFIGS / name).optim.accumulation
    assert held.ways[0].executed_flops - free.ways[0].executed_flops == pytest.approx(steps * tokens * per_token)
    assert held.ways[0].memory_bytes > free.ways[0].memory_bytes
    assert f"The base reads {texts:.0%} of the samples once more" in format_plan(held)
    assert free.batch.held is None


def test_utilisation_and_lengths_can_be_given() -> None:
    usual = planned("stage1_align.yaml", "1xH100", utilisation=0.2)
    fast = planned("stage1_align.yaml", "1xH100", utilisation=0.4)
    assert usual.ways[0].step_seconds == pytest.approx(2 * fast.ways[0].step_seconds)
    long = planned("stage1_align.yaml", "1xH100", tokens_per_sample=198, graded_per_sample=20)
    assert (long.data.tokens, long.data.graded) == (198, 20)
    assert long.ways[0].hours > 1.5 * planned("stage1_align.yaml", "1xH100").ways[0].hours


def test_what_does_not_fit_is_said_with_what_would() -> None:
    found = planned("stage1_align.yaml", "1xA100-40", "optim.batch_size=64")
    assert not found.ways[0].fits
    assert 0 < found.ways[0].largest_batch_size < 64
    smaller = f"optim.batch_size={found.ways[0].largest_batch_size}"
    assert planned("stage1_align.yaml", "1xA100-40", smaller).ways[0].fits
    assert not planned("stage1_align.yaml", "1xA100-40", "optim.batch_size=4096").best
    text = format_plan(planned("stage1_align.yaml", "1xL4", "model.llm=Qwen/Qwen3-32B"))
    assert "Nothing fits, not even one row at a time" in text
    sharded = planned("stage1_align.yaml", "8xL4", "model.llm=Qwen/Qwen3-32B")
    assert [way.name for way in sharded.ways if way.fits] == ["FSDP2 + checkpointing"]


def test_cached_features_take_the_tower_out_of_the_step() -> None:
    usual = planned("stage1_align.yaml", "1xH100", "optim.epochs=3")
    cached = planned("stage1_align.yaml", "1xH100", "optim.epochs=3", "data.feature_cache=features")
    assert cached.ways[0].step_seconds < usual.ways[0].step_seconds
    assert cached.ways[0].hours < usual.ways[0].hours
    assert any("once per picture" in remark for remark in cached.remarks)


def test_max_steps_decide_the_length() -> None:
    assert planned("stage1_align.yaml", "1xH100", "optim.max_steps=10").steps == 10


def test_bases_are_read_from_folders(tiny_llm_dir: Path, tiny_tower_dir: Path) -> None:
    text, tower = read_text_shape(str(tiny_llm_dir)), read_tower_shape(str(tiny_tower_dir))
    assert (text.width, text.layers, text.vocabulary, text.tied) == (32, 2, 384, True)
    assert (tower.width, tower.patches) == (24, 16)
    overrides = [f"model.llm={tiny_llm_dir}", f"model.vision_tower={tiny_tower_dir}"]
    assert planned("stage1_align.yaml", "4x3090", *overrides).best is not None


def test_a_token_space_on_disk_says_how_many_rows_there_are(tmp_path: Path, tiny_llm_dir: Path) -> None:
    from tests.tiny import tiny_row_space

    space = tiny_row_space(tiny_llm_dir)
    space.save(tmp_path)
    overrides = [f"model.llm={tiny_llm_dir}", f"tokens.folders=[{tmp_path}]"]
    found = planned("stage3_rows.yaml", "1xL4", *overrides)
    rows = space.vocab_size_total - space.text.vocab_size
    assert found.parameters["vocabulary_rows"] == (rows * 32, 0)
    assert not any("--new-rows" in remark for remark in found.remarks)


@pytest.mark.parametrize("name", ["nobody/unknown-7b", "not a name"])
def test_unknown_bases_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match=r"sizes of .* are not known"):
        read_text_shape(name)


def test_other_families_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelError, match="'gpt2' model; the planner has formulas for"):
        read_text_shape(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
    with pytest.raises(ModelError, match="must be SigLIP"):
        read_tower_shape(str(tmp_path))


@pytest.mark.parametrize("text", ["8xH100", "8 x h100", "8×H100-80", "8xNVIDIA H100"])
def test_accelerators_are_named_as_people_do(text: str) -> None:
    assert str(parse_cluster(text)) == "8xH100"


def test_rtx_names_and_single_ones() -> None:
    assert str(parse_cluster("RTX4090")) == str(parse_cluster("rtx 4090")) == "1x4090"


@pytest.mark.parametrize("text", ["0xH100", "H999", "8x", "", "-1xH100"])
def test_other_accelerators_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpus is"):
        parse_cluster(text)


def test_every_accelerator_can_be_named_and_has_a_source() -> None:
    for device in DEVICES:
        assert parse_cluster(f"2x{device.name}").device is device
        assert device.source
        assert 0 < device.utilisation < 1


def test_fsdp_over_slow_links_waits_for_weights() -> None:
    found = planned("stage1_align.yaml", "64xL40S", "optim.batch_size=1")
    ways = {way.name: way for way in found.ways}
    assert ways["FSDP2"].communication_share > 0.3
    assert ways["FSDP2"].step_seconds > ways["DDP"].step_seconds


def test_the_plan_is_json_and_text() -> None:
    found = planned("stage2_sft.yaml", "8xH100", price=3.0)
    tree = json.loads(json.dumps(found.to_dict()))
    assert tree["best"] == found.best.name if found.best else tree["best"] is None
    assert [way["name"] for way in tree["ways"]] == [way.name for way in found.ways]
    assert tree["cluster"]["count"] == 8
    text = format_plan(found)
    for word in ("lora", "DDP + checkpointing", "fits in 80 GB", "cost", "Quickest that fits"):
        assert word in text


def test_the_command() -> None:
    config = str(CONFIGS / "stage1_align.yaml")
    result = CliRunner().invoke(
        _app(), [config, "optim.batch_size=2", "--gpus", "2xH100", "--samples", "1000", "--json"]
    )
    assert result.exit_code == 0, result.output
    tree = json.loads(result.output)
    assert (tree["data"]["samples"], tree["batch"]["rows"]) == (1000, 2)


def test_no_torch_is_needed() -> None:
    code = (
        "import sys\nfrom qwen3_vlm.config import load_config\nfrom qwen3_vlm.train.planner import plan\n"
        "from qwen3_vlm.train.planner_hardware import parse_cluster\nfrom qwen3_vlm.cli_plan import format_plan\n"
        f"print(format_plan(plan(load_config({str(CONFIGS / 'stage1_align.yaml')!r}), parse_cluster('8xH100'))))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONFIGS.parent)
    assert result.returncode == 0, result.stderr


def test_every_default_can_be_planned() -> None:
    assert plan(RunConfig(), parse_cluster("1xH100")).steps > 0


DOCUMENT = CONFIGS.parent / "docs" / "planning.md"
CHECKED = CONFIGS.parent / "benchmarks" / "results" / "plan_check.json"


def refreshed(text: str) -> str:
    """The document with the output of every command in it as it is now."""

    def run(block: re.Match[str]) -> str:
        name, *options = block.group(1).split()
        result = CliRunner().invoke(_app(), [str(CONFIGS.parent / name), *options])
        assert result.exit_code == 0, result.output
        return f"```console\n$ qwen3-vlm plan {block.group(1)}\n{result.output.rstrip()}\n```"

    text = re.sub(r"```console\n\$ qwen3-vlm plan ([^\n]+)\n(?:.*?\n)??```", run, text, flags=re.DOTALL)
    start, end = "<!-- benchmarks/results/plan_check.json -->\n", "<!-- end -->"
    return re.sub(f"{start}.*?{end}", f"{start}{checked_table()}\n{end}", text, flags=re.DOTALL)


def checked_table() -> str:
    """The recorded comparison as a table; each figure is planned ÷ measured."""
    if not CHECKED.exists():
        return "Not recorded yet."
    found = json.loads(CHECKED.read_text(encoding="utf-8"))
    lines = ["| planned ÷ measured | bytes beside the model | with the model | FLOPs |", "|---|---|---|---|"]
    for name, case in found["cases"].items():
        ratio = case["ratio"]
        lines.append(f"| {name} | {ratio['bytes']:.3f} | {case['whole_ratio']:.3f} | {ratio['flops']:.4f} |")
    full = found["full_size"]["ratio"]
    beside, whole, flops = (full[key] for key in ("over_the_model_bytes", "peak_bytes", "useful_flops"))
    return "\n".join([*lines, f"| Qwen3-8B + SO400M, stage 1 | {beside:.3f} | {whole:.3f} | {flops:.4f} |"])


def test_the_document_shows_what_the_command_prints() -> None:
    """`python -m tests.train.test_planner` writes it anew."""
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.count("$ qwen3-vlm plan") >= 3
    assert refreshed(text) == text


def test_the_recorded_comparison_is_within_a_tenth() -> None:
    found = json.loads(CHECKED.read_text(encoding="utf-8"))
    ratios = [value for case in found["cases"].values() for value in (*case["ratio"].values(), case["whole_ratio"])]
    for ratio in [*ratios, *found["full_size"]["ratio"].values()]:
        assert ratio == pytest.approx(1, abs=0.1)


if __name__ == "__main__":
    DOCUMENT.write_text(refreshed(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
