"""Compiled loops against their twins of torch operations, inputs laid out in every way, and whole batches in parts."""

import ctypes
import itertools
import math

import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.errors import PotentialsError
from codd_ppl.graphs import topologies
from codd_ppl.inference import (
    entropy,
    k_best,
    log_partition,
    log_score,
    marginals,
    mode,
    native,
    sample,
)
from codd_ppl.inference.projection import project

LENGTH = 6
SIZES = {  # with so many threads: (states, batch)
    1: [(1, 3), (3, 1), (16, 3), (17, 9), (40, 1), (40, 3)],
    2: [(1, 3), (17, 9)],
}
TABLES = ["shared", "own", "in order", "reversed", "shuffled", "apart", "transposed", "evidence only"]

needs_library = pytest.mark.skipif(native.library() is None, reason="no compiled loops here")


def chain(kind: str, n: int, batch: int, dtype: torch.dtype, infinite: float = 0.2):
    """A chain's plan and log-potentials, some of them -inf."""
    graph = topologies.chain(LENGTH, n, tie="edge" if kind == "shared" else None)
    generator = torch.Generator().manual_seed(n * batch)
    names = [*graph.factors]

    def table(*shape: int) -> torch.Tensor:
        log = torch.randn(*shape, generator=generator, dtype=dtype)
        dead = torch.rand(*shape, generator=generator) < infinite
        dead[..., 0] = False
        if len(shape) > 1:
            dead[..., 0, :] = False
        return log.masked_fill(dead, -math.inf)

    tables: dict = {graph.tokens: table(batch, LENGTH, n)}
    if kind == "shared":
        tables["edge"] = table(n, n)
    elif kind == "own":
        tables |= {name: table(n, n) for name in names}
    elif kind == "apart":
        tables |= {name: table(batch, n, n) for name in names}
    elif kind == "transposed":
        tables[tuple(names)] = table(batch, LENGTH - 1, n, n).transpose(-1, -2)
    elif kind == "evidence only":
        tables[tuple(names)] = table(LENGTH - 1, n, n)
    else:
        order = {"in order": names, "reversed": names[::-1], "shuffled": [names[i] for i in (2, 0, 4, 1, 3)]}
        tables[tuple(order[kind])] = table(batch, LENGTH - 1, n, n)
    return compile(graph), tables


def results(plan, tables) -> dict:
    """Of every query that goes along a path."""
    leaves = {key: table.detach().requires_grad_() for key, table in tables.items()}
    total = log_partition(plan, leaves)
    weights = torch.linspace(1, 2, total.numel(), dtype=total.dtype)
    gradients = torch.autograd.grad((total * weights).sum(), list(leaves.values()))
    best = mode(plan, tables)
    draws = sample(plan, tables, (3,), generator=torch.Generator().manual_seed(0))
    return {
        "log_partition": total.detach(),
        **{("gradient", key): value for key, value in zip(leaves, gradients, strict=True)},
        **{("marginal", key): value for key, value in marginals(plan, tables).items()},
        "entropy": entropy(plan, tables),
        "mode": log_score(plan, tables, best),
        **{("best", name): value for name, value in best.items()},
        **{("draw", name): value for name, value in draws.items()},
    }


@pytest.fixture
def used(monkeypatch):
    """Names of the compiled functions that were called."""
    names: list[str] = []
    right = native.call
    monkeypatch.setattr(native, "call", lambda name, *given: names.append(name) or right(name, *given))
    return names


def assert_same(found: dict, expected: dict, dtype: torch.dtype) -> None:
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(
            value, expected[key], rtol=tolerance, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.slow
@pytest.mark.ci
def test_the_same_as_torch(kind, dtype, threads, used, monkeypatch):
    """Sizes below, at and above a register's width; with two threads the batch is split, however little work it is."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        monkeypatch.setattr(native, "WORK", 1)
        for n, batch in SIZES[threads]:
            plan, tables = chain(kind, n, batch, dtype)
            copies = {key: table.clone() for key, table in tables.items()}
            used.clear()
            found = results(plan, tables)
            shared = {"share"} if kind == "shared" else set()
            assert {"scan", "draw", "best_scores", "best_values"} | shared == set(used)
            assert all(torch.equal(table, copies[key]) for key, table in tables.items()), (
                "an input was modified"
            )
            with monkeypatch.context() as without:
                without.setattr(native, "library", lambda: None)
                used.clear()
                expected = results(plan, tables)
                assert not used
            assert_same(found, expected, dtype)
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("states", [300, native.LAID_OUT + 11])
@pytest.mark.slow
@pytest.mark.ci
def test_large_shared_tables_the_same_as_torch(states, dtype, threads, used, monkeypatch):
    """Tables read row by row, and those used as they lie; states no multiple of a register, batches none of four."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for batch in (1, 2, 7):
            plan, tables = chain("shared", states, batch, dtype)
            used.clear()
            found = results(plan, tables)
            # With more threads than batch elements torch's products, which use all of them, are the faster ones.
            assert ("scan" in used) == (batch >= threads or states <= native.STATES)
            with monkeypatch.context() as without:
                without.setattr(native, "library", lambda: None)
                expected = results(plan, tables)
            assert_same(found, expected, dtype)
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("states", [1, 3, 16, 17, 40])
def test_the_projection_is_the_same(states, dtype, used, monkeypatch):
    graph = topologies.hidden_markov(5, 19, states)
    plan, generator = compile(graph), torch.Generator().manual_seed(states)
    prior = testing.random_log_potentials(graph, dtype=dtype, seed=states)
    prior = {key: table.masked_fill(table < -1.5, -math.inf) if key == "emission" else table
             for key, table in prior.items()}  # fmt: skip
    prior["emission"][:, 0] = 0.0
    for batch in (1, 3, 9):
        target = torch.randn(batch, 5, 19, generator=generator, dtype=dtype).log_softmax(-1)
        masked = torch.rand(batch, 5, generator=generator) < 0.7
        used.clear()
        found = project(plan, prior, graph.tokens, target, masked, 3)
        assert "path_left" in used
        with monkeypatch.context() as without:
            without.setattr(native, "library", lambda: None)
            expected = project(plan, prior, graph.tokens, target, masked, 3)
        tolerance = 1e-4 if dtype == torch.float32 else 1e-11
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", TABLES)
def test_nan_and_infinity_are_named(kind, bad):
    """Wherever in a table or the evidence they stand, also where a comparison in C would pass over them."""
    for n in (1, 3, 17):
        plan, tables = chain(kind, n, 3, torch.float32, infinite=0.0)
        for key, table in tables.items():
            for place in {0, (table.numel() - 1) // 2, table.numel() - 1}:
                broken = tables | {key: table.clone()}
                broken[key][torch.unravel_index(torch.tensor(place), table.shape)] = bad
                for query in (log_partition, marginals, mode, sample, entropy, lambda p, t: k_best(p, t, 2)):
                    with pytest.raises(PotentialsError, match="must be finite or -inf"):
                        query(plan, broken)


@pytest.mark.parametrize("kind", TABLES)
def test_a_batch_of_none(kind):
    """All tables, one of them, or the evidence alone are empty, the others have no batch or one of 1."""
    plan, tables = chain(kind, 3, 1, torch.float64)
    for key in tables:
        empty = tables | {key: tables[key].new_zeros(0, *plan_shape(tables[key], key))}
        for value in results(plan, empty).values():
            assert 0 in value.shape or torch.equal(value, torch.zeros_like(value))


def plan_shape(table: torch.Tensor, key) -> tuple[int, ...]:
    """What a key's tensor ends with."""
    return tuple(table.shape[-3 if isinstance(key, tuple) and "," in key[0] else -2 :])


@needs_library
@pytest.mark.parametrize(("dtype", "lowest"), [(torch.float32, -87.0), (torch.float64, -708.0)])
def test_the_exponential(dtype, lowest):
    """Two units in the last place from torch's, down to the smallest number that is not denormal; 0 below."""
    n = 128
    logs = torch.cat((torch.linspace(lowest, 0, n * n - n - 3, dtype=torch.float64), torch.zeros(n + 3))).to(
        dtype
    )
    logs[:3] = torch.tensor([-math.inf, 2 * lowest, torch.finfo(dtype).min])
    gauge, linear = torch.empty(n, dtype=dtype), torch.empty(n, n, dtype=dtype)
    native.call("share", n, logs, gauge, linear)  # a last row of zeros: nothing is taken out
    exact = logs.double().exp()
    exact[:3] = 0
    assert bool((linear.flatten()[:3] == 0).all()) and not bool(gauge.any())
    units = (linear.flatten().double() - exact).abs() / (exact.clamp(min=1e-300) * torch.finfo(dtype).eps)
    assert float(units.max()) <= 2.0


@needs_library
def test_the_library_lets_other_threads_run():
    """ctypes.CDLL, not PyDLL: a call gives Python's lock away, on which the threads of a split batch rely."""
    assert type(native.library()) is ctypes.CDLL


@pytest.mark.parametrize(("batch", "work", "parts"), [(1, 10, 1), (9, 10, 2), (2, 1, 2), (9, 0, 1)])
def test_parts_of_a_batch(batch, work, parts, monkeypatch):
    monkeypatch.setattr(native, "WORK", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found = native.slices(batch, work)
    assert len(found) == parts and found[0][0] == 0 and found[-1][1] == batch
    assert all(a < b for a, b in found) and all(a[1] == b[0] for a, b in itertools.pairwise(found))
