"""Stacks of kinds that the training's generator does not make, each with its true tree.

    python scripts/unlike_stacks.py OUT

draws one picture of each kind, with the truth beside it, into the folder OUT. Nothing may train on these:
`evaluate_checkpoint.py` takes them to tell how often a network fails elsewhere. Of the kinds in `ALIKE` the training's
augmentation or its simulated neurons have something alike, by other formulas; of the others nothing.
"""

import sys
from pathlib import Path

import numpy as np
from scipy import ndimage

from vit3d.plot import plot_reconstruction
from vit3d.simulate import Microscope, Style, simulate_neuron
from vit3d.targets import paint, sample_balls, voxels_near
from vit3d.tree import NeuronTree
from vit3d.volume import Volume

SHAPE, SPACING_UM = (48, 192, 192), (1.0, 0.33, 0.33)
SEEDS = range(700, 710)  # checkpoints are chosen by these,
UNSEEN = range(760, 770)  # and none by these: what is said of the chosen one
PSF_VOX = (1.5, 1.06, 1.06)
NOISELESS = Microscope(photons=1e6, read_noise=0, background=0, unevenness=0, haze=0, gain=0.25, debris=0, bits=16)
THICK = Style(stem_radius_um=2.2, thinnest_um=1.2, cable_um=250, branch_every_um=25, beads=0, boutons=0)
STYLES = {"membrane": THICK}

# Each kind takes the light of a neuron, 1 on a bright neurite, and gives that of its stack, the ground included.


def plain(rng, light: np.ndarray, truth: NeuronTree) -> np.ndarray:
    """The neuron as the generator would image it: what the other kinds are to be held against."""
    return light + 0.05


def membrane(rng, light: np.ndarray, truth: NeuronTree) -> np.ndarray:
    """Only the surface is labelled: neurites are hollow tubes."""
    points, radii = sample_balls(truth.to("voxel"), step_vox=0.5)
    outer = radii[:, None] * SPACING_UM[2] / np.array(SPACING_UM) + 1.5
    depth = np.full(light.shape, -1.5, np.float32)  # below the surface, in x-voxels
    for voxels, balls, distances in voxels_near(points, outer, light.shape):
        np.maximum.at(depth.ravel(), voxels, ((1 - distances) * outer[balls, 2] - 1.5).astype(np.float32))
    shell = np.exp(-0.5 * (depth / 0.7) ** 2) * (depth > -1.5)
    return 0.05 + 1.4 * ndimage.gaussian_filter(shell, (0.5, 0.7, 0.7)) * rng.uniform(0.8, 1.2)


def puncta(rng, light: np.ndarray, truth: NeuronTree) -> np.ndarray:
    """The label sits in spots along the neurites; next to nothing lies between them."""
    points, _ = sample_balls(truth.to("voxel"), step_vox=0.5)
    spots = points[rng.random(len(points)) < 0.5 / 5.5]  # one in five and a half voxels of cable
    inside = np.clip(np.rint(spots).astype(int), 0, np.array(light.shape) - 1)
    image = np.zeros(light.shape, np.float32)
    image[tuple(inside.T)] = rng.gamma(3, 1 / 3, len(spots))
    image = ndimage.gaussian_filter(image, PSF_VOX) * (2 * np.pi) ** 1.5 * np.prod(PSF_VOX)
    return 0.05 + image + 0.05 * light


def stripes(rng, light: np.ndarray, truth: NeuronTree) -> np.ndarray:
    """A light sheet from one side: shadows behind what absorbs it, and slices of unlike brightness."""
    depth, height, width = light.shape
    shadow = ndimage.gaussian_filter(rng.standard_normal((depth, height)), (3, 1.2))
    shadow = np.clip(shadow / shadow.std() - 0.5, 0, None)[:, :, None]
    begins = ndimage.gaussian_filter(rng.uniform(-0.5, 1, (depth, height)), (3, 1.2))[:, :, None] * width
    factor = np.exp(-0.8 * shadow / (1 + np.exp((begins - np.arange(width)) / 4)))
    slices = np.exp(0.35 * rng.standard_normal((depth, 1, 1)))
    return (light + 0.3) * factor * slices


def crowd(rng, light: np.ndarray, truth: NeuronTree) -> np.ndarray:
    """Many other cells lie out of focus and glow through."""
    others = sum(clean(int(seed), Style(num_stems=3, cable_um=900))[0] for seed in rng.integers(10**6, 10**7, 3))
    glow = ndimage.gaussian_filter(others, (4, 5, 5))
    return 0.05 + light + 0.8 * glow / np.percentile(glow, 99)


def blobs(rng, light: np.ndarray, truth: NeuronTree) -> np.ndarray:
    """Somata of other cells, brighter than the neurites, lie between them."""
    away = ndimage.distance_transform_edt(~paint(truth, light.shape, min_radius_vox=1), sampling=SPACING_UM)
    grid = np.stack(np.indices(light.shape), -1)
    image = np.zeros(light.shape)
    for _ in range(10):
        radius_um = rng.uniform(2.5, 4.5)
        room = np.argwhere(away > radius_um + 1)
        if not len(room):
            continue
        axes = radius_um * rng.uniform(0.8, 1.25, 3) / SPACING_UM
        inside = (((grid - room[rng.integers(len(room))]) / axes) ** 2).sum(-1) < 1
        image = np.maximum(image, inside * rng.uniform(0.8, 1.5))
    grain = 1 + 0.5 * ndimage.gaussian_filter(rng.standard_normal(light.shape), (1, 2, 2)) * 8
    return 0.05 + np.maximum(light, ndimage.gaussian_filter(image * np.clip(grain, 0.3, 1.5), PSF_VOX))


def ringing(rng, light: np.ndarray, truth: NeuronTree) -> np.ndarray:
    """Deconvolved too far: every neurite has a dark halo and rings around it, and the noise clumps."""
    noisy = rng.poisson(40 * (light + 0.2)) / 40
    frequency = np.sqrt(sum(f**2 for f in np.meshgrid(*map(np.fft.fftfreq, light.shape), indexing="ij")))
    gain = 1 + 3.0 * np.exp(-0.5 * ((frequency - 0.14) / 0.025) ** 2)
    gain[frequency > 0.25] = 0
    return np.fft.ifftn(np.fft.fftn(noisy) * gain).real


def speckle(rng, light: np.ndarray, truth: NeuronTree) -> np.ndarray:
    """Coherent light: the noise multiplies what is there, and is coarser than a voxel."""
    fields = ndimage.gaussian_filter(rng.standard_normal((2, *light.shape)), (0, 0.4, 0.8, 0.8))
    intensity = (fields**2).sum(0)
    return (light + 0.08) * intensity / intensity.mean()


def brightfield(rng, light: np.ndarray, truth: NeuronTree) -> np.ndarray:
    """A stained neuron in transmitted light: dark on an uneven ground, its shadow cast through all slices."""
    shadow = ndimage.shift(ndimage.gaussian_filter(light, (9, 3, 3)), (0, 6, 6), order=1, mode="nearest")
    y, x = (np.linspace(-1, 1, size) for size in light.shape[1:])
    lamp = 0.85 - 0.25 * ((y[:, None] - 0.3) ** 2 + (x - 0.2) ** 2) / 2
    dirt = ndimage.gaussian_filter(rng.random(light.shape[1:]) < 0.0008, 2) * 8
    return lamp * np.exp(-1.2 * light - 6 * shadow - 0.5 * dirt)


def jitter(rng, light: np.ndarray, truth: NeuronTree) -> np.ndarray:
    """The sample moved between the slices: each lies up to two voxels beside its place."""
    steps = np.clip(rng.normal(0, 0.9, (len(light), 2)), -2, 2)
    moved = [ndimage.shift(plane, step, order=1, mode="nearest") for plane, step in zip(light, steps, strict=True)]
    return np.stack(moved) + 0.05


def seams(rng, light: np.ndarray, truth: NeuronTree) -> np.ndarray:
    """Stitched from four tiles, each darker towards its edges and as bright as its exposure made it."""
    middle = np.array(light.shape[1:]) // 2 + rng.integers(-30, 31, 2)
    factor = np.empty(light.shape[1:])
    for y in (slice(0, middle[0]), slice(middle[0], None)):
        for x in (slice(0, middle[1]), slice(middle[1], None)):
            rows, columns = (np.linspace(-1, 1, size) for size in factor[y, x].shape)
            factor[y, x] = rng.uniform(0.4, 1.2) * (1 - 0.3 * (rows[:, None] ** 2 + columns**2) / 2)
    return (light + 0.2) * factor


def dim(rng, light: np.ndarray, truth: NeuronTree) -> np.ndarray:
    """A detector at low gain: the ground is 0 or 1, and a bright neurite a dozen grey levels."""
    return light + 0.05


def mesh(rng, light: np.ndarray, truth: NeuronTree) -> np.ndarray:
    """Neurites of other cells, many and sharp, each far dimmer than the neuron, touch it everywhere."""
    thin = Style(num_stems=4, cable_um=1500, stem_radius_um=0.3)
    others = sum(clean(int(seed), thin)[0] for seed in rng.integers(10**6, 10**7, 2))
    return 0.05 + light + 0.15 * others


UNLIKE = (puncta, blobs, jitter, seams, dim)
KINDS = {k.__name__: k for k in (plain, stripes, crowd, ringing, speckle, membrane, brightfield, *UNLIKE, mesh)}
ALIKE = ("stripes", "crowd", "ringing", "speckle", "membrane", "brightfield", "mesh")
DARK = ("brightfield",)
LEVELS = {"dim": 12}  # grey levels of a bright neurite; of the others' 200


def clean(seed: int, style: Style | None = None) -> tuple[np.ndarray, NeuronTree]:
    """The light of a neuron without ground or noise, 1 on a bright neurite, and its tree."""
    volume, truth = simulate_neuron(seed=seed, shape=SHAPE, spacing_um=SPACING_UM, style=style, microscope=NOISELESS)
    return volume.voxels / (NOISELESS.gain * (2**NOISELESS.bits - 1)), truth


def unlike_stack(kind: str, seed: int) -> tuple[Volume, NeuronTree]:
    """A uint8 stack of one neuron in this kind, and its true tree in um."""
    rng = np.random.default_rng([seed, 2])
    light, truth = clean(seed, STYLES.get(kind))
    light = np.clip(KINDS[kind](rng, light, truth), 0, None)
    counted = rng.poisson(100 * light) / 100 + 0.01 * rng.standard_normal(light.shape)
    return Volume(np.clip(np.rint(LEVELS.get(kind, 200) * counted), 0, 255).astype(np.uint8), SPACING_UM), truth


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        volume, truth = unlike_stack(kind, SEEDS[0])
        plot_reconstruction(volume, truth, out / f"{kind}.png", polarity="dark" if kind in DARK else "bright")


if __name__ == "__main__":
    main()
