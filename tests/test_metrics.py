"""The two `evaluate` metrics: loaded from their folders, offline, fed rows, the same for one process and for two."""

import json
import math
import os
import subprocess
import sys

import evaluate
import numpy as np
import pytest

from vit3d.metrics import metric_folder
from vit3d.scoring import score_masks, score_trees
from vit3d.targets import paint
from vit3d.tree import NeuronTree

SHAPE = (16, 32, 48)


def tree(shift=(0.0, 0.0, 0.0), length: float = 40.0, spacing_um=(1.0, 0.5, 0.5)) -> NeuronTree:
    points = np.array([[8, 10, 3], [8, 10, 3 + length / 2], [8, 10 + length / 2, 3 + length / 2]], float) + shift
    return NeuronTree(points, np.full(3, 1.5), [-1, 0, 1], unit="voxel", spacing_um=spacing_um)


PREDICTED = {"same": tree(), "shifted": tree((0, 3, 0)), "short": tree(length=20), "empty": NeuronTree.empty("voxel")}


@pytest.fixture
def load(tmp_path):
    return lambda name: evaluate.load(metric_folder(name), cache_dir=str(tmp_path))


def tracing_rows(metric) -> list[dict]:
    return [metric.row(name, predicted, tree()) for name, predicted in PREDICTED.items()]


def mask_rows(metric) -> list[dict]:
    gold = paint(tree(), SHAPE)
    return [metric.row(name, paint(predicted, SHAPE), gold) for name, predicted in PREDICTED.items()]


def computed(metric, rows: list[dict]) -> dict:
    for row in rows:
        metric.add(**row)
    return metric.compute()


def test_one_volume_scores_what_scoring_says(load):
    gold, shifted = paint(tree(), SHAPE), paint(tree((0, 1, 0)), SHAPE)
    metric = load("neuron_segmentation")
    for predicted in (gold, shifted, np.zeros(SHAPE, bool)):
        expected, found = score_masks(predicted, gold), computed(metric, [metric.row("a", predicted, gold)])
        assert all(
            found[key] == pytest.approx(expected[key]) for key in ("dice", "iou", "precision", "recall", "cldice")
        )
        assert found["hd95_vox"] == expected["hd95_vox"]
        assert found["dice_pooled"] == found["dice"]
        assert found["dice_std"] == 0
    empty = np.zeros(SHAPE, bool)
    assert computed(metric, [metric.row("a", empty, empty)])["dice"] == score_masks(empty, empty)["dice"] == 1
    metric = load("neuron_tracing")
    for predicted in PREDICTED.values():
        expected, found = score_trees(predicted, tree()), computed(metric, [metric.row("a", predicted, tree())])
        for key in ("precision", "recall", "f1", "esa", "dsa", "pds", "corrections", "corrections_per_mm"):
            assert found[key] == pytest.approx(expected[key]), key


def test_what_is_outside_the_evaluated_part_does_not_count(load):
    gold, predicted = paint(tree(), SHAPE), paint(tree((0, 1, 0)), SHAPE)
    part = np.zeros(SHAPE, np.uint8)
    part[:, :, :24] = 255
    metric = load("neuron_segmentation")
    found = computed(metric, [metric.row("a", predicted, gold, evaluate=part)])
    assert found["dice"] == pytest.approx(score_masks(predicted, gold, evaluate=part)["dice"])
    assert found["dice"] == pytest.approx(
        computed(metric, [metric.row("a", predicted[..., :24], gold[..., :24])])["dice"]
    )


def test_many_volumes_have_a_mean_a_spread_and_a_pooled_value(load):
    metric = load("neuron_segmentation")
    rows = [
        dict(name="a", true_positives=10, false_positives=0, false_negatives=0, cldice=1.0, hd95_vox=0.0),
        dict(name="b", true_positives=0, false_positives=0, false_negatives=30, cldice=0.0, hd95_vox=math.inf),
    ]
    found = computed(metric, rows)
    assert (found["dice"], found["dice_std"], found["dice_pooled"]) == (0.5, 0.5, 0.4)
    assert (found["recall_pooled"], found["precision_pooled"]) == (0.25, 1.0)
    assert (found["hd95_vox"], found["num_infinite"], found["num_volumes"]) == (0.0, 1, 2)


def test_many_trees_too(load):
    metric = load("neuron_tracing")
    rows = tracing_rows(metric)
    found = computed(metric, rows)
    assert found["f1"] == pytest.approx(np.mean([row["f1"] for row in rows]))
    assert found["f1_std"] == pytest.approx(np.std([row["f1"] for row in rows]))
    assert (found["num_infinite"], found["num_volumes"]) == (1, 4)
    assert math.isfinite(found["esa"])
    gold, missing = (sum(row[key] for row in rows) for key in ("gold_length_vox", "missing_length_vox"))
    assert found["recall_pooled"] == pytest.approx(1 - missing / gold)
    lengths_mm = sum(row["gold_length_um"] for row in rows) / 1000
    assert found["corrections_per_mm"] == pytest.approx(sum(row["corrections"] for row in rows) / lengths_mm)


def test_without_spacing_nothing_is_said_per_mm(load):
    metric = load("neuron_tracing")
    known, unknown = metric.row("a", tree(), tree()), metric.row("b", tree(spacing_um=None), tree(spacing_um=None))
    assert "corrections_per_mm" in computed(metric, [known])
    assert "corrections_per_mm" not in computed(metric, [known, unknown])


@pytest.mark.parametrize("name, rows_of", [("neuron_segmentation", mask_rows), ("neuron_tracing", tracing_rows)])
def test_neither_order_nor_copies_nor_the_way_of_adding_changes_anything(load, name, rows_of):
    metric = load(name)
    rows = rows_of(metric)
    expected = computed(metric, rows)
    assert computed(metric, [*reversed(rows), rows[1]]) == expected  # as two processes gather, filled up with a copy
    metric.add_batch(**{key: [row[key] for row in rows] for key in rows[0]})
    assert metric.compute() == expected
    with pytest.raises(ValueError, match="the volume same was added twice, with other numbers"):
        computed(metric, [rows[0], {**rows[1], "name": "same"}])
    assert len(json.dumps(rows)) < 2000  # numbers, no voxels


OFFLINE = """
import json, sys
import evaluate
name, rows = json.loads(sys.argv[1])
metric = evaluate.load(sys.argv[2], cache_dir=sys.argv[3], experiment_id=sys.argv[4])
for row in rows:
    metric.add(**row)
print(json.dumps(metric.compute(), sort_keys=True))
"""


@pytest.mark.slow
def test_offline_in_a_process_of_its_own(load, tmp_path):
    metric = load("neuron_tracing")
    rows = tracing_rows(metric)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "HF_MODULES_CACHE": str(tmp_path / "m"),
    }
    answer = subprocess.run(
        [sys.executable, "-c", OFFLINE, json.dumps(["x", rows]), metric_folder("neuron_tracing"), str(tmp_path), "one"],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == pytest.approx(computed(metric, rows))


GATHERED = """
import json, sys
import evaluate, torch
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
for folder, rows in json.loads(sys.argv[1]).items():
    loader = accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=1, collate_fn=list))
    found = []
    for own in loader:  # prepared: gather_for_metrics then knows which rows are copies
        found += accelerator.gather_for_metrics(own, use_gather_object=True)
    if accelerator.is_main_process:
        metric = evaluate.load(folder, keep_in_memory=True)
        for row in found:
            metric.add(**row)
        print("SCORES", json.dumps([accelerator.num_processes, len(found), metric.compute()]))
accelerator.end_training()  # a process that leaves its group open may be aborted as it exits
"""


@pytest.mark.slow
def test_two_processes_gather_what_one_computes(load, tmp_path):
    metrics = {"neuron_segmentation": mask_rows, "neuron_tracing": tracing_rows}
    rows = {name: rows_of(load(name))[:3] for name, rows_of in metrics.items()}  # for two processes one too few
    script = tmp_path / "gathered.py"
    script.write_text(GATHERED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    folders = json.dumps({metric_folder(name): rows[name] for name in metrics})
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, folders], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("SCORES")]
    assert [answer[:2] for answer in answers] == [[2, 3], [2, 3]]
    assert [answer[2] for answer in answers] == [computed(load(name), rows[name]) for name in metrics]


def test_scoring_does_not_know_evaluate():
    code = "import sys, vit3d.scoring, vit3d.metrics; print(*({'evaluate', 'torch', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
