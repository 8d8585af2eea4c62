"""codd convert: from a file that PyJuice wrote to a folder, and what stands in the way."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from codd_ppl import CouplingLayer
from codd_ppl.cli import main
from codd_ppl.convert import hidden_markov_from_pyjuice
from codd_ppl.coupling_files import vocabulary_hash

FILE = Path(__file__).parents[1] / "convert" / "data" / "trained_2.6.3.jpc"
VOCAB = 5


def words(folder: Path, count: int = VOCAB) -> Tokenizer:
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return made


def test_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, out = words(tmp_path / "network"), tmp_path / "coupling"
    given = ["convert", str(FILE), "--out", str(out), "--backbone", "owner/network"]
    assert main([*given, "--tokenizer", str(tmp_path / "network")]) == 0
    assert "a hidden Markov model of 6 states over 5 tokens, 4 sites" in capsys.readouterr().out
    found = CouplingLayer.from_pretrained(out, backbone="owner/network", tokenizer=tokenizer)
    for name, value in hidden_markov_from_pyjuice(FILE).state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=0, atol=0)
    config = json.loads((out / "coupling.json").read_text())
    assert config["tokenizer"] == vocabulary_hash(tokenizer) and config["backbone"] == "owner/network"
    about = config["about"]
    assert about["command"].startswith("codd convert ") and about["converted"] == {
        "file": FILE.name,
        "sha256": hashlib.sha256(FILE.read_bytes()).hexdigest(),
        "library": "PyJuice",
        "sites": 4,
        "states": 6,
        "distribution": "Categorical",
    }


def test_settings(tmp_path: Path) -> None:
    out = tmp_path / "coupling"
    start = ["convert", str(FILE), "--out", str(out), "--sites", "9", "--weights", "float16"]
    assert main([*start, "--combine", "product", "--tokenizer", str(tmp_path / "none.json")]) == 2
    assert main([*start, "--combine", "product"]) == 0
    found = CouplingLayer.from_pretrained(out)
    assert (found.sites, found.combine) == (9, "product")
    assert {v.dtype for v in load_file(out / "coupling.safetensors").values()} == {torch.float16}
    assert main([*start, "--candidates", "3"]) == 0  # over the other
    assert CouplingLayer.from_pretrained(out).candidates == 3


def test_what_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyjuice", None)
    words(tmp_path / "large", VOCAB + 1)
    (tmp_path / "model.jpc").write_bytes(b"cos\nmkdir\n(S'harm'\ntR.")
    out = ["--out", str(tmp_path / "coupling")]
    for arguments, said in (
        ([str(FILE), *out, "--trust-pickle"], "pip install pyjuice"),
        ([str(FILE), *out, "--tokenizer", str(tmp_path / "large")], "expected ids below 5"),
        ([str(FILE), *out, "--combine", "product", "--candidates", "2"], "belongs to the projection"),
        ([str(FILE), "--out", str(tmp_path)], "nothing was written"),
        ([str(tmp_path / "model.jpc"), *out], "a pickle that calls os.mkdir, which was not run"),
    ):
        assert main(["convert", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "coupling").exists() and not Path("harm").exists()
