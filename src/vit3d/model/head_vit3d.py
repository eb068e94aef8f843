"""The head: every token paints its own patch, and two small convolutions join that with the raw image."""

import math

import torch
from torch import nn
from torch.nn import functional

from .configuration_vit3d import ViT3DConfig
from .packing_vit3d import from_patches, pack_tokens

BACKGROUND_LOGIT = -10.0  # painted where a patch was left out
HALO = 2  # voxels that the head's two 3x3x3 convolutions look beyond a patch


class ViT3DHeadConvolution(nn.Conv3d):
    """3 x 3 x 3, with the weights of He et al. 2015 to begin with."""


class ViT3DClassifier(nn.Conv3d):
    """Features -> logits; to begin with, of what is rare."""


class ViT3DHead(nn.Module):
    """Every token paints its patch; two small convolutions join that with the raw image.

    Context reaches a voxel only through its tokens: the stem and the mixing convolution see `HALO` voxels.
    """

    def __init__(self, config: ViT3DConfig):
        super().__init__()
        self.config = config
        channels = config.head_channels
        fused = len(config.fused_layers) * config.hidden_size
        self.layernorm = nn.LayerNorm(fused, eps=config.layer_norm_eps)
        self.painter = nn.Linear(fused, channels * math.prod(config.painted_size))
        self.stem = ViT3DHeadConvolution(config.num_channels, channels, kernel_size=3)
        self.mix = ViT3DHeadConvolution(2 * channels, 2 * channels, kernel_size=3)
        self.classifier = ViT3DClassifier(2 * channels, config.num_labels, kernel_size=1)

    def forward(
        self,
        tokens: torch.Tensor,
        pixel_values: torch.Tensor,
        token_mask: torch.Tensor | None,
        max_tokens: int | None = None,
    ) -> torch.Tensor:
        """Tokens as `fuse` gives them (batch, kept patches, fused) -> logits (batch, labels, depth, height, width)."""
        grid_size = tuple(n // p for n, p in zip(pixel_values.shape[2:], self.config.patch_size, strict=True))
        raw = self._with_halo(pixel_values)
        if token_mask is None:
            painted = from_patches(self.painter(tokens), grid_size, self.config.painted_size)
            return self._join(functional.pad(painted, (1,) * 6), raw).float()
        indices, real = pack_tokens(token_mask.flatten(1), max_tokens)
        rows = torch.arange(len(indices), device=indices.device).unsqueeze(1).expand_as(indices)
        places, tokens, real = torch.stack([rows, indices]).flatten(1), tokens.flatten(0, 1), real.flatten()
        if max_tokens is None:  # shapes may follow the mask; else padding is computed, and then painted as background
            places, tokens, real = places[:, real], tokens[real], real[real]
        kept = torch.stack([places[0], *torch.unravel_index(places[1], grid_size)])
        table = torch.full((len(indices), *(n + 2 for n in grid_size)), len(tokens), device=indices.device)
        row, z, y, x = kept
        table[row, z + 1, y + 1, x + 1] = torch.arange(len(tokens), device=indices.device).where(real, len(tokens))
        patches = self.paint(self.features(tokens), table, kept, self._raw_windows(raw, kept)).flatten(1)
        logits = patches.new_full((len(indices), math.prod(grid_size), patches.shape[1]), BACKGROUND_LOGIT)
        logits[places[0], places[1]] = patches.where(real[:, None], BACKGROUND_LOGIT)
        return from_patches(logits, grid_size, self.config.painted_size)

    def fuse(self, states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What the head paints from: an encoder's `fused_states` -> (batch, kept patches, fused)."""
        return self.layernorm(torch.cat(states, dim=-1))

    def features(self, tokens: torch.Tensor) -> torch.Tensor:
        """(patches, fused) -> what each token paints, (patches + 1, voxels, channels); the last patch is zero."""
        painted = self.painter(tokens).unflatten(1, (-1, math.prod(self.config.painted_size)))
        return functional.pad(painted.transpose(1, 2), (0, 0, 0, 0, 0, 1))

    def paint(self, features: torch.Tensor, table: torch.Tensor, kept: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
        """Logits of patches that lie anywhere, (patches, labels, pz, py, px), fp32.

        Args:
            features: of these patches and of those around them, as `features` gives them.
            table: (rows, gz + 2, gy + 2, gx + 2), where in `features` the patch of a place is, with a border of one
                patch around the grid; that of the last, zero one where none is painted. Rows do not see one another.
            kept: (4, patches), row and place of each patch, without the border.
            raw: (patches, channels, pz + 4, py + 4, px + 4), its normalised voxels and a halo of 2.
        """
        return self._join(self._painted_windows(features, table, kept), raw).float()

    def _with_halo(self, raw: torch.Tensor) -> torch.Tensor:
        """The stack, its border repeated `HALO` times; with `center_slice` only what the centre slice's halo needs."""
        raw = functional.pad(raw, (HALO,) * 6, mode="replicate")
        if self.config.prediction != "center_slice":
            return raw
        centre = self.config.patch_size[0] // 2
        return raw[:, :, centre : centre + 2 * HALO + 1]

    def _raw_windows(self, raw: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Raw voxels of the kept patches with their halo: (patches, channels, pz + 4, py + 4, px + 4)."""
        row, *corner = kept
        axes = []
        for axis, (position, size) in enumerate(zip(corner, self.config.painted_size, strict=True)):
            voxels = position[:, None] * size + torch.arange(size + 2 * HALO, device=raw.device)
            axes.append(voxels.view(len(voxels), *[size + 2 * HALO if a == axis else 1 for a in range(3)]))
        return raw.movedim(1, -1)[row.view(-1, 1, 1, 1), axes[0], axes[1], axes[2]].movedim(-1, 1)

    def _painted_windows(self, features: torch.Tensor, table: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Painted features of the kept patches with a halo of 1 from their neighbours, zero where nothing is painted.

        -> (patches, channels, pz + 2, py + 2, px + 2); the work follows the kept patches, not the window.
        """
        size = self.config.painted_size
        row, z, y, x = (index.view(-1, 1, 1, 1) for index in kept)
        spans = [torch.arange(-1, n + 1, device=features.device) for n in size]
        grids = torch.meshgrid(*spans, indexing="ij")
        oz, oy, ox = (g.div(n, rounding_mode="floor") + 1 for g, n in zip(grids, size, strict=True))
        dz, dy, dx = (g % n for g, n in zip(grids, size, strict=True))
        voxels = math.prod(size)
        index = table[row, z + oz, y + oy, x + ox] * voxels + (dz * size[1] + dy) * size[2] + dx
        return functional.embedding(index, features.flatten(0, 1)).movedim(-1, 1)

    def _join(self, painted: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
        """Painted features with a halo of 1 and raw voxels with a halo of 2 -> logits without halo."""
        features = torch.cat([painted, functional.gelu(self.stem(raw))], dim=1)
        return self.classifier(functional.gelu(self.mix(features)))
