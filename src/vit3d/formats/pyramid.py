"""Writing OME-Zarr 0.5: a volume as a store, and the coarser levels that viewers open first. Memory is one box's."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import zarr
from tqdm import tqdm
from zarr.codecs import Crc32cCodec, ZstdCodec

from .appearing import appearing
from .axes import SpacingUm
from .lazy_voxels import Box, give_back_freed
from .ngff import levels_of, ome_attributes

METHODS = ("max", "mean")
_CHUNK = 64
_SHARD = 256  # edge of a file of level 0; coarser levels have half of it, so that both read the same box
_COARSEST = 128  # a level with no longer axis than this is the last

_Factor = tuple[int, int, int]


def write_store(voxels, path: Path, spacing_um: SpacingUm | None) -> None:
    """An OME-Zarr with one level, written shard by shard under another name and then renamed; see `write_volume`."""
    give_back_freed()
    dtype = {"bool": "uint8", "float16": "float32"}.get(voxels.dtype.name, voxels.dtype.name)
    with _appearing(path) as folder:
        zarr.create_group(folder, attributes={"ome": ome_attributes(path.stem, spacing_um, [(1, 1, 1)])})
        array = _new_array(folder / "0", voxels.shape, dtype, _SHARD)
        for box in _progress(_boxes(voxels.shape, array.shards), voxels.shape, array.shards, "write"):
            part = np.asarray(voxels[box])
            array[box] = part.astype(np.uint8) * 255 if part.dtype == bool else part


def build_pyramid(store: str | Path, *, method: str = "max") -> list[SpacingUm | None]:
    """Add coarser levels to a local OME-Zarr 0.5 of one (Z, Y, X) image -> the spacing of every level.

    Each level halves the axes whose step is less than twice the finest, so voxels become cubic, until no axis is
    longer than 128. A voxel is the largest ("max") or the mean ("mean") of those it covers: the largest keeps a
    neurite of one voxel in sight at every level of a probability, where a mean would fade it away. Coarser levels that
    are there are replaced. A level appears when it is whole; the group names them all when they are.

    ValueError for another method and for a store without such an image.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
    give_back_freed()
    store = Path(store)
    levels = levels_of(_attributes(store), store)
    if not levels or (levels[0].axes, levels[0].path) != ("ZYX", "0"):
        raise ValueError(f"{store} is no OME-Zarr 0.5 with one stack (z, y, x) at the path 0.")
    spacing_um = levels[0].spacing_um
    _name_levels(store, spacing_um, [(1, 1, 1)])  # what follows is not to be believed until it is whole
    factors = [(1, 1, 1), *_factors(zarr.open_array(store / "0", mode="r").shape, spacing_um)]
    for number in range(1, len(factors)):
        halved = tuple(b // a for a, b in zip(factors[number - 1], factors[number], strict=True))
        with _appearing(store / str(number)) as folder:
            _coarsen(zarr.open_array(store / str(number - 1), mode="r"), folder, halved, method)
    _name_levels(store, spacing_um, factors, method)
    return [level.spacing_um for level in levels_of(_attributes(store), store)]


def has_pyramid(store: Path) -> bool:
    """Whether `build_pyramid` has been through with a store, and every coarser level is what it wrote."""
    image = _attributes(store).get("ome", {}).get("multiscales", [{}])[0]
    return image.get("type") in METHODS and next(pyramid_damage(store), None) is None


def pyramid_damage(store: Path) -> Iterator[tuple[Path, str]]:
    """(file, what is wrong with it) of every damaged or missing file of the coarser levels; all of them are read."""
    for level in levels_of(_attributes(store), store)[1:]:
        folder = store / level.path
        try:
            array = zarr.open_array(folder, mode="r")
        except Exception as error:  # of many kinds: for what is no JSON, and for what it should not say
            metadata = folder / "zarr.json"
            yield metadata, f"cannot be read ({error})" if metadata.exists() else "is missing"
            continue
        edges = array.shards or array.chunks
        for box in _progress(_boxes(array.shape, edges), array.shape, edges, f"check level {level.path}"):
            index = tuple(b.start // edge for b, edge in zip(box, edges, strict=True))
            file = folder / array.metadata.encode_chunk_key(index)
            if damage := _damage_of(file, array, box):
                yield file, damage


def _damage_of(file: Path, array: zarr.Array, box: Box) -> str | None:
    """Of a shard, which holds the box; a missing one would be read as zeros."""
    if not file.exists():
        return "is missing"
    try:
        array[box]
    except Exception as error:  # whatever a codec makes of other bytes
        return f"cannot be read ({error})"
    return None


def _factors(shape: tuple[int, ...], spacing_um: SpacingUm | None) -> Iterator[_Factor]:
    """The factor of each coarser level against level 0."""
    spacing, factor = np.array(spacing_um or (1.0, 1.0, 1.0)), np.ones(3, int)
    while (-(-np.array(shape) // factor)).max() > _COARSEST:
        sizes, steps = -(-np.array(shape) // factor), spacing * factor
        long = sizes > 1
        factor = factor * np.where(long & (steps < 2 * steps[long].min()), 2, 1)
        yield tuple(factor.tolist())


def _coarsen(fine: zarr.Array, folder: Path, factor: _Factor, method: str) -> None:
    shape = tuple(-(-n // f) for n, f in zip(fine.shape, factor, strict=True))
    array = _new_array(folder, shape, fine.dtype, _SHARD // 2)
    for box in _progress(_boxes(shape, array.shards), shape, array.shards, f"level {folder.name.split('.')[1]}"):
        read = tuple(slice(b.start * f, min(b.stop * f, n)) for b, f, n in zip(box, factor, fine.shape, strict=True))
        array[box] = _reduced(fine[read], factor, method)


def _reduced(voxels: np.ndarray, factor: _Factor, method: str) -> np.ndarray:
    """Blocks of `factor` -> one voxel each; blocks at the end that are cut count by what they have."""
    reduce = np.maximum if method == "max" else np.add
    result = voxels if method == "max" else voxels.astype(np.float64)
    for axis, step in enumerate(factor):
        if step > 1:
            starts = np.arange(0, voxels.shape[axis], step)
            result = reduce.reduceat(result, starts, axis=axis)
    if method == "mean":
        counts = [np.minimum(f, n - np.arange(0, n, f)) for n, f in zip(voxels.shape, factor, strict=True)]
        result = result / (counts[0][:, None, None] * counts[1][:, None] * counts[2])
        result = result if voxels.dtype.kind == "f" else np.rint(result)
    return result.astype(voxels.dtype)


def _new_array(folder: Path, shape: tuple[int, ...], dtype, edge: int) -> zarr.Array:
    """Every chunk is written, also one of zeros: a file that is missing is damage, never background."""
    return zarr.create_array(
        folder,
        shape=shape,
        dtype=dtype,
        chunks=(_CHUNK,) * 3,
        shards=tuple(min(edge, -(-n // _CHUNK) * _CHUNK) for n in shape),
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
        fill_value=0,
        dimension_names=["z", "y", "x"],
        config={"write_empty_chunks": True},
    )


def _boxes(shape: tuple[int, ...], edges: tuple[int, ...]) -> Iterator[Box]:
    for start in product(*(range(0, n, edge) for n, edge in zip(shape, edges, strict=True))):
        yield tuple(slice(s, min(s + edge, n)) for s, edge, n in zip(start, edges, shape, strict=True))


def _progress(boxes: Iterator[Box], shape, edges, what: str) -> Iterator[Box]:
    total = int(np.prod([-(-n // edge) for n, edge in zip(shape, edges, strict=True)]))
    return tqdm(boxes, desc=what, total=total, unit="box", delay=2, leave=False, disable=None)


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A folder to write in that takes the place of `path` when all went well, and otherwise leaves nothing."""
    folder = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    old = folder.with_suffix(".old")
    try:
        yield folder
        if path.exists():
            os.rename(path, old)
        os.rename(folder, path)
    finally:
        for leftover in (folder, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _attributes(store: Path) -> dict:
    try:
        return json.loads((store / "zarr.json").read_text())["attributes"]
    except (OSError, ValueError, KeyError):
        return {}


def _name_levels(store: Path, spacing_um, factors: list[_Factor], method: str | None = None) -> None:
    """The group's `ome` attributes, put on disk in one step; other attributes stay."""
    file = store / "zarr.json"
    metadata = json.loads(file.read_text())
    metadata["attributes"]["ome"] = ome_attributes(store.name.removesuffix(".zarr"), spacing_um, factors, method)
    metadata.pop("consolidated_metadata", None)  # a copy that would go on to name the old levels
    with appearing(file) as hidden:
        hidden.write_text(json.dumps(metadata, indent=2))
