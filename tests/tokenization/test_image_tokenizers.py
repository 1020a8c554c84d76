"""The adapters against the peer libraries called directly, and against arithmetic by hand."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from qwen3_vlm.errors import ConfigError, ModelError, TokenError
from qwen3_vlm.tokenization.image_models import PixelScaling
from qwen3_vlm.tokenization.image_tokenizers import ImageTokenizer, open_image_tokenizer
from qwen3_vlm.tokenization.uti_config import ImageConfig
from tests.tokenization.tiny_models import IMAGE_TYPES, SIDE, SIZE, rewrite, save_tiny, tiny_model, weights_of

GRIDS = {"janus_vqvae": (4, 4), "emu3_vqvae": (8, 8), "diffusers_vq": (8, 8)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_tiny(tmp_path_factory.mktemp(kind), kind) for kind in IMAGE_TYPES}


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A folder of its own for a test that changes it."""
    return lambda kind: Path(shutil.copytree(folders[kind], tmp_path / kind))


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)


def open_it(folder: Path, kind: str, **values: Any) -> Any:
    config = {"source": str(folder), "type": kind, "resolution": SIDE, "device": "cpu", **values}
    return open_image_tokenizer(ImageConfig(**config), download=False)


def peers_pixel_values(kind: str, pixels: NDArray[np.uint8]) -> torch.Tensor:
    """The picture as the library's own processor hands it to the model."""
    if kind == "diffusers_vq":
        from diffusers.image_processor import VaeImageProcessor
        from PIL import Image

        return VaeImageProcessor(do_resize=False).preprocess([Image.fromarray(picture) for picture in pixels])
    from transformers import Emu3ImageProcessor, JanusImageProcessorPil

    processor: Any = JanusImageProcessorPil() if kind == "janus_vqvae" else Emu3ImageProcessor()
    return processor(list(pixels), do_resize=False, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def peers_ids(kind: str, model: Any, values: torch.Tensor) -> NDArray[np.int64]:
    if kind == "janus_vqvae":
        ids = model.encode(values).image_tokens
    elif kind == "emu3_vqvae":
        ids = torch.stack(model.encode(values, torch.tensor([[SIDE, SIDE]] * len(values))).image_tokens)
    else:
        ids = model.quantize(model.encode(values).latents)[2][2]
    return ids.reshape(len(values), *GRIDS[kind]).numpy()


@torch.no_grad()
def peers_values(kind: str, model: Any, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    codes = torch.from_numpy(ids)
    if kind == "janus_vqvae":
        values = model.decode(codes.flatten(1))
    elif kind == "emu3_vqvae":
        values = model.decode(codes)
    else:
        latents = model.quantize.embedding(codes).permute(0, 3, 1, 2)
        values = model.decode(latents, force_not_quantize=True).sample
    return values.double().numpy()


@pytest.mark.parametrize("kind", IMAGE_TYPES)
def test_ids_and_pictures_are_the_peers(kind: str, folders: dict[str, Path], pixels: NDArray[np.uint8]) -> None:
    tokenizer, model = open_it(folders[kind], kind), tiny_model(kind)
    assert isinstance(tokenizer, ImageTokenizer)
    assert (tokenizer.codebook_size, tokenizer.resolution, tokenizer.grid) == (SIZE, (SIDE, SIDE), GRIDS[kind])
    ids = tokenizer.encode(pixels)
    np.testing.assert_array_equal(ids, peers_ids(kind, model, peers_pixel_values(kind, pixels)))
    assert ids.dtype == np.int64
    assert len(np.unique(ids)) > SIZE // 4
    decoded = tokenizer.decode(ids)
    mean, deviation = np.asarray(tokenizer.scaling.mean), np.asarray(tokenizer.scaling.deviation)
    wanted = (peers_values(kind, model, ids).transpose(0, 2, 3, 1) * deviation + mean) * 255
    assert np.abs(np.clip(wanted, 0, 255) - decoded).max() <= 0.5 + 1e-3
    assert decoded.dtype == np.uint8
    assert decoded.std() > 5


def test_ids_are_the_nearest_rows_by_hand(folders: dict[str, Path], pixels: NDArray[np.uint8]) -> None:
    """Distances in float64, one by one, of the latents of the same weights in float64."""
    kind = "janus_vqvae"
    model = tiny_model(kind).double()
    values = torch.from_numpy((pixels / 255 - [0.48145466, 0.4578275, 0.40821073]).transpose(0, 3, 1, 2))
    values = values / torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None].double()
    with torch.no_grad():
        latents = model.quant_conv(model.encoder(values)).permute(0, 2, 3, 1).numpy()
    rows = model.quantize.embedding.weight.detach().numpy()
    distances = np.array(
        [[[[np.sum((cell - row) ** 2) for row in rows] for cell in line] for line in p] for p in latents]
    )
    nearest, second = np.sort(distances, -1)[..., :2].transpose(3, 0, 1, 2)
    assert (second - nearest > 1e-4).all()  # else fp32 may decide otherwise
    np.testing.assert_array_equal(open_it(folders[kind], kind).encode(pixels), distances.argmin(-1))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}),
        ({"image_mean": [0.5] * 3, "image_std": 0.5}, {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}),
        ({"do_normalize": False}, {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}),
    ],
)
def test_pixels_are_scaled_as_the_processor_in_the_folder_does_it(
    copied: Callable[[str], Path], pixels: NDArray[np.uint8], values: dict[str, Any], expected: dict[str, Any]
) -> None:
    from transformers import JanusImageProcessorPil

    folder = copied("janus_vqvae")
    before = open_it(folder, "janus_vqvae")
    processor = JanusImageProcessorPil(size={"height": SIDE, "width": SIDE}, **values)
    processor.save_pretrained(folder)
    tokenizer = open_it(folder, "janus_vqvae")
    assert (tokenizer.scaling.mean, tokenizer.scaling.deviation) == (expected["image_mean"], expected["image_std"])
    wanted = processor(list(pixels), do_resize=False, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(tokenizer.scaling.to_values(pixels), wanted)
    assert (tokenizer.weights_sha256 == before.weights_sha256) == (not values)


def test_bytes_survive_scaling_and_are_rounded_half_to_even() -> None:
    scaling = PixelScaling(1 / 255, (0.5, 0.4, 0.3), (0.5, 0.25, 0.3))
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    np.testing.assert_array_equal(scaling.to_bytes(scaling.to_values(every)), every)
    plain = PixelScaling(1.0, (0.0,) * 3, (1.0,) * 3)
    halves = np.array([-3, 0.5, 1.5, 2.5, 254.5, 255.5, 400], np.float32).reshape(1, 1, 1, 7).repeat(3, 1)
    assert plain.to_bytes(halves)[0, 0, :, 0].tolist() == [0, 0, 2, 2, 254, 255, 255]


def test_amused_pipelines_take_pixels_from_0_to_1(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["diffusers_vq"], tmp_path / "vqvae")
    (tmp_path / "model_index.json").write_text('{"_class_name": "AmusedPipeline"}', encoding="utf-8")
    tokenizer = open_it(tmp_path, "diffusers_vq", subfolder="vqvae")
    assert (tokenizer.scaling.mean, tokenizer.scaling.deviation) == ((0.0,) * 3, (1.0,) * 3)
    assert open_it(folders["diffusers_vq"], "diffusers_vq").scaling.mean == (0.5,) * 3


@pytest.mark.parametrize(
    "changes", [{"lookup_from_codebook": True}, {"norm_type": "spatial", "block_out_channels": [32, 32]}]
)
def test_variants_of_vq_model_decode_as_the_class_does(changes: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = open_it(save_tiny(tmp_path, "diffusers_vq", **changes), "diffusers_vq")
    model = tiny_model("diffusers_vq", **changes)
    ids = np.random.default_rng(2).integers(0, SIZE, (2, 8, 8))
    codes = torch.from_numpy(ids)
    with torch.no_grad():
        if "norm_type" in changes:
            quantized = model.quantize.embedding(codes).permute(0, 3, 1, 2)
            values = model.decoder(model.post_quant_conv(quantized), quantized)
        else:
            values = model.decode(codes.flatten(), force_not_quantize=True, shape=(2, 8, 8, 4)).sample
    wanted = np.clip((values.numpy().transpose(0, 2, 3, 1) * 0.5 + 0.5) * 255, 0, 255)
    assert np.abs(wanted - tokenizer.decode(ids)).max() <= 0.5 + 1e-3


def test_janus_works_at_other_resolutions(folders: dict[str, Path]) -> None:
    kind = "janus_vqvae"
    assert open_it(folders[kind], kind, resolution=None).resolution == (SIDE, SIDE)  # what its config says
    tokenizer = open_it(folders[kind], kind, resolution=24)
    assert tokenizer.grid == (6, 6)
    ids = np.random.default_rng(3).integers(0, SIZE, (2, 6, 6))
    values = peers_values(kind, tiny_model(kind, num_patches=6), ids).transpose(0, 2, 3, 1)
    wanted = np.clip((values * tokenizer.scaling.deviation + tokenizer.scaling.mean) * 255, 0, 255)
    assert np.abs(wanted - tokenizer.decode(ids)).max() <= 0.5 + 1e-3


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("janus_vqvae", {"resolution": 18}, r"image\.resolution is 18, .* a multiple of 4, such as 16"),
        ("emu3_vqvae", {"resolution": None}, r"image\.resolution must be given"),
        ("diffusers_vq", {"codebook_size": 64}, r"image\.codebook_size is 64 in the configuration, .* has 32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    folders: dict[str, Path], kind: str, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        open_it(folders[kind], kind, **values)


def test_a_whole_janus_model_gives_the_ids_of_its_tokenizer(
    folders: dict[str, Path], pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    from transformers import JanusConfig, JanusForConditionalGeneration

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "model_type": "llama", "intermediate_size": 16, "num_key_value_heads": 2, "vocab_size": 64}
    vision = {**small, "image_size": 16, "patch_size": 8, "projection_dim": 16, "num_image_tokens": 4, "depth": 1}
    alone = tiny_model("janus_vqvae")
    model = JanusForConditionalGeneration(
        JanusConfig(text_config=text, vision_config=vision, vq_config=alone.config.to_dict())
    )
    model.model.vqmodel.load_state_dict(alone.state_dict())
    model.save_pretrained(tmp_path)
    tokenizer, plain = open_it(tmp_path, "janus_vqvae"), open_it(folders["janus_vqvae"], "janus_vqvae")
    np.testing.assert_array_equal(tokenizer.encode(pixels), plain.encode(pixels))
    assert tokenizer.weights_sha256 == plain.weights_sha256
    tensors = weights_of(tmp_path)[1]
    rewrite(tmp_path, {**tensors, "model.vqmodel.encoder.extra.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"no place for, such as encoder\.extra\.weight"):
        open_it(tmp_path, "janus_vqvae")


def _drop(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def _add(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name + ".more"] = torch.zeros(3)


def _reshape(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = torch.zeros(1, 2, 3)


@pytest.mark.parametrize("kind", IMAGE_TYPES)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop, "lacks 1 tensors of its class, such as encoder.conv_in.weight"),
        (_add, "no place for, such as encoder.conv_in.weight.more"),
        (_reshape, "of another shape than its config says, such as encoder.conv_in.weight"),
    ],
)
def test_weights_must_be_exactly_the_classs(
    copied: Callable[[str], Path], kind: str, change: Callable[[dict[str, torch.Tensor], str], None], said: str
) -> None:
    folder = copied(kind)
    tensors = weights_of(folder)[1]
    change(tensors, "encoder.conv_in.weight")
    rewrite(folder, tensors)
    with pytest.raises(ModelError, match=said):
        open_it(folder, kind)


def test_other_folders_are_refused_with_a_sentence(copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied("janus_vqvae")
    with pytest.raises(ModelError, match=r"does not hold a Emu3VQVAE .*model_type 'janus_vqgan'"):
        open_it(folder, "emu3_vqvae")
    with pytest.raises(ModelError, match=r"does not hold a VQModel .*no _class_name"):
        open_it(folder, "diffusers_vq")
    with pytest.raises(ModelError, match="has no folder 'vae'"):
        open_it(folder, "janus_vqvae", subfolder="vae")
    with pytest.raises(ModelError, match="must lie inside"):
        open_it(folder, "janus_vqvae", subfolder="../janus_vqvae")
    with pytest.raises(ModelError, match="neither a local folder nor a hub repository"):
        open_it(Path("someone/nothing"), "janus_vqvae")
    with pytest.raises(ModelError, match=r"device 'cuda:99' can't be used"):
        open_it(folder, "janus_vqvae", device="cuda:99")
    file, tensors = weights_of(folder)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged safetensors file"):
        open_it(folder, "janus_vqvae")
    file.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds no model\.safetensors\. Only safetensors are read"):
        open_it(folder, "janus_vqvae")
    (folder / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ModelError, match="holds a JSON list"):
        open_it(folder, "janus_vqvae")


def test_the_digest_is_of_the_content_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    kind = "janus_vqvae"
    model, digest = tiny_model(kind), open_it(folders[kind], kind).weights_sha256
    model.save_pretrained(tmp_path / "cut", max_shard_size="50KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    assert open_it(tmp_path / "cut", kind).weights_sha256 == digest
    shard = sorted((tmp_path / "cut").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=rf"lacks {shard.name}, which model\.safetensors\.index\.json names"):
        open_it(tmp_path / "cut", kind)
    with torch.no_grad():
        model.decoder.conv_out.bias[0] += 1e-3
    model.save_pretrained(tmp_path / "changed")
    assert open_it(tmp_path / "changed", kind).weights_sha256 != digest
    assert open_it(folders[kind], kind, dtype="bfloat16").weights_sha256 != digest


def test_weights_stored_in_half_precision_are_used_in_single(
    copied: Callable[[str], Path], pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    kind = "janus_vqvae"
    folder = copied(kind)
    tensors = {name: tensor.half() for name, tensor in weights_of(folder)[1].items()}
    rewrite(folder, tensors)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}), encoding="utf-8")
    tokenizer = open_it(folder, kind)
    assert {parameter.dtype for parameter in tokenizer.model.parameters()} == {torch.float32}
    model = tiny_model(kind)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    np.testing.assert_array_equal(tokenizer.encode(pixels), peers_ids(kind, model, peers_pixel_values(kind, pixels)))


def test_settings_of_the_caller_change_nothing_and_stay(folders: dict[str, Path], pixels: NDArray[np.uint8]) -> None:
    tokenizer = open_it(folders["diffusers_vq"], "diffusers_vq")
    ids = tokenizer.encode(pixels)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            np.testing.assert_array_equal(tokenizer.encode(pixels), ids)
            np.testing.assert_array_equal(tokenizer.decode(ids), tokenizer.decode(ids))
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize(
    ("codes", "reason", "said"),
    [
        (np.full((1, 4, 4), SIZE), "out_of_range", r"The id 32 at \(0, 0, 0\) is not one of the codebook's 0 … 31"),
        (np.full((1, 4, 4), -1), "out_of_range", "The id -1"),
        (np.full((1, 4, 4), 2**64 - 1, np.uint64), "out_of_range", "18446744073709551615"),
        (np.zeros((1, 4, 5), np.int64), "wrong_shape", r"\(1, 4, 5\); \(any, 4, 4\)"),
        (np.zeros((4, 4), np.int64), "wrong_shape", r"\(4, 4\)"),
        (np.zeros((0, 4, 4), np.int64), "wrong_shape", r"\(0, 4, 4\)"),
        (np.zeros((1, 4, 4)), "wrong_dtype", "not float64"),
        ([[[0]]], "wrong_dtype", "not list"),
    ],
)
def test_ids_that_cannot_be_decoded(folders: dict[str, Path], codes: Any, reason: str, said: str) -> None:
    with pytest.raises(TokenError, match=said) as caught:
        open_it(folders["janus_vqvae"], "janus_vqvae").decode(codes)
    assert caught.value.reason == reason


def test_pictures_that_cannot_be_encoded(folders: dict[str, Path], pixels: NDArray[np.uint8]) -> None:
    tokenizer = open_it(folders["janus_vqvae"], "janus_vqvae")
    for wrong, reason in (
        (pixels[0], "wrong_shape"),
        (pixels[:0], "wrong_shape"),
        (pixels[:, 1:], "wrong_shape"),
        (pixels.astype(np.int16), "wrong_dtype"),
        (pixels.tolist(), "wrong_dtype"),
    ):
        with pytest.raises(TokenError) as caught:
            tokenizer.encode(wrong)
        assert caught.value.reason == reason


def test_a_pickled_tokenizer_is_opened_again_and_checked(copied: Callable[[str], Path]) -> None:
    folder = copied("diffusers_vq")
    tokenizer = open_it(folder, "diffusers_vq")
    sent = pickle.dumps(tokenizer)
    assert len(sent) < 2000  # no weights
    assert pickle.loads(sent).weights_sha256 == tokenizer.weights_sha256
    file, tensors = weights_of(folder)
    tensors["quantize.embedding.weight"][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(ModelError, match="no longer the one that was opened before"):
        pickle.loads(sent)


def test_without_diffusers_the_extra_is_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModelError, match=r"pip install 'qwen3-vlm\[diffusers\]'"):
        open_it(folders["diffusers_vq"], "diffusers_vq")
