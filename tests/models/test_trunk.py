"""A trained decoder beside its rows: every bit comes back, anything else is refused, and the base is left alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from qwen3_vlm.errors import AddOnError, TamperedFileError
from qwen3_vlm.fingerprint import fingerprint_file
from qwen3_vlm.models.lora import add_lora
from qwen3_vlm.models.row_files import describe_base, load_rows, read_rows_info, save_rows
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.models.trunk import TRUNK, frozen_copy, trunk_parameters
from qwen3_vlm.train.omni_files import load_omni
from qwen3_vlm.train.verify import verify_rows
from tests.tiny import save_tiny_llm, tiny_row_space

IDS = torch.tensor([[1, 2, 390, 460, 478]])


def plain(llm: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(llm, dtype=dtype)


def trained(llm: Path, dtype: torch.dtype = torch.float32) -> TokenLM:
    """A model whose decoder has moved."""
    model: TokenLM = TokenLM.grow(plain(llm, dtype), tiny_row_space(llm), seed=3).eval()
    model.owns_trunk = True
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in trunk_parameters(model.language_model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llm(tmp_path_factory.mktemp("llm"), tied=request.param)


@pytest.fixture
def rows(llm: Path, tmp_path: Path) -> Path:
    return save_rows(tmp_path / "rows", trained(llm), describe_base(llm), uti=None)


def test_what_is_saved_comes_back_to_the_bit(rows: Path, llm: Path) -> None:
    before = fingerprint_file(llm / "model.safetensors")
    model, loaded = trained(llm), TokenLM.from_add_on(rows)
    wanted, found = trunk_parameters(model.language_model), trunk_parameters(loaded.language_model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert loaded.owns_trunk
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded.embedding.weight, plain(llm).get_input_embeddings().weight)
    assert fingerprint_file(llm / "model.safetensors") == before


def test_names_are_those_of_the_bases_own_file(rows: Path, llm: Path) -> None:
    """All but the vocabulary's rows, so that a plain model takes them by name; and the folder's format says so."""
    stored = safetensors.torch.load_file(rows / TRUNK)
    base = {name for name, _ in plain(llm).named_parameters()}
    assert stored.keys() == base - {"model.embed_tokens.weight", "lm_head.weight"}
    info = read_rows_info(rows)
    new = sum(tensor.numel() for tensor in trained(llm).row_parameters().values())
    assert info["format"] == 2
    assert info["parameters"] == new + sum(tensor.numel() for tensor in stored.values())
    assert info["files"][TRUNK]["sha256"] == fingerprint_file(rows / TRUNK)


def test_what_was_loaded_is_saved_again(rows: Path, llm: Path, tmp_path: Path) -> None:
    again = save_rows(tmp_path / "again", TokenLM.from_add_on(rows), describe_base(llm), uti=None)
    assert (again / TRUNK).read_bytes() == (rows / TRUNK).read_bytes()


def test_it_is_kept_in_the_bases_dtype_where_that_holds_it(llm: Path, tmp_path: Path) -> None:
    """Masters in fp32 are kept as they are until they are rounded."""
    model = trained(llm, torch.bfloat16)
    parameters = trunk_parameters(model.language_model)
    for parameter in parameters.values():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    rounded = save_rows(tmp_path / "rounded", model, describe_base(llm), uti=None)
    for parameter in parameters.values():
        parameter.data += 1e-6
    exact = save_rows(tmp_path / "exact", model, describe_base(llm), uti=None)
    for folder, dtype in ((rounded, torch.bfloat16), (exact, torch.float32)):
        stored = safetensors.torch.load_file(folder / TRUNK)
        assert {tensor.dtype for tensor in stored.values()} == {dtype}
        loaded = TokenLM.from_add_on(folder)
        assert loaded.dtype == torch.bfloat16
        found = trunk_parameters(loaded.language_model)
        assert all(torch.equal(found[name].float(), stored[f"model.{name}"].to(found[name].dtype)) for name in found)


def test_a_changed_file_is_refused(rows: Path) -> None:
    """By its checksum; verify says it without a base."""
    verify_rows(rows)
    path = rows / TRUNK
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    for read in (TokenLM.from_add_on, verify_rows):
        with pytest.raises(TamperedFileError, match=r"trunk\.safetensors was changed after it was written"):
            read(rows)
    path.unlink()
    with pytest.raises(AddOnError, match=r"trunk\.safetensors can't be read"):
        TokenLM.from_add_on(rows)


def rewrite(rows: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other tensors under a checksum that agrees, as somebody would who knows the format."""
    path = rows / TRUNK
    safetensors.torch.save_file(tensors, path)
    info = json.loads((rows / "trainable_rows.json").read_text())
    info["files"][TRUNK] = {"sha256": fingerprint_file(path), "bytes": path.stat().st_size}
    (rows / "trainable_rows.json").write_text(json.dumps(info))


def test_other_tensors_are_refused(rows: Path) -> None:
    good = safetensors.torch.load_file(rows / TRUNK)
    norm = "model.norm.weight"
    rewrite(rows, {**good, "model.embed_tokens.weight": good[norm], norm: torch.ones(3)})
    with pytest.raises(AddOnError, match="does not fit") as problem:
        TokenLM.from_add_on(rows)
    assert "model.embed_tokens.weight is unexpected" in str(problem.value)
    assert "model.norm.weight has shape (3,); the model has (32,)" in str(problem.value)
    rewrite(rows, {name: tensor for name, tensor in good.items() if name != norm})
    with pytest.raises(AddOnError, match=r"model\.norm\.weight is missing"):
        TokenLM.from_add_on(rows)
    rewrite(rows, {**good, norm: good[norm] * torch.inf})
    for read in (TokenLM.from_add_on, verify_rows):
        with pytest.raises(AddOnError, match=r"model\.norm\.weight holds values that are not finite"):
            read(rows)


def test_folders_of_the_first_format_are_read_and_hold_no_trunk(rows: Path, llm: Path, tmp_path: Path) -> None:
    without = TokenLM.grow(plain(llm), tiny_row_space(llm), seed=3)
    old = save_rows(tmp_path / "old", without, describe_base(llm), uti=None)
    assert read_rows_info(old)["format"] == 1
    assert not TokenLM.from_add_on(old).owns_trunk
    adapter: dict[str, Any] = {"adapter_model.safetensors": {}}
    for number, (format, more) in enumerate([(1, {}), (2, adapter)]):
        folder = Path(shutil.copytree(rows, tmp_path / f"changed {number}"))
        info = json.loads((folder / "trainable_rows.json").read_text())
        info |= {"format": format, "files": {**info["files"], **more}}
        (folder / "trainable_rows.json").write_text(json.dumps(info))
        with pytest.raises(AddOnError, match=r"no usable files\.trunk\.safetensors"):
            read_rows_info(folder)


def test_a_trunk_does_not_go_under_an_adapter(rows: Path, llm: Path) -> None:
    model = TokenLM.grow(plain(llm), tiny_row_space(llm))
    add_lora(model.language_model, rank=2, alpha=4)
    with pytest.raises(AddOnError, match=r"trunk\.safetensors does not fit the model"):
        load_rows(rows, model)


def test_a_connector_does_not_go_over_a_trunk(rows: Path, tmp_path: Path) -> None:
    """It learned over the base's decoder; known before a base is looked for."""
    with pytest.raises(AddOnError, match=r"a decoder of their own \(trunk\.safetensors\).*TokenLM\.from_add_on"):
        load_omni(tmp_path / "connector", rows)


def test_a_frozen_copy_is_the_decoder_as_it_was(llm: Path) -> None:
    model = TokenLM.grow(plain(llm), tiny_row_space(llm)).eval()
    copied = frozen_copy(model.language_model)
    kept = {id(parameter) for parameter in model.parameters()}
    assert not any(id(parameter) in kept for parameter in copied.parameters())
    assert sum(parameter.numel() for parameter in copied.parameters()) == sum(
        parameter.numel() for parameter in trunk_parameters(model.language_model).values()
    )
    embeddings = model.embedding(IDS)
    with torch.no_grad():
        before = model.language_model(inputs_embeds=embeddings).last_hidden_state
        for parameter in trunk_parameters(model.language_model).values():
            parameter.add_(0.1)
        assert torch.equal(copied(inputs_embeds=embeddings).last_hidden_state, before)
        assert not torch.equal(model.language_model(inputs_embeds=embeddings).last_hidden_state, before)
