"""The virtual reference of several models: worked examples, its definition, the cases in which it is one model."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mallowspo.functional import mixed_reference_logps
from mallowspo.objective import PreferenceObjective, preset

# Anchor and another reference, log-probabilities by hand: the anchor prefers the chosen response by 1, the other by 3.
CHOSEN = torch.tensor([[-4.0], [-2.0]], dtype=torch.float64)
REJECTED = torch.tensor([[-5.0], [-5.0]], dtype=torch.float64)


def mixed(chosen=CHOSEN, rejected=REJECTED, **options):
    return tuple(values.item() for values in mixed_reference_logps(chosen, rejected, **options))


def harmonic(weights, logps):
    return -math.log(math.fsum(w / math.exp(logp) for w, logp in zip(weights, logps, strict=True)))


def test_fixed_weights_by_hand():
    """1 / (0.25 e^4 + 0.75 e^2) and 1 / (e^5): the second response is the same to both."""
    assert mixed(reference_weights=(0.25, 0.75)) == pytest.approx((harmonic((0.25, 0.75), (-4, -2)), -5.0))


def test_adaptive_weights_by_hand():
    """A preference of 1 against one of 3: a quarter and three quarters."""
    assert mixed() == pytest.approx(mixed(reference_weights=(0.25, 0.75)), abs=1e-5)
    swapped = mixed(swap_reference_weights=True)  # the authors' code
    assert swapped == pytest.approx(mixed(reference_weights=(0.75, 0.25)), abs=1e-5) and swapped != mixed()


def test_the_authors_expression_for_two():
    """l1 + l2 - log(alpha e^l1 + (1 - alpha) e^l2), with l2 the anchor and alpha from l1."""
    alpha = 3 / (3 + 1 + 1e-6)
    expected = [
        l1 + l2 - math.log(alpha * math.exp(l1) + (1 - alpha) * math.exp(l2)) for l2, l1 in ((-4, -2), (-5, -5))
    ]
    assert mixed(swap_reference_weights=True) == pytest.approx(expected, abs=1e-12)


def test_clipping_by_hand():
    """-2 is clipped to -4 + 0.1 * 4; adaptively the width is 0.1 * 3 / (3 + 5) of it, the means being -3 and -5."""
    weights = {"reference_weights": (0.5, 0.5)}
    chosen, rejected = mixed(**weights, reference_clip=0.1)
    assert (chosen, rejected) == pytest.approx((harmonic((0.5, 0.5), (-4, -3.6)), -5.0))
    chosen, rejected = mixed(**weights, reference_clip=0.1, adaptive_clip=True)
    assert (chosen, rejected) == pytest.approx((harmonic((0.5, 0.5), (-4, -4 + 0.1 * 3 / 8 * 4)), -5.0))
    below = torch.tensor([[-4.0], [-9.0]], dtype=torch.float64)
    assert mixed(below, REJECTED, **weights, reference_clip=0.1)[0] == pytest.approx(harmonic((0.5, 0.5), (-4, -4.4)))


def test_the_anchor_is_never_clipped_and_weights_are_of_the_unclipped():
    assert mixed(reference_clip=0.0) == pytest.approx((-4.0, -5.0))
    chosen = mixed(reference_clip=0.1)[0]
    assert chosen == pytest.approx(harmonic((0.25, 0.75), (-4, -3.6)), abs=1e-5)


HOSTS = ("bradley-terry", "ipo", "hinge", "mallows-theta", "mallows-phi")
LOGPS = st.floats(-500, -0.01)
OPTIONS = st.fixed_dictionaries(
    {
        "reference_clip": st.sampled_from([None, 0.0, 0.1, 2.0]),
        "adaptive_clip": st.booleans(),
        "fixed": st.booleans(),
    }
).filter(lambda o: o["reference_clip"] is not None or not o["adaptive_clip"])


def options_for(options, count):
    fixed = tuple((k + 1) * 2 / (count * (count + 1)) for k in range(count))
    mixture = {name: value for name, value in options.items() if name != "fixed"}
    return mixture | {"reference_weights": fixed if options["fixed"] else "adaptive"}


@st.composite
def references(draw, identical=False):
    count, pairs = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    values = [draw(st.lists(LOGPS, min_size=2 * pairs, max_size=2 * pairs)) for _ in range(1 if identical else count)]
    return torch.tensor(values * (count if identical else 1), dtype=torch.float64)


@settings(max_examples=60)
@given(references(), OPTIONS)
def test_the_mixture_lies_between_its_references(logps, options):
    chosen, rejected = mixed_reference_logps(*logps.chunk(2, dim=1), **options_for(options, len(logps)))
    found = torch.cat([chosen, rejected])
    assert (found >= logps.min(0).values - 1e-9).all() and (found <= logps.max(0).values + 1e-9).all()
    if options["reference_clip"] == 0:
        torch.testing.assert_close(found, logps[0], rtol=1e-12, atol=1e-12)
    if options["fixed"] and options["reference_clip"] is None:
        weights = options_for(options, len(logps))["reference_weights"]
        low = logps.min(0).values.tolist()  # shifted, so that the plain sum does not overflow
        for i, column in enumerate(logps.T.tolist()):
            expected = low[i] + harmonic(weights, [logp - low[i] for logp in column])
            assert found[i].item() == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60)
@given(references(identical=True), OPTIONS, st.sampled_from(HOSTS), st.booleans())
def test_identical_references_make_mrpo_the_host(ref_logps, options, link, mean):
    pairs = ref_logps.shape[1] // 2
    generator = torch.Generator().manual_seed(0)
    logps = (-50 * torch.rand(2 * pairs, generator=generator, dtype=torch.float64)).requires_grad_()
    num_tokens = torch.arange(1, 2 * pairs + 1)
    dispersion = torch.full((pairs,), 0.7, dtype=torch.float64)
    results = []
    for fields, ref in ((options_for(options, len(ref_logps)), ref_logps), ({}, ref_logps[0])):
        objective = PreferenceObjective(link, token_weights="mean" if mean else "uniform", **fields)
        losses = objective(logps, num_tokens, ref, dispersion if objective.uses_dispersion else None).losses
        results.append((losses.detach(), torch.autograd.grad(losses.sum(), logps)[0]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_references_that_prefer_nothing_leave_the_anchor():
    chosen = torch.tensor([[-3.0], [-7.0], [-1.0]])
    assert mixed(chosen, chosen) == pytest.approx((-3.0, -3.0))
    zeros = torch.zeros(2, 1)  # a model that is sure of both responses
    assert mixed(zeros, zeros, reference_clip=0.1, adaptive_clip=True) == (0.0, 0.0)


def test_long_responses_in_float32():
    chosen, rejected = torch.tensor([[-2000.0], [-2100.0]]), torch.tensor([[-1900.0], [-2500.0]])
    assert mixed(chosen, rejected) == pytest.approx(mixed(chosen.double(), rejected.double()), rel=1e-6)


def test_the_preset_is_the_authors_setting():
    objective = preset("mrpo")
    assert (objective.reference_weights, objective.reference_clip, objective.adaptive_clip) == ("adaptive", 0.1, True)
    assert preset("mallows-phi+mrpo").uses_dispersion and preset("mrpo+d2po").weighs_tokens


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"reference_weights": "even"}, "reference_weights must be 'adaptive' or one number a reference, got 'even'"),
        ({"reference_weights": (0.5, 0.6)}, r"must be positive and add up to 1, got \(0.5, 0.6\)"),
        ({"reference_weights": [0.0, 1.0]}, r"must be positive and add up to 1, got \(0.0, 1.0\)"),
        ({"reference_weights": (0.5, math.nan)}, "must be positive and add up to 1"),
        ({"reference_clip": 0.1}, "reference_clip is for several references: set reference_weights"),
        ({"adaptive_clip": True}, "adaptive_clip is for several references: set reference_weights"),
        ({"swap_reference_weights": True}, "swap_reference_weights is for several references: set reference_weights"),
        ({"reference_weights": "adaptive", "adaptive_clip": True}, "adaptive_clip shares out .* reference_clip"),
        ({"reference_weights": "adaptive", "reference_clip": -0.1}, "reference_clip must be finite and >= 0 .*-0.1"),
        (
            {"reference_weights": "adaptive", "reference_free": True},
            "reference_free=True .* does not go with reference_weights='adaptive'",
        ),
    ],
)
def test_impossible_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        PreferenceObjective(**fields)


def test_the_number_of_references():
    num_tokens, one, three = torch.ones(2), torch.zeros(2), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="3 references need reference_weights"):
        preset("dpo")(one, num_tokens, three)
    with pytest.raises(ValueError, match=r"reference_weights \(MRPO\) mix several references"):
        preset("mrpo")(one, num_tokens, one)
    with pytest.raises(ValueError, match="reference_weights has 2 numbers for 3 references"):
        preset("mrpo", reference_weights=(0.5, 0.5))(one, num_tokens, three)
    with pytest.raises(ValueError, match="swap_reference_weights is defined for two references, got 3"):
        preset("mrpo", swap_reference_weights=True)(one, num_tokens, three)
    with pytest.raises(ValueError, match=r"must be \[K, B\] twice, got \[2\] and \[2\]"):
        mixed_reference_logps(one, one)


@pytest.mark.parametrize("weights", [(0.5, 0.501), (0.333, 0.333, 0.333)])
def test_weights_that_nearly_add_up(weights):
    with pytest.raises(ValueError, match="add up to 1"):
        PreferenceObjective(reference_weights=weights)
    PreferenceObjective(reference_weights=(1 / 3, 1 / 3, 1 / 3))  # but for rounding
