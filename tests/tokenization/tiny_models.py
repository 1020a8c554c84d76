"""Tiny models of the six tokenizer classes, seeded, saved to disk like pretrained ones.

Fresh weights of these classes hardly let a signal through, and some codebooks start at zero: here weights
keep the signal's size, and codebooks lie where random inputs are, so that inputs get ids all over the codebook.
"""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    DacConfig,
    DacModel,
    Emu3VQVAE,
    Emu3VQVAEConfig,
    EncodecConfig,
    EncodecModel,
    JanusVQVAE,
    JanusVQVAEConfig,
    MimiConfig,
    MimiModel,
)

IMAGE_TYPES = ("janus_vqvae", "emu3_vqvae", "diffusers_vq")
AUDIO_TYPES = ("encodec", "dac", "mimi")
SIZE = 32  # codebook size of all of them
SIDE = 16  # pixels


def tiny_model(kind: str, **changes: Any) -> Any:
    """An unsaved model; `changes` go into its config."""
    torch.manual_seed(0)
    model = _BUILDERS[kind](changes).eval()
    _keep_signals(model)
    with torch.no_grad():
        _spread_codebooks(kind, model)
    return model


def save_tiny(folder: Path, kind: str, **changes: Any) -> Path:
    """A folder as `save_pretrained` leaves it."""
    tiny_model(kind, **changes).save_pretrained(folder)
    return folder


def weights_of(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The weight file of a folder and copies of its tensors (`load_file` alone leaves them in the file)."""
    (file,) = folder.glob("*.safetensors")
    return file, {name: tensor.clone() for name, tensor in load_file(file).items()}


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Put other tensors into the weight file of a folder."""
    file, _ = weights_of(folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def _janus(changes: dict[str, Any]) -> nn.Module:
    sizes = {"embed_dim": 4, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1, 1]}
    return JanusVQVAE(
        JanusVQVAEConfig(**{**sizes, "num_embeddings": SIZE, "num_res_blocks": 1, "num_patches": SIDE // 4, **changes})
    )


def _emu3(changes: dict[str, Any]) -> nn.Module:
    sizes = {"base_channels": 32, "channel_multiplier": [1, 1], "attn_resolutions": [1], "hidden_size": 32}
    return Emu3VQVAE(
        Emu3VQVAEConfig(
            **{**sizes, "codebook_size": SIZE, "num_res_blocks": 1, "temporal_downsample_factor": 2, **changes}
        )
    )


def _diffusers(changes: dict[str, Any]) -> nn.Module:
    from diffusers import VQModel

    sizes = {"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 4, "num_vq_embeddings": SIZE}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return VQModel(**{**sizes, **blocks, **changes})


def _encodec(changes: dict[str, Any]) -> nn.Module:
    sizes = {"num_filters": 4, "hidden_size": 16, "upsampling_ratios": [4, 2], "num_lstm_layers": 1}
    rates = {"sampling_rate": 800, "target_bandwidths": [0.5, 1.0, 2.0]}  # 1, 2 and 4 codebooks of 500 bits a second
    return EncodecModel(EncodecConfig(**{**sizes, **rates, "codebook_size": SIZE, **changes}))


def _dac(changes: dict[str, Any]) -> nn.Module:
    sizes = {"encoder_hidden_size": 4, "decoder_hidden_size": 16, "downsampling_ratios": [2, 4], "codebook_dim": 4}
    return DacModel(DacConfig(**{**sizes, "n_codebooks": 3, "codebook_size": SIZE, "sampling_rate": 800, **changes}))


def _mimi(changes: dict[str, Any]) -> nn.Module:
    sizes = {"hidden_size": 16, "num_filters": 4, "upsampling_ratios": [4, 2], "codebook_dim": 8, "upsample_groups": 16}
    transformer = {"num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    quantizer = {"vector_quantization_hidden_dimension": 8, "num_quantizers": 4, "codebook_size": SIZE}
    return MimiModel(
        MimiConfig(**{**sizes, **transformer, **quantizer, "sampling_rate": 800, "sliding_window": 6, **changes})
    )


_BUILDERS = {
    "janus_vqvae": _janus,
    "emu3_vqvae": _emu3,
    "diffusers_vq": _diffusers,
    "encodec": _encodec,
    "dac": _dac,
    "mimi": _mimi,
}


def _keep_signals(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d)):
            fan_in = module.weight[0].numel()
            if isinstance(module, nn.ConvTranspose1d):
                fan_in = module.weight.shape[0] * module.kernel_size[0] // module.stride[0]
            with torch.no_grad():
                module.weight = (
                    nn.Parameter(torch.randn_like(module.weight) * fan_in**-0.5)
                    if not hasattr(module, "parametrizations")
                    else module.weight
                )
                if hasattr(module, "parametrizations"):
                    module.weight = torch.randn_like(module.weight) * fan_in**-0.5


def _spread_codebooks(kind: str, model: Any) -> None:
    """Codebook entries become latents of noise, one codebook after the other."""
    generator = torch.Generator().manual_seed(1)
    if kind in IMAGE_TYPES:
        rows = _image_latents(kind, model, torch.rand(8, 3, SIDE, SIDE, generator=generator) * 2 - 1)
        model.quantize.embedding.weight.copy_(rows[torch.randperm(len(rows), generator=generator)[:SIZE]])
        return
    channels = 1 if kind == "dac" else model.config.audio_channels
    sound = torch.rand(8, channels, 512, generator=generator) * 2 - 1
    if kind == "dac":
        residual = model.encoder(sound)
        for layer in model.quantizer.quantizers:
            layer.codebook.weight.copy_(_picks(layer.in_proj(residual), generator))
            residual = residual - layer(residual)[0]
    elif kind == "encodec":
        _spread_residual(model.quantizer.layers, model.encoder(sound), "embed", generator)
    else:
        latents = model.encoder(sound).latents
        for part in ("semantic", "acoustic"):
            quantizer = getattr(model.quantizer, f"{part}_residual_vector_quantizer")
            _spread_residual(quantizer.layers, quantizer.input_proj(latents), "embed_sum", generator)


def _image_latents(kind: str, model: Any, pixels: Tensor) -> Tensor:
    if kind == "janus_vqvae":
        latents = model.quant_conv(model.encoder(pixels))
    elif kind == "emu3_vqvae":
        latents = model.quant_conv(model.encoder(pixels[:, None].repeat(1, 2, 1, 1, 1)).transpose(1, 2))[:, :, 0]
    else:
        latents = model.encode(pixels).latents
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


def _spread_residual(layers: Any, residual: Tensor, buffer: str, generator: torch.Generator) -> None:
    for layer in layers:
        getattr(layer.codebook, buffer).copy_(_picks(residual, generator))
        residual = residual - layer.decode(layer.encode(residual))


def _picks(latents: Tensor, generator: torch.Generator) -> Tensor:
    rows = latents.transpose(1, 2).flatten(0, 1)
    return rows[torch.randperm(len(rows), generator=generator)[:SIZE]]
