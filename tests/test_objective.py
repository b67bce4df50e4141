"""PreferenceObjective and its presets against the formulas of the methods they are named after, its fields and what
cannot be. Identities of the presets and their values by hand: test_objective_identities.py."""

import dataclasses
import inspect
import math

import pytest
import torch
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


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown preset 'mallows'") as error:
        preset("mallows")
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
        ({"sft_weight": math.inf}, "sft_weight must be finite and >= 0, got inf"),
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
            {"link": "bradley-terry", "rearrangement": "paired", "label_smoothing": 0.1, "robust": True},
            "rearrangement='paired' sorts margins, .* robust=True",
        ),
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


@pytest.mark.parametrize("rearrangement", ["paired", "unpaired"])
def test_rearranged_margins_have_the_offset_of_reference_mixing(rearrangement):
    """Of one pair nothing is rearranged, whatever else the margin is made of."""
    options = {"gamma": 0.7, "reference_mixing": 0.25}
    logps, num_tokens, ref_logps, _ = batch()
    one = [0, len(logps) // 2]
    losses = [
        objective(logps[one], num_tokens[one], ref_logps[one]).losses
        for objective in (preset("dpo", **options), preset("dpo", rearrangement=rearrangement, **options))
    ]
    torch.testing.assert_close(*losses)


OTHER = {
    "reference_free": True, "clip_rejected": True, "divergence": "js", "on_policy_weighting": True,
    "reference_mixing": 0.5, "token_weights": "mean", "token_decay": 0.9, "ld_alpha": 0.5, "down_sampling": True,
    "bridge_delta": 2.0, "own_token_weights": True, "reference_weights": "adaptive", "rearrangement": "paired",
}  # fmt: skip
EXCLUSIONS = [
    ({"rearrangement": "unpaired"}, "reference_free clip_rejected divergence on_policy_weighting"),
    ({"clip_rejected": True}, "reference_free reference_mixing"),
    ({"divergence": "js"}, "token_weights token_decay ld_alpha down_sampling bridge_delta reference_free"),
    ({"divergence": "js"}, "reference_mixing"),
    ({"down_sampling": True}, "token_weights ld_alpha"),
    ({"reference_free": True}, "reference_mixing reference_weights"),
    ({"reference_free": True, "down_sampling": True}, "own_token_weights"),
    ({"link": "nca"}, "reference_free reference_mixing rearrangement"),
    ({"link": "mallows-ipo"}, "rearrangement"),
]


@pytest.mark.parametrize("fields, other", [(f, o) for f, others in EXCLUSIONS for o in others.split()])
def test_every_exclusion(fields, other):
    fields = {"link": "bradley-terry"} | fields
    PreferenceObjective(**fields)  # possible by itself
    with pytest.raises(ValueError, match=f"does not go with {other}="):
        PreferenceObjective(**fields | {other: OTHER[other]})
