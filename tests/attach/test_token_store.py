"""Blocks on disk: what they hold, whatever interrupts their making."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from codd_ppl.attach import Answers, Conversations, Example, Rows, Texts, TokenStore, token_store
from codd_ppl.errors import ConfigError, DataError

WORDS, END = ["[UNK]", "[END]", *"abcdefgh"], 1


def tokenizer() -> Tokenizer:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return words


def store(path: Path, answers: bool = False, **settings: object) -> TokenStore:
    return TokenStore(path, tokenizer(), 4, [END], answers, **{"held_out": 0.2, **settings})  # type: ignore[arg-type]


def ids(text: str) -> list[int]:
    return tokenizer().encode(text).ids


def documents(n: int = 60) -> list[Example]:
    return [Example("", " ".join("abcdefgh"[(i + j) % 8] for j in range(1 + i % 7))) for i in range(n)]


def all_of(rows: Rows) -> list[int]:
    return rows.tokens.tolist()


def test_documents_follow_one_another(tmp_path: Path) -> None:
    made = store(tmp_path / "s", held_out=0.0)
    assert list(made.build(documents(5)))
    rows = made.part("train")
    expected = [token for example in documents(5) for token in [*ids(example.text), END]]
    assert all_of(rows) == expected
    assert rows.blocks.tolist() == [expected[i : i + 4] for i in range(0, len(expected) - 3, 4)]
    assert rows.context(torch.tensor([0, 1]), 6, 0).tolist() == [[0] * 6, [0, 0, *expected[:4]]]


def test_answers_begin_blocks_and_are_filled_up(tmp_path: Path) -> None:
    examples = [Example("a b c", "d e f g h"), Example("h", "g f e d")]
    made = store(tmp_path / "s", answers=True, held_out=0.0)
    list(made.build(examples))
    rows = made.part("train")
    first, second = ids("d e f g h"), ids("g f e d")
    assert rows.blocks.tolist() == [first[:4], [first[4], END, END, END], second, [END] * 4]
    assert rows.context(torch.tensor([0, 1, 3]), 5, 0).tolist() == [
        [0, 0, *ids("a b c")],
        [*ids("c"), *first[:4]],
        [*ids("h"), *second],
    ]
    with pytest.raises(ConfigError, match="the token that ends a text"):
        list(TokenStore(tmp_path / "t", tokenizer(), 4, [1, 1], True).build(examples))


def test_held_out_examples_are_a_share_of_whole_ones(tmp_path: Path) -> None:
    made = store(tmp_path / "s")
    list(made.build(documents(2000)))
    train, held = made.part("train"), made.part("held_out")
    ends = [int((rows.tokens == END).sum()) for rows in (train, held)]
    assert sum(ends) == 2000 and 340 < ends[1] < 460  # 400 +- 18
    few = store(tmp_path / "t", held_out_limit=10)
    list(few.build(documents(2000)))
    assert 10 <= len(few.part("held_out").tokens) < 20


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("killed", [3, 17, 40, 60])
def test_killed_in_the_middle_it_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool, killed: int
) -> None:
    monkeypatch.setattr(token_store, "AT_ONCE", 8)
    examples = [Example("a b", example.text) for example in documents()]
    whole = store(tmp_path / "whole", answers)
    list(whole.build(examples))

    def broken() -> Iterator[Example]:
        yield from examples[:killed]
        raise RuntimeError("killed")

    part = store(tmp_path / "part", answers)
    with pytest.raises(RuntimeError, match="killed"):
        list(part.build(broken()))
    for name in ("train.tokens", "held_out.starts"):  # what was written but not noted
        with (tmp_path / "part" / name).open("ab") as file:
            file.write(b"12345678")
    again = store(tmp_path / "part", answers)
    list(again.build(examples))
    for name in ("train", "held_out"):
        one, other = whole.part(name), again.part(name)
        assert torch.equal(one.blocks, other.blocks) and torch.equal(one.tokens, other.tokens)
    assert list(again.build(broken())) == []  # done: nothing is read


def test_a_limit_ends_the_text_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "AT_ONCE", 8)
    made = store(tmp_path / "s", limit=50)
    list(made.build(documents(1000)))
    assert len(made.part("train").blocks) == 12
    with pytest.raises(DataError, match="at least one block"):
        few = store(tmp_path / "t")
        list(few.build(documents(2)))
        few.part("held_out")


def test_readers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    turns += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    path.write_text(
        json.dumps({"text": "x", "q": "y", "chat": turns}) + "\n" + json.dumps({"q": 1, "text": "t"})
    )
    assert [e.text for e in Texts().read(path)] == ["x", "t"]
    first = next(Answers(("q",), "text").read(path))
    assert first == Example("y\n\n", "x")
    asked: list[list[dict[str, str]]] = []
    read = Conversations("chat", lambda messages: f"{asked.append(list(messages))}").read(path)  # type: ignore
    assert [next(read).text, next(read).text] == ["b", "d"] and asked == [turns[:1], turns[:3]]
    with pytest.raises(DataError, match="line 2: expected in field 'chat'"):
        next(read)
    with pytest.raises(DataError, match="expected text in field 'q'"):
        list(Answers(("q",), "text").read(path))
    lines = tmp_path / "lines.txt"
    lines.write_text("a b c")
    with pytest.raises(DataError, match=r"give a \.jsonl file"):
        list(Answers(("q",), "text").read(lines))
