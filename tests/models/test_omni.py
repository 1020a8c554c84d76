"""One base for both tracks: the base's own bits in text mode, each single model's answers, one copy in memory."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qwen3_vlm.evaluate.captioning import caption_images
from qwen3_vlm.evaluate.text_identity import compare_text, measure_text
from qwen3_vlm.generate.generation import generate
from qwen3_vlm.models.omni import OmniModel
from qwen3_vlm.models.token_lm import TokenLM
from qwen3_vlm.train.add_ons import load_vlm
from qwen3_vlm.train.omni_files import load_omni
from tests.models.tiny_omni import picture, save_connector_of, save_rows_of, sound
from tests.tiny import SENTENCES, save_tiny_llm, save_tiny_tower
from tests.tokenization.plain_codecs import plain_uti

UTI = plain_uti()
PICTURES = [picture(number) for number in range(3)]
BASES = [(tied, dtype) for tied in (True, False) for dtype in (torch.float32, torch.bfloat16)]


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tower: Path) -> dict[str, Path]:
    """A base, and a connector and rows with an adapter each."""
    home = tmp_path_factory.mktemp("omni")
    llm = save_tiny_llm(home / "llm")
    connector = save_connector_of(home / "connector", llm, tower)
    return {"llm": llm, "connector": connector, "rows": save_rows_of(home / "rows", llm, UTI)}


@pytest.fixture(scope="module")
def omni(folders: dict[str, Path]) -> OmniModel:
    return load_omni(folders["connector"], folders["rows"], uti=UTI)


@pytest.mark.parametrize(("tied", "dtype"), BASES)
def test_text_is_the_bases_to_the_bit(tower: Path, tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    llm = save_tiny_llm(tmp_path / "llm", tied=tied)
    connector = save_connector_of(tmp_path / "connector", llm, tower, dtype=dtype)
    rows = save_rows_of(tmp_path / "rows", llm, UTI, dtype=dtype)
    base = load_base(llm, dtype)
    omni = load_omni(connector, rows, uti=UTI)
    assert omni.adapters == ["connector", "rows"]
    tokenizer = omni.processor.tokenizer.from_pretrained(llm)
    before = measure_text(base, tokenizer, SENTENCES)
    assert not compare_text(before, measure_text(omni.vlm, tokenizer, SENTENCES)).passed  # its adapter is on
    assert not compare_text(before, measure_text(omni.token_lm, tokenizer, SENTENCES)).passed
    assert compare_text(before, measure_text(omni.text, tokenizer, SENTENCES)).passed
    assert compare_text(before, measure_text(omni.speaking(None), tokenizer, SENTENCES)).passed
    ids = torch.tensor([tokenizer.encode(SENTENCES[0])])
    answers = [
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, pad_token_id=0)
        for model in (base, omni.text)
    ]
    assert torch.equal(*answers)


def test_captions_are_the_vlms(folders: dict[str, Path], omni: OmniModel) -> None:
    model, processor = load_vlm(folders["connector"])
    assert caption_images(omni.vlm, omni.processor, PICTURES) == caption_images(model, processor, PICTURES)
    ids = torch.tensor([processor.encode_prompt([{"role": "user", "content": "<image_patch>\nwhat"}])])
    pixels = processor.pixel_values(PICTURES[:1])
    assert torch.equal(omni.vlm(ids, **pixels).logits, model(ids, **pixels).logits)


def test_what_is_drawn_and_said_is_the_token_lms(folders: dict[str, Path], omni: OmniModel) -> None:
    from qwen3_vlm.generate.generation import generate_segments
    from qwen3_vlm.generate.grammar import Grammar

    alone = TokenLM.from_add_on(folders["rows"])
    sources = [{"text": "a red heart"}, {"image": PICTURES[0]}, {"audio": sound()}]
    grammar = Grammar(UTI.token_space, max_frames=3, max_text=5)
    for target, given in (("image", sources[::2]), ("audio", sources[:2]), ("text", sources[1:])):
        found = [
            generate_segments(model, UTI, target, given, seed=5, grammar=grammar)  # type: ignore[arg-type]
            for model in (omni.token_lm, alone)
        ]
        assert [[s.ids.tolist() for s in answer] for answer in found[0]] == [
            [s.ids.tolist() for s in answer] for answer in found[1]
        ]
