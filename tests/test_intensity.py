"""What grey levels mean does not depend on how the stack was stored, and never on where a block lies."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

from vit3d.model.foreground_vit3d import _BESIDE, BESIDE_FACTOR, _beside, foreground, occupied_patches
from vit3d.model.ground_vit3d import BLUR_VOX, blur, blur_halo, ground_of_cells
from vit3d.model.intensity_vit3d import (
    FAINT_SHARE,
    LEAST_FACTOR,
    NOISE_FACTOR,
    IntensityStatistics,
    _median,
    measure,
    normalize,
)

PATCH = (4, 8, 8)


def neurite(noise: float = 0.0, background: float = 0.0) -> np.ndarray:
    """(24, 64, 80) uint8: a bright curved fibre of width 3, blurred, on an even ground."""
    z, y, x = np.indices((24, 64, 80))
    axis = np.hypot(y - 32 - 12 * np.sin(x / 12), z - 12) < 1.6
    light = background + 200 * ndimage.gaussian_filter(axis.astype(float), 0.7)
    light += np.random.default_rng(0).normal(0, noise, light.shape)
    return np.clip(np.rint(light), 0, 255).astype(np.uint8)


def test_the_blur_is_a_gaussian_truncated_at_three_sigma():
    voxels = np.random.default_rng(0).random((12, 20, 25))
    expected = ndimage.gaussian_filter(voxels, BLUR_VOX, mode="nearest", truncate=3)
    assert_allclose(blur(voxels), expected, rtol=1e-3)


def test_the_blur_is_the_same_whatever_tiles_it_is_made_of(monkeypatch):
    voxels = np.random.default_rng(0).random((20, 40, 50)).astype(np.float32)
    whole = blur(voxels)
    monkeypatch.setattr("vit3d.model.ground_vit3d._TILE", (4, 16, 32))
    assert_array_equal(blur(voxels), whole)


@pytest.mark.parametrize(
    "make",
    [
        lambda rng: rng.normal(0, 1, 300_001),
        lambda rng: rng.normal(0, 1, 300_000).clip(0, None),  # half of them, and so the middle, are equal
        lambda rng: np.sort(rng.normal(0, 1, 300_000)),
        lambda rng: np.arange(300_000) % 4 < 2,  # what the sample sees is not what there is
        lambda rng: np.zeros(1),
    ],
)
def test_the_median_that_counts_is_the_median(make):
    values = make(np.random.default_rng(0)).astype(np.float32)
    assert _median(values) == np.median(values)


@pytest.mark.parametrize("polarity", ["bright", "dark"])
def test_what_is_never_blurred_holds_no_neurite(polarity, monkeypatch):
    """The mask of a stack that is blurred everywhere, with spots at the faces and corners of cells."""
    monkeypatch.setattr("vit3d.model.ground_vit3d._TILE", (4, 16, 16))
    voxels = np.full((20, 70, 90), 100.0, dtype=np.float32)
    z, y, x = np.array([(3, 15, 15), (4, 16, 16), (0, 0, 0), (19, 69, 89), (11, 33, 47), (12, 31, 80)]).T
    voxels[z, y, x] += 200.0 if polarity == "bright" else -200.0
    statistics = IntensityStatistics(100, 1, 200 if polarity == "bright" else 0, polarity)
    mask = foreground(voxels, statistics)
    rise = (blur(voxels) - 100) * statistics.sign
    clear = rise > statistics.threshold
    assert clear.sum() > 6
    beside = np.kron(_beside(clear), np.ones(_BESIDE, dtype=bool))[tuple(map(slice, clear.shape))]
    assert_array_equal(mask, clear | (beside & (rise > BESIDE_FACTOR * statistics.noise)))


def test_a_blurred_voxel_looks_exactly_as_far_as_the_halo():
    halo = blur_halo()
    spot = np.zeros((15, 15, 15))
    spot[7, 7, 7] = 1
    reach = np.argwhere(blur(spot) > 0)
    assert_array_equal(reach.min(0), 7 - np.array(halo))
    assert_array_equal(reach.max(0), 7 + np.array(halo))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_ground_is_what_lies_between_neurites_that_fill_nearly_half_of_the_cells(sign):
    neurite = np.random.default_rng(0).random((9, 9, 9)) < 0.45
    ground = ground_of_cells(sign * np.where(neurite, 100, 10).astype(np.float32), sign, sign * np.inf)
    assert np.median(ground) == sign * 10


def test_a_cleaned_background_leaves_bounds_that_differ_and_noise_of_one_grey_level():
    voxels = neurite()
    assert np.percentile(voxels, 95) == 0
    statistics = measure(voxels)
    assert (statistics.background, statistics.noise, statistics.polarity) == (0, 1, "bright")
    assert 50 < statistics.bright <= 255
    found = foreground(voxels, statistics)
    assert found[voxels > 100].all()
    assert found.mean() < 0.05


@pytest.mark.parametrize("high", [1, 3, 12, 255])
def test_a_mask_shows_its_neurite_whatever_it_is_marked_with(high):
    marked = neurite() > 0.5 * neurite().max()
    statistics = measure(marked * np.uint8(high))
    assert statistics.background < statistics.bright <= 1.2 * high
    found = foreground(marked * np.uint8(high), statistics)
    assert found[marked].mean() > 0.99
    assert found.mean() < 0.5


@pytest.mark.parametrize("stored", [lambda v: v, lambda v: v.astype(np.float32) / 255], ids=["integers", "float"])
@pytest.mark.parametrize("background", [0.5, 2.5])
def test_a_dim_stack_whose_ground_wavers_between_a_few_levels_shows_its_dim_neurites(background, stored):
    """A detector at low gain: half of the ground is 0, which was imaged all the same."""
    voxels = np.random.default_rng(0).normal(background, 0.6, (16, 96, 192)).clip(0)
    voxels[6:9, 47:50, :96] += np.linspace(5, 30, 96)
    voxels[6:9, 70:73] += 3
    voxels = np.rint(voxels).astype(np.uint8)
    statistics = measure(stored(voxels))
    assert statistics.fill is None
    unit = float(stored(np.ones(1, np.uint8))[0])
    assert statistics.background == pytest.approx(unit * voxels[:4].mean(), abs=0.1 * unit)
    assert statistics.noise < 0.3 * unit
    assert occupied_patches(foreground(stored(voxels), statistics), PATCH)[1:3, 8:10].any(axis=(0, 1)).all()


def test_noise_and_background_of_a_noisy_stack_are_found():
    statistics = measure(neurite(noise=20, background=60))
    peak = 1 / np.sqrt(np.prod([2 * np.sqrt(np.pi) * s for s in BLUR_VOX]))  # white noise, after the blur
    assert statistics.background == pytest.approx(60, abs=2)
    assert statistics.noise == pytest.approx(20 * peak, rel=0.1)


def test_the_threshold_is_six_noises_where_that_is_faint_and_never_less_than_three_and_a_half():
    assert IntensityStatistics(0, 1, 100).threshold == NOISE_FACTOR
    assert IntensityStatistics(0, 10, 100).threshold == LEAST_FACTOR * 10
    assert IntensityStatistics(0, 10, 300).threshold == pytest.approx(FAINT_SHARE * 300)


@pytest.mark.parametrize("polarity", ["bright", "dark"])
def test_a_neurite_on_uneven_ground_is_kept_and_the_ground_is_not(polarity):
    """Haze that rises across the stack by more than the neurite stands out from it."""
    y = np.arange(192, dtype=float)[:, None]
    ground = np.broadcast_to(40 + 120 * y / 192, (16, 192, 192)) + np.random.default_rng(0).normal(0, 3, (16, 192, 192))
    ground[6:9, :, 95:98] += 60
    stack = (ground if polarity == "bright" else 255 - ground).clip(0, 255).astype(np.uint8)
    mask = foreground(stack, measure(stack, polarity))
    assert mask[7, :, 96].mean() > 0.99
    beside = slice(80, 112)  # the neurite's blocks and those that touch them
    assert np.delete(mask, beside, axis=2).mean() < 0.005


@pytest.mark.parametrize("polarity", ["bright", "dark"])
def test_a_branch_too_dim_to_be_seen_alone_is_kept_where_it_goes_on_from_a_bright_one(polarity):
    ground = np.random.default_rng(0).normal(100, 5.5, (16, 96, 192))
    ground[6:9, 47:50, :96] += 90
    ground[6:9, 47:50, 96:] += 4
    stack = np.rint(ground if polarity == "bright" else 255 - ground).clip(0, 255).astype(np.uint8)
    statistics = measure(stack, polarity)
    assert BESIDE_FACTOR * statistics.noise < 3.5 < statistics.threshold - 2 * statistics.noise  # 3.5 after the blur
    kept = occupied_patches(foreground(stack, statistics), PATCH)
    assert kept[1:3, 5:7, :12].any(axis=(0, 1)).all()
    assert kept[1:3, 5:7, 12:14].any(axis=(0, 1)).all()  # from one patch to the next
    assert kept[:, :, 15:].mean() < 0.01
    assert not kept[:, 9:].any()


def test_a_stack_whose_noise_hides_its_neurites_is_computed_whole():
    stack = np.random.default_rng(0).normal(100, 30, (16, 96, 96))
    stack[8, :, 48] += 30
    assert foreground(stack, measure(stack)).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, bool])
@pytest.mark.parametrize("level", [0, 1])
def test_a_constant_stack_holds_no_neurite_and_divides_by_nothing(level, dtype):
    voxels = np.full((8, 16, 16), level, dtype=dtype)
    statistics = measure(voxels)
    assert statistics.bright > statistics.background
    assert not foreground(voxels, statistics).any()
    assert normalize(voxels, statistics).max() < 0.1


@pytest.mark.parametrize("noise", [0, 8])
def test_dark_neurites_are_found_and_look_like_bright_ones(noise):
    bright = neurite(noise, background=40)
    dark = 255 - bright
    assert measure(bright).polarity == "bright"
    assert measure(dark).polarity == "dark"
    assert measure(bright).sure
    assert measure(dark).sure
    assert_allclose(normalize(dark, measure(dark)), normalize(bright, measure(bright)), atol=5e-3)
    assert_array_equal(foreground(dark, measure(dark)), foreground(bright, measure(bright)))


@pytest.mark.parametrize("polarity", ["bright", "dark"])
def test_uneven_light_does_not_hide_which_side_the_neurites_are_on(polarity):
    """Its own tails are longer than the neurite's, on both sides."""
    z, y, x = np.indices((32, 128, 128))
    light = 60 * np.sin(x / 60) * np.sin(y / 80)
    strand = 60 * np.exp(-((y - 64 - 10 * np.sin(x / 15)) ** 2 + (z - 16) ** 2) / 4)
    noise = np.random.default_rng(0).normal(0, 2, light.shape)
    voxels = 128 + light + noise + (strand if polarity == "bright" else -strand)
    assert measure(voxels.clip(0, 255).astype(np.uint8)).polarity == polarity


@pytest.mark.parametrize("polarity", ["bright", "dark"])
def test_neurites_that_fill_much_of_a_stack_still_tell_their_side(polarity):
    """They are most of its spread, so that no tail leaves what passes for noise."""
    light = np.random.default_rng(0).normal(size=(24, 96, 96))
    light = ndimage.gaussian_filter(light, (1.5, 3, 3))
    light = np.exp(0.25 * light / light.std())
    light = 255 * light / light.max()
    voxels = np.rint(light if polarity == "bright" else 255 - light).astype(np.uint8)
    assert measure(voxels).polarity == polarity


def test_noise_alone_has_no_dark_neurites():
    voxels = np.random.default_rng(0).normal(120, 12, (24, 96, 96)).astype(np.uint8)
    assert measure(voxels).polarity == "bright"


def _blank_slice(voxels):
    voxels[3] = 0
    return voxels


@pytest.mark.parametrize("width", [198, 200, 201, 231])
def test_statistics_see_every_column(width):
    """Of a large stack one voxel in so many is looked at: of other columns in each row, whatever the width."""
    voxels = np.random.default_rng(0).normal(100, 5, (100, 200, width))
    voxels[:, 60:140, 101:103] = voxels[50:52, :, 101:103] = 220
    assert measure(voxels.clip(0, 255).astype(np.uint8)).bright == pytest.approx(177, abs=4)


def _deskewed(voxels):
    """Each slice lies further along y, as in a light sheet's stack: most of the box was never imaged."""
    depth, height, width = voxels.shape
    wide = np.zeros((depth, height + 8 * depth, width), voxels.dtype)
    for z, plane in enumerate(voxels):
        wide[z, 8 * z : 8 * z + height] = plane
    return wide


FRAMES = {
    "deskewed": _deskewed,
    "band": lambda voxels: np.pad(voxels, ((0, 0), (5, 0), (0, 0))),
    "slice": _blank_slice,
    "corners": lambda voxels: ndimage.rotate(voxels, 20, axes=(1, 2), order=1),
}


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())
@pytest.mark.parametrize("polarity", ["bright", "dark"])
def test_voxels_that_were_never_imaged_count_as_background(polarity, frame):
    """Zeros lie far below a camera's offset, and would be the darkest of neurites."""
    plain = neurite(4.0, background=20).astype(np.uint16)
    plain = (1000 + 4 * plain if polarity == "bright" else 3000 - 4 * plain).astype(np.uint16)
    expected, found = measure(plain), measure(frame(plain.copy()))
    assert (found.polarity, found.fill) == (polarity, 0.0)
    assert expected.fill is None
    assert found.background == pytest.approx(expected.background, abs=4)
    assert found.bright == pytest.approx(expected.bright, rel=0.1)
    assert found.noise == pytest.approx(expected.noise, rel=0.2)
    assert not normalize(np.zeros((2, 2, 2), np.uint16), found).any()
    assert not normalize(np.zeros((2, 2, 2), np.float32), found).any()
    shown = frame(plain.copy())
    assert foreground(shown, found)[shown == 0].mean() < 0.01
    assert foreground(shown, found).mean() < 1.5 * foreground(plain, expected).mean()


@pytest.mark.parametrize("polarity", ["bright", "dark"])
def test_a_mask_a_cleaned_soma_and_a_saturated_stack_hold_no_voxels_that_were_never_imaged(polarity):
    noisy = neurite(4.0, background=20)
    _, y, x = np.indices(noisy.shape)
    soma = np.hypot(y - noisy.shape[1] / 2, x - noisy.shape[2] / 2) < 0.3 * noisy.shape[1]
    for voxels in (
        np.where(soma, 150 + noisy, 0).clip(0, 255),
        np.where(noisy > 90, 255, 0),
        np.where(noisy > 60, noisy, 0),
        np.clip(noisy.astype(int) * 2, 0, 255),
    ):
        voxels = voxels.astype(np.uint8)
        assert measure(voxels if polarity == "bright" else 255 - voxels).fill is None


def test_a_named_polarity_is_taken_at_its_word():
    voxels = neurite()
    assert measure(voxels, "dark").polarity == "dark"
    assert not normalize(voxels, measure(voxels, "dark")).any()


@pytest.mark.parametrize("bright", [170, 190])
def test_a_stack_with_both_dark_and_bright_structure_is_computed_everywhere(bright):
    voxels = np.full((16, 32, 64), 100, dtype=np.uint8)
    voxels[8, :, 10], voxels[8, :, 50] = bright, 10
    statistics = measure(voxels)
    assert not statistics.sure
    assert foreground(voxels, statistics).all()


@pytest.mark.parametrize("noise", [0, 5])
def test_the_mask_does_not_depend_on_how_the_stack_is_stored(noise):
    voxels = neurite(noise, background=4 * noise)
    mask = foreground(voxels, measure(voxels))
    for stored in (voxels.astype(np.uint16) * 257, voxels.astype(np.float32) / 255, voxels.astype(float) * 3):
        other = foreground(stored, measure(stored))
        # the least noise is a 255th of the range where grey levels are not whole numbers: a little less than one
        assert (mask & ~other).sum() < 0.01 * mask.sum()
        assert other.sum() < 1.3 * mask.sum()
        assert_allclose(normalize(stored, measure(stored)), normalize(voxels, measure(voxels)), atol=0.08)


def test_a_faint_neurite_in_a_deep_stack_is_kept_when_it_leaves_the_noise():
    voxels = 100 + neurite().astype(float) + np.random.default_rng(0).normal(0, 10, (24, 64, 80))
    voxels[2:6, 2:6, 2:6] = 60_000  # a soma, so bright that the neurite is below an 8-bit level
    voxels = np.rint(voxels).astype(np.uint16)
    assert foreground(voxels, measure(voxels))[neurite() > 150].all()


def test_normalisation_block_by_block_equals_the_whole():
    voxels = neurite(noise=5, background=20)
    statistics = measure(voxels)
    whole = normalize(voxels, statistics)
    assert_array_equal(normalize(voxels[3:9, 10:30, 40:], statistics), whole[3:9, 10:30, 40:])
    assert whole.min() == 0
    assert whole.max() == 1


@pytest.mark.parametrize(
    "cut", [np.s_[:, :, :], np.s_[1:, 3:50, 1:], np.s_[:, :, 1:78], np.s_[3, :, ::2], np.s_[3, 4, 5]]
)
def test_levels_that_are_looked_up_are_those_that_are_computed(cut):
    voxels = neurite(noise=5, background=20)
    statistics = measure(voxels)
    expected = normalize(voxels[cut].astype(np.float32), statistics, 0.4, 0.2)
    assert_array_equal(normalize(voxels[cut], statistics, 0.4, 0.2), expected)
    assert_array_equal(normalize(voxels[cut].astype(np.uint16), statistics, 0.4, 0.2), expected)


def test_a_deep_stack_is_measured_from_a_sample_of_its_slices():
    deep = np.concatenate([neurite(noise=5, background=20)] * 8)
    whole, sample = measure(deep[:96]), measure(deep)
    assert sample.background == pytest.approx(whole.background, abs=0.5)
    assert sample.noise == pytest.approx(whole.noise, rel=0.1)
    assert sample.bright == pytest.approx(whole.bright, rel=0.2)


def test_a_patch_is_occupied_where_any_of_its_voxels_is():
    mask = np.zeros((8, 16, 24), dtype=bool)
    mask[3, 8, 23] = mask[4, 7, 0] = True
    assert_array_equal(np.argwhere(occupied_patches(mask, PATCH)), [(0, 1, 2), (1, 0, 0)])


def test_an_unknown_polarity_is_refused():
    with pytest.raises(ValueError, match="`polarity` must be 'auto', 'bright' or 'dark', got 'light'"):
        measure(neurite(), "light")


def test_no_neurite_of_a_real_stack_is_left_out(shared):
    tifffile = pytest.importorskip("tifffile")
    voxels = tifffile.imread(shared / "data/op/OP_6.tif")[28:60, :, 256:]
    gold = np.loadtxt(shared / "data/op/OP_6.swc")[:, [4, 3, 2]] - (28, 0, 256)
    kept = occupied_patches(foreground(voxels, measure(voxels)), PATCH)
    inside = gold[((gold >= 0) & (gold < voxels.shape)).all(1)]
    assert len(inside) > 50
    patches = (inside // PATCH).astype(int)
    assert kept[tuple(patches.T)].mean() > 0.97
    assert kept.mean() < 0.02
