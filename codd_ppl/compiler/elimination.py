"""Rooting a forest and ordering its messages, leaves first, equal-shaped ones of a level together."""

from __future__ import annotations

from collections import deque
from functools import lru_cache

from opt_einsum import contract_path

from codd_ppl.compiler.plan import Message, Step
from codd_ppl.graphs import FactorGraph
from codd_ppl.graphs.properties import components

__all__ = ["choose_roots", "root_forest", "schedule"]

Links = dict[str, list[tuple[str, ...]]]


def choose_roots(graph: FactorGraph) -> tuple[str, ...]:
    """One root for each connected component.

    Without its leaves (tokens that hang on one variable) a chain or a hidden Markov model is a path: its root is
    the path's first end, so that the downward pass runs in reading order. Any other tree is rooted in the middle
    of a longest path, which gives the fewest levels.
    """
    neighbours = {v: set[str]() for v in graph.variables}
    factors = dict.fromkeys(graph.variables, 0)
    for factor in graph.factors.values():
        if factor.order > 1:
            for v in factor.scope:
                factors[v] += 1
                neighbours[v].update(u for u in factor.scope if u != v)
    position = _reading_order(graph)
    latent = {v.name: v.latent for v in graph}

    def root(component: tuple[str, ...]) -> str:
        core = [v for v in component if factors[v] > 1] or list(component)
        inside = set(core)
        degree = {v: len(neighbours[v] & inside) for v in core}
        ends = [v for v in core if degree[v] <= 1]
        if max(degree.values()) <= 2 and ends:
            # A chain of tokens starts at its first token, which is a leaf and so not in the core.
            near = {u for v in ends for u in (v, *neighbours[v]) if latent[u] == latent[v]}
            return min(near, key=position.__getitem__)
        far, _ = _farthest(neighbours, core[0])
        _, path = _farthest(neighbours, far)
        return path[len(path) // 2]

    return tuple(root(component) for component in components(graph))


def _reading_order(graph: FactorGraph) -> dict[str, int]:
    return {name: i for i, name in enumerate((*graph.latents, *graph.tokens))}


def _farthest(neighbours: dict[str, set[str]], start: str) -> tuple[str, list[str]]:
    came: dict[str, str | None] = {start: None}
    queue, last = deque([start]), start
    while queue:
        last = queue.popleft()
        for other in sorted(neighbours[last]):
            if other not in came:
                came[other] = last
                queue.append(other)
    path: list[str] = []
    node: str | None = last
    while node is not None:
        path.append(node)
        node = came[node]
    return last, path


def root_forest(graph: FactorGraph, roots: tuple[str, ...]) -> list[Message]:
    """Orient every factor of order >= 2 towards the roots; parents come before their children in the list."""
    touching: dict[str, list[str]] = {v: [] for v in graph.variables}
    factors = {name: f for name, f in graph.factors.items() if f.order > 1}
    for name, factor in factors.items():
        for v in factor.scope:
            touching[v].append(name)
    messages: list[Message] = []
    done: set[str] = set()
    queue = deque(roots)
    while queue:
        parent = queue.popleft()
        for name in touching[parent]:
            if name not in done:
                done.add(name)
                children = tuple(v for v in factors[name].scope if v != parent)
                messages.append(Message(name, parent, children))
                queue.extend(children)
    return messages


def schedule(graph: FactorGraph, messages: list[Message]) -> tuple[Step, ...]:
    """Group messages into steps: by height, then by shared table or table shape, and by orientation."""
    factors = graph.factors
    height = dict.fromkeys(graph.variables, 0)
    groups: dict[tuple[int, str, int, tuple[int, ...]], list[Message]] = {}
    position = _reading_order(graph)
    for message in reversed(messages):
        factor = factors[message.factor]
        level = max(height[c] for c in message.children)
        height[message.parent] = max(height[message.parent], level + 1)
        axis = factor.scope.index(message.parent)
        groups.setdefault((level, factor.tie or "", axis, graph.shape(factor.name)), []).append(message)
    steps = []
    for (_, tie, axis, shape), group in sorted(groups.items(), key=lambda item: item[0]):
        group.sort(key=lambda m: position[m.children[0]])
        equation, path, flops = _contraction(shape, axis, len(group), shared=bool(tie))
        steps.append(Step(tuple(group), axis, shape, tie or None, equation, path, flops))
    return tuple(steps)


@lru_cache(maxsize=256)
def _contraction(
    shape: tuple[int, ...], axis: int, group: int, shared: bool
) -> tuple[str, tuple[tuple[int, ...], ...], int]:
    """Equation over (child beliefs .., table), with opt_einsum's path and its FLOPs for one batch element."""
    letters = [chr(ord("i") + d) for d in range(len(shape))]  # i, j, k, ..: never b, g or p
    letters[axis] = "p"
    children = [letters[d] for d in range(len(shape)) if d != axis]
    table = ("" if shared else "g") + "".join(children) + "p"
    equation = ",".join([f"bg{c}" for c in children] + [table]) + "->bgp"
    sizes = {letter: size for letter, size in zip(letters, shape, strict=True)} | {"b": 1, "g": group}
    shapes = [tuple(sizes[c] for c in term) for term in equation.split("->")[0].split(",")]
    path, info = contract_path(equation, *shapes, shapes=True, optimize="optimal")
    return equation, tuple(tuple(pair) for pair in path), int(info.opt_cost)
