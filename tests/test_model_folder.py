"""Model folders: what is written is what is read, and bad folders say what is wrong."""

from pathlib import Path

import pytest
import torch

from codd_ppl import BidirectionalTransformer, CouplingLayer, topologies
from codd_ppl.errors import ConfigError, DataError
from codd_ppl.model_folder import load_contextual, load_coupling, load_model, save_model
from codd_ppl.potentials import ContextualLatentPotentials, LogarithmicPool


@pytest.mark.parametrize("combine", ["projected", "product"])
@pytest.mark.parametrize(
    "graph",
    [
        topologies.hidden_markov(5, 7, 3),
        topologies.chain(5, 7, tie=None),
        topologies.latent_tree(5, 7, 2),
        topologies.independent(5, 7),
    ],
)
def test_round_trip(tmp_path: Path, graph, combine: str) -> None:
    denoiser = BidirectionalTransformer(7, 16, 1, 2).eval()
    coupling = CouplingLayer(graph, 7, combine=combine, sweeps=3)
    for parameter in coupling.parameters():
        torch.nn.init.normal_(parameter)
    path = save_model(tmp_path / "model", denoiser, coupling, about={"text": "none"})
    saved = load_model(path)
    assert saved.coupling.graph == graph and saved.coupling.sweeps == 3 and saved.about == {"text": "none"}
    xt = torch.randint(0, 8, (3, 5))
    output, again = denoiser(xt), saved.denoiser(xt)
    assert torch.equal(output.logits, again.logits)
    ours = coupling(output.logits, tokens=xt, known=xt < 7)
    theirs = saved.coupling(again.logits, tokens=xt, known=xt < 7)
    x0 = xt.clamp(max=6)
    assert torch.equal(ours.log_prob(x0), theirs.log_prob(x0))


def test_an_old_folder_is_replaced_and_nothing_is_left_beside(tmp_path: Path) -> None:
    denoiser, coupling = (
        BidirectionalTransformer(4, 16, 1, 2),
        CouplingLayer(topologies.chain(3, 4), 4),
    )
    for note in (1, 2):
        save_model(tmp_path / "model", denoiser, coupling, about={"note": note})
    assert load_model(tmp_path / "model").about == {"note": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_other_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    denoiser, coupling = (
        BidirectionalTransformer(4, 16, 1, 2),
        CouplingLayer(topologies.chain(3, 4), 4),
    )
    with pytest.raises(ConfigError, match="no model folder"):
        save_model(tmp_path, denoiser, coupling)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("damage", ["missing", "json", "weights"])
def test_bad_folders(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model"
    if damage != "missing":
        save_model(path, BidirectionalTransformer(4, 16, 1, 2), CouplingLayer(topologies.chain(3, 4), 4))
        (path / {"json": "model.json", "weights": "weights.safetensors"}[damage]).write_bytes(b"{")
    with pytest.raises(DataError, match="codd demo"):
        load_model(path)


@pytest.fixture
def hidden_markov(tmp_path: Path) -> tuple[Path, BidirectionalTransformer, CouplingLayer]:
    denoiser = BidirectionalTransformer(6, 16, 1, 2)
    coupling = CouplingLayer(topologies.hidden_markov(4, 6, 3), 6, sweeps=2, pool=LogarithmicPool())
    with torch.no_grad():
        coupling.pool.weights.copy_(torch.rand(coupling.pool.weights.shape))
    return save_model(tmp_path / "model", denoiser, coupling), denoiser, coupling


def test_tables_of_a_folder_on_a_longer_chain(hidden_markov) -> None:
    path, _, coupling = hidden_markov
    longer = load_coupling(path, topologies.hidden_markov(7, 6, 3))
    assert longer.sites == 7 and longer.sweeps == 2
    expected = CouplingLayer(topologies.hidden_markov(7, 6, 3), 6, sweeps=2, pool=coupling.pool)
    expected.potentials.load_state_dict(coupling.potentials.state_dict())
    x0, logits = torch.randint(0, 6, (2, 7)), torch.randn(2, 7, 6)
    torch.testing.assert_close(longer(logits).log_prob(x0), expected(logits).log_prob(x0))
    assert torch.equal(
        load_coupling(path)(logits[:, :4]).log_prob(x0[:, :4]), coupling(logits[:, :4]).log_prob(x0[:, :4])
    )
    product = load_coupling(path, combine="product")
    assert product.pool is None and product.combine == "product" and product.sites == 4
    with pytest.raises(ConfigError, match=r"emission.*\(3, 6\).*found"):
        load_coupling(path, topologies.hidden_markov(7, 6, 4))


@pytest.mark.parametrize("gates", [False, True])
def test_a_folder_made_contextual_starts_as_it_was(hidden_markov, gates: bool) -> None:
    path, denoiser, coupling = hidden_markov
    contextual = load_contextual(path, width=8, gates=gates, emission_rank=2 * gates, mask_ratio=gates)
    assert isinstance(contextual.potentials, ContextualLatentPotentials)
    xt = torch.randint(0, 7, (3, 4))
    output, x0 = denoiser(xt), xt.clamp(max=5)
    ours = contextual(output.logits, output.hidden, xt, xt < 6).log_prob(x0)
    theirs = coupling(output.logits, tokens=xt, known=xt < 6).log_prob(x0)
    torch.testing.assert_close(ours, theirs, atol=0.05 if gates else 1e-5, rtol=0)


def test_only_latents_become_contextual(tmp_path: Path) -> None:
    path = save_model(
        tmp_path / "model", BidirectionalTransformer(4, 16, 1, 2), CouplingLayer(topologies.chain(3, 4), 4)
    )
    assert load_coupling(path).sites == 3
    for load in (load_contextual, lambda path: load_coupling(path, topologies.chain(4, 4))):
        with pytest.raises(ConfigError, match="LatentPotentials"):
            load(path)
