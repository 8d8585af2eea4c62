"""The benchmark of the inference engine, on tiny sizes: right answers, whole files, clear errors; no time is judged."""

import gc
import importlib.util
import json
from itertools import product

import pytest
import torch

from codd_ppl.cli import main
from codd_ppl.evaluation.benchmark import (
    PARTS,
    BenchmarkSettings,
    benchmark_inference,
    numerics,
    peers,
    plain,
    plain_graphs,
    report,
    rounds,
    scaling,
    tasks,
)
from codd_ppl.evaluation.benchmark.cases import Case, make_inputs
from codd_ppl.evaluation.benchmark.limits import Limits, measure_limits
from codd_ppl.evaluation.benchmark.memory import peak_bytes
from codd_ppl.evaluation.benchmark.ours import OURS, answers, our_plan, potentials
from codd_ppl.evaluation.benchmark.result import Result
from codd_ppl.evaluation.benchmark.rounds import Candidate, Timing, measure
from codd_ppl.evaluation.benchmark.targets import targets
from codd_ppl.evaluation.benchmark.tasks import TASKS, Cell
from codd_ppl.inference import log_partition, log_score, mode

TINY = [Case("shared", 2, 5, 3), Case("full", 2, 4, 3), Case("tree", 2, 6, 3), Case("tokens", 2, 3, 2, 4)]
CHAINS = TINY[:2]
LIMITS = Limits(gemm=1e11, copy=1e10, exp=1e9, op=1e-6)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tiny case of each layout; no call that takes long."""
    monkeypatch.setattr(peers, "LONGEST", 0.1)
    monkeypatch.setattr(rounds, "ROUNDS", 1)
    monkeypatch.setattr(
        tasks,
        "cells",
        lambda task, quick: [
            Cell(task, query, case)
            for query in tasks.QUERIES[task]
            for case in ([TINY[3]] if task == "T5" else [TINY[2]] if task == "T6" else CHAINS)
        ],
    )
    monkeypatch.setattr("codd_ppl.evaluation.benchmark.run.cells", tasks.cells)


# --- the answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.layout)
def test_all_candidates_agree(case):
    """Plain code, ours and torch-struct (others where installed) on every query that has one answer."""
    queries = {q for t in TASKS for q in tasks.QUERIES[t] if case in tiny_cases(t)} - {"sample", "samples"}
    assert queries
    for query in queries:
        inputs, candidates = Cell("T", query, case).candidates()
        compare = tasks.comparison(query, inputs, candidates)
        found = measure(candidates, 0.001, compare)
        assert all(t.reason == "not installed" or t.error < 1e-4 for t in found.values()), (query, found)
        assert found[OURS].error is not None and found[OURS].median > 0


def tiny_cases(task):
    return [TINY[3]] if task == "T5" else [TINY[2]] if task == "T6" else CHAINS


@pytest.mark.parametrize("case", CHAINS, ids=lambda case: case.layout)
def test_gradients_of_tables_agree(case):
    inputs = make_inputs(case)
    theirs = plain.gradient(inputs.requiring_grad())
    ours = answers("gradient", inputs).call()
    two = plain.forward_backward(inputs)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    edges = two[1].sum(0) if case.layout == "shared" else two[1]
    torch.testing.assert_close(edges, ours[-1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CHAINS, ids=lambda case: case.layout)
def test_plain_samples_have_the_right_frequencies(case):
    inputs, draws = make_inputs(Case(case.layout, 1, 3, 2)), 20_000
    plan = our_plan(inputs.case)
    found = plain.sample(inputs, draws)[:, 0]
    total = log_partition(plan, potentials(plan, inputs))
    for path in product(range(2), repeat=3):
        values = {f"x{i}": torch.tensor([v]) for i, v in enumerate(path)}
        p = float((log_score(plan, potentials(plan, inputs), values) - total).exp())
        share = float((found == torch.tensor(path)).all(-1).double().mean())
        assert abs(share - p) < 5 * (p * (1 - p) / draws) ** 0.5 + 1e-3


def test_plain_token_samples_have_the_right_frequencies():
    inputs = make_inputs(Case("tokens", 4000, 2, 2, 3))
    same = type(inputs)(inputs.case, inputs.table, inputs.unary[:1].expand(4000, -1, -1), inputs.emission)
    tokens = plain_graphs.tokens_sample(same)[1]
    one = type(inputs)(Case("tokens", 1, 2, 2, 3), inputs.table, inputs.unary[:1], inputs.emission)
    truth = answers("marginals", one)
    marginals = truth.read(truth.call())[0]
    share = torch.nn.functional.one_hot(tokens, 3).float().mean(0)
    torch.testing.assert_close(share, marginals, atol=0.04, rtol=0.0)


def test_the_log_space_reference_is_ours_in_float64():
    for case in CHAINS:
        inputs = make_inputs(case, dtype=torch.float64)
        total, marginals = numerics.log_space(inputs)
        plan = our_plan(case)
        torch.testing.assert_close(total, log_partition(plan, potentials(plan, inputs)))
        mine = answers("marginals", inputs)
        torch.testing.assert_close(marginals, mine.read(mine.call()))


def test_ours_is_right_where_plain_code_is_not():
    peaked = {p.name: p for p in numerics.problems(quick=True)}
    for name in ("N(0, 100²), N=128, C=8", "contradiction: needs exp(-150), exp(-200)"):
        found = numerics.errors(peaked[name])
        assert found[OURS]["log_partition"] < 1e-2 and found[OURS]["marginals"] < 1e-4
        assert found["plain"]["log_partition"] in ("nan", "inf")


def test_a_wrong_path_is_seen():
    inputs = make_inputs(CHAINS[0])
    candidates = Cell("T3", "mode", CHAINS[0]).candidates()[1]
    compare = tasks.comparison("mode", inputs, candidates)
    best = mode(our_plan(CHAINS[0]), potentials(our_plan(CHAINS[0]), inputs))
    path = torch.stack([best[f"x{i}"] for i in range(5)], -1)
    assert compare(path) == 0.0
    path[0, 2] = (path[0, 2] + 1) % 3
    assert compare(path) > 0.0


# --- rounds, limits, slopes, memory, targets -------------------------------------------------------------


def test_rounds_take_turns():
    calls = []
    two = [Candidate(name, "peer", lambda name=name: calls.append(name)) for name in "ab"]
    found = measure(two, budget=10.0)
    assert calls == list("ab") * (len(calls) // 2)
    assert len(found["a"].seconds) == len(calls) // 2 - 1  # the first call is not counted


def test_garbage_waits_while_the_clock_runs():
    """A full collection looks through all candidates' objects, 0.2 s and more, and would be counted as one call's."""
    seen = []
    measure([Candidate("a", "peer", lambda: seen.append(gc.isenabled()))], budget=10.0)
    assert not any(seen[1:]) and gc.isenabled()

    def fail():
        if len(seen) % 2 == 0:
            raise ValueError("later")
        seen.append(True)

    seen[:] = [True]
    with pytest.raises(ValueError, match="later"):
        measure([Candidate(OURS, "ours", fail)], budget=10.0)
    assert gc.isenabled()


def test_a_peer_may_fail_and_we_may_not():
    def fail():
        raise ValueError("no such thing\nat all")

    found = measure([Candidate("x", "peer", fail)], 0.01)
    assert found["x"].reason == "ValueError: no such thing" and found["x"].median is None
    with pytest.raises(ValueError, match="no such thing"):
        measure([Candidate(OURS, "ours", fail)], 0.01)


def test_peers_that_take_too_long_are_not_called():
    for case in (Case("shared", 8, 32, 128), Case("full", 1, 32, 1024)):
        assert "O(sites states^3)" in peers._obstacle("torch-struct", "log_partition", case)
    assert "predicted" in peers._obstacle("torch-struct", "sample", Case("shared", 8, 128, 32))
    assert "GiB" in peers._obstacle("pomegranate", "marginals", Case("shared", 4, 128, 1024))
    assert not peers._obstacle("dynamax", "log_partition", Case("shared", 8, 32, 128))


def test_a_wrong_answer_is_marked():
    timings = {
        "plain": Timing("plain", [1.0]),
        OURS: Timing("ours", [1.0]),
        "x": Timing("peer", [1.0], error=float("nan")),
    }
    result = Result({}, LIMITS, [(Cell("T1", "log_partition", CHAINS[0]), timings)])
    assert any("x is wrong at 2,5,3" in note for sheet in report.sheets(result) for note in sheet.notes)
    assert (
        json.loads(json.dumps(result.to_dict(), allow_nan=False))["cells"][0]["candidates"]["x"]["error"]
        == "nan"
    )


def test_limits_are_rates():
    found = measure_limits(0.001)
    assert all(value > 0 for value in found.to_dict().values())
    case = Case("full", 8, 128, 128)
    assert LIMITS.seconds("log_partition", case) == pytest.approx(case.bytes / 1e10 + case.bytes / 4 / 1e9)
    tokens = Case("tokens", 8, 32, 1024, 32_768)
    flops = 2 * 8 * 32 * 1024 * (32_768 + 1024)
    assert LIMITS.seconds("log_partition", tokens) == pytest.approx(flops / 1e11 + 8 * 32 * 32_768 / 1e9)


def test_slope():
    assert scaling.slope([1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx(1.0)
    assert scaling.slope([1, 10], [1.0, 100.0]) == pytest.approx(2.0)


def test_peak_memory_counts_what_lives_at_once():
    x = torch.zeros(1000)
    assert peak_bytes(lambda: x.exp() + x.exp()) == 12_000
    assert peak_bytes(lambda: x.exp().exp().exp()) == 8_000


def test_targets_take_the_fastest_rival():
    def timings(**seconds):
        kinds = {OURS: "ours", "torch-struct": "peer"}
        names = {name.replace("_", " "): value for name, value in seconds.items()}
        names = {OURS if n == "ours" else "torch-struct" if n == "struct" else n: v for n, v in names.items()}
        return {n: Timing(kinds.get(n, "plain"), [v]) for n, v in names.items()}

    result = Result({}, LIMITS)
    case = Case("full", 8, 32, 8)
    result.cells = [
        (Cell("T1", "log_partition", case), timings(plain=2.0, plain_fast=1.0, struct=10.0, ours=3.0)),
        (Cell("T2", "marginals", case), timings(plain_autograd=4.0, plain_two=1.0, ours=2.0)),
        (Cell("T4", "sample", case), timings(plain=1.0, ours=1.0)),
        (Cell("T4", "samples", case), timings(plain=1.0, ours=5.0)),
    ]
    result.curves = [scaling.Curve("sites", "mode", (1, 2), (1.0, 4.0))]
    found = {t.name: t for t in targets(result)}
    assert found["log_partition / plain"].worst == ("log_partition full 8,32,8", 3.0)
    assert found["log_partition / plain"].reached == 0
    assert found["marginals / plain with autograd"].middle == 0.5
    assert found["64 samples / one"].middle == 5.0
    assert found["/ torch-struct, 8 states"].reached == 1
    assert found["slope in sites (0.95 to 1.05)"].ratios == {"mode": 2.0}
    assert "/ dynamax jit, 8 states" not in found


# --- the command -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ci
def test_every_part_is_in_the_files(tmp_path, few, monkeypatch, capsys):
    hard = numerics.problems(quick=True)[-1:]
    monkeypatch.setattr(numerics, "problems", lambda quick: hard)
    monkeypatch.setattr(scaling, "AXES", ("sites",))
    settings = BenchmarkSettings(quick=True, cell_seconds=0.001)
    benchmark_inference(tmp_path / "out", settings, "codd bench inference")
    data = json.loads((tmp_path / "out" / "inference_cpu.json").read_text())
    assert {row["task"] for row in data["cells"]} == set(TASKS)
    assert {row["query"] for row in data["cells"]} == {q for qs in tasks.QUERIES.values() for q in qs}
    assert all(row["candidates"][OURS]["median"] > 0 and row["limit"] > 0 for row in data["cells"])
    assert data["memory"] and data["numerics"] and data["scaling"][0]["slope"] and data["targets"]
    assert set(data["about"]) >= {"command", "date", "device", "threads", "versions"}
    assert not data["skipped"]
    page = (tmp_path / "out" / "inference_cpu.md").read_text()
    printed = capsys.readouterr().out
    for title in (
        "Ratios of codd_ppl against targets",
        "T1 log_partition, shared",
        "Peak extra memory",
        "log Z",
    ):
        assert title in page and title in printed
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "inference_cpu.json",
        "inference_cpu.md",
        "inference_cpu.png",
    ]


def test_a_missing_peer_is_shown_as_such(tmp_path, few, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in MISSING else find(name, *a)
    )
    settings = BenchmarkSettings(("T1",), quick=True, cell_seconds=0.001)
    result = benchmark_inference(tmp_path, settings)
    assert result.cells[0][1]["torch-struct"].reason == "not installed"
    assert "torch-struct: not installed" in (tmp_path / "inference_cpu.md").read_text()
    row = json.loads((tmp_path / "inference_cpu.json").read_text())["cells"][0]["candidates"]["dynamax"]
    assert row["median"] is None and row["reason"] == "not installed"


MISSING = set(peers.PEERS.values())


def test_the_budget_lists_what_is_left(tmp_path, few):
    settings = BenchmarkSettings(("T1", "scaling"), quick=True, budget=1e-9, cell_seconds=0.001)
    result = benchmark_inference(tmp_path, settings)
    assert not result.cells and len(result.skipped) == 4 + 3
    assert "Not measured" in (tmp_path / "inference_cpu.md").read_text()


def test_ctrl_c_leaves_whole_files(tmp_path, few, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(numerics, "errors", interrupt)
    words = ["bench", "inference", "--quick", "--only", "T6,numerics", "--output", str(tmp_path)]
    assert main(words) == 130
    data = json.loads((tmp_path / "inference_cpu.json").read_text())
    assert {row["task"] for row in data["cells"]} == {"T6"} and data["about"]["command"].endswith(
        "T6,numerics"
    )
    monkeypatch.setattr(report.os, "replace", interrupt)
    before = (tmp_path / "inference_cpu.json").read_bytes()
    assert main([*words[:4], "T6", *words[5:]]) == 130
    assert (tmp_path / "inference_cpu.json").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("only", ["T9", "", "T1,,T2"])
def test_an_unknown_part_is_an_error(only, tmp_path, capsys):
    assert main(["bench", "inference", "--only", only, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in PARTS) and "--only T1,T3" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--budget", "0"], ["--threads", "0"], ["--budget", "nan"]])
def test_settings_out_of_range(words, tmp_path, capsys):
    assert main(["bench", "inference", *words, "--output", str(tmp_path / "out")]) == 2
    assert "leave them out" in capsys.readouterr().err


def test_output_must_not_be_a_file(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["bench", "inference", "--output", str(tmp_path / "file")]) == 2
    assert "--output" in capsys.readouterr().err


def test_threads_are_left_as_they_were(tmp_path, few):
    before = torch.get_num_threads()
    benchmark_inference(tmp_path, BenchmarkSettings(("T6",), quick=True, cell_seconds=0.001, threads=2))
    assert torch.get_num_threads() == before


def test_the_tables_cover_the_sizes():
    full = {cell.case for task in TASKS for cell in tasks.cells(task)}
    assert Case("shared", 8, 128, 128) in full and Case("shared", 4, 128, 1024) in full
    assert Case("tokens", 8, 32, 1024, 32_768) in full and Case("tree", 8, 64, 64) in full
    assert all(len(tasks.cells(task, quick=True)) < len(tasks.cells(task)) or task == "T5" for task in TASKS)
