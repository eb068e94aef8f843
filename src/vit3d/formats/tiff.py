"""TIFF, OME-TIFF, ImageJ TIFF and LSM: what must hold before a voxel is believed, and reading them box by box."""

import math
import struct
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple
from xml.etree import ElementTree

import numpy as np
import tifffile

from .appearing import appearing
from .axes import SpacingUm, spacing_of, stack_index
from .lazy_voxels import Box, LazyVoxels, MappedVoxels, check_declared, damage_reported

_LARGEST_IMAGEJ_BYTES = 4_000_000_000  # the offsets in ImageJ's TIFF are 32-bit
SOFTWARE = "vit3d"  # what files that are written say of themselves
_DEFAULTS = {254: 0, 255: 0, 257: 0, 256: 0, 277: 1, 339: 1, 258: 1}  # tags by which pages are compared
_NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # types of tags


class _PageHeader(NamedTuple):
    """What a page states of its image, by the tags of `_DEFAULTS` and in their order."""

    new_subfile_type: int
    subfile_type: int
    length: int
    width: int
    samples: int
    sample_format: int
    bits: int

    @property
    def is_preview(self) -> bool:
        """Or a mask of what is to be seen of another page."""
        return bool(self.new_subfile_type & (1 | 4)) or self.subfile_type == 2

    @property
    def form(self) -> str:
        kind = {2: "int", 3: "float"}.get(self.sample_format, "uint")
        return f"{self.length} x {self.width}{f' x {self.samples}' * (self.samples > 1)} of {kind}{self.bits}"


class TiffVoxels(LazyVoxels):
    """A stack in a compressed or scattered TIFF: only the strips or tiles that meet the box are decoded."""

    def __init__(self, path: Path, tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries, index: tuple):
        self._path, self._tiff, self._series, self._index = path, tiff, series, index
        shape, page = self._series.shape, self._series.keyframe.chunks
        stored = (*(1,) * (len(shape) - len(page)), *page)
        kept = [axis for axis, part in enumerate(index) if isinstance(part, slice)]
        chunks = [stored[axis] for axis in kept] if len(stored) == len(shape) else None
        super().__init__([shape[axis] for axis in kept], self._series.dtype, chunks)

    @cached_property
    def _array(self):
        import zarr  # a quarter of a second that stacks which are read whole need not wait

        return zarr.open_array(self._series.aszarr(level=0), mode="r")

    def _fetch(self, box: Box) -> np.ndarray:
        with damage_reported(self._path):
            if box == tuple(slice(0, size, 1) for size in self.shape) and len(self._index) == 3:
                return self._series.asarray()  # several threads at once
            kept = iter(box)
            return self._array[tuple(next(kept) if isinstance(part, slice) else part for part in self._index)]

    def close(self) -> None:
        self._tiff.close()


def open_tiff(path: Path, channel: int | None, time: int | None = None) -> tuple[LazyVoxels, SpacingUm | None]:
    """The voxels of a whole, undamaged TIFF, lazily, and their spacing; ValueError, in one sentence, otherwise."""
    headers = _page_headers(path)
    with damage_reported(path):
        tiff = tifffile.TiffFile(path)
    try:
        return _voxels(path, tiff, headers, channel, time), _stated_spacing(tiff)
    except BaseException:
        tiff.close()
        raise


def _voxels(
    path: Path, tiff: tifffile.TiffFile, headers: dict[int, _PageHeader], channel: int | None, time: int | None
) -> LazyVoxels:
    with damage_reported(path):
        series = _slices(tiff) or tiff.series[0]
        declared = _declared_size(tiff) if series in tiff.series else None
        own = [page.offset for page in series.pages if page is not None and page.parent is tiff]
        num_pages, whole = len(series.pages), all(_is_whole(page) for page in series.pages)
    _check_equal_pages(path, headers, own, counted=declared is not None and series.size > series.keyframe.size)
    contiguous = series.dataoffset is not None  # ImageJ's large stacks have one page header for all
    found = series.size if contiguous else num_pages * series.keyframe.size
    if {found, declared or found} != {series.size} or not whole:
        raise ValueError(
            f"{path} is incomplete: its header declares {declared or series.size} voxels, but "
            "some of their pages or bytes are missing; copy or export it again."
        )
    index = stack_index(series.axes, series.shape, path, channel, time)
    if series in tiff.series:
        _refuse_several(path, tiff)
    dtype = np.dtype(series.dtype)
    if contiguous:
        if series.dataoffset + series.nbytes > path.stat().st_size:
            raise _cut_short(path, "its voxels", series.dataoffset + series.nbytes)
        tiff.close()
        return MappedVoxels(path, dtype.newbyteorder(tiff.byteorder), series.dataoffset, series.shape, index)
    check_declared(path, series.shape, dtype, series.keyframe.chunks)
    with damage_reported(path):
        return TiffVoxels(path, tiff, series, index)


def _check_equal_pages(path: Path, headers: dict[int, _PageHeader], own: list[int], counted: bool) -> None:
    """ValueError where a page of the stack, whose offsets are `own`, has another size or type than the others.

    tifffile compares a few of them only: it leaves the odd page out, or reads what follows in the file as its pixels.
    Beside the pages that a description counts there may be any others. Where none counts them, only previews may: pages
    that say so, or that are smaller both ways and come last, or as many as the slices.
    """
    stack = [headers[offset] for offset in own if offset in headers]
    if not stack:
        return
    slices = stack if counted else [header for header in headers.values() if not header.is_preview]
    usual = Counter(slices or stack).most_common(1)[0][0]
    last = max(at for at, offset in enumerate(headers) if offset in own)
    of_form = Counter(header.form for header in headers.values())
    if of_form[usual.form] == 1:  # images, each of its own kind
        return
    for at, (offset, header) in enumerate(headers.items()):
        if header.form == usual.form or (offset not in own and (counted or header.is_preview)):
            continue
        smaller = header.length < usual.length and header.width < usual.width
        if offset in own or not smaller or not (at > last or of_form[header.form] == of_form[usual.form]):
            raise ValueError(
                f"{path} is no stack: page {at + 1} is {header.form}, but most pages are {usual.form}; slices must be "
                "equal."
            )


def _slices(tiff: tifffile.TiffFile) -> tifffile.TiffPageSeries | None:
    """Slices that were written one by one, each as an image of its own, as one stack; None where these are none. Images
    that OME lists are positions of the stage."""
    first, *others = images = tiff.series
    alike = all((other.axes, other.shape, other.dtype) == (first.axes, first.shape, first.dtype) for other in others)
    if not others or first.axes != "YX" or not alike or tiff.is_ome:
        return None
    pages = [image.pages[0] for image in images]
    return tifffile.TiffPageSeries(pages, shape=(len(pages), *first.shape), dtype=first.dtype, axes="ZYX")


def _refuse_several(path: Path, tiff: tifffile.TiffFile) -> None:
    """ValueError where another series has slices as large as the first one's: no preview, which is smaller or says so.

    OME lists the positions of an acquisition that lie in other files beside this one, too.
    """
    stacks = [series for series in tiff.series if not series.keyframe.is_reduced]
    sides = [(size.get("Y"), size.get("X")) for size in (dict(zip(s.axes, s.shape, strict=True)) for s in stacks)]
    if len(sides) > 1 and sides.count(sides[0]) > 1:
        shapes = ", ".join(" x ".join(map(str, series.shape)) for series in stacks)
        raise ValueError(
            f"{path} holds several stacks ({shapes}), or belongs to an acquisition of several; save the one that you "
            "mean as a file, or move it to a folder, of its own."
        )


def write_tiff(voxels: np.ndarray, path: Path, spacing_um: SpacingUm | None) -> None:
    """A zlib-compressed TIFF, ImageJ's where its depth and size allow, else OME's; there only when whole."""
    voxels = _storable(voxels, path)
    options = {"compression": "zlib", "photometric": "minisblack", "software": SOFTWARE}
    with appearing(path) as hidden:
        tifffile.imwrite(hidden, voxels, **options, **_tiff_header(voxels, spacing_um))


def _storable(voxels: np.ndarray, path: Path) -> np.ndarray:
    """The same voxels in a type that OME knows."""
    if voxels.dtype.kind == "b":
        return voxels.astype(np.uint8) * np.uint8(255)
    if voxels.dtype == np.float16:
        return voxels.astype(np.float32)
    if voxels.dtype.kind not in "iuf" or voxels.dtype.itemsize > 8:
        raise ValueError(f"{path} cannot hold voxels of type {voxels.dtype}: whole numbers or floats up to 64 bits.")
    if voxels.dtype.kind == "f" or voxels.dtype.itemsize <= 4:
        return voxels
    narrow = np.dtype(f"{voxels.dtype.kind}4")
    if voxels.min() < np.iinfo(narrow).min or voxels.max() > np.iinfo(narrow).max:
        raise ValueError(f"{path} cannot hold whole numbers beyond 32 bits; a .zarr can.")
    return voxels.astype(narrow)


def _cut_short(path: Path, what: str, end: int) -> ValueError:
    size = path.stat().st_size
    return ValueError(f"{path} is cut short: {what} would end at byte {end}, the file ends at {size}.")


def _page_headers(path: Path) -> dict[int, _PageHeader]:
    """The header of every page by its offset; each, and every value it points to, lies inside the file.

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
        headers = {}
        while offset and offset not in headers:
            file.seek(min(offset, size))
            raw = file.read(count_bytes)
            entries = struct.unpack(order + count_code, raw)[0] if len(raw) == count_bytes else 1
            end = offset + count_bytes + entries * entry.itemsize + inline
            if end > size:
                raise _cut_short(path, f"the header of page {len(headers) + 1}", end)
            body = file.read(end - offset - count_bytes)
            tags = np.frombuffer(body, entry, count=entries)
            _check_tag_values(path, tags, inline, size)
            headers[offset] = _page_header(file, body, tags, order + offset_code)
            (offset,) = struct.unpack(order + offset_code, body[-inline:])
    return headers


def _page_header(file: BinaryIO, body: bytes, tags: np.ndarray, offset_code: str) -> _PageHeader:
    stated, order, inline = dict(_DEFAULTS), offset_code[0], struct.calcsize(offset_code)
    known = np.isin(tags["tag"], list(_DEFAULTS)) & np.isin(tags["type"], list(_NUMBERS))
    for place in np.flatnonzero(known):
        code = order + _NUMBERS[int(tags["type"][place])]
        value = body[(place + 1) * tags.itemsize - inline : (place + 1) * tags.itemsize]
        if tags["count"][place] * struct.calcsize(code) > inline:
            file.seek(*struct.unpack(offset_code, value))
            value = file.read(struct.calcsize(code))
        (stated[int(tags["tag"][place])],) = struct.unpack_from(code, value)
    return _PageHeader(*stated.values())


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


def _number(stated) -> float:
    """What a header states as a number, also with a decimal comma; 0, which is no spacing, where it is none."""
    try:
        return float(str(stated).replace(",", "."))
    except ValueError:
        return 0.0


def _stated_spacing(tiff: tifffile.TiffFile) -> SpacingUm | None:
    """Spacing (z, y, x) in um where the file states a physical unit; a bare resolution in dpi is no such."""
    if tiff.is_ome:
        pixels = _ome_pixels(tiff)
        steps = [_number(pixels.get(f"PhysicalSize{axis}", 0)) for axis in "ZYX"]
        units = [pixels.get(f"PhysicalSize{axis}Unit", "µm") for axis in "ZYX"]
    elif tiff.is_lsm:
        steps = [tiff.lsm_metadata[f"VoxelSize{axis}"] for axis in "ZYX"]
        units = ["m"] * 3
    elif tiff.is_imagej:
        # ImageJ leaves `spacing` out when it is 1, and writes it negative for stacks taken downwards.
        tags = tiff.pages.first.tags
        per_pixel = [tags.valueof(f"{axis}Resolution", default=(0, 1)) for axis in "YX"]
        steps = [abs(_number(tiff.imagej_metadata.get("spacing", 1)))]
        steps += [length / pixels if pixels else math.inf for pixels, length in per_pixel]
        unit = tiff.imagej_metadata.get("unit", "")
        own = [str(tiff.imagej_metadata.get(f"{axis}unit", unit)) for axis in "zyx"]
        units = [other if spacing_of([1], [other]) else str(unit) for other in own]
    else:
        return None
    return spacing_of(steps, units)


def _ome_pixels(tiff: tifffile.TiffFile) -> dict[str, str]:
    root = ElementTree.fromstring(tiff.ome_metadata)
    return next(element for element in root.iter() if element.tag.endswith("}Pixels")).attrib


def _tiff_header(voxels: np.ndarray, spacing_um: SpacingUm | None) -> dict:
    z, y, x = spacing_um or (1.0, 1.0, 1.0)
    wide = voxels.shape[2] > 1  # tifffile cannot read ImageJ's of one column
    if wide and voxels.dtype in (np.uint8, np.uint16, np.float32) and voxels.nbytes <= _LARGEST_IMAGEJ_BYTES:
        unit = {"unit": "um", "spacing": z} if spacing_um else {}
        return {"imagej": True, "resolution": (1 / x, 1 / y), "metadata": {"axes": "ZYX", **unit}}
    sizes = {"PhysicalSizeZ": z, "PhysicalSizeY": y, "PhysicalSizeX": x} if spacing_um else {}
    units = {f"{name}Unit": "µm" for name in sizes}
    return {"ome": True, "bigtiff": True, "metadata": {"axes": "ZYX", **sizes, **units}}
