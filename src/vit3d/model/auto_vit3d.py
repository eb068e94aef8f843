"""Registers vit3d with the Auto classes of transformers."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation

from .configuration_vit3d import ViT3DConfig
from .image_processing_vit3d import ViT3DImageProcessor
from .modeling_vit3d import ViT3DForNeuronSegmentation, ViT3DModel


def register() -> None:
    """Make `AutoModel.from_pretrained` and its siblings know `model_type = "vit3d"`; harmless when repeated."""
    AutoConfig.register(ViT3DConfig.model_type, ViT3DConfig, exist_ok=True)
    AutoModel.register(ViT3DConfig, ViT3DModel, exist_ok=True)
    AutoModelForSemanticSegmentation.register(ViT3DConfig, ViT3DForNeuronSegmentation, exist_ok=True)
    AutoImageProcessor.register(ViT3DConfig, image_processor_classes={"pil": ViT3DImageProcessor}, exist_ok=True)


def mark_for_upload(model: ViT3DForNeuronSegmentation) -> None:
    """Let `save_pretrained` carry the code and an `auto_map` for every Auto class, not only the saved one's."""
    ViT3DConfig.register_for_auto_class()
    ViT3DForNeuronSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
    ViT3DImageProcessor.register_for_auto_class("AutoImageProcessor")
    model.config.auto_map = {"AutoModel": "modeling_vit3d.ViT3DModel"}
