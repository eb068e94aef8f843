"""Which weight learns how fast."""

from dataclasses import replace

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from runs import SIZES, WINDOW
from vit3d import ViT3DConfig, ViT3DForNeuronSegmentation
from vit3d.learning.optimization import averaging, freeze, optimizer_and_schedule, parameter_groups
from vit3d.learning.training_config import TrainingConfig

CONFIG = TrainingConfig("", "", "", encoder_rate=1e-4, head_rate=1e-3, max_steps=20, warmup_steps=4)


@pytest.fixture
def model() -> ViT3DForNeuronSegmentation:
    return ViT3DForNeuronSegmentation(ViT3DConfig(**SIZES, **WINDOW))


def rates(model, config) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in parameter_groups(model, config) for p in group["params"]}


def test_every_parameter_is_in_one_group(model):
    grouped = [id(parameter) for group in parameter_groups(model, CONFIG) for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))


def test_inherited_and_new_weights_have_rates_of_their_own(model):
    for name, rate in rates(model, CONFIG).items():
        new = name.startswith("head.") or name == "vit3d.embeddings.depth_embeddings"
        assert rate == (1e-3 if new else 1e-4), name


def test_each_layer_learns_slower_than_the_one_above_it(model):
    found = rates(model, replace(CONFIG, layer_decay=0.5))
    assert found["vit3d.layernorm.weight"] == found["vit3d.layers.1.mlp.fc1.weight"] == 1e-4
    assert found["vit3d.layers.0.mlp.fc1.weight"] == 0.5e-4
    assert found["vit3d.embeddings.patch_embeddings.projection.weight"] == 0.25e-4
    assert found["vit3d.embeddings.position_embeddings"] == found["vit3d.embeddings.cls_token"] == 0.25e-4
    assert found["head.classifier.weight"] == found["vit3d.embeddings.depth_embeddings"] == 1e-3


def test_biases_norms_and_embeddings_are_not_decayed(model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept = {n: g["weight_decay"] for g in parameter_groups(model, CONFIG) for n in map(names.get, map(id, g["params"]))}
    assert {name for name, decay in kept.items() if decay} == {
        name for name, parameter in model.named_parameters() if name.endswith("weight") and parameter.ndim > 1
    }


def test_what_is_frozen_is_in_no_group(model):
    freeze(model, ("vit3d.layers", "vit3d.embeddings.depth"))
    found = rates(model, CONFIG)
    assert not [name for name in found if "layers." in name or "depth" in name]
    assert "vit3d.embeddings.position_embeddings" in found
    with pytest.raises(ValueError, match=r"`frozen` names 'nosuch', with which no parameter"):
        freeze(model, ("nosuch",))
    with pytest.raises(ValueError, match="no parameter that could learn"):
        freeze(model, ("vit3d", "head"))


def test_the_rate_rises_and_falls_as_a_cosine(model):
    optimizer, schedule = optimizer_and_schedule(model, CONFIG)
    seen = []
    for _ in range(20):
        seen.append(schedule.get_last_lr()[-1])
        optimizer.step()
        schedule.step()
    assert seen[:5] == pytest.approx([0, 0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert seen[12] == pytest.approx(0.5e-3)  # half way down
    assert seen[5:] == sorted(seen[5:], reverse=True)
    assert schedule.get_last_lr()[-1] == pytest.approx(0)


def test_in_a_short_run_too_the_rate_has_time_to_fall(model):
    optimizer, schedule = optimizer_and_schedule(model, replace(CONFIG, warmup_steps=100))
    seen = []
    for _ in range(20):
        seen.append(schedule.get_last_lr()[-1])
        optimizer.step()
        schedule.step()
    assert seen.index(max(seen)) == 5
    assert max(seen) == pytest.approx(CONFIG.head_rate)


@pytest.mark.parametrize("steps, decay", [(40, 0.995), (2000, 0.995), (40, 0.5)])
def test_an_average_forgets_where_it_began_and_is_then_as_long_as_asked(steps, decay):
    """The weight is 1 at first and 0 from then on: what is left of 1 is the beginning's share."""
    weight = torch.nn.Linear(1, 1, bias=False)
    average = AveragedModel(weight, multi_avg_fn=averaging(decay))
    kept = []
    for step in range(steps):
        weight.weight.data.fill_(1.0 if step == 0 else 0.0)
        average.update_parameters(weight)
        kept.append(average.module.weight.item())
    assert kept[0] == 1
    assert kept[-1] < 1e-3
    weight.weight.data.fill_(1.0)
    average.update_parameters(weight)
    latest = min(decay, (1 + steps) / (10 + steps))
    assert average.module.weight.item() == pytest.approx(1 - latest, abs=1e-3)
