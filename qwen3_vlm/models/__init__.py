"""Connector, model and processor; importing this registers them with the Auto classes of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from qwen3_vlm.models.configuration import Qwen3VLMConfig
from qwen3_vlm.models.processing import Qwen3VLMProcessor
from qwen3_vlm.models.projector import MLPProjector
from qwen3_vlm.models.resampler import PerceiverResampler
from qwen3_vlm.models.vlm import Qwen3VLMForConditionalGeneration, Qwen3VLMModel

AutoConfig.register(Qwen3VLMConfig.model_type, Qwen3VLMConfig, exist_ok=True)
AutoModel.register(Qwen3VLMConfig, Qwen3VLMModel, exist_ok=True)
AutoModelForImageTextToText.register(Qwen3VLMConfig, Qwen3VLMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(Qwen3VLMConfig, Qwen3VLMProcessor, exist_ok=True)
# A saved folder carries the model's source files, so that it loads with trust_remote_code where this is not installed.
Qwen3VLMConfig.register_for_auto_class()
Qwen3VLMModel.register_for_auto_class("AutoModel")
Qwen3VLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
Qwen3VLMProcessor.register_for_auto_class()

__all__ = [
    "MLPProjector",
    "PerceiverResampler",
    "Qwen3VLMConfig",
    "Qwen3VLMForConditionalGeneration",
    "Qwen3VLMModel",
    "Qwen3VLMProcessor",
]
