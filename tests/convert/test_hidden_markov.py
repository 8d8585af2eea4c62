"""Hidden Markov models of PyJuice: the same likelihoods, by enumeration and as PyJuice gave them; what is refused."""

import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codd_ppl import CouplingLayer
from codd_ppl.convert import hidden_markov_from_pyjuice, read_hidden_markov
from codd_ppl.errors import ConfigError, DataError

SITES, VOCAB = 3, 3
DATA = Path(__file__).parent / "data"


def tables(states: int = 4, vocab: int = VOCAB) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(states)
    ones = np.ones(states)
    return draw.dirichlet(ones), draw.dirichlet(ones, states), draw.dirichlet(np.ones(vocab), states)


def brute(initial: Any, transition: Any, emission: Any, x: tuple[int, ...]) -> float:
    """P(x): every path of states, one by one."""
    total = 0.0
    for z in product(range(len(initial)), repeat=len(x)):
        p = initial[z[0]] * emission[z[0], x[0]]
        for i in range(1, len(x)):
            p *= transition[z[i - 1], z[i]] * emission[z[i], x[i]]
        total += p
    return total


@torch.no_grad()
def prior(coupling: CouplingLayer, x: torch.Tensor) -> torch.Tensor:
    """log P(x) of the prior: with equal logits a product is nothing else."""
    coupling = coupling.double()
    coupling.combine = "product"
    return coupling(torch.zeros(*x.shape, coupling.vocab_size, dtype=torch.float64)).log_prob(x)


def everything(sites: int = SITES) -> list[tuple[int, ...]]:
    return list(product(range(VOCAB), repeat=sites))


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("block", [1, 2, 4])
def test_the_likelihoods_of_enumeration(
    juice: Any, write: Callable[..., Path], block: int, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(juice.hmm(*tables(), SITES, block, protocol=protocol), protocol)
    monkeypatch.setitem(sys.modules, "pyjuice", None)  # not needed, even if it is there
    coupling = hidden_markov_from_pyjuice(path)
    assert type(coupling) is CouplingLayer and not coupling.training and coupling.combine == "projected"
    found = prior(coupling, torch.tensor(everything()))
    expected = torch.tensor([brute(*tables(), x) for x in everything()]).log()
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["trained_2.6.3", "evidence_2.4.1"])
def test_the_likelihoods_that_pyjuice_gave(name: str) -> None:
    """Files that PyJuice wrote, and log-likelihoods of its own kernels (tests/convert/data/README.md)."""
    said = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    coupling = hidden_markov_from_pyjuice(DATA / f"{name}.jpc")
    assert read_hidden_markov(DATA / f"{name}.jpc").distribution == said["distribution"]
    assert coupling.graph.variables["z0"].cardinality == said["states"]
    found = prior(coupling, torch.tensor(said["sequences"]))
    torch.testing.assert_close(found.float(), torch.tensor(said["log_likelihoods"]), rtol=0, atol=1e-5)


def test_the_law_that_pyjuice_samples_is_the_product() -> None:
    """log p(x_M | x_K) with evidence of a network, as the article's circuits are run."""
    said = json.loads((DATA / "evidence_2.4.1.json").read_text(encoding="utf-8"))
    coupling = hidden_markov_from_pyjuice(DATA / "evidence_2.4.1.jpc", combine="product").double()
    tokens, known = torch.tensor(said["sequences"]), torch.tensor(said["known"])
    law = coupling(torch.tensor(said["evidence"], dtype=torch.float64), tokens=tokens, known=known)
    expected = torch.tensor(said["log_probs"])
    torch.testing.assert_close(law.log_prob(tokens).float(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["external_categorical", "softevi_categorical"])
def test_other_tables_and_lengths(juice: Any, write: Callable[..., Path], kind: str) -> None:
    path = write(juice.hmm(*tables(), SITES, 2, kind))
    long = hidden_markov_from_pyjuice(path, sites=5, combine="product")
    some = everything(5)[::17]
    expected = torch.tensor([brute(*tables(), x) for x in some]).log().double()
    torch.testing.assert_close(prior(long, torch.tensor(some)), expected, rtol=0, atol=1e-5)
    one = hidden_markov_from_pyjuice(path, sites=1, candidates=2)
    assert (one.sites, one.candidates) == (1, 2)
    short = write(juice.hmm(*tables(), 1))
    x = torch.arange(VOCAB)[:, None]
    torch.testing.assert_close(prior(hidden_markov_from_pyjuice(short), x), prior(one, x))
    with pytest.raises(ConfigError, match="no transitions, found 2"):
        hidden_markov_from_pyjuice(short, sites=2)


def test_what_has_no_edge_is_impossible(juice: Any, write: Callable[..., Path]) -> None:
    initial, _, emission = tables()
    ring = np.kron(np.array([[0, 1], [1, 0]]), np.full((2, 2), 0.5))
    emission = np.kron(np.array([[1.0, 0, 0], [0, 0.5, 0.5]]), np.ones((2, 1)))
    path = write(juice.hmm(initial, ring, emission, SITES, 2))
    assert read_hidden_markov(path).transition is not None
    found = prior(hidden_markov_from_pyjuice(path), torch.tensor([[0, 0, 0], [0, 1, 0]]))
    assert found[0] == -torch.inf
    torch.testing.assert_close(found[1].exp().item(), brute(initial, ring, emission, (0, 1, 0)))


def test_equal_tables_may_be_untied(juice: Any, write: Callable[..., Path]) -> None:
    given = juice.hmm(*tables(), SITES, 2, tied=False)
    found = read_hidden_markov(write(given))
    np.testing.assert_allclose(found.emission, tables()[2], atol=1e-6)
    given[0]["params"] = np.roll(given[0]["params"].reshape(4, VOCAB), 1, 0).reshape(-1)
    with pytest.raises(DataError, match="different tables of emissions at different sites"):
        read_hidden_markov(write(given))
    given = juice.hmm(*tables(), SITES, 2, tied=False)
    last = next(r for r in reversed(given[:-1]) if r["type"] == "Sum")
    last["params"] = last["params"][::-1].copy()
    with pytest.raises(DataError, match=r"different tables of transitions.*homogeneous=False"):
        read_hidden_markov(write(given))


def swapped(records: list[dict[str, Any]]) -> None:
    for i in range(SITES):
        records[i]["scope"] = [SITES - 1 - i]


def permuted(records: list[dict[str, Any]]) -> None:
    records[SITES]["edge_ids"] = records[SITES]["edge_ids"][::-1].copy()


def mixture(records: list[dict[str, Any]]) -> None:
    records[-1]["chs"] = records[-1]["chs"] * 2


def several(records: list[dict[str, Any]]) -> None:
    records[-2]["chs"] = (0, 1)


def untrained(records: list[dict[str, Any]]) -> None:
    del records[SITES - 1]["params"]


def scaled(records: list[dict[str, Any]]) -> None:
    records[SITES - 1]["params"] = records[SITES - 1]["params"] * 2


def negative(records: list[dict[str, Any]]) -> None:
    records[-1]["params"] = records[-1]["params"] * np.float32(-1)


def unclear(records: list[dict[str, Any]]) -> None:
    records[-1]["params"] = records[-1]["params"] * np.float32("nan")


def reached(records: list[dict[str, Any]]) -> None:
    records[-1]["edge_ids"] = records[-1]["edge_ids"] + 7


def short(records: list[dict[str, Any]]) -> None:
    records[-1]["params"] = records[-1]["params"][:1]


def external(records: list[dict[str, Any]]) -> None:
    records[-3]["external_params"] = b"cos\nsystem\n(S'exit 1'\ntR."


def no_root(records: list[dict[str, Any]]) -> None:
    del records[-1]


def looped(records: list[dict[str, Any]]) -> None:
    records[-2]["chs"] = (0, len(records) - 1)


def astray(records: list[dict[str, Any]]) -> None:
    records[0]["source_node"] = SITES


def pairs(records: list[dict[str, Any]]) -> None:
    records[0]["scope"] = [0, 5]


@pytest.mark.parametrize(
    "change,said",
    [
        (swapped, r"a chain over the variables 2, 1, 0, from the root on"),
        (permuted, r"product nodes that join other states than their own at site 2"),
        (mixture, r"sum nodes over 2 vectors of products at site 0"),
        (several, r"2 vectors of input and 0 of sum nodes at site 0"),
        (untrained, r"input nodes without parameters; init_parameters\(\) or training"),
        (scaled, r"rows of the emission table .* add up to 2 \.\. 2"),
        (negative, r"rows of the initial table with values from -0"),
        (unclear, r"rows of the initial table with values from nan"),
        (reached, r"edges to blocks that aren't there"),
        (short, r"parameters of shape \(1, 1, 2\) for 2 edges from 1 to 4 nodes"),
        (external, r"changed from outside \(external_params\)"),
        (no_root, r"a root of 4 product node\(s\)"),
        (looped, r"where children come first"),
        (astray, r"node 0 tied to node 3, which has other sizes or edges"),
        (pairs, r"input nodes over several variables, \(0, 5\)"),
    ],
)
def test_other_circuits_are_named(juice: Any, write: Callable[..., Path], change: Any, said: str) -> None:
    records = juice.hmm(*tables(), SITES, 2)
    change(records)
    with pytest.raises(DataError, match=f"expected a tied hidden Markov model.*found {said}|found.*{said}"):
        hidden_markov_from_pyjuice(write(records))


@pytest.mark.parametrize("kind,name", [("masked_categorical", "MaskedCategorical"), ("gaussian", "Gaussian")])
def test_other_distributions_are_named(juice: Any, write: Callable[..., Path], kind: str, name: str) -> None:
    with pytest.raises(DataError, match=f"found the input distribution {name}, where Categorical, "):
        hidden_markov_from_pyjuice(write(juice.hmm(*tables(), SITES, 2, kind)))


def test_circuits_in_memory(juice: Any) -> None:
    records, fake = juice.hmm(*tables(), SITES, 2), juice.install()
    found = read_hidden_markov(fake.CircuitNodes(records))
    np.testing.assert_allclose(found.transition, tables()[1], atol=1e-6)
    read_hidden_markov(fake.TensorCircuit(fake.CircuitNodes(records)))
    assert fake.log.updates == 1  # training changed the compiled circuit, not the nodes
    with pytest.raises(ConfigError, match=r"path of a \.jpc file, or a circuit of PyJuice, found int"):
        read_hidden_markov(3)
    with pytest.raises(DataError, match=r"as pyjuice\.save can write it"):
        read_hidden_markov(fake.CircuitNodes([{"type": "Sum"}]))


def test_pyjuice_is_asked_for_where_it_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyjuice", None)
    for given, trust in ((object(), False), (tmp_path / "a.jpc", True)):
        with pytest.raises(ConfigError, match=r"need PyJuice .*pip install pyjuice"):
            read_hidden_markov(given, trust_pickle=trust)


def test_a_trusted_file_is_loaded_by_pyjuice(juice: Any, write: Callable[..., Path], tmp_path: Path) -> None:
    records = juice.hmm(*tables(), SITES, 2)
    path, fake = write(records), juice.install()
    np.testing.assert_allclose(read_hidden_markov(path, True).emission, tables()[2], atol=1e-6)
    assert fake.log.loads == 1
    (tmp_path / "bad.jpc").write_bytes(b"text")
    with pytest.raises(DataError, match=r"bad\.jpc: expected a \.jpc file, but UnpicklingError"):
        read_hidden_markov(tmp_path / "bad.jpc", True)
