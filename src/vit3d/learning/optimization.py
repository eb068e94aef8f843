"""Which weight learns how fast: inherited and new ones, layer by layer, and how the rate runs over the steps."""

import re

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import get_cosine_schedule_with_warmup

from ..model.modeling_vit3d import ViT3DForNeuronSegmentation
from .training_config import TrainingConfig

_LAYER = re.compile(r"vit3d\.layers\.(\d+)\.")
_LONGEST_WARMUP = 4  # one step in so many at most: the rate of a short run must have time to fall


def parameter_groups(model: ViT3DForNeuronSegmentation, config: TrainingConfig) -> list[dict]:
    """Groups for an optimiser: `params`, their `lr`, their `weight_decay`, and a `name`.

    What was inherited learns at `encoder_rate`, what is new (the head, the depth embedding) at `head_rate`. With
    `layer_decay` each layer learns that much slower than the one above it, the embeddings slowest. Biases, norms
    and embeddings are not decayed.
    """
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part, rate = _rate(name, model.config.num_hidden_layers, config)
            decay = config.weight_decay if parameter.ndim > 1 and name.endswith("weight") else 0.0
            group = {"name": part, "lr": rate, "weight_decay": decay, "params": []}
            groups.setdefault((part, decay), group)["params"].append(parameter)
    return list(groups.values())


def _rate(name: str, layers: int, config: TrainingConfig) -> tuple[str, float]:
    if name.startswith("head.") or name.endswith("depth_embeddings"):
        return "new", config.head_rate
    layer = _LAYER.match(name)
    below_top = layers - 1 - int(layer[1]) if layer else layers * (not name.startswith("vit3d.layernorm"))
    if config.layer_decay == 1:
        return "inherited", config.encoder_rate
    return f"inherited {layers - below_top}", config.encoder_rate * config.layer_decay**below_top


def freeze(model: torch.nn.Module, prefixes: tuple[str, ...]) -> None:
    """Parameters whose names begin with one of `prefixes` do not learn.

    ValueError: one of them names nothing, or all together name everything.
    """
    for prefix in prefixes:
        found = [parameter for name, parameter in model.named_parameters() if name.startswith(prefix)]
        if not found:
            raise ValueError(f"`frozen` names {prefix!r}, with which no parameter of the network begins.")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("`frozen` leaves no parameter that could learn.")


def optimizer_and_schedule(model: ViT3DForNeuronSegmentation, config: TrainingConfig):
    """AdamW, and a rate that rises over `warmup_steps`, a quarter of the run at most, and falls as a cosine to 0 at
    `max_steps`."""
    optimizer = torch.optim.AdamW(parameter_groups(model, config))
    warmup_steps = min(config.warmup_steps, config.max_steps // _LONGEST_WARMUP)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, warmup_steps, config.max_steps)


def averaging(decay: float):
    """How `AveragedModel` takes in the weights of a step: with `decay`, but in the first steps with (1 + n) / (10 + n)
    where that is less. The weights that a run began with would otherwise fill the average of a short one."""

    def update(average: list[torch.Tensor], weights: list[torch.Tensor], steps) -> None:
        now = min(decay, (1 + int(steps)) / (10 + int(steps)))
        get_ema_multi_avg_fn(now)(average, weights, steps)

    return update
