"""Loops over sparse voxels and their neighbours, compiled by numba once and cached.

Plain loops over arrays that the callers allocate: array expressions would make the first call wait for seconds.
`neighbours` (N, 26) holds the row of each neighbour or -1, opposite columns add up to 25; `index` (N, 3) the voxel's
place; `step` (3,) the size of a voxel.
"""

import numpy as np
from numba import njit

OFFSETS = np.array([(z, y, x) for z in (-1, 0, 1) for y in (-1, 0, 1) for x in (-1, 0, 1) if (z, y, x) != (0, 0, 0)])
FORWARD = np.array((21, 15, 13))  # columns of the next voxel along z, y, x
_compiled = njit(cache=True, nogil=True, error_model="numpy", no_cfunc_wrapper=True)
_inlined = njit(cache=True, nogil=True, error_model="numpy", no_cfunc_wrapper=True, no_cpython_wrapper=True)


def find_neighbours(linear: np.ndarray, index: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """(N, 26) int32 rows of the neighbours of voxels with ascending flat indices `linear` (N,)."""
    neighbours = np.full((len(linear), 26), -1, np.int32)
    _link(linear, index, np.array(shape), OFFSETS, neighbours)
    return neighbours


def label_components(neighbours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) int32 number of the component of each voxel, counted from 0; and (C,) a voxel at an end of each."""
    label = np.full(len(neighbours), -1, np.int32)
    visited = np.empty(len(neighbours), np.int32)
    _flood(neighbours, label, visited)
    return label, visited[np.append(np.flatnonzero(np.diff(label[visited])), len(visited) - 1)]


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
    for sweep in range(2):  # more change a voxel here and there
        if not _hand_on_balls(depth, neighbours, index, step, centre, sweep % 2 == 1):
            break
    return centre


def climb(tips: np.ndarray, depth: np.ndarray, graph: tuple, slope: float) -> np.ndarray:
    """Rows (T,) of the centres of the caps that the voxels `tips` (T,) lie in, where depth stops to grow by `slope`.

    graph: (neighbours, index, step).
    """
    return np.array([_cap_centre(tip, depth, graph, slope) for tip in tips.tolist()], np.int64)


def shortest_paths(
    roots: np.ndarray, neighbours: np.ndarray, neighbour_step: np.ndarray, cost: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Parent row (N,) int32, -1 at roots, and length (N,) float32 of the cheapest path to the nearest root.

    A step costs its length times the mean `cost` (N,) of its ends; all roots start at once.
    """
    count = len(cost)
    distance, length = np.full(count, np.inf, np.float32), np.zeros(count, np.float32)
    parent, place = np.full(count, -1, np.int32), np.full(count, -1, np.int32)
    distance[roots] = 0
    heap = np.empty(count, np.int32)
    heap[: len(roots)] = roots
    place[roots] = np.arange(len(roots))
    _dijkstra(len(roots), (neighbours, neighbour_step), cost, distance, length, parent, (heap, place))
    return parent, length


def extract_branches(paths, depth, graph, rule):
    """Branches of the shortest-path tree, each from the farthest uncovered voxel back to the ones before.

    paths: (parent, length) as `shortest_paths` gives them. graph: (neighbours, index, step).
    rule: (scale, extra, hops, min_branch, slope). A branch covers the voxels within scale * depth + extra voxels; it
    ends in the centre of its cap (see `climb`); up to there it must cross at least `hops` uncovered voxels (the rim of
    a flat neurite has its cap inside), and its farthest voxel must lie `min_branch` beyond the surface of its parent.
    Returns the voxel of each node (M,), its parent node (M,), -1 at a root, the first node of each branch (B,), and
    the node that owns each voxel (N,), the nearest one.
    """
    parent, length = paths
    count = len(depth)
    order = np.argsort(-length, kind="stable").astype(np.int32)
    owner, node = np.full(count, -1, np.int32), np.full(count, -1, np.int32)
    voxel, parents, starts, queue = (np.empty(count, np.int32) for _ in range(4))
    found = (voxel, parents, starts, owner, node, queue)
    nodes, branches = _extract(0, order, (parent, length, depth), np.array(rule), graph, found)
    voxel, parents, starts = voxel[:nodes], parents[:nodes], starts[:branches]
    for backwards in (False, True):
        _hand_to_nearest(owner, voxel, *graph, backwards)
    return voxel, parents, starts, owner


@_compiled
def _link(linear, index, shape, offsets, neighbours):
    """Both sides of each of the 13 forward offsets, by walking two pointers along the sorted indices."""
    count = linear.shape[0]
    for k in range(13, 26):
        dy, dx = offsets[k, 1], offsets[k, 2]
        jump = (offsets[k, 0] * shape[1] + dy) * shape[2] + dx
        j = 0
        for i in range(count):
            target = linear[i] + jump
            while j < count and linear[j] < target:
                j += 1
            if j == count:
                break
            y, x = index[i, 1] + dy, index[i, 2] + dx
            if linear[j] == target and y >= 0 and y < shape[1] and x >= 0 and x < shape[2]:
                neighbours[i, k] = j
                neighbours[j, 25 - k] = i


@_compiled
def _flood(neighbours, label, queue):
    """Breadth first; `queue` ends up in order, so the last voxel of each component is one farthest from its first."""
    current, head, tail = 0, 0, 0
    for seed in range(label.shape[0]):
        if label[seed] >= 0:
            continue
        label[seed] = current
        queue[tail] = seed
        tail += 1
        while head < tail:
            i = queue[head]
            head += 1
            for k in range(26):
                j = neighbours[i, k]
                if j >= 0 and label[j] < 0:
                    label[j] = current
                    queue[tail] = j
                    tail += 1
        current += 1


@_compiled
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


@_inlined
def _squared_distance(index, i, j, step):
    total = 0.0
    for axis in range(3):
        total += ((index[i, axis] - index[j, axis]) * step[axis]) ** 2
    return total


@_inlined
def _within(index, i, j, step, radius, extra):
    """Whether voxel i lies within the ball around j, widened by `extra` voxels along each axis."""
    total = 0.0
    for axis in range(3):
        total += ((index[i, axis] - index[j, axis]) * step[axis] / (radius + extra * step[axis])) ** 2
    return total <= 1


@_compiled
def _hand_on_balls(depth, neighbours, index, step, centre, backwards):
    """One sweep: take over a neighbour's ball where it is larger and holds this voxel. False when nothing changed."""
    count = depth.shape[0]
    changed = False
    for n in range(count):
        i = count - 1 - n if backwards else n
        for k in range(26):
            j = neighbours[i, k]
            if j >= 0 and depth[centre[j]] > depth[centre[i]]:
                c = centre[j]
                if _within(index, i, c, step, np.float64(depth[c]), 1.0):
                    centre[i] = c
                    changed = True
    return changed


@_inlined
def _sift_up(heap, place, distance, v, hole):
    while hole > 0:
        above = (hole - 1) // 2
        if distance[heap[above]] <= distance[v]:
            break
        heap[hole] = heap[above]
        place[heap[hole]] = hole
        hole = above
    heap[hole] = v
    place[v] = hole


@_inlined
def _sift_down(heap, place, distance, v, size):
    hole = 0
    while True:
        child = 2 * hole + 1
        if child >= size:
            break
        if child + 1 < size and distance[heap[child + 1]] < distance[heap[child]]:
            child += 1
        if distance[heap[child]] >= distance[v]:
            break
        heap[hole] = heap[child]
        place[heap[hole]] = hole
        hole = child
    heap[hole] = v
    place[v] = hole


@_compiled
def _dijkstra(size, graph, cost, distance, length, parent, queue):
    """An indexed binary heap; `place` is where a voxel sits in it, -1 before and -2 after."""
    neighbours, neighbour_step = graph
    heap, place = queue
    while size > 0:
        u = heap[0]
        size -= 1
        if size > 0:
            _sift_down(heap, place, distance, heap[size], size)
        place[u] = -2
        for k in range(26):
            v = neighbours[u, k]
            if v < 0 or place[v] == -2:
                continue
            reached = distance[u] + neighbour_step[k] * (cost[u] + cost[v]) / 2
            if reached < distance[v]:
                distance[v] = reached
                parent[v] = u
                length[v] = length[u] + neighbour_step[k]
                hole = place[v]
                if hole < 0:
                    hole = size
                    size += 1
                _sift_up(heap, place, distance, v, hole)


@_compiled
def _cap_centre(tip, depth, graph, slope):
    """Uphill from `tip` while depth grows steeply; then onward as long as the ball there still reaches the tip."""
    neighbours, index, step = graph
    i, best = tip, tip
    while best >= 0:
        i, best, steepest = best, -1, slope
        for k in range(26):
            j = neighbours[i, k]
            if j >= 0 and depth[j] > depth[i]:
                gain = (depth[j] - depth[i]) / np.sqrt(_squared_distance(index, i, j, step))
                if gain > steepest:
                    best, steepest = j, gain
    best = i
    while best >= 0:
        i, best, deepest = best, -1, 0.0
        away = _squared_distance(index, tip, np.int32(i), step)  # int32 as rows in `neighbours`: compiled once
        for k in range(26):
            j = neighbours[i, k]
            onward = j >= 0 and depth[j] > deepest and _squared_distance(index, tip, j, step) > away
            if onward and _within(index, np.int32(tip), j, step, np.float64(depth[j]), 0.5):
                best, deepest = j, depth[j]
    return i


@_inlined
def _walk_to_tree(v, parent, node, owner, path):
    """Write the way from `v` to a node of the tree or a root into `path` -> its end, its hops, its uncovered hops."""
    hops = bare = 0
    while node[v] < 0 and parent[v] >= 0:
        path[hops] = v
        hops += 1
        if owner[v] < 0:
            bare += 1
        v = parent[v]
    return v, hops, bare


@_inlined
def _cover(first, nodes, depth, rule, graph, found):
    """Breadth first, give the uncovered voxels around the new nodes to them."""
    neighbours, index, step = graph
    voxel, _, _, owner, _, queue = found
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
            if j < 0 or owner[j] >= 0:
                continue
            if _within(index, j, s, step, rule[0] * depth[s], rule[1]):
                owner[j] = source
                queue[tail] = j
                tail += 1


@_compiled
def _extract(nodes, order, paths, rule, graph, found):
    """See `extract_branches`."""
    parent, length, depth = paths
    voxel, parents, starts, owner, node, queue = found
    branches = 0  # `nodes` is 0 too, as an argument: as a literal it would be compiled three times
    for n in range(order.shape[0]):
        v = np.int64(order[n])
        if owner[v] >= 0:
            continue
        u, hops, bare = _walk_to_tree(_cap_centre(v, depth, graph, rule[4]), parent, node, owner, queue)
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
        for m in range(hops - 1, -1, -1):
            voxel[nodes], parents[nodes], node[queue[m]] = queue[m], hook, nodes
            hook = nodes
            nodes += 1
        _cover(first, nodes, depth, rule, graph, found)
    return nodes, branches


@_compiled
def _hand_to_nearest(owner, voxel, neighbours, index, step, backwards):
    """One sweep: every voxel goes to the nearest of the nodes that own it or its neighbours."""
    count = owner.shape[0]
    for n in range(count):
        i = count - 1 - n if backwards else n
        mine = owner[i]
        best = _squared_distance(index, i, voxel[mine], step) if mine >= 0 else np.inf
        for k in range(26):
            j = neighbours[i, k]
            if j >= 0 and owner[j] >= 0 and owner[j] != mine:
                away = _squared_distance(index, i, voxel[owner[j]], step)
                if away < best:
                    best = away
                    mine = owner[j]
        owner[i] = mine
