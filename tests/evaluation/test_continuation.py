"""Likelihoods of continuations: against enumeration, against what the block sampler writes, and their invariances."""

import itertools
import math

import pytest
import torch
from torch import nn

from codd_ppl import CouplingLayer, Sampler, topologies
from codd_ppl.denoisers import DenoiserOutput
from codd_ppl.diffusion.schedules import LinearSchedule
from codd_ppl.errors import CoddError, ConfigError, ShapeError, TokenError
from codd_ppl.evaluation import ContinuationScorer
from codd_ppl.sampling import BlockSampler

VOCAB, SITES = 3, 4
CONTEXT = torch.tensor([0, 2, 1, 1, 2, 0])


class Network(nn.Module):
    """Random, far from uniform; every site sees every other."""

    vocab_size, mask_token_id, hidden_size = VOCAB, VOCAB, 6

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB + 1, 6), nn.Linear(6, VOCAB)

    def forward(self, xt: torch.Tensor) -> DenoiserOutput:
        read = self.embedding(xt)
        hidden = (read.cumsum(1) + 2 * read.flip(1).cumsum(1).flip(1)).sin()
        return DenoiserOutput(4 * self.head(hidden), hidden)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(1)
    return Network().requires_grad_(False)


@pytest.fixture
def coupling() -> CouplingLayer:
    torch.manual_seed(2)
    layer = CouplingLayer(topologies.hidden_markov(SITES, VOCAB, 3), VOCAB, sweeps=2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    return layer.requires_grad_(False).eval()


def continued(context: torch.Tensor, length: int) -> list[torch.Tensor]:
    """All texts with so many tokens after the context."""
    every = itertools.product(range(VOCAB), repeat=length)
    return [torch.cat((context, torch.tensor(rest, dtype=torch.int64))) for rest in every]


@pytest.mark.parametrize("length", [1, 2, 4, 6])
@pytest.mark.parametrize("given", [0, 1, 3, 6])
def test_probabilities_of_all_continuations_add_up_to_one(
    network: Network, coupling: CouplingLayer, given: int, length: int
) -> None:
    """Windows that begin with context, texts shorter than the window, and several blocks."""
    texts = continued(CONTEXT[:given], length)
    found = ContinuationScorer(network, coupling, batch_size=100).score(texts, [given] * len(texts))
    probabilities = found.log_prob.exp()
    assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(probabilities.max()) > 1.2 * float(probabilities.min())
    assert int(found.modal.sum()) == 1


def test_one_step_is_the_joint_law_of_the_window(network: Network, coupling: CouplingLayer) -> None:
    text = torch.cat((CONTEXT, torch.tensor([1, 0])))
    xt = torch.cat((CONTEXT, torch.tensor([VOCAB, VOCAB])))[None]
    output = network(xt)
    known = torch.tensor([[True, True, False, False]])
    dist = coupling(output.logits[:, 4:], hidden=output.hidden[:, 4:], tokens=xt[:, 4:], known=known)
    found = ContinuationScorer(network, coupling).score([text], [6])
    assert float(found.log_prob) == pytest.approx(float(dist.log_prob(text[None, 4:])), abs=1e-5)
    assert bool(found.modal) == bool((dist.mode[0] == text[4:]).all())


def test_what_is_behind_a_short_text_is_summed_out(network: Network, coupling: CouplingLayer) -> None:
    text = torch.tensor([2, 0])
    xt = torch.tensor([[2, VOCAB, VOCAB, VOCAB]])
    output = network(xt)
    dist = coupling(output.logits, hidden=output.hidden, tokens=xt, known=xt != VOCAB)
    every = torch.tensor([[2, 0, a, b] for a in range(VOCAB) for b in range(VOCAB)])
    expected = dist.log_prob(every[:, None]).logsumexp(0)
    found = ContinuationScorer(network, coupling).score([text], [1])
    assert float(found.log_prob) == pytest.approx(float(expected), abs=1e-5)


def test_the_block_sampler_draws_from_it(
    network: Network, coupling: CouplingLayer, generator: torch.Generator
) -> None:
    """Frequencies of 4000 texts of three blocks, one step each."""
    count, length = 4000, 3
    texts = continued(CONTEXT[:4], length)
    scorer = ContinuationScorer(network, coupling, block_length=1, batch_size=200)
    expected = scorer.score(texts, [4] * len(texts)).log_prob.exp()
    template = torch.cat((CONTEXT[:4], torch.full((length,), VOCAB)))
    written = BlockSampler(Sampler(network, coupling, steps=1), 1).generate([template] * count, generator)
    place = torch.tensor([VOCAB**2, VOCAB, 1])
    codes = torch.stack([tokens[4:] for tokens in written.tokens]) @ place
    counts = torch.bincount(codes, minlength=VOCAB**length).double()
    chi = float(((counts - count * expected) ** 2 / (count * expected)).sum())
    assert chi < 60  # 26 degrees of freedom: chance below 0.0002


def test_the_modal_continuation_is_what_mode_drawing_writes(
    network: Network, coupling: CouplingLayer
) -> None:
    for given, length in ((0, 2), (2, 4), (6, 3), (6, 7)):
        template = torch.cat((CONTEXT[:given], torch.full((length,), VOCAB)))
        sampler = Sampler(network, coupling, steps=1, drawing="mode")
        best = BlockSampler(sampler).generate([template]).tokens[0]
        other = best.clone()
        other[-1] = (best[-1] + 1) % VOCAB
        for steps in (1, 2):
            scorer = ContinuationScorer(network, coupling, steps=steps, draws=2)
            assert scorer.score([best, other], [given, given]).modal.tolist() == [True, False]


def bound(network: Network, coupling: CouplingLayer, text: torch.Tensor, given: int, T: int) -> float:
    """NELBO_T of a block that ends the window, by listing steps, masks and revealed sets."""
    alphas, rates = LinearSchedule().grid(T).tolist(), LinearSchedule().reveal_rates(T).tolist()
    m, total = len(text) - given, 0.0
    for k in range(1, T + 1):
        for bits in itertools.product((False, True), repeat=m):
            chance = math.prod(1 - alphas[k] if hidden else alphas[k] for hidden in bits)
            masked = torch.tensor([False] * given + list(bits))
            xt = torch.where(masked, VOCAB, text)[None]
            output = network(xt)
            window = slice(len(text) - SITES, None)
            dist = coupling(
                output.logits[:, window],
                hidden=output.hidden[:, window],
                tokens=xt[:, window],
                known=~masked[None, window],
            )
            for chosen in itertools.product((False, True), repeat=sum(bits)):
                revealed = masked.clone()
                revealed[masked] = torch.tensor(chosen, dtype=torch.bool)
                weight = chance * math.prod(rates[k - 1] if c else 1 - rates[k - 1] for c in chosen)
                logs = dist.log_prob(text[None, window], sites=revealed[None, window])
                total -= weight * float(logs)
    return total


@pytest.mark.parametrize("factorised", [False, True])
def test_more_steps_are_estimated_without_bias(
    network: Network, coupling: CouplingLayer, factorised: bool
) -> None:
    if factorised:
        coupling = CouplingLayer(topologies.independent(SITES, VOCAB), VOCAB).eval()
    text, given = torch.tensor([0, 2, 1, 0, 2]), 2
    for T in (2, 3):
        expected = bound(network, coupling, text, given, T)
        means = []
        for seed in range(8):
            scorer = ContinuationScorer(network, coupling, 3, T, draws=250, seed=seed, batch_size=251)
            means.append(-scorer.score([text], [given]).log_prob)
        found = torch.cat(means)
        error = float(found.std()) / math.sqrt(len(found))
        assert abs(float(found.mean()) - expected) < 4 * error + 1e-4
        assert error < 0.02 * expected
        exact = float(ContinuationScorer(network, coupling, 3).score([text], [given]).log_prob)
        assert abs(expected + exact) > 5 * error  # T steps are another law than one


def test_how_many_sites_are_masked_adds_no_noise() -> None:
    """Independent tokens, equally hard, whatever is known: every draw gives the bound itself."""

    class Flat:
        vocab_size, mask_token_id, hidden_size = VOCAB, VOCAB, 1

        def __call__(self, xt: torch.Tensor) -> DenoiserOutput:
            return DenoiserOutput(torch.zeros(*xt.shape, VOCAB), torch.zeros(*xt.shape, 1))

    layer = CouplingLayer(topologies.independent(SITES, VOCAB), VOCAB)
    for seed in range(5):
        scorer = ContinuationScorer(Flat(), layer, steps=4, draws=3, seed=seed)
        found = scorer.score([CONTEXT], [2])
        assert float(found.log_prob) == pytest.approx(-4 * math.log(VOCAB), rel=1e-5)


def test_one_token_needs_no_draws(network: Network, coupling: CouplingLayer) -> None:
    once, often = (ContinuationScorer(network, coupling, steps=T, draws=2) for T in (1, 8))
    texts = continued(CONTEXT, 1)
    assert once.score(texts, [6] * 3).log_prob.equal(often.score(texts, [6] * 3).log_prob)


@pytest.mark.parametrize("steps", [1, 3])
def test_blocks_follow_the_chain_rule(network: Network, coupling: CouplingLayer, steps: int) -> None:
    text = torch.cat((CONTEXT, CONTEXT[1:]))
    scorer = ContinuationScorer(network, coupling, block_length=2, steps=steps, draws=5)
    whole = scorer.score([text], [7]).log_prob
    ends = [(9, 7), (11, 9)]
    parts = scorer.score([text[:end] for end, _ in ends], [start for _, start in ends]).log_prob
    if steps == 1:
        assert float(parts.sum()) == pytest.approx(float(whole), abs=1e-5)
    first = scorer.score([text[:9]], [7]).log_prob  # the noise of a block depends on its place only
    rest = float(whole) - float(first)
    assert rest < 0 and (steps == 1 or rest != pytest.approx(float(parts[1]), abs=1e-5))


def test_the_first_block_goes_on_to_the_end_of_the_graph(network: Network, coupling: CouplingLayer) -> None:
    """As the block sampler's does, where there is too little text before it to fill the window."""
    short, whole = (ContinuationScorer(network, coupling, block_length=length) for length in (2, SITES))
    for given, same in ((0, True), (1, True), (4, False)):
        text = torch.cat((CONTEXT, CONTEXT))[: max(SITES, given + 3)]
        scores = [float(scorer.score([text], [given]).log_prob) for scorer in (short, whole)]
        assert (scores[0] == scores[1]) == same


def test_neither_the_batch_nor_its_order_matters(network: Network, coupling: CouplingLayer) -> None:
    texts = [CONTEXT[:n] for n in (6, 2, 5, 1, 6, 3)]
    given = [3, 0, 5, 0, 0, 2]
    scorers = [
        ContinuationScorer(network, coupling, steps=2, draws=3, batch_size=size) for size in (1, 2, 50)
    ]
    alone = [float(scorers[0].score([t], [g]).log_prob) for t, g in zip(texts, given, strict=True)]
    assert alone[2] == 0.0 and all(value < 0 for i, value in enumerate(alone) if i != 2)
    for scorer in scorers:
        assert scorer.score(texts, given).log_prob.tolist() == pytest.approx(alone, abs=1e-5)
    backwards = scorers[0].score(texts[::-1], given[::-1]).log_prob.tolist()
    assert backwards[::-1] == pytest.approx(alone, abs=1e-5)
    assert scorers[0].score(texts, given).modal[2]


def test_the_network_reads_so_much_context(network: Network, coupling: CouplingLayer) -> None:
    """A text of eight tokens, window of four, one of context: the first three are not read."""
    text = torch.cat((CONTEXT, torch.tensor([1, 2])))
    scorer = ContinuationScorer(network, coupling, context=1)
    before = float(scorer.score([text], [6]).log_prob)
    for site, same in ((2, True), (3, False)):
        other = text.clone()
        other[site] = (text[site] + 1) % VOCAB
        assert (float(scorer.score([other], [6]).log_prob) == before) == same


def test_what_the_network_rules_out_is_impossible(coupling: CouplingLayer) -> None:
    class Strict:
        vocab_size, mask_token_id, hidden_size = VOCAB, VOCAB, 1

        def __call__(self, xt: torch.Tensor) -> DenoiserOutput:
            logits = torch.zeros(*xt.shape, VOCAB)
            logits[..., 2] = -torch.inf
            return DenoiserOutput(logits, torch.zeros(*xt.shape, 1))

    for steps in (1, 3):
        scorer = ContinuationScorer(Strict(), coupling, steps=steps)
        found = scorer.score([torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0])], [1, 1])
        assert float(found.log_prob[0]) == -torch.inf and math.isfinite(float(found.log_prob[1]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"block_length": 5}, "expected 1 to 4"),
        ({"block_length": 0}, "expected 1 to 4"),
        ({"steps": 0}, "steps to be a whole number"),
        ({"draws": 0}, "draws and batch_size of at least 1"),
        ({"context": -1}, "context of at least 0"),
    ],
)
def test_settings_out_of_range(
    network: Network, coupling: CouplingLayer, settings: dict[str, int], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        ContinuationScorer(network, coupling, **settings)


def test_texts_that_do_not_fit(network: Network, coupling: CouplingLayer) -> None:
    scorer = ContinuationScorer(network, coupling)
    wrong: list[tuple[list[torch.Tensor], list[int], type[CoddError], str]] = [
        ([CONTEXT], [7], ShapeError, "a number from 0 to its length"),
        ([CONTEXT], [], ShapeError, "for each of 1 texts"),
        ([CONTEXT.float()], [1], ShapeError, "int64"),
        ([torch.tensor([0, VOCAB])], [1], TokenError, "without the mask token"),
        ([torch.tensor([0, 7])], [1], TokenError, "expected ids in"),
    ]
    for texts, given, kind, said in wrong:
        with pytest.raises(kind, match=said):
            scorer.score(texts, given)
    other = CouplingLayer(topologies.independent(SITES, VOCAB + 1), VOCAB + 1)
    with pytest.raises(ConfigError, match=r"expected 3 as in denoiser\.vocab_size, found 4"):
        ContinuationScorer(network, other)
