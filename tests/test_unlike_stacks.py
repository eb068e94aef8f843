"""The kinds of stacks that no training makes: what the checkpoint's card tells its failures by."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from unlike_stacks import DARK, KINDS, LEVELS, unlike_stack
from vit3d.targets import paint


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_shows_its_neuron_and_is_the_same_every_time(kind):
    volume, truth = unlike_stack(kind, 700)
    assert volume.voxels.dtype == np.uint8
    assert np.array_equal(volume.voxels, unlike_stack(kind, 700)[0].voxels)
    neuron = paint(truth, volume.shape, min_radius_vox=1)
    inside, outside = volume.voxels[neuron].mean(), np.median(volume.voxels[~neuron])
    assert inside < outside - 30 if kind in DARK else inside > outside + 0.1 * LEVELS.get(kind, 200)
    assert truth.num_roots == 1
