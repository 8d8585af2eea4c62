"""Calibration of a clique tree: messages over the separators, leaves to roots and back (Shafer and Shenoy 1990).

Nothing is ever divided out: a message or marginal is the product of everything that meets at a clique but the table
or message that it is for. So an impossible entry stays -inf exactly, in values and in gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codd_ppl.compiler import Clique, CliqueTree, Contraction, ContractionPlan
from codd_ppl.compiler.junction import Term
from codd_ppl.errors import PotentialsError
from codd_ppl.inference.contraction import Contract, max_product, sum_product, top
from codd_ppl.inference.semirings import log_normalized
from codd_ppl.inference.tables import Tables
from codd_ppl.inference.transforms import transforming

__all__ = ["Calibration", "contradiction", "require_proper", "tree_of"]


def tree_of(plan: ContractionPlan) -> CliqueTree:
    """The plan's clique tree."""
    assert plan.junction is not None
    return plan.junction


def require_proper(tables: Tables) -> None:
    """Raise PotentialsError where a log-potential is NaN or +inf."""
    if transforming():
        return
    tops = [t.detach().amax().to(tables.dtype) for t in tables.raw.values() if t.numel()]
    if tops and not bool((torch.stack(tops) < torch.inf).all()):
        raise PotentialsError(
            f"log_potentials must be finite or -inf: {tables.bad_entries()}. "
            "-inf means impossible; replace NaN and +inf before the call"
        )


class Calibration:
    """Messages of a clique tree: upward at once, downward with :meth:`run`.

    Attributes:
        ups: message of each clique to its parent, (batch or 1, *separator), its largest entry scaled to 1.
        offsets: the log scale that was taken out of each, (batch or 1).
        downs: message to each clique from its parent, up to a constant.
    """

    def __init__(self, tables: Tables, contract: Contract = sum_product) -> None:
        self.tables, self.plan, self.contract = tables, tables.plan, contract
        self.tree = tree_of(tables.plan)
        self.evidence: dict[str, Tensor] = {}
        for names in self.plan.by_cardinality:
            self.evidence.update(zip(names, tables.evidence(names).unbind(1), strict=True))
        self.ups: list[Tensor] = []
        self.offsets: list[Tensor] = []
        self.downs: dict[int, Tensor] = {}
        for clique in self.tree.cliques:
            found, scale = scaled(self.contracted(clique.up))
            self.ups.append(found)
            self.offsets.append(scale)

    def term(self, term: Term) -> Tensor:
        """The table or message that a contraction asks for."""
        kind, key = term
        if isinstance(key, int):
            return self.ups[key] if kind == "up" else self.downs[key]
        if kind == "factor":
            return self.tables.factor(key)
        return self.evidence[key] if kind == "evidence" else torch.zeros_like(self.evidence[key][:1])

    def contracted(self, contraction: Contraction) -> Tensor:
        """The result of a contraction, (batch or 1, *output)."""
        return self.contract(contraction, [self.term(t) for t in contraction.terms])

    def log_partition(self) -> Tensor:
        """Log of the sum over everything (or of the largest product), (batch or 1); scales are added in float64."""
        roots = [self.ups[i] for i, clique in enumerate(self.tree.cliques) if clique.parent < 0]
        parts = torch.stack(torch.broadcast_tensors(*roots, *self.offsets))
        return parts.double().sum(0).to(self.tables.dtype)

    def run(self) -> Calibration:
        """Send the messages downward, roots first."""
        for clique in reversed(self.tree.cliques):
            for child, contraction in zip(clique.children, clique.down, strict=True):
                self.downs[child] = scaled(self.contracted(contraction))[0]
        return self

    def own(self, clique: Clique) -> list[tuple[Term, Contraction]]:
        """The tables that belong to a clique, each with the contraction of everything else."""
        terms: list[Term] = [("factor", f) for f in clique.factors]
        terms += [("evidence", v) for v in clique.residual]
        return list(zip(terms, clique.cavities, strict=True))

    def log_marginals(self, wanted: set[str]) -> dict[str, Tensor]:
        """Normalised log-marginals of variables and factors of order two or more, (batch or 1, *cardinalities)."""
        found: dict[str, Tensor] = {}
        for clique in self.tree.cliques:
            for term, contraction in self.own(clique):
                if term[1] not in wanted:
                    continue
                log = self.term(term) + self.contracted(contraction)
                found[str(term[1])] = log_normalized(log, tuple(range(1, log.dim())))
        return found

    def belief(self, index: int) -> tuple[list[tuple[str, ...]], list[Tensor]]:
        """Everything that meets at a clique but the message from above: scopes and tables."""
        clique = self.tree.cliques[index]
        terms: list[Term] = [term for term, _ in self.own(clique)]
        terms += [("up", c) for c in clique.children]
        return [self.scope(t) for t in terms], [self.term(t) for t in terms]

    def scope(self, term: Term) -> tuple[str, ...]:
        """Variables of a term."""
        kind, key = term
        if isinstance(key, int):
            return self.tree.cliques[key].separator
        return self.plan.factor[key].scope if kind == "factor" else (key,)


def scaled(log: Tensor) -> tuple[Tensor, Tensor]:
    """A message with its largest entry taken out, and that, (batch or 1)."""
    largest = top(log)
    return log - largest, largest.reshape(-1)


def contradiction(tables: Tables, element: int) -> tuple[str, list[str]]:
    """The variable or clique nearest to the leaves where nothing is possible, and the variables from there down."""
    with torch.no_grad():
        up = Calibration(tables, max_product)

    def dead(value: Tensor) -> bool:
        return bool((value[element if value.shape[0] > 1 else 0] == -torch.inf).all())

    for v, evidence in up.evidence.items():
        if dead(evidence):
            return f"variable {v!r}", [v]
    cliques = up.tree.cliques
    index = next(i for i, message in enumerate(up.ups) if dead(message))
    below, queue = list[str](), [index]
    for i in queue:
        below += [v for v in cliques[i].variables if v not in below]
        queue.extend(cliques[i].children)
    factors = ", ".join(cliques[index].factors[:6]) or "none"
    return f"clique ({', '.join(cliques[index].variables)}), factors: {factors}", below
