"""A record made by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.evaluation import NelboTable
from codd_ppl.evaluation.record import Row, evaluation_record

MODEL = (BidirectionalTransformer(3, 4, 1, 1), None)
BOUNDS = {
    "factorised": {1: 4.0, 2: 3.5, 4: 3.0, 8: 2.75, 16: 2.5},
    "coupled": {1: 2.75, 2: 2.625, 4: 2.625, 8: 2.6, 16: 2.45},
    "prior alone": {1: 3.0, 2: 3.0, 4: 3.0, 8: 3.0, 16: 3.0},
}
SECONDS = {"factorised": {1: 1.0, 4: 4.0, 8: 8.0}, "coupled": {1: 1.5, 4: 8.0, 8: 11.0}}
COUPLING = {
    "graph": "hidden Markov",
    "states": 128,
    "potentials": "LatentPotentials",
    "combine": "projected",
    "sweeps": 2,
    "candidates": None,
    "pool": True,
    "parameters": 12345,
}
NETWORK = {"class": "Network", "parameters": 2_500_000, "layers": 3}
ROWS = {
    "factorised": Row(MODEL, "factorised", None, {"network": NETWORK}),
    "coupled": Row(
        MODEL,
        "coupled",
        "factorised",
        {"coupling": COUPLING, "about": {"seconds": 150.0, "step": 200}},
    ),
    "prior alone": Row(MODEL, "control", "factorised"),
}


@pytest.fixture
def make_record() -> Callable[..., dict[str, Any]]:
    """Of a table of 16 sites whose blocks are all alike, so that every interval has width 0; ``shift`` the coupled."""

    def make(shift: float = 0.0, drop: str = "", **settings: Any) -> dict[str, Any]:
        values = {
            name: {
                T: torch.full((6,), bits + shift * (name == "coupled"), dtype=torch.float64)
                for T, bits in row.items()
            }
            for name, row in BOUNDS.items()
            if name != drop
        }
        seconds = {name: row for name, row in SECONDS.items() if name != drop}
        given: dict[str, Any] = {
            "command": "codd evaluate a b",
            "device": "CPU",
            "versions": {"torch": "2"},
            "text": {"files": ["heldout.txt"], "blocks": 6, "tokens": 1234},
            "vocab": 27,
        }
        table = NelboTable(16, values, {"seed": 0, "draws": 2}, seconds)
        rows = {name: row for name, row in ROWS.items() if name != drop}
        return evaluation_record(table, rows, **given | settings)

    return make
