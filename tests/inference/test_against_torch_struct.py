"""torch-struct's linear-chain CRF as a second, independent oracle for chains."""

import warnings

import pytest
import torch

from codd_ppl.compiler import compile
from codd_ppl.graphs import topologies
from codd_ppl.inference import (
    entropy,
    k_best,
    kl,
    lengths,
    log_partition,
    log_score,
    marginals,
    mode,
    pad,
)

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


def free_chain(sites, states, seed):
    graph = topologies.chain(sites, states, tie=None)
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randn(4, sites - 1, states, states, dtype=torch.float64, generator=generator)
    return compile(graph), {key: edges[:, i] for i, key in enumerate(graph.factors)}, edges


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("sites", [2, 3, 7])
def test_k_best_and_divergence(sites, k):
    plan, p, edges = free_chain(sites, 3, sites)
    _, q, others = free_chain(sites, 3, sites + 1)
    crf, other = (torch_struct.LinearChainCRF(e.mT.contiguous().clone()) for e in (edges, others))
    torch.testing.assert_close(k_best(plan, p, k)[0], crf.kmax(k).detach().T)
    torch.testing.assert_close(kl(plan, p, q), crf.kl(other).detach())


def test_lengths():
    plan, tables, edges = free_chain(6, 3, 0)
    n = torch.tensor([6, 2, 4, 3])
    crf = torch_struct.LinearChainCRF(edges.mT.contiguous().clone(), lengths=n)
    padded = pad(plan, tables, lengths(plan, n))
    torch.testing.assert_close(log_partition(plan, padded), crf.partition.detach())
    torch.testing.assert_close(k_best(plan, padded, 3)[0], crf.kmax(3).detach().T)
    theirs, found = crf.marginals.detach().mT, marginals(plan, padded)
    for row, length in enumerate(n.tolist()):
        for i in range(length - 1):
            torch.testing.assert_close(found[f"x{i},x{i + 1}"][row], theirs[row, i])


def test_lengths_of_a_tied_chain():
    graph = topologies.chain(6, 3)
    plan, edge = compile(graph), torch.randn(3, 3, dtype=torch.float64)
    n = torch.tensor([6, 2, 4, 3])
    crf = torch_struct.LinearChainCRF(edge.mT.expand(4, 5, 3, 3).clone(), lengths=n)
    padded = pad(plan, {"edge": edge}, lengths(plan, n))
    torch.testing.assert_close(log_partition(plan, padded), crf.partition.detach())
    torch.testing.assert_close(k_best(plan, padded, 3)[0], crf.kmax(3).detach().T)
