"""A volume is segmented block by block as it would be at once."""

import math
import time
from itertools import pairwise
from threading import Lock
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn
from torch.nn import functional

from vit3d import ViT3DConfig, ViT3DForNeuronSegmentation, ViT3DImageProcessor, Volume, segment
from vit3d.model.blocks_vit3d import Block
from vit3d.model.canvas_vit3d import Canvas, Job
from vit3d.model.head_vit3d import HALO
from vit3d.model.inference_vit3d import FAINT, batches, predict, window_plan

SHAPES = [(19, 40, 53), (8, 16, 24), (9, 17, 25), (3, 5, 7), (1, 40, 30), (30, 10, 24)]


class OneVoxelNetwork(nn.Module):
    """Its logit is twice a voxel's value: once by way of the patch's token, once as the head sees the stack.

    It remembers how many windows it was given.
    """

    device = torch.device("cpu")

    def __init__(self, prediction: str = "volume"):
        super().__init__()
        patch = (4, 8, 8) if prediction == "volume" else (8, 8, 8)
        self.config = ViT3DConfig(volume_size=(8, 16, 24), patch_size=patch, prediction=prediction)
        self.batches = []

    @property
    def head(self) -> "OneVoxelNetwork":
        return self

    def forward(self, patches: torch.Tensor, token_mask: torch.Tensor):
        self.batches.append(len(token_mask))
        assert patches.shape == (token_mask.sum(), math.prod(self.config.patch_size))
        if self.config.prediction == "center_slice":
            depth = self.config.patch_size[0]
            patches = patches.unflatten(1, (depth, -1))[:, depth // 2]
        return SimpleNamespace(tokens=patches)

    def features(self, tokens: torch.Tensor) -> torch.Tensor:
        return functional.pad(tokens[..., None], (0, 0, 0, 0, 0, 1))

    def paint(self, features, table, kept, raw) -> torch.Tensor:
        row, z, y, x = kept
        seen = features[table[row, z + 1, y + 1, x + 1], :, 0].unflatten(1, self.config.painted_size)
        return seen[:, None] + raw[:, :, HALO:-HALO, HALO:-HALO, HALO:-HALO]

    def whole(self, voxels: np.ndarray) -> np.ndarray:
        """The probability without blocks."""
        processor = ViT3DImageProcessor.from_config(self.config)
        values = processor.pixel_values(voxels, processor.measure(voxels))
        return 1 / (1 + np.exp(-2 * values))


@pytest.fixture(params=["volume", "center_slice"])
def network(request) -> OneVoxelNetwork:
    return OneVoxelNetwork(request.param)


def noise(shape) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)


def fibre(shape=(20, 60, 70)) -> np.ndarray:
    voxels = np.zeros(shape, dtype=np.uint8)
    z, y, x = np.indices(shape)
    voxels[np.hypot(z - 9, y - 20 - x / 3) < 2] = 180
    return voxels


def tiny_model(prediction: str) -> ViT3DForNeuronSegmentation:
    torch.manual_seed(0)
    patch = (4, 8, 8) if prediction == "volume" else (8, 8, 8)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, head_channels=4)
    model = ViT3DForNeuronSegmentation(
        ViT3DConfig(**sizes, volume_size=(8, 16, 24), patch_size=patch, prediction=prediction, fused_layers=(1, 2))
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_slice_is_painted_from_the_middle_of_a_window_of_few_slices_too(depth):
    network, voxels = OneVoxelNetwork("center_slice"), noise((7, 20, 30))
    network.config = ViT3DConfig(volume_size=(depth, 16, 24), patch_size=(depth, 8, 8), prediction="center_slice")
    assert_allclose(segment(network, Volume(voxels), select=False).voxels, network.whole(voxels), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_network_that_sees_one_voxel_gives_the_same_block_wise_and_whole(network, shape):
    voxels = noise(shape)
    found = segment(network, Volume(voxels, (2.0, 0.5, 0.5)), select=False)
    assert_allclose(found.voxels, network.whole(voxels), atol=1e-5)
    assert found.spacing_um == (2.0, 0.5, 0.5)
    assert found.voxels.dtype == np.float32


@pytest.mark.parametrize("value, said", [(np.nan, "NaN or inf"), (np.inf, "NaN or inf"), (-1e39, r"beyond 3.4e\+38")])
def test_voxels_that_are_no_number_are_refused(network, value, said):
    voxels = noise((8, 40, 40)).astype(np.float64)
    statistics = ViT3DImageProcessor.from_config(network.config).measure(voxels)
    voxels[3, 5, 7] = value
    for known in (None, statistics):
        with pytest.raises(ValueError, match=said):
            segment(network, Volume(voxels), statistics=known)


def test_an_array_is_told_how_to_become_a_volume(network):
    with pytest.raises(TypeError, match=r"Volume\(array, spacing_um\)"):
        segment(network, noise((8, 40, 40)))


def test_every_slice_is_its_own(network):
    """Each slice has its own level, so a slice put in another's place shows."""
    voxels = np.tile(np.arange(0, 200, 10, dtype=np.uint8)[:, None, None], (1, 30, 30))
    found = segment(network, Volume(voxels), select=False).voxels
    assert_allclose(found, network.whole(voxels), atol=1e-5)
    assert len(np.unique(found[:, 10, 10].round(4))) > 5


def test_selection_changes_nothing_on_the_neurite_and_only_zeroes_what_is_far_from_it(network):
    voxels = fibre()
    dense, selected = (segment(network, Volume(voxels), select=s).voxels for s in (False, True))
    processor = ViT3DImageProcessor.from_config(network.config)
    mask = processor.foreground(voxels, processor.measure(voxels))
    assert_allclose(selected[mask], dense[mask], atol=1e-5)
    assert (selected <= dense + 1e-5).all()
    far = np.ones_like(mask)
    reach = network.config.painted_size if network.config.prediction == "volume" else network.config.patch_size
    for z, y, x in np.argwhere(mask):
        box = tuple(slice(max(0, c - n), c + n) for c, n in zip((z, y, x), reach, strict=True))
        far[box] = False
    assert far.mean() > 0.3
    assert not selected[far].any()


def test_the_next_batch_is_read_while_the_network_works(monkeypatch):
    """A network that returns only when the next window was looked up."""
    voxels, looked_up = noise((30, 40, 53)), []
    values = ViT3DImageProcessor.pixel_values

    def spy_on_values(self, voxels, *arguments, **options):
        result = values(self, voxels, *arguments, **options)
        looked_up.extend([1] * (voxels.shape[1] == math.prod(self.patch_size)))
        return result

    class PatientNetwork(OneVoxelNetwork):
        def forward(self, patches, token_mask):
            super().forward(patches, token_mask)
            done = len(self.batches)
            deadline = time.monotonic() + 10
            while len(looked_up) < min(done + 1, windows):
                assert time.monotonic() < deadline, "nothing went on while the network worked"
                time.sleep(0.001)
            self.batches.pop()
            # as the values are now: nobody may have written into them
            return super().forward(patches, token_mask)

    network = PatientNetwork()
    windows = len(list(window_plan(voxels.shape, network.config)))
    expected = network.whole(voxels)
    monkeypatch.setattr(ViT3DImageProcessor, "pixel_values", spy_on_values)
    found = predict(
        network, voxels, processor=ViT3DImageProcessor.from_config(network.config), select=False, batch_size=1
    )
    assert_allclose(found, expected, atol=1e-5)
    assert len(network.batches) == windows > 5


@pytest.mark.parametrize("level, dtype", [(0, np.uint8), (7, np.uint16), (0.3, np.float64)])
def test_a_constant_stack_holds_nothing(network, level, dtype):
    voxels = np.full((9, 20, 30), level, dtype)
    found = segment(network, Volume(voxels)).voxels
    assert_array_equal(found, np.zeros(voxels.shape, np.float32))
    assert not network.batches


def test_faint_probabilities_are_written_as_zero(network, monkeypatch):
    voxels = noise((9, 20, 30))
    found = segment(network, Volume(voxels), select=False).voxels
    assert found[found > 0].min() >= FAINT
    monkeypatch.setattr("vit3d.model.inference_vit3d.FAINT", 0.5)
    assert_array_equal(segment(network, Volume(voxels), select=False).voxels, np.where(found < 0.5, 0, found))


@pytest.mark.parametrize("shape", SHAPES)
def test_all_windows_cut_a_voxel_into_the_same_patch(network, shape):
    starts = np.array([block.start for block in window_plan(shape, network.config)])
    assert not ((starts - starts[0]) % network.config.painted_size).any()


def test_windows_share_half_of_their_depth_and_a_patch_of_the_plane():
    starts = [block.start for block in window_plan((16 + 3 * 8, 112 + 2 * 104, 112 + 104), ViT3DConfig())]
    assert starts == [(z, y, x) for z in (0, 8, 16, 24) for y in (0, 104, 208) for x in (0, 104)]


@pytest.mark.parametrize("window", [(4, 16, 24), (8, 8, 24), (4, 8, 8), (12, 16, 16)])
def test_a_window_may_be_one_patch_wide(network, window):
    network.config = ViT3DConfig(volume_size=window, patch_size=(4, 8, 8))
    voxels = noise((19, 40, 53))
    assert_allclose(segment(network, Volume(voxels), select=False).voxels, network.whole(voxels), atol=1e-5)


def job_of(index: int, kept: np.ndarray, depth: int = 0) -> Job:
    block = Block((depth, 0, index), (16, 112, 112))
    return Job(block, block, kept)


def test_a_batch_holds_windows_of_like_token_counts_each_window_once():
    counts = np.sort(np.random.default_rng(0).geometric(0.02, 300).clip(1, 784))
    masks = [np.arange(784) < count for count in counts]
    jobs = [job_of(i, mask) for i, mask in enumerate(masks)]
    found = list(batches(jobs[::2] + jobs[1::2]))
    assert [job.num_tokens for batch in found for job in batch] == counts.tolist()
    assert {job for batch in found for job in batch} == set(jobs)
    held = [sum(1 + job.num_tokens for job in batch) for batch in found]
    assert max(held) <= 4096
    assert len(found) <= 1 + (counts + 1).sum() / (4096 - counts.max())


def test_deep_windows_come_after_others_that_hold_enough_tokens():
    """So that what is painted early frees its memory, and a sparse stack is batched as a whole."""
    full = [job_of(i, np.ones(784, bool), depth) for depth in range(0, 80, 8) for i in range(12)]
    depths = [{job.write.start[0] for job in batch} for batch in batches(full)]
    assert all(max(one) <= min(other) + 8 for one, other in pairwise(depths))
    assert [min(one) for one in depths] == sorted(min(one) for one in depths)
    sparse = [job_of(i, np.arange(784) < 5 + i, depth) for depth in range(0, 80, 8) for i in range(12)]
    assert any(len({job.write.start[0] for job in batch}) == 10 for batch in batches(sparse))


def test_a_batch_of_nearly_empty_windows_counts_their_class_tokens_too():
    sizes = [len(batch) for batch in batches([job_of(i, np.arange(784) < 1) for i in range(5000)])]
    assert sizes == [2048, 2048, 904]


def test_no_batch_holds_more_windows_than_asked(network):
    segment(network, Volume(noise((19, 40, 53))), select=False, batch_size=3)
    assert max(network.batches) == 3


@pytest.mark.parametrize("prediction", ["volume", "center_slice"])
def test_the_real_network_gives_probabilities_that_do_not_depend_on_the_batch_size(prediction):
    model, volume = tiny_model(prediction), Volume(fibre((12, 40, 50)))
    one, many = (segment(model, volume, batch_size=size).voxels for size in (1, 7))
    assert_allclose(many, one, atol=1e-5)
    assert one.shape == volume.shape
    assert one.min() == 0
    assert 0.05 < one.max() <= 1
    assert not model.training


def test_a_part_of_a_volume_is_segmented_with_the_statistics_of_the_whole(network):
    voxels = fibre()
    voxels[:, 40:] //= 3
    processor = ViT3DImageProcessor.from_config(network.config)
    part = Volume(voxels[:, 30:])
    found = segment(network, part, statistics=processor.measure(voxels), select=False).voxels
    assert_allclose(found, network.whole(voxels)[:, 30:], atol=1e-5)


def test_a_volume_in_a_window_of_its_size_is_the_networks_own_answer():
    model = tiny_model("volume")
    voxels = noise((8, 16, 24))
    batch = ViT3DImageProcessor.from_config(model.config)(voxels, return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(batch["pixel_values"]).logits.sigmoid()[0, 0].numpy()
    found = segment(model, Volume(voxels), select=False).voxels
    assert_allclose(found, np.where(expected < FAINT, 0, expected), atol=1e-6)


def test_a_patch_in_two_windows_is_painted_once_from_the_mean_of_what_both_say():
    """Each window says its number; what is painted goes from one to the other as the weights do."""

    class NumberedNetwork(OneVoxelNetwork):
        def forward(self, patches, token_mask):
            tokens = super().forward(patches, token_mask).tokens
            return SimpleNamespace(tokens=torch.full_like(tokens, float(len(self.batches))))

        def paint(self, features, table, kept, raw):
            painted.extend(zip(*kept.tolist(), strict=True))
            return super().paint(features, table, kept, 0 * raw)

    network, painted = NumberedNetwork(), []
    found = segment(network, Volume(noise((8, 16, 40))), select=False, batch_size=1).voxels
    steps = np.log(found / (1 - found))[0, 0, ::8]
    plan = window_plan(found.shape, network.config)
    first, second = (plan.weights(block, (4, 8, 8))[0, 0] for block in plan)
    assert [block.start[2] for block in plan] == [0, 16]
    assert_allclose(steps, [1, 1, (1 * first[2] + 2 * second[0]) / (first[2] + second[0]), 2, 2], atol=1e-4)
    assert len(painted) == len(set(painted)) == 2 * 2 * 5


@pytest.mark.parametrize("prediction", ["volume", "center_slice"])
@pytest.mark.parametrize("at_once", [1, 5, 1000])
def test_what_is_painted_early_is_what_would_be_painted_at_the_end(prediction, at_once, monkeypatch):
    model, volume = tiny_model(prediction), Volume(fibre((60, 40, 50)))
    late = segment(model, volume).voxels
    monkeypatch.setattr("vit3d.model.inference_vit3d.TOKENS_PER_GROUP", 1)
    monkeypatch.setattr("vit3d.model.canvas_vit3d.PAINTED_AT_ONCE", at_once)
    monkeypatch.setattr("vit3d.model.canvas_vit3d.TURNED_TO_FEATURES", 3 * at_once)
    assert_allclose(segment(model, volume).voxels, late, atol=1e-5)


@pytest.mark.parametrize("prediction", ["volume", "center_slice"])
def test_no_more_layers_are_held_than_the_windows_under_way_add_to(prediction, monkeypatch):
    monkeypatch.setattr("vit3d.model.inference_vit3d.TOKENS_PER_GROUP", 1)
    network, add, held = OneVoxelNetwork(prediction), Canvas.add, []

    def spy(self, batch, tokens):
        add(self, batch, tokens)
        held.append(len(self._tokens))

    monkeypatch.setattr(Canvas, "add", spy)
    voxels = noise((120, 16, 24))
    assert_allclose(segment(network, Volume(voxels), select=False).voxels, network.whole(voxels), atol=1e-5)
    assert len(held) > 10
    assert max(held) <= 5


def test_a_stack_on_disk_is_read_in_windows_and_layers_by_one_at_a_time(network, monkeypatch):
    class OnDisk:
        """One file, which can be read at one place at a time."""

        shape, dtype, is_free = (60, 40, 53), np.dtype(np.uint8), Lock()

        def __getitem__(self, box):
            assert self.is_free.acquire(blocking=False)
            read.append([b.stop - b.start for b in box])
            time.sleep(0.001)
            self.is_free.release()
            return voxels[box]

    monkeypatch.setattr("vit3d.model.inference_vit3d.TOKENS_PER_GROUP", 1)
    voxels, read = noise((60, 40, 53)), []
    processor = ViT3DImageProcessor.from_config(network.config)
    found = predict(network, OnDisk(), processor=processor, statistics=processor.measure(voxels), select=False)
    assert_allclose(found, network.whole(voxels), atol=1e-5)
    assert max(depth for depth, _, _ in read) == 8


def test_a_network_that_fails_does_not_wait_for_what_is_still_to_be_painted(monkeypatch):
    class FailingNetwork(OneVoxelNetwork):
        def forward(self, patches, token_mask):
            if len(self.batches) == 3:
                time.sleep(0.1)
                raise KeyboardInterrupt
            return super().forward(patches, token_mask)

        def paint(self, *arguments):
            painted.append(1)
            time.sleep(0.05)
            return super().paint(*arguments)

    painted = []
    monkeypatch.setattr("vit3d.model.inference_vit3d.TOKENS_PER_GROUP", 1)
    monkeypatch.setattr("vit3d.model.canvas_vit3d.PAINTED_AT_ONCE", 1)
    with pytest.raises(KeyboardInterrupt):
        segment(FailingNetwork(), Volume(noise((60, 16, 24))), select=False, batch_size=1)
    assert 6 <= len(painted) < 11  # of two layers of six patches, the first was waited for


def test_what_is_hung_onto_a_network_or_compiled_is_used():
    """Hooks, `torch.compile` and accelerate's mixed precision all wrap `forward`."""
    model, volume, called = tiny_model("volume"), Volume(fibre()), []
    expected = segment(model, volume).voxels
    model.register_forward_pre_hook(lambda _, inputs: called.append(len(inputs[1])))
    model.compile(backend=lambda graph, _: called.append("compiled") or graph.forward)
    assert_allclose(segment(model, volume).voxels, expected, atol=1e-5)
    assert "compiled" in called
    assert sum(count for count in called if count != "compiled") > 4


def test_what_a_network_gives_that_is_no_number_is_refused():
    class Broken(OneVoxelNetwork):
        def paint(self, *args) -> torch.Tensor:
            return super().paint(*args) * math.nan

    with pytest.raises(ValueError, match="gave NaN or infinite probabilities"):
        segment(Broken(), Volume(noise((8, 20, 30))), select=False)
