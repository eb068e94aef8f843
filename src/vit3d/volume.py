"""Volume: the voxels of a stack in (Z, Y, X) order and their spacing in um; opening, reading and writing it."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .formats.axes import SpacingUm, checked_spacing
from .formats.lazy_voxels import LazyVoxels, check_memory
from .formats.slice_folder import holds_slices, open_slices
from .formats.tiff import open_tiff, write_tiff
from .formats.vaa3d import open_vaa3d
from .model.intensity_vit3d import check_finite

_TIFF_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8", ".lsm")
_VAA3D_SUFFIXES = (".v3draw", ".v3dpbd")
SUFFIXES = (*_TIFF_SUFFIXES, *_VAA3D_SUFFIXES, ".zarr")
_VENDOR_SUFFIXES = (".czi", ".nd2", ".lif", ".oib", ".oif", ".oir", ".vsi", ".ims")
_READ = "TIFF, OME-TIFF, ImageJ TIFF (.tif, .tiff), .lsm, .v3draw, .v3dpbd, .zarr and folders of z-slices"
_ZARR_FILES = ("zarr.json", ".zarray", ".zgroup")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(?=[^/])")  # a Path has made one slash of two


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels (Z, Y, X), array-like, and their spacing (z, y, x) in um; None where nobody has stated it.

    `voxels` is an array, as which a list or a tensor on the CPU is taken, or lies on disk: it knows `shape`, `dtype`
    and `chunks`, `voxels[box]` reads a box, and `np.asarray(voxels)` everything.
    """

    voxels: np.ndarray | LazyVoxels
    spacing_um: SpacingUm | None = None

    def __post_init__(self) -> None:
        if not isinstance(getattr(self.voxels, "dtype", None), np.dtype):  # a list, or a tensor of torch's
            object.__setattr__(self, "voxels", np.asarray(self.voxels))
        if len(self.shape) != 3 or 0 in self.shape:
            raise ValueError(f"`voxels` must be a stack (Z, Y, X) that is not empty, got shape {self.shape}.")
        if self.spacing_um is not None:
            object.__setattr__(self, "spacing_um", checked_spacing(self.spacing_um))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.voxels.shape)

    def crop(self, box: tuple[slice, slice, slice]) -> "Volume":
        """The part inside `box`, as `box_in` takes it; the spacing stays. Of voxels on disk, it is read."""
        return Volume(self.voxels[box_in(box, self.shape)], self.spacing_um)


def box_in(box: tuple[slice, slice, slice] | None, shape: tuple[int, ...]) -> tuple[slice, slice, slice]:
    """Slices (z, y, x) of voxels with both ends inside `shape`, counted from its first voxel; None is all of it.

    Ends may be left out, be counted from the end, or lie beyond, as Python has it. ValueError: other than three slices
    without a step, or without a voxel.
    """
    box = (slice(None),) * 3 if box is None else box
    slices = isinstance(box, tuple | list) and all(isinstance(axis, slice) and axis.step in (None, 1) for axis in box)
    if not slices or len(box) != 3:
        raise ValueError(f"`box` must be three slices (z, y, x) without a step, got {box}.")
    inside = tuple(slice(*axis.indices(size)[:2]) for axis, size in zip(box, shape, strict=True))
    if any(axis.stop <= axis.start for axis in inside):
        raise ValueError(f"`box` {box} holds no voxel of a stack of {tuple(shape)} (Z, Y, X).")
    return inside


def refuse_other_than_volume(volume) -> None:
    """TypeError for an array or a path given in the place of a Volume."""
    if not isinstance(volume, Volume):
        raise TypeError(
            f"`volume` must be a Volume, got {type(volume).__name__}; `Volume(array, spacing_um)` makes one of "
            "an array, `read_volume(path)` of a file."
        )


def open_volume(
    path: str | Path,
    *,
    spacing_um: SpacingUm | None = None,
    channel: int | None = None,
    time: int | None = None,
    level: str | float | SpacingUm | None = None,
    missing_as_fill: bool = False,
) -> Volume:
    """A 3D stack whose voxels stay where they are and are read box by box.

    What `read_volume` reads, and at a URL that fsspec knows (s3://, gs://, https://, memory://) OME-Zarr (0.1 to 0.5)
    or a plain Zarr array (version 2 or 3). A compressed .v3dpbd alone is decoded at once.

    Args:
        spacing_um: (z, y, x), overrides what the file says.
        channel, time: which of several, counted from 0; they must be chosen.
        level: of a multiscale OME-Zarr: its name ("1"), or a spacing in um (2.0, (2, 1, 1), "2um" or "2,1,1um") for the
            coarsest level that is nowhere coarser; the finest by default. Coordinates count from that level's first
            voxel.
        missing_as_fill: Zarr chunks that are not there hold the fill value. Otherwise reading one raises ValueError,
            unless the array's attribute `missing_chunks: "fill"` says the same.

    Raises FileNotFoundError for what is not there, ValueError, in one sentence, for what is not one whole 3D stack of
    numbers. Whether floats are finite is for those who read them to check.
    """
    spacing_um = None if spacing_um is None else checked_spacing(spacing_um)
    where = _location(path)
    if str(where).endswith(".zarr.partial"):
        raise ValueError(f"{where} is not finished: repeat the command that began it.")
    if isinstance(where, str) or _is_zarr(where):
        from .formats.zarr_store import open_zarr  # here: it takes a quarter of a second to load zarr

        chosen = {"channel": channel, "time": time, "level": level, "missing_as_fill": missing_as_fill}
        voxels, stated_um = open_zarr(str(where), **chosen)
    elif level is not None:
        raise ValueError(f"{where} has no levels to choose from; only OME-Zarr has.")
    else:
        voxels, stated_um = _open_file(where, channel, time)
    if voxels.dtype.kind not in "buif":
        raise ValueError(f"{where} holds voxels of type {voxels.dtype}; only integers and floats are read.")
    return Volume(voxels, spacing_um or stated_um)


def read_volume(
    path: str | Path,
    *,
    spacing_um: SpacingUm | None = None,
    channel: int | None = None,
    time: int | None = None,
    level: str | float | SpacingUm | None = None,
    missing_as_fill: bool = False,
) -> Volume:
    """Read a 3D stack into memory, at its own depth: TIFF, OME-TIFF, ImageJ TIFF, LSM, v3draw, v3dpbd, Zarr, slices.

    Arguments as for `open_volume`. Where neither `spacing_um` nor the file states a physical unit, the spacing is
    None.

    Raises FileNotFoundError for a missing file and ValueError, in one sentence, for everything that is not
    one whole 3D stack of finite numbers that fits into memory.
    """
    chosen = {"channel": channel, "time": time, "level": level, "missing_as_fill": missing_as_fill}
    return loaded(open_volume(path, spacing_um=spacing_um, **chosen), path)


def loaded(volume: Volume, where: str | Path = "The volume") -> Volume:
    """An opened volume in memory, its file closed. ValueError, beginning with `where`: too large, or not finite."""
    try:
        check_memory(where, volume.shape, volume.voxels.dtype)
        voxels = np.asarray(volume.voxels)
    finally:
        getattr(volume.voxels, "close", lambda: None)()
    voxels = np.ascontiguousarray(voxels, dtype=voxels.dtype.newbyteorder("="))
    check_finite(voxels, str(where))
    return Volume(voxels, volume.spacing_um)


def write_volume(volume: Volume, path: str | Path) -> None:
    """Write a TIFF (zlib) or an OME-Zarr 0.5 (.zarr: Zarr v3, zstd and crc32c) that keeps voxels and spacing.

    It appears under its name only when whole. A store is written box by box, so its volume may be larger than memory.
    uint8, uint16 and float32 up to 4 GB become ImageJ TIFF, which Fiji opens with its spacing; other depths
    and sizes become OME-TIFF (BigTIFF). In TIFF a mask (bool) is written as uint8 0 and 255, float16 as float32, and
    64-bit whole numbers as 32-bit ones; ValueError where they do not fit.
    """
    path = Path(path)
    if path.suffix.lower() == ".zarr":
        from .formats.pyramid import write_store

        return write_store(volume.voxels, path, volume.spacing_um)
    if path.suffix.lower() not in (".tif", ".tiff"):
        raise ValueError(f"Volumes are written as TIFF or Zarr: the name must end in .tif, .tiff or .zarr, got {path}.")
    write_tiff(np.asarray(volume.voxels), path, volume.spacing_um)


def stack_name(path: str | Path) -> str:
    """A stack's name without the suffixes of its formats: `a.ome.tif`, `a.tif.v3dpbd` -> `a`; `a.extract_5` stays."""
    name = Path(path).name
    while Path(name).suffix.lower() in (*SUFFIXES, ".ome"):
        name = Path(name).stem
    return name


def swc_name(path: str | Path) -> str:
    """The name of the stack that an SWC beside it is of: `a.ome.swc`, `a.swc`, `a.tif.swc` -> `a`."""
    return stack_name(Path(path).stem)


def named_stacks(paths: list[Path]) -> dict[str, Path]:
    """Stacks by their names; those that differ only in their suffixes keep them."""
    names = [stack_name(path) for path in paths]
    return {name if names.count(name) == 1 else path.name: path for name, path in zip(names, paths, strict=True)}


def is_stack(path: str | Path) -> bool:
    """Whether a file, a folder or a URL is one stack, by its name and what lies in it; a folder of stacks is none."""
    where = _location(path)
    if isinstance(where, str) or not where.is_dir():
        return True
    return _is_zarr(where) or holds_slices(where)


def is_url(path: str | Path) -> bool:
    return isinstance(_location(path), str)


def _location(path: str | Path) -> Path | str:
    """A path of this machine, or a URL, put together again where somebody has made a Path of it."""
    found = _URL.match(str(path))
    if found is None or Path(path).exists():
        return Path(path)
    rest = str(path)[found.end() :]
    return Path(f"/{rest}") if found[1].lower() in ("file", "local") else f"{found[1].lower()}://{rest}"


def _is_zarr(path: Path) -> bool:
    return path.is_dir() and (path.suffix.lower() == ".zarr" or any((path / name).exists() for name in _ZARR_FILES))


def _open_file(path: Path, channel: int | None, time: int | None) -> tuple[LazyVoxels | np.ndarray, SpacingUm | None]:
    suffix = path.suffix.lower()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if path.is_dir() and holds_slices(path):
        return open_slices(path, channel)
    if suffix in _VENDOR_SUFFIXES:
        name = path.with_suffix(".ome.tif").name
        raise ValueError(f"{path} is a vendor's format: convert it first, `bfconvert {path.name} {name}`.")
    if path.is_dir() or suffix not in SUFFIXES:
        what = "a folder without z-slices" if path.is_dir() else f"of unknown type {suffix or '(no suffix)'}"
        raise ValueError(f"{path} is {what}; the formats that are read are {_READ}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes).")
    return open_vaa3d(path, channel) if suffix in _VAA3D_SUFFIXES else open_tiff(path, channel, time)
