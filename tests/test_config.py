"""Configuration: every value is checked, nothing but ConfigError comes out, and it survives a round trip."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vlm.config import DataConfig, RunConfig, dump_yaml, load_config, parse_as, parse_config, to_dict
from qwen3_vlm.errors import ConfigError
from qwen3_vlm.tokenization.uti_config import UTIConfig, load_uti_config

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


def leaf_keys(config: Any, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"{prefix}{field.name}"
        keys += leaf_keys(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return keys


LEAF_KEYS = leaf_keys(RunConfig())
SECTIONS = [field.name for field in dataclasses.fields(RunConfig) if field.name in {k.split(".")[0] for k in LEAF_KEYS}]

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


def parse_or_refuse(tree: Any, overrides: list[str]) -> RunConfig | None:
    try:
        return parse_config(tree, overrides)
    except ConfigError as error:
        assert str(error).strip()
        return None


def test_a_weight_of_texts_is_refused_where_it_is_not_read() -> None:
    assert parse_config({"stage": "stage4_mmpt", "text": {"files": ["t"], "loss_weight": 0}}).text.loss_weight == 0
    with pytest.raises(ConfigError, match=r"text\.loss_weight is read by stage4_mmpt alone"):
        parse_config({"stage": "stage2_sft", "text": {"loss_weight": 0}})


def test_a_tasks_folders_are_among_those_of_the_data() -> None:
    tasks = {"i2t": {}, "t2i": {"folders": ["b"]}}
    config = parse_config({"stage": "stage3_rows", "tokens": {"folders": ["a", "b"], "tasks": tasks}})
    assert config.tokens.tasks["t2i"].folders == ("b",)
    with pytest.raises(ConfigError, match=r"tasks\.t2i\.folders is 'b'; it must be among tokens\.folders"):
        parse_config({"stage": "stage3_rows", "tokens": {"folders": ["a"], "tasks": tasks}})


@given(key=st.sampled_from(LEAF_KEYS), value=values)
def test_any_value_of_a_known_key_is_taken_or_refused(key: str, value: Any) -> None:
    tree: dict[str, Any] = {}
    node = tree
    *parents, last = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    config = parse_or_refuse(tree, [])
    if config is not None:
        assert parse_config(to_dict(config)) == config


@given(key=st.sampled_from(LEAF_KEYS + SECTIONS) | st.text(max_size=12), value=st.text(max_size=30))
def test_any_override_is_taken_or_refused(key: str, value: str) -> None:
    parse_or_refuse({}, [f"{key}={value}"])


@given(override=st.text(max_size=40))
def test_any_text_as_an_override_is_taken_or_refused(override: str) -> None:
    parse_or_refuse({}, [override])


@given(tree=st.dictionaries(st.sampled_from(SECTIONS) | st.text(max_size=8), values, max_size=4))
def test_any_tree_is_taken_or_refused(tree: dict[str, Any]) -> None:
    parse_or_refuse(tree, [])


@settings(max_examples=150)
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_file_is_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    try:
        load_config(path)
    except ConfigError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "seed: 2020-13-45",  # looks like a date, is none
        "seed: 0b_",  # looks like a binary number
        "seed: " + "9" * 5000,  # more digits than Python converts
        "model: &again {llm: *again}",  # contains itself
        "data: &again [*again]",
        "[" * 3000,
        "seed: !!python/object/apply:os.system ['true']",
        "? [a, b]\n: 1",
        "seed: 1\n---\nseed: 2",
        "a: *nothing",
        "just a sentence",
        "[1, 2]",
        "\x00",
    ],
)
def test_hostile_yaml_is_refused_with_the_file_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(path)
    if ": " in text and "\n" not in text:
        key, _, value = text.partition(": ")
        with pytest.raises(ConfigError, match=rf"{key}|config contains itself"):
            parse_config({}, [f"{key}={value}"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_parses(path: Path) -> None:
    if path.name.endswith("uti.yaml"):
        tokens = load_uti_config(path)
        assert parse_as(UTIConfig, yaml.safe_load(dump_yaml(tokens))) == tokens
        return
    config = load_config(path)
    assert parse_config(yaml.safe_load(dump_yaml(config))) == config


def test_the_full_size_run_is_that_of_the_public_record() -> None:
    config = load_config(ROOT / "configs" / "stage1_align.yaml")
    assert (config.model.llm, config.model.vision_tower) == (
        "Qwen/Qwen3-8B-Base",
        "google/siglip2-so400m-patch14-384",
    )
    assert (config.model.vision_ln, config.optim.weight_decay, config.optim.mixed_precision) == (False, 0.0, "bf16")
    assert (config.data.max_seq_len, config.optim.batch_size, config.optim.accumulation) == (512, 4, 4)
    assert (config.data.eval_fraction, config.data.eval_max, config.optim.learning_rate) == (0.02, 2000, 1e-4)
    assert (config.eval.quick_samples, config.eval.quick_every) == (200, 200)
    assert (config.eval.golden_samples, config.eval.golden_max_new_tokens) == (64, 64)


def test_overrides_win_and_numbers_may_be_written_as_people_do() -> None:
    config = parse_config({"optim": {"learning_rate": "5e-5"}}, ["optim.learning_rate=2e-4", "data.train=[a.json]"])
    assert config.optim.learning_rate == 2e-4
    assert config.data.train == ("a.json",)
    assert parse_config({"data": {"train": "one.json"}}).data.train == ("one.json",)
    assert parse_config({}, ["optim.max_steps=null"]).optim.max_steps is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.learning_rat=1"], r"unknown key optim\.learning_rat\. Did you mean learning_rate\?"),
        (["nonsense=1"], "unknown key nonsense. Known keys: "),
        (["optim=3"], "optim must be a mapping"),
        (["seed=1", "seed.x=1"], "below 'seed', which holds a plain value"),
        (["optim.batch_size=2.5"], r"optim\.batch_size is 2\.5; it must be a whole number"),
        (["optim.batch_size=true"], "must be a whole number"),
        (["optim.learning_rate=true"], "must be a finite number"),
        (["optim.learning_rate=.nan"], "must be a finite number"),
        (["optim.learning_rate=.inf"], "must be a finite number"),
        (["tensorboard=1"], "must be true or false"),
        (["model.dtype=float16"], "must be one of bfloat16, float32"),
        (["optim.batch_size=0"], r"optim\.batch_size is 0; it must be above 0"),
        (["data.eval_fraction=1"], "must lie between 0 and 1"),
        (["optim.min_learning_rate=1"], "between 0 and learning_rate"),
        (["learning_rate"], "not of the form key=value"),
        (["=1"], "not of the form key=value"),
        (["seed={"], "not valid YAML"),
        (["sweep.learning_rates=[]"], "must name at least one rate"),
    ],
)
def test_refusals_name_the_key_and_the_rule(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({}, overrides)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path)
    (tmp_path / "large.yaml").write_text("#" * 1_000_001)
    with pytest.raises(ConfigError, match="at most 1,000,000"):
        load_config(tmp_path / "large.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == RunConfig()


def test_the_given_mapping_is_left_as_it_was() -> None:
    tree = {"optim": {"batch_size": 2}}
    parse_config(tree, ["optim.batch_size=8", "seed=1"])
    assert tree == {"optim": {"batch_size": 2}}


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataConfig().train = ("x",)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("section", "problem"),
    [({"text": {"share": 0.3}}, "names no files"), ({"lora": {"kl_weight": 1.0}}, r"text\.files, which names none")],
)
def test_what_needs_texts_is_not_set_without_them(section: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_config({"stage": "stage4_mmpt", **section})
    text = {"files": ["t.jsonl"], **section.get("text", {})}
    assert parse_config({"stage": "stage4_mmpt", **section, "text": text}).text.files == ("t.jsonl",)
