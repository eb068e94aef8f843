"""Soft clDice: what a centreline is, and what a gap in it costs."""

import pytest
import torch

from vit3d.learning.cldice import ITERATIONS, soft_cldice_loss, soft_skeleton
from vit3d.model.modeling_vit3d import segmentation_loss

SHAPE = (1, 1, 12, 16, 40)


def bar(radius: int = 2, gap: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """A straight neurite along x, 2 * radius + 1 voxels thick, with a piece missing."""
    volume = torch.zeros(SHAPE)
    volume[..., 6 - radius : 7 + radius, 8 - radius : 9 + radius, 4:36] = 1
    volume[..., gap[0] : gap[1]] = 0
    return volume


def logits_of(volume: torch.Tensor) -> torch.Tensor:
    return 40 * (volume - 0.5)


@pytest.mark.parametrize("radius", [1, 2, 3, ITERATIONS])
def test_the_skeleton_of_a_bar_is_its_axis(radius):
    skeleton = soft_skeleton(bar(radius))[0, 0]
    axis = torch.zeros_like(skeleton)
    axis[6, 8, 4 + radius : 36 - radius] = 1
    assert torch.equal(skeleton[:, :, 8:32], axis[:, :, 8:32])
    assert 0 <= skeleton.min() <= skeleton.max() <= 1


def test_a_thin_neurite_is_its_own_skeleton():
    assert torch.equal(soft_skeleton(bar(0)), bar(0))


def test_the_truth_costs_nothing_and_the_opposite_all():
    labels = bar()[:, 0].long()
    assert soft_cldice_loss(logits_of(bar()), labels) < 1e-4
    assert soft_cldice_loss(logits_of(1 - bar()), labels) > 0.9


def test_a_gap_costs_more_than_as_many_voxels_at_the_surface():
    """Dice cannot tell these two apart."""
    labels = bar()[:, 0].long()
    broken, thinner = bar(gap=(19, 21)), bar()
    thinner[..., 4, 8, 4:36] = 0  # 32 voxels and then 18: as many as the gap's 50
    thinner[..., 4, 7, 4:22] = 0
    assert broken.sum() == thinner.sum()
    whole = [float(segmentation_loss(logits_of(v), labels)) for v in (broken, thinner)]
    assert whole[0] == pytest.approx(whole[1], rel=1e-3)
    assert soft_cldice_loss(logits_of(broken), labels) > 3 * soft_cldice_loss(logits_of(thinner), labels)


def test_of_one_annotated_slice_the_skeleton_is_that_of_a_plane():
    """A row that is missing at the surface costs next to nothing there, too."""
    labels = torch.full((1, *SHAPE[2:]), -100)
    labels[:, 6] = bar()[:, 0, 6].long()
    known = (labels != -100)[:, None]
    plane = soft_skeleton(bar()[:, :, 6:7], ITERATIONS)
    assert torch.equal(soft_skeleton(bar(), ITERATIONS, known)[:, :, 6:7], plane)
    assert not soft_skeleton(bar(), ITERATIONS, known)[~known].any()
    thinner = bar()
    thinner[..., 6, 4:36] = 0
    assert soft_cldice_loss(logits_of(thinner), labels) < 0.01


@pytest.mark.parametrize("radius", [1, 2, 3])
def test_a_neurite_whose_rim_is_ignored_is_missed_as_one_without(radius):
    """So `training_labels` leaves what is thicker than its golds say."""
    labels = bar(radius)[:, 0].long()
    labels[(bar(radius + 2)[:, 0] == 1) & (labels == 0)] = -100
    assert soft_cldice_loss(logits_of(torch.zeros(SHAPE)), labels) > 0.9


def test_what_is_ignored_costs_nothing_and_teaches_nothing():
    labels = bar()[:, 0].long()
    labels[..., 24:] = -100
    logits = logits_of(bar()).requires_grad_()
    soft_cldice_loss(logits, labels).backward()
    assert (logits.grad[..., 24:] == 0).all()
    changed = logits.detach().clone()
    changed[..., 24:] = torch.randn_like(changed[..., 24:])
    assert soft_cldice_loss(changed, labels) == soft_cldice_loss(logits.detach(), labels)


def test_descending_it_closes_a_gap():
    labels = bar(1)[:, 0].long()
    logits = (4 * (bar(1, gap=(18, 22)) - 0.5)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for _ in range(30):
        optimizer.zero_grad()
        soft_cldice_loss(logits, labels).backward()
        optimizer.step()
    assert (logits.detach()[0, 0, 6, 8, 5:35] > 0).all()


def test_a_single_slice_works_too():
    labels = bar()[:, 0, 6:7].long()
    assert soft_cldice_loss(logits_of(bar()[:, :, 6:7]), labels) < 1e-4


def test_nothing_anywhere_costs_nothing():
    nothing = torch.zeros(SHAPE)
    assert soft_cldice_loss(logits_of(nothing), nothing[:, 0].long()) < 1e-4
