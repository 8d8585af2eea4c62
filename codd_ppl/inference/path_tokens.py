"""The sweep of :mod:`codd_ppl.inference.path_projection` for large vocabularies, without a graph.

Known tokens are rows of the emission table, which is in linear space already. At each site only the masked rows of the
batch take part in its two products, and what lies between these stays in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codd_ppl.inference.path_candidates import Candidates, PathMessages, ruled_out, sweep_candidates
from codd_ppl.inference.path_model import HiddenMarkov, linear_form, scaled
from codd_ppl.inference.products import times, transposed_times
from codd_ppl.inference.semirings import LogSemiring
from codd_ppl.inference.step_tables import KeptTable
from codd_ppl.inference.tables import Tables, index
from codd_ppl.typing import Bool, Float, Int

__all__ = ["sweep_tokens", "usable"]


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

    With candidates it is the sweep of :mod:`codd_ppl.inference.path_candidates`.

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
    latents = own.transpose(0, 1).expand(-1, batch, -1)
    # At masked sites the token may be the mask's number, which has no row.
    known = table[tokens.long().masked_fill(masked, 0)].to(tables.dtype)
    message = torch.where(masked[..., None], emission.sums, known)
    messages = list(message[:, order].unbind(1))
    places = masked[:, order].T.nonzero()
    rows = places[:, 1].split(torch.bincount(places[:, 0], minlength=len(order)).tolist())
    out = None if candidates is None else ruled_out(target, masked)
    if (
        candidates is not None
        and out is not None
        and candidates < target.shape[-1] - len(out)
        and len(places)
    ):
        where = places[:, 1] * len(order) + index(order, target.device)[places[:, 0]]
        few = Candidates(emission.by_child, emission.sums, candidates, out, target, where, rows)
        return sweep_candidates(PathMessages(rows, latents, move, messages), few, sweeps, tolerance, first)
    semiring, result, latent, fit = LogSemiring(), torch.empty_like(target), latents.unbind(0), _Whole(table)
    result[~masked] = 0.0
    if first is not None:
        for k, site in enumerate(order):
            if len(rows[k]):
                new = fit.begin(first[rows[k], site])
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


class _Whole:
    """All tokens of a site: log-weights, the message that goes on, and the smallest cavity."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def begin(self, weight: Tensor) -> Tensor:
        """The message (rows, states) of log-weights (rows, vocab), which are used up."""
        return times(weight.sub_(weight.amax(-1, keepdim=True)).exp_(), self.table)

    def __call__(self, log_q: Tensor, belief: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``log_q`` (rows, vocab), which is used up, and the latents' belief (rows, states)."""
        cavity = transposed_times(belief, self.table)
        least = cavity.amin()
        message = times(log_q.exp().div_(cavity), self.table)
        return log_q.sub_(cavity.div_(cavity.sum(-1, keepdim=True)).log_()), message, least
