"""VERB share: a checkpoint, or what a data set consists of, on the Hub in one commit."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import DatasetCardData, snapshot_download
from tqdm import tqdm

from .annotations.file_facts import digest, size
from .annotations.pairs import find_pairs
from .checkpoint import load_checkpoint, place_of
from .model.configuration_vit3d import ViT3DConfig
from .model.image_processing_vit3d import ViT3DImageProcessor
from .model.modeling_vit3d import ViT3DForNeuronSegmentation
from .model_card import Record, card_of, check_card
from .repository import HubRepository

PREVIEW = "preview.png"
_FILES = ("image", "swc", "label")  # what a row of `find_pairs` names
OPEN_LICENCES = (
    *("cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
    *("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "pddl", "odc-by", "odbl", "cdla-permissive-1.0", "cdla-permissive-2.0"),
    *("mit", "apache-2.0", "bsd-3-clause"),
)
LICENCES = (  # as the Hub calls them, less those of other people's networks
    *OPEN_LICENCES,
    *("openrail", "openrail++", "openmdw-1.0", "bigscience-openrail-m", "creativeml-openrail-m", "bigcode-openrail-m"),
    *("cc", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0"),
    *("cc-by-nc-nd-4.0", "cdla-sharing-1.0", "c-uda", "etalab-2.0", "fair-noncommercial-research-license"),
    *("bsd", "bsd-2-clause", "bsd-3-clause-clear", "bsl-1.0", "isc", "ncsa", "postgresql", "unlicense", "zlib"),
    *("agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "mpl-2.0", "wtfpl"),
    *("afl-3.0", "artistic-2.0", "ecl-2.0", "epl-1.0", "epl-2.0", "eupl-1.1", "eupl-1.2", "lppl-1.3c", "ms-pl"),
    *("ofl-1.1", "osl-3.0", "unknown", "other"),
)

_DATASET_CARD = """
# {name}

What `{folder}` consists of: {pairs} neurons, each a light-microscopy stack and its traced tree (SWC), {size:.1f} MB.
**The stacks and trees themselves are not in this repository.** `metadata.jsonl` has one row for each, with the size and
SHA-256 of both files, so that whoever has a copy can tell whether it is the same.

```python
import json

from huggingface_hub import hf_hub_download

path = hf_hub_download("{repo_id}", "metadata.jsonl", repo_type="dataset")
rows = [json.loads(line) for line in open(path)]
print(len(rows), rows[0]["image"], rows[0]["image_sha256"])
```

The data are licensed under {licence}, as stated by whoever shared this list.
"""


def share(
    checkpoint: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    card: str | Path | None = None,
    licence: str | None = None,
    base_model: str | None = None,
) -> list[str]:
    """Push model, processor, code, pipeline, card, metrics and picture in one commit; what a person should be told.

    Weights are copied from `checkpoint` as they are stored, and read back from the Hub and compared bit by bit.
    Scores, metrics and pictures lie beside the checkpoint, in its run, or in the folder `card`. `licence` is that
    of the weights, `base_model` the Hub id of the 2D source, where neither can be read off. With `dry_run` nothing
    leaves this machine. ValueError, ConnectionError: the folder is no vit3d checkpoint, a number in the card is not
    the one on file, or the Hub refuses; nothing is then published.
    """
    repository = HubRepository(repo_id)
    if not dry_run:
        repository.check_token()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = prepare(checkpoint, repo_id, folder, card, licence, base_model)
        if dry_run:
            return [f"{repo_id} would hold {len(files)} files:", *files]
        address = repository.publish(folder, "Upload vit3d checkpoint", private=private, check=_same_logits(folder))
    return [
        f"{len(files)} files in one commit: {address}",
        "Read back from the Hub: every file is the same to the last byte, every logit to the last bit.",
    ]


def prepare(
    checkpoint: str | Path,
    repo_id: str,
    folder: Path,
    card: str | Path | None = None,
    licence: str | None = None,
    base_model: str | None = None,
) -> list[str]:
    """Lay out the repository in `folder`; returns the names of its files."""
    if card is not None and not Path(card).is_dir():
        raise ValueError(f"--card takes a folder with scores.json, README.md or a picture, and {card} is none.")
    licence = licence and licence.lower()
    if licence and licence not in LICENCES:
        raise ValueError(f"--licence takes what the Hub knows, mit, apache-2.0, cc-by-4.0, ..., other, got {licence}.")
    model, processor = load_checkpoint(str(checkpoint), device="cpu", dtype=torch.float32)
    place = place_of(str(checkpoint))
    source = Path(place if Path(place).is_dir() else snapshot_download(place))
    ViT3DConfig.from_pretrained(source).save_pretrained(folder)  # the model's own says the precision it runs in
    processor.save_pretrained(folder)
    for weights in source.glob("model*.safetensors*"):
        shutil.copy(weights, folder)  # as stored: loading may have changed the precision
    record = Record.read(source, Path(card) if card is not None else None)
    if record.picture is None:
        _draw_preview(model, processor, folder / PREVIEW)
        record.files[PREVIEW] = folder / PREVIEW
    text = card_of(record, model.config, repo_id, licence, base_model)
    if wrong := check_card(text, record):
        raise ValueError(f"The card of {checkpoint} is not shared: {' '.join(wrong)}")
    for name, path in record.files.items():
        if path != folder / name:
            shutil.copy(path, folder / name)
    if record.training:
        (folder / "training.json").write_text(json.dumps(record.published_training, indent=2) + "\n")
    (folder / "README.md").write_text(text)
    return sorted(path.name for path in folder.iterdir())


def share_dataset(
    data: str | Path, repo_id: str, *, licence: str | None, private: bool = False, dry_run: bool = False
) -> list[str]:
    """Push what a folder of stacks and SWCs consists of: a row per neuron with sizes and checksums, and a card.

    No stack and no tree is sent. ValueError, FileNotFoundError, ConnectionError: no pair in the folder, a licence
    that is not stated or does not let others have the data, or the Hub refuses; nothing is then published.
    """
    repository = HubRepository(repo_id, "dataset")
    if (licence or "").lower() not in OPEN_LICENCES:
        raise ValueError(
            f"A data set is shared under a licence that lets others have it, --licence {', '.join(OPEN_LICENCES[:5])}, "
            f"...; got {licence or 'none'}."
        )
    if not dry_run:
        repository.check_token()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = prepare_dataset(data, repo_id, folder, licence.lower())
        if dry_run:
            return [f"{repo_id} would hold {len(files)} files:", *files]
        address = repository.publish(folder, "Upload metadata and checksums", private=private)
    return [f"{len(files)} files in one commit: {address}", "Read back from the Hub: the same to the last byte."]


def prepare_dataset(data: str | Path, repo_id: str, folder: Path, licence: str) -> list[str]:
    """Lay out the data set's repository in `folder`; returns the names of its files."""
    data = Path(data)
    rows = [_described(row, data) for row in tqdm(find_pairs(data), desc="checksums", unit="neuron", disable=None)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metadata = DatasetCardData(
        license=licence,
        task_categories=["image-segmentation"],
        tags=["vit3d", "neuron", "microscopy", "swc"],
        configs=[{"config_name": "default", "data_files": "metadata.jsonl"}],
    )
    words = _DATASET_CARD.format(
        name=repo_id.split("/")[-1],
        folder=data.resolve().name,
        pairs=len(rows),
        size=sum(value for row in rows for key, value in row.items() if key.endswith("_bytes")) / 1e6,
        repo_id=repo_id,
        licence=licence,
    )
    (folder / "README.md").write_text(f"---\n{metadata.to_yaml()}\n---\n{words}")
    return sorted(path.name for path in folder.iterdir())


def _described(row: dict, data: Path) -> dict:
    """A row of `find_pairs` whose files are named from the folder on, with their bytes and SHA-256."""
    described = {}
    for key, value in row.items():
        if key not in _FILES or not value:
            described[key] = value
            continue
        path = Path(value)
        described[key] = Path(os.path.relpath(path, data)).as_posix()
        described |= {f"{key}_bytes": size(path), f"{key}_sha256": digest(path)}
    return described


def _draw_preview(model, processor: ViT3DImageProcessor, path: Path) -> None:
    """What the network makes of a small simulated neuron."""
    from .plot import plot_reconstruction
    from .reconstruction import reconstruct  # the only place where sharing meets the other verbs
    from .simulate import simulate_neuron

    volume, _ = simulate_neuron(seed=1, shape=(32, 128, 128))
    found = reconstruct(model, volume, processor=processor)
    plot_reconstruction(volume, found.tree, path, probability=found.probability)


def _same_logits(folder: Path) -> Callable[[Path], None]:
    """A check that a folder fetched from the Hub holds the network of `folder`."""

    @torch.inference_mode()
    def check(pulled: Path) -> None:
        sent, back = (
            ViT3DForNeuronSegmentation.from_pretrained(place, dtype=torch.float32).eval() for place in (folder, pulled)
        )
        noise = torch.randn(1, 1, *sent.config.volume_size, generator=torch.Generator().manual_seed(0))
        if not torch.equal(sent(noise).logits, back(noise).logits):
            raise ValueError("The network that the Hub gives back has other logits than the one that was sent.")

    return check
