"""PreferenceObjective and its presets against the formulas of the methods they are named after."""

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import logsigmoid, relu

from mallowspo import functional as F
from mallowspo import reference
from mallowspo.objective import PreferenceObjective, preset, presets

B = 40


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
    )


def formulas(logps, num_tokens, ref_logps, a):
    """Loss of each method as its paper or its authors' code writes it (IPO times beta^2), with their beta."""
    (pc, pr), (rc, rr), (nc, nr) = (x.chunk(2) for x in (logps, ref_logps, num_tokens))
    h = (pc - pr) - (rc - rr)
    per_token = (pc - rc) / nc - (pr - rr) / nr
    simpo = 2.0 * (pc / nc - pr / nr - 0.5)  # gamma_beta_ratio 0.5
    win, lose = logsigmoid(0.1 * h), logsigmoid(-0.1 * h)
    return {
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
    assert set(presets()) == set(formulas(*batch()))


@pytest.mark.parametrize("name", presets())
@pytest.mark.parametrize("sft_weight", [0.0, 0.3])
def test_preset_is_its_formula(name, sft_weight):
    logps, num_tokens, ref_logps, dispersion = batch()
    objective = preset(name, sft_weight=sft_weight)
    assert objective.uses_dispersion == name.startswith("mallows")
    assert objective.reference_free == name.endswith("simpo")

    logps.requires_grad_()
    actual = call(objective, logps, num_tokens, ref_logps, dispersion)
    expected = formulas(logps, num_tokens, ref_logps, dispersion)[name]
    expected = expected - sft_weight * logps[:B] / num_tokens[:B]
    torch.testing.assert_close(actual.losses, expected, rtol=1e-10, atol=1e-10)
    gradients = (torch.autograd.grad(x.sum(), logps)[0] for x in (actual.losses, expected))
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", presets())
def test_rewards_are_beta_times_the_score(name):
    logps, num_tokens, ref_logps, dispersion = batch()
    objective = preset(name, sft_weight=0.5)
    result = call(objective, logps.requires_grad_(), num_tokens, ref_logps, dispersion)
    score = logps.detach() - (0 if objective.reference_free else ref_logps)
    if objective.token_weights == "mean":
        score = score / num_tokens
    rewards = torch.cat([result.chosen_rewards, result.rejected_rewards])
    torch.testing.assert_close(rewards, objective.beta * score, rtol=1e-12, atol=1e-12)
    assert not rewards.requires_grad and result.losses.shape == result.chosen_rewards.shape == (B,)


# Each field and another value for it; the objective they change reads every one of them.
READS_EVERYTHING = PreferenceObjective(link="mallows-phi", beta=0.1, label_smoothing=0.1)
CHANGES = {
    "link": "mallows-theta",
    "beta": 0.2,
    "gamma": 0.5,
    "token_weights": "mean",
    "reference_free": True,
    "label_smoothing": 0.2,
    "robust": True,
    "smoothing": 2.0,
    "sft_weight": 0.1,
}


def test_every_field_has_a_change():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(PreferenceObjective)}


@pytest.mark.parametrize("field, value", CHANGES.items())
def test_every_field_changes_the_loss(field, value):
    changed = dataclasses.replace(READS_EVERYTHING, **{field: value})
    assert getattr(READS_EVERYTHING, field) != value
    before, after = (call(objective, *batch()).losses for objective in (READS_EVERYTHING, changed))
    assert (before != after).sum() > B / 4


@pytest.mark.parametrize("name", presets())
def test_overrides_are_replaced_fields(name):
    assert preset(name, beta=0.7, gamma=0.2) == dataclasses.replace(preset(name), beta=0.7, gamma=0.2)
    assert preset(name) == preset(name) and preset(name).beta != 0.7


def test_the_default_is_mallows_theta():
    assert PreferenceObjective() == preset("mallows-theta")


def test_an_objective_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("dpo").beta = 1.0


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
    assert {link for link in F.LINKS if PreferenceObjective(link=link).uses_dispersion} == set(
        reference.DISPERSION_LINKS
    )
