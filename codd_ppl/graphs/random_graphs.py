"""Random factor graphs for tests, with and without loops; ``codd_ppl.testing`` lists them beside its oracles."""

from __future__ import annotations

import itertools
import math
import random

from codd_ppl.errors import GraphError
from codd_ppl.graphs.factor_graph import FactorGraph

__all__ = ["random_forest", "random_loopy_graph"]


def random_forest(
    seed: int,
    *,
    variables: int = 6,
    max_cardinality: int = 4,
    max_order: int = 3,
    connectivity: float = 0.8,
    latent: float = 0.3,
    tie: float = 0.5,
    max_joint: int = 4096,
) -> FactorGraph:
    """A random factor graph without loops; the same seed gives the same graph.

    One to ``variables`` variables of cardinality 1 to ``max_cardinality``, a share of ``latent`` hidden
    ones; factors of order 1 to ``max_order`` with scopes in random order, each joining components that
    were apart; several components and isolated variables if ``connectivity`` is below 1. Factors of equal
    shape share a table with probability ``tie``. ``max_joint`` bounds the product of the cardinalities.
    """
    rng = random.Random(seed)
    graph, cards = FactorGraph(), dict[str, int]()
    for index in range(rng.randint(1, variables)):
        room = max(1, max_joint // math.prod(cards.values()))
        hidden = rng.random() < latent
        name = f"{'z' if hidden else 'x'}{index}"
        cards[name] = rng.randint(1, min(max_cardinality, room))
        graph.add_variable(name, cardinality=cards[name], latent=hidden)
    component = {name: {name} for name in cards}
    scopes: list[tuple[str, ...]] = [(name,) for name in cards if rng.random() < 0.3]
    for _ in range(4 * len(cards)):
        order = rng.randint(2, max(2, max_order))
        scope = tuple(rng.sample(sorted(cards), min(order, len(cards))))
        apart = len({id(component[name]) for name in scope}) == len(scope)
        if len(scope) < 2 or not apart or rng.random() > connectivity:
            continue
        union = set[str]().union(*(component[name] for name in scope))
        component.update(dict.fromkeys(union, union))
        scopes.append(scope)
    rng.shuffle(scopes)
    for number, scope in enumerate(scopes):
        shape = "x".join(str(cards[name]) for name in scope)
        shared = f"tie {shape}" if rng.random() < tie else None
        graph.add_factor(scope, name=f"f{number}", tie=shared)
    return graph


def random_loopy_graph(
    seed: int,
    *,
    treewidth: int = 2,
    variables: int = 7,
    max_cardinality: int = 3,
    max_order: int = 4,
    latent: float = 0.3,
    tie: float = 0.5,
    max_joint: int = 4096,
) -> FactorGraph:
    """A random factor graph with loops of the given treewidth (2 or more); the same seed gives the same graph.

    A random partial k-tree: ``treewidth + 1`` variables coupled in pairs, each further one coupled with some of a
    clique that is there already, by factors of order 1 to ``max_order`` with scopes in random order. Some variables
    stand apart, alone or in a pair. Cardinalities from 1 to ``max_cardinality`` (at least 2 in the first clique where
    ``max_joint``, the bound of their product, allows), shares of ``latent`` variables and of tables with a ``tie``.
    """
    if treewidth < 2:
        raise GraphError(f"a graph with loops has treewidth 2 or more, found {treewidth}; use random_forest")
    rng = random.Random(seed)
    graph, cards = FactorGraph(), dict[str, int]()
    for index in range(rng.randint(treewidth + 1, max(treewidth + 1, variables))):
        room = max(1, max_joint // math.prod(cards.values()))
        hidden = rng.random() < latent
        name = f"{'z' if hidden else 'x'}{index}"
        least = 2 if index <= treewidth else 1
        cards[name] = rng.randint(min(least, room), max(1, min(max_cardinality, room)))
        graph.add_variable(name, cardinality=cards[name], latent=hidden)
    names = list(cards)
    bags = [tuple(names[: treewidth + 1])]
    scopes = [tuple(rng.sample(pair, 2)) for pair in itertools.combinations(bags[0], 2)]
    for name in names[treewidth + 1 :]:
        if rng.random() < 0.15:
            bags.append((name,))  # a component of its own, or the start of one
            continue
        bag = rng.choice(bags)
        near = tuple(rng.sample(bag, min(len(bag), treewidth)))
        bags.append((*near, name))
        scopes += [(name, other) for other in near if rng.random() < 0.7]
    for _ in range(len(names)):
        bag = rng.choice(bags)
        scopes.append(tuple(rng.sample(bag, rng.randint(1, min(max_order, len(bag))))))
    rng.shuffle(scopes)
    for number, scope in enumerate(scopes):
        shape = "x".join(str(cards[name]) for name in scope)
        shared = f"tie {shape}" if rng.random() < tie else None
        graph.add_factor(scope, name=f"f{number}", tie=shared)
    return graph
