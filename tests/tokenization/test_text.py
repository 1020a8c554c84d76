"""Text: what a normalizing tokenizer changes, what looks like markup, and what can't be kept."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qwen3_vlm.demo.run import BASES
from qwen3_vlm.errors import ModelError, TokenError, TokenSpaceError
from qwen3_vlm.tokenization.text import LosslessText, open_text, public_name
from qwen3_vlm.tokenization.uti_config import TextConfig

TEXT = BASES / "text"


def byte_level(normalizer: normalizers.Normalizer | None = None) -> PreTrainedTokenizerFast:
    """All 256 bytes and one special token."""
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize(
    "text", ["e\u0301 \u212b", "<|im_end|>", "", " \t\r\n\x00\x7f", "👩\u200d👩\u200d👧 \U0010ffff"]
)
def test_a_normalizing_tokenizer_loses_nothing(text: str) -> None:
    tokenizer = LosslessText(byte_level(normalizers.NFC()), 300, "bytes")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode()), "one id a byte: nothing was taken for markup"


def test_composed_text_gets_the_tokenizers_own_ids() -> None:
    backend = byte_level(normalizers.NFC())
    assert LosslessText(backend, 300, "bytes").encode("é") == backend.encode("é", add_special_tokens=False)


def test_a_tokenizer_that_forgets_spaces_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = LosslessText(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?"), 3, "words")
    with pytest.raises(TokenError, match="can't keep this text: at character 2 ") as caught:
        tokenizer.encode("a  b")
    assert caught.value.reason == "text_not_lossless"


@pytest.mark.parametrize(("text", "reason"), [("a\ud800b", "lone_surrogate"), (b"a", "not_text"), (None, "not_text")])
def test_what_is_no_text_is_refused(text: object, reason: str) -> None:
    with pytest.raises(TokenError) as caught:
        LosslessText(byte_level(), 300, "bytes").encode(text)  # type: ignore[arg-type]
    assert caught.value.reason == reason


def test_more_ids_than_rows_is_another_base() -> None:
    with pytest.raises(TokenSpaceError, match="text_tokenizer_size is 257"):
        LosslessText(byte_level(), 256, "bytes")


def test_ids_beyond_the_tokenizer_are_refused() -> None:
    tokenizer = LosslessText(byte_level(), 300, "bytes")
    with pytest.raises(TokenError, match="257 was given at position 1"):
        tokenizer.decode([0, 257])


def test_rows_come_from_the_base() -> None:
    text = open_text(TextConfig(tokenizer=str(TEXT)), download=False)
    assert text.identity.vocab_size == 1536
    assert text.identity.tokenizer_size == len(AutoTokenizer.from_pretrained(TEXT))
    with pytest.raises(ModelError, match=r"text.vocab_size is 7, .* has 1,536 rows"):
        open_text(TextConfig(tokenizer=str(TEXT), vocab_size=7), download=False)
    with pytest.raises(ModelError, match="can't be loaded"):
        open_text(TextConfig(tokenizer="nobody/nothing"), download=False)


def test_a_public_name_is_no_path() -> None:
    assert public_name(str(TEXT)) == "text"
    assert public_name("/no/such/folder") == "folder"
    assert public_name("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
