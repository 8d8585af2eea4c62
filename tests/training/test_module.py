"""CoDDModule: what is trained, with which loss and rates, and runs that resume exactly."""

import contextlib
import copy
import math
import warnings
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint

from codd_ppl import BidirectionalTransformer, CoDDModule, CouplingLayer, TextDataModule, topologies
from codd_ppl.diffusion import factorised_nelbo
from codd_ppl.errors import ConfigError
from codd_ppl.potentials import ContextualLatentPotentials, LogarithmicPool
from codd_ppl.training import fit_pool
from codd_ppl.training.blocks import BlockLoader

TEXT = "the cat sat on the mat and the dog sat on the log. a hat for the cat, a bone for the dog. " * 40
SITES = 8


@pytest.fixture
def data(tmp_path: Path) -> TextDataModule:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return TextDataModule(path, block_length=SITES, batch_size=16)


def parts(data: TextDataModule, states: int = 3, combine: str = "projected"):
    torch.manual_seed(1)
    graph = topologies.hidden_markov(SITES, data.vocab_size, states)
    return BidirectionalTransformer(data.vocab_size, 16, 1, 2), CouplingLayer(
        graph, data.vocab_size, combine=combine
    )


def trainer(folder: Path, **settings) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, "max_steps": 6, **settings},
    )


class Losses(Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.values[trainer.global_step] = float(outputs["loss"])


@pytest.mark.parametrize("combine", ["projected", "product"])
def test_everything_is_trained_by_default(data: TextDataModule, tmp_path: Path, combine: str) -> None:
    denoiser, coupling = parts(data, combine=combine)
    before = {name: value.clone() for name, value in CoDDModule(denoiser, coupling).state_dict().items()}
    module = CoDDModule(denoiser, coupling, learning_rate=1e-2)
    trainer(tmp_path).fit(module, data)
    still = [
        n for n, v in module.state_dict().items() if torch.equal(v, before[n]) and v.dtype.is_floating_point
    ]
    assert still == []


@pytest.mark.parametrize("frozen", ["denoiser", "coupling"])
def test_what_is_frozen_stays(data: TextDataModule, tmp_path: Path, frozen: str) -> None:
    denoiser, coupling = parts(data)
    module = CoDDModule(denoiser, coupling, learning_rate=1e-2, **{f"freeze_{frozen}": True})
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(tmp_path).fit(module, data)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(frozen), name


def test_frozen_dropout_is_off(data: TextDataModule, tmp_path: Path) -> None:
    _, coupling = parts(data)
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            seen.append(module.denoiser.training)

    denoiser = BidirectionalTransformer(data.vocab_size, 16, 1, 2, dropout=0.5)
    module = CoDDModule(denoiser, coupling, freeze_denoiser=True)
    trainer(tmp_path, callbacks=[Watch()]).fit(module, data)
    assert seen and not any(seen)


def test_the_tables_learn(data: TextDataModule, tmp_path: Path) -> None:
    """On a frozen untrained network a coupling that is trained alone lowers the bound by much."""
    denoiser, coupling = parts(data, states=8)
    module = CoDDModule(
        denoiser, coupling, steps=1, freeze_denoiser=True, potentials_learning_rate=0.1, init_from_corpus=True
    )
    runner = trainer(tmp_path, max_steps=40)
    before = runner.validate(module, data, verbose=False)[0]["valid_bits"]
    runner = trainer(tmp_path, max_steps=40, limit_val_batches=0)
    runner.fit(module, data)
    after = trainer(tmp_path).validate(module, data, verbose=False)[0]["valid_bits"]
    assert after < before - 0.5


def test_the_pool_is_fitted_to_held_out_text_before_training(data: TextDataModule, tmp_path: Path) -> None:
    denoiser, _ = parts(data)
    graph = topologies.hidden_markov(SITES, data.vocab_size, 8)
    coupling = CouplingLayer(graph, data.vocab_size, pool=LogarithmicPool((0.5, 1.0)))
    module = CoDDModule(
        denoiser, coupling, freeze_denoiser=True, init_from_corpus=True, fit_pool={"sites": 500}
    )
    found = []

    class Watch(Callback):
        def on_train_start(self, trainer, module) -> None:
            found.append(module.coupling.pool.weights.detach().clone())

    trainer(tmp_path, max_steps=1, callbacks=[Watch()]).fit(module, data)
    weights = coupling.pool.weights.detach().clone()
    expected = fit_pool(denoiser, coupling, data.valid_blocks(), sites=500)
    assert found[0][0, 1] > 0.5, "an untrained network: the prior knows more"
    assert all(p < n - 0.2 for p, n in zip(expected.pooled, expected.network, strict=True))
    again = CoDDModule(denoiser, coupling, freeze_denoiser=True, fit_pool=True)
    again.on_load_checkpoint({})
    with torch.no_grad():
        coupling.pool.weights.copy_(weights)
    again.on_fit_start()
    assert torch.equal(coupling.pool.weights, weights), "a resumed run goes on with what it had"


def test_independent_topology_has_the_factorised_loss(data: TextDataModule) -> None:
    denoiser, _ = parts(data)
    module = CoDDModule(
        denoiser, CouplingLayer(topologies.independent(SITES, data.vocab_size), data.vocab_size), steps=4
    )
    noised = module.noise(data.train_blocks()[:16], 4, salt=1)
    assert torch.equal(module(noised), factorised_nelbo(noised, denoiser(noised.xt).logits))


def test_rates_of_network_and_tables(data: TextDataModule, tmp_path: Path) -> None:
    denoiser, coupling = parts(data)
    module = CoDDModule(denoiser, coupling, learning_rate=1e-3, warmup_steps=2)
    rates: list[list[float]] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    trainer(tmp_path, callbacks=[Watch()]).fit(module, data)
    assert all(math.isclose(row[-1], 10 * row[0]) for row in rates)
    assert rates[0][0] == pytest.approx(5e-4) and rates[1][0] == pytest.approx(1e-3)
    assert rates[-1][0] < rates[2][0]
    decays = [group["weight_decay"] for group in module.trainer.optimizers[0].param_groups]
    assert decays == [0.01, 0.0, 0.0]


@pytest.mark.parametrize(("steps", "expected"), [("any", [1, 2, 4, 8]), (3, [3]), ([2, 5], [2, 5])])
def test_steps(data: TextDataModule, steps, expected: list[int]) -> None:
    assert CoDDModule(*parts(data), steps=steps).steps == expected


@pytest.mark.parametrize("steps", ["all", 0, [], [4, -1], 2.5])
def test_wrong_steps(data: TextDataModule, steps) -> None:
    with pytest.raises(ConfigError, match="steps"):
        CoDDModule(*parts(data), steps=steps)


def test_nothing_to_train(data: TextDataModule) -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        CoDDModule(*parts(data), freeze_denoiser=True, freeze_coupling=True)


def test_vocabularies_must_agree(data: TextDataModule, tmp_path: Path) -> None:
    _, coupling = parts(data)
    with pytest.raises(ConfigError, match="vocab"):
        CoDDModule(BidirectionalTransformer(5, 16, 1, 2), coupling)
    size = data.vocab_size + 1
    other = CouplingLayer(topologies.independent(SITES, size), size)
    with pytest.raises(ConfigError, match="tokenizer has"):
        trainer(tmp_path).fit(CoDDModule(BidirectionalTransformer(size, 16, 1, 2), other), data)


def test_lengths_must_agree(data: TextDataModule, tmp_path: Path) -> None:
    denoiser, _ = parts(data)
    longer = CouplingLayer(topologies.independent(SITES + 1, data.vocab_size), data.vocab_size)
    with pytest.raises(ConfigError, match="block_length"):
        trainer(tmp_path).fit(CoDDModule(denoiser, longer), data)


def run(data: TextDataModule, folder: Path, steps: int, ckpt: Path | None = None, build=None):
    """A run of 24 steps by plan, stopped after ``steps``; its losses and weights."""
    losses = Losses()
    module = (
        CoDDModule(*parts(data), learning_rate=1e-2, init_from_corpus=True) if build is None else build(data)
    )

    class Crash(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            if trainer.global_step >= steps < 24:
                raise EOFError  # the power goes off

    saver = ModelCheckpoint(folder, every_n_train_steps=5, save_last=True, save_top_k=0)
    runner = trainer(
        folder,
        enable_checkpointing=True,
        max_steps=24,
        limit_val_batches=0,
        callbacks=[losses, Crash(), saver, EMAWeightAveraging(decay=0.9)],
    )
    with warnings.catch_warnings():
        # torch says it of its own scheduler when an optimizer's state is loaded before a first step
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
        with pytest.raises(EOFError) if steps < 24 else contextlib.nullcontext():
            runner.fit(module, data, ckpt_path=None if ckpt is None else str(ckpt))
    return losses.values, module.state_dict()


def test_a_resumed_run_is_the_uninterrupted_one(data: TextDataModule, tmp_path: Path) -> None:
    """Loss by loss and weight by weight, averages included, from a checkpoint in the middle of an epoch."""
    assert 10 % len(data.train_dataloader())  # the checkpoint of step 10 lies inside an epoch
    whole, weights = run(data, tmp_path / "whole", 24)
    first, _ = run(data, tmp_path / "parts", 12)
    rest, resumed = run(data, tmp_path / "parts", 24, tmp_path / "parts" / "last.ckpt")
    assert sorted(first) == list(range(1, 13)) and sorted(rest) == list(range(11, 25))
    assert whole == {**first, **rest} and all(first[k] == rest[k] for k in (11, 12))
    for name, value in weights.items():
        assert torch.equal(value, resumed[name]), name


def everything(data: TextDataModule, marginal_weight: float = 0.5) -> CoDDModule:
    """End to end: a network, a coupling that reads its hidden states through evidence and gates, a pool, an anchor."""
    torch.manual_seed(1)
    graph = topologies.hidden_markov(SITES, data.vocab_size, 3)
    coupling = CouplingLayer(
        graph,
        data.vocab_size,
        hidden_size=16,
        potentials=ContextualLatentPotentials(graph, 16, width=8, gates=True),
        pool=LogarithmicPool((0.5, 1.0)),
    )
    return CoDDModule(
        BidirectionalTransformer(data.vocab_size, 16, 1, 2),
        coupling,
        learning_rate=1e-2,
        init_from_corpus={"epochs": 1},
        fit_pool={"sites": 200},
        marginal_weight=marginal_weight,
    )


@pytest.mark.parametrize("part", ["denoiser", "coupling.potentials", "coupling.pool"])
def test_gradients_go_through_the_projection(data: TextDataModule, part: str) -> None:
    """The bound alone, without anchor: its slope along each part is that of finite differences."""
    module = everything(data, marginal_weight=0.0).double()
    noised = module.noise(data.train_blocks()[:6], 2, salt=1)
    assert bool(noised.known.any()) and not bool(noised.known.all())
    parameters = list(module.get_submodule(part).parameters())
    torch.manual_seed(2)
    direction = [torch.randn_like(p) for p in parameters]
    gradient = torch.autograd.grad(module(noised).mean(), parameters)
    slope = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))

    def moved(size: float) -> float:
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=size)
            return float(module(noised).mean())

    up, down = moved(1e-5), moved(-2e-5)
    assert abs(slope) > 1e-3
    assert slope == pytest.approx((up - down) / 2e-5, rel=1e-4)


def test_everything_end_to_end_receives_gradients(data: TextDataModule, tmp_path: Path) -> None:
    moved: dict[str, float] = {}

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
            for name, p in module.named_parameters():
                assert p.grad is not None and bool(p.grad.isfinite().all()), name
                moved[name] = max(moved.get(name, 0.0), float(p.grad.abs().max()))

    module = everything(data)
    trainer(tmp_path, max_steps=8, limit_val_batches=0, callbacks=[Watch()]).fit(module, data)
    assert set(moved) == {name for name, _ in module.named_parameters()}
    assert any("gate_head" in name for name in moved) and "coupling.pool.weights" in moved
    assert [name for name, size in moved.items() if size == 0] == []


def test_everything_end_to_end_resumes_exactly(data: TextDataModule, tmp_path: Path) -> None:
    whole, weights = run(data, tmp_path / "whole", 24, build=everything)
    first, _ = run(data, tmp_path / "parts", 12, build=everything)
    rest, resumed = run(data, tmp_path / "parts", 24, tmp_path / "parts" / "last.ckpt", build=everything)
    assert whole == {**first, **rest} and all(first[k] == rest[k] for k in (11, 12))
    for name, value in weights.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes(data: TextDataModule, tmp_path: Path) -> None:
    """trainer.fit with strategy="ddp_spawn"-like processes on CPU: both end with the same weights."""
    import subprocess
    import sys

    script = tmp_path / "train.py"
    script.write_text(
        f"""
import lightning, torch
from codd_ppl import BidirectionalTransformer, CoDDModule, CouplingLayer, TextDataModule, topologies

if __name__ == "__main__":
    torch.manual_seed(1)
    data = TextDataModule({str(data.path)!r}, block_length={SITES}, batch_size=8)
    coupling = CouplingLayer(topologies.hidden_markov({SITES}, data.vocab_size, 3), data.vocab_size)
    module = CoDDModule(BidirectionalTransformer(data.vocab_size, 16, 1, 2), coupling, learning_rate=1e-2,
                        init_from_corpus=True)
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=6, logger=False,
                                enable_progress_bar=False, enable_checkpointing=False)
    trainer.fit(module, data)
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    both = trainer.strategy.all_gather(weights)
    assert both.shape[0] == 2 and torch.equal(both[0], both[1]), "the processes have different weights"
    if trainer.is_global_zero:
        print("world size", trainer.world_size, "steps", trainer.global_step)
""",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "world size 2 steps 6" in done.stdout


# --- the anchor of the network's own marginals ------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """Text, and a network trained on it alone."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    data = TextDataModule(folder / "text.txt", block_length=SITES, batch_size=16)
    torch.manual_seed(1)
    denoiser = BidirectionalTransformer(data.vocab_size, 32, 1, 2)
    alone = CouplingLayer(topologies.independent(SITES, data.vocab_size), data.vocab_size)
    trainer(folder, max_steps=150, limit_val_batches=0).fit(
        CoDDModule(denoiser, alone, learning_rate=1e-2), data
    )
    return data, denoiser


def network_bits(denoiser: BidirectionalTransformer, blocks: torch.Tensor) -> float:
    """The network's own NELBO at T = sites, bits per token; 20 draws of the noise."""
    alone = CouplingLayer(topologies.independent(SITES, denoiser.vocab_size), denoiser.vocab_size)
    module = CoDDModule(denoiser, alone)
    with torch.no_grad():
        draws = [module(module.noise(blocks, SITES, salt)).mean().item() for salt in range(20)]
    return sum(draws) / len(draws) / (SITES * math.log(2))


@pytest.mark.slow
@pytest.mark.ci
def test_the_anchor_keeps_single_token_predictions(trained, tmp_path: Path) -> None:
    """End to end with a product coupling the network's own marginals drift; anchored they don't."""
    data, network = trained
    blocks, found = data.valid_blocks(), {}
    before = network_bits(network, blocks)
    for weight in (0.0, 1.0):
        denoiser = copy.deepcopy(network)
        coupling = parts(data, states=8, combine="product")[1]
        module = CoDDModule(
            denoiser, coupling, learning_rate=5e-3, init_from_corpus=True, marginal_weight=weight
        )
        trainer(tmp_path, max_steps=60, limit_val_batches=0).fit(module, data)
        report = trainer(tmp_path).validate(module, data, verbose=False)[0]
        found[weight] = network_bits(denoiser, blocks), report[f"valid_bits_T{SITES}"]
    assert found[0.0][0] > before + 0.1, (before, found)
    assert found[1.0][0] < before, (before, found)
    assert found[1.0][1] < found[0.0][1] + 0.05, (before, found)


def test_the_anchor_is_one_cross_entropy_more(data: TextDataModule, tmp_path: Path) -> None:
    """Loss = bound + weight times the network's own bound, from one forward pass; both are logged."""
    calls = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            self.metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}

    denoiser, coupling = parts(data)
    denoiser.register_forward_hook(lambda *_: calls.append(1))
    module = CoDDModule(denoiser, coupling, steps=4, marginal_weight=0.25)
    noised = module.noise(data.train_blocks()[:16], 4, salt=1)
    watch = Watch()

    with torch.no_grad():
        bound = module(noised).mean() / SITES
        marginal = factorised_nelbo(noised, denoiser(noised.xt).logits).mean() / SITES
    calls.clear()
    batches = BlockLoader(data.train_blocks().flatten(), SITES, 16)
    trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[watch]).fit(module, batches, batches)
    assert len(calls) == 1
    assert watch.metrics["train_marginal_loss"] == pytest.approx(float(marginal), rel=1e-6)
    assert watch.metrics["train_loss"] == pytest.approx(float(bound + 0.25 * marginal), rel=1e-6)
    report = trainer(tmp_path).validate(module, data, verbose=False)[0]
    assert set(report) == {"valid_bits", "valid_bits_T4", "valid_marginal_bits_T4"}


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_wrong_weight_of_the_anchor(data: TextDataModule, weight: float) -> None:
    with pytest.raises(ConfigError, match="marginal_weight >= 0"):
        CoDDModule(*parts(data), marginal_weight=weight)


def test_a_frozen_network_has_no_anchor(data: TextDataModule) -> None:
    with pytest.raises(ConfigError, match="needs no anchor"):
        CoDDModule(*parts(data), freeze_denoiser=True, marginal_weight=0.5)
