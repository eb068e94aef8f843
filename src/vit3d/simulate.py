"""Neurons with a known truth: branching trees and the stacks a microscope would make of them.

`Style` says how a neuron grows, `Microscope` how it is imaged; both draw themselves at random, so that
`random_neuron` gives a network stacks unlike one another.
"""

from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import ndimage

from .targets import sample_balls, sample_edges, voxels_near
from .tree import SOMA, NeuronTree
from .volume import Volume

Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Style:
    """How a neuron grows. The defaults resemble a fly's olfactory projection neuron."""

    stem_radius_um: float = 0.7
    thinnest_um: float = 0.25
    cable_um: float = 400.0  # no new branch is begun beyond it
    branch_every_um: float = 14.0
    arbor: float = 4.0  # how many times more often a neurite branches at its far end than at its start
    tortuosity: float = 0.5  # 0 straight, 1 wriggling
    bead_every_um: float = 4.0
    beads: float = 0.5  # a bead's radius is (1 + beads) times the neurite's; 0 for a smooth neurite
    boutons: float = 0.7  # share of the branches that end in a knob
    brightness_spread: float = 0.6  # standard deviation of log brightness between and along branches
    soma_radius_um: float = 0.0  # 0: no soma, the axon comes in through a face
    num_stems: int = 1

    @classmethod
    def random(cls, rng: np.random.Generator, spacing_um: Spacing) -> "Style":
        """Anything between a bare axon and a bushy cell, or a tract of thin axons of many cells; drawn in x-voxels
        and scaled by `spacing_um`."""
        voxel_um = spacing_um[2]
        is_tract = rng.random() < 0.2
        stem = _log_uniform(rng, 0.7, 1.8 if is_tract else 4.5) * voxel_um
        soma = rng.uniform(3, 6) * stem * (rng.random() < 0.3) * (not is_tract)
        num_stems = int(rng.integers(4, 15) if is_tract else rng.integers(1, 6 if soma else 4))
        return cls(
            stem_radius_um=stem,
            thinnest_um=min(stem, rng.uniform(0.5, 1.0) * voxel_um),
            cable_um=_log_uniform(rng, 300, 5000) * voxel_um,
            branch_every_um=_log_uniform(rng, 15, 150) * voxel_um,
            arbor=rng.uniform(0, 8),
            tortuosity=rng.uniform(0.1, 1.0),
            bead_every_um=_log_uniform(rng, 6, 40) * voxel_um,
            beads=rng.uniform(0, 1.2) * (rng.random() < 0.7),
            boutons=rng.uniform(0, 1) * (rng.random() < 0.6),
            brightness_spread=rng.uniform(0.1, 0.8),
            soma_radius_um=soma,
            num_stems=num_stems,
        )

    def thicker(self, rng: np.random.Generator, spacing_um: Spacing) -> "Style":
        """The same neuron with neurites up to seven x-voxels in radius."""
        stem = max(self.stem_radius_um, _log_uniform(rng, 1.5, 7.0) * spacing_um[2])
        return replace(self, stem_radius_um=stem, thinnest_um=min(stem, rng.uniform(0.7, 4.0) * spacing_um[2]))


@dataclass(frozen=True)
class Microscope:
    """How a stack is made. Intensities are shares of the signal on a bright neurite; the defaults resemble a
    confocal stack of good quality."""

    membrane: float = 0.0  # share of the label that lies in the membrane: at 1 a thick neurite is a hollow tube
    psf_um: Spacing = (1.5, 0.35, 0.35)  # standard deviations of the blur (z, y, x)
    photons: float = 60.0  # counted at intensity 1: shot noise
    read_noise: float = 0.01
    background: float = 0.03
    unevenness: float = 0.3  # relative variation of the background over the field
    haze: float = 0.02  # light from out of focus
    cone: float = 0.0  # light of the slices above and below, as a microscope without a pinhole sees it
    black_level: float = 0.8  # share of the background that the detector's offset takes away
    gain: float = 1.2  # above 1 saturates the brightest parts
    smooth_vox: float = 0.0  # blur after the noise, as resampling and denoising leave it
    cleaned: bool = False  # everything dim set to 0, as in many published stacks
    debris: int = 5  # bright specks that are no neurite
    bits: int = 8  # 8 gives uint8, 9 to 16 give uint16

    @classmethod
    def random(cls, rng: np.random.Generator, spacing_um: Spacing) -> "Microscope":
        """Anything from a cleaned and saturated stack to one where dim branches drown in noise.

        Bounded so that a bright neurite stands 5 standard deviations above the background, and the background
        below half of full scale: beyond, a stack shows no neuron.
        """
        blur_um = rng.uniform(0.5, 1.6) * spacing_um[2]
        background, unevenness = _log_uniform(rng, 0.005, 0.8), rng.uniform(0, 0.8)
        black_level = rng.choice([0.0, rng.uniform(0, 1), 1.0])
        ground = background * (np.exp(unevenness) - black_level)
        return cls(
            psf_um=(blur_um * rng.uniform(1.0, 4.5), blur_um, blur_um),
            photons=max(_log_uniform(rng, 6, 400), 25 * background),
            read_noise=_log_uniform(rng, 0.002, 0.06),
            background=background,
            unevenness=unevenness,
            haze=rng.uniform(0, 0.08),
            black_level=black_level,
            gain=min(_log_uniform(rng, 0.25, 4.0), 0.5 / ground),
            smooth_vox=rng.uniform(0.3, 0.9) * (rng.random() < 0.4),
            cleaned=bool(rng.random() < 0.3),
            debris=int(rng.integers(0, 40)),
            bits=int(rng.choice([8, 8, 12, 16])),
        )


def simulate_neuron(
    *,
    seed: int = 0,
    shape: Shape = (64, 256, 256),
    spacing_um: Spacing = (1.0, 0.33, 0.33),
    polarity: str = "bright",
    style: Style | None = None,
    microscope: Microscope | None = None,
) -> tuple[Volume, NeuronTree]:
    """A stack (Z, Y, X) of one neuron and its true tree: in um, inside the volume, with one root per stem or
    one at the soma. The same arguments give the same voxels, on x86-64 with and without AVX2 and AVX-512.

    polarity: "bright" on dark, or "dark": the same stack inverted. ValueError for anything else, and for a
    shape or a spacing that is not three positive numbers.
    """
    _check(shape, spacing_um, polarity)
    microscope = microscope or Microscope()
    rng = np.random.default_rng(seed)
    tree, brightness = grow(rng, shape, spacing_um, style or Style())
    voxels = expose(rng, tree, brightness, shape, microscope)
    if polarity == "dark":
        voxels = voxels.dtype.type(2**microscope.bits - 1) - voxels
    return Volume(voxels, tree.spacing_um), tree


def random_neuron(seed: int, shape: Shape = (64, 256, 256)) -> tuple[Volume, NeuronTree]:
    """`simulate_neuron` with spacing, style, microscope and polarity drawn from the seed: for training."""
    rng = np.random.default_rng([seed, 1])
    in_plane_um = _log_uniform(rng, 0.1, 1.0)
    spacing_um = (in_plane_um * _log_uniform(rng, 1.0, 5.0), in_plane_um, in_plane_um)
    polarity = "dark" if rng.random() < 0.15 else "bright"
    style, microscope = Style.random(rng, spacing_um), Microscope.random(rng, spacing_um)
    if rng.random() < 0.2:
        style = style.thicker(rng, spacing_um)
        microscope = replace(microscope, membrane=rng.uniform(0.5, 1.0))
    if rng.random() < (0.6 if polarity == "dark" else 0.2):  # transmitted light has no pinhole
        microscope = replace(microscope, cone=rng.uniform(0.1, 0.7))
    return simulate_neuron(
        seed=seed, shape=shape, spacing_um=spacing_um, polarity=polarity, style=style, microscope=microscope
    )


def _check(shape: Shape, spacing_um: Spacing, polarity: str) -> None:
    if polarity not in ("bright", "dark"):
        raise ValueError(f"`polarity` must be 'bright' or 'dark', got {polarity!r}.")
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"`shape` must be three positive numbers (z, y, x), got {tuple(shape)}.")
    if len(spacing_um) != 3 or not min(spacing_um) > 0:
        raise ValueError(f"`spacing_um` must be three positive numbers (z, y, x), got {tuple(spacing_um)}.")


# --- the neuron ---


@dataclass
class _Nodes:
    """Nodes grown so far, in um."""

    points: list = field(default_factory=list)
    radii: list = field(default_factory=list)
    parents: list = field(default_factory=list)
    types: list = field(default_factory=list)
    brightness: list = field(default_factory=list)

    def add(self, point, radius, parent, brightness, kind=0) -> int:
        """Row of the new node."""
        self.points.append(point)
        self.radii.append(radius)
        self.parents.append(parent)
        self.types.append(kind)
        self.brightness.append(brightness)
        return len(self.points) - 1


@dataclass(frozen=True)
class _Sprout:
    """A neurite about to grow: from the node `parent` (-1: from nowhere, at `point`)."""

    parent: int
    point: np.ndarray
    goal: np.ndarray
    radius: float
    length: float
    log_brightness: float
    is_stem: bool = False


def grow(rng: np.random.Generator, shape: Shape, spacing_um: Spacing, style: Style) -> tuple[NeuronTree, np.ndarray]:
    """A tree in um inside a stack of this shape, and the brightness (N,) of its nodes, between 0.1 and 1."""
    extent_um = (np.array(shape) - 1) * spacing_um
    step_um = 1.5 * spacing_um[2]
    nodes = _Nodes()
    sprouts = deque(_stems(rng, nodes, extent_um, style))
    cable_um = 0.0
    while sprouts and (cable_um < style.cable_um or sprouts[0].is_stem):
        sprout = sprouts.popleft()
        path = _walk(rng, sprout, step_um, extent_um, style.tortuosity)
        rows = _add_path(rng, nodes, sprout, path, step_um, style)
        sprouts += _side_branches(rng, nodes, sprout, rows, extent_um, style)
        cable_um += len(path) * step_um
    # rounded: processors differ in the last bits, and noise that is counted from them would be quite another
    points, radii, brightness = (np.round(column, 6) for column in (nodes.points, nodes.radii, nodes.brightness))
    columns = (np.clip(points, 0, extent_um), radii, np.array(nodes.parents), np.array(nodes.types))
    return NeuronTree(*columns, unit="um", spacing_um=tuple(spacing_um)), brightness


def _stems(rng, nodes: _Nodes, extent_um: np.ndarray, style: Style) -> list[_Sprout]:
    levels = -style.brightness_spread * rng.random(style.num_stems)
    soma = -1
    if style.soma_radius_um > 0:
        radius = min(style.soma_radius_um, 0.3 * extent_um.max())
        soma = nodes.add(rng.uniform(0.2, 0.8, 3) * extent_um, radius, -1, 1.0, SOMA)
    sprouts = []
    for level in levels:
        point, goal = _crossing(rng, extent_um)
        if soma >= 0:
            surface = nodes.points[soma] + nodes.radii[soma] * _unit(goal - nodes.points[soma])
            point = np.clip(surface, 0, extent_um)
        length = 1.3 * np.linalg.norm(goal - point) * rng.choice([1.0, 1.0, rng.uniform(0.3, 1)])
        sprouts.append(_Sprout(soma, point, goal, style.stem_radius_um, length, level, is_stem=True))
    return sprouts


def _crossing(rng, extent_um: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A point on a y or x face and another on the face across."""
    axis, side = rng.integers(1, 3), rng.integers(0, 2)
    point, goal = rng.uniform(0.1, 0.9, (2, 3)) * extent_um
    point[axis], goal[axis] = side * extent_um[axis], (1 - side) * extent_um[axis]
    return point, goal


def _walk(rng, sprout: _Sprout, step_um: float, extent_um: np.ndarray, tortuosity: float) -> np.ndarray:
    """(N, 3) points of a path that is drawn to its goal, bends and kinks; a stem may leave by a face."""
    num_steps = max(int(sprout.length / step_um), 2)
    turns = 0.12 * tortuosity * (_slow_noise(rng, (num_steps, 3), 5) + rng.normal(size=(num_steps, 3)))
    point, path = sprout.point, [sprout.point]
    direction = _unit(_unit(sprout.goal - point) + 0.6 * tortuosity * rng.normal(size=3))
    for turn in turns:
        direction = _unit(direction + turn + 0.06 * _unit(sprout.goal - point))
        ahead = point + step_um * direction
        outside = (ahead < 0) | (ahead > extent_um)
        if outside.any() and sprout.is_stem and len(path) > num_steps // 3:
            break
        direction = np.where(outside, -direction, direction)
        point = np.clip(ahead, 0, extent_um)
        path.append(point)
    return np.array(path)


def _add_path(rng, nodes: _Nodes, sprout: _Sprout, path: np.ndarray, step_um: float, style: Style):
    """Rows of the new nodes: calibre and brightness along the path, beads and a knob at the end."""
    size = len(path)
    taper = np.linspace(sprout.radius, max(0.6 * sprout.radius, style.thinnest_um), size)
    beads = style.beads * _bumps(rng, size, step_um, style, taper.mean())
    knob = np.zeros(size)
    if not sprout.is_stem and rng.random() < style.boutons:
        distance_um = step_um * np.arange(size)[::-1]
        knob = rng.uniform(0.5, 1.8) * np.exp(-0.5 * (distance_um / (1.2 * taper[-1] + step_um)) ** 2)
    swelling = 1 + np.maximum(beads, knob)
    drift = 0.5 * style.brightness_spread * _slow_noise(rng, (size,), 12) * np.linspace(0, 1, size)
    level = sprout.log_brightness + drift
    brightness = np.clip(np.exp(level) * np.sqrt(swelling), 0.1, 1)
    rows, parent = [], sprout.parent
    for point, radius, light in zip(path, taper * swelling, brightness, strict=True):
        parent = nodes.add(point, radius, parent, light)
        rows.append(parent)
    return rows


def _bumps(rng, size: int, step_um: float, style: Style, radius_um: float) -> np.ndarray:
    """(size,) between 0 and 1: bumps about as long as wide, at irregular distances."""
    is_bead = rng.random(size) < step_um / style.bead_every_um
    width = max((radius_um + 0.5 * step_um) / step_um, 0.7)
    bumps = ndimage.gaussian_filter1d(is_bead * rng.uniform(0.3, 1, size), width) * width * np.sqrt(2 * np.pi)
    return np.minimum(bumps, 1)


def _side_branches(rng, nodes: _Nodes, sprout: _Sprout, rows: list[int], extent_um, style: Style):
    """Sprouts along the path `rows`, denser towards its end by `style.arbor`, each thinner and shorter."""
    progress = np.linspace(0, 1, len(rows))
    step_um = sprout.length / max(len(rows), 1)
    chance = step_um / style.branch_every_um * (1 + style.arbor * progress**3)
    chance[: 3 + len(rows) // 10] = 0
    sprouts = []
    for place in np.flatnonzero(rng.random(len(rows)) < chance):
        row = rows[place]
        forward = _unit(nodes.points[row] - nodes.points[rows[place - 1]] + 1e-9)
        direction = _unit(forward + rng.uniform(0.6, 2.0) * _unit(rng.normal(size=3)))
        radius = max(rng.uniform(0.45, 0.9) * sprout.radius, style.thinnest_um)
        length = sprout.length * rng.uniform(0.08, 0.4)
        level = min(sprout.log_brightness - style.brightness_spread * rng.normal(0.5, 0.7), 0)
        point = np.clip(nodes.points[row] + step_um * direction, 0, extent_um)
        goal = np.clip(point + 2 * length * direction, 0.05 * extent_um, 0.95 * extent_um)
        sprouts.append(_Sprout(row, point, goal, radius, length, level))
    return sprouts


# --- the stack ---


def expose(
    rng: np.random.Generator, tree: NeuronTree, brightness: np.ndarray, shape: Shape, microscope: Microscope
) -> np.ndarray:
    """(Z, Y, X) uint8 or uint16: the stack that the microscope makes of the tree (um), bright on dark."""
    tree_vox = tree.to("voxel")
    signal = _fluorescence(rng, tree_vox, brightness, shape, microscope)
    signal = ndimage.gaussian_filter(signal, np.array(microscope.psf_um) / tree.spacing_um, truncate=3)
    signal /= _trace_level(signal, tree_vox, on_wall=microscope.membrane > 0)
    light = signal + microscope.haze * _out_of_focus(signal)
    if microscope.cone > 0:
        light += microscope.cone * _cone(signal, tree_vox)
    ground = microscope.background * _field(rng, shape, microscope.unevenness)
    light += ground
    light = rng.poisson(microscope.photons * light).astype(np.float32) / microscope.photons
    light += microscope.read_noise * rng.standard_normal(shape, np.float32)
    if microscope.smooth_vox > 0:
        light = ndimage.gaussian_filter(light, microscope.smooth_vox, truncate=3)
    light -= microscope.black_level * microscope.background
    if microscope.cleaned:
        ground -= microscope.black_level * microscope.background
        light *= _above(ground, light, microscope)
    return _digitised(light * microscope.gain, microscope.bits)


def _fluorescence(rng, tree_vox: NeuronTree, brightness: np.ndarray, shape: Shape, microscope: Microscope):
    """(Z, Y, X) float32 in [0, 1]: brightness times the share of each voxel that is neurite (or debris)."""
    points, radii = sample_balls(tree_vox, step_vox=0.5)
    rows, fraction = sample_edges(tree_vox, step_vox=0.5)
    parents = np.where(tree_vox.parents[rows] < 0, rows, tree_vox.parents[rows])
    light = brightness[rows] + fraction * (brightness[parents] - brightness[rows])
    points = np.concatenate([points, rng.uniform(0, shape, (microscope.debris, 3))])
    radii = np.concatenate([radii, rng.gamma(2, 0.4, microscope.debris)])
    light = np.concatenate([light, rng.uniform(0.1, 1, microscope.debris)]).astype(np.float32)
    spacing = np.array(tree_vox.spacing_um)
    outer = radii[:, None] * spacing[2] / spacing + 0.5  # coverage falls from 1 to 0 over a voxel
    image, depth = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for voxels, balls, distances in voxels_near(points, outer, shape):
        below = (1 - distances) * outer[balls, 2].astype(np.float32)  # the surface, in x-voxels
        np.maximum.at(image.ravel(), voxels, np.clip(below, 0, 1) * light[balls])
        if microscope.membrane > 0:
            np.maximum.at(depth.ravel(), voxels, below)
    inside = np.exp(-0.5 * np.clip(depth - 0.5, 0, None) ** 2)  # of the membrane's label; it is a voxel thick
    return image * (1 - microscope.membrane * (1 - inside))


def _trace_level(signal: np.ndarray, tree_vox: NeuronTree, *, on_wall: bool) -> float:
    """What a bright neurite measures: the 80th percentile along the trace, or along its wall where that is more."""
    places = [tree_vox.points]
    if on_wall:
        places.append(tree_vox.points + tree_vox.radii[:, None] * (0, 1, 0))
    levels = [np.percentile(ndimage.map_coordinates(signal, points.T, order=1), 80) for points in places]
    return float(max(*levels, 1e-6))


def _cone(signal: np.ndarray, tree_vox: NeuronTree) -> np.ndarray:
    """The light of other slices, each the wider and dimmer the further it is away; 1 on a bright neurite."""
    voxel = tree_vox.spacing_um[2] / np.array(tree_vox.spacing_um)
    coarse = signal[:, ::2, ::2]
    half = voxel / (1, 2, 2)
    spread = sum(
        width * ndimage.gaussian_filter(coarse, width * half * (6, 1, 1), truncate=2, mode="nearest")
        for width in (1.5, 3, 6)
    )
    return _enlarged(spread / _trace_level(_enlarged(spread, signal.shape), tree_vox, on_wall=False), signal.shape)


def _out_of_focus(signal: np.ndarray) -> np.ndarray:
    """The signal blurred over a tenth of the field, brightest voxel 1."""
    spread = _enlarged(ndimage.gaussian_filter(signal[::2, ::4, ::4], 4, truncate=3), signal.shape)
    return spread / max(spread.max(), 1e-6)


def _field(rng, shape: Shape, unevenness: float) -> np.ndarray:
    """A smooth positive field of mean about 1."""
    waves = ndimage.gaussian_filter(rng.normal(size=(6, 8, 8)), 1, mode="wrap")
    return _enlarged(np.exp(unevenness * waves / max(waves.std(), 1e-6)).astype(np.float32), shape)


def _enlarged(coarse: np.ndarray, shape: Shape) -> np.ndarray:
    factors = np.array(shape) / coarse.shape
    return ndimage.zoom(coarse, factors, order=1, grid_mode=True, mode="nearest").astype(np.float32)


def _above(ground: np.ndarray, light: np.ndarray, microscope: Microscope) -> np.ndarray:
    """What a person who cleans a stack by threshold leaves: the neuron with a ragged rim, and some specks."""
    noise = np.hypot(microscope.read_noise, np.sqrt(microscope.background / microscope.photons))
    return ndimage.gaussian_filter(light - ground, 0.8, truncate=3) > noise + 0.03


def _digitised(light: np.ndarray, bits: int) -> np.ndarray:
    top = 2**bits - 1
    return np.clip(np.rint(light * top), 0, top).astype(np.uint8 if bits <= 8 else np.uint16)


def _slow_noise(rng, shape: tuple[int, ...], width: float) -> np.ndarray:
    """Gaussian noise of standard deviation about 1 that changes over `width` samples of the first axis."""
    noise = ndimage.gaussian_filter1d(rng.normal(size=shape), width, axis=0, mode="nearest")
    return noise * np.sqrt(2 * np.sqrt(np.pi) * width)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(np.linalg.norm(vector), 1e-12)


def _log_uniform(rng, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
