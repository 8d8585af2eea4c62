"""codd evaluate: several models on one text, and the record that it leaves."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from codd_ppl import BidirectionalTransformer, CouplingLayer, TextDataModule, topologies
from codd_ppl.cli import main
from codd_ppl.commands.evaluate import model_rows
from codd_ppl.evaluation import NelboTable
from codd_ppl.evaluation.record import load_record
from codd_ppl.model_folder import load_model, save_model

SITES = 8
TEXT = "the cat sat on the mat and the dog sat on the log. a hat for the cat, a bone for the dog. " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and model folders: hmm, product (the same network), chain (its own network), alone (no coupling)."""
    where = tmp_path_factory.mktemp("models")
    (where / "text.txt").write_text(TEXT, encoding="utf-8")
    (where / "more.txt").write_text(TEXT[:600], encoding="utf-8")
    data = TextDataModule(where / "text.txt", block_length=SITES)
    vocab, blocks = data.vocab_size, data.train_blocks()
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(BidirectionalTransformer(vocab, 16, 1, 2))
    hmm = topologies.hidden_markov(SITES, vocab, 3)
    couplings = {
        "hmm": (networks[0], CouplingLayer(hmm, vocab)),
        "product": (networks[0], CouplingLayer(hmm, vocab, combine="product")),
        "chain": (networks[1], CouplingLayer(topologies.chain(SITES, vocab), vocab)),
        "alone": (networks[0], CouplingLayer(topologies.independent(SITES, vocab), vocab)),
        "longer": (networks[0], CouplingLayer(topologies.chain(SITES + 1, vocab), vocab)),
    }
    for name, (network, coupling) in couplings.items():
        if name == "hmm":
            coupling.init_from_corpus(blocks, progress=False, epochs=1)
        save_model(where / name, network, coupling, data.tokenizer, {"step": 7, "seconds": 12.5, "x": [1]})
    save_model(where / "bare", *couplings["hmm"])
    other = Tokenizer.from_str(data.tokenizer.to_str().replace('"a"', '"Q"'))
    save_model(where / "foreign", *couplings["hmm"], other)
    return where


def evaluate(folder: Path, *words: str, model: str = "hmm") -> list[str]:
    found = ["evaluate", str(folder / model), str(folder / "text.txt"), "--blocks", "32"]
    return [*found, "--steps", "1", "4", "8", *words]


def test_the_record_of_several_models(folder: Path, tmp_path: Path) -> None:
    target, values = tmp_path / "name" / "results.json", tmp_path / "table.json"
    words = evaluate(folder, "--also", f"product={folder / 'product'}", "--also", f"chain={folder / 'chain'}")
    words += ["--also", f"network={folder / 'alone'}", "--controls", "--timing", "0.01"]
    words += ["--batch-size", "16", "--reveals", "2", "--output", str(target), "--table", str(values)]
    assert main(words) == 0
    assert target.stat().st_size < 11_000  # nine models
    record = load_record(target)
    assert record is not None
    assert record["command"] == "codd " + shlex.join(words)
    for name, row in record["models"].items():
        base = row.get("against")
        assert ("network_seconds" in row) == (row["role"] == "factorised"), name
        if row["role"] == "coupled":
            added = (
                row["nelbo"]["1"]["seconds_per_sample"]
                - record["models"][base]["nelbo"]["1"]["seconds_per_sample"]
            )
            expected = added / record["models"][base]["network_seconds"]
            assert row["coupling_time"] == pytest.approx(expected, rel=0.1, abs=0.02)
    assert record["text"] == {"files": ["text.txt"], "blocks": 32, "tokens": len(TEXT) + 2}
    assert record["sites"] == SITES and record["settings"]["reveals"] == 2
    assert record["device"].startswith("CPU, ") and set(record["versions"]) == {"codd_ppl", "torch"}
    table, models = NelboTable.load(values), record["models"]
    assert list(models) == [
        *("factorised", "coupled", "product", "factorised, chain", "chain", "network"),
        *("marginals alone", "prior alone", "sharpened 0.8"),
    ]
    assert {name: row["against"] for name, row in models.items() if "against" in row} == dict.fromkeys(
        ["coupled", "product", "network", "marginals alone", "prior alone", "sharpened 0.8"], "factorised"
    ) | {"chain": "factorised, chain"}
    for name, row in models.items():
        for T, cell in row["nelbo"].items():
            assert float(cell["bits_per_token"]) == pytest.approx(table.mean(name, int(T)), rel=1e-4)
            assert cell["seconds_per_sample"] > 0
            assert ("gap_closed" in cell) == (T != "8" and "against" in row)
    gap = table.gap_closed("coupled", "factorised", 1)
    cell = models["coupled"]["nelbo"]["1"]
    assert list(map(float, cell["gap_closed"])) == pytest.approx([gap.value, gap.low, gap.high], rel=1e-3)
    assert cell["difference"] == pytest.approx(table.difference("coupled", "factorised", 1), rel=1e-3)
    change = table.relative_gain("chain", "factorised, chain", 8)
    assert models["chain"]["change_at_sites"] == pytest.approx(
        [-change.value, -change.high, -change.low], rel=1e-3
    )
    assert models["network"]["nelbo"]["4"]["difference"] == [0, 0]
    coupling = models["coupled"]["coupling"]
    assert (coupling["graph"], coupling["latents"], coupling["states"]) == ("hidden Markov", SITES, 3)
    assert models["product"]["coupling"]["combine"] == "product"
    assert models["coupled"]["about"] == {"step": 7, "seconds": 12.5}
    assert models["factorised"]["network"]["class"] == "BidirectionalTransformer"
    assert models["coupled"]["step_time"] > 0 and models["coupled"]["equivalent_steps"]["T"] == 4
    assert "step_time" not in models["factorised"]


def test_perplexities_and_several_texts(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    words = evaluate(folder, "--wikitext", "--output", str(target), model="alone")
    words.insert(3, str(folder / "more.txt"))
    assert main(words) == 0
    record = json.loads(target.read_text(encoding="utf-8"))
    assert record["text"]["files"] == ["text.txt", "more.txt"] and record["text"]["words"] > 800
    assert list(record["models"]) == ["factorised"]  # there is no coupling in the folder
    cell = record["models"]["factorised"]["nelbo"]["1"]
    each = record["text"]["tokens"] / record["text"]["words"]
    assert cell["word_perplexity"] == pytest.approx(2 ** (cell["bits_per_token"] * each), rel=1e-2)


def test_documents_of_several_fields(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(
        '{"question": "the cat", "answer": "sat on the mat"}\n', encoding="utf-8"
    )
    words = ["evaluate", str(folder / "hmm"), str(tmp_path / "pairs.jsonl"), "--steps", "8"]
    assert main([*words, "--fields", "question", "answer", "--output", str(tmp_path / "r.json")]) == 0
    record = load_record(tmp_path / "r.json")
    assert record is not None and record["text"]["tokens"] == len("the cat\nsat on the mat") + 2
    assert main(words) == 2  # no field "text"


def test_the_same_network_runs_once(folder: Path) -> None:
    first, same, other = (load_model(folder / name) for name in ("hmm", "product", "chain"))
    rows = model_rows(first, {"product": same, "chain": other})
    assert rows["product"].model[0] is rows["factorised"].model[0]
    assert rows["chain"].model[0] is rows["factorised, chain"].model[0] is other.denoiser
    changed = replace(same, denoiser=BidirectionalTransformer(first.denoiser.vocab_size, 32, 1, 2))
    assert model_rows(first, {"wide": changed})["wide"].against == "factorised, wide"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--also", "longer={}/longer"], "8 sites as in"),
        (["--also", "foreign={}/foreign"], "the vocabulary of"),
        (["--also", "bare={}/bare"], "no tokenizer.json"),
        (["--also", "{}/chain"], "NAME=FOLDER"),
        (["--also", "coupled={}/chain"], "not taken"),
        (["--also", "a={}/chain", "--also", "a={}/product"], "not taken"),
        (["--output", "{}"], "is a folder"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--batch-size", "0"], "batch_size"),
    ],
)
def test_errors_teach(folder: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(evaluate(folder, *(word.format(folder) for word in words))) == 2
    assert said in capsys.readouterr().err


def test_a_model_in_the_place_of_a_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(folder / "hmm"), str(folder / "chain"), str(folder / "text.txt")]) == 2
    assert "--also NAME=" in capsys.readouterr().err
