"""A token's numbers under samples, over a vocabulary of a real size."""

import torch

from laplace_lora.generation.sampled_token import SampledToken


class Pairs:
    """Samples ``mean ± tangent``."""

    def __init__(self, tangents):
        self.n_samples = 2 * len(tangents)

    def each_output(self, mean, tangents):
        for tangent in tangents:
            yield mean + tangent
            yield mean - tangent


def test_the_mutual_information_keeps_a_vocabularys_tail():
    """It is a small difference of entropies, of which most tokens have a ten-thousandth each."""
    generator = torch.Generator().manual_seed(0)
    zipf = -2.0 * torch.arange(1, 49_153).double().log()
    logits = torch.stack([zipf[torch.randperm(len(zipf), generator=generator)] for _ in range(4)])
    logits = logits.float()
    tangents = 0.01 * torch.randn(4, *logits.shape, generator=generator)
    single, double = (
        SampledToken(f, f, t, Pairs(t))
        for f, t in ((logits, tangents), (logits.double(), tangents.double()))
    )
    true = double.mutual_information
    assert true.min() > 1e-5
    torch.testing.assert_close(single.mutual_information.double(), true, rtol=0, atol=2e-6)
    torch.testing.assert_close(single.entropy.double(), double.entropy, rtol=0, atol=2e-6)
