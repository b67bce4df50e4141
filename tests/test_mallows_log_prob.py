"""mallows_log_prob against 50-digit arithmetic and the oracle, at its extremes, and in its shapes."""

import math

import pytest
import strategies
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mallows_truth import exact_g, exact_link
from mpmath import mp

from mallowspo import functional as F
from mallowspo import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Units in the last place, of values and of gradients. The arithmetic for float64 is wider, that for float32 is double
# and rounded once, half a unit. Below the normal numbers, a few times the smallest one.
ULPS = {torch.float32: 0.5001, torch.float64: 4.0}
TINY = {torch.float32: 2.0**-150, torch.float64: 2.0**-1072}
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


def assert_within_ulps(value, exact, dtype, *case):
    bits = 1 - round(math.log2(torch.finfo(dtype).eps))
    ulp = mp.ldexp(1, mp.frexp(abs(exact))[1] - bits)
    assert abs(mp.mpf(value) - exact) <= ULPS[dtype] * ulp + TINY[dtype], (value, exact, *case)


def assert_exact(margin, dispersion, smoothing):
    """Value and both gradients against 50 digits of the definition and its numerical derivatives."""
    results = [x.tolist() for x in with_gradients(margin, dispersion, smoothing=smoothing)]
    for z, a, *actual in zip(margin.tolist(), dispersion.tolist(), *results, strict=True):
        # 50 for the result, 50 for what cancels, and inside those of e^-(a smoothing), which is added to 1
        with mp.workdps(100 + (int(0.44 * min(a * smoothing, 850)) if abs(z) < smoothing else 0)):
            exact = exact_link(mp.mpf(z), mp.mpf(a), smoothing)
        with mp.workdps(50):
            for name, value, right in zip(("value", "d_margin", "d_dispersion"), actual, exact, strict=True):
                assert_within_ulps(value, right, margin.dtype, name, z, a)


def signs(generator, count, dtype):
    return (torch.randint(2, (count,), generator=generator) * 2 - 1).to(dtype)


@accurate
@pytest.mark.parametrize("smoothing", [0.0, 0.25, 1.0, 2.0])
def test_fifty_digits(dtype, smoothing):
    generator = torch.Generator().manual_seed(int(4 * smoothing))
    margin = log_uniform(generator, 600, max(smoothing, 1e-12), 1e4, dtype) * signs(generator, 600, dtype)
    assert_exact(margin, log_uniform(generator, 600, 1e-6, 1e3, dtype), smoothing)


@accurate
@pytest.mark.parametrize("smoothing", [0.25, 1.0, 2.0, 0.7])
def test_fifty_digits_of_the_smoothed_part(dtype, smoothing):
    generator = torch.Generator().manual_seed(int(4 * smoothing))
    margin = (torch.rand(120, generator=generator, dtype=dtype) * 2 - 1) * smoothing
    margin[60:80] *= log_uniform(generator, 20, 1e-30, 1.0, dtype)
    below = torch.nextafter(torch.tensor(smoothing, dtype=dtype), torch.zeros((), dtype=dtype))
    gap = log_uniform(generator, 40, torch.finfo(dtype).eps, 1e-2, dtype)
    margin[80:] = ((1 - gap) * smoothing).clamp(max=below) * signs(generator, 40, dtype)
    margin[80:82] = torch.stack([below, -below])
    margin[82] = 0
    assert_exact(margin, log_uniform(generator, 120, 1e-6, 1e3, dtype), smoothing)


@accurate
@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_fifty_digits_where_the_arithmetic_changes(dtype, smoothing):
    """The limits of the domain, the branches in a and in u = a |z|, the underflow of q."""
    near = torch.tensor([1 - 4 * torch.finfo(dtype).eps, 1.0, 1 + 4 * torch.finfo(dtype).eps], dtype=torch.float64)
    sizes = torch.tensor([1e-12, smoothing or 0.5, 3.0, 1e4], dtype=torch.float64)
    dispersions = torch.cat([near * 2**-10, near * 2, torch.tensor([1e-6, 0.3, 700.0, 1e3])])
    far = torch.cartesian_prod(torch.tensor([1e8, 1e13, 1e18]).double(), torch.tensor([1e-6, 0.3, 700.0]).double())
    grid = torch.cat([torch.cartesian_prod(sizes, dispersions), far])  # the asymptote, from u = 1e20 on
    by_u = torch.cartesian_prod(torch.cat([near * 2**-12, near * 80, torch.tensor([500.0, 690, 720, 744])]), sizes[1:])
    by_u = torch.stack([by_u[:, 1], by_u[:, 0] / by_u[:, 1]], dim=-1)
    by_u = by_u[(by_u[:, 1] >= 1e-6) & (by_u[:, 1] <= 1e3)]
    margin, dispersion = (
        torch.cat([grid, -grid * torch.tensor([1, -1]), by_u, by_u * torch.tensor([-1, 1])]).to(dtype).T
    )
    assert_exact(margin, dispersion, smoothing)


@settings(max_examples=150)
@given(
    margin=st.floats(-1e4, 1e4).filter(lambda z: abs(z) >= 1e-30),
    dispersion=st.floats(math.log(1e-6), math.log(1e3)).map(math.exp),
    dtype=st.sampled_from(list(ULPS)),
)
@example(margin=-1e-30, dispersion=1e-6, dtype=torch.float64)
@example(margin=0.5, dispersion=1e-6, dtype=torch.float32)
def test_fifty_digits_anywhere(margin, dispersion, dtype):
    assert_exact(torch.tensor([margin]).to(dtype), torch.tensor([dispersion]).to(dtype), 0.0)


@accurate
def test_fifty_digits_of_the_slope_at_the_jump(dtype):
    dispersion = log_uniform(torch.Generator().manual_seed(0), 20, 1e-6, 1e3, dtype)
    value, slope, d_dispersion = with_gradients(torch.zeros((), dtype=dtype), dispersion, smoothing=0.0)
    half = torch.tensor(0.5, dtype=dtype).log().double()
    assert (value == half).all() and not d_dispersion.any()
    for actual, a in zip(slope.tolist(), dispersion.tolist(), strict=True):
        with mp.workdps(100):  # of the right-hand side, near enough to 0
            right = 2 * mp.diff(lambda z, a=a: exact_g(z, mp.mpf(a)), mp.mpf(10) ** -60, h=mp.mpf(10) ** -70)
        assert_within_ulps(actual, right, dtype, a)


@accurate
@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_an_infinite_margin_counts_as_the_largest_finite_one(dtype, smoothing):
    largest = torch.finfo(dtype).max
    infinite = torch.tensor([math.inf, -math.inf], dtype=dtype)
    results = torch.stack(with_gradients(infinite, torch.tensor(1.5, dtype=dtype), smoothing=smoothing), dim=-1)
    assert results.tolist() == [[0, 0, 0], [-largest, 1.5, -largest]]
    nothing = torch.stack(with_gradients(infinite, torch.zeros((), dtype=dtype), smoothing=smoothing))
    assert nothing[0].tolist() == [torch.tensor(0.5, dtype=dtype).log().item()] * 2 and not nothing[1].any()
    assert nothing.isfinite().all()


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
        tolerance = (4 if dtype == torch.float64 else 1) * finfo.eps
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


@accurate
@pytest.mark.parametrize("smoothing", [0.0, 1.0, 2.0, 1e10, 1e300])
def test_finite_for_finite_arguments(dtype, smoothing):
    limits = torch.finfo(dtype)
    steps = [0.0, limits.smallest_normal, 1e-30, 1e-12, 0.5, 1.0, 1.5, 745.0, 2e3, 1e10, 1e18, 1e20, 1e30]
    sizes = torch.tensor([*steps, limits.max**0.5, limits.max / 2, limits.max], dtype=dtype)
    margin = torch.cat([-sizes, sizes]).unsqueeze(-1)
    value, d_margin, d_dispersion = with_gradients(margin, sizes, smoothing=smoothing)
    assert value.isfinite().all() and d_margin.isfinite().all() and d_dispersion.isfinite().all()
    assert (value <= 0).all() and (d_margin >= 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_nan_stays_nan(smoothing):
    nan, number = torch.tensor(math.nan), torch.tensor(0.5)
    assert all(x.isnan() for x in with_gradients(nan, number, smoothing=smoothing))


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
