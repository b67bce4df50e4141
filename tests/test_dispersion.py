"""Dispersion from measurements and its scale. The cached pass of the reference: test_dispersion_cache.py."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model

from mallowspo import functional as F
from mallowspo import reference
from mallowspo.dispersion import (
    AGREEMENT_CEILING,
    agreement_to_neg_log_dispersion,
    answer_log_odds,
    calibrated_scale,
    fit_log_odds,
    log_odds_to_neg_log_dispersion,
)

THETA_LINKS = ("mallows-theta", "mallows-ipo", "mallows-hinge")
SHARES = st.floats(0.5, AGREEMENT_CEILING, exclude_min=True)


# Agreement


@given(SHARES, st.sampled_from(THETA_LINKS))
def test_theta_link_returns_the_agreement(share, link):
    (a,) = agreement_to_neg_log_dispersion([share], link)
    assert 1 / (1 + np.exp(-2 * a)) == pytest.approx(share, rel=1e-14)
    assert a > 0 or share < 0.5 + 1e-15


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 1.0])
@given(SHARES)
def test_phi_link_returns_the_agreement(smoothing, share):
    (a,) = agreement_to_neg_log_dispersion([share], "mallows-phi")
    one = torch.ones(1, dtype=torch.float64)
    found = F.mallows_log_prob(one, torch.tensor([a]), smoothing=smoothing).exp().item()
    assert found == pytest.approx(share, rel=1e-12)
    assert np.exp(reference.mallows_log_prob(1.0, a, smoothing)[0]) == pytest.approx(share, rel=1e-12)


@given(st.floats(0.55, AGREEMENT_CEILING), st.floats(1.01, 5.0))
def test_phi_link_smoothed_further_would_not(share, smoothing):
    (a,) = agreement_to_neg_log_dispersion([share], "mallows-phi")
    assert np.exp(reference.mallows_log_prob(1.0, a, smoothing)[0]) < share


@pytest.mark.parametrize("link", sorted(F.MALLOWS_LINKS))
def test_agreement_above_the_ceiling_counts_as_the_ceiling(link):
    values = agreement_to_neg_log_dispersion([0.75, AGREEMENT_CEILING, 0.995, 1.0, 1], link)
    assert values.dtype == np.float64 and values.shape == (5,)
    assert values[1] == values[2] == values[3] == values[4] > values[0] > 0 and np.isfinite(values).all()
    factor = 1 if link == "mallows-phi" else 0.5
    assert values[:2] == pytest.approx([factor * np.log(3), factor * np.log(99)])


@pytest.mark.parametrize("value", [0.5, 0.0, -1.0, 1.0000001, np.nan, np.inf])
def test_agreement_outside_its_range(value):
    with pytest.raises(ValueError, match=rf"\(0.5, 1\], got {value}.* at index 1"):
        agreement_to_neg_log_dispersion([0.7, value, 0.2], "mallows-theta")


@pytest.mark.parametrize("link", ["bradley-terry", "ipo", "nonsense"])
def test_a_link_without_dispersion_has_no_inverse(link):
    with pytest.raises(ValueError, match=f"'{link}' has no dispersion.*mallows-phi"):
        agreement_to_neg_log_dispersion([0.7], link)


# A model's opinion

LOG_ODDS = st.lists(st.floats(-20, 20), min_size=1, max_size=20)


@given(LOG_ODDS, st.sampled_from(sorted(F.MALLOWS_LINKS)), st.floats(-3, 3), st.floats(0, 3))
def test_log_odds_stand_for_the_agreement_that_the_link_then_returns(log_odds, link, offset, slope):
    a = log_odds_to_neg_log_dispersion(log_odds, link, offset=offset, slope=slope)
    logit = np.array([max(offset + slope * abs(x), 0.0) for x in log_odds])
    assert a.dtype == np.float64 and a == pytest.approx(logit / (1 if link == "mallows-phi" else 2))
    known = logit[(logit > 1e-6) & (logit < np.log(99))]
    if len(known):
        share = 1 / (1 + np.exp(-known))
        expected = agreement_to_neg_log_dispersion(share, link)
        assert log_odds_to_neg_log_dispersion(-known, link) == pytest.approx(expected, rel=1e-6)


@given(st.integers(0, 10**6), st.floats(-1, 1), st.floats(0.1, 2))
def test_offset_and_slope_are_found_again(seed, offset, slope):
    index = np.random.default_rng(seed).uniform(1.5, 3, 30)
    logit = offset + slope * index
    index, logit = index[(logit >= 0) & (logit < 4.5)], logit[(logit >= 0) & (logit < 4.5)]
    if len(index) < 3:
        return
    signs = np.where(np.arange(len(index)) % 2, 1, -1)
    assert fit_log_odds(signs * index, 1 / (1 + np.exp(-logit))) == pytest.approx((offset, slope), abs=1e-3)


@pytest.mark.parametrize("index", [[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]], ids=["the wrong way round", "all the same"])
def test_an_index_that_says_nothing_gives_the_mean_agreement(index):
    assert fit_log_odds(index, [0.9, 0.8, 0.55]) == pytest.approx((np.log(3), 0.0))


def test_fitted_line_beats_its_neighbours():
    generator = np.random.default_rng(0)
    index, agreement = generator.exponential(size=200), generator.uniform(0.5, 1, 200)
    agreement = np.maximum(agreement, 1 / (1 + np.exp(-0.5 * index)))

    def likelihood(offset, slope):
        share, target = 1 / (1 + np.exp(-offset - slope * index)), np.minimum(agreement, AGREEMENT_CEILING)
        return np.sum(target * np.log(share) + (1 - target) * np.log(1 - share))

    offset, slope = fit_log_odds(index, agreement)
    assert slope > 0.05
    for change in (1e-3, -1e-3):
        assert likelihood(offset, slope) > likelihood(offset + change, slope)
        assert likelihood(offset, slope) > likelihood(offset, slope + change)


@pytest.mark.parametrize(
    ("log_odds", "agreement", "message"),
    [
        ([1.0, np.nan], [0.6, 0.7], "log_odds must be finite, got nan"),
        ([1.0, 2.0], [0.6], r"shapes \(1,\) and \(2,\)"),
        ([], [], r"shapes \(0,\)"),
        ([1.0, 2.0], [0.6, 0.4], r"\[0.5, 1\], got 0.4 at index 1"),
        ([1.0], [np.nan], "got nan at index 0"),
    ],
)
def test_bad_opinions(log_odds, agreement, message):
    with pytest.raises(ValueError, match=message):
        fit_log_odds(log_odds, agreement)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@given(
    questions=st.lists(st.lists(st.integers(3, 19), min_size=1, max_size=6), min_size=1, max_size=5),
    answers=st.lists(st.integers(3, 19), min_size=2, max_size=2, unique=True),
    batch_size=st.integers(1, 3),
)
def test_answers_are_compared_as_next_tokens(model_type, questions, answers, batch_size):
    model, done = tiny_model(model_type).eval(), []
    expected = torch.empty(len(questions))
    for i, question in enumerate(questions):
        with torch.no_grad():
            logps = model(torch.tensor([question])).logits[0, -1].double().log_softmax(-1)
        expected[i] = logps[answers[0]] - logps[answers[1]]
    found = answer_log_odds(model.train(), questions, answers, batch_size, done.append)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer_log_odds(model, questions, answers[::-1]), -expected, rtol=1e-4, atol=1e-5)
    assert model.training and sum(done) == len(questions) and max(done) <= batch_size


def test_a_question_has_the_same_answer_in_a_batch_and_alone():
    model, questions = tiny_model(), [[5], [3, 9, 12, 4, 17, 8], [6, 6, 7], [19, 3]]
    together = answer_log_odds(model, questions, [7, 8])
    assert together.abs().min() > 0.01 and not together.requires_grad
    for question, odds in zip(questions, together, strict=True):
        torch.testing.assert_close(answer_log_odds(model, [question], [7, 8]), odds[None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_answers_of_other_weights_are_float32(dtype):
    model = tiny_model().to(dtype)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 9, 6]])).logits[0, -1].double()
    found = answer_log_odds(model, torch.tensor([[5, 9, 6]]), np.array([7, 8]))  # what else ids may come in
    expected = (logits[7] - logits[8])[None].float()
    torch.testing.assert_close(found, expected, **({"rtol": 3e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}))


def test_no_questions_have_no_answers():
    assert answer_log_odds(tiny_model(), [], [7, 8]).shape == (0,)


@pytest.mark.parametrize(
    ("questions", "answers", "batch_size", "error", "message"),
    [
        ([[5]], [7, 7], 1, ValueError, "begin with the same token, 7"),
        ([[5]], [7, 8, 9], 1, ValueError, r"answers must be two token ids.* got \[7, 8, 9\]"),
        ([[5]], [[7], [8]], 1, TypeError, r"answers must be a list of token ids, got \[\[7\], \[8\]\]"),
        ([[5]], [" yes", " no"], 1, TypeError, r"answers must .* got \[' yes', ' no'\]; tokenize"),
        ([[5]], [7, 20], 1, ValueError, "token 20 of answers is outside the vocabulary of 20"),
        ([[5], []], [7, 8], 1, ValueError, "question 1 has no tokens"),
        ([[5], [6, -1]], [7, 8], 1, ValueError, "token -1 of question 1 is outside"),
        ([[5], "good?"], [7, 8], 1, TypeError, "question 1 must be a list of token ids, got 'good[?]'"),
        ([5, 6], [7, 8], 1, TypeError, "question 0 must be a list of token ids, got 5"),
        ({"input_ids": [[5]]}, [7, 8], 1, TypeError, "question 0 must be .* got 'input_ids'"),
        ([[5.5]], [7, 8], 1, TypeError, r"question 0 must be .* got \[5.5\]"),
        ([[5]], [7, 8], 0, ValueError, "batch_size must be at least 1, got 0"),
        ([[5]], [7, 8], -1, ValueError, "batch_size must be at least 1, got -1"),  # gave whatever was in memory
    ],
)
def test_questions_without_an_answer(questions, answers, batch_size, error, message):
    with pytest.raises(error, match=message):
        answer_log_odds(tiny_model(), questions, answers, batch_size)


def test_log_odds_that_cannot_be_a_dispersion():
    with pytest.raises(ValueError, match="log_odds must be finite, got -inf"):
        log_odds_to_neg_log_dispersion([0.0, -np.inf], "mallows-theta")
    with pytest.raises(ValueError, match="'ipo' has no dispersion"):
        log_odds_to_neg_log_dispersion([1.0], "ipo")


# Scale


@given(st.lists(st.floats(1e-6, 14.0), min_size=1, max_size=20))
def test_calibrated_scale_makes_the_mean_factor_one(values):
    assert np.mean(2 * calibrated_scale(values) * np.array(values)) == pytest.approx(1, rel=1e-12)
    assert calibrated_scale(torch.tensor(values, dtype=torch.float64)) == calibrated_scale(values)


def slope_at_0(link, **options):
    """Of the loss in the margin, where 2a = 1."""
    one, a = torch.zeros(1, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)
    chosen = one.clone().requires_grad_()
    dispersion = a if link in F.MALLOWS_LINKS else None
    losses = F.preference_loss(chosen, one, link=link, beta=1.0, neg_log_dispersion=dispersion, **options).losses
    return torch.autograd.grad(losses.sum(), chosen)[0].item()


def test_what_beta_means_at_the_calibrated_scale():
    """For theta what it means in DPO, for a plug-in what it means in its host; not for phi."""
    assert slope_at_0("mallows-theta") == slope_at_0("bradley-terry") == -0.5
    for link in sorted(F.MALLOWS_LINKS - {"mallows-theta", "mallows-phi"}):
        options = {"label_smoothing": 1e-3} if link == "mallows-exo" else {}
        host = slope_at_0(link.removeprefix("mallows-"), **options)
        assert slope_at_0(link, **options) == host != 0
    assert slope_at_0("mallows-phi") == pytest.approx(-0.28872, abs=1e-5)


@pytest.mark.parametrize("values", [[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_a_scale_that_cannot_be_calibrated(values):
    with pytest.raises(ValueError, match="cannot calibrate.*give a number"):
        calibrated_scale(np.array(values))


@pytest.mark.parametrize("entropy, at_most", [(0.0, 1e-6), (np.log(1000), 1 - 1e-6)])
def test_entropy_at_its_ends_gives_a_finite_dispersion(entropy, at_most):
    """Entropy 0 (a certain reference) gave infinity, entropy log V a pair without a gradient."""
    ends = torch.full((2,), entropy, dtype=torch.float64)
    a = F.neg_log_dispersion(ends, ends, 1000)
    assert a.numpy() == pytest.approx([-np.log(at_most)] * 2, rel=1e-9) and (a > 0).all()
