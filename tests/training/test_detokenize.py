"""WikiText's tokens as running text."""

import pytest

from codd_ppl.training.detokenize import detokenize_wikitext, wikitext_words


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (" He had a guest @-@ starring role , in 2000 . ", "He had a guest-starring role, in 2000."),
        (" 1 @,@ 234 @.@ 5 metres ( 4 @,@ 050 ft ) . ", "1,234.5 metres (4,050 ft)."),
        (
            ' as " Craig " in the episode " Teddy \'s Story " of ',
            'as "Craig" in the episode "Teddy\'s Story" of',
        ),
        (" he didn 't ; they 're ; I 've ; we 'll ", "he didn't; they're; I've; we'll"),
        (" the boys ' team , and James ' own ", "the boys' team, and James' own"),
        (" called ' the old ' road ", "called 'the old' road"),
        (" costs $ 5 million or £ 3 ; 50 % of it , at 30 ° . ", "costs $5 million or £3; 50% of it, at 30°."),
        (" 90 km / h – fast — very ! ", "90 km/h – fast — very!"),
        (' in the episode , " In Safe Hands " . ', 'in the episode, "In Safe Hands".'),
        (" = = Career = = ", "= = Career = ="),
        (" Paris <unk> , and ( <unk> ) ", "Paris <unk>, and (<unk>)"),
        ("", ""),
    ],
)
def test_lines(tokens, text):
    assert detokenize_wikitext(tokens) == text


def test_lines_stay_lines_and_words_are_counted_as_they_came():
    text = " \n = Title = \n \n A film , and more . \n"
    assert detokenize_wikitext(text) == "\n= Title =\n\nA film, and more.\n"
    assert wikitext_words(text) == 3 + 6 + 4
    assert wikitext_words("one two") == 3 and wikitext_words("") == 0


def test_running_text_is_left_alone():
    text = 'He said "no", then (later) it\'s 5% of $3.50; well-known.'
    assert detokenize_wikitext(text) == text
