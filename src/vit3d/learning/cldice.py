"""Soft clDice: how much of each centreline lies in the other mask, made differentiable.

After S. Shit et al., "clDice - a Novel Topology-Preserving Loss Function for Tubular Structure Segmentation",
CVPR 2021. Dice counts voxels, so a gap of two voxels costs next to nothing; here it costs its share of the length.
"""

import torch
from torch.nn import functional

ITERATIONS = 4  # erosions: a neurite of up to this radius in voxels is thinned to its centreline
_IGNORED = -100


def soft_cldice_loss(logits: torch.Tensor, labels: torch.Tensor, iterations: int = ITERATIONS) -> torch.Tensor:
    """1 - clDice over the whole batch, of the voxels that are not labelled -100.

    logits (batch, 1, depth, height, width), labels (batch, depth, height, width).
    """
    known = (labels != _IGNORED).unsqueeze(1)
    probability = logits.float().sigmoid() * known
    target = (labels == 1).unsqueeze(1).float()
    annotated = known.any(-1, keepdim=True).any(-2, keepdim=True).expand_as(known)  # slices of which anything is known
    found, true = (soft_skeleton(image, iterations, annotated) for image in (probability, target))
    precision = ((found * target).sum() + 1) / (found.sum() + 1)
    sensitivity = ((true * probability).sum() + 1) / (true.sum() + 1)
    return 1 - 2 * precision * sensitivity / (precision + sensitivity)


def soft_skeleton(image: torch.Tensor, iterations: int = ITERATIONS, known: torch.Tensor | None = None) -> torch.Tensor:
    """What opening takes away, collected over repeated erosions: (batch, 1, depth, height, width) in [0, 1].

    Voxels that are not `known` (bool, as large) are as what lies outside: of one annotated slice the skeleton is that
    of a plane.
    """
    known = torch.ones_like(image, dtype=torch.bool) if known is None else known
    skeleton = functional.relu(image - _opened(image, known)) * known
    for _ in range(iterations):
        image = _eroded(image, known)
        ridge = functional.relu(image - _opened(image, known)) * known
        skeleton = skeleton + ridge * (1 - skeleton)
    return skeleton


def _opened(image: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    return functional.max_pool3d(_eroded(image, known) * known, 3, stride=1, padding=1)


def _eroded(image: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Minimum over a voxel and its six neighbours; outside there is nothing that could be smaller."""
    image, along = torch.where(known, image, 1.0), []
    for axis in range(3):
        size = [3 if axis == a else 1 for a in range(3)]
        along.append(functional.max_pool3d(-image, size, stride=1, padding=[n // 2 for n in size]))
    return -torch.stack(along).amax(0)
