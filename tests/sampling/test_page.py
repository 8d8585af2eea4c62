"""The page of a generation: what it holds, and that it plays in a browser."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from codd_ppl.errors import ShapeError
from codd_ppl.graphs import FactorGraph, topologies
from codd_ppl.graphs.properties import token_edges
from codd_ppl.sampling import Generation
from codd_ppl.sampling.page import RevealedText, reveal_page

PIECES = [["a", " ", "</script>", "<b>", "\n", "é"], ["{{data}}", "x", "y", "z", "\u2028", '"']]
HISTORY = torch.tensor([[-1, 0, 2, 0, 1, 2], [1, 1, -1, 2, 0, 0]])
CONFIDENCE = torch.tensor([[1.0, 0.25, 0.5, 0.123456, 0.75, 1.0]] * 2)


def page() -> str:
    tokens = torch.arange(12).reshape(2, 6)
    graph = topologies.hidden_markov(6, 12, 4)
    decode = lambda ids: PIECES[ids[0] // 6][ids[0] % 6]  # noqa: E731
    return Generation(tokens, 3, HISTORY, CONFIDENCE).to_html(decode, graph, "<i> & co")


def test_token_edges() -> None:
    assert token_edges(topologies.hidden_markov(4, 3, 2)) == [(0, 1), (1, 2), (2, 3)]
    assert token_edges(topologies.chain(4, 3)) == [(0, 1), (1, 2), (2, 3)]
    assert token_edges(topologies.independent(4, 3)) == []
    assert token_edges(topologies.star(3, 5, states=2)) == [(0, 1), (0, 2), (1, 2)]
    assert (0, 1) in token_edges(topologies.latent_tree(8, 5, 2, tie=False))
    graph = FactorGraph()
    for i in range(3):
        graph.add_variable(f"x{i}", cardinality=2)
    graph.add_factor(("x2", "x0"))
    assert token_edges(graph) == [(0, 2)]


def test_what_the_page_holds() -> None:
    text = page()
    assert text.count("</script>") == 2  # its own; the token's is escaped
    assert not re.search(r"""(src|href)=|https?://(?!www\.w3\.org/2000/svg)""", text)  # nothing is fetched
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert data["title"] == "<i> & co"
    assert [sample["pieces"] for sample in data["samples"]] == PIECES
    assert torch.tensor([sample["history"] for sample in data["samples"]]).equal(HISTORY)
    for sample in data["samples"]:
        assert sample["steps"] == 3 and sample["edges"] == [[i, i + 1] for i in range(5)]
    assert data["samples"][0]["confidence"][3] == 0.1235


def test_one_text_without_a_batch() -> None:
    found = Generation(torch.arange(2), 1, torch.tensor([0, -1])).to_html(lambda ids: "ab"[ids[0]])
    assert '"pieces":["a","b"],"history":[0,-1],"steps":1,"confidence":null,"edges":[]' in found


def test_what_does_not_go_together() -> None:
    with pytest.raises(ShapeError, match="decode every token"):
        RevealedText(["a", "b"], [0])
    with pytest.raises(ShapeError, match="decode every token"):
        RevealedText(["a", "b"], [0, 1], [1.0])
    with pytest.raises(ShapeError, match="at least one text"):
        reveal_page([])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's chromium, without a window."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on this machine; on Debian: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


def test_it_plays_in_a_browser(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page(), encoding="utf-8")
    tab = browser.new_context(offline=True).new_page()
    wrong: list[str] = []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda message: wrong.append(message.text))
    tab.goto(path.as_uri())
    assert tab.title() == "<i> & co"
    mask = "\u2581"

    def letters() -> list[str]:
        return tab.locator(".token").all_inner_texts()

    def sites(kind: str) -> list[int]:
        return [int(found.get_attribute("data-site")) for found in tab.locator(f".token.{kind}").all()]

    assert letters() == ["a", *[mask] * 5] and sites("given") == [0]
    tab.keyboard.press("ArrowRight")
    assert letters()[:4] == ["a", " ", mask, "<b>"] and sites("now") == [1, 3]
    assert tab.locator("#caption").inner_text() == "step 1: 2 tokens drawn together, 3 left"
    tab.locator("#step").fill("3")
    assert sites("masked") == [] and sites("now") == [2, 5] and letters()[2] == "</script>"
    tab.keyboard.press("Home")
    assert sites("masked") == [1, 2, 3, 4, 5]
    tab.keyboard.press("End")
    tab.locator('.token[data-site="2"]').hover()
    assert sites("near") == [1, 3] and tab.locator("#arcs path").count() == 2
    assert tab.locator('.token[data-site="2"]').get_attribute("title") == "step 3, confidence 0.500"
    colours = {
        site: tab.locator(f'.token[data-site="{site}"]').evaluate("e => e.style.background")
        for site in (1, 5)
    }
    assert colours[1] != colours[5]
    tab.locator("#sample").select_option(index=1)
    assert letters()[0] == "{{data}}" and sites("given") == [2]
    tab.locator("#play").click()  # from the end it begins anew, and stops by itself
    tab.wait_for_function("document.getElementById('step').value === '1'")
    assert tab.locator("#play").inner_text() == "Pause"
    tab.wait_for_function("document.getElementById('play').textContent === 'Play'", timeout=10_000)
    assert tab.locator("#count").inner_text() == "3 / 3"
    assert not wrong
