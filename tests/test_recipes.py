"""The recipes of models/: every config.yaml trains, on a text made on the spot; every folder has card and results."""

import json
import random
from pathlib import Path

import pytest

from codd_ppl.cli import main
from codd_ppl.evaluation.card import card_text
from codd_ppl.evaluation.grid import grid_text
from codd_ppl.evaluation.section import BEGIN
from codd_ppl.evaluation.seeds import read_seeds
from codd_ppl.model_folder import load_model

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
    assert 0 < (MODELS / name / "nelbo.png").stat().st_size < 40_000
    assert all(path.stat().st_size < 15_000 for path in (MODELS / name).glob("results*.json"))


def test_no_figure_of_the_grid_is_typed() -> None:
    page = (MODELS / "README.md").read_text(encoding="utf-8")
    assert BEGIN in page and page == grid_text(MODELS), "run: codd card models"


def test_the_text8_recipes_run_one_after_the_other(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their own sizes, for two steps; the coupled one takes up the network that the other left."""
    monkeypatch.chdir(tmp_path)
    for name in ("text8_factorised", "text8_coupled"):
        words = ["fit", "--config", str(MODELS / name / "config.yaml"), "--data.path", str(text)]
        words += ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--data.batch_size", "4"]
        words += ["--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false"]
        assert main(words) == 0
    first, second = (
        load_model(tmp_path / "runs" / name / "model") for name in ("text8_factorised", "text8_coupled")
    )
    assert first.about["step"] == second.about["step"] == 2
    assert not first.coupling.plan.factors and sum(v.latent for v in second.coupling.graph) == 64
    for key, value in first.denoiser.state_dict().items():
        assert value.equal(second.denoiser.state_dict()[key]), key
    assert first.tokenizer is not None and first.tokenizer.get_vocab_size() == 27
