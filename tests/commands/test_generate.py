"""codd generate: prompts, templates, long texts, JSON lines, the terminal, exit codes."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from codd_ppl import BidirectionalTransformer, CouplingLayer, Sampler, TextDataModule, topologies
from codd_ppl.cli import main
from codd_ppl.commands.generate_output import LiveText, text_output
from codd_ppl.graphs.properties import token_edges
from codd_ppl.model_folder import load_model, save_model
from codd_ppl.sampling import BlockSampler, PathScore, WholeTextSampler, WindowedCoupling, extended

SITES = 8
TEXT = "the cat sat on the mat and the dog sat on the log. a hat for the cat, a bone for the dog.\n" * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders: hmm, tree (no tied chain), bare (without a tokenizer)."""
    where = tmp_path_factory.mktemp("models")
    (where / "text.txt").write_text(TEXT, encoding="utf-8")
    data = TextDataModule(where / "text.txt", block_length=SITES)
    vocab = data.vocab_size
    torch.manual_seed(0)
    network = BidirectionalTransformer(vocab, 16, 1, 2)
    hmm = CouplingLayer(topologies.hidden_markov(SITES, vocab, 6), vocab)
    hmm.init_from_corpus(data.train_blocks(), progress=False, epochs=1)
    save_model(where / "hmm", network, hmm, data.tokenizer)
    save_model(where / "bare", network, hmm)
    tree = CouplingLayer(topologies.latent_tree(SITES, vocab, 3, tie=False), vocab)
    save_model(where / "tree", network, tree, data.tokenizer)
    return where


def generate(folder: Path, *words: str, model: str = "hmm") -> int:
    return main(["generate", str(folder / model), *words])


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_json_lines_say_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "the ", "--prompt", "a hat", "--template", "the c__ [MASK:2]", "--samples", "2"]
    assert generate(folder, *words, "--length", "20", "--jsonl") == 0
    found = lines(capsys)
    assert [(row["prompt"], row["sample"]) for row in found] == [
        (prompt, i) for prompt in ("the ", "a hat", "the c__ [MASK:2]") for i in (0, 1)
    ]
    tokenizer = load_model(folder / "hmm").tokenizer
    assert tokenizer is not None
    for row in found:
        assert set(row) == {"prompt", "sample", "text", "tokens", "nfe", "seconds", "batch"}
        assert tokenizer.decode(row["tokens"], skip_special_tokens=False) == row["text"]
        assert row["batch"] == 6 and row["seconds"] > 0 and row["nfe"] >= 4
    assert all(
        row["text"].startswith(row["prompt"]) and len(row["text"]) == len(row["prompt"]) + 20
        for row in found[:4]
    )
    assert all(
        row["text"].startswith("the c") and row["text"][7] == " " and len(row["text"]) == 30
        for row in found[4:]
    )


@pytest.mark.parametrize(
    "way", [[], ["--block-length", "3", "--context", "2"], ["--lookahead"], ["--windows"], ["--extend"]]
)
def test_the_command_is_the_library(folder: Path, way: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "the cat", "--length", "15", "--steps", "3", "--unmasking", "entropy", "--seed", "7"]
    assert generate(folder, *words, "--cfg-scale", "0.5", "--samples", "3", *way, "--jsonl") == 0
    saved = load_model(folder / "hmm")
    assert saved.tokenizer is not None
    inner = Sampler(saved.denoiser, saved.coupling, "entropy", steps=3)
    settings = {"[]": {"context": None}, "['--lookahead']": {"lookahead": True}}.get(str(way))
    if way and way[0] in ("--windows", "--extend"):
        stretch = extended if way == ["--extend"] else WindowedCoupling
        sampler: BlockSampler | WholeTextSampler = WholeTextSampler(inner, stretch, guidance=0.5)
    else:
        sampler = BlockSampler(inner, **(settings or {"block_length": 3, "context": 2}), guidance=0.5)
    prompt = saved.tokenizer.encode("the cat", add_special_tokens=False).ids
    template = torch.tensor(prompt + 15 * [saved.denoiser.mask_token_id])
    expected = sampler.generate(3 * [template], torch.Generator().manual_seed(7))
    assert [row["tokens"] for row in lines(capsys)] == [row.tolist() for row in expected.tokens]


def test_defaults_fill_the_sites_or_go_on_for_half_of_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(folder, "--prompt", "the", "--prompt", "the cat sat", "--samples", "1", "--jsonl") == 0
    assert generate(folder, "--template", "the cat _at on the mat", "--samples", "1", "--jsonl") == 0
    assert generate(folder, "--samples", "1", "--jsonl") == 0
    assert [len(row["tokens"]) for row in lines(capsys)] == [8, 15, 22, 8]


def test_prompts_from_a_file_and_from_standard_input(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("the cat\n\na dog\n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("a hat\n"))
    words = [
        "--prompt-file",
        str(tmp_path / "prompts.txt"),
        "--prompt-file",
        "-",
        "--prompt",
        "on",
        "--samples",
        "1",
    ]
    assert generate(folder, *words, "--jsonl", "--batch-size", "2") == 0
    captured = capsys.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    assert "no token for" not in captured.err
    assert [row["prompt"] for row in found] == ["on", "the cat", "a dog", "a hat"]
    assert [row["batch"] for row in found] == [2, 2, 2, 2]


def test_stops_end_before_the_string_and_count_in_what_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(folder, "--prompt", "the ", "--length", "60", "--samples", "20", "--jsonl") == 0
    free = lines(capsys)
    words = ["--stop", "t", "--stop", "\\n"]
    assert generate(folder, "--prompt", "the ", "--length", "60", "--samples", "20", *words, "--jsonl") == 0
    found = lines(capsys)
    assert all(row["text"].startswith("the ") and "t" not in row["text"][1:] for row in found)
    assert all("\n" not in row["text"] for row in found)
    assert sum(row["nfe"] for row in found) < sum(row["nfe"] for row in free)
    tokenizer = load_model(folder / "hmm").tokenizer
    assert tokenizer is not None
    space = tokenizer.token_to_id(" ")
    assert (
        generate(
            folder,
            "--prompt",
            "the ",
            "--length",
            "60",
            "--samples",
            "9",
            "--stop-token",
            str(space),
            "--jsonl",
        )
        == 0
    )
    for row in lines(capsys):
        assert space not in row["tokens"][4:-1]


def test_best_of_says_the_probability_of_what_it_kept(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--prompt",
        "the",
        "--length",
        "5",
        "--samples",
        "2",
        "--steps",
        "1",
        "--best-of",
        "8",
        "--jsonl",
    ]
    assert generate(folder, *words) == 0
    found = lines(capsys)
    saved = load_model(folder / "hmm")
    assert saved.tokenizer is not None
    prompt = saved.tokenizer.encode("the", add_special_tokens=False).ids
    template = torch.tensor(prompt + 5 * [saved.denoiser.mask_token_id]).expand(16, -1)
    score = PathScore(16)
    tokens = (
        Sampler(saved.denoiser, saved.coupling, steps=1)
        .generate(template, torch.Generator().manual_seed(0), on_step=score)
        .tokens
    )
    for row, scores, drawn in zip(found, score.log_prob.split(8), tokens.split(8), strict=True):
        assert row["log_prob"] == pytest.approx(scores.max().item(), abs=1e-4)
        assert row["tokens"] == drawn[scores.argmax()].tolist()
        assert row["nfe"] == 8


def test_plain_lines_and_the_factorised_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(folder, "--samples", "3", "--length", "30") == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3 and "network calls" in captured.err
    assert generate(folder, "--samples", "3", "--length", "30", "--factorised", "--extend") == 0
    assert capsys.readouterr().out != captured.out


def test_the_terminal_shows_texts_while_they_are_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every picture: known text and blocks for masks; afterwards the same lines as without a terminal."""
    saved = load_model(folder / "hmm")
    assert saved.tokenizer is not None
    assert generate(folder, "--prompt", "the ", "--samples", "2", "--length", "14", "--steps", "3") == 0
    plain = capsys.readouterr().out
    pictures: list[str] = []
    picture = LiveText._picture

    def noted(self: LiveText) -> object:
        group = picture(self)
        pictures.append("\n".join(str(row) for row in group.renderables))
        return group

    monkeypatch.setattr(LiveText, "_picture", noted)
    monkeypatch.setattr(
        "codd_ppl.commands.generate.text_output", lambda _, *rest: LiveText(rest[-1], *rest[:-1])
    )
    assert generate(folder, "--prompt", "the ", "--samples", "2", "--length", "14", "--steps", "3") == 0
    assert capsys.readouterr().out.endswith(plain)
    masks = [text.count("░") for text in pictures]
    assert masks[0] == 28 and masks == sorted(masks, reverse=True) and masks[-1] == 0
    assert len(pictures) == 1 + 3 * 2, "two blocks of three steps"
    assert pictures[0].splitlines()[0] == "the " + 14 * "░"
    assert all(line.startswith("the ") for text in pictures for line in text.split("\n"))
    assert pictures[-1].replace("\n", " ") == plain.rstrip("\n").replace("\n", " ")


def test_the_output_follows_the_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_model(folder / "hmm").tokenizer
    assert tokenizer is not None

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, json_lines, kind in (
        (Terminal(), False, "LiveText"),
        (Terminal(), True, "JsonLines"),
        (io.StringIO(), False, "Output"),
    ):
        monkeypatch.setattr("sys.stdout", stream)
        assert type(text_output(json_lines, tokenizer, 0, 1)).__name__ == kind


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--samples", "0"], "--samples: expected"),
        (["--best-of", "0"], "--best-of: expected"),
        (["--length", "-1"], "--length: expected"),
        (["--steps", "0"], "steps=4"),
        (["--block-length", "9"], "extended(coupling, sites)"),
        (["--windows", "--context", "4"], "leave out --windows"),
        (["--extend", "--lookahead"], "leave out --windows and --extend"),
        (["--cfg-scale", "-1"], "0 is none"),
        (["--template", "the [MASK:x]"], "as in [MASK:12]"),
        (["--template", "the cat", "--length", "0"], "something to write"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt: expected a UTF-8 text"),
        (["--stop-token", "999"], "--stop-token: expected ids from 0"),
        (["--stop", ""], "empty"),
        (["--device", "abacus"], "try cpu"),
    ],
)
def test_errors_are_one_line_and_teach(
    folder: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(folder, *words) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.out == "" and len(printed.err.splitlines()) == 1


def test_errors_of_the_folder_and_the_graph(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(folder, model="bare") == 2
    assert "tokenizer.json" in capsys.readouterr().err
    assert generate(folder, "--extend", "--length", "20", model="tree") == 2
    assert "WindowedCoupling or BlockSampler" in capsys.readouterr().err
    assert generate(folder, "--windows", "--length", "20", "--samples", "1", model="tree") == 0
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    assert generate(folder, "--prompt-file", str(tmp_path / "empty.txt")) == 2
    with pytest.raises(SystemExit) as stop:
        generate(folder, "--windows", "--extend")
    assert stop.value.code == 2
    capsys.readouterr()
    assert generate(folder, "--prompt", "the Ω", "--samples", "1") == 0
    assert "no token for" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_printed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    generate_ = BlockSampler.generate

    def interrupted(self: BlockSampler, *args: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate_(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockSampler, "generate", interrupted)
    page = tmp_path / "texts.html"
    assert generate(folder, "--samples", "4", "--batch-size", "2", "--jsonl", "--html", str(page)) == 130
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 2 and "Traceback" not in captured.err
    data = re.search(
        r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page.read_text("utf-8"), re.S
    )
    assert data is not None and len(json.loads(data[1])["samples"]) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="pipes are another thing there")
@pytest.mark.slow
@pytest.mark.ci
def test_a_reader_that_leaves_early_is_no_error(folder: Path) -> None:
    code = "import sys; from codd_ppl.cli import main; sys.exit(main())"
    words = ["generate", str(folder / "hmm"), "--samples", "300", "--batch-size", "10", "--length", "30"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 0 and said == ""


# ------------------------------------------------------------------------------------ draws, orders, the page


@pytest.mark.parametrize(
    "words",
    [
        ["--unmasking", "joint_entropy", "--steps", "8"],
        ["--drawing", "latent", "--drawing-temperature", "0.5"],
        ["--drawing", "any_order", "--drawing-temperature", "0.7"],
        ["--drawing", "k_best"],
        ["--temperature", "0.7", "--top-k", "5", "--top-p", "0.9"],
        ["--active-below", "0.5"],
        ["--remasking", "rescale", "--steps", "6"],
    ],
)
def test_ways_to_draw(folder: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Each changes what is written, and the same seed writes the same."""
    found = []
    for how in (words, words, []):
        assert generate(folder, *how, "--samples", "6", "--jsonl", "--seed", "3") == 0
        found.append([row["tokens"] for row in lines(capsys)])
    assert found[0] == found[1] != found[2] and {len(row) for row in found[0]} == {SITES}


def test_the_mode_is_one_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(folder, "--drawing", "mode", "--steps", "1", "--samples", "3", "--jsonl") == 0
    assert len({row["text"] for row in lines(capsys)}) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--drawing-temperature", "0.5"], "--drawing latent and any_order"),
        (["--temperature", "0"], "--drawing mode"),
        (["--html", "page.html", "--best-of", "2"], "leave out --best-of"),
        (["--html", "."], "is a folder"),
        (["--top-p", "1.5"], "top_p"),
        (["--active-below", "2"], "2"),
    ],
)
def test_ways_that_do_not_go(
    folder: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(folder, *words) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") <= 2


@pytest.mark.parametrize("way", [["--block-length", "4"], ["--windows"], ["--extend"]])
def test_the_page(folder: Path, tmp_path: Path, way: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sub" / "page.html"
    words = ["--prompt", "the ", "--length", "20", "--samples", "2", "--steps", "3", "--jsonl"]
    assert generate(folder, *words, *way, "--html", str(path)) == 0
    texts = lines(capsys)
    found = re.search(r'type="application/json">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    samples = json.loads(found[1])["samples"]
    for sample, text in zip(samples, texts, strict=True):
        assert "".join(sample["pieces"]) == text["text"]
        assert sample["history"][:4] == [-1] * 4
        assert set(sample["history"][4:]) == set(range(sample["steps"])), "every step writes something"
        assert sample["edges"] == [[i, i + 1] for i in range(23)]
        assert all(0 < sure <= 1 for sure in sample["confidence"])
    if way[0] == "--block-length":  # the second block is written after the first one
        assert max(samples[0]["history"][4:8]) < min(samples[0]["history"][12:])


def test_the_page_of_a_graph_with_other_edges(folder: Path, tmp_path: Path) -> None:
    words = ["--samples", "1", "--length", "12", "--html", str(tmp_path / "page.html")]
    assert generate(folder, *words, model="tree") == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    found = re.search(r'type="application/json">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    (sample,) = json.loads(found[1])["samples"]
    edges = {tuple(edge) for edge in sample["edges"]}
    inside = set(token_edges(load_model(folder / "tree").coupling.graph))
    assert inside <= edges and max(max(edge) for edge in edges) < 12


# ------------------------------------------------------------------------------------------------ constraints


def test_what_the_text_must_be(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--samples", "20", "--jsonl", "--steps", "3", "--prompt", "the"]
    assert generate(folder, *words, "--regex", "[a-z ]+", "--contains", "at", "--forbids", "t a") == 0
    texts = [row["text"] for row in lines(capsys)]
    assert len(set(texts)) > 5 and {len(text) for text in texts} == {SITES}
    for text in texts:
        assert re.fullmatch("the[a-z ]+", text) and "at" in text and "t a" not in text
    assert generate(folder, *words, "--samples", "2", "--factorised", "--regex", "the (dog|cat) ?") == 0
    assert all(row["text"] in ("the dog ", "the cat ") for row in lines(capsys))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--regex", "[a-z"], "[a-z"),
        (["--regex", "dog.*", "--prompt", "cat"], "cat"),
        (["--contains", "a", "--length", "20"], "leave out --length"),
        (["--contains", "a", "--block-length", "4"], "leave out --length"),
        (["--contains", "a", "--active-below", "0.5"], "leave active_below out"),
        (["--contains", "a", "--drawing", "any_order"], 'use drawing="joint"'),
    ],
)
def test_constraints_that_do_not_go(
    folder: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(folder, *words) == 2
    captured = capsys.readouterr()
    assert said in captured.err and not captured.out
