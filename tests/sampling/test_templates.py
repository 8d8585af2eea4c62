"""Templates: masks, numbers of masks, and how to write a bracket that is none."""

import pytest

from codd_ppl.errors import ConfigError
from codd_ppl.sampling import encode_template, parse_template


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ()),
        ("plain", ("plain",)),
        ("The [MASK:12] sat on", ("The ", 12, " sat on")),
        ("[MASK]", (1,)),
        ("the c__ sat", ("the c", 2, " sat")),
        ("__[MASK:3]_[MASK]x", (7, "x")),
        (r"snake\_case \[MASK] \\ a_b", ("snake_case [MASK] \\ a", 1, "b")),
        (r"\\_", ("\\", 1)),
        (r"C:\new [mask]", (r"C:\new [mask]",)),
        ("[MASK: 4 ]", (4,)),
        ("a[MASK:2", ("a[MASK:2",)),
    ],
)
def test_parts(text, parts):
    assert parse_template(text) == parts


@pytest.mark.parametrize(
    "mark", ["[MASK:]", "[MASK:0]", "[MASK:-1]", "[MASK:two]", "[MASK:1.5]", "[MASK:9999999]"]
)
def test_a_bad_number_is_an_error_and_not_text(mark):
    with pytest.raises(ConfigError, match=r"whole number of tokens.*\\\[MASK"):
        parse_template(f"a {mark} b")
    assert parse_template(f"a \\{mark} b") == (f"a {mark} b",)


def test_ids():
    def encode(text):
        return [ord(c) - ord("a") for c in text]

    assert encode_template("ab[MASK:2]c_", encode, 26).tolist() == [0, 1, 26, 26, 2, 26]
    assert encode_template("", encode, 26).shape == (0,)
