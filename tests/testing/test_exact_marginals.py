import math

import pytest
import torch

from codd_ppl.denoisers import Denoiser
from codd_ppl.diffusion.closed_forms import even_parity
from codd_ppl.errors import ConfigError
from codd_ppl.testing import ExactMarginals, enumerate_sequences


def random_joint(vocab, sites):
    generator = torch.Generator().manual_seed(vocab * 10 + sites)
    joint = torch.rand([vocab] * sites, generator=generator, dtype=torch.float64)
    return joint / joint.sum()


def test_every_marginal_given_every_set_of_known_tokens():
    joint = random_joint(3, 3)
    network = ExactMarginals(joint)
    xt = enumerate_sequences(4, 3)  # 3 is the mask
    found = network(xt).logits.exp()
    for row, probabilities in zip(xt.tolist(), found, strict=True):
        index = [slice(None) if token == 3 else slice(token, token + 1) for token in row]
        given = joint[tuple(index)]
        given = given / given.sum()
        for site, token in enumerate(row):
            if token == 3:
                expected = given.sum([i for i in range(3) if i != site])
                torch.testing.assert_close(probabilities[site], expected)
            else:
                assert probabilities[site].tolist() == pytest.approx([float(v == token) for v in range(3)])


def test_it_is_a_denoiser():
    network = ExactMarginals(random_joint(2, 4).float())
    assert isinstance(network, Denoiser)
    assert (network.vocab_size, network.mask_token_id, network.sites) == (2, 2, 4)
    output = network(torch.full((5, 3, 4), 2))
    assert output.logits.shape == (5, 3, 4, 2) and output.logits.dtype == torch.float32
    assert output.hidden.shape == (5, 3, 4, 0)


def test_impossible_tokens_and_impossible_texts():
    network = ExactMarginals(even_parity(3))
    assert network(torch.tensor([1, 0, 2])).logits[2].tolist() == [-math.inf, 0.0]
    assert bool((network(torch.tensor([1, 1, 1])).logits == -math.inf).all())


def test_errors():
    with pytest.raises(ConfigError, match="equally many"):
        ExactMarginals(torch.full((2, 3), 1 / 6))
    with pytest.raises(ConfigError, match="sum 2"):
        ExactMarginals(torch.full((2, 2), 0.5))
