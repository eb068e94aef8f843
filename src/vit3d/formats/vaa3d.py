"""Vaa3D's raw and compressed stacks, .v3draw and .v3dpbd."""

import math
import struct
from pathlib import Path

import numpy as np

from .axes import stack_index
from .lazy_voxels import LazyVoxels, MappedVoxels, check_memory

_RAW_KEY, _PBD_KEY = b"raw_image_stack_by_hpeng", b"v3d_volume_pkbitdf_encod"
_HEADER_BYTES = 43  # key 24, byte order 1, datatype 2, sizes x y z channel 4 x 4

# Packets of the v3dpbd stream by bytes per voxel: first and last header byte, what to subtract from it to get
# the number of voxels, and bits per voxel; 0 bits is one value for all, 2 to 5 bits are running differences.
_PACKETS = {
    1: ((0, 32, -1, 8), (33, 127, 32, 2), (128, 255, 127, 0)),
    2: ((0, 31, -1, 16), (32, 79, 31, 3), (80, 182, 79, 4), (183, 222, 182, 5), (223, 255, 222, 0)),
}


def open_vaa3d(path: Path, channel: int | None) -> tuple[LazyVoxels | np.ndarray, None]:
    """The voxels of a .v3draw, lazily, or of a .v3dpbd, which is decoded whole: it has no place to jump to."""
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
    index, dtype = stack_index("CZYX", shape, path, channel), np.dtype(order + codes[datatype])
    if key == _RAW_KEY:
        end, size = _HEADER_BYTES + math.prod(shape) * dtype.itemsize, path.stat().st_size
        if size != end:
            raise ValueError(f"{path} declares {shape} (channel, z, y, x), {end} bytes, but has {size}.")
        return MappedVoxels(path, dtype, _HEADER_BYTES, shape, index), None
    check_memory(path, shape, dtype)
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
