"""The command line, on a text made on the spot."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import codd_ppl.demo.run as run
from codd_ppl.cli import main
from codd_ppl.data import demo_model_path
from codd_ppl.demo import DemoSettings, run_demo
from codd_ppl.errors import ConfigError
from codd_ppl.model_folder import load_model

TEXT = "the cat sat on the mat and the dog sat on the log. a hat for the cat, a bone for the dog. " * 60
TINY = replace(
    DemoSettings.fast(), sites=12, states=6, hidden=16, layers=1, train_steps=20, valid_blocks=16, epochs=1.0
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def model(text: Path, tmp_path: Path) -> Path:
    """The model folder of a tiny demonstration."""
    return run_demo(text, tmp_path / "out", TINY).folder / "model"


def test_demo_writes_all_it_promises(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_demo(text, tmp_path / "out", TINY)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"model", "nelbo.json", "nelbo.png", "graph.png", "reveals.png", "report.html"}
    assert result.table.steps == (1, 2, 4, 8, 12) and set(result.samples) == {"factorised", "coupled"}
    assert result.table.mean("coupled", 1) < result.table.mean("factorised", 1)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64") == 3 and "gap closed" in page
    printed = capsys.readouterr().out
    assert "samples at 4 steps" in printed and "coupled at 4 steps" in printed


def test_the_demo_that_comes_with_the_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A network and a coupling from the package's own data, nothing trained; the coupling gains at every T."""
    settings = replace(DemoSettings.pretrained(), valid_blocks=48, timing_seconds=0.1)
    result = run_demo(folder=tmp_path / "out", settings=settings, train=False)
    assert "--train" in capsys.readouterr().out
    for T in result.table.steps:
        mean, error = result.table.difference("coupled", "factorised", T)
        assert mean < 2 * error
    assert result.table.mean("coupled", 1) < 0.65 * result.table.mean("factorised", 1)
    assert result.table.mean("coupled", 4) < result.table.mean("factorised", 8)
    weights = demo_model_path() / "weights.safetensors"
    assert weights.stat().st_size < 2_000_000
    assert main(["generate", str(tmp_path / "out" / "model"), "--samples", "1", "--steps", "2"]) == 0
    with pytest.raises(ConfigError, match="train=True"):
        run_demo("text.txt", tmp_path / "other", train=False)


def test_ctrl_c_leaves_a_usable_model(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_fit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_demo(text, tmp_path / "out", TINY)
    assert load_model(tmp_path / "out" / "model").about == {"interrupted": True}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is another thing there")
@pytest.mark.parametrize("phase", ["network, factorised loss", "coupling, from the text alone"])
def test_ctrl_c_in_the_middle_of_the_command(phase: str, text: Path, tmp_path: Path) -> None:
    """A signal to the process, as from a terminal: status 130, a word on what is there, no traceback."""
    code = "import sys; from codd_ppl.cli import main; sys.exit(main())"
    words = ["demo", "--fast", "--text", str(text), "--output", str(tmp_path / "out")]
    with subprocess.Popen(
        [sys.executable, "-u", "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if phase in line:
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        printed = process.stdout.read()
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    assert "interrupted; what was trained so far is in" in printed
    folder = tmp_path / "out" / "model"
    assert load_model(folder).about == {"interrupted": True}
    assert main(["generate", str(folder), "--samples", "1", "--steps", "2"]) == 0


def test_generate_and_evaluate(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["generate", str(model), "--samples", "2", "--template", "the c__ sat"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 and all(row.startswith("the c") and row[7:11] == " sat" for row in rows)
    target = tmp_path / "table.json"
    words = [
        "evaluate",
        str(model),
        str(text),
        "--steps",
        "1",
        "12",
        "--blocks",
        "8",
        "--timing",
        "0.1",
        "--table",
        str(target),
    ]
    assert main(words) == 0
    table = json.loads(target.read_text())
    assert set(table["values"]) == set(table["seconds_per_sample"]) == {"factorised", "coupled"}
    assert main(["explain", str(model)]) == 0


def test_evaluate_on_wikitext_with_controls(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Perplexities per word follow from the bits per token and the two counts."""
    text = tmp_path / "wiki.txt"
    text.write_text(
        " = the cat = \n \n" + " the cat sat on the mat , and the dog sat . \n" * 40, encoding="utf-8"
    )
    capsys.readouterr()
    words = [
        "evaluate",
        str(model),
        str(text),
        "--steps",
        "1",
        "12",
        "--blocks",
        "8",
        "--wikitext",
        "--controls",
    ]
    assert main(words) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(name in printed for name in ("marginals alone", "prior alone", "sharpened 0.8"))
    found = re.search(r"\(([\d,]+) words as WikiText counts them, ([\d.]+) tokens each\)", printed)
    assert found is not None and int(found[1].replace(",", "")) == 5 + 1 + 40 * 13
    tokens = 40 * len("the cat sat on the mat, and the dog sat.\n") + len("= the cat =\n\n")
    assert abs(float(found[2]) - tokens / 526) < 0.01
    assert re.search(r"coupled T=1: [\d.e+]+ T=12: [\d.e+]+", printed)


@pytest.mark.parametrize("words", [["generate", "nowhere"], ["demo", "--text", "nowhere.txt"]])
def test_errors_are_one_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert "nowhere" in capsys.readouterr().err


def test_explain_a_topology(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--sites", "5", "--states", "4", "--batch", "2"]) == 0
    assert "z0" in capsys.readouterr().out


@pytest.fixture
def recipe(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in the current folder, for three steps."""
    from codd_ppl import TextDataModule

    vocab = TextDataModule(text).vocab_size
    recipe = tmp_path / "config.yaml"
    recipe.write_text(
        f"""
model:
  denoiser:
    class_path: codd_ppl.denoisers.BidirectionalTransformer
    init_args: {{vocab_size: {vocab}, hidden_size: 16, layers: 1, heads: 2}}
  coupling:
    class_path: codd_ppl.coupling.CouplingLayer
    init_args:
      graph:
        class_path: codd_ppl.graphs.topologies.hidden_markov
        init_args: {{sites: 12, cardinality: {vocab}, states: 3}}
      vocab_size: {vocab}
  init_from_corpus: true
data:
  path: [{text}, {text}]
  block_length: 12
  batch_size: 16
trainer:
  accelerator: cpu
  max_steps: 3
  logger: false
  enable_progress_bar: false
  enable_checkpointing: false
""",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    return recipe


def test_fit_by_a_recipe(recipe: Path, tmp_path: Path) -> None:
    """LightningCLI: a recipe names the network, the graph and the data; data of no class are text."""
    assert main(["fit", "--config", str(recipe)]) == 0
    assert (tmp_path / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("block_length: 12", "block_len: 12", "does not accept option 'data.block_len'"),
        ("batch_size: 16", "batch_size: many", "Expected a <class 'int'>. Got value: many"),
        ("  path: [", "  valid_path: [", "required: fit.data.path"),
        ("data:\n", "data: {class_path: codd_ppl.training.Nothing}\n#", "no attribute 'Nothing'"),
        ("data:\n", "data: {class_path: codd_ppl.Sampler}\n#", "not correspond to a subclass"),
        (
            "data:\n",
            "data: {class_path: codd_ppl.TextDataModule, init_args: {sites: 1}}\n#",
            "Option 'sites' is not accepted",
        ),
        ("hidden_markov", "hidden_markow", "no attribute 'hidden_markow'"),
        ("states: 3", "stats: 3", "Option 'stats' is not accepted"),
        ("init_from_corpus: true", "init_corpus: true", "model.init_corpus"),
    ],
)
def test_a_bad_recipe_is_told_where(
    recipe: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, said: str
) -> None:
    text = recipe.read_text(encoding="utf-8")
    assert old in text
    changed = text.replace(old, new)
    if "#" in changed:  # the data are on one line
        changed = changed[: changed.index("#")] + changed[changed.index("trainer:") :]
    recipe.write_text(changed, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(recipe)])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("block_length: 12", "block_length: 0", "codd: expected block_length >= 1, found 0"),
        ("states: 3", "states: 0", "codd: "),
        ("text.txt, ", "no.txt, ", "no.txt"),
        (
            "data:\n",
            "data:\n  class_path: codd_ppl.TextDataModule\n",
            "block_length, path beside them; put settings",
        ),
        ("block_length: 12", "block_length: 9", "codd: the data's blocks have 9 tokens, expected 12"),
    ],
)
def test_what_a_part_of_a_recipe_raises_is_said_as_it_is(
    recipe: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, said: str
) -> None:
    text = recipe.read_text(encoding="utf-8")
    assert old in text
    recipe.write_text(text.replace(old, new), encoding="utf-8")
    assert main(["fit", "--config", str(recipe)]) == 2
    printed = capsys.readouterr().err
    assert said in printed and "Traceback" not in printed
