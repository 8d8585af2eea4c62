"""Coupled discrete diffusion: language models that draw tokens jointly, as a probabilistic program."""

from typing import TYPE_CHECKING

from codd_ppl import constraints
from codd_ppl.compiler import compile
from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.distributions import CoupledCategorical
from codd_ppl.graphs import FactorGraph, topologies
from codd_ppl.sampling import Sampler
from codd_ppl.spanning_tree_coupling import MaximumTreeCoupling, SpanningTreeCoupling

if TYPE_CHECKING:
    from codd_ppl.training import CoDDModule, TextDataModule

__version__ = "0.1.0"

__all__ = [
    "FactorGraph",
    "topologies",
    "compile",
    "CouplingLayer",
    "CoupledCategorical",
    "SpanningTreeCoupling",
    "MaximumTreeCoupling",
    "CoDDModule",
    "TextDataModule",
    "Sampler",
    "constraints",
    "BidirectionalTransformer",
    "__version__",
]


def __getattr__(name: str) -> object:
    """CoDDModule and TextDataModule load with their first use, since Lightning is slow to import (PEP 562)."""
    if name in ("CoDDModule", "TextDataModule"):
        from codd_ppl import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
