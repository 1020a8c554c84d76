"""One base for both tracks: the base's own bits in text mode, each single model's answers, one copy in memory."""

import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from qwen3_vlm.errors import (
    AddOnError,
    BaseMismatchError,
    ConfigError,
    ModelError,
    Qwen3VLMError,
    TamperedFileError,
    TokenSpaceError,
)
from qwen3_vlm.evaluate.captioning import caption_images
from qwen3_vlm.evaluate.text_identity import compare_text, measure_text
from qwen3_vlm.generate.generation import generate_segments
from qwen3_vlm.generate.grammar import Grammar
from qwen3_vlm.generate.streaming import stream_ids
from qwen3_vlm.models.bases import load_tower
from qwen3_vlm.models.lora import write_adapter
from qwen3_vlm.models.omni import OmniModel
from qwen3_vlm.models.precision import compute_in_fp32, must_widen
from qwen3_vlm.models.row_files import read_rows, read_rows_info
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.tokenization.sequences import prompt_ids
from qwen3_vlm.tokenization.text import LosslessText
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
from qwen3_vlm.train.add_ons import load_vlm
from qwen3_vlm.train.omni_files import load_omni
from tests.models.grown import SIZES
from tests.models.tiny_omni import give_adapter, picture, save_connector_of, save_rows_of, sound
from tests.tiny import SENTENCES, save_tiny_llm, tiny_tokenizer
from tests.tokenization.plain_codecs import BlockColours, plain_uti

UTI = plain_uti()
PICTURES = [picture(number) for number in range(3)]
BASES = [(tied, dtype) for tied in (True, False) for dtype in (torch.float32, torch.bfloat16)]


class Coarse(BlockColours):
    """Another image tokenizer."""

    weights_sha256 = "c0a7" * 16


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def drawn(model: Any, target: Any, sources: Any, seed: int = 5) -> list[list[int]]:
    grammar = Grammar(UTI.token_space, max_frames=3, max_text=5)
    answers = generate_segments(model, UTI, target, sources, seed=seed, grammar=grammar)
    return [[int(value) for value in segments[0].ids] for segments in answers]


@dataclass
class Made:
    """A base, two add-ons of it, and the model of all three."""

    dtype: torch.dtype
    llm: Path
    connector: Path
    rows: Path
    omni: OmniModel


@pytest.fixture(scope="module", params=BASES, ids=str)
def made(request: pytest.FixtureRequest, tiny_tower_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    tied, dtype = request.param
    home = tmp_path_factory.mktemp("made")
    llm = save_tiny_llm(home / "llm", tied=tied)
    connector = save_connector_of(home / "connector", llm, tiny_tower_dir, dtype=dtype)
    rows = save_rows_of(home / "rows", llm, UTI, dtype=dtype)
    return Made(dtype, llm, connector, rows, load_omni(connector, rows, uti=UTI))


def test_text_is_the_bases_to_the_bit(made: Made) -> None:
    base, omni = load_base(made.llm, made.dtype), made.omni
    tokenizer = AutoTokenizer.from_pretrained(made.llm)

    def read(model: Any) -> Any:
        return measure_text(model, tokenizer, SENTENCES[:2], new_tokens=3)

    before = read(base)
    assert omni.adapters == ["connector", "rows"]
    assert [compare_text(before, read(model)).logits for model in (omni.vlm, omni.token_lm)] == [(0, 1), (0, 1)]
    assert compare_text(before, read(omni.text)).passed
    assert compare_text(before, read(omni.speaking(None))).passed
    ids = torch.tensor([tokenizer.encode(SENTENCES[0])])
    settings: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    answers = [model.generate(ids, attention_mask=torch.ones_like(ids), **settings) for model in (base, omni.text)]
    assert torch.equal(*answers)


def test_one_base_in_memory(made: Made, tiny_tower_dir: Path) -> None:
    """All tensors together are as large as the base, the tower and the add-ons' files; views add nothing."""
    omni, base, tower = made.omni, load_base(made.llm, made.dtype), load_tower(tiny_tower_dir, dtype=made.dtype)
    if must_widen(base.lm_head.weight):
        compute_in_fp32(base)
        compute_in_fp32(tower)
    views = [omni.vlm, omni.token_lm, omni.text, omni.speaking(None)]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for v in views for p in v.parameters()}
    tensors: dict[str, Iterable[torch.Tensor]] = {
        "connector": load_file(made.connector / "connector.safetensors").values(),
        "adapter connector": load_file(made.connector / "adapter_model.safetensors").values(),
        "adapter rows": load_file(made.rows / "adapter_model.safetensors").values(),
        "rows": read_rows(made.rows, read_rows_info(made.rows)).values(),
        "llm": base.parameters(),
        "vision_tower": tower.parameters(),
    }
    expected = {name: sum(tensor.nbytes for tensor in found) for name, found in tensors.items()}
    assert omni.sizes() == expected
    assert sum(storages.values()) == sum(expected.values())
    assert not any(parameter.requires_grad for view in views for parameter in view.parameters())
    table: Any = omni.token_lm.language_model.get_input_embeddings()
    tied = base.lm_head.weight is base.get_input_embeddings().weight
    assert (table.base.weight.data_ptr() == omni.vlm.lm_head.weight.data_ptr()) is tied


def test_each_track_has_the_scores_of_its_single_model(made: Made) -> None:
    vlm, processor = load_vlm(made.connector)
    ids = torch.tensor([processor.encode_prompt([{"role": "user", "content": "<image_patch>\nwhat"}])])
    pixels = processor.pixel_values(PICTURES[:1])
    prompt = torch.from_numpy(prompt_ids(UTI.token_space, "t2i", {"text": np.arange(5)})).long()[None]
    rows = TokenLM.from_add_on(made.rows)
    for _ in range(2):
        assert torch.equal(made.omni.vlm(ids, **pixels).logits, vlm(ids, **pixels).logits)
        assert torch.equal(made.omni.token_lm(prompt).logits, rows(prompt).logits)


def test_captions_are_the_vlms(seer: tuple[Any, Any], omni: OmniModel) -> None:
    model, processor = seer
    assert caption_images(omni.vlm, omni.processor, PICTURES, max_new_tokens=8) == caption_images(
        model, processor, PICTURES, max_new_tokens=8
    )
    ids = torch.tensor([processor.encode_prompt([{"role": "user", "content": "<image_patch>\nwhat"}])])
    pixels = processor.pixel_values(PICTURES[:1])
    assert torch.equal(omni.vlm(ids, **pixels).logits, model(ids, **pixels).logits)
    assert not torch.equal(omni.text(ids, **pixels).logits, model(ids, **pixels).logits)


def test_what_is_drawn_and_said_is_the_token_lms(speaker: TokenLM, omni: OmniModel) -> None:
    text, image, audio = {"text": "a red heart"}, {"image": PICTURES[0]}, {"audio": sound()}
    for target, sources in (("image", [text, audio]), ("audio", [text, image]), ("text", [image, audio])):
        assert drawn(omni.token_lm, target, sources) == drawn(speaker, target, sources)
    assert drawn(omni.speaking(None), "image", [text]) != drawn(speaker, "image", [text])


def test_pictures_reach_the_rows_through_the_connector(omni: OmniModel) -> None:
    """In text mode the speaking view, given a picture, has the scores of the seeing one; greedy ids follow."""
    ids = torch.tensor([omni.processor.encode_prompt([{"role": "user", "content": "<image_patch>\nwhat"}])])
    pixels = omni.processor.pixel_values(PICTURES[:1])
    used = omni.token_space.text.tokenizer_size
    seen = omni.seeing("rows")(ids, **pixels).logits[..., :used]
    view = omni.speaking("rows")
    assert torch.equal(view(ids, **pixels, score_range=(0, used)).logits[..., :used], seen)
    blind = view(ids, score_range=(0, used)).logits[..., :used]  # without pictures an id is an id
    assert not torch.equal(blind, seen)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"attention_mask": torch.ones_like(ids), "suppress_tokens": list(range(used, view.config.vocab_size))}
    steps = [view.generate(ids, use_cache=cached, **pixels, **settings) for cached in (True, False)]
    assert torch.equal(*steps)


def test_requests_take_turns_in_threads(seer: tuple[Any, Any], speaker: TokenLM, omni: OmniModel) -> None:
    """Every pass has its own adapter, whoever else is in the middle of an answer."""
    plain = load_base(Path(seer[0].config.text_config._name_or_path))
    ids = torch.arange(12)[None]
    expected = {
        "caption": caption_images(*seer, PICTURES, max_new_tokens=6),
        "draw": drawn(speaker, "image", [{"text": "a"}] * 2),
        "text": plain(ids).logits.tolist(),
    }
    found: dict[str, list[Any]] = {name: [] for name in expected}
    work = {
        "caption": lambda: caption_images(omni.vlm, omni.processor, PICTURES, max_new_tokens=6),
        "draw": lambda: drawn(omni.token_lm, "image", [{"text": "a"}] * 2),
        "text": lambda: omni.text(ids).logits.tolist(),
    }
    threads = [
        threading.Thread(target=lambda name=name: found[name].extend(work[name]() for _ in range(3))) for name in work
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: [value] * 3 for name, value in expected.items()}


def test_streams_have_their_adapter_too(speaker: TokenLM, omni: OmniModel) -> None:
    prompt = ("t2a", {"text": np.arange(4)})
    grammar = Grammar(UTI.token_space, max_frames=3)
    streams = [stream_ids(model, prompt, grammar=grammar) for model in (omni.token_lm, speaker)]
    caption_images(omni.vlm, omni.processor, PICTURES[:1], max_new_tokens=2)
    assert list(streams[0]) == list(streams[1])


def test_further_adapters(add_ons: dict[str, Path], tiny_llm_dir: Path, tiny_tower_dir: Path, tmp_path: Path) -> None:
    """One beside another add-on, and one in PEFT's own format: each gives what it gives alone."""
    other = load_base(tiny_llm_dir)
    give_adapter(other.base_model, rank=1, seed=21)
    write_adapter(tmp_path, other.base_model, "model", str(tiny_llm_dir))
    adapters = {"peft": tmp_path, "again": add_ons["rows"]}
    omni = load_omni(add_ons["connector"], add_ons["rows"], adapters=adapters, uti=UTI)
    assert omni.adapters == ["connector", "rows", "peft", "again"]
    ids = torch.arange(12)[None]
    for _ in range(2):
        assert torch.equal(omni.seeing("peft")(ids).logits, other(ids).logits)
        assert torch.equal(omni.seeing("again")(ids).logits, omni.seeing("rows")(ids).logits)
        assert not torch.equal(omni.vlm(ids).logits, other(ids).logits)
    with pytest.raises(ModelError, match=r"no adapter 'nothing'; there are connector, rows, peft, again\."):
        omni.speaking("nothing")


def test_add_ons_without_adapters(add_ons: dict[str, Path], tiny_llm_dir: Path, tmp_path: Path) -> None:
    rows = save_rows_of(tmp_path / "rows", tiny_llm_dir, UTI, adapter=False)
    omni = load_omni(add_ons["connector"], rows, uti=UTI)
    assert (omni.adapters, omni.sees_with, omni.speaks_with) == (["connector"], "connector", None)
    assert drawn(omni.token_lm, "image", [{"text": "a"}]) == drawn(TokenLM.from_add_on(rows), "image", [{"text": "a"}])


def test_a_base_without_a_spare_row(tiny_tower_dir: Path, tmp_path: Path) -> None:
    """`<image_patch>` then has the number of the first new row; pictures and ids are told apart all the same."""
    llm = tmp_path / "llm"
    size = len(tiny_tokenizer())
    Qwen3ForCausalLM(Qwen3Config(**SIZES | {"vocab_size": size}, head_dim=8)).save_pretrained(llm)
    tiny_tokenizer().save_pretrained(llm)
    uti = plain_uti()
    uti = UnifiedTokenizer(
        uti.config, LosslessText(tiny_tokenizer(), size, "tiny"), uti.image_tokenizer, uti.audio_codec
    )
    connector = save_connector_of(tmp_path / "connector", llm, tiny_tower_dir, adapter=False)
    rows = save_rows_of(tmp_path / "rows", llm, uti, adapter=False)
    omni = load_omni(connector, rows, uti=uti)
    assert omni.processor.image_token_id == uti.token_space.special("<|text_start|>") == size
    captions = caption_images(omni.vlm, omni.processor, PICTURES[:1], max_new_tokens=8)
    assert captions == caption_images(*load_vlm(connector), PICTURES[:1], max_new_tokens=8)
    given = {"sources": [{"text": "a"}], "target": "image"}
    answers = [generate_segments(m, uti, **given)[0][0] for m in (omni.token_lm, TokenLM.from_add_on(rows))]
    assert answers[0].ids.tolist() == answers[1].ids.tolist()


class TestRefused:
    """Each with a sentence that says what does not belong together."""

    def test_another_base(self, add_ons: dict[str, Path], tmp_path: Path) -> None:
        other = save_tiny_llm(tmp_path / "other", seed=4)
        rows = save_rows_of(tmp_path / "rows", other, UTI)
        with pytest.raises(BaseMismatchError, match=r"rows were made for another base than the connector .*:\n  LLM"):
            load_omni(add_ons["connector"], rows, uti=UTI)
        with pytest.raises(BaseMismatchError, match="made for another base"):
            load_omni(add_ons["connector"], add_ons["rows"], llm=other, uti=UTI)
        with pytest.raises(BaseMismatchError, match="made for another base"):
            load_omni(add_ons["connector"], add_ons["rows"], adapters={"other": rows}, uti=UTI)

    def test_another_token_space(self, add_ons: dict[str, Path]) -> None:
        with pytest.raises(TokenSpaceError, match="another token space"):
            load_omni(add_ons["connector"], add_ons["rows"], uti=plain_uti(clipping="refuse", image=Coarse()))

    def test_other_dtypes(self, add_ons: dict[str, Path], tiny_llm_dir: Path, tmp_path: Path) -> None:
        rows = save_rows_of(tmp_path / "rows", tiny_llm_dir, UTI, dtype=torch.bfloat16)
        with pytest.raises(ConfigError, match="a base in float32, the rows on one in bfloat16"):
            load_omni(add_ons["connector"], rows, uti=UTI)
        assert load_omni(add_ons["connector"], rows, uti=UTI, dtype="float32").text.dtype == torch.float32

    def test_adapters(self, add_ons: dict[str, Path], tmp_path: Path) -> None:
        for name, message in (("rows", "can't be called 'rows'"), ("a.b", "'a.b' is no name of an adapter")):
            with pytest.raises(Qwen3VLMError, match=message):
                load_omni(add_ons["connector"], add_ons["rows"], adapters={name: add_ons["rows"]}, uti=UTI)
        with pytest.raises(AddOnError, match="has no adapter"):
            load_omni(add_ons["connector"], add_ons["rows"], adapters={"x": tmp_path}, uti=UTI)
        changed = Path(shutil.copytree(add_ons["connector"], tmp_path / "changed"))
        data = bytearray((changed / "adapter_model.safetensors").read_bytes())
        data[-1] ^= 1
        (changed / "adapter_model.safetensors").write_bytes(data)
        with pytest.raises(TamperedFileError, match="adapter_model"):
            load_omni(changed, add_ons["rows"], uti=UTI)

    def test_two_bases_in_memory(self, seer: tuple[Any, Any], speaker: TokenLM) -> None:
        with pytest.raises(ModelError, match="two bases in memory"):
            OmniModel(*seer[:1], speaker, seer[1], UTI)
