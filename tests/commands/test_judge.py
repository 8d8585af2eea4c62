"""codd judge: from two folders and a text to a table and a record."""

import json
from pathlib import Path

import pytest
import torch

from codd_ppl import BidirectionalTransformer, CouplingLayer, TextDataModule, topologies
from codd_ppl.cli import main
from codd_ppl.judge import CausalJudge
from codd_ppl.model_folder import save_model

pytest.importorskip("transformers")

SITES = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.txt, a model, a judge, and a judge of another vocabulary."""
    where = tmp_path_factory.mktemp("judged")
    (where / "text.txt").write_text("the cat sat on the mat, the dog sat on the log. " * 40, encoding="utf-8")
    data, torch_seed = TextDataModule(where / "text.txt", block_length=SITES), 0
    torch.manual_seed(torch_seed)
    coupling = CouplingLayer(topologies.hidden_markov(SITES, data.vocab_size, 3), data.vocab_size)
    coupling.init_from_corpus(data.train_blocks(), progress=False, epochs=1)
    network = BidirectionalTransformer(data.vocab_size, 16, 1, 2)
    save_model(where / "model", network, coupling, data.tokenizer)
    save_model(where / "bare", network, coupling)
    CausalJudge(data.vocab_size, 16, 1, 2, SITES).save(where / "judge", data.tokenizer, {"step": 5})
    (where / "other.txt").write_text("0123456789 " * 40, encoding="utf-8")
    other = TextDataModule(where / "other.txt", block_length=SITES)
    CausalJudge(other.vocab_size, 16, 1, 2, SITES).save(where / "foreign", other.tokenizer)
    return where


def judge(folder: Path, *words: str, model: str = "model", by: str = "judge") -> list[str]:
    start = ["judge", str(folder / model), str(folder / "text.txt"), "--judge", str(folder / by)]
    return [*start, "--samples", "20", "--batch-size", "8", "--steps", "2", *words]


def test_the_record(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "name" / "samples.json"
    words = judge(folder, "--output", str(target), "--seed", "3")
    assert main(words) == 0
    said = capsys.readouterr()
    assert "samples under the judge" in said.out and "Loading" not in said.err
    record = json.loads(target.read_text())
    assert [row["name"] for row in record["rows"]] == [
        "held-out text", "factorised", "coupled", "factorised, in the time of coupled"
    ]  # fmt: skip
    assert record["judge"] == {"step": 5} and record["sites"] == SITES
    assert record["command"].startswith("codd judge") and {"date", "device", "versions"} <= record.keys()


@pytest.mark.parametrize(
    "words,message",
    [
        ({"by": "foreign"}, "another one"),
        ({"by": "model"}, "expected the folder of a judge"),
        ({"model": "bare"}, "no tokenizer.json"),
    ],
)
def test_folders_that_do_not_go_together(folder: Path, words, message, capsys) -> None:
    assert main(judge(folder, **words)) == 2
    assert message in capsys.readouterr().err


def test_a_folder_for_a_file_and_too_little_text(folder: Path, tmp_path: Path, capsys) -> None:
    assert main(judge(folder, "--output", str(tmp_path))) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main([*judge(folder), "--samples", "1"]) == 2
    assert "--samples: expected at least 2" in capsys.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text("cat", encoding="utf-8")
    words = judge(folder)
    words[2] = str(short)
    assert main(words) == 2
    assert "at least two blocks" in capsys.readouterr().err
