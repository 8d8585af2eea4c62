"""Against PyJuice itself, where it is installed: circuits that it builds, files that it writes.

Its kernels need a GPU, so the likelihoods are those of a recursion over its nodes, written here.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from codd_ppl.convert import hidden_markov_from_pyjuice
from codd_ppl.errors import DataError
from codd_ppl.testing import enumerate_sequences

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    juice = pytest.importorskip("pyjuice")

SITES, VOCAB = 4, 3
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")


def log_likelihood(root: Any, x: torch.Tensor) -> torch.Tensor:
    """log P(x), nodes after their children."""
    values: dict[Any, torch.Tensor] = {}
    for node in root:
        source = node.get_source_ns()
        if node.is_input():
            table = source.get_params().double().reshape(node.num_nodes, -1)
            (site,) = node.scope.to_list()
            values[node] = table[:, x[:, site]].log().T
        elif node.is_prod():
            parts = [values[c].unflatten(1, (c.num_node_blocks, c.block_size)) for c in node.chs]
            values[node] = sum(p[:, node.edge_ids[:, k]].flatten(1) for k, p in enumerate(parts))
        else:
            table = source.get_params(as_matrix=True).double().log()
            values[node] = (table + torch.cat([values[c] for c in node.chs], 1)[:, None]).logsumexp(-1)
    return values[root].flatten()


def ring(child: Any, *_: Any, num_node_blocks: int, **__: Any) -> torch.Tensor:
    """Each block of states goes to itself and the next."""
    n = child.num_node_blocks
    if num_node_blocks == 1:
        return torch.stack([torch.zeros(n, dtype=torch.int64), torch.arange(n)])
    start = torch.arange(n).repeat_interleave(2)
    return torch.stack([start, (start + torch.arange(2).repeat(n)) % n])


@pytest.mark.parametrize("memory", [False, True], ids=["file", "memory"])
@pytest.mark.parametrize("states,block,edges", [(4, 4, None), (6, 2, None), (3, 1, None), (8, 2, ring)])
@pytest.mark.parametrize("kind", ["Categorical", "ExternProductCategorical", "SoftEvidenceCategorical"])
def test_likelihoods(kind: str, states: int, block: int, edges: Any, memory: bool, tmp_path: Path) -> None:
    torch.manual_seed(states)
    root = juice.structures.GeneralizedHMM(
        SITES,
        states,
        block_size=block,
        input_dist=getattr(juice.distributions, kind)(num_cats=VOCAB),
        sum_edge_ids_constructor=edges,
    )
    root.init_parameters(perturbation=6.0)
    juice.save(str(tmp_path / "model.jpc"), root)
    coupling = hidden_markov_from_pyjuice(root if memory else tmp_path / "model.jpc", combine="product")
    x = enumerate_sequences(VOCAB, SITES)
    with torch.no_grad():
        found = coupling.double()(torch.zeros(*x.shape, VOCAB, dtype=torch.float64)).log_prob(x)
    torch.testing.assert_close(found, log_likelihood(root, x), rtol=0, atol=1e-5)


def test_trusted_files_and_other_circuits(tmp_path: Path) -> None:
    path = str(tmp_path / "model.jpc")
    root = juice.structures.HMM(SITES, 4, VOCAB)
    root.init_parameters()
    juice.save(path, root)
    plain, trusted = (hidden_markov_from_pyjuice(path, trust_pickle=trust) for trust in (False, True))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(trusted.state_dict()[name], value)
    root = juice.structures.HMM(SITES, 4, VOCAB, homogeneous=False)
    root.init_parameters()
    juice.save(path, root)
    with pytest.raises(DataError, match=r"different tables of emissions.*homogeneous=False"):
        hidden_markov_from_pyjuice(path)
    tokens = [juice.inputs(i, num_nodes=4, dist=juice.distributions.Categorical(VOCAB)) for i in range(2)]
    mixture = juice.summate(juice.multiply(*tokens), num_nodes=1)
    mixture.init_parameters()
    juice.save(path, mixture)
    with pytest.raises(DataError, match="found product nodes over 2 vectors of input and 0 of sum nodes"):
        hidden_markov_from_pyjuice(path)
