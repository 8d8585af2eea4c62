"""A fit that is killed goes on to the same tables, to the last bit; files of other fits are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from codd_ppl import topologies
from codd_ppl.errors import ConfigError, DataError
from codd_ppl.potentials import Given, RandomStart, baum_welch
from codd_ppl.potentials.fit import Fit

GRAPH = topologies.hidden_markov(7, 5, 4)
KILLED = RuntimeError("killed")


def text(n: int = 90, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, (n, 7), generator=generator).cumsum(1) % 5


def killed_after(updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], Fit.update

    def update(fit: Fit) -> None:
        if len(calls) == updates:
            raise KILLED
        calls.append(1)
        real(fit)

    monkeypatch.setattr(Fit, "update", update)


@pytest.mark.parametrize("keep_zeros", [False, True])
@pytest.mark.parametrize("batch_size", [16, None])
@pytest.mark.parametrize("updates", [1, 6, 7, 11])
def test_killed_in_the_middle_it_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, updates: int, batch_size: int | None, keep_zeros: bool
) -> None:
    settings: dict[str, Any] = {
        "epochs": 2 if batch_size else 12, "batch_size": batch_size, "valid_blocks": text(20, 1), "seed": 5,
        "keep_zeros": keep_zeros, "held_out_every": 4, "progress": False,
    }  # fmt: skip
    whole, trace = baum_welch(GRAPH, text(), **settings)
    file = tmp_path / "new" / "fit.safetensors"
    with monkeypatch.context() as patch:
        killed_after(updates, patch)
        with pytest.raises(RuntimeError, match="killed"):
            baum_welch(GRAPH, text(), **settings, checkpoint=file, checkpoint_seconds=0.0)
    tables, again = baum_welch(GRAPH, text(), **settings, checkpoint=file, checkpoint_seconds=1e9)
    assert all(torch.equal(tables[name], value) for name, value in whole.items())
    assert again.log_likelihood == trace.log_likelihood and again.held_out == trace.held_out
    assert again.tokens == trace.tokens and again.seconds == sorted(again.seconds)
    assert [path.name for path in file.parent.iterdir()] == ["fit.safetensors"]  # no drafts
    with monkeypatch.context() as patch:  # done: nothing is left to do
        killed_after(0, patch)
        finished, _ = baum_welch(GRAPH, text(), **settings, checkpoint=file)
    assert all(torch.equal(finished[name], value) for name, value in whole.items())


def test_of_several_restarts_the_chosen_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"epochs": 40, "batch_size": None, "restarts": 3, "start": RandomStart()}
    settings |= {"progress": False, "smoothing": 0.1}
    whole, _ = baum_welch(GRAPH, text(), **settings)
    with monkeypatch.context() as patch:
        killed_after(3 * 4 + 20, patch)
        with pytest.raises(RuntimeError, match="killed"):
            baum_welch(GRAPH, text(), **settings, checkpoint=tmp_path / "fit", checkpoint_seconds=0.0)
    tables, _ = baum_welch(GRAPH, text(), **settings, checkpoint=tmp_path / "fit")
    assert all(torch.equal(tables[name], value) for name, value in whole.items())


def test_blocks_of_any_integer_type_give_the_same() -> None:
    whole, _ = baum_welch(GRAPH, text(), epochs=1, progress=False)
    small, _ = baum_welch(GRAPH, text().to(torch.int32), epochs=1, progress=False)
    assert all(torch.equal(small[name], value) for name, value in whole.items())


@pytest.mark.parametrize("other", [{"seed": 1}, {"smoothing": 0.5}, {"epochs": 3}, {"start": RandomStart()}])
def test_another_fit_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    settings = {"epochs": 2, "progress": False, "checkpoint": tmp_path / "fit"}
    baum_welch(GRAPH, text(), **settings)
    with pytest.raises(ConfigError, match="another path"):
        baum_welch(GRAPH, text(), **settings | other)
    with pytest.raises(ConfigError, match="another path"):
        baum_welch(GRAPH, text(seed=2), **settings)


def test_a_start_from_other_tables_is_refused(tmp_path: Path) -> None:
    """Also where they differ in what is left out when a large tensor is printed."""
    graph = topologies.hidden_markov(3, 1200, 2)
    blocks = torch.randint(1200, (20, 3), generator=torch.Generator().manual_seed(0))
    tables, _ = baum_welch(graph, blocks, epochs=1, progress=False)
    other = {name: value.clone() for name, value in tables.items()}
    other["emission"][0, 600] += 1.0
    settings = {"epochs": 1, "progress": False, "checkpoint": tmp_path / "fit"}
    baum_welch(graph, blocks, start=Given(tables), **settings)
    baum_welch(graph, blocks, start=Given(tables), **settings)
    with pytest.raises(ConfigError, match="another path"):
        baum_welch(graph, blocks, start=Given(other), **settings)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "fit"
    file.write_bytes(b"no fit")
    with pytest.raises(DataError, match="remove the file"):
        baum_welch(GRAPH, text(), progress=False, checkpoint=file)
    assert file.read_bytes() == b"no fit"
    with pytest.raises(ConfigError, match="held_out_every"):
        baum_welch(GRAPH, text(), progress=False, held_out_every=0)
