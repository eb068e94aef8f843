"""Each variation of a crop does what its name says, and leaves alone what it must."""

from typing import NamedTuple

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

from vit3d import ViT3DImageProcessor
from vit3d.learning.augmentation import Augmentation, resample, vary_geometry, vary_intensity, vary_orientation
from vit3d.model.intensity_vit3d import IntensityStatistics, measure

NOTHING = Augmentation.none()


class Stack(NamedTuple):
    voxels: np.ndarray
    neurite: np.ndarray
    statistics: IntensityStatistics


def fibre(noise: float = 0.0, *, dark: bool = False) -> Stack:
    """A fibre slanted in every axis, of grey level 200 on 20; or on a bright ground."""
    shape = (20, 60, 70)
    z, y, x = np.indices(shape)
    neurite = np.hypot(z - shape[0] * (0.3 + 0.4 * x / 70), y - shape[1] * (0.2 + 0.5 * x / 70)) < 2
    voxels = np.where(neurite, 200.0, 20.0) + np.random.default_rng(0).normal(0, noise, shape)
    voxels = np.clip(255 - voxels if dark else voxels, 0, 255).astype(np.uint8)
    return Stack(voxels, neurite, measure(voxels))


def varied(stack: Stack, augmentation: Augmentation, seed: int = 0):
    return vary_intensity(stack.voxels, stack.statistics, np.random.default_rng(seed), augmentation)


def light_of(stack: Stack, augmentation: Augmentation, seed: int = 0) -> np.ndarray:
    """The varied stack: 0 in the background, 1 where the processor shows it fully bright."""
    voxels, statistics = varied(stack, augmentation, seed)
    return (voxels - statistics.background) * statistics.sign / statistics.contrast


# --- where voxels lie ---


def test_an_orientation_is_the_same_for_all_arrays():
    marker = np.zeros((4, 6, 6))
    marker[0, 1, 4] = 1
    places = set()
    for seed in range(60):
        one, other = vary_orientation((marker, marker * 2), np.random.default_rng(seed))
        assert_array_equal(other, one * 2)
        assert one.sum() == 1
        places.add(tuple(np.argwhere(one)[0].tolist()))
    assert len(places) == 2 * 8 / 2  # two flips in z; in the plane (1, 4) lies on a diagonal: four places


def test_a_window_that_is_not_square_is_not_transposed():
    shapes = {vary_orientation((np.zeros((4, 6, 8)),), np.random.default_rng(seed))[0].shape for seed in range(20)}
    assert shapes == {(4, 6, 8)}


def test_a_rotated_crop_is_the_neuron_rotated():
    """A straight fibre through the centre comes out straight, at the angle by which the crop was turned."""
    window = (4, 32, 32)
    for seed in range(8):
        matrix, read = vary_geometry(window, np.random.default_rng(seed), Augmentation.none(rotate=1))
        y, x = (np.arange(n) - (n - 1) / 2 for n in read[1:])
        stack = np.broadcast_to(np.hypot(y[:, None], 0 * x) < 1.5, read)
        turned = resample(stack, matrix, window, smooth=False)
        assert turned.dtype == bool
        points = np.argwhere(turned[2]) - 15.5
        direction = np.linalg.svd(points - points.mean(0), full_matrices=False)[2][0]
        along = matrix[1:, 1:].T @ np.array([0.0, 1.0])  # the stack's x axis, as the crop sees it
        assert abs(direction @ along) == pytest.approx(1, abs=0.01)
        assert points.mean(0) == pytest.approx([0, 0], abs=0.2)


def test_a_stretched_crop_shows_more_or_fewer_slices():
    window, steps = (8, 16, 16), []
    for seed in range(12):
        matrix, read = vary_geometry(window, np.random.default_rng(seed), Augmentation.none(stretch=1))
        assert read[1:] == window[1:]
        z = np.broadcast_to(np.arange(read[0], dtype=np.float32)[:, None, None], read)
        seen = resample(z, matrix, window, smooth=True)[:, 8, 8]
        assert_allclose(np.diff(seen), matrix[0, 0], rtol=1e-4)
        assert seen.mean() == pytest.approx((read[0] - 1) / 2, abs=1e-4)
        steps.append(matrix[0, 0])
    assert min(steps) < 0.8
    assert max(steps) > 1.25


@pytest.mark.parametrize("seed", range(4))
def test_a_turned_and_stretched_crop_is_the_affine_transform_of_its_stack(seed):
    window, rng = (8, 24, 20), np.random.default_rng(seed)
    matrix, read = vary_geometry(window, rng, Augmentation.none(rotate=1, stretch=1))
    stack = rng.random(read, np.float32)
    offset = (np.array(read) - 1) / 2 - matrix @ ((np.array(window) - 1) / 2)
    for order in (0, 1):
        expected = ndimage.affine_transform(stack, matrix, offset, window, order=order, mode="nearest")
        assert_allclose(resample(stack, matrix, window, smooth=order == 1), expected, atol=1e-5)


# --- how bright they are ---


def test_another_exposure_keeps_dark_apart_from_bright():
    stack, processor = fibre(), ViT3DImageProcessor()
    levels = set()
    for seed in range(40):
        values = processor.pixel_values(*varied(stack, Augmentation.none(expose=1, noise=0.5, gamma=0.5), seed))
        assert np.percentile(values[stack.neurite], 5) > np.percentile(values[~stack.neurite], 95)
        levels.add(round(float(np.median(values[stack.neurite])), 3))
    assert len(levels) > 3


def test_without_variation_a_crop_is_the_stack_as_the_processor_shows_it():
    stack, processor = fibre(noise=3), ViT3DImageProcessor()
    seen, statistics = processor.pixel_values(*varied(stack, NOTHING)), varied(stack, NOTHING)[1]
    assert statistics.noise / statistics.contrast == pytest.approx(stack.statistics.noise / stack.statistics.contrast)
    assert_allclose(seen, processor.pixel_values(stack.voxels, stack.statistics), atol=1e-4)


@pytest.mark.parametrize("dark", [False, True])
def test_what_was_never_imaged_stays_background_in_every_other_microscope(dark):
    stack = fibre(2.0, dark=dark)
    voxels = np.pad(stack.voxels.astype(np.uint16) + 500, ((0, 0), (6, 0), (0, 0)))
    framed = Stack(voxels, np.pad(stack.neurite, ((0, 0), (6, 0), (0, 0))), measure(voxels))
    assert framed.statistics.fill == 0
    shown = ViT3DImageProcessor(image_mean=0.0, image_std=1.0).pixel_values(*varied(framed, NOTHING))
    assert not shown.squeeze()[:, :6].any()
    assert abs(light_of(framed, Augmentation.none(polarity=1.0, expose=1.0))[:, :6]).max() < 0.1


def test_a_probability_is_one():
    with pytest.raises(ValueError, match=r"`blur` is a probability, from 0 to 1; got 1\.5"):
        Augmentation(blur=1.5)


def test_noise_adds_noise_and_blur_takes_it_away():
    stack = fibre(noise=10)
    each = (NOTHING, Augmentation.none(noise=1), Augmentation.none(blur=1))
    spread = [[light_of(stack, one, seed)[~stack.neurite].std() for seed in range(5)] for one in each]
    plain, noisy, blurred = np.mean(spread, axis=1)
    assert noisy > plain * 1.02
    assert blurred < plain * 0.8


def test_gamma_keeps_the_ends_and_moves_what_is_between():
    statistics = fibre().statistics
    ramp = np.linspace(statistics.background, statistics.bright, 8).reshape(1, 1, 8)
    middles = set()
    for seed in range(10):
        light = vary_intensity(ramp, statistics, np.random.default_rng(seed), Augmentation.none(gamma=1))[0]
        assert_allclose(light.ravel()[[0, -1]], [0, 1], atol=1e-5)
        assert (np.diff(light.ravel()) > 0).all()
        middles.add(round(float(light.ravel()[4]), 3))
    assert min(middles) < 0.5 < max(middles)


def test_dropped_slices_are_blank_or_repeat_their_neighbour():
    stack = fibre(noise=5)
    kinds = set()
    for seed in range(40):
        light, whole = light_of(stack, Augmentation.none(drop_slices=1), seed), light_of(stack, NOTHING)
        changed = [z for z in range(len(light)) if not np.array_equal(light[z], whole[z])]
        assert 1 <= len(changed) <= 2
        for z in changed:
            kinds.add("blank" if not light[z].any() else "repeated")
            assert not light[z].any() or (z > 0 and np.array_equal(light[z], light[z - 1]))
    assert kinds == {"blank", "repeated"}


@pytest.mark.parametrize("polarity", ["bright", "dark"])
def test_the_other_polarity_is_another_curve_through_the_same_ends(polarity):
    """A brightfield neuron is dark on bright ground, and the processor turns it back: 0 ground, 1 neurite."""
    stack = fibre(dark=polarity == "dark")
    assert stack.statistics.polarity == polarity
    grey, statistics = varied(stack, Augmentation.none(polarity=1))
    assert statistics.polarity == {"bright": "dark", "dark": "bright"}[polarity]
    assert (grey[stack.neurite].mean() < grey[~stack.neurite].mean()) == (polarity == "bright")
    ramp = np.linspace(stack.statistics.background, stack.statistics.bright, 9).reshape(1, 3, 3)
    ramps = Stack(ramp, ramp > 0, stack.statistics)
    one, other = (light_of(ramps, how).ravel() for how in (NOTHING, Augmentation.none(polarity=1)))
    assert_allclose(other[[0, -1]], [0, 1], atol=1e-5)
    assert (np.diff(other) > 0).all()
    assert other[4] > 0.55 if polarity == "bright" else np.allclose(one, other, atol=1e-5)


def test_far_below_the_ground_the_other_polarity_is_still_a_number():
    stack = fibre()
    hole = Stack(stack.voxels - 300.0 * stack.statistics.contrast, stack.neurite, stack.statistics)
    assert np.isfinite(light_of(hole, Augmentation.none(polarity=1))).all()


def test_exposure_moves_brightness_and_black_level():
    stack = fibre()
    lights = [light_of(stack, Augmentation.none(expose=1), seed) for seed in range(10)]
    plain = light_of(stack, NOTHING)[stack.neurite].mean()
    brightness = [light[stack.neurite].mean() / plain for light in lights]
    assert min(brightness) < 0.8
    assert max(brightness) > 1.2


# --- what is no neurite ---


def far_from(neurite: np.ndarray) -> np.ndarray:
    return ndimage.distance_transform_edt(~neurite) > 8


def test_a_crowd_glows_smoothly_and_takes_no_light_away():
    stack = fibre()
    for seed in range(5):
        added = light_of(stack, Augmentation.none(crowd=1), seed) - light_of(stack, NOTHING)
        assert added.min() >= -1e-6
        assert 0.1 < added.max() < 2
        assert np.abs(np.diff(added, axis=2)).max() < 0.2 * added.max()


def test_stripes_run_along_one_axis_in_the_plane_and_slices_are_of_unlike_brightness():
    stack, ratios, slices = fibre(noise=1), [], []
    ground = far_from(stack.neurite).all(axis=0)
    for seed in range(20):
        light = light_of(stack, Augmentation.none(stripes=1), seed)
        rows, columns = (np.median(light, axis).std(axis=-1).mean() for axis in (1, 2))
        ratios.append(rows / columns)
        slices.append(light[:, ground].mean(axis=1).std())
        assert abs(np.median(light[far_from(stack.neurite)])) < 0.05
    assert np.mean([max(ratio, 1 / ratio) for ratio in ratios]) > 2
    assert max(slices) > 5 * light_of(stack, NOTHING)[:, ground].mean(axis=1).std()


def test_speckle_is_strongest_where_light_is_and_keeps_its_mean():
    stack = fibre()
    for seed in range(5):
        factors = light_of(stack, Augmentation.none(speckle=1), seed) / np.maximum(light_of(stack, NOTHING), 1e-9)
        on, off = factors[stack.neurite], light_of(stack, Augmentation.none(speckle=1), seed)[far_from(stack.neurite)]
        assert abs(on.mean() - 1) < 0.3
        assert on.std() > max(0.15, off.std())


def test_texture_is_noise_whose_neighbours_are_alike():
    stack, beside = fibre(), []
    for seed in range(5):
        noise = (light_of(stack, Augmentation.none(texture=1), seed) - light_of(stack, NOTHING))[5]
        beside.append(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1])
        assert 0.005 < noise.std() < 0.25
    assert min(beside) > 0.1
    assert np.mean(beside) > 0.3


def test_sharpening_leaves_a_halo_beside_the_neurite_and_nothing_far_away():
    stack = fibre()
    plain = light_of(stack, NOTHING)
    even = Stack(np.full((6, 9, 9), stack.statistics.bright), stack.neurite, stack.statistics)
    beside = ndimage.binary_dilation(stack.neurite, iterations=2) & ~ndimage.binary_dilation(stack.neurite)
    for seed in range(5):
        light = light_of(stack, Augmentation.none(sharpen=1), seed)
        assert_allclose(light_of(even, Augmentation.none(sharpen=1), seed), 1, atol=1e-5)
        assert light[beside].mean() < plain[beside].mean() - 0.05
        assert light[stack.neurite].mean() > plain[stack.neurite].mean()
        assert_allclose(light[far_from(stack.neurite)], plain[far_from(stack.neurite)], atol=0.1)


def test_neighbours_are_dim_and_as_sharp_as_the_neurite_and_lie_elsewhere():
    stack = fibre()
    far, plain = far_from(stack.neurite), light_of(stack, NOTHING)
    sharpness = np.abs(np.diff(plain, axis=2)).max() / plain.max()
    for seed in range(5):
        added = light_of(stack, Augmentation.none(neighbours=1), seed) - plain
        assert added.min() >= -1e-6
        assert 0.03 < added.max() < 0.6
        assert (added[far] > 0.5 * added.max()).any()
        assert np.abs(np.diff(added, axis=2)).max() > 0.5 * sharpness * added.max()
