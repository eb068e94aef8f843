"""Loops over sparse voxels and their neighbours, compiled by numba once and cached.

Plain loops over arrays that the callers allocate, few of them called from Python, no powers, tuples, `min` or `max`
inside: what else numba offers makes the first call wait for seconds.
`neighbours` (N, 26) holds the row of each neighbour or -1, opposite columns add up to 25; `index` (N, 3) the voxel's
place; `step` (3,) the size of a voxel.
"""

import numpy as np
from numba import njit

OFFSETS = np.array([(z, y, x) for z in (-1, 0, 1) for y in (-1, 0, 1) for x in (-1, 0, 1) if (z, y, x) != (0, 0, 0)])
FORWARD = np.array((21, 15, 13))  # columns of the next voxel along z, y, x
# Nothing here allocates: without numba's counting of references the first call waits a tenth less.
_quick = {"cache": True, "nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True, "_nrt": False}
compiled, inlined = njit(**_quick), njit(**_quick, no_cpython_wrapper=True)
_row = np.uint64  # numba asks of every signed index whether it counts from the end


def link_voxels(linear: np.ndarray, index: np.ndarray, shape: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of voxels with ascending flat indices `linear` (N,): the (N, 26) int32 rows of their neighbours, the (N,) int32
    number of the component of each, counted from 0, and (C,) a voxel at an end of each component."""
    stride = np.array([(shape[1] + 1) * (shape[2] + 1), shape[2] + 1, 1])  # a border between rows and between planes
    neighbours = np.full((len(linear), 26), -1, np.int32)
    component, visited = np.full(len(linear), -1, np.int32), np.empty(len(linear), np.int32)
    _link(index @ stride, OFFSETS @ stride, np.zeros(26, np.int64), neighbours, component, visited)
    return neighbours, component, visited[np.append(np.flatnonzero(np.diff(component[visited])), len(visited) - 1)]


def distance_to_background(
    index: np.ndarray, neighbours: np.ndarray, shape: tuple[int, int, int], step: np.ndarray
) -> np.ndarray:
    """(N,) float32 distance from each voxel's centre to that of the nearest background voxel, exact.

    Separable: one axis after the other, each voxel looking no further than its best so far. Voxels outside
    `shape` are no background.
    """
    squared = np.full(len(index), np.inf, np.float32)
    for axis in (2, 1, 0):
        previous = squared.copy()
        _parabolas(index[:, axis], neighbours, FORWARD[axis], shape[axis] - 1, step[axis], previous, squared)
    return np.sqrt(squared, out=squared)


def largest_balls(depth: np.ndarray, neighbours: np.ndarray, index: np.ndarray, step: np.ndarray) -> np.ndarray:
    """(N,) int32 row of the centre of (about) the largest inscribed ball that holds each voxel."""
    centre = np.arange(len(depth), dtype=np.int32)
    reach = depth + np.float32(step.min())
    reach *= reach
    _hand_on(centre, centre.copy(), reach, neighbours, index, step, 26)
    return centre


def shortest_paths(
    ends: np.ndarray, graph: tuple, neighbour_step: np.ndarray, cost: np.ndarray, depth: np.ndarray, slope: float
) -> tuple[np.ndarray, np.ndarray]:
    """Parent row (N,) int32, -1 at roots, and length (N,) float32 of the cheapest path to the nearest root.

    The roots are the centres of the caps (see `_cap_centre`) that the voxels `ends` lie in. A step costs its length
    times the mean `cost` (N,) of its ends; all roots start at once.
    """
    count, width = len(cost), float(neighbour_step.min() * cost.min())
    distance, length = np.full(count, np.inf, np.float32), np.zeros(count, np.float32)
    parent, before, after = (np.full(count, -1, np.int32) for _ in range(3))
    slots = np.full(int(neighbour_step.max() * cost.max() / width) + 2, -1, np.int32)
    found = (distance, length, parent, slots, before, after)
    _dijkstra(ends, depth, slope, width, *graph, neighbour_step, cost, *found)
    return parent, length


def extract_branches(paths, depth, graph, rule):
    """Branches of the shortest-path tree, each from the farthest uncovered voxel back to the ones before.

    paths: (parent, length) as `shortest_paths` gives them. graph: (neighbours, index, step).
    rule: (scale, extra, bare, min_branch, slope). A branch covers the voxels within scale * depth + extra voxels; it
    ends in the centre of its cap (see `_cap_centre`); the depths of the uncovered voxels on its way up to there must
    add up to `bare` (the rim of a flat neurite has its cap inside), and its farthest voxel must lie `min_branch`
    beyond the surface of its parent.
    Returns the voxel of each node (M,), its parent node (M,), -1 at a root, the first node of each branch (B,), and
    the node that owns each voxel (N,), the nearest one.
    """
    parent, length = paths
    count = len(depth)
    # longest first, equal ones by row: as one number, which sorts many times faster than a stable argsort
    key = (~length.view(np.uint32)).astype(np.uint64) << np.uint64(32)
    key |= np.arange(count, dtype=np.uint64)
    key.sort()
    order = key.astype(np.int32)  # its lower half
    del key
    owner, node = np.full(count, -1, np.int32), np.full(count, -1, np.int32)
    voxel, parents, starts, queue = (np.empty(count, np.int32) for _ in range(4))
    found = (voxel, owner, queue, node, parents, starts)
    nodes, branches = _extract(order, parent, length, depth, np.array(rule), *graph, *found)
    voxel, parents, starts = voxel[:nodes], parents[:nodes], starts[:branches]
    _hand_on(owner, voxel, np.full(nodes, np.inf, np.float32), *graph, 13)
    return voxel, parents, starts, owner


@compiled
def _link(linear, jumps, ahead, neighbours, component, queue):
    """Both sides of each of the 13 forward offsets, by one pointer `ahead` each along sorted indices; then components.

    Breadth first; `queue` ends up in order, so the last voxel of each component is one farthest from its first.
    """
    count = linear.shape[0]
    for i in range(count):
        for k in range(13, 26):
            j = ahead[k]
            while j < count and linear[j] < linear[i] + jumps[k]:
                j += 1
            ahead[k] = j
            if j < count and linear[j] == linear[i] + jumps[k]:
                neighbours[i, k] = j
                neighbours[j, 25 - k] = i
    current = head = tail = 0
    for seed in range(count):
        if component[seed] >= 0:
            continue
        component[seed] = current
        queue[tail] = seed
        tail += 1
        while head < tail:
            i = queue[head]
            head += 1
            for k in range(26):
                j = neighbours[i, k]
                if j >= 0 and component[j] < 0:
                    component[j] = current
                    queue[tail] = j
                    tail += 1
        current += 1


@compiled
def _parabolas(place, neighbours, forward, last, step, previous, squared):
    """squared[i] = min over the run of voxels j through i of previous[j] + distance(i, j)^2, background being 0."""
    for i in range(place.shape[0]):
        best = previous[i]
        for side in range(2):
            column = forward if side == 1 else 25 - forward
            border = last if side == 1 else 0
            j, away = i, 0
            while True:
                away += 1
                square = (away * step) ** 2
                if square >= best:
                    break
                if neighbours[j, column] < 0:
                    if place[j] != border:
                        best = square
                    break
                j = neighbours[j, column]
                if square + previous[j] < best:
                    best = square + previous[j]
        squared[i] = best


@inlined
def _squared_distance(index, i, j, step):
    total = 0.0
    for axis in range(3):
        total += ((index[_row(i), axis] - index[_row(j), axis]) * step[axis]) ** 2
    return total


@inlined
def _within(index, i, j, step, radius, extra):
    """Whether voxel i lies within the ball around j, widened by `extra` voxels along each axis."""
    total = 0.0
    for axis in range(3):
        total += ((index[_row(i), axis] - index[_row(j), axis]) * step[axis] / (radius + extra * step[axis])) ** 2
    return total <= 1


@compiled
def _hand_on(holder, place, reach, neighbours, index, step, looks):
    """Every voxel goes over to the best holder that it or its neighbours have, in a sweep there and one back.

    On the way there it looks at the 13 neighbours that were passed, or at all 26; on the way back at the 13 that were
    passed then, for the others have not changed.

    The best is the one of largest squared `reach` among those that reach the voxel from their `place`, then the
    nearest.
    """
    count = np.int32(holder.shape[0])
    for n in range(2 * count):
        i, first, last = np.int32(n), 0, looks
        if n >= count:
            i, first, last = np.int32(2 * count - 1 - n), 13, 26
        mine, most, away = holder[i], np.float32(-1), 0.0
        if mine >= 0:
            most, away = reach[_row(mine)], _squared_distance(index, i, place[_row(mine)], step)
        for k in range(first, last):
            j = neighbours[_row(i), _row(k)]
            if j < 0:
                continue
            other = holder[_row(j)]
            if other < 0 or other == mine:
                continue
            far = reach[_row(other)]
            if far < most:
                continue
            there = _squared_distance(index, i, place[_row(other)], step)
            if there <= far and (far > most or there < away):
                mine, most, away = other, far, there
        holder[_row(i)] = mine


@inlined
def _cap_centre(tip, depth, neighbours, index, step, slope):
    """Uphill from `tip` while depth grows steeply; then onward as long as the ball there still reaches the tip."""
    best = tip
    while best >= 0:
        i, best, steepest = best, np.int32(-1), slope * slope
        for k in range(26):
            j = neighbours[i, k]
            if j >= 0 and depth[j] > depth[i]:
                rise = depth[j] - depth[i]
                gain = rise * rise / _squared_distance(index, i, j, step)
                if gain > steepest:
                    best, steepest = j, gain
    best = i
    while best >= 0:
        i, best, deepest = best, np.int32(-1), np.float32(0)
        away = _squared_distance(index, tip, i, step)
        for k in range(26):
            j = neighbours[i, k]
            onward = j >= 0 and depth[j] > deepest and _squared_distance(index, tip, j, step) > away
            if onward and _within(index, tip, j, step, depth[j], 0.5):
                best, deepest = j, depth[j]
    return i


@inlined
def _chain(v, slot, slots, before, after):
    first = slots[slot]
    if first >= 0:
        before[first] = v
    before[v], after[v], slots[slot] = -1 - slot, first, v


@inlined
def _unchain(v, slots, before, after):
    if before[v] >= 0:
        after[before[v]] = after[v]
    else:
        slots[-1 - before[v]] = after[v]
    if after[v] >= 0:
        before[after[v]] = before[v]


@compiled
def _dijkstra(
    ends, depth, slope, width, neighbours, index, step, neighbour_step, cost,
    distance, length, parent, slots, before, after,
):  # fmt: skip
    """Shortest paths with voxels in slots by distance: no step is shorter than a slot is wide, none wraps around.

    The voxels of a slot are a chain, linked by `before` (-1 - slot at its first) and `after` (-1 at its last,
    -2 once a voxel is done).
    """
    waiting = 0
    for n in range(ends.shape[0]):
        u = _cap_centre(ends[n], depth, neighbours, index, step, slope)
        if distance[u] > 0:
            distance[u] = 0
            _chain(u, np.int64(0), slots, before, after)
            waiting += 1
    current = 0
    while waiting > 0:
        u = slots[current % slots.shape[0]]
        if u < 0:
            current += 1
            continue
        _unchain(u, slots, before, after)
        after[u] = -2
        waiting -= 1
        for k in range(26):
            v = neighbours[u, k]
            if v < 0 or after[v] == -2:
                continue
            reached = distance[u] + neighbour_step[k] * (cost[u] + cost[v]) / 2
            if reached < distance[v]:
                if distance[v] < np.inf:
                    _unchain(v, slots, before, after)
                    waiting -= 1
                distance[v] = reached
                parent[v] = u
                length[v] = length[u] + neighbour_step[k]
                _chain(v, np.int64(distance[v] / width) % slots.shape[0], slots, before, after)
                waiting += 1


@inlined
def _cover(first, nodes, depth, rule, neighbours, index, step, voxel, owner, queue):
    """Breadth first, give the uncovered voxels around the new nodes to them."""
    fresh = nodes - first
    for n in range(fresh):
        queue[n] = voxel[first + n]
        if owner[queue[n]] < 0:
            owner[queue[n]] = first + n
    head, tail = 0, fresh
    while head < tail:
        w = queue[head]
        source = first + head if head < fresh else owner[w]
        s = voxel[source]
        head += 1
        for k in range(26):
            j = neighbours[w, k]
            if j >= 0 and owner[j] < 0 and _within(index, j, s, step, np.float32(rule[0] * depth[s]), rule[1]):
                owner[j] = source
                queue[tail] = j
                tail += 1


@compiled
def _extract(
    order, parent, length, depth, rule, neighbours, index, step,
    voxel, owner, queue, node, parents, starts,
):  # fmt: skip
    """See `extract_branches`."""
    nodes = branches = np.int64(0)  # a literal 0 would be compiled again and again
    for n in range(order.shape[0]):
        v = order[n]
        if owner[v] >= 0:
            continue
        u = _cap_centre(v, depth, neighbours, index, step, rule[4])
        hops, bare = 0, 0.0
        while node[u] < 0 and parent[u] >= 0:
            queue[hops] = u
            hops += 1
            if owner[u] < 0:
                bare += depth[u]
            u = parent[u]
        hook = node[u]
        if hook < 0:
            queue[hops] = u
            hops += 1
        elif hops == 0 or bare < rule[2] or length[v] - length[u] < depth[u] + rule[3]:
            for m in range(hops):
                if owner[queue[m]] < 0:
                    owner[queue[m]] = hook
            continue
        first = nodes
        starts[branches] = first
        branches += 1
        while hops > 0:
            hops -= 1
            voxel[nodes] = queue[hops]
            parents[nodes] = hook
            node[queue[hops]] = hook = nodes
            nodes += 1
        _cover(first, nodes, depth, rule, neighbours, index, step, voxel, owner, queue)
    return nodes, branches
