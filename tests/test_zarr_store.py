"""Zarr stores as people have them: both versions, OME-Zarr of all versions, at a URL, damaged, and absurd."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from vit3d.formats import lazy_voxels
from vit3d.volume import Volume, is_stack, open_volume, read_volume, write_volume

SPACING = (1.5, 0.33, 0.21)
SHAPE = (12, 20, 24)


def noise(shape=SHAPE, dtype=np.uint16, seed=0):
    return np.random.default_rng(seed).integers(1, 200, shape).astype(dtype)


def plain(path, voxels, version=3, chunks=(8, 16, 16), **options):
    chunks = (1,) * (voxels.ndim - 3) + chunks
    array = zarr.create_array(
        path, shape=voxels.shape, dtype=voxels.dtype, chunks=chunks, zarr_format=version, **options
    )
    array[...] = voxels
    return path


def axes_of(names, unit="micrometer"):
    kinds = {"t": "time", "c": "channel"}
    return [
        {"name": name, "type": kinds.get(name, "space")} | ({"unit": unit} if name in "zyx" and unit else {})
        for name in names
    ]


def ome(path, levels, names="zyx", version="0.5", scales=None, overall=None, unit="micrometer"):
    """An OME-Zarr of these arrays, each with the scale that belongs to it."""
    group = zarr.create_group(path, zarr_format=3 if version == "0.5" else 2)
    for name, voxels in levels.items():
        group.create_array(name, data=voxels, chunks=(1,) * (voxels.ndim - 3) + (8, 16, 16))
    scales = scales or [[1.0] * len(names)] * len(levels)
    datasets = [
        {"path": name, "coordinateTransformations": [{"type": "scale", "scale": list(scale)}]}
        for name, scale in zip(levels, scales, strict=True)
    ]
    image = {"axes": axes_of(names, unit), "datasets": datasets}
    if overall:
        image["coordinateTransformations"] = [{"type": "scale", "scale": list(overall)}]
    if version == "0.5":
        group.attrs["ome"] = {"version": "0.5", "multiscales": [image]}
    else:
        group.attrs["multiscales"] = [{**image, "version": version}]
    return path


class Server(ThreadingHTTPServer):
    """A web server of a folder that remembers what it was asked for, and may stumble."""

    def __init__(self, folder):
        self.asked, self.stumbles = [], 0
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))

    def url(self, path):
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class Handler(SimpleHTTPRequestHandler):
    def send_head(self):
        self.server.asked.append(self.path)
        if self.server.stumbles and "/c/" in self.path:
            self.server.stumbles -= 1
            self.send_error(503)
            return None
        return super().send_head()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    (tmp_path / "web").mkdir()
    server = Server(tmp_path / "web")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# ------------------------------------------------------------ arrays


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("dtype", [">u2", "float32", "bool"])
def test_a_plain_array_opens_lazily_and_gives_every_box(tmp_path, version, dtype):
    written = noise(dtype=dtype)
    volume = open_volume(plain(tmp_path / "a.zarr", written, version))
    voxels = volume.voxels
    assert (volume.shape, voxels.chunks, volume.spacing_um) == (SHAPE, (8, 16, 16), None)
    assert voxels.dtype == np.dtype(dtype).newbyteorder("=")
    random = np.random.default_rng(1)
    for _ in range(12):
        index = tuple(slice(*sorted(random.integers(-3, size + 4, 2)), int(random.integers(1, 4))) for size in SHAPE)
        assert voxels[index].dtype == voxels.dtype
        assert np.array_equal(voxels[index], written[index]), index
    for index in (4, -1, (slice(None), 3), (slice(2, 4), ..., 5), (1, 2, 3), ...):
        assert np.array_equal(voxels[index], written[index]), index
    assert np.array_equal(np.asarray(voxels), written)
    assert np.array_equal(read_volume(tmp_path / "a.zarr").voxels, written)
    assert np.asarray(voxels, np.float64).dtype == np.float64


@pytest.mark.parametrize("index", [np.array([1, 2]), (0, 0, 0, 0), slice(None, None, -1), 12, [1]])
def test_what_cannot_be_read_from_disk_is_no_index(tmp_path, index):
    voxels = open_volume(plain(tmp_path / "a.zarr", noise())).voxels
    with pytest.raises(IndexError):
        voxels[index]


def test_voxels_on_disk_are_no_array_without_being_read(tmp_path):
    with pytest.raises(ValueError, match="without being read"):
        np.asarray(open_volume(plain(tmp_path / "a.zarr", noise())).voxels, copy=False)


def test_a_thinned_read_holds_one_piece_at_a_time_and_gives_the_same(tmp_path, monkeypatch):
    written = noise((24, 30, 40))
    voxels = open_volume(plain(tmp_path / "a.zarr", written)).voxels
    monkeypatch.setattr(lazy_voxels, "_PIECE", (8, 16, 16))
    boxes, read = [], voxels._read
    monkeypatch.setattr(voxels, "_read", lambda box: boxes.append(box) or read(box))
    for steps in ((2, 2, 2), (3, 5, 7), (9, 17, 1), (24, 30, 40)):
        index = tuple(slice(first, None, step) for first, step in zip((0, 1, 2), steps, strict=True))
        assert np.array_equal(voxels[index], written[index])
    assert max(np.prod([b.stop - b.start for b in box]) for box in boxes) <= 8 * 16 * 16


@pytest.mark.parametrize("depth", [24, 130])
def test_projections_are_those_of_the_array(tmp_path, depth):
    written = noise((depth, 30, 40))
    voxels = open_volume(plain(tmp_path / "a.zarr", written)).voxels
    for axis in range(3):
        assert np.array_equal(lazy_voxels.projection(voxels, axis), written.max(axis))
        assert np.array_equal(lazy_voxels.projection(voxels, axis, dark=True), written.min(axis))


def test_every_pixel_of_a_projection_is_made_of_several_pieces(tmp_path):
    written = noise((24, 30, 40))
    boxes = list(lazy_voxels.pieces(open_volume(plain(tmp_path / "a.zarr", written)).voxels, (8, 16, 16)))
    covered = np.zeros(written.shape, int)
    for box in boxes:
        covered[box] += 1
    assert (covered == 1).all()
    assert len(boxes) == 3 * 2 * 3


def test_an_array_says_its_axes_by_dimension_names_or_by_their_number(tmp_path):
    voxels = noise((2, *SHAPE))
    plain(tmp_path / "named.zarr", voxels, dimension_names=["c", "z", "y", "x"])
    plain(tmp_path / "unnamed.zarr", voxels)
    plain(tmp_path / "half named.zarr", voxels, dimension_names=[None, "z", "y", "x"])
    plain(tmp_path / "xarray.zarr", voxels, version=2, attributes={"_ARRAY_DIMENSIONS": ["c", "z", "y", "x"]})
    for name in ("named", "unnamed", "half named", "xarray"):
        with pytest.raises(ValueError, match=r"2 channels.*--channel"):
            open_volume(tmp_path / f"{name}.zarr")
        assert np.array_equal(open_volume(tmp_path / f"{name}.zarr", channel=1).voxels[3:5], voxels[1, 3:5])
    with pytest.raises(ValueError, match="no levels"):
        open_volume(tmp_path / "named.zarr", channel=1, level="0")


# ------------------------------------------------------------ OME-Zarr


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("unit, um", [("micrometer", 1), ("nanometer", 1e-3), ("millimeter", 1e3), (None, None)])
def test_spacing_is_the_levels_scale_times_the_images_in_its_unit(tmp_path, version, unit, um):
    scales, overall = [(3, 0.5, 0.25), (3, 1, 0.5)], (0.5, 2, 2)
    ome(tmp_path / "a.zarr", {"s0": noise(), "s1": noise()[:, ::2, ::2]}, "zyx", version, scales, overall, unit)
    expected = um and pytest.approx((1.5 * um, 1 * um, 0.5 * um))
    assert open_volume(tmp_path / "a.zarr").spacing_um == expected
    assert open_volume(tmp_path / "a.zarr", level="s1").spacing_um == (um and pytest.approx((1.5 * um, 2 * um, um)))
    assert open_volume(tmp_path / "a.zarr", spacing_um=SPACING).spacing_um == SPACING
    assert open_volume(tmp_path / "a.zarr/s0").spacing_um == expected  # the level itself, by its own path


def test_the_spacing_of_a_5d_image_is_that_of_z_y_and_x(tmp_path):
    voxels = noise((3, 2, *SHAPE))
    ome(tmp_path / "a.zarr", {"0": voxels}, "tczyx", scales=[(7, 5, *SPACING)])
    with pytest.raises(ValueError, match=r"time axis.*time="):
        open_volume(tmp_path / "a.zarr", channel=0)
    with pytest.raises(ValueError, match="2 channels"):
        open_volume(tmp_path / "a.zarr", time=0)
    with pytest.raises(ValueError, match=r"3 time point.*no time point 3"):
        open_volume(tmp_path / "a.zarr", time=3, channel=0)
    volume = open_volume(tmp_path / "a.zarr", channel=1, time=2)
    assert volume.spacing_um == SPACING
    assert np.array_equal(volume.voxels[1:4, ::2], voxels[2, 1, 1:4, ::2])


def test_single_channels_and_time_points_need_no_choice(tmp_path):
    voxels = noise((1, 1, *SHAPE))
    assert np.array_equal(read_volume(ome(tmp_path / "a.zarr", {"0": voxels}, "tczyx", "0.4")).voxels, voxels[0, 0])


def test_a_level_is_chosen_by_name_or_by_spacing(tmp_path):
    levels = {name: noise(seed=seed) for seed, name in enumerate(("full", "half", "quarter"))}
    scales = [(1, 0.5, 0.5), (2, 1, 1), (4, 2, 2)]
    path = ome(tmp_path / "a.zarr", levels, scales=scales)
    chosen = {None: "full", "half": "half", "quarter": "quarter", 2.0: "half", (2, 1, 1): "half"}
    chosen |= {(1.9, 1, 1): "full", "4um": "quarter", "4,2,2um": "quarter", "4,1,4um": "half", 0.1: "full"}
    chosen |= {(1.95, 1, 1): "half"}  # hardly coarser
    for level, name in chosen.items():
        assert np.array_equal(open_volume(path, level=level).voxels[3], levels[name][3]), level
    with pytest.raises(ValueError, match="levels full, half, quarter, and no level '7'"):
        open_volume(path, level="7")
    with pytest.raises(ValueError, match=r"The level '1\.\.2um' is no spacing: give one as 2um"):
        open_volume(path, level="1..2um")
    ome(tmp_path / "b.zarr", levels, scales=scales, unit=None)
    with pytest.raises(ValueError, match=r"states no voxel size.*by name: full"):
        open_volume(tmp_path / "b.zarr", level=2.0)
    write_volume(Volume(noise()), tmp_path / "a.tif")
    with pytest.raises(ValueError, match="no levels"):
        open_volume(tmp_path / "a.tif", level="0")


def test_versions_before_axes_had_types_are_read(tmp_path):
    group = zarr.create_group(tmp_path / "a.zarr", zarr_format=2)
    group.create_array("0", data=noise((1, 2, *SHAPE)), chunks=(1, 1, 8, 16, 16))
    group.attrs["multiscales"] = [{"version": "0.2", "datasets": [{"path": "0"}]}]
    assert np.array_equal(read_volume(tmp_path / "a.zarr", channel=1).voxels, noise((1, 2, *SHAPE))[0, 1])
    group.attrs["multiscales"] = [{"version": "0.3", "axes": list("tczyx"), "datasets": [{"path": "0"}]}]
    assert np.array_equal(read_volume(tmp_path / "a.zarr", channel=1).voxels, noise((1, 2, *SHAPE))[0, 1])


def test_the_only_image_of_a_collection_is_found_and_several_are_not_guessed_among(tmp_path):
    group = zarr.create_group(tmp_path / "a.zarr", attributes={"ome": {"version": "0.5", "bioformats2raw.layout": 3}})
    ome(tmp_path / "a.zarr/0", {"0": noise()}, scales=[SPACING])
    assert open_volume(tmp_path / "a.zarr").spacing_um == SPACING
    group.create_group("1")
    with pytest.raises(ValueError, match=r"several images.*a\.zarr/0"):
        open_volume(tmp_path / "a.zarr")


@pytest.mark.parametrize("names", ["xyz", "yxz", "zxy"])
def test_axes_in_another_order_are_refused(tmp_path, names):
    with pytest.raises(ValueError, match="not one 3D stack"):
        open_volume(ome(tmp_path / "a.zarr", {"0": noise()}, names))
    with pytest.raises(ValueError, match="not one 3D stack"):
        open_volume(plain(tmp_path / "b.zarr", noise(), dimension_names=list(names)))
    as_xarray = {"_ARRAY_DIMENSIONS": list(names)}
    with pytest.raises(ValueError, match="not one 3D stack"):
        open_volume(plain(tmp_path / "c.zarr", noise(), version=2, attributes=as_xarray))


def _edited(path, change):
    file = path / "zarr.json"
    metadata = json.loads(file.read_text())
    change(metadata)
    file.write_text(json.dumps(metadata))
    return path


BROKEN = {
    "a level that is not there": (lambda image: image["datasets"][0].update(path="9"), "names a level 9, but holds no"),
    "no datasets": (lambda image: image.pop("datasets"), "broken OME-Zarr metadata"),
    "no level": (lambda image: image.update(datasets=[]), "."),
    "a path out of the store": (lambda image: image["datasets"][0].update(path="../b.zarr"), "."),
    "axes that do not fit": (lambda image: image["axes"].insert(0, {"name": "c", "type": "channel"}), "axes"),
    "axes that do not fit, without a scale": (
        lambda image: image.update(axes=axes_of("czyx"), datasets=[{"path": "0"}]),
        "has 3 axes, but its metadata name 4",
    ),
    "a scale that does not fit": (
        lambda image: image["datasets"][0]["coordinateTransformations"][0].update(scale=[1, 2]),
        "broken OME-Zarr metadata",
    ),
    "an axis of an unknown kind": (lambda image: image["axes"][0].update(name="q", type="angle"), "not one 3D stack"),
    "axes that are no list": (lambda image: image.update(axes=7), "broken OME-Zarr metadata"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_metadata_are_refused_in_a_sentence(tmp_path, what):
    change, sentence = BROKEN[what]
    plain(tmp_path / "b.zarr", noise())
    path = ome(tmp_path / "a.zarr", {"0": noise()})
    _edited(path, lambda metadata: change(metadata["attributes"]["ome"]["multiscales"][0]))
    with pytest.raises(ValueError, match=sentence) as refused:
        open_volume(path)
    assert "a.zarr" in str(refused.value)


def test_a_level_that_is_a_group_is_refused(tmp_path):
    path = ome(tmp_path / "a.zarr", {"0/0": noise()})
    _edited(path, lambda metadata: metadata["attributes"]["ome"]["multiscales"][0]["datasets"][0].update(path="0"))
    with pytest.raises(ValueError, match=r"a\.zarr names a level 0, but that is no array"):
        open_volume(path)


def test_a_later_version_is_refused(tmp_path):
    path = ome(tmp_path / "a.zarr", {"0": noise()})
    _edited(path, lambda metadata: metadata["attributes"]["ome"].update(version="0.9"))
    for each in (path, ome(tmp_path / "b.zarr", {"0": noise()}, version="0.9")):  # said of the group, or of the image
        with pytest.raises(ValueError, match=r"version 0\.9; 0\.1 to 0\.5 are read"):
            open_volume(each)


# ------------------------------------------------------------ bad stores


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_volume(tmp_path / "none.zarr")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(FileNotFoundError, match="no Zarr store"):
        open_volume(tmp_path / "empty.zarr")
    zarr.create_group(tmp_path / "group.zarr")
    with pytest.raises(ValueError, match="group without an OME-Zarr image"):
        open_volume(tmp_path / "group.zarr")
    (plain(tmp_path / "a.zarr", noise()) / "zarr.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        open_volume(tmp_path / "a.zarr")
    plain(tmp_path / "b.zarr.partial", noise())
    with pytest.raises(ValueError, match="not finished"):
        open_volume(tmp_path / "b.zarr.partial")


@pytest.mark.parametrize(
    "shape, chunks, sentence",
    [
        ([2**20, 2**20, 2**20], [64, 64, 64], "more than any microscope makes"),
        ([2**14, 2**14, 2**14], [2**14, 2**14, 2**14], "voxels per chunk.*memory are free"),
        ([64, 64, 64], [2**14, 2**14, 2**14], "voxels per chunk.*memory are free"),
    ],
)
def test_absurd_sizes_are_refused_when_it_is_opened(tmp_path, shape, chunks, sentence):
    def change(metadata):
        metadata["shape"] = shape
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = chunks

    path = _edited(plain(tmp_path / "a.zarr", noise()), change)
    with pytest.raises(ValueError, match=sentence):
        open_volume(path)


def test_a_volume_larger_than_memory_opens_but_is_not_read_into_it(tmp_path, monkeypatch):
    path = plain(tmp_path / "a.zarr", noise())
    monkeypatch.setattr(lazy_voxels, "free_bytes", lambda: noise().nbytes - 1)
    assert np.array_equal(open_volume(path).voxels[:3], noise()[:3])
    with pytest.raises(ValueError, match="memory are free"):
        read_volume(path)


@pytest.mark.parametrize("version", [2, 3])
def test_a_lost_chunk_is_named_and_never_read_as_zeros(tmp_path, version):
    path = plain(tmp_path / "a.zarr", noise(), version)
    chunk = path / ("0.1.1" if version == 2 else "c/0/1/1")
    chunk.unlink()
    voxels = open_volume(path).voxels
    assert np.array_equal(voxels[8:], noise()[8:])
    for index in ((slice(0, 8), slice(16, 20), slice(16, 24)), (slice(None), slice(None), slice(None, None, 5)), 3):
        with pytest.raises(ValueError, match=r"lost the chunk.*0.1.1"):
            voxels[index]
    with pytest.raises(ValueError, match="lost the chunk"):
        read_volume(path)
    filled = noise()
    filled[:8, 16:, 16:] = 0
    assert np.array_equal(read_volume(path, missing_as_fill=True).voxels, filled)
    zarr.open(path).attrs["missing_chunks"] = "fill"
    assert np.array_equal(read_volume(path).voxels, filled)


def test_a_lost_chunk_of_a_store_without_a_fill_value_is_named(tmp_path):
    """Zarr v2 may leave the fill open (null); what is read for a lost chunk is 0 all the same."""
    path = plain(tmp_path / "a.zarr", noise(), 2)
    header = json.loads((path / ".zarray").read_text())
    (path / ".zarray").write_text(json.dumps({**header, "fill_value": None}))
    (path / "0.1.1").unlink()
    with pytest.raises(ValueError, match=r"lost the chunk.*0.1.1"):
        read_volume(path)


def test_a_lost_chunk_of_a_store_that_is_filled_with_nan_is_named(tmp_path):
    path = tmp_path / "a.zarr"
    array = zarr.create_array(path, shape=(8, 32, 32), chunks=(8, 16, 16), dtype="float32", fill_value=np.nan)
    array[:] = 1
    (path / "c/0/1/1").unlink()
    with pytest.raises(ValueError, match="lost the chunk c/0/1/1"):
        read_volume(path)


def test_a_lost_chunk_of_a_chosen_channel_is_named_too(tmp_path):
    path = plain(tmp_path / "a.zarr", noise((2, *SHAPE)))
    (path / "c/1/0/0/0").unlink()
    assert np.array_equal(read_volume(path, channel=0).voxels, noise((2, *SHAPE))[0])
    with pytest.raises(ValueError, match="lost the chunk c/1/0/0/0"):
        read_volume(path, channel=1)


def test_a_dark_chunk_of_a_shard_is_not_lost(tmp_path):
    voxels = noise()
    voxels[:, 16:] = 0
    path = plain(tmp_path / "a.zarr", voxels, chunks=(4, 16, 8), shards=(12, 32, 24))
    assert np.array_equal(read_volume(path).voxels, voxels)


def test_a_flipped_bit_under_a_checksum_is_refused(tmp_path):
    path = plain(tmp_path / "a.zarr", noise(), compressors=[ZstdCodec(), Crc32cCodec()])
    chunk = path / "c/1/0/0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 4
    chunk.write_bytes(data)
    assert np.array_equal(open_volume(path).voxels[:8], noise()[:8])
    with pytest.raises(ValueError, match=r"a\.zarr cannot be read"):
        read_volume(path)
    chunk.write_bytes(data[:100])
    with pytest.raises(ValueError, match=r"a\.zarr cannot be read"):
        read_volume(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_floats_that_are_not_finite_are_refused_when_all_is_read(tmp_path, bad):
    voxels = noise(dtype=np.float32)
    voxels[4, 3, 2] = bad
    path = plain(tmp_path / "a.zarr", voxels)
    assert open_volume(path).voxels[:4].max() < 200
    with pytest.raises(ValueError, match="NaN or infinite"):
        read_volume(path)


def test_complex_voxels_are_refused(tmp_path):
    with pytest.raises(ValueError, match="complex64"):
        open_volume(plain(tmp_path / "a.zarr", noise(dtype=np.complex64)))


# ------------------------------------------------------------ at a URL


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_only_the_chunks_that_meet_the_box_travel(tmp_path, server, version):
    ome(tmp_path / "web/a.zarr", {"0": noise()}, version=version, scales=[SPACING])
    volume = open_volume(server.url("a.zarr"))
    assert (volume.shape, volume.spacing_um) == (SHAPE, SPACING)
    assert not [path for path in server.asked if "/c/" in path or "0.0" in path]
    server.asked.clear()
    assert np.array_equal(volume.voxels[2:10, 16:20, 0:5], noise()[2:10, 16:20, 0:5])
    chunks = {"/a.zarr/0/c/0/1/0", "/a.zarr/0/c/1/1/0"} if version == "0.5" else {"/a.zarr/0/0/1/0", "/a.zarr/0/1/1/0"}
    chunks |= {"/a.zarr/0/0.1.0", "/a.zarr/0/1.1.0"} if version == "0.4" else set()
    assert len(server.asked) == 2
    assert set(server.asked) <= chunks
    assert np.array_equal(read_volume(server.url("a.zarr")).voxels, noise())


def test_a_path_made_of_a_url_is_still_that_url(tmp_path, server):
    plain(tmp_path / "web/a.zarr", noise())
    assert np.array_equal(read_volume(Path(server.url("a.zarr"))).voxels, noise())
    assert np.array_equal(read_volume(f"file://{tmp_path}/web/a.zarr").voxels, noise())
    assert is_stack(Path(server.url("a.zarr")))


def test_a_server_that_stumbles_is_asked_again_and_one_that_is_gone_is_named(tmp_path, server, monkeypatch):
    monkeypatch.setattr("vit3d.formats.zarr_store._WAITS_S", (0.01, 0.01))
    plain(tmp_path / "web/a.zarr", noise())
    voxels = open_volume(server.url("a.zarr")).voxels
    server.stumbles = 2
    assert np.array_equal(voxels[:8, :16, :16], noise()[:8, :16, :16])
    server.stumbles = 1000
    with pytest.raises(OSError, match=r"a\.zarr cannot be read.*503"):
        voxels[:8]
    with pytest.raises(FileNotFoundError, match=r"none\.zarr does not exist"):
        open_volume(server.url("none.zarr"))


def test_a_chunk_lost_on_the_server_is_named(tmp_path, server):
    path = plain(tmp_path / "web/a.zarr", noise())
    (path / "c/1/1/1").unlink()
    with pytest.raises(ValueError, match="lost the chunk c/1/1/1"):
        open_volume(server.url("a.zarr")).voxels[8:16]


def test_a_store_in_fsspecs_memory_is_read():
    url = "memory://vit3d-test/a.zarr"
    try:
        plain(url, noise())
        assert np.array_equal(read_volume(url).voxels, noise())
        with pytest.raises(FileNotFoundError, match="does not exist"):
            open_volume("memory://vit3d-test/b.zarr")
    finally:
        fsspec.filesystem("memory").rm("/vit3d-test", recursive=True)


@pytest.mark.parametrize("url, package", [("s3://bucket/a.zarr", "s3fs"), ("gs://bucket/a.zarr", "gcsfs")])
def test_a_package_that_a_url_needs_is_named(url, package):
    try:
        __import__(package)
    except ImportError:
        with pytest.raises(ValueError, match=f"{url}.*pip install {package}"):
            open_volume(url)
    else:
        pytest.skip(f"{package} is installed")


def test_a_protocol_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="Protocol not known: nosuch"):
        open_volume("nosuch://bucket/a.zarr")
