"""The sweep of :mod:`codd_ppl.inference.path_projection` for large vocabularies, without a graph.

Known tokens are rows of the emission table, which is in linear space already. At each site only the masked rows of the
batch take part in its two products, and what lies between these stays in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codd_ppl.inference.path_model import HiddenMarkov, linear_form, scaled
from codd_ppl.inference.products import times, transposed_times
from codd_ppl.inference.semirings import LogSemiring
from codd_ppl.inference.step_tables import KeptTable
from codd_ppl.inference.tables import Tables
from codd_ppl.typing import Bool, Float, Int

__all__ = ["sweep_tokens", "usable"]

TINY = 1e-7
"""Share of a row of sums, or of a site's probability, that is rounding."""


def usable(
    tables: Tables, model: HiddenMarkov, sites: tuple[str, ...], target: Tensor, first: Tensor | None
) -> bool:
    """Whether :func:`sweep_tokens` may be asked: a large emission table, no other evidence of tokens, no graph."""
    emission, transition = tables.step(model.emission), tables.step(model.transition)
    (run,) = tables.plan.runs
    return (
        isinstance(emission, KeptTable)
        and transition.scale.shape[:2] == (1, 1)
        and tables.layout.shared.issuperset(range(run.start, run.stop))
        and target.numel() > 0
        and target.dtype == tables.dtype
        and not (torch.is_grad_enabled() and (target.requires_grad or tables.differentiable))
        and not (torch.is_grad_enabled() and first is not None and first.requires_grad)
        and not any(v in tables.raw or tables.plan.unary.get(v) for v in sites)
        and all(set(block).isdisjoint(sites) for block in tables.layout.blocks)
    )


def sweep_tokens(
    tables: Tables,
    model: HiddenMarkov,
    target: Float[Tensor, "batch sites vocab"],
    masked: Bool[Tensor, "batch sites"],
    tokens: Int[Tensor, "batch sites"],
    sweeps: int,
    tolerance: float,
    candidates: int | None = None,
    first: Float[Tensor, "batch sites vocab"] | None = None,
) -> Float[Tensor, "batch sites vocab"] | None:
    """Log-weights, 0 where not masked; None where linear space is not safe.

    With f and b the messages from both sides (the latent's evidence in f), P the table, at the masked rows of a site

        c = (f b) P,     log w = log q - log(c / sum c),     message = (q / c) P^T.

    Args:
        tables: the prior, for which :func:`usable` holds.
        model: from :func:`codd_ppl.inference.path_projection.hidden_markov`.
        target: log q.
        masked, tokens: where to project, and the values elsewhere.
        sweeps, tolerance: as in :func:`codd_ppl.inference.projection.project`.
        candidates: as there; only where all masked sites rule out the same tokens, such as the mask, or none.
        first: log-weights to begin with, from :func:`codd_ppl.inference.first_weights.first_weights`; None: all 1.
    """
    emission = tables.step(model.emission)
    assert isinstance(emission, KeptTable)
    table, order, batch = emission.stored[0, 0], model.order, target.shape[0]
    move = linear_form(tables.step(model.transition).log[0, 0].T)
    # The scales of the table depend on the state: they count as the latents' evidence.
    own = linear_form(tables.evidence(model.latents) + emission.scale[:, 0, None], -1)
    latent = own.transpose(0, 1).expand(-1, batch, -1).unbind(0)
    # At masked sites the token may be the mask's number, which has no row.
    known = table[tokens.long().masked_fill(masked, 0)].to(tables.dtype)
    message = torch.where(masked[..., None], emission.sums, known)
    messages = list(message[:, order].unbind(1))
    places = masked[:, order].T.nonzero()
    rows = places[:, 1].split(torch.bincount(places[:, 0], minlength=len(order)).tolist())
    semiring, result = LogSemiring(), torch.empty_like(target)
    result[~masked] = 0.0
    out = None if candidates is None else _ruled_out(target, masked)
    fit: _Candidates | _Whole = _Whole(table)
    if candidates is not None and out is not None and candidates < target.shape[-1] - len(out):
        fit = _Candidates(emission.by_child, emission.sums, candidates, out)
    if first is not None:
        for k, site in enumerate(order):
            if len(rows[k]):
                new = fit.begin(target[rows[k], site], first[rows[k], site])
                semiring.watch(new.amin() / max(table.shape))
                messages[k] = messages[k].index_copy(0, rows[k], new)
        result = first.clone()
    for sweep in range(sweeps):
        right, least, change = [torch.ones_like(latent[0])] * len(order), list[Tensor](), 0.0
        for k in range(len(order) - 1, 0, -1):
            right[k - 1] = scaled(latent[k] * right[k] * messages[k]) @ move.T
        left = latent[0]
        for k, site in enumerate(order):
            least += [left.amin(), right[k].amin()]
            if len(rows[k]):
                weight, new, smallest = fit(target[rows[k], site], (left * right[k])[rows[k]])
                least.append(smallest)
                messages[k] = new if len(new) == batch else messages[k].index_copy(0, rows[k], new)
                if (sweep or first is not None) and tolerance > 0:
                    gap = weight - result[rows[k], site]
                    change = max(change, float(torch.where(torch.isfinite(gap), gap, 0.0).abs().amax()))
                result[rows[k], site] = weight
            least.append(messages[k].amin())
            if k + 1 < len(order):
                left = (scaled(left * messages[k]) @ move) * latent[k + 1]
        semiring.watch(torch.stack(least).amin() / max(table.shape))
        if not semiring.safe():
            return None
        if (sweep or first is not None) and tolerance > 0 and change <= tolerance:
            break
    return result


def _ruled_out(target: Tensor, masked: Tensor) -> Tensor | None:
    """The tokens that all masked sites rule out, or None where some rule out others."""
    if bool((target.amin(-1)[masked] > -torch.inf).all()):
        return torch.empty(0, dtype=torch.int64, device=target.device)
    dead = (target == -torch.inf)[masked]
    return dead[0].nonzero()[:, 0] if bool((dead == dead[0]).all()) else None


class _Whole:
    """All tokens of a site: log-weights, the message that goes on, and the smallest cavity."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def begin(self, log_q: Tensor, weight: Tensor) -> Tensor:
        """The message (rows, states) of log-weights (rows, vocab), which are used up."""
        return times(weight.sub_(weight.amax(-1, keepdim=True)).exp_(), self.table)

    def __call__(self, log_q: Tensor, belief: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``log_q`` (rows, vocab), which is used up, and the latents' belief (rows, states)."""
        cavity = transposed_times(belief, self.table)
        least = cavity.amin()
        message = times(log_q.exp().div_(cavity), self.table)
        return log_q.sub_(cavity.div_(cavity.sum(-1, keepdim=True)).log_()), message, least


class _Candidates:
    """The likeliest tokens of each row one by one, the others as one token whose row of the table is what is left.

    Among the others the weight is constant: they have the network's probability together, in the prior's proportions.
    Tokens that are ruled out at every site are not among them; their weight is 0.
    """

    def __init__(self, table: Tensor, sums: Tensor, count: int, out: Tensor) -> None:
        self.table, self.sums, self.count, self.out = table, sums, count, out
        self.left = sums - table[out].to(sums.dtype).sum(0) if len(out) else sums
        self.rounding = TINY * sums
        self._room = table.new_empty(
            0, table.shape[1]
        )  # fresh memory for the rows would cost more than reading them

    def _rows(self, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows of the table (rows, candidates, states), and what is left of it (rows, states)."""
        if len(self._room) < index.numel():
            self._room = self.table.new_empty(index.numel(), self.table.shape[1])
        rows = torch.index_select(self.table, 0, index.flatten(), out=self._room[: index.numel()])
        chosen = rows.view(*index.shape, -1).to(dtype)
        # What is left may be nothing but the rounding of these sums.
        return chosen, (self.left - chosen.sum(1)).clamp(min=0) + self.rounding

    def begin(self, log_q: Tensor, weight: Tensor) -> Tensor:
        """The message (rows, states) of log-weights (rows, vocab), those of the others averaged."""
        index = log_q.topk(self.count, sorted=False).indices
        top, others = weight.gather(-1, index), log_q.shape[-1] - self.count - len(self.out)
        weight = weight.index_fill(-1, self.out, 0.0)
        mean = (weight.sum(-1, keepdim=True) - top.sum(-1, keepdim=True)) / others
        highest = torch.maximum(top.amax(-1, keepdim=True), mean)
        chosen, tail = self._rows(index, log_q.dtype)
        return ((top - highest).exp()[:, None] @ chosen)[:, 0] + (mean - highest).exp() * tail

    def __call__(self, log_q: Tensor, belief: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        top, index = log_q.topk(self.count, sorted=False)
        chosen, tail = self._rows(index, belief.dtype)
        share = top.exp()
        rest = (1 - share.sum(-1, keepdim=True)).clamp(min=TINY)
        cavity = (belief[:, None] @ chosen.mT)[:, 0]
        other = (belief * tail).sum(-1, keepdim=True)
        message = ((share / cavity)[:, None] @ chosen)[:, 0] + rest / other * tail
        total = (belief @ self.sums).log()[:, None]
        weight = (rest.log() - other.log() + total).expand(log_q.shape)
        weight = weight.scatter(-1, index, top - cavity.log() + total).index_fill_(-1, self.out, -torch.inf)
        return weight, message, torch.minimum(cavity.amin(), other.amin())
