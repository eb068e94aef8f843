"""Patches of a volume, and rows of those that are kept: padded to one length, or packed without padding."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers.masking_utils import create_bidirectional_mask

MOST_PADDED, FREE_PADDING = 1.25, 4  # windows attend together that have at most so many times the fewest patches, and 4


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
class _LikeWindows:
    """Windows of like length, which attend together.

    rows: (windows, length) where their tokens lie among the packed ones; padding repeats class tokens.
    real: which of them are no padding, the same shape; None where all are.
    places: of the real ones, in `rows` laid flat.
    span: of the tokens, where all are real and lie side by side: nothing is then copied.
    """

    rows: torch.Tensor
    real: torch.Tensor | None
    places: torch.Tensor
    span: slice | None
    attention_mask: torch.Tensor | None = None  # as the attention that is used takes it

    @classmethod
    def of(cls, windows: torch.Tensor, first: torch.Tensor, count: torch.Tensor) -> "_LikeWindows":
        """windows: (windows,) their numbers. first, count: of every window its class token's row, its patches."""
        first, count = first[windows, None], count[windows, None]
        along = torch.arange(1 + int(count.max()))
        real = along <= count
        rows = (first + along).where(real, first)
        side_by_side = bool(real.all()) and bool((first[1:] == first[:-1] + len(along)).all())
        span = slice(int(first[0]), int(first[0]) + rows.numel()) if side_by_side else None
        return cls(rows, None if real.all() else real, real.flatten().nonzero()[:, 0], span)

    def to(self, device, **options) -> "_LikeWindows":
        named = ("rows", "real", "places", "attention_mask")
        tensors = {name: getattr(self, name) for name in named if getattr(self, name) is not None}
        return replace(self, **{name: tensor.to(device, **options) for name, tensor in tensors.items()})

    def padded(self, states: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, head_dim) -> (windows, heads, length, head_dim)"""
        rows = states[self.rows] if self.span is None else states[self.span].unflatten(0, self.rows.shape)
        return rows.transpose(1, 2)

    def put(self, found: torch.Tensor, context: torch.Tensor) -> None:
        """What they found, (windows, length, heads, head_dim), where it belongs among all tokens."""
        if self.span is None:
            context[self.rows.flatten()[self.places]] = found.flatten(0, 1)[self.places]
        else:
            context[self.span] = found.flatten(0, 1)


@dataclass(frozen=True, eq=False)
class PackedWindows:
    """Where the tokens of several windows lie when none is padded: window by window its class token, then its kept
    patches in raster order.

    places: (patches,) of each its index in the grid of its window. order: (tokens,) of each its index among the
    class token and then all patches. patch_rows: (patches,) where among the tokens each lies.
    """

    grid_size: tuple[int, int, int]
    places: torch.Tensor
    order: torch.Tensor
    patch_rows: torch.Tensor
    groups: list[_LikeWindows]

    @classmethod
    @torch.compiler.disable
    def of(cls, token_mask: torch.Tensor) -> "PackedWindows":
        """token_mask: (windows, grid_depth, grid_height, grid_width) bool. On the CPU, where all its numbers are asked
        for; `to` moves it."""
        kept = token_mask.flatten(1).cpu()
        count = kept.sum(1)
        first = (1 + count).cumsum(0) - 1 - count
        is_patch = torch.ones(int((1 + count).sum()), dtype=torch.bool)
        is_patch[first] = False
        order = torch.empty(len(is_patch), dtype=torch.long)
        order[~is_patch] = 0
        order[is_patch] = torch.arange(1, 1 + int(count.sum()))
        groups = [_LikeWindows.of(windows, first, count) for windows in _alike(count)]
        grid_size, places = tuple(token_mask.shape[1:]), kept.nonzero()[:, 1]
        return cls(grid_size, places, order, is_patch.nonzero()[:, 0], groups)

    @torch.compiler.disable
    def to(self, device, **options) -> "PackedWindows":
        """Accelerate moves so what a layer on another device is given."""
        tensors = {name: getattr(self, name).to(device, **options) for name in ("places", "order", "patch_rows")}
        return replace(self, **tensors, groups=[group.to(device, **options) for group in self.groups])

    @torch.compiler.disable
    def masked(self, config, hidden_states: torch.Tensor) -> "PackedWindows":
        """With the attention masks that these tokens (1, tokens, hidden) need; the same for all layers."""
        groups = []
        for group in self.groups:
            padded = hidden_states.new_empty(()).expand(*group.rows.shape, hidden_states.shape[-1])  # for its shape
            mask = create_bidirectional_mask(config=config, inputs_embeds=padded, attention_mask=group.real)
            groups.append(replace(group, attention_mask=mask))
        return replace(self, groups=groups)

    @torch.compiler.disable
    def attend(self, attention: Callable, module, query, key, value, _, **kwargs):
        """Attention within each window, by whichever function attends among padded ones; (1, heads, tokens, head_dim)
        each -> (1, tokens, heads, head_dim)."""
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
        context = torch.empty_like(query)
        for group in self.groups:
            states = map(group.padded, (query, key, value))
            group.put(attention(module, *states, group.attention_mask, **kwargs)[0], context)
        return context[None], None


def _alike(count: torch.Tensor) -> list[torch.Tensor]:
    """Windows of like number of patches: the largest has at most so many times those of the smallest, and a few."""
    order = count.argsort(stable=True)
    starts, least = [], -1.0
    for place, patches in enumerate(count[order].tolist()):
        if not starts or patches > MOST_PADDED * least + FREE_PADDING:
            starts.append(place)
            least = patches
    return list(order.tensor_split(starts[1:]))
