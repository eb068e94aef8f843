"""What a training depends on, in one place, checked where it is written down."""

from dataclasses import dataclass
from math import isfinite

PRECISIONS = ("no", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class TrainingConfig:
    """Everything a run depends on; written to `OUT/training.json`.

    data: folder of stacks and golds (layouts: `annotations.pairs`; SWCs in voxels where they say no unit); may be "".
    init: a 2D ViT (Hub id or folder) to inflate with `strategy` (None: center), or a vit3d checkpoint to go on from.
    prediction: "volume", or "center_slice": the paper's mode, five slices in and their centre out. None: volume, or as
    the checkpoint does.
    validate: names of neurons kept out of training, or of a split, which stands for its neurons with an SWC; the
    checkpoint with the best mean F1 on them is kept.
    split_file: see `annotations.pairs.read_split_file`. With it, or with a split in `validate`, only the split
    "train" is trained on; without, every neuron that does not validate.
    spacing_um: voxel size (z, y, x) of the stacks; it overrides what they say themselves and `spacing_table`.
    channel: which one of stacks that have several, counted from 0.
    gold, spacing_table: see `vit3d.annotations.pairs.find_pairs`.
    align: move each gold onto its image first. keep_misplaced: take golds that do not lie on their images, too.
    simulated: how many simulated neurons are mixed in, and `simulated_share` of the crops they get.
    max_steps: optimiser steps; each takes `accumulation` batches of `batch_size` crops on every process.
    encoder_rate, head_rate: peak learning rates of what was inherited and of what is new. The encoder's rate
    falls by `layer_decay` from each layer to the one below it; 1.0 is one rate for all.
    frozen: parameters whose names begin with one of these do not learn.
    warmup_steps: over which rates rise, a quarter of all steps at most; then they fall as a cosine.
    ema_decay: of the average of the weights, which is what is kept and validated, less in the first steps
    (`learning.optimization.averaging`); 0.0 keeps the weights themselves.
    cldice_weight: of the soft-clDice term (`vit3d.learning.cldice`), 0.0 leaves it out.
    consistency_weight: of how far two windows of one crop diverge where both see it (`vit3d.learning.consistency`); a
    crop then counts as one of `batch_size` and takes two windows. 0.0 cuts one.
    save_every, validate_every, log_every: steps between two of each; all three happen at the last step too.
    num_workers: processes that cut crops, for each that trains; None is one, and up to eight beside a GPU.
    log_with: trackers that Accelerate knows, comma-separated; `metrics.jsonl` is always written.
    device: "auto", "cpu", or "cuda", which is refused where there is none.
    """

    data: str
    init: str
    out: str
    strategy: str | None = None
    prediction: str | None = None
    validate: tuple[str, ...] = ()
    split_file: str | None = None
    spacing_um: tuple[float, float, float] | None = None
    channel: int | None = None
    gold: str | None = None
    spacing_table: str | None = None
    align: bool = True
    keep_misplaced: bool = False
    simulated: int = 32
    simulated_share: float = 0.4
    max_steps: int = 2000
    batch_size: int = 8
    accumulation: int = 1
    encoder_rate: float = 1e-4
    head_rate: float = 1e-3
    layer_decay: float = 1.0
    weight_decay: float = 0.05
    warmup_steps: int = 100
    frozen: tuple[str, ...] = ()
    ema_decay: float = 0.995
    cldice_weight: float = 0.0
    consistency_weight: float = 0.0
    gradient_checkpointing: bool = False
    mixed_precision: str = "no"
    seed: int = 0
    validate_every: int = 500
    save_every: int = 250
    log_every: int = 10
    num_workers: int | None = None
    log_with: str = ""
    device: str = "auto"

    def __post_init__(self):
        at_least_one = ("max_steps", "batch_size", "accumulation", "validate_every", "save_every", "log_every")
        least = dict.fromkeys(at_least_one, 1) | dict.fromkeys(("simulated", "warmup_steps", "num_workers", "seed"), 0)
        for name, value in least.items():
            if getattr(self, name) is not None and getattr(self, name) < value:
                raise ValueError(f"`{name}` must be at least {value}, got {getattr(self, name)}.")
        for name in ("encoder_rate", "head_rate", "weight_decay", "cldice_weight", "consistency_weight"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"`{name}` must be a number from 0 on, got {getattr(self, name)}.")
        for name, fits, bounds in (
            ("ema_decay", 0 <= self.ema_decay < 1, "from 0 to below 1"),  # 1 would keep the weights it began with
            ("simulated_share", 0 <= self.simulated_share <= 1, "from 0 to 1"),
            ("layer_decay", 0 < self.layer_decay <= 1, "above 0, up to 1"),
        ):
            if not fits:
                raise ValueError(f"`{name}` must be a number {bounds}, got {getattr(self, name)}.")
        for name, known in (("mixed_precision", PRECISIONS), ("device", DEVICES)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` takes {', '.join(known)}, got {getattr(self, name)!r}.")
