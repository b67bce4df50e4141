"""mallows_log_prob against 50-digit arithmetic and the oracle, at its extremes, and in its shapes."""

import math

import pytest
import strategies
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mallows_truth import exact_log_losing, exact_smoothed_g
from mpmath import mp

from mallowspo import functional as F
from mallowspo import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Units in the last place. All arithmetic is in float64, where exp, log and a ten-term sum leave ten roundings; float32
# is that result rounded once, half a unit. Below 1e-300 a factor of the result may be subnormal, with fewer digits.
ULPS = {torch.float32: 0.5001, torch.float64: 10.0}
TINY = {torch.float32: 2.0**-150, torch.float64: 1e-300}
accurate = pytest.mark.parametrize("dtype", ULPS)


def with_gradients(margin, dispersion, **options):
    """[log g, d/d margin, d/d dispersion] as float64 tensors."""
    margin, dispersion = (x.detach().requires_grad_() for x in torch.broadcast_tensors(margin, dispersion))
    value = F.mallows_log_prob(margin, dispersion, **options)
    return [x.detach().double() for x in (value, *torch.autograd.grad(value.sum(), (margin, dispersion)))]


def log_uniform(generator, count, low, high, dtype):
    """With all digits of the dtype: products of shorter numbers would be exact and hide their rounding."""
    x = torch.rand(count, generator=generator, dtype=torch.float64)
    return (math.log(low) + x * (math.log(high) - math.log(low))).exp().clamp(low, high).to(dtype)


def assert_within_ulps(value, exact, dtype):
    bits = 1 - round(math.log2(torch.finfo(dtype).eps))
    ulp = mp.ldexp(1, mp.frexp(abs(exact))[1] - bits)
    assert abs(mp.mpf(value) - exact) <= ULPS[dtype] * ulp + TINY[dtype], (value, exact)


@accurate
@pytest.mark.parametrize("low, high", [(1.0, 1e4), (1.0, 50.0), (1e-12, 1.0)])
def test_the_definition_in_50_digits(dtype, low, high):
    generator = torch.Generator().manual_seed(0)
    margin = log_uniform(generator, 400, low, high, dtype) * (torch.randint(2, (400,), generator=generator) * 2 - 1)
    dispersion = log_uniform(generator, 400, 1e-6, 1e3, dtype)
    smoothing = 0.0 if low < 1 else 1.0
    values = F.mallows_log_prob(margin, dispersion, smoothing=smoothing)
    with mp.workdps(50):
        for value, z, a in zip(values.tolist(), margin.tolist(), dispersion.tolist(), strict=True):
            losing = exact_log_losing(mp.mpf(abs(z)), mp.mpf(a))
            assert_within_ulps(value, losing if z < 0 else mp.log1p(-mp.exp(losing)), dtype)


@accurate
@pytest.mark.parametrize("smoothing", [0.25, 1.0, 2.0])
def test_the_smoothed_part_in_50_digits(dtype, smoothing):
    generator = torch.Generator().manual_seed(0)
    margin = (torch.rand(100, generator=generator, dtype=dtype) * 2 - 1) * smoothing
    margin[:3] = torch.tensor([0.0, 1 - 2**-20, 2**-20 - 1], dtype=dtype) * smoothing
    dispersion = log_uniform(generator, 100, 1e-6, 1e3, dtype)
    values = F.mallows_log_prob(margin, dispersion, smoothing=smoothing)
    with mp.workdps(100):  # 50 for the result, 50 for what the definition loses by cancellation
        for value, z, a in zip(values.tolist(), margin.tolist(), dispersion.tolist(), strict=True):
            assert_within_ulps(value, mp.log(exact_smoothed_g(mp.mpf(z), mp.mpf(a), smoothing)), dtype)


@settings(max_examples=300)
@given(
    z=strategies.margins(),
    a=strategies.dispersions(),
    smoothing=strategies.smoothings,
    dtype=st.sampled_from(DTYPES),
)
@example(z=1e4, a=0.0625, smoothing=1.0, dtype=torch.float64)
@example(z=-1e4, a=1e3, smoothing=1.0, dtype=torch.float32)
def test_value_and_gradients_against_the_oracle(z, a, smoothing, dtype):
    margin, dispersion = torch.tensor(z).to(dtype), torch.tensor(a).to(dtype)
    exact = reference.mallows_log_prob(margin.item(), dispersion.item(), smoothing)
    results = with_gradients(margin, dispersion, smoothing=smoothing)
    for i, (actual, right) in enumerate(zip(results, exact, strict=True)):
        finfo = torch.finfo(torch.float32 if i == 0 and dtype != torch.float64 else dtype)  # gradients: the inputs'
        if abs(right) > finfo.max:
            continue  # float16 cannot hold it
        tolerance = (10 if dtype == torch.float64 else 1) * finfo.eps
        assert actual.item() == pytest.approx(right, rel=tolerance, abs=max(1e-300, finfo.tiny * finfo.eps))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 1.0, 2.0])
def test_no_dispersion_gives_one_half_everywhere(dtype, smoothing):
    margin = torch.tensor([-1e4, -1.0, -0.5, 0.0, 0.5, 1.0, 1e4], dtype=dtype)
    value, d_margin, d_dispersion = with_gradients(margin, torch.zeros((), dtype=dtype), smoothing=smoothing)
    half = torch.tensor(math.log(0.5), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    assert (value == half.double()).all() and not d_margin.any()
    exact = [reference.mallows_log_prob(z, 0.0, smoothing)[2] for z in margin.tolist()]
    assert d_dispersion.tolist() == pytest.approx(exact, rel=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype, huge", [(torch.float32, 1e30), (torch.float64, 1e300), (torch.float64, 1.7e308)])
@pytest.mark.parametrize("smoothing", [0.0, 1.0, 2.0, 1e10])
def test_finite_for_finite_arguments(dtype, huge, smoothing):
    sizes = torch.tensor([0.0, torch.finfo(dtype).tiny, 1e-12, 0.5, 1.0, 1.5, 745.0, 1e18, huge], dtype=dtype)
    margin = torch.cat([-sizes, sizes]).unsqueeze(-1)
    for result in with_gradients(margin, sizes, smoothing=smoothing):
        assert result.isfinite().all()
    assert (F.mallows_log_prob(margin, sizes, smoothing=smoothing) <= 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_nan_stays_nan(smoothing):
    nan, number = torch.tensor(math.nan), torch.tensor(0.5)
    assert F.mallows_log_prob(nan, number, smoothing=smoothing).isnan()


@accurate
@pytest.mark.parametrize("smoothing", [0.0, 0.25, 1.0])
def test_increases_with_the_margin(dtype, smoothing):
    margin = torch.linspace(-40, 40, 2561, dtype=dtype)  # multiples of 1/32
    dispersion = log_uniform(torch.Generator().manual_seed(0), 20, 1e-3, 1e2, dtype).unsqueeze(-1)
    value, d_margin, _ = with_gradients(margin, dispersion, smoothing=smoothing)
    steps = value.diff(dim=-1)
    assert (steps >= 0).all() and (d_margin >= 0).all()
    losing = margin[1:] <= 0  # on the winning side both sides of a step may round to 0
    assert (steps[:, losing] > 0).all() and (d_margin[:, :-1][:, losing] > 0).all()


@settings(max_examples=100)
@given(z=strategies.margins(50), a=strategies.dispersions(1e-3, 10), smoothing=strategies.smoothings)
def test_both_sides_sum_to_one(z, a, smoothing):
    margin = torch.tensor([z, -z], dtype=torch.float64)
    total = F.mallows_log_prob(margin, a, smoothing=smoothing).exp().sum().item()
    assert total == pytest.approx(1, rel=1e-14)


def test_one_rank_apart_is_one_over_one_plus_phi():
    phi = torch.tensor([1e-6, 0.1, 0.5, 0.9, 1 - 1e-6], dtype=torch.float64)
    torch.testing.assert_close(F.mallows_log_prob(1.0, -phi.log()), -phi.log1p(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 1.0])
def test_gradcheck(smoothing):
    margin = torch.tensor([-30.0, -1.7, -0.9, -0.3, 0.2, 0.8, 1.3, 20.0], dtype=torch.float64, requires_grad=True)
    dispersion = torch.tensor([[0.01], [0.7], [5.0]], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda z, a: F.mallows_log_prob(z, a, smoothing=smoothing), (margin, dispersion))


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_broadcasting_and_its_gradients():
    generator = torch.Generator().manual_seed(0)
    margin = torch.randn(3, 1, 4, generator=generator, requires_grad=True)
    dispersion = torch.rand(5, 1, generator=generator, requires_grad=True)
    value = F.mallows_log_prob(margin, dispersion)
    assert value.shape == (3, 5, 4)
    on_margin, on_dispersion = torch.autograd.grad(value.sum(), (margin, dispersion))
    each, on_each_margin, on_each_dispersion = with_gradients(margin.expand(3, 5, 4), dispersion.expand(3, 5, 4))
    assert torch.equal(value.double(), each)
    torch.testing.assert_close(on_margin.double(), on_each_margin.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        on_dispersion.double(), on_each_dispersion.sum((0, 2)).unsqueeze(-1), rtol=1e-5, atol=1e-6
    )


@accurate
def test_numbers_beside_tensors(dtype):
    tensor = torch.tensor([0.5, 3.0], dtype=dtype)
    expected = F.mallows_log_prob(tensor, torch.full_like(tensor, 0.7))
    assert torch.equal(F.mallows_log_prob(tensor, 0.7), expected) and expected.dtype == dtype
    expected = F.mallows_log_prob(torch.full_like(tensor, -2.0), tensor)
    assert torch.equal(F.mallows_log_prob(-2, tensor), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
def test_empty_and_scalar_tensors(dtype, shape):
    value, *gradients = with_gradients(torch.ones(shape, dtype=dtype), torch.ones(shape, dtype=dtype))
    assert value.shape == shape and all(g.shape == shape for g in gradients)
    assert F.mallows_log_prob(torch.ones(shape, dtype=dtype), 1.0).dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )


def test_only_the_gradient_that_is_needed():
    margin, dispersion = torch.tensor([2.0], requires_grad=True), torch.tensor([1.0])
    F.mallows_log_prob(margin, dispersion).sum().backward()
    assert margin.grad.item() > 0 and dispersion.grad is None
    margin, dispersion = torch.tensor([2.0]), torch.tensor([1.0], requires_grad=True)
    F.mallows_log_prob(margin, dispersion).sum().backward()
    assert dispersion.grad.item() > 0 and margin.grad is None
