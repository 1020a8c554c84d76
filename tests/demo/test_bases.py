"""The shipped bases are real, small, complete, and do what the demo builds on."""

import json
import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer, Qwen3ForCausalLM, SiglipVisionModel

from qwen3_vlm.demo.paths import BASES
from qwen3_vlm.demo.text_base import Encoder, keyword_slots, scene_sample
from qwen3_vlm.demo.tower import scene_batch, to_pixel_values
from qwen3_vlm.demo.world import BACKGROUND_WORDS, NAMES, PROMPTS, SIZE_WORDS, plural, scenes
from qwen3_vlm.models.bases import load_bases

SLOTS = 16
ROOT = Path(__file__).parents[2]
CODECS = {"image.source": "image_tokenizer", "audio.source": "audio_codec", "text.tokenizer": "text"}


@pytest.fixture(scope="module")
def text_base() -> Qwen3ForCausalLM:
    model, info = Qwen3ForCausalLM.from_pretrained(BASES / "text", dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.fixture(scope="module")
def tower() -> SiglipVisionModel:
    model, info = SiglipVisionModel.from_pretrained(BASES / "tower", dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def test_both_bases_together_are_small_and_no_drawing_is_shipped() -> None:
    files = [path for path in BASES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_every_word_of_the_world_is_one_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASES / "text")
    words = [*NAMES, *map(plural, NAMES), *SIZE_WORDS, *BACKGROUND_WORDS, "left", "right", "top", "bottom", "above"]
    assert all(len(tokenizer.encode(f" {word}")) == 1 for word in words)
    caption = next(scenes("tokens")).caption()
    assert tokenizer.decode(tokenizer.encode(caption)) == caption


def test_the_placeholder_takes_a_spare_row() -> None:
    model, processor = load_bases(
        BASES / "text", BASES / "tower", dtype=torch.float32, num_latents=SLOTS, latent_dim=32
    )
    rows = model.get_input_embeddings().weight.shape[0]
    assert len(processor.tokenizer) - 1 == processor.image_token_id < rows
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_the_image_processor_scales_as_the_tower_was_trained() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    processor = AutoImageProcessor.from_pretrained(BASES / "tower", backend="pil")
    given = processor(pixels, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(given, to_pixel_values(pixels[None]), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_text_base_reads_keyword_slots_and_nothing_from_empty_ones(text_base: Qwen3ForCausalLM) -> None:
    torch.manual_seed(0)
    rng, encoder = random.Random(0), Encoder(AutoTokenizer.from_pretrained(BASES / "text"))
    samples = [scene_sample(scene, rng) for scene in islice(scenes("slots", unseen=True), 80)]
    samples = [sample for sample in samples if sample.question in PROMPTS]
    batch, embedding = encoder.batch(samples, SLOTS), text_base.get_input_embeddings().weight
    slots = keyword_slots(embedding, batch["regions"], batch["everywhere"], SLOTS, roughness=0.0)
    names = encoder.name_ids()
    labels = batch["labels"][:, 1:]
    asked = torch.isin(labels, names)

    def share_right(vectors: torch.Tensor) -> float:
        inputs = embedding[batch["input_ids"]]
        inputs[:, 3 : 3 + SLOTS] = vectors
        said = text_base(inputs_embeds=inputs).logits[:, :-1].argmax(-1)
        return (said == labels)[asked].float().mean().item()

    assert share_right(slots) > 0.9
    assert share_right(torch.zeros_like(slots)) < 0.2


@torch.no_grad()
def test_objects_are_linearly_readable_from_the_towers_patches(tower: SiglipVisionModel) -> None:
    rng = random.Random(0)
    parts = []
    for stream, count in ((scenes("probe"), 600), (scenes("probe", unseen=True), 100)):
        batch = scene_batch(stream, rng, count)
        hidden = torch.cat(
            [tower(pixel_values=part).last_hidden_state for part in to_pixel_values(batch.pixels).split(100)]
        )
        target = torch.from_numpy(batch.targets["object"])
        parts.append((hidden[target > 0], target[target > 0]))
    (inputs, classes), (unseen_inputs, unseen_classes) = parts
    gram = inputs.T @ inputs + 10 * torch.eye(inputs.shape[1])
    weights = torch.linalg.solve(gram, inputs.T @ torch.nn.functional.one_hot(classes).float())
    right = (unseen_inputs @ weights).argmax(-1) == unseen_classes
    assert right.float().mean() > 0.75


def test_what_the_bases_were_trained_with_is_written_beside_them() -> None:
    card = (BASES / "README.md").read_text(encoding="utf-8")
    assert "OpenMoji" in card
    assert "CC BY-SA 4.0" in card
    assert all(
        (Path(__file__).parents[2] / "scripts" / name).is_file() for name in ("train_text_base.py", "train_tower.py")
    )


def test_the_stored_audit_is_of_the_shipped_codecs() -> None:
    """Codecs that are trained anew need `qwen3-vlm uti audit` anew, or nobody could be gated against it."""
    from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer

    stored = json.loads((BASES / "uti_audit.json").read_text(encoding="utf-8"))
    folders = [f"{kind}={BASES / folder}" for kind, folder in CODECS.items()]
    uti = UnifiedTokenizer.open(ROOT / "configs" / "demo_uti.yaml", folders, download=False)
    assert stored["token_space_sha256"] == uti.sha256
    assert stored["passed"] is True
