"""A joint small enough to write down, its best factorised network, and two couplings that enumerate it."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from codd_ppl.denoisers import DenoiserOutput
from codd_ppl.testing import enumerate_sequences


class TableDistribution:
    """p(x_M | x_K) as one row of probabilities over all sequences per batch element."""

    def __init__(self, probabilities, states):
        self.probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        self.states = states

    @property
    def marginals(self):
        vocab = int(self.states.max()) + 1
        return torch.einsum(
            "bs,siv->biv", self.probabilities, nn.functional.one_hot(self.states, vocab).double()
        )

    def log_prob(self, value, /, sites=None):
        agrees = (value[:, None] == self.states) | (False if sites is None else ~sites[:, None])
        return (self.probabilities * agrees.all(-1)).sum(-1).log()

    def sample(self, sample_shape=(), generator=None):
        assert sample_shape == ()
        return self.states[torch.multinomial(self.probabilities, 1, generator=generator)[:, 0]]


class EnumeratedCoupling(nn.Module):
    """Perfect joint of the table, or (factorised=True) the product of the network's softmaxes."""

    def __init__(self, joint, factorised):
        super().__init__()
        self.register_buffer("joint", joint.flatten())
        self.sites, self.vocab_size, self.factorised = joint.ndim, joint.shape[0], factorised
        self.states = enumerate_sequences(self.vocab_size, self.sites)
        self.calls = 0

    def forward(self, logits, hidden=None, tokens=None, known=None):
        self.calls += 1
        agrees = ((tokens[:, None] == self.states) | ~known[:, None]).all(-1)
        weights = self.joint.expand(len(tokens), -1)
        if self.factorised:
            site = torch.arange(self.sites)
            weights = logits.softmax(-1)[:, site, self.states].masked_fill(known[:, None], 1.0).prod(-1)
        return TableDistribution(weights * agrees, self.states)


class TableDenoiser(nn.Module):
    """The best factorised network of the table: exact conditional marginals. Notes what it was called with."""

    def __init__(self, joint):
        super().__init__()
        self.perfect = EnumeratedCoupling(joint, factorised=False)
        self.weight = nn.Parameter(torch.zeros(()))
        self.vocab_size, self.mask_token_id, self.hidden_size = joint.shape[0], joint.shape[0], 1
        self.seen = []

    def forward(self, xt):
        assert not torch.is_grad_enabled()
        assert not self.training
        self.seen.append(xt.clone())
        logits = self.perfect(None, tokens=xt, known=xt != self.mask_token_id).marginals.log() + self.weight
        return DenoiserOutput(logits=logits, hidden=logits[..., :1])


@dataclass(frozen=True)
class Toy:
    joint: torch.Tensor
    denoiser: TableDenoiser
    perfect: EnumeratedCoupling
    factorised: EnumeratedCoupling

    @property
    def mask(self):
        return self.denoiser.mask_token_id

    def template(self, batch):
        return torch.full((batch, self.joint.ndim), self.mask)


@pytest.fixture
def toy() -> Callable[..., Toy]:
    def make(sites=3, vocab=3, seed=0, joint=None):
        generator = torch.Generator().manual_seed(seed)
        if joint is None:
            joint = torch.rand((vocab,) * sites, generator=generator, dtype=torch.float64) ** 3 + 0.01
        joint = joint / joint.sum()
        return Toy(
            joint, TableDenoiser(joint), EnumeratedCoupling(joint, False), EnumeratedCoupling(joint, True)
        )

    return make
