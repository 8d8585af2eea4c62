"""Texts longer than the graph: laws of blocks, prompts and whole texts by enumeration; rows of any lengths together."""

import itertools

import pytest
import torch

from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers import BidirectionalTransformer, DenoiserOutput, Guided, InContext
from codd_ppl.errors import ConfigError, ShapeError, TokenError
from codd_ppl.graphs import topologies
from codd_ppl.sampling import (
    BlockSampler,
    FirstStop,
    Sampler,
    StopStrings,
    StopTokens,
    WholeTextSampler,
    WindowedCoupling,
    extended,
)
from codd_ppl.testing import chi_square_p_value, enumerate_sequences

VOCAB, MASK = 2, 2


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def models(graph=None, vocab=VOCAB):
    torch.manual_seed(0)
    denoiser = BidirectionalTransformer(vocab, hidden_size=16, layers=1, heads=2).eval()
    coupling = CouplingLayer(topologies.hidden_markov(3, vocab, 3) if graph is None else graph, vocab)
    with torch.no_grad():
        denoiser.head.weight.normal_(std=0.5)
        for parameter in coupling.parameters():
            parameter.copy_(1.5 * torch.randn_like(parameter))
    return denoiser, coupling


def counts(tokens):
    place = VOCAB ** torch.arange(tokens.shape[1] - 1, -1, -1)
    return (tokens * place).sum(-1).bincount(minlength=VOCAB ** tokens.shape[1])


def text(*parts):
    """Token ids: text(1, 0, 4 * "_") is two tokens and four masks."""
    return torch.tensor([MASK if t == "_" else int(t) for part in parts for t in str(part)])


@torch.no_grad()
def block_law(denoiser, coupling, template, blocks, context=None, lookahead=False):
    """p(x) over all sequences at one step a block: written out block by block. ``blocks``: (window, start, end)."""
    states = enumerate_sequences(VOCAB, len(template))
    sites = torch.arange(len(template))
    masked = template == MASK
    agrees = ((states == template) | masked).all(-1)
    total = torch.where(agrees, 0.0, -torch.inf)
    for window, start, end in blocks:
        xt = torch.where((sites < start) | ~masked, states, MASK)
        seen = len(template) if lookahead else end
        left = 0 if context is None else max(0, window - context)
        output = denoiser(xt[:, left:seen])
        inside = slice(window - left, end - left)
        known = xt[:, window:end] != MASK
        law = coupling(
            output.logits[:, inside], hidden=output.hidden[:, inside], tokens=xt[:, window:end], known=known
        )
        chosen = (sites[window:end] >= start).expand(len(states), -1) & ~known
        total = total + law.log_prob(states[:, window:end], sites=chosen)
    return total.exp()


CASES = {
    "blocks of the graph's length": (text(1, "______"), None, [(1, 1, 4), (4, 4, 7)]),
    "with known text in the window": (text(0, "______"), 2, [(0, 1, 3), (2, 3, 5), (4, 5, 7)]),
    "one at a time": (text(1, 0, "____"), 1, [(0, 2, 3), (1, 3, 4), (2, 4, 5), (3, 5, 6)]),
    "a shorter last block": (text("_______"), 3, [(0, 0, 3), (3, 3, 6), (4, 6, 7)]),
    "a template": (text(1, "__", 0, "_", 1, "_"), 2, [(0, 1, 3), (2, 3, 5), (4, 5, 7)]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
@pytest.mark.ci
def test_one_step_a_block_has_the_law_of_the_model(name):
    denoiser, coupling = models()
    template, length, blocks = CASES[name]
    sampler = BlockSampler(Sampler(denoiser, coupling, steps=1), length)
    found = sampler.generate(template.repeat(6000, 1), seeded(0))
    law = block_law(denoiser, coupling, template, blocks)
    assert float(law.sum()) == pytest.approx(1, abs=1e-5)
    assert chi_square_p_value(counts(torch.stack(found.tokens)), law) > 1e-4
    assert found.calls == len(blocks) and (found.nfe == len(blocks)).all()
    assert (found.lengths == len(template)).all()


@pytest.mark.parametrize("settings", [{"context": 1}, {"context": 0}, {"lookahead": True}])
def test_what_the_network_reads(settings):
    denoiser, coupling = models()
    template = text(1, 0, 0, "____", 1, "_")
    blocks = [(2, 3, 5), (4, 5, 7), (6, 7, 9)]
    sampler = BlockSampler(Sampler(denoiser, coupling, steps=1), 2, **settings)
    tokens = torch.stack(sampler.generate(template.repeat(6000, 1), seeded(1)).tokens)
    law = block_law(denoiser, coupling, template, blocks, **settings)
    assert chi_square_p_value(counts(tokens), law) > 1e-4
    plain = block_law(denoiser, coupling, template, blocks)
    assert (law - plain).abs().max() > 1e-3, "the setting matters here"


def test_the_laws_of_other_blocks_are_told_apart():
    denoiser, coupling = models()
    template = text(1, "______")
    tokens = torch.stack(
        BlockSampler(Sampler(denoiser, coupling, steps=1))
        .generate(template.repeat(6000, 1), seeded(0))
        .tokens
    )
    for blocks in ([(0, 1, 3), (2, 3, 5), (4, 5, 7)], [(i - 2, i, i + 1) for i in range(2, 7)]):
        law = block_law(denoiser, coupling, template, blocks)
        assert chi_square_p_value(counts(tokens), law / law.sum()) < 1e-6


def test_steps_within_a_block_are_those_of_the_sampler():
    """Deterministic order and several steps: the block sampler is the sampler, applied by hand."""
    denoiser, coupling = models()
    template = text(1, "_____").repeat(50, 1)
    inner = Sampler(denoiser, coupling, "entropy", steps=2)
    generator = seeded(5)
    first = Sampler(InContext(denoiser, template[:, :1]), coupling, "entropy", steps=2).generate(
        template[:, 1:4], generator
    )
    done = torch.cat((template[:, :1], first.tokens), 1)
    window = torch.cat((done[:, 3:], template[:, 4:]), 1)
    second = Sampler(InContext(denoiser, done[:, :3]), coupling, "entropy", steps=2).generate(
        window, generator
    )
    found = BlockSampler(inner).generate(template, seeded(5))
    assert torch.equal(torch.stack(found.tokens), torch.cat((done[:, :3], second.tokens), 1))
    assert found.calls == first.nfe + second.nfe


# ---------------------------------------------------------------------- rows of any lengths


class Certain(torch.nn.Module):
    """A network sure of one token per site: a hash of the length of the text, the site and the tokens to its left."""

    vocab_size, mask_token_id, hidden_size = 7, 7, 1

    def forward(self, xt):
        known = torch.where(xt == 7, 0, xt)
        best = (
            3 * known.cumsum(-1) + 5 * torch.arange(xt.shape[1]) + xt.shape[1] + known.sum(-1, keepdim=True)
        ) % 7
        logits = torch.full((*xt.shape, 7), -torch.inf).scatter(-1, best[..., None], 0.0)
        return DenoiserOutput(logits, logits[..., :1])


ROWS = [
    [1, 2] + 9 * [7],
    11 * [7],
    [3] + 10 * [7],
    [1, 2] + 9 * [7],
    [4, 4, 4, 7, 7],
    [5],
    [6, 7, 6],
    [2, 5] + 9 * [7],
]


@pytest.mark.parametrize("length", [None, 2])
@pytest.mark.parametrize("whole", [False, True])
def test_a_batch_of_unequal_lengths_is_one_by_one(whole, length):
    """Exactly equal, as every draw is certain; networks that look at the length of the text would notice padding."""
    coupling = CouplingLayer(topologies.independent(4, 7), 7)
    inner = Sampler(Certain(), coupling, "random_order", steps=3)
    inner.unmasking = LeftFirst()
    rows = [torch.tensor(row) for row in ROWS]
    sampler = WholeTextSampler(inner) if whole else BlockSampler(inner, length)
    together = sampler.generate(rows)
    for i, row in enumerate(rows):
        alone = sampler.generate([row])
        assert torch.equal(together.tokens[i], alone.tokens[0])
        assert torch.equal(together.history[i], alone.history[0])
        assert together.nfe[i] == alone.nfe[0] == alone.calls
        assert together.lengths[i] == len(row) == len(together.tokens[i])
        assert torch.equal(together.tokens[i][row != 7], row[row != 7])
    groups = {(len(r), None if whole else next((i for i, t in enumerate(r) if t == 7), None)) for r in ROWS}
    assert together.calls < sum(together.nfe.tolist()) and len(groups) < len(rows), (
        "equal rows share their calls"
    )


class LeftFirst:
    """Reveals two sites a step, from the left."""

    def reveal(self, state):
        return state.masked & (state.masked.cumsum(-1) <= 2)


def test_a_batch_of_unequal_lengths_has_the_laws_of_its_rows():
    denoiser, coupling = models()
    cases = [
        CASES["with known text in the window"],
        (text(0, 1, "____"), 2, [(1, 2, 4), (3, 4, 6)]),
        (text(1, 1, 0, "___"), 2, [(2, 3, 5), (3, 5, 6)]),
    ]
    templates = [template for template, *_ in cases for _ in range(5000)]
    found = BlockSampler(Sampler(denoiser, coupling, steps=1), 2).generate(templates, seeded(3))
    for i, (template, _, blocks) in enumerate(cases):
        tokens = torch.stack(found.tokens[5000 * i : 5000 * (i + 1)])
        assert chi_square_p_value(counts(tokens), block_law(denoiser, coupling, template, blocks)) > 1e-4


# ---------------------------------------------------------------------- whole texts


@pytest.mark.parametrize("stretch", [WindowedCoupling, extended])
def test_whole_texts_of_several_lengths_have_their_laws(stretch):
    denoiser, coupling = models()
    inner = Sampler(denoiser, coupling, steps=1)
    sampler = WholeTextSampler(inner, stretch, shorten=stretch is extended)
    templates = [text(1, "____"), text("__", 0, "____"), text("__")]
    found = sampler.generate([t for t in templates for _ in range(5000)], seeded(0))
    for i, template in enumerate(templates):
        tokens = torch.stack(found.tokens[5000 * i : 5000 * (i + 1)])
        assert tokens.shape[1] == len(template)
        sites = len(template) if stretch is extended else max(3, len(template))
        xt = torch.cat((template, torch.full((sites - len(template),), MASK)))[None]
        layer = stretch(coupling, sites)
        with torch.no_grad():
            output = denoiser(xt)
            law = layer(output.logits, hidden=output.hidden, tokens=xt, known=xt != MASK)
            joint = law.log_prob(enumerate_sequences(VOCAB, sites)[:, None])[:, 0].exp()
        joint = joint.reshape(VOCAB ** len(template), -1).sum(-1)  # what is cut off is summed out
        assert chi_square_p_value(counts(tokens), joint) > 1e-4


# ---------------------------------------------------------------------- stops


class Spelling(torch.nn.Module):
    """Writes 0 1 2 3 4 5 6 0 1 2 ... by site."""

    vocab_size, mask_token_id, hidden_size = 7, 7, 1

    def forward(self, xt):
        best = (torch.arange(xt.shape[1]) % 7).expand(xt.shape)
        logits = torch.full((*xt.shape, 7), -torch.inf).scatter(-1, best[..., None], 0.0)
        return DenoiserOutput(logits, logits[..., :1])


def letters(ids):
    return "".join("abcdefg"[i] for i in ids)


@pytest.mark.parametrize(
    "stop", [StopTokens(4, 5), StopStrings(["de", "ef"], letters), StopStrings(["e"], letters)]
)
@pytest.mark.parametrize("whole", [False, True])
def test_stops_end_a_row_and_spare_its_calls(stop, whole):
    """The row of [4] has a stop in its prompt, which doesn't count, the second reaches it in its second block."""
    inner = Sampler(Spelling(), CouplingLayer(topologies.independent(4, 7), 7), steps=1)
    sampler = WholeTextSampler(inner, stop=stop) if whole else BlockSampler(inner, stop=stop)
    rows = [torch.tensor(row) for row in ([4, 5, *(9 * [7])], 11 * [7], [0, 1], 3 * [7])]
    found = sampler.generate(rows)
    assert found.tokens[0].tolist() == [4, 5, 2, 3, *(7 * [4])]
    assert found.tokens[1].tolist() == [0, 1, 2, 3, *(7 * [4])]
    assert found.lengths.tolist() == [5, 5, 2, 3]
    assert found.history[1].tolist() == [0, 0, 0, 0, 0, *(6 * [-1])]
    if not whole:
        assert found.nfe.tolist() == [1, 2, 0, 1]
    assert found.tokens[3].tolist() == [0, 1, 2]


def test_stop_strings_are_found_token_by_token():
    stop = StopStrings(["cd", "g"], letters)
    assert stop.end(torch.tensor([[0, 1, 2, 3, 4], [6, 6, 6, 6, 6], [3, 2, 1, 2, 2]])).tolist() == [4, 1, 6]
    assert stop.cut("abcdefg") == "ab" and stop.cut("abd") == "abd"
    written = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 0, 0], [5, 6, 1, 2, 3]])
    assert FirstStop(stop, StopTokens(5, 1)).end(written).tolist() == [2, 6, 1]
    assert FirstStop().end(written).tolist() == [6, 6, 6]
    assert StopTokens(3).end(torch.zeros(2, 0, dtype=torch.int64)).tolist() == [1, 1]


# ---------------------------------------------------------------------- guidance


def test_guidance_extrapolates_from_the_network_without_the_prompt():
    """LLaDA's formula, one call of twice the rows; scale 0 is the network, -inf stays."""
    denoiser, _ = models()
    calls = []
    denoiser.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    xt = torch.tensor([[0, 1, 2, 2, 1], [1, 1, 2, 0, 2]])
    prompt = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]).bool()
    cond, uncond = denoiser(xt), denoiser(torch.where(prompt, MASK, xt)).logits
    calls.clear()
    output = Guided(denoiser, prompt, 1.5)(xt)
    assert calls == [4]
    assert torch.allclose(output.logits, uncond + 2.5 * (cond.logits - uncond), atol=1e-5)
    assert torch.allclose(output.hidden, cond.hidden, atol=1e-6)
    assert torch.allclose(Guided(denoiser, prompt, 0.0)(xt).logits, cond.logits, atol=1e-6)
    ruled_out = Guided(Spelling(), prompt, 2.0)(xt).logits
    assert torch.equal(ruled_out, Spelling()(xt).logits)


@pytest.mark.parametrize("whole", [False, True])
def test_guided_texts_have_the_law_of_the_guided_network(whole):
    denoiser, coupling = models()
    template = text(1, 0, "___")
    inner = Sampler(denoiser, coupling, steps=1)
    sampler = WholeTextSampler(inner, extended, guidance=2.0) if whole else BlockSampler(inner, guidance=2.0)
    tokens = torch.stack(sampler.generate(template.repeat(6000, 1), seeded(0)).tokens)
    states = enumerate_sequences(VOCAB, 3)
    laws = []
    for scale in (2.0, 0.0):
        with torch.no_grad():
            output = Guided(denoiser, (template != MASK)[None], scale)(template[None])
            if whole:
                law = extended(coupling, 5)(
                    output.logits, tokens=template[None], known=template[None] != MASK
                )
                full = torch.cat((template[:2].expand(8, 2), states), 1)
                laws.append(law.log_prob(full[:, None])[:, 0].exp())
            else:
                laws.append(coupling(output.logits[:, 2:]).log_prob(states[:, None])[:, 0].exp())
    assert chi_square_p_value(counts(tokens[:, 2:]), laws[0]) > 1e-4
    assert chi_square_p_value(counts(tokens[:, 2:]), laws[1]) < 1e-6


# ---------------------------------------------------------------------- steps and errors


@pytest.mark.parametrize("whole", [False, True])
def test_every_step_is_told_with_its_place(whole):
    denoiser, coupling = models()
    rows = [text(1, "_____"), text("____"), text(0, "_____")]
    inner = Sampler(denoiser, coupling, steps=2)
    sampler = WholeTextSampler(inner) if whole else BlockSampler(inner, 2)
    shown = [row.clone() for row in rows]
    ends = []

    def on_step(step):
        for row, tokens in zip(step.rows, step.tokens, strict=True):
            shown[row][step.start : step.start + len(tokens)] = tokens
        ends.append(step.index)
        assert step.steps == 2 and bool((step.tokens[step.revealed] != MASK).all())
        assert (step.dist is None) == (not bool(step.revealed.any()))

    found = sampler.generate(rows, seeded(0), on_step=on_step)
    assert all(torch.equal(a, b) for a, b in zip(shown, found.tokens, strict=True))
    assert ends[0] == 0 and all(b in (0, a + 1) for a, b in itertools.pairwise(ends))  # a run may end early


def test_an_error_of_the_callback_ends_the_generation():
    denoiser, coupling = models()

    def stop(step):
        raise KeyboardInterrupt

    denoiser.train()
    with pytest.raises(KeyboardInterrupt):
        BlockSampler(Sampler(denoiser, coupling)).generate([text("______")], on_step=stop)
    assert denoiser.training


def test_errors_teach():
    denoiser, coupling = models()
    inner = Sampler(denoiser, coupling)
    for wrong in (0, 4):
        with pytest.raises(ConfigError, match="1 to 3"):
            BlockSampler(inner, wrong)
    with pytest.raises(ConfigError, match="context"):
        BlockSampler(inner, context=-1)
    for make in (BlockSampler, WholeTextSampler):
        with pytest.raises(ConfigError, match="0 is none"):
            make(inner, guidance=-1.0)
        with pytest.raises(ShapeError, match=r"templates\[1\]"):
            make(inner).generate([text("__"), text("__").float()])
        with pytest.raises(ShapeError, match="at least one site"):
            make(inner).generate([text("")])
        with pytest.raises(TokenError, match=r"templates\[0\].*found 5 at site 1"):
            make(inner).generate([torch.tensor([0, 5])])
        assert make(inner).generate([]).tokens == ()
    with pytest.raises(ConfigError, match="at least one token id"):
        StopTokens()
    for strings in ([], [""]):
        with pytest.raises(ConfigError, match="empty"):
            StopStrings(strings, letters)
    with pytest.raises(ConfigError, match="finite"):
        Guided(denoiser, torch.zeros(1, 2, dtype=torch.bool), float("nan"))
    with pytest.raises(ShapeError, match="prompt"):
        Guided(denoiser, torch.zeros(1, 2), 1.0)
    with pytest.raises(ShapeError, match="prompt's shape"):
        Guided(denoiser, torch.zeros(1, 2, dtype=torch.bool), 1.0)(text("___")[None])
    with pytest.raises(ShapeError, match="rows of equal length"):
        InContext(denoiser, text("__")[None], text("__"))
    with pytest.raises(ShapeError, match="expected 1 windows"):
        InContext(denoiser, text("__")[None])(text("__").repeat(2, 1))
