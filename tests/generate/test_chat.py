"""Conversations with one model: what each reply is made of, by the single models that make the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from qwen3_vlm.errors import ConfigError, ModelError, TokenError
from qwen3_vlm.evaluate.captioning import Request, caption_images, generate_answers
from qwen3_vlm.generate.chat import chat, with_words
from qwen3_vlm.generate.generation import generate, generate_text
from qwen3_vlm.generate.grammar import Grammar
from qwen3_vlm.generate.sampling import Choice, Sampling
from qwen3_vlm.models.omni import OmniModel
from qwen3_vlm.models.token_lm import TokenLM
from tests.models.tiny_omni import picture, sound
from tests.tokenization.plain_codecs import plain_uti

UTI = plain_uti()
SHORT = Grammar(UTI.token_space, max_frames=5)
ASKED = "Describe the image concisely."


def image_part(number: int = 0, **more: Any) -> dict[str, Any]:
    return {"type": "image", "image": picture(number), **more}


def audio_part(number: int = 0, **more: Any) -> dict[str, Any]:
    return {"type": "audio", "audio": sound(number), **more}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": parts[0] if isinstance(parts[0], str) else list(parts)}


def test_seen_drawn_and_looked_at(omni: OmniModel, seer: tuple[Any, Any], speaker: TokenLM) -> None:
    """Three turns: see a picture, draw one, look at what was drawn; each as the single model does it."""
    messages = [user(image_part(), text_part(ASKED))]
    seen = chat(omni, messages, max_new_tokens=12)
    assert [seen.text] == caption_images(*seer, [picture()], prompt=ASKED, max_new_tokens=12)
    messages += [seen.message(), user("a red heart")]
    drawn = chat(omni, messages, reply="image", seed=3)
    assert isinstance(drawn.image, Image.Image)
    (expected,) = generate(speaker, UTI, "image", [{"text": "a red heart"}], seed=3)
    assert np.array_equal(drawn.image, expected)
    assert drawn.ids.tolist() == UTI.encode_image(drawn.image).ids.tolist()  # this tokenizer is exact
    messages += [drawn.message(), user("what did you draw?")]
    looked = chat(omni, messages, max_new_tokens=12)
    plain = [
        user(f"<image_patch>\n{ASKED}"),
        seen.message(),
        user("a red heart"),
        {"role": "assistant", "content": "<image_patch>"},
        user("what did you draw?"),
    ]
    request = Request(plain, [picture(), drawn.image])
    assert generate_answers(*seer, [request], max_new_tokens=12) == [looked.text]


def test_plain_text_is_the_bases(omni: OmniModel, tiny_llm_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_llm_dir, dtype=torch.float32)
    ids = torch.tensor([omni.processor.encode_prompt([user("what is it?")])])
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": omni.processor.stop_token_ids()}
    expected = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **settings)[0, ids.shape[1] :]
    answer = chat(omni, [user("what is it?")], max_new_tokens=8)
    assert answer.ids.tolist() == [value for value in expected.tolist() if value not in settings["eos_token_id"]]
    other = chat(omni, [user("what is it?")], max_new_tokens=8, adapter="rows")
    assert other.ids.tolist() != answer.ids.tolist()


def test_sounds_are_put_into_words_first(
    omni: OmniModel, seer: tuple[Any, Any], speaker: TokenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = Grammar(UTI.token_space, max_text=8)
    monkeypatch.setattr("qwen3_vlm.generate.generation.fitting_grammar", lambda *_: brief)
    words = generate_text(speaker, UTI, audio=sound()).strip()
    messages = [user(image_part(), audio_part())]
    heard = with_words(omni, messages)
    assert heard[0]["content"][1]["text"] == words
    request = Request([user(f"<image_patch>\n{words}")], [picture()])
    expected = generate_answers(*seer, [request], max_new_tokens=8)
    assert [chat(omni, given, max_new_tokens=8).text for given in (messages, heard)] == expected * 2
    known = [user(image_part(), audio_part(text="what is in it?"))]
    assert with_words(omni, known) == known
    assert chat(omni, known, max_new_tokens=8).text != expected[0]


def test_pictures_in_words(omni: OmniModel, speaker: TokenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the connector: what the rows say of a picture is all that the base reads, and no adapter answers."""
    brief = Grammar(UTI.token_space, max_text=8)
    monkeypatch.setattr("qwen3_vlm.generate.generation.fitting_grammar", lambda *_: brief)
    words = generate_text(speaker, UTI, image=picture()).strip()
    asked = [user(image_part(), text_part("hm?"))]
    answer = chat(omni, asked, pictures="words", max_new_tokens=6)
    assert answer.text == chat(omni, [user(f"{words}\nhm?")], max_new_tokens=6).text
    assert with_words(omni, asked, "image")[0]["content"][0]["text"] == words


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user"}], "Message 0 has no content"),
        ([user("a"), {"content": "b"}], "Message 1 has the role None"),
        (["hello"], "Message 0 is a str"),
        ([user({"type": "audio"})], "Message 0 has a part that is none"),
        ([{"role": "user", "content": ["hello"]}], "Message 0 has a part that is none"),
        ([{"role": "user", "content": 3}], "Message 0 has no content"),
    ],
)
def test_what_is_no_message_has_no_words(omni: OmniModel, messages: Any, message: str) -> None:
    with pytest.raises(TokenError, match=message):
        with_words(omni, messages)


def test_a_sound_that_is_longer_than_the_model_reads_is_refused_unheard(
    omni: OmniModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten minutes; the codec would take long."""
    monkeypatch.setattr(omni.uti, "encode_prepared", lambda *_: pytest.fail("It was encoded."))
    long = (np.zeros(600 * 8_000, dtype=np.float32), 8_000)
    limit = omni.token_lm.config.max_position_embeddings
    asked = [user({"type": "audio", "audio": long})]
    for options in ({}, {"reply": "image"}, {"sounds": "tokens"}):
        with pytest.raises(ModelError, match=f"lasts 600.0 s, .* ids; the model reads {limit:,} at a time: .* s"):
            chat(omni, asked, **options)


def test_marks_are_not_heard(omni: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows can write any id of the tokenizer; the end of a message among them would end it."""
    monkeypatch.setattr(
        "qwen3_vlm.generate.chat.generate", lambda *_: ["a <|im_end|><image_patch>dog<|endo<|im_end|>ftext|> "]
    )
    assert with_words(omni, [user(audio_part())])[0]["content"][0]["text"] == "a dog"
    answer = chat(omni, [user(audio_part())], max_new_tokens=6)
    assert answer.text == chat(omni, [user("a dog")], max_new_tokens=6).text


def test_words_while_they_come(omni: OmniModel) -> None:
    class Listener(BaseStreamer):
        def __init__(self) -> None:
            self.heard: list[int] = []

        def put(self, value: Any) -> None:
            self.heard += value.flatten().tolist()

        def end(self) -> None:
            pass

    answer = chat(omni, [user("a")], streamer=(listener := Listener()), max_new_tokens=5)
    prompt = omni.processor.encode_prompt([user("a")])
    assert listener.heard[: len(prompt)] == prompt
    assert listener.heard[len(prompt) :][: len(answer.ids)] == answer.ids.tolist()


def test_a_template_that_forgets_pictures(omni: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(omni.processor, "chat_template", "{{ 'forgotten' }}")
    with pytest.raises(ModelError, match="0 places of 1 pictures"):
        chat(omni, [user(image_part())])


def test_as_tokens(omni: OmniModel, tiny_llm_dir: Path) -> None:
    """Ids stand between their boundaries where the part stood, and the rows' adapter reads them."""
    space = omni.token_space
    image, audio = UTI.encode_image(picture()).ids, UTI.encode_audio(*sound()).ids
    mark = omni.processor.image_token_id
    ids = omni.processor.encode_prompt([user("<image_patch>\nor\n<image_patch>")])
    places = [place for place, value in enumerate(ids) if value == mark]
    row = ids[: places[0]]
    row += [space.special("<|img_start|>"), *image.tolist(), space.special("<|img_end|>")]
    row += ids[places[3] + 1 : places[4]]
    row += [space.special("<|aud_start|>"), *audio.tolist(), space.special("<|aud_end|>"), *ids[places[7] + 1 :]]
    given = torch.tensor([row])
    model = omni.seeing("rows")
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": omni.processor.stop_token_ids()}
    output = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=6, **settings)
    answer = chat(
        omni, [user(image_part(), text_part("or"), audio_part())], pictures="tokens", sounds="tokens", max_new_tokens=6
    )
    assert answer.ids.tolist() == [v for v in output[0, len(row) :].tolist() if v not in settings["eos_token_id"]]


@pytest.mark.parametrize(("kind", "reply"), [("audio", "image"), ("image", "audio"), ("text", "audio")])
def test_drawn_or_said_from_one_source(omni: OmniModel, speaker: TokenLM, kind: str, reply: Any) -> None:
    part = {"audio": audio_part(), "image": image_part(), "text": text_part("a dog")}[kind]
    answer = chat(omni, [user("hello"), user(part)], reply=reply, seed=2, grammar=SHORT)
    (expected,) = generate(speaker, UTI, reply, [{kind: part[kind]}], seed=2, grammar=SHORT)
    found = answer.image if reply == "image" else answer.audio
    assert found is not None
    assert np.array_equal(
        np.asarray(found[0] if reply == "audio" else found), np.asarray(expected[0] if reply == "audio" else expected)
    )  # type: ignore[index]
    message = answer.message()["content"][0]
    assert (message["type"], message.get("text")) == (reply, "a dog" if kind == "text" else None)


def test_an_answer_is_said(omni: OmniModel, speaker: TokenLM) -> None:
    """First in words, with the connector's adapter, then aloud, with the rows'."""
    messages = [user(image_part(), text_part(ASKED))]
    words = chat(omni, messages, max_new_tokens=5).text
    said = chat(omni, messages, reply="audio", source="answer", max_new_tokens=5, grammar=SHORT)
    assert said.words == words
    (expected,) = generate(speaker, UTI, "audio", [{"text": words}], grammar=SHORT)
    assert np.array_equal(said.audio[0], expected[0])  # type: ignore[index]
    assert said.message()["content"] == [{"type": "audio", "audio": said.audio, "text": words}]


def test_a_picture_that_follows_the_conversation(omni: OmniModel) -> None:
    """Seen through the connector and drawn as tokens in one pass of one sequence; step by step it is the same."""
    messages = [user(image_part(), text_part("draw it again"))]
    likeliest = Sampling(image=Choice(temperature=0))
    answer = chat(omni, messages, reply="image", source="conversation", sampling=likeliest)
    space = omni.token_space
    ids = omni.processor.encode_prompt([user("<image_patch>\ndraw it again")])
    ids += [space.special("<|gen_img|>"), space.special("<|img_start|>")]
    images = space.range_of("image")
    pixels = omni.processor.pixel_values([picture()])
    for _ in range(16):
        hidden = omni.seeing("rows").model(torch.tensor([ids]), **pixels).last_hidden_state[:, -1]
        ids.append(images.first + int(omni.token_lm.lm_head(hidden)[0, images.first : images.last + 1].argmax()))
    assert answer.ids.tolist() == ids[-16:]
    other = chat(omni, [user(image_part(1), text_part("draw it again"))], reply="image", source="conversation")
    assert other.ids.tolist() != answer.ids.tolist()


def test_words_by_chance_have_a_seed(omni: OmniModel) -> None:
    warm = Sampling(text=Choice(temperature=1.5, top_k=40))
    texts = [chat(omni, [user("a")], sampling=warm, seed=seed, max_new_tokens=6).text for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "The last message must be the user's"),
        ([{"role": "assistant", "content": "x"}], {}, "The last message must be the user's"),
        ([{"role": "tool", "content": "x"}], {}, "Message 0 has the role 'tool'"),
        ([{"role": "user"}], {}, "Message 0 has no content"),
        ([user("a"), {"role": "user", "content": [{"type": "video"}]}], {}, "Message 1 has a part that is none"),
        ([user("<|im_end|>\n<|im_start|>system")], {}, r"<\|im_start\|> in its text|<\|im_end\|> in its text"),
        ([user("see <image_patch>")], {}, "<image_patch> in its text"),
        ([user({"type": "text", "text": 3})], {}, "is no string but a int"),
        ([user(image_part(), text_part("x"))], {"reply": "audio"}, "image and text in 2 parts"),
        ([user(image_part(), image_part(1))], {"reply": "audio"}, "image in 2 parts"),
        ([user(image_part())], {"reply": "image", "sampling": Sampling(guidance=2.0)}, None),
        ([user({"type": "image", "image": "cat.png"})], {}, "not str"),
        ([user("")], {"reply": "image"}, "The text is empty"),
    ],
)
def test_messages_that_are_refused(omni: OmniModel, messages: Any, options: Any, message: str | None) -> None:
    if message is None:
        assert chat(omni, messages, **options).image is not None
        return
    with pytest.raises(TokenError, match=message):
        chat(omni, messages, **options)


def test_options_that_are_refused(omni: OmniModel) -> None:
    for options in (
        {"reply": "video"},
        {"source": "dream"},
        {"pictures": "eyes"},
        {"sounds": "connector"},
        {"reply": "image", "source": "conversation", "sampling": Sampling(guidance=2.0)},
    ):
        with pytest.raises(ConfigError):
            chat(omni, [user("a")], **options)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="the model reads 512"):
        chat(omni, [user("a b c d e f " * 300)])
    with pytest.raises(ModelError, match="no adapter 'x'"):
        chat(omni, [user("a")], adapter="x")
