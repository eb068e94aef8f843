"""Where side branches leave their parents: the fork that direction and outline of the branch agree on.

A shortest path cuts the corner inside the thicker neurite, and where two neurites have not parted yet, no voxel
belongs to one of them alone. So the part of a branch inside its parent is drawn anew.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial.distance import cdist

from vit3d.centerlines.foreground import Foreground
from vit3d.tree import NeuronTree

_REACH, _REACH_STEPS = 3.0, 5  # the fork is sought within scale * radius + steps * in-plane voxel along the parent
_FREE_STEPS = 0.5  # a branch is free where its centre is this far outside its parent
_AIM_STEPS = 3.0  # a branch's direction is that of this many voxels, and its parent's radius, beyond that
_SIDE_STEPS, _SIDE_TURN = 0.6, 0.2  # how far a branch strays from a straight line: steps * voxel + turn * length
_DEPTH_STEPS, _DEPTH_EXCESS = 0.22, 0.2  # how well depth is known, and its mean excess in a fork
_DEPTH_RANGE = -1.5, 0.5  # excess counts up to here; a fork in a soma is deeper than any neurite
_CURVE = 0.4  # a branch leaves its line after this share of the way
_CANDIDATES = 20
_AT_ONCE = 8  # branches; more take more memory
_SAMPLES = np.linspace(0.1, 0.9, 9)[:, None]
_WEIGHTS = (1 - _SAMPLES) ** 2, 2 * _SAMPLES * (1 - _SAMPLES), _SAMPLES**2  # of start, control and end of a curve


@dataclass(frozen=True)
class _Trunk:
    """The parent near the place where a branch was hooked on: its nodes, `rows` of the skeleton."""

    rows: np.ndarray
    points: np.ndarray
    radii: np.ndarray
    radius: float  # where the branch was hooked on


def place_junctions(skeleton: NeuronTree, starts: np.ndarray, foreground: Foreground) -> NeuronTree:
    """The skeleton, whose branches begin at the rows `starts`, with each branch led into its parent anew.

    In units of `foreground.round_step`, posed as the foreground. Each branch keeps its free part. From there it
    follows a curve to that node of the parent which is best in two ways: the branch points there, and the curve is as
    deep as it should be in the union of the two, neither out of it nor off its outer wall.
    """
    step = foreground.round_step.min()
    parents, stops = skeleton.parents.copy(), np.append(starts[1:], len(skeleton))
    run = np.repeat(np.arange(len(starts)), stops - starts)
    left_out = np.zeros(len(skeleton), bool)
    moved = np.arange(len(skeleton))
    ways, chosen = [], []  # of each branch: its first node, then as `_ways` gives them
    for first, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if parents[first] < 0:
            continue
        hook = moved[parents[first]]
        reach = int(np.ceil(_REACH * skeleton.radii[hook] / step)) + _REACH_STEPS
        trunk = _trunk(skeleton, hook, reach, parents, moved, left_out, stops[run[hook]])
        twig = np.arange(first, min(stop, first + 2 * reach))
        free = _first_free(skeleton.points[twig], trunk, step)
        if free is None:
            parents[first] = hook
            continue
        left_out[first : first + free] = True
        moved[first : first + free] = first + free
        parents[first + free] = hook
        ways.append((first + free, *_ways(skeleton, twig[free:], trunk, step)))
        if len(ways) == _AT_ONCE:
            chosen += _best_ways(ways, foreground)
            ways = []
    chosen += _best_ways(ways, foreground) if ways else []
    for row, fork, _ in chosen:
        parents[row] = fork
    hooked = parents >= 0
    parents[hooked] = moved[parents[hooked]]
    skeleton = _draw(replace(skeleton, parents=parents), [(row, control) for row, _, control in chosen], step)
    return skeleton.take(np.flatnonzero(~np.append(left_out, np.zeros(len(skeleton) - len(left_out), bool))))


def _trunk(skeleton, hook, reach, parents, moved, left_out, stop) -> _Trunk:
    """Nodes up to `reach` towards the root, across branches, and away from it along the same branch."""
    rows = [hook]
    while len(rows) <= reach and parents[rows[-1]] >= 0:
        rows.append(moved[parents[rows[-1]]])
    rows = np.concatenate([rows[::-1], np.arange(hook + 1, min(stop, hook + reach + 1))])
    rows = rows[~left_out[rows]]
    return _Trunk(rows, skeleton.points[rows], skeleton.radii[rows], skeleton.radii[hook])


def _first_free(twig: np.ndarray, trunk: _Trunk, step: float) -> int | None:
    """Where the branch has left its parent; None when it never does for long enough to have a direction."""
    away = cdist(twig, trunk.points)
    nearest = away.argmin(1)
    outside = away[np.arange(len(twig)), nearest] - trunk.radii[nearest] > _FREE_STEPS * step
    free = int(outside.argmax())
    return free if outside[free] and len(twig) - free >= 3 else None


def _ways(skeleton, twig, trunk: _Trunk, step: float) -> tuple[np.ndarray, ...]:
    """Of K ways from the free branch `twig` into its parent: the rows (K,) that they end at, their control points
    (K, 3), what they cost by direction (K,), samples (K, S, 3), and how deep those should be (K, S)."""
    ahead = twig[: int(_AIM_STEPS + trunk.radius / step)]
    start, points = skeleton.points[twig[0]], skeleton.points[ahead]
    centre = points.sum(0) / len(points)
    around = points - centre
    direction = np.linalg.eigh(around.T @ around)[1][:, -1]
    direction *= np.sign((points[0] - points[-1]) @ direction) or 1.0
    across = trunk.points - centre
    forward = across @ direction
    length = cdist(start[None], trunk.points)[0]
    beside = np.sqrt(np.maximum((across**2).sum(1) - forward**2, 0))
    cost = (beside / (_SIDE_STEPS * step + _SIDE_TURN * length)) ** 2
    cost[forward <= 0] += 1e6
    best = np.argsort(cost, kind="stable")[:_CANDIDATES]
    control = start + _CURVE * length[best, None] * direction
    path = _WEIGHTS[0] * start + _WEIGHTS[1] * control[:, None] + _WEIGHTS[2] * trunk.points[best, None]
    inside = (trunk.radii[:, None] - cdist(trunk.points, path.reshape(-1, 3))).max(0)
    usual = np.sort(skeleton.radii[ahead])[len(ahead) // 2]
    expected = np.maximum(inside, usual).reshape(path.shape[:2])
    return trunk.rows[best], control, cost[best], path, expected


def _best_ways(ways: list[tuple], foreground: Foreground) -> list[tuple[int, int, np.ndarray]]:
    """Of each branch: its first row, the row it leaves from, and the control point of the curve between them."""
    first, rows, control, cost, path, expected = zip(*ways, strict=True)
    depth = foreground.depth_at(np.concatenate(path).reshape(-1, 3)).reshape(-1, len(_SAMPLES))
    excess = (depth - np.concatenate(expected)) / foreground.round_step.min() - _DEPTH_EXCESS
    cost_of_depth = (np.clip(excess, *_DEPTH_RANGE) ** 2).mean(1) / (2 * _DEPTH_STEPS**2)
    ends = np.cumsum([len(one) for one in rows])
    chosen = [(a + b).argmin() for a, b in zip(cost, np.split(cost_of_depth, ends[:-1]), strict=True)]
    return [(f, r[k], c[k]) for f, r, c, k in zip(first, rows, control, chosen, strict=True)]


def _draw(skeleton: NeuronTree, ways: list[tuple[int, np.ndarray]], step: float) -> NeuronTree:
    """Nodes about a voxel apart along the curve from each row in `ways` to its parent."""
    points, radii, confidence, parents = skeleton.points, skeleton.radii, skeleton.confidence, skeleton.parents
    new, above, count = [], parents.copy(), len(parents)
    for row, control in ways:
        start, end = points[row], points[parents[row]]
        number = int(np.sqrt(((end - start) ** 2).sum()) / step) - 1
        if number < 1:
            continue
        u = np.arange(1, number + 1)[:, None] / (number + 1)
        curve = (1 - u) ** 2 * end + 2 * u * (1 - u) * control + u**2 * start
        new.append((curve, np.full(number, row), np.append(parents[row], count + np.arange(number - 1))))
        above[row] = count + number - 1
        count += number
    if not new:
        return skeleton
    curves, like, hooks = (np.concatenate(part) for part in zip(*new, strict=True))
    return replace(
        skeleton,
        points=np.concatenate([points, curves]),
        radii=np.concatenate([radii, radii[like]]),
        parents=np.concatenate([above, hooks]),
        types=np.concatenate([skeleton.types, np.zeros(len(like), int)]),
        confidence=np.concatenate([confidence, confidence[like]]),
    )
