"""Figures: what they show, and that no global plotting state is touched."""

import pytest
import torch
from matplotlib.figure import Figure

from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.evaluation import NelboTable, plot_nelbo, plot_reveal_history, save_figure
from codd_ppl.sampling import Generation

TABLE = NelboTable(
    sites=4,
    values={
        m: {T: torch.tensor([v, v + 0.1], dtype=torch.float64) for T, v in row.items()}
        for m, row in {"factorised": {1: 4.0, 2: 3.5, 4: 3.0}, "hmm": {1: 3.2, 4: 3.0}}.items()
    },
)


def test_nelbo_curves():
    figure = plot_nelbo(TABLE, entropy=2.9)
    (axes,) = figure.axes
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(legend) == ["entropy of the data", "factorised", "hmm"]
    lines = {bar.get_label(): bar.lines[0] for bar in axes.containers}
    assert list(lines["hmm"].get_xdata()) == [1, 4]
    assert list(lines["hmm"].get_ydata()) == pytest.approx([3.25, 3.05])
    assert list(axes.get_xticks()) == [1, 2, 4]


def test_own_axes_and_a_choice_of_models():
    figure = Figure()
    left, _ = figure.subplots(1, 2)
    assert plot_nelbo(TABLE, models=["hmm"], axes=left) is figure
    assert [bar.get_label() for bar in left.containers] == ["hmm"]
    with pytest.raises(ConfigError, match="found 'lstm'"):
        plot_nelbo(TABLE, models=["lstm"])


@pytest.mark.parametrize("history", [torch.tensor([[0, -1, 2], [1, 1, -1]]), torch.tensor([-1, -1, 0])])
def test_reveal_history(history):
    figure = plot_reveal_history(Generation(tokens=history.clamp_min(0), nfe=1, history=history))
    shown = figure.axes[0].images[0].get_array()
    rows = history.reshape(-1, 3)
    assert shown.shape == rows.shape
    assert (shown.mask == (rows < 0).numpy()).all()
    assert (shown.filled(-1) == rows.numpy()).all()


def test_an_empty_history_is_refused():
    empty = torch.zeros(0, 3, dtype=torch.int64)
    with pytest.raises(ShapeError, match="generate something"):
        plot_reveal_history(Generation(tokens=empty, nfe=0, history=empty))


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_saving_is_whole_or_nothing(tmp_path, suffix):
    path = tmp_path / "figures" / f"nelbo.{suffix}"
    save_figure(plot_nelbo(TABLE), path)
    assert path.stat().st_size > 1000
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(ValueError, match="nosuch"):
        save_figure(plot_nelbo(TABLE), tmp_path / "figure.nosuch")
    assert [p.name for p in tmp_path.iterdir()] == ["figures"]


def test_no_global_plotting_state_is_touched(tmp_path):
    from matplotlib import pyplot, rcParams

    before = dict(rcParams)
    history = torch.tensor([[0, -1, 2]])
    save_figure(plot_nelbo(TABLE), tmp_path / "a.png")
    save_figure(plot_reveal_history(Generation(tokens=history, nfe=1, history=history)), tmp_path / "b.png")
    assert pyplot.get_fignums() == []
    assert dict(rcParams) == before
