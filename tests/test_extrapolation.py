"""The extrapolated reference: the formula, of values and of parameters."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mallowspo import functional as F
from mallowspo.accelerated import extrapolate_parameters_, extrapolated

alphas = st.floats(0, 0.99)
tables = st.lists(st.floats(-20, 0), min_size=6, max_size=6)


def test_worked_example():
    """Three tokens a response, alpha 1/2. pi_hat_t gives the chosen one -1 -2 -1 = -4 and pi_hat_{t-1} -2 -2 -2 = -6:
    the reference is 1.5 * -4 + 0.5 * 6 = -3. The rejected one: -2 and -1 give -2.5. A policy at -1 and -4.5 has the
    margin (-1 + 3) - (-4.5 + 2.5) = 4, times beta 1/4 is 1."""
    current = torch.tensor([[-1.0, -2.0, -1.0], [-1.0, -0.5, -0.5]]).sum(1)
    previous = torch.tensor([[-2.0, -2.0, -2.0], [-0.5, -0.25, -0.25]]).sum(1)
    ref = extrapolated(current, previous, 0.5)
    assert ref.tolist() == [-3.0, -2.5]
    policy = torch.tensor([-1.0, -4.5])
    loss = F.preference_loss(*policy[:, None], *ref[:, None], link="bradley-terry", beta=0.25).losses
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)


def test_worked_example_of_the_rounds():
    """Each round adds 1 to the log-odds of the best answer over its reference. With alpha 1/2: pi_hat 1, extrapolated
    1.5; 2.5, extrapolated 3.25; 4.25. The steps of pi_hat, 1, 1.5, 1.75, tend to 1 / (1 - alpha) = 2."""
    previous, current, found = 0.0, 0.0, []
    for _ in range(3):
        previous, current = current, extrapolated(current, previous, 0.5) + 1
        found.append(current)
    assert found == [1.0, 2.5, 4.25]


@given(tables, tables, alphas)
def test_it_is_the_formula_and_its_corners_are_exact(current, previous, alpha):
    current, previous = torch.tensor(current), torch.tensor(previous)
    expected = [(1 + alpha) * c - alpha * p for c, p in zip(current.tolist(), previous.tolist(), strict=True)]
    assert extrapolated(current, previous, alpha).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert torch.equal(extrapolated(current, previous, 0), current)
    losses = []
    for ref in (extrapolated(current, previous, 0), current):  # the loss at alpha 0, and iterative DPO's
        policy = previous.clone().requires_grad_()
        loss = F.preference_loss(*policy.chunk(2), *ref.chunk(2), link="bradley-terry", beta=0.1).losses
        losses.append((loss.detach(), *torch.autograd.grad(loss.sum(), policy)))
    assert all(map(torch.equal, *losses))
    assert torch.equal(extrapolated(current, current, alpha), current)


@given(tables, tables, tables, alphas)
def test_the_normaliser_cancels_in_values_and_gradients(policy, current, previous, alpha):
    """As a reference it is the normalised extrapolated policy, computed here from probabilities in NumPy."""
    current, previous = (np.array(t) - np.log(np.exp(t).sum()) for t in (current, previous))
    weights = np.exp(current) * (np.exp(current) / np.exp(previous)) ** alpha
    exact = torch.tensor(np.log(weights / weights.sum()))
    ref = extrapolated(torch.tensor(current), torch.tensor(previous), alpha)
    results = []
    for table in (ref, exact):
        logps = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
        sides = (values[half] for values in (logps, table) for half in (slice(0, 3), slice(3, 6)))
        loss = F.preference_loss(*sides, link="bradley-terry", beta=0.5).losses
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), logps)[0]))
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)


@given(tables, tables, alphas)
def test_a_table_of_logits_is_extrapolated_exactly_by_its_parameters(current, previous, alpha):
    models = [torch.nn.ParameterList([torch.tensor(logits, dtype=torch.float64)]) for logits in (current, previous)]
    logps = [model[0].detach().log_softmax(-1) for model in models]
    expected = extrapolated(*logps, alpha).log_softmax(-1)
    extrapolate_parameters_(*models, alpha)
    torch.testing.assert_close(models[0][0].detach().log_softmax(-1), expected, rtol=1e-9, atol=1e-9)


def test_models_of_different_sizes_are_not_extrapolated():
    models = [torch.nn.ParameterList([torch.zeros(2)] * count) for count in (2, 1)]
    with pytest.raises(ValueError, match="zip"):
        extrapolate_parameters_(*models, 0.3)


@pytest.mark.parametrize("alpha", [-0.1, 1.0, math.nan])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\)"):
        extrapolated(torch.zeros(1), torch.zeros(1), alpha)
