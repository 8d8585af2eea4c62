"""codd bench decoding: what is measured, what is written, what is refused."""

import json
from pathlib import Path

import pytest
import torch

from codd_ppl import BidirectionalTransformer, CouplingLayer, topologies
from codd_ppl.cli import main
from codd_ppl.errors import ConfigError
from codd_ppl.evaluation.decoding_time import DecodingTime, time_decoding
from codd_ppl.model_folder import save_model
from codd_ppl.sampling import drawing_method


class Clock:
    """Ticks when the network or the coupling is called: what is measured is then known."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_parts_of_a_step() -> None:
    clock = Clock()
    network = BidirectionalTransformer(5, 8, 1, 1)
    coupling = CouplingLayer(topologies.hidden_markov(8, 5, 2), 5)

    def tick(seconds: float):  # type: ignore[no-untyped-def]
        def hook(*_: object) -> None:
            clock.now += seconds

        return hook

    network.register_forward_hook(tick(2.0))
    coupling.register_forward_hook(tick(0.5))
    drawings = {name: drawing_method(name) for name in ("joint", "mode")}
    found = time_decoding(network, coupling, drawings, (1, 3), steps=4, repeats=2, clock=clock)
    assert found == [
        DecodingTime(name, batch, network=2.0, factorised=2.0, coupled=2.5)
        for batch in (1, 3)
        for name in drawings
    ]
    assert found[0].coupling == 0.5 and found[0].overhead == pytest.approx(0.25)
    with pytest.raises(ConfigError, match="at least 1"):
        time_decoding(network, coupling, {}, (1,))
    with pytest.raises(ConfigError, match="at least 1"):
        time_decoding(network, coupling, drawings, (0,))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vocab, threads = 5, torch.get_num_threads()
    save_model(
        tmp_path / "model",
        BidirectionalTransformer(vocab, 8, 1, 1),
        CouplingLayer(topologies.hidden_markov(8, vocab, 2), vocab),
    )
    words = ["bench", "decoding", str(tmp_path / "model"), "--batch-size", "1", "2", "--repeats", "1"]
    target = tmp_path / "sub" / "decoding.json"
    assert main([*words, "--drawing", "joint", "any_order", "--clock", "cpu", "--output", str(target)]) == 0
    shown = capsys.readouterr().out
    assert "any_order" in shown and "overhead" in shown
    record = json.loads(target.read_text(encoding="utf-8"))
    rows = record["seconds_per_step"]
    assert [(row["drawing"], row["batch_size"]) for row in rows] == [
        (name, batch) for batch in (1, 2) for name in ("joint", "any_order")
    ]
    assert all(row["overhead"] == pytest.approx(row["coupled"] / row["factorised"] - 1) for row in rows)
    assert record["command"].startswith("codd bench decoding") and record["sites"] == 8
    assert torch.get_num_threads() == threads
    for more, said in (
        (["--drawing", "nucleus"], "drawing: expected one of"),
        (["--output", str(tmp_path)], "is a folder"),
        (["--threads", "0"], "--threads"),
        (["--steps", "0"], "at least 1"),
        (["--device", "nowhere"], "--device"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
