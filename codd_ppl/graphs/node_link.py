"""Factor graphs as JSON values, in networkx's node-link form."""

from __future__ import annotations

from typing import Any

import networkx as nx

from codd_ppl.graphs.factor_graph import FactorGraph

__all__ = ["graph_from_json", "graph_to_json"]


def graph_to_json(graph: FactorGraph) -> dict[str, Any]:
    """As networkx writes node-link data."""
    found: dict[str, Any] = nx.node_link_data(graph.to_networkx(), edges="edges")
    return found


def graph_from_json(data: dict[str, Any]) -> FactorGraph:
    """The same back; JSON turned node names and scopes into lists, networkx wants tuples."""
    nodes = [{k: tuple(v) if isinstance(v, list) else v for k, v in node.items()} for node in data["nodes"]]
    edges = [{k: tuple(v) if isinstance(v, list) else v for k, v in edge.items()} for edge in data["edges"]]
    return FactorGraph.from_networkx(
        nx.node_link_graph({**data, "nodes": nodes, "edges": edges}, edges="edges")
    )
