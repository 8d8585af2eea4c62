"""ModelFolder: what a run leaves behind when it ends, is interrupted or fails."""

from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging

from codd_ppl import BidirectionalTransformer, CoDDModule, CouplingLayer, TextDataModule, topologies
from codd_ppl.errors import ConfigError
from codd_ppl.model_folder import load_coupling, load_denoiser, load_model
from codd_ppl.training import ModelFolder

SITES = 8


@pytest.fixture
def data(tmp_path: Path) -> TextDataModule:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and the dog sat on the log. " * 60, encoding="utf-8")
    return TextDataModule(path, block_length=SITES, batch_size=16)


def module(data: TextDataModule, **settings) -> CoDDModule:
    torch.manual_seed(1)
    coupling = CouplingLayer(topologies.hidden_markov(SITES, data.vocab_size, 3), data.vocab_size)
    return CoDDModule(BidirectionalTransformer(data.vocab_size, 16, 1, 2), coupling, **settings)


def fit(model: lightning.LightningModule, data: TextDataModule, folder: Path, *callbacks: Callback) -> None:
    fit_with(ModelFolder(folder / "model"), data, folder, *callbacks, model=model)


def fit_with(
    writer: ModelFolder,
    data: TextDataModule,
    folder: Path,
    *callbacks: Callback,
    model: lightning.LightningModule | None = None,
) -> None:
    lightning.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_steps=4,
        callbacks=[writer, *callbacks],
    ).fit(model or module(data), data)


class Stop(Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 2:
            raise self.error


def test_the_averaged_weights_are_written(data: TextDataModule, tmp_path: Path) -> None:
    trained = module(data, init_from_corpus={"epochs": 0.5, "batch_size": 8})
    fit(trained, data, tmp_path, EMAWeightAveraging(decay=0.5))
    saved = load_model(tmp_path / "model")
    for name, value in trained.denoiser.state_dict().items():  # Lightning leaves the average in the module
        assert torch.equal(value, saved.denoiser.state_dict()[name]), name
    assert saved.about.pop("seconds") > 0
    assert saved.about == {"step": 4, "text": str(data.path)}
    assert saved.tokenizer is not None and saved.tokenizer.get_vocab() == data.tokenizer.get_vocab()
    assert torch.equal(load_denoiser(tmp_path / "model").head.weight, trained.denoiser.head.weight)
    for name, value in load_coupling(tmp_path / "model").state_dict().items():
        assert torch.equal(value, trained.coupling.state_dict()[name]), name


def test_ctrl_c_keeps_what_there_is(data: TextDataModule, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):  # Lightning's word for it
        fit(module(data), data, tmp_path, Stop(KeyboardInterrupt()))
    about = load_model(tmp_path / "model").about
    assert about.pop("seconds") > 0
    assert about == {"step": 2, "text": str(data.path), "interrupted": True}


def test_seconds_go_on_after_a_checkpoint(data: TextDataModule, tmp_path: Path) -> None:
    first, second = ModelFolder(tmp_path / "a"), ModelFolder(tmp_path / "b")
    assert first.state_dict() == {"seconds": 0.0}
    first.load_state_dict({"seconds": 100.0})
    fit_with(first, data, tmp_path)
    assert 100.0 < load_model(tmp_path / "a").about["seconds"] < 200.0
    second.load_state_dict(first.state_dict())
    assert second.seconds > 100.0


def test_an_error_leaves_an_older_model_alone(data: TextDataModule, tmp_path: Path) -> None:
    fit(module(data), data, tmp_path)
    with pytest.raises(EOFError):
        fit(module(data), data, tmp_path, Stop(EOFError()))
    assert load_model(tmp_path / "model").about["step"] == 4


def test_a_place_that_is_taken_is_found_before_training(data: TextDataModule, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("chapter 1", encoding="utf-8")
    with pytest.raises(ConfigError, match="no model folder"):
        fit(module(data), data, tmp_path, Stop(AssertionError("trained")))
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["thesis.txt"]


def test_another_network_gives_a_warning_and_no_folder(data: TextDataModule, tmp_path: Path) -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = BidirectionalTransformer(data.vocab_size, 16, 1, 2)
            self.vocab_size, self.mask_token_id, self.hidden_size = data.vocab_size, data.vocab_size, 16

        def forward(self, xt):
            return self.inner(xt)

    coupling = CouplingLayer(topologies.hidden_markov(SITES, data.vocab_size, 3), data.vocab_size)
    with pytest.warns(UserWarning, match="no model folder will be written"):
        fit(CoDDModule(Own(), coupling), data, tmp_path)
    assert not (tmp_path / "model").exists()


def test_settings_of_the_start_are_passed_on(data: TextDataModule, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="epochs"):
        fit(module(data, init_from_corpus={"epochs": -1.0}), data, tmp_path)
