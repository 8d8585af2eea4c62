"""Model folders: what is written is what is read, and bad folders say what is wrong."""

from pathlib import Path

import pytest
import torch

from codd_ppl import BidirectionalTransformer, CouplingLayer, topologies
from codd_ppl.errors import ConfigError, DataError
from codd_ppl.model_folder import load_model, save_model


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
