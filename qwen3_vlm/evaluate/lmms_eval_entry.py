"""What lmms-eval finds under the entry point group `lmms_eval.models`: where the model class is, and no more.

It is loaded whenever lmms-eval starts, for whatever model, so it imports nothing large.
"""

from typing import Any

MODEL_ID = "qwen3_vlm"
MODULE = "qwen3_vlm.lmms_eval_model"


def manifest() -> Any:
    """The `ModelManifest` of `lmms-eval --model qwen3_vlm`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=MODEL_ID,
        simple_class_path=f"{MODULE}.Qwen3VLMSimple",
        chat_class_path=f"{MODULE}.Qwen3VLMChat",
    )
