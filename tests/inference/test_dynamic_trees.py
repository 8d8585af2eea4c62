"""A tree of its own for every batch element, against the compiled factor graph of each and against enumeration."""

import itertools

import pytest
import torch
from scipy import stats

from codd_ppl import compile
from codd_ppl.errors import CyclicGraphError, GraphError, InfeasibleError, PotentialsError, ShapeError
from codd_ppl.graphs import FactorGraph
from codd_ppl.inference import dynamic_trees
from codd_ppl.inference import log_partition as plan_log_partition
from codd_ppl.inference import marginals as plan_marginals
from codd_ppl.inference.dynamic_trees import DynamicForest, SharedTables

PARENTS = torch.tensor(
    [
        [-1, 0, 1, 2, 3],  # a path
        [4, 4, 4, 4, -1],  # a star on the last site
        [-1, 0, -1, 2, 2],  # two trees
        [-1, -1, -1, -1, -1],
        [1, 3, 1, -1, 3],
        [2, 0, -1, 4, 2],
    ]
)


def case(vocab: int = 3) -> tuple[DynamicForest, torch.Tensor, torch.Tensor]:
    evidence = torch.randn(6, 5, vocab, dtype=torch.float64)
    evidence[1, 2, 0] = evidence[4, 3, 1] = -torch.inf
    tables = 2 * torch.randn(6, 5, vocab, vocab, dtype=torch.float64)
    tables[0, 1, 0] = -torch.inf
    return DynamicForest(PARENTS), evidence, tables


def own_graph(parents: list[int], evidence: torch.Tensor, tables: torch.Tensor):  # type: ignore[no-untyped-def]
    graph = FactorGraph()
    for i in range(len(parents)):
        graph.add_variable(f"x{i}", cardinality=evidence.shape[-1])
    potentials = {f"x{i}": evidence[i] for i in range(len(parents))}
    for i, parent in enumerate(parents):
        if parent >= 0:
            graph.add_factor((f"x{i}", f"x{parent}"), name=f"edge{i}")
            potentials[f"edge{i}"] = tables[i]
    return compile(graph), potentials


def enumerated(parents: list[int], evidence: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Log-weights of all sequences, in the order of itertools.product."""
    rows = []
    for x in itertools.product(range(evidence.shape[-1]), repeat=len(parents)):
        total = sum(evidence[i, x[i]] for i in range(len(parents)))
        rows.append(total + sum(tables[i, x[i], x[p]] for i, p in enumerate(parents) if p >= 0))
    return torch.stack(rows)


def test_each_tree_equals_its_own_plan() -> None:
    forest, evidence, tables = case()
    total = dynamic_trees.log_partition(forest, evidence, tables)
    found = dynamic_trees.marginals(forest, evidence, tables)
    for row, parents in enumerate(PARENTS.tolist()):
        plan, potentials = own_graph(parents, evidence[row], tables[row])
        torch.testing.assert_close(total[row], plan_log_partition(plan, potentials))
        expected = plan_marginals(plan, potentials)
        torch.testing.assert_close(found[row], torch.stack([expected[f"x{i}"] for i in range(5)]))


def test_partial_assignments_and_batch_shapes() -> None:
    forest, evidence, tables = case(2)
    value = torch.randint(2, (6, 5))
    sites = torch.rand(6, 5) < 0.5
    found = dynamic_trees.log_prob(forest, evidence, tables, value, sites)
    sequences = torch.tensor(list(itertools.product(range(2), repeat=5)))
    for row, parents in enumerate(PARENTS.tolist()):
        logs = enumerated(parents, evidence[row], tables[row])
        agree = ((sequences == value[row]) | ~sites[row]).all(-1)
        torch.testing.assert_close(found[row], logs[agree].logsumexp(0) - logs.logsumexp(0))
    shaped = DynamicForest(PARENTS.reshape(2, 3, 5))
    again = dynamic_trees.log_partition(shaped, evidence.reshape(2, 3, 5, 2), tables.reshape(2, 3, 5, 2, 2))
    assert torch.equal(again.reshape(6), dynamic_trees.log_partition(forest, evidence, tables))


def test_shared_tables() -> None:
    forest, evidence, _ = case()
    shared = SharedTables(torch.randn(4, 3, 3, dtype=torch.float64), (PARENTS - torch.arange(5)).abs() % 4)
    dense = shared.tables[shared.kind]
    for query in (dynamic_trees.log_partition, dynamic_trees.marginals):
        assert torch.equal(query(forest, evidence, shared), query(forest, evidence, dense))


def test_draws(generator: torch.Generator) -> None:
    forest, evidence, tables = case(2)
    drawn = dynamic_trees.sample(forest, evidence, tables, (5000,), generator)
    assert drawn.shape == (5000, 6, 5)
    place = 2 ** torch.arange(4, -1, -1)
    for row, parents in enumerate(PARENTS.tolist()):
        chance = enumerated(parents, evidence[row], tables[row]).softmax(0)
        counts = torch.bincount((drawn[:, row] * place).sum(-1), minlength=32).double()
        assert bool((counts[chance == 0] == 0).all())
        expected = chance * 5000
        rare = expected < 5
        seen, want = (torch.cat([v[~rare], v[rare].sum()[None]]) for v in (counts, expected))
        keep = want > 0
        assert stats.chisquare(seen[keep].numpy(), want[keep].numpy()).pvalue > 1e-3
    again = dynamic_trees.sample(forest, evidence, tables, (5000,), torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


def test_gradients() -> None:
    forest, evidence, tables = case(2)
    assert torch.autograd.gradcheck(
        lambda e, t: dynamic_trees.log_partition(forest, e, t),
        (torch.randn_like(evidence, requires_grad=True), torch.randn_like(tables, requires_grad=True)),
    )
    evidence = evidence.requires_grad_()
    (slope,) = torch.autograd.grad(dynamic_trees.log_partition(forest, evidence, tables).sum(), evidence)
    torch.testing.assert_close(slope, dynamic_trees.marginals(forest, evidence, tables))
    assert torch.autograd.gradcheck(
        lambda e: dynamic_trees.marginals(forest, e, tables), torch.randn_like(evidence).requires_grad_()
    )


def test_impossible_evidence() -> None:
    forest, evidence, tables = case()
    evidence[2, 3] = -torch.inf
    evidence.requires_grad_()
    total = dynamic_trees.log_partition(forest, evidence, tables)
    assert total[2] == -torch.inf and bool(total[[0, 1, 3, 4, 5]].isfinite().all())
    (slope,) = torch.autograd.grad(total.sum(), evidence)
    assert bool(slope.isfinite().all()) and bool((slope[2, 2:] == 0).all())
    for query in (dynamic_trees.marginals, dynamic_trees.sample):
        with pytest.raises(InfeasibleError, match=r"batch element .2,"):
            query(forest, evidence, tables)


def test_forest_from_edges() -> None:
    edges = torch.zeros(6, 5, 5, dtype=torch.bool)
    for row, parents in enumerate(PARENTS.tolist()):
        for i, parent in enumerate(parents):
            if parent >= 0:
                edges[row, i, parent] = True
    forest = DynamicForest.from_edges(edges)
    child, parent = (forest.parents >= 0).nonzero(), forest.parents[forest.parents >= 0]
    again = torch.zeros_like(edges)
    again[child[:, 0], child[:, 1], parent] = True
    assert torch.equal(again | again.mT, edges | edges.mT)
    assert bool((forest.parents[:, 0] == -1).all())
    for i, j in ((0, 3), (2, 2)):
        looped = edges.clone()
        looped[0, i, j] = True
        with pytest.raises(CyclicGraphError, match=r"batch element \(0,\) close a loop"):
            DynamicForest.from_edges(looped)


def test_wrong_input_is_named() -> None:
    with pytest.raises(CyclicGraphError, match=r"in a circle, .*->"):
        DynamicForest(torch.tensor([[-1, 0, 1], [1, 2, 0]]))
    with pytest.raises(CyclicGraphError, match="1 -> 1"):
        DynamicForest(torch.tensor([-1, 1]))
    with pytest.raises(GraphError, match=r"parent of site 1 .* is 3"):
        DynamicForest(torch.tensor([[-1, 3, 1]]))
    with pytest.raises(ShapeError, match="integers"):
        DynamicForest(torch.zeros(3))
    with pytest.raises(ShapeError, match="edges as bool"):
        DynamicForest.from_edges(torch.zeros(3, 3))
    forest, evidence, tables = case()
    with pytest.raises(ShapeError, match="log_evidence of shape"):
        dynamic_trees.log_partition(forest, evidence[:, :4], tables)
    with pytest.raises(ShapeError, match="child, parent"):
        dynamic_trees.log_partition(forest, evidence, tables[0])
    with pytest.raises(ShapeError, match="shared tables"):
        dynamic_trees.log_partition(forest, evidence, SharedTables(tables[0], PARENTS[0]))
    with pytest.raises(PotentialsError, match="log_evidence holds NaN"):
        dynamic_trees.log_partition(forest, evidence * torch.nan, tables)
