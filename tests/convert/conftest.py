"""A stand-in for PyJuice, which the tests can't count on: what it writes, in the layout of 2.4.1 to 2.6.3.

Written from the source (src/pyjuice/io/serialization.py, structures/hmm.py, nodes/) and compared with real files:
tests/convert/data, and test_pyjuice.py where PyJuice is installed.
"""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

Records = list[dict[str, Any]]


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    for key, value in contents.items():
        if isinstance(value, type):
            value.__module__, value.__qualname__ = name, key
        setattr(made, key, value)
    return made


def distributions() -> dict[str, type]:
    """Classes that are pickled as PyJuice's are."""

    class Categorical:
        def __init__(self, num_cats: int) -> None:
            self.post_fw_fns, self.post_bp_fns, self.sampling_fns = list[Any](), list[Any](), list[Any]()
            self.num_cats = num_cats

    class ExternProductCategorical(Categorical):
        def __reduce__(self) -> Any:
            return type(self), (self.num_cats,)

    class SoftEvidenceCategorical(Categorical):
        def __reduce__(self) -> Any:
            return type(self), (self.num_cats, True)

        def __init__(self, num_cats: int, _dual_flow_backward: bool = True) -> None:
            super().__init__(num_cats)

    class MaskedCategorical(Categorical):
        def __init__(self, num_cats: int) -> None:
            super().__init__(num_cats)
            self.fw_mar_fn = MaskedCategorical.fw_mar_fn_range

        @staticmethod
        def fw_mar_fn_range() -> None:
            """PyJuice keeps such a function in the object."""

    MaskedCategorical.fw_mar_fn_range.__module__ = "pyjuice.nodes.distributions.masked_categorical"
    MaskedCategorical.fw_mar_fn_range.__qualname__ = "MaskedCategorical.fw_mar_fn_range"

    class Gaussian:
        def __init__(self, num_cats: int) -> None:
            self.mu, self.sigma, self.min_sigma = 0.0, 1.0, 0.01

    return {
        "categorical": Categorical,
        "external_categorical": ExternProductCategorical,
        "softevi_categorical": SoftEvidenceCategorical,
        "masked_categorical": MaskedCategorical,
        "gaussian": Gaussian,
    }


class Juice:
    """Builds records, writes files, and can be installed as ``pyjuice``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.kinds = monkeypatch, distributions()
        self.dumped = {name: self._dump(name) for name in self.kinds}

    def _dump(self, name: str) -> Callable[[int, int], bytes]:
        def dump(vocab: int, protocol: int) -> bytes:
            with self.monkeypatch.context() as patch:
                full = f"pyjuice.nodes.distributions.{name}"
                kind = self.kinds[name]
                for part in ("pyjuice", "pyjuice.nodes", "pyjuice.nodes.distributions"):
                    patch.setitem(sys.modules, part, module(part))
                patch.setitem(sys.modules, full, module(full, **{kind.__name__: kind}))
                return pickle.dumps(kind(vocab), protocol)

        return dump

    def hmm(
        self,
        initial: np.ndarray,
        transition: np.ndarray,
        emission: np.ndarray,
        sites: int,
        block: int = 1,
        distribution: str = "categorical",
        tied: bool = True,
        protocol: int = 4,
    ) -> Records:
        """Records of a hidden Markov model: tokens, tied to the last one; then the chain from its end."""
        vocab, n = emission.shape[1], len(initial) // block
        size = {"num_node_blocks": n, "block_size": block}
        dist = self.dumped[distribution](vocab, protocol)
        inputs = [
            {"type": "Input", **size, "chs": (), "scope": [site], "dist": dist} for site in range(sites)
        ]
        records: Records = list(inputs)
        for site, record in enumerate(inputs):
            if site < sites - 1 and tied:
                record["source_node"] = sites - 1
            else:
                record["params"] = emission.reshape(-1).astype(np.float32)
        first = None
        for site in range(sites - 1, -1, -1):
            below = (site,) if site == sites - 1 else (site, len(records) - 1)
            edges = np.arange(n)[:, None].repeat(len(below), 1)
            records.append({"type": "Product", **size, "chs": below, "edge_ids": edges})
            if not site:
                break
            kept = transition.reshape(n, block, n, block).transpose(0, 2, 1, 3)
            there = np.stack(kept.any((2, 3)).nonzero())
            record = {"type": "Sum", **size, "chs": (len(records) - 1,), "edge_ids": there}
            if first is not None and tied:
                record["source_node"] = first
            else:
                record["params"] = kept[there[0], there[1]].astype(np.float32)
                first = len(records)
            records.append(record)
        grid = np.stack([np.zeros(n, dtype=np.int64), np.arange(n)])
        root = {"type": "Sum", "num_node_blocks": 1, "block_size": 1, "chs": (len(records) - 1,)}
        records.append(root | {"edge_ids": grid, "params": initial.reshape(n, 1, block).astype(np.float32)})
        return records

    def install(self) -> SimpleNamespace:
        """As the module ``pyjuice``, with a log of what was asked of it."""
        log = SimpleNamespace(updates=0, loads=0)

        class CircuitNodes:
            def __init__(self, records: Records) -> None:
                self.records = records

        class TensorCircuit:
            def __init__(self, root: CircuitNodes) -> None:
                self.root_ns = root

            def update_parameters(self) -> None:
                log.updates += 1

        def load(path: str) -> CircuitNodes:
            log.loads += 1
            with open(path, "rb") as file:
                return CircuitNodes(pickle.load(file))

        nodes = module("pyjuice.nodes", CircuitNodes=CircuitNodes)
        writer = module("pyjuice.io.serialization", serialize_nodes=lambda root: root.records)
        juice = module("pyjuice", TensorCircuit=TensorCircuit, load=load)
        for made in (juice, nodes, module("pyjuice.io"), writer):
            self.monkeypatch.setitem(sys.modules, made.__name__, made)
        return SimpleNamespace(log=log, CircuitNodes=CircuitNodes, TensorCircuit=TensorCircuit)


@pytest.fixture
def juice(monkeypatch: pytest.MonkeyPatch) -> Juice:
    return Juice(monkeypatch)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Records into a file."""

    def done(records: Any, protocol: int = 4) -> Path:
        path = tmp_path / "model.jpc"
        path.write_bytes(pickle.dumps(records, protocol))
        return path

    return done
