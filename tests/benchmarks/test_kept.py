"""The results that are kept are whole: every task, our answer in each row, and where they come from."""

import json
from pathlib import Path

import pytest

from codd_ppl.evaluation.benchmark.ours import OURS
from codd_ppl.evaluation.benchmark.tasks import TASKS

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("path", sorted(FOLDER.glob("inference_*.json")), ids=lambda path: path.stem)
def test_inference(path):
    data = json.loads(path.read_text(encoding="utf-8"))
    assert {row["task"] for row in data["cells"]} == set(TASKS)
    assert all(row["candidates"][OURS]["median"] > 0 for row in data["cells"])
    assert data["memory"] and data["numerics"] and data["scaling"] and data["targets"]
    assert all(data["about"][key] for key in ("command", "date", "device", "threads", "versions"))
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert data["about"]["date"] in page and data["about"]["command"] in page


def test_sweeps():
    """Every order of updates at every mask ratio, with finite figures for the sequential sweep."""
    data = json.loads((FOLDER / "sweeps.json").read_text(encoding="utf-8"))
    page = (FOLDER / "sweeps.md").read_text(encoding="utf-8")
    assert all(str(data["about"][key]) in page for key in ("command", "date", "device", "training", "torch"))
    assert len(data["rows"]) == 4 * len(data["about"]["states"])
    for row in data["rows"]:
        for start in ("cold", "warm")[: 1 + (row["ratio"] < 1)]:
            found = row[start]
            assert {"sequential", "odd/even", "Jacobi, d = .5", "blocks of 8"} <= found.keys() & row[
                "seconds"
            ].keys()
            assert all(
                q[key] is not None for q in found["sequential"] for key in ("tv_max", "tv_mean", "kl", "bits")
            )
            assert found["difference from project"] < 1e-9, "the sweep that is compared is the library's"
            assert all(t["all reached"] for t in found["tolerance"] if t["tolerance"] >= 0.01)


def test_something_is_kept():
    assert list(FOLDER.glob("inference_*.json"))


def test_candidates():
    """A full sweep reaches the network's marginals; more candidates are nearer to them, and dearer."""
    data = json.loads((FOLDER / "candidates.json").read_text(encoding="utf-8"))
    assert all(data[key] for key in ("command", "date", "device", "torch"))
    for size in data["sizes"]:
        found = size["candidates"]
        counts = sorted(int(name) for name in found if name != "all")
        gaps = [found[name]["total_variation"] for name in (*map(str, counts), "all")]
        assert len(counts) > 1 and gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-3


def test_overhead():
    """Measured and extrapolated figures follow from the times beside them, and say where they come from."""
    data = json.loads((FOLDER / "overhead_cpu.json").read_text(encoding="utf-8"))
    assert all(data[key] for key in ("command", "date", "device", "versions", "backbone", "layers"))
    network = {found["batch_size"]: found for found in data["network"]}
    assert network.keys() >= {1, 8}
    for row in data["couplings"]:
        assert row["overhead_measured"] == pytest.approx(row["coupled_step"] / row["step"] - 1)
        whole = network[row["batch_size"]]["seconds_extrapolated"]
        assert row["overhead_extrapolated"] == pytest.approx(row["coupling"] / (whole + row["draw"]))
        assert row["extra_flops"] < 0.005


def test_any_order():
    """Every size has the joint draw and every number of turns beside it."""
    data = json.loads((FOLDER / "any_order.json").read_text(encoding="utf-8"))
    assert all(data[key] for key in ("command", "date", "device", "torch", "load"))
    assert (data["sites"], data["states"]) == (32, 256)
    for size in data["sizes"]:
        for of in ("", "_from_logits"):
            assert size[f"joint_ms{of}"] > 0
            assert {"latent", "turns=1", "turns=4", "strict"} <= size[f"ratio{of}"].keys()


def kept(name: str) -> dict:
    data = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert all(data[key] for key in ("command", "date", "device", "torch"))
    assert (FOLDER / f"{name}.py").is_file()
    return data


def test_attach_memory():
    """Four gigabytes beyond the network's are enough for 200 MB of text."""
    data = kept("attach_memory")
    assert data["text_bytes"] >= 200_000_000 and (data["vocab"], data["states"]) == (126_464, 1024)
    assert data["coupling_bytes"] < data["peak_bytes"] < 4_000_000_000


def test_structured_transitions():
    """Blocks pay in the sweep over small vocabularies, which is why the library looks for them."""
    rows = kept("structured_transitions")["models"]
    small = [row["sweep_ms"] for row in rows if row["vocab"] == 27]
    assert len(small) == 2 and all(row["4 blocks"] < 0.6 * row["dense"] for row in small)


def test_tied_emissions():
    """More columns lose less, and the network's vectors less than random ones of the same width."""
    data = kept("tied_emissions")
    lost = {kind: [r["lost"] for r in data["tied"] if r["vectors"] == kind] for kind in ("network", "random")}
    for values in lost.values():
        assert values == sorted(values, reverse=True)
    assert all(a < b for a, b in zip(lost["network"], lost["random"], strict=True))
    assert all(row["parameters"] < data["free"]["parameters"] for row in data["tied"])


def test_projection_gradients():
    """The reference has converged, and autograd through the sweeps comes to it."""
    for found in kept("projection_gradients")["states"].values():
        assert found["reference_converged"] > 0.999
        near = [found["methods"][f"unrolled {n}"]["cosine_to_exact"] for n in (1, 2, 20)]
        assert near == sorted(near) and near[-1] > 0.99
