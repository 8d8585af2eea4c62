"""Layer 1, declare: factor graphs on networkx, without torch."""

from codd_ppl.graphs import properties, topologies
from codd_ppl.graphs.drawing import draw
from codd_ppl.graphs.factor_graph import Factor, FactorGraph, Variable

__all__ = ["Factor", "FactorGraph", "Variable", "draw", "properties", "topologies"]
