"""Constraints at work: the demo model and byte pairs, every policy and number of steps, known text, refusals."""

import re

import pytest
import torch
from torch import nn

from codd_ppl import constraints
from codd_ppl.coupling import CouplingLayer
from codd_ppl.data import __file__ as data_file
from codd_ppl.denoisers import BidirectionalTransformer, DenoiserOutput
from codd_ppl.errors import ConfigError, InfeasibleError
from codd_ppl.graphs import topologies
from codd_ppl.model_folder import load_model
from codd_ppl.sampling import Sampler, WarmCoupling
from codd_ppl.sampling.protocol import CheckedCoupling, Coupling
from codd_ppl.spanning_tree_coupling import SpanningTreeCoupling
from codd_ppl.testing import chi_square_p_value, enumerate_sequences
from codd_ppl.training.tokenizer import build_tokenizer

POLICIES = ["random", "random_order", "low_confidence", "margin", "entropy"]

PATTERNS = [
    r"(?s).*", r"[a-z ]*", r"[^e]*", r"[A-Z]+:\n(?s:.*)", r"(?s)([a-z]+[ ,\n])*[a-z]+\.", r"(?s).*king.*", r"(?s).*\.",
    r"(?s).*(love|death).*(love|death).*", r"([a-z]{1,8}[ .]){8,}", r"(?:ab){32}", r"[a-z]{64}", r"(?s).{20}the.{41}",
    r"(?s)[^\n]*\n[^\n]*\n[^\n]*", r"(?s)(.{7}\n){8}", r"(?i:[a-m ,.]*)", r"\w*\W\w*", r"\S+\s\S+\s\S+", r"[aeiou]+",
    r"(?s)O .*!", r"(?s)(?:[A-Z][a-z]+ )*[A-Z][a-z]+", r"a{10,20}b{10,20}c*", r"(?s).*([a-z])ing .*ing.*", r"x?y?z*",
    r"(the |a |an )+", r"(?s)To be, or not to be.*", r"(?s).*\?\n", r"((?:he|she|it) [a-z]+s\. )*[a-z]*",
    r"[ \n]*[a-z]+[ \n]*", r"(?s)A?.*[^z]{60}", r"[a-y]*z[a-y]*",
]  # fmt: skip


@pytest.fixture(scope="module")
def demo():
    return load_model(data_file.replace("__init__.py", "demo_model"))


@pytest.fixture(scope="module")
def demo_logits(demo):
    with torch.no_grad():
        return demo.denoiser(torch.full((1, demo.coupling.sites), demo.denoiser.mask_token_id)).logits


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_a_hundred_texts_of_the_demo_model_satisfy_the_pattern(pattern: str, demo, demo_logits) -> None:
    coupled = constraints.constrain(demo.coupling, constraints.regex(pattern), demo.tokenizer)
    drawn = coupled(demo_logits).sample((100,), generator=torch.Generator().manual_seed(0))[:, 0]
    texts = [demo.tokenizer.decode(row) for row in drawn.tolist()]
    assert all(len(text) == 64 and re.fullmatch(pattern, text, re.ASCII) for text in texts)
    assert len({*texts}) > 1 or pattern in (r"(?:ab){32}",)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_and_number_of_steps(policy: str, steps: int, demo) -> None:
    """Twelve sites of the demo's chain, some known: a part of a draw that is kept can always be completed."""
    demo_coupling, sites = demo.coupling, 12
    graph = topologies.hidden_markov(sites, demo_coupling.vocab_size, 128)
    coupling = CouplingLayer(graph, demo_coupling.vocab_size, potentials=demo_coupling.potentials)
    wanted = constraints.regex(r"[a-z]+ [a-z]+,\n[A-Z].*") & constraints.forbids("e")
    coupled = constraints.constrain(coupling, wanted, demo.tokenizer)
    template = torch.full((6, sites), demo.denoiser.mask_token_id)
    template[0, 3] = template[1, 5] = demo.tokenizer.encode(" ").ids[0]
    template[2, 11] = demo.tokenizer.encode("A").ids[0]
    sampler = Sampler(demo.denoiser, coupled, unmasking=policy, steps=steps)
    done = sampler.generate(template, generator=torch.Generator().manual_seed(steps))
    for row in done.tokens.tolist():
        text = demo.tokenizer.decode(row)
        assert re.fullmatch(r"[a-z]+ [a-z]+,\n[A-Z].*", text) and "e" not in text
    given = template != demo.denoiser.mask_token_id
    assert torch.equal(done.tokens[given], template[given])


def small(graph, vocab, seed=0, combine="projected"):
    torch.manual_seed(seed)
    denoiser = BidirectionalTransformer(vocab, hidden_size=16, layers=1, heads=2, dropout=0.0)
    coupling = CouplingLayer(graph, vocab, combine=combine)
    with torch.no_grad():
        denoiser.head.weight.normal_(std=0.3)
        for parameter in coupling.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return denoiser, coupling


@pytest.mark.parametrize("steps", [1, 3])
def test_byte_pairs_with_characters_cut_in_two(steps: int) -> None:
    text = "the naïve café, 東京 and 大阪: 12:30 to 14:45. the cat sat on the mat at 9:15\n" * 20
    tokenizer = build_tokenizer("bpe", [text], 320)
    vocab = tokenizer.get_vocab_size()
    denoiser, coupling = small(topologies.hidden_markov(10, vocab, 6), vocab)
    wanted = constraints.regex(r"[0-9]{1,2}:[0-9]{2} [^a-z]+") & constraints.contains("京é")
    coupled = constraints.constrain(coupling, wanted & constraints.length(12, 20), tokenizer)
    template = torch.full((50, 10), denoiser.mask_token_id)
    done = Sampler(denoiser, coupled, steps=steps).generate(template, torch.Generator().manual_seed(0))
    texts = [tokenizer.decode(row) for row in done.tokens.tolist()]
    assert all(re.fullmatch(r"[0-9]{1,2}:[0-9]{2} [^a-z]+", t) and "京é" in t for t in texts)
    assert all(12 <= len(t) <= 20 for t in texts) and len({*texts}) == 50


def test_text_before_inside_and_behind_a_span(demo) -> None:
    tokenizer, mask = demo.tokenizer, demo.denoiser.mask_token_id
    coupled = constraints.constrain(
        demo.coupling, constraints.regex(r"[a-z]+ing [a-z ]+", span=(10, 30)), tokenizer
    )
    template = torch.full((3, 64), mask)
    template[:, :10] = torch.tensor(tokenizer.encode("ROMEO:\nI a").ids)
    template[:, 15:18] = torch.tensor(tokenizer.encode("ing").ids)
    template[:, 30:] = torch.tensor(tokenizer.encode(".\n").ids).repeat(17)
    done = Sampler(demo.denoiser, coupled, steps=2).generate(template, torch.Generator().manual_seed(0))
    for row in done.tokens.tolist():
        text = tokenizer.decode(row)
        assert text.startswith("ROMEO:\nI a") and text[15:18] == "ing" and text[30:] == ".\n" * 17
        assert re.fullmatch("[a-z]+ing [a-z ]+", text[10:30])


def test_an_end_token_lets_the_text_be_shorter() -> None:
    tokens = ["a", "b", None]
    denoiser, coupling = small(topologies.chain(6, 3), 3)
    wanted = constraints.length(2, 4) & constraints.forbids("bb")
    coupled = constraints.constrain(coupling, wanted, tokens, end=2)
    template = torch.full((300, 6), denoiser.mask_token_id)
    done = Sampler(denoiser, coupled, steps=2).generate(template, torch.Generator().manual_seed(0))
    texts = {"".join("ab."[t] for t in row) for row in done.tokens.tolist()}
    assert all(re.fullmatch(r"[ab]{2,4}\.{2,4}", t) and "bb" not in t for t in texts)
    assert {len(t.rstrip(".")) for t in texts} == {2, 3, 4}


def test_one_step_of_the_sampler_has_the_conditional_law() -> None:
    denoiser, coupling = small(topologies.hidden_markov(3, 4, 3), 4, seed=1)
    tokens = ["a", "b", "c", "ab"]
    coupled = constraints.constrain(coupling, constraints.regex("a.*|b+c*"), tokens)
    sequences = enumerate_sequences(4, 3)
    template = torch.full((4000, 3), denoiser.mask_token_id)
    with torch.no_grad():
        output = denoiser(template[:1])
        logs = coupling(output.logits, hidden=output.hidden).log_prob(sequences)
    texts = ["".join(tokens[t] for t in row) for row in sequences.tolist()]
    allowed = torch.tensor([re.fullmatch("a.*|b+c*", text) is not None for text in texts])
    truth = torch.where(allowed, logs, -torch.inf).softmax(0)
    done = Sampler(denoiser, coupled, steps=1).generate(template, torch.Generator().manual_seed(0))
    counts = (done.tokens * 4 ** torch.arange(2, -1, -1)).sum(-1).bincount(minlength=64)
    assert chi_square_p_value(counts, truth) > 1e-3
    assert chi_square_p_value(counts, logs.softmax(0)) < 1e-6  # the test would notice


class Forbidden(nn.Module):
    """A network that must not be run."""

    vocab_size, mask_token_id, hidden_size = 4, 4, 1

    def forward(self, xt) -> DenoiserOutput:
        raise AssertionError("the network was run")


def test_what_is_infeasible_is_said_before_the_network_runs() -> None:
    _, coupling = small(topologies.hidden_markov(4, 4, 2), 4)
    coupled = constraints.constrain(coupling, constraints.regex("(ab)+"), ["a", "b", "c", None])
    sampler = Sampler(Forbidden(), coupled, steps=2)
    template = torch.tensor([[4, 4, 4, 4], [4, 0, 4, 4]])
    with pytest.raises(InfeasibleError, match=r"regex\('\(ab\)\+'\).*batch element 1 .*'\?a\?\?'.*site 1"):
        sampler.generate(template)
    with pytest.raises(InfeasibleError, match=r"'<3>\?\?\?'"):
        sampler.generate(torch.tensor([3, 4, 4, 4]))
    with pytest.raises(InfeasibleError, match="no sequence of 4 tokens"):
        constraints.constrain(coupling, constraints.regex("(ab){3}"), ["a", "b", "c", "d"])
    with pytest.raises(AssertionError, match="was run"):
        sampler.generate(template[:1])


def test_what_the_network_rules_out_is_said() -> None:
    _, coupling = small(topologies.independent(3, 3), 3)
    logits = torch.zeros(2, 3, 3)
    logits[1, :, 1] = -torch.inf
    law = constraints.constrain(coupling, constraints.contains("b"), ["a", "b", "c"])(logits)
    with pytest.raises(InfeasibleError, match=r"contains.*batch element \(1,\).*logits"):
        law.sample()


def test_what_cannot_be_constrained_is_refused() -> None:
    _, coupling = small(topologies.hidden_markov(4, 3, 2), 3)
    with pytest.raises(ConfigError, match="found SpanningTreeCoupling"):
        constraints.constrain(SpanningTreeCoupling(4, 3, max_offset=2), constraints.regex("a*"), "abc")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"constraints.regex\(pattern\)"):
        constraints.constrain(coupling, "a*", ["a", "b", "c"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="stop <= 4"):
        constraints.constrain(coupling, constraints.regex("a*", span=(2, 5)), ["a", "b", "c"])
    with pytest.raises(ConfigError, match="the text of each token id"):
        constraints.constrain(coupling, constraints.regex("a*"), 3)


def test_it_fits_the_protocols_and_starts_warm() -> None:
    denoiser, coupling = small(topologies.hidden_markov(6, 3, 2), 3)
    coupled = constraints.constrain(coupling, constraints.contains("abc"), ["a", "b", "c"])
    assert isinstance(coupled, Coupling) and isinstance(coupled, WarmCoupling)
    assert isinstance(coupled, CheckedCoupling) and not isinstance(coupling, CheckedCoupling)
    template = torch.full((20, 6), denoiser.mask_token_id)
    sampler = Sampler(denoiser, coupled, steps=3, warm_start=True)
    done = sampler.generate(template, torch.Generator().manual_seed(0))
    assert all("abc" in "".join("abc"[t] for t in row) for row in done.tokens.tolist())
    tree = CouplingLayer(topologies.latent_tree(6, 3, 2), 3)
    assert not constraints.constrain(tree, constraints.contains("abc"), ["a", "b", "c"]).warm_starts
