"""The network learns in other people's loops too: transformers' Trainer, and PEFT's adapters."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from runs import SIZES, WINDOW, make_checkpoint, make_pairs, weights
from vit3d import ViT3DConfig, ViT3DForNeuronSegmentation
from vit3d.learning.patches import CropDataset
from vit3d.learning.training_data import crop_dataset
from vit3d.training import TrainingConfig, TrainingRun, train


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("data"), {"one": "um", "two": "voxel"})


@pytest.fixture(scope="module")
def crops(data, tmp_path_factory) -> CropDataset:
    return crop_dataset(data, ViT3DConfig(**SIZES, **WINDOW), 40, tmp_path_factory.mktemp("store"), validate=("two",))


@pytest.fixture
def checkpoint(tmp_path) -> str:
    return make_checkpoint(tmp_path / "checkpoint")


def trained(model, crops, folder: Path, steps: int, **options) -> Trainer:
    sizes = dict(per_device_train_batch_size=2, per_device_eval_batch_size=2)
    arguments = TrainingArguments(
        str(folder), max_steps=steps, logging_steps=1, learning_rate=1e-3, lr_scheduler_type="constant",
        report_to="none", use_cpu=True, disable_tqdm=True, **(sizes | options),
    )  # fmt: skip
    few = torch.utils.data.Subset(crops, range(4))
    trainer = Trainer(model, arguments, train_dataset=few, eval_dataset=few)
    trainer.train()
    return trainer


def test_other_loops_get_the_crops_that_train_cuts(data, crops, checkpoint, tmp_path, monkeypatch):
    cut = []
    monkeypatch.setattr(TrainingRun, "go", lambda self: cut.append(self.crops))
    train(TrainingConfig(str(data), checkpoint, str(tmp_path / "run"), validate=("two",), simulated=0, num_workers=0))
    assert len(crops) == 40
    assert [volume.name for volume in crops.volumes] == ["one"]
    for number in range(4):
        assert all(torch.equal(value, cut[0][number][key]) for key, value in crops[number].items())


@pytest.mark.slow
def test_the_trainer_of_transformers_trains_and_saves_it(crops, checkpoint, tmp_path):
    model = ViT3DForNeuronSegmentation.from_pretrained(checkpoint)
    trainer = trained(model, crops, tmp_path / "out", steps=20)
    found = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(found) == 20
    assert np.mean(found[-4:]) < 0.95 * np.mean(found[:4])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(np.mean(found[-4:]), rel=0.2)
    trainer.save_model(str(tmp_path / "saved"))
    again = ViT3DForNeuronSegmentation.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        batch = {key: value[None] for key, value in crops[0].items()}
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


def test_the_trainer_logs_the_mean_loss_of_the_batches_that_it_accumulates(checkpoint, crops, tmp_path):
    model = ViT3DForNeuronSegmentation.from_pretrained(checkpoint)
    with torch.no_grad():
        alone = [model(**{key: value[None] for key, value in crops[number].items()}).loss.item() for number in range(4)]
    trainer = trained(
        model, crops, tmp_path / "out", steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    assert trainer.state.log_history[0]["loss"] == pytest.approx(np.mean(alone), rel=1e-3)


@pytest.mark.slow
def test_lora_on_the_attention_learns_and_its_adapter_is_small_and_enough(crops, checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    base = ViT3DForNeuronSegmentation.from_pretrained(checkpoint)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["head"])
    model = peft.get_peft_model(base, lora)
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len([name for name in learns if "lora" in name]) == 2 * 2 * SIZES["num_hidden_layers"]
    assert all("lora" in name or ".head." in name for name in learns)
    trained(model, crops, tmp_path / "out", steps=3)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < (Path(checkpoint) / "model.safetensors").stat().st_size
    # the base is as it was, and base + adapter predict what was trained
    fresh = ViT3DForNeuronSegmentation.from_pretrained(checkpoint)
    untouched = base.state_dict()
    for name, value in weights(Path(checkpoint)).items():
        if not name.startswith("head."):
            wrapped = name.replace("_proj.", "_proj.base_layer.") if "q_proj" in name or "v_proj" in name else name
            assert torch.equal(untouched[wrapped], value), name
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    batch = {key: value[None] for key, value in crops[0].items()}
    with torch.no_grad():
        found, before = again(**batch).logits, ViT3DForNeuronSegmentation.from_pretrained(checkpoint)(**batch).logits
        assert torch.equal(found, model.eval()(**batch).logits)
        assert not torch.equal(found, before)
