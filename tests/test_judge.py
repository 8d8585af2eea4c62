"""The autoregressive judge: its law, its folder, its training."""

import json
import math
from pathlib import Path

import lightning
import pytest
import torch

from codd_ppl import TextDataModule
from codd_ppl.cli import main
from codd_ppl.errors import ConfigError, DataError, ShapeError, TokenError
from codd_ppl.judge import CausalJudge
from codd_ppl.testing import enumerate_sequences
from codd_ppl.training import JudgeModule, ModelFolder

pytest.importorskip("transformers")


@pytest.fixture
def judge() -> CausalJudge:
    torch.manual_seed(0)
    return CausalJudge(3, hidden_size=16, layers=2, heads=2, length=8).eval()


@pytest.fixture
def data(tmp_path: Path) -> TextDataModule:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and the dog sat on the log. " * 60, encoding="utf-8")
    return TextDataModule(path, block_length=8, batch_size=16)


def test_it_is_a_law_of_sequences(judge: CausalJudge) -> None:
    logs = judge.token_log_prob(enumerate_sequences(3, 5), batch_size=100)
    assert logs.shape == (243, 5) and not logs.requires_grad
    assert float(logs.double().sum(-1).exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_a_token_is_judged_by_those_before_it(judge: CausalJudge) -> None:
    tokens = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 1, 0]])
    one, other = judge.token_log_prob(tokens)
    torch.testing.assert_close(one[:3], other[:3])
    assert not torch.allclose(one[3:], other[3:])


def test_the_folder(judge: CausalJudge, data: TextDataModule, tmp_path: Path) -> None:
    tokens, where = torch.tensor([[0, 1, 2, 0, 1]]), tmp_path / "judge"
    judge.save(where, data.tokenizer, {"step": 3})
    found = CausalJudge.load(where)
    torch.testing.assert_close(found.token_log_prob(tokens), judge.token_log_prob(tokens))
    assert found.about == {"step": 3} and not found.training
    assert found.tokenizer is not None and found.tokenizer.get_vocab() == data.tokenizer.get_vocab()
    judge.save(where)  # over it
    assert CausalJudge.load(where).tokenizer is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["judge", "text.txt"]
    with pytest.raises(ConfigError, match="nothing was written"):
        judge.save(tmp_path)


def test_folders_that_are_none(judge: CausalJudge, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected the folder of a judge"):
        CausalJudge.load(tmp_path)
    where = judge.save(tmp_path / "judge")
    (where / "judge.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(DataError, match="expected the folder of a judge"):
        CausalJudge.load(where)
    where = judge.save(tmp_path / "other")
    (where / "model.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match="can't be read"):
        CausalJudge.load(where)


def test_bad_input(judge: CausalJudge) -> None:
    with pytest.raises(TokenError, match=r"ids in 0..2, found 0..3"):
        judge.token_log_prob(torch.tensor([[0, 3]]))
    with pytest.raises(ShapeError, match="int64"):
        judge.token_log_prob(torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="multiple of 2"):
        CausalJudge(3, hidden_size=6, heads=2)


def test_it_learns(data: TextDataModule, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = JudgeModule(data.vocab_size, 32, 1, 2, 8, learning_rate=1e-2, warmup_steps=5)
    before = -module.judge.token_log_prob(data.valid_blocks()).mean() / math.log(2)
    lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_steps=60,
        callbacks=[ModelFolder(tmp_path / "judge")],
    ).fit(module, data)
    judge = CausalJudge.load(tmp_path / "judge")
    after = -judge.token_log_prob(data.valid_blocks()).mean() / math.log(2)
    assert judge.about["step"] == 60 and float(after) < 1.6 < float(before)


def test_data_of_another_vocabulary(data: TextDataModule) -> None:
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1)
    with pytest.raises(ConfigError, match="same tokenizer"):
        trainer.fit(JudgeModule(5, 16, 1, 2, 8), data)


def test_settings_beside_the_class_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "judge.yaml"
    recipe.write_text("model: {class_path: codd_ppl.training.JudgeModule, vocab_size: 3}\n", encoding="utf-8")
    assert main(["fit", "--config", str(recipe)]) == 2
    assert "model: expected class_path and init_args, found vocab_size" in capsys.readouterr().err
