"""Where side branches leave their parents: the fork that direction and outline of the branch agree on.

A shortest path cuts the corner inside the thicker neurite, and where two neurites have not parted yet, no voxel
belongs to one of them alone. So the part of a branch inside its parent is drawn anew.
"""

from dataclasses import replace

import numpy as np

from vit3d.centerlines.foreground import Foreground
from vit3d.centerlines.voxel_graph import compiled, inlined
from vit3d.tree import NeuronTree

_REACH, _REACH_STEPS = 3.0, 5  # the fork is sought within scale * radius + steps * in-plane voxel along the parent
_FREE_STEPS = 0.5  # a branch is free where its centre is this far outside its parent
_AIM_STEPS = 3.0  # a branch's direction is that of this many voxels, and its parent's radius, beyond that
_SIDE_STEPS, _SIDE_TURN = 0.6, 0.2  # how far a branch strays from a straight line: steps * voxel + turn * length
_BEHIND = 1e6  # cost of a fork that the branch points away from
_DEPTH_STEPS, _DEPTH_EXCESS = 0.22, 0.2  # how well depth is known, and its mean excess in a fork
_LEAST_EXCESS, _MOST_EXCESS = -1.5, 0.5  # excess counts up to here; a fork in a soma is deeper than any neurite
_CURVE = 0.4  # a branch leaves its line after this share of the way
_CANDIDATES = 20
_SAMPLES = 9  # of a curve, at equal distances
_AT_ONCE = 256  # branches; more take more memory


def place_junctions(skeleton: NeuronTree, starts: np.ndarray, foreground: Foreground) -> NeuronTree:
    """The skeleton, whose branches begin at the rows `starts`, with each branch led into its parent anew.

    In units of `foreground.round_step`, posed as the foreground. Each branch keeps its free part. From there it
    follows a curve to that node of the parent which is best in two ways: the branch points there, and the curve is as
    deep as it should be in the union of the two, neither out of it nor off its outer wall.
    """
    count, step = len(skeleton), foreground.round_step.min()
    points, radii, parents = skeleton.points, skeleton.radii, skeleton.parents.astype(np.int64)
    starts = starts.astype(np.int64)
    stops = np.append(starts[1:], count)
    reach = np.ceil(_REACH * radii / step).astype(np.int64) + _REACH_STEPS
    tree = points, radii, reach, np.repeat(stops, stops - starts)
    moved, left_out = np.arange(count), np.zeros(count, bool)
    led = []  # (first free row, the row of its parent that it leaves from, control point) of some branches each
    for few in np.split(starts, range(_AT_ONCE, len(starts), _AT_ONCE)):
        branch, trunk = np.empty((4, len(few)), np.int64), np.empty(len(few) * (2 * int(reach.max()) + 1), np.int64)
        found = _free(few, *tree, _FREE_STEPS * step, parents, moved, left_out, branch, trunk)
        if found:
            branch = np.ascontiguousarray(branch[:, :found])
            led.append(_best_ways(branch, trunk[: branch[3, -1]], points, radii, foreground))
    if not led:
        return skeleton
    rows, forks, controls = map(np.concatenate, zip(*led, strict=True))
    parents[rows] = forks
    hooked = parents >= 0
    parents[hooked] = moved[parents[hooked]]
    skeleton = _draw(replace(skeleton, parents=parents), rows, controls, step)
    return skeleton.take(np.flatnonzero(~np.append(left_out, np.zeros(len(skeleton) - count, bool))))


def _best_ways(branch: np.ndarray, trunk: np.ndarray, points, radii, foreground) -> tuple[np.ndarray, ...]:
    """Of B branches: their first free rows (B,), the rows of their parents that they leave from (B,), and the control
    points of the curves in between (B, 3). branch, trunk: as `_free` fills them."""
    step = foreground.round_step.min()
    free, hook, stop, end = branch
    ahead = np.minimum(stop - free, (_AIM_STEPS + radii[hook] / step).astype(int))
    direction, centre, usual = _directions(free, ahead, points, radii)
    of = np.repeat(np.arange(len(free)), np.diff(end, prepend=0))  # the branch of each node of a trunk
    across = points[trunk] - centre[of]
    forward = (across * direction[of]).sum(1)
    beside = np.sqrt(np.maximum((across**2).sum(1) - forward**2, 0))
    length = np.linalg.norm(points[trunk] - points[free[of]], axis=1)
    cost = (beside / (_SIDE_STEPS * step + _SIDE_TURN * length)) ** 2 + _BEHIND * (forward <= 0)
    control = points[free[of]] + _CURVE * length[:, None] * direction[of]
    best = np.empty(len(free), np.int64)  # place in `trunk`
    inside = (step, foreground.round_step, foreground.linear, np.array(foreground.shape))
    inside += (foreground.neighbours, foreground.depth)
    _choose(end, cost, trunk, points[free], control, usual, points, radii, *inside, best)
    return free, trunk[best], control[best]


def _directions(free, ahead, points, radii) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of `ahead` (B,) rows each from `free` (B,) on: the principal axis (B, 3), towards the first of them; their centre
    (B, 3), and the upper median of their radii (B,)."""
    place = np.arange(ahead.max())
    there = place < ahead[:, None]
    rows = np.where(there, free[:, None] + place, free[:, None])
    centre = (points[rows] * there[..., None]).sum(1) / ahead[:, None]
    around = (points[rows] - centre[:, None]) * there[..., None]
    axis = np.linalg.eigh(around.transpose(0, 2, 1) @ around)[1][:, :, -1]
    back = ((points[free] - points[free + ahead - 1]) * axis).sum(1)
    usual = np.sort(np.where(there, radii[rows], np.inf), axis=1)[np.arange(len(free)), ahead // 2]
    return np.where(back < 0, -1, 1)[:, None] * axis, centre, usual


def _draw(skeleton: NeuronTree, rows: np.ndarray, controls: np.ndarray, step: float) -> NeuronTree:
    """Nodes about a voxel apart along the curve from each of the `rows` over its control point to its parent."""
    points, radii, parents, confidence = skeleton.points, skeleton.radii, skeleton.parents, skeleton.confidence
    start, end = points[rows], points[parents[rows]]
    number = np.maximum((np.linalg.norm(end - start, axis=1) / step).astype(int) - 1, 0)
    way = np.repeat(np.arange(len(rows)), number)
    place = np.arange(len(way)) - np.repeat(np.cumsum(number) - number, number)  # along its way, from the parent on
    u = ((place + 1) / (number[way] + 1))[:, None]
    curve = (1 - u) ** 2 * end[way] + 2 * u * (1 - u) * controls[way] + u**2 * start[way]
    new, like = len(skeleton) + np.arange(len(way)), rows[way]
    above, drawn = parents.copy(), number > 0
    above[rows[drawn]] = len(skeleton) + np.cumsum(number)[drawn] - 1
    return replace(
        skeleton,
        points=np.concatenate([points, curve]),
        radii=np.concatenate([radii, radii[like]]),
        parents=np.concatenate([above, np.where(place == 0, parents[like], new - 1)]),
        types=np.concatenate([skeleton.types, np.zeros(len(like), int)]),
        confidence=np.concatenate([confidence, confidence[like]]),
    )


@compiled
def _free(starts, points, radii, reach, stop_of, margin, parents, moved, left_out, branch, trunk):
    """Free every branch: what it has inside its parent is `left_out`, its nodes are `moved` to the first free one.

    Of each that is long enough to have a direction, into a column of `branch`: its first free row, the row of the
    parent that it was hooked on, the row after its last that counts, and up to where the nodes of its parent fill
    `trunk`. Returns how many there are.
    """
    found, size = np.int64(0), np.int64(0)
    for first in starts:
        if parents[first] < 0:
            continue
        hook = moved[parents[first]]
        end = _find_trunk(size, hook, reach[hook], stop_of[hook], parents, moved, left_out, trunk)
        stop = first + 2 * reach[hook]
        stop = stop if stop < stop_of[first] else stop_of[first]
        row = first
        while row < stop and not _is_free(row, points, radii, trunk, size, end, margin):
            row += 1
        if stop - row < 3:
            parents[first] = hook
            continue
        for i in range(first, row):
            left_out[i] = True
            moved[i] = row
        parents[row] = hook
        branch[0, found], branch[1, found], branch[2, found], branch[3, found] = row, hook, stop, end
        size = end
        found += 1
    return found


@inlined
def _find_trunk(size, hook, reach, stop, parents, moved, left_out, trunk):
    """Nodes of the parent up to `reach` towards the root, across branches, and away from it along the same branch.

    Into `trunk` from `size` on. Returns up to where.
    """
    row = hook
    for _ in range(reach + 1):
        if not left_out[row]:
            trunk[size] = row
            size += 1
        row = parents[row]
        if row < 0:
            break
        row = moved[row]
    last = hook + reach + 1
    for row in range(hook + 1, stop if stop < last else last):
        if not left_out[row]:
            trunk[size] = row
            size += 1
    return size


@inlined
def _squared_distance(points, i, z, y, x):
    z, y, x = points[i, 0] - z, points[i, 1] - y, points[i, 2] - x
    return z * z + y * y + x * x


@inlined
def _is_free(row, points, radii, trunk, begin, end, margin):
    """Whether a row lies outside the node of the trunk nearest to it."""
    nearest, least = trunk[begin], np.inf
    for k in range(begin, end):
        away = _squared_distance(points, trunk[k], points[row, 0], points[row, 1], points[row, 2])
        if away < least:
            nearest, least = trunk[k], away
    return np.sqrt(least) > radii[nearest] + margin


@compiled
def _choose(  # noqa: C901 (each function more takes numba a tenth of a second)
    ends, cost, trunk, start, control, usual, points, radii, finest, step, linear, shape, neighbours, depth, best,
):  # fmt: skip
    """Into `best`: of each branch that place in `trunk` which costs least by direction and depth together.

    Only the few are looked at that direction favours, and their `cost` becomes infinite.
    """
    begin = np.int64(0)
    for n in range(ends.shape[0]):
        least = np.inf
        for _ in range(_CANDIDATES):
            k = begin
            for other in range(begin + 1, ends[n]):
                if cost[other] < cost[k]:
                    k = other
            total = cost[k]
            if total >= least:
                break
            cost[k] = np.inf
            for m in range(1, _SAMPLES + 1):
                u = m / (_SAMPLES + 1)
                a, b, c = (1 - u) * (1 - u), 2 * u * (1 - u), u * u
                z = a * start[n, 0] + b * control[k, 0] + c * points[trunk[k], 0]
                y = a * start[n, 1] + b * control[k, 1] + c * points[trunk[k], 1]
                x = a * start[n, 2] + b * control[k, 2] + c * points[trunk[k], 2]
                expected = usual[n]  # or as deep as in the parent, where that is more
                for other in range(begin, ends[n]):
                    room = radii[trunk[other]] - expected
                    if room > 0:
                        away = _squared_distance(points, trunk[other], z, y, x)
                        if away < room * room:
                            expected = radii[trunk[other]] - np.sqrt(away)
                deep = _depth_at(z / step[0], y / step[1], x / step[2], linear, shape, neighbours, depth)
                excess = (deep - expected) / finest - _DEPTH_EXCESS
                if excess < _LEAST_EXCESS:
                    excess = _LEAST_EXCESS
                elif excess > _MOST_EXCESS:
                    excess = _MOST_EXCESS
                total += excess * excess / (2 * _DEPTH_STEPS * _DEPTH_STEPS * _SAMPLES)
            if total < least:
                best[n], least = k, total
        begin = ends[n]


@inlined
def _depth_at(z, y, x, linear, shape, neighbours, depth):
    """Depth at a point in voxels, interpolated; 0 out of the foreground, and beyond the volume as at its border."""
    z = 0.0 if z < 0 else z if z < shape[0] - 1 else shape[0] - 1.0
    y = 0.0 if y < 0 else y if y < shape[1] - 1 else shape[1] - 1.0
    x = 0.0 if x < 0 else x if x < shape[2] - 1 else shape[2] - 1.0
    nz, ny, nx = np.int64(z + 0.5), np.int64(y + 0.5), np.int64(x + 0.5)
    place = (nz * shape[1] + ny) * shape[2] + nx
    low, high = 0, linear.shape[0] - 1
    while low < high:
        middle = (low + high) // 2
        if linear[middle] < place:
            low = middle + 1
        else:
            high = middle
    if linear[low] != place:
        return 0.0
    z, y, x = z - nz, y - ny, x - nx
    jz, jy, jx = (9 if z >= 0 else -9), (3 if y >= 0 else -3), (1 if x >= 0 else -1)
    z, y, x = (z if z >= 0 else -z), (y if y >= 0 else -y), (x if x >= 0 else -x)
    total = depth[low] * ((1 - z) * (1 - y) * (1 - x))
    for corner in range(1, 8):
        a, b, c = corner >> 2, corner >> 1 & 1, corner & 1
        column = 13 + a * jz + b * jy + c * jx
        there = neighbours[low, column - 1 if column > 13 else column]
        if there >= 0:
            total += depth[there] * (z if a else 1 - z) * (y if b else 1 - y) * (x if c else 1 - x)
    return total
