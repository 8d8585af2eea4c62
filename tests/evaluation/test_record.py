"""Records of an evaluation: figures from a table, small files, errors that teach."""

import json
from pathlib import Path

import pytest
import torch

from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.errors import ConfigError, DataError
from codd_ppl.evaluation import NelboTable
from codd_ppl.evaluation.machine import describe_device, processor
from codd_ppl.evaluation.parts import describe_coupling, graph_kind
from codd_ppl.evaluation.record import Row, evaluation_record, load_record, save_record
from codd_ppl.graphs import topologies
from codd_ppl.potentials import LogarithmicPool

MODEL = (BidirectionalTransformer(3, 4, 1, 1), None)


def test_figures_by_hand(make_record):
    found = make_record(tokens_per_word=2.0)["models"]
    coupled, cell = found["coupled"], found["coupled"]["nelbo"]["4"]
    assert cell["bits_per_token"] == 2.625 and cell["standard_error"] == 0
    assert cell["seconds_per_sample"] == 8.0
    assert cell["word_perplexity"] == pytest.approx(2**5.25, rel=1e-4)
    assert cell["difference"] == [-0.375, 0]
    assert cell["relative_gain"] == [0.125] * 3
    assert cell["gap_closed"] == [0.75] * 3
    assert coupled["change_at_sites"] == [-0.02] * 3
    assert coupled["step_time"] == 1.5  # the median of 1.5, 2 and 1.375
    assert coupled["in_the_same_time"] == {"T": 4, "steps": 8.0, "bits_per_token": 2.75}
    equal = coupled["equivalent_steps"]
    assert equal["relation"] == "=" and equal["steps"] == pytest.approx([2**3.5] * 3, rel=1e-3)
    assert "gap_closed" not in coupled["nelbo"]["16"]  # 0/0 there
    control = found["prior alone"]
    assert control["nelbo"]["1"]["gap_closed"][0] == pytest.approx(1 / 1.5, rel=1e-3)
    assert "step_time" not in control and "equivalent_steps" not in control
    assert set(found["factorised"]) == {"role", "network", "nelbo"}


def test_files_are_small_and_read_back(tmp_path: Path, make_record):
    path = save_record(make_record(), tmp_path / "deep" / "results.json")
    assert path.stat().st_size < 5000
    text = path.read_text(encoding="utf-8")
    assert (
        len([line for line in text.splitlines() if '"bits_per_token"' in line]) == 15 + 1
    )  # a line for each
    assert load_record(path) == json.loads(text) == make_record()
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_a_single_block_and_infinite_bounds(tmp_path: Path):
    rows = {"factorised": {1: torch.tensor([torch.inf]), 2: torch.tensor([1.0])}}
    found = evaluation_record(
        NelboTable(2, {k: {T: v.double() for T, v in row.items()} for k, row in rows.items()}),
        {"factorised": Row(MODEL, "factorised")},
        command="codd",
        device="CPU",
        versions={},
        text={},
        vocab=2,
    )
    cell = found["models"]["factorised"]["nelbo"]["1"]
    assert cell == {"bits_per_token": "inf", "standard_error": "nan"}
    assert load_record(save_record(found, tmp_path / "results.json")) == found


def test_rows_must_be_those_of_the_table():
    table = NelboTable(2, {"factorised": {1: torch.ones(2, dtype=torch.float64)}})
    given = {"command": "", "device": "", "versions": {}, "text": {}, "vocab": 2}
    with pytest.raises(ConfigError, match="models of the table"):
        evaluation_record(table, {}, **given)
    with pytest.raises(ConfigError, match="compared with nobody"):
        evaluation_record(table, {"factorised": Row(MODEL, "coupled", "nobody")}, **given)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("device"), "device"),
        (lambda d: d.update(sites="64"), "sites"),
        (lambda d: d.update(models={}), "no models"),
        (lambda d: d["models"]["coupled"].update(role="best"), "role 'best'"),
        (lambda d: d["models"]["coupled"]["nelbo"]["1"].pop("bits_per_token"), "bits_per_token"),
        (lambda d: d["models"]["coupled"].update(nelbo=[1]), "AttributeError"),
    ],
)
def test_damaged_records(tmp_path: Path, make_record, change, said: str):
    data, path = make_record(), tmp_path / "results.json"
    change(data)
    save_record(data, path)
    with pytest.raises(DataError, match=rf"results\.json.*{said}.*codd evaluate"):
        load_record(path)


def test_files_that_are_no_records(tmp_path: Path):
    path = tmp_path / "results.json"
    path.write_text('{"toys": 1}', encoding="utf-8")
    assert load_record(path) is None
    path.write_text('{"format": ', encoding="utf-8")
    with pytest.raises(DataError, match=r"results\.json.*JSON"):
        load_record(path)
    with pytest.raises(DataError, match=r"missing\.json"):
        load_record(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("graph", "kind"),
    [
        (topologies.independent(4, 3), "independent"),
        (topologies.chain(4, 3), "chain"),
        (topologies.tree([None, 0, 0, 0], 3), "tree"),
        (topologies.star(4, 3, states=2), "mixture"),
        (topologies.hidden_markov(4, 3, 2), "hidden Markov"),
        (topologies.latent_tree(4, 3, 2), "latent tree"),
        (topologies.grid(2, 2, 3), "graph with loops"),
    ],
)
def test_kinds_of_graphs(graph, kind: str):
    assert graph_kind(graph) == kind


def test_parts_of_a_coupling():
    from codd_ppl import CouplingLayer

    graph = topologies.hidden_markov(4, 3, 2)
    found = describe_coupling(CouplingLayer(graph, 3, sweeps=2, candidates=2, pool=LogarithmicPool()))
    assert found["states"] == 2 and found["latents"] == 4 and found["pool"] is True
    assert (found["combine"], found["sweeps"], found["candidates"]) == ("projected", 2, 2)
    assert found["parameters"] == 2 + 4 + 6 + 15


def test_devices(monkeypatch: pytest.MonkeyPatch):
    assert describe_device(torch.device("cpu")).startswith(f"CPU, {processor()}, ") and processor()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T1")
    assert describe_device(torch.device("cuda")).startswith("CUDA, NVIDIA T1; host ")
