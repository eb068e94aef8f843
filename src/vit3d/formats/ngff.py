"""The metadata of OME-Zarr (NGFF 0.1 to 0.5): what they say of an image's levels, and what ours say."""

from dataclasses import dataclass

from .axes import SpacingUm, spacing_of

_READ = ("0.1", "0.2", "0.3", "0.4", "0.5")
_FIVE_AXES = ("t", "c", "z", "y", "x")  # of versions that do not name them


@dataclass(frozen=True)
class Level:
    """One resolution of an image: its array's path in the group, its axes as letters, its spacing (z, y, x)."""

    path: str
    axes: str
    spacing_um: SpacingUm | None


def levels_of(attributes: dict, where) -> list[Level]:
    """The levels of a group's image, finest first; none where the group is no multiscale image.

    ValueError for metadata of another version or without what they must have.
    """
    ome = attributes.get("ome", attributes)
    if not isinstance(ome, dict) or not ome.get("multiscales"):
        return []
    try:
        image = ome["multiscales"][0]
        version = str(ome.get("version") or image.get("version") or "0.4")
        if version not in _READ:
            raise ValueError(f"{where} is OME-Zarr of version {version}; {_READ[0]} to {_READ[-1]} are read.")
        axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in image.get("axes", _FIVE_AXES)]
        letters = "".join(letter_of(axis.get("name"), axis.get("type")) for axis in axes)
        overall = _scale(image, len(axes))
        return [
            Level(str(dataset["path"]), letters, _spacing(axes, letters, overall, _scale(dataset, len(axes))))
            for dataset in image["datasets"]
        ]
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{where} has broken OME-Zarr metadata ({type(error).__name__}: {error}).") from error


def letter_of(name, kind: str | None = None) -> str:
    """Z, Y, X, C (channel), T (time), or A for any other axis."""
    name = str(name).lower()
    if name in ("z", "y", "x") and kind in (None, "space"):
        return name.upper()
    if kind == "channel" or (kind is None and name in ("c", "channel", "channels")):
        return "C"
    return "T" if kind == "time" or (kind is None and name in ("t", "time")) else "A"


def ome_attributes(
    name: str, spacing_um: SpacingUm | None, factors: list[tuple[int, int, int]], method: str | None = None
) -> dict:
    """The `ome` attributes (version 0.5) of an image with levels "0", "1", ... of these factors against the first.

    A coarse voxel covers a block of fine ones, so its centre is moved by half of what the block has more. `method`:
    how levels were made of one another.
    """
    spacing = spacing_um or (1.0, 1.0, 1.0)
    unit = {} if spacing_um is None else {"unit": "micrometer"}
    datasets = []
    for number, factor in enumerate(factors):
        scale = [step * f for step, f in zip(spacing, factor, strict=True)]
        shift = [step * (f - 1) / 2 for step, f in zip(spacing, factor, strict=True)]
        moves = [{"type": "scale", "scale": scale}]
        moves += [{"type": "translation", "translation": shift}] * any(shift)
        datasets.append({"path": str(number), "coordinateTransformations": moves})
    image = {
        "name": name,
        "axes": [{"name": axis, "type": "space", **unit} for axis in "zyx"],
        "datasets": datasets,
        **({} if method is None else {"type": method}),
    }
    return {"version": "0.5", "multiscales": [image]}


def _scale(entry: dict, num_axes: int) -> list[float]:
    """The scale among an entry's transformations; ones where it has none."""
    scale = [1.0] * num_axes
    for transformation in entry.get("coordinateTransformations") or ():
        if transformation["type"] == "scale":
            scale = [float(factor) for factor in transformation["scale"]]
    if len(scale) != num_axes:
        raise IndexError(f"a scale of {len(scale)} numbers for {num_axes} axes")
    return scale


def _spacing(axes: list[dict], letters: str, overall: list[float], own: list[float]) -> SpacingUm | None:
    at = [letters.find(letter) for letter in "ZYX"]
    if -1 in at:
        return None
    return spacing_of([overall[i] * own[i] for i in at], [axes[i].get("unit") for i in at])
