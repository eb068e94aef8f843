"""Simulated neurons lie where their tree says, and the seed decides everything."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy import ndimage

from vit3d.simulate import Microscope, Style, random_neuron, simulate_neuron
from vit3d.targets import paint
from vit3d.tree import SOMA

SHAPE = (24, 80, 96)


def test_the_same_seed_gives_the_same_voxels_and_another_seed_others():
    volume, tree = simulate_neuron(seed=3, shape=SHAPE)
    again, tree_again = simulate_neuron(seed=3, shape=SHAPE)
    assert_array_equal(again.voxels, volume.voxels)
    assert_array_equal(tree_again.points, tree.points)
    other, _ = simulate_neuron(seed=4, shape=SHAPE)
    assert (other.voxels != volume.voxels).mean() > 0.2


def test_another_kind_of_processor_gives_the_same_voxels():
    told = "from hashlib import md5; from vit3d.simulate import random_neuron, simulate_neuron;"
    told += f"stacks = [simulate_neuron(seed=3)[0], *(random_neuron(seed, {SHAPE})[0] for seed in range(4))];"
    told += "print(*(md5(stack.voxels.tobytes()).hexdigest() for stack in stacks))"
    older = {"OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": "X86_V4,X86_V3,AVX512F,AVX2,FMA3"}
    command = [sys.executable, "-c", told]
    first, second = (subprocess.check_output(command, env=os.environ | extra).split() for extra in ({}, older))
    assert len(first) == 5
    assert first == second


@pytest.mark.parametrize("seed", range(8))
def test_the_tree_is_in_um_inside_the_stack(seed):
    volume, tree = random_neuron(seed, SHAPE)
    assert volume.shape == SHAPE
    assert (tree.unit, tree.spacing_um) == ("um", volume.spacing_um)
    assert (tree.points >= 0).all()
    assert (tree.points <= (np.array(SHAPE) - 1) * volume.spacing_um).all()
    assert (tree.radii > 0).all()
    assert tree.cable_length > 30 * volume.spacing_um[2]


@pytest.mark.parametrize("seed", range(4))
def test_the_tree_lies_on_the_bright_voxels(seed):
    volume, tree = simulate_neuron(seed=seed, shape=SHAPE)
    image = ndimage.gaussian_filter(volume.voxels.astype(float), 1)
    along = ndimage.map_coordinates(image, tree.to("voxel").points.T, order=1)
    away = image[~ndimage.binary_dilation(paint(tree, SHAPE), iterations=8)]
    assert (along > np.percentile(away, 99)).mean() > 0.95
    for step in (*np.eye(3), *-np.eye(3)):
        beside = ndimage.map_coordinates(image, (tree.to("voxel").points + 2 * step).T, order=1)
        assert beside.mean() < 0.98 * along.mean()


def test_dark_neurites_are_the_bright_ones_inverted():
    for bits, top in ((8, 255), (12, 4095), (16, 65535)):
        microscope = Microscope(bits=bits)
        bright, _ = simulate_neuron(shape=SHAPE, microscope=microscope)
        dark, _ = simulate_neuron(shape=SHAPE, microscope=microscope, polarity="dark")
        assert dark.voxels.dtype == bright.voxels.dtype == (np.uint8 if bits == 8 else np.uint16)
        assert_array_equal(top - dark.voxels.astype(int), bright.voxels)


def test_the_point_spread_is_wider_along_z():
    plain = Style(beads=0, boutons=0, branch_every_um=1e9, tortuosity=0)
    clear = Microscope(psf_um=(2.0, 0.5, 0.5), photons=1e5, read_noise=0, background=0, haze=0, gain=0.8, debris=0)
    size = {"shape": (61, 61, 61), "spacing_um": (0.5, 0.5, 0.5)}
    volume, tree = simulate_neuron(seed=0, style=plain, microscope=clear, **size)
    inner = tree.to("voxel").points
    inner = inner[((inner > 12) & (inner < 48)).all(axis=1)]
    aside = [inner + step for step in np.eye(3) * 4]
    z, y, x = (ndimage.map_coordinates(volume.voxels, points.T, order=1).mean() for points in aside)
    assert z > 5 * min(y, x)  # the axon crosses the stack along one of y and x; the other is across it


CLEAR = Microscope(photons=1e5, read_noise=0, background=0, haze=0, gain=0.5, debris=0, bits=16)


def test_of_a_neurite_labelled_on_its_membrane_the_wall_is_bright_and_the_inside_dark():
    thick = Style(stem_radius_um=2.0, thinnest_um=2.0, beads=0, boutons=0, branch_every_um=1e9, tortuosity=0)
    size = {"shape": (61, 61, 61), "spacing_um": (0.33, 0.33, 0.33)}
    ratio = []
    for membrane in (0.0, 0.5, 1.0):
        volume, tree = simulate_neuron(
            style=thick, microscope=replace(CLEAR, psf_um=(0.3, 0.3, 0.3), membrane=membrane), **size
        )
        inner = tree.to("voxel")
        kept = ((inner.points > 12) & (inner.points < 48)).all(axis=1)
        wall = inner.points[kept] + inner.radii[kept, None] * (1, 0, 0)
        at = (ndimage.map_coordinates(volume.voxels, points.T, order=1).mean() for points in (wall, inner.points[kept]))
        ratio.append(next(at) / next(at))
    assert ratio[0] < 0.8
    assert ratio[0] < ratio[1] < ratio[2]
    assert ratio[2] > 2


def test_without_a_pinhole_the_light_of_a_slice_reaches_others_wide_and_dim():
    plain = Style(beads=0, boutons=0, branch_every_um=1e9, tortuosity=0)
    size = {"shape": (61, 61, 61), "spacing_um": (1.0, 0.33, 0.33), "style": plain}
    (sharp, tree), (wide, _) = (simulate_neuron(microscope=replace(CLEAR, cone=cone), **size) for cone in (0, 0.5))
    inner = tree.to("voxel").points
    inner = inner[((inner > 10) & (inner < 50)).all(axis=1)]
    extra = wide.voxels.astype(float) - sharp.voxels
    level = ndimage.map_coordinates(sharp.voxels, inner.T, order=1).mean()
    here, near, far = (
        ndimage.map_coordinates(extra, (inner + np.array((z, 0, 0))).T, order=1).mean() / level for z in (0, 5, 10)
    )
    assert here == pytest.approx(0.5, rel=0.3)
    assert here > near > far > 0.02


def test_a_cleaned_background_is_zero():
    volume, _ = simulate_neuron(shape=SHAPE, microscope=Microscope(cleaned=True, debris=0))
    assert (volume.voxels == 0).mean() > 0.9


def test_brighter_light_makes_a_less_noisy_stack():
    light = Microscope(black_level=0, background=0.2, unevenness=0, read_noise=0, haze=0, gain=0.8)
    spread = []
    for photons in (20, 80):
        volume, tree = simulate_neuron(shape=SHAPE, microscope=replace(light, photons=photons))
        spread.append(volume.voxels[~ndimage.binary_dilation(paint(tree, SHAPE), iterations=10)].std())
    assert spread[0] / spread[1] == pytest.approx(2, rel=0.2)


def test_a_neuron_with_a_soma_is_one_tree_rooted_there():
    _, tree = simulate_neuron(seed=1, shape=SHAPE, style=Style(soma_radius_um=3.0, num_stems=3))
    assert tree.num_roots == 1
    assert tree.types[tree.parents < 0] == SOMA
    assert tree.radii.argmax() == np.flatnonzero(tree.parents < 0)[0]


def test_random_neurons_differ_in_spacing_brightness_depth_and_polarity():
    neurons = [random_neuron(seed, (16, 48, 48))[0] for seed in range(40)]
    assert {neuron.voxels.dtype.name for neuron in neurons} == {"uint8", "uint16"}
    in_plane = [neuron.spacing_um[2] for neuron in neurons]
    assert max(in_plane) / min(in_plane) > 5
    relative = [np.median(neuron.voxels) / neuron.voxels.max() for neuron in neurons]
    assert min(relative) == 0  # a cleaned or black background
    assert max(relative) > 0.8  # dark neurites


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 3, 40), (40, 12, 12)])
def test_shallow_and_narrow_stacks_work(shape):
    volume, tree = simulate_neuron(shape=shape)
    assert volume.shape == shape
    assert len(tree) >= 2


def test_senseless_arguments_are_refused():
    with pytest.raises(ValueError, match="'grey'"):
        simulate_neuron(polarity="grey")
    with pytest.raises(ValueError, match="shape"):
        simulate_neuron(shape=(0, 16, 16))
    with pytest.raises(ValueError, match="spacing_um"):
        simulate_neuron(spacing_um=(1.0, 0.0, 1.0))
