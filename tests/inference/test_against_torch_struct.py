"""torch-struct's linear-chain CRF as a second, independent oracle for chains."""

import warnings

import pytest
import torch

from codd_ppl.compiler import compile
from codd_ppl.graphs import topologies
from codd_ppl.inference import entropy, log_partition, log_score, marginals, mode

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch_struct = pytest.importorskip("torch_struct")

pytestmark = pytest.mark.filterwarnings("ignore:.*arg_constraints.*:UserWarning")


@pytest.mark.parametrize("tie", [None, "edge"])
@pytest.mark.parametrize("sites", [2, 3, 9])
@pytest.mark.parametrize("states", [2, 5])
def test_chain(sites, states, tie):
    graph = topologies.chain(sites, states, tie=tie)
    generator = torch.Generator().manual_seed(sites * states)
    shape = (4, sites - 1, states, states) if tie is None else (4, 1, states, states)
    edges = torch.randn(shape, dtype=torch.float64, generator=generator).expand(4, sites - 1, states, states)
    keys = list(graph.factors)
    tables = {"edge": edges[:, 0]} if tie else {key: edges[:, i] for i, key in enumerate(keys)}
    plan = compile(graph)
    crf = torch_struct.LinearChainCRF(edges.mT.contiguous().clone())  # theirs is [next, previous]
    torch.testing.assert_close(log_partition(plan, tables), crf.partition.detach())
    torch.testing.assert_close(entropy(plan, tables), crf.entropy.detach())
    theirs, found = crf.marginals.detach().mT, marginals(plan, tables)
    if tie:
        torch.testing.assert_close(found["edge"], theirs.sum(1))
    else:
        for i, key in enumerate(keys):
            torch.testing.assert_close(found[key], theirs[:, i])
    torch.testing.assert_close(found["x0"], theirs[:, 0].sum(-1))
    torch.testing.assert_close(found[f"x{sites - 1}"], theirs[:, -1].sum(-2))
    best = crf.struct.from_parts(crf.argmax.detach())[0]
    path = {
        f"x{i}": best[:, i] for i in range(sites)
    }  # several paths may be equally good: compare their scores
    torch.testing.assert_close(log_score(plan, tables, mode(plan, tables)), log_score(plan, tables, path))
    if tie is None:
        assert torch.equal(torch.stack([mode(plan, tables)[f"x{i}"] for i in range(sites)], -1), best)
