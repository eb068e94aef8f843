"""What the network is."""

import math
from pathlib import Path

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

FROM_THE_HUB = __name__.startswith("transformers_modules.")  # run with `trust_remote_code`, not from the package


@strict
class ViT3DConfig(PreTrainedConfig):
    r"""Configuration of [`ViT3DModel`] and [`ViT3DForNeuronSegmentation`]; the defaults are `vit3d-tiny`'s.

    All sizes are in voxels and in (depth, height, width) order.

    Args:
        volume_size: the window the network is trained on and `segment` uses, in whole patches. A checkpoint can be
            loaded with another height and width, not with another depth: its depth embedding has a row per patch.
        patch_size: extent of one token. With `prediction="center_slice"` its depth is the window's depth.
        num_channels: channels of the stack. `forward` takes any number, `segment` and the image processor one.
        prediction: `"volume"`, the whole block at once, or `"center_slice"`, the paper's mode: a 2D grid of
            tokens that paints the window's centre slice.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act, hidden_dropout_prob,
            attention_probs_dropout_prob, initializer_range, layer_norm_eps, qkv_bias: as in the 2D ViT.
        position_grid: rows and columns of the 2D source's position table.
        fused_layers: encoder depths (1 = after the first layer) whose tokens the head paints from.
        head_channels: feature channels that a token paints per voxel, and that the raw-image stem adds.
        image_mean, image_std: grey statistics of the photographs the 2D source was trained on.
        training_spacing_um: voxel spacing (z, y, x) of the training stacks, where known.
    """

    model_type = "vit3d"

    volume_size: list[int] | tuple[int, ...] = (16, 112, 112)
    patch_size: list[int] | tuple[int, ...] = (4, 8, 8)
    num_channels: int = 1
    prediction: str = "volume"
    hidden_size: int = 192
    num_hidden_layers: int = 12
    num_attention_heads: int = 3
    intermediate_size: int = 768
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    position_grid: list[int] | tuple[int, ...] = (14, 14)
    fused_layers: list[int] | tuple[int, ...] = (3, 6, 9, 12)
    head_channels: int = 8
    image_mean: float = 0.449
    image_std: float = 0.226
    training_spacing_um: list[float] | tuple[float, ...] | None = None

    def __post_init__(self, **kwargs):
        for name in ("volume_size", "patch_size", "position_grid", "fused_layers", "training_spacing_um"):
            value = getattr(self, name)
            setattr(self, name, tuple(value) if value is not None else None)  # JSON has no tuples
        if "num_labels" not in kwargs:
            kwargs.setdefault("id2label", {0: "neurite"})
            kwargs.setdefault("label2id", {"neurite": 0})
        if not FROM_THE_HUB:
            kwargs.pop("custom_pipelines", None)  # ours is registered; the entry would ask for `trust_remote_code`
        super().__post_init__(**kwargs)
        for validate in (self.validate_sizes, self.validate_prediction, self.validate_numbers, self.validate_layers):
            validate()  # `strict` does it too, but wraps the sentence in an error that is no ValueError

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs):
        """As any config, and with it the code, so that every save of a network works where vit3d is not installed."""
        from .auto_vit3d import carry_code  # here, not above: it imports this file

        carry_code(self, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def grid_size(self) -> tuple[int, int, int]:
        """Tokens per axis in one window."""
        return tuple(size // patch for size, patch in zip(self.volume_size, self.patch_size, strict=True))

    @property
    def painted_size(self) -> tuple[int, int, int]:
        """Voxels that one token paints: its patch, or the patch's centre slice."""
        return (1, *self.patch_size[1:]) if self.prediction == "center_slice" else self.patch_size

    @property
    def output_size(self) -> tuple[int, int, int]:
        """Voxels predicted from one window."""
        return (1, *self.volume_size[1:]) if self.prediction == "center_slice" else self.volume_size

    def validate_sizes(self):
        if len(self.volume_size) != 3 or len(self.patch_size) != 3:
            raise ValueError(
                f"`volume_size` {self.volume_size} and `patch_size` {self.patch_size} need three numbers, (Z, Y, X)."
            )
        if min(self.patch_size) < 1:
            raise ValueError(f"`patch_size` {self.patch_size} must be at least 1 on every axis (Z, Y, X).")
        if any(size < 1 or size % patch for size, patch in zip(self.volume_size, self.patch_size, strict=True)):
            nearest = tuple(max(1, round(s / p)) * p for s, p in zip(self.volume_size, self.patch_size, strict=True))
            raise ValueError(
                f"`volume_size` {self.volume_size} must be a multiple of `patch_size` {self.patch_size} on every axis "
                f"(Z, Y, X); the nearest that fits is {nearest}."
            )

    def validate_prediction(self):
        if self.prediction not in ("volume", "center_slice"):
            raise ValueError(f"`prediction` must be 'volume' or 'center_slice', got {self.prediction!r}.")
        if self.prediction == "center_slice" and self.patch_size[0] != self.volume_size[0]:
            raise ValueError(
                f"With `prediction='center_slice'` a patch is as deep as the window: `patch_size` {self.patch_size} "
                f"needs depth {self.volume_size[0]}."
            )

    def validate_numbers(self):
        for name in ("hidden_size", "intermediate_size", "num_channels", "head_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is a probability, from 0 to 1; got {getattr(self, name)}.")
        for name in ("image_std", "layer_norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if not math.isfinite(self.image_mean):
            raise ValueError(f"`image_mean` must be a number, got {self.image_mean}.")

    def validate_layers(self):
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` {self.hidden_size} must divide by `num_attention_heads` {self.num_attention_heads}."
            )
        if len(self.position_grid) != 2 or min(self.position_grid) < 1:
            raise ValueError(f"`position_grid` {self.position_grid} must be two numbers, rows and columns.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` {self.hidden_act!r} is no activation that transformers knows.")
        if not self.fused_layers or not all(1 <= depth <= self.num_hidden_layers for depth in self.fused_layers):
            raise ValueError(
                f"`fused_layers` {self.fused_layers} must lie between 1 and {self.num_hidden_layers}, the last layer."
            )
