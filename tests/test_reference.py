"""The pure Python oracle against mpmath, closed forms and finite differences."""

import math

import pytest
import strategies
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from mallows_truth import exact_g, exact_log_losing, exact_smoothed_g
from mpmath import mp

from mallowspo import reference

few = settings(max_examples=40)
many = settings(max_examples=200)
moderate = strategies.pairs(strategies.dispersions(1e-2, 10.0))


def assert_close(actual, expected, rel=1e-13, tiny=1e-300):
    assert abs(mp.mpf(actual) - expected) <= rel * abs(expected) + tiny, (actual, expected)


def central_difference(f, x, h):
    return (f(x + h) - f(x - h)) / (2 * h)


# --- the Mallows link ------------------------------------------------------------------------------------------------


def assert_link_matches(z, a, smoothing, log_g):
    value, d_z, d_a = reference.mallows_log_prob(z, a, smoothing)
    z, a = mp.mpf(z), mp.mpf(a)
    assert_close(value, log_g(z, a))
    assert_close(d_z, mp.diff(lambda x: log_g(x, a), z))
    assert_close(d_a, mp.diff(lambda x: log_g(z, x), a))


@few
@given(z=strategies.margins(), a=strategies.dispersions())
@example(z=1e4, a=0.0625)
@example(z=-1e4, a=0.0625)
@example(z=1e-12, a=1e-6)
def test_raw_link_is_the_definition(z, a):
    assume(z != 0 and abs(z) > 1e-30)
    z = math.copysign(min(abs(z), 700 / a), z)
    with mp.workdps(50 + 8 * 6 + int(a * (abs(z) + 1))):  # enough digits for 1 - g ~ e^-(a z) and for small a z
        assert_link_matches(z, a, 0.0, lambda z, a: mp.log(exact_g(z, a)))


@settings(few, max_examples=20)
@given(
    x=st.floats(-0.999, 0.999).map(lambda x: round(x, 9)),
    a=strategies.dispersions(1e-6, 50),
    smoothing=st.sampled_from([0.25, 1.0, 2.0]),
)
@example(x=0.0, a=1e-6, smoothing=1.0)
def test_smoothed_link_is_the_cubic(x, a, smoothing):
    with mp.workdps(150):
        assert_link_matches(x * smoothing, a, smoothing, lambda z, a: mp.log(exact_smoothed_g(z, a, smoothing)))


@few
@given(r=strategies.margins().map(abs), a=strategies.dispersions(), smoothing=strategies.smoothings)
@example(r=1e4, a=1e3, smoothing=1.0)
@example(r=1e4, a=1e-6, smoothing=0.0)
def test_link_in_both_tails(r, a, smoothing):
    assume(r >= max(smoothing, 1e-30))
    with mp.workdps(150):
        # mpmath steps to both sides of r = |z|, so the tails are differentiated as functions of r
        lose, win = exact_log_losing, lambda r, a: mp.log1p(-mp.exp(exact_log_losing(r, a)))
        assert_link_matches(-r, a, smoothing, lambda z, a: lose(-z, a))
        assert_link_matches(r, a, smoothing, win)


def test_link_at_exactly_zero():
    a = 0.7
    log_half = math.log(0.5)
    for smoothing in (0.25, 1.0):
        value, d_z, d_a = reference.mallows_log_prob(0.0, a, smoothing)
        assert (value, d_a) == (log_half, 0.0) and d_z > 0
    value, d_z, d_a = reference.mallows_log_prob(0.0, a, 0.0)
    with mp.workdps(50):
        slope = mp.diff(lambda z: exact_g(z, mp.mpf(a)), mp.mpf(10) ** -30, h=mp.mpf(10) ** -40)
    assert (value, d_a) == (log_half, 0.0)
    assert d_z == pytest.approx(float(2 * slope), rel=1e-12)


@many
@given(a=strategies.dispersions())
def test_one_rank_apart_gives_one_over_one_plus_phi(a):
    phi = math.exp(-a)
    for smoothing in (0.0, 1.0):
        assert reference.mallows_log_prob(1.0, a, smoothing)[0] == pytest.approx(-math.log1p(phi), rel=1e-13)
        assert reference.mallows_log_prob(-1.0, a, smoothing)[0] == pytest.approx(-a - math.log1p(phi), rel=1e-13)


@many
@given(z=strategies.margins(), a=strategies.dispersions(), smoothing=strategies.smoothings)
def test_both_sides_sum_to_one(z, a, smoothing):
    win, lose = (reference.mallows_log_prob(x, a, smoothing)[0] for x in (z, -z))
    assert math.exp(win) + math.exp(lose) == pytest.approx(1.0, rel=1e-14)


@many
@given(z=strategies.margins(100.0), smoothing=strategies.smoothings)
def test_total_dispersion_gives_one_half(z, smoothing):
    value, d_z, d_a = reference.mallows_log_prob(z, 0.0, smoothing)
    assert (value, d_z) == (math.log(0.5), 0.0)
    small = 1e-9
    near, near_z, near_a = reference.mallows_log_prob(z, small, smoothing)
    assert near == pytest.approx(value + small * d_a, abs=1e-13)
    assert near_a == pytest.approx(d_a, rel=1e-5, abs=1e-12)
    assert abs(near_z) < 1e-8


@many
@given(a=strategies.dispersions())
def test_slope_of_the_losing_tail_is_the_dispersion(a):
    z = max(1e4, 1e6 / a)
    assert reference.mallows_log_prob(-z, a)[1] == pytest.approx(a, rel=1.1 / (a * z))


@many
@given(a=strategies.dispersions(1e-6, 200), smoothing=st.sampled_from([0.25, 1.0, 2.0]))
def test_smoothed_link_is_continuously_differentiable(a, smoothing):
    for end in (smoothing, -smoothing):
        inside, outside = (reference.mallows_log_prob(math.nextafter(end, x), a, smoothing) for x in (0.0, 9 * end))
        (g_inside, slope_inside), (g_outside, slope_outside) = (
            (math.exp(value), d_z * math.exp(value)) for value, d_z, _ in (inside, outside)
        )
        assert g_inside == pytest.approx(g_outside, rel=1e-12, abs=1e-15)
        assert slope_inside == pytest.approx(slope_outside, rel=1e-12, abs=1e-13)


@many
@given(z=st.floats(-3, 3), a=strategies.dispersions(1e-6, 20), smoothing=strategies.smoothings)
def test_link_increases(z, a, smoothing):
    value, d_z, _ = reference.mallows_log_prob(z, a, smoothing)
    assert d_z > 0
    assert reference.mallows_log_prob(z + 0.125, a, smoothing)[0] > value


def test_nan_goes_through_the_link():
    for z, a in ((math.nan, 1.0), (1.0, math.nan)):
        assert all(math.isnan(x) for x in reference.mallows_log_prob(z, a))


# --- the loss of a pair ----------------------------------------------------------------------------------------------


@few
@given(pair=strategies.pairs(), link=strategies.links, kwargs=strategies.loss_options)
def test_loss_of_every_link_against_mpmath(pair, link, kwargs):
    with mp.workdps(150):
        *logps, a = (mp.mpf(x) for x in pair)
        beta, eps = mp.mpf(kwargs["beta"]), mp.mpf(kwargs["label_smoothing"])
        # z is rounded to float64 as the oracle rounds it, so that only the link and the mixing are compared
        h = (pair[0] - pair[2]) - (pair[1] - pair[3])
        z = mp.mpf(kwargs["beta"] * h - kwargs["gamma"])

        def likelihood(z, a):
            if link == "mallows-phi":
                if abs(z) < kwargs["smoothing"]:
                    return mp.log(exact_smoothed_g(z, a, kwargs["smoothing"]))
                return exact_log_losing(-z, a) if z < 0 else mp.log1p(-mp.exp(exact_log_losing(z, a)))
            x = 2 * a * z if link.startswith("mallows") else z
            if link.endswith("ipo"):
                return -((x - 0.5) ** 2)
            return -max(mp.mpf(0), 1 - x) if link.endswith("hinge") else -mp.log1p(mp.exp(-x))

        keep, swap = ((1 - eps) / (1 - 2 * eps), -eps / (1 - 2 * eps)) if kwargs["robust"] else (1 - eps, eps)
        parts = [keep * likelihood(z, a), swap * likelihood(-z, a)]
        result = reference.preference_loss(*pair[:4], neg_log_dispersion=pair.neg_log_dispersion, link=link, **kwargs)
        assert abs(result.loss + sum(parts)) <= 1e-12 * sum(abs(x) for x in parts) + 1e-300
        assert_close(result.chosen_reward, beta * (logps[0] - logps[2]))
        assert_close(result.rejected_reward, beta * (logps[1] - logps[3]))


@many
@given(pair=moderate, link=strategies.links, kwargs=strategies.loss_options)
def test_loss_gradients_against_central_differences(pair, link, kwargs):
    z = kwargs["beta"] * ((pair[0] - pair[2]) - (pair[1] - pair[3])) - kwargs["gamma"]
    a, h = pair.neg_log_dispersion, 1e-5
    for x in (z, 2 * a * z):  # away from the hinge's kinks
        assume(min(abs(x - 1), abs(x + 1)) > 1e-3)

    def loss(pair):
        return reference.preference_loss(*pair[:4], neg_log_dispersion=pair[4], link=link, **kwargs)

    result = loss(pair)
    g, g_rejected = result.grad_chosen, result.grad_rejected
    expected = [g, g_rejected, -g, -g_rejected, result.grad_neg_log_dispersion]
    tolerance = 1e-5 + 1e-9 * abs(result.loss) / h
    for i in range(5):
        numeric = central_difference(lambda x, i=i: loss((*pair[:i], x, *pair[i + 1 :])).loss, pair[i], h)
        assert numeric == pytest.approx(expected[i], rel=1e-5, abs=tolerance)


def test_hinge_subgradient_is_zero_at_the_kink():
    result = reference.preference_loss(1.0, 0.0, link="hinge", beta=1.0)
    assert (result.loss, result.grad_chosen) == (0.0, 0.0)
    assert reference.preference_loss(0.999, 0.0, link="hinge", beta=1.0).grad_chosen == -1.0


@many
@given(h=st.floats(-1e3, 1e3), label_smoothing=st.sampled_from([0.0, 0.2]))
def test_theta_at_one_half_is_dpo(h, label_smoothing):
    kwargs = {"label_smoothing": label_smoothing}
    dpo = reference.preference_loss(h, 0.0, link="bradley-terry", **kwargs)
    theta = reference.preference_loss(h, 0.0, link="mallows-theta", neg_log_dispersion=0.5, **kwargs)
    assert theta[:5] == dpo[:5]


@pytest.mark.parametrize("link", ["bradley-terry", "mallows-theta", "mallows-phi"])
@pytest.mark.parametrize("label_smoothing, robust", [(0.0, False), (0.1, False), (0.1, True)])
def test_first_step_loss_is_log_two(link, label_smoothing, robust):
    result = reference.preference_loss(
        -12.5,
        -40.25,
        -12.5,
        -40.25,
        neg_log_dispersion=0.8,
        link=link,
        label_smoothing=label_smoothing,
        robust=robust,
    )
    assert result.loss == pytest.approx(math.log(2), rel=1e-15)
    assert result.grad_chosen < 0


@pytest.mark.parametrize("link", reference.TORCH_LINKS)
@pytest.mark.parametrize("z", [1e6, -1e6])
def test_loss_is_finite_at_huge_margins(link, z):
    result = reference.preference_loss(z, 0.0, link=link, neg_log_dispersion=3.0, beta=1.0, label_smoothing=0.1)
    assert all(math.isfinite(x) for x in result)
    assert result.loss > 1e4


def test_bad_links_are_refused():
    with pytest.raises(ValueError, match="unknown link 'sigmoid'"):
        reference.preference_loss(0.0, 0.0, link="sigmoid")
    for link in reference.DISPERSION_LINKS:
        with pytest.raises(ValueError, match="needs neg_log_dispersion"):
            reference.preference_loss(0.0, 0.0, link=link)
        with pytest.raises(ValueError, match="needs neg_log_dispersion"):
            reference.torch_preference_loss(torch.zeros(1), torch.zeros(1), link=link)


# --- token statistics and dispersion ---------------------------------------------------------------------------------


def exact_token_stats(logits, label, temperature):
    scaled = [mp.mpf(x) / mp.mpf(temperature) if x != -math.inf else -mp.inf for x in logits]
    weights = [mp.exp(x) for x in scaled]
    total = mp.fsum(weights)
    probs = [w / total for w in weights]
    return mp.log(probs[label]), -mp.fsum(p * mp.log(p) for p in probs if p), mp.log(total)


@many
@given(logits=strategies.finite_logits(1, 7), label=st.integers(0, 6), temperature=st.sampled_from([0.5, 1.0, 2.0]))
def test_token_stats_against_mpmath(logits, label, temperature):
    row = logits[0].double().tolist()
    result = reference.token_stats(row, label, temperature)
    with mp.workdps(700):  # enough for 1 - p down to the smallest float64
        exact = exact_token_stats(row, label, temperature)
    for actual, expected in zip(result, exact, strict=True):
        assert (
            actual == -math.inf
            if expected == -mp.inf
            else math.isclose(actual, float(expected), rel_tol=1e-12, abs_tol=1e-300)
        )


@many
@given(
    logits=strategies.finite_logits(1, 6).filter(lambda x: x[x.isfinite()].abs().max() < 100),
    label=st.integers(0, 5),
    temperature=st.sampled_from([0.7, 1.0, 2.0]),
    weights=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.8, -1.3)]),
)
def test_token_stats_gradient_against_central_differences(logits, label, temperature, weights):
    row = logits[0].double().tolist()
    assume(row[label] != -math.inf)
    gradient = reference.token_stats_grad(row, label, *weights, temperature)

    for v in range(len(row)):
        if row[v] == -math.inf:
            assert gradient[v] == 0.0
            continue

        def value(x, v=v):
            logp, entropy, _ = reference.token_stats([*row[:v], x, *row[v + 1 :]], label, temperature)
            return weights[0] * logp + weights[1] * entropy

        assert central_difference(value, row[v], 1e-5) == pytest.approx(gradient[v], rel=1e-5, abs=1e-8)


def test_uniform_and_certain_rows():
    logp, entropy, lse = reference.token_stats([3.0] * 8, 5)
    assert (logp, entropy, lse) == pytest.approx((-math.log(8), math.log(8), 3 + math.log(8)))
    assert reference.token_stats([-math.inf, 2.0, -math.inf], 1) == (0.0, 0.0, 2.0)
    assert reference.token_stats_grad([-math.inf, 2.0, -math.inf], 1, 1.0, 1.0) == [0.0, 0.0, 0.0]


def test_almost_certain_rows_keep_their_digits():
    p = math.exp(-40.0)  # 1 - p rounds to 1 in float64
    logp, entropy, lse = reference.token_stats([40.0, 0.0], 0)
    assert (logp, entropy, lse) == (pytest.approx(-p), pytest.approx(41 * p), 40.0)
    assert reference.token_stats_grad([40.0, 0.0], 0, 1.0, 0.0) == pytest.approx([p, -p], abs=0)
    assert reference.token_stats_grad([40.0, 0.0], 0, 0.0, 1.0) == pytest.approx([-40 * p, 40 * p], abs=0)


def test_label_on_a_masked_logit():
    row = [-math.inf, 0.0, 1.0]
    logp, entropy, _ = reference.token_stats(row, 0)
    assert logp == -math.inf and entropy == pytest.approx(reference.token_stats(row[1:], 0).entropy)
    logits = torch.tensor(row, dtype=torch.float64, requires_grad=True)
    torch.log_softmax(logits, -1)[0].mul(2.5).backward()
    assert reference.token_stats_grad(row, 0, 2.5, 0.0) == pytest.approx(logits.grad.tolist())
    assert reference.token_stats_grad(row, 0, 2.5, 1.0)[0] == 2.5


@pytest.mark.parametrize("row", [[0.0, math.nan], [math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_undefined_rows_are_nan(row):
    assert all(math.isnan(x) for x in reference.token_stats(row, 0))
    assert all(math.isnan(x) for x in reference.token_stats_grad(row, 0, 1.0, 1.0))
    for result in reference.torch_token_stats(torch.tensor([row]), torch.tensor([0])):
        assert result.isnan().all()


def test_neg_log_dispersion_value_and_clamp():
    assert reference.neg_log_dispersion(0.3, 0.5, 50_000) == pytest.approx(-math.log(0.4 / math.log(50_000)))
    assert reference.neg_log_dispersion(0.3, 0.5, 50_000, 0.29) == pytest.approx(
        0.29 * reference.neg_log_dispersion(0.3, 0.5, 50_000)
    )
    assert reference.neg_log_dispersion(0.0, 0.0, 4) == pytest.approx(-math.log(1e-6))
    assert reference.neg_log_dispersion(math.log(4), math.log(4), 4) == pytest.approx(1e-6)
    assert math.isnan(reference.neg_log_dispersion(math.nan, 0.5, 4))
