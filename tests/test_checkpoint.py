"""Which dtype a checkpoint is loaded in, and that it does not matter for the tree."""

import time

import pytest
import torch

from vit3d.checkpoint import load_checkpoint, preferred_dtype
from vit3d.gold import align_gold
from vit3d.scoring import score_trees
from vit3d.segmentation import segment
from vit3d.tracing import trace
from vit3d.tree import read_swc
from vit3d.volume import read_volume

SPACING_UM = (1.0, 0.33, 0.33)


def fastest_of_five(function) -> float:
    function()
    times = []
    for _ in range(5):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def test_the_preferred_dtype_multiplies_no_slower_than_fp32_on_this_cpu():
    cost = {}
    for dtype in {torch.float32, preferred_dtype("cpu")}:
        left, right = torch.ones(512, 512, dtype=dtype), torch.ones(512, 1024, dtype=dtype)
        cost[dtype] = fastest_of_five(lambda left=left, right=right: left @ right)
    assert cost[preferred_dtype("cpu")] <= 1.2 * cost[torch.float32]


@pytest.mark.parametrize(
    "capabilities, expected",
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"neon": True}, torch.float32),
    ],
)
def test_only_hardware_that_multiplies_bf16_gets_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert preferred_dtype("cpu") is expected


def test_a_torch_that_does_not_tell_computes_in_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert preferred_dtype("cpu") is torch.float32


def test_the_shipped_network_loads_in_the_preferred_dtype_unless_told_otherwise():
    assert load_checkpoint(device="cpu")[0].dtype is preferred_dtype("cpu")
    assert load_checkpoint(device="cpu", dtype=torch.float32)[0].dtype is torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["OP_6", "OP_3"])
def test_bf16_gives_the_tree_that_fp32_gives_and_no_later(shared, name):
    volume = read_volume(shared / f"data/op/{name}.tif", spacing_um=SPACING_UM)
    gold = read_swc(shared / f"data/op/{name}.swc", unit="voxel").to("voxel", SPACING_UM)
    gold = align_gold(gold, volume)[0]
    f1, cost = {}, {}
    for dtype in {torch.float32, preferred_dtype("cpu")}:
        model, processor = load_checkpoint(device="cpu", dtype=dtype)
        segment(model, volume, processor=processor)  # the first call pays for warming up
        start = time.process_time()
        probability = segment(model, volume, processor=processor)
        cost[dtype] = time.process_time() - start
        f1[dtype] = score_trees(trace(probability).to("voxel"), gold)["f1"]
    assert f1[preferred_dtype("cpu")] == pytest.approx(f1[torch.float32], abs=0.005)
    assert cost[preferred_dtype("cpu")] <= cost[torch.float32]
