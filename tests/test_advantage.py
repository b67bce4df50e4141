"""Losses on advantages against plain Python, by hand, and by what minimises them."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mallowspo.advantage import advantage_loss, advantage_weights, expectile_loss

numbers = st.lists(st.floats(-5, 5), min_size=3, max_size=3)
temperatures = st.floats(0.05, 10)
expectiles = st.floats(0.05, 0.95)


def double(values, **options):
    return torch.tensor(values, dtype=torch.float64, **options)


def test_worked_example_of_apa():
    """Three tokens, lambda 1/2: log-ratios 1, 0, -1 and advantages 1/2, 0, 1, which ask for 1, 0 and 2."""
    logps = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    loss = advantage_loss(logps, torch.tensor([-2.0, -2.0, -3.0]), torch.tensor([0.5, 0.0, 1.0]), temperature=0.5)
    assert loss.tolist() == [0.0, 0.0, 9.0]
    assert torch.autograd.grad(loss.sum(), logps)[0].tolist() == [0.0, 0.0, -6.0]


@given(numbers, numbers, numbers, temperatures)
def test_apa_is_the_formula(logps, refs, advantages, temperature):
    tensors = [double(x, requires_grad=True) for x in (logps, refs, advantages)]
    loss = advantage_loss(*tensors, temperature=temperature)
    rows = list(zip(logps, refs, advantages, strict=True))
    assert loss.tolist() == pytest.approx([(p - a / temperature - r) ** 2 for p, r, a in rows], abs=1e-9)
    gradients = torch.autograd.grad(loss.sum(), tensors, allow_unused=True)
    assert gradients[0].tolist() == pytest.approx([2 * (p - a / temperature - r) for p, r, a in rows], abs=1e-9)
    assert gradients[1:] == (None, None)


@given(numbers, numbers, temperatures)
def test_apa_rests_at_its_target_and_pulls_a_better_action_up(refs, advantages, temperature):
    refs, advantages = double(refs), double(advantages)
    logps = (refs + advantages / temperature).requires_grad_()
    loss = advantage_loss(logps, refs, advantages, temperature=temperature)
    assert torch.autograd.grad(loss.sum(), logps)[0].abs().max() < 1e-9
    start = refs.clone().requires_grad_()  # a step against the gradient raises what has an advantage, and only that
    step = -torch.autograd.grad(advantage_loss(start, refs, advantages, temperature=temperature).sum(), start)[0]
    assert torch.equal(step.sign(), (advantages / temperature).sign())


def test_worked_example_of_the_weights():
    weights = advantage_weights(torch.tensor([0.0, math.log(2), -2 * math.log(2), 9.0]), temperature=1.0)
    assert weights.tolist() == pytest.approx([1.0, 2.0, 0.25, math.exp(3)], rel=1e-6)


@given(numbers, temperatures, st.floats(0.1, 5))
def test_weights_are_the_formula_capped_and_have_no_gradient(advantages, temperature, cap):
    given_ = double(advantages, requires_grad=True)
    weights = advantage_weights(given_, temperature=temperature, max_exponent=cap)
    assert weights.tolist() == pytest.approx([math.exp(min(a / temperature, cap)) for a in advantages])
    assert not weights.requires_grad and weights.max() <= math.exp(cap) * (1 + 1e-12)


def test_worked_example_of_the_expectile():
    """Two too low and one too high by 1 and 2: at tau 3/4 an underestimate costs three times an overestimate."""
    values = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
    loss = expectile_loss(values, torch.tensor([1.0, 2.0, -2.0]), expectile=0.75)
    assert loss.tolist() == [0.75, 3.0, 1.0]
    assert torch.autograd.grad(loss.sum(), values)[0].tolist() == [-1.5, -3.0, 1.0]


@given(numbers, numbers, expectiles)
def test_expectile_is_the_formula_and_at_half_the_squared_error(values, targets, tau):
    v, t = double(values, requires_grad=True), double(targets, requires_grad=True)
    errors = [t - v for v, t in zip(values, targets, strict=True)]
    loss = expectile_loss(v, t, expectile=tau)
    assert loss.tolist() == pytest.approx([abs(tau - (u < 0)) * u * u for u in errors], abs=1e-12)
    gradients = torch.autograd.grad(loss.sum(), (v, t), allow_unused=True)
    assert gradients[0].tolist() == pytest.approx([-2 * abs(tau - (u < 0)) * u for u in errors], abs=1e-12)
    assert gradients[1] is None
    assert expectile_loss(v, t, expectile=0.5).tolist() == pytest.approx([u * u / 2 for u in errors], abs=1e-12)


@given(numbers, expectiles)
def test_the_expectile_minimises_it(targets, tau):
    """Found by bisection on its definition: tau E(t - m)+ = (1 - tau) E(m - t)+."""
    assume(max(targets) - min(targets) > 0.1)
    low, high = min(targets), max(targets)
    for _ in range(100):
        middle = (low + high) / 2
        above = np.maximum(np.array(targets) - middle, 0).sum() * tau
        below = np.maximum(middle - np.array(targets), 0).sum() * (1 - tau)
        low, high = (middle, high) if above > below else (low, middle)
    value = double(low, requires_grad=True)
    loss = expectile_loss(value.expand(3), double(targets), expectile=tau).sum()
    assert abs(torch.autograd.grad(loss, value)[0]) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    x = torch.ones(2, dtype=dtype)
    for result in (advantage_loss(x, x, x), advantage_weights(x, temperature=1.0), expectile_loss(x, x)):
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


X = torch.zeros(2)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: advantage_loss(X, X, torch.zeros(3)), ValueError, r"shapes must agree.*advantages is \[3\]"),
        (lambda: advantage_loss(X, X, X.double()), TypeError, "cast to one dtype"),
        (lambda: advantage_loss(X, X, [0.0, 0.0]), TypeError, "advantages must be a torch.Tensor"),
        (lambda: advantage_loss(X, X, X, temperature=0), ValueError, "temperature must be finite and positive, got 0"),
        (lambda: advantage_weights(X, temperature=-1), ValueError, "temperature must be .* got -1"),
        (lambda: advantage_weights(X, temperature=1, max_exponent=math.inf), ValueError, "max_exponent .* got inf"),
        (lambda: expectile_loss(X, X, expectile=1.0), ValueError, r"expectile must be in \(0, 1\), got 1.0"),
        (lambda: expectile_loss(X, torch.zeros(1)), ValueError, "shapes must agree"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_it_needs_torch_alone():
    code = "import sys, mallowspo.advantage; print('transformers' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
