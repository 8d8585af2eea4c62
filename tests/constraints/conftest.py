"""Strings of tokens that overlap and stand for nothing, couplings over them, and the conditional law by enumeration."""

import pytest
import torch

from codd_ppl.coupling import CouplingLayer
from codd_ppl.graphs import FactorGraph, topologies
from codd_ppl.testing import enumerate_sequences

TOKENS = ["a", "b", "ab", "c", None]
SITES = 4


def pairs():
    """Two tokens on each latent, scopes in either order, no link between the latents."""
    graph = FactorGraph()
    for i in range(SITES):
        graph.add_variable(f"x{i}", len(TOKENS))
    for i in range(0, SITES, 2):
        graph.add_variable(f"z{i}", 3, latent=True)
        graph.add_factor((f"z{i}", f"x{i}"), tie="left")
        graph.add_factor((f"x{i + 1}", f"z{i}"), tie="right")
    return graph


GRAPHS = {
    "independent": topologies.independent(SITES, len(TOKENS)),
    "chain": topologies.chain(SITES, len(TOKENS)),
    "free chain": topologies.chain(SITES, len(TOKENS), tie=None),
    "hidden Markov": topologies.hidden_markov(SITES, len(TOKENS), 3),
    "mixture": topologies.star(SITES, len(TOKENS), 3),
    "pairs": pairs(),
    "latent tree": topologies.latent_tree(SITES, len(TOKENS), 3),
    "grid": topologies.grid(2, 2, len(TOKENS)),
}


def spelled(row, tokens=TOKENS):
    """The text of some token ids; None where one of them is none."""
    pieces = [tokens[t] for t in row]
    return None if None in pieces else "".join(pieces)


class Case:
    """A lively coupling over four sites, its law for two sequences, and the law given a constraint by enumeration."""

    def __init__(self, graph, combine="projected", seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.coupling = CouplingLayer(GRAPHS[graph], len(TOKENS), combine=combine).double()
        with torch.no_grad():
            for parameter in self.coupling.parameters():
                parameter.copy_(1.5 * torch.randn(parameter.shape, generator=generator))
        self.logits = 2 * torch.randn(2, SITES, len(TOKENS), generator=generator, dtype=torch.float64)
        self.tokens = torch.tensor([[0, 0, 0, 0], [0, 1, 3, 1]])
        self.known = torch.tensor([[False] * 4, [False, True, False, False]])
        self.sequences = enumerate_sequences(len(TOKENS), SITES)

    @torch.no_grad()
    def law(self, coupling=None):
        return (coupling or self.coupling)(self.logits, tokens=self.tokens, known=self.known)

    @torch.no_grad()
    def truth(self, accepted):
        """log p(x | accepted) for all sequences, (sequences, 2), and log p(accepted)."""
        allowed = torch.tensor([accepted(row) for row in self.sequences.tolist()])
        logs = self.law().log_prob(self.sequences[:, None].expand(-1, 2, -1))
        logs = torch.where(allowed[:, None], logs, -torch.inf)
        total = logs.logsumexp(0)
        return logs - total, total


@pytest.fixture
def case():
    return Case


@pytest.fixture
def spell():
    return spelled


@pytest.fixture
def vocabulary():
    return list(TOKENS)
