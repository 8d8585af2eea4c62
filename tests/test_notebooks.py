"""The notebooks run from top to bottom without a warning, and what is committed is what they say."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def streams(cell: nbformat.NotebookNode) -> list[str]:
    """What a cell wrote to standard error."""
    return [
        o["text"] for o in cell.get("outputs", ()) if o["output_type"] == "stream" and o["name"] == "stderr"
    ]


def shape(notebook: nbformat.NotebookNode) -> list[list[tuple[str, ...]]]:
    """The kinds of outputs of every code cell."""
    kinds = {"stream": lambda o: (o["name"],), "error": lambda o: ("error", o["ename"])}
    rich = lambda o: tuple(sorted(o["data"]))  # noqa: E731
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[kinds.get(o["output_type"], rich)(o) for o in cell.outputs] for cell in cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
@pytest.mark.slow
@pytest.mark.ci
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = nbformat.read(path, as_version=4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = nbformat.read(path, as_version=4)
    NotebookClient(run, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    nbformat.validate(run)
    for number, cell in enumerate(run.cells):
        assert not streams(cell), f"cell {number} writes to standard error"
    assert shape(run) == shape(committed), "run the notebook and save it with its outputs"


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
