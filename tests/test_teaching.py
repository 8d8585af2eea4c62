"""Figures of the notebooks: what is drawn, described and displayed."""

import sys

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from IPython.display import Image, Markdown
from matplotlib.figure import Figure

from codd_ppl import constraints, teaching
from codd_ppl.errors import ConfigError, ShapeError


@pytest.fixture
def displayed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    shown: list[object] = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    return shown


def test_style_tells_lines_apart_without_colours() -> None:
    with matplotlib.rc_context():
        teaching.use_style()
        cycle = matplotlib.rcParams["axes.prop_cycle"].by_key()
        assert (
            len({str(dash) for dash in cycle["linestyle"]})
            == len(set(cycle["marker"]))
            == len(cycle["color"])
            == 8
        )
        assert matplotlib.rcParams["font.size"] >= 14


def test_show_displays_the_description_and_closes_the_figure(displayed: list[object]) -> None:
    figure, axes = plt.subplots(figsize=(9, 4))
    axes.plot([1, 2])
    teaching.show(figure, alt="A line from one to two.")
    (image,) = displayed
    assert isinstance(image, Image)
    data, metadata = image._repr_png_()
    assert metadata["alt"] == "A line from one to two." and metadata["width"] == 720
    assert data
    assert not plt.fignum_exists(figure.number)


def test_show_wants_a_description() -> None:
    with pytest.raises(ConfigError, match="'figure'"):
        teaching.show(Figure(), alt="figure")


def test_show_table(displayed: list[object]) -> None:
    teaching.show_table(["T", "bits"], [(1, 0.123456), ("all", 2)])
    (table,) = displayed
    assert isinstance(table, Markdown)
    assert table.data == "| T | bits |\n| --- | --- |\n| 1 | 0.123 |\n| all | 2 |"


def test_heat_map_writes_each_number_in_an_ink_that_can_be_read() -> None:
    axes = Figure().add_subplot()
    teaching.heat_map(
        axes, torch.tensor([[0.0, 1.0], [0.25, 0.5]]), ["a", "b"], ["c", "d"], "title", largest=1.0
    )
    texts = {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts}
    assert texts[1, 0] == ("1.00", "white") and texts[0, 1] == ("0.25", "black")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert axes.images[0].get_clim() == (0.0, 1.0)
    teaching.heat_map(axes, torch.zeros(2, 2))  # nothing to see: no division by zero


def test_heat_map_wants_labels_that_fit() -> None:
    with pytest.raises(ShapeError, match="with 1 and 2 labels"):
        teaching.heat_map(Figure().add_subplot(), torch.zeros(2, 2), ["a"], ["c", "d"])
    with pytest.raises(ShapeError, match="expected a table"):
        teaching.heat_map(Figure().add_subplot(), torch.zeros(2))


def test_automaton_is_drawn_without_states_that_lead_nowhere() -> None:
    axes = Figure().add_subplot()
    teaching.draw_automaton(axes, constraints.regex("ab*"), "abc")
    texts = [text.get_text() for text in axes.texts]
    assert [t for t in texts if t.isdigit()] == ["0", "1"]  # and not the sink
    assert sorted(t for t in texts if t and not t.isdigit()) == ["a", "b"]
    assert len(axes.patches) == 3  # the accepting one is doubled


def test_automaton_wants_one() -> None:
    both = constraints.regex("a", span=(0, 1)) & constraints.regex("b", span=(1, 2))
    with pytest.raises(ConfigError, match="found 2"):
        teaching.draw_automaton(Figure().add_subplot(), both, "ab")


def test_without_ipython_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", None)
    with pytest.raises(ConfigError, match="notebooks"):
        teaching.show_table(["a"], [(1,)])
