"""Presets that are each other's limits or special cases, and their values and gradients by hand."""

import dataclasses
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objective import ELSEWHERE, B, batch, call

from mallowspo import reference
from mallowspo.choices import EXO_LINKS, MARGIN_LINKS
from mallowspo.objective import PreferenceObjective, preset, presets


def values_and_gradients(objective, *arguments):
    logps, *rest = arguments
    logps = logps.clone().requires_grad_()
    losses = call(objective, logps, *rest).losses
    return losses.detach(), torch.autograd.grad(losses.sum(), logps)[0]


def assert_same(one, two, arguments=None, rtol=1e-12):
    found, expected = (values_and_gradients(objective, *(arguments or batch())) for objective in (one, two))
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-13)


seeds, betas, constants = st.integers(0, 2**32 - 1), st.floats(0.02, 10), st.floats(0.05, 3)


@settings(max_examples=30)
@given(seeds, betas, st.floats(0, 2))
def test_corners_of_rainbowpo(seed, beta, gamma):
    logps, num_tokens, ref_logps, a = batch(seed)
    half = logps, num_tokens, ref_logps, torch.full_like(a, 0.5)  # the factor 2a is 1
    rainbow = preset("rainbowpo", beta=beta, gamma=gamma)
    free = dataclasses.replace(rainbow, reference_mixing=0.0)
    assert_same(free, preset("simpo", beta=beta, gamma=gamma), half)
    assert_same(free, preset("mallows-simpo", beta=beta, gamma=gamma), batch(seed))
    full = dataclasses.replace(rainbow, reference_mixing=1.0)
    assert_same(full, preset("ln-dpo", beta=beta), half)
    assert_same(dataclasses.replace(full, token_weights="uniform"), preset("mallows-theta", beta=beta), batch(seed))


HOSTS = {
    "mallows-theta": preset("dpo"),
    "mallows-ipo": preset("ipo"),
    "mallows-hinge": preset("hinge"),
    "mallows-exo": preset("exo-pair"),
    "mallows-discopop": preset("discopop"),
    "mallows-simpo": preset("simpo"),
    "rainbowpo": dataclasses.replace(preset("rainbowpo"), link="bradley-terry"),
}


def test_every_factor_on_a_margin_has_its_host():
    mallows = {name for name in presets() if preset(name).uses_dispersion}
    assert mallows == {*HOSTS, "mallows-phi"}  # phi is no factor: its limits are test_mallows_log_prob.py's


@pytest.mark.parametrize("name", HOSTS)
@settings(max_examples=20)
@given(seeds, betas, constants)
def test_constant_dispersion_makes_a_mallows_preset_its_host(name, seed, beta, a):
    logps, num_tokens, ref_logps, _ = batch(seed)
    arguments = logps, num_tokens, ref_logps, torch.full((B,), a, dtype=torch.float64)
    gamma = preset(name).gamma
    host = dataclasses.replace(HOSTS[name], beta=2 * a * beta, gamma=2 * a * gamma)
    assert_same(preset(name, beta=beta), host, arguments, rtol=1e-9)


@settings(max_examples=30)
@given(seeds, st.sampled_from(["dpo", "mallows-theta", "mallows-phi"]), st.floats(1e-14, 1e-10))
def test_focal_at_0_is_its_host(seed, host, gamma):
    assert_same(preset(host, focal_gamma=gamma), preset(host), batch(seed), rtol=1e-7)


@pytest.mark.parametrize("link", sorted(MARGIN_LINKS - {*EXO_LINKS}))
@settings(max_examples=20)
@given(seeds, st.floats(0.02, 0.5), st.floats(0.01, 0.4))
def test_robust_loss_is_the_clean_one_on_average(link, seed, beta, share):
    """Labels that are flipped at random, each with the assumed probability."""
    logps, num_tokens, ref_logps, a = batch(seed)
    robust = PreferenceObjective(link=link, beta=beta, label_smoothing=share, robust=True)
    kept, flipped = (
        call(robust, logps.roll(shift), num_tokens.roll(shift), ref_logps.roll(shift), a).losses for shift in (0, B)
    )
    clean = call(dataclasses.replace(robust, label_smoothing=0.0, robust=False), logps, num_tokens, ref_logps, a)
    size = kept.abs() + flipped.abs() + clean.losses.abs()
    assert ((1 - share) * kept + share * flipped - clean.losses).abs().le(1e-12 * size).all()


def test_robust_loss_with_a_target_margin_is_refused():
    for link in sorted(MARGIN_LINKS - {*EXO_LINKS}):
        with pytest.raises(ValueError, match="robust=True with gamma=1.0 is not unbiased"):
            PreferenceObjective(link=link, gamma=1.0, label_smoothing=0.2, robust=True)
    with pytest.raises(ValueError, match="robust=True with gamma"):
        preset("simpo+robust-dpo")
    options = {"link": "bradley-terry", "beta": 2.0, "gamma": 1.0}
    robust = options | {"label_smoothing": 0.2, "robust": True}
    kept, flipped = (reference.preference_loss(*logps, **robust).loss for logps in ((-1, -2), (-2, -1)))
    assert 0.8 * kept + 0.2 * flipped == pytest.approx(0.7937, abs=1e-4)  # what the formula would give
    assert reference.preference_loss(-1, -2, **options).loss == pytest.approx(0.3133, abs=1e-4)


def test_limits_are_dpo():
    assert_same(preset("focal", focal_gamma=0.0), preset("dpo"))
    assert_same(preset("mallows-theta+focal", focal_gamma=0.0), preset("mallows-theta"))
    assert_same(preset("alpha", divergence_alpha=1.0), preset("dpo"))
    assert_same(preset("alpha", divergence_alpha=0.0), preset("forward-kl"))
    assert_same(preset("ln-dpo", token_weights="uniform", beta=0.1), preset("dpo"))


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_the_alpha_of_f_dpo_s_paper(alpha):
    """f'(u) = (1 - u^-alpha) / alpha of both ratios u = pi / ref."""
    logps, num_tokens, ref_logps, _ = batch()
    chosen, rejected = ((1 - (ref_logps - logps).mul(alpha).exp()) / alpha).chunk(2)
    found = preset("alpha", divergence_alpha=1 - alpha)(logps, num_tokens, ref_logps).losses
    torch.testing.assert_close(found, -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)))


def test_minor_dpo_is_dpo_where_the_policy_favours_the_rejected_response():
    logps, num_tokens, ref_logps, a = batch()
    favoured = logps, num_tokens, logps + ref_logps, a  # ref_logps < 0
    assert_same(preset("minor"), preset("dpo"), favoured)
    assert_same(preset("mallows-phi+minor"), preset("mallows-phi"), favoured)
    disliked = logps - 40, num_tokens, torch.zeros_like(logps), a
    _, gradient = values_and_gradients(preset("minor"), *disliked)
    assert not gradient[B:].any() and gradient[:B].all()


def test_rearrangement_of_sorted_pairs_is_none():
    up = torch.arange(1.0, B + 1, dtype=torch.float64)
    logps, ref_logps = torch.cat([up, -up / 2]), torch.cat([up / 3, up / 4])
    arguments = logps, torch.ones(2 * B), ref_logps, None
    assert_same(preset("aot"), preset("dpo"), arguments)
    unpaired = torch.cat([up, up / 2]), torch.ones(2 * B), torch.zeros(2 * B, dtype=torch.float64), None
    assert_same(preset("aot-unpaired"), preset("dpo"), unpaired)


def test_rearrangement_by_hand():
    """Policy margins 3, 1 and reference margins 0, 2: 1 meets 0 and 3 meets 2, a margin of 1 twice."""
    logps, ref_logps = torch.tensor([-1.0, -4.0, -4.0, -5.0]), torch.tensor([-3.0, -3.0, -3.0, -5.0])
    losses = preset("aot", beta=1.0)(logps, torch.ones(4), ref_logps).losses
    torch.testing.assert_close(losses, torch.full((2,), math.log1p(math.exp(-1))))
    # log-ratios 2, -1 and -1, 0: -1 meets -1, 2 meets 0; the first pair's chosen response has margin 2
    losses = preset("aot-unpaired", beta=1.0)(logps, torch.ones(4), ref_logps).losses
    torch.testing.assert_close(losses, torch.tensor([math.log1p(math.exp(-2)), math.log(2)]))


def test_rainbowpo_by_hand():
    """Means -1 and -2 of the policy, -2 and -4 of the reference: 10 (1 - 1/4 2) - 3/4 1 = 4.25, doubled by a = 1."""
    logps, num_tokens = torch.tensor([-2.0, -2.0]), torch.tensor([2.0, 1.0])
    loss = preset("rainbowpo")(logps, num_tokens, 2 * logps, torch.tensor([1.0]))
    torch.testing.assert_close(loss.losses, torch.tensor([math.log1p(math.exp(-8.5))]))
    torch.testing.assert_close(loss.chosen_rewards, torch.tensor([-5.0]))  # 10 (-1 - -2/4)


def test_every_preset_by_hand():
    """Three tokens each. Chosen: log pi -1 -1 -1, log ref -2 -1 -1. Rejected: -1 -2 -2 and -1 -1 -1. Log-ratios 1
    and -2, the margin 3, z = 0.3 at beta 0.1; means a token 1/3 and -2/3, the margin 1. a = 1 doubles a margin."""
    e = math.exp

    def L(x):  # -log sigmoid
        return math.log1p(e(-x))

    def sig(x):
        return 1 / (1 + e(-x))

    def exo(x):
        return sig(x) * (math.log(sig(x)) - math.log(0.999)) + sig(-x) * (math.log(sig(-x)) - math.log(0.001))

    def discopop(x):
        return L(x) * sig(-x / 0.05) + e(-x) * sig(x / 0.05)

    # phi's cubic, of the value g(1) = 1 / (1 + 1/e) and the slope there, s(2) - s(1) of s(u) = d/du u / (1 - e^-u)
    rise, (s_1, s_2) = sig(1) - 0.5, ((1 - (1 + u) * e(-u)) / (1 - e(-u)) ** 2 for u in (1, 2))
    slope = s_2 - s_1

    expected = {
        "dpo": L(0.3),
        "cdpo": 0.9 * L(0.3) + 0.1 * L(-0.3),
        "robust-dpo": (0.9 * L(0.3) - 0.1 * L(-0.3)) / 0.8,
        "ipo": (0.1 - 0.5) ** 2,
        "hinge": 0.7,
        "simpo": L(2 * (5 / 3 - 1) - 1),
        "ln-dpo": L(10),
        "exo-pair": exo(0.3),
        "discopop": discopop(0.3),
        "sppo-hard": (0.1 - 0.5) ** 2 + (-0.2 + 0.5) ** 2,
        "nca-pair": L(0.1) + L(-0.1) / 2 + L(0.2) / 2,
        "bco-pair": L(0.1) + L(0.2),
        "apo-zero": 1 - sig(0.1) + sig(-0.2),
        "apo-down": sig(0.1) + 1 - sig(0.3),
        "mallows-theta": L(0.6),
        "mallows-phi": -math.log(0.5 + (3 * rise - slope) / 2 * 0.3 + (slope - rise) / 2 * 0.3**3),
        "mallows-ipo": (0.2 - 0.5) ** 2,
        "mallows-hinge": 0.4,
        "mallows-exo": exo(0.6),
        "mallows-discopop": discopop(0.6),
        "mallows-simpo": L(2 * (2 * (5 / 3 - 1) - 1)),
        "rainbowpo": L(2 * (10 * (2 / 3 + 1 / 12) - 0.75)),
        "focal": sig(0.3) ** 0.05 * L(0.3),
        "minor": L(0.1),
        "forward-kl": L(0.1 * ((1 - e(-1)) - (1 - e(2)))),
        "js": L(0.1 * (math.log(2 * sig(1)) - math.log(2 * sig(-2)))),
        "alpha": L(0.1 * ((2 - 2 * e(-0.5)) - (2 - 2 * e(1)))),
        "aot": L(0.3),  # of one pair
        "aot-unpaired": L(0.3),
        "wpo": e(0 - 1) * L(0.3),  # sums of log sum p^2: -3 and -2
    }
    assert {*expected, *ELSEWHERE} == set(presets())
    logps, ref_logps, num_tokens = torch.tensor([[-3.0, -5.0], [-4.0, -3.0], [3.0, 3.0]], dtype=torch.float64)
    found = {}
    for name in expected:
        objective = preset(name)
        found[name] = objective(
            logps,
            num_tokens,
            None if objective.reference_free else ref_logps,
            torch.ones(1, dtype=torch.float64) if objective.uses_dispersion else None,
            alignment=logps.new_tensor([-3.0, -2.0]) if objective.on_policy_weighting else None,
        ).losses.item()
    assert found == pytest.approx(expected, rel=1e-12)


def test_wpo_by_hand():
    """At pi = ref the loss is log 2. Three tokens of probability 1/2 among two such, and one of 1/4 beside one of 3/4:
    (1/2) / (1/2) = 1 and (1/4) / (10/16) = 2/5."""
    logps, num_tokens = torch.tensor([-3 * math.log(2), -math.log(4)]), torch.tensor([3.0, 1.0])
    alignment = torch.tensor([3 * math.log(1 / 2), math.log(10 / 16)])
    losses = preset("wpo")(logps, num_tokens, logps, alignment=alignment).losses
    torch.testing.assert_close(losses, torch.tensor([math.log(2) * 2 / 5]))
    with pytest.raises(ValueError, match="on_policy_weighting needs alignment"):
        preset("wpo")(logps, num_tokens, logps)


def test_focal_warns_where_its_gradient_turns_at_the_first_step():
    logps, num_tokens, _, _ = batch()
    for name, fields, turning in (
        ("focal", {}, 1.4427),
        ("mallows-phi+focal", {}, 1.4427),
        ("focal", {"gamma": 1.0}, 0.7615),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            preset(name, focal_gamma=turning - 0.001, **fields)
        with pytest.warns(UserWarning, match=f"is at least {turning:.3g}: at the first step every gradient"):
            objective = preset(name, focal_gamma=turning + 0.001, **fields)
        if "mallows" not in name:
            _, gradient = values_and_gradients(objective, logps, num_tokens, logps, None)
            assert (gradient[:B] > 0).all()
