"""Windows cover a volume, whatever its shape, and share what was asked."""

from itertools import pairwise

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from vit3d.model.blocks_vit3d import Block, BlockPlan

WINDOW, OVERLAP = (8, 12, 16), (2, 5, 4)
VOXEL = (1, 1, 1)
SHAPES = [
    (1, 1, 1),
    (7, 33, 19),
    (8, 12, 16),
    (9, 13, 17),
    (3, 40, 16),
    (20, 2, 50),
    (5, 5, 5),
    (31, 47, 64),
]


def added_weights(plan: BlockPlan) -> np.ndarray:
    """What the weights of all windows add up to at each voxel."""
    total = np.zeros(plan.shape)
    for block in plan:
        inside = block.inside(plan.shape)
        crop = tuple(slice(i.start - s, i.stop - s) for i, s in zip(inside, block.start, strict=True))
        total[inside] += plan.weights(block, VOXEL)[crop]
    return total


@pytest.mark.parametrize("shape", SHAPES)
def test_every_voxel_has_weight_and_where_no_more_than_two_windows_meet_along_an_axis_one_in_all(shape):
    total = added_weights(BlockPlan(shape, WINDOW, OVERLAP))
    assert total.min() > 0.2
    assert_allclose(np.median(total), 1, atol=1e-6)


@pytest.mark.parametrize("overlap", [(0, 0, 0), (7, 11, 15), (4, 6, 8), (5, 9, 9)])
def test_no_weight_is_zero_for_any_overlap(overlap):
    plan = BlockPlan((13, 20, 27), WINDOW, overlap)
    assert min(plan.weights(block, VOXEL).min() for block in plan) > 0 or not all(overlap)
    assert added_weights(plan).min() > 0


def test_the_weight_of_a_patch_is_the_mean_of_its_voxels():
    plan = BlockPlan((19, 33, 41), WINDOW, OVERLAP)
    for block in plan:
        voxels = plan.weights(block, VOXEL).reshape(2, 4, 3, 4, 2, 8)
        assert_allclose(plan.weights(block, (4, 4, 8)), voxels.mean(axis=(1, 3, 5)), rtol=1e-5)


def test_weights_fall_linearly_over_the_overlap():
    plan = BlockPlan((1, 1, 14), (1, 1, 9), (0, 0, 4))
    first, second = (plan.weights(block, VOXEL)[0, 0] for block in plan)
    assert_allclose(first, [1, 1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125], atol=1e-6)
    assert_allclose(second, first[::-1], atol=1e-6)


@pytest.mark.parametrize("extent", [9, 17, 30, 31, 100])
def test_windows_lie_inside_a_larger_volume_and_overlap_as_much_as_was_asked(extent):
    starts = [block.start[0] for block in BlockPlan((extent, 12, 16), WINDOW, OVERLAP)]
    assert starts[0] == 0
    assert starts[-1] + WINDOW[0] == extent
    assert all(0 < b - a <= WINDOW[0] - OVERLAP[0] for a, b in pairwise(starts))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", [(4, 3, 2), (2, 7, 8)])
def test_windows_begin_a_whole_number_of_steps_apart_and_still_cover_and_share_what_was_asked(shape, step):
    plan = BlockPlan(shape, WINDOW, OVERLAP, step=step)
    assert added_weights(plan).min() > 0
    for axis, size in enumerate(step):
        starts = sorted({block.start[axis] for block in plan})
        assert starts[0] == plan.first[axis]
        assert all((start - starts[0]) % size == 0 for start in starts)
        assert all(0 < b - a <= WINDOW[axis] - OVERLAP[axis] for a, b in pairwise(starts))
        assert starts[-1] + WINDOW[axis] < max(shape[axis], WINDOW[axis]) + size


def test_a_step_beyond_what_two_windows_may_lie_apart_is_refused():
    with pytest.raises(ValueError, match=r"A `step` of \(4, 8, 13\) leaves windows of \(8, 12, 16\) less than"):
        BlockPlan((30, 30, 30), WINDOW, OVERLAP, step=(4, 8, 13))


def test_a_volume_smaller_than_a_window_lies_in_its_middle():
    assert BlockPlan((4, 12, 7), WINDOW, OVERLAP).first == (-2, 0, -4)


def test_a_block_that_reaches_beyond_the_volume_repeats_its_border():
    volume = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    block = Block((-1, -2, 1), (4, 4, 5))
    assert_array_equal(block.read(volume), np.pad(volume, [(1, 1), (2, 0), (0, 2)], mode="edge")[:, :4, 1:])


def test_as_many_blocks_come_as_are_announced():
    plan = BlockPlan((31, 47, 64), WINDOW, OVERLAP)
    assert len(list(plan)) == len(plan) == 5 * 6 * 5


@pytest.mark.parametrize("overlap", [(8, 0, 0), (0, -1, 0)])
def test_an_overlap_as_large_as_the_window_is_refused(overlap):
    with pytest.raises(ValueError, match="must be at least 0 and smaller than `window`"):
        BlockPlan((8, 8, 8), WINDOW, overlap)
