"""Layer 2, compile: from a factor graph to a frozen plan of contractions."""

from codd_ppl.compiler.lower import compile
from codd_ppl.compiler.plan import ContractionPlan, Message, Step

__all__ = ["ContractionPlan", "Message", "Step", "compile"]
