"""What is read off a table of bounds: gap closed, equivalent steps, intervals, files."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

from codd_ppl.errors import ConfigError, DataError
from codd_ppl.evaluation import NelboTable


def constant(values, blocks=5):
    """A table whose blocks are all alike: every interval has width 0."""
    rows = {
        m: {T: torch.full((blocks,), v, dtype=torch.float64) for T, v in row.items()}
        for m, row in values.items()
    }
    return NelboTable(sites=16, values=rows, settings={"seed": 0})


def noisy(blocks=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(blocks, generator=generator, dtype=torch.float64)  # what all models find hard
    means = {"factorised": {1: 4.0, 4: 3.0, 16: 2.5}, "coupled": {1: 2.8, 4: 2.7, 16: 2.5}}
    return NelboTable(
        sites=16,
        values={
            m: {
                T: v + text + 0.1 * torch.randn(blocks, generator=generator, dtype=torch.float64)
                for T, v in row.items()
            }
            for m, row in means.items()
        },
    )


TABLE = constant(
    {
        "factorised": {1: 4.0, 2: 3.5, 4: 3.0, 8: 2.75, 16: 2.5},
        "coupled": {1: 2.75, 2: 2.625, 4: 2.4, 16: 2.4},
        "worse": {1: 4.5, 4: 4.0, 16: 4.0},
    }
)


def test_gap_closed_and_relative_gain_by_hand():
    gap = TABLE.gap_closed("coupled", "factorised", 1)
    assert gap.value == pytest.approx((4.0 - 2.75) / (4.0 - 2.5))
    assert gap.low == pytest.approx(gap.value)
    assert gap.high == pytest.approx(gap.value)
    assert TABLE.gap_closed("factorised", "factorised", 2).value == 0
    assert TABLE.gap_closed("worse", "factorised", 4).value == pytest.approx(-2.0)
    assert TABLE.relative_gain("coupled", "factorised", 1).value == pytest.approx(1.25 / 4.0)
    assert str(gap) == "0.833 [0.833, 0.833]"


@pytest.mark.parametrize(
    ("model", "T", "steps", "relation"),
    [
        ("coupled", 1, 8.0, "="),  # on a node
        ("coupled", 2, 2**3.5, "="),  # half way between 8 and 16
        ("coupled", 4, 16.0, ">="),  # better than all that was measured
        ("factorised", 16, 16.0, "="),
        ("factorised", 1, 1.0, "="),
        ("worse", 1, 1.0, "<="),
        ("worse", 4, 1.0, "="),
    ],
)
def test_equivalent_steps(model, T, steps, relation):
    found = TABLE.equivalent_steps(model, "factorised", T)
    assert found.steps == pytest.approx(steps)
    assert found.relation == relation
    assert (found.low, found.high) == (pytest.approx(steps), pytest.approx(steps))
    assert str(found).startswith(relation) == (relation != "=")


def test_equivalent_steps_with_a_single_number_of_steps():
    table = constant({"f": {4: 3.0}, "better": {4: 2.0}, "worse": {4: 4.0}})
    assert str(table.equivalent_steps("better", "f", 4)).startswith(">= 4")
    assert str(table.equivalent_steps("worse", "f", 4)).startswith("<= 4")
    assert table.equivalent_steps("f", "f", 4).relation == "="


def test_intervals_are_paired_seeded_and_cover():
    table = noisy()
    gap = table.gap_closed("coupled", "factorised", 1)
    assert gap == table.gap_closed("coupled", "factorised", 1)
    assert gap != table.gap_closed("coupled", "factorised", 1, seed=1)
    assert gap.low < gap.value < gap.high
    # the spread of the texts (sd 1) cancels: only the 0.1 of each model is left
    assert gap.high - gap.low < 0.03
    assert table.standard_error("coupled", 1) > 0.04
    narrow = table.gap_closed("coupled", "factorised", 1, level=0.5)
    assert gap.low < narrow.low < narrow.high < gap.high
    truth, hits = (4.0 - 2.8) / (4.0 - 2.5), 0
    for seed in range(100):
        interval = noisy(blocks=60, seed=seed).gap_closed(
            "coupled", "factorised", 1, resamples=300, level=0.9
        )
        hits += interval.low <= truth <= interval.high
    assert 80 <= hits <= 98
    steps = table.equivalent_steps("coupled", "factorised", 4)
    assert 4 < steps.low < steps.steps < steps.high < 16


def test_difference_is_paired():
    mean, error = noisy().difference("coupled", "factorised", 1)
    assert mean == pytest.approx(-1.2, abs=5 * error)
    assert error == pytest.approx(0.1 * math.sqrt(2 / 400), rel=0.2)


def test_no_gap_no_number():
    flat = constant({"factorised": {1: 2.5, 16: 2.5}, "coupled": {1: 2.5, 16: 2.5}})
    gap = flat.gap_closed("coupled", "factorised", 1)
    assert math.isnan(gap.value)
    assert (gap.low, gap.high) == (-math.inf, math.inf)
    single = constant({"factorised": {1: 3.0}}, blocks=1)
    assert math.isnan(single.standard_error("factorised", 1))


def test_wrong_questions():
    for T in (16, 32):
        with pytest.raises(ConfigError, match="where there is no gap"):
            TABLE.gap_closed("coupled", "factorised", T)
    with pytest.raises(ConfigError, match="found 'hmm'"):
        TABLE.mean("hmm", 1)
    with pytest.raises(ConfigError, match="with 8 among its steps"):
        TABLE.gap_closed("coupled", "factorised", 8)
    with pytest.raises(ConfigError, match="with 16 among its steps"):
        constant({"f": {1: 3.0}, "c": {1: 2.0}}).gap_closed("c", "f", 1)
    with pytest.raises(ConfigError, match="'f'"):
        TABLE.equivalent_steps("coupled", "f", 1)
    with pytest.raises(ConfigError, match="resamples"):
        TABLE.relative_gain("coupled", "factorised", 1, resamples=0)


def test_files_round_trip_to_the_last_bit(tmp_path):
    table = noisy(blocks=7)
    table.values["coupled"][1][:3] = torch.tensor([math.inf, -math.inf, math.nan], dtype=torch.float64)
    path = tmp_path / "new folder" / "table.json"
    table.save(path)
    table.save(path)  # overwrites
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]
    json.loads(path.read_text(), parse_constant=pytest.fail)  # strict JSON
    again = NelboTable.load(path)
    assert (again.sites, again.models, again.steps, again.settings) == (
        16,
        table.models,
        table.steps,
        table.settings,
    )
    for model in table.models:
        for T in table.steps:
            assert torch.equal(
                again.per_block(model, T).nan_to_num(-7), table.per_block(model, T).nan_to_num(-7)
            )


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.json"
    TABLE.save(path)
    before = path.read_text()
    with pytest.raises(TypeError):
        NelboTable(16, TABLE.values, {"schedule": object()}).save(path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


def test_bad_files(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text('{"sites": 16')
    with pytest.raises(DataError, match=r"broken\.json"):
        NelboTable.load(broken)
    with pytest.raises(DataError, match="missing"):
        NelboTable.load(tmp_path / "missing.json")
    for wrong in (
        {},
        {"sites": 3, "settings": {}, "values": {"m": {"one": [1.0]}}},
        {"sites": 3, "values": 5},
    ):
        with pytest.raises(DataError, match="to_dict"):
            NelboTable.from_dict(wrong)


def shown(table, width=100, **settings):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table.render(**settings))
    return console.export_text()


def test_rendering():
    text = shown(TABLE, width=80, factorised="factorised")
    first, second = (part.splitlines() for part in text.split("  worse "))
    rows, worse = (
        {line.split()[0]: line.split() for line in part if line[:3].strip().isdigit()}
        for part in (first, second)
    )
    assert list(rows) == ["1", "2", "4", "8", "16"]
    assert rows["1"][:5] == ["1", "4.000±0.000", "2.750±0.000", "31.2", "%"]
    assert " ".join(rows["1"][5:]) == "0.83 [0.83, 0.83]"
    assert rows["8"] == ["8", "2.750±0.000"]  # the other one was not computed there
    assert rows["16"] == ["16", "2.500±0.000", "2.400±0.000", "4.0", "%"]
    assert worse["16"] == ["16", "2.500±0.000", "4.000±0.000", "-60.0", "%"]
    assert "coupled at 4 steps is better than factorised at 16 steps" in text
    assert "worse at 4 steps = factorised at 1 step [1, 1]" in text
    assert "s/sample" not in text
    assert "time of" not in text


def test_rendering_without_a_factorised_model_or_the_steps_of_the_gap():
    text = shown(TABLE)
    assert "2.625±0.000" in text and "below" not in text
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(TABLE)
    assert console.export_text() == text
    bare = constant({"f": {1: 3.0, 4: 2.5, 32: 2.25}, "c": {1: 2.5, 4: 2.375, 32: 2.25}}, blocks=1)
    text = shown(bare, factorised="f")
    assert "16.7 %" in text and "±" not in text.split("\n", 1)[1]  # one block has no standard error
    assert "[" not in text.split("c at")[0]  # no T = sites, no gap
    assert "c at 4 steps = f at 11.3 steps [11.3, 11.3]" in text
    flat = constant({"f": {1: 2.5, 16: 2.5}, "c": {1: 2.5, 16: 2.5}})
    assert "no gap" in shown(flat, factorised="f")
    alone = constant({"f": {1: 2.5, 16: 2.5}})
    assert "2.500±0.000" in shown(alone, factorised="f") and "below" not in shown(alone, factorised="f")
    with pytest.raises(ConfigError, match="'lstm'"):
        TABLE.render("lstm")


def test_rendering_fits_a_terminal():
    table = constant({"factorised": {1: 4.0, 16: 2.5}, "hidden_markov": {1: 2.75, 16: 2.4}}).with_seconds(
        {"factorised": {1: 0.00123, 16: 0.0123}, "hidden_markov": {1: 0.00234, 16: 0.0234}}
    )
    assert "…" not in shown(table, width=80, factorised="factorised")


TIMED = TABLE.with_seconds(
    {"factorised": {1: 0.1, 2: 0.2, 4: 0.4, 8: 0.8}, "coupled": {1: 0.3, 4: 1.2}}, timing_batch_size=8
)


def test_seconds_stand_beside_every_row():
    assert TIMED.seconds("coupled", 4) == 1.2
    assert math.isnan(TIMED.seconds("coupled", 2)) and math.isnan(TIMED.seconds("worse", 1))
    assert TIMED.settings == {"seed": 0, "timing_batch_size": 8}
    assert TABLE.seconds_per_sample == {}
    text = shown(TIMED, width=130, factorised="factorised", equivalent=(1, 4))
    assert (
        text.count("s/sample") == 3
    )  # twice beside the coupled model, once beside the one that wasn't timed
    row = next(line for line in text.splitlines() if line.strip().startswith("4 "))
    assert row.split()[:5] == ["4", "3.000±0.000", "0.4", "2.400±0.000", "1.2"]
    # 0.3 s are three factorised steps, half way (in the logarithm: .585) from 3.5 to 3.0
    share = math.log2(3 / 2)
    bits = 3.5 - 0.5 * share
    assert TIMED.in_the_same_time("coupled", "factorised", 1) == (pytest.approx(3), pytest.approx(bits))
    assert f"in the time of coupled at 1 step, factorised makes 3: {bits:.3f} bits per token" in text
    # beyond what was timed: clamped to the largest number of steps
    assert TIMED.in_the_same_time("coupled", "factorised", 4) == (8, 2.75)
    assert all(map(math.isnan, TIMED.in_the_same_time("coupled", "factorised", 2)))
    assert all(map(math.isnan, TIMED.in_the_same_time("coupled", "worse", 1)))
    slow = TABLE.with_seconds({"factorised": {4: 2.0}, "coupled": {4: 1.0}})
    assert slow.in_the_same_time("coupled", "factorised", 4) == (4, 3.0)


def test_seconds_of_another_model_are_refused():
    with pytest.raises(ConfigError, match="lstm"):
        TABLE.with_seconds({"lstm": {1: 0.1}})


def test_seconds_are_kept_in_the_file(tmp_path):
    TIMED.save(tmp_path / "table.json")
    assert NelboTable.load(tmp_path / "table.json").seconds_per_sample == TIMED.seconds_per_sample
    old = TABLE.to_dict()
    del old["seconds_per_sample"]  # a table written without them
    assert NelboTable.from_dict(old).seconds_per_sample == {}
