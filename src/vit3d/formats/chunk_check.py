"""Zarr gives its fill value for a chunk whose file is lost, and says nothing. Here a lost chunk is an error.

A store may leave out chunks on purpose, as Zarr's writers do with chunks of zeros unless told otherwise: it declares
that by the attribute `missing_chunks: "fill"` of the array. A shard lists the chunks it leaves out, so of a sharded
array only whole shards can be lost.
"""

from collections.abc import Iterator
from itertools import product

import numpy as np
import zarr
from zarr.core.sync import sync

from .lazy_voxels import Box

DECLARATION = ("missing_chunks", "fill")


def refuse_missing_chunks(array, box: Box, voxels: np.ndarray) -> None:
    """ValueError naming the first chunk that `voxels`, read from `box` of a Zarr array, show to be lost.

    Only chunks that read as fill throughout are looked for; arrays of other kinds are passed over.
    """
    if not isinstance(array, zarr.Array) or array.attrs.get(DECLARATION[0]) == DECLARATION[1]:
        return
    fill = 0 if array.fill_value is None else array.fill_value  # Zarr v2's null leaves it open: zeros are read
    for index, part in _chunks(array, box):
        region = voxels[part]
        if _is_filled(region.flat[:1], fill) and _is_filled(region, fill):
            key = array.metadata.encode_chunk_key(index)
            if not sync((array.store_path / key).exists()):
                raise ValueError(
                    f"{array.store_path} has lost the chunk {key}, which would be read as {fill}; restore "
                    f'it. A store that leaves out empty chunks declares it by the attribute "{DECLARATION[0]}": '
                    f'"{DECLARATION[1]}", or is read with --missing-as-fill.'
                )


def _is_filled(voxels: np.ndarray, fill) -> bool:
    return bool((np.isnan(voxels) if fill != fill else voxels == fill).all())


def _chunks(array: zarr.Array, box: Box) -> Iterator[tuple[tuple[int, ...], Box]]:
    """(chunk or shard, its part of the box in the box's coordinates)."""
    edges = array.shards or array.chunks
    for index in product(*(range(b.start // e, -(-b.stop // e)) for b, e in zip(box, edges, strict=True))):
        spans = zip(index, edges, box, strict=True)
        yield index, tuple(slice(max(i * e - b.start, 0), min((i + 1) * e, b.stop) - b.start) for i, e, b in spans)
