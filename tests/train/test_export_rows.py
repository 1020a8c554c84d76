"""Exported rows: a plain folder that says the same as the TokenLM, where this package can't even be imported."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from qwen3_vlm.errors import AddOnError, BaseMismatchError, ConfigError, ModelError, StorageError
from qwen3_vlm.models.lora import add_lora, lora_parameters
from qwen3_vlm.models.row_files import describe_base, save_rows
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.tokenization.token_names import token_names
from qwen3_vlm.tokenization.token_space import TokenSpace
from qwen3_vlm.train.export_rows import export_add_on, export_rows, join_rows, name_tokens
from qwen3_vlm.train.verify import verify_add_on
from tests.conftest import Run
from tests.tiny import PASSED_GATE, VOCABULARY_ROWS, save_tiny_llm, save_tiny_rows, tiny_row_space, tiny_tokenizer

IDS = torch.tensor([[1, 2, 390, 448, 463, 464, 478], [5, 384, 100, 385, 391, 386, 450]])

# What somebody without this package would run: logits over some ids, and greedy continuations.
PLAIN = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "qwen3_vlm":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = model.eval()(input_ids=ids).logits
greedy = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
assert not any(name.split(".")[0] == "qwen3_vlm" for name in sys.modules)
torch.save({"logits": logits, "greedy": greedy, "class": type(model).__name__}, sys.argv[3])
print(json.dumps(tokenizer(sys.argv[4], add_special_tokens=False)["input_ids"]))
"""


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llm(tmp_path_factory.mktemp("llm"), tied=request.param)


@pytest.fixture(scope="module")
def rows(llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_rows(tmp_path_factory.mktemp("rows") / "rows", llm)


@pytest.fixture(scope="module")
def out(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    sentence = export_rows(rows, folder)
    assert str(folder) in sentence
    return folder


def used(space: TokenSpace) -> torch.Tensor:
    """Ids that TokenLM can say: all but the base's padding rows."""
    ids = torch.arange(space.vocab_size_total)
    return ids[(ids < space.text.tokenizer_size) | (ids >= space.text.vocab_size)]


def test_it_is_the_same_model_where_this_package_is_not(rows: Path, out: Path, tmp_path: Path) -> None:
    text = "a red heart<|img_start|><|image_00003|><|audio_2_0005|>"
    arguments = [str(out), json.dumps(IDS.tolist()), str(tmp_path / "plain.pt"), text]
    result = subprocess.run([sys.executable, "-c", PLAIN, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)
    model = TokenLM.from_add_on(rows)
    space = model.token_space
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    assert plain["class"] == "Qwen3ForCausalLM"
    assert plain["logits"].shape == expected.shape
    assert (plain["logits"] - expected)[..., used(space)].abs().max() < 1e-5
    stops = {"eos_token_id": [385, 387, 389], "pad_token_id": space.special("<|pad_mm|>")}
    greedy = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=False, **stops)
    assert torch.equal(plain["greedy"], greedy)
    words = AutoTokenizer.from_pretrained(out)("a red heart", add_special_tokens=False)["input_ids"]
    assert json.loads(result.stdout) == [*words, 386, 448 + 3, 384 + 64 + 16 + 4 + 5 + 5]


def test_base_rows_are_the_bases_to_the_bit_and_tied_stays_tied(llm: Path, rows: Path, out: Path) -> None:
    base = safetensors.torch.load_file(llm / "model.safetensors")
    found = safetensors.torch.load_file(out / "model.safetensors")
    saved = torch.load(rows / "trainable_rows.pt", weights_only=True)
    assert found.keys() == base.keys()
    assert ("lm_head.weight" in found) == (saved["lm_head"] is not None)
    for name, tensor in base.items():
        assert torch.equal(found[name][: len(tensor)], tensor)
    assert torch.equal(found["model.embed_tokens.weight"][384:], saved["embeddings"])
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] == (saved["lm_head"] is None)
    assert config["vocab_size"] == 479
    model = AutoModelForCausalLM.from_pretrained(out)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (saved["lm_head"] is None)
    if not tied:
        assert torch.equal(found["lm_head.weight"][384:], saved["lm_head"])


def test_every_id_has_its_name(llm: Path, out: Path) -> None:
    space = tiny_row_space(llm)
    tokenizer, base = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(llm)
    assert len(tokenizer) == space.vocab_size_total
    for name, value in space.special_tokens.items():
        assert tokenizer.convert_tokens_to_ids(name) == value
    named = {
        323: "<|unused_323|>",
        383: "<|unused_383|>",
        394: "<|special_10|>",
        448: "<|image_00000|>",
        463: "<|image_00015|>",
        464: "<|audio_0_0000|>",
        472: "<|audio_1_0004|>",
        478: "<|audio_2_0005|>",
    }
    assert tokenizer.convert_ids_to_tokens(list(named)) == list(named.values())
    assert tokenizer.decode([448, 464, 1], skip_special_tokens=True) == base.decode([1])
    for text in ("a red heart", "  ünïcode\n\t🙂 <|im_start|>", "x" * 300, ""):
        assert tokenizer.encode(text) == base.encode(text)


def test_names_follow_from_the_token_space(llm: Path) -> None:
    space = tiny_row_space(llm)
    names = token_names(space)
    assert len(names) == len(set(names)) == space.vocab_size_total - space.text.tokenizer_size
    other = token_names(space, {"<|img_start|>", "<|img_start_mm|>", "<|image_00002|>"})
    changed = {one: two for one, two in zip(names, other, strict=True) if one != two}
    assert changed == {"<|img_start|>": "<|img_start_mm_mm|>", "<|image_00002|>": "<|image_00002_mm|>"}


def test_a_tokenizer_that_can_not_have_them(llm: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    with pytest.raises(ModelError, match="does not give added tokens the ids"):
        name_tokens(tokenizer, tiny_row_space(llm))


def test_generation_ends_with_a_segment_and_never_says_a_padding_row(out: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(out).generation_config
    assert config.eos_token_id == [385, 387, 389]
    assert config.suppress_tokens == list(range(323, 384))
    assert config.pad_token_id == 393


def test_the_folder_says_what_it_is(rows: Path, out: Path) -> None:
    for name in ("token_space.json", "token_space.sha256", "uti.yaml", "evidence.json"):
        assert (out / name).read_bytes() == (rows / name).read_bytes()
    sha256 = TokenSpace.load(out).sha256
    assert json.loads((out / "config.json").read_text())["token_space_sha256"] == sha256
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for words in (sha256, "Qwen3ForCausalLM", "95 vocabulary rows", "step 7", "zero − correct | passed | 0.500", "−∞"):
        assert words in card
    assert str(rows.parent) not in card
    assert "base_model" not in card  # a folder of this machine
    assert not list(out.rglob("*.py"))


def test_the_card_does_not_believe_what_is_marked(llm: Path, rows: Path, tmp_path: Path) -> None:
    gates: list[Any] = [{**PASSED_GATE, "value": 0.01, "name": "a | b\n# big"}]
    model = TokenLM.from_add_on(rows)
    folder = save_rows(tmp_path / "rows", model, describe_base(llm), uti=None, evidence={"gates": gates})
    export_rows(folder, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| a \\| b # big | **failed** |" in card
    folder = save_rows(tmp_path / "bad", model, describe_base(llm), uti=None, evidence={"gates": [3]})
    with pytest.raises(AddOnError, match="list of gates"):
        export_rows(folder, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_sixteen_bits(rows: Path, tmp_path: Path) -> None:
    export_rows(rows, tmp_path / "out", dtype="bfloat16")
    found = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    saved = torch.load(rows / "trainable_rows.pt", weights_only=True)["embeddings"]
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert torch.equal(found["model.embed_tokens.weight"][384:], saved.bfloat16())
    assert "rounded to bfloat16" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ModelError, match="no dtype"):
        export_rows(rows, tmp_path / "other", dtype="int8")


def test_what_is_refused(rows: Path, tmp_path: Path, connector: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(StorageError, match="not empty"):
        export_rows(rows, tmp_path / "full")
    with pytest.raises(BaseMismatchError):
        export_rows(rows, tmp_path / "out", llm=save_tiny_llm(tmp_path / "other", seed=5))
    with pytest.raises(ConfigError, match="leave --vision-tower out"):
        export_add_on(rows, tmp_path / "out", vision_tower="x")
    with pytest.raises(ConfigError, match="leave --dtype out"):
        export_add_on(connector, tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_merged(llm: Path, rows: Path, tmp_path: Path) -> None:
    model = TokenLM.from_add_on(rows)
    add_lora(model.language_model, rank=4, alpha=8.0)
    for number, parameter in enumerate(lora_parameters(model.language_model).values()):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(number))
    folder = save_rows(tmp_path / "rows", model, describe_base(llm), uti=None)
    (adapter,) = (check for check in verify_add_on(folder).checks if check.name == "adapter")
    assert adapter.detail.startswith("28 tensors, ")
    export_rows(folder, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not any("lora" in name for name in safetensors.torch.load_file(tmp_path / "out" / "model.safetensors"))
    with torch.no_grad():
        found, expected, without = (
            each(input_ids=IDS).logits[..., used(model.token_space)]
            for each in (plain, model.eval(), TokenLM.from_add_on(rows))
        )
    assert (found - expected).abs().max() < 1e-5
    assert (found - without).abs().max() > 0.1
    assert "with a LoRA adapter merged" in (tmp_path / "out" / "README.md").read_text()


def test_a_base_of_pickled_weights(llm: Path, rows: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(llm, tmp_path / "old"))
    (old / "model.safetensors").unlink()
    weights = AutoModelForCausalLM.from_pretrained(llm).state_dict()
    torch.save(weights, old / "pytorch_model.bin")
    export_rows(rows, tmp_path / "out", llm=old)
    weights["model.norm.weight"] += 1
    torch.save(weights, old / "pytorch_model.bin")
    with pytest.raises(BaseMismatchError, match="LLM weights differ in norm"):
        export_rows(rows, tmp_path / "other", llm=old)


def test_rows_that_do_not_fit_are_not_joined(llm: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llm)
    with pytest.raises(ModelError, match="do not fit"):
        join_rows(model, {"embeddings": torch.zeros(5, 32)}, VOCABULARY_ROWS + 6)


def test_the_command(rows: Path, connector: Path, tmp_path: Path, run: Run) -> None:
    status, out, _ = run("export", rows, tmp_path / "out")
    assert status == 0
    assert "AutoModelForCausalLM" in out
    status, out, _ = run("export", connector, tmp_path / "vlm")
    assert status == 0
    assert "AutoModelForImageTextToText" in out
    status, _, err = run("export", rows, tmp_path / "out")
    assert status == 1
    assert "not empty" in err


SIZES = {
    "vocab_size": VOCABULARY_ROWS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
FAMILIES = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=5.0)),  # scales its embeddings
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=2.0, embedding_multiplier=3.0)),
    "cohere2": lambda: Cohere2ForCausalLM(Cohere2Config(**SIZES, logit_scale=0.25)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY_ROWS, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    model.save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    rows = save_tiny_rows(tmp_path / "rows", tmp_path / "llm")
    export_rows(rows, tmp_path / "out")
    token_lm = TokenLM.from_add_on(rows, attn_implementation="eager")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert type(plain) is type(model)
    with torch.no_grad():
        found, expected = (each(input_ids=IDS).logits[..., used(token_lm.token_space)] for each in (plain, token_lm))
    assert (found - expected).abs().max() < 1e-5
