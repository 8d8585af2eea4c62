"""Layer 2, compile: from a factor graph to a frozen plan of contractions."""

from codd_ppl.compiler.approximation import LoopyBeliefPropagation
from codd_ppl.compiler.junction import Clique, CliqueTree, Contraction
from codd_ppl.compiler.lower import compile
from codd_ppl.compiler.plan import ContractionPlan, Message, Step

__all__ = [
    "Clique",
    "CliqueTree",
    "Contraction",
    "ContractionPlan",
    "LoopyBeliefPropagation",
    "Message",
    "Step",
    "compile",
]
