"""Token strings and the automaton over token ids, against spelling every token out."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from codd_ppl import constraints
from codd_ppl.constraints.layers import layers
from codd_ppl.constraints.lifting import lift
from codd_ppl.constraints.patterns import from_pattern
from codd_ppl.constraints.utf8 import byte_automaton
from codd_ppl.errors import ConfigError, InfeasibleError
from codd_ppl.training.tokenizer import build_tokenizer

TEXT = "The naïve café — 東京, 12:30 \N{SLIGHTLY SMILING FACE}. the cat sat on the mat\n" * 30


@pytest.mark.parametrize(("kind", "size"), [("char", 40), ("byte", None), ("bpe", 300)])
def test_the_bytes_of_tokens_put_together_are_the_text(kind: str, size: int | None) -> None:
    tokenizer = build_tokenizer(kind, [TEXT], size)
    pieces = constraints.token_bytes(tokenizer, tokenizer.get_vocab_size() + 3)
    ids = tokenizer.encode(TEXT).ids
    assert b"".join(pieces[i] or b"" for i in ids).decode() == tokenizer.decode(ids)
    assert pieces[-3:] == [None] * 3


def test_metaspace_and_byte_fallback() -> None:
    vocabulary = {"\u2581the": 0, "re": 1, "<0xC3>": 2, "<0xA9>": 3, "<unk>": 4, "<0x41>x": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts)
    expected = [b" the", b"re", b"\xc3", b"\xa9", None, b"<0x41>x", None, None]
    assert constraints.token_bytes(tokenizer, 8) == expected


def test_a_decoder_that_does_more_than_join_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ConfigError, match=r"spaces between tokens.*give a list"):
        constraints.token_bytes(tokenizer, 1)
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="WordPiece"):
        constraints.token_bytes(tokenizer, 1)
    with pytest.raises(ConfigError, match="below 1"):
        constraints.token_bytes(["a", "b"], 1)


@pytest.mark.parametrize("pattern", [r"[^a]*é?", r"(?:ab|c)*", r"[0-9]{2,4}", r"東.*"])
def test_a_token_does_what_its_bytes_do(pattern: str) -> None:
    tokenizer = build_tokenizer("bpe", [TEXT], 300)
    tokens = constraints.token_bytes(tokenizer, tokenizer.get_vocab_size() + 1)
    machine = byte_automaton(from_pattern(pattern))
    lifted = lift(machine, tokens)
    for i, token in enumerate(tokens):
        for state in range(len(machine.table)):
            now = -1 if token is None else state
            for byte in token or b"":
                now = -1 if now < 0 else int(machine.table[now, byte])
            assert lifted.following[lifted.class_of[i], state] == now
    assert len(np.unique(lifted.following, axis=0)) == len(lifted.following), "equal classes are one"


def test_positions_resolve_what_the_automaton_counts() -> None:
    """A date has eight states, but at each site one: nothing is left to sum over."""
    tokens = [c.encode() for c in "0123456789-x"]
    lifted = lift(byte_automaton(from_pattern("[0-9]{4}-[0-9]{2}")), tokens)
    found = layers([(lifted, 0, 7)], 7, "date")
    assert [layer.states for layer in found.sites] == [1] * 7
    assert [layer.groups.sizes for layer in found.sites] == [(10,)] * 4 + [(1,)] + [(10,)] * 2
    two = layers([(lifted, 0, 7), (lifted, 8, 15)], 16, "two dates")
    assert max(layer.states for layer in two.sites) == 1, "spans apart from each other don't multiply"
    assert two.sites[7].groups.sizes == (12,)


def test_the_end_of_text_fills_the_rest() -> None:
    lifted = lift(byte_automaton(from_pattern("a{1,2}")), [b"a", b"b", None], end=2)
    found = layers([(lifted, 0, 3)], 3, "end")
    rows = torch.cartesian_prod(*[torch.arange(3)] * 3)
    possible = found.possible(rows, torch.ones_like(rows, dtype=torch.bool)) == 3
    assert rows[possible].tolist() == [[0, 0, 2], [0, 2, 2]]
    with pytest.raises(InfeasibleError, match=r"no sequence of 3 tokens.*end token"):
        layers([(lift(byte_automaton(from_pattern("a{1,2}")), [b"a", b"b", None]), 0, 3)], 3, "short")
    with pytest.raises(ConfigError, match="0 to 2"):
        lift(byte_automaton(from_pattern("a")), [b"a", b"b", None], end=3)
