"""Every choice of a pair's loss: native against the oracle, both against mpmath, identities between methods."""

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

many = settings(max_examples=300, deadline=None)
ratios = st.integers(-(2**24), 2**24).map(lambda i: i / 2**20)  # |r| <= 16; their differences are exact
dispersions = strategies.dispersions(1e-2, 10.0)


def native(r_w, r_l, a, **options):
    """Loss, and its derivatives in both log-ratios and in a, of pairs given by their log-ratios; float64 lists."""
    tensors = [torch.as_tensor(x, dtype=torch.float64).reshape(-1).requires_grad_() for x in (r_w, r_l, a)]
    dispersion = tensors[2] if options["link"] in reference.DISPERSION_LINKS else None
    losses = F.preference_loss(*tensors[:2], neg_log_dispersion=dispersion, **options).losses
    gradients = torch.autograd.grad(losses.sum(), tensors, allow_unused=True, materialize_grads=True)
    return [x.tolist() for x in (losses.detach(), *gradients)]


def plain(r_w, r_l, a, **options):
    """The same of one pair by the oracle."""
    found = reference.preference_loss(r_w, r_l, neg_log_dispersion=a, **options)
    return [found.loss, found.grad_chosen, found.grad_rejected, found.grad_neg_log_dispersion]


NEARLY_REVERSE_KL = {"link": "bradley-terry", "beta": 0.7, "divergence": "alpha", "divergence_alpha": 1.0005}


@many
@given(ratios, ratios, dispersions, strategies.pair_choices())
@example(r_w=3.0, r_l=-2.0, a=1.0, options=NEARLY_REVERSE_KL)
def test_native_is_the_oracle(r_w, r_l, a, options):
    found = [x for (x,) in native(r_w, r_l, a, **options)]
    expected = plain(r_w, r_l, a, **options)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-13)


# A rejected ratio that is positive, though so small that its score may round to 0, is not clipped.
BARELY_POSITIVE = {"link": "ipo", "beta": 0.01, "divergence": "js", "clip_rejected": True}


@settings(max_examples=60)
@given(pair=strategies.pairs(dispersions), options=strategies.pair_choices())
@example(pair=strategies.Pair(0.0, 0.0, 0.0, -(2.0**-102), 1.0), options=BARELY_POSITIVE)
def test_references_and_half_precision(pair, options):
    *logps, a = pair
    if max(abs(pair[0] - pair[2]), abs(pair[1] - pair[3])) > 16:  # the oracle's link ends at a |z| of 1e17
        options = options | {"divergence": "reverse-kl"}
    expected = reference.preference_loss(*logps, neg_log_dispersion=a, **options)
    for dtype, rel in ((torch.float64, 1e-7), (torch.float32, 1e-5)):
        tensors = [torch.tensor([x], dtype=dtype, requires_grad=True) for x in pair]
        dispersion = tensors[4] if options["link"] in reference.DISPERSION_LINKS else None
        found = F.preference_loss(*tensors[:4], neg_log_dispersion=dispersion, **options)
        gradients = torch.autograd.grad(found.losses, tensors, allow_unused=True, materialize_grads=True)
        g, g_rejected = expected.grad_chosen, expected.grad_rejected
        right = [*expected[:3], g, g_rejected, -g, -g_rejected, expected.grad_neg_log_dispersion]
        for actual, value in zip((*found, *gradients), right, strict=True):
            if abs(value) < torch.finfo(dtype).max:
                assert actual.item() == pytest.approx(value, rel=rel, abs=1e-9 * (1 + abs(expected.loss)))


# --- against mpmath, from the formulas of docs/methods.md ------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + mp.exp(-x))


def log_sigmoid(x):
    return -mp.log1p(mp.exp(-x))


def exact_loss(r_w, r_l, a, *, link, beta, gamma=0.0, label_smoothing=0.0, robust=False, smoothing=1.0, **others):
    beta, gamma, eps = mp.mpf(beta), mp.mpf(gamma), mp.mpf(label_smoothing)
    x_w, x_l = beta * r_w, beta * r_l
    separate = {
        "sppo": lambda: (x_w - 0.5) ** 2 + (x_l + 0.5) ** 2,
        "nca": lambda: -log_sigmoid(x_w) - (log_sigmoid(-x_w) + log_sigmoid(-x_l)) / 2,
        "bco": lambda: -log_sigmoid(x_w) - log_sigmoid(-x_l),
        "apo-zero": lambda: 1 - sigmoid(x_w) + sigmoid(x_l),
        "apo-down": lambda: sigmoid(x_w) + 1 - sigmoid(x_w - x_l),
    }
    if link in separate:
        return separate[link]()
    alpha = mp.mpf({"forward-kl": 0, "alpha": others.get("divergence_alpha")}.get(others.get("divergence"), 1))
    s_w, s_l = r_w, r_l
    if others.get("divergence") == "js":
        s_w, s_l = (mp.log(2 / (1 + mp.exp(-r))) for r in (r_w, r_l))
    elif alpha != 1:
        s_w, s_l = ((mp.exp((alpha - 1) * r) - 1) / (alpha - 1) for r in (r_w, r_l))
    if others.get("clip_rejected"):
        s_l = max(s_l, mp.mpf(0))
    z, focal = beta * (s_w - s_l) - gamma, mp.mpf(others.get("focal_gamma", 0))

    def loss(z):
        x = 2 * a * z if link in reference.DISPERSION_LINKS else z
        host = {"mallows-theta": "bradley-terry"}.get(link, link.removeprefix("mallows-"))
        if host == "ipo":
            return (x - 0.5) ** 2
        if host == "hinge":
            return max(mp.mpf(0), 1 - x)
        if host == "exo":
            return sigmoid(x) * mp.log(sigmoid(x) / (1 - eps)) + sigmoid(-x) * mp.log(sigmoid(-x) / eps)
        if host == "discopop":
            m = sigmoid(x / mp.mpf(others.get("discopop_tau", 0.05)))
            return -(1 - m) * log_sigmoid(x) + m * mp.exp(-x)
        log_p = exact_link(z, a, smoothing)[0] if link == "mallows-phi" else log_sigmoid(x)
        return -mp.exp(focal * log_p) * log_p

    if eps == 0 or link.endswith("exo"):
        return loss(z)
    keep, swap = ((1 - eps) / (1 - 2 * eps), -eps / (1 - 2 * eps)) if robust else (1 - eps, eps)
    return keep * loss(z) + swap * loss(-z)


@settings(max_examples=150, deadline=None)
@given(ratios, ratios, dispersions, strategies.pair_choices())
def test_oracle_and_native_against_mpmath(r_w, r_l, a, options):
    """Values everywhere, gradients of the native kernel by differences of the exact loss, away from the kinks."""
    with mp.workdps(60):
        exact = [mp.mpf(x) for x in (r_w, r_l, a)]
        value = exact_loss(*exact, **options)
        found = [x for (x,) in native(r_w, r_l, a, **options)]
        size = abs(value) + abs(mp.mpf(found[0])) + 1e-3  # a mixed or a bounded loss is a difference of order 1
        assert abs(found[0] - value) <= 1e-11 * size
        assert abs(plain(r_w, r_l, a, **options)[0] - value) <= 1e-11 * size
        step = mp.mpf(10) ** -15
        for i, gradient in enumerate(found[1:]):
            if i == 2 and options["link"] not in reference.DISPERSION_LINKS:
                assert gradient == 0
                continue
            ends = ([x + sign * step * (i == k) for k, x in enumerate(exact)] for sign in (1, -1))
            up, down = (exact_loss(*x, **options) for x in ends)
            sides = [(up - value) / step, (value - down) / step]
            if abs(sides[0] - sides[1]) > 1e-9 * (1 + abs(sides[0])):  # on a kink
                assert min(sides) - 1e-9 <= gradient <= max(sides) + 1e-9
            else:
                slope = sum(sides) / 2
                assert abs(gradient - slope) <= 1e-9 * abs(slope) + 1e-12


ULPS = {"sppo": 2, "nca": 4, "bco": 4, "apo-zero": 4, "apo-down": 4, "discopop": 4, "focal": 16, "js": 16}


@pytest.mark.parametrize("name", ULPS)
def test_losses_are_good_to_units_in_the_last_place(name):
    """Near zero and far out: each is a sum of terms of one sign."""
    options = {
        "focal": {"link": "bradley-terry", "focal_gamma": 1.0},
        "js": {"link": "bradley-terry", "divergence": "js"},
    }.get(name, {"link": name})
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([16.0, 16.0, 0.1, 1e-3], dtype=torch.float64).repeat(40)
    r_w, r_l = ((2 * torch.rand(160, generator=generator) - 1).double() * scale for _ in range(2))
    found = native(r_w, r_l, torch.zeros(160), beta=1.0, **options)[0]
    with mp.workdps(60):
        for won, lost, loss in zip(r_w.tolist(), r_l.tolist(), found, strict=True):
            right = exact_loss(mp.mpf(won), mp.mpf(lost), mp.mpf(0), beta=1.0, **options)
            # e^-x turns the rounding of its argument, here a score or a power's exponent, into units in the last place
            carried = 2 * abs(won - lost) if name in ("discopop", "focal", "js") else 0
            assert abs(loss - right) <= (ULPS[name] + carried) * mp.mpf(2) ** -52 * right, (won, lost)


# --- identities, on values and gradients -----------------------------------------------------------------------------

R_W, R_L = (torch.linspace(-7.3, 8.1, 41, dtype=torch.float64) * sign for sign in (1, -0.6))
A = torch.linspace(0.05, 2, 41, dtype=torch.float64)
NO_A = torch.zeros(41, dtype=torch.float64)
hosts = pytest.mark.parametrize("host", ["bradley-terry", "ipo", "hinge", "exo", "discopop"])


def assert_equal(found, expected, rel=1e-12):
    for one, two in zip(found, expected, strict=True):
        assert one == pytest.approx(two, rel=rel, abs=1e-13)


def dpo(r_w=R_W, r_l=R_L, **options):
    return native(r_w, r_l, NO_A, **{"link": "bradley-terry", "beta": 0.7} | options)


def plug_in(host):
    return "mallows-theta" if host == "bradley-terry" else f"mallows-{host}"


@hosts
@pytest.mark.parametrize("a", [0.5, 0.2, 3.0])
def test_constant_dispersion_makes_a_plug_in_its_host(host, a):
    """With beta and gamma scaled by 2a; the gradient in a is that of the scale."""
    eps = {"label_smoothing": 0.1} if host == "exo" else {}
    *found, _ = native(R_W, R_L, NO_A + a, link=plug_in(host), beta=0.7, gamma=0.3, **eps)
    *expected, _ = native(R_W, R_L, NO_A, link=host, beta=2 * a * 0.7, gamma=2 * a * 0.3, **eps)
    assert_equal(found, expected)


@pytest.mark.parametrize("link", reference.PROBABILITY_LINKS)
@pytest.mark.parametrize("gamma", [0.0, 1e-9, 0.05, 1.0, 3.0])
def test_focal_is_a_power_of_the_probability_times_the_host(link, gamma):
    loss, *gradients = native(R_W, R_L, A, link=link, beta=0.7)
    loss = torch.tensor(loss, dtype=torch.float64)
    log_p = -loss
    found, *focal_gradients = native(R_W, R_L, A, link=link, beta=0.7, focal_gamma=gamma)
    by = torch.exp(gamma * log_p) * (1 + gamma * log_p)
    assert_equal([found], [(torch.exp(gamma * log_p) * loss).tolist()])
    assert_equal(focal_gradients, [[x * y for x, y in zip(by.tolist(), g, strict=True)] for g in gradients], rel=1e-9)
    if gamma <= 1e-9:
        assert_equal([found, *focal_gradients], [loss.tolist(), *gradients], rel=1e-6)


def test_focal_turns_where_the_likelihood_is_minus_one_over_gamma():
    for gamma in (0.5, 1.0, 2.0):
        z = -math.log(math.expm1(1 / gamma))  # log sigmoid(z) = -1 / gamma
        for offset, sign in ((0.01, -1), (-0.01, 1)):
            (gradient,) = native(z + offset, 0.0, 0.0, link="bradley-terry", beta=1.0, focal_gamma=gamma)[1]
            assert math.copysign(1, gradient) == sign


@pytest.mark.parametrize("link", [link for link in reference.MARGIN_LINKS if not link.endswith("exo")])
def test_minor_dpo_is_dpo_where_the_rejected_ratio_is_positive(link):
    whole = native(R_W, R_L, A, link=link, beta=0.7)
    clipped = native(R_W, R_L, A, link=link, beta=0.7, clip_rejected=True)
    without = native(R_W, torch.zeros_like(R_L), A, link=link, beta=0.7)
    for i, r_l in enumerate(R_L.tolist()):
        for k, (found, expected, other) in enumerate(zip(clipped, whole, without, strict=True)):
            if r_l > 0:
                assert found[i] == expected[i]
            else:
                assert found[i] == (0.0 if k == 2 else other[i])


@hosts
def test_divergences_meet_at_their_limits(host):
    options = {"link": host, "beta": 0.7} | ({"label_smoothing": 0.1} if host == "exo" else {})

    def of(divergence, alpha=0.5):
        return native(R_W, R_L, NO_A, **options, divergence=divergence, divergence_alpha=alpha)

    assert_equal(of("alpha", 1.0), of("reverse-kl"), rel=0)
    assert_equal(of("alpha", 0.0), of("forward-kl"), rel=0)
    assert_equal(of("alpha", 1 + 1e-9), of("reverse-kl"), rel=1e-6)
    # all of them have slope 1 at pi = ref (Jensen-Shannon's 1/2), so they agree for small ratios
    small = [1e-6 * x for x in (R_W, R_L)]
    expected = native(*small, NO_A, **options)
    for divergence, scale in (("forward-kl", 1), ("alpha", 1), ("js", 2)):
        found = native(*small, NO_A, **options | {"beta": 0.7 * scale}, divergence=divergence)
        assert_equal(found, expected, rel=1e-4)


def test_losses_without_a_margin_are_sums_of_margin_losses():
    zero = torch.zeros_like(R_W)

    def total(link):
        won = native(R_W, zero, NO_A, link=link, beta=0.7)
        lost = native(zero, R_L, NO_A, link=link, beta=0.7)
        return [[a + b for a, b in zip(won[0], lost[0], strict=True)], won[1], lost[2]]

    assert_equal(native(R_W, R_L, NO_A, link="sppo", beta=0.7)[:3], total("ipo"))
    assert_equal(native(R_W, R_L, NO_A, link="bco", beta=0.7)[:3], total("bradley-terry"))


def test_apo_down_is_apo_zero_of_swapped_ratios_where_the_chosen_is_the_reference():
    zero = torch.zeros_like(R_L)
    down, zero_loss = (native(zero, R_L, NO_A, link=link, beta=0.7) for link in ("apo-down", "apo-zero"))
    assert_equal([down[0], down[2]], [zero_loss[0], zero_loss[2]])


def test_exo_is_zero_with_zero_gradient_at_its_target():
    z = math.log(0.9 / 0.1)
    found = native([z, z - 1, z + 1], [0.0] * 3, [0.0] * 3, link="exo", beta=1.0, label_smoothing=0.1)
    assert found[0][0] == pytest.approx(0, abs=1e-15) and found[1][0] == pytest.approx(0, abs=1e-15)
    assert found[0][1] > 0.05 and found[1][1] < -0.01 and found[1][2] > 0.01


# --- by hand: (r(y_w), r(y_l), beta) -> loss and as many of its derivatives in r(y_w) and r(y_l) ---------------------

LOG_2 = math.log(2)
E = math.exp
BY_HAND = [
    # p = sigmoid(0) = 1/2: the loss sqrt(1/2) log 2, slope -beta p^g (1 - p) (1 + g log p)
    ("focal", (2, 2, 0.5), {"focal_gamma": 0.5}, [LOG_2 / 2**0.5, -0.25 / 2**0.5 * (1 - LOG_2 / 2)]),
    # log 3 - max(0, -5) = log 3: sigmoid = 3/4
    ("minor", (2 * math.log(3), -5, 0.5), {"clip_rejected": True}, [math.log(4 / 3), -0.125]),
    # z = log 2, p = 2/3 against 0.9: 2/3 log(2/3 / 0.9) + 1/3 log(1/3 / 0.1)
    (
        "exo",
        (2 * LOG_2, 0, 0.5),
        {"link": "exo", "label_smoothing": 0.1},
        [2 / 3 * math.log(20 / 27) + 1 / 3 * math.log(10 / 3), 0.5 * 2 / 9 * math.log(2 / 9)],
    ),
    # z = 0: m = 1/2, half of log 2 and half of 1; the slope -(log 2 and 1, moved by m' = 5) - (1/4 + 1/2)
    ("discopop", (3, 3, 0.5), {"link": "discopop"}, [LOG_2 / 2 + 0.5, 0.5 * (5 - 5 * LOG_2 - 0.75)]),
    ("sppo", (2, 1, 0.5), {"link": "sppo"}, [0.25 + 1.0, 0.5, 1.0]),  # (1 - 1/2)^2 + (1/2 + 1/2)^2
    ("nca", (0, 0, 0.5), {"link": "nca"}, [2 * LOG_2, 0.5 * (-0.5 + 0.25), 0.5 * 0.25]),
    ("bco", (2 * math.log(3), 0, 0.5), {"link": "bco"}, [math.log(4 / 3) + LOG_2, -0.125, 0.25]),
    ("apo-zero", (2 * math.log(3), 0, 0.5), {"link": "apo-zero"}, [0.25 + 0.5, -0.5 * 3 / 16, 0.5 / 4]),
    ("apo-down", (0, -2 * math.log(3), 0.5), {"link": "apo-down"}, [0.5 + 0.25, 0.5 * (1 / 4 - 3 / 16), 0.5 * 3 / 16]),
    # s = 1 - 1/t at t = 2 and 1/2: 1/2 + 1, z = 3/4
    ("forward-kl", (LOG_2, -LOG_2, 0.5), {"divergence": "forward-kl"}, [math.log1p(E(-0.75))]),
    # s = log(2t / (t + 1)) at t = 3 and 1: log 3/2, z = log(3/2)
    ("js", (math.log(3), 0, 1.0), {"divergence": "js"}, [math.log1p(2 / 3), -0.4 * 0.25, 0.4 * 0.5]),
    # alpha 1/2: s = 2 - 2 / sqrt t at t = 4 and 1: s = 1
    ("alpha", (2 * LOG_2, 0, 1.0), {"divergence": "alpha"}, [math.log1p(E(-1)), -0.5 / (1 + E(1)), 1 / (1 + E(1))]),
]


@pytest.mark.parametrize("pair, options, expected", [case[1:] for case in BY_HAND], ids=[case[0] for case in BY_HAND])
def test_worked_by_hand(pair, options, expected):
    r_w, r_l, beta = pair
    options = {"link": "bradley-terry", "beta": beta} | options
    found = [x for (x,) in native(r_w, r_l, 0.0, **options)]
    assert found[: len(expected)] == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert plain(r_w, r_l, 0.0, **options)[: len(expected)] == pytest.approx(expected, rel=1e-12, abs=1e-15)


# --- extremes and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [*reference.LINKS, *(f"{link}+focal" for link in reference.PROBABILITY_LINKS)])
def test_finite_at_huge_ratios(link):
    link, _, focal = link.partition("+")
    options = {"link": link, "beta": 1.0, "focal_gamma": 0.5 if focal else 0.0}
    if link.endswith("exo"):
        options["label_smoothing"] = 0.1
    r_w, r_l = zip(*itertools.product((1e6, 0.0, -1e6), repeat=2), strict=True)
    assert all(math.isfinite(x) for values in native(r_w, r_l, [3.0] * 9, **options) for x in values)
    # a masked token: log-probability -inf of the rejected response
    loss, _, on_rejected, on_a = native([0.5], [-math.inf], [3.0], **options)
    if link not in ("sppo", "ipo", "mallows-ipo"):
        assert math.isfinite(loss[0]) and on_rejected[0] == on_a[0] == 0
    assert native([-math.inf], [0.5], [3.0], **options)[0][0] >= 0  # of the chosen one: not NaN


@pytest.mark.parametrize("divergence", ["forward-kl", "js", "alpha"])
def test_divergences_are_finite_at_huge_ratios(divergence):
    r_w, r_l = zip(*itertools.product((1e4, 50.0, 0.0, -1e4), repeat=2), strict=True)
    for alpha in (0.5, 3.0):
        results = native(
            r_w, r_l, [0.0] * 16, link="bradley-terry", beta=0.1, divergence=divergence, divergence_alpha=alpha
        )
        assert all(math.isfinite(x) for values in results for x in values)


def test_a_score_stays_where_it_is_beyond_e_to_the_80():
    options = {"link": "bradley-terry", "beta": 0.1, "divergence": "forward-kl"}
    loss, on_chosen, *_ = native([-79.0, -81.0, -100.0], [0.0] * 3, [0.0] * 3, **options)
    assert loss[0] < loss[1] == loss[2] and on_chosen[0] < 0 and on_chosen[1:] == [0, 0]


@pytest.mark.parametrize("link", reference.LINKS)
@pytest.mark.parametrize("divergence", ["reverse-kl", "forward-kl", "js", "alpha"])
@pytest.mark.parametrize("clip_rejected", [False, True])
def test_the_loss_of_an_undefined_ratio_is_nan(link, divergence, clip_rejected):
    options = {"link": link, "beta": 0.7}
    if link in reference.MARGIN_LINKS:
        options |= {"divergence": divergence, "clip_rejected": clip_rejected and not link.endswith("exo")}
    if link.endswith("exo"):
        options["label_smoothing"] = 0.1
    losses = native([math.nan, 0.5, 50.0, 0.5], [0.5, math.nan, math.nan, 0.25], [3.0] * 4, **options)[0]
    assert [math.isnan(loss) for loss in losses] == [True, True, True, False]


REFUSED = [
    ({"focal_gamma": 0.5, "link": "ipo"}, "focal_gamma=0.5 is a power of a probability, .* link 'ipo'"),
    ({"focal_gamma": -1.0}, "focal_gamma must be finite and >= 0, got -1.0"),
    ({"focal_gamma": 0.5, "label_smoothing": 0.1}, "focal_gamma=0.5 has no meaning for .* label_smoothing"),
    ({"clip_rejected": True, "label_smoothing": 0.1}, "clip_rejected=True .* label_smoothing"),
    ({"link": "exo", "clip_rejected": True, "label_smoothing": 0.1}, "clip_rejected=True .* target of 'exo', label"),
    ({"link": "nca", "gamma": 0.1}, "gamma=0.1 changes a margin, and the link 'nca' has none"),
    ({"link": "bco", "label_smoothing": 0.1}, "label_smoothing=0.1 changes a margin, and the link 'bco'"),
    ({"link": "sppo", "robust": True}, "robust=True changes a margin, and the link 'sppo'"),
    ({"link": "sppo", "clip_rejected": True}, "clip_rejected=True changes a margin, and the link 'sppo'"),
    ({"link": "apo-zero", "divergence": "js"}, "divergence='js' changes a margin, and the link 'apo-zero'"),
    ({"link": "exo"}, "link 'exo' reads label_smoothing .* got 0.0 and False"),
    ({"link": "exo", "label_smoothing": 0.1, "robust": True}, "robust False, got 0.1 and True"),
    ({"gamma": -0.5, "label_smoothing": 0.1, "robust": True}, "robust=True with gamma=-0.5 is not unbiased"),
    ({"gamma": 0.5, "label_smoothing": 0.1, "robust": True}, "robust=True with gamma=0.5 is not unbiased.*leave one"),
    ({"divergence": "kl"}, "unknown divergence 'kl'; choose one of reverse-kl, forward-kl, js, alpha"),
    ({"divergence_alpha": math.inf}, "divergence_alpha must be finite, got inf"),
    ({"discopop_tau": 0.0}, "discopop_tau must be finite and positive, got 0.0"),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=str)
def test_choices_that_exclude_each_other(options, message):
    logps = torch.zeros(2)
    with pytest.raises(ValueError, match=message):
        F.preference_loss(logps, logps, **{"link": "bradley-terry"} | options)
