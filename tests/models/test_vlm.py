"""Injection, losses, packing and what the LLM sees."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from qwen3_vlm.errors import ModelError
from qwen3_vlm.models.bases import load_bases
from tests.tiny import TINY_CONNECTOR, save_tiny_llm

Vlm = tuple[Any, Any]


def encode(processor: Any, answer: str, images: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """One conversation → ids (1, T) and labels (1, T)."""
    question = "<image_patch>\n" * images + "describe"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids, mask = processor.encode_conversation(messages)
    labels = [token if graded else -100 for token, graded in zip(ids, mask, strict=True)]
    return torch.tensor([ids]), torch.tensor([labels])


def test_image_embeddings_stand_at_the_placeholders_and_text_elsewhere(tiny_vlm: Vlm) -> None:
    model, processor = tiny_vlm
    ids, _ = encode(processor, "a dog", images=2)
    pixels = torch.randn(2, 3, 16, 16)
    seen: dict[str, torch.Tensor] = {}
    handle = model.model.language_model.layers[0].register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    model(input_ids=ids, pixel_values=pixels)
    handle.remove()
    images = torch.cat(model.get_image_features(pixels).pooler_output)
    expected = model.get_input_embeddings()(ids.clamp(max=383))[0].clone()
    expected[ids[0] == processor.image_token_id] = images
    torch.testing.assert_close(seen["x"][0], expected)


@pytest.mark.parametrize("images", [0, 1, 3])
def test_wrong_number_of_pictures_names_the_rows(tiny_vlm: Vlm, images: int) -> None:
    model, processor = tiny_vlm
    ids, _ = encode(processor, "a dog", images=2)
    pixels = torch.randn(images, 3, 16, 16) if images else None
    with pytest.raises(ValueError, match=rf"row 0: 8.*but {images} pictures"):
        model(input_ids=ids, pixel_values=pixels)


def test_loss_equals_cross_entropy_of_all_logits(tiny_vlm: Vlm) -> None:
    model, processor = tiny_vlm
    ids, labels = encode(processor, "a red heart left of a small dog")
    pixels = torch.randn(1, 3, 16, 16)
    outputs = model(input_ids=ids, pixel_values=pixels, labels=labels)
    expected = F.cross_entropy(outputs.logits[0, :-1].double(), labels[0, 1:])
    torch.testing.assert_close(outputs.loss.double(), expected, atol=1e-5, rtol=1e-5)
    summed = model(input_ids=ids, pixel_values=pixels, labels=labels, num_items_in_batch=10).loss
    torch.testing.assert_close(summed.double(), expected * (labels[0, 1:] != -100).sum() / 10, atol=1e-5, rtol=1e-5)
    model.train()
    training = model(input_ids=ids, pixel_values=pixels, labels=labels)
    assert training.logits is None
    torch.testing.assert_close(training.loss, outputs.loss)


def test_head_runs_at_supervised_positions_only_while_training(tiny_vlm: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3_vlm.models import vlm

    model, processor = tiny_vlm
    ids, labels = encode(processor, "a dog")
    rows = []
    monkeypatch.setattr(
        vlm, "linear_cross_entropy", lambda hidden, weight, target: rows.append(len(hidden)) or hidden.sum(-1)
    )
    model.train()(input_ids=ids, pixel_values=torch.randn(1, 3, 16, 16), labels=labels)
    assert rows == [int((labels != -100).sum())]


def packed(samples: list[tuple[torch.Tensor, torch.Tensor]], padding: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.cat([sample[0] for sample in samples] + [torch.zeros(1, padding, dtype=torch.long)], dim=1)
    labels = torch.cat([sample[1] for sample in samples] + [torch.full((1, padding), -100)], dim=1)
    lengths = [sample[0].shape[1] for sample in samples] + [padding]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_samples_lose_what_they_lose_alone(tiny_llm_dir: Path, tiny_tower_dir: Path, attention: str) -> None:
    model, processor = load_bases(
        tiny_llm_dir, tiny_tower_dir, dtype=torch.float32, attn_implementation=attention, **TINY_CONNECTOR
    )
    samples = [encode(processor, text) for text in ("a dog", "two big apples above a green tree", "a red heart")]
    pixels = torch.randn(3, 3, 16, 16)
    alone = [
        model.token_losses(input_ids=ids, labels=labels, pixel_values=pixels[index : index + 1]).loss
        for index, (ids, labels) in enumerate(samples)
    ]
    together = model.token_losses(**packed(samples), pixel_values=pixels)
    torch.testing.assert_close(together.loss, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_text_only_training_batch_gives_the_connector_a_zero_gradient(tiny_vlm: Vlm) -> None:
    model, processor = tiny_vlm
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    connector = model.connector_parameters()
    for parameter in connector.values():
        parameter.requires_grad_(True)
    ids, labels = encode(processor, "no picture here", images=0)
    model.train()(input_ids=ids, labels=labels).loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in connector.values())


def test_text_only_logits_are_the_base_models_to_the_bit(tiny_vlm: Vlm, tiny_llm_dir: Path) -> None:
    model, processor = tiny_vlm
    base = AutoModelForCausalLM.from_pretrained(tiny_llm_dir, dtype=torch.float32).eval()
    ids, _ = encode(processor, "what is in the picture?", images=0)
    assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_other_language_models_fit(tmp_path: Path, tiny_tower_dir: Path, family: str, tied: bool) -> None:
    llm = save_tiny_llm(tmp_path / "llm", tied=tied, family=family)
    model, processor = load_bases(llm, tiny_tower_dir, dtype=torch.float32, **TINY_CONNECTOR)
    assert model.config.tie_word_embeddings is tied
    base = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()
    ids, _ = encode(processor, "hello", images=0)
    assert torch.equal(model.eval()(input_ids=ids).logits, base(input_ids=ids).logits)


def test_a_base_that_lacks_tensors_is_refused(tmp_path: Path, tiny_tower_dir: Path) -> None:
    from safetensors.torch import load_file, save_file

    llm = save_tiny_llm(tmp_path / "llm")
    tensors = load_file(llm / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, llm / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj"):
        load_bases(llm, tiny_tower_dir, dtype=torch.float32, **TINY_CONNECTOR)


def test_a_language_model_is_no_tower(tiny_llm_dir: Path) -> None:
    with pytest.raises(ModelError, match="must be SigLIP"):
        load_bases(tiny_llm_dir, tiny_llm_dir, **TINY_CONNECTOR)


def test_a_missing_folder_is_a_sentence(tiny_tower_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        load_bases(tmp_path / "nowhere", tiny_tower_dir, **TINY_CONNECTOR)


def test_frozen_tower_keeps_no_graph(tiny_vlm: Vlm) -> None:
    model, _ = tiny_vlm
    model.model.vision_tower.requires_grad_(False)
    assert not model.encode_patches(torch.randn(1, 3, 16, 16)).requires_grad
    model.model.vision_tower.requires_grad_(True)
    assert model.encode_patches(torch.randn(1, 3, 16, 16)).requires_grad


def test_gradient_checkpointing_changes_nothing(tiny_vlm: Vlm) -> None:
    model, processor = tiny_vlm
    ids, labels = encode(processor, "a dog")
    pixels = torch.randn(1, 3, 16, 16)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
        model.train()(input_ids=ids, pixel_values=pixels, labels=labels).loss.backward()
        gradients.append(model.model.resampler.latents.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])
