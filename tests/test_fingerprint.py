"""The same base has the same fingerprint however it is stored; another base has another."""

import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, SiglipModel, SiglipVisionModel

from qwen3_vlm.errors import ModelError
from qwen3_vlm.fingerprint import (
    differences,
    fingerprint_dataset,
    fingerprint_file,
    fingerprint_folder,
    fingerprint_module,
    fingerprint_text,
    fingerprint_tokenizer,
    resolve_folder,
    safetensors_files,
)
from tests.tiny import save_tiny_llm, tiny_tokenizer


def load(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def copy_with(folder: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(folder, target)
    safetensors.torch.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def wide_llm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with an untied head; its tensors have more elements than are sampled."""
    return save_tiny_llm(tmp_path_factory.mktemp("untied"), tied=False)


def test_the_same_for_any_sharding_and_in_memory(wide_llm_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(wide_llm_dir, dtype=torch.float32)
    expected = fingerprint_folder(wide_llm_dir, "llm")
    assert fingerprint_module(model, "llm") == expected
    for size in ("20KB", "60KB"):
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        assert len(safetensors_files(tmp_path / size)) > 1
        assert fingerprint_folder(tmp_path / size, "llm") == expected
    assert expected["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_a_tied_head_in_the_file_does_not_matter(tiny_llm_dir: Path, tmp_path: Path) -> None:
    tensors = load(tiny_llm_dir)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    with_head = copy_with(tiny_llm_dir, tmp_path / "with_head", tensors)
    assert fingerprint_folder(with_head, "llm") == fingerprint_folder(tiny_llm_dir, "llm")
    model = AutoModelForCausalLM.from_pretrained(tiny_llm_dir, dtype=torch.float32)
    assert fingerprint_module(model, "llm") == fingerprint_folder(tiny_llm_dir, "llm")


def test_the_tower_of_a_two_tower_model(tiny_tower_dir: Path, tmp_path: Path) -> None:
    whole = SiglipModel.from_pretrained(tiny_tower_dir, dtype=torch.float32)
    tower = SiglipVisionModel.from_pretrained(tiny_tower_dir, dtype=torch.float32)
    tower.save_pretrained(tmp_path / "tower")
    expected = fingerprint_folder(tiny_tower_dir, "vision_tower")
    assert fingerprint_folder(tmp_path / "tower", "vision_tower") == expected
    assert fingerprint_module(tower, "vision_tower") == expected
    assert expected["parameters"] < sum(parameter.numel() for parameter in whole.parameters())


def test_config_noise_does_not_matter(tiny_llm_dir: Path, tmp_path: Path) -> None:
    noisy = tmp_path / "noisy"
    shutil.copytree(tiny_llm_dir, noisy)
    config = json.loads((noisy / "config.json").read_text())
    config |= {"transformers_version": "9.9.9", "_name_or_path": "/elsewhere", "dtype": "bfloat16", "use_cache": False}
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope["rope_theta"]  # how older versions of transformers spell it
    (noisy / "config.json").write_text(json.dumps(config))
    assert fingerprint_folder(noisy, "llm") == fingerprint_folder(tiny_llm_dir, "llm")


@pytest.mark.parametrize("element", [0, -1])
def test_any_tensor_counts(tiny_llm_dir: Path, tmp_path: Path, element: int) -> None:
    """The first and last element of each tensor are among the samples."""
    tensors = load(tiny_llm_dir)
    base = fingerprint_folder(tiny_llm_dir, "llm")
    for number, name in enumerate(tensors):
        changed = {key: value.clone() for key, value in tensors.items()}
        changed[name].flatten()[element] += 1
        other = fingerprint_folder(copy_with(tiny_llm_dir, tmp_path / str(number), changed), "llm")
        lines = differences(base, other, "LLM")
        part = "layers." + name.split(".")[2] if "layers" in name else name.split(".")[1]
        assert lines == [f"LLM weights differ in {part}"]


def test_names_shapes_dtypes_and_config_count(tiny_llm_dir: Path, tmp_path: Path) -> None:
    tensors = load(tiny_llm_dir)
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    name = "model.layers.0.self_attn.q_norm.weight"
    folded = {key: value.reshape(2, -1) if key == name else value for key, value in tensors.items()}
    renamed = {key.replace("q_norm", "x_norm"): value for key, value in tensors.items()}
    base = fingerprint_folder(tiny_llm_dir, "llm")
    for number, changed in enumerate((half, folded, renamed)):
        other = fingerprint_folder(copy_with(tiny_llm_dir, tmp_path / str(number), changed), "llm")
        assert differences(base, other, "LLM")
    shutil.copytree(tiny_llm_dir, tmp_path / "eps")
    config = json.loads((tmp_path / "eps" / "config.json").read_text())
    (tmp_path / "eps" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    lines = differences(base, fingerprint_folder(tmp_path / "eps", "llm"), "LLM")
    assert lines == ["LLM config rms_norm_eps: 1e-06 in the add-on, 1e-05 here"]


def test_loading_in_another_dtype_keeps_the_folder_fingerprint(tiny_llm_dir: Path) -> None:
    """Which is why files are preferred to what is in memory."""
    half = AutoModelForCausalLM.from_pretrained(tiny_llm_dir, dtype=torch.bfloat16)
    assert fingerprint_module(half, "llm")["dtypes"] == ["BF16"]
    assert fingerprint_folder(tiny_llm_dir, "llm")["dtypes"] == ["F32"]


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_a_cut_file_is_refused(tiny_llm_dir: Path, tmp_path: Path, keep: int) -> None:
    shutil.copytree(tiny_llm_dir, tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is not a readable safetensors file"):
        fingerprint_folder(tmp_path / "cut", "llm")


def test_hostile_headers_are_refused(tiny_llm_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llm_dir, tmp_path / "bad")
    path = tmp_path / "bad" / "model.safetensors"
    entries: list[Any] = [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 10**12]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-8, 8]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]},
        ["not", "an", "entry"],
    ]
    for entry in entries:
        header = json.dumps({"a": entry}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
        with pytest.raises(ModelError):
            fingerprint_folder(tmp_path / "bad", "llm")
    path.write_bytes(struct.pack("<Q", 2**63))
    with pytest.raises(ModelError):
        fingerprint_folder(tmp_path / "bad", "llm")


def test_an_index_can_not_lead_outside_the_folder(tiny_llm_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llm_dir, tmp_path / "base")
    index = {"weight_map": {"a": "../../etc/passwd"}}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.parent for path in safetensors_files(tmp_path / "base")] == [tmp_path / "base"]


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no safetensors"):
        fingerprint_folder(tmp_path, "llm")


def test_sixteen_gigabytes_in_seconds(wide_llm_dir: Path, tmp_path: Path) -> None:
    """Qwen3-8B's shapes over a sparse file, so that this measures the reading of headers and samples."""
    shutil.copytree(wide_llm_dir, tmp_path / "big")
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (151_936, 4096),
        "lm_head.weight": (151_936, 4096),
    }
    sizes = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "up_proj": (12_288, 4096), "down_proj": (4096, 12_288)}
    sizes |= {"gate_proj": (12_288, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096), "norm": (4096,)}
    shapes |= {f"model.layers.{layer}.{name}.weight": shape for layer in range(36) for name, shape in sizes.items()}
    offset, header = 0, {}
    for name, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(tmp_path / "big" / "model.safetensors", "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + offset)
    start = time.perf_counter()
    found = fingerprint_folder(tmp_path / "big", "llm")
    assert time.perf_counter() - start < 10
    assert offset > 16e9
    assert found["tensors"] == len(shapes)


def test_agrees_with_the_safetensors_library(tiny_llm_dir: Path) -> None:
    """Names, shapes and dtypes as another reader of the same file sees them."""
    found = fingerprint_folder(tiny_llm_dir, "llm")
    with safe_open(tiny_llm_dir / "model.safetensors", "pt") as file:
        names = list(file.keys())
        count = sum(file.get_tensor(name).numel() for name in names)
    assert (found["tensors"], found["parameters"]) == (len(names), count)


def test_tokenizers() -> None:
    base = tiny_tokenizer()
    expected = fingerprint_tokenizer(base)
    base("padding and truncation leave marks", truncation=True, max_length=2, padding="max_length")
    assert fingerprint_tokenizer(base) == expected
    more = tiny_tokenizer()
    more.add_tokens(["<new>"])
    lines = differences(expected, fingerprint_tokenizer(more), "tokenizer")
    assert "tokenizer added_tokens <new>: none in the add-on, 323 here" in lines
    other = tiny_tokenizer()
    state = json.loads(other.backend_tokenizer.to_str())
    state["pre_tokenizer"]["add_prefix_space"] = True
    other.backend_tokenizer.pre_tokenizer = type(other.backend_tokenizer).from_str(json.dumps(state)).pre_tokenizer
    assert [line.split(":")[0] for line in differences(expected, fingerprint_tokenizer(other), "tokenizer")] == [
        "tokenizer splitting"
    ]


def test_small_fingerprints(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert fingerprint_file(tmp_path / "a") == abc
    assert fingerprint_text("abc") == abc
    assert fingerprint_dataset([("a", "1"), ("b", "2")]) != fingerprint_dataset([("b", "2"), ("a", "1")])


def test_an_unknown_base_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    missing = str(tmp_path / "missing" / "folder")
    hub = ("no-such-owner/no-such-model", "x" * 5_000, "nul\0")
    for name, words in ((missing, "no such folder"), *((name, "nor a hub repository") for name in hub)):
        with pytest.raises(ModelError, match=words) as caught:
            resolve_folder(name)
        assert "\n" not in str(caught.value)


def test_hub_errors_are_not_cut_inside_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **settings: Any) -> str:
        raise ValueError("unbelievable " * 40)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError, match=r"unbelievable …\)") as caught:
        resolve_folder("owner/model")
    assert len(str(caught.value)) < 320


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "second shard"])
def test_a_snapshot_in_part_is_downloaded_or_refused(
    tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """What the hub's cache has after, say, the config alone was asked for."""
    cached = tmp_path / "cached"
    shutil.copytree(tiny_llm_dir, cached)
    if lost == "second shard":
        index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
        (cached / "model.safetensors.index.json").write_text(json.dumps(index))
        lost = "model-2.safetensors"
    else:
        (cached / lost).unlink()
    answers = {True: cached, False: cached}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, local_files_only, **settings: str(answers[local_files_only])
    )
    for download in (False, True):  # True, but what comes is no more: as without a network
        with pytest.raises(ModelError, match=f"owner/model is incomplete in the hub's cache .* lacks {lost}"):
            resolve_folder("owner/model", download=download)
    answers[False] = tiny_llm_dir
    assert resolve_folder("owner/model") == tiny_llm_dir


def test_pickled_weights_are_a_whole_snapshot(
    tiny_llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_llm_dir, tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").rename(tmp_path / "old" / "pytorch_model.bin")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **settings: str(tmp_path / "old"))
    assert resolve_folder("owner/model", download=False) == tmp_path / "old"


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("granite", {"embedding_multiplier": 12.0}),
        ("granite", {"residual_multiplier": 0.5}),
        ("granite", {"attention_multiplier": 0.5}),
        ("granite", {"logits_scaling": 8.0}),
        ("gemma2", {"final_logit_softcapping": 20.0}),
        ("gemma2", {"attn_logit_softcapping": 20.0}),
        ("gemma2", {"query_pre_attn_scalar": 128}),
        ("gemma2", {"hidden_activation": "relu"}),
        ("cohere", {"logit_scale": 0.5}),
        ("qwen3_moe", {"num_experts_per_tok": 2}),
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ],
)
def test_settings_that_change_the_computation_count(
    tiny_llm_dir: Path, tmp_path: Path, model_type: str, change: dict[str, Any]
) -> None:
    found = []
    for number, extra in enumerate(({}, change)):
        folder = tmp_path / str(number)
        shutil.copytree(tiny_llm_dir, folder)
        sizes = {"model_type": model_type, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
        (folder / "config.json").write_text(json.dumps(sizes | extra))
        found.append(fingerprint_folder(folder, "llm"))
    lines = differences(*found, "LLM")
    assert all(any(f"LLM config {name}" in line for line in lines) for name in change)


def test_layer_types_count_unless_every_layer_is_full(tiny_llm_dir: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_llm_dir / "config.json").read_text())
    mixed = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}
    swapped = mixed | {"layer_types": mixed["layer_types"][::-1]}
    without = {key: value for key, value in config.items() if key not in ("layer_types", "max_window_layers")}
    found = []
    for number, tree in enumerate((config, without, config | mixed, config | swapped)):
        folder = tmp_path / str(number)
        shutil.copytree(tiny_llm_dir, folder)
        (folder / "config.json").write_text(json.dumps(tree))
        found.append(fingerprint_folder(folder, "llm"))
    assert found[0] == found[1] == fingerprint_folder(tiny_llm_dir, "llm")
    assert "layer_types" not in found[0]["config"]
    assert [line.split(":")[0] for line in differences(found[2], found[3], "LLM")] == ["LLM config layer_types"]


def test_other_families_in_memory_and_on_disk(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, Qwen3MoeConfig

    sizes: dict[str, Any] = {
        "vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    configs = (
        Gemma2Config(**sizes),
        GraniteConfig(**sizes, embedding_multiplier=12.0),
        Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=8, num_experts_per_tok=2),
    )
    for number, config in enumerate(configs):
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(tmp_path / str(number))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(number), dtype=torch.float32)
        on_disk = fingerprint_folder(tmp_path / str(number), "llm")
        assert fingerprint_module(loaded, "llm")["config"] == on_disk["config"]
