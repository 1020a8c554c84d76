"""Teach a frozen text-only Qwen3 to see, hear, draw and speak, by training and shipping a small add-on.

Only the public names are here. Each is imported when it is first asked for, so that `import qwen3_vlm`
costs nothing and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen3_vlm.config import RunConfig, load_config
    from qwen3_vlm.errors import Qwen3VLMError
    from qwen3_vlm.evaluate.captioning import caption_images
    from qwen3_vlm.generate.chat import Reply, chat
    from qwen3_vlm.generate.generation import generate_audio, generate_image, generate_text
    from qwen3_vlm.models import (
        MLPProjector,
        PerceiverResampler,
        Qwen3VLMConfig,
        Qwen3VLMForConditionalGeneration,
        Qwen3VLMModel,
        Qwen3VLMProcessor,
    )
    from qwen3_vlm.models.omni import OmniModel
    from qwen3_vlm.models.token_lm import TokenLM
    from qwen3_vlm.tokenization.token_space import TokenSpace
    from qwen3_vlm.tokenization.unified_tokenizer import UnifiedTokenizer
    from qwen3_vlm.train.add_ons import load_vlm
    from qwen3_vlm.train.omni_files import load_omni

__version__ = "0.1.0"

_HOMES = {
    "MLPProjector": "qwen3_vlm.models",
    "OmniModel": "qwen3_vlm.models.omni",
    "PerceiverResampler": "qwen3_vlm.models",
    "Qwen3VLMConfig": "qwen3_vlm.models",
    "Qwen3VLMError": "qwen3_vlm.errors",
    "Qwen3VLMForConditionalGeneration": "qwen3_vlm.models",
    "Qwen3VLMModel": "qwen3_vlm.models",
    "Qwen3VLMProcessor": "qwen3_vlm.models",
    "Reply": "qwen3_vlm.generate.chat",
    "RunConfig": "qwen3_vlm.config",
    "TokenLM": "qwen3_vlm.models.token_lm",
    "TokenSpace": "qwen3_vlm.tokenization.token_space",
    "UnifiedTokenizer": "qwen3_vlm.tokenization.unified_tokenizer",
    "caption_images": "qwen3_vlm.evaluate.captioning",
    "chat": "qwen3_vlm.generate.chat",
    "generate_audio": "qwen3_vlm.generate.generation",
    "generate_image": "qwen3_vlm.generate.generation",
    "generate_text": "qwen3_vlm.generate.generation",
    "load_config": "qwen3_vlm.config",
    "load_omni": "qwen3_vlm.train.omni_files",
    "load_vlm": "qwen3_vlm.train.add_ons",
}

__all__ = [
    "MLPProjector",
    "OmniModel",
    "PerceiverResampler",
    "Qwen3VLMConfig",
    "Qwen3VLMError",
    "Qwen3VLMForConditionalGeneration",
    "Qwen3VLMModel",
    "Qwen3VLMProcessor",
    "Reply",
    "RunConfig",
    "TokenLM",
    "TokenSpace",
    "UnifiedTokenizer",
    "__version__",
    "caption_images",
    "chat",
    "generate_audio",
    "generate_image",
    "generate_text",
    "load_config",
    "load_omni",
    "load_vlm",
]


def __getattr__(name: str) -> object:
    """Import a public name from where it lives; PEP 562."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
