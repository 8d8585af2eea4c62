"""codd bench overhead: what is built, counted, measured, extrapolated, written and refused."""

import inspect
import json
from pathlib import Path

import pytest
import torch

from codd_ppl import CouplingLayer
from codd_ppl.cli import main
from codd_ppl.commands.bench_overhead import layers_to_run
from codd_ppl.errors import ConfigError
from codd_ppl.evaluation import overhead_timing
from codd_ppl.evaluation.backbone_shape import SHAPES, BackboneShape, named_shape
from codd_ppl.evaluation.footprint import Footprint, footprint
from codd_ppl.evaluation.overhead import NetworkTime, Overhead, overhead_record
from codd_ppl.evaluation.overhead_timing import network_flops, time_overhead
from codd_ppl.evaluation.overhead_variants import bytes_needed, drawing_at, variants
from codd_ppl.evaluation.shape_network import ShapeNetwork
from codd_ppl.inference import native

CPU = torch.device("cpu")
CONFIG = {
    "model_type": "tiny",
    "vocab_size": 1500,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "mask_token_id": 7,
}
TINY = BackboneShape.from_config(CONFIG, "tiny")
STATES = 50  # 75,000 emissions: as for a large vocabulary


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    return path


def network(layers: int = 2, prompt: int = 5, shape: BackboneShape = TINY) -> ShapeNetwork:
    return ShapeNetwork(shape, layers, prompt, CPU, torch.bfloat16)


# --- shapes -----------------------------------------------------------------------------------------


def test_the_shapes_have_the_sizes_of_their_models() -> None:
    found = {name: round(shape.parameters() / 1e9, 2) for name, shape in SHAPES.items()}
    assert found == {"llada-8b": 8.02, "dream-7b": 7.62, "bert-base": 0.13}  # BERT's embedding is tied: 0.11
    assert SHAPES["dream-7b"].kv_heads == 4 and SHAPES["llada-8b"].kv_heads == 32
    assert SHAPES["bert-base"].layer_parameters == 4 * 768**2 + 2 * 768 * 3072 + 2 * 768


def test_configurations_of_other_families() -> None:
    llada = {"d_model": 64, "n_layers": 3, "n_heads": 4, "mlp_hidden_size": 96, "vocab_size": 100}
    shape = BackboneShape.from_config({**llada, "activation_type": "silu", "n_kv_heads": None}, "llada")
    assert (shape.hidden_size, shape.layers, shape.inner_size, shape.kv_heads) == (64, 3, 96, 4)
    assert shape.mask_token_id == 99 and shape.gated
    assert not BackboneShape.from_config({**llada, "hidden_act": "gelu"}, "bert").gated


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": None}, "expected num_hidden_layers or n_layers or n_layer, the layers"),
        ({"num_attention_heads": 3}, "multiple of 2 \\* heads"),
        ({"num_key_value_heads": 3}, "one of kv_heads"),
        ({"hidden_size": 0}, "hidden_size as an integer of at least 1, found 0"),
        ({"intermediate_size": "24"}, "inner_size as an integer of at least 1, found '24'"),
        ({"mask_token_id": 1500}, "mask_token_id below vocab_size = 1500"),
    ],
)
def test_configurations_that_are_wrong(change: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        BackboneShape.from_config({**CONFIG, **change}, "tiny")


def test_where_a_configuration_is_looked_for(config: Path, tmp_path: Path) -> None:
    assert named_shape(str(config)) == named_shape(str(tmp_path)) == TINY
    with pytest.raises(ConfigError, match=r"expected one of llada-8b, dream-7b, bert-base or a config.json"):
        named_shape("llada-9b")
    for text, said in (("{", "as JSON"), ("[1]", "a JSON object .* found a list")):
        config.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=said):
            named_shape(str(config))


# --- the network ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
def test_a_network_says_finite_things_of_every_site(gated: bool) -> None:
    shape = BackboneShape("tiny", 1500, 16, 4, 4, 2, 24, 7, gated)
    net = network(shape=shape)
    assert sum(p.numel() for p in net.parameters()) == shape.parameters(2)
    output = net(torch.full((3, 6), 7))
    assert output.logits.shape == (3, 6, 1500) and output.hidden.shape == (3, 6, 16)
    assert output.logits.dtype == torch.bfloat16
    others = [token for token in range(1500) if token != 7]
    assert bool((output.logits[..., 7] == -torch.inf).all()), "the mask is no token"
    assert bool(torch.isfinite(output.logits[..., others].float()).all())
    assert float(output.logits[..., others].float().std()) > 0.01, "rows of the head differ"


def test_a_site_sees_the_whole_text_and_the_prompt() -> None:
    net = ShapeNetwork(TINY, 2, 5, CPU, torch.float32)
    xt = torch.arange(6)[None] + 20
    base, turned = net(xt).hidden, net(xt.flip(1)).hidden.flip(1)
    assert not torch.allclose(base, turned), "places count"
    for site in (0, 5):
        other = xt.clone()
        other[0, site] = 99
        assert bool((net(other).hidden != base).any(-1).all()), "every site sees every other"
    assert not torch.allclose(ShapeNetwork(TINY, 2, 0, CPU, torch.float32)(xt).hidden, base)
    shallow = [net(xt, layers).hidden for layers in (0, 1, 2)]
    assert torch.equal(shallow[2], base) and not torch.allclose(shallow[0], shallow[1])


@pytest.mark.parametrize("name", ["llada-8b", "dream-7b", "bert-base"])
def test_operations_of_the_whole_network(name: str) -> None:
    """Two for each weight and token, but the embedding's, and the attention's own; the head reads the sites alone."""
    shape, sites, read = SHAPES[name], 32, 544
    norms = 2 * shape.hidden_size * shape.layers
    blocks = shape.layers * shape.layer_parameters - norms
    attention = 4 * shape.layers * read**2 * shape.hidden_size
    expected = 2 * read * blocks + 2 * sites * shape.vocab_size * shape.hidden_size + attention
    assert network_flops(shape, sites, read - sites) == expected


# --- what a call does -------------------------------------------------------------------------------


def test_the_footprint_of_a_call() -> None:
    kept: list[torch.Tensor] = []
    x = torch.zeros(1000)

    def call() -> None:
        y = x + 1.0
        z = y * 2.0
        del y
        kept.append(z[:10])  # a view, which keeps all of z
        (torch.ones(10, 20) @ torch.ones(20, 3)).addmm_(torch.ones(10, 5), torch.ones(5, 3))
        bool(z.any())

    found = footprint(call, CPU)
    assert found.flops == 2 * 10 * 20 * 3 + 2 * 10 * 5 * 3
    assert found.operations == 2 + 6 + 2 and found.waits == 1
    assert found.peak_bytes == 8000 and found.kept_bytes == 4000
    del kept[:]
    assert footprint(lambda: x[x > 0], CPU).waits == 1, "how many there are is waited for"


@pytest.mark.parametrize("drawing", ["joint", "any_order"])
def test_operations_of_the_couplings(drawing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula is what PyTorch's counter sees where it sees all, that is, without compiled loops."""
    monkeypatch.setattr(native, "library", lambda: None)
    sites, batch, few = 8, 3, 16
    draw = drawing_at(drawing, 0.7)
    unchecked = inspect.unwrap(type(draw).draw)  # a check of shapes would ask for the marginals once more
    for variant in variants(sites, 1500, STATES, [few], {drawing: draw}, CPU):
        logits = torch.randn(batch, sites, 1500).index_fill(-1, torch.tensor([7]), -torch.inf)
        known = torch.zeros(batch, sites, dtype=torch.bool)
        tokens = torch.full((batch, sites), 7)

        def step(coupling: CouplingLayer = variant.coupling, given: tuple = (logits, tokens, known)) -> None:
            law = coupling(given[0], tokens=given[1], known=given[2])
            unchecked(draw, law, ~given[2], torch.Generator().manual_seed(0))

        with torch.no_grad():
            found = footprint(step, CPU).flops
        expected = batch * variant.flops(STATES)
        along = batch * 2 * (sites - 1) * STATES**2
        if drawing == "joint":
            assert found == expected, variant.name
        else:  # the last turns may end before the end of the text
            assert expected - 2 * along <= found <= expected, variant.name


def test_the_couplings_share_their_tables() -> None:
    drawings = {name: drawing_at(name, 0.5) for name in ("latent", "any_order")}
    found = variants(4, 1500, STATES, [8, 16], drawings, CPU)
    assert [variant.name for variant in found] == [
        "top 8, latent", "top 8, any_order", "top 16, latent", "top 16, any_order", "all tokens, latent",
        "product, latent",
    ]  # fmt: skip
    assert len({id(variant.coupling.potentials) for variant in found}) == 1
    assert [variant.coupling.candidates for variant in found] == [8, 8, 16, 16, None, None]
    tables = found[0].coupling.log_potentials(None, torch.zeros(1, 4, dtype=torch.bool))
    total = tables["emission"].double().exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


# --- times ------------------------------------------------------------------------------------------


def test_the_line_through_the_depths() -> None:
    times = NetworkTime(8, 32, {0: 1.0, 1: 3.0, 2: 5.0})
    assert (times.depth, times.measured) == (2, 5.0)
    assert times.layer == pytest.approx(2.0) and times.head == pytest.approx(1.0)
    assert times.extrapolated == pytest.approx(65.0) and times.misfit == pytest.approx(0.0)
    assert NetworkTime(8, 32, {0: 1.0, 1: 4.0, 2: 5.0}).misfit == pytest.approx(2 / 3 / 5)
    assert NetworkTime(8, 2, {2: 5.0}).extrapolated is None
    assert NetworkTime(8, 2, {2: 5.0}).layer == 2.5


def row(times: NetworkTime) -> Overhead:
    plain = Footprint(0, 10, 1, 500, 0, "")
    coupled = Footprint(90, 210, 4, 700, 0, "")
    return Overhead("x", times, 6.0, 7.5, 0.2, 0.3, 1.0, 2.3, 1000, 3000, plain, coupled, 100, 10_000)


def test_measured_and_extrapolated_overheads_are_apart() -> None:
    part = row(NetworkTime(1, 32, {0: 1.0, 1: 3.0, 2: 5.0}))
    assert part.measured == pytest.approx(0.25), "of the steps"
    assert part.extrapolated == pytest.approx(1.3 / 66), "of the draws, beside the line at 32 layers"
    assert part.extra_bytes == 4200 and part.extra_flops == 0.01
    record = overhead_record(part)
    assert record["overhead_measured"] == pytest.approx(0.25) and record["layers_measured"] == 2
    assert record["overhead_extrapolated"] == pytest.approx(1.3 / 66)
    whole = row(NetworkTime(1, 2, {2: 5.0}))
    assert whole.measured == pytest.approx(0.25) and whole.extrapolated is None


class Clock:
    """Ticks with every layer that is run and every call of a coupling."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def tick(self, module: torch.nn.Module, seconds: float) -> None:
        def hook(*_: object) -> None:
            self.now += seconds

        module.register_forward_hook(hook)


def test_steps_are_measured_with_their_draw_and_draws_without_the_network() -> None:
    clock, net = Clock(), network(layers=3)
    found = variants(4, 1500, STATES, [8], {"joint": drawing_at("joint", 1.0)}, CPU)
    for block in net.blocks:
        clock.tick(block, 2.0)
    clock.tick(net, 1.0)
    for variant, seconds in zip(found, (0.5, 60.0, 0.25), strict=True):
        clock.tick(variant.coupling, seconds)
    top, every, product = time_overhead(net, found, STATES, 2, repeats=2, clock=clock)
    assert isinstance(top, Overhead) and isinstance(product, Overhead)
    assert top.network.seconds == {0: 1.0, 1: 3.0, 2: 5.0, 3: 7.0} and top.network.extrapolated == 9.0
    assert (top.step, top.coupled_step, top.draw, top.coupled_draw) == (7.0, 7.5, 0.0, 0.5)
    assert top.measured == pytest.approx(0.5 / 7) and top.extrapolated == pytest.approx(0.5 / 9)
    assert (product.coupled_step, product.coupled_draw) == (7.25, 0.25)
    assert every.reason == "a draw takes 60.0 s, more than 10 s and 2 calls of the network"
    assert top.network_flops == 2 * network_flops(TINY, 4, 5)
    assert top.weight_bytes == 4 * (1500 * STATES + STATES**2 + STATES)
    assert top.kept_bytes >= 3 * 4 * 1500 * STATES, "logarithms, exponentials, and these by token"
    assert product.kept_bytes >= 2 * 4 * 1500 * STATES
    with pytest.raises(ConfigError, match="repeats of at least 1"):
        time_overhead(net, found, STATES, 2, repeats=0)


def test_what_does_not_fit_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Footprint:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(overhead_timing, "footprint", full)
    found = overhead_timing._look(lambda: None, 1.0, Clock(), CPU)
    assert found == "it needs more memory than the device has left"


def test_how_many_layers_are_run() -> None:
    def needed(layers: int) -> int:
        return 10 + layers

    assert layers_to_run("auto", 32, 32, needed, 1000) == 32
    assert layers_to_run("auto", 32, 32, needed, 20) == 8
    assert layers_to_run("auto", 32, 2, needed, 1000) == 2
    assert layers_to_run("1/8", 32, 2, needed, 1000) == 4
    assert layers_to_run("0.5", 28, 2, needed, 1000) == 14
    assert layers_to_run("1/100", 32, 2, needed, 1000) == 1
    with pytest.raises(ConfigError, match=r"--scale 1: expected 0.0 GB for 32 of 32 layers and the coupling"):
        layers_to_run("1", 32, 2, needed, 20)
    with pytest.raises(ConfigError, match="smaller --scale"):
        layers_to_run("auto", 32, 32, needed, 10)
    for wrong in ("2", "0", "-1", "half", "1/0"):
        with pytest.raises(ConfigError, match="auto, or a share of the layers"):
            layers_to_run(wrong, 32, 2, needed, 1000)
    tables = bytes_needed(126_464, 1024, 32, 1)
    assert tables > 4 * 4 * 126_464 * 1024
    assert bytes_needed(126_464, 1024, 32, 32) - tables == 31 * 32 * 126_464 * 40


# --- the command ------------------------------------------------------------------------------------


def test_the_command(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads, target = torch.get_num_threads(), tmp_path / "sub" / "overhead.json"
    words = ["bench", "overhead", "--backbone-config", str(config), "--states", "50", "--length", "4"]
    words += ["--prompt", "3", "--batch-size", "1", "2", "--candidates", "8", "--repeats", "1"]
    assert main([*words, "--clock", "cpu", "--output", str(target)]) == 0
    shown = capsys.readouterr().out
    assert "tiny, batch 2: network" in shown and "with 2 of 4 layers" in shown
    assert "extrapolated to 4 layers" in shown
    assert shown.count("top 8, any_order") == 2 and shown.count("product, joint") == 2
    record = json.loads(target.read_text(encoding="utf-8"))
    assert record["backbone"]["layers"] == 4 and record["layers"] == 2 and record["clock"] == "cpu"
    assert record["command"].startswith("codd bench overhead --backbone-config")
    assert [(found["batch_size"], found["variant"]) for found in record["couplings"]] == [
        (batch, name)
        for batch in (1, 2)
        for name in ("top 8, joint", "top 8, any_order", "all tokens, joint", "product, joint")
    ]
    network = record["network"][1]
    assert network["batch_size"] == 2 and set(network["seconds_measured_by_layers"]) == {"0", "1", "2"}
    for found in record["couplings"]:
        assert found["overhead_measured"] == pytest.approx(found["coupled_step"] / found["step"] - 1)
        assert found["coupling"] == pytest.approx(found["coupled_draw"] - found["draw"])
        whole = record["network"][found["batch_size"] - 1]["seconds_extrapolated"]
        assert found["overhead_extrapolated"] == pytest.approx(found["coupling"] / (whole + found["draw"]))
        assert found["extra_flops"] == pytest.approx(found["flops"] / found["flops_of_whole_network"])
        assert found["operations"] > found["operations_factorised"] > 0
    assert torch.get_num_threads() == threads
    assert main([*words, "--scale", "1", "--drawing", "latent"]) == 0
    shown = capsys.readouterr().out
    assert "with 4 of 4 layers" in shown and "extrapolated" not in shown


def test_a_batch_that_does_not_fit_is_left_out(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codd_ppl.commands.bench_overhead.free_bytes", lambda _: 10_000_000)
    words = ["bench", "overhead", "--backbone-config", str(config), "--states", "50", "--length", "4"]
    words += ["--prompt", "3", "--batch-size", "1", "4096", "--repeats", "1"]
    target = tmp_path / "overhead.json"
    assert main([*words, "--output", str(target)]) == 0
    assert "batch 4096 is left out: it needs" in capsys.readouterr().out.replace("\n", " ")
    assert list(json.loads(target.read_text(encoding="utf-8"))["left_out"]) == ["4096"]
    monkeypatch.setattr("codd_ppl.commands.bench_overhead.free_bytes", lambda _: 1000)
    assert main(words) == 2
    assert "0.0 GB free; give a smaller --scale" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--backbone-config", "gpt-5"], "expected one of llada-8b"),
        (["--states", "0"], "--states: expected at least 1"),
        (["--batch-size", "1", "0"], "--batch-size: expected at least 1"),
        (["--candidates", "0"], "--candidates: expected at least 1"),
        (["--prompt", "-1"], "--prompt: expected at least 0"),
        (["--drawing", "mode"], "--drawing: expected one of joint, latent, any_order, found 'mode'"),
        (["--drawing-temperature", "0"], "temperature: expected a number above 0"),
        (["--scale", "3"], "--scale: expected auto"),
        (["--device", "nowhere"], "--device nowhere: expected a device of this machine"),
        (["--device", "meta", "--clock", "cpu"], "--clock cpu counts the host's work"),
        (["--output", "."], "is a folder"),
    ],
)
def test_what_is_refused(
    config: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert main(["bench", "overhead", "--backbone-config", str(config), "--states", "8", *more]) == 2
    assert said in capsys.readouterr().err


def test_the_mask_among_the_logits_leaves_the_candidates_in_use() -> None:
    """Else all tokens would be fitted, and the figures of candidates would be theirs."""
    found = variants(4, 1500, STATES, [8], {"joint": drawing_at("joint", 1.0)}, CPU)[0]
    output = network()(torch.full((1, 4), 7))
    with torch.no_grad():
        known = torch.zeros(1, 4, dtype=torch.bool)
        law = found.coupling(output.logits, tokens=torch.full((1, 4), 7), known=known)
    values = law.log_weights[0, 0]
    assert len(values.unique()) <= 8 + 2, "the candidates', one for all others, and -inf"
