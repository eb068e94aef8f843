"""The paper's experiment: does a 2D Vision Transformer's sight help a 3D one, and with how little data?

    python scripts/transfer_experiment.py --source ../shared/weights/deit-tiny-patch16-224 --data ../shared/data/op \
        --card model_cards/transfer/README.md

trains the same network from scratch, by Average and by Center on 1, 2 and 5 neurons, and scores it on OP_6 and on
simulated neurons. Every finished run is a line of `results.jsonl` beside the card; the same command goes on where it
was stopped. On a GPU machine: `--source facebook/dino-vitb16 --steps 3000 --batch-size 32`, nothing else. `--report`
draws what is there and trains nothing. What is left of the network without its encoder is a part of its own:

    python scripts/transfer_experiment.py --part encoders --source ../shared/weights/deit-tiny-patch16-224 \
        --data ../shared/data/op --card model_cards/network/README.md --steps 800

keeps its runs in `encoders.jsonl` beside that card.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch

from vit3d import ViT3DForNeuronSegmentation
from vit3d.annotations.annotation import read_gold
from vit3d.checkpoint import preferred_dtype
from vit3d.learning.run_folder import RunFolder
from vit3d.model.image_processing_vit3d import ViT3DImageProcessor
from vit3d.reconstruction import reconstruct
from vit3d.scoring import score_masks, score_trees
from vit3d.simulate import random_neuron
from vit3d.tables import add_json_line, fill_card, json_lines, markdown_table
from vit3d.targets import paint
from vit3d.training import TrainingConfig, train
from vit3d.volume import read_volume

SPACING_UM = (1.0, 0.33, 0.33)
TRAINED = ("OP_1", "OP_3", "OP_4", "OP_5", "OP_7")
TESTED, SEARCHED = "OP_6", "OP_7"  # the encoder's rate is searched without a look at the test neuron
STRATEGIES, RATES = ("random", "average", "center"), (1e-4, 3e-4, 1e-3)
UNSEEN = range(900, 904)  # seeds of simulated neurons; nothing here trains on simulated ones
SCORES = ("dice", "f1", "esa", "dsa", "pds", "simulated_f1", "loss")
WINDOWS = {  # overrides of the config
    "volume": {},
    "slice": {"prediction": "center_slice", "patch_size": (5, 8, 8), "volume_size": (5, 112, 112)},
    "slice, no depth context": {"prediction": "center_slice", "patch_size": (1, 8, 8), "volume_size": (1, 112, 112)},
    "volume, no depth embedding": {},
}
FROZEN = "vit3d.embeddings.depth_embeddings"
SILENCED = {  # what is set to zero and learns nothing; a layer whose outputs are zero is the identity
    "no layers": ("attention.o_proj", "mlp.fc2"),
    "stem alone": ("attention.o_proj", "mlp.fc2", "head.painter"),
}
FOLDS = (TESTED, "OP_3")
ENCODER_RATE = 3e-4  # which the search found for center and for random alike
EARNS = 0.02  # a fall of the mean F1 below this is none
STORES = {"transfer": "results.jsonl", "encoders": "encoders.jsonl"}


@dataclass(frozen=True)
class Run:
    """One training: `encoder_rate` None is the searched one; `held_out` is what it is scored on."""

    strategy: str
    window: str = "volume"
    neurons: int = 5
    seed: int = 0
    encoder_rate: float | None = None
    held_out: str = TESTED

    def names(self) -> list[str]:
        """The training neurons: which ones, where not all, turns with the seed, alike for every strategy."""
        names = [name for name in TRAINED if name != self.held_out]
        return [names[(self.seed + k) % len(names)] for k in range(min(self.neurons, len(names)))]


def grid(seeds: int) -> list[Run]:
    """The search first, then what the paper compares, then the variants."""
    search = [Run(strategy, encoder_rate=rate, held_out=SEARCHED) for rate in RATES for strategy in STRATEGIES]
    main = [Run(s, neurons=n, seed=seed) for seed in range(seeds) for n in (1, 5, 2) for s in STRATEGIES]
    variants = [Run("center", window=window) for window in WINDOWS if window != "volume"]
    return [*search, *main, *variants, Run("random", window="slice")]


def encoders(seeds: int) -> list[Run]:
    """The network with an encoder from photographs, none and a random one, seed by seed: the verdict's pairs first."""
    return [
        Run(strategy, seed=seed, encoder_rate=ENCODER_RATE, held_out=fold)
        for seed in range(seeds)
        for strategy in ("center", "no layers", "random", "stem alone")
        for fold in FOLDS
    ]


def starting_model(run: Run, source: str) -> ViT3DForNeuronSegmentation:
    """What a run begins with; heads of one seed are the same whatever the encoder."""
    torch.manual_seed(run.seed)
    strategy = run.strategy if run.strategy in STRATEGIES else "center"
    model = ViT3DForNeuronSegmentation.from_2d_pretrained(source, strategy, **WINDOWS[run.window])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in SILENCED.get(run.strategy, ())):
                parameter.zero_()
    return model


def frozen_parts(run: Run) -> tuple[str, ...]:
    """Names of parameters that do not learn in this run."""
    silenced = {"no layers": ("vit3d.layers",), "stem alone": ("vit3d", "head.painter", "head.layernorm")}
    return silenced.get(run.strategy, (FROZEN,) if "no depth embedding" in run.window else ())


def perform(run: Run, rate: float, args, folder: Path) -> dict:
    """Train, then score as a user would run it."""
    for name in run.names():
        for path in args.data.glob(f"{name}.*"):
            (folder / path.name).symlink_to(path.resolve())
    model = starting_model(run, args.source)
    model.save_pretrained(folder / "start")
    (folder / "run").mkdir()
    RunFolder(folder / "run").volumes.symlink_to(args.volumes)  # made ready once for all runs
    start = time.monotonic()
    last = train(
        TrainingConfig(
            data=str(folder),
            init=str(folder / "start"),
            out=str(folder / "run"),
            spacing_um=SPACING_UM,
            prediction=model.config.prediction,
            simulated=0,
            max_steps=args.steps,
            batch_size=args.batch_size,
            encoder_rate=rate,
            warmup_steps=args.steps // 10,
            ema_decay=0.98,
            validate_every=args.steps,
            num_workers=0 if args.device == "cpu" else None,
            device=args.device,
            mixed_precision=args.mixed_precision,
            seed=run.seed,
            frozen=frozen_parts(run),
        )
    )
    seconds = time.monotonic() - start
    losses = [row["loss"] for row in RunFolder(folder / "run").rows() if "loss" in row]
    model = ViT3DForNeuronSegmentation.from_pretrained(last).to(args.device)
    return {"loss": fmean(losses[-10:]), "seconds": round(seconds), **scores(model, run.held_out, args)}


def scores(model, name: str, args) -> dict:
    """Dice of the probability above 0.5 with the painted gold, the tree's scores, and the mean simulated F1."""
    processor = ViT3DImageProcessor.from_config(model.config)
    volume = read_volume(args.data / f"{name}.tif", spacing_um=SPACING_UM)
    gold = read_gold({"name": name, "swc": str(args.data / f"{name}.swc")}, volume)
    result = reconstruct(model, volume, processor=processor)
    found = score_trees(result.tree.to("voxel"), gold)
    mask = paint(gold, volume.shape, min_radius_vox=1.5, max_radius_vox=2.5)
    row = {"dice": score_masks(result.probability.voxels > 0.5, mask)["dice"]}
    row |= {key: found[key] for key in ("f1", "precision", "recall", "esa", "dsa", "pds")}
    if name == TESTED:
        unseen = [random_neuron(seed, shape=(48, 192, 192)) for seed in UNSEEN]
        trees = [reconstruct(model, stack, processor=processor).tree for stack, _ in unseen]
        row["simulated_f1"] = fmean(score_trees(t, gold)["f1"] for t, (_, gold) in zip(trees, unseen, strict=True))
    return row


def searched_rate(strategy: str, rows: list[dict]) -> float | None:
    """The rate with the best Dice on the neuron held out of the search; None before it is complete."""
    tried = [row for row in rows if row["strategy"] == strategy and row["held_out"] == SEARCHED]
    return max(tried, key=lambda row: row["dice"])["encoder_rate"] if len(tried) == len(RATES) else None


def table(rows: list[dict], keys: tuple[str, ...], shown: tuple[str, ...] = SCORES) -> list[dict]:
    """Mean and standard deviation over the rows that agree in `keys`."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        {**dict(zip(keys, group, strict=True)), "runs": len(part), **{key: _spread(part, key) for key in shown}}
        for group, part in sorted(groups.items())
    ]


def _spread(rows: list[dict], key: str) -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
        return "-"
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def gains(rows: list[dict]) -> list[dict]:
    """What transfer gains over scratch, paired by seed, relative as the paper counts it."""
    found = []
    for neurons in (1, 2, 5):
        for strategy in STRATEGIES[1:]:
            pairs = [_paired(rows, strategy, neurons, seed, key) for key in ("f1", "dice") for seed in range(99)]
            for key, part in (("f1", pairs[:99]), ("dice", pairs[99:])):
                part = [pair for pair in part if pair]
                if part:
                    relative = [100 * (with_ - without) / max(without, 1e-9) for with_, without in part]
                    mean = 100 * (sum(a for a, _ in part) / max(sum(b for _, b in part), 1e-9) - 1)
                    found.append(
                        {"neurons": neurons, "strategy": strategy, "score": key, "pairs": len(part)}
                        | {"gain of the mean, %": mean, "ahead in": sum(value > 0 for value in relative)}
                    )
    return found


def _paired(rows: list[dict], strategy: str, neurons: int, seed: int, key: str) -> tuple[float, float] | None:
    here = {r["strategy"]: r[key] for r in rows if (r["window"], r["neurons"], r["seed"]) == ("volume", neurons, seed)}
    return (here[strategy], here["random"]) if {strategy, "random"} <= set(here) else None


def report(rows: list[dict], card: Path) -> None:
    """Tables and picture of what is finished."""
    search = [row for row in rows if row["held_out"] == SEARCHED]
    tested = [row for row in rows if row["held_out"] == TESTED and row["strategy"] in STRATEGIES]
    budget = [{key: row["run"][key] for key in ("source", "steps", "batch_size")} for row in rows]
    spent = [{**kind, "runs": budget.count(kind)} for kind in {str(kind): kind for kind in budget}.values()]
    minutes = {"minutes of training, mean": fmean(row["seconds"] for row in rows) / 60}
    fill_card(card, "budget", markdown_table([{**kind, **minutes} for kind in spent]))
    fill_card(card, "search", markdown_table(table(search, ("strategy", "encoder_rate"), ("dice", "f1", "loss"))))
    if tested:
        fill_card(card, "results", markdown_table(table(tested, ("window", "neurons", "strategy", "encoder_rate"))))
        fill_card(card, "gains", markdown_table(gains(tested)))
        plot(tested, card.with_name("transfer.png"))


def report_encoders(rows: list[dict], card: Path) -> None:
    """The table, and what it says: the mean F1 of the pairs of runs that differ in the layers alone, of the most steps
    that there are pairs for on both neurons."""
    for row in rows:
        row |= {
            "steps": row["run"]["steps"],
            "budget": f"{row['run']['steps']} steps of {row['run']['batch_size']} crops",
        }
    shown = ("dice", "f1", "simulated_f1", "loss")
    fill_card(card, "encoders", markdown_table(table(rows, ("steps", "held_out", "strategy"), shown)))
    for _, budget in sorted({(row["steps"], row["budget"]) for row in rows}, reverse=True):
        by_run = {(row["seed"], row["held_out"], row["strategy"]): row["f1"] for row in rows if row["budget"] == budget}
        paired = [run for *run, strategy in by_run if strategy == "center" and (*run, "no layers") in by_run]
        if {fold for _, fold in paired} == set(FOLDS):  # one neuron says nothing of the other
            with_, without = (fmean(by_run[*run, strategy] for run in paired) for strategy in ("center", "no layers"))
            verdict = "earn their cost" if with_ - without >= EARNS else "do **not** earn their cost"
            words = (
                f"The transformer's layers {verdict} after {budget}: mean F1 at 2 voxels over {len(paired)} pairs of "
            )
            words += f"runs on neurons left out is {with_:.3f} with them and {without:.3f} with none "
            words += f"(a fall below {EARNS} is none)."
            return fill_card(card, "verdict", words)


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("dice", "f1"), strict=True):
        for strategy in STRATEGIES:
            part = [row for row in rows if row["strategy"] == strategy and row["window"] == "volume"]
            counts = sorted({row["neurons"] for row in part})
            values = [[row[key] for row in part if row["neurons"] == count] for count in counts]
            errors = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values]
            axes.errorbar(counts, [fmean(v) for v in values], errors, marker="o", capsize=3, label=strategy)
        axes.set(xlabel="training neurons", ylabel=f"{key} on {TESTED}", xticks=(1, 2, 5))
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--card", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--part", choices=STORES, default="transfer")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--backwards", action="store_true", help="from the grid's other end, beside a first process")
    args = parser.parse_args()
    args.mixed_precision = "bf16" if preferred_dtype(args.device) is torch.bfloat16 else "no"

    store = args.card.with_name(STORES[args.part])
    runs = (grid if args.part == "transfer" else encoders)(args.seeds)
    budget = {"steps": args.steps, "batch_size": args.batch_size, "source": Path(args.source).name}
    rows = json_lines(store)
    scratch = tempfile.TemporaryDirectory()
    args.volumes = Path(scratch.name)
    for run in [] if args.report else runs[:: -1 if args.backwards else 1]:
        rows = json_lines(store)  # another process may work from the other end
        if asdict(run) | budget in [row["run"] for row in rows]:
            continue
        rate = run.encoder_rate or searched_rate(run.strategy, rows)
        with tempfile.TemporaryDirectory() as folder:
            row = {**asdict(run), "encoder_rate": rate, **perform(run, rate, args, Path(folder))}
        row["run"] = asdict(run) | budget
        add_json_line(store, row)
        print(json.dumps(row), flush=True)
    (report if args.part == "transfer" else report_encoders)(json_lines(store), args.card)


if __name__ == "__main__":
    main()
