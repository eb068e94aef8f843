"""Volume: what readers and writer promise, on files built here and on the real ones beside the repository."""

import itertools
import platform
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
import torch

from vit3d.formats import lazy_voxels
from vit3d.formats import tiff as tiff_module
from vit3d.formats.axes import spacing_of, stack_index
from vit3d.volume import Volume, open_volume, read_volume, write_volume

SPACING = (1.5, 0.33, 0.21)


def noise(shape=(9, 33, 21), dtype=np.uint16, seed=0):
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


def imagej(path, voxels, unit="um", spacing=1.5, pixels_per_unit=(4.0, 2.0), axes="ZYX"):
    metadata = {"axes": axes, "spacing": spacing} | ({"unit": unit} if unit else {})
    tifffile.imwrite(path, voxels, imagej=True, resolution=pixels_per_unit, metadata=metadata)
    return path


# ------------------------------------------------------------ the noun


def test_a_crop_keeps_the_spacing_and_the_voxels_of_its_box():
    voxels = noise()
    part = Volume(voxels, SPACING).crop((slice(2, 5), slice(0, 7), slice(3, None)))
    assert part.shape == (3, 7, 18)
    assert part.spacing_um == SPACING
    assert (part.voxels == voxels[2:5, 0:7, 3:]).all()


@pytest.mark.parametrize(
    "box", [(slice(0, 4, 2), slice(None), slice(None)), (slice(0, 4), slice(0, 4)), (0, 1, 2), slice(0, 4)]
)
def test_a_box_with_a_step_or_too_few_slices_is_refused(box):
    with pytest.raises(ValueError, match="three slices"):
        Volume(noise(), SPACING).crop(box)


def test_a_box_that_holds_no_voxel_is_refused():
    with pytest.raises(ValueError, match="holds no voxel"):
        Volume(noise(), SPACING).crop((slice(4, 4), slice(None), slice(None)))


@pytest.mark.parametrize("spacing", [(1, 0, 1), (1, -1, 1), (1, np.nan, 1), (np.inf, 1, 1), (1, 1)])
def test_a_spacing_that_is_not_three_positive_numbers_is_refused(spacing, tmp_path):
    with pytest.raises(ValueError, match="three positive numbers"):
        Volume(noise(), spacing)
    path = imagej(tmp_path / "a.tif", noise())
    with pytest.raises(ValueError, match="three positive numbers"):
        read_volume(path, spacing_um=spacing)


def test_a_tensor_is_taken_as_the_array_it_is():
    volume = Volume(torch.from_numpy(noise()))
    assert isinstance(volume.voxels, np.ndarray)
    assert (volume.voxels == noise()).all()


@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 4, 5), (0, 4, 4)])
def test_voxels_that_are_no_stack_are_refused(shape):
    with pytest.raises(ValueError, match="must be a stack"):
        Volume(np.zeros(shape))


# ------------------------------------------------------------ writing


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "int16", "int32", "uint32", "float64"])
@pytest.mark.parametrize("spacing", [SPACING, None])
def test_written_voxels_and_spacing_come_back(tmp_path, dtype, spacing):
    written = Volume(noise(dtype=dtype), spacing)
    write_volume(written, tmp_path / "a.tif")
    read = read_volume(tmp_path / "a.tif")
    assert read.voxels.dtype == dtype
    assert (read.voxels == written.voxels).all()
    assert read.spacing_um == spacing


def test_a_volume_too_large_for_imagej_is_written_as_bigtiff(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff_module, "_LARGEST_IMAGEJ_BYTES", 100)
    write_volume(Volume(noise(), SPACING), tmp_path / "a.tif")
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert tiff.is_bigtiff
        assert tiff.is_ome
    read = read_volume(tmp_path / "a.tif")
    assert (read.voxels == noise()).all()
    assert read.spacing_um == SPACING


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_64_bit_whole_numbers_are_written_as_32_bit_ones_where_they_fit(tmp_path, dtype):
    ids = noise(dtype=dtype) * 1000
    write_volume(Volume(ids), tmp_path / "a.tif")
    assert (read_volume(tmp_path / "a.tif").voxels == ids).all()
    with pytest.raises(ValueError, match="beyond 32 bits"):
        write_volume(Volume(ids + 2**33), tmp_path / "b.tif")
    assert not (tmp_path / "b.tif").exists()


@pytest.mark.parametrize("dtype", ["complex64", "longdouble"])
def test_what_no_tiff_holds_is_not_written(tmp_path, dtype):
    with pytest.raises(ValueError, match="cannot hold voxels of type"):
        write_volume(Volume(noise(dtype=dtype)), tmp_path / "a.tif")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float64"])
@pytest.mark.parametrize("width", [1, 3, 4])
def test_a_narrow_stack_is_read_back(tmp_path, dtype, width):
    voxels = noise(dtype=dtype)[:, :, :width]
    write_volume(Volume(voxels), tmp_path / "a.tif")
    assert (read_volume(tmp_path / "a.tif").voxels == voxels).all()


def test_a_mask_is_written_as_0_and_255(tmp_path):
    mask = noise() > 100
    write_volume(Volume(mask), tmp_path / "mask.tif")
    assert (read_volume(tmp_path / "mask.tif").voxels == 255 * mask.astype(np.uint8)).all()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def full_disk(name, *_, **__):
        name.write_bytes(b"half")
        raise OSError("No space left on device")

    write_volume(Volume(noise()), tmp_path / "a.tif")
    before = (tmp_path / "a.tif").read_bytes()
    monkeypatch.setattr(tifffile, "imwrite", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_volume(Volume(noise()), tmp_path / "a.tif")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]
    assert (tmp_path / "a.tif").read_bytes() == before


def test_only_tiff_and_zarr_are_written(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.tif, \.tiff or \.zarr"):
        write_volume(Volume(noise()), tmp_path / "a.v3draw")


# ------------------------------------------------------------ opening without reading

LAYOUTS = {
    "contiguous": {},
    "big-endian": {"byteorder": ">"},
    "ImageJ": {"imagej": True, "metadata": {"axes": "ZYX"}},
    "one header for all": {"truncate": True},
    "strips": {"compression": "zlib", "rowsperstrip": 8},
    "tiles": {"compression": "zstd", "tile": (16, 32)},
    "uncompressed tiles": {"tile": (16, 32)},
    "predictor": {"compression": "zlib", "predictor": True},
    "OME": {"ome": True, "compression": "lzw", "metadata": {"axes": "ZYX"}},
    "BigTIFF": {"bigtiff": True, "metadata": None, "compression": "zlib"},
    "volumetric tiles": {"tile": (4, 16, 32), "volumetric": True, "compression": "zlib"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tiff_of_any_layout_gives_every_box(tmp_path, layout):
    written = noise((9, 40, 70))
    tifffile.imwrite(tmp_path / "a.tif", written, **LAYOUTS[layout])
    volume = open_volume(tmp_path / "a.tif")
    assert (volume.shape, volume.voxels.dtype) == (written.shape, np.uint16)
    random = np.random.default_rng(1)
    for _ in range(10):
        index = tuple(slice(*sorted(random.integers(0, n + 2, 2)), int(random.integers(1, 3))) for n in written.shape)
        assert (volume.voxels[index] == written[index]).all()
        assert volume.voxels[index].dtype == np.uint16
    assert (volume.voxels[-1, 3] == written[-1, 3]).all()
    assert (np.asarray(volume.voxels) == written).all()
    assert (read_volume(tmp_path / "a.tif").voxels == written).all()


@pytest.mark.parametrize("layout", ["strips", "tiles", "volumetric tiles"])
def test_only_what_meets_the_box_is_decoded(tmp_path, layout):
    written = noise((9, 40, 70))
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, written, **LAYOUTS[layout])
    with tifffile.TiffFile(path) as tiff:
        far = [(at, n) for page in tiff.pages for at, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
    data = bytearray(path.read_bytes())
    for at, size in far[1:]:
        data[at : at + size] = bytes(size)
    path.write_bytes(data)
    voxels = open_volume(path).voxels
    near = tuple(slice(0, chunk) for chunk in voxels.chunks)
    assert (voxels[near] == written[near]).all()
    with pytest.raises(ValueError, match=r"a\.tif is damaged"):
        voxels[:, 20:]


def test_a_chosen_channel_is_read_alone_whatever_lies_between(tmp_path):
    for axes, shape in (("ZCYX", (9, 2, 40, 70)), ("CZYX", (2, 9, 40, 70)), ("ZYXS", (9, 40, 70, 3))):
        for compression in (None, "zlib"):
            written = noise(shape, np.uint8)
            tifffile.imwrite(tmp_path / "a.ome.tif", written, metadata={"axes": axes}, compression=compression)
            voxels = open_volume(tmp_path / "a.ome.tif", channel=1).voxels
            expected = written.take(1, max(axes.find("C"), axes.find("S")))
            assert (voxels[2:5, 3:9, ::2] == expected[2:5, 3:9, ::2]).all()
            assert (np.asarray(voxels) == expected).all()


def test_a_time_point_is_chosen_too(tmp_path):
    written = noise((3, 9, 8, 7))
    path = imagej(tmp_path / "a.tif", written, axes="TZYX")
    assert (read_volume(path, time=2).voxels == written[2]).all()


def test_a_raw_stack_opens_without_being_read(tmp_path):
    path = tmp_path / "a.v3draw"
    voxels = noise((2, 9, 33, 21), ">u2")
    path.write_bytes(b"raw_image_stack_by_hpeng" + b"B" + struct.pack(">h4i", 2, 21, 33, 9, 2) + voxels.tobytes())
    volume = open_volume(path, channel=1)
    assert (volume.voxels[3:5, ::2] == voxels[1, 3:5, ::2]).all()
    assert volume.voxels.dtype == np.uint16


@pytest.mark.parametrize("layout", ["contiguous", "tiles"])
def test_several_threads_may_read_at_once(tmp_path, layout):
    written = noise((16, 64, 96))
    tifffile.imwrite(tmp_path / "a.tif", written, **LAYOUTS[layout])
    voxels = open_volume(tmp_path / "a.tif").voxels
    with ThreadPoolExecutor(8) as pool:
        planes = list(pool.map(lambda z: voxels[z % 16], range(64)))
    assert all((plane == written[z % 16]).all() for z, plane in enumerate(planes))


@pytest.mark.slow
def test_an_opened_stack_is_not_in_memory(tmp_path):
    """Reading a corner of 400 MB takes a corner's memory, mapped or compressed."""
    code = r"""
import re, sys
from vit3d.volume import open_volume
# ru_maxrss may be the parent's
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024
for path in sys.argv[1:]:
    open_volume(path).voxels[:2, :8, :8]
before = peak()
for path in sys.argv[1:]:
    voxels = open_volume(path).voxels
    for z in range(0, 400, 20):
        voxels[z : z + 20]
print(peak() - before)
"""
    paths = [tmp_path / "mapped.tif", tmp_path / "tiles.tif"]
    tifffile.imwrite(paths[0], shape=(400, 1000, 1000), dtype=np.uint8)  # a hole: takes no disk
    tifffile.imwrite(paths[1], np.zeros((400, 1000, 1000), np.uint8), compression="zlib", tile=(512, 512))
    done = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 120


# ------------------------------------------------------------ spacing from metadata


@pytest.mark.parametrize(
    "unit, um",
    [("um", 1), ("micron", 1), ("\\u00B5m", 1), ("nm", 1e-3), ("mm", 1e3)],
)
def test_imagej_spacing_is_pixels_per_unit_and_the_absolute_slice_distance(tmp_path, unit, um):
    path = imagej(tmp_path / "a.tif", noise(), unit, spacing=-1.5)
    assert read_volume(path).spacing_um == pytest.approx((1.5 * um, 0.5 * um, 0.25 * um), rel=1e-8)
    assert read_volume(path, spacing_um=(3, 2, 1)).spacing_um == (3, 2, 1)


def test_a_decimal_comma_is_a_point_and_what_is_no_number_no_spacing(tmp_path):
    path = imagej(tmp_path / "a.tif", noise(), spacing="1,5")
    assert read_volume(path).spacing_um == (1.5, 0.5, 0.25)
    assert read_volume(imagej(tmp_path / "a.tif", noise(), spacing="thin")).spacing_um is None


def test_a_spacing_gets_no_digits_from_its_unit():
    assert spacing_of((345, 1000, 330), ("nm", "nm", "nm")) == (0.345, 1.0, 0.33)  # 345 * 1e-3 is 0.34500000000000003


def test_imagej_writes_micro_as_one_latin_byte_too(tmp_path):
    path = imagej(tmp_path / "a.tif", noise(), "Xm")
    path.write_bytes(path.read_bytes().replace(b"unit=Xm", b"unit=\xb5m"))
    assert read_volume(path).spacing_um == (1.5, 0.5, 0.25)


@pytest.mark.parametrize("unit", ["inch", "pixel", "Mm", "", None])
def test_imagej_without_a_physical_unit_has_no_spacing(tmp_path, unit):
    assert read_volume(imagej(tmp_path / "a.tif", noise(), unit)).spacing_um is None


def test_imagej_without_a_resolution_has_no_spacing(tmp_path):
    assert read_volume(imagej(tmp_path / "a.tif", noise(), pixels_per_unit=(0, 0))).spacing_um is None


def test_a_resolution_in_dots_per_inch_is_no_spacing(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", noise(), resolution=(72, 72), resolutionunit="INCH")
    assert read_volume(tmp_path / "a.tif").spacing_um is None


@pytest.mark.parametrize("unit, um", [("µm", 1), ("nm", 1e-3), ("mm", 1e3), (None, 1), ("pixel", None)])
def test_ome_spacing_is_read_with_its_unit(tmp_path, unit, um):
    metadata = {"axes": "ZYX"}
    for axis, size in zip("ZYX", SPACING, strict=True):
        metadata |= {f"PhysicalSize{axis}": size} | ({f"PhysicalSize{axis}Unit": unit} if unit else {})
    tifffile.imwrite(tmp_path / "a.ome.tif", noise(), metadata=metadata)
    expected = um and pytest.approx([um * step for step in SPACING], rel=1e-8)
    assert read_volume(tmp_path / "a.ome.tif").spacing_um == expected


def test_ome_with_a_step_that_is_not_stated_has_no_spacing(tmp_path):
    sizes = {"PhysicalSizeX": 0.3, "PhysicalSizeY": 0.3}
    tifffile.imwrite(tmp_path / "a.ome.tif", noise(), metadata={"axes": "ZYX", **sizes})
    assert read_volume(tmp_path / "a.ome.tif").spacing_um is None


def test_lsm_spacing_is_in_metres(tmp_path):
    sizes = (21, 33, 9, 1, 1, 1, 21, 33)
    steps = (1e-6 * step for step in reversed(SPACING))
    info = struct.pack("<Ii8i3d3d2HI", 0x0400494C, 96, *sizes, *steps, 0, 0, 0, 0, 0, 1)
    with tifffile.TiffWriter(tmp_path / "a.lsm") as tiff:
        for plane in noise():
            tiff.write(plane, metadata=None, extratags=[(34412, "B", len(info), info, True)])
            tiff.write(plane[::4, ::4], metadata=None, subfiletype=1)  # every page has a thumbnail
    read = read_volume(tmp_path / "a.lsm")
    assert (read.voxels == noise()).all()
    assert read.spacing_um == pytest.approx(SPACING, rel=1e-8)


def test_the_real_stacks_state_no_spacing(shared):
    volume = read_volume(shared / "data/op/OP_6.tif")
    assert (volume.shape, volume.voxels.dtype, volume.spacing_um) == ((101, 512, 512), np.uint8, None)
    volume = read_volume(shared / "data/trailmap/volume.tif", spacing_um=(2, 2, 2))
    assert (volume.shape, volume.voxels.dtype, volume.spacing_um) == ((101, 120, 120), np.uint16, (2, 2, 2))


# ------------------------------------------------------------ axes and channels


@pytest.mark.parametrize("axes, shape", [("CZYX", (2, 9, 8, 7)), ("ZCYX", (9, 2, 8, 7)), ("ZYXS", (9, 8, 7, 3))])
def test_a_channel_must_be_chosen_and_is_the_one_that_is_read(tmp_path, axes, shape):
    voxels = noise(shape, np.uint8)
    tifffile.imwrite(tmp_path / "a.ome.tif", voxels, metadata={"axes": axes})
    at = max(axes.find("C"), axes.find("S"))
    with pytest.raises(ValueError, match=rf"{shape[at]} channels.*--channel"):
        read_volume(tmp_path / "a.ome.tif")
    with pytest.raises(ValueError, match="no channel 3"):
        read_volume(tmp_path / "a.ome.tif", channel=3)
    assert (read_volume(tmp_path / "a.ome.tif", channel=1).voxels == voxels.take(1, at)).all()


def test_an_imagej_hyperstack_is_read_by_channel(tmp_path):
    voxels = noise((9, 2, 8, 7))
    path = imagej(tmp_path / "a.tif", voxels, axes="ZCYX")
    read = read_volume(path, channel=1)
    assert (read.voxels == voxels[:, 1]).all()
    assert read.spacing_um == (1.5, 0.5, 0.25)


def test_one_channel_needs_no_choice_but_another_is_refused(tmp_path):
    path = imagej(tmp_path / "a.tif", noise())
    assert (read_volume(path, channel=0).voxels == noise()).all()
    with pytest.raises(ValueError, match=r"1 channel\(s\).*no channel 1"):
        read_volume(path, channel=1)


def test_a_time_axis_is_refused(tmp_path):
    with pytest.raises(ValueError, match="time axis"):
        read_volume(imagej(tmp_path / "a.tif", noise((3, 9, 8, 7)), axes="TZYX"))


@pytest.mark.parametrize("shape, photometric", [((64, 48), "minisblack"), ((64, 48, 3), "rgb")])
def test_a_2d_image_is_refused(tmp_path, shape, photometric):
    tifffile.imwrite(tmp_path / "a.tif", noise(shape, np.uint8), photometric=photometric)
    with pytest.raises(ValueError, match="2D image"):
        read_volume(tmp_path / "a.tif")


def test_slices_that_were_saved_as_channels_are_refused_with_the_way_out(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", noise((9, 8, 7), np.uint8), imagej=True)
    with pytest.raises(ValueError, match=r"2D image \(axes CYX.*metadata=\{'axes': 'ZYX'\}"):
        read_volume(tmp_path / "a.tif")


def test_a_colour_is_chosen_beside_a_single_channel():
    assert stack_index("CZYXS", (1, 5, 6, 7, 3), "a.tif", channel=2) == (0, *[slice(None)] * 3, 2)


def test_axes_that_mean_nothing_here_are_refused(tmp_path):
    axes = {"metadata": {"axes": "AZYX"}, "photometric": "minisblack"}
    tifffile.imwrite(tmp_path / "a.tif", noise((3, 4, 8, 7)), **axes)
    with pytest.raises(ValueError, match="not one 3D stack"):
        read_volume(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", [">u2", ">f4", "int8", "float16", "float64", "uint64"])
def test_every_depth_and_byte_order_is_read_in_the_machines_order(tmp_path, dtype):
    byteorder = ">" if dtype[0] == ">" else "<"
    tifffile.imwrite(tmp_path / "a.tif", noise().astype(dtype), byteorder=byteorder)
    read = read_volume(tmp_path / "a.tif").voxels
    assert read.dtype == np.dtype(dtype).newbyteorder("=")
    assert (read == noise().astype(dtype)).all()


# ------------------------------------------------------------ bad TIFF


def test_a_missing_an_empty_and_a_foreign_file_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_volume(tmp_path / "a.tif")
    (tmp_path / "a.tif").touch()
    with pytest.raises(ValueError, match="is empty"):
        read_volume(tmp_path / "a.tif")
    (tmp_path / "a.tif").write_text("This is a letter, not an image.")
    with pytest.raises(ValueError, match="not a TIFF"):
        read_volume(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"is a folder.*v3dpbd"):
        read_volume(tmp_path)
    (tmp_path / "a.jpeg").touch()
    with pytest.raises(ValueError, match=r"unknown type \.jpeg.*OME-TIFF"):
        read_volume(tmp_path / "a.jpeg")


@pytest.mark.parametrize("suffix", [".czi", ".nd2"])
def test_vendor_formats_name_the_converter(tmp_path, suffix):
    (tmp_path / f"a{suffix}").touch()
    with pytest.raises(ValueError, match=rf"bfconvert a{suffix} a\.ome\.tif"):
        read_volume(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("kind", ["imagej", "ome", "shaped", "plain", "bigtiff"])
@pytest.mark.parametrize("compression", [None, "zlib", "zstd"])
def test_a_tiff_truncated_anywhere_is_refused(tmp_path, kind, compression):
    options = {
        "imagej": {"imagej": True, "metadata": {"axes": "ZYX"}},
        "ome": {"ome": True, "metadata": {"axes": "ZYX"}},
        "shaped": {},
        "plain": {"metadata": None},
        "bigtiff": {"bigtiff": True, "metadata": None},
    }[kind]
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise(), compression=compression, **options)
    whole = path.read_bytes()
    assert (read_volume(path).voxels == noise()).all()
    # tifffile may end a file with 16 bytes of padding; without them nothing is lost
    for length in {1, 8, 30, *np.linspace(100, len(whole) - 20, 25).astype(int).tolist()}:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut short|incomplete|damaged|not a TIFF"):
            read_volume(path)


@pytest.mark.parametrize("options", [{"imagej": True}, {"ome": True}, {}])
def test_a_stack_with_fewer_pages_than_its_description_declares_is_refused(tmp_path, options):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise(), compression="zlib", metadata={"axes": "ZYX"}, **options)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[4]
        chain_end = page.offset + 2 + 12 * len(page.tags)
    data = bytearray(path.read_bytes())
    data[chain_end : chain_end + 4] = bytes(4)  # a page list that ends well, five pages long
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"incomplete|damaged"):
        read_volume(path)


@pytest.mark.parametrize("options", [{"imagej": True}, {"truncate": True}])
def test_one_page_header_for_more_slices_than_the_file_holds_is_refused(tmp_path, options):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise(), metadata={"axes": "ZYX"}, **options)
    with tifffile.TiffFile(path) as tiff:
        page, voxels = tiff.pages[0], tiff.series[0].dataoffset
        chain_end = page.offset + 2 + 12 * len(page.tags)
    data = bytearray(path.read_bytes())
    data[chain_end : chain_end + 4] = bytes(4)
    path.write_bytes(data)
    assert (read_volume(path).voxels == noise()).all()  # as Fiji saves stacks over 4 GB
    path.write_bytes(data[: voxels + noise()[:5].nbytes])
    with pytest.raises(ValueError, match=r"cut short|incomplete"):
        read_volume(path)


@pytest.mark.timeout(60)
def test_a_list_of_pages_that_runs_in_a_circle_ends(tmp_path):
    path, voxels = tmp_path / "a.tif", np.arange(5 * 16 * 16, dtype=np.uint8).reshape(5, 16, 16)
    tifffile.imwrite(path, voxels, compression="zlib", metadata=None, photometric="minisblack")
    with tifffile.TiffFile(path) as tiff:
        first, *_, last = (page.offset for page in tiff.pages)
    data = bytearray(path.read_bytes())
    (num_tags,) = struct.unpack_from("<H", data, last)
    struct.pack_into("<I", data, last + 2 + 12 * num_tags, first)
    path.write_bytes(data)
    assert (read_volume(path).voxels == voxels).all()


def test_a_bigtiff_whose_first_page_lies_beyond_every_file_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise(), bigtiff=True)
    path.write_bytes(path.read_bytes()[:8] + b"\xff" * 8 + path.read_bytes()[16:])
    with pytest.raises(ValueError, match="cut short"):
        read_volume(path)


def test_compressed_bytes_that_were_overwritten_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise(), compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        start = tiff.pages[3].dataoffsets[0]
    data = bytearray(path.read_bytes())
    data[start : start + 200] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        read_volume(path)


def test_a_header_that_declares_more_than_memory_is_refused_before_allocating(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise((2, 16, 16), np.uint8), metadata=None, compression="zlib")
    data = bytearray(path.read_bytes())
    for tag in (256, 257, 278):  # width, length, rows per strip: inline values of every page
        entry, huge = struct.pack("<HHI", tag, 3, 1), struct.pack("<HHII", tag, 4, 1, 1 << 20)
        for form in (entry, struct.pack("<HHI", tag, 4, 1)):
            at = data.find(form)
            while at >= 0:
                data[at : at + 12] = huge
                at = data.find(form, at + 12)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"1048576 x 1048576 voxels.*GiB of memory are free"):
        read_volume(path)


def test_a_file_for_which_there_is_no_memory_is_not_said_to_be_damaged():
    with pytest.raises(MemoryError), lazy_voxels.damage_reported("a.tif"):
        raise MemoryError


def test_the_memory_limit_is_the_memory_that_is_free(tmp_path, monkeypatch):
    path = imagej(tmp_path / "a.tif", noise())
    monkeypatch.setattr(lazy_voxels, "free_bytes", lambda: noise().nbytes)
    assert (read_volume(path).voxels == noise()).all()
    monkeypatch.setattr(lazy_voxels, "free_bytes", lambda: noise().nbytes - 1)
    with pytest.raises(ValueError, match="memory are free"):
        read_volume(path)


@pytest.mark.parametrize("bad, said", [(np.nan, "NaN or inf"), (-np.inf, "NaN or inf"), (1e39, r"beyond 3.4e\+38")])
def test_voxels_that_float32_does_not_hold_are_refused(tmp_path, bad, said):
    voxels = noise(dtype=np.float64)
    voxels[4, 3, 2] = bad
    tifffile.imwrite(tmp_path / "a.tif", voxels)
    with pytest.raises(ValueError, match=said):
        read_volume(tmp_path / "a.tif")


def test_complex_voxels_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", noise().astype(np.complex64))
    with pytest.raises(ValueError, match="complex64"):
        read_volume(tmp_path / "a.tif")


# ------------------------------------------------------------ Vaa3D


def vaa3d(path, key, datatype, shape, body, order="<"):
    code = {"<": b"L", ">": b"B"}[order]
    path.write_bytes(key + code + struct.pack(f"{order}h4i", datatype, *reversed(shape)) + body)
    return path


RAW, PBD = b"raw_image_stack_by_hpeng", b"v3d_volume_pkbitdf_encod"


def packed(codes, bits):
    """16-bit packets hold their differences highest bit first, the last byte filled with zeros."""
    text = "".join(f"{code:0{bits}b}" for code in codes)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def encode_16bit(values, order="<", width=None):
    """Pack bits and differences by the format's definition: a literal, then whatever fits, narrowest first.

    Header byte: 0-31 n+1 literals; 32-79, 80-182, 183-222 differences of 3, 4, 5 bits; 223-255 repeats.
    A difference d is stored as d when it is not negative, else as half the range minus d.
    """
    out, i, used = bytearray(), 0, set()
    while i < len(values):
        run = next((k for k in range(1, 33) if i + k >= len(values) or values[i + k] != values[i]), 33)
        widths = [(3, 31, 48), (4, 79, 103), (5, 182, 40)] if width is None else [width]
        options = []
        for bits, base, longest in widths if i else []:
            top, n = 1 << (bits - 1), 0
            while n < longest and i + n < len(values) and -top < values[i + n] - values[i + n - 1] <= top:
                n += 1
            options.append((n / (1 + -(-n * bits // 8)), bits, base, n))
        efficiency, bits, base, n = max(options, default=(0, 0, 0, 0))
        if run / 3 > max(efficiency, 1 / 3):
            out += bytes([222 + run]) + struct.pack(order + "H", values[i])
            i, n = i + run, 0
            used.add("repeat")
        elif n:
            steps = [values[i + k] - values[i + k - 1] for k in range(n)]
            out += bytes([base + n]) + packed([d if d >= 0 else (1 << bits - 1) - d for d in steps], bits)
            i += n
            used.add(bits)
        else:
            n = min(3, len(values) - i)
            out += bytes([n - 1]) + struct.pack(f"{order}{n}H", *values[i : i + n])
            i += n
            used.add("literal")
    return bytes(out), used


def walk_of_steps(widest, seed=0, shape=(6, 40, 50)):
    """Values that rise and fall by up to `widest`, with plateaus and jumps, also over the 16-bit border."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(-widest + 1, widest + 1, np.prod(shape))
    steps[rng.random(steps.size) < 0.02] = 3000
    for start in rng.integers(0, steps.size, 40):
        steps[start : start + 60] = 0
    return (np.cumsum(steps) % 65536).reshape(shape)


def test_the_real_v3dpbd_equals_its_expected_stack(shared):
    folder = shared / "data/vaa3d"
    read = read_volume(folder / "smalltest.v3dpbd")
    assert (read.voxels == tifffile.imread(folder / "smalltest_expected.tif")).all()
    assert read.spacing_um is None


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("widest, width", [(4, (3, 31, 48)), (8, (4, 79, 103)), (16, (5, 182, 40)), (16, None)])
def test_16bit_v3dpbd_differences_of_every_width_and_sign_are_undone(tmp_path, widest, width, order):
    values = walk_of_steps(widest)
    stream, used = encode_16bit(values.ravel().tolist(), order, width)
    assert used >= {"literal", "repeat", width[0] if width else 5}
    path = vaa3d(tmp_path / "a.v3dpbd", PBD, 2, (1, *values.shape), stream, order)
    read = read_volume(path).voxels
    assert read.dtype == np.uint16
    assert (read == values).all()


def test_16bit_differences_decode_as_worked_out_by_hand(tmp_path):
    # 1000, then +4 -1 -3 by three bits (100 101 111), +8 -7 by four (1000 1111), +16 -15 by five, two repeats
    stream = bytes([0, 0xE8, 0x03, 34, 0b10010111, 0b10000000, 81, 0b10001111, 184, 0b10000111, 0b11000000])
    stream += bytes([224, 7, 0])
    path = vaa3d(tmp_path / "a.v3dpbd", PBD, 2, (1, 2, 1, 5), stream)
    assert read_volume(path).voxels.ravel().tolist() == [1000, 1004, 1003, 1000, 1008, 1001, 1017, 1002, 7, 7]


def test_8bit_differences_decode_as_worked_out_by_hand(tmp_path):
    # literals 10 20, five differences +1 +2 -1 0 | -1 from the lowest bits up, 200 three times
    stream = bytes([1, 10, 20, 37, 0b00111001, 0b11, 130, 200])
    path = vaa3d(tmp_path / "a.v3dpbd", PBD, 1, (1, 2, 1, 5), stream)
    assert read_volume(path).voxels.ravel().tolist() == [10, 20, 21, 23, 22, 22, 21, 200, 200, 200]


def test_a_v3dpbd_longer_than_one_batch_of_packets_carries_its_last_voxel_over(tmp_path):
    stream = bytes([0, 100]) + bytes([33, 0b01, 33, 0b11]) * 20000
    path = vaa3d(tmp_path / "a.v3dpbd", PBD, 1, (1, 40001, 1, 1), stream)
    assert (read_volume(path).voxels.ravel() == [100, *[101, 100] * 20000]).all()


@pytest.mark.slow
def test_a_50_megabyte_v3dpbd_is_read_within_ten_seconds(tmp_path, shared):
    stream = (shared / "data/vaa3d/smalltest.v3dpbd").read_bytes()[43:]
    path = vaa3d(tmp_path / "a.v3dpbd", PBD, 1, (1, 5 * 41, 512, 512), stream * 5)
    start = time.process_time()
    read_volume(path)
    assert time.process_time() - start < 10


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("datatype, dtype", [(1, "u1"), (2, "u2"), (4, "f4")])
def test_v3draw_is_read_x_fastest_channel_slowest(tmp_path, order, datatype, dtype):
    voxels = noise((2, 5, 4, 3), order + dtype)
    path = vaa3d(tmp_path / "a.v3draw", RAW, datatype, voxels.shape, voxels.tobytes(), order)
    with pytest.raises(ValueError, match="2 channels"):
        read_volume(path)
    read = read_volume(path, channel=1, spacing_um=SPACING)
    assert read.voxels.dtype == np.dtype(dtype)
    assert (read.voxels == voxels[1]).all()
    assert read.spacing_um == SPACING


@pytest.mark.parametrize("change", [-1, 1])
def test_a_v3draw_of_the_wrong_size_is_refused(tmp_path, change):
    body = bytes(60 + change)
    path = vaa3d(tmp_path / "a.v3draw", RAW, 1, (1, 5, 4, 3), body)
    with pytest.raises(ValueError, match=rf"103 bytes, but has {103 + change}"):
        read_volume(path)


def test_a_v3dpbd_that_is_truncated_anywhere_is_refused(tmp_path):
    values = walk_of_steps(16, shape=(2, 10, 10))
    stream, _ = encode_16bit(values.ravel().tolist())
    for length in range(len(stream)):
        path = vaa3d(tmp_path / "a.v3dpbd", PBD, 2, (1, *values.shape), stream[:length])
        with pytest.raises(ValueError, match="200 voxels, but its compressed stream ends before"):
            read_volume(path)


@pytest.mark.parametrize("extra", [bytes([128, 7]), bytes([0, 5]), bytes([33, 0]), bytes([32])])
def test_a_v3dpbd_that_holds_more_than_it_declares_is_refused(tmp_path, extra):
    path = vaa3d(tmp_path / "a.v3dpbd", PBD, 1, (1, 2, 1, 5), bytes([137, 9]) + extra)
    with pytest.raises(ValueError, match="10 voxels, but its compressed stream holds more"):
        read_volume(path)


def test_vaa3d_headers_that_cannot_be_true_are_refused(tmp_path):
    path = tmp_path / "a.v3dpbd"
    with pytest.raises(ValueError, match=r"datatype 33 \(lossy 3-bit"):
        read_volume(vaa3d(path, PBD, 33, (1, 5, 4, 3), b""))
    with pytest.raises(ValueError, match="datatype 4"):
        read_volume(vaa3d(path, PBD, 4, (1, 5, 4, 3), b""))
    with pytest.raises(ValueError, match="must be positive"):
        read_volume(vaa3d(path, PBD, 1, (1, 5, -4, 3), b""))
    with pytest.raises(ValueError, match="2D image"):
        read_volume(vaa3d(path, PBD, 1, (1, 1, 4, 3), b""))
    with pytest.raises(ValueError, match="memory are free"):
        read_volume(vaa3d(path, PBD, 1, (1, 1 << 20, 1 << 20, 1 << 20), b"\0\0"))
    with pytest.raises(ValueError, match="does not begin with"):
        read_volume(vaa3d(path, b"v3d_stack_pkbit_by_gene1", 1, (1, 5, 4, 3), b""))
    path.write_bytes(PBD + b"L")
    with pytest.raises(ValueError, match="does not begin with"):
        read_volume(path)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_arrays_that_are_freed_go_back_to_the_system_at_once():
    code = """
from pathlib import Path
import numpy as np
from vit3d.formats.lazy_voxels import give_back_freed

def resident():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

give_back_freed()
np.ones(2**25 - 2**16, np.uint8)  # freed, it would make glibc keep all that are no larger
arrays = [np.ones(2**23, np.uint8) for _ in range(16)]
before = resident()
del arrays[::2]  # between others that stay
print((before - resident()) / (8 * 2**23))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert float(done.stdout) > 0.9, done.stderr


@pytest.mark.parametrize("shapes, ome", [([(9, 20, 30), (7, 20, 30)], False), ([(9, 20, 30), (9, 20, 30)], True)])
def test_a_tiff_of_several_stacks_is_not_taken_for_its_first(tmp_path, shapes, ome):
    path = tmp_path / ("a.ome.tif" if ome else "a.tif")
    with tifffile.TiffWriter(path, ome=ome) as file:
        for shape in shapes:
            file.write(np.ones(shape, np.uint8), photometric="minisblack", metadata={"axes": "ZYX"})
    with pytest.raises(ValueError, match=r"holds several stacks \(9 x 20 x 30, "):
        read_volume(path)


@pytest.mark.parametrize("preview", [np.s_[::2, ::2], np.s_[:, ::2], np.s_[::2]])
def test_a_preview_beside_a_stack_is_passed_over(tmp_path, preview):
    voxels = np.random.default_rng(0).integers(0, 200, (9, 20, 30)).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(voxels, photometric="minisblack", metadata={"axes": "ZYX"})
        file.write(voxels[0][preview], photometric="minisblack")
    assert (read_volume(tmp_path / "a.tif").voxels == voxels).all()


COUNTED = {"metadata": None, "description": '{"shape": [20, 64, 48]}'}
PAGE_BY_PAGE = [{}, {"metadata": None}, {"metadata": None, "compression": "zlib"}]


def page_by_page(path, pages, description=None, byteorder=None, **options):
    with tifffile.TiffWriter(path, byteorder=byteorder) as file:
        for page in pages:
            file.write(page, contiguous=False, description=description, **options)
            description = None


@pytest.mark.parametrize(
    "options, at",
    [*itertools.product(PAGE_BY_PAGE, (0, 1, 4, 19)), *itertools.product([COUNTED], (1, 4, 19))],
)
def test_a_page_unlike_the_others_is_named(tmp_path, options, at):
    path, pages = tmp_path / "a.tif", list(noise((20, 64, 48), np.uint8))
    for odd, said in ((pages[at][:50], "50 x 48 of uint8"), (pages[at].astype(np.int16), "64 x 48 of int16")):
        page_by_page(path, [*pages[:at], odd, *pages[at + 1 :]], **options)
        with pytest.raises(ValueError, match=rf"a\.tif is no stack: page {at + 1} is {said}, but most .*must be equal"):
            open_volume(path)


def test_pages_unlike_the_others_that_come_at_no_regular_distance_are_named(tmp_path):
    colours = noise((20, 64, 48, 3), np.uint16)
    for pages in (list(colours[..., 0]), list(colours)):
        for at in (1, 9):
            pages[at] = pages[at].astype(np.uint8)
        page_by_page(tmp_path / "a.tif", pages, metadata=None, byteorder=">")
        with pytest.raises(ValueError, match=r"page 2 is 64 x 48( x 3)? of uint8, but most pages are .* of uint16"):
            open_volume(tmp_path / "a.tif", channel=None if pages[0].ndim == 2 else 0)


@pytest.mark.parametrize("odd", [(7, 8), (0, 1), (5, 6, 7, 8), (4, 5), (1, 3, 5, 7)])
def test_of_several_shorter_pages_wherever_they_come_one_is_named(tmp_path, odd):
    pages = [plane[: 63 if at in odd else 64] for at, plane in enumerate(noise((9, 64, 48), np.uint8))]
    page_by_page(tmp_path / "a.tif", pages, metadata=None)
    with pytest.raises(ValueError, match=rf"page {odd[0] + 1} is 63 x 48 of uint8, but most pages are 64 x 48"):
        open_volume(tmp_path / "a.tif")


def test_thumbnails_that_come_last_or_with_every_slice_are_passed_over(tmp_path):
    voxels, path = noise((9, 64, 48), np.uint8), tmp_path / "a.tif"
    small = [plane[::4, ::4] for plane in voxels]
    in_turn = [page for both in zip(voxels, small, strict=True) for page in both]
    for pages in ([*voxels, small[0]], [*voxels, small[0], small[1][:9]], in_turn):
        page_by_page(path, pages, metadata=None)
        assert (read_volume(path).voxels == voxels).all()


def test_no_page_of_those_that_a_description_counts_may_be_of_another_type(tmp_path):
    pages = list(noise((20, 64, 48), np.uint8))
    pages[10:] = [page.astype(np.uint16) for page in pages[10:]]
    page_by_page(tmp_path / "a.tif", pages, **COUNTED)
    with pytest.raises(ValueError, match=r"page 11 is 64 x 48 of uint16"):
        open_volume(tmp_path / "a.tif")


@pytest.mark.parametrize(
    "order, flag", [("all last", None), ("all last", 1), ("in turn", None), ("in turn", 1), ("one", 1)]
)
def test_pages_that_are_previews_are_passed_over(tmp_path, order, flag):
    voxels = noise((20, 64, 48))
    slices, previews = ([(plane, None) for plane in voxels], [(plane[::4, ::4], flag) for plane in voxels])
    pages = slices + (previews[:1] if order == "one" else previews)
    if order == "in turn":
        pages[::2], pages[1::2] = slices, previews
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page, subfiletype in pages:
            file.write(page, metadata=None, subfiletype=subfiletype, contiguous=False)
    assert (read_volume(tmp_path / "a.tif").voxels == voxels).all()


@pytest.mark.parametrize("unit, um", [("Microns", 1.0), ("MICRON", 1.0), ("Micrometers", 1.0), ("nm", 1e-3)])
def test_units_may_be_written_large_and_differ_in_depth(tmp_path, unit, um):
    known = {"axes": "ZYX", "unit": unit, "spacing": 2000, "zunit": "nm"}
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 5, 6), np.uint8), imagej=True, resolution=(2, 2), metadata=known)
    assert read_volume(tmp_path / "a.tif").spacing_um == pytest.approx((2.0, 0.5 * um, 0.5 * um))


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"metadata": None}])
def test_slices_that_were_written_one_by_one_are_a_stack(tmp_path, options):
    path, voxels = tmp_path / "loop.tif", noise()
    with tifffile.TiffWriter(path) as file:
        for plane in voxels:
            file.write(plane, **options)
    assert (read_volume(path).voxels == voxels).all()
    assert (open_volume(path).voxels[2:5, 7:20, 3:9] == voxels[2:5, 7:20, 3:9]).all()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"is cut short|is incomplete"):
        read_volume(path)
    for other, ome in ((np.float32, False), (voxels.dtype, True)):  # nor two positions
        with tifffile.TiffWriter(path, ome=ome) as file:
            for plane in (voxels[0], voxels[1].astype(other)):
                file.write(plane)
        with pytest.raises(ValueError, match="is a 2D image"):
            read_volume(path)
