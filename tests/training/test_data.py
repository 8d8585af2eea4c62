"""TextDataModule: from files to blocks, under Lightning, and what it says about text that doesn't do."""

import json
import logging
import os
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tokenizers import Tokenizer
from torch import nn

from codd_ppl.errors import ConfigError, DataError, ShapeError, TokenError
from codd_ppl.training.data import TextDataModule


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No test writes to the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty documents, each of a number and its name."""
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"{n}: document number {n}.\nEnd of {n}." for n in range(40)))
    return path


def small(path: Any, **settings: Any) -> TextDataModule:
    return TextDataModule(path, **({"block_length": 16, "batch_size": 8} | settings))


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_blocks_hold_the_text(corpus: Path, tokenizer: str) -> None:
    data = small(corpus, tokenizer=tokenizer, vocab_size=280 if tokenizer == "bpe" else None)
    for blocks in (data.train_blocks(), data.valid_blocks()):
        assert blocks.dtype == torch.int64 and blocks.shape[1] == 16
        assert blocks.min() >= 0 and blocks.max() < data.vocab_size
    text = corpus.read_text()
    joined = (
        data.decode(data.train_blocks().flatten()).split("\n\n")[:-1]
        + data.decode(data.valid_blocks().flatten()).split("\n\n")[:-1]
    )
    assert len(joined) >= 38 and all(document in text.split("\n\n") for document in joined)
    assert data.split == "documents"


def test_all_follows_from_the_seed(corpus: Path) -> None:
    def made(seed: int) -> list[torch.Tensor]:
        data = small(corpus, seed=seed)
        return [data.valid_blocks(), *data.train_dataloader()]

    assert all(torch.equal(a, b) for a, b in zip(made(1), made(1), strict=True))
    assert not torch.equal(made(1)[0], made(2)[0])


def test_a_document_is_on_one_side_only(corpus: Path) -> None:
    data = small(corpus, valid_fraction=0.3)
    train, valid = (data.decode(tokens) for tokens in data._state[1:])
    for n in range(40):
        assert (f"document number {n}." in train) != (f"document number {n}." in valid)


def test_one_document_is_cut_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "one.txt"
    path.write_text(string.ascii_letters * 20)
    data = small(path, separator="")
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        data.setup()
    assert "is one document: its first 936 characters are for training, the other 104" in caplog.text
    assert data.split == "position"
    assert data.decode(data.valid_blocks()[0]) == (string.ascii_letters * 20)[936:952]


def test_validation_file(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "valid.jsonl"
    path.write_text(json.dumps({"text": "A document of 3 words."}))
    data = small(corpus, valid_path=path)
    assert data.decode(data.valid_blocks()[0]) == "\N{REPLACEMENT CHARACTER} document of 3 "
    assert data.split == "files"
    assert data.train_blocks().numel() > len(corpus.read_text()) - 16


def test_vocabulary_is_of_the_training_text(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "valid.txt"
    path.write_text("ÄÖÜ" * 20)
    data = small(corpus, valid_path=path)
    assert not set("ÄÖÜ") & set(data.tokenizer.get_vocab())
    assert set(data.valid_blocks().flatten().tolist()) == {0}


def test_text8(corpus: Path) -> None:
    data = small(corpus, normalize="text8")
    assert data.vocab_size == 27
    assert data.encode("It's 5").tolist() == data.encode("it s five ").tolist()
    text = data.decode(data.train_blocks().flatten())
    assert "three document number three end of three" in text and "  " not in text


def test_limit(corpus: Path) -> None:
    assert small(corpus, limit=300).train_blocks().numel() < 300 < small(corpus).train_blocks().numel()


def test_encode_and_decode(corpus: Path) -> None:
    data = small(corpus)
    ids = data.encode("document")
    assert ids.dtype == torch.int64 and data.decode(ids) == data.decode(ids.tolist()) == "document"
    ids[[0, 3, 4]] = data.vocab_size
    assert data.decode(ids) == "_oc__ent" and data.decode(ids, mask="[M]") == "[M]oc[M][M]ent"
    assert data.decode([]) == ""
    with pytest.raises(
        TokenError, match=rf"from 0 to {data.vocab_size} \(the mask\), found {data.vocab_size + 1}"
    ):
        data.decode([data.vocab_size + 1])
    with pytest.raises(ShapeError, match=r"one row of ids, found shape \(2, 3\)"):
        data.decode(torch.zeros(2, 3, dtype=torch.long))


def test_a_given_tokenizer(corpus: Path, tmp_path: Path) -> None:
    first = small(corpus, tokenizer="bpe", vocab_size=270)
    path = tmp_path / "tokenizer.json"
    first.tokenizer.save(str(path))
    for given in (str(path), Tokenizer.from_file(str(path))):
        assert torch.equal(small(corpus, tokenizer=given).train_blocks(), first.train_blocks())
    with pytest.raises(DataError, match=r"tokenizer\.json, found no file at .*gone\.json"):
        small(corpus, tokenizer=str(tmp_path / "gone.json")).setup()


# --- the cache of tokenizers --------------------------------------------------------------------------


def test_byte_pairs_are_kept_in_the_users_cache(corpus: Path, own_cache: Path) -> None:
    small(corpus).setup()
    assert not own_cache.exists()
    data = small(corpus, tokenizer="bpe", vocab_size=270)
    data.setup()
    (file,) = own_cache.glob("codd_ppl/*/tokenizer.json")
    assert Tokenizer.from_file(str(file)).to_str() == data.tokenizer.to_str()


def test_every_kind_is_kept_in_a_given_cache(corpus: Path, tmp_path: Path, own_cache: Path) -> None:
    small(corpus, cache_dir=tmp_path / "mine").setup()
    assert len(list((tmp_path / "mine").glob("*/tokenizer.json"))) == 1 and not own_cache.exists()


def test_a_cache_that_cannot_be_written_is_done_without(corpus: Path, own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")
    assert small(corpus, tokenizer="bpe", vocab_size=270).vocab_size == 270
    with pytest.raises(OSError, match="cache"):
        small(corpus, tokenizer="bpe", cache_dir=own_cache / "mine").setup()


# --- under Lightning ----------------------------------------------------------------------------------


class Counts(L.LightningModule):
    """Sees the batches, learns nothing of use."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[list[torch.Tensor]] = []
        self.validated: list[torch.Tensor] = []

    def on_train_epoch_start(self) -> None:
        self.seen.append([])

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        self.seen[-1].append(batch)
        return self.weight * batch.float().mean()

    def validation_step(self, batch: torch.Tensor, _: int) -> None:
        self.validated.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**settings: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(accelerator="cpu", logger=False, num_sanity_val_steps=0, **quiet, **settings)  # type: ignore[arg-type]


def test_fit_sees_every_block_once_per_epoch(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine with many cores, where Lightning would ask for workers (warnings are errors)."""
    monkeypatch.setattr("lightning.fabric.utilities.data._num_cpus_available", lambda: 64)
    data, module = small(corpus), Counts()
    trainer(max_epochs=2).fit(module, datamodule=data)
    first, second = (torch.cat(batches) for batches in module.seen)
    assert not torch.equal(first, second)
    for epoch in (first, second):
        assert sorted(epoch.tolist()) == sorted(data.train_blocks().tolist())
    assert torch.equal(torch.cat(module.validated[: len(data.val_dataloader())]), data.valid_blocks())


def test_a_resumed_run_goes_on_in_the_same_order(corpus: Path, tmp_path: Path) -> None:
    whole, head, tail = Counts(), Counts(), Counts()
    trainer(max_epochs=2).fit(whole, datamodule=small(corpus))
    interrupted = trainer(max_epochs=1)
    interrupted.fit(head, datamodule=small(corpus))
    interrupted.save_checkpoint(tmp_path / "half.ckpt")
    trainer(max_epochs=2).fit(
        tail, datamodule=small(corpus), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert torch.equal(torch.cat(whole.seen[1]), torch.cat(tail.seen[-1]))


def test_overfit_batches_stay_the_same(corpus: Path) -> None:
    module = Counts()
    trainer(max_epochs=2, overfit_batches=2).fit(module, datamodule=small(corpus))
    assert torch.equal(torch.cat(module.seen[0]), torch.cat(module.seen[1]))


def test_setup_reads_once(corpus: Path) -> None:
    data = small(corpus)
    data.setup("fit")
    blocks = data.train_blocks()
    corpus.unlink()
    data.prepare_data()
    data.setup("validate")
    assert torch.equal(data.train_blocks(), blocks)


def test_random_offsets(corpus: Path) -> None:
    data = small(corpus, random_offsets=True)
    blocks = set(map(tuple, data.train_blocks().tolist()))
    drawn = torch.cat(list(data.train_dataloader()))
    assert drawn.shape == data.train_blocks().shape
    assert not set(map(tuple, drawn.tolist())) <= blocks
    assert torch.equal(torch.cat(list(data.val_dataloader())), data.valid_blocks())


_TWO_PROCESSES = """
import sys
import lightning as L, torch
from codd_ppl.training.data import TextDataModule

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []
    def training_step(self, batch, _):
        self.seen.append(batch)
        return self.weight * batch.float().mean()
    def on_train_end(self):
        torch.save(torch.cat(self.seen), f"{sys.argv[2]}/rank{self.global_rank}.pt")
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

if __name__ == "__main__":
    data = TextDataModule(sys.argv[1], tokenizer="bpe", vocab_size=270, block_length=16, batch_size=8)
    L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_progress_bar=False,
              enable_checkpointing=False, enable_model_summary=False, limit_val_batches=0).fit(Module(), data)
"""


@pytest.mark.slow
def test_two_processes(corpus: Path, tmp_path: Path, own_cache: Path) -> None:
    """Real DDP: the two shares together are all blocks, and the cache holds one tokenizer."""
    script = tmp_path / "two.py"
    script.write_text(_TWO_PROCESSES)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, str(script), str(corpus), str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    shares = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    data = small(corpus, tokenizer="bpe", vocab_size=270)
    assert len(shares[0]) == len(shares[1])
    assert {tuple(row) for share in shares for row in share.tolist()} == set(
        map(tuple, data.train_blocks().tolist())
    )
    assert len([path for path in (own_cache / "codd_ppl").rglob("*") if path.is_file()]) == 1


# --- text that doesn't do -----------------------------------------------------------------------------


def test_block_longer_than_the_text(corpus: Path) -> None:
    length = len(corpus.read_text())
    message = f"block longer than the text: .*block_length = {length} tokens of training.*lower block_length"
    with pytest.raises(DataError, match=message):
        small(corpus, block_length=length).setup()


def test_too_little_to_validate(corpus: Path) -> None:
    with pytest.raises(
        DataError, match=r"tokens of validation text, found .*; raise valid_fraction, pass valid_path"
    ):
        small(corpus, valid_fraction=0.01, block_length=100).setup()


def test_no_document_left(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "marks.txt"
    path.write_text("!!!\n\n???\n")
    with pytest.raises(
        DataError, match=r'no validation document left in .*marks\.txt after normalize="text8"'
    ):
        small(corpus, valid_path=path, normalize="text8").setup()
    with pytest.raises(DataError, match="no training document left"):
        small(path, normalize="text8").setup()


def test_missing_file_and_missing_validation_file(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found nothing at .*gone\.txt"):
        small(tmp_path / "gone.txt").setup()
    with pytest.raises(DataError, match=r"found nothing at .*gone\.txt"):
        small(corpus, valid_path=tmp_path / "gone.txt").setup()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"block_length": 0}, ConfigError, "block_length >= 1, found 0"),
        ({"batch_size": 0}, ConfigError, "batch_size >= 1, found 0"),
        ({"limit": 0}, ConfigError, "limit >= 1, found 0"),
        ({"seed": -1}, ConfigError, "seed >= 0, found -1"),
        ({"valid_fraction": 1.0}, ConfigError, "valid_fraction between 0 and 1, found 1.0"),
        ({"normalize": "lower"}, ConfigError, "found 'lower'"),
        ({"tokenizer": "word"}, ConfigError, "found 'word'"),
        ({"tokenizer": "bpe", "vocab_size": 100}, DataError, "vocabulary too small: .* >= 257 .* found 100"),
    ],
)
def test_wrong_settings_are_found_at_once(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        small("never read", **settings)
