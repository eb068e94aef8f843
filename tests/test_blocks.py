"""A volume cut into blocks and put together again is the volume, whatever its shape."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

from vit3d.model.blocks_vit3d import Block, BlockPlan
from vit3d.model.inference_vit3d import assemble

WINDOW, OVERLAP = (8, 12, 16), (2, 5, 4)
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


@pytest.fixture(params=["blend", "crop"])
def mode(request) -> str:
    return request.param


def process_blocks(array: np.ndarray, function, plan: BlockPlan) -> np.ndarray:
    """Run `function` (window -> array of the window's size) over the array, block by block."""
    return assemble(plan, ([(block, function(block.read(array)))] for block in plan), activation=torch.clone)


def added_weights(plan: BlockPlan) -> np.ndarray:
    return assemble(plan, ([(block, np.ones(plan.window))] for block in plan), activation=torch.clone)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_weights_of_all_blocks_add_up_to_one_at_every_voxel(shape, mode):
    assert_allclose(added_weights(BlockPlan(shape, WINDOW, OVERLAP, mode)), np.ones(shape), atol=1e-6)


@pytest.mark.parametrize("overlap", [(0, 0, 0), (7, 11, 15), (4, 6, 8), (5, 9, 9)])
def test_the_weights_add_up_to_one_for_any_overlap(overlap, mode):
    weights = added_weights(BlockPlan((13, 20, 27), WINDOW, overlap, mode))
    assert_allclose(weights, np.ones((13, 20, 27)), atol=1e-5)


def test_weights_are_never_negative(mode):
    plan = BlockPlan((19, 33, 41), WINDOW, (5, 9, 9), mode)
    assert min(plan.weight(block).min() for block in plan) >= 0


@pytest.mark.parametrize("shape", SHAPES)
def test_an_untouched_volume_comes_back(shape, mode):
    volume = np.random.default_rng(0).random(shape)
    result = process_blocks(volume, lambda block: block, BlockPlan(shape, WINDOW, OVERLAP, mode))
    assert_allclose(result, volume, atol=1e-6)


def test_crop_takes_every_voxel_from_one_block_as_it_is():
    volume = np.random.default_rng(0).random((21, 34, 43)).astype(np.float32)
    assert_array_equal(process_blocks(volume, np.copy, BlockPlan(volume.shape, WINDOW, OVERLAP, "crop")), volume)


@pytest.mark.parametrize("shape", [(19, 29, 40), (7, 33, 19), (3, 6, 9), (1, 30, 40)])
def test_a_function_that_sees_no_further_than_half_the_overlap_gives_the_same_block_wise_and_whole(shape):
    def smooth(array: np.ndarray) -> np.ndarray:
        return ndimage.median_filter(array, size=(3, 5, 5), mode="nearest")

    volume = np.random.default_rng(1).random(shape).astype(np.float32)
    plan = BlockPlan(shape, WINDOW, (2, 4, 4), "crop")
    assert_array_equal(process_blocks(volume, smooth, plan), smooth(volume))


def test_a_function_that_sees_further_than_the_overlap_does_not():
    def smooth(array: np.ndarray) -> np.ndarray:
        return ndimage.uniform_filter(array, size=(3, 9, 9), mode="nearest")

    volume = np.random.default_rng(1).random((31, 47, 64))
    seams = process_blocks(volume, smooth, BlockPlan(volume.shape, WINDOW, (2, 4, 4), "crop")) - smooth(volume)
    assert np.abs(seams).max() > 0.01


def test_blending_falls_linearly_over_the_overlap():
    plan = BlockPlan((1, 1, 14), (1, 1, 9), (0, 0, 4))
    first, second = (plan.weight(block)[0, 0] for block in plan)
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
    assert_allclose(added_weights(plan), np.ones(shape), atol=1e-6)
    for axis, size in enumerate(step):
        starts = sorted({block.start[axis] for block in plan})
        assert all((start - starts[0]) % size == 0 for start in starts)
        assert all(0 < b - a <= WINDOW[axis] - OVERLAP[axis] for a, b in pairwise(starts))
        assert starts[-1] + WINDOW[axis] < max(shape[axis], WINDOW[axis]) + size


def test_a_step_beyond_what_two_windows_may_lie_apart_is_refused():
    with pytest.raises(ValueError, match=r"A `step` of \(4, 8, 13\) leaves windows of \(8, 12, 16\) less than"):
        BlockPlan((30, 30, 30), WINDOW, OVERLAP, step=(4, 8, 13))


def test_a_block_that_reaches_beyond_the_volume_repeats_its_border():
    volume = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    block = Block((-1, -2, 1), (4, 4, 5))
    assert_array_equal(block.read(volume), np.pad(volume, [(1, 1), (2, 0), (0, 2)], mode="edge")[:, :4, 1:])


def test_a_block_left_out_counts_as_zeros():
    plan = BlockPlan((8, 12, 40), WINDOW, (0, 0, 0), "crop")
    first, *_ = plan
    result = assemble(plan, [[(first, np.ones(WINDOW))]], activation=torch.clone)
    assert result[..., :14].all()
    assert not result[..., 14:].any()


def test_as_many_blocks_come_as_are_announced():
    plan = BlockPlan((31, 47, 64), WINDOW, OVERLAP)
    assert len(list(plan)) == len(plan) == 5 * 6 * 5


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="`mode` must be 'blend' or 'crop', got 'hann'"):
        BlockPlan((8, 8, 8), WINDOW, OVERLAP, "hann")


@pytest.mark.parametrize("overlap", [(8, 0, 0), (0, -1, 0)])
def test_an_overlap_as_large_as_the_window_is_refused(overlap):
    with pytest.raises(ValueError, match="must be at least 0 and smaller than `window`"):
        BlockPlan((8, 8, 8), WINDOW, overlap)
