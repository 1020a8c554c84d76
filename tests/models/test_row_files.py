"""Trainable-rows folders: what is written comes back to the bit; anything else is refused with a reason."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen3_vlm.errors import (
    AddOnError,
    BaseMismatchError,
    ConfigError,
    ModelError,
    Qwen3VLMError,
    StorageError,
    TamperedFileError,
    TokenSpaceError,
)
from qwen3_vlm.fingerprint import fingerprint_file, fingerprint_folder
from qwen3_vlm.models.add_on_files import named_dtype
from qwen3_vlm.models.row_base import base_differences
from qwen3_vlm.models.row_files import (
    check_layout,
    describe_base,
    load_rows,
    load_token_lm,
    read_rows,
    read_rows_info,
    save_rows,
    write_rows,
)
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.tokenization.token_space import ImageIdentity, TokenSpace
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
from qwen3_vlm.tokenization.uti_config import AudioConfig, ImageConfig, TextConfig, UTIConfig
from tests.tiny import save_tiny_llm, save_tiny_rows, tiny_row_space
from tests.tokenization.tiny_models import save_tiny

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llm(tmp_path_factory.mktemp("llm"), tied=request.param)


@pytest.fixture(scope="module")
def template(llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_rows(tmp_path_factory.mktemp("rows") / "rows", llm)


@pytest.fixture
def rows(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "rows"))


@pytest.fixture
def model(llm: Path) -> TokenLM:
    """A base with fresh rows that are not the saved ones."""
    return TokenLM.grow(AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32), tiny_row_space(llm), seed=99)


def edit(folder: Path, change: Change) -> None:
    path = folder / "trainable_rows.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def record(path: Path) -> None:
    """Put the checksum that a changed file now has into trainable_rows.json, as somebody would who knows the format."""
    entry = {path.name: {"sha256": fingerprint_file(path), "bytes": path.stat().st_size}}
    edit(path.parent, lambda info: info["files"].update(entry))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Change the content of trainable_rows.pt and make the checksum agree."""
    path = folder / "trainable_rows.pt"
    content = torch.load(path, weights_only=True)
    torch.save(change(content) or content, path)
    record(path)


def test_round_trip_is_exact(rows: Path, llm: Path, model: TokenLM) -> None:
    saved = torch.load(rows / "trainable_rows.pt", weights_only=True)
    loaded = TokenLM.from_add_on(rows)
    tied = loaded.tied
    assert set(loaded.row_parameters()) == {"embeddings"} | (set() if tied else {"lm_head"})
    for name, parameter in loaded.row_parameters().items():
        assert torch.equal(parameter, saved[name])
        assert not torch.equal(parameter, model.row_parameters()[name])
    assert (saved["lm_head"] is None) == tied
    assert load_rows(rows, model, describe_base(llm))["step"] == 7
    ids = torch.tensor([[1, 2, 390, 460, 478]])
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert all(parameter.requires_grad for parameter in model.row_parameters().values())


def test_what_the_folder_holds(rows: Path, llm: Path) -> None:
    assert sorted(path.name for path in rows.iterdir()) == [
        "evidence.json",
        "token_space.json",
        "token_space.sha256",
        "trainable_rows.json",
        "trainable_rows.pt",
        "uti.yaml",
    ]
    space = tiny_row_space(llm)
    content = torch.load(rows / "trainable_rows.pt", weights_only=True)
    assert set(content) == {"embeddings", "lm_head", "row_start", "row_end", "base_llm", "dtype"}
    assert (content["row_start"], content["row_end"]) == (384, space.vocab_size_total) == (384, 384 + 64 + 16 + 15)
    assert content["embeddings"].shape == (95, 32)
    assert (content["base_llm"], content["dtype"]) == (str(llm), "float32")
    info = read_rows_info(rows)
    assert (info["row_start"], info["row_end"], info["width"]) == (384, 479, 32)
    assert info["has_lm_head"] == (content["lm_head"] is not None)
    assert info["parameters"] == 95 * 32 * (2 if info["has_lm_head"] else 1)
    assert info["token_space_sha256"] == space.sha256
    assert info["base_fingerprint"] == fingerprint_folder(llm, "llm")
    assert (info["stage"], info["step"], info["base_dtype"]) == ("stage3_rows", 7, "float32")
    assert (rows / "uti.yaml").read_text() == "text: {}\n"
    assert TokenSpace.load(rows) == space


def test_the_same_rows_give_the_same_bytes(model: TokenLM, llm: Path, tmp_path: Path) -> None:
    first, second = (save_rows(tmp_path / name, model, describe_base(llm), uti=None) for name in ("a", "longer-name"))
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    assert not (first / "uti.yaml").exists()
    assert not load_token_lm(first).training


def test_given_tensors_stand_for_the_models_own(model: TokenLM, llm: Path, tmp_path: Path) -> None:
    whole = {name: torch.full_like(parameter, 0.5) for name, parameter in model.row_parameters().items()}
    folder = save_rows(tmp_path / "rows", model, describe_base(llm), uti=None, tensors=whole)
    assert all(bool((tensor == 0.5).all()) for tensor in read_rows(folder, read_rows_info(folder)).values())


def test_other_dtypes_of_base_and_rows(rows: Path, llm: Path, tmp_path: Path) -> None:
    loaded = load_token_lm(rows, dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    assert loaded.embedding.rows.dtype == torch.float32
    with pytest.raises(ModelError, match="no dtype"):
        load_token_lm(rows, dtype="int8")
    again = save_rows(tmp_path / "again", loaded, describe_base(llm), uti=rows)
    assert read_rows_info(again)["base_dtype"] == "bfloat16"
    assert load_token_lm(again).dtype == torch.bfloat16
    assert (again / "trainable_rows.pt").read_bytes() == (rows / "trainable_rows.pt").read_bytes()


def test_saving_again_replaces_the_whole_folder(rows: Path, model: TokenLM, llm: Path) -> None:
    (rows / "stray").write_text("x")
    save_rows(rows, model, describe_base(llm), uti=None)
    assert not (rows / "stray").exists()
    assert not (rows / "uti.yaml").exists()


def test_a_failed_write_leaves_what_was_there(
    rows: Path, model: TokenLM, llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in rows.iterdir()}
    base = describe_base(llm)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match="the disk is full"):
        save_rows(rows, model, base, uti=None)
    assert {path.name: path.read_bytes() for path in rows.iterdir()} == before
    assert [path.name for path in rows.parent.iterdir()] == ["rows"]


def test_another_base_is_refused_by_part(rows: Path, llm: Path, model: TokenLM, tmp_path: Path) -> None:
    other = save_tiny_llm(tmp_path / "other", tied=model.tied, seed=9)
    with pytest.raises(BaseMismatchError) as caught:
        load_token_lm(rows, llm=other)
    assert "LLM weights differ in embed_tokens, layers.0, layers.1" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2
    with pytest.raises(BaseMismatchError, match="LLM weights differ"):
        load_rows(rows, model, describe_base(other))


def test_tied_and_untied_are_not_confused(rows: Path, model: TokenLM, tmp_path: Path) -> None:
    other = save_tiny_llm(tmp_path / "other", tied=not model.tied)
    with pytest.raises(BaseMismatchError, match="tie_word_embeddings"):
        load_token_lm(rows, llm=other)
    base = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    with pytest.raises(BaseMismatchError, match="has_lm_head"):
        load_rows(rows, TokenLM.grow(base, model.token_space))


def test_another_tokenizer_is_refused(rows: Path, llm: Path, model: TokenLM, tmp_path: Path) -> None:
    other = Path(shutil.copytree(llm, tmp_path / "other"))
    state = json.loads((other / "tokenizer.json").read_text())
    state["model"]["merges"] = state["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(BaseMismatchError, match="tokenizer merges"):
        load_token_lm(rows, llm=other)
    with pytest.raises(ModelError, match="not the one that the token space was built with"):
        write_rows(tmp_path, model, describe_base(llm, AutoTokenizer.from_pretrained(other)), uti=None)


def test_another_token_space_is_refused_by_field(rows: Path, llm: Path) -> None:
    space = tiny_row_space(llm)
    image = ImageIdentity("tiny-vq", "janus_vqvae", 15, (16, 24), (2, 3), "1" * 64)
    other = TokenSpace.build(space.text, image, space.audio)
    model = TokenLM.grow(AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32), other)
    with pytest.raises(BaseMismatchError) as caught:
        load_rows(rows, model)
    assert "token space" in str(caught.value)
    assert "codebook_size" in str(caught.value)
    other.save(rows)
    with pytest.raises(TamperedFileError, match=r"token_space\.json"):
        load_token_lm(rows)
    for name in ("token_space.json", "token_space.sha256"):
        record(rows / name)
    with pytest.raises(TamperedFileError, match="not the token space that"):
        load_token_lm(rows)
    edit(rows, lambda info: info.update(token_space_sha256=other.sha256))
    with pytest.raises(AddOnError, match="row_end: 479, and 478 is right"):
        load_token_lm(rows)


def test_bases_without_files_are_fingerprinted_in_memory(rows: Path, llm: Path, model: TokenLM, tmp_path: Path) -> None:
    old = Path(shutil.copytree(llm, tmp_path / "old"))
    (old / "model.safetensors").unlink()
    torch.save(AutoModelForCausalLM.from_pretrained(llm).state_dict(), old / "pytorch_model.bin")
    assert describe_base(old, model=model)["base_fingerprint"] == describe_base(llm)["base_fingerprint"]
    with pytest.raises(ModelError, match="no safetensors"):
        describe_base(old)
    assert load_token_lm(rows, llm=old).row_parameters().keys() == model.row_parameters().keys()


@pytest.mark.parametrize("name", ["trainable_rows.pt", "evidence.json", "uti.yaml", "token_space.json"])
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"\x01", lambda data: b""])
def test_changed_bytes_are_refused(rows: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    (rows / name).write_bytes(damage((rows / name).read_bytes()))
    with pytest.raises(TamperedFileError, match="Fetch it again") as caught:
        load_token_lm(rows)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["trainable_rows.pt", "evidence.json", "uti.yaml", "token_space.json"])
def test_missing_files_are_refused(rows: Path, name: str) -> None:
    (rows / name).unlink()
    with pytest.raises(Qwen3VLMError, match=name.replace(".", r"\.")):
        load_token_lm(rows)


def poisoned(content: dict[str, Any]) -> None:
    content["embeddings"][3, 1] = float("nan")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (poisoned, "embeddings holds values that are not finite"),
        (lambda c: c.update(embeddings=None), "embeddings is missing"),
        (lambda c: c.update(embeddings=c["embeddings"][:-1].clone()), r"has shape \(94, 32\); .* describes \(95, 32\)"),
        (lambda c: c.update(embeddings=c["embeddings"].flatten()), r"has shape \(3040,\)"),
        (lambda c: c.update(embeddings=c["embeddings"].T), "a view of other bytes"),
        (lambda c: c.update(embeddings=torch.zeros(1, 32).expand(95, 32)), "a view of other bytes"),
        (lambda c: c.update(embeddings=torch.zeros(1000, 32)[5:100]), "a view of other bytes"),
        (lambda c: c.update(embeddings=c["embeddings"].bfloat16()), r"names torch\.BFloat16Storage"),
        (lambda c: c.update(embeddings=c["embeddings"].double()), r"names torch\.DoubleStorage"),
        (
            lambda c: c.update(embeddings=torch.nn.Parameter(c["embeddings"])),
            r"names torch\._utils\._rebuild_parameter",
        ),
        (lambda c: c.update(embeddings=c["embeddings"].to_sparse()), r"names torch\._utils\._rebuild_sparse_tensor"),
        (lambda c: c.update(embeddings=torch.empty(95, 32, device="meta")), "names torch"),
        (lambda c: c.update(embeddings=[[1.0]]), "uses EMPTY_LIST"),
        (lambda c: c.update(embeddings=(1, 2)), "its embeddings is no tensor"),
        (lambda c: c.update(row_start=383), "row_start: 383 in trainable_rows.pt, 384 in"),
        (lambda c: c.update(row_end=480), "row_end: 480 in"),
        (lambda c: c.update(row_end=True), "uses NEWTRUE"),
        (lambda c: c.update(row_end=None), "its row_end is no int"),
        (lambda c: c.update(base_llm="other/base"), "base_llm: 'other/base' in"),
        (lambda c: c.update(dtype="int4"), "dtype: 'int4' in"),
        (lambda c: c.update(extra=1), "it is no dict of base_llm, dtype"),
        (lambda c: c.pop("dtype") and c, "it is no dict of"),
        (lambda c: (1, 2), "it is no dict of"),
    ],
)
def test_wrong_content_is_refused(rows: Path, change: Any, words: str) -> None:
    rewrite(rows, change)
    with pytest.raises(AddOnError, match=words):
        load_token_lm(rows)


def test_a_head_that_should_not_be_there_or_should(rows: Path) -> None:
    has_head = read_rows_info(rows)["has_lm_head"]

    def other(content: dict[str, Any]) -> None:
        content["lm_head"] = None if has_head else content["embeddings"].clone()

    rewrite(rows, other)
    with pytest.raises(AddOnError, match="lm_head is missing" if has_head else "lm_head is unexpected"):
        load_token_lm(rows)
    edit(rows, lambda info: info.update(has_lm_head=not has_head))
    with pytest.raises(BaseMismatchError, match="has_lm_head"):
        load_token_lm(rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i: i.update(format=3), "this version reads the formats 1 and 2"),
        (lambda i: i.pop("row_start"), "no usable row_start"),
        (lambda i: i.update(row_end=10**12), "no usable row_end"),
        (lambda i: i.update(width=True), "no usable width"),
        (lambda i: i.update(width=10**9), "no usable width"),
        (lambda i: i.update(width=16), r"embeddings has shape \(95, 32\); .* describes \(95, 16\)"),
        (lambda i: i.update(row_start=300), "row_start: 300, and 384 is right"),
        (lambda i: i.update(base_llm=None), "no usable base_llm"),
        (lambda i: i.update(base_llm="\udcff"), "no usable base_llm"),
        (lambda i: i.update(base_dtype=3), "no usable base_dtype"),
        (lambda i: i.update(base_dtype="load"), "no dtype of model weights"),
        (lambda i: i.update(dtype="float64"), "dtype: 'float64', and 'float32' is right"),
        (lambda i: i.update(has_lm_head=1), "no usable has_lm_head"),
        (lambda i: i.update(base_fingerprint=[]), "no usable base_fingerprint"),
        (lambda i: i.update(tokenizer_fingerprint={"sha256": "0"}), "not the tokenizer of the token space"),
        (lambda i: i.update(files=[]), "no usable files"),
        (lambda i: i["files"].pop("trainable_rows.pt"), r"no usable files\.trainable_rows\.pt"),
        (lambda i: i["files"].pop("evidence.json"), r"no usable files\.evidence\.json"),
        (lambda i: i["files"].update({"../../etc/passwd": {}}), r"no usable files\.\.\."),
        (lambda i: i["files"].update({"evidence.json": 3}), r"no usable files\.evidence\.json"),
        (lambda i: i["files"]["evidence.json"].update(bytes="many"), "bytes"),
    ],
)
def test_broken_descriptions_are_refused_before_a_base_is_loaded(
    rows: Path, change: Change, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(rows, change)
    monkeypatch.setattr(
        "qwen3_vlm.models.row_files.load_strictly", lambda *args, **kwargs: pytest.fail("the base was loaded")
    )
    with pytest.raises(Qwen3VLMError, match=words):
        load_token_lm(rows)


def test_other_folders_are_refused(tmp_path: Path, rows: Path) -> None:
    with pytest.raises(AddOnError, match="no trainable-rows folder"):
        read_rows_info(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        load_token_lm(tmp_path / "nothing")
    (rows / "trainable_rows.json").write_text("[]")
    with pytest.raises(AddOnError, match="an object is expected"):
        read_rows_info(rows)
    (rows / "token_space.json").write_text("{}")
    with pytest.raises(AddOnError):
        read_rows_info(rows)


def test_a_token_space_that_is_none(rows: Path) -> None:
    (rows / "token_space.json").write_text("{}")
    record(rows / "token_space.json")
    with pytest.raises(TokenSpaceError, match=r"token_space\.json"):
        read_rows_info(rows)


def test_uti_yaml_is_copied_as_it_is(model: TokenLM, llm: Path, tmp_path: Path) -> None:
    text = "# ours\ntext: {tokenizer: ../relative/place}\n"
    (tmp_path / "uti.yaml").write_text(text)
    for name, source in (("file", tmp_path / "uti.yaml"), ("folder", tmp_path)):
        folder = save_rows(tmp_path / name, model, describe_base(llm), uti=source)
        assert (folder / "uti.yaml").read_text() == text
        read_rows_info(folder)
    with pytest.raises(ConfigError, match="can't be read"):
        save_rows(tmp_path / "none", model, describe_base(llm), uti=tmp_path / "none.yaml")
    assert not (tmp_path / "none").exists()


def test_missing_bases_say_how_to_name_them(rows: Path) -> None:
    content: dict[str, Tensor] = {}
    rewrite(rows, lambda c: content.update(c) or c.update(base_llm="no-such-owner/no-such-model"))
    edit(rows, lambda info: info.update(base_llm="no-such-owner/no-such-model"))
    with pytest.raises(ModelError, match="--llm"):
        load_token_lm(rows)


def test_a_hub_id_is_downloaded_by_its_files(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        assert name == "owner/rows"
        asked.append(allow_patterns)
        return str(rows)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert TokenLM.from_add_on("owner/rows").token_space.sha256 == read_rows_info(rows)["token_space_sha256"]
    files = ["trainable_rows.*", "token_space.*", "adapter_*", "trunk.safetensors", "uti.yaml", "evidence.json"]
    assert asked == [files]


def paths_of(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield from paths_of(child, (*path, key))


@pytest.mark.parametrize("value", [None, [], {}, "x", "\udcff", -1, 10**30, 1e308, True, [{}], {"sha256": {}}])
def test_any_field_may_hold_anything(rows: Path, llm: Path, value: Any) -> None:
    """Each field of trainable_rows.json in turn: it is refused in a sentence, or changes nothing that matters."""
    base = describe_base(llm)
    good = (rows / "trainable_rows.json").read_text()
    for path in list(paths_of(json.loads(good)))[1:]:
        tree = json.loads(good)
        place = tree
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (rows / "trainable_rows.json").write_text(json.dumps(tree))
        try:
            info = read_rows_info(rows)
            check_layout(rows, info)
            base_differences(info, base)
            named_dtype(info["base_dtype"])
        except Qwen3VLMError as error:
            str(error).encode("utf-8", "backslashreplace")


def test_the_folder_opens_its_tokenizers(llm: Path, tmp_path: Path) -> None:
    image, audio = save_tiny(tmp_path / "image", "janus_vqvae"), save_tiny(tmp_path / "audio", "dac")
    config = UTIConfig(
        text=TextConfig(tokenizer=str(llm)),
        image=ImageConfig(source=str(image)),
        audio=AudioConfig(type="dac", source=str(audio), clip_seconds=1.0),
    )
    uti = UnifiedTokenizer.open(config)
    uti.save(tmp_path / "space")
    model = TokenLM.grow(AutoModelForCausalLM.from_pretrained(llm), uti.token_space)
    folder = save_rows(tmp_path / "rows", model, describe_base(llm), uti=tmp_path / "space")
    opened = UnifiedTokenizer.open(folder)
    assert opened.token_space == TokenLM.from_add_on(folder).token_space == uti.token_space
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert opened.encode_image(pixels).ids.tolist() == uti.encode_image(pixels).ids.tolist()
