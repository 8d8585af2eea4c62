"""The chain scan: torch-struct's parallel scan behind guards, for chains with few states.

The only file that imports torch_struct. Its traps (log-zero is -1e5, one batch dimension, at least two sites,
requires_grad set on its input, -1e9 for infeasible chains) stay in here: potentials are reshaped and cloned, and
anything that is not finite and moderate takes the tree sweep instead.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from codd_ppl.inference.tables import Tables
from codd_ppl.typing import Float

__all__ = ["edge_potentials", "log_partition", "torch_struct_crf", "usable"]

LARGEST = 1e4
"""Log-potentials beyond this size are left to the tree sweep: torch-struct's zero is exp(-1e5)."""


def usable(tables: Tables) -> bool:
    """True when the plan asks for the chain scan and torch-struct is right on these potentials."""
    if tables.plan.route != "chain scan" or not tables.raw:
        return False
    return all(bool((t.detach().abs() <= LARGEST).all()) for t in tables.raw.values())


def edge_potentials(tables: Tables) -> Float[Tensor, "batch edges states states"]:
    """Edges in path order with the unary evidence folded in, indexed [next value, value] as torch-struct wants it."""
    plan = tables.plan
    edges = []
    for index in range(len(plan.steps) - 1, -1, -1):  # from the root outwards
        (message,) = plan.steps[index].messages
        child = tables.evidence(message.children)[:, 0]
        table = tables.step(index).log[:, 0] + child[:, :, None]
        if index == len(plan.steps) - 1:
            table = table + tables.evidence((message.parent,))
        edges.append(table)
    stacked = torch.stack(torch.broadcast_tensors(*edges), dim=1)
    return stacked.expand(tables.batch, *stacked.shape[1:])


def log_partition(tables: Tables) -> Float[Tensor, "*batch"]:
    """log Z by a scan of logarithmic depth, O(sites states^3) work (Rush 2020, arXiv:2002.00876)."""
    from torch_struct import LinearChain, LogSemiring

    edges = edge_potentials(tables)
    if tables.batch == 0:
        return edges.new_zeros(tables.batch_shape)
    # sum() sets requires_grad on what it gets, so it gets a tensor of its own
    own = edges.clone() if edges.requires_grad else edges.detach().clone()
    total: Tensor = LinearChain(LogSemiring).logpartition(own)[0][0]
    if not edges.requires_grad:
        total = total.detach()
    return total.reshape(tables.batch_shape)


def torch_struct_crf(edges: Float[Tensor, "batch edges states states"]) -> Any:
    """torch-struct's own distribution of a chain, traps and all, to compare with: edges are [next value, value]."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not define `arg_constraints`", UserWarning)
        from torch_struct import LinearChainCRF

        return LinearChainCRF(edges)
