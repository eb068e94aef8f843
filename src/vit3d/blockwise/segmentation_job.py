"""`vit3d segment IN OUT.zarr`: from names to a store, and what is wrong with a store. Bad input ends here, at once."""

import os
from pathlib import Path

from ..arguments import make_room, new_folder, notice_spacing
from ..checkpoint import DEFAULT_MODEL, device_of, load_checkpoint
from ..formats.pyramid import pyramid_damage
from ..regridding import warn_of_coarse_voxels
from ..volume import open_volume
from .block_store import BlockStore, partial_path
from .out_of_core import Outcome, RunOptions, segment_store


def segment_path(
    source: str,
    out: Path,
    *,
    model: str = DEFAULT_MODEL,
    polarity: str = "auto",
    device: str = "auto",
    options: RunOptions | None = None,
    **reading,
) -> Outcome:
    """`segment_store` for a path or URL and the name of a checkpoint; `reading` goes to `open_volume`.

    Whatever would stop it later is refused before the network is loaded.
    """
    options = options or RunOptions()
    check_output(out)
    _check_apart(source, out)
    volume = open_volume(source, **reading)
    network, processor = load_checkpoint(model, device_of(device, options.local_rank), polarity)
    if options.rank == 0:
        notice_spacing(Path(source), volume)
        warn_of_coarse_voxels(volume, network.config)
    return segment_store(network, volume, make_room(out), processor=processor, options=options)


def check_output(out: Path) -> None:
    """Refuse, before work, a place where no store can grow."""
    if out.suffix != ".zarr":
        raise ValueError(f"A volume on disk is segmented into a store named OUT.zarr, got {out}.")
    new_folder(out.parent)
    nearest = next((place for place in (out, partial_path(out)) if place.exists()), None)
    if nearest is not None and not os.access(nearest, os.W_OK):
        raise PermissionError(f"Nothing can be written to {nearest}: it is read-only for you.")


def _check_apart(source: str, out: Path) -> None:
    """Input and output are different stores, neither inside the other."""
    if "://" in source:
        return
    first = Path(source).resolve()
    for second in (out.resolve(), partial_path(out).resolve()):
        if first == second or first in second.parents or second in first.parents:
            raise ValueError(
                f"Input {source} and output {out} are the same store; the output needs a place of its own."
            )


def damage_report(out: Path) -> list[str]:
    """One line per damaged or missing file of a finished (or growing) store, also of its coarser levels; none when it
    is whole."""
    folder = out if out.exists() else partial_path(out)
    if not folder.exists():
        raise FileNotFoundError(f"{out} does not exist, and neither does {partial_path(out).name}.")
    store = BlockStore(folder)
    checked = ((index, damage) for index, damage in store.verify() if damage)
    lines = [f"{folder / store.file_of(index)} {damage}" for index, damage in checked]
    metadata = store.metadata_damage()
    lines += [f"{folder / '0' / 'zarr.json'} {metadata}"] if metadata else []
    return lines + [f"{file} {damage}" for file, damage in pyramid_damage(folder)]
