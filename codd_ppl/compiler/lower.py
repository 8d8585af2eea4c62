"""compile: from a declared graph to a plan."""

from __future__ import annotations

from typing import Literal

from codd_ppl.compiler.approximation import LoopyBeliefPropagation
from codd_ppl.compiler.elimination import choose_roots, root_forest, schedule
from codd_ppl.compiler.junction import clique_tree
from codd_ppl.compiler.plan import ContractionPlan
from codd_ppl.errors import GraphError
from codd_ppl.graphs import FactorGraph
from codd_ppl.graphs.properties import components, find_cycle, is_chain

__all__ = ["compile"]

MEMORY_LIMIT = 2**30
"""Bytes of the largest clique table for one batch element, in float32, that are accepted by default: 1 GiB."""

Route = Literal["auto", "tree sweep", "chain scan", "clique contraction"]


def compile(
    graph: FactorGraph,
    route: Route = "auto",
    *,
    memory_limit: int = MEMORY_LIMIT,
    approximate: LoopyBeliefPropagation | None = None,
) -> ContractionPlan:
    """Compile a factor graph into a contraction plan, which is exact unless an approximation is asked for by name.

    Belief propagation on a forest (Pearl 1988; Kschischang, Frey and Loeliger 2001, "Factor graphs and the
    sum-product algorithm"): every factor sends one message towards the root, leaves first. A graph with loops gets
    a clique tree (Lauritzen and Spiegelhalter 1988), whose cost grows exponentially with the treewidth.

    Args:
        graph: of any shape: mixed cardinalities, latents, ties, factors of any order, isolated variables, loops.
        route: "auto" takes the tree sweep for a forest and cliques for loops. "chain scan" asks for torch-struct's
            parallel scan for log_partition (chains with one cardinality only): logarithmic depth for (sites x
            states^3) work, so worth it on a GPU with few states. "clique contraction" asks for cliques on a forest.
        memory_limit: bytes of the largest clique table for one batch element, in float32. A query in log space holds
            two or three such tables at a time.
        approximate: settings of an approximation instead, for any graph. It is never chosen silently.

    Returns:
        A frozen, hashable :class:`ContractionPlan`; ``print(plan.explain())`` tells what it will do.

    Raises:
        TreewidthError: a clique is larger than ``memory_limit``; the message names it and a loop of the graph.
        GraphError: no variables, or a route that this graph can't take.
    """
    if not isinstance(graph, FactorGraph):
        raise GraphError(
            f"compile takes a FactorGraph, found {type(graph).__name__}; for a networkx graph use "
            "FactorGraph.from_networkx(graph, cardinality=...)"
        )
    if len(graph) == 0:
        raise GraphError("the graph has no variables; add some with add_variable or take one from topologies")
    if route not in ("auto", "tree sweep", "chain scan", "clique contraction"):
        raise GraphError(
            f"route must be 'auto', 'tree sweep', 'chain scan' or 'clique contraction', found {route!r}"
        )
    variables, factors = tuple(graph.variables.values()), tuple(graph.factors.values())
    if approximate is not None:
        if not isinstance(approximate, LoopyBeliefPropagation):
            raise GraphError(
                f"approximate must be LoopyBeliefPropagation(...) or None, found {approximate!r}"
            )
        if route != "auto":
            raise GraphError(f"route={route!r} is exact and approximate= is not; leave one of them out")
        roots, why = tuple(part[0] for part in components(graph)), "an approximation, asked for"
        route_name = "loopy belief propagation"
        return ContractionPlan(variables, factors, roots, (), route_name, why, approximation=approximate)
    cycle = find_cycle(graph)
    if cycle is not None and route in ("auto", "clique contraction"):
        reason = f"there are loops, one through {len(cycle) // 2} variables: {', '.join(cycle[:12:2])}"
        return _with_cliques(graph, memory_limit, reason + (", ..." if len(cycle) > 12 else ""))
    if route == "clique contraction":
        return _with_cliques(graph, memory_limit, "asked for; the graph is a forest")
    if cycle is not None:
        raise GraphError(
            f"route={route!r} needs a graph without loops, found one through {', '.join(cycle[:12:2])}; "
            "leave route='auto'"
        )
    roots = choose_roots(graph)
    steps = schedule(graph, root_forest(graph, roots))
    sizes = {v.cardinality for v in graph}
    scannable = len(graph) > 1 and len(sizes) == 1 and is_chain(graph)
    if route == "chain scan":
        if not scannable:
            raise GraphError(
                "route='chain scan' needs one chain of at least two variables with equal cardinalities; "
                "leave route='auto'"
            )
        chosen = str(route)
        reason = "asked for; parallel scan of torch-struct for log_partition, tree sweep otherwise"
    elif not steps:
        chosen, reason = "independent", "no factor joins two variables"
    else:
        chosen, reason = (
            "tree sweep",
            f"a forest of {len(roots)} tree{'s' * (len(roots) > 1)}, {len(steps)} levels deep",
        )
    return ContractionPlan(variables, factors, roots, steps, chosen, reason)


def _with_cliques(graph: FactorGraph, memory_limit: int, reason: str) -> ContractionPlan:
    tree = clique_tree(graph, memory_limit)
    roots = tuple(c.variables[0] for c in reversed(tree.cliques) if c.parent < 0)
    parts = tuple(graph.variables.values()), tuple(graph.factors.values())
    return ContractionPlan(*parts, roots, (), "clique contraction", reason, junction=tree)
