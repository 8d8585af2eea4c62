"""Queries under torch.func's transforms and inside functions that torch.compile compiles."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from codd_ppl import compile, topologies
from codd_ppl.errors import PotentialsError
from codd_ppl.graphs import FactorGraph
from codd_ppl.inference import entropy, log_partition, log_score, marginals, mode, sample, transforms
from codd_ppl.testing import brute_log_partition, brute_marginals, random_forest
from codd_ppl.typing import Tensor

GRAPH = topologies.hidden_markov(5, 4, 3)
PLAN = compile(GRAPH)


def potentials(emission: Tensor, transition: Tensor, evidence: Tensor) -> dict:
    initial = torch.zeros(3, dtype=emission.dtype)
    return {"initial": initial, "emission": emission, "transition": transition, GRAPH.tokens: evidence}


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (3, 3), (6, 5, 4))
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    values[1][0, 1] = -torch.inf
    return values[0], values[1], values[2]


def total(emission: Tensor, transition: Tensor, evidence: Tensor) -> Tensor:
    return log_partition(PLAN, potentials(emission, transition, evidence)).sum()


def test_func_grad_is_autograd(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    leaves = [value.clone().requires_grad_() for value in inputs]
    expected = torch.autograd.grad(total(*leaves), leaves)
    found = torch.func.grad(total, argnums=(0, 1, 2))(*inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "query",
    [
        log_partition,
        entropy,
        lambda plan, tables: marginals(plan, tables)["transition"],
        lambda plan, tables: marginals(plan, tables)["x2"],
        lambda plan, tables: mode(plan, tables)["z3"],
        lambda plan, tables: log_score(plan, tables, mode(plan, tables)),
    ],
)
def test_vmap_is_the_batch(query: Callable, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    emission, transition, evidence = inputs
    expected = query(PLAN, potentials(*inputs))
    found = torch.func.vmap(lambda row: query(PLAN, potentials(emission, transition, row)))(evidence)
    torch.testing.assert_close(found, expected)


def test_vmap_over_tables_and_of_gradients(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    emission, transition, evidence = inputs
    tables = torch.stack([emission, emission.flip(0)])
    found = torch.func.vmap(torch.func.grad(total), in_dims=(0, None, None))(tables, transition, evidence)
    for a, table in zip(found, tables, strict=True):
        leaf = table.clone().requires_grad_()
        torch.testing.assert_close(
            a, torch.autograd.grad(total(leaf, transition, evidence), leaf)[0], rtol=1e-10, atol=1e-10
        )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch itself
def test_hessian_is_symmetric_and_matches_double_backward(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    emission, transition, evidence = inputs
    found = torch.func.hessian(total)(emission, transition, evidence).reshape(12, 12)
    torch.testing.assert_close(found, found.T, rtol=1e-9, atol=1e-9)
    leaf = emission.clone().requires_grad_()
    (first,) = torch.autograd.grad(total(leaf, transition, evidence), leaf, create_graph=True)
    row = torch.autograd.grad(first.flatten()[5], leaf)[0].flatten()
    torch.testing.assert_close(found[5], row, rtol=1e-8, atol=1e-9)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch itself
def test_forward_mode(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    emission, transition, evidence = inputs
    tangent = torch.ones_like(emission)
    _, found = torch.func.jvp(lambda e: total(e, transition, evidence), (emission,), (tangent,))
    torch.testing.assert_close(found, torch.tensor(30.0, dtype=torch.float64))  # 6 sequences of 5 emissions


def test_vmapped_draws_follow_the_generator_of_the_caller(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    emission, transition, evidence = inputs
    draw = torch.func.vmap(
        lambda row: sample(PLAN, potentials(emission, transition, row), (5,))["x0"], randomness="different"
    )
    torch.manual_seed(0)
    assert draw(evidence).shape == (6, 5)


@pytest.mark.parametrize("seed", range(8))
def test_random_forests(seed: int) -> None:
    graph = random_forest(seed, variables=5)
    plan, generator = compile(graph), torch.Generator().manual_seed(seed)
    keys = list(dict.fromkeys(f.tie or f.name for f in graph.factors.values()))
    if not keys:
        return
    shapes = {f.tie or f.name: graph.shape(f.name) for f in graph.factors.values()}
    tables = [torch.randn(3, *shapes[k], generator=generator, dtype=torch.float64) for k in keys]

    def one(*values: Tensor) -> Tensor:
        return log_partition(plan, dict(zip(keys, values, strict=True)))

    whole = dict(zip(keys, tables, strict=True))
    torch.testing.assert_close(torch.func.vmap(one)(*tables), brute_log_partition(graph, whole))
    found = torch.func.vmap(torch.func.grad(one))(*tables)
    torch.testing.assert_close(found, brute_marginals(graph, whole)[keys[0]])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_caller(backend: str, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """The query is one opaque call inside; values and gradients are those of the plain function."""

    def loss(emission: Tensor, transition: Tensor, evidence: Tensor) -> Tensor:
        return (total(2 * emission, transition, evidence) * 3).tanh() + emission.sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        compiled = torch.compile(loss, backend=backend)
        leaves = [value.clone().requires_grad_() for value in inputs]
        found = torch.autograd.grad(compiled(*leaves), leaves)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_inputs_are_left_alone(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    before = [value.clone() for value in inputs]
    for query in (log_partition, marginals, mode, sample, entropy):
        query(PLAN, potentials(*inputs))
    total(*(value.requires_grad_() for value in inputs)).backward()
    for now, then in zip(inputs, before, strict=True):
        assert torch.equal(now.detach(), then)


def test_no_grad_keeps_nothing(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    leaves = [value.clone().requires_grad_() for value in inputs]
    with torch.no_grad():
        assert not total(*leaves).requires_grad
        assert not marginals(PLAN, potentials(*leaves))["x0"].requires_grad


def test_many_tables_under_one_key() -> None:
    """A tuple of factors stacks their tables; own tables go before it."""
    graph = FactorGraph()
    for i in range(6):
        graph.add_variable(f"x{i}", 3)
    for i in range(5):
        graph.add_factor((f"x{i}", f"x{i + 1}"))
    graph.add_factor(("x0",), name="start")
    plan, names = compile(graph), tuple(f"x{i},x{i + 1}" for i in range(5))
    generator = torch.Generator().manual_seed(1)
    stacked = torch.randn(2, 5, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    start = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    apart = {"start": start, **dict(zip(names, stacked.detach().unbind(1), strict=True))}
    for order in (names, names[::-1], (names[3], *names[:3], names[4])):
        whole = {"start": start, order: stacked[:, [names.index(n) for n in order]]}
        torch.testing.assert_close(log_partition(plan, whole), brute_log_partition(graph, whole))
        found, expected = marginals(plan, whole), brute_marginals(graph, whole)
        torch.testing.assert_close(found[order], torch.stack([expected[n] for n in order], 1))
        (gradient,) = torch.autograd.grad(log_partition(plan, whole).sum(), stacked)
        torch.testing.assert_close(gradient, torch.stack([expected[n] for n in names], 1))
    own = torch.zeros(3, 3, dtype=torch.float64)
    mixed = {"start": start, names: stacked, names[2]: own}
    torch.testing.assert_close(log_partition(plan, mixed), brute_log_partition(graph, mixed))
    torch.testing.assert_close(
        brute_log_partition(graph, mixed), brute_log_partition(graph, {**apart, names[2]: own})
    )
    with pytest.raises(PotentialsError, match="tuple must name distinct"):
        log_partition(plan, {"start": start, (*names[:4], "x4"): stacked})


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("batch", [(), (3,), (1,)])
def test_large_tables_are_streamed(
    together: bool, batch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With little room the tables of a path are turned into linear space anew by each pass: the same results."""
    graph = topologies.chain(9, 4, tie=None)
    plan, names = compile(graph), tuple(graph.factors)
    generator = torch.Generator().manual_seed(2)
    stacked = torch.randn(*batch, 8, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    unary = torch.randn(3, 9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    tables = {graph.tokens: unary}
    tables |= {names: stacked} if together else dict(zip(names, stacked.unbind(-3), strict=True))

    def results() -> list[Tensor]:
        value = log_partition(plan, tables)
        weights = torch.arange(1.0, 4.0, dtype=torch.float64)
        gradients = torch.autograd.grad((value * weights).sum(), (stacked, unary))
        with torch.no_grad():
            found = marginals(plan, tables)
            draws = sample(plan, tables, (7,), generator=torch.Generator().manual_seed(3))
        return [value, *gradients, *(v for _, v in sorted(found.items(), key=str)), *draws.values()]

    expected = results()
    monkeypatch.setattr("codd_ppl.inference.path_tables.KEPT", 8)
    monkeypatch.setattr("codd_ppl.inference.path_tables.CHUNK", 3 * 16 * max(1, *batch, 1))
    for a, b in zip(results(), expected, strict=True):
        torch.testing.assert_close(a, b)


class NoLook(TorchDispatchMode):
    """Refuses what makes the host wait for a device, or shapes depend on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in function.name() and "nonzero" not in function.name(), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("graph", [GRAPH, topologies.grid(3, 3, 2)], ids=["forest", "loops"])
@pytest.mark.parametrize(
    "query",
    [
        log_partition,
        entropy,
        marginals,
        mode,
        lambda plan, tables: {name: draws.shape for name, draws in sample(plan, tables, (5,)).items()},
        lambda plan, tables: log_score(plan, tables, dict.fromkeys(plan.variable, torch.zeros(2).long())),
        lambda plan, tables: torch.autograd.grad(log_partition(plan, tables).sum(), list(tables.values())),
    ],
    ids=["log_partition", "entropy", "marginals", "mode", "sample", "log_score", "gradient"],
)
def test_nothing_is_looked_at_while_a_cuda_graph_is_captured(query, graph, monkeypatch) -> None:
    """With the flag of a capture set, on the CPU: same results, and no operation that a capture refuses."""
    plan, generator = compile(graph), torch.Generator().manual_seed(1)
    tables = {}
    for factor in plan.factors:
        shape = [plan.variable[v].cardinality for v in factor.scope]
        tables[factor.tie or factor.name] = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    for table in tables.values():
        table.requires_grad_()
    expected = query(plan, tables)
    monkeypatch.setattr(transforms, "capturing", lambda: True)
    with NoLook():
        found = query(plan, tables)
    if isinstance(found, dict) and isinstance(next(iter(found.values())), torch.Size):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
