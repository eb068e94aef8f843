"""Patches of a volume, and rows of those that are kept: padded to one length, or packed without padding."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch.nn import functional

LIKE_LENGTHS = 16  # windows whose numbers of tokens differ by less are padded to attend together


def to_patches(volume: torch.Tensor, patch_size: tuple[int, int, int]) -> torch.Tensor:
    """(batch, channels, depth, height, width) -> (batch, num_patches, channels * voxels of a patch), x fastest."""
    for axis, patch in zip((2, 4, 6), patch_size, strict=True):
        volume = volume.unflatten(axis, (-1, patch))
    # (batch, channels, gz, pz, gy, py, gx, px) -> (batch, gz, gy, gx, channels, pz, py, px)
    return volume.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def from_patches(patches: torch.Tensor, grid_size: tuple[int, int, int], patch_size) -> torch.Tensor:
    """(batch, num_patches, channels * voxels of a patch) -> (batch, channels, depth, height, width)."""
    volume = patches.unflatten(2, (-1, *patch_size)).unflatten(1, grid_size)
    # (batch, gz, gy, gx, channels, pz, py, px) -> (batch, channels, gz, pz, gy, py, gx, px)
    volume = volume.permute(0, 4, 1, 5, 2, 6, 3, 7)
    return volume.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def pack_tokens(token_mask: torch.Tensor, max_tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, num_patches) bool -> indices of the kept patches, padded by patches left out, and which are real.

    Rows are as long as the longest, or `max_tokens` long: the shape is then known before the mask is, so that
    `torch.compile` gets one graph. A row that keeps more fails.
    """
    if max_tokens is None:
        max_tokens = max(1, int(token_mask.sum(1).max()))
    else:
        torch._assert_async(
            token_mask.sum(1).max() <= max_tokens, f"`token_mask` keeps more than {max_tokens} patches."
        )
    indices = token_mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :max_tokens]
    return indices, token_mask.gather(1, indices)


@dataclass(frozen=True, eq=False)
class LikeWindows:
    """Windows of like length, which are padded to attend together.

    rows: (windows, length) where their tokens lie among the packed ones; padding repeats class tokens.
    real: which of them are no padding, the same shape; None where all are.
    places: of the real ones, in `rows` laid flat.
    """

    rows: torch.Tensor
    real: torch.Tensor | None
    places: torch.Tensor
    attention_mask: torch.Tensor | None = None  # as the attention that is used takes it

    def to(self, device, **options) -> "LikeWindows":
        """Accelerate moves what it can so call to the device of the next layer."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: t.to(device, **options) for name, t in tensors.items() if t is not None})

    def attend(self, attention: Callable, module, query, key, value, context, **kwargs) -> None:
        """Put their part of the (tokens, heads, head_dim) `context` where it belongs."""
        states = (some[self.rows].transpose(1, 2) for some in (query, key, value))
        found, _ = attention(module, *states, self.attention_mask, **kwargs)
        context[self.rows.flatten()[self.places]] = found.flatten(0, 1)[self.places]


@dataclass(frozen=True, eq=False)
class PackedWindows:
    """Where the tokens of several windows lie when none is padded: their class tokens, then all kept patches, window by
    window in raster order. `places`: (patches,) of each its index in the grid of its window."""

    num_windows: int
    grid_size: tuple[int, int, int]
    places: torch.Tensor
    groups: list[LikeWindows]

    @classmethod
    def of(cls, token_mask: torch.Tensor, device: torch.device) -> "PackedWindows":
        """token_mask: (windows, grid_depth, grid_height, grid_width) bool; on a CPU nothing is waited for."""
        kept = token_mask.flatten(1).cpu()
        count, groups = kept.sum(1), []
        first = len(kept) + count.cumsum(0) - count  # row of each window's first patch
        alike = count.div(LIKE_LENGTHS, rounding_mode="floor")
        for number in alike.unique():
            windows = (alike == number).nonzero()
            along = torch.arange(int(count[windows].max()))
            real = functional.pad(along < count[windows], (1, 0), value=True)
            rows = torch.cat([windows, first[windows] + along], dim=1).where(real, windows)
            places = real.flatten().nonzero()[:, 0]
            groups.append(LikeWindows(rows, None if real.all() else real, places).to(device))
        return cls(len(kept), tuple(token_mask.shape[1:]), kept.nonzero()[:, 1].to(device), groups)


def packed_attention_forward(attention: Callable, groups: list[LikeWindows], module, query, key, value, _, **kwargs):
    """Attention within packed windows, (1, heads, tokens, head_dim) each, by whichever function attends among padded
    ones."""
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # (tokens, heads, head_dim)
    context = torch.empty_like(query)
    for group in groups:
        group.attend(attention, module, query, key, value, context, **kwargs)
    return context[None], None
