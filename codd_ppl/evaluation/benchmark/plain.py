"""The straightforward torch code: scaled probabilities along a chain (Rabiner 1989), autograd for gradients.

This is what one would write in a script, written well: exponentials once, evidence and tables taken apart by
``unbind`` (autograd through ``table[:, t]`` writes the whole gradient once for each edge, 40 times slower at 128
sites and 128 states), normalisers collected and summed once. It is the bar that `codd_ppl.inference` is measured
by, and it is wrong (NaN or -inf) where log-potentials spread over more than about 88 nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codd_ppl.evaluation.benchmark.cases import Inputs

__all__ = ["forward_backward", "gradient", "log_partition", "mode", "sample"]


def log_partition(inputs: Inputs, stream: bool = False) -> Tensor:
    """log Z of a chain, (batch). ``stream``: take the exponential of each edge's table when its turn comes."""
    last, scales = forward(inputs, stream)[:2]
    return torch.cat([*scales, last[-1].sum(-1, keepdim=True)], dim=1).log().sum(1)


def forward(inputs: Inputs, stream: bool = False) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Filtered vectors (batch, states) of all sites, the sums divided out (batch, 1), and the tables.

    The tables are linear, or as they came if ``stream``.
    """
    a, alphas, scales = None, list[Tensor](), list[Tensor]()
    if inputs.unary is not None:
        rows, table = inputs.unary.exp().unbind(1), inputs.table.exp()
        for row in rows:
            a = row if a is None else a @ table * row
            scale = a.sum(-1, keepdim=True)
            a = a / scale
            alphas.append(a)
            scales.append(scale)
        return alphas, scales, [table]
    tables = list((inputs.table if stream else inputs.table.exp()).unbind(1))
    a = torch.ones(tables[0].shape[:2], dtype=inputs.table.dtype)
    alphas.append(a)
    for table in tables:
        a = torch.bmm(a[:, None], table.exp() if stream else table)[:, 0]
        scale = a.sum(-1, keepdim=True)
        a = a / scale
        alphas.append(a)
        scales.append(scale)
    return alphas, scales, tables


def gradient(inputs: Inputs, stream: bool = False) -> tuple[Tensor, ...]:
    """Gradients of the sum of log Z by autograd; ``inputs`` must require them. They are marginals and counts."""
    total = log_partition(inputs, stream).sum()
    return torch.autograd.grad(total, inputs.leaves)


def forward_backward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Marginals of sites (batch, sites, states) and of edges, by the explicit recursion and no autograd.

    Edges: (batch, states, states) summed over a shared table's edges, else (batch, sites - 1, states, states).
    """
    alphas, _, tables = forward(inputs)
    shared = inputs.unary is not None
    rows = inputs.unary.exp().unbind(1) if inputs.unary is not None else ()
    back = tables[0].T.contiguous() if shared else tables[0]
    b = torch.ones_like(alphas[0])
    betas, right = [b], []
    for t in range(len(alphas) - 2, -1, -1):
        r = rows[t + 1] * b if shared else b
        b = r @ back if shared else torch.bmm(tables[t], r[..., None])[..., 0]
        scale = b.sum(-1, keepdim=True)
        b = b / scale
        betas.append(b)
        right.append(r)
    sites = torch.stack(alphas, 1) * torch.stack(betas[::-1], 1)
    if not shared:
        edges = torch.stack(
            [a[..., None] * p * r[:, None] for a, p, r in zip(alphas, tables, right[::-1], strict=False)], 1
        )
        edges /= edges.sum((-1, -2), keepdim=True)
        return sites / sites.sum(-1, keepdim=True), edges
    left, outer = torch.stack(alphas[:-1], 1), torch.stack(right[::-1], 1)
    weight = (left @ tables[0] * outer).sum(-1, keepdim=True)
    counts = (left / weight).mT @ outer * tables[0]
    return sites / sites.sum(-1, keepdim=True), counts


def mode(inputs: Inputs) -> Tensor:
    """The most probable values, (batch, sites), by the Viterbi recursion in log space."""
    if inputs.unary is not None:
        rows, tables = inputs.unary.unbind(1), (inputs.table,) * (inputs.case.sites - 1)
        score = rows[0]
    else:
        rows, tables = (), inputs.table.unbind(1)
        score = torch.zeros(tables[0].shape[:2], dtype=inputs.table.dtype)
    back = []
    for t, table in enumerate(tables):
        score, index = (score[..., None] + table).max(1)
        if rows:
            score = score + rows[t + 1]
        back.append(index)
    path = [score.argmax(-1, keepdim=True)]
    for index in reversed(back):
        path.append(index.gather(1, path[-1]))
    return torch.cat(path[::-1], 1)


def sample(inputs: Inputs, draws: int = 1) -> Tensor:
    """Exact draws, (draws, batch, sites): filter forward, draw backward by inverting cumulative sums."""
    alphas, _, tables = forward(inputs)
    shape = (len(alphas), draws, alphas[0].shape[0])
    uniform = torch.rand(shape, dtype=alphas[0].dtype).unbind(0)
    if inputs.unary is not None:
        columns, batch = tables[0].T.contiguous(), None
    else:
        columns, batch = tables[0], torch.arange(shape[2])
    value = invert(alphas[-1].expand(draws, -1, -1), uniform[-1])
    path = [value]
    for t in range(len(alphas) - 2, -1, -1):
        row = columns[value] if batch is None else tables[t][batch, :, value]
        value = invert(alphas[t] * row, uniform[t])
        path.append(value)
    return torch.stack(path[::-1], -1)


def invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """One draw per row of unnormalised weights (*rows, n), for uniform numbers (*rows)."""
    cumulative = weights.cumsum(-1)
    target = (uniform * cumulative[..., -1])[..., None]
    return torch.searchsorted(cumulative, target, right=True)[..., 0].clamp_(max=weights.shape[-1] - 1)
