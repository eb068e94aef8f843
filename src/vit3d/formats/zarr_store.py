"""Zarr stores, local or at a URL: OME-Zarr images and plain arrays, of Zarr versions 2 and 3."""

import asyncio
import re
import time as clock
from collections.abc import Callable

import numpy as np
import zarr
import zarr.errors
from zarr.core.sync import sync

from .axes import SpacingUm, checked_spacing, stack_index
from .chunk_check import refuse_missing_chunks
from .lazy_voxels import Box, LazyVoxels, check_declared
from .ngff import Level, letter_of, levels_of

_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "abfs": "adlfs"}
_WAITS_S = (0.5, 2.0)  # before a read over the network is tried again
_TOLERANCE = 1.05  # a level this much coarser than the target spacing still counts as fine enough
_ABSENT = (FileNotFoundError, zarr.errors.GroupNotFoundError, zarr.errors.ArrayNotFoundError)


class ZarrVoxels(LazyVoxels):
    """A stack in a Zarr array; `index` picks it from more axes. A chunk that is lost is an error, never zeros."""

    def __init__(self, array: zarr.Array, index: tuple, where: str, missing_as_fill: bool = False):
        self.array, self._index, self._where = array, index, where
        self._missing_as_fill = missing_as_fill
        kept = [axis for axis, part in enumerate(index) if isinstance(part, slice)]
        super().__init__([array.shape[a] for a in kept], array.dtype, [array.chunks[a] for a in kept])

    def _fetch(self, box: Box) -> np.ndarray:
        kept = iter(box)
        full = tuple(next(kept) if isinstance(part, slice) else slice(part, part + 1, 1) for part in self._index)
        region = _reading(self._where, lambda: self.array[full])
        if not self._missing_as_fill and (loss := _reading(self._where, lambda: _loss(self.array, full, region))):
            raise loss
        return region.reshape([b.stop - b.start for b in box])


def open_zarr(
    where: str,
    *,
    channel: int | None = None,
    time: int | None = None,
    level: str | float | SpacingUm | None = None,
    missing_as_fill: bool = False,
) -> tuple[LazyVoxels, SpacingUm | None]:
    """The voxels of a store, lazily, and their spacing; arguments as `open_volume`'s."""
    node = _node(where)
    if isinstance(node, zarr.Group) and not levels_of(dict(node.attrs), where):
        where, node = _only_image(where, node)
    if isinstance(node, zarr.Group):
        chosen = _chosen_level(levels_of(dict(node.attrs), where), level, where)
        where, array = f"{where}/{chosen.path}", _array(node, chosen, where)
    else:
        if level is not None:
            raise ValueError(f"{where} is one array and has no levels; leave the level out.")
        array, chosen = node, _level_of_array(where, node)
    if len(chosen.axes) != array.ndim:
        raise ValueError(f"{where} has {array.ndim} axes, but its metadata name {len(chosen.axes)}.")
    check_declared(where, array.shape, array.dtype, array.chunks)
    index = stack_index(chosen.axes, array.shape, where, channel, time)
    return ZarrVoxels(array, index, where, missing_as_fill), chosen.spacing_um


def end_reads() -> None:
    """Call off what is being read. Of a read that fails Zarr leaves the other chunks under way, and of each that the
    end of the program finds there Python prints a traceback."""
    sync(_called_off())


async def _called_off() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _node(where: str) -> zarr.Group | zarr.Array:
    try:
        return _reading(where, lambda: zarr.open(where, mode="r"))
    except _ABSENT as error:
        raise FileNotFoundError(f"{where} does not exist, or is no Zarr store.") from error


def _loss(array: zarr.Array, box: tuple[slice, ...], voxels: np.ndarray) -> ValueError | None:
    """The complaint about a chunk that is not there, apart from all that can go wrong in asking for it."""
    try:
        refuse_missing_chunks(array, box, voxels)
    except ValueError as error:
        return error
    return None


def _reading(where: str, read: Callable):
    """`read()`; what goes wrong is said in one sentence, and over the network tried again first."""
    protocol = where.partition("://")[0] if "://" in where else None
    for wait in (*(_WAITS_S if protocol else ()), None):
        try:
            return read()
        except ImportError as error:
            package = _PACKAGES.get(protocol)
            advice = f"`pip install {package}`" if package else str(error)
            raise ValueError(f"{where} needs one more package: {advice}.") from error
        except (*_ABSENT, KeyError, MemoryError):
            raise
        except ValueError as error:
            raise ValueError(f"{where} cannot be read ({error}).") from error
        except Exception as error:
            if wait is None:
                kind = OSError if protocol else ValueError
                raise kind(f"{where} cannot be read ({type(error).__name__}: {error}).") from error
            clock.sleep(wait)


def _array(group: zarr.Group, level: Level, where: str) -> zarr.Array:
    try:
        array = _reading(f"{where}/{level.path}", lambda: group[level.path])
    except (KeyError, *_ABSENT) as error:
        raise ValueError(f"{where} names a level {level.path}, but holds no such array.") from error
    if not isinstance(array, zarr.Array):
        raise ValueError(f"{where} names a level {level.path}, but that is no array.")
    return array


def _only_image(where: str, group: zarr.Group) -> tuple[str, zarr.Group]:
    """The one image in a collection that bioformats2raw wrote."""
    attributes = dict(group.attrs)
    if "bioformats2raw.layout" not in {**attributes, **attributes.get("ome", {})}:
        raise ValueError(
            f"{where} is a Zarr group without an OME-Zarr image; give the path of one of its arrays, {where}/NAME."
        )
    images = [name for name in ("0", "1") if name in group]
    if images != ["0"]:
        raise ValueError(f"{where} holds several images or none; give the path of one, such as {where}/0.")
    return f"{where}/0", group["0"]


def _level_of_array(where: str, array: zarr.Array) -> Level:
    """What is known of an array that was named itself: by the image it is a level of, by its dimension names."""
    place, _, name = where.rstrip("/").rpartition("/")
    try:
        levels = levels_of(dict(zarr.open_group(place, mode="r").attrs), place) if place.strip(":/") else []
    except Exception:  # whatever the folder around is, it does not describe this array
        levels = []
    for level in levels:
        if level.path == name and len(level.axes) == array.ndim:
            return level
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    if names and all(names):
        return Level("", "".join(map(letter_of, names)), None)
    if not 3 <= array.ndim <= 5:
        raise ValueError(f"{where} has {array.ndim} axes; a stack has z, y, x, and may have a channel and a time axis.")
    return Level("", "TCZYX"[-array.ndim :], None)


def _chosen_level(levels: list[Level], level: str | float | SpacingUm | None, where: str) -> Level:
    """By name, or the coarsest one that is on no axis coarser than a target spacing; the finest by default."""
    if level is None:
        return levels[0]
    names = [each.path for each in levels]
    if isinstance(level, str) and level in names:
        return levels[names.index(level)]
    target = _target(level)
    if target is None:
        raise ValueError(f"{where} has the levels {', '.join(names)}, and no level {level!r}; or give a spacing: 2um.")
    if any(each.spacing_um is None for each in levels):
        raise ValueError(f"{where} states no voxel size in um; choose a level by name: {', '.join(names)}.")
    fine = [each for each in levels if all(s <= t * _TOLERANCE for s, t in zip(each.spacing_um, target, strict=True))]
    return max(fine or levels[:1], key=lambda each: np.prod(each.spacing_um))


def _target(level: str | float | SpacingUm) -> SpacingUm | None:
    """2.0, (2, 1, 1), "2um" or "2,1,1um" -> a spacing (z, y, x); None for anything else."""
    if isinstance(level, str):
        if re.fullmatch(r"[\d.,\s]+um", level) is None:
            return None
        try:
            level = [float(part) for part in level.removesuffix("um").split(",")]
        except ValueError:
            raise ValueError(f"The level {level!r} is no spacing: give one as 2um, or as 2,1,1um.") from None
    steps = list(level) if isinstance(level, tuple | list) else [level]
    return checked_spacing(steps * 3 if len(steps) == 1 else steps)
