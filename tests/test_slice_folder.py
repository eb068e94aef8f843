"""A folder of z-slices is a stack, or what is wrong with it is said in one sentence."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from vit3d.volume import is_stack, open_volume, read_volume


def noise(shape=(12, 20, 30), dtype=np.uint16):
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def slices(folder, voxels, name="s{}.tif", **options):
    folder.mkdir()
    for z, plane in enumerate(voxels):
        path = folder / name.format(z)
        if path.suffix == ".png":
            Image.fromarray(plane).save(path)
        else:
            tifffile.imwrite(path, plane, **options)
    return folder


@pytest.mark.parametrize("name", ["s{}.tif", "2024-05-01_{:04d}.TIFF", "{}_ch00.tif", "s{}.png"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_slices_are_stacked_in_the_order_of_their_numbers(tmp_path, name, dtype):
    voxels = noise(dtype=dtype)
    folder = slices(tmp_path / "a", voxels, name)
    (folder / ".hidden.tif").write_bytes(b"x")
    (folder / "notes.txt").write_text("taken on Monday")
    read = read_volume(folder)
    assert read.voxels.dtype == dtype
    assert (read.voxels == voxels).all()
    assert read.spacing_um is None
    assert read_volume(folder, spacing_um=(2, 1, 1)).spacing_um == (2, 1, 1)
    assert is_stack(folder)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_box_reads_its_slices_alone(tmp_path, compression):
    voxels = noise()
    folder = slices(tmp_path / "a", voxels, compression=compression)
    volume = open_volume(folder)
    assert (volume.shape, volume.voxels.chunks) == (voxels.shape, (1, 20, 30))
    for path in folder.iterdir():
        if path.name not in ("s10.tif", "s11.tif"):
            path.write_bytes(b"gone")
    assert (volume.voxels[10:, 3:9, ::2] == voxels[10:, 3:9, ::2]).all()
    with pytest.raises(ValueError, match=r"s9\.tif is damaged"):
        volume.voxels[9]


def test_slices_of_one_bit_are_a_mask(tmp_path):
    mask = noise() > 100
    read = read_volume(slices(tmp_path / "a", mask, "s{}.png")).voxels
    assert read.dtype == bool
    assert (read == mask).all()


def test_a_channel_of_colour_slices_is_chosen(tmp_path):
    voxels = noise((12, 20, 30, 3), np.uint8)
    for name in ("s{}.tif", "s{}.png"):
        folder = slices(tmp_path / name[-3:], voxels, name)
        with pytest.raises(ValueError, match=r"3 channels \(RGB\)"):
            open_volume(folder)
        assert (read_volume(folder, channel=2).voxels == voxels[..., 2]).all()


def palette_slices(folder, indices, palette, **options):
    folder.mkdir()
    for z, plane in enumerate(indices):
        image = Image.fromarray(plane)
        image.putpalette(palette.tobytes())
        image.save(folder / f"s{z}.png", **options)
    return folder


@pytest.mark.parametrize("options", [{}, {"transparency": bytes([0, 128])}, {"bits": 4}])
def test_slices_with_a_palette_of_greys_are_read_as_grey_values(tmp_path, options):
    indices = noise(dtype=np.uint8) % 16
    palette = np.repeat(np.random.default_rng(1).permutation(256).astype(np.uint8)[:16, None], 3, axis=1)
    volume = open_volume(palette_slices(tmp_path / "a", indices, palette, **options))
    assert (volume.shape, volume.voxels.dtype) == (indices.shape, np.uint8)
    assert (volume.voxels[3:, 4:, ::2] == palette[indices, 0][3:, 4:, ::2]).all()


@pytest.mark.parametrize(
    "name", ["2.{0}a{0}", "A1.{0} ({0})", "12.8.0 frame {0}", "s1.{0}_z{0:04}", "Image 3.{0} - {0}"]
)
def test_a_dot_is_no_decimal_point_where_a_whole_number_counts_the_slices(tmp_path, name):
    planes = noise((13, 8, 9), np.uint8)
    folder = tmp_path / "a"
    folder.mkdir()
    for z, plane in enumerate(planes):
        Image.fromarray(plane).save(folder / f"{name.format(z + 5)}.png")
    assert (read_volume(folder).voxels == planes).all()


def test_slices_with_a_palette_of_colours_are_colour_slices(tmp_path):
    indices, palette = noise(dtype=np.uint8), np.random.default_rng(1).integers(0, 255, (256, 3), np.uint8)
    indices[0], palette[0] = 0, 0  # a blank slice, which uses black alone
    folder = palette_slices(tmp_path / "a", indices, palette)
    with pytest.raises(ValueError, match=r"3 channels \(RGB\)"):
        open_volume(folder)
    assert (read_volume(folder, channel=1).voxels == palette[indices, 1]).all()


def test_slices_that_are_not_equal_are_named(tmp_path):
    folder = slices(tmp_path / "a", noise())
    tifffile.imwrite(folder / "s5.tif", noise((21, 30)))
    with pytest.raises(ValueError, match=r"a is no stack: s5\.tif is 21 x 30 of uint16, but s0\.tif is 20 x 30"):
        open_volume(folder)
    tifffile.imwrite(folder / "s5.tif", noise((20, 30), np.uint8))
    with pytest.raises(ValueError, match=r"s5\.tif is 20 x 30 of uint8"):
        open_volume(folder)
    tifffile.imwrite(folder / "s5.tif", noise((2, 20, 30)))
    with pytest.raises(ValueError, match=r"s5\.tif"):
        open_volume(folder)


def test_a_slice_that_has_grown_since_it_was_opened_is_named(tmp_path):
    folder = slices(tmp_path / "a", noise())
    opened = open_volume(folder)
    tifffile.imwrite(folder / "s5.tif", noise((21, 31)))
    with pytest.raises(ValueError, match=r"s5\.tif has changed"):
        opened.voxels[4:6]


def test_a_slice_that_is_cut_short_is_named(tmp_path):
    folder = slices(tmp_path / "a", noise())
    (folder / "s5.tif").write_bytes((folder / "s5.tif").read_bytes()[:600])
    with pytest.raises(ValueError, match=r"s5\.tif is damaged"):
        open_volume(folder)


@pytest.mark.parametrize("lost", [1, 6, 10])
def test_a_lost_slice_is_missed(tmp_path, lost):
    folder = slices(tmp_path / "a", noise(), "s{:03d}.tif")
    (folder / f"s{lost:03d}.tif").unlink()
    with pytest.raises(ValueError, match=rf"lacks slices: after s{lost - 1:03d}\.tif comes s{lost + 1:03d}\.tif"):
        open_volume(folder)


@pytest.mark.parametrize(
    "name",
    [
        lambda z: f"z{z:02d}_pos{z * 100}.tif",
        lambda z: f"z{z:02d}_{z * 7013 + z**2}ms.tif",
        lambda z: f"2021-03-01_12-{z // 5:02d}-{z * 12 % 60:02d}_z{z:03d}.tif",
        lambda z: f"z{z:02d}{'_redo' if z == 2 else ''}.tif",
    ],
    ids=["positions", "times", "clock", "one redone"],
)
def test_a_lost_slice_is_missed_whatever_else_its_name_holds(tmp_path, name):
    folder = slices(tmp_path / "a", noise())
    for path in list(folder.iterdir()):
        path.rename(folder / name(int(path.stem[1:])))
    (folder / name(4)).unlink()
    with pytest.raises(ValueError, match=f"lacks slices: after {name(3)} comes {name(5)}; "):
        open_volume(folder)


NAMES = {
    "channels": lambda z: f"s_z{z // 2:03d}_ch{z % 2:02d}.tif",
    "neurons": lambda z: f"cell{'AB'[z // 6]}_{z % 6:02d}.tif",
    "times": lambda z: f"t{z // 6}_z{z % 6}.tif",
    "a projection": lambda z: f"z{z:03d}.tif" if z else "MAX_z.tif",
    "another projection": lambda z: f"z{z:03d}.tif" if z else "MIP.tif",
    "a copy": lambda z: f"z{z:03d}.tif" if z < 11 else "z005 (1).tif",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_slices_of_several_channels_times_or_neurons_are_no_stack(tmp_path, name):
    folder = slices(tmp_path / "a", noise())
    for path in list(folder.iterdir()):
        path.rename(folder / name(int(path.stem[1:])))
    with pytest.raises(ValueError, match="are not two slices of one"):
        open_volume(folder)


HASHES = ["a1f3", "bcde", "0f1e", "77aa", "c0de", "1a2b3c", "f00d", "abcd", "9", "e5e5", "dead", "4b4b"]
ORDINARY = {
    "a time behind the number": lambda z: f"z{z}_at{z * 7 % 5}s.tif",
    "a time before the number": lambda z: f"2021-03-01_12-{z // 5:02d}-{z * 12 % 60:02d}_z{z:03d}.tif",
    "times that come late": lambda z: f"z{z:03d}_{z + z // 7}s.tif",
    "times alone that are uneven": lambda z: f"{'abcdefghijkl'[z]}_{z * 7013 + z**2}ms.tif",
    "depth in um": lambda z: f"scan_z{z * 0.3:.2f}um.tif",
    "depth in steps of a quarter": lambda z: f"z{z * 0.25:g}.tif",
    "depth and number": lambda z: f"pos_{z * 0.3:.1f}_{z}.tif",
    "letters": lambda z: f"slice{'abcdefghijkl'[z]}.tif",
    "a hash": lambda z: f"z{z:03d}_{HASHES[z]}.tif",
    "one redone twice": lambda z: f"z{z:02d}{'_redo2' if z == 2 else ''}.tif",
    "all are projections": lambda z: f"MAX_t{z}.tif",
    "one redone": lambda z: f"z{z:02d}{'_redo' if z == 2 else ''}.tif",
}


@pytest.mark.parametrize("name", ORDINARY.values(), ids=ORDINARY.keys())
def test_what_else_stands_in_the_names_of_slices_does_no_harm(tmp_path, name):
    folder = slices(tmp_path / "a", noise())
    for path in list(folder.iterdir()):
        path.rename(folder / name(int(path.stem[1:])))
    assert read_volume(folder).shape == noise().shape
    assert (read_volume(folder).voxels == noise()).all()


def test_numbers_may_have_any_step(tmp_path):
    folder = slices(tmp_path / "a", noise())
    for path in list(folder.iterdir()):
        path.rename(folder / f"z{int(path.stem[1:]) * 5 + 3}um.tif")
    assert (read_volume(folder).voxels == noise()).all()


def test_images_of_several_types_are_not_guessed_among(tmp_path):
    folder = slices(tmp_path / "a", noise(dtype=np.uint8))
    Image.fromarray(noise((20, 30), np.uint8)).save(folder / "t0.png")
    with pytest.raises(ValueError, match=r"mixes images of several types \(12 \.tif, 1 \.png\)"):
        open_volume(folder)


def test_a_folder_of_stacks_or_of_pictures_beside_trees_is_no_stack(tmp_path):
    stacks = tmp_path / "stacks"
    stacks.mkdir()
    for name in ("a.tif", "b.tif"):
        tifffile.imwrite(stacks / name, noise(), metadata={"axes": "ZYX"})
    results = [slices(tmp_path / f"results {n}", noise((2, 20, 30), np.uint8), "s{}.png") for n in range(4)]
    for folder, company in zip(results, ("s0.swc", "s.v3dpbd", "s.lsm", "s.zarr"), strict=True):
        (folder / company).touch()
    one = slices(tmp_path / "one", noise((1, 20, 30)))
    mixed = slices(tmp_path / "mixed", noise((2, 20, 30)))
    tifffile.imwrite(mixed / "stack.tif", noise(), metadata={"axes": "ZYX"})
    (tmp_path / "empty").mkdir()
    for folder in (stacks, *results, one, mixed, tmp_path / "empty"):
        assert not is_stack(folder)
        with pytest.raises(ValueError, match="folder without z-slices"):
            open_volume(folder)
