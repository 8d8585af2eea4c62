"""compile: from a declared graph to a plan."""

from __future__ import annotations

from typing import Literal

from codd_ppl.compiler.elimination import choose_roots, root_forest, schedule
from codd_ppl.compiler.plan import ContractionPlan
from codd_ppl.errors import CyclicGraphError, GraphError
from codd_ppl.graphs import FactorGraph
from codd_ppl.graphs.properties import find_cycle, is_chain

__all__ = ["compile"]


def compile(
    graph: FactorGraph, route: Literal["auto", "tree sweep", "chain scan"] = "auto"
) -> ContractionPlan:
    """Compile a factor graph into an exact contraction plan.

    Belief propagation on a forest (Pearl 1988; Kschischang, Frey and Loeliger 2001, "Factor graphs and the
    sum-product algorithm"): every factor sends one message towards the root, leaves first.

    Args:
        graph: a forest of any shape: mixed cardinalities, latents, ties, factors of any order, isolated variables.
        route: "auto" chooses. "chain scan" asks for torch-struct's parallel scan for log_partition (chains with one
            cardinality only): logarithmic depth for (sites x states^3) work, so worth it on a GPU with few states.

    Returns:
        A frozen, hashable :class:`ContractionPlan`; ``print(plan.explain())`` tells what it will do.

    Raises:
        CyclicGraphError: the graph has a loop; the message names it.
        GraphError: no variables, or "chain scan" asked for a graph that is not such a chain.
    """
    if not isinstance(graph, FactorGraph):
        raise GraphError(
            f"compile takes a FactorGraph, found {type(graph).__name__}; for a networkx graph use "
            "FactorGraph.from_networkx(graph, cardinality=...)"
        )
    if len(graph) == 0:
        raise GraphError("the graph has no variables; add some with add_variable or take one from topologies")
    cycle = find_cycle(graph)
    if cycle is not None:
        path = " - ".join(cycle[:12] + (["..."] if len(cycle) > 12 else [cycle[0]]))
        raise CyclicGraphError(
            f"exact inference here needs a forest, but the graph has a loop of {len(cycle) // 2} variables: {path}. "
            "Remove one of these factors, merge factors over the same variables into one table, "
            "or replace the loop by a latent variable"
        )
    roots = choose_roots(graph)
    steps = schedule(graph, root_forest(graph, roots))
    if route not in ("auto", "tree sweep", "chain scan"):
        raise GraphError(f"route must be 'auto', 'tree sweep' or 'chain scan', found {route!r}")
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
    return ContractionPlan(
        tuple(graph.variables.values()), tuple(graph.factors.values()), roots, steps, chosen, reason
    )
