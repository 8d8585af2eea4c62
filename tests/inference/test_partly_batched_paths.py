"""Paths where one table or one variable's evidence has the batch dimension and the rest doesn't."""

import pytest
import torch

from codd_ppl import testing
from codd_ppl.compiler import compile
from codd_ppl.graphs import topologies
from codd_ppl.inference import entropy, log_partition, marginals

PLACES = [("edge", f"x{i}") for i in range(6)] + [(None, f"x{i},x{i + 1}") for i in range(5)] + [(None, "x3")]


@pytest.mark.parametrize(("tie", "place"), PLACES)
def test_one_place_is_batched(tie, place):
    graph = topologies.chain(6, 3, tie=tie)
    plan, tables = compile(graph), testing.random_log_potentials(graph)
    shape = (4, 3, 3) if "," in place else (4, 3)
    tables[place] = torch.randn(shape, dtype=torch.float64)
    expected = testing.brute_marginals(graph, tables)
    for key, found in marginals(plan, tables).items():
        torch.testing.assert_close(found, expected[key].expand(found.shape), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(entropy(plan, tables), testing.brute_entropy(graph, tables))
    leaves = {key: table.clone().requires_grad_() for key, table in tables.items()}
    log_partition(plan, leaves).sum().backward()
    for key, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[key].sum_to_size(leaf.shape), rtol=1e-9, atol=1e-9)
