"""Samples under a judge: the figures by hand, the same time, the record and the card."""

import json
import math
from pathlib import Path

import pytest
import torch

from codd_ppl import CouplingLayer, topologies
from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.errors import ConfigError, DataError
from codd_ppl.evaluation import NGramModel, distinct_n, repetition, token_entropy
from codd_ppl.evaluation.card import card_text
from codd_ppl.evaluation.sample_quality import (
    SampleQuality,
    judge_samplers,
    judge_text,
    quality_table,
    read_samples,
    samples_record,
    samples_rows,
)

SITES, VOCAB = 6, 4


class Uniform:
    """log P = -log 2 for token 0, -log 8 for others."""

    def token_log_prob(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.where(tokens == 0, -math.log(2), -math.log(8))


def test_the_figures() -> None:
    tokens = torch.tensor([[0, 0, 0, 0], [1, 2, 0, 0]])
    found = judge_text(tokens, Uniform(), n=2, name="x", steps=3, seconds=0.5)
    assert found.judge_bits == pytest.approx((1 + 2) / 2)
    assert found.judge_error == pytest.approx(math.sqrt(0.5) / math.sqrt(2))  # 1 and 2 bits
    assert found.entropy == pytest.approx(float(token_entropy(tokens).mean()))
    assert found.distinct == distinct_n(tokens, 2) and found.repetition == float(repetition(tokens, 2).mean())
    assert (found.name, found.steps, found.samples, found.n, found.seconds) == ("x", 3, 2, 2, 0.5)
    with pytest.raises(ConfigError, match="at least 2"):
        judge_text(tokens[:1], Uniform())


@pytest.fixture
def model() -> tuple[BidirectionalTransformer, CouplingLayer, NGramModel]:
    torch.manual_seed(0)
    text = (
        torch.arange(SITES) + torch.randint(VOCAB, (400, 1))
    ) % VOCAB  # each token follows from the one before
    coupling = CouplingLayer(topologies.chain(SITES, VOCAB), VOCAB)
    coupling.init_from_corpus(text, progress=False)
    return BidirectionalTransformer(VOCAB, 8, 1, 1), coupling, NGramModel.fit(text, VOCAB, order=2)


def test_coupled_samples_are_the_likelier_ones(model) -> None:
    rows = judge_samplers(*model, steps=[1, 2], samples=70, batch_size=32, n=2, seed=1)
    names = ["factorised", "coupled", "factorised, in the time of coupled"]
    assert [row.name for row in rows] == 2 * names and all(row.samples == 70 for row in rows)
    for alone, coupled, same in (rows[:3], rows[3:]):
        assert coupled.steps == alone.steps and same.steps >= alone.steps
        assert coupled.judge_bits + 3 * coupled.judge_error < alone.judge_bits
        assert all(row.seconds > 0 for row in (alone, coupled, same))
    # The same draws for the same seed, whatever the time was.
    again = judge_samplers(*model, steps=[1], samples=70, batch_size=32, n=2, seed=1)
    assert [row.judge_bits for row in again[:2]] == [row.judge_bits for row in rows[:2]]


def test_bad_numbers(model) -> None:
    for settings in ({"steps": []}, {"steps": [0]}, {"samples": 1}, {"batch_size": 0}, {"n": 0}):
        with pytest.raises(ConfigError, match="at least 1 and 2 samples"):
            judge_samplers(*model, **settings)


ROWS = [
    SampleQuality("held-out text", None, 9, 2.0, 0.01, 3.9, 0.5, 0.25, 4),
    SampleQuality("coupled", 4, 9, 2.25, 0.02, 3.8, 0.4, 0.3, 4, 0.0123),
]


def test_the_record_and_the_table(tmp_path: Path) -> None:
    assert read_samples(tmp_path) is None
    (tmp_path / "samples.json").write_text(samples_record(ROWS, command="codd judge", judge={"step": 7}))
    assert read_samples(tmp_path) == ({"command": "codd judge", "judge": {"step": 7}}, ROWS)
    head, text, coupled = samples_rows(ROWS)
    assert head[4:6] == ["distinct-4", "repetition-4"] and text[1] == text[6] == ""
    assert coupled == ["coupled", "4", "2.250 \u00b1 0.020", "3.800", "0.400", "0.300", "12.3"]
    assert quality_table(ROWS).row_count == 2
    (tmp_path / "samples.json").write_text(json.dumps({"format": "other", "rows": []}))
    with pytest.raises(DataError, match="another format"):
        read_samples(tmp_path)


def test_the_card_shows_them(tmp_path: Path, make_record) -> None:
    (tmp_path / "results.json").write_text(json.dumps(make_record()))
    assert "judge" not in card_text(tmp_path)
    notes = {"command": "codd judge m t", "judge": {"step": 7}, "date": "2026-01-02", "device": "CPU"}
    (tmp_path / "samples.json").write_text(samples_record(ROWS, **notes))
    text = card_text(tmp_path)
    assert "| coupled | 4 | 2.250 \u00b1 0.020 |" in text and "codd judge m t" in text
    assert "training text, 7 steps" in text
