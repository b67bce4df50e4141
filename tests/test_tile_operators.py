"""The tile operators of linear_token_stats against whole rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mallowspo import functional as F

ops = torch.ops.mallowspo


@settings(max_examples=100)
@given(
    dtype=st.sampled_from(F.DTYPES),
    vocab=st.sampled_from([1, 2, 17, 64, 1024, 1025, 2500]),
    cuts=st.lists(st.integers(1, 2499), max_size=3),
    temperature=st.sampled_from([1.0, 0.7]),
    seed=st.integers(0, 2**31 - 1),
)
def test_tiles_add_up_to_whole_rows(dtype, vocab, cuts, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(4, vocab, generator=generator, dtype=torch.float64) * 3).to(dtype)
    logits[torch.rand(4, vocab, generator=generator) < 0.1] = -math.inf
    logits[:, -1] = 0.0
    labels = torch.randint(vocab, (4, 2), generator=generator)[:, 0]  # not contiguous
    labels[1] = -100
    logps, entropy, row_max, log_sum = ops.token_stats(logits, labels, -100, temperature)

    state = torch.zeros(4, 4, dtype=logps.dtype)
    state[0] = torch.finfo(state.dtype).min
    bounds = sorted({0, vocab, *(cut for cut in cuts if cut < vocab)})
    parts = list(zip(bounds, bounds[1:], strict=False))
    for start, stop in parts:
        ops.token_stats_tile(state, logits[:, start:stop], labels, start, vocab, -100, temperature, False)
    assert torch.equal(state[0], row_max)
    tolerance = 8 * torch.finfo(state.dtype).eps  # the sums run in another order
    for actual, right in zip(state[1:], (log_sum, entropy, logps), strict=True):
        torch.testing.assert_close(actual, right, rtol=tolerance, atol=tolerance)

    saved = entropy, row_max, log_sum
    grads = torch.randn(2, 4, generator=generator, dtype=torch.float64).to(logps.dtype)
    expected = ops.token_stats_backward(*grads, logits, labels, *saved, -100, temperature)
    for start, stop in parts:
        ops.token_stats_backward_tile(
            logits[:, start:stop], *grads, labels, *saved, start, vocab, -100, temperature
        )  # in place
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("dtype", F.DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_tile_as_numerators(dtype, temperature):
    """-e^(l - m) / temperature; 0 for the label and, whatever it holds, in a row that is ignored."""
    logits = torch.randn(3, 600, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = -((logits.double() - logits.double().amax(1, keepdim=True)) / temperature).exp() / temperature
    labels = torch.tensor([0, -100, 599])
    logits[1], expected[1], expected[0, 0], expected[2, 599] = math.nan, 0.0, 0.0, 0.0
    state = torch.zeros(4, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    state[0] = torch.finfo(state.dtype).min
    ops.token_stats_tile(state, logits, labels, 0, 600, -100, temperature, True)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=tolerance)
