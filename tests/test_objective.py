"""PreferenceObjective and its presets against the formulas of the methods they are named after."""

import dataclasses
import inspect
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import sigmoid
from torch.nn.functional import logsigmoid, relu, softplus

from mallowspo import choices, reference
from mallowspo import functional as F
from mallowspo.objective import PreferenceObjective, preset, presets

B = 40
# Of token weights and several references: test_token_weights.py, test_mixture.py.
ELSEWHERE = ("d2po", "ld-dpo", "sampo", "bmc", "mrpo")
NAMES = [name for name in presets() if name not in ELSEWHERE]


def batch(seed=0):
    """logps, num_tokens and ref_logps [2B], neg_log_dispersion [B]."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = torch.randint(1, 30, (2 * B,), generator=generator)
    logps, ref_logps = (
        -torch.rand(2 * B, generator=generator, dtype=torch.float64) * 2 * num_tokens for _ in range(2)
    )
    return logps, num_tokens, ref_logps, 0.05 + 2 * torch.rand(B, generator=generator, dtype=torch.float64)


def call(objective, logps, num_tokens, ref_logps, dispersion):
    """The objective with the arguments that it takes."""
    return objective(
        logps,
        num_tokens,
        None if objective.reference_free else ref_logps,
        dispersion if objective.uses_dispersion else None,
        alignment=alignment(logps) if objective.on_policy_weighting else None,
    )


def alignment(logps):
    """A log sum_v p_v^2 for each response."""
    return -0.3 * torch.arange(1.0, len(logps) + 1, dtype=logps.dtype).remainder(7)


def formulas(logps, num_tokens, ref_logps, a):
    """Loss of each method as its paper or its authors' code writes it (IPO times beta^2), with their beta."""
    (pc, pr), (rc, rr), (nc, nr), (sc, sr) = (x.chunk(2) for x in (logps, ref_logps, num_tokens, alignment(logps)))
    h = (pc - pr) - (rc - rr)
    per_token = (pc - rc) / nc - (pr - rr) / nr
    simpo = 2.0 * (pc / nc - pr / nr - 0.5)  # gamma_beta_ratio 0.5
    win, lose = logsigmoid(0.1 * h), logsigmoid(-0.1 * h)
    r_w, r_l = pc - rc, pr - rr
    x, x_w, x_l = 0.1 * h, 0.1 * r_w, 0.1 * r_l
    rainbow = 10 * (pc / nc - pr / nr - 0.25 * (rc / nc - rr / nr) - 0.75 * 0.1)

    def dpo(s):
        return -logsigmoid(0.1 * (s(r_w) - s(r_l)))

    def rearranged(first, second):  # put back to the pair of the first
        order = first.argsort()
        return -logsigmoid(0.1 * (first[order] - second.sort().values))[order.argsort()]

    def exo(x):
        return sigmoid(x) * (logsigmoid(x) - math.log(0.999)) + sigmoid(-x) * (logsigmoid(-x) - math.log(0.001))

    def discopop(x):
        return -logsigmoid(x) * sigmoid(-x / 0.05) + torch.exp(-x) * sigmoid(x / 0.05)

    return {
        "ln-dpo": -logsigmoid(10 * per_token),
        "exo-pair": exo(x),
        "mallows-exo": exo(2 * a * x),
        "discopop": discopop(x),
        "mallows-discopop": discopop(2 * a * x),
        "sppo-hard": 0.1**2 * ((r_w - 5) ** 2 + (r_l + 5) ** 2),
        "nca-pair": softplus(-x_w) + softplus(x_w) / 2 + softplus(x_l) / 2,
        "bco-pair": softplus(-x_w) + softplus(x_l),
        "apo-zero": 1 - sigmoid(x_w) + sigmoid(x_l),
        "apo-down": sigmoid(x_w) + 1 - sigmoid(x),
        "rainbowpo": -logsigmoid(2 * a * rainbow),
        "focal": -(sigmoid(x) ** 0.05) * win,
        "minor": -logsigmoid(0.1 * (r_w - relu(r_l))),
        "forward-kl": dpo(lambda r: 1 - torch.exp(-r)),
        "js": dpo(lambda r: math.log(2) + logsigmoid(r)),
        "alpha": dpo(lambda r: 2 - 2 * torch.exp(-r / 2)),
        "aot": rearranged(pc - pr, rc - rr),
        "aot-unpaired": rearranged(r_w, r_l),
        "wpo": -win * torch.exp((pc - sc) / nc + (pr - sr) / nr).detach(),
        "dpo": -win,
        "cdpo": -0.9 * win - 0.1 * lose,
        "robust-dpo": (-0.9 * win + 0.1 * lose) / 0.8,
        "ipo": 0.1**2 * (per_token - 1 / (2 * 0.1)) ** 2,
        "hinge": relu(1 - 0.1 * h),
        "simpo": -logsigmoid(simpo),
        "mallows-theta": -logsigmoid(2 * a * 0.1 * h),
        "mallows-phi": -reference.torch_mallows_log_prob(0.1 * h, a),
        "mallows-ipo": (2 * a * 0.1 * per_token - 0.5) ** 2,
        "mallows-hinge": relu(1 - 2 * a * 0.1 * h),
        "mallows-simpo": -logsigmoid(2 * a * simpo),
    }


def test_every_preset_has_a_formula():
    assert set(presets()) == {*formulas(*batch()), *ELSEWHERE}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sft_weight", [0.0, 0.3])
def test_preset_is_its_formula(name, sft_weight):
    logps, num_tokens, ref_logps, dispersion = batch()
    objective = preset(name, sft_weight=sft_weight)
    assert objective.uses_dispersion == (name.startswith("mallows") or name == "rainbowpo")
    assert objective.reference_free == name.endswith("simpo")

    logps.requires_grad_()
    actual = call(objective, logps, num_tokens, ref_logps, dispersion)
    expected = formulas(logps, num_tokens, ref_logps, dispersion)[name]
    expected = expected - sft_weight * logps[:B] / num_tokens[:B]
    torch.testing.assert_close(actual.losses, expected, rtol=1e-10, atol=1e-10)
    gradients = (torch.autograd.grad(x.sum(), logps)[0] for x in (actual.losses, expected))
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_rewards_are_beta_times_the_score(name):
    logps, num_tokens, ref_logps, dispersion = batch()
    objective = preset(name, sft_weight=0.5)
    result = call(objective, logps.requires_grad_(), num_tokens, ref_logps, dispersion)
    share = 0.25 if name == "rainbowpo" else 1
    score = logps.detach() - (0 if objective.reference_free else share * ref_logps)
    if objective.token_weights == "mean":
        score = score / num_tokens
    rewards = torch.cat([result.chosen_rewards, result.rejected_rewards])
    torch.testing.assert_close(rewards, objective.beta * score, rtol=1e-12, atol=1e-12)
    assert not rewards.requires_grad and result.losses.shape == result.chosen_rewards.shape == (B,)


# Each field and another value for it; the objective they change reads every one of them that no other excludes.
READS_EVERYTHING = PreferenceObjective(link="mallows-phi", beta=0.1, label_smoothing=0.1)
ON = {
    "focal_gamma": preset("mallows-phi"),
    "clip_rejected": preset("mallows-phi"),
    "divergence_alpha": preset("alpha"),
    "discopop_tau": preset("discopop"),
    "reference_mixing": preset("mallows-phi"),
    "rearrangement": preset("dpo"),
}
CHANGES = {
    "link": "mallows-theta",
    "beta": 0.2,
    "gamma": 0.5,
    "token_weights": "mean",
    "reference_free": True,
    "label_smoothing": 0.2,
    "robust": True,
    "smoothing": 2.0,
    "focal_gamma": 0.5,
    "clip_rejected": True,
    "divergence": "js",
    "divergence_alpha": 0.7,
    "discopop_tau": 0.5,
    "reference_mixing": 0.7,
    "rearrangement": "paired",
    "on_policy_weighting": True,
    "sft_weight": 0.1,
}
# Those of token weights and several references, in the same places as their presets.
FIELDS_ELSEWHERE = {
    *("token_decay", "ld_alpha", "down_sampling", "bridge_delta", "own_token_weights"),
    *("reference_weights", "reference_clip", "adaptive_clip", "swap_reference_weights"),
}


def test_every_field_has_a_change():
    assert {*CHANGES, *FIELDS_ELSEWHERE} == {field.name for field in dataclasses.fields(PreferenceObjective)}


@pytest.mark.parametrize("field, value", CHANGES.items())
def test_every_field_changes_the_loss(field, value):
    unchanged = ON.get(field, READS_EVERYTHING)
    changed = dataclasses.replace(unchanged, **{field: value})
    assert getattr(unchanged, field) != value
    before, after = (call(objective, *batch()).losses for objective in (unchanged, changed))
    assert (before != after).sum() > B / 4


@pytest.mark.parametrize("name", presets())
def test_overrides_are_replaced_fields(name):
    assert preset(name, beta=0.7, sft_weight=0.2) == dataclasses.replace(preset(name), beta=0.7, sft_weight=0.2)
    assert preset(name) == preset(name) and preset(name).beta != 0.7


def test_one_set_of_defaults():
    fields = {field.name: field.default for field in dataclasses.fields(PreferenceObjective)}
    arguments = {name: p.default for name, p in inspect.signature(F.preference_loss).parameters.items()}
    for name, default in choices.PAIR_CHOICES.items():
        assert fields[name] == arguments[name] == default
    assert tuple(inspect.signature(choices.operator_settings).parameters) == tuple(choices.PAIR_CHOICES)


def test_the_default_is_mallows_theta():
    assert PreferenceObjective() == preset("mallows-theta")


def test_an_objective_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("dpo").beta = 1.0


# --- identities ------------------------------------------------------------------------------------------------------


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


def test_limits_are_dpo():
    assert_same(preset("focal", focal_gamma=0.0), preset("dpo"))
    assert_same(preset("mallows-theta+focal", focal_gamma=0.0), preset("mallows-theta"))
    assert_same(preset("alpha", divergence_alpha=1.0), preset("dpo"))
    assert_same(preset("alpha", divergence_alpha=0.0), preset("forward-kl"))
    assert_same(preset("ln-dpo", token_weights="uniform", beta=0.1), preset("dpo"))


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


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown preset 'sigmoid'") as error:
        preset("sigmoid")
    assert all(name in str(error.value) for name in presets())


def test_an_unknown_field():
    with pytest.raises(TypeError, match="betta"):
        preset("dpo", betta=0.2)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"link": "sigmoid"}, "unknown link 'sigmoid'; choose one of .*bradley-terry"),
        ({"beta": 0}, "beta must be finite and positive, got 0"),
        ({"beta": -0.1}, "beta must be finite and positive, got -0.1"),
        ({"beta": math.nan}, "beta must be finite and positive, got nan"),
        ({"gamma": math.inf}, "gamma must be finite, got inf"),
        ({"token_weights": "sum"}, "unknown token_weights 'sum'; choose one of uniform, mean"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 0.5\), got -0.1"),
        ({"robust": True}, "robust=True corrects label_smoothing, which is 0"),
        ({"link": "mallows-phi", "smoothing": -1.0}, "smoothing must be finite and >= 0 .*, got -1.0"),
        ({"smoothing": 2.0}, "smoothing=2.0 is read by the link 'mallows-phi' alone, not by 'mallows-theta'"),
        ({"sft_weight": -1.0}, "sft_weight must be finite and >= 0, got -1.0"),
        ({"sft_weight": math.nan}, "sft_weight must be finite and >= 0, got nan"),
        ({"discopop_tau": 0.1}, "discopop_tau=0.1 is read by the link 'discopop' and 'mallows-discopop' alone"),
        (
            {"divergence_alpha": 0.1},
            "divergence_alpha=0.1 is read by the divergence 'alpha' alone, not by 'reverse-kl'",
        ),
        ({"reference_mixing": 1.5}, r"reference_mixing must be None or in \[0, 1\], got 1.5"),
        ({"rearrangement": "sorted"}, "unknown rearrangement 'sorted'; choose one of none, paired, unpaired"),
        ({"rearrangement": "paired"}, "link='mallows-theta' weighs each pair .* rearrangement='paired'"),
        ({"link": "nca", "reference_free": True}, "link='nca' compares .* reference_free=True; leave one of them out"),
        ({"link": "apo-zero", "rearrangement": "paired"}, "link='apo-zero' .* rearrangement='paired'"),
        ({"clip_rejected": True, "reference_free": True}, "clip_rejected=True clips .* reference_free=True"),
        ({"divergence": "js", "token_weights": "mean"}, "divergence='js' is between whole .* token_weights='mean'"),
        ({"reference_free": True, "reference_mixing": 0.5}, "reference_free=True leaves .* reference_mixing=0.5"),
        (
            {"link": "hinge", "rearrangement": "unpaired", "on_policy_weighting": True},
            "rearrangement='unpaired' sorts margins, .* on_policy_weighting=True",
        ),
        ({"link": "hinge", "focal_gamma": 0.5}, "focal_gamma=0.5 .* the link 'hinge'"),
    ],
)
def test_impossible_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        PreferenceObjective(**fields)
    with pytest.raises(ValueError, match=message):
        preset("mallows-theta", **fields)


def test_a_reference_where_and_only_where_it_is_read():
    logps, num_tokens, ref_logps, dispersion = batch()
    with pytest.raises(ValueError, match="reference_free is False, so ref_logps must be given"):
        preset("dpo")(logps, num_tokens)
    with pytest.raises(ValueError, match="reference_free is True, so ref_logps must not be given"):
        preset("simpo")(logps, num_tokens, ref_logps)
    with pytest.raises(ValueError, match="link 'mallows-theta' needs neg_log_dispersion"):
        preset("mallows-theta")(logps, num_tokens, ref_logps)
    with pytest.raises(ValueError, match="link 'bradley-terry' does not read neg_log_dispersion"):
        preset("dpo")(logps, num_tokens, ref_logps, dispersion)


def test_links_agree_with_the_oracle():
    assert set(F.LINKS) == set(reference.LINKS)
    assert F.MALLOWS_LINKS == set(reference.DISPERSION_LINKS)
    assert choices.MARGIN_LINKS == set(reference.MARGIN_LINKS)
    assert set(choices.PROBABILITY_LINKS) == set(reference.PROBABILITY_LINKS)
