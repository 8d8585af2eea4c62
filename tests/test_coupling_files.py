"""Couplings on disk and on the hub: what comes back, what is checked, what is never lost."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from codd_ppl import CouplingLayer, topologies
from codd_ppl.coupling_files import vocabulary_hash
from codd_ppl.errors import ConfigError, DataError
from codd_ppl.potentials import (
    ContextualLatentPotentials,
    LogarithmicPool,
    LowRankPotentials,
    MixturePotentials,
    TiedEmissionPotentials,
)

SITES, VOCAB, HIDDEN = 4, 5, 6


def words(*names: str) -> Tokenizer:
    return Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))


UNEMBEDDING = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(3))


def make(kind: str) -> CouplingLayer:
    torch.manual_seed(1)
    hmm = topologies.hidden_markov(SITES, VOCAB, 3)
    if kind == "latent":
        pool = LogarithmicPool((0.5, 1.0))
        layer = CouplingLayer(hmm, VOCAB, pool=pool, sweeps=2, tolerance=0.1, candidates=3)
    elif kind == "table":
        layer = CouplingLayer(topologies.chain(SITES, VOCAB), VOCAB, combine="product")
    elif kind == "contextual":
        potentials = ContextualLatentPotentials(hmm, HIDDEN, width=4, gates=True, mask_ratio=True, reduced=2)
        layer = CouplingLayer(hmm, VOCAB, HIDDEN, potentials=potentials)
    elif kind == "mixture":
        star = topologies.hidden_markov(SITES, VOCAB, 4)
        layer = CouplingLayer(star, VOCAB, potentials=MixturePotentials(star, 2))
    elif kind == "low rank":
        graph = topologies.low_rank(topologies.chain(SITES, VOCAB), 2)
        layer = CouplingLayer(graph, VOCAB, potentials=LowRankPotentials(graph))
    else:
        layer = CouplingLayer(hmm, VOCAB, potentials=TiedEmissionPotentials(hmm, UNEMBEDDING, rank=2))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer.eval()


@torch.no_grad()
def law(layer: CouplingLayer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, SITES, VOCAB, generator=generator)
    hidden = torch.randn(2, SITES, HIDDEN, generator=generator)
    return layer(logits, hidden=hidden).log_prob(torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]]))


@pytest.mark.parametrize("kind", ["latent", "table", "contextual", "mixture", "low rank", "tied"])
def test_it_comes_back(kind: str, tmp_path: Path) -> None:
    layer = make(kind)
    assert layer.save_pretrained(tmp_path / "here") == tmp_path / "here"
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == ["coupling.json", "coupling.safetensors"]
    given = {"unembedding": UNEMBEDDING} if kind == "tied" else {}
    found = CouplingLayer.from_pretrained(tmp_path / "here", **given)
    assert type(found) is CouplingLayer and not found.training
    torch.testing.assert_close(law(found), law(layer), rtol=0, atol=0)
    assert (found.sweeps, found.tolerance, found.candidates) == (
        layer.sweeps,
        layer.tolerance,
        layer.candidates,
    )
    assert found.graph.to_networkx().nodes == layer.graph.to_networkx().nodes
    if kind == "tied":
        with pytest.raises(ConfigError, match=r"unembedding=denoiser\.unembedding"):
            CouplingLayer.from_pretrained(tmp_path / "here")


def test_what_the_file_says(tmp_path: Path) -> None:
    tokenizer = words("a", "b", "c", "d", "e")
    make("latent").save_pretrained(tmp_path / "x", "owner/network", tokenizer, {"tokens": 7}, torch.float16)
    config = json.loads((tmp_path / "x" / "coupling.json").read_text())
    assert config["backbone"] == "owner/network" and config["tokenizer"] == vocabulary_hash(tokenizer)
    assert config["versions"].keys() == {"codd_ppl", "torch"} and config["about"] == {"tokens": 7}
    weights = load_file(tmp_path / "x" / "coupling.safetensors")
    assert {v.dtype for v in weights.values() if v.is_floating_point()} == {torch.float16}
    found = CouplingLayer.from_pretrained(tmp_path / "x", backbone="owner/network", tokenizer=tokenizer)
    assert found.loaded_config["backbone"] == "owner/network" and "graph" not in found.loaded_config
    assert all(p.dtype == torch.float32 for p in found.parameters())


def test_another_network_is_an_error_that_names_both(tmp_path: Path) -> None:
    make("latent").save_pretrained(tmp_path / "x", "owner/network", words("a", "b", "c", "d", "e"))
    with pytest.raises(ConfigError, match=r"'owner/network'.*found 'owner/other'"):
        CouplingLayer.from_pretrained(tmp_path / "x", backbone="owner/other")
    other = words("a", "b", "c", "d", "f")
    with pytest.raises(ConfigError) as said:
        CouplingLayer.from_pretrained(tmp_path / "x", tokenizer=other)
    assert vocabulary_hash(other)[:12] in str(said.value) and "'owner/network'" in str(said.value)
    make("latent").save_pretrained(tmp_path / "y")  # made for nothing in particular
    CouplingLayer.from_pretrained(tmp_path / "y", backbone="any", tokenizer=other)


def test_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="nothing was written"):
        make("latent").save_pretrained(tmp_path)
    where = make("latent").save_pretrained(tmp_path / "x")
    before = law(CouplingLayer.from_pretrained(where))

    def broken(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("codd_ppl.coupling_files.save_file", broken)
    with pytest.raises(OSError, match="full"):
        make("table").save_pretrained(where)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]
    torch.testing.assert_close(law(CouplingLayer.from_pretrained(where)), before)
    monkeypatch.undo()
    make("table").save_pretrained(where)  # over it
    torch.testing.assert_close(law(CouplingLayer.from_pretrained(where)), law(make("table")))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


def test_damage_is_named(tmp_path: Path) -> None:
    where = make("latent").save_pretrained(tmp_path / "x")
    with pytest.raises(DataError, match="expected a coupling written by save_pretrained"):
        CouplingLayer.from_pretrained(tmp_path / "missing")
    (where / "coupling.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match="expected a coupling written by save_pretrained"):
        CouplingLayer.from_pretrained(where)
    config = json.loads((where / "coupling.json").read_text())
    (where / "coupling.json").write_text(json.dumps({**config, "format": "other"}))
    with pytest.raises(DataError, match="format 'other'"):
        CouplingLayer.from_pretrained(where)

    class Own(torch.nn.Module):
        def forward(self, hidden: Any = None) -> dict[str, torch.Tensor]:
            return {}

        def evidence(self) -> None:
            return None

    layer = make("table")
    layer.potentials = Own()
    with pytest.raises(ConfigError, match="found Own"):
        layer.save_pretrained(tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its library is asked for the right things; no network here."""
    hub = pytest.importorskip("huggingface_hub")
    calls: list[Any] = []

    def upload(repo_id: str, folder_path: Path, **settings: Any) -> str:
        shutil.copytree(folder_path, tmp_path / "remote")
        calls.append((repo_id, settings["commit_message"]))
        return "https://hub/commit"

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision, allow_patterns))
        if name == "owner/none":
            raise OSError("404")
        return str(tmp_path / "remote")

    monkeypatch.setattr(hub, "create_repo", lambda repo_id, **s: calls.append((repo_id, s["private"])))
    monkeypatch.setattr(hub, "upload_folder", upload)
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert make("latent").push_to_hub("owner/name", private=True) == "https://hub/commit"
    found = CouplingLayer.from_pretrained("owner/name", revision="abc")
    torch.testing.assert_close(law(found), law(make("latent")))
    files = ["coupling.json", "coupling.safetensors"]
    assert calls == [
        ("owner/name", True), ("owner/name", "A coupling of codd_ppl"), ("owner/name", "abc", files)
    ]  # fmt: skip
    with pytest.raises(DataError, match="a folder or a repository of the hub"):
        CouplingLayer.from_pretrained("owner/none")
