"""The oracle against the formulas of other implementations, and its PyTorch part against its pure Python part."""

import itertools
import math
import random

import pytest
import strategies
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mallowspo import reference

few = settings(max_examples=40)
many = settings(max_examples=200)
moderate = strategies.pairs(strategies.dispersions(1e-2, 10.0))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# --- formulas of other implementations, on random pairs --------------------------------------------------------------


def random_pairs(count=50):
    rng = random.Random(7)
    for _ in range(count):
        yield [rng.uniform(-60, -5) for _ in range(4)]


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_equals_original_dpo_and_conservative_dpo(eps):
    beta = 0.1
    for pc, pr, rc, rr in random_pairs():
        logits = (pc - pr) - (rc - rr)
        expected = -math.log(sigmoid(beta * logits)) * (1 - eps) - math.log(sigmoid(-beta * logits)) * eps
        result = reference.preference_loss(pc, pr, rc, rr, link="bradley-terry", beta=beta, label_smoothing=eps)
        assert result.loss == pytest.approx(expected, rel=1e-12)
        assert result.chosen_reward == pytest.approx(beta * (pc - rc))
        assert result.rejected_reward == pytest.approx(beta * (pr - rr))


def test_equals_original_ipo_up_to_beta_squared():
    for beta, (pc, pr, rc, rr) in itertools.product((0.1, 0.5), random_pairs()):
        expected = ((pc - pr) - (rc - rr) - 1 / (2 * beta)) ** 2
        assert reference.preference_loss(pc, pr, rc, rr, link="ipo", beta=beta).loss == pytest.approx(
            beta**2 * expected, rel=1e-12
        )


def test_equals_trl_sigmoid_hinge_robust_and_length_normalised_ipo():
    beta, eps, chosen_tokens, rejected_tokens = 0.2, 0.15, 7, 11
    for pc, pr, rc, rr in random_pairs():
        delta = (pc - rc) - (pr - rr)
        clean, flipped = -math.log(sigmoid(beta * delta)), -math.log(sigmoid(-beta * delta))
        ipo = ((pc - rc) / chosen_tokens - (pr - rr) / rejected_tokens - 1 / (2 * beta)) ** 2

        def loss(*logps, **kwargs):
            return reference.preference_loss(*logps, beta=beta, **kwargs).loss

        logps = (pc, pr, rc, rr)
        assert loss(*logps, link="bradley-terry") == pytest.approx(clean, rel=1e-12)
        assert loss(*logps, link="hinge") == pytest.approx(max(0.0, 1 - beta * delta), rel=1e-12)
        assert loss(*logps, link="bradley-terry", label_smoothing=eps, robust=True) == pytest.approx(
            ((1 - eps) * clean - eps * flipped) / (1 - 2 * eps), rel=1e-12
        )
        means = (pc / chosen_tokens, pr / rejected_tokens, rc / chosen_tokens, rr / rejected_tokens)
        assert loss(*means, link="ipo") == pytest.approx(beta**2 * ipo, rel=1e-12)


def test_equals_simpo():
    beta, gamma_beta_ratio, chosen_tokens, rejected_tokens = 2.5, 0.55, 9, 14
    for pc, pr, _, _ in random_pairs():
        average = pc / chosen_tokens, pr / rejected_tokens
        expected = -math.log(sigmoid(beta * (average[0] - average[1] - gamma_beta_ratio)))
        result = reference.preference_loss(*average, link="bradley-terry", beta=beta, gamma=beta * gamma_beta_ratio)
        assert result.loss == pytest.approx(expected, rel=1e-12)


def test_equals_the_mallowspo_authors_code():
    """Their weight is -phi_star log(Hbar), without the theta link's 2: our scale is half their phi_star."""
    phi_star, vocabulary, beta, eps, home_advantage = 0.29, 128_256, 0.1, 0.1, 0.4
    rng = random.Random(3)
    for pc, pr, rc, rr in random_pairs():
        entropies = rng.uniform(0.05, 3), rng.uniform(0.05, 3)
        w = -phi_star * math.log((entropies[0] / math.log(vocabulary) + entropies[1] / math.log(vocabulary)) / 2)
        logits = (pc - pr) - (rc - rr) - home_advantage
        mallows_dpo = -math.log(sigmoid(beta * w * logits)) * (1 - eps) - math.log(sigmoid(-beta * w * logits)) * eps
        rainbow_ipo = (beta * w * logits - 0.5) ** 2
        mallows_ipo = (w * logits - 1 / (2 * beta)) ** 2

        a = reference.neg_log_dispersion(*entropies, vocabulary, scale=phi_star / 2)
        shared = {"neg_log_dispersion": a, "beta": beta, "gamma": beta * home_advantage}
        theta = reference.preference_loss(pc, pr, rc, rr, link="mallows-theta", label_smoothing=eps, **shared)
        ipo = reference.preference_loss(pc, pr, rc, rr, link="mallows-ipo", **shared)
        assert theta.loss == pytest.approx(mallows_dpo, rel=1e-11)
        assert ipo.loss == pytest.approx(rainbow_ipo, rel=1e-11)
        assert ipo.loss == pytest.approx(beta**2 * mallows_ipo, rel=1e-11)


# --- the PyTorch part against the pure Python part -------------------------------------------------------------------


@few
@given(logits=strategies.finite_logits(5, 9), temperature=st.sampled_from([0.7, 1.0]), seed=st.integers(0, 999))
def test_torch_token_stats(logits, temperature, seed):
    logits = logits.double().requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(9, (5,), generator=generator)
    labels[seed % 5] = -100
    grad_logps, grad_entropy = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    logps, entropy = reference.torch_token_stats(logits, labels, temperature=temperature)
    (gradient,) = torch.autograd.grad((logps, entropy), logits, (grad_logps, grad_entropy))
    for i, (row, label) in enumerate(zip(logits.tolist(), labels.tolist(), strict=True)):
        if label == -100:
            assert logps[i] == entropy[i] == 0 and not gradient[i].any()
            continue
        expected = reference.token_stats(row, label, temperature)
        assert (logps[i].item(), entropy[i].item()) == pytest.approx(expected[:2], rel=1e-12, abs=1e-12)
        assert gradient[i].tolist() == pytest.approx(
            reference.token_stats_grad(row, label, grad_logps[i].item(), grad_entropy[i].item(), temperature),
            rel=1e-11,
            abs=1e-12,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_torch_token_stats_dtypes(dtype):
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    logps, entropy = reference.torch_token_stats(logits, torch.tensor([[0, 1, 2], [3, 4, -1]]), ignore_index=-1)
    assert logps.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logps.shape == entropy.shape == (2, 3)
    assert logps[0, 1].item() == pytest.approx(reference.token_stats(logits[0, 1].tolist(), 1).logp, rel=1e-6)


@many
@given(z=strategies.margins(1e3), a=strategies.dispersions(1e-2, 1e3), smoothing=strategies.smoothings)
def test_torch_mallows_log_prob(z, a, smoothing):
    assume(smoothing > 0 or abs(z) > 1e-3)
    margin, dispersion = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (z, a))
    value = reference.torch_mallows_log_prob(margin, dispersion, smoothing)
    actual = [value.item(), *(x.item() for x in torch.autograd.grad(value, (margin, dispersion)))]
    assert actual == pytest.approx(reference.mallows_log_prob(z, a, smoothing), rel=1e-6, abs=1e-9)


@many
@given(pair=moderate, link=strategies.links, kwargs=strategies.loss_options)
def test_torch_preference_loss(pair, link, kwargs):
    kwargs = {"link": link, **kwargs}
    expected = reference.preference_loss(*pair[:4], neg_log_dispersion=pair.neg_log_dispersion, **kwargs)
    inputs = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in pair]
    losses, *rewards = reference.torch_preference_loss(*inputs[:4], neg_log_dispersion=inputs[4], **kwargs)
    assert losses.item() == pytest.approx(expected.loss, rel=1e-9, abs=1e-9)
    assert [x.item() for x in rewards] == [expected.chosen_reward, expected.rejected_reward]
    assert not any(x.requires_grad for x in rewards)
    gradients = [x.item() for x in torch.autograd.grad(losses, inputs, allow_unused=True, materialize_grads=True)]
    g, g_rejected = expected.grad_chosen, expected.grad_rejected
    right = [g, g_rejected, -g, -g_rejected, expected.grad_neg_log_dispersion]
    assert gradients == pytest.approx(right, rel=1e-6, abs=1e-8)


def test_torch_preference_loss_without_reference():
    chosen, rejected = torch.tensor([-3.0, -1.0]), torch.tensor([-2.0, -4.0])
    losses, chosen_rewards, _ = reference.torch_preference_loss(chosen, rejected, link="bradley-terry", beta=0.5)
    expected = [reference.preference_loss(*x, link="bradley-terry", beta=0.5) for x in ((-3.0, -2.0), (-1.0, -4.0))]
    assert losses.tolist() == pytest.approx([x.loss for x in expected], rel=1e-6)
    assert chosen_rewards.tolist() == [x.chosen_reward for x in expected]
