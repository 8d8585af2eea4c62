"""Denoisers and couplings small enough to enumerate, made up and real, and two statistical tests."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from codd_ppl.coupling import CouplingLayer
from codd_ppl.graphs import topologies
from codd_ppl.testing import ExactMarginals, chi_square_p_value, enumerate_sequences


class TableDistribution:
    """p(x_M | x_K) as a row of log-probabilities over all sequences; every query sums over the row."""

    def __init__(self, scores, states):
        self.log_probs, self.states = scores.log_softmax(-1), states
        self.batch_shape, self.event_shape = scores.shape[:-1], states.shape[-1:]

    def log_prob(self, value, sites=None):
        sites = torch.ones_like(value, dtype=torch.bool) if sites is None else sites
        agrees = ((value.unsqueeze(-2) == self.states) | ~sites.unsqueeze(-2)).all(-1)
        return torch.where(agrees, self.log_probs, -torch.inf).logsumexp(-1)

    def sample(self, sample_shape=(), generator=None):
        draws = math.prod(sample_shape) * math.prod(self.batch_shape)
        rows = self.log_probs.exp().expand(*sample_shape, *self.log_probs.shape).reshape(draws, -1)
        index = torch.multinomial(rows, 1, generator=generator)
        return self.states[index[:, 0]].reshape(*sample_shape, *self.batch_shape, *self.event_shape)


class TableCoupling(nn.Module):
    """p(x_M | xt) proportional to prod softmax(l_i)[x_i] exp(table[x]): any dependence, by enumeration."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table.flatten())
        self.sites, self.vocab_size = table.ndim, table.shape[0]
        self.states = enumerate_sequences(self.vocab_size, self.sites)

    def forward(self, logits, hidden=None, tokens=None, known=None):
        site = torch.arange(self.sites)
        singles = logits.log_softmax(-1)[..., site, self.states]
        scores = torch.where(known.unsqueeze(-2), 0, singles).sum(-1) + self.table
        agrees = ((tokens.unsqueeze(-2) == self.states) | ~known.unsqueeze(-2)).all(-1)
        return TableDistribution(torch.where(agrees, scores, -torch.inf), self.states)


class TinyDenoiser(nn.Module):
    """Logits that depend on every known token, as a linear map of the one-hot sequence."""

    def __init__(self, vocab_size, sites):
        super().__init__()
        self.vocab_size, self.sites, self.mask_token_id = vocab_size, sites, vocab_size
        self.weight = nn.Parameter(0.7 * torch.randn(sites * (vocab_size + 1), sites * vocab_size))

    def forward(self, xt):
        one_hot = nn.functional.one_hot(xt, self.vocab_size + 1).to(self.weight.dtype).flatten(-2)
        logits = (one_hot @ self.weight).reshape(*xt.shape, self.vocab_size)
        return SimpleNamespace(logits=logits, hidden=None)


def coupling_of(kind, vocab, sites, combine, dtype, spread):
    """A real CouplingLayer with random potentials, normal with standard deviation ``spread``."""
    graph = {
        "independent": lambda: topologies.independent(sites, vocab),
        "chain": lambda: topologies.chain(sites, vocab),
        "hidden_markov": lambda: topologies.hidden_markov(sites, vocab, 3),
        "latent_tree": lambda: topologies.latent_tree(sites, vocab, 2),
    }[kind]()
    coupling = CouplingLayer(graph, vocab, combine=combine).to(dtype)
    with torch.no_grad():
        for parameter in coupling.parameters():
            parameter.copy_(spread * torch.randn_like(parameter))
    return coupling


@pytest.fixture
def exact_marginals():
    """exact_marginals(joint) -> the best factorised network of the joint."""
    return ExactMarginals


@pytest.fixture
def real():
    """real(kind, combine, vocab, sites) -> (denoiser, CouplingLayer): random, seeded, strongly coupled."""

    def make(kind, combine="projected", vocab=2, sites=3, dtype=torch.float64, spread=1.5):
        torch.manual_seed(100 * vocab + sites)
        return TinyDenoiser(vocab, sites).to(dtype), coupling_of(kind, vocab, sites, combine, dtype, spread)

    return make


@pytest.fixture
def reverse_law():
    """reverse_law(denoiser, coupling, steps, schedule, template) -> the law of x_0, state by state, (vocab^sites)."""

    def law(denoiser, coupling, steps, schedule, template):
        mask, sites = denoiser.mask_token_id, coupling.sites
        states = enumerate_sequences(coupling.vocab_size, sites)
        reached = torch.cartesian_prod(*[torch.arange(coupling.vocab_size + 1)] * sites).reshape(-1, sites)
        xts = torch.where(reached == coupling.vocab_size, mask, reached)  # all that a chain may pass through
        output = denoiser(xts)
        joint = coupling(output.logits, hidden=output.hidden, tokens=xts, known=xts != mask)
        tables = joint.log_prob(states.unsqueeze(1)).exp().T.tolist()
        rows = dict(zip(map(tuple, xts.tolist()), tables, strict=True))
        chances = {tuple(template): 1.0}
        for k in range(steps, 0, -1):
            rate, after = float(schedule.reveal_rates(steps, torch.float64)[k - 1]), {}
            for xt, chance in chances.items():
                masked = [i for i, token in enumerate(xt) if token == mask]
                for chosen in itertools.product([False, True], repeat=len(masked)):
                    share = math.prod(rate if c else 1 - rate for c in chosen)
                    shown = {i for i, c in zip(masked, chosen, strict=True) if c}
                    for x, p in zip(states.tolist(), rows[xt], strict=True):
                        following = tuple(x[i] if i in shown else xt[i] for i in range(sites))
                        after[following] = after.get(following, 0.0) + chance * share * p
            chances = {xt: p for xt, p in after.items() if p > 0}
        return torch.tensor([chances.get(tuple(x), 0.0) for x in states.tolist()], dtype=torch.float64)

    return law


@pytest.fixture
def tiny():
    """tiny(vocab, sites, spread) -> (denoiser, coupling): random, seeded, spread = strength of the coupling."""

    def make(vocab, sites, spread=1.0, dtype=torch.float32):
        torch.manual_seed(100 * vocab + sites)
        denoiser = TinyDenoiser(vocab, sites).to(dtype)
        return denoiser, TableCoupling(spread * torch.randn([vocab] * sites, dtype=dtype))

    return make


@pytest.fixture
def perfect():
    """perfect(joint) -> (denoiser, coupling) that know the joint exactly."""

    def make(joint):
        vocab, sites = joint.shape[0], joint.ndim
        denoiser = TinyDenoiser(vocab, sites).to(joint.dtype)
        nn.init.zeros_(denoiser.weight)
        return denoiser, TableCoupling(joint.log())

    return make


@pytest.fixture
def random_joint():
    """random_joint(vocab, sites) -> a table of probabilities, seeded."""

    def make(vocab, sites):
        torch.manual_seed(7 * vocab + sites)
        return (
            (1.5 * torch.randn([vocab] * sites, dtype=torch.float64))
            .flatten()
            .softmax(0)
            .reshape([vocab] * sites)
        )

    return make


@pytest.fixture
def assert_unbiased():
    """assert_unbiased(estimates, truth, precision): the mean of independent estimates is the truth.

    Within 4.5 standard errors, in every column; and the standard error is small enough (relative to the
    truth) for that to mean something.
    """

    def check(estimates, truth, precision=0.02):
        estimates = estimates.detach().double()
        error = estimates.std(0) / math.sqrt(len(estimates))
        scale = torch.as_tensor(truth).detach().double()
        assert bool((error <= precision * scale.abs().max()).all()), f"too noisy to tell: {error} for {scale}"
        z = (estimates.mean(0) - scale).abs() / error.clamp(min=1e-7 * float(scale.abs().max()))
        assert bool((z < 4.5).all()), f"mean {estimates.mean(0)}, truth {scale}, z {z}"

    return check


@pytest.fixture
def assert_follows():
    """assert_follows(samples, probabilities): token sequences (n, sites) have the frequencies of a table."""

    def check(samples, probabilities):
        vocab, sites = probabilities.shape[0], probabilities.ndim
        index = (samples * vocab ** torch.arange(sites - 1, -1, -1)).sum(-1)
        counts = torch.bincount(index, minlength=vocab**sites)
        p_value = chi_square_p_value(counts, probabilities.flatten())
        assert p_value > 1e-4, f"frequencies don't follow the table: chi-square p-value {p_value:.2e}"

    return check
