"""VERB share: a checkpoint on the Hub, in one commit."""

import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .checkpoint import load_checkpoint, place_of
from .model.auto_vit3d import mark_for_upload

_CARD = """
# {name}

A [vit3d](https://huggingface.co/models?other=vit3d) checkpoint: grey stacks (depth, height, width) in, one logit per
voxel out that it belongs to a neurite. Patch {patch} and window {window} voxels (z, y, x), {prediction} prediction.

```python
from transformers import AutoModelForSemanticSegmentation

model = AutoModelForSemanticSegmentation.from_pretrained("{repo_id}", trust_remote_code=True)
```

Installed as a package, `vit3d reconstruct STACK --model {repo_id}` turns a stack into an SWC.
"""


def share(checkpoint: str | Path, repo_id: str, *, private: bool = False, dry_run: bool = False) -> list[str]:
    """Push model, processor, code and card in one commit; returns what a person should be told.

    Weights are copied from `checkpoint` as they are stored. ValueError: the folder is no vit3d checkpoint, or
    `repo_id` is malformed. With `dry_run` nothing leaves this machine.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository id NAMESPACE/NAME: {error}") from error
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} is no repository id NAMESPACE/NAME: the namespace is missing.")
    with tempfile.TemporaryDirectory() as folder:
        files = prepare(checkpoint, repo_id, Path(folder))
        if dry_run:
            return [f"{repo_id} would hold {len(files)} files:", *files]
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload vit3d checkpoint")
    return [f"{len(files)} files in one commit: {commit.commit_url}"]


def prepare(checkpoint: str | Path, repo_id: str, folder: Path) -> list[str]:
    """Lay out the repository in `folder`; returns the names of its files. A card that the checkpoint has stays."""
    model, processor = load_checkpoint(str(checkpoint), device="cpu")
    mark_for_upload(model)
    try:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    finally:  # the mark is on the classes: later checkpoints of this process are to stay as they are
        for marked in (type(model.config), type(model), type(processor)):
            marked._auto_class = None
    source = Path(place_of(str(checkpoint)))
    for name in ("model.safetensors", "README.md"):
        if (source / name).is_file():
            shutil.copy(source / name, folder)  # as stored: loading may have changed the precision
    if not (folder / "README.md").exists():
        _card(model.config, repo_id).save(folder / "README.md")
    return sorted(path.name for path in folder.iterdir())


def _card(config, repo_id: str) -> ModelCard:
    text = _CARD.format(
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        patch=config.patch_size,
        window=config.volume_size,
        prediction=config.prediction,
    )
    data = ModelCardData(
        license="apache-2.0", library_name="transformers", pipeline_tag="image-segmentation", tags=["vit3d"]
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")
