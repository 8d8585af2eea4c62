"""The k most probable assignments where cliques are contracted: the space of assignments, split around each best one.

Once the best assignment of a part of the space is known, what is left of that part is split into n parts: part i
agrees with it in the variables before i and differs from it in variable i (Lawler 1972, "A procedure for computing the
K best solutions"; Nilsson 1998, "An efficient algorithm for finding the M most probable configurations"). The next
best assignment of all is the best one of some part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codd_ppl.inference.clique_queries import decode
from codd_ppl.inference.cliques import Calibration
from codd_ppl.inference.contraction import max_product
from codd_ppl.inference.evidence import add_evidence
from codd_ppl.inference.tables import Key, Tables
from codd_ppl.inference.transforms import transforming

__all__ = ["best_assignments"]

CHUNK = 1 << 22
"""The best assignments of parts are looked for together up to so many entries of cliques."""


def best_assignments(tables: Tables, k: int) -> tuple[dict[str, Tensor], Tensor]:
    """Variable -> values (batch, k), best first, and which of them are possible, (batch, k)."""
    plan, batch, device = tables.plan, tables.batch, tables.device
    cards = torch.tensor([v.cardinality for v in plan.variables], device=device)
    width = int(cards.max())
    each = torch.arange(width, device=device)
    variables = torch.arange(len(cards), device=device)
    # Parts of the space: the values that each variable may have, (parts, batch, variables, values).
    allowed = (each < cards[:, None]).expand(1, batch, -1, -1)
    scores, values = _best(tables, allowed)
    element = torch.arange(batch, device=device)
    found, possible = list[Tensor](), list[Tensor]()
    for rank in range(k):
        place = scores.argmax(0)
        best, part = values[place, element], allowed[place, element]
        found.append(best)
        possible.append(scores[place, element] > -torch.inf)
        if rank == k - 1 or not (transforming() or bool(possible[-1].any())):
            break
        taken = torch.arange(len(scores), device=device)[:, None] == place
        scores = torch.where(taken, -torch.inf, scores)
        chosen = best[..., None] == each  # (batch, variables, values)
        before = (variables[None, :] < variables[:, None])[:, None, :, None]
        here = (variables[None, :] == variables[:, None])[:, None, :, None]
        parts = torch.where(before, chosen & part, torch.where(here, part & ~chosen, part))
        # Where nothing was left, the part is one that was split before. A variable without values leaves none.
        parts = parts & possible[-1][:, None, None]
        if not transforming():
            parts = parts[parts.any(-1).all(-1).any(1)]
        own, values_of = _best(tables, parts)
        scores, values = torch.cat((scores, own)), torch.cat((values, values_of))
        allowed = torch.cat((allowed, parts))
        scores, kept = scores.topk(min(k - rank - 1, len(scores)), dim=0)
        values, allowed = values[kept, element], allowed[kept, element]
    missing = k - len(found)
    ranked = torch.stack([*found, *[torch.zeros_like(found[0])] * missing], 1)
    known = torch.stack([*possible, *[torch.zeros_like(possible[0])] * missing], 1)
    return dict(zip(plan.variable, ranked.unbind(-1), strict=True)), known


def _best(tables: Tables, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Score (parts, batch) and values (parts, batch, variables) of a best assignment of each part; -inf: none."""
    plan = tables.plan
    assert plan.junction is not None
    place = {v.name: i for i, v in enumerate(plan.variables)}
    each = max(1, CHUNK // max(1, tables.batch * plan.junction.largest.entries))
    scores, values = [], []
    for some in allowed.split(each):
        clamped: dict[Key, Tensor] = dict(tables.raw)
        for names in plan.by_cardinality:
            own = some[:, :, [place[v] for v in names], : plan.variable[names[0]].cardinality]
            ruled_out = torch.zeros((), dtype=tables.dtype, device=tables.device).masked_fill(
                ~own, -torch.inf
            )
            ruled_out = ruled_out.reshape(len(some), *tables.batch_shape, *own.shape[2:])
            clamped = add_evidence(plan, clamped, names, ruled_out)
        up = Calibration(Tables(plan, clamped), max_product)
        shape = (len(some), tables.batch)
        scores.append(up.log_partition().expand(up.tables.batch).reshape(shape))
        best = decode(up, 1, lambda log: log.argmax(-1))
        values.append(torch.stack([best[v].reshape(shape) for v in plan.variable], -1))
    if not scores:
        return allowed.new_zeros(allowed.shape[:2], dtype=tables.dtype), allowed.new_zeros(
            allowed.shape[:3], dtype=torch.int64
        )
    return torch.cat(scores), torch.cat(values)
