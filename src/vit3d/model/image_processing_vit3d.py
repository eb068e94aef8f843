"""Stack -> normalised tensor with its token mask; logits -> probability."""

from numbers import Real

import numpy as np
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .configuration_vit3d import ViT3DConfig
from .foreground_vit3d import foreground, occupied_patches
from .intensity_vit3d import IntensityStatistics, check_polarity, measure, normalize

_SHARED = ("volume_size", "patch_size", "image_mean", "image_std", "prediction")  # with the network's config


class ViT3DImageProcessor(BaseImageProcessor):
    r"""Prepares grey stacks, (depth, height, width), for [`ViT3DForNeuronSegmentation`].

    Intensity statistics belong to a whole volume. Called on a crop, pass the `statistics` that `measure` gave for
    the volume it was cut from; without them the crop counts as the volume.

    Args:
        volume_size: the window the network was trained on.
        patch_size: extent of one token; stacks are padded to a multiple of it by repeating their border.
        image_mean, image_std: grey statistics the 2D source expects.
        polarity: `"auto"`, `"bright"` (fluorescence) or `"dark"` (brightfield) neurites.
        prediction: the network's: with `"center_slice"` labels are the centre slice of a map as deep as the window.
    """

    model_input_names = ["pixel_values", "token_mask"]  # noqa: RUF012 (read by transformers as it is)

    def __init__(
        self,
        volume_size=(16, 112, 112),
        patch_size=(4, 8, 8),
        image_mean: float = 0.449,
        image_std: float = 0.226,
        polarity: str = "auto",
        prediction: str = "volume",
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_polarity(polarity)
        self.volume_size = tuple(volume_size)
        self.patch_size = tuple(patch_size)
        for name, value in (("image_mean", image_mean), ("image_std", image_std)):
            if not isinstance(value, Real):
                raise ValueError(f"`{name}` must be one number, that of grey, got {value}.")
            setattr(self, name, float(value))
        self.polarity = polarity
        self.prediction = prediction
        ViT3DConfig(**{name: getattr(self, name) for name in _SHARED})  # refuses what no network could have

    @classmethod
    def from_config(cls, config, **kwargs) -> "ViT3DImageProcessor":
        """The processor that fits a network's config."""
        return cls(**{name: getattr(config, name) for name in _SHARED}, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As any processor, and with it the code: it works where vit3d is not installed."""
        from .auto_vit3d import carry_code  # here, not above: it imports this file

        carry_code(self, save_directory)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def measure(self, voxels) -> IntensityStatistics:
        """Background, noise, bright level and polarity of a whole volume."""
        return measure(voxels, self.polarity)

    def pixel_values(self, voxels, statistics: IntensityStatistics) -> np.ndarray:
        """Any voxels of the volume, float32, as the 2D source saw its photographs."""
        return normalize(voxels, statistics, self.image_mean, self.image_std)

    def foreground(self, voxels, statistics: IntensityStatistics) -> np.ndarray:
        """Voxels that may belong to a neurite; see `occupied_patches` for the tokens this keeps."""
        return foreground(voxels, statistics)

    def token_mask(self, mask: np.ndarray) -> np.ndarray:
        """(depth, height, width) bool -> (grid_depth, grid_height, grid_width) bool."""
        return occupied_patches(mask, self.patch_size)

    def preprocess(
        self,
        images,
        segmentation_maps=None,
        statistics: IntensityStatistics | None = None,
        return_tensors=None,
    ) -> BatchFeature:
        """One stack or a list of equally large ones -> `pixel_values` (batch, 1, Z, Y, X), `token_mask`, `labels`.

        segmentation_maps: one for each stack and of its shape, 1 neurite, 0 background, -100 ignored; 255 counts as 1
            where no 1 is, as masks are often stored.
        `labels` are (batch, Z, Y, X); with `prediction="center_slice"` Z is 1, of maps as deep as the window.
        ValueError: stacks of different shapes, or a map of another shape or with other values.
        """
        stacks = _as_stacks(images)
        shapes = [stack.shape for stack in stacks]
        pads = [[(0, -size % patch) for size, patch in zip(shape, self.patch_size, strict=True)] for shape in shapes]
        stacks = [np.pad(stack, pad, mode="edge") for stack, pad in zip(stacks, pads, strict=True)]
        measured = [statistics or self.measure(stack) for stack in stacks]
        pairs = list(zip(stacks, measured, strict=True))
        data = {
            "pixel_values": np.stack([self.pixel_values(*pair) for pair in pairs])[:, None],
            "token_mask": np.stack([self.token_mask(self.foreground(*pair)) for pair in pairs]),
        }
        if segmentation_maps is not None:
            maps = zip(_as_labels(segmentation_maps, shapes), pads, strict=True)
            data["labels"] = self._predicted(np.stack([np.pad(m, pad, constant_values=-100) for m, pad in maps]))
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _predicted(self, labels: np.ndarray) -> np.ndarray:
        """(batch, depth, height, width): of the labels those that the network predicts."""
        if self.prediction != "center_slice":
            return labels
        depth = self.patch_size[0]
        if labels.shape[1] != depth:
            raise ValueError(f"A centre slice is predicted from {depth} slices, got labels of {labels.shape[1]}.")
        return labels[:, depth // 2][:, None]

    def post_process_semantic_segmentation(self, outputs, target_sizes=None, threshold: float = 0.5) -> list:
        """Logits -> one bool mask (depth, height, width) per stack, cut back to `target_sizes` where given.

        ValueError: not one size per stack.
        """
        masks = outputs.logits[:, 0].sigmoid() > threshold
        sizes = target_sizes if target_sizes is not None else [mask.shape for mask in masks]
        if len(sizes) != len(masks):
            raise ValueError(f"`target_sizes` needs one size per stack: {len(masks)}, got {len(sizes)}.")
        return [mask[tuple(slice(0, n) for n in size)] for mask, size in zip(masks, sizes, strict=True)]


def _as_stacks(images) -> list[np.ndarray]:
    """One stack, a batch array or a list of stacks -> list of (depth, height, width) arrays."""
    if isinstance(images, (list, tuple)):
        stacks = [np.asarray(image) for image in images]
    else:
        array = np.asarray(images)
        stacks = [array] if array.ndim == 3 else list(array)
    shapes = {stack.shape for stack in stacks}
    if len(shapes) != 1 or any(len(shape) != 3 for shape in shapes):
        raise ValueError(f"A batch needs stacks of one shape (depth, height, width), got {sorted(shapes)}.")
    return stacks


def _as_labels(segmentation_maps, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Maps of the stacks' `shapes` -> int64 arrays of 0, 1 and -100."""
    maps = _as_stacks(segmentation_maps)
    if [labels.shape for labels in maps] != shapes:
        raise ValueError(
            f"Every stack needs a label map of its own shape: {len(shapes)} of {shapes[0]}, got {len(maps)} of "
            f"{maps[0].shape}."
        )
    for labels in maps:
        values = set(np.unique(labels).tolist())
        if not (values <= {0, 1, -100} or values <= {0, 255, -100}):
            raise ValueError(
                f"A label map holds 1 (neurite, or 255 in its place), 0 (background) and -100 (ignored), got the "
                f"values {sorted(values)[:5]}."
            )
    return [np.where(labels == 255, 1, labels).astype(np.int64) for labels in maps]
