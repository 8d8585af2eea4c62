"""The straightforward torch code for the two other layouts: evidence over a vocabulary, and trees."""

from __future__ import annotations

import torch
from torch import Tensor

from codd_ppl.evaluation.benchmark import plain
from codd_ppl.evaluation.benchmark.cases import Inputs

__all__ = ["tokens_log_partition", "tokens_sample", "tree_log_partition"]


def tokens_log_partition(inputs: Inputs, emission: Tensor | None = None) -> Tensor:
    """log Z of a hidden Markov model with evidence over a vocabulary, (batch).

    ``emission``: exp of the emission table, (states, vocab), where it is at hand already.
    """
    evidence, scales = _absorb(inputs, emission)[:2]
    small = Inputs(inputs.case, inputs.table, evidence.log())
    return plain.log_partition(small) + scales.sum(1)


def _absorb(inputs: Inputs, emission: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Evidence over the states, its log scales (batch, sites), exp of the token evidence and of the emissions."""
    assert inputs.unary is not None and inputs.emission is not None
    emission = inputs.emission.exp() if emission is None else emission
    top = inputs.unary.amax(-1, keepdim=True)
    weights = (inputs.unary - top).exp()
    evidence = weights.flatten(0, 1) @ emission.T
    return evidence.unflatten(0, weights.shape[:2]), top[..., 0].clone(), weights, emission


def tokens_sample(inputs: Inputs, emission: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One exact draw of the states and of the tokens, (batch, sites) each."""
    evidence, _, weights, emission = _absorb(inputs, emission)
    states = plain.sample(Inputs(inputs.case, inputs.table, evidence.log()))[0]
    uniform = torch.rand(states.shape, dtype=weights.dtype)
    return states, plain.invert(weights * emission[states], uniform)


def tree_log_partition(inputs: Inputs) -> Tensor:
    """log Z of a tree with a table for each edge, (batch): one matrix product for each edge, leaves first."""
    beliefs: list[Tensor | None] = [None] * inputs.case.sites
    scales, tables = list[Tensor](), inputs.table.exp().unbind(1)
    for site in range(inputs.case.sites - 1, 0, -1):  # a parent comes before its children
        belief, parent = beliefs[site], inputs.parents[site]
        table = tables[site - 1]
        message = table.sum(-1) if belief is None else torch.bmm(table, belief[..., None])[..., 0]
        scale = message.sum(-1, keepdim=True)
        scales.append(scale)
        own, message = beliefs[parent], message / scale
        beliefs[parent] = message if own is None else own * message
    root = beliefs[0]
    assert root is not None
    return torch.cat([*scales, root.sum(-1, keepdim=True)], dim=1).log().sum(1)
