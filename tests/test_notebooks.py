"""The notebooks run from top to bottom without a warning, are saved as they ran, and read well unrun."""

import ast
import base64
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if path.stem < "09"]  # with exercises; 09 is a guide
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
every_lesson = pytest.mark.parametrize("path", LESSONS, ids=[p.stem for p in LESSONS])
WIDEST = 120  # characters in a line of code or of printed text: more scrolls sideways
LONGEST = 40  # lines that a cell may print


def streams(cell: nbformat.NotebookNode) -> list[str]:
    """What a cell wrote to standard error."""
    return [
        o["text"] for o in cell.get("outputs", ()) if o["output_type"] == "stream" and o["name"] == "stderr"
    ]


def shape(notebook: nbformat.NotebookNode) -> list[list[tuple[str, ...]]]:
    """The kinds of outputs of every code cell."""
    kinds = {"stream": lambda o: (o["name"],), "error": lambda o: ("error", o["ename"])}
    rich = lambda o: tuple(sorted(o["data"]))  # noqa: E731
    return [[kinds.get(o["output_type"], rich)(o) for o in cell.outputs] for cell in code_cells(notebook)]


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def python(cell: nbformat.NotebookNode) -> ast.Module:
    """The code of a cell without its magics."""
    return ast.parse("\n".join(line for line in cell.source.split("\n") if not line.startswith("%")))


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", ()))


@every_notebook
@pytest.mark.slow
@pytest.mark.ci
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = read(path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = read(path)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(run, timeout=300, resources=where, coalesce_streams=True).execute()
    nbformat.validate(run)
    for number, cell in enumerate(run.cells):
        assert not streams(cell), f"cell {number} writes to standard error"
    assert shape(run) == shape(committed), "run the notebook and save it with its outputs"


def test_the_series_is_complete() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{i:02d}" for i in range(1, len(NOTEBOOKS) + 1)]
    assert len(NOTEBOOKS) == 9


@every_notebook
def test_notebook_is_saved_as_run_once_from_top_to_bottom(path: Path) -> None:
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(streams(cell) for cell in cells)
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)


def imported(notebook: nbformat.NotebookNode) -> Iterator[tuple[str, str]]:
    """(module, name) of every import of codd_ppl; the name is empty in ``import module``."""
    for cell in code_cells(notebook):
        for node in ast.walk(python(cell)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "codd_ppl":
                yield from ((str(node.module), alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((a.name, "") for a in node.names if a.name.split(".")[0] == "codd_ppl")


@every_notebook
def test_notebook_imports_the_public_surface_alone(path: Path) -> None:
    found = list(imported(read(path)))
    assert found
    for module, name in found:
        assert not any(part.startswith("_") for part in [*module.split("."), name]), f"{module}.{name}"
        home = importlib.import_module(module)
        submodule = hasattr(home, "__path__") and importlib.util.find_spec(f"{module}.{name}") is not None
        assert not name or submodule or name in home.__all__, f"{name} is not in __all__ of {module}"


@every_notebook
def test_figures_have_a_description_and_no_tensor_is_dumped(path: Path) -> None:
    figures = 0
    for number, cell in enumerate(code_cells(read(path))):
        for output in cell.outputs:
            text = output.get("text", "") or output.get("data", {}).get("text/plain", "")
            assert "tensor(" not in text, f"code cell {number} prints a raw tensor"
            if output.output_type == "stream":
                lines = text.rstrip("\n").split("\n")
                assert len(lines) <= LONGEST, f"code cell {number} prints {len(lines)} lines"
                assert max(map(len, lines)) <= WIDEST, f"code cell {number} prints lines that scroll sideways"
            if "image/png" in output.get("data", {}):
                figures += 1
                alt = output.metadata.get("image/png", {}).get("alt", "")
                assert len(alt.split()) >= 5, (
                    f"the figure of code cell {number} needs teaching.show(.., alt=..)"
                )
    assert figures


@every_notebook
def test_no_line_scrolls_sideways(path: Path) -> None:
    for number, cell in enumerate(code_cells(read(path))):
        widest = max(map(len, cell.source.split("\n")), default=0)
        assert widest <= WIDEST, f"code cell {number} has a line of {widest} characters"


@every_lesson
def test_lesson_has_its_parts(path: Path) -> None:
    notebook = read(path)
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ") and "You learn" in first.source
    words = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert any("## What to remember" in text for text in words)
    solutions = [cell for cell in notebook.cells if "solution" in tags(cell)]
    assert len(solutions) == 3, "three exercises, each with a cell tagged solution"
    for number, cell in enumerate(solutions, start=1):
        before = notebook.cells[notebook.cells.index(cell) - 1]
        assert before.cell_type == "markdown" and f"### Exercise {number}" in before.source
        assert cell.metadata["jupyter"] == {"source_hidden": True, "outputs_hidden": True}
        assert "hide-cell" in tags(cell)
        asserts = [node for node in ast.walk(python(cell)) if isinstance(node, ast.Assert)]
        assert asserts, f"the solution of exercise {number} claims nothing that a test could see"
    claims = [
        node
        for cell in code_cells(notebook)
        for node in ast.walk(python(cell))
        if isinstance(node, ast.Assert)
    ]
    assert len(claims) >= 10, "a lesson's numbers are asserted"


@every_notebook
def test_readme_shows_the_notebook_with_its_thumbnail(path: Path) -> None:
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    picture = f"notebooks/thumbnails/{path.stem}.png"
    assert f"]({path.parent.name}/{path.name})" in readme
    assert picture in readme
    marked = [cell for cell in code_cells(read(path)) if "thumbnail" in tags(cell)]
    assert len(marked) == 1, "one cell is tagged thumbnail: its figure is the one in the README"
    data = next(o["data"]["image/png"] for o in marked[0].outputs if "image/png" in o.get("data", {}))
    assert size(base64.b64decode(data))[0] > size((FOLDER.parent / picture).read_bytes())[0]


def size(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG file."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(png[16:20]), int.from_bytes(png[20:24])


@every_notebook
def test_links_to_files_lead_somewhere(path: Path) -> None:
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#]+)[^)]*\)", cell.source):
                assert target.startswith(("http", "attachment:")) or (FOLDER / target).exists(), target
