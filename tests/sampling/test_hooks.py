"""Couplings in loops that aren't ours: laws of what the loops write by enumeration, confidences, padding, errors.

The two loops follow what LLaDA (arXiv:2502.09992, algorithm 4 with its block-wise variant) and Dream (arXiv:2508.15487)
publish, at temperature 0, rows side by side.
"""

import itertools

import pytest
import torch
from torch import nn

from codd_ppl import constraints
from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.denoisers.pretrained import PretrainedDenoiser
from codd_ppl.errors import ConfigError, InfeasibleError, LogitsError, ShapeError, TokenError
from codd_ppl.graphs import topologies
from codd_ppl.potentials import ContextualLatentPotentials
from codd_ppl.sampling import (
    AnyOrder,
    CoupledLogits,
    TopK,
    WindowedCoupling,
    extended,
)
from codd_ppl.spanning_tree_coupling import SpanningTreeCoupling
from codd_ppl.testing import chi_square_p_value, enumerate_sequences

VOCAB, MASK, ROWS = 2, 2, 6000


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def text(symbols):
    """Token ids: text("10__") is two tokens and two masks."""
    return torch.tensor([MASK if s == "_" else int(s) for s in symbols])


def lively(module, seed=0):
    """Strong random parameters."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(1.5 * torch.randn(parameter.shape, generator=generator))
    return module


def network(vocab=VOCAB):
    torch.manual_seed(0)
    denoiser = BidirectionalTransformer(vocab, hidden_size=16, layers=1, heads=2).eval()
    with torch.no_grad():
        denoiser.head.weight.normal_(std=0.5)
    return denoiser


def hmm(sites=3, vocab=VOCAB, **settings):
    return lively(CouplingLayer(topologies.hidden_markov(sites, vocab, 3), vocab, **settings))


COUPLINGS = {
    "projected": hmm,
    "product": lambda: hmm(combine="product"),
    "spanning_trees": lambda: lively(SpanningTreeCoupling(3, VOCAB, max_offset=2)),
    "none": lambda: CouplingLayer(topologies.independent(3, VOCAB), VOCAB),
}


# ---------------------------------------------------------------------- the loops


@torch.no_grad()
def dream_loop(model, x, hook, steps=1, alg="origin"):
    """All places at once; a random subset, or the surest ones, of each step."""
    mask, times = hook.mask_token_id, torch.linspace(1, 1e-3, steps + 1)
    for i in range(steps):
        masked = x == mask
        share = 1 - float(times[i + 1] / times[i]) if i < steps - 1 else 1.0
        probs = hook.dream(i, x, model(x).logits).softmax(-1)
        sure, best = probs.max(-1)
        if alg == "origin":
            reveal = masked & (torch.rand(x.shape) < share)
        else:
            if alg == "topk_margin":
                first, second = probs.topk(2).values.unbind(-1)
                sure = first - second
            elif alg == "entropy":
                sure = (probs * (probs + 1e-10).log()).sum(-1)
            number = int(masked.sum() / len(x) * share)
            reveal = surest(sure.masked_fill(~masked, -torch.inf), torch.full((len(x),), number))
        x = torch.where(reveal, best, x)
    return x


@torch.no_grad()
def llada_loop(model, x, hook, start, block_length, steps=1, remasking="low_confidence", guidance=0.0):
    """Block by block, each in so many steps; the model sees all of the text."""
    mask, prompt = hook.mask_token_id, x != hook.mask_token_id
    for end in range(start + block_length, x.shape[1] + 1, block_length):
        left = (x[:, :end] == mask).sum(-1)
        for i in range(steps):
            masked = x == mask
            if guidance:
                both = model(torch.cat((x, torch.where(prompt, mask, x)))).logits
                logits, without = both.chunk(2)
                logits = without + (1 + guidance) * (logits - without)
            else:
                logits = model(x).logits
            logits = hook(x, logits)
            best = logits.double().exp().argmax(-1)  # noise to the power of the temperature 0
            sure = logits.softmax(-1).gather(-1, best[..., None])[..., 0]
            sure = torch.rand(x.shape) if remasking == "random" else sure
            sure = sure.masked_fill(~masked, -torch.inf)
            sure[:, end:] = -torch.inf
            number = left // steps + (i < left % steps)
            x = torch.where(surest(sure, number), best, x)
    return x


def surest(sure, number):
    """The ``number`` places of each row that are largest."""
    rank = sure.argsort(-1, descending=True).argsort(-1)
    return (rank < number[:, None]) & (sure > -torch.inf)


# ---------------------------------------------------------------------- their laws


def counts(tokens, vocab=VOCAB):
    place = vocab ** torch.arange(tokens.shape[1] - 1, -1, -1)
    return (tokens * place).sum(-1).bincount(minlength=vocab ** tokens.shape[1])


@torch.no_grad()
def block_law(model, coupling, template, blocks, in_turn):
    """p(x) over all sequences, written out. ``blocks``: (window, start, end); each given those before it if in_turn."""
    states, sites, masked = (
        enumerate_sequences(VOCAB, len(template)),
        torch.arange(len(template)),
        template == MASK,
    )
    total = torch.where(((states == template) | masked).all(-1), 0.0, -torch.inf)
    for window, start, end in blocks:
        xt = torch.where(((sites < start) & in_turn) | ~masked, states, MASK)
        output, inside = model(xt), slice(window, end)
        known = xt[:, inside] != MASK
        law = coupling(
            output.logits[:, inside], hidden=output.hidden[:, inside], tokens=xt[:, inside], known=known
        )
        chosen = (sites[inside] >= start).expand(len(states), -1) & ~known
        law = law.restrict(chosen) if hasattr(law, "restrict") else law
        total = total + law.log_prob(states[:, inside], sites=chosen)
    return total.exp()


CASES = {  # template, start, blocks as (window, start, end)
    "blocks of the graph's length": ("1______", 1, [(1, 1, 4), (4, 4, 7)]),
    "a shorter last block": ("01_____", 2, [(2, 2, 5), (4, 5, 7)]),
    "less than a block": ("0101__", 4, [(3, 4, 6)]),
    "no prompt": ("______", 0, [(0, 0, 3), (3, 3, 6)]),
    "known text in between": ("1_0_1__", 1, [(1, 1, 4), (4, 4, 7)]),
    "a start within the prompt": ("11_____", 1, [(1, 1, 4), (4, 4, 7)]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("coupling", ["projected", "spanning_trees"])
def test_dream_writes_all_blocks_in_one_step(name, coupling):
    symbols, start, blocks = CASES[name]
    model, coupling, template = network(), COUPLINGS[coupling](), text(symbols)
    hook = CoupledLogits(coupling, MASK, start, generator=seeded(0))
    written = dream_loop(model, template.repeat(ROWS, 1), hook)
    law = block_law(model, coupling, template, blocks, in_turn=False)
    assert float(law.sum()) == pytest.approx(1, abs=1e-5)
    assert chi_square_p_value(counts(written), law) > 1e-4


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("most", [None, 1])
def test_llada_writes_one_block_after_the_other(name, most):
    symbols, start, blocks = CASES[name]
    if (len(symbols) - start) % 3:
        symbols, blocks = symbols + "_", [*blocks[:-1], (blocks[-1][0] + 1, blocks[-1][1], blocks[-1][2] + 1)]
    if name == "less than a block":
        symbols, blocks = "0101___", [(4, 4, 7)]
    model, coupling, template = network(), hmm(), text(symbols)
    hook = CoupledLogits(coupling, MASK, start, blocks=most, generator=seeded(0))
    written = llada_loop(model, template.repeat(ROWS, 1), hook, start, 3)
    law = block_law(model, coupling, template, blocks, in_turn=True)
    assert float(law.sum()) == pytest.approx(1, abs=1e-5)
    assert chi_square_p_value(counts(written), law) > 1e-4


@torch.no_grad()
def two_step_law(model, coupling, template, subsets):
    """p(x) after a first step that keeps a set of the masked places, drawn from ``subsets`` (set -> probability)."""
    window = slice(len(template) - coupling.sites, len(template))
    states, total = enumerate_sequences(VOCAB, len(template)), 0.0
    for places, chance in subsets.items():
        first = torch.zeros(len(template), dtype=torch.bool)
        first[list(places)] = True
        logs = torch.where(((states == template) | (template == MASK)).all(-1), 0.0, -torch.inf)
        for xt, now in (
            (template.expand_as(states), first),
            (torch.where((template != MASK) | first, states, MASK), ~first),
        ):
            law = coupling(model(xt).logits[:, window], tokens=xt[:, window], known=xt[:, window] != MASK)
            logs = logs + law.log_prob(states[:, window], sites=now[window].expand(len(states), -1))
        total = total + chance * logs.exp()
    return total


@pytest.mark.parametrize("name", ["projected", "product", "none"])
def test_random_orders_keep_exact_joint_draws(name):
    """Two steps, the first of which keeps a random set, whatever the values."""
    model, coupling, template = network(), COUPLINGS[name](), text("1___")
    hook = CoupledLogits(coupling, MASK, 1, generator=seeded(0))
    share = 1 - float(torch.linspace(1, 1e-3, 3)[1])
    subsets = {
        places: share ** len(places) * (1 - share) ** (3 - len(places))
        for n in range(4)
        for places in itertools.combinations((1, 2, 3), n)
    }
    written = dream_loop(model, template.repeat(ROWS, 1), hook, steps=2)
    law = two_step_law(model, coupling, template, subsets)
    assert float(law.sum()) == pytest.approx(1, abs=1e-5)
    assert chi_square_p_value(counts(written), law) > 1e-4

    pairs = {places: 1 / 3 for places in itertools.combinations((1, 2, 3), 2)}
    written = llada_loop(model, template.repeat(ROWS, 1), hook, 1, 3, steps=2, remasking="random")
    assert chi_square_p_value(counts(written), two_step_law(model, coupling, template, pairs)) > 1e-4


def test_without_factors_tokens_are_independent_draws_of_the_softmax():
    logits = 2 * torch.randn(1, 4, 3, generator=seeded(1))
    hook = CoupledLogits(CouplingLayer(topologies.independent(2, 3), 3), 3, generator=seeded(0))
    drawn = hook(torch.full((ROWS, 4), 3), logits.expand(ROWS, -1, -1)).argmax(-1)
    probs = logits[0].softmax(-1)
    joint = torch.einsum("a,b,c,d->abcd", *probs).flatten()
    assert chi_square_p_value(counts(drawn, 3), joint) > 1e-4


CITIES = ["San", "New", "Diego", "York"]


@pytest.mark.parametrize("loop", ["dream", "llada"])
def test_one_step_writes_valid_pairs(loop):
    """'He is from [MASK] [MASK]': the network knows both cities, and no loop of its own draws can keep them apart."""

    def model(x):
        logits = torch.full((*x.shape, 4), -8.0)
        logits[:, 1, :2], logits[:, 2, 2:] = 0.0, 0.0
        return type("Output", (), {"logits": logits})

    pairs = CouplingLayer(topologies.chain(2, 4), 4)
    pairs.init_from_corpus(torch.tensor([[0, 2], [1, 3]]).repeat(500, 1), progress=False, pseudo_count=1e-3)
    x = torch.tensor([[0, 4, 4]]).repeat(400, 1)
    valid = {}
    for name, coupling in (("pairs", pairs), ("none", CouplingLayer(topologies.independent(2, 4), 4))):
        hook = CoupledLogits(coupling, 4, start=1, generator=seeded(0))
        written = dream_loop(model, x, hook) if loop == "dream" else llada_loop(model, x, hook, 1, 2)
        found = [f"{CITIES[a]} {CITIES[b]}" for _, a, b in written.tolist()]
        valid[name] = sum(pair in ("San Diego", "New York") for pair in found) / len(found)
        assert set(found) >= {"San Diego", "New York"}
    assert valid["pairs"] > 0.99 and valid["none"] < 0.6


# ---------------------------------------------------------------------- what the loop reads


@torch.no_grad()
def test_confidences_are_the_coupled_marginals():
    """Probability, margin and entropy as Dream computes them; the token is the one that the law draws."""
    coupling = hmm(4, 7)
    x = torch.tensor([[3, 7, 7, 7, 7], [7, 1, 7, 0, 7]])
    logits = 2 * torch.randn(2, 5, 7, generator=seeded(1))
    law = coupling(logits[:, 1:], tokens=x[:, 1:], known=x[:, 1:] != 7)
    drawn = law.sample(generator=seeded(5))
    found = CoupledLogits(coupling, 7, 1, generator=seeded(5))(x, logits)[:, 1:]
    masked = x[:, 1:] == 7
    assert torch.equal(found.argmax(-1)[masked], drawn[masked])
    own = law.marginals.gather(-1, drawn[..., None])[..., 0].clamp_min(1 / 7)
    probs = found.softmax(-1)
    assert torch.allclose(probs.amax(-1)[masked], own[masked], atol=1e-5)
    rest = (1 - own) / 6
    first, second = probs.topk(2).values.unbind(-1)
    assert torch.allclose((first - second)[masked], (own - rest)[masked], atol=1e-5)
    entropy = -(own.log() * own + 6 * rest * rest.log())
    assert torch.allclose(-(probs * probs.log()).sum(-1)[masked], entropy[masked], atol=1e-4)
    assert (own[masked] < 0.99).all() and (own[masked] > 1 / 7 + 1e-6).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [3, 260_000])
@torch.no_grad()
def test_unlikely_tokens_are_found_by_every_arithmetic(dtype, vocab):
    """Half the draws are below 1 / V; neither the logits' nor the softmax's rounding may hide them."""
    coupling = CouplingLayer(topologies.independent(4, vocab), vocab)
    logits = torch.randn(1, 4, vocab, generator=seeded(0)).to(dtype).expand(2 if vocab > 3 else 500, -1, -1)
    x = torch.full(logits.shape[:2], vocab)
    found = CoupledLogits(coupling, vocab, generator=seeded(3))(x, logits)
    exact = logits.double() if dtype == torch.float64 else logits.float()
    law = coupling(exact, tokens=x, known=x != vocab)
    drawn = law.sample(generator=seeded(3))
    below = law.marginals.gather(-1, drawn[..., None]) < 1 / vocab
    assert below.any() and found.dtype == dtype and bool(found.isfinite().all())
    assert torch.equal(found.argmax(-1), drawn)
    assert torch.equal(found.softmax(-1).argmax(-1), drawn)
    assert torch.equal(found.double().exp().argmax(-1), drawn)


@pytest.mark.parametrize("error", [0.0, 1e-6])
def test_certain_tokens_are_finite_and_certain(error):
    """Marginals that rounding has lifted above 1, too."""

    class Rounded(CouplingLayer):
        def forward(self, *given, **named):
            law = super().forward(*given, **named)
            law.marginals = law.marginals * (1 + error)
            return law

    logits = torch.full((1, 3, VOCAB), -torch.inf)
    logits[..., 1] = 0.0
    hook = CoupledLogits(Rounded(topologies.independent(3, VOCAB), VOCAB), MASK)
    found = hook(text("___")[None], logits)
    assert bool(found.isfinite().all()) and found.softmax(-1)[..., 1].tolist() == [[1.0] * 3]


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
@torch.no_grad()
def test_the_surest_tokens_of_the_draw_come_first(alg):
    """The three orders of Dream rank alike here, by the coupled probability of what was drawn; all is written."""
    model, coupling = network(7), hmm(4, 7)
    x = torch.full((50, 8), 7)
    first = dream_loop(model, x, Stop(CoupledLogits(coupling, 7, generator=seeded(2))), 4, alg)
    logits = model(x).logits.detach().unflatten(1, (2, 4)).flatten(0, 1)
    law = coupling(logits, tokens=x.reshape(100, 4), known=torch.zeros(100, 4, dtype=torch.bool))
    drawn = law.sample(generator=seeded(2)).reshape(50, 8)
    own = law.marginals.detach().reshape(50, 8, 7).gather(-1, drawn[..., None])[..., 0]
    kept = first != 7
    assert (kept.sum(-1) == 1).all() and torch.equal(first[kept], drawn[kept])
    assert (own.masked_fill(~kept, 0.0).amax(-1) >= own.amax(-1) - 1e-6).all()
    written = dream_loop(model, x, CoupledLogits(coupling, 7, generator=seeded(2)), 4, alg)
    assert bool((written != 7).all())


class Stop:
    """A hook for the first step; the loop then goes on with logits that write the mask."""

    def __init__(self, hook):
        self.hook, self.mask_token_id = hook, hook.mask_token_id

    def dream(self, step, x, logits):
        if step == 0:
            return self.hook.dream(step, x, logits)
        return torch.nn.functional.one_hot(torch.full(x.shape, self.mask_token_id)).float()


def test_the_rest_stays_as_it_was():
    coupling, x = hmm(), torch.stack((text("1_0____"), text("1111111")))
    logits = torch.randn(2, 7, 5, generator=seeded(0))
    logits[0, 0], logits[0, 2], logits[1] = torch.nan, torch.nan, torch.nan  # known text: nobody reads it
    before = logits.clone()
    for most, changed in ((None, [1, 3, 4, 5, 6]), (1, [1, 3]), (2, [1, 3, 4, 5, 6]), (7, [1, 3, 4, 5, 6])):
        found = CoupledLogits(coupling, MASK, 1, blocks=most)(x, logits)
        assert torch.equal(logits.nan_to_num(), before.nan_to_num()), "inputs are not edited"
        same = (found == logits).all(-1) | found.isnan().all(-1)
        assert (~same).nonzero().tolist() == [[0, place] for place in changed]
        assert found.argmax(-1)[~same].max() < VOCAB, "columns beyond the vocabulary are padding"
    hook = CoupledLogits(coupling, MASK, 7)
    assert hook(x, logits) is logits, "nothing is to be written from place 7 on"
    assert CoupledLogits(coupling, MASK)(x[1:], logits[1:]).data_ptr() == logits[1:].data_ptr()


def test_the_mask_is_never_drawn():
    """A vocabulary with the mask in it, as those of LLaDA and Dream; the network shouts for it."""
    coupling = hmm(3, 4)
    logits = torch.randn(1, 6, 6, generator=seeded(0)).repeat(2000, 1, 1)
    logits[..., 2] = 50.0  # the mask
    logits[..., 5] = 60.0  # padding of the unembedding
    hook = CoupledLogits(coupling, 2, generator=seeded(0))
    found = hook(torch.full((2000, 6), 2), logits)
    assert sorted(found.argmax(-1).unique().tolist()) == [0, 1, 3]
    assert float(found.softmax(-1)[..., [2, 5]].max()) == 0.0
    clean = logits[:1, :3, :4].clone()
    clean[..., 2] = -torch.inf
    marginals = coupling(clean).marginals[0]
    drawn = nn.functional.one_hot(found.argmax(-1)[:, :3], 4).float().mean(0)
    assert torch.allclose(drawn, marginals, atol=0.05)

    class Careless(nn.Module):
        sites, vocab_size = 3, 4

        def forward(self, logits, hidden=None, tokens=None, known=None):
            return CouplingLayer(topologies.independent(3, 4), 4)(torch.zeros_like(logits))

    with pytest.raises(TokenError, match=r"without the mask 2.*Careless must rule out what the logits do"):
        CoupledLogits(Careless(), 2)(torch.full((20, 3), 2), torch.zeros(20, 3, 4))


@torch.no_grad()
def test_draws_and_transforms_are_those_of_the_sampler():
    coupling, x = hmm(4, 7), torch.full((3, 4), 7)
    logits = torch.randn(3, 4, 7, generator=seeded(0))
    law = coupling(logits, tokens=x, known=x != 7)
    assert torch.equal(CoupledLogits(coupling, 7, drawing="mode")(x, logits).argmax(-1), law.mode)
    greedy = CoupledLogits(coupling, 7, logits=TopK(1))(x, logits)
    assert torch.equal(greedy.argmax(-1), logits.argmax(-1))
    drawn = AnyOrder(0.5).draw(law, x == 7, seeded(1))
    hook = CoupledLogits(coupling, 7, drawing=AnyOrder(0.5), generator=seeded(1))
    assert torch.equal(hook(x, logits).argmax(-1), drawn)


def test_other_couplings():
    """One with a law for each set, one with a constraint, and one in training mode."""
    asked = []

    class Windows(WindowedCoupling):
        def forward(self, *given, **named):
            law = super().forward(*given, **named)
            restrict = law.restrict
            law.restrict = lambda sites: asked.append(sites.tolist()) or restrict(sites)
            return law

    x, logits = torch.full((200, 6), MASK), torch.randn(200, 6, VOCAB, generator=seeded(0))
    found = CoupledLogits(Windows(hmm(), 4), MASK)(x[:1], logits[:1])
    assert asked == [[[True] * 4, [False, False, True, True]]], "the set is the block's, not the window's"
    assert bool((found != logits[:1]).any(-1).all())
    wanted = constraints.constrain(extended(hmm(), 6), constraints.regex("(ab)*"), ["a", "b"])
    hook = CoupledLogits(wanted, MASK)
    assert hook(x, logits).argmax(-1).tolist() == [[0, 1, 0, 1, 0, 1]] * 200
    with pytest.raises(InfeasibleError, match=r"\(ab\)\*.*the known tokens"):
        hook(torch.tensor([[1, *(5 * [MASK])]]), logits[:1])
    coupling = hmm().train()
    CoupledLogits(coupling, MASK)(x, logits)
    assert coupling.training, "the mode of the coupling is its own"


# ---------------------------------------------------------------------- rows of unequal prompts


def test_prompts_padded_on_the_left():
    """One start for all; what stands before it, pads and their NaN, isn't read."""
    coupling, pad = hmm(), 3
    x = torch.tensor([[pad, pad, 1, *(5 * [MASK])], [0, 1, 1, *(5 * [MASK])]]).repeat(ROWS, 1)
    one = torch.randn(2, 8, VOCAB, generator=seeded(0))
    logits = one.clone()
    logits[0, :2] = torch.nan
    hook = CoupledLogits(coupling, MASK, 3, generator=seeded(1))
    drawn = hook(x, logits.repeat(ROWS, 1, 1)).argmax(-1)[:, 3:].reshape(ROWS, 2, 5)
    for row in range(2):
        law = window_law(coupling, one[row, 3:], [(0, 0, 3), (2, 3, 5)])
        assert chi_square_p_value(counts(drawn[:, row]), law) > 1e-4


@pytest.mark.parametrize("start", [[1, 4], torch.tensor([1, 4])])
def test_a_start_for_each_row(start):
    """Prompts of one and four tokens, padding on the right of what is written."""
    coupling, pad = hmm(), 0
    rows = [[1, 2, 2, 2, 2, 2, 2, pad], [0, 1, 1, 0, 2, 2, 2, 2]]
    logits = torch.randn(2, 8, VOCAB, generator=seeded(0))
    starts = torch.as_tensor(start).repeat(ROWS)
    hook = CoupledLogits(coupling, MASK, starts if isinstance(start, torch.Tensor) else starts.tolist())
    found = hook(torch.tensor(rows).repeat(ROWS, 1), logits.repeat(ROWS, 1, 1)).argmax(-1).reshape(ROWS, 2, 8)
    assert (
        chi_square_p_value(
            counts(found[:, 0, 1:7]), window_law(coupling, logits[0, 1:7], [(0, 0, 3), (3, 3, 6)])
        )
        > 1e-4
    )
    assert (
        chi_square_p_value(
            counts(found[:, 1, 4:]), window_law(coupling, logits[1, 4:], [(0, 0, 3), (1, 3, 4)])
        )
        > 1e-4
    )


def window_law(coupling, logits, blocks):
    """Product over (window, start, ..) of the windows' laws, nothing known."""
    states, total = enumerate_sequences(VOCAB, len(logits)), 0.0
    for window, start, _ in blocks:
        chosen = torch.arange(window, window + 3) >= start
        law = coupling(logits[None, window : window + 3].expand(len(states), -1, -1))
        inside = states[:, window : window + 3]
        total = total + law.log_prob(inside, sites=chosen.expand(len(states), -1)).detach()
    return total.exp()


# ---------------------------------------------------------------------- hidden states


def contextual(hidden_size, vocab=VOCAB, sites=3):
    graph = topologies.hidden_markov(sites, vocab, 3)
    potentials = ContextualLatentPotentials(graph, hidden_size, width=8, gates=True)
    return lively(CouplingLayer(graph, vocab, hidden_size, "product", potentials))


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_contextual_couplings_read_the_model_that_runs(guidance):
    model, template = network(), text("1___")
    coupling = contextual(model.hidden_size)
    with CoupledLogits(coupling, MASK, 1, model=model.head, generator=seeded(0)) as hook:
        written = llada_loop(model, template.repeat(ROWS, 1), hook, 1, 3, guidance=guidance)
    states = enumerate_sequences(VOCAB, 3)
    laws = []
    with torch.no_grad():
        output, without = model(template[None]), model(torch.full((1, 4), MASK)).logits
        logits = without + (1 + guidance) * (output.logits - without)
        for hidden in (output.hidden, torch.zeros_like(output.hidden)):
            law = coupling(logits[:, 1:], hidden=hidden[:, 1:])
            laws.append(law.log_prob(states[:, None])[:, 0].exp())
    assert chi_square_p_value(counts(written[:, 1:]), laws[0]) > 1e-4
    assert chi_square_p_value(counts(written[:, 1:]), laws[1]) < 1e-6, "the states matter here"


class Dreaming(nn.Module):
    """A model of the type of Dream: logits at a place are about the next one."""

    def __init__(self):
        super().__init__()
        self.config = type(
            "Config", (), {"model_type": "Dream", "vocab_size": VOCAB + 1, "hidden_size": 16}
        )()
        self.inner = network()

    def get_output_embeddings(self):
        return self.inner.head

    def forward(self, input_ids):
        return self.inner(input_ids)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("shift", [None, True, False])
@torch.no_grad()
def test_hidden_states_of_the_next_token_are_moved_with_the_logits(wrapped, shift):
    """In Dream's loop the logits are in place when the hook gets them, and so must the states be."""
    inner = Dreaming()
    model = PretrainedDenoiser(inner, MASK, shift=True) if wrapped else inner
    coupling = contextual(16, VOCAB + 1)
    x = text("10__1_").repeat(5, 1)
    hook = CoupledLogits(coupling, MASK, 3, model=model, shift=shift, generator=seeded(0))
    states = inner.inner(x).hidden
    logits = inner(x).logits.detach()
    wide = torch.cat((logits, torch.zeros(*logits.shape[:2], 1)), -1)  # a column for the mask
    found = hook(x, torch.cat((wide[:, :1], wide[:, :-1]), 1))
    if shift is not False:
        states = torch.cat((states[:, :1], states[:, :-1]), 1)
    own = torch.cat((wide[:, :1], wide[:, :-1]), 1)[:, 3:]
    own[..., MASK] = -torch.inf
    law = coupling(own, hidden=states[:, 3:], tokens=x[:, 3:], known=x[:, 3:] != MASK)
    drawn, masked = law.sample(generator=seeded(0)), x[:, 3:] == MASK
    chance = law.marginals.gather(-1, drawn[..., None])[..., 0]
    assert torch.equal(found[:, 3:].argmax(-1)[masked], drawn[masked])
    probs = found[:, 3:].softmax(-1).amax(-1)
    assert torch.allclose(probs[masked], chance[masked].clamp_min(0.5), atol=1e-5)


def test_the_hook_comes_off():
    model = network()
    hook = CoupledLogits(contextual(16), MASK, model=model.head)
    assert len(model.head._forward_pre_hooks) == 1
    x = text("___")[None]
    hook(x, model(x).logits.detach())
    with pytest.raises(ConfigError, match="run the model that was given here once before each call"):
        hook(x, torch.zeros(1, 3, VOCAB))
    hook.close()
    hook.close()
    assert len(model.head._forward_pre_hooks) == 0
    with pytest.raises(RuntimeError), CoupledLogits(contextual(16), MASK, model=model.head):
        raise RuntimeError
    assert len(model.head._forward_pre_hooks) == 0
    CoupledLogits(hmm(), MASK).close()


def test_hidden_states_that_are_missing_or_of_something_else():
    model, x = network(), text("___")[None]
    with pytest.raises(ConfigError, match=r"may read hidden states.*give the network that it runs as model="):
        CoupledLogits(contextual(16), MASK)(x, torch.zeros(1, 3, VOCAB))
    with pytest.raises(ConfigError, match="pass the linear layer that makes the logits"):
        CoupledLogits(contextual(16), MASK, model=model)
    hook = CoupledLogits(contextual(16), MASK, model=model.head)
    for other in (text("__")[None], text("___").repeat(3, 1)):
        model(other)
        with pytest.raises(ShapeError, match=r"expected hidden states \(1, 3, hidden\)"):
            hook(x, torch.zeros(1, 3, VOCAB))
    wrong = CoupledLogits(contextual(8), MASK, model=model.head)
    model(x)
    with pytest.raises(ShapeError, match="hidden"):
        wrong(x, torch.zeros(1, 3, VOCAB))


# ---------------------------------------------------------------------- a model of transformers


@pytest.mark.parametrize("reads_hidden", [False, True])
def test_a_masked_model_of_transformers_in_both_loops(reads_hidden):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=10, pad_token_id=0, **sizes)
    ).eval()
    coupling = contextual(16, 10, 4) if reads_hidden else hmm(4, 10)
    x = torch.full((3, 10), 2)
    x[:, :2] = torch.tensor([3, 4])
    with CoupledLogits(coupling, 2, 2, model=model if reads_hidden else None, generator=seeded(0)) as hook:
        texts = [llada_loop(model, x, hook, 2, 4, 2, remasking) for remasking in ("low_confidence", "random")]
        texts += [dream_loop(model, x, hook, 3, alg) for alg in ("origin", "entropy")]
        with torch.no_grad():
            processed = transformers.LogitsProcessorList([hook])(x, model(x).logits)
    for written in texts:
        assert bool((written != 2).all()) and torch.equal(written[:, :2], x[:, :2])
    assert processed.shape == (3, 10, 10) and bool((processed[:, 2:].argmax(-1) != 2).all())


# ---------------------------------------------------------------------- errors


def test_errors_teach():
    coupling = hmm()
    for start in (1.5, [[1]], torch.tensor([True])):
        with pytest.raises(ShapeError, match=r"pass prompt.shape\[1\]"):
            CoupledLogits(coupling, MASK, start)
    for settings in ({"start": -1}, {"start": [1, -2]}):
        with pytest.raises(ConfigError, match="at least 0"):
            CoupledLogits(coupling, MASK, **settings)
    with pytest.raises(ConfigError, match="mask_token_id of at least 0"):
        CoupledLogits(coupling, -1)
    for blocks in (0, True, 1.5):
        with pytest.raises(ConfigError, match="blocks: expected an integer of at least 1"):
            CoupledLogits(coupling, MASK, blocks=blocks)
    with pytest.raises(ConfigError, match="drawing"):
        CoupledLogits(coupling, MASK, drawing="best")

    hook, x = CoupledLogits(coupling, MASK, 1), text("1____")[None]
    with pytest.raises(ShapeError, match=r"expected floating ones \(1, 5, columns\)"):
        hook(x, torch.zeros(1, 3, VOCAB))
    with pytest.raises(ShapeError, match="expected floating ones"):
        hook(x, torch.zeros(1, 5, VOCAB, dtype=torch.int64))
    with pytest.raises(ShapeError, match="expected at least 2 columns"):
        hook(x, torch.zeros(1, 5, 1))
    for wrong in (x[0], x.float(), x == MASK):
        with pytest.raises(ShapeError, match="x: expected integer tokens"):
            hook(wrong, torch.zeros(1, 5, VOCAB))
    with pytest.raises(ConfigError, match="start: expected at most 5"):
        CoupledLogits(coupling, MASK, 6)(x, torch.zeros(1, 5, VOCAB))
    with pytest.raises(ShapeError, match=r"one for each of the 1 rows, found 2.*repeat_interleave"):
        CoupledLogits(coupling, MASK, [1, 1])(x, torch.zeros(1, 5, VOCAB))
    with pytest.raises(
        ConfigError, match=r"at least the 3 sites of the coupling, found 2.*extended\(coupling, 2\)"
    ):
        CoupledLogits(coupling, MASK)(text("__")[None], torch.zeros(1, 2, VOCAB))
    with pytest.raises(TokenError, match=r"found 5 at place 2 of row 0"):
        hook(torch.tensor([[1, 2, 5, 2, 2]]), torch.zeros(1, 5, VOCAB))
    for value in (torch.nan, torch.inf, -torch.inf):
        logits = torch.zeros(1, 5, VOCAB)
        logits[0, 3] = value
        with pytest.raises(LogitsError, match=rf"the largest is {value:g} at place 3 of row 0"):
            hook(x, logits)
    elsewhere = CoupledLogits(coupling.to("meta"), MASK)
    with pytest.raises(ConfigError, match=r"on cpu, where the logits are, found them on meta"):
        elsewhere(x, torch.zeros(1, 5, VOCAB))
