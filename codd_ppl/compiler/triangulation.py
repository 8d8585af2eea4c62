"""Triangulation by elimination: which variables have to be contracted together, and in which order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from math import prod

import networkx as nx

__all__ = ["Bag", "as_declared", "bags_of", "eliminate", "min_fill", "min_weight"]

CHILDREN = 4
"""From so many children on, a clique passes further ones on to a child that can take them."""

Score = Callable[[dict[str, set[str]], dict[str, int], str], tuple[int, int]]


def min_fill(links: dict[str, set[str]], sizes: dict[str, int], v: str) -> tuple[int, int]:
    """Edges that eliminating v adds, then the entries of its clique."""
    around = links[v]
    missing = sum(len(around) - 1 - len(around & links[u]) for u in around) // 2
    return missing, prod(sizes[u] for u in around) * sizes[v]


def min_weight(links: dict[str, set[str]], sizes: dict[str, int], v: str) -> tuple[int, int]:
    """Entries of v's clique, then the edges that eliminating it adds."""
    missing, entries = min_fill(links, sizes, v)
    return entries, missing


def as_declared(links: dict[str, set[str]], sizes: dict[str, int], v: str) -> tuple[int, int]:
    """The same for all, so that the order of declaration decides: the best one for grids and skips along the text."""
    return 0, 0


def eliminate(
    primal: nx.Graph, sizes: dict[str, int], score: Score, limit: int
) -> list[tuple[str, frozenset[str]]]:
    """Greedy elimination: each variable with its neighbours that are eliminated later; ties go by declaration.

    Stops after the first variable whose clique has more than ``limit`` entries.
    """
    links = {v: set(primal[v]) for v in primal}
    number = {v: i for i, v in enumerate(primal)}
    scores = {v: score(links, sizes, v) for v in primal}
    heap = [(scores[v], number[v], v) for v in primal]
    heapify(heap)
    order = []
    while links:
        found, _, v = heappop(heap)
        if v not in links or found != scores[v]:
            continue  # eliminated already, or scored anew since
        around = links.pop(v)
        order.append((v, frozenset(around)))
        if prod(sizes[u] for u in around) * sizes[v] > limit:
            break
        stale = set(around)
        for u in around:
            links[u] |= around
            links[u] -= {u, v}
        for u in around:
            stale |= links[u]
        for u in stale:
            new = score(links, sizes, u)
            if new != scores[u]:
                scores[u] = new
                heappush(heap, (new, number[u], u))
    return order


class Bag:
    """A clique while the tree is built."""

    def __init__(self, members: set[str], separator: frozenset[str], parent: int) -> None:
        self.members, self.separator, self.parent = members, separator, parent


def bags_of(order: list[tuple[str, frozenset[str]]]) -> list[Bag]:
    """Maximal cliques of the triangulation, parents first (Blair and Peyton 1993).

    Where many cliques hang on one by the same separator, as the leaves of a star do, they are hung on each other
    instead: a clique with a hundred children would contract a hundred messages for each of them.
    """
    place = {v: i for i, (v, _) in enumerate(order)}
    bags: list[Bag] = []
    home: dict[str, int] = {}
    degree: list[int] = []
    hosts: dict[frozenset[str], deque[int]] = {}  # separator -> cliques that hold it, those with room first
    for v, later in reversed(order):
        parent = home[min(later, key=place.__getitem__)] if later else -1
        if later and bags[parent].members == later:
            bags[parent].members.add(v)
            home[v] = parent
        else:
            home[v] = len(bags)
            if later:
                queue = hosts.setdefault(later, deque([parent]))
                while len(queue) > 1 and degree[queue[0]] >= CHILDREN:
                    queue.popleft()
                parent = queue[0]
                queue.append(home[v])
                degree[parent] += 1
            degree.append(0)
            bags.append(Bag({v, *later}, later, parent))
    return bags
