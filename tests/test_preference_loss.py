"""preference_loss and neg_log_dispersion against the oracle, closed forms and the identities behind their options."""

import itertools
import math

import pytest
import strategies
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mallows_truth import exact_link
from mpmath import mp

from mallowspo import functional as F
from mallowspo import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = st.sampled_from(DTYPES)
SMOOTHINGS = [(0.0, False), (0.1, False), (0.3, True)]
label_smoothings = pytest.mark.parametrize("label_smoothing, robust", SMOOTHINGS)
all_links = pytest.mark.parametrize("link", reference.TORCH_LINKS)


def result_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_pairs(count=50, scale=20.0, seed=0, dtype=torch.float64):
    """Chosen, rejected, their references, and the neg-log dispersion: five tensors [count]."""
    generator = torch.Generator().manual_seed(seed)
    logps = -torch.rand(4, count, generator=generator, dtype=torch.float64) * scale
    dispersion = 0.05 + 2 * torch.rand(count, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (*logps, dispersion)]


def loss_of(tensors, link, **options):
    *logps, dispersion = tensors
    dispersion = dispersion if link in reference.DISPERSION_LINKS else None
    return F.preference_loss(*logps, neg_log_dispersion=dispersion, link=link, **options)


def with_gradients(tensors, link, **options):
    """PreferenceLoss and the gradients of the summed losses in the five tensors, zeros for one that is not used."""
    tensors = [None if x is None else x.detach().requires_grad_() for x in tensors]
    result = loss_of(tensors, link, **options)
    given = [x for x in tensors if x is not None]
    gradients = torch.autograd.grad(result.losses.sum(), given, allow_unused=True, materialize_grads=True)
    return result, gradients


def exact_likelihood(link, z, a):
    """Log-likelihood, and its derivatives in z and in a, at the set precision."""
    if link == "mallows-phi":
        return exact_link(z, a, 1.0)
    factor = 2 * a if link in reference.DISPERSION_LINKS else mp.mpf(1)
    x, in_a = factor * z, (2 * z if link in reference.DISPERSION_LINKS else 0)
    if link in ("bradley-terry", "mallows-theta"):
        value, slope = -mp.log1p(mp.exp(-x)), 1 / (1 + mp.exp(x))
    elif link in ("ipo", "mallows-ipo"):
        value, slope = -((x - 0.5) ** 2), 1 - 2 * x
    else:
        value, slope = min(x - 1, mp.mpf(0)), mp.mpf(x < 1)
    return value, factor * slope, in_a * slope


CANCELLING = {"beta": 0.01, "gamma": 0.3, "label_smoothing": 0.0, "robust": False, "smoothing": 0.25}


@settings(max_examples=400)
@example(strategies.Pair(-2.0, -32.0, -2.0, -32.0, 1.0), "mallows-theta", CANCELLING, torch.float32, False)
@given(
    pair=strategies.pairs(strategies.dispersions(1e-6, 100.0)),
    link=strategies.links,
    options=strategies.loss_options,
    dtype=dtypes,
    with_reference=st.booleans(),
)
def test_losses_rewards_and_gradients_against_the_oracle(pair, link, options, dtype, with_reference):
    tensors = [torch.tensor([x]).to(dtype) for x in pair]
    if not with_reference:
        tensors[2:4] = None, None
    result, gradients = with_gradients(tensors, link, **options)
    assert all(x.dtype == result_dtype(dtype) and x.shape == (1,) for x in result)
    assert all(x.dtype == dtype and x.shape == (1,) for x in gradients)

    *logps, a = (0.0 if x is None else x.item() for x in tensors)
    exact = reference.preference_loss(*logps, neg_log_dispersion=a, link=link, **options)
    # Both compute in float64, but the oracle rounds its margin, which e^-margin turns into units in the last place.
    # Robust smoothing subtracts two likelihoods, each as large as this:
    eps, z = options["label_smoothing"], options["beta"] * ((logps[0] - logps[2]) - (logps[1] - logps[3]))
    sizes = [
        [abs(x) for x in reference.log_likelihood(link, sign * (z - options["gamma"]), a, options["smoothing"])]
        for sign in (1, -1)
    ]
    value, slope, slope_a = ((win + (lose if eps else 0)) / (1 - 2 * eps) for win, lose in zip(*sizes, strict=True))
    z_rounded = (
        2 * abs(z - options["gamma"]) * {"bradley-terry": 1, "mallows-theta": 2 * a, "mallows-phi": a}.get(link, 1)
    )
    double, results, storage = (torch.finfo(x) for x in (torch.float64, result_dtype(dtype), dtype))

    def assert_close(actual, right, size, finfo, lost=0.0):
        if abs(right) <= finfo.max:  # float16 cannot hold every gradient
            rounding = (finfo.eps / 2 + double.eps) * abs(right) + finfo.tiny * finfo.eps
            assert abs(actual.item() - right) <= (20 + z_rounded) * double.eps * size + rounding + lost + 1e-300

    assert_close(result.losses, exact.loss, value, results)
    assert_close(result.chosen_rewards, exact.chosen_reward, 0, results)
    assert_close(result.rejected_rewards, exact.rejected_reward, 0, results)
    on_logps = exact.grad_chosen, exact.grad_rejected, -exact.grad_chosen, -exact.grad_rejected
    for actual, right in zip(gradients[:-1], on_logps, strict=False):
        assert_close(actual, right, options["beta"] * slope, storage)
    # 2 z sigmoid(-2 a z): of beta h and gamma, where they cancel, the oracle keeps what their own rounding leaves.
    lost = 4 * double.eps * abs(options["gamma"])
    assert_close(gradients[-1], exact.grad_neg_log_dispersion, slope_a, storage, lost)


@all_links
@label_smoothings
def test_gradcheck(link, label_smoothing, robust):
    tensors = random_pairs(6)
    gamma = 0.0 if robust else 0.2
    z = 0.3 * ((tensors[0] - tensors[2]) - (tensors[1] - tensors[3])) - gamma
    assert all((abs(abs(x) - 1) > 1e-3).all() for x in (z, 2 * tensors[4] * z))  # away from the kinks of the hinge
    used = tensors if link in reference.DISPERSION_LINKS else tensors[:4]

    def losses(*tensors):
        options = {"beta": 0.3, "gamma": gamma, "label_smoothing": label_smoothing, "robust": robust}
        return loss_of([*tensors, None][:5], link, **options).losses

    torch.autograd.gradcheck(losses, [x.requires_grad_() for x in used])


@pytest.mark.parametrize("dtype", DTYPES)
@all_links
def test_a_batch_is_its_pairs(dtype, link):
    tensors = [x.reshape(2, 3).T for x in random_pairs(6, dtype=dtype)]  # not contiguous
    result, gradients = with_gradients(tensors, link)
    assert all(x.shape == (3, 2) for x in (*result, *gradients))
    for i, j in itertools.product(range(3), range(2)):
        single, single_gradients = with_gradients([x[i, j] for x in tensors], link)
        pairs = zip((*result, *gradients), (*single, *single_gradients), strict=True)
        assert all(one.shape == () and torch.equal(whole[i, j], one) for whole, one in pairs)


@all_links
def test_threads_change_no_bit(link):
    tensors, before, results = random_pairs(2000, dtype=torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            result, gradients = with_gradients(tensors, link)
            results.append([*result, *gradients])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@all_links
def test_no_pairs(dtype, link):
    result, gradients = with_gradients([x[:0] for x in random_pairs(3, dtype=dtype)], link)
    assert all(x.shape == (0,) for x in (*result, *gradients))


@all_links
def test_fifty_digits_given_the_log_ratio(link):
    """Loss and derivatives in float64 to 4 units in the last place, the rounding of beta h - gamma among them."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.rand(4, 200, generator=generator, dtype=torch.float64)
    h, a = (unit[0] * 1600 - 800) * 10 ** -(3 * unit[1]), (-3 + 4 * unit[2]).exp()
    beta, gamma = 0.37, 0.3
    h[::4] = (gamma + {"ipo": 0.5, "hinge": 1}.get(link, 0) + 1e-6 * unit[3, ::4]) / beta  # about the place of no loss
    tensors = [h, *torch.zeros(3, 200, dtype=torch.float64), a]
    result, (d_margin, *_, d_dispersion) = with_gradients(tensors, link, beta=beta, gamma=gamma)
    results = torch.stack([result.losses.detach(), d_margin, d_dispersion], dim=-1).tolist()
    for h_i, a_i, actuals in zip(h.tolist(), a.tolist(), results, strict=True):
        with mp.workdps(100):
            value, slope, slope_a = exact_likelihood(link, mp.mpf(beta) * mp.mpf(h_i) - mp.mpf(gamma), mp.mpf(a_i))
            for actual, right in zip(actuals, (-value, -mp.mpf(beta) * slope, -slope_a), strict=True):
                ulp = mp.ldexp(1, mp.frexp(abs(right))[1] - 53)
                assert abs(mp.mpf(actual) - right) <= 4 * ulp + 1e-300, (h_i, a_i, actual, right)


# --- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("link", ["bradley-terry", "mallows-theta", "mallows-phi"])
@label_smoothings
def test_the_first_step_costs_log_two(dtype, link, label_smoothing, robust):
    chosen, rejected, _, _, dispersion = random_pairs(dtype=dtype)
    tensors = chosen, rejected, chosen, rejected, dispersion
    result, (on_chosen, *_) = with_gradients(tensors, link, label_smoothing=label_smoothing, robust=robust)
    expected = torch.full_like(result.losses, math.log(2))
    torch.testing.assert_close(result.losses, expected, rtol=torch.finfo(expected.dtype).eps, atol=0)
    assert not result.chosen_rewards.any() and not result.rejected_rewards.any()
    assert (on_chosen < 0).all()
    if link == "bradley-terry":
        share = 1 / (1 - 2 * label_smoothing) if robust else 1 - 2 * label_smoothing
        torch.testing.assert_close(on_chosen, torch.full_like(on_chosen, -0.05 * share))


@pytest.mark.parametrize("dtype", DTYPES)
@label_smoothings
@pytest.mark.parametrize("host", ["bradley-terry", "ipo", "hinge"])
def test_one_half_makes_a_plug_in_its_host(dtype, label_smoothing, robust, host):
    """At a = 1/2 the factor 2 a is 1, to the bit: mallows-theta is DPO."""
    tensors = random_pairs(dtype=dtype)
    tensors[4] = torch.full_like(tensors[4], 0.5)
    link = {"bradley-terry": "mallows-theta", "ipo": "mallows-ipo", "hinge": "mallows-hinge"}[host]
    options = {"label_smoothing": label_smoothing, "robust": robust, "gamma": 0.0 if robust else 0.1}
    mallows, plain = (with_gradients(tensors, name, **options) for name in (link, host))
    for one, two in zip((*mallows[0], *mallows[1][:4]), (*plain[0], *plain[1][:4]), strict=True):
        assert torch.equal(one, two)
    assert mallows[1][4].any() and not plain[1][4].any()


def test_dpo_is_logsigmoid_and_the_paper_s_weights():
    tensors = random_pairs()
    chosen, rejected, ref_chosen, ref_rejected, dispersion = tensors
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    for link, z in (("bradley-terry", 0.1 * h), ("mallows-theta", 2 * dispersion * 0.1 * h)):
        expected = -torch.nn.functional.logsigmoid(z)
        torch.testing.assert_close(loss_of(tensors, link).losses, expected, rtol=1e-14, atol=0)


@all_links
def test_conservative_smoothing_mixes_with_the_flipped_pair(link):
    tensors = random_pairs()
    flipped = [tensors[i] for i in (1, 0, 3, 2, 4)]
    options = {"beta": 0.2, "gamma": 0.3}
    smooth = loss_of(tensors, link, **options, label_smoothing=0.2).losses
    kept, swapped = loss_of(tensors, link, **options), loss_of(flipped, link, **options | {"gamma": -0.3})
    torch.testing.assert_close(smooth, 0.8 * kept.losses + 0.2 * swapped.losses, rtol=1e-14, atol=0)


@all_links
def test_robust_smoothing_is_unbiased(link):
    """If a label is flipped with the assumed probability, the loss is the clean one on average."""
    tensors = random_pairs()
    flipped = [tensors[i] for i in (1, 0, 3, 2, 4)]
    robust = {"beta": 0.2, "label_smoothing": 0.3, "robust": True}
    clean = loss_of(tensors, link, beta=0.2).losses
    average = 0.7 * loss_of(tensors, link, **robust).losses + 0.3 * loss_of(flipped, link, **robust).losses
    torch.testing.assert_close(average, clean, rtol=1e-12, atol=1e-12)


def test_mallows_phi_is_the_link():
    tensors = random_pairs(scale=100.0)
    chosen, rejected, ref_chosen, ref_rejected, dispersion = tensors
    z = 0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected)) - 0.4
    for smoothing in (0.0, 1.0, 2.0):
        expected = -F.mallows_log_prob(z, dispersion, smoothing=smoothing)
        losses = loss_of(tensors, "mallows-phi", gamma=0.4, smoothing=smoothing).losses
        torch.testing.assert_close(losses, expected, rtol=1e-14, atol=0)
    assert (z.abs() < 1).any() and (z.abs() > 2).any()


@all_links
def test_each_side_pulls_its_own_way(link):
    """Where the pair is not yet won, a more likely chosen response costs less and a more likely rejected one more."""
    losing = [torch.sort(x)[0] for x in random_pairs()]
    losing[0], losing[1] = losing[0] - 30, losing[1] + 30
    _, (on_chosen, on_rejected, on_ref_chosen, on_ref_rejected, _) = with_gradients(losing, link)
    assert (on_chosen < 0).all() and (on_rejected > 0).all()
    assert torch.equal(on_rejected, -on_chosen)
    assert torch.equal(on_ref_chosen, -on_chosen) and torch.equal(on_ref_rejected, on_chosen)


@all_links
def test_rewards_are_detached_log_ratios(link):
    tensors = [x.requires_grad_() for x in random_pairs()]
    chosen, rejected, ref_chosen, ref_rejected, dispersion = tensors
    result = loss_of(tensors, link, beta=0.7)
    assert result.losses.requires_grad
    assert not result.chosen_rewards.requires_grad and not result.rejected_rewards.requires_grad
    torch.testing.assert_close(result.chosen_rewards, (0.7 * (chosen - ref_chosen)).detach())
    torch.testing.assert_close(result.rejected_rewards, (0.7 * (rejected - ref_rejected)).detach())
    without = loss_of((chosen, rejected, None, None, dispersion), link, beta=0.7)
    torch.testing.assert_close(without.chosen_rewards, (0.7 * chosen).detach())
    torch.testing.assert_close(without.rejected_rewards, (0.7 * rejected).detach())


def test_no_reference_is_a_reference_of_zero():
    chosen, rejected, _, _, dispersion = random_pairs()
    zero = torch.zeros_like(chosen)
    for link in reference.TORCH_LINKS:
        without, with_zero = (loss_of((chosen, rejected, *r, dispersion), link) for r in ((None, None), (zero, zero)))
        assert all(torch.equal(one, two) for one, two in zip(without, with_zero, strict=True))


def test_only_the_gradients_that_are_needed():
    tensors = random_pairs()
    tensors[1].requires_grad_()
    loss_of(tensors, "mallows-theta").losses.sum().backward()
    assert [x.grad is None for x in tensors] == [True, False, True, True, True]


@pytest.mark.parametrize("dtype", DTYPES)
@all_links
def test_an_impossible_rejected_response(dtype, link):
    """Through a masked token it has log-probability -inf: a certain win for every link but the squared ones."""
    chosen, dispersion = torch.tensor([-3.0], dtype=dtype), torch.tensor([0.7], dtype=dtype)
    rejected = torch.full_like(chosen, -math.inf)
    losses = loss_of((chosen, rejected, None, None, dispersion), link).losses
    assert losses.item() == (math.inf if "ipo" in link else 0.0)


def test_what_no_float_can_hold_is_the_largest_one():
    """A gradient that is infinite would be NaN times the 0 of a pair that is left out."""
    tensors = [torch.tensor([x]) for x in (3e38, -3e38)] + [None, None, torch.ones(1)]
    _, gradients = with_gradients(tensors, "mallows-ipo", beta=10.0)
    assert [x.item() for x in gradients] == [(-1) ** i * torch.finfo(torch.float32).max for i in range(3)]
    chosen, rejected, a = (torch.tensor([x], dtype=torch.float64) for x in (-1e305, 0.0, 1e4))
    tensors = chosen, rejected, None, None, a
    result, _ = with_gradients(tensors, "mallows-phi", beta=1.0)
    assert result.losses.item() == torch.finfo(torch.float64).max


# --- neg_log_dispersion ----------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    entropies=st.tuples(*[st.floats(0, 20).map(strategies.to_float32)] * 2),
    outcomes=st.integers(2, 10**6),
    scale=st.floats(0.01, 10),
    dtype=dtypes,
)
def test_neg_log_dispersion_against_the_oracle(entropies, outcomes, scale, dtype):
    chosen, rejected = (torch.tensor([x]).to(dtype) for x in entropies)
    actual = F.neg_log_dispersion(chosen, rejected, outcomes, scale=scale)
    right = reference.neg_log_dispersion(chosen.item(), rejected.item(), outcomes, scale)
    eps = torch.finfo(result_dtype(dtype)).eps
    assert actual.dtype == result_dtype(dtype) and actual.item() > 0
    assert abs(actual.item() - right) <= 4 * eps * (scale + right)  # the argument of the logarithm has three roundings


@pytest.mark.parametrize("dtype", DTYPES)
def test_neg_log_dispersion_is_clamped_away_from_zero_and_infinity(dtype):
    nothing, everything = torch.zeros(1, dtype=dtype), torch.full((1,), 20.0, dtype=dtype)
    assert F.neg_log_dispersion(nothing, nothing, 50).item() == pytest.approx(-math.log(1e-6), rel=1e-6)
    assert F.neg_log_dispersion(everything, everything, 50).item() == pytest.approx(1e-6, rel=0.05)
