"""A tiny masked model of transformers on disk, with a tokenizer that ends texts, and text for it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["[PAD]", "[UNK]", "[MASK]", "[END]", *"abcdefgh"]
VOCAB, MASK, END = len(WORDS), 2, 3
TEMPLATE = "{% for m in messages %}{{ m['role'][0] if m['role'] != 'user' else 'u' }} {{ m['content'] }} {% endfor %}"


def tokenizer() -> Tokenizer:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return words


def save_backbone(
    folder: Path, positions: int = 64, mask: bool = True, size: int = VOCAB, chat: bool = True
) -> Path:
    """A random BERT, as `save_pretrained` leaves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=positions, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    special = {"mask_token": "[MASK]"} if mask else {}
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), pad_token="[PAD]", eos_token="[END]", **special
    )
    words.chat_template = TEMPLATE if chat else None
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_backbone() -> Callable[..., Path]:
    return save_backbone


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("attach") / "bert")


def sentence(seed: int, length: int) -> str:
    """Letters that follow each other cyclically, mostly."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(length, generator=generator).gt(0.9).long() * 3 + 1
    return " ".join("abcdefgh"[i] for i in (steps.cumsum(0) % 8).tolist())


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [json.dumps({"text": sentence(i, 5 + i % 17)}) for i in range(400)]
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "answers.jsonl"
    rows = [{"question": sentence(i, 3 + i % 5), "answer": sentence(1000 + i, 4 + i % 9)} for i in range(300)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
