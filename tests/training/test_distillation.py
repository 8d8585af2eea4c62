"""Distillation: the teacher's blocks have its one-token-at-a-time law, are kept, go on, and teach."""

import contextlib
import copy
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import lightning
import networkx as nx
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn

from codd_ppl import (
    BidirectionalTransformer,
    CoDDModule,
    CouplingLayer,
    FactorGraph,
    TextDataModule,
    topologies,
)
from codd_ppl.cli import main
from codd_ppl.denoisers import DenoiserOutput
from codd_ppl.errors import ConfigError, DataError
from codd_ppl.fingerprint import fingerprint
from codd_ppl.model_folder import load_model, save_model
from codd_ppl.testing import chi_square_p_value, enumerate_sequences
from codd_ppl.training import DistillationDataModule, ModelFolder, SampledBlocks, sampled_blocks
from codd_ppl.training.fit_cli import _names_a_class
from codd_ppl.training.tokenizer import build_tokenizer

SITES, VOCAB = 3, 3


def network(sites: int = SITES, vocab: int = VOCAB, scale: float = 0.7) -> BidirectionalTransformer:
    """A random network whose predictions depend on what is known, and contradict each other."""
    torch.manual_seed(0)
    denoiser = BidirectionalTransformer(vocab, 16, 1, 2)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=scale)
    return denoiser


def product(sites: int = SITES, vocab: int = VOCAB) -> CouplingLayer:
    """A coupling that changes single-token predictions, too."""
    coupling = CouplingLayer(topologies.hidden_markov(sites, vocab, 2), vocab, combine="product")
    with torch.no_grad():
        for parameter in coupling.parameters():
            parameter.mul_(3)
    return coupling


@torch.no_grad()
def one_at_a_time(denoiser: BidirectionalTransformer, coupling: CouplingLayer | None) -> torch.Tensor:
    """p(x) of every sequence: the mean over all orders of the product of the conditional predictions."""
    denoiser.eval()
    states, orders = enumerate_sequences(VOCAB, SITES), list(itertools.permutations(range(SITES)))
    total = torch.zeros(len(states), dtype=torch.float64)
    for order in orders:
        xt, chance = torch.full_like(states, denoiser.mask_token_id), torch.ones_like(total)
        for site in order:
            output = denoiser(xt)
            law = output.logits.softmax(-1)
            if coupling is not None:
                law = coupling(output.logits, tokens=xt, known=xt != denoiser.mask_token_id).marginals
            chance = chance * law[torch.arange(len(states)), site, states[:, site]].double()
            xt[:, site] = states[:, site]
        total += chance / len(orders)
    return total


@pytest.mark.parametrize("coupled", [False, True])
def test_the_blocks_have_the_one_token_at_a_time_law(tmp_path: Path, coupled: bool) -> None:
    denoiser, coupling = network(), product() if coupled else None
    source = SampledBlocks(tmp_path / "b.safetensors", denoiser, coupling, SITES, chunk_size=5000)
    blocks = source.draw(20_000)
    assert blocks.shape == (20_000, SITES) and blocks.dtype == torch.int64
    counts = (blocks * VOCAB ** torch.arange(SITES - 1, -1, -1)).sum(-1).bincount(minlength=VOCAB**SITES)
    law = one_at_a_time(denoiser, coupling)
    assert law.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert chi_square_p_value(counts, law / law.sum()) > 1e-3
    # the test can tell: neither all at once nor the other teacher
    other = one_at_a_time(denoiser, None if coupled else product())
    assert chi_square_p_value(counts, other / other.sum()) < 1e-6
    with torch.no_grad():
        first = denoiser(torch.full((1, SITES), denoiser.mask_token_id)).logits.softmax(-1)[0].double()
    at_once = first[torch.arange(SITES), enumerate_sequences(VOCAB, SITES)].prod(-1)
    assert chi_square_p_value(counts, at_once / at_once.sum()) < 1e-6


class Breaks(nn.Module):
    """A network that is interrupted at its n-th call (a private attribute counts: it is no setting)."""

    def __init__(
        self, inner: BidirectionalTransformer, at: float = math.inf, error: type = KeyboardInterrupt
    ):
        super().__init__()
        self.inner, self._left, self._error = inner, at, error
        self.vocab_size, self.mask_token_id, self.hidden_size = VOCAB, inner.mask_token_id, inner.hidden_size

    def forward(self, xt: torch.Tensor) -> DenoiserOutput:
        self._left -= 1
        if self._left < 0:
            raise self._error
        return self.inner(xt)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_goes_on_as_an_uninterrupted_one(tmp_path: Path, error: type) -> None:
    whole = SampledBlocks(tmp_path / "whole.safetensors", Breaks(network()), sites=SITES, chunk_size=16)
    expected = whole.draw(100)
    path = tmp_path / "parts.safetensors"
    broken = SampledBlocks(path, Breaks(network(), 2 * SITES + 1, error), sites=SITES, chunk_size=16)
    with pytest.raises(error):
        broken.draw(100)
    assert torch.equal(load_file(path)["blocks"].long(), expected[:32])
    counting = Breaks(network(), 5 * SITES)  # seven chunks, two of them there
    again = SampledBlocks(path, counting, sites=SITES, chunk_size=16)
    assert torch.equal(again.draw(100), expected) and counting._left == 0
    assert path.read_bytes() == whole.path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts.safetensors", "whole.safetensors"]


def test_more_blocks_later_are_the_same_and_more(tmp_path: Path) -> None:
    def source(name: str) -> SampledBlocks:
        return SampledBlocks(tmp_path / name, network(), sites=SITES, chunk_size=16)

    few, many = source("a.safetensors").draw(20), source("a.safetensors").draw(50)
    assert torch.equal(few, many[:20]) and torch.equal(many, source("b.safetensors").draw(50))
    assert torch.equal(source("a.safetensors").draw(7), many[:7])
    assert len(load_file(tmp_path / "a.safetensors")["blocks"]) == 64


def test_what_is_drawn_is_saved_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut leaves what was saved; a process that wrote more meanwhile is not overwritten."""
    monkeypatch.setattr(sampled_blocks, "SAVE_SECONDS", -1.0)
    source = SampledBlocks(tmp_path / "a.safetensors", network(), sites=SITES, chunk_size=4)
    settings, seen, chunk = source.settings(), [], source._chunk

    def watched(number: int) -> torch.Tensor:
        seen.append(len(source._read(settings)))
        return chunk(number)

    monkeypatch.setattr(source, "_chunk", watched)
    source.draw(16)
    assert seen == [0, 4, 8, 12]
    bytes_before = source.path.read_bytes()
    assert source._save(torch.zeros(8, SITES, dtype=torch.int64), settings) == 16
    assert source.path.read_bytes() == bytes_before


def changed_weight(folder: Path) -> SampledBlocks:
    denoiser = network()
    with torch.no_grad():
        denoiser.head.bias[0] += 1e-3
    return SampledBlocks(folder / "a.safetensors", denoiser, product(), chunk_size=16)


def changed_coupling(folder: Path) -> SampledBlocks:
    graph = topologies.hidden_markov(SITES, VOCAB, 2)
    coupling = CouplingLayer(graph, VOCAB, potentials=product().potentials, sweeps=2)
    return SampledBlocks(folder / "a.safetensors", network(), coupling, chunk_size=16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed_weight, r"denoiser = '\w+' there, '\w+' now"),
        (changed_coupling, r"coupling = '\w+' there"),
        (
            lambda f: SampledBlocks(f / "a.safetensors", network(), None, SITES, chunk_size=16),
            "coupling = .* None now",
        ),
        (
            lambda f: SampledBlocks(f / "a.safetensors", network(), product(), seed=1, chunk_size=16),
            "seed = 0 there, 1 now",
        ),
        (
            lambda f: SampledBlocks(f / "a.safetensors", network(), product(), chunk_size=8),
            "chunk_size = 16 there",
        ),
    ],
)
def test_another_teacher_or_setting_is_noticed(tmp_path: Path, change, said: str) -> None:
    SampledBlocks(tmp_path / "a.safetensors", network(), product(), chunk_size=16).draw(16)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(DataError, match=f"made otherwise: {said}.*nothing was changed.*another path"):
        change(tmp_path).draw(32)
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir()}


def flip_a_bit(path: Path) -> None:
    """In the last byte, which is a token's."""
    whole = bytearray(path.read_bytes())
    whole[-2] ^= 1
    path.write_bytes(whole)


def as_another_format(path: Path) -> None:
    with safe_open(path, "pt") as file:
        about, blocks = json.loads(file.metadata()["about"]), file.get_tensor("blocks")
    save_file({"blocks": blocks}, path, {"about": json.dumps({**about, "format": "mine"})})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-3]), "damaged"),
        (lambda p: p.write_bytes(b""), "damaged"),
        (flip_a_bit, "tokens are not those that were written"),
        (as_another_format, "'mine', not 'codd_ppl sampled blocks 1'"),
        (lambda p: save_file({"blocks": torch.zeros(16, SITES)}, p), "something else"),
        (lambda p: save_file({"blocks": torch.zeros(16, SITES)}, p, {"about": "[1]"}), "something else"),
        (lambda p: save_file({"blocks": torch.zeros(16, SITES)}, p, {"about": "{"}), "something else"),
    ],
)
def test_files_that_cannot_be_used_are_left_as_they_are(tmp_path: Path, spoil, said: str) -> None:
    source = SampledBlocks(tmp_path / "a.safetensors", network(), sites=SITES, chunk_size=16)
    source.draw(16)
    spoil(source.path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(DataError, match=f"{said}.*nothing was changed.*another path.*or delete the file"):
        source.draw(32)
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir()}


def test_a_fingerprint_is_of_weights_and_settings_alone() -> None:
    denoiser, coupling = network(), product()
    first = fingerprint(denoiser), fingerprint(coupling)
    assert (fingerprint(network()), fingerprint(product())) == first
    denoiser.train().requires_grad_(False)(torch.zeros(2, SITES, dtype=torch.int64))
    _ = coupling.plan.explain(), coupling(torch.zeros(1, SITES, VOCAB)).log_partition
    assert (fingerprint(denoiser.double().float()), fingerprint(copy.deepcopy(coupling))) == first
    assert fingerprint(denoiser.double()) != first[0]
    coupling.tolerance = 1e-3
    assert fingerprint(coupling) != first[1]
    torch.manual_seed(0)
    heads = [BidirectionalTransformer(VOCAB, 16, 1, heads) for heads in (2, 4)]
    heads[1].load_state_dict(heads[0].state_dict())
    assert fingerprint(heads[0]) != fingerprint(heads[1])
    path = nx.path_graph(4), nx.star_graph(3)  # as many edges, other ones
    trees = [CouplingLayer(FactorGraph.from_networkx(g, cardinality=2, tie="edge"), 2) for g in path]
    trees[1].load_state_dict(trees[0].state_dict())
    assert fingerprint(trees[0]) != fingerprint(trees[1])


@dataclass
class Settings:
    temperature: float


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (0.5, 0.5, 0.25),
        (1, 1, True),
        (None, None, 0),
        ("a", "a", "b"),
        (torch.float32, torch.float32, torch.float64),
        (torch.arange(3), torch.arange(3), torch.arange(3)[[0, 2, 1]]),
        ([1, [2]], (1, [2]), [[1], 2]),
        ({1, 2}, {2, 1}, {1, 3}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 2, "b": 1}),
        (Settings(1.0), Settings(1.0), Settings(0.5)),
        (torch.Generator(), torch.Generator(), Path()),
    ],
)
def test_attributes_count_by_value(one: object, same: object, other: object) -> None:
    prints = []
    for value in (one, same, other):
        module = nn.Linear(1, 1, bias=False)
        nn.init.ones_(module.weight)
        module.setting = value
        prints.append(fingerprint(module))
    assert prints[0] == prints[1] != prints[2]


def test_wrong_settings(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for arguments, said in (
        ((tmp_path / "a.txt", network(), None, SITES), "safetensors"),
        ((path, network()), "sites >= 1"),
        ((path, network(), None, 0), "sites >= 1"),
        ((path, network(), product(), SITES + 1), "expected sites = 3"),
        ((path, network(), product(vocab=4)), "vocab_size"),
        ((path, network(), None, SITES, -1), "seed >= 0"),
        ((path, network(), None, SITES, 0, 0), "chunk_size >= 1"),
        ((path, lambda xt: xt, None, SITES), "expected an nn.Module.*found function"),
    ):
        with pytest.raises(ConfigError, match=said):
            SampledBlocks(*arguments)
    with pytest.raises(ConfigError, match="at least 1"):
        SampledBlocks(path, network(), sites=SITES).draw(0)
    for name in ("count", "valid_count", "batch_size"):
        with pytest.raises(ConfigError, match=f"{name} >= 1"):
            DistillationDataModule(network(), path, block_length=SITES, **{name: 0})
    assert list(tmp_path.iterdir()) == []


# --- the data module --------------------------------------------------------------------------------


def trainer(folder: Path, **settings) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **settings,
    )


def test_validation_comes_first_and_stays(tmp_path: Path) -> None:
    settings = {"block_length": SITES, "valid_count": 10, "batch_size": 8, "chunk_size": 16}
    few = DistillationDataModule(network(), tmp_path / "a.safetensors", count=30, **settings)
    assert (few.vocab_size, few.block_length, few.tokenizer) == (VOCAB, SITES, None)
    assert not few.path.exists(), "sizes are known without a draw"
    many = DistillationDataModule(network(), tmp_path / "a.safetensors", count=60, **settings)
    assert torch.equal(few.valid_blocks(), many.valid_blocks()) and len(few.valid_blocks()) == 10
    assert torch.equal(few.train_blocks(), many.train_blocks()[:30]) and len(many.train_blocks()) == 60
    batches = list(few.train_dataloader())
    assert [len(b) for b in batches] == [8, 8, 8, 6]
    order = torch.cat(batches)
    assert not torch.equal(order, few.train_blocks())
    assert sorted(order.tolist()) == sorted(few.train_blocks().tolist())
    assert torch.equal(torch.cat(list(few.val_dataloader())), few.valid_blocks())


def test_the_tokenizer_goes_into_the_model_folder(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("char", ["ab"], 3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path, size = tmp_path / "a.safetensors", tokenizer.get_vocab_size()

    def data(denoiser: nn.Module, name: str) -> DistillationDataModule:
        return DistillationDataModule(
            denoiser,
            path,
            block_length=SITES,
            count=8,
            valid_count=8,
            chunk_size=8,
            tokenizer=str(tmp_path / name),
        )

    assert isinstance(data(network(vocab=size), "tokenizer.json").tokenizer, Tokenizer)
    with pytest.raises(ConfigError, match="tokens, expected 9"):
        data(network(vocab=9), "tokenizer.json").setup()
    with pytest.raises(DataError, match="no file at"):
        data(network(vocab=size), "other.json").setup()
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.json: expected a tokenizer"):
        data(network(vocab=size), "bad.json").setup()
    assert not path.exists()
    module = CoDDModule(network(vocab=size), product(vocab=size), freeze_denoiser=True)
    trainer(tmp_path, max_steps=1, callbacks=[ModelFolder(tmp_path / "model")]).fit(
        module, data(network(vocab=size), "tokenizer.json")
    )
    saved = load_model(tmp_path / "model")
    assert saved.tokenizer is not None and saved.about["text"] == str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> BidirectionalTransformer:
    """A network that was trained on a text of its own."""
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "text.txt").write_text("the cat sat on the mat and the dog sat on the log. " * 60, "utf-8")
    text = TextDataModule(folder / "text.txt", block_length=8, batch_size=16)
    torch.manual_seed(0)
    denoiser = BidirectionalTransformer(text.vocab_size, 32, 1, 2)
    alone = CouplingLayer(topologies.independent(8, text.vocab_size), text.vocab_size)
    trainer(folder, max_steps=100, limit_val_batches=0).fit(
        CoDDModule(denoiser, alone, learning_rate=1e-2), text
    )
    return denoiser


@pytest.fixture
def teacher(trained: BidirectionalTransformer) -> BidirectionalTransformer:
    """That network, to change as a test likes."""
    return copy.deepcopy(trained)


@torch.no_grad()
def bits_at_once(student: CoDDModule, blocks: torch.Tensor) -> torch.Tensor:
    """-log2 p(x) of each block in one step, which hides everything: exact, there is no noise to draw."""
    noised = student.noise(blocks, 1, salt=0)
    assert not bool(noised.known.any())
    return student(noised) / math.log(2)


@pytest.mark.parametrize("how", ["by EM", "by gradients"])
def test_a_coupling_learns_what_the_teacher_writes(
    tmp_path: Path, teacher: BidirectionalTransformer, how: str
) -> None:
    """The T = 1 bound of held-out blocks falls against the coupling's random start; the network is frozen."""
    path = tmp_path / "a.safetensors"
    data = DistillationDataModule(copy.deepcopy(teacher), path, block_length=8, count=512, valid_count=256)
    coupling = CouplingLayer(topologies.hidden_markov(8, data.vocab_size, 16), data.vocab_size)
    student = CoDDModule(
        teacher, coupling, steps=1, freeze_denoiser=True, potentials_learning_rate=0.1, warmup_steps=5
    )
    before = bits_at_once(student, data.valid_blocks())
    if how == "by EM":
        coupling.init_from_corpus(data.train_blocks(), progress=False)
    else:
        trainer(tmp_path, max_steps=25, limit_val_batches=0).fit(student, data)
    gain = before - bits_at_once(student, data.valid_blocks())
    assert gain.mean() > 5 * gain.std() / math.sqrt(len(gain)), (before.mean(), gain.mean(), gain.std())
    assert gain.mean() > 0.05 * before.mean(), (before.mean(), gain.mean())


def test_distillation_resumes_exactly(tmp_path: Path, teacher: BidirectionalTransformer) -> None:
    """A run that was interrupted in the middle of a pass, and one that finds the blocks in the file."""

    def run(name: str, stop: int, ckpt: Path | None = None) -> dict[str, torch.Tensor]:
        """Twelve steps by plan; the power goes off after ``stop``."""

        class Crash(Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
                if trainer.global_step == stop < 12:
                    trainer.save_checkpoint(tmp_path / "last.ckpt")
                    raise EOFError

        data = DistillationDataModule(
            copy.deepcopy(teacher), tmp_path / name, block_length=8, count=80, valid_count=8, batch_size=16
        )
        coupling = CouplingLayer(topologies.hidden_markov(8, data.vocab_size, 3), data.vocab_size)
        module = CoDDModule(copy.deepcopy(teacher), coupling, freeze_denoiser=True, init_from_corpus=True)
        runner = trainer(tmp_path, max_steps=12, limit_val_batches=0, callbacks=[Crash()])
        with pytest.raises(EOFError) if stop < 12 else contextlib.nullcontext():
            runner.fit(module, data, ckpt_path=ckpt)
        return {name: value.clone() for name, value in module.state_dict().items()}

    whole = run("a.safetensors", 12)
    halfway = run("b.safetensors", 7)
    resumed = run("b.safetensors", 12, tmp_path / "last.ckpt")
    assert any(not torch.equal(value, halfway[name]) for name, value in whole.items())
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_a_recipe_names_the_data_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``codd fit`` with ``data.class_path``: distils a model folder into another one."""
    monkeypatch.chdir(tmp_path)
    tokenizer = build_tokenizer("char", ["ab"], 3)
    vocab = tokenizer.get_vocab_size()
    save_model("teacher", network(vocab=vocab), product(vocab=vocab), tokenizer)
    recipe = f"""
model:
  denoiser: &network {{class_path: codd_ppl.model_folder.load_denoiser, init_args: {{path: teacher}}}}
  coupling:
    class_path: codd_ppl.coupling.CouplingLayer
    init_args:
      graph:
        class_path: codd_ppl.graphs.topologies.hidden_markov
        init_args: {{sites: {SITES}, cardinality: {vocab}, states: 2}}
      vocab_size: {vocab}
  freeze_denoiser: true
  init_from_corpus: true
data:
  class_path: codd_ppl.training.DistillationDataModule
  init_args:
    denoiser: *network
    coupling: {{class_path: codd_ppl.model_folder.load_coupling, init_args: {{path: teacher}}}}
    path: blocks.safetensors
    count: 64
    valid_count: 16
    chunk_size: 32
    tokenizer: teacher/tokenizer.json
trainer:
  accelerator: cpu
  max_steps: 2
  logger: false
  enable_progress_bar: false
  enable_checkpointing: false
model_folder: {{path: student}}
"""
    (tmp_path / "config.yaml").write_text(recipe, encoding="utf-8")
    assert main(["fit", "--config", "config.yaml", "--data.count", "70"]) == 0
    assert {"step": 2, "text": "blocks.safetensors"}.items() <= load_model("student").about.items()
    assert len(load_file("blocks.safetensors")["blocks"]) == 96
    # what a part of the recipe says is said as it is; so is a file of another teacher
    before = Path("blocks.safetensors").read_bytes()
    assert main(["fit", "--config", "config.yaml", "--data.block_length", "9"]) == 2
    assert capsys.readouterr().err.startswith("codd: expected sites = 3 as in the coupling's graph, found 9")
    assert main(["fit", "--config", "config.yaml", "--data.seed", "9"]) == 2
    assert "codd: blocks.safetensors: expected blocks of this teacher" in capsys.readouterr().err
    assert Path("blocks.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["fit", "--data.path", "a.txt"], False),
        (["fit", "--config", "text.yaml"], False),
        (["fit", "-c", "nothing.yaml"], False),
        (["fit", "--config"], False),
        (["fit", "--config=text.yaml", "--data", "settings.yaml"], False),
        (["fit", "--config=class.yaml"], True),
        (["fit", "--config", "text.yaml", "--data", "codd_ppl.training.DistillationDataModule"], True),
        (["fit", "--data.class_path=codd_ppl.training.TextDataModule"], True),
    ],
)
def test_whether_a_recipe_names_a_class(tmp_path: Path, monkeypatch, words: list[str], named: bool) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.yaml").write_text("data: {path: a.txt}", encoding="utf-8")
    Path("settings.yaml").write_text("path: a.txt", encoding="utf-8")
    Path("class.yaml").write_text("data: {class_path: a.B}", encoding="utf-8")
    assert _names_a_class(words, "data") == named
