"""The projected coupling: borrow the prior's dependence, keep the network's marginals (DESIGN section 3).

Among all joint distributions over the masked sites whose single-site marginals are q_1, .., q_n, the one closest
in KL to the prior p(x) has the form

    p*(x) = 1/Z  prod_i w_i(x_i)  p(x)

(Csiszar 1975, "I-divergence geometry"). Iterative proportional fitting finds w one site at a time: the cavity

    cav_i(x_i) = sum over everything else of p(x) prod_{j != i} w_j(x_j)

is read off the messages that meet at site i, and w_i = q_i / cav_i makes its marginal exactly q_i. Sites are
visited along a depth-first walk over the tree, so that every message is up to date when it is used and a sweep
costs about as much as one forward and one backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.errors import ConfigError, PotentialsError
from codd_ppl.inference import clique_projection, loopy, path_tokens
from codd_ppl.inference.first_weights import first_weights
from codd_ppl.inference.hidden_path import HiddenPath
from codd_ppl.inference.hidden_projection import project_path
from codd_ppl.inference.path_model import HiddenMarkov, hidden_markov
from codd_ppl.inference.path_projection import sweep_path
from codd_ppl.inference.semirings import LogSemiring
from codd_ppl.inference.tables import Tables
from codd_ppl.inference.transforms import transforming
from codd_ppl.inference.tree import Upward
from codd_ppl.inference.tree_walk import TreeWalk, walk
from codd_ppl.typing import Bool, Float, Int, LogPotentials

__all__ = ["broadcasts", "project", "walk"]


def project(
    plan: ContractionPlan,
    log_potentials: LogPotentials,
    sites: Sequence[str],
    log_targets: Float[Tensor, "*batch sites vocab"],
    masked: Bool[Tensor, "*batch sites"],
    sweeps: int = 1,
    tolerance: float = 0.0,
    tokens: Int[Tensor, "*batch sites"] | None = None,
    candidates: int | None = None,
    start: Float[Tensor, "*batch sites vocab"] | None = None,
    compiled: bool = True,
) -> Float[Tensor, "*batch sites vocab"]:
    """Log-weights w that give the masked sites the target marginals (I-projection of the prior).

    Args:
        plan, log_potentials: the prior p(x), with known tokens clamped as evidence unless ``tokens`` are given;
            batch shapes broadcast to that of ``log_targets``.
        sites: variables in the order of the site dimension.
        log_targets: normalised log q_i; -inf is legal.
        masked: where to project; other sites get weight 0.
        sweeps: passes over the sites; each further one shrinks the error of the marginals, about by half where the
            prior disagrees with the targets (tests/benchmarks/sweeps.md).
        tolerance: stop early when no log-weight changed by more than this in a sweep (0: never).
        tokens: clamp the sites that are not masked to these values; evidence of the sites is then read only from
            one key, the tuple of all of them.
        candidates: an approximation for large vocabularies: only so many of the likeliest tokens of a site get the
            network's probabilities, the others together theirs, in the prior's proportions, so that each site costs
            candidates and not vocab rows of the emission table. The law stays proper over the whole vocabulary. It is
            used along hidden Markov models with a large emission table where all sites rule out the same tokens, such
            as the mask, or none; else all are fitted.
        start: log w to begin with, read at masked sites only; None: w = 1 there. The fixed point is the same. It costs
            a (vocab x states) product for each masked site, as one of the two of a sweep (with ``candidates``:
            candidates rows; the others together begin at the geometric mean of their weights), and in return the first
            sweep has a residual, so that ``tolerance`` can end after it.
        compiled: False leaves out the compiled passes, for a caller whose own :class:`HiddenPath` declined.

    Returns:
        log w, zero at sites that are not masked; -inf where the network or the prior rules a token out.

    Raises:
        ConfigError: sweeps or candidates < 1.
        ShapeError: a start of another shape than the targets.
        PotentialsError: malformed log-potentials, or a start that is NaN or +inf at a masked site.
        IntractableError: the plan is an approximation.
    """
    loopy.require_exact(plan, "project")
    if sweeps < 1:
        raise ConfigError(f"sweeps must be at least 1, found {sweeps}")
    if candidates is not None and candidates < 1:
        raise ConfigError(f"candidates must be at least 1, or None for all tokens, found {candidates}")
    batch_shape, names = tuple(log_targets.shape[:-2]), tuple(sites)
    first = None if start is None else first_weights(start, log_targets, masked)
    tables = Tables(plan, log_potentials)
    model = None if transforming() or plan.junction is not None else hidden_markov(plan, names)
    shared = tables.batch_shape in ((), batch_shape)
    if model is not None and shared:
        settings = (sweeps, tolerance, candidates, first, compiled)
        found = _along_path(tables, model, log_potentials, names, log_targets, masked, tokens, *settings)
        if found is not None:
            return found.reshape(log_targets.shape)
    if tokens is not None:
        values = torch.arange(log_targets.shape[-1], device=log_targets.device)
        clash = ~masked[..., None] & (values != tokens[..., None])
        evidence = torch.where(clash, -torch.inf, log_potentials.get(names, torch.zeros_like(log_targets)))
        log_potentials = {**log_potentials, names: evidence}
        tables = Tables(plan, log_potentials)
    if not broadcasts(tables.batch_shape, batch_shape):
        raise PotentialsError(
            f"the prior's batch shape {tables.batch_shape} must broadcast to that of the targets, {batch_shape}"
        )
    if tables.batch_shape != batch_shape:
        widened = {k: _widen(v, len(tables.shapes[k]), batch_shape) for k, v in log_potentials.items()}
        tables, log_potentials = Tables(plan, widened), widened
    count, vocab = log_targets.shape[-2:]
    target = log_targets.reshape(-1, count, vocab)
    flat = masked.expand(*batch_shape, count).reshape(-1, count)
    begun, begin = tables, None
    if first is not None:
        begin = first.reshape(target.shape)
        begun = Tables(plan, {**log_potentials, names: log_potentials.get(names, 0.0) + first})
    what = (sites, target, flat, begin, sweeps, tolerance)
    if plan.junction is not None:
        return clique_projection.fit(tables, begun, *what).reshape(*batch_shape, count, vocab)
    weights = None if model is None else sweep_path(tables, model, *what)
    if weights is None and model is None and not transforming():
        weights = _sweeps(tables, begun, *what, fast=True)
    if weights is None:
        weights = _sweeps(tables, begun, *what, fast=False)
    assert weights is not None
    return weights.reshape(*batch_shape, count, vocab)


def _along_path(
    tables: Tables,
    model: HiddenMarkov,
    log_potentials: LogPotentials,
    names: tuple[str, ...],
    log_targets: Tensor,
    masked: Tensor,
    tokens: Tensor | None,
    sweeps: int,
    tolerance: float,
    candidates: int | None,
    first: Tensor | None,
    compiled: bool,
) -> Tensor | None:
    """Log-weights by the routes for hidden Markov models without a graph: compiled for small vocabularies, over the

    masked rows alone for large ones. None where neither serves.
    """
    whole, vocab = log_targets.shape[:-1], log_targets.shape[-1]
    hidden = masked.expand(whole)
    value = None if tokens is None else tokens.expand(whole)
    fitted = None
    if compiled:
        rest = {key: table for key, table in log_potentials.items() if key != names}
        evidence = log_potentials.get(names)
        evidence = None if evidence is None else evidence.expand(log_targets.shape)
        path = HiddenPath.of(tables.plan, rest, names, evidence, value, ~hidden)
        if path is not None:
            target = log_targets.masked_fill(~hidden[..., None], 0.0)
            fitted = project_path(path, target, sweeps, tolerance, first)
    if fitted is not None:
        return fitted.log_weights
    if value is None or not path_tokens.usable(tables, model, names, log_targets, first):
        return None
    target = log_targets.reshape(-1, len(names), vocab)
    hidden, value = (t.reshape(-1, len(names)) for t in (hidden, value))
    begin = None if first is None else first.reshape(target.shape)
    return path_tokens.sweep_tokens(
        tables, model, target, hidden, value, sweeps, tolerance, candidates, begin
    )


def broadcasts(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether a shape broadcasts to a full one, which stays as it is."""
    pairs = zip(reversed(shape), reversed(full), strict=False)
    return len(shape) <= len(full) and all(n in (1, m) for n, m in pairs)


def _widen(value: Tensor, event: int, batch_shape: tuple[int, ...]) -> Tensor:
    """Give batched tensors the full batch shape; unbatched ones stay as they are."""
    return value if value.dim() == event else value.expand(*batch_shape, *value.shape[value.dim() - event :])


def _sweeps(
    tables: Tables,
    begun: Tables,
    sites: Sequence[str],
    target: Tensor,
    masked: Tensor,
    first: Tensor | None,
    sweeps: int,
    tolerance: float,
    fast: bool,
) -> Tensor | None:
    """Log-weights, or None when the fast route was not safe; ``begun`` is the prior with the first weights."""
    semiring = LogSemiring(fast)
    state = TreeWalk(Upward(begun, semiring), tables, sites, target, masked, first, semiring)
    moves = walk(tables.plan)
    last = max((i for i, m in enumerate(moves) if m[0] == "visit"), default=-1) + 1
    for sweep in range(sweeps):
        state.residual = None
        state.run(moves[:last])
        # From w = 1 only tokens that are visited twice have a residual at first: it says nothing about the rest.
        telling = tolerance > 0 and (sweep > 0 or first is not None)
        if telling and state.residual is not None and float(state.residual) <= tolerance:
            break
        if sweep + 1 < sweeps:
            state.run(moves[last:])
    if not semiring.safe():
        return None
    weights = torch.stack([state.weights[name].expand(target.shape[0], -1) for name in sites], dim=1)
    return torch.where(masked[..., None], weights, 0.0)
