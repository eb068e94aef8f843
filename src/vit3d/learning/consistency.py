"""How far two windows differ in what they say of the patches that both see.

`segment` cuts a stack into windows; where a voxel's probability depends on the window it was computed in, they show as
seams. The less it does, the fewer patches must neighbours share, each of which is computed again.
"""

import torch
from torch.nn import functional

from ..model.packing_vit3d import to_patches


def disagreement(
    logits: torch.Tensor, token_mask: torch.Tensor, places: torch.Tensor, patch: tuple[int, int, int]
) -> torch.Tensor:
    """How far two windows' probabilities diverge from their mean, in nats per voxel of the patches that both keep.

    Its gradient draws each logit by what its probability is off the mean: neither window is taken at its word, and
    what both doubt stays in doubt. The mere difference of the probabilities would draw most to the surer one. 0 where
    they share nothing.

    Args:
        logits: (2 * pairs, 1, depth, height, width), the windows of a pair one after the other.
        token_mask: (2 * pairs, grid_depth, grid_height, grid_width) bool.
        places: (2 * pairs, 3), at which patch (z, y, x) of what they are cut from the windows begin.
        patch: voxels that a token paints.
    """
    painted = to_patches(logits.float(), patch)  # (2 * pairs, patches, voxels)
    grid = torch.tensor(token_mask.shape[1:], device=logits.device)
    patches = torch.cartesian_prod(*(torch.arange(n, device=logits.device) for n in token_mask.shape[1:]))
    there = patches + (places[0::2] - places[1::2])[:, None]  # (pairs, patches, 3): the first's, in the second
    inside = ((there >= 0) & (there < grid)).all(dim=2)
    depth, row, column = there.minimum(grid - 1).clamp(min=0).unbind(dim=2)
    index = (depth * grid[1] + row) * grid[2] + column
    kept = token_mask.flatten(1)
    both = inside & kept[0::2] & kept[1::2].gather(1, index)
    one, other = painted[0::2], painted[1::2].gather(1, index[..., None].expand(-1, -1, painted.shape[2]))
    mean = ((one.sigmoid() + other.sigmoid()) / 2).detach()
    entropies = [functional.binary_cross_entropy_with_logits(logit, mean, reduction="none") for logit in (one, other)]
    apart = sum(entropies) / 2 - torch.special.entr(mean) - torch.special.entr(1 - mean)
    return (apart.mean(dim=2) * both).sum() / both.sum().clamp(min=1)
