"""NOUN  Record: what is on file about a checkpoint; and its card, whose numbers are the record's, never typed."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index

from .model.intensity_vit3d import DISPLAY_GAMMA
from .tables import json_lines, markdown_table

METRICS = ("precision", "recall", "f1", "esa", "dsa", "pds")
_TASK = "image-segmentation"
_CURVE = "curve.png"  # drawn by `train`: no picture of a stack
_SECTION = re.compile(r"<!-- ([^/\s].*?) -->\n(.*?)\n<!-- /\1 -->", re.DOTALL)
_RUN_TABLE = "this run"
_RUN = ("strategy", "prediction", "max_steps", "batch_size", "encoder_rate", "head_rate", "weight_decay", "seed")

_START = """
```python
import numpy as np
from transformers import pipeline

segmenter = pipeline("neuron-segmentation", model="{repo_id}", trust_remote_code=True)
stack = np.zeros((24, 96, 96), dtype=np.uint8)  # yours: an array (depth, height, width), or the path of a TIFF
stack[11:14, 40:44, :] = 200
found = segmenter(stack)
print(found["probability"].max(), found["mask"].sum())
```

It takes `pip install torch "transformers>=5.20" pillow`, and `tifffile` to read a TIFF. This runs the code in this
repository: read it first, and pin what you read with `revision="..."`. To fine-tune, load the network by itself with
`AutoModelForSemanticSegmentation`, or its encoder with `AutoModel`, and what prepares a stack for it with
`AutoImageProcessor`: `from_pretrained("{repo_id}", trust_remote_code=True)`.

Where `vit3d-neuron` is installed, `found["swc"]` is the tree, `trust_remote_code` is not needed once `vit3d`'s network
is imported, and `vit3d reconstruct STACK --model {repo_id}` does everything from the shell.
"""

_OUTPUTS = {
    "volume": "of every voxel of the window",
    "center_slice": "of the window's centre slice, so that `depth` is 1 (the pipeline stacks the slices)",
}

_CARD = """
# {name}

A [vit3d](https://huggingface.co/models?other=vit3d) checkpoint: a 3D Vision Transformer that marks the neurites in a
grey light-microscopy stack of a neuron.

{picture}

## Get started

<!-- get started -->
<!-- /get started -->

## In and out

- **Input**: one grey channel, axes `(depth, height, width)`, integers or floats, any size. It is cut into windows of
  {window} voxels, tokens are {patch} voxels, prediction is `{prediction}`.
- **Spacing**: {spacing}
- **Normalisation**: once per stack, never per window: background to 0, bright level to 1 (dark neurites on a bright
  ground are found by themselves), gamma 1/{gamma:g}, then minus {mean} and divided by {std}, the grey statistics of the
  photographs that the 2D source was trained on. The image processor does it.
- **Output**: logits `(batch, 1, depth, height, width)` {outputs}; their sigmoid is the probability of neurite. Patches
  that hold only background are not computed and count as background (`select=False` in the pipeline computes them all).

## Trained on

{trained_on}

## Scores

{scores}

## Licences

{licences}

## Limits

Stacks unlike those it was trained on (another spacing, stain, microscope or species) may need fine-tuning: look at the
result before you count in it. One channel is seen at a time. Scores above are of few neurons, and those that it was
trained on, or that chose the checkpoint, say little. It is a research tool, not one for diagnosis.
"""


@dataclass(frozen=True)
class Record:
    """`scores`: rows by group (scores.json, and validation from metrics.jsonl); `training`: training.json;
    `history`: the lines of metrics.jsonl; `files`: what of it is published as it is, by name."""

    scores: dict[str, list[dict]] = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def read(cls, checkpoint: Path, card: Path | None = None) -> "Record":
        """What lies in the folder of the card, beside the checkpoint, or in the run that wrote the checkpoint."""
        run = checkpoint.resolve().parent
        folders = [*([card] if card else []), checkpoint, *([run] if (run / "training.json").is_file() else [])]
        names = ("README.md", "scores.json", "metrics.jsonl", "training.json")
        found = {name: folder / name for name in names for folder in reversed(folders) if (folder / name).is_file()}
        pictures = [path for folder in folders for path in sorted(folder.glob("*.png"))]
        history = json_lines(found.get("metrics.jsonl"))
        scores = _groups(_json(found.get("scores.json"), {}))
        if validation := _validation(history, last=checkpoint.name == "last"):
            scores["validation"] = validation
        training = _json(found.pop("training.json", None), {})  # it is rewritten, see `published_training`
        return cls(scores, training, history, found | {path.name: path for path in reversed(pictures)})

    @property
    def published_training(self) -> dict:
        """training.json without the places of this machine: files and folders by their name alone."""
        return {**_without_places(self.training), "init": self.base_model} if self.training else {}

    @property
    def picture(self) -> str | None:
        """Of a stack and what is found in it, by name: the first that is not the curve of the training."""
        return next((name for name in self.files if name.endswith(".png") and name != _CURVE), None)

    @property
    def base_model(self) -> str:
        """The 2D source, or the checkpoint that was gone on from: a Hub id, or the name of a folder."""
        start, seen = str(self.training.get("init", "")), set()
        while start and Path(start).is_dir() and start not in seen:
            seen.add(start)
            folder = Path(start).resolve()
            before = _json(folder / "training.json", {}) or _json(folder.parent / "training.json", {})
            start = str(before.get("init", "")) or folder.name
        return start

    def results(self) -> list[EvalResult]:
        """Means over the neurons of each group, one entry per metric; rows without a finite value are left out."""
        return [
            EvalResult(
                task_type=_TASK, dataset_type=re.sub(r"\W+", "-", name).strip("-"), dataset_name=name,
                metric_type=metric, metric_name=f"{metric}, mean of {len(rows)}", metric_value=mean,
            )
            for name, rows in self._judged().items()
            for metric in METRICS
            if (mean := _mean(row.get(metric) for row in rows)) is not None
        ]  # fmt: skip

    def _judged(self) -> dict[str, list[dict]]:
        """Rows by group and role: a neuron that was trained on is not averaged with one that was not."""
        judged: dict[str, list[dict]] = {}
        for group, rows in self.scores.items():
            for row in rows:
                label = str(next(iter(row.values()), ""))
                if label.startswith("mean"):
                    continue
                role = row.get("role") or ("aligned" if " aligned by " in label else "")
                judged.setdefault(f"{group} ({role})" if role else group, []).append(row)
        return judged

    def run_table(self) -> str:
        """What the run was told and how far it came, one row; empty where no run is on file."""
        if not self.training:
            return ""
        losses = [line["loss"] for line in self.history if "loss" in line][-20:]
        row = {key: self.training[key] for key in _RUN if self.training.get(key) is not None}
        if self.history:
            row["steps done"] = self.history[-1].get("step", "")
        if losses:
            row["mean of last losses"] = math.fsum(losses) / len(losses)
        return markdown_table([row])


def card_of(record: Record, config, repo_id: str, licence: str | None = None, base_model: str | None = None) -> str:
    """The whole README.md. Words that lie beside the checkpoint stay; the metadata and get-started block are ours.

    `licence` and `base_model` (a Hub id) are what a person states; where nobody does, the card says so.
    """
    source = base_model or record.base_model
    if "README.md" in record.files:
        text, given = _split(record.files["README.md"].read_text())
        licence, base_model = licence or given.get("license"), base_model or given.get("base_model")
    else:
        text, given = _own_words(record, config, repo_id, licence, source), {}
    if not base_model and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists():
        base_model = source
    return f"---\n{_metadata(record, repo_id, licence, base_model, given).to_yaml()}\n---\n{_started(text, repo_id)}"


def check_card(text: str, record: Record) -> list[str]:
    """One sentence for each table or metadata entry of a card that is not what the record says."""
    wrong = []
    for name, body in _SECTION.findall(text):
        group = next((group for group in record.scores if name == group or name.startswith(f"{group} ")), None)
        if group and body.strip() != markdown_table(record.scores[group]):
            wrong.append(f"The table '{name}' is not what scores.json holds.")
        if name == _RUN_TABLE and body.strip() != record.run_table():
            wrong.append(f"The table '{_RUN_TABLE}' is not what training.json and metrics.jsonl hold.")
    stated = _split(text)[1].get("model-index")
    if stated and stated != _index(record, stated[0]["name"]):
        wrong.append("The metadata's model-index is not what scores.json and metrics.jsonl hold.")
    return wrong


def _metadata(record: Record, repo_id: str, licence, base_model, given: dict) -> ModelCardData:
    results = record.results()
    data = record.training.get("data")
    ours = {
        "library_name": "transformers",
        "pipeline_tag": _TASK,
        "tags": list(dict.fromkeys([*(given.get("tags") or []), "vit3d", "neuron", "microscopy", "swc"])),
        "license": licence,
        "base_model": base_model,
        "datasets": given.get("datasets") or ([re.sub(r"[^\w.-]+", "-", Path(data).name)] if data else None),
        "metrics": [metric for metric in METRICS if any(r.metric_type == metric for r in results)] or None,
    }
    kept = {key: value for key, value in given.items() if key not in (*ours, "model-index", "model_name")}
    named = {"eval_results": results, "model_name": repo_id.split("/")[-1]} if results else {}
    return ModelCardData(**ours, **named, **kept)


def _index(record: Record, name: str) -> list[dict]:
    """The model-index as it comes out of YAML."""
    data = ModelCardData(model_name=name, eval_results=record.results()).to_dict()
    return data.get("model-index") or eval_results_to_model_index(name, record.results())


def _own_words(record: Record, config, repo_id: str, licence: str | None, source: str) -> str:
    spacing = "that of the training stacks is not on file."
    if config.training_spacing_um:
        trained = _times(config.training_spacing_um)
        spacing = f"trained at {trained} um (z, y, x), to which `vit3d reconstruct` refines coarser stacks."
    tables = [f"Group `{name}`:\n\n{_marked(name, markdown_table(rows))}" for name, rows in record.scores.items()]
    words = (
        "Precision, recall and f1 count the points of one tree that lie near the other (closer than 2 voxels, unless "
        "who scored chose otherwise). ESA, DSA and PDS, in voxels: mean distance, mean distance of the far points, and "
        "their share."
    )
    return _CARD.format(
        name=repo_id.split("/")[-1],
        picture=f"![A stack and what is found in it]({record.picture})" if record.picture else "",
        window=_times(config.volume_size),
        patch=_times(config.patch_size),
        prediction=config.prediction,
        outputs=_OUTPUTS[config.prediction],
        spacing=spacing,
        gamma=1 / DISPLAY_GAMMA,
        mean=config.image_mean,
        std=config.image_std,
        trained_on=_trained_on(record, source),
        scores="\n\n".join([words, *tables]) if tables else "None are on file.",
        licences=_licences(record, licence, source),
    )


def _trained_on(record: Record, source: str) -> str:
    training = record.training
    if not training:
        return "No record of the training lies beside this checkpoint."
    data = f"the folder `{Path(training['data']).name}`" if training.get("data") else "no real neurons"
    kept = ", ".join(training.get("validate") or ()) or "none"
    words = (
        f"Started from `{source}`. Real data: {data}; kept out of training, to choose the checkpoint: {kept}. "
        f"Simulated neurons mixed in: {training.get('simulated', 0)}. `metrics.jsonl` holds every logged step."
    )
    curve = f"\n\n![The training, step by step]({_CURVE})" if _CURVE in record.files else ""
    return f"{words}\n\n{_marked(_RUN_TABLE, record.run_table())}{curve}"


def _licences(record: Record, licence: str | None, source: str) -> str:
    data = record.training.get("data")
    of_source = _licence_in(record.training.get("init")) or "see the page of that model"
    of_data = _licence_in(data) or "not on file; ask whoever recorded them"
    lines = [f"- These weights: {licence or 'not stated; ask whoever shares them'}."]
    lines += [f"- The weights that training started from, `{source}`: {of_source}."] if source else []
    lines += (
        [f"- The stacks trained on, `{Path(data).name}`, which are not in this repository: {of_data}."] if data else []
    )
    return "\n".join([*lines, "- The code in this repository: apache-2.0."])


def _started(text: str, repo_id: str) -> str:
    """The text with a get-started block that names this repository: in its section, or at the end."""
    block = _marked("get started", _START.format(repo_id=repo_id).strip())
    if "<!-- get started -->" in text:
        return re.sub(r"<!-- get started -->.*?<!-- /get started -->", lambda _: block, text, flags=re.DOTALL)
    return f"{text.rstrip()}\n\n## Get started\n\n{block}\n"


def _split(text: str) -> tuple[str, dict]:
    """(words, metadata) of a README.md."""
    card = ModelCard(text, ignore_metadata_errors=True)
    return card.text, card.data.to_dict() if text.startswith("---") else {}


def _groups(scores: dict | list) -> dict[str, list[dict]]:
    """What `score --json` wrote (a list of rows; one row alone, of old) or `evaluate_checkpoint.py` (rows by group)."""
    if isinstance(scores, list) or any(metric in scores for metric in METRICS):
        scores = {"scores": scores if isinstance(scores, list) else [scores]}
    return {
        name: rows for name, rows in scores.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)
    }


def _validation(history: list[dict], last: bool) -> list[dict]:
    """The F1 of each neuron kept out of training, at the step of the last checkpoint or of the best."""
    lines = [line for line in history if "f1" in line]
    if not lines:
        return []
    chosen = lines[-1] if last else max(reversed(lines), key=lambda line: line["f1"])
    return [{"neuron": key.removeprefix("f1/"), "f1": value} for key, value in chosen.items() if key.startswith("f1/")]


def _without_places(value):
    if isinstance(value, dict):
        return {key: _without_places(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_places(part) for part in value]
    is_place = isinstance(value, str) and value and (Path(value).is_absolute() or Path(value).exists())
    return Path(value).name if is_place else value


def _mean(values) -> float | None:
    known = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None


def _licence_in(folder: str | None) -> str | None:
    """What the card in a folder states."""
    readme = Path(folder or "") / "README.md"
    return _split(readme.read_text())[1].get("license") if folder and readme.is_file() else None


def _marked(name: str, body: str) -> str:
    return f"<!-- {name} -->\n{body}\n<!-- /{name} -->"


def _times(sizes) -> str:
    return " x ".join(f"{size:g}" for size in sizes)


def _text(path: Path | None) -> str:
    return path.read_text() if path and path.is_file() else ""


def _json(path: Path | None, default):
    """ValueError, naming the file, where it is no JSON."""
    try:
        return json.loads(_text(path) or "null") or default
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from None
