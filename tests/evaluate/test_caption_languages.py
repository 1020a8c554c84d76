"""Words of many scripts, cut by hand; scores by language against those of each language alone."""

import pytest

from qwen3_vlm.evaluate.caption_languages import over_languages, score_languages
from qwen3_vlm.evaluate.caption_scores import cider_d, ptb_words
from qwen3_vlm.evaluate.caption_words import unicode_words, words_for

CUT = [
    ("Ein Bär, zwei Äpfel!", ["ein", "bär", "zwei", "äpfel"]),
    ("两只小狗在草地上。", list("两只小狗在草地上")),
    ("赤いハートが3つ、猫と犬", ["赤", "い", "ハ", "ー", "ト", "が", "3", "つ", "猫", "と", "犬"]),
    ("빨간 하트 두 개.", ["빨간", "하트", "두", "개"]),
    ("एक लाल दिल और दो कुत्ते।", ["एक", "लाल", "दिल", "और", "दो", "कुत्ते"]),
    ("قلبٌ أحمرُ، وكلبان", ["قلبٌ", "أحمرُ", "وكلبان"]),
    ("לב אדום וכלב", ["לב", "אדום", "וכלב"]),
    ("หมาตัวที่", ["ห", "ม", "า", "ตั", "ว", "ที่"]),
    ("l'arbre bleu-vert « ici »", ["l'arbre", "bleu-vert", "ici"]),
    ("красное сердце — слева", ["красное", "сердце", "слева"]),
    ("iPhone手机 2台", ["iphone", "手", "机", "2", "台"]),
    ("２０２４年 ＡＢ", ["2024", "年", "ab"]),
    ("'quoted' -dash-", ["quoted", "dash"]),
    ("…!? ", []),
]


@pytest.mark.parametrize(("text", "expected"), CUT)
def test_words_of_many_scripts(text: str, expected: list[str]) -> None:
    assert unicode_words(text) == expected


def test_composed_or_not_is_one_word() -> None:
    assert unicode_words("a\u0308pfel") == unicode_words("\u00e4pfel") == ["äpfel"]


@pytest.mark.parametrize("language", ["en", "EN", "en-GB", "en_US", "eng", ""])
def test_english_is_cut_as_the_published_tool_does(language: str) -> None:
    assert words_for(language) is ptb_words


@pytest.mark.parametrize("language", ["de", "zh-Hant", "enm", "ja"])
def test_others_are_not(language: str) -> None:
    assert words_for(language) is unicode_words


def test_chinese_captions_get_partial_credit() -> None:
    """As one English "word" a whole caption would be right or wrong; in characters it can be nearly right."""
    references = ["两只小狗在草地上", "一颗红色的心", "绿色的树下有一只猫"]
    said = ["两只小猫在草地上", "一颗红色的心", "房子"]
    assert cider_d(said, references).per_caption[0] == 0
    score = cider_d(said, references, unicode_words)
    assert 1 < score.per_caption[0] < score.per_caption[1]
    assert score.per_caption[2] == 0


def test_each_language_is_scored_by_itself() -> None:
    said = ["a red heart", "ein rotes Herz", "a dog", "zwei Hunde", "two cats"]
    wanted = ["a red heart", "ein rotes Herz", "a cat", "zwei Katzen", "two cats"]
    languages = ["en", "de", "en", "de", "en"]
    scores = score_languages(said, wanted, languages)
    assert list(scores) == ["en", "de"]
    assert scores["en"]["n"] == 3
    assert scores["en"]["exact_match"] == pytest.approx(2 / 3)
    english, german = [0, 2, 4], [1, 3]
    alone = cider_d([said[i] for i in english], [wanted[i] for i in english])
    assert scores["en"]["cider_d"] == pytest.approx(alone.score)
    assert scores["en"]["cider_d_low"] <= alone.score <= scores["en"]["cider_d_high"]
    other = cider_d([said[i] for i in german], [wanted[i] for i in german], unicode_words)
    assert scores["de"]["cider_d"] == pytest.approx(other.score)
    total = over_languages(scores)
    assert (total["n"], total["exact_match"]) == (5, pytest.approx(3 / 5))
    assert total["cider_d"] == pytest.approx((alone.score + other.score) / 2)


def test_letters_are_the_same_however_typed() -> None:
    assert score_languages(["a\u0308pfel"], [["\u00e4pfel", "apfel"]], ["de"])["de"]["exact_match"] == 1.0


def test_nothing_and_what_is_refused() -> None:
    assert score_languages([], [], []) == {}
    assert over_languages({})["cider_d"] is None
    with pytest.raises(ValueError, match="2 captions, 1 references"):
        score_languages(["a", "b"], ["a"], ["en", "en"])
