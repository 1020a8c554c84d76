"""Text to ids and back, with the real Qwen vocabulary: any Unicode comes back as it was, or is refused by name."""

import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen3_vlm.errors import TokenError
from qwen3_vlm.tokenization.text import LosslessText
from qwen3_vlm.tokenization.token_space import TokenSpace
from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
from qwen3_vlm.tokenization.uti_config import UTIConfig
from tests.models.test_families import real_qwen_tokenizer
from tests.tiny import tiny_tokenizer

QWEN_ROWS, QWEN_IDS = 151_936, 151_669
PIECES = [
    *("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|img_start|>", "<|gen_aud|>", "<|vision_pad|>", "<think>"),
    *("</think>", "<tool_call>", "<|im_", "end|>", "<image_patch>", "<|fim_prefix|>"),
    *(
        "👩🏽‍🚀",
        "🏳️‍🌈",
        "🇩🇪",
        "1️⃣",
        "🫠",
        "👨‍👩‍👧‍👦",
        "e\u0301",
        "é",
        "Å",
        "A\u030a",
        "ﬁ",
        "ǆ",
        "각",
        "\u1100\u1161\u11a8",
    ),
    *("\u0000", "\u0001", "\u0007", "\u001b[31m", "\u007f", "\u0085", "\u00ad", "\u200b", "\u200d", "\u2028", "\ufeff"),
    *(
        "\u202eabc\u202c",
        "\u2066x\u2069",
        "שלום",
        "مرحبا",
        "नमस्ते",
        "ไทย",
        "日本語",
        "𠜎",
        "𝔘𝔫𝔦",
        "\U0010ffff",
        "\ue000",
        "\ufffd",
    ),
    *(
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\r",
        "\n\n\n",
        "   \n ",
        "\u00a0",
        "\u3000",
        "don't",
        "I'LL",
        "1234567",
        "x" * 300,
    ),
    *("a\u0315\u0300\u05ae\u0062", "\u0344", "\u212b", "\u0958", "\u2126", "\u1e9b\u0323", "�", "Ġ", "Ċ", "▁", "##ing"),
]
ANY_TEXT = st.text(max_size=60) | st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=12).map("".join)
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return real_qwen_tokenizer()


@pytest.fixture(scope="module")
def qwen(tokenizer: Any) -> UnifiedTokenizer:
    return UnifiedTokenizer(UTIConfig(), LosslessText(tokenizer, QWEN_ROWS, "Qwen/Qwen3-8B-Base"))


def comes_back(uti: UnifiedTokenizer, text: str) -> list[int]:
    ids = uti.encode_text(text)
    assert uti.decode_text(ids) == text
    span = uti.token_space.range_of("text")
    assert all(type(value) is int and value in span for value in ids)
    assert all(value < uti.token_space.text.tokenizer_size for value in ids)
    return ids


@settings(max_examples=300, **QUIET)
@given(text=ANY_TEXT)
def test_any_text_comes_back(qwen: UnifiedTokenizer, text: str) -> None:
    comes_back(qwen, text)


@pytest.mark.parametrize("piece", PIECES, ids=ascii)
def test_every_awkward_piece_comes_back(qwen: UnifiedTokenizer, piece: str) -> None:
    for text in (piece, f"a{piece}b", f" {piece} ", piece * 3):
        comes_back(qwen, text)


def test_every_character_comes_back(qwen: UnifiedTokenizer) -> None:
    """All of the basic plane, and every 37th of the others; neighbours that combine stand together."""
    codes = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 37)]
    lines = ["".join(map(chr, codes[start : start + 64])) for start in range(0, len(codes), 64)]
    for start in range(0, len(lines), 100):
        comes_back(qwen, "\n".join(lines[start : start + 100]))


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_normal_forms_are_kept_apart(qwen: UnifiedTokenizer, form: Any) -> None:
    """Qwen's own tokenizer composes: "e" and an accent would come back as one character."""
    text = unicodedata.normalize(form, "Ångström café naïve ﬁancé 각각 Việt Nam क़ Ω")
    comes_back(qwen, text)


def test_plain_text_has_the_ids_that_the_base_was_trained_on(qwen: UnifiedTokenizer, tokenizer: Any) -> None:
    """Only text that would be changed, or could be taken for control, is encoded in another way."""
    for text in ("A red heart left of a small dog.", "Größe: 12,5 µm — 图片", "def f(x):\n    return x**2\n", "", "🙂"):
        assert qwen.encode_text(text) == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>", "<|vision_start|>"])
def test_text_can_not_become_a_control_token(qwen: UnifiedTokenizer, tokenizer: Any, token: str) -> None:
    """Added tokens start at 151,643; a caption that spells one must not end the turn."""
    ids = comes_back(qwen, f"before {token} after")
    if token.startswith("<|"):
        assert max(ids) < 151_643
        assert tokenizer.convert_tokens_to_ids(token) not in ids


@pytest.mark.parametrize("name", ["<|img_start|>", "<|gen_aud|>", "<|pad_mm|>"])
def test_text_can_not_become_a_boundary_of_the_token_space(qwen: UnifiedTokenizer, name: str) -> None:
    assert qwen.token_space.special(name) not in comes_back(qwen, f"{name} x {name}")


@pytest.mark.parametrize(
    ("text", "place"), [("\ud83d", 0), ("ab\udc00c", 2), ("\ude00\ud83d", 0), ("x" * 50 + "\ud800", 50)]
)
def test_lone_surrogates_are_refused_by_place(qwen: UnifiedTokenizer, text: str, place: int) -> None:
    with pytest.raises(TokenError, match=f"lone surrogate .*character {place};") as caught:
        qwen.encode_text(text)
    assert caught.value.reason == "lone_surrogate"
    assert str(caught.value).encode("utf-8")  # can be printed
    with pytest.raises(TokenError):
        qwen.encode_texts(["fine", text])


@settings(max_examples=60, **QUIET)
@given(texts=st.lists(ANY_TEXT, max_size=6))
def test_a_batch_is_its_texts_one_by_one(qwen: UnifiedTokenizer, texts: list[str]) -> None:
    alone = [qwen.encode_text(text) for text in texts]
    assert qwen.encode_texts(texts) == alone
    assert qwen.encode_texts(texts[::-1]) == alone[::-1]
    assert [qwen.decode_text(np.array(ids, dtype=np.int64)) for ids in alone] == texts


@pytest.mark.parametrize("value", [None, 3, b"bytes", ["list"]])
def test_what_is_no_text_is_refused(qwen: UnifiedTokenizer, value: Any) -> None:
    with pytest.raises(TokenError) as caught:
        qwen.encode_text(value)
    assert caught.value.reason == "not_text"


@pytest.mark.parametrize("value", [-1, QWEN_IDS, QWEN_ROWS - 1, QWEN_ROWS, 2**40])
def test_ids_that_are_no_text_are_refused(qwen: UnifiedTokenizer, value: int) -> None:
    """The padding rows of the base's embedding are text ids that no text has."""
    with pytest.raises(TokenError) as caught:
        qwen.decode_text([1, 2, value])
    assert caught.value.reason == "out_of_range"


def test_the_token_space_has_the_real_sizes(qwen: UnifiedTokenizer) -> None:
    text = qwen.token_space.text
    assert (text.vocab_size, text.tokenizer_size) == (QWEN_ROWS, QWEN_IDS)
    assert TokenSpace.from_dict(qwen.token_space.to_dict()).sha256 == qwen.sha256


@settings(max_examples=100, **QUIET)
@given(text=ANY_TEXT)
def test_another_byte_level_tokenizer_is_lossless_too(text: str) -> None:
    comes_back(TINY, text)


TINY = UnifiedTokenizer(UTIConfig(), LosslessText(tiny_tokenizer(), 384, "tiny"))
