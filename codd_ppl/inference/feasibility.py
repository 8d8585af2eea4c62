"""Feasibility: whether some assignment is possible, and where the log-potentials contradict each other if not."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from codd_ppl.errors import InfeasibleError
from codd_ppl.inference.semirings import MaxSemiring
from codd_ppl.inference.tables import Tables
from codd_ppl.inference.transforms import transforming
from codd_ppl.inference.tree import Upward

__all__ = ["require_feasible"]

SHOWN = 6
"""So many names are listed in a message."""


def require_feasible(tables: Tables, total: Tensor) -> None:
    """Check that every log-partition is above -inf.

    Args:
        tables: the log-potentials.
        total: their log-partition, (batch or 1).

    Raises:
        InfeasibleError: one isn't; the message names batch elements, the place where the evidence of one subtree
            leaves nothing possible, and the variables with hard evidence there.
    """
    if transforming():
        return
    full = (total == -torch.inf).expand(tables.batch)
    if not bool(full.any()):
        return
    dead = full.reshape(tables.batch_shape).nonzero().tolist()
    index = f"batch element {tuple(dead[0])}" if tables.batch_shape else "the evidence"
    more = f" and {len(dead) - 1} more" if len(dead) > 1 else ""
    element = int(full.nonzero()[0])
    place, variables = _contradiction(tables, element)
    hard = [v for v in variables if bool(_impossible(tables.evidence((v,)), element).any())]
    raise InfeasibleError(
        f"{index}{more} has probability zero: no assignment is possible. The contradiction shows at {place}; "
        f"variables from there to the leaves: {_listed(variables)}; with -inf in their evidence: {_listed(hard)}. "
        "Relax the evidence, or give the factors over these variables finite entries where they are -inf"
    )


def _contradiction(tables: Tables, element: int) -> tuple[str, list[str]]:
    """The factor or variable closest to the leaves that leaves nothing possible, and the variables it depends on."""
    plan = tables.plan
    with torch.no_grad():
        up = Upward(tables, MaxSemiring())
    for index, step in enumerate(plan.steps):
        for c, beliefs in enumerate(up.children(index)):
            for g in _impossible(beliefs, element).all(-1).nonzero().flatten().tolist():
                name = step.messages[g].children[c]
                return f"variable {name!r}", _below(tables, [name])
        for g in _impossible(up.message(index), element).all(-1).nonzero().flatten().tolist():
            factor = plan.factor[step.messages[g].factor]
            tie = f" (tie {factor.tie!r})" if factor.tie is not None else ""
            below = _below(tables, list(step.messages[g].children))
            return f"factor {factor.name!r}{tie}", [step.messages[g].parent, *below]
    dead = (r for r in plan.roots if bool(_impossible(up.belief(r), element).all()))
    root = next(dead, plan.roots[0])
    return f"variable {root!r}", _below(tables, [root])


def _impossible(value: Tensor, element: int) -> Tensor:
    """Where one batch element of a (batch or 1, ...) tensor is -inf."""
    return value[element if value.shape[0] > 1 else 0] == -torch.inf


def _below(tables: Tables, names: list[str]) -> list[str]:
    """The variables and everything below them, nearest first."""
    found, queue = list[str](), deque(names)
    while queue:
        name = queue.popleft()
        found.append(name)
        for s, g in tables.plan.below[name]:
            queue.extend(tables.plan.steps[s].messages[g].children)
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "") if names else "none"
