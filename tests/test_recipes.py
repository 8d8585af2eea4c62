"""The recipes of models/: every config.yaml trains, on a text made on the spot; every folder has card and results."""

import json
import random
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from codd_ppl.cli import main
from codd_ppl.evaluation.card import card_text
from codd_ppl.evaluation.grid import grid_text
from codd_ppl.evaluation.section import BEGIN
from codd_ppl.evaluation.seeds import read_seeds
from codd_ppl.judge import CausalJudge
from codd_ppl.model_folder import SavedModel, load_model
from codd_ppl.potentials import ContextualLatentPotentials, LogarithmicPool

MODELS = Path(__file__).parents[1] / "models"
RECIPES = sorted(p.name for p in MODELS.iterdir() if p.is_dir())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some documents of pseudo-words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucmfwyp", k=draw.randint(1, 7))) for _ in range(60)]
    rows = [json.dumps({"text": " ".join(draw.choices(words, k=600))}) for _ in range(8)]
    path = tmp_path_factory.mktemp("text") / "wikipedia.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_card_and_results(name: str) -> None:
    card = (MODELS / name / "README.md").read_text(encoding="utf-8")
    assert card.startswith(f"# {name}\n")
    results = json.loads((MODELS / name / "results.json").read_text(encoding="utf-8"))
    assert {"command", "date", "device"} <= set(results)


@pytest.mark.parametrize("name", RECIPES)
def test_no_figure_of_a_card_is_typed(name: str) -> None:
    """A folder with records, or a card with the marks, says what `codd card` makes of the JSON."""
    card = (MODELS / name / "README.md").read_text(encoding="utf-8")
    if read_seeds(MODELS / name) is None:
        assert BEGIN not in card, "results of another kind don't go between these marks"
        return
    assert card == card_text(MODELS / name), f"run: codd card models/{name}"
    assert 0 < (MODELS / name / "nelbo.png").stat().st_size < 80_000
    assert all(path.stat().st_size < 30_000 for path in (MODELS / name).glob("results*.json"))


def test_no_figure_of_the_grid_is_typed() -> None:
    page = (MODELS / "README.md").read_text(encoding="utf-8")
    assert BEGIN in page and page == grid_text(MODELS), "run: codd card models"


CHAINS = {
    "text8": ["text8/network", "text8/hmm", "text8/contextual", "text8_256/network", "text8_256/hmm"],
    "gsm8k": [f"gsm8k/{path.stem}" for path in (MODELS / "gsm8k").glob("*.yaml")],
    "bpe4k": ["bpe4k/network", "bpe4k/hmm", "bpe4k/contextual"],
    "bpe32k": ["bpe32k/network", "bpe32k/hmm"],
}
"""Recipes that take up what the ones before them left."""
JUDGES = ["text8/judge"]
CHAINS["gsm8k"].sort(key=lambda name: ("network" not in name, "hmm" not in name, name))


def run(names: list[str], text: Path, *more: str) -> dict[str, SavedModel]:
    """Each recipe for at most two steps, one after the other as their comments say; the models they leave."""
    found = {}
    for name in names:
        recipe = MODELS / f"{name}.yaml"
        settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        words = ["fit", "--config", str(recipe), "--data.path", str(text), "--trainer.accelerator", "cpu"]
        words += ["--trainer.max_steps", str(min(2, settings["trainer"]["max_steps"]))]
        words += ["--data.batch_size", "4", "--trainer.enable_progress_bar", "false", *more]
        words += ["--trainer.limit_val_batches", "0", "--trainer.log_every_n_steps", "1"]
        assert main(words) == 0, name
        found[name] = load_model(settings["model_folder"]["path"])
        assert found[name].about["step"] == min(2, settings["trainer"]["max_steps"])
    return found


def test_every_recipe_is_run_by_a_test() -> None:
    there = {str(p.relative_to(MODELS).with_suffix("")) for p in MODELS.glob("*/*.yaml")}
    assert there == {name for names in CHAINS.values() for name in names} | set(JUDGES)


def check_text8(found: dict[str, SavedModel]) -> None:
    """The coupling takes up the network that the other recipe left, and stands on its own text."""
    network, coupled = found["text8/network"], found["text8/hmm"]
    assert not network.coupling.plan.factors and sum(v.latent for v in coupled.coupling.graph) == 128
    for key, value in network.denoiser.state_dict().items():
        assert value.equal(coupled.denoiser.state_dict()[key]), key
    assert network.tokenizer is not None and network.tokenizer.get_vocab_size() == 27
    assert coupled.coupling.pool is not None
    assert not coupled.coupling.pool.weights.equal(LogarithmicPool().weights)  # it was fitted
    contextual = found["text8/contextual"].coupling
    assert isinstance(contextual.potentials, ContextualLatentPotentials)


def test_the_text8_recipes_run_one_after_the_other(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for a prior of fewer states; with all of them in the slow test."""
    monkeypatch.chdir(tmp_path)
    found = run(["text8/network"], text)
    found |= run(["text8/hmm"], text, "--model.coupling.init_args.graph.init_args.states", "16")
    found |= run(["text8/contextual"], text)
    check_text8(found)


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
def test_recipes_run_one_after_the_other(chain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their own sizes, on a text that has as many characters or pieces of words."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(1)
    letters = "etaoinshrdlucmfwypgbvk"
    count = {"bpe4k": 4_000, "bpe32k": 40_000}.get(chain, 60)
    words = ["".join(draw.choices(letters, k=draw.randint(3, 7))) for _ in range(count)]
    if chain == "gsm8k":  # with the blank, the line end and the unknown one 116
        words += [chr(c) for c in (*range(33, 127), *range(192, 211))]
    documents = [" ".join(draw.sample(words, len(words))) for _ in range(20)]
    rows = [{"text": document, "question": document, "answer": "4"} for document in documents]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = run(CHAINS[chain], text)
    if chain == "text8":
        check_text8(found)
        assert found["text8_256/hmm"].coupling.sites == 256


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_is_trained_by_its_recipe(
    name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    words = [
        "fit",
        "--config",
        str(MODELS / f"{name}.yaml"),
        "--data.path",
        str(text),
        "--data.batch_size",
        "4",
    ]
    words += ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "0", "--trainer.accelerator", "cpu"]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1"]
    assert main(words) == 0
    judge = CausalJudge.load("runs/text8_judge/model")
    assert judge.vocab_size == 27 and judge.about["step"] == 2 and judge.tokenizer is not None


WEIGHTS = sorted(path.parent for path in MODELS.glob("*/weights/model.json"))


@pytest.mark.parametrize("folder", WEIGHTS, ids=[path.parent.name for path in WEIGHTS])
def test_weights_write_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are small, load, and write another text with the coupling than without."""
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16_000_000
    found = []
    for more in ([], ["--factorised"]):
        assert main(["generate", str(folder), "--samples", "2", "--steps", "2", "--jsonl", *more]) == 0
        found.append([json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()])
    sites = load_model(folder).coupling.sites
    assert found[0] != found[1] and all(len(text) >= sites for text in found[0])
