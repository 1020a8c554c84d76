"""The model class as lmms-eval itself finds, makes and asks it."""

import importlib
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from qwen3_vlm.errors import AddOnError, ConfigError, DataError, ModelError
from qwen3_vlm.evaluate.captioning import Request, generate_answers
from qwen3_vlm.evaluate.lmms_eval_entry import manifest
from tests.evaluate.helpers import picture

pytest.importorskip("lmms_eval", reason="make setup installs lmms-eval, without its tasks' many packages")
ROOT = Path(__file__).parent.parent
GENERATION = {"max_new_tokens": 6, "until": [], "do_sample": False}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.delitem(sys.modules, "qwen3_vlm.lmms_eval_model", raising=False)
    yield importlib.import_module("qwen3_vlm.lmms_eval_model")
    sys.modules.pop("qwen3_vlm.lmms_eval_model", None)


def docs() -> list[dict[str, Any]]:
    return [{"picture": picture(seed), "question": f"what is {seed}?", "answer": "a dog"} for seed in range(4)]


def to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [doc["picture"]]


def to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": doc["picture"]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]


def request(kind: str, *arguments: Any) -> Any:
    from lmms_eval.api.instance import Instance

    metadata = {"task": "toy", "doc_id": arguments[-3], "repeats": 1}
    return Instance(request_type=kind, arguments=arguments, idx=0, metadata=metadata)


def chat(number: int, **settings: Any) -> Any:
    return request("generate_until", "context", to_messages, {**GENERATION, **settings}, number, "toy", "test")


def simple(number: int, text: str, **settings: Any) -> Any:
    return request("generate_until", text, {**GENERATION, **settings}, to_visual, number, "toy", "test")


def open_model(module: Any, name: str, connector: Path, **options: Any) -> Any:
    made = getattr(module, name).create_from_arg_string(
        f"pretrained={connector}", {"batch_size": 3, "max_batch_size": None, "device": "cpu", **options}
    )
    made.task_dict["toy"] = {"test": docs()}
    return made


@pytest.fixture
def expected(tiny_vlm: tuple[Any, Any]) -> list[str]:
    """What the same model answers without lmms-eval."""
    model, processor = tiny_vlm
    requests = [
        Request([{"role": "user", "content": f"{processor.image_token}\n{doc['question']}"}], [doc["picture"]])
        for doc in docs()
    ]
    return generate_answers(model, processor, requests, max_new_tokens=6)


def test_the_entry_point_names_both_classes(module: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["lmms_eval.models"] == {
        "qwen3_vlm": f"{manifest.__module__}:{manifest.__qualname__}"
    }
    found = manifest()
    assert found.model_id == "qwen3_vlm"
    from lmms_eval.api.model import lmms

    for path, is_simple in ((found.simple_class_path, True), (found.chat_class_path, False)):
        name, _, attribute = path.rpartition(".")
        cls = getattr(importlib.import_module(name), attribute)
        assert issubclass(cls, lmms)
        assert cls.is_simple is is_simple
        assert not cls.__abstractmethods__


def test_the_real_registry_accepts_it() -> None:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    for found in registry._coerce_payload_to_manifests(manifest):
        registry.register_manifest(found)
    assert registry.get_model_class("qwen3_vlm").__name__ == "Qwen3VLMChat"
    assert registry.get_model_class("qwen3_vlm", force_simple=True).__name__ == "Qwen3VLMSimple"


def test_answers_are_those_of_the_model(module: Any, connector: Path, expected: list[str]) -> None:
    model = open_model(module, "Qwen3VLMChat", connector)
    assert model.generate_until([chat(number) for number in range(4)]) == expected
    assert model.generate_until([chat(number) for number in (2, 0)]) == [expected[2], expected[0]]
    older = open_model(module, "Qwen3VLMSimple", connector)
    asked = [simple(number, doc["question"]) for number, doc in enumerate(docs())]
    assert older.generate_until(asked) == expected
    assert (model.rank, model.world_size, model.batch_size) == (0, 1, 3)


def test_an_exported_folder(module: Any, connector: Path, tmp_path: Path, expected: list[str]) -> None:
    from qwen3_vlm.train.add_ons import export_vlm

    export_vlm(connector, tmp_path / "whole")
    model = open_model(module, "Qwen3VLMChat", tmp_path / "whole")
    assert model.generate_until([chat(number) for number in range(4)]) == expected


def test_each_request_has_its_own_settings(module: Any, connector: Path, expected: list[str]) -> None:
    model = open_model(module, "Qwen3VLMChat", connector)
    stop = expected[1][2]
    answers = model.generate_until([chat(0), chat(1, until=[stop]), chat(2, max_new_tokens=1), chat(3, until="")])
    assert answers[0] == expected[0]
    assert answers[1] == expected[1][: expected[1].find(stop)].strip()
    assert expected[2].startswith(answers[2])
    assert len(answers[2]) < len(expected[2])
    assert answers[3] == expected[3]


def test_sampling_is_asked_for_by_temperature(module: Any) -> None:
    assert module._decoding({"temperature": 0, "top_p": 0.9, "num_beams": 2}) == {"num_beams": 2}
    assert module._decoding({"temperature": 0.7, "do_sample": False}) == {}
    assert module._decoding({"temperature": 0.7, "top_p": 0.9, "top_k": None}) == {
        "temperature": 0.7,
        "top_p": 0.9,
        "do_sample": True,
    }
    assert module._decoding({}) == {}


def test_likelihoods_equal_the_models_losses(module: Any, connector: Path, tiny_vlm: tuple[Any, Any]) -> None:
    model = open_model(module, "Qwen3VLMSimple", connector)
    bare, processor = tiny_vlm
    texts = [" a dog", lambda doc: doc["answer"], "a red heart"]
    asked = [request("loglikelihood", "what?", text, to_visual, 1, "toy", "test") for text in texts]
    found = model.loglikelihood(asked)
    for text, (likelihood, greedy) in zip(("a dog", "a dog", "a red heart"), found, strict=True):
        prompt = processor.encode_prompt([{"role": "user", "content": f"{processor.image_token}\nwhat?"}])
        answer = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        losses = bare.token_losses(
            input_ids=torch.tensor([prompt + answer]), labels=labels, **processor.pixel_values([docs()[1]["picture"]])
        )
        assert likelihood == pytest.approx(-float(losses.loss.sum()), abs=1e-4)
        assert not greedy
    said = model.generate_until([simple(1, "what?", max_new_tokens=3)])[0]
    ids = processor.tokenizer(said, add_special_tokens=False)["input_ids"]
    ((_, greedy),) = model.loglikelihood([request("loglikelihood", "what?", said, to_visual, 1, "toy", "test")])
    assert greedy is (processor.tokenizer.decode(ids) == said and len(ids) <= 3)


def test_marks_in_a_question_are_no_pictures(module: Any, connector: Path, expected: list[str]) -> None:
    model = open_model(module, "Qwen3VLMSimple", connector)
    marked = simple(0, "<image>what is <image_patch>0?")
    assert model.generate_until([marked]) == [expected[0]]


def test_a_system_prompt_and_several_turns(module: Any, connector: Path) -> None:
    model = open_model(module, "Qwen3VLMChat", connector, system_prompt="be brief")
    turns = [
        {"role": "user", "content": [{"type": "image", "url": picture(1)}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
        {"role": "user", "content": "and now?"},
    ]
    asked = model._request(turns)
    mark = model.processor.image_token
    assert [message["content"] for message in asked.messages] == ["be brief", f"{mark}\nwhat?", "a dog", "and now?"]
    assert [message["role"] for message in asked.messages] == ["system", "user", "assistant", "user"]
    assert len(asked.images) == 1


def test_what_is_refused(module: Any, connector: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pretrained=DIR"):
        module.Qwen3VLMChat()
    with pytest.raises(AddOnError, match="no connector directory"):
        module.Qwen3VLMChat(pretrained=str(tmp_path))
    model = open_model(module, "Qwen3VLMChat", connector, batch_size="auto")
    assert model.batch_size == module.AUTO_BATCH_SIZE
    with pytest.raises(DataError, match="a part of the type 'video'"):
        model._request([{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}])
    with pytest.raises(DataError, match="a part of the type 'other'"):
        model._request(module._as_messages("what?", ["x.mp4"]))
    with pytest.raises(NotImplementedError, match="one round"):
        model.generate_until_multi_round([])
    long = [{"role": "user", "content": "dog " * 600}]
    with pytest.raises(ModelError, match="the model reads 512"):
        model._room([model._request(long)], 5)
    assert model._room([model._request([{"role": "user", "content": "dog"}])], 5000) < 512


def test_pictures_by_path(module: Any, connector: Path, tmp_path: Path) -> None:
    model = open_model(module, "Qwen3VLMSimple", connector)
    picture(3).save(tmp_path / "p.png")
    (found,) = model._request(module._as_messages("what?", [str(tmp_path / "p.png")])).images
    assert found.tobytes() == picture(3).tobytes()
