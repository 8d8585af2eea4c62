"""Cards and the grid: every figure from the records, what was written by hand untouched."""

from pathlib import Path

import pytest

from codd_ppl.cli import main
from codd_ppl.errors import DataError
from codd_ppl.evaluation.card import card_text, update_card
from codd_ppl.evaluation.grid import grid_text, update_grid
from codd_ppl.evaluation.record import save_record
from codd_ppl.evaluation.section import BEGIN, END


def rows(text: str) -> dict[str, list[list[str]]]:
    """First cell -> the other cells of every table row that starts with it."""
    found: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        if line.startswith("| "):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found.setdefault(name, []).append(cells)
    return found


def test_a_card_by_hand(tmp_path: Path, make_record, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "name"
    save_record(make_record(tokens_per_word=1.0), folder / "results.json")
    assert main(["card", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "README.md")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"# name\n\n{BEGIN}\n") and text.endswith(f"\n{END}\n")
    assert "```bash\ncodd evaluate a b\n```" in text and "`heldout.txt`, 6 blocks of 16" in text
    bounds, gaps, perplexities, part = rows(text)["coupled"]
    assert bounds == [f"{b:.3f} ± 0.000" for b in (2.75, 2.625, 2.625, 2.6, 2.45)]
    assert gaps == [f"{g:.2f} [{g:.2f}, {g:.2f}]" for g in (0.83, 0.88, 0.75, 0.60)]
    assert perplexities[0] == f"{2**2.75:.1f}"
    what = "hidden Markov, 128 states, projected (2 sweeps) onto a pool"
    assert part == [what, "12,345", "2.5 min, 200 steps", "-2.0 [-2.0, -2.0]", "1.50", ""]
    assert rows(text)["factorised"][-1] == ["Network, 3 layers", "2,500,000", "", "", "1", ""]
    assert rows(text)["control: prior alone"][0] == ["3.000 ± 0.000"] * 5
    words = " ".join(text.split())
    assert "4 steps of *coupled* are as good as 11.3 (95 % interval 11.3 to 11.3) of *factorised*." in words
    assert "In the same time *factorised* makes 8.0: 2.750 bits per token against 2.625." in words
    assert 1000 < (folder / "nelbo.png").stat().st_size < 40_000


def test_the_part_of_the_coupling(tmp_path: Path, make_record) -> None:
    """0.5 seconds more a step than the network alone, whose call takes 0.25."""
    save_record(make_record(network_seconds={"factorised": 0.25}), tmp_path / "results.json")
    text = card_text(tmp_path)
    assert rows(text)["coupled"][-1][-2:] == ["1.50", "2.00"]
    assert "*the coupling's part*: what it adds to a step" in text


def test_twice_is_once_and_what_is_written_by_hand_stays(tmp_path: Path, make_record) -> None:
    save_record(make_record(), tmp_path / "results.json")
    card = tmp_path / "README.md"
    card.write_text(f"# a\n\nBy hand.\n\n{BEGIN}\nold\n{END}\n\n## Limits\n\nMany.\n", encoding="utf-8")
    update_card(tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {"results.json", "README.md", "nelbo.png"}  # and no temporary file
    text = card.read_text(encoding="utf-8")
    assert text.startswith(f"# a\n\nBy hand.\n\n{BEGIN}\n") and text.endswith(
        f"{END}\n\n## Limits\n\nMany.\n"
    )
    assert "old" not in text
    update_card(tmp_path)
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    typed = text.replace("2.750 ± 0.000", "2.650 ± 0.000", 1)
    card.write_text(typed, encoding="utf-8")
    assert card_text(tmp_path) == text != typed


def test_several_seeds(tmp_path: Path, make_record) -> None:
    """Mean and standard deviation: the coupled bounds are 0, 0.1 and 0.2 above those of the first."""
    for seed in range(3):
        name = f"results_seed{seed}.json" if seed else "results.json"
        save_record(make_record(0.1 * seed, command=f"codd evaluate {seed}"), tmp_path / name)
    text = card_text(tmp_path)
    assert "codd evaluate 0\ncodd evaluate 1\ncodd evaluate 2\n" in text
    bounds, gaps, part = rows(text)["coupled"]
    assert bounds[0] == "2.850 ± 0.100" and gaps[0] == "0.77 ± 0.07"
    assert part[-3:] == ["2.0 ± 4.0", "1.50 ± 0.00", ""]
    assert "as good as 11.3 / 8.57 / 6.5 of *factorised*" in " ".join(text.split())
    assert rows(grid_text(tmp_path.parent))["heldout.txt"][0][6] == "0.77"


def test_a_gap_within_its_noise_is_not_shown(tmp_path: Path, make_record) -> None:
    found = make_record()
    found["models"]["coupled"]["nelbo"]["8"]["gap_closed"] = [1.4, "-inf", "inf"]
    save_record(found, tmp_path / "name" / "results.json")
    assert rows(card_text(tmp_path / "name"))["coupled"][1][3] == "-"
    assert rows(grid_text(tmp_path))["heldout.txt"][0][6:10] == ["0.83", "0.88", "0.75", "-"]


def test_the_grid(tmp_path: Path, make_record, capsys: pytest.CaptureFixture[str]) -> None:
    models = tmp_path / "models"
    save_record(make_record(), models / "b" / "results.json")
    text = {"files": ["another.txt"], "blocks": 6, "tokens": 99}
    save_record(make_record(text=text), models / "z" / "results.json")
    save_record(make_record(drop="coupled"), models / "a" / "results.json")
    (models / "toys").mkdir()
    (models / "toys" / "results.json").write_text('{"toys": 3.14}', encoding="utf-8")
    (models / "empty").mkdir()
    (models / "README.md").write_text("# models\n\nBy hand.\n", encoding="utf-8")
    assert main(["card", str(models)]) == 0
    assert capsys.readouterr().out.strip() == str(models / "README.md")
    page = (models / "README.md").read_text(encoding="utf-8")
    assert page.startswith(f"# models\n\nBy hand.\n\n{BEGIN}\n")
    assert page.index("another.txt") < page.index("[a](a/README.md)") < page.index("[b](b/README.md)")
    what = "hidden Markov, 128 states, projected (2 sweeps) onto a pool"
    alone, coupled = rows(page)["heldout.txt"]
    assert coupled == [
        *("[b](b/README.md)", "27", "16", "2.50 M", "2.500", what, "0.83", "0.88", "0.75", "0.60", "-"),
        *("-2.0 %", "1.50", "3.000"),
    ]
    assert alone == ["[a](a/README.md)", "27", "16", "2.50 M", "2.500"] + [""] * 9
    assert "Results of other kinds: [toys](toys/README.md)." in page and "3.14" not in page
    update_grid(models)
    assert (models / "README.md").read_text(encoding="utf-8") == page


def test_errors_teach(tmp_path: Path, make_record, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", str(tmp_path / "nowhere")]) == 2
    assert "codd evaluate MODEL TEXT --output" in capsys.readouterr().err
    with pytest.raises(DataError, match="folders with results"):
        grid_text(tmp_path)
    file = tmp_path / "results.json"
    file.write_text('{"toys": 1}', encoding="utf-8")
    with pytest.raises(DataError, match="another kind"):
        card_text(tmp_path)
    file.write_text('{"toys": ', encoding="utf-8")
    with pytest.raises(DataError, match="expected JSON results"):
        card_text(tmp_path)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(sites=8), "same sites .* 16 in results.json and 8 in results_seed1.json"),
        (lambda d: d.update(vocab=8), "same vocab"),
        (lambda d: d.update(text={"files": [], "blocks": 1, "tokens": 1}), "same text"),
        (lambda d: d["models"].pop("prior alone"), "same models and steps"),
        (lambda d: d["models"]["coupled"]["nelbo"].pop("2"), "same models and steps"),
    ],
)
def test_records_that_do_not_go_together(tmp_path: Path, make_record, change, said: str) -> None:
    save_record(make_record(), tmp_path / "results.json")
    other = make_record()
    change(other)
    save_record(other, tmp_path / "results_seed1.json")
    with pytest.raises(DataError, match=said):
        card_text(tmp_path)


@pytest.mark.parametrize("marks", [[BEGIN], [END], [END, BEGIN], [BEGIN, END, BEGIN, END]])
def test_marks_that_do_not_pair(tmp_path: Path, make_record, marks: list[str]) -> None:
    save_record(make_record(), tmp_path / "results.json")
    (tmp_path / "README.md").write_text("\n".join(["# a", *marks, ""]), encoding="utf-8")
    with pytest.raises(DataError, match=r"README\.md: expected .* on the lines"):
        update_card(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "\n".join(["# a", *marks, ""])
    assert not (tmp_path / "nelbo.png").exists()
