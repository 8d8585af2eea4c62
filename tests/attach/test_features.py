"""Cached features: what they keep of the network, and that training on them is the bound itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from codd_ppl import CouplingLayer, topologies
from codd_ppl.attach import FeatureCache, Rows
from codd_ppl.attach.cached_module import CachedFeatures, CachedModule
from codd_ppl.attach.features import restore
from codd_ppl.denoisers import DenoiserOutput
from codd_ppl.diffusion import coupled_nelbo
from codd_ppl.diffusion.nelbo import NoisedBatch
from codd_ppl.errors import ConfigError, LogitsError
from codd_ppl.potentials import ContextualLatentPotentials

VOCAB, SITES, HIDDEN = 9, 4, 6


class Network(nn.Module):
    """Reads the sum of its input; counts its calls."""

    vocab_size, mask_token_id, hidden_size = VOCAB + 1, VOCAB, HIDDEN

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB + 1, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB + 1)
        self.calls: list[Tensor] = []

    def forward(self, xt: Tensor) -> DenoiserOutput:
        self.calls.append(xt)
        hidden = self.embed(xt).cumsum(1)
        return DenoiserOutput(logits=self.head(hidden), hidden=hidden)


def rows(n: int = 700) -> Rows:
    tokens = torch.randint(VOCAB, (n * SITES,), generator=torch.Generator().manual_seed(1)).int()
    return Rows(tokens.view(n, SITES), tokens, None, None)


def cache(path: Path, **settings: Any) -> FeatureCache:
    given = {"examples": 600, "steps": (2, 4), "top_k": 3, "reduced": 0, **settings}
    return FeatureCache(path, **given)


def test_restoring_keeps_the_likely_tokens_and_the_mass_of_the_rest() -> None:
    log_q = torch.randn(5, VOCAB).log_softmax(-1)
    unigram = torch.randn(VOCAB).log_softmax(-1)
    top, ids = log_q.topk(3, -1)
    rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1)
    found = restore(ids, top, rest, unigram)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(5))
    torch.testing.assert_close(found.gather(-1, ids), top)
    others = torch.ones(5, VOCAB, dtype=torch.bool).scatter(-1, ids, False)
    ratio = (found - unigram)[others].reshape(5, -1)  # in proportion to the unigram
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    everything, order = log_q.topk(VOCAB, -1)
    nothing = torch.full((5,), -6e4)
    torch.testing.assert_close(restore(order, everything, nothing, unigram), log_q)


def test_shards_that_are_there_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, network = cache(tmp_path / "whole"), Network()
    assert list(whole.build(network, rows(), 0)) == [256, 512, 600]
    assert len(network.calls) == 2 * 16 + 6  # 256 in batches of 16, twice, and 88
    part, real, made = cache(tmp_path / "part"), FeatureCache._features, []

    def features(self: FeatureCache, *arguments: Any) -> list[dict[str, Tensor]]:
        if len(made) == 1:
            raise RuntimeError("killed")
        made.append(1)
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureCache, "_features", features)
        with pytest.raises(RuntimeError, match="killed"):
            list(part.build(Network(), rows(), 0))
    stranger = tmp_path / "part" / "notes.txt"
    stranger.write_text("mine")
    again = Network()
    list(part.build(again, rows(), 0))
    assert len(again.calls) == 16 + 6 and stranger.read_text() == "mine"
    for one, other in zip(whole.shards, part.shards, strict=True):
        assert one.read_bytes() == other.read_bytes()
    size = sum(path.stat().st_size for path in whole.shards)
    assert 0.7 * size < whole.size(SITES, HIDDEN) < 1.3 * size


def test_a_pass_sees_every_example_once(tmp_path: Path) -> None:
    kept = cache(tmp_path / "c")
    list(kept.build(Network(), rows(), 0))
    orders = []
    for epoch in range(2):
        batches = list(kept.batches(50, epoch))
        assert sum(len(b["x0"]) for b in batches) == 600
        orders.append(torch.cat([b["x0"] for b in batches]))
        assert all(len(set(b["steps"].tolist())) == 1 for b in batches)  # a shard has one T
    assert not torch.equal(*orders)
    one, other = (torch.cat([b["x0"] for b in kept.batches(50, 0, r, 2)]) for r in (0, 1))
    assert len(one) + len(other) in (688, 856)  # two shards each
    skipped = iter(CachedFeatures(kept, 50, skip=3))
    expected = iter(CachedFeatures(kept, 50))
    for _ in range(3):
        next(expected)
    assert all(torch.equal(next(skipped)["x0"], next(expected)["x0"]) for _ in range(20))


def test_hidden_states_are_reduced_to_principal_components(tmp_path: Path) -> None:
    kept, network = cache(tmp_path / "c", reduced=2), Network()
    list(kept.build(network, rows(), 0))
    reduction = kept.reduction()
    assert reduction is not None and reduction.shape == (HIDDEN, 2)
    torch.testing.assert_close(reduction.T @ reduction, torch.eye(2), atol=1e-5, rtol=0)
    states = torch.cat([network(xt).hidden.detach().flatten(0, 1) for xt in network.calls[:16]])
    spectrum = torch.linalg.eigvalsh(states.T.cov())
    kept_variance = (states @ reduction).var(0).sum()
    torch.testing.assert_close(kept_variance, spectrum[-2:].sum(), rtol=1e-3, atol=0)


def test_the_network_reads_the_context(tmp_path: Path) -> None:
    kept, network, text = cache(tmp_path / "c", context=3, examples=20), Network(), rows()
    list(kept.build(network, text, pad_token_id=8))
    order = torch.randperm(700, generator=torch.Generator().manual_seed(0))[:16]
    assert torch.equal(network.calls[0][:, :3], text.context(order, 3, 8))
    assert network.calls[0].shape == (16, 3 + SITES)


@pytest.mark.parametrize("steps", [1, 4])
def test_training_is_on_the_bound_itself(tmp_path: Path, steps: int) -> None:
    network = Network()
    kept = cache(tmp_path / "c", steps=(steps,), top_k=VOCAB + 1, examples=32)
    list(kept.build(network, rows(), 0))
    graph = topologies.hidden_markov(SITES, VOCAB + 1, 3)
    potentials = ContextualLatentPotentials(graph, HIDDEN, mask_ratio=True)
    with torch.no_grad():
        for p in potentials.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    coupling = CouplingLayer(graph, VOCAB + 1, HIDDEN, potentials=potentials)
    module = CachedModule(coupling, torch.zeros(VOCAB + 1).log_softmax(-1), kept)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    batch = next(kept.batches(32, 0))
    found = module.training_step(batch, 0)
    x0, known = batch["x0"].long(), batch["known"]
    output = network(torch.where(known, x0, VOCAB))
    dist = coupling(output.logits, hidden=output.hidden, tokens=x0, known=known)
    noised = NoisedBatch(x0, x0, known, batch["revealed"], batch["steps"], batch["rate"], steps)
    expected = coupled_nelbo(noised, output.logits, dist).mean() / SITES
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)  # half precision
    found.backward()
    assert all(p.grad is not None for n, p in coupling.named_parameters() if "evidence" in n)


def test_what_can_be_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="top_k"):
        list(cache(tmp_path / "c", top_k=VOCAB + 2).build(Network(), rows(), 0))
    broken = Network()
    nn.init.constant_(broken.head.weight, torch.nan)
    with pytest.raises(LogitsError, match="NaN"):
        list(cache(tmp_path / "d").build(broken, rows(), 0))
    assert not list((tmp_path / "d").glob("0*"))
