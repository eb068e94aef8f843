"""Which axis of a stored array is which, and how far apart its voxels lie: shared by all readers of volumes."""

import math
import re

SpacingUm = tuple[float, float, float]

UM_PER_UNIT = {
    **dict.fromkeys(("um", "µm", "μm", "\\u00B5m", "\\u03BCm", "micron", "microns", "micrometer"), 1.0),
    **dict.fromkeys(("micrometers", "micrometre", "micrometres"), 1.0),
    **{"pm": 1e-6, "Å": 1e-4, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6},
    **{"picometer": 1e-6, "angstrom": 1e-4, "nanometer": 1e-3, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6},
}


def checked_spacing(spacing_um) -> SpacingUm:
    """Three positive floats (z, y, x), or ValueError."""
    spacing = tuple(float(step) for step in spacing_um)
    if len(spacing) != 3 or not all(math.isfinite(step) and step > 0 for step in spacing):
        raise ValueError(f"`spacing_um` must be three positive numbers (z, y, x) in um, got {spacing_um}.")
    return spacing


def _um_per(unit: str | None) -> float:
    """0 where the unit is no length. Words may be written large; "Mm" is no "mm"."""
    word = str(unit).lower()
    return UM_PER_UNIT.get(unit, UM_PER_UNIT.get(word, 0.0) if len(word) > 3 else 0.0)


def spacing_of(steps, units) -> SpacingUm | None:
    """Steps (z, y, x), each in its unit, as um; None where a unit is no length or a step no distance."""
    in_um = [float(step) * _um_per(unit) for step, unit in zip(steps, units, strict=True)]
    spacing = tuple(float(f"{step:.9g}") for step in in_um)  # a rational 1/0.33 reads as 0.33
    return spacing if all(math.isfinite(step) and step > 0 for step in spacing) else None


def stack_index(axes: str, shape: tuple[int, ...], where, channel: int | None = None, time: int | None = None) -> tuple:
    """The index that picks one (Z, Y, X) stack from an array with these axes (tifffile's letters): slices and ints.

    ValueError, beginning with `where`, for what is no such stack and for a choice that is missing or impossible.
    """
    long = [(axis, size) for axis, size in zip(axes, shape, strict=True) if size > 1 or axis in "YX"]
    letters = re.sub("[IQ]", "Z", "".join(axis for axis, _ in long))  # unnamed pages are slices
    said = f"axes {axes} of sizes {' x '.join(map(str, shape))}"
    if "T" in letters and time is None:
        raise ValueError(
            f"{where} has a time axis ({said}); choose a time point (`time=` in Python), save one as a stack, "
            "or name the axis Z if these are slices."
        )
    if re.sub("[CST]", "", letters) == "YX":
        hint = "a stack is needed, " + ("of more than one slice" if "Z" in axes else "its slices on an axis named Z")
        if "C" in letters:  # what ImageJ, and tifffile without `axes`, make of slices that nobody named
            hint += "; if the channels are slices: in ImageJ Image > Properties, in tifffile metadata={'axes': 'ZYX'}"
        raise ValueError(f"{where} is a 2D image ({said}); {hint}.")
    if re.fullmatch("(C?ZYX|ZC?YX|ZYXS?|S?ZYX)", letters.replace("T", "")) is None:
        raise ValueError(f"{where} has {said}, not one 3D stack with channels; save it as Z, C, Y, X.")
    chosen = _chosen(long, where, channel, time)
    return tuple(
        slice(None) if axis in "YX" or (size > 1 and axis not in "CST") else min(chosen.get(axis, 0), size - 1)
        for axis, size in zip(axes, shape, strict=True)
    )


def _chosen(long: list[tuple[str, int]], where, channel: int | None, time: int | None) -> dict[str, int]:
    """Channel and time point, checked against the sizes of their axes."""
    num_channels = next((size for axis, size in long if axis in "CS"), 1)
    num_times = next((size for axis, size in long if axis == "T"), 1)
    if channel is None and num_channels > 1:
        raise ValueError(
            f"{where} has {num_channels} channels{' (RGB)' * any(axis == 'S' for axis, _ in long)}; "
            f"choose one with `--channel 0` to `--channel {num_channels - 1}` (`channel=` in Python); "
            "for a command without that flag save it as a stack of its own."
        )
    for name, number, count in (("channel", channel, num_channels), ("time point", time, num_times)):
        if not 0 <= (number or 0) < count:
            raise ValueError(f"{where} has {count} {name}(s), counted from 0, and no {name} {number}.")
    return {"C": channel or 0, "S": channel or 0, "T": time or 0}
