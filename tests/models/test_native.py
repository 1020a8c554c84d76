"""Native to transformers: Auto classes, generate in its modes, pipeline, save and load, PEFT."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

from qwen3_vlm.models import Qwen3VLMConfig, Qwen3VLMForConditionalGeneration, Qwen3VLMModel, Qwen3VLMProcessor

Vlm = tuple[Any, Any]
COLOURS = ("red", "green", "blue")
PICTURES = [Image.new("RGB", (20, 12), colour) for colour in COLOURS]


def chat(images: int, text: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": picture} for picture in PICTURES[:images]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def inputs_for(processor: Any, *conversations: list[dict[str, Any]]) -> Any:
    return processor.apply_chat_template(
        list(conversations),
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def manual_greedy(model: Any, inputs: Any, steps: int) -> list[int]:
    """Greedy decoding without a cache: the whole sequence and the pictures again at every step."""
    ids = inputs["input_ids"]
    for _ in range(steps):
        logits = model(input_ids=ids, pixel_values=inputs.get("pixel_values")).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]


@pytest.fixture
def vlm(tiny_vlm: Vlm) -> Vlm:
    model, processor = tiny_vlm
    model.generation_config.eos_token_id = None
    return model, processor


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_greedy_generation_equals_decoding_by_hand(vlm: Vlm, options: dict[str, Any], images: int) -> None:
    model, processor = vlm
    inputs = inputs_for(processor, chat(images, "describe"))
    expected = manual_greedy(model, inputs, steps=6)
    generated = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
    assert generated[0, -6:].tolist() == expected


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": False, "num_beams": 3}])
def test_left_padded_batch_equals_one_by_one(vlm: Vlm, options: dict[str, Any]) -> None:
    model, processor = vlm
    chats = [chat(1, "describe"), chat(3, "what is in the picture? describe it"), chat(0, "hello"), chat(2, "hm")]
    together = model.generate(**inputs_for(processor, *chats), max_new_tokens=5, **options)
    for row, conversation in zip(together, chats, strict=True):
        alone = model.generate(**inputs_for(processor, conversation), max_new_tokens=5, **options)
        assert row[-5:].tolist() == alone[0, -5:].tolist()


def test_sampling_is_reproduced_by_its_seed(vlm: Vlm) -> None:
    model, processor = vlm
    inputs = inputs_for(processor, chat(1, "describe"))
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(model.generate(**inputs, max_new_tokens=12, do_sample=True, temperature=2.0)[0].tolist())
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}])
def test_pictures_are_encoded_once_per_generation(vlm: Vlm, options: dict[str, Any]) -> None:
    model, processor = vlm
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**inputs_for(processor, chat(2, "describe")), max_new_tokens=6, **options)
    assert len(calls) == 1


def test_the_picture_matters(vlm: Vlm) -> None:
    model, processor = vlm
    inputs = inputs_for(processor, chat(1, "describe"))
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    assert not torch.equal(model(**inputs).logits, model(**other).logits)


def test_save_and_load_through_the_auto_classes(vlm: Vlm, tmp_path: Path) -> None:
    model, processor = vlm
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is Qwen3VLMConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is Qwen3VLMModel
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is Qwen3VLMForConditionalGeneration
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    reloaded = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(reloaded) is Qwen3VLMProcessor
    assert reloaded.num_image_tokens == 4
    assert reloaded.chat_template == processor.chat_template
    inputs = inputs_for(processor, chat(2, "describe"))
    again = inputs_for(reloaded, chat(2, "describe"))
    assert torch.equal(inputs["input_ids"], again["input_ids"])
    assert torch.equal(loaded.eval()(**again).logits, model(**inputs).logits)


def test_fresh_weights_are_initialised_when_missing(vlm: Vlm, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, _ = vlm
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.resampler.latents"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = Qwen3VLMForConditionalGeneration.from_pretrained(tmp_path)
    latents = loaded.model.resampler.latents
    assert latents.isfinite().all()
    assert 0.05 < latents.std() < 0.5


def test_pipeline(vlm: Vlm) -> None:
    model, processor = vlm
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    answer = pipe(text=chat(1, "describe"), max_new_tokens=4, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)


def test_saved_folder_loads_without_this_package(vlm: Vlm, tmp_path: Path) -> None:
    model, processor = vlm
    folder = tmp_path / "exported"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    inputs = inputs_for(processor, chat(1, "describe"))
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()
    script = f"""
import sys
sys.modules["qwen3_vlm"] = None  # any import of the package fails
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True, backend="pil")
model.generation_config.eos_token_id = None
content = [{{"type": "image", "image": Image.new("RGB", (20, 12), "red")}}, {{"type": "text", "text": "describe"}}]
inputs = processor.apply_chat_template([[{{"role": "user", "content": content}}]], tokenize=True,
    add_generation_prompt=True, return_dict=True, return_tensors="pt", processor_kwargs={{"padding": True}})
print(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist())
"""
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip().splitlines()[-1] == str(expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks by the old name
def test_lora_reaches_the_language_model_alone_and_loads_again(vlm: Vlm, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model, processor = vlm
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)
    inputs = inputs_for(processor, chat(1, "describe"))
    plain = model(**inputs).logits
    peft_model = get_peft_model(model, config)
    trainable = [name for name, parameter in peft_model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("language_model" in name and "lora_" in name for name in trainable)
    adapted = peft_model(**inputs).logits
    assert not torch.allclose(plain, adapted)
    peft_model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(peft_model.unload(), tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, adapted)
    again.generate(**inputs, max_new_tokens=2)


def test_the_number_of_tokens_is_told_in_advance(vlm: Vlm) -> None:
    _, processor = vlm
    told = processor._get_num_multimodal_tokens(image_sizes=[[10, 10], [30, 20]])
    assert told["num_image_tokens"] == [4, 4]
