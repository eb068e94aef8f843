"""What a training runs on: devices, processes, precision and trackers, and what of them is not there."""

import os
import warnings
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    LoggerType,
)

from .training_config import TrainingConfig


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """ValueError: a device, a precision or a tracker that is not there."""
    _refuse_what_is_not_there(config)
    # of a kernel of one channel: its gradient is laid out in another order, which costs nothing here
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    handlers = [
        DistributedDataParallelKwargs(find_unused_parameters=True),  # the encoder's last norm feeds no head
        InitProcessGroupKwargs(timeout=timedelta(hours=6)),  # all wait for the slowest neuron that validates
    ]
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(config.accumulation),  # no environment overrides it
        cpu=config.device == "cpu",
        log_with=[name for name in config.log_with.split(",") if name] or None,
        project_dir=config.out,
        kwargs_handlers=handlers,
    )
    if accelerator.distributed_type == DistributedType.FSDP and config.ema_decay:
        raise ValueError("With FSDP the average of the weights is not kept: give --ema-decay 0.")
    return accelerator


def num_workers(config: TrainingConfig, accelerator: Accelerator) -> int:
    """Processes that cut crops for this one: one keeps up with a CPU, a GPU takes a batch in less time than a crop."""
    if config.num_workers is not None:
        return config.num_workers
    if accelerator.device.type == "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def _refuse_what_is_not_there(config: TrainingConfig) -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cuda" and int(os.environ.get("LOCAL_RANK", 0)) >= gpus:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        raise ValueError(f"--device cuda: {processes} GPUs are asked for, this machine has {gpus}; take auto or cpu.")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not gpus:
        raise ValueError("FSDP is asked for and would silently be DDP here: it shards weights on GPUs alone.")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", config.mixed_precision):
        raise ValueError(f"accelerate launch says mixed precision {launched}: give --mixed-precision {launched} too.")
    if config.mixed_precision == "fp16" and not gpus:
        raise ValueError("--mixed-precision fp16 needs a GPU; bf16 also works without one.")
    own = [name for name in LOGGER_TYPE_TO_CLASS if name not in LoggerType.list()]  # by `register_tracker_class`
    there = [*(str(getattr(name, "value", name)) for name in get_available_trackers()), *own]
    for name in filter(None, config.log_with.split(",")):
        if name not in there:
            raise ValueError(
                f"--log-with {name}: Accelerate has no such tracker or it is not installed (pip install {name}); "
                f"there is {', '.join(there) or 'none'}, and metrics.jsonl is always written."
            )
