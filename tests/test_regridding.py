"""A stack on another grid: the same light at the same places, and the same tree."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from test_reconstruction import CONFIG, ON_DISK, Photograph, names
from vit3d import Volume, read_swc, read_volume, regridding, write_volume
from vit3d.formats.lazy_voxels import LazyVoxels
from vit3d.model.image_processing_vit3d import ViT3DImageProcessor
from vit3d.reconstruction import fits_in_memory, reconstruct, reconstruct_on_disk
from vit3d.regridding import as_trained, on_grid_of, regridded, warn_of_coarse_voxels
from vit3d.scoring import score_trees
from vit3d.simulate import Microscope, Style, expose, grow
from vit3d.tracing import trace

TRAINED_UM, COARSE_UM = (1.0, 0.5, 0.5), (2.0, 0.5, 0.9)


class Trained(Photograph):
    """The photograph, of microscopes whose voxels are known."""

    config = type(CONFIG)(**{**CONFIG.to_dict(), "training_spacing_um": TRAINED_UM})


def ramp(shape, spacing_um) -> Volume:
    """Each voxel says where it lies."""
    z, y, x = np.ix_(*(np.arange(n) * s for n, s in zip(shape, spacing_um, strict=True)))
    return Volume((z + 10 * y + 100 * x).astype(np.float32), spacing_um)


@pytest.mark.parametrize("spacing_um", [(0.3, 0.2, 0.7), (1.0, 0.5, 0.25), (0.5, 0.17, 0.5)])
def test_every_voxel_shows_what_lies_where_it_is(spacing_um):
    volume = ramp((20, 30, 40), (1.0, 0.5, 0.5))
    again = regridded(volume, spacing_um)
    extent = np.array(again.shape) * spacing_um
    assert (extent > (np.array(volume.shape) - 1) * volume.spacing_um).all()  # to the last voxel
    inner = tuple(slice(0, n - 1) for n in again.shape)
    assert_allclose(again.voxels[inner], ramp(again.shape, spacing_um).voxels[inner], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.float32])
def test_the_largest_and_the_smallest_numbers_stay_what_they_are(dtype):
    ends = (np.iinfo(dtype).min, np.iinfo(dtype).max) if np.dtype(dtype).kind in "iu" else (-1e30, 1e30)
    for value in ends:
        stack = Volume(np.full((4, 5, 6), value, dtype), (1, 1, 1))
        again = np.asarray(regridded(stack, (0.3, 0.7, 1)).voxels)
        assert again.dtype == dtype
        assert (again == np.asarray(value, dtype)).all()


def test_a_box_is_that_part_of_the_whole_and_the_type_stays():
    values = np.random.default_rng(0).integers(0, 60_000, (21, 18, 17))
    for dtype in (np.uint16, np.uint8, np.float32, np.int16, bool):
        again = regridded(Volume(values.astype(dtype), (1, 1, 1)), (0.7, 1.6, 0.9)).voxels
        whole = np.asarray(again)
        assert whole.dtype == again.dtype == dtype
        assert_array_equal(again[3:29, 2:9, 5], whole[3:29, 2:9, 5])


def test_on_its_own_grid_a_volume_is_itself_also_where_a_store_rounded_the_spacing():
    volume, rounded = (Volume(np.zeros((3, 4, 5), np.uint8), (1, step, step)) for step in (1 / 3, round(1 / 3, 9)))
    assert on_grid_of(volume, rounded) is volume
    assert on_grid_of(volume, replace(rounded, spacing_um=(1, 0.34, 0.34))) is not volume


def test_in_however_small_parts_it_is_made_the_whole_is_the_same(monkeypatch):
    volume = Volume(np.random.default_rng(0).integers(0, 60_000, (21, 18, 17)).astype(np.uint16), (1, 1, 1))
    whole = np.asarray(regridded(volume, (0.7, 1.6, 0.9)).voxels)
    monkeypatch.setattr(regridding, "_READ_VOXELS", 5 * 18 * 17)
    for made in (1, 1300):
        monkeypatch.setattr(regridding, "_MADE_VOXELS", made)
        assert_array_equal(np.asarray(regridded(volume, (0.7, 1.6, 0.9)).voxels), whole)


def test_a_mask_ends_midway_between_neurite_and_background():
    line = np.zeros((1, 1, 9), bool)
    line[..., 3:6] = True
    finer = regridded(Volume(line, (1, 1, 1)), (1, 1, 0.5))
    assert_array_equal(np.flatnonzero(finer.voxels[:, :, :]), np.arange(5, 12))  # from 2.5 to 5.5


@pytest.mark.parametrize("spacing_um", [1.1, 1.5, 3.0])
def test_cut_into_whole_parts_a_stack_still_ends_at_its_last_voxel(spacing_um):
    for size in range(2, 20):
        stack = Volume(np.zeros((1, 1, size), np.uint8), (1, 1, spacing_um))
        assert regridded(stack, (1, 1, spacing_um / 5)).shape == (1, 1, 5 * (size - 1) + 1)


def test_back_on_its_own_grid_a_smooth_stack_is_itself():
    z, y, x = np.ogrid[:20, :30, :40]
    volume = Volume((np.sin(z / 4) * np.cos(y / 5) + np.sin(x / 6)).astype(np.float32), (1, 0.5, 0.5))
    again = on_grid_of(regridded(volume, (0.4, 0.2, 0.5)), volume)
    assert (again.shape, again.spacing_um) == (volume.shape, volume.spacing_um)
    assert_allclose(again.voxels, volume.voxels, atol=0.03)
    assert on_grid_of(volume, volume) is volume
    rounded = Volume(volume.voxels, tuple(float(f"{step * (1 + 1e-10):.9g}") for step in volume.spacing_um))
    assert on_grid_of(rounded, volume) is rounded
    coarser = Volume(volume.voxels, tuple(1.001 * step for step in volume.spacing_um))
    assert on_grid_of(coarser, volume) is not coarser


def test_only_what_is_coarser_than_the_training_gets_finer_voxels():
    stack, config = np.zeros((8, 8, 8), np.uint8), Trained.config
    for known in (None, TRAINED_UM, (1.2, 0.41, 0.6), (0.3, 0.1, 0.1), (1000, 500, 500), (4.1, 0.5, 0.5)):
        volume = Volume(stack, known)
        assert as_trained(volume, config) is volume
    assert as_trained(Volume(stack, COARSE_UM), CONFIG).spacing_um == COARSE_UM  # it does not say
    assert as_trained(Volume(stack, COARSE_UM), config).spacing_um == pytest.approx(TRAINED_UM)
    one = as_trained(Volume(stack, (1.1, 0.2, 1.9)), config)
    assert one.spacing_um == pytest.approx((1.1, 0.2, 0.5))  # along the other axes its voxels stay
    with pytest.raises(ValueError, match="without a spacing"):
        regridded(Volume(stack), TRAINED_UM)


@pytest.fixture(scope="module")
def coarse():
    """A neuron in voxels that the network does not know, and its truth in um."""
    rng = np.random.default_rng(4)
    tree, brightness = grow(rng, (25, 80, 80), (1.0, 0.5, 0.5), Style(cable_um=150.0))
    shape = [round(n * t / c) for n, t, c in zip((25, 80, 80), TRAINED_UM, COARSE_UM, strict=True)]
    tree = replace(tree, spacing_um=COARSE_UM)
    clear = Microscope(debris=0, photons=1000, background=0.02)
    return Volume(expose(rng, tree, brightness, tuple(shape), clear), COARSE_UM), tree.to("um")


def f1_um(found, truth) -> float:
    return score_trees(*(replace(tree, unit="voxel", spacing_um=None) for tree in (found, truth)), threshold=1.0)["f1"]


def test_a_tree_lies_where_its_neuron_is_whatever_the_grid_it_was_traced_on(coarse):
    volume, truth = coarse
    result = reconstruct(Trained(), volume)
    assert (result.tree.unit, result.tree.spacing_um) == ("um", COARSE_UM)
    assert result.probability.shape == volume.shape
    assert f1_um(result.tree, truth) > 0.9
    on = np.rint(result.tree.to("voxel").points).astype(int)
    on = on[(on < volume.shape).all(1)]
    assert result.probability.voxels[tuple(on.T)].mean() > 0.5  # the picture's two layers lie on each other


def test_a_crop_means_the_same_places_on_the_other_grid(coarse):
    volume, _ = coarse
    whole, box = reconstruct(Trained(), volume), (slice(1, 12), slice(10, 70), slice(3, 40))
    part = reconstruct(Trained(), volume, box=box)
    assert part.probability.shape == (11, 60, 37)
    low, high = (np.array(ends) * COARSE_UM for ends in ((1, 10, 3), (11, 69, 39)))
    assert (part.tree.points > low - 0.5).all()
    assert (part.tree.points < high + 0.5).all()
    inside = ((whole.tree.points > low + 2) & (whole.tree.points < high - 2)).all(1)
    near = np.linalg.norm(whole.tree.points[inside][:, None] - part.tree.points, axis=2).min(1)
    assert np.median(near) < 0.5  # of voxels 2 um deep


@pytest.mark.parametrize("value", [1, 255, True])
def test_nothing_is_traced_where_the_mask_is_zero_whatever_its_numbers(coarse, value):
    volume, _ = coarse
    mask = np.zeros(volume.shape, type(value) if value is True else np.uint8)
    mask[:, :, :20] = value
    result = reconstruct(Trained(), volume, mask=mask, box=(slice(0, 12), slice(5, 80), slice(0, 44)))
    assert 18 * COARSE_UM[2] < result.tree.points[:, 2].max() <= 19.5 * COARSE_UM[2]
    assert result.probability.voxels[:, :, 20:].max() == 0


def test_the_probability_that_is_written_gives_nearly_the_tree_that_is(coarse):
    result = reconstruct(Trained(), coarse[0])
    again = trace(result.probability)
    assert f1_um(again, result.tree) > 0.85
    assert again.cable_length == pytest.approx(result.tree.cable_length, rel=0.2)


def test_larger_than_memory_is_the_same_tree_and_the_store_says_its_grid(coarse, tmp_path):
    from vit3d.volume import open_volume

    volume, _ = coarse
    write_volume(volume, tmp_path / "a.zarr")
    network, processor = Trained(), ViT3DImageProcessor.from_config(Trained.config)
    disk = reconstruct_on_disk(network, open_volume(tmp_path / "a.zarr"), tmp_path / "o" / "a_probability.zarr",
                               processor=processor, run={"memory_bytes": 64 * 2**30})  # fmt: skip
    memory = reconstruct(network, volume, processor=processor)
    assert f1_um(disk.tree, memory.tree) > 0.99
    assert disk.probability.shape == volume.shape
    assert_allclose(disk.probability.voxels, memory.probability.voxels, atol=1e-3)  # the store holds 2048ths
    assert open_volume(tmp_path / "o" / "a_probability.zarr").spacing_um == pytest.approx(TRAINED_UM)
    disk.write(tmp_path / "o", "a")
    assert names(tmp_path / "o") == ON_DISK
    assert read_swc(tmp_path / "o" / "a.swc").spacing_um == COARSE_UM


def test_on_request_the_stack_keeps_its_voxels(coarse, tmp_path, monkeypatch):
    from vit3d import checkpoint
    from vit3d.cli import main

    def load(*_, **__):
        network = Trained()
        network.config = copy.deepcopy(Trained.config)
        return network, ViT3DImageProcessor.from_config(network.config)

    write_volume(coarse[0], tmp_path / "a.tif")
    monkeypatch.setattr(checkpoint, "load_checkpoint", load)
    found = []
    for flag in ("--regrid", "--no-regrid"):
        with pytest.raises(SystemExit) as stopped:
            main(["reconstruct", str(tmp_path / "a.tif"), "--out", str(tmp_path / flag), flag])
        assert not stopped.value.code
        found.append(read_volume(tmp_path / flag / "a_probability.tif").voxels)
    assert_array_equal(found[1], reconstruct(Trained(), coarse[0], regrid=False).probability.voxels)
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_segment_says_where_reconstruct_would_do_better():
    warn_of_coarse_voxels(Volume(np.zeros((8, 8, 8)), TRAINED_UM), Trained.config)
    with pytest.warns(UserWarning, match=r"2 x 0.5 x 0.9 um are coarser than the 1 x 0.5 x 0.5"):
        warn_of_coarse_voxels(Volume(np.zeros((8, 8, 8)), COARSE_UM), Trained.config)


def test_memory_is_that_of_both_grids(coarse):
    volume, _ = coarse
    seen = as_trained(volume, Trained.config)
    each = volume.voxels.dtype.itemsize + 12
    enough = (np.prod(seen.shape) + np.prod(volume.shape)) * each + 2**30
    assert fits_in_memory(volume, np.prod(volume.shape) * each + 2**30)
    assert fits_in_memory(volume, enough, config=Trained.config)
    assert not fits_in_memory(volume, enough - 1, config=Trained.config)


@pytest.mark.slow
def test_a_slab_reads_no_more_than_it_needs():
    class Counted(LazyVoxels):
        def _fetch(self, box):
            reads.append([b.stop - b.start for b in box])
            return np.zeros(reads[-1], self.dtype)

    reads = []
    finer = regridded(Volume(Counted((400, 3000, 3000), np.uint8, (64, 64, 64)), (3, 1, 1)), (1, 0.5, 0.5))
    assert finer.voxels.chunks == (192, 128, 128)
    assert finer.voxels[0:135, 1000:3000, 1000:3000].shape == (135, 2000, 2000)
    assert len(reads) > 2
    assert max(np.prod(read) for read in reads) <= 2**24
    assert sum(read[0] for read in reads) < 1.25 * 45  # slabs share a plane or two
    reads.clear()
    back = on_grid_of(finer, Volume(np.zeros((400, 3000, 3000), bool), (3, 1, 1)))
    assert back.voxels[0:64, 0:64, 0:64].shape == (64, 64, 64)
    assert max(np.prod(read) for read in reads) < 2**20  # through both grids no more than is asked for


def test_a_speck_of_the_stack_is_noise_on_finer_voxels_too():
    speck, neurite = np.zeros((10, 40, 40), np.uint8), np.zeros((10, 40, 40), np.uint8)
    speck[5, 30, 30:32] = 255
    neurite[5, 10, 5:35] = neurite[5, 11, 5:35] = 255
    for spacing_um in (TRAINED_UM, COARSE_UM):
        volume = Volume(speck | neurite, spacing_um)
        result = reconstruct(Trained(), volume, forest=True)
        assert result.tree.num_roots == 1
        assert result.probability.voxels[5, 30, 30] > 0.5
        kept = reconstruct(Trained(), volume, forest=True, min_voxels=1)
        assert kept.tree.num_roots == 2
