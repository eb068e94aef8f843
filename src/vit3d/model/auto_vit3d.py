"""What transformers is told about vit3d: its Auto classes, its pipeline, and the code that every checkpoint carries."""

import shutil
from pathlib import Path

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_vit3d import ViT3DConfig
from .image_processing_vit3d import ViT3DImageProcessor
from .modeling_vit3d import ViT3DForNeuronSegmentation, ViT3DModel
from .pipeline_vit3d import TASK, NeuronSegmentationPipeline

_HERE = Path(__file__).parent


def register() -> None:
    """Make the Auto classes and `pipeline` know vit3d without `trust_remote_code`; harmless when repeated."""
    AutoConfig.register(ViT3DConfig.model_type, ViT3DConfig, exist_ok=True)
    AutoModel.register(ViT3DConfig, ViT3DModel, exist_ok=True)
    AutoModelForSemanticSegmentation.register(ViT3DConfig, ViT3DForNeuronSegmentation, exist_ok=True)
    AutoImageProcessor.register(ViT3DConfig, image_processor_classes={"pil": ViT3DImageProcessor}, exist_ok=True)
    if TASK not in PIPELINE_REGISTRY.supported_tasks:  # a second time is said to be one
        PIPELINE_REGISTRY.register_pipeline(TASK, NeuronSegmentationPipeline, (AutoModelForSemanticSegmentation,))


def carry_code(saved: ViT3DConfig | ViT3DImageProcessor, folder: str | Path) -> None:
    """Put the code into `folder`, and into `saved`, which is about to be written there, where each class is.

    Such a folder works where vit3d is not installed, whatever else is saved into it or not. The checkpoints inside
    the package carry nothing: they are beside the code.
    """
    folder = Path(folder).resolve()
    if _HERE.parent.resolve() in folder.parents:
        return
    saved.auto_map = {
        "AutoConfig": _place_of(ViT3DConfig),
        "AutoModel": _place_of(ViT3DModel),
        "AutoModelForSemanticSegmentation": _place_of(ViT3DForNeuronSegmentation),
        "AutoImageProcessor": _place_of(ViT3DImageProcessor),
    }
    if isinstance(saved, ViT3DConfig):
        entry = {"impl": _place_of(NeuronSegmentationPipeline), "pt": [AutoModelForSemanticSegmentation.__name__]}
        saved.custom_pipelines = {TASK: entry}
    folder.mkdir(parents=True, exist_ok=True)
    for module in _HERE.glob("*_vit3d.py"):
        if not (folder / module.name).exists() or not module.samefile(folder / module.name):
            shutil.copyfile(module, folder / module.name)


def _place_of(cls: type) -> str:
    return f"{cls.__module__.split('.')[-1]}.{cls.__name__}"
