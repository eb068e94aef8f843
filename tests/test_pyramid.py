"""Stores that are written: whole or not at all, by the rules of OME-Zarr 0.5, at every level, in little memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from vit3d.formats import pyramid
from vit3d.formats.lazy_voxels import ChangedVoxels
from vit3d.formats.pyramid import build_pyramid, has_pyramid, pyramid_damage
from vit3d.volume import Volume, open_volume, read_volume, write_volume

SPACING = (1.0, 0.33, 0.33)


def noise(shape=(20, 70, 300), dtype=np.uint16, seed=0):
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


def written(path: Path, voxels=None, spacing=SPACING) -> Path:
    write_volume(Volume(noise() if voxels is None else voxels, spacing), path)
    return path


def image_of(path: Path) -> dict:
    return json.loads((path / "zarr.json").read_text())["attributes"]["ome"]["multiscales"][0]


# ------------------------------------------------------------ one level


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "int32", "float64"])
@pytest.mark.parametrize("spacing", [SPACING, None])
def test_written_voxels_and_spacing_come_back(tmp_path, dtype, spacing):
    voxels = noise((9, 33, 70), dtype)
    read = read_volume(written(tmp_path / "a.zarr", voxels, spacing))
    assert read.voxels.dtype == dtype
    assert (read.voxels == voxels).all()
    assert read.spacing_um == spacing


def test_a_mask_and_half_precision_are_written_in_depths_that_viewers_know(tmp_path):
    mask = noise((9, 33, 70)) > 100
    assert (read_volume(written(tmp_path / "a.zarr", mask)).voxels == 255 * mask.astype(np.uint8)).all()
    half = read_volume(written(tmp_path / "b.zarr", noise((9, 33, 70), np.float16))).voxels
    assert half.dtype == np.float32
    assert (half == noise((9, 33, 70))).all()


def test_big_endian_voxels_are_written_as_they_count(tmp_path):
    assert (read_volume(written(tmp_path / "a.zarr", noise(dtype=">u2"))).voxels == noise()).all()


def test_the_store_has_checksums_and_every_file(tmp_path):
    voxels = np.zeros((70, 70, 300), np.uint8)  # nothing to see, and still written
    path = written(tmp_path / "a.zarr", voxels)
    array = zarr.open_array(path / "0")
    assert array.metadata.zarr_format == 3
    assert array.metadata.dimension_names == ("z", "y", "x")
    files = sorted(file for file in path.rglob("*") if file.is_file() and "c" in file.parts)
    assert len(files) == 2
    assert (read_volume(path).voxels == 0).all()
    files[0].unlink()
    with pytest.raises(ValueError, match="lost the chunk"):
        read_volume(path)


def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path):
    path = written(tmp_path / "a.zarr", np.random.default_rng(0).integers(0, 256, (9, 20, 30), np.uint8))
    (file,) = (file for file in path.rglob("*") if file.is_file() and "c" in file.parts)
    whole = file.read_bytes()
    for at in np.linspace(0, len(whole) - 1, 40).astype(int):  # noise is stored as it is: zstd alone sees nothing
        data = bytearray(whole)
        data[at] ^= 1
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.zarr/0 cannot be read"):
            read_volume(path)


def test_a_failed_write_leaves_the_old_store_and_nothing_else(tmp_path):
    def broken(part, box):
        if box[2].start:
            raise OSError("No space left on device")
        return part

    path = written(tmp_path / "a.zarr", noise(seed=1))
    with pytest.raises(OSError, match="No space"):
        write_volume(Volume(ChangedVoxels(noise(), broken)), path)
    assert [place.name for place in tmp_path.iterdir()] == ["a.zarr"]
    assert (read_volume(path).voxels == noise(seed=1)).all()
    written(path, noise(seed=2))
    assert [place.name for place in tmp_path.iterdir()] == ["a.zarr"]
    assert (read_volume(path).voxels == noise(seed=2)).all()


# ------------------------------------------------------------ levels


def test_levels_halve_what_is_fine_until_all_is_small(tmp_path):
    path = written(tmp_path / "a.zarr")
    assert not has_pyramid(path)
    steps = build_pyramid(path)
    assert has_pyramid(path)
    assert steps == [SPACING, (1.0, 0.66, 0.66), (2.0, 1.32, 1.32)]
    assert [open_volume(path, level=name).shape for name in "012"] == [(20, 70, 300), (20, 35, 150), (10, 18, 75)]
    assert [open_volume(path, level=name).spacing_um for name in "012"] == [pytest.approx(step) for step in steps]


def test_an_axis_of_twice_the_finest_step_waits_for_the_others(tmp_path):
    path = written(tmp_path / "a.zarr", noise(), (2, 1, 1))
    assert build_pyramid(path) == [(2, 1, 1), (2, 2, 2), (4, 4, 4)]


def test_how_thick_a_single_slice_is_does_not_matter(tmp_path):
    path = written(tmp_path / "a.zarr", noise((1, 20, 300)), (0.1, 0.33, 0.33))
    assert build_pyramid(path) == [(0.1, 0.33, 0.33), (0.1, 0.66, 0.66), (0.1, 1.32, 1.32)]


def test_what_is_small_already_gets_no_coarser_level(tmp_path):
    path = written(tmp_path / "a.zarr", noise((5, 20, 128)))
    assert build_pyramid(path) == [SPACING]
    assert has_pyramid(path)


def test_a_voxel_is_the_largest_of_those_it_covers_at_every_level(tmp_path):
    path = written(tmp_path / "a.zarr")
    build_pyramid(path)
    first, second = (read_volume(path, level=name).voxels for name in "12")
    expected = noise().reshape(20, 35, 2, 150, 2).max((2, 4))
    assert (first == expected).all()
    padded = np.pad(expected, [(0, 0), (0, 1), (0, 0)])
    assert (second == padded.reshape(10, 2, 18, 2, 75, 2).max((1, 3, 5))).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_or_their_mean_also_where_a_block_is_cut_at_the_end(tmp_path, dtype):
    voxels = noise((3, 65, 129), dtype)
    path = written(tmp_path / "a.zarr", voxels)
    build_pyramid(path, method="mean")
    read = read_volume(path, level="1").voxels
    assert read.dtype == dtype
    assert read.shape == (3, 33, 65)
    part = voxels[:, 64:, 128:].astype(float)
    rounding = 0 if dtype == np.float32 else 0.5
    np.testing.assert_allclose(read[:, -1, -1], part[:, 0, 0], atol=rounding)
    blocks = voxels[:, :64, :128].astype(float).reshape(3, 32, 2, 64, 2).mean((2, 4))
    np.testing.assert_allclose(read[:, :32, :64], blocks, atol=rounding)


def test_a_neurite_of_one_voxel_stays_in_sight_at_the_coarsest_level(tmp_path):
    voxels = np.zeros((64, 260, 260), np.float32)
    voxels[30, 100, :] = 0.9
    path = written(tmp_path / "a.zarr", voxels, (1, 1, 1))
    last = len(build_pyramid(path)) - 1
    coarse = read_volume(path, level=str(last)).voxels
    assert max(coarse.shape) <= 128
    assert (coarse.max((0, 1)) == np.float32(0.9)).all()


def test_a_second_pyramid_takes_the_place_of_the_first(tmp_path):
    path = written(tmp_path / "a.zarr")
    build_pyramid(path)
    before = sorted(file.relative_to(path) for file in path.rglob("*"))
    build_pyramid(path, method="mean")
    assert image_of(path)["type"] == "mean"
    assert sorted(file.relative_to(path) for file in path.rglob("*")) == before
    assert read_volume(path, level="1").voxels.mean() == pytest.approx(noise().mean(), rel=0.02)


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_levels_are_found_where_metadata_were_consolidated_before_there_were_any(tmp_path):
    path = written(tmp_path / "a.zarr")
    zarr.consolidate_metadata(path)
    build_pyramid(path)
    assert set(zarr.open_group(path, mode="r").array_keys()) == {"0", "1", "2"}


def test_a_pyramid_that_breaks_off_leaves_a_store_that_opens(tmp_path, monkeypatch):
    path = written(tmp_path / "a.zarr")
    build_pyramid(path)

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(pyramid, "_reduced", full_disk)
    with pytest.raises(OSError, match="No space"):
        build_pyramid(path)
    assert not has_pyramid(path)
    assert not [file for file in path.rglob("*.partial")]
    assert (read_volume(path).voxels == noise()).all()


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    "harm, said", [(Path.unlink, "is missing"), (flip, "cannot be read"), (halve, "cannot be read")]
)
@pytest.mark.parametrize("file", ["1/c/0/0/1", "2/c/0/0/0"])
def test_damage_of_a_coarser_level_is_named_and_written_anew(tmp_path, file, harm, said):
    path = written(tmp_path / "a.zarr", noise((20, 70, 600)))
    build_pyramid(path)
    assert has_pyramid(path)
    before = {each: each.read_bytes() for each in path.rglob("*") if each.is_file()}
    harm(path / file)
    ((named, damage),) = pyramid_damage(path)
    assert (named, damage.startswith(said)) == (path / file, True)
    assert not has_pyramid(path)
    build_pyramid(path)
    assert {each: each.read_bytes() for each in path.rglob("*") if each.is_file()} == before


def test_a_coarser_level_that_is_gone_is_named_by_its_metadata(tmp_path):
    path = written(tmp_path / "a.zarr")
    build_pyramid(path)
    shutil.rmtree(path / "2")
    (path / "1/zarr.json").write_text("{")
    (first, unread), (second, missing) = pyramid_damage(path)
    assert (first, second, missing) == (path / "1/zarr.json", path / "2/zarr.json", "is missing")
    assert unread.startswith("cannot be read")


def test_what_has_no_image_gets_no_pyramid(tmp_path):
    zarr.create_array(tmp_path / "a.zarr", data=noise())
    image = {"axes": [{"name": name} for name in "zyx"], "datasets": [{"path": "full"}]}
    group = zarr.create_group(tmp_path / "c.zarr", attributes={"ome": {"version": "0.5", "multiscales": [image]}})
    group.create_array("full", data=noise())
    for path in (tmp_path / "a.zarr", tmp_path / "none.zarr", tmp_path / "c.zarr"):
        with pytest.raises(ValueError, match=r"no OME-Zarr 0\.5"):
            build_pyramid(path)
    with pytest.raises(ValueError, match="max, mean"):
        build_pyramid(written(tmp_path / "b.zarr"), method="median")


# ------------------------------------------------------------ the rules of OME-Zarr 0.5, as its specification has them


def test_the_metadata_keep_the_rules(tmp_path):
    path = written(tmp_path / "a.zarr")
    build_pyramid(path)
    group = json.loads((path / "zarr.json").read_text())
    assert (group["zarr_format"], group["node_type"]) == (3, "group")
    assert group["attributes"]["ome"]["version"] == "0.5"
    image = image_of(path)
    assert [axis["name"] for axis in image["axes"]] == ["z", "y", "x"]
    assert all(axis["type"] == "space" and axis["unit"] == "micrometer" for axis in image["axes"])
    sizes = []
    for dataset in image["datasets"]:
        array = json.loads((path / dataset["path"] / "zarr.json").read_text())
        assert array["dimension_names"] == ["z", "y", "x"]  # equal to the axes
        sizes.append(np.prod(array["shape"]))
        kinds = [move["type"] for move in dataset["coordinateTransformations"]]
        assert kinds in (["scale"], ["scale", "translation"])  # one scale, and what follows it
        assert all(len(move[move["type"]]) == 3 for move in dataset["coordinateTransformations"])
    assert sizes == sorted(sizes, reverse=True)  # finest first


def test_every_level_lies_in_the_same_place(tmp_path):
    """The centre of a block's voxel, by the metadata, is the mean of the centres of those it covers."""
    path = written(tmp_path / "a.zarr")
    build_pyramid(path)
    for dataset in image_of(path)["datasets"][1:]:
        moves = {move["type"]: np.array(move[move["type"]]) for move in dataset["coordinateTransformations"]}
        factor = np.rint(moves["scale"] / SPACING).astype(int)
        covered = np.stack(np.meshgrid(*map(np.arange, factor), indexing="ij"), -1) * SPACING
        np.testing.assert_allclose(moves["translation"], covered.mean((0, 1, 2)), atol=1e-9)


def test_a_volume_without_spacing_claims_no_unit(tmp_path):
    path = written(tmp_path / "a.zarr", spacing=None)
    assert build_pyramid(path) == [None] * 3  # isotropic in voxels
    assert not any("unit" in axis for axis in image_of(path)["axes"])


# ------------------------------------------------------------ memory


@pytest.mark.slow
def test_memory_is_flat_in_the_size_of_the_volume(tmp_path):
    code = r"""
import re, sys
import numpy as np
from vit3d.formats.lazy_voxels import ChangedVoxels, LazyVoxels
from vit3d.formats.pyramid import build_pyramid
from vit3d.volume import Volume, write_volume

class Grey(LazyVoxels):
    def _fetch(self, box):
        return np.full([b.stop - b.start for b in box], box[0].start % 200, self.dtype)

shape = (int(sys.argv[2]), 512, 512)
write_volume(Volume(Grey(shape, np.float32)), sys.argv[1])
build_pyramid(sys.argv[1])
print(int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024)  # ru_maxrss may be the parent's
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    peaks = []
    for depth in (512, 1024):
        words = [sys.executable, "-c", code, str(tmp_path / f"{depth}.zarr"), str(depth)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout))
    assert peaks[1] < 1.15 * peaks[0]
    assert peaks[1] < 1024 * 512 * 512 * 4 / 2**20 / 2
