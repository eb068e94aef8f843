"""The 2D ViT that a network starts from, a Hub id or a folder: its config, its weights, or why it is none."""

import re
from pathlib import Path

import torch
from transformers import AutoConfig, ViTModel
from transformers.image_processing_base import ImageProcessingMixin

from .configuration_vit3d import ViT3DConfig


def vit_config(source: str):
    """The 2D source's config, or a sentence saying why it is none."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`source` {source!r} is neither a folder with a 2D ViT nor a model that the Hub gives out now."
        ) from error
    except Exception as error:
        raise _broken(source, error) from error
    if config.model_type != "vit":
        raise ValueError(
            f"`source` {source!r} is a {config.model_type!r} model, not a 'vit' (such as facebook/dino-vitb16 or "
            "facebook/deit-tiny-patch16-224)."
        )
    return config


def vit_state(source: str) -> dict[str, torch.Tensor]:
    """The 2D source's weights, fp32; all that its config asks for, and of the sizes that it says."""
    try:
        encoder, report = ViTModel.from_pretrained(
            source,
            add_pooling_layer=False,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise _broken(source, error) from error
    if misfits := sorted(key[0] for key in report["mismatched_keys"]):
        raise ValueError(f"`source` {source!r} has weights of other sizes than its config says: {misfits[:3]}.")
    if report["missing_keys"]:
        raise ValueError(f"`source` {source!r} lacks weights of a ViT: {sorted(report['missing_keys'])}.")
    if surplus := sorted(key for key in report["unexpected_keys"] if re.search(r"\blayers?\.\d", key)):
        raise ValueError(f"`source` {source!r} has layers that its config does not say: {surplus[:3]}.")
    return encoder.state_dict()


def inflated_config(source: str, vit, patch_size, overrides: dict) -> ViT3DConfig:
    """The 3D config that fits a 2D source: its architecture, its input statistics, its position table."""
    try:
        inherited = _inherited_fields(source, vit)
        ViT3DConfig(**inherited)  # what is wrong without the caller's own fields is wrong with the source
    except Exception as error:
        raise _broken(source, error) from error
    patch_size = tuple(patch_size) if isinstance(patch_size, tuple | list) else (patch_size,)
    return ViT3DConfig(**{**inherited, "patch_size": patch_size, **overrides})


def _inherited_fields(source: str, vit) -> dict:
    shared = (
        "hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act hidden_dropout_prob "
        "attention_probs_dropout_prob initializer_range layer_norm_eps qkv_bias"
    )
    inherited = {name: getattr(vit, name) for name in shared.split()}
    inherited["position_grid"] = tuple(
        n // p for n, p in zip(_pair(vit.image_size), _pair(vit.patch_size), strict=True)
    )
    layers = vit.num_hidden_layers
    inherited["fused_layers"] = tuple(sorted({max(1, round(layers * k / 4)) for k in (1, 2, 3, 4)}))
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except OSError:
        if Path(source, "preprocessor_config.json").is_file():
            raise  # a broken one
        processor = {}  # a bare checkpoint: the config's defaults are ImageNet's, which DINO and DeiT use
    for name in ("image_mean", "image_std"):
        if (values := processor.get(name)) is not None:
            values = values if isinstance(values, list) else [values]
            inherited[name] = sum(values) / len(values)
    return inherited


def _broken(source: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()).rstrip(".")
    return ValueError(f"`source` {source!r} cannot be read as a 2D ViT ({type(error).__name__}: {reason}).")


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
