"""What counts as a word, in any language: the units that caption scores compare.

English goes through the tokenizer of the published caption tool (`ptb_words`), so that its figures stay comparable.
Elsewhere a word is a run of letters, marks and digits (Unicode's categories), and each character of a script
that is written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) is one of its own, with the marks that
stand on it: that is how Chinese captions are scored where no segmenter is agreed on. Punctuation is no word.
"""

import unicodedata
from collections.abc import Callable, Iterator

from qwen3_vlm.evaluate.caption_scores import ptb_words

Words = Callable[[str], list[str]]

# Blocks of the scripts that put no spaces between words.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # 々〆〇
    (0x3040, 0x30FF),  # kana
    (0x31F0, 0x31FF),  # more katakana
    (0x3400, 0x4DBF),  # Chinese characters …
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
_INNER = frozenset("'’-‑·")  # between two letters they are part of the word: l'arbre, bleu-vert, col·lecció


def words_for(language: str) -> Words:
    """The function that cuts texts of a language ("de", "zh-Hant", "en_GB") into words; "" counts as English."""
    return ptb_words if language.lower().replace("_", "-").split("-")[0] in ("", "en", "eng") else unicode_words


def unicode_words(text: str) -> list[str]:
    """Case-folded words of a text in whatever scripts: "Ein Bär, 小狗!" → ["ein", "bär", "小", "狗"]."""
    return list(_runs(unicodedata.normalize("NFKC", text).casefold()))


def _runs(text: str) -> Iterator[str]:
    word, alone = "", False  # alone: the word is one character of a script without spaces
    for position, char in enumerate(text):
        kind = unicodedata.category(char)[0]
        if word and kind == "M":
            word += char
            continue
        unspaced = kind in "LN" and _is_unspaced(char)
        inner = char in _INNER and not alone and _is_letter(text, position - 1) and _is_letter(text, position + 1)
        if word and (alone or unspaced or not (kind in "LNM" or inner)):
            yield word
            word = ""
        if kind in "LNM" or inner:
            word, alone = word + char, unspaced
    if word:
        yield word


def _is_unspaced(char: str) -> bool:
    code = ord(char)
    return any(first <= code <= last for first, last in _UNSPACED)


def _is_letter(text: str, position: int) -> bool:
    return (
        0 <= position < len(text)
        and unicodedata.category(text[position])[0] in "LM"
        and not _is_unspaced(text[position])
    )
