"""vit3d: a 3D Vision Transformer that turns a light-microscopy stack of a neuron into its tree (SWC).

Public names are resolved on first use (PEP 562), so `import vit3d` loads neither torch nor numpy.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "ViT3DConfig": "model.configuration_vit3d",
    "ViT3DModel": "model.modeling_vit3d",
    "ViT3DForNeuronSegmentation": "model.modeling_vit3d",
    "ViT3DImageProcessor": "model.image_processing_vit3d",
    "Volume": "volume",
    "open_volume": "volume",
    "read_volume": "volume",
    "write_volume": "volume",
    "NeuronTree": "tree",
    "read_swc": "tree",
    "write_swc": "tree",
    "segment": "segmentation",
    "trace": "tracing",
    "reconstruct": "reconstruction",
    "load_checkpoint": "checkpoint",
    "score_trees": "scoring",
    "score_masks": "scoring",
    "simulate_neuron": "simulate",
    "BigNeuron": "bigneuron",
    "load_bigneuron": "bigneuron",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'vit3d' has no attribute {name!r}")
    value = getattr(import_module(f"vit3d.{_HOMES[name]}"), name)
    if _HOMES[name].startswith("model."):
        import_module("vit3d.model.auto_vit3d").register()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
