"""Volume: the voxels of a stack in (Z, Y, X) order and their spacing in um; its readers and its writer."""

import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import tifffile

SpacingUm = tuple[float, float, float]

_TIFF_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8", ".lsm")
_VAA3D_SUFFIXES = (".v3draw", ".v3dpbd")
SUFFIXES = _TIFF_SUFFIXES + _VAA3D_SUFFIXES
_VENDOR_SUFFIXES = (".czi", ".nd2", ".lif", ".oib", ".oif", ".oir", ".vsi", ".ims")
_READ = "TIFF, OME-TIFF, ImageJ TIFF (.tif, .tiff), .lsm, .v3draw and .v3dpbd"
_UM_PER_UNIT = {
    **dict.fromkeys(("um", "µm", "μm", "\\u00B5m", "\\u03BCm", "micron", "microns", "micrometer"), 1.0),
    **{"pm": 1e-6, "Å": 1e-4, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6},
}
_LARGEST_IMAGEJ_BYTES = 4_000_000_000  # the offsets in ImageJ's TIFF are 32-bit


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels (Z, Y, X), array-like, and their spacing (z, y, x) in um; None where nobody has stated it."""

    voxels: np.ndarray
    spacing_um: SpacingUm | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.voxels, "shape"):
            object.__setattr__(self, "voxels", np.asarray(self.voxels))
        if len(self.shape) != 3 or 0 in self.shape:
            raise ValueError(f"`voxels` must be a stack (Z, Y, X) that is not empty, got shape {self.shape}.")
        if self.spacing_um is not None:
            object.__setattr__(self, "spacing_um", _checked_spacing(self.spacing_um))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.voxels.shape)

    def crop(self, box: tuple[slice, slice, slice]) -> "Volume":
        """The part inside `box`, slices in voxels (z, y, x); the spacing stays."""
        return Volume(self.voxels[box], self.spacing_um)


def read_volume(path: str | Path, *, spacing_um: SpacingUm | None = None, channel: int | None = None) -> Volume:
    """Read a 3D stack (TIFF, OME-TIFF, ImageJ TIFF, LSM, v3draw, v3dpbd) at its own depth.

    `spacing_um` (z, y, x) overrides what the file says; without it, and where the file states no physical
    unit, the spacing is None. A file with several channels needs `channel`, counted from 0.

    Raises FileNotFoundError for a missing file and ValueError, in one sentence, for everything that is not
    one whole 3D stack of finite numbers that fits into memory.
    """
    path = Path(path)
    spacing_um = None if spacing_um is None else _checked_spacing(spacing_um)
    voxels, stated_um = _reader_for(path)(path, channel)
    voxels = np.ascontiguousarray(voxels, dtype=voxels.dtype.newbyteorder("="))
    if voxels.dtype.kind not in "buif":
        raise ValueError(f"{path} holds voxels of type {voxels.dtype}; only integers and floats are read.")
    if voxels.dtype.kind == "f" and not all(np.isfinite(plane).all() for plane in voxels):
        raise ValueError(f"{path} holds NaN or infinite voxels; replace them before use.")
    return Volume(voxels, spacing_um or stated_um)


def write_volume(volume: Volume, path: str | Path) -> None:
    """Write a zlib-compressed TIFF that keeps voxels and spacing; it appears under its name only when whole.

    uint8, uint16 and float32 up to 4 GB become ImageJ TIFF, which Fiji opens with its spacing; other depths
    and sizes become OME-TIFF (BigTIFF). A mask (bool) is written as uint8 0 and 255, float16 as float32.
    """
    path = Path(path)
    if path.suffix.lower() not in (".tif", ".tiff"):
        raise ValueError(f"Volumes are written as TIFF: the name must end in .tif or .tiff, got {path}.")
    voxels = np.asarray(volume.voxels)
    if voxels.dtype == bool:
        voxels = voxels.astype(np.uint8) * 255
    elif voxels.dtype == np.float16:
        voxels = voxels.astype(np.float32)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        tifffile.imwrite(temporary, voxels, compression="zlib", **_tiff_header(voxels, volume.spacing_um))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _checked_spacing(spacing_um: SpacingUm) -> SpacingUm:
    spacing = tuple(float(step) for step in spacing_um)
    if len(spacing) != 3 or not all(math.isfinite(step) and step > 0 for step in spacing):
        raise ValueError(f"`spacing_um` must be three positive numbers (z, y, x) in um, got {spacing_um}.")
    return spacing


def _reader_for(path: Path) -> Callable[[Path, int | None], tuple[np.ndarray, SpacingUm | None]]:
    suffix = path.suffix.lower()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if suffix in _VENDOR_SUFFIXES:
        name = path.with_suffix(".ome.tif").name
        raise ValueError(f"{path} is a vendor's format: convert it first, `bfconvert {path.name} {name}`.")
    if path.is_dir() or suffix not in SUFFIXES:
        what = "a folder" if path.is_dir() else f"of unknown type {suffix or '(no suffix)'}"
        raise ValueError(f"{path} is {what}; the formats that are read are {_READ}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes).")
    return _read_vaa3d if suffix in _VAA3D_SUFFIXES else _read_tiff


def _stack_index(axes: str, shape: tuple[int, ...], channel: int | None, path: Path) -> tuple:
    """The index that picks one (Z, Y, X) stack from an array with these axes (tifffile's letters)."""
    long = [(axis, size) for axis, size in zip(axes, shape, strict=True) if size > 1 or axis in "YX"]
    letters = re.sub("[IQ]", "Z", "".join(axis for axis, _ in long))  # unnamed pages are slices
    said = f"axes {axes} of sizes {' x '.join(map(str, shape))}"
    if "T" in letters:
        raise ValueError(
            f"{path} has a time axis ({said}); save one time point, or name the axis Z if these are slices."
        )
    if re.sub("[CS]", "", letters) == "YX":
        raise ValueError(f"{path} is a 2D image ({said}); a stack is needed, its slices on an axis named Z.")
    if re.fullmatch("(C?ZYX|ZC?YX|ZYXS?|S?ZYX)", letters) is None:
        raise ValueError(f"{path} has {said}, not one 3D stack with channels; save it as Z, C, Y, X.")
    num_channels = next((size for axis, size in long if axis in "CS"), 1)
    if channel is None and num_channels > 1:
        raise ValueError(
            f"{path} has {num_channels} channels{' (RGB)' * ('S' in letters)}; "
            f"choose one with `--channel 0` to `--channel {num_channels - 1}` (`channel=` in Python)."
        )
    if not 0 <= (channel or 0) < num_channels:
        raise ValueError(f"{path} has {num_channels} channel(s), counted from 0, and no channel {channel}.")
    return tuple(
        slice(None) if axis in "YX" or (size > 1 and axis not in "CS") else min(channel or 0, size - 1)
        for axis, size in zip(axes, shape, strict=True)
    )


def _check_memory(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    needed, free = math.prod(shape) * dtype.itemsize, _free_bytes()
    if needed > free:
        raise ValueError(
            f"{path} declares {' x '.join(map(str, shape))} voxels of {dtype}, {needed / 2**30:.1f} GiB, "
            f"but only {free / 2**30:.1f} GiB of memory are free; crop the stack or use a larger machine."
        )


def _free_bytes() -> int:
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text()).group(1))
    except (OSError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------- TIFF


def _read_tiff(path: Path, channel: int | None) -> tuple[np.ndarray, SpacingUm | None]:
    _check_tiff_structure(path)
    with _damage_reported(path):
        tiff = tifffile.TiffFile(path)
    with tiff:
        with _damage_reported(path):
            series = tiff.series[0]
            declared, spacing_um = _declared_size(tiff), _stated_spacing(tiff)
            num_pages, whole = len(series.pages), all(_is_whole(page) for page in series.pages)
        contiguous = series.dataoffset is not None  # ImageJ's large stacks have one page header for all
        found = series.size if contiguous else num_pages * series.keyframe.size
        if {found, declared or found} != {series.size} or not whole:
            raise ValueError(
                f"{path} is incomplete: its header declares {declared or series.size} voxels, but "
                "some of their pages or bytes are missing; copy or export it again."
            )
        if contiguous and series.dataoffset + series.nbytes > path.stat().st_size:
            raise _cut_short(path, "its voxels", series.dataoffset + series.nbytes)
        index = _stack_index(series.axes, series.shape, channel, path)
        _check_memory(path, series.shape, series.dtype)
        with _damage_reported(path):
            return series.asarray()[index], spacing_um


@contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    """Whatever a decoder raises on a damaged file becomes one sentence."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); export it again.") from error


def _cut_short(path: Path, what: str, end: int) -> ValueError:
    size = path.stat().st_size
    return ValueError(f"{path} is cut short: {what} would end at byte {end}, the file ends at {size}.")


def _check_tiff_structure(path: Path) -> None:
    """Every page header, and every value it points to, lies inside the file.

    tifffile ends its page list silently where the chain breaks, and so returns a part of a truncated stack.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
        order, big = {b"II": "<", b"MM": ">"}.get(head[:2]), head[2:4] in (b"+\0", b"\0+")
        if order is None or len(head) < 16 or head[2:4] not in (b"*\0", b"\0*", b"+\0", b"\0+"):
            raise ValueError(f"{path} is not a TIFF image, whatever its name says.")
        count_code, offset_code, inline = ("Q", "Q", 8) if big else ("H", "I", 4)
        entry = np.dtype(f"{order}u2, {order}u2, {order}u{inline}, {order}u{inline}")
        entry.names = "tag", "type", "count", "value"
        count_bytes = struct.calcsize(count_code)
        (offset,) = struct.unpack_from(order + offset_code, head, 8 if big else 4)
        seen = set()
        while offset and offset not in seen:
            seen.add(offset)
            file.seek(min(offset, size))
            raw = file.read(count_bytes)
            entries = struct.unpack(order + count_code, raw)[0] if len(raw) == count_bytes else 1
            end = offset + count_bytes + entries * entry.itemsize + inline
            if end > size:
                raise _cut_short(path, f"the header of page {len(seen)}", end)
            body = file.read(end - offset - count_bytes)
            tags = np.frombuffer(body, entry, count=entries)
            _check_tag_values(path, tags, inline, size)
            (offset,) = struct.unpack(order + offset_code, body[-inline:])


def _check_tag_values(path: Path, tags: np.ndarray, inline: int, size: int) -> None:
    bytes_per_type = np.array([0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8])
    num_bytes = tags["count"].astype(float) * bytes_per_type[np.minimum(tags["type"], 18)]
    ends = np.where(num_bytes > inline, tags["value"] + num_bytes, 0)
    if ends.max(initial=0) > size:
        raise _cut_short(path, f"the value of tag {tags['tag'][ends.argmax()]}", int(ends.max()))


def _is_whole(page: tifffile.TiffPage | tifffile.TiffFrame | None) -> bool:
    """All strips or tiles lie inside the file; None is a page that a description names but no file holds."""
    if page is None or not page.dataoffsets:
        return False
    ends = map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))
    return max(ends) <= page.parent.filehandle.size


def _declared_size(tiff: tifffile.TiffFile) -> int | None:
    """Number of voxels that the description promises; None where it promises nothing."""
    if tiff.is_ome:
        pixels = _ome_pixels(tiff)
        return math.prod(int(pixels.get(f"Size{axis}", 1)) for axis in "XYZCT")
    if tiff.is_imagej:
        return int(tiff.imagej_metadata.get("images", 1)) * tiff.pages.first.size
    if tiff.is_shaped:
        return math.prod(tiff.shaped_metadata[0]["shape"])
    return None


def _stated_spacing(tiff: tifffile.TiffFile) -> SpacingUm | None:
    """Spacing (z, y, x) in um where the file states a physical unit; a bare resolution in dpi is no such."""
    if tiff.is_ome:
        pixels = _ome_pixels(tiff)
        steps = [float(pixels.get(f"PhysicalSize{axis}", 0)) for axis in "ZYX"]
        units = [pixels.get(f"PhysicalSize{axis}Unit", "µm") for axis in "ZYX"]
    elif tiff.is_lsm:
        steps = [tiff.lsm_metadata[f"VoxelSize{axis}"] for axis in "ZYX"]
        units = ["m"] * 3
    elif tiff.is_imagej:
        # ImageJ leaves `spacing` out when it is 1, and writes it negative for stacks taken downwards.
        tags = tiff.pages.first.tags
        per_pixel = [tags.valueof(f"{axis}Resolution", default=(0, 1)) for axis in "YX"]
        steps = [abs(float(tiff.imagej_metadata.get("spacing", 1)))]
        steps += [length / pixels if pixels else math.inf for pixels, length in per_pixel]
        units = [str(tiff.imagej_metadata.get("unit", ""))] * 3
    else:
        return None
    in_um = [step * _UM_PER_UNIT.get(unit, 0) for step, unit in zip(steps, units, strict=True)]
    spacing = tuple(float(f"{step:.9g}") for step in in_um)  # a rational 1/0.33 reads as 0.33
    return spacing if all(math.isfinite(step) and step > 0 for step in spacing) else None


def _ome_pixels(tiff: tifffile.TiffFile) -> dict[str, str]:
    root = ElementTree.fromstring(tiff.ome_metadata)
    return next(element for element in root.iter() if element.tag.endswith("}Pixels")).attrib


def _tiff_header(voxels: np.ndarray, spacing_um: SpacingUm | None) -> dict:
    z, y, x = spacing_um or (1.0, 1.0, 1.0)
    if voxels.dtype in (np.uint8, np.uint16, np.float32) and voxels.nbytes <= _LARGEST_IMAGEJ_BYTES:
        unit = {"unit": "um", "spacing": z} if spacing_um else {}
        return {"imagej": True, "resolution": (1 / x, 1 / y), "metadata": {"axes": "ZYX", **unit}}
    sizes = {"PhysicalSizeZ": z, "PhysicalSizeY": y, "PhysicalSizeX": x} if spacing_um else {}
    units = {f"{name}Unit": "µm" for name in sizes}
    return {"ome": True, "bigtiff": True, "metadata": {"axes": "ZYX", **sizes, **units}}


# ---------------------------------------------------------------- Vaa3D

_RAW_KEY, _PBD_KEY = b"raw_image_stack_by_hpeng", b"v3d_volume_pkbitdf_encod"
_HEADER_BYTES = 43  # key 24, byte order 1, datatype 2, sizes x y z channel 4 x 4

# Packets of the v3dpbd stream by bytes per voxel: first and last header byte, what to subtract from it to get
# the number of voxels, and bits per voxel; 0 bits is one value for all, 2 to 5 bits are running differences.
_PACKETS = {
    1: ((0, 32, -1, 8), (33, 127, 32, 2), (128, 255, 127, 0)),
    2: ((0, 31, -1, 16), (32, 79, 31, 3), (80, 182, 79, 4), (183, 222, 182, 5), (223, 255, 222, 0)),
}


def _read_vaa3d(path: Path, channel: int | None) -> tuple[np.ndarray, None]:
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    key, order = header[:24], {b"L": "<", b"B": ">"}.get(header[24:25])
    if key not in (_RAW_KEY, _PBD_KEY) or order is None or len(header) < _HEADER_BYTES:
        raise ValueError(f"{path} is no v3draw or v3dpbd file: it does not begin with their header.")
    datatype, *sizes = struct.unpack(order + "h4i", header[25:])
    shape = tuple(reversed(sizes))
    if min(shape) < 1:
        raise ValueError(f"{path} declares the sizes {shape} (channel, z, y, x); all must be positive.")
    codes = {1: "u1", 2: "u2", 4: "f4"} if key == _RAW_KEY else {1: "u1", 2: "u2"}
    if datatype not in codes:
        what = f"datatype {datatype}{' (lossy 3-bit v3dpbd)' * (datatype == 33)}"
        raise ValueError(f"{path} has Vaa3D {what}, which is not read; save it as .v3draw or TIFF.")
    index, dtype = _stack_index("CZYX", shape, channel, path), np.dtype(order + codes[datatype])
    if key == _RAW_KEY:
        end, size = _HEADER_BYTES + math.prod(shape) * dtype.itemsize, path.stat().st_size
        if size != end:
            raise ValueError(f"{path} declares {shape} (channel, z, y, x), {end} bytes, but has {size}.")
        _check_memory(path, shape[1:], dtype)
        return np.memmap(path, dtype, "r", _HEADER_BYTES, shape)[index], None
    _check_memory(path, shape, dtype)
    return _decode_pbd(path, math.prod(shape), dtype).reshape(shape)[index], None


def _decode_pbd(path: Path, num_voxels: int, dtype: np.dtype) -> np.ndarray:
    """Undo Vaa3D's pack-bits-plus-difference coding -> (num_voxels,); x fastest, channel slowest.

    Only where packets begin is sequential; their voxels are computed together, some thousand packets at once.
    """
    stream = path.read_bytes()[_HEADER_BYTES:]
    data = np.frombuffer(stream + b"\0", np.uint8)
    count, bits = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for first, last, base, width in _PACKETS[dtype.itemsize]:
        count[first : last + 1] = np.arange(first, last + 1) - base
        bits[first : last + 1] = width
    steps = (1 + np.where(bits > 0, (count * bits + 7) // 8, dtype.itemsize)).tolist()
    voxels = np.empty(num_voxels, dtype.newbyteorder("="))
    position = done = prior = 0
    while position < len(stream):
        starts = []
        while position < len(stream) and len(starts) < 1 << 14:
            starts.append(position)
            position += steps[stream[position]]
        codes = data[starts]
        stop = done + int(count[codes].sum())
        if stop > num_voxels:
            raise ValueError(f"{path} declares {num_voxels} voxels, but its compressed stream holds more.")
        if position > len(stream):
            break
        voxels[done:stop] = _decode_packets(data, np.array(starts), count[codes], bits[codes], dtype, prior)
        done, prior = stop, int(voxels[stop - 1])
    if done < num_voxels:
        raise ValueError(f"{path} declares {num_voxels} voxels, but its compressed stream ends before.")
    return voxels


def _decode_packets(
    data: np.ndarray, starts: np.ndarray, count: np.ndarray, bits: np.ndarray, dtype: np.dtype, prior: int
) -> np.ndarray:
    """Voxels of whole packets, given where each starts, its voxels, its bits per voxel, the voxel before.

    Differences are sign and magnitude in one number: up to half its range it counts up, beyond it down.
    """
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    bits = np.repeat(bits, count)
    at = np.repeat(starts + 1, count) + (within * bits >> 3)
    if dtype.itemsize == 1:
        stored = data[at].astype(np.int64)
        field = stored >> (within * bits & 7)  # differences begin at the lowest bits
    else:
        word = data[at].astype(np.int64) << 8 | data[at + 1]
        stored = word if dtype.str[0] == ">" else (word & 255) << 8 | word >> 8
        field = word >> (16 - bits - (within * bits & 7))  # and here at the highest
    field &= (1 << bits) - 1
    top = 1 << np.maximum(bits - 1, 0)
    is_difference = (bits > 0) & (bits < 8)
    climbed = np.cumsum(np.where(is_difference, np.where(field > top, top - field, field), 0))
    last_stored = np.maximum.accumulate(np.where(is_difference, -1, np.arange(len(bits))))
    base = np.where(last_stored < 0, prior, stored[last_stored] - climbed[last_stored])
    return np.where(is_difference, base + climbed, stored).astype(dtype.newbyteorder("="))
