"""Brute-force oracles and random factor graphs.

Everything here enumerates the whole joint table and shares no code with the compiler or the inference
engine, so that the two can be held against each other. Tables grow as the product of the cardinalities:
use graphs with at most a few thousand joint values.
"""

import math
import random
from collections.abc import Iterable
from typing import Any

import torch

from codd_ppl.errors import IntractableError, PotentialsError
from codd_ppl.graphs import FactorGraph
from codd_ppl.typing import Assignment, Bool, Float, Int, LogPotentials, Tensor

__all__ = [
    "brute_entropy",
    "brute_log_partition",
    "brute_log_score",
    "brute_marginals",
    "brute_mode",
    "chi_square_p_value",
    "enumerate_log_joint",
    "enumerate_sequences",
    "joint_counts",
    "random_forest",
    "random_log_potentials",
    "sample_p_value",
]

MAX_JOINT = 2**22
"""More joint values than this are refused: the oracles are for tiny graphs."""


def _cards(graph: FactorGraph) -> list[int]:
    return [variable.cardinality for variable in graph]


def _scores(graph: FactorGraph, log_potentials: LogPotentials) -> list[tuple[tuple[str, ...], Tensor]]:
    """Every term of the sum of log-potentials, as (scope, table of shape (*batch, *cardinalities))."""
    terms: list[tuple[tuple[str, ...], Tensor]] = []
    stacked = {
        name: log_potentials[key].select(-1 - graph.factors[name].order, place)
        for key in log_potentials
        if isinstance(key, tuple)
        for place, name in enumerate(key)
        if name in graph.factors and key[0] not in graph.variables
    }
    for factor in graph.factors.values():
        table = log_potentials.get(
            factor.name, stacked.get(factor.name, log_potentials.get(factor.tie or ""))
        )
        if table is None:
            raise PotentialsError(f"factor {factor.name!r} has no log-potentials under its name or its tie")
        terms.append((factor.scope, table))
    for name in graph.variables:
        if name in log_potentials and name not in graph.factors:  # else it is that factor's own table
            terms.append(((name,), log_potentials[name]))
    for names, table in log_potentials.items():
        if isinstance(names, tuple) and names[0] in graph.variables:
            terms += [((name,), row) for name, row in zip(names, table.unbind(-2), strict=True)]
    return terms


def enumerate_log_joint(graph: FactorGraph, log_potentials: LogPotentials) -> Float[Tensor, "..."]:
    """Unnormalised log-probability of every joint value, in float64.

    ``sum_f log psi_f(x_f)``, plus the unary evidence; one axis per variable, in the order of
    ``graph.variables``, behind the broadcast batch shape.

    Raises:
        IntractableError: the table would hold more than ``MAX_JOINT`` values per batch element.
        PotentialsError: a factor has no log-potentials.
    """
    names = list(graph.variables)
    cards = _cards(graph)
    if math.prod(cards) > MAX_JOINT:
        raise IntractableError(
            f"the joint table would hold {math.prod(cards)} values, more than {MAX_JOINT}; use fewer"
        )
    terms = _scores(graph, log_potentials)
    batch = torch.broadcast_shapes(*(table.shape[: table.dim() - len(scope)] for scope, table in terms))
    joint = torch.zeros((*batch, *cards), dtype=torch.float64)
    for scope, table in terms:
        lead = table.dim() - len(scope)
        axes = sorted(range(len(scope)), key=lambda axis: names.index(scope[axis]))
        ordered = table.permute(*range(lead), *(lead + axis for axis in axes)).to(torch.float64)
        shape = [card if name in scope else 1 for name, card in zip(names, cards, strict=True)]
        joint = joint + ordered.reshape(*table.shape[:lead], *shape)
    return joint


def _flat(graph: FactorGraph, joint: Tensor) -> Tensor:
    """(*batch, *cardinalities) -> (*batch, number of joint values)."""
    return joint.reshape(*joint.shape[: joint.dim() - len(graph)], math.prod(_cards(graph)))


def _probabilities(graph: FactorGraph, log_potentials: LogPotentials) -> Tensor:
    joint = enumerate_log_joint(graph, log_potentials)
    return torch.softmax(_flat(graph, joint), -1).reshape(joint.shape)


def brute_log_partition(graph: FactorGraph, log_potentials: LogPotentials) -> Float[Tensor, "*batch"]:
    """``log sum_x prod_f psi_f(x_f)`` by enumeration; ``-inf`` where no joint value is possible."""
    return _flat(graph, enumerate_log_joint(graph, log_potentials)).logsumexp(-1)


def brute_marginals(
    graph: FactorGraph, log_potentials: LogPotentials
) -> dict[str | tuple[str, ...], Float[Tensor, "..."]]:
    """Marginal probabilities of every variable and every factor scope, by enumeration.

    Keys: every variable and every factor; every tie (the **sum** over its factors: expected counts, the
    gradient of log_partition with respect to the shared table); every tuple key of ``log_potentials``.
    ``nan`` where no joint value is possible. Axes of a factor follow its scope.
    """
    probabilities = _probabilities(graph, log_potentials)
    names = list(graph.variables)
    lead = probabilities.dim() - len(names)

    def marginal(scope: tuple[str, ...]) -> Tensor:
        rest = [lead + axis for axis, name in enumerate(names) if name not in scope]
        kept = sorted(scope, key=names.index)
        table = probabilities.sum(rest) if rest else probabilities
        return table.permute(*range(lead), *(lead + kept.index(name) for name in scope))

    result: dict[str | tuple[str, ...], Tensor] = {name: marginal((name,)) for name in names}
    for factor in graph.factors.values():
        table = marginal(factor.scope)
        if factor.tie is not None:
            result[factor.tie] = result[factor.tie] + table if factor.tie in result else table
        if factor.name != factor.tie:
            result[factor.name] = table
    for key in log_potentials:
        if isinstance(key, tuple):
            scopes = [(name,) if name in graph.variables else graph.factors[name].scope for name in key]
            result[key] = torch.stack([marginal(scope) for scope in scopes], lead)
    return result


def brute_mode(
    graph: FactorGraph, log_potentials: LogPotentials, tolerance: float = 1e-9
) -> tuple[Float[Tensor, "*batch"], Bool[Tensor, "..."]]:
    """Largest joint log-score, and the set of the joint values that reach it within ``tolerance``."""
    joint = enumerate_log_joint(graph, log_potentials)
    flat = _flat(graph, joint)
    best = flat.amax(-1)
    return best, (flat >= best[..., None] - tolerance).reshape(joint.shape)


def brute_entropy(graph: FactorGraph, log_potentials: LogPotentials) -> Float[Tensor, "*batch"]:
    """``-sum_x p(x) log p(x)`` in nats, by enumeration."""
    return torch.special.entr(_flat(graph, _probabilities(graph, log_potentials))).sum(-1)


def brute_log_score(
    graph: FactorGraph, log_potentials: LogPotentials, assignment: Assignment
) -> Float[Tensor, "*batch"]:
    """``sum_f log psi_f(x_f)`` at one value of every variable, read from the enumerated table.

    The assignment may have sample dimensions in front of the batch shape.
    """
    joint = enumerate_log_joint(graph, log_potentials)
    flat = _flat(graph, joint)
    index = _joint_index(graph, assignment)
    shape = torch.broadcast_shapes(index.shape, flat.shape[:-1])
    return flat.expand(*shape, flat.shape[-1]).gather(-1, index.expand(shape)[..., None])[..., 0]


def _joint_index(graph: FactorGraph, assignment: Assignment) -> Tensor:
    """Row-major index of an assignment in the flattened joint table."""
    index = torch.zeros((), dtype=torch.int64)
    for variable in graph:
        index = index * variable.cardinality + assignment[variable.name]
    return index


def joint_counts(graph: FactorGraph, samples: Assignment) -> Int[Tensor, "*batch values"]:
    """How often each joint value occurs along the first dimension of ``samples``, per batch element."""
    index = _joint_index(graph, samples)
    counts = torch.zeros(*index.shape[1:], math.prod(_cards(graph)), dtype=torch.int64)
    return counts.scatter_add(-1, index.movedim(0, -1), torch.ones_like(index.movedim(0, -1)))


def chi_square_p_value(
    counts: Tensor | Iterable[int], probabilities: Tensor | Iterable[float], minimum: float = 5.0
) -> float:
    """P-value of Pearson's chi-square test of ``counts`` against ``probabilities`` (both of shape (cells,)).

    Cells whose expected count is below ``minimum`` are pooled into one. A count in a cell of probability
    zero gives 0.0 at once; one single cell gives 1.0, as there is nothing left to test.
    """
    observed = torch.as_tensor(counts).to(torch.float64).flatten()
    p = torch.as_tensor(probabilities).to(torch.float64).flatten()
    expected = p * observed.sum()
    if bool((observed[p == 0] > 0).any()):
        return 0.0
    order = expected.argsort(descending=True)
    observed, expected = observed[order], expected[order]
    large = int((expected >= minimum).sum())
    if large < len(expected):
        observed = torch.cat([observed[:large], observed[large:].sum()[None]])
        expected = torch.cat([expected[:large], expected[large:].sum()[None]])
    if len(expected) > 1 and expected[-1] < minimum:  # the pool itself is too small: join it to the next cell
        observed = torch.cat([observed[:-2], observed[-2:].sum()[None]])
        expected = torch.cat([expected[:-2], expected[-2:].sum()[None]])
    if len(expected) < 2:
        return 1.0
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def sample_p_value(graph: FactorGraph, log_potentials: LogPotentials, samples: Assignment) -> float:
    """Smallest chi-square p-value, over the batch, of ``samples`` (draws, *batch) against the joint."""
    truth = _flat(graph, _probabilities(graph, log_potentials))
    counts = joint_counts(graph, samples)
    rows = zip(counts.reshape(-1, counts.shape[-1]), truth.reshape(-1, truth.shape[-1]), strict=True)
    return min(chi_square_p_value(count, p) for count, p in rows)


def random_forest(
    seed: int,
    *,
    variables: int = 6,
    max_cardinality: int = 4,
    max_order: int = 3,
    connectivity: float = 0.8,
    latent: float = 0.3,
    tie: float = 0.5,
    max_joint: int = 4096,
) -> FactorGraph:
    """A random factor graph without loops; the same seed gives the same graph.

    One to ``variables`` variables of cardinality 1 to ``max_cardinality``, a share of ``latent`` hidden
    ones; factors of order 1 to ``max_order`` with scopes in random order, each joining components that
    were apart; several components and isolated variables if ``connectivity`` is below 1. Factors of equal
    shape share a table with probability ``tie``. ``max_joint`` bounds the product of the cardinalities.
    """
    rng = random.Random(seed)
    graph, cards = FactorGraph(), dict[str, int]()
    for index in range(rng.randint(1, variables)):
        room = max(1, max_joint // math.prod(cards.values()))
        hidden = rng.random() < latent
        name = f"{'z' if hidden else 'x'}{index}"
        cards[name] = rng.randint(1, min(max_cardinality, room))
        graph.add_variable(name, cardinality=cards[name], latent=hidden)
    component = {name: {name} for name in cards}
    scopes: list[tuple[str, ...]] = [(name,) for name in cards if rng.random() < 0.3]
    for _ in range(4 * len(cards)):
        order = rng.randint(2, max(2, max_order))
        scope = tuple(rng.sample(sorted(cards), min(order, len(cards))))
        apart = len({id(component[name]) for name in scope}) == len(scope)
        if len(scope) < 2 or not apart or rng.random() > connectivity:
            continue
        union = set[str]().union(*(component[name] for name in scope))
        component.update(dict.fromkeys(union, union))
        scopes.append(scope)
    rng.shuffle(scopes)
    for number, scope in enumerate(scopes):
        shape = "x".join(str(cards[name]) for name in scope)
        shared = f"tie {shape}" if rng.random() < tie else None
        graph.add_factor(scope, name=f"f{number}", tie=shared)
    return graph


def random_log_potentials(
    graph: FactorGraph,
    batch_shape: tuple[int, ...] = (),
    *,
    dtype: torch.dtype = torch.float64,
    infinite: float = 0.0,
    scale: float = 1.0,
    evidence: float = 0.0,
    mixed: bool = False,
    seed: int = 0,
) -> dict[str | tuple[str, ...], Tensor]:
    """Normal log-potentials for every factor (one table per tie), with standard deviation ``scale``.

    Args:
        graph: the graph to parameterise.
        batch_shape: leading dimensions of every table.
        dtype: of the tables.
        infinite: probability that an entry is ``-inf``; one joint value always stays possible.
        scale: standard deviation.
        evidence: probability that a variable gets a unary table under its own name.
        mixed: let every table lack some of the batch dimensions, or have 1 there.
        seed: of an own generator; torch's global state is left alone.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    cards = {variable.name: variable.cardinality for variable in graph}
    planted = {name: rng.randrange(card) for name, card in cards.items()}
    scopes: dict[str, list[tuple[str, ...]]] = {}
    for factor in graph.factors.values():
        scopes.setdefault(factor.tie if factor.tie is not None else factor.name, []).append(factor.scope)
    for name in cards:
        if rng.random() < evidence:
            scopes[name] = [(name,)]
    tables: dict[str | tuple[str, ...], Tensor] = {}
    for key, group in scopes.items():
        batch = batch_shape
        if mixed:
            kept = batch_shape[rng.randint(0, len(batch_shape)) :]
            batch = tuple(1 if rng.random() < 0.3 else size for size in kept)
        shape = (*batch, *(cards[name] for name in group[0]))
        table = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        possible = torch.rand(shape, generator=generator) >= infinite
        for scope in group:
            where: tuple[Any, ...] = (..., *(planted[name] for name in scope))
            possible[where] = True
        tables[key] = table.masked_fill(~possible, -math.inf).to(dtype)
    return tables


def enumerate_sequences(vocab: int, sites: int) -> Int[Tensor, "sequences sites"]:
    """All ``vocab ** sites`` token sequences, in lexicographic order."""
    if vocab**sites > MAX_JOINT:
        raise IntractableError(
            f"{vocab} tokens at {sites} sites are {vocab**sites} sequences, more than {MAX_JOINT}; use fewer"
        )
    place = vocab ** torch.arange(sites - 1, -1, -1)
    return torch.arange(vocab**sites)[:, None] // place % vocab
