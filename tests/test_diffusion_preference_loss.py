"""diffusion_preference_loss against the official code's formula, the oracle's links, and by hand."""

import math

import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mallowspo import functional as F
from mallowspo import reference

all_links = pytest.mark.parametrize("link", reference.TORCH_LINKS)
error = st.floats(0, 2).map(strategies.to_float32)
betas = st.sampled_from([1.0, 100.0, 5000.0])


def dispersion_for(link, a):
    return a if link in reference.DISPERSION_LINKS else None


def with_gradients(errors, a, link, **options):
    """PreferenceLoss, and the gradients of the summed losses in the four errors and in a (None: not given)."""
    leaves = [x.detach().requires_grad_() for x in (*errors, *([] if dispersion_for(link, a) is None else [a]))]
    result = F.diffusion_preference_loss(
        *leaves[:4], neg_log_dispersion=leaves[4] if leaves[4:] else None, link=link, **options
    )
    return result, torch.autograd.grad(result.losses.sum(), leaves)


def random_errors(count=50, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(4, count, generator=generator, dtype=torch.float64).to(dtype)
    return list(errors), (0.05 + 2 * torch.rand(count, generator=generator, dtype=torch.float64)).to(dtype)


# ---- by hand -------------------------------------------------------------------------------------------------------

BY_HAND = {  # K = 50 and z = -50 [(0.10 - 0.20) - (0.12 - 0.18)] = 2: the dispersion, and the loss
    "bradley-terry": (None, math.log(1 + math.exp(-2))),
    "ipo": (None, 2.25),
    "hinge": (None, 0.0),
    "mallows-theta": (0.25, math.log(1 + math.exp(-1))),
    "mallows-ipo": (0.25, 0.25),
    "mallows-hinge": (0.125, 0.5),
    "mallows-phi": (math.log(2), math.log(21 / 16)),  # phi = 1/2: g(2) = 3 / (1 - 1/8) - 2 / (1 - 1/4) = 16/21
}


@all_links
def test_by_hand(link):
    """The policy predicts the chosen image's noise better than the reference, and the rejected one's worse."""
    a, expected = BY_HAND[link]
    errors = [torch.tensor([x], dtype=torch.float64) for x in (0.10, 0.20, 0.12, 0.18)]
    a = None if a is None else torch.tensor([a], dtype=torch.float64)
    result = F.diffusion_preference_loss(*errors, neg_log_dispersion=a, link=link, beta=100)
    assert result.losses.item() == pytest.approx(expected, abs=1e-12)
    assert result.chosen_rewards.item() == pytest.approx(1)
    assert result.rejected_rewards.item() == pytest.approx(-1)


# ---- the official formula and the oracle ---------------------------------------------------------------------------


def test_official_code_on_predictions():
    """Predictions [2B, C, H, W], chosen first, one noise for both: values and the gradient in the predictions."""
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(10, 3, 4, 4, generator=generator, requires_grad=True)
    ref_predicted = predicted.detach() + 0.05 * torch.randn(10, 3, 4, 4, generator=generator)
    noise = torch.randn(5, 3, 4, 4, generator=generator).repeat(2, 1, 1, 1)

    chosen, rejected = (predicted - noise).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    ref_chosen, ref_rejected = (ref_predicted - noise).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    inside = -0.5 * 100 * ((chosen - rejected) - (ref_chosen - ref_rejected))
    official = -torch.nn.functional.logsigmoid(inside)

    errors = chosen, rejected, ref_chosen, ref_rejected
    losses = F.diffusion_preference_loss(*errors, link="bradley-terry", beta=100).losses
    torch.testing.assert_close(losses, official)
    gradients = [torch.autograd.grad(x.mean(), predicted, retain_graph=True)[0] for x in (losses, official)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 1e-3


@settings(max_examples=200)
@given(
    errors=st.tuples(error, error, error, error),
    a=strategies.dispersions(1e-3, 10.0),
    link=strategies.links,
    beta=betas,
    gamma=st.sampled_from([0.0, 0.3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_values_and_gradients_against_the_oracle(errors, a, link, beta, gamma, dtype):
    tensors = [torch.tensor([x], dtype=dtype) for x in (*errors, a)]
    result, gradients = with_gradients(tensors[:4], tensors[4], link, beta=beta, gamma=gamma)
    chosen, rejected, ref_chosen, ref_rejected = errors
    k = 0.5 * beta
    z = -k * ((chosen - rejected) - (ref_chosen - ref_rejected)) - gamma
    likelihood, in_z, in_a = reference.log_likelihood(link, z, a)
    # The link's tail turns the rounding of z into a relative error of 2 a times it.
    near = {"rel": 10 * torch.finfo(dtype).eps + 1e-15 * (1 + abs(z)) * (1 + 2 * a), "abs": torch.finfo(dtype).tiny}
    assert result.losses.item() == pytest.approx(-likelihood, **near | {"abs": 1e-12 * (1 + k)})
    assert result.chosen_rewards.item() == pytest.approx(k * (ref_chosen - chosen), **near)
    assert result.rejected_rewards.item() == pytest.approx(k * (ref_rejected - rejected), **near)
    near["abs"] = 1e-11 * (1 + k) * (1 + a)
    for actual, sign in zip(gradients, (1, -1, -1, 1), strict=False):
        assert actual.item() == pytest.approx(sign * k * in_z, **near)
    if link in reference.DISPERSION_LINKS:
        assert gradients[4].item() == pytest.approx(-in_a, **near)


# ---- identities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["bradley-terry", "ipo", "hinge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dispersion_of_one_half_is_the_host(host, dtype):
    errors, a = random_errors(dtype=dtype)
    mallows = {"bradley-terry": "mallows-theta", "ipo": "mallows-ipo", "hinge": "mallows-hinge"}[host]
    plug_in, plain = (with_gradients(errors, torch.full_like(a, 0.5), link, beta=20) for link in (mallows, host))
    for one, two in zip((*plug_in[0], *plug_in[1][:4]), (*plain[0], *plain[1]), strict=True):
        assert torch.equal(one, two)


@settings(max_examples=100)
@given(errors=st.tuples(error, error, error, error), a=strategies.dispersions(0.01, 3.0), link=strategies.links)
def test_swapping_the_pair(errors, a, link):
    """Swapped, the margin changes its sign: the two mix to the smoothed loss; their probabilities add up to 1."""
    chosen, rejected, ref_chosen, ref_rejected, a = (torch.tensor([x], dtype=torch.float64) for x in (*errors, a))
    options = {"link": link, "neg_log_dispersion": dispersion_for(link, a), "beta": 10}
    given = F.diffusion_preference_loss(chosen, rejected, ref_chosen, ref_rejected, **options)
    swapped = F.diffusion_preference_loss(rejected, chosen, ref_rejected, ref_chosen, **options)
    smooth = F.diffusion_preference_loss(
        chosen, rejected, ref_chosen, ref_rejected, label_smoothing=0.2, **options
    ).losses
    torch.testing.assert_close(smooth, 0.8 * given.losses + 0.2 * swapped.losses)
    assert torch.equal(given.chosen_rewards, swapped.rejected_rewards)
    assert torch.equal(given.rejected_rewards, swapped.chosen_rewards)
    if link in ("bradley-terry", "mallows-theta", "mallows-phi"):
        torch.testing.assert_close((-given.losses).exp() + (-swapped.losses).exp(), torch.ones_like(a))


@all_links
def test_what_both_models_get_wrong_does_not_count(link):
    """An image harder to denoise for the policy and the reference alike: the loss is the same."""
    errors, a = random_errors()
    harder = torch.linspace(0, 1, 50, dtype=torch.float64)
    other = [errors[0] + harder, errors[1] - harder, errors[2] + harder, errors[3] - harder]
    one, two = (with_gradients(x, a, link, beta=10) for x in (errors, other))
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("link", ["bradley-terry", "mallows-theta", "mallows-phi"])
def test_the_first_step_costs_log_two_and_parts_the_errors(link):
    (chosen, rejected, *_), a = random_errors()
    result, (on_chosen, on_rejected, *_) = with_gradients([chosen, rejected, chosen, rejected], a, link)
    torch.testing.assert_close(result.losses, torch.full_like(a, math.log(2)))
    assert (on_chosen > 0).all() and (on_rejected < 0).all()
    if link == "bradley-terry":
        torch.testing.assert_close(on_chosen, torch.full_like(a, 1250.0))  # K / 2, at the default beta of 5000


# ---- what is refused -----------------------------------------------------------------------------------------------

D = torch.full((3,), 0.1)
REFUSED = [
    (TypeError, "chosen_errors must be float32 or float64, got bfloat16", [D.bfloat16(), D, D, D], {}),
    (TypeError, "ref_rejected_errors must be a torch.Tensor, got NoneType", [D, D, D, None], {}),
    (TypeError, "rejected_errors is float64", [D, D.double(), D, D], {}),
    (TypeError, "neg_log_dispersion must be float32 or float64, got int64", [D] * 4, {"neg_log_dispersion": D.long()}),
    (ValueError, r"chosen_errors is \[3\], rejected_errors is \[2\]", [D, D[:2], D, D], {}),
    (ValueError, r"ref_chosen_errors is \[3, 1\]", [D, D, D[:, None], D], {}),
    (ValueError, r"chosen_errors is \[3\], .*neg_log_dispersion is \[1\]", [D] * 4, {"neg_log_dispersion": D[:1]}),
    (ValueError, "'mallows-theta' needs neg_log_dispersion", [D] * 4, {"neg_log_dispersion": None}),
    (ValueError, "'bradley-terry' does not read neg_log_dispersion", [D] * 4, {"link": "bradley-terry"}),
    (ValueError, "unknown link 'sigmoid'", [D] * 4, {"link": "sigmoid"}),
    (ValueError, "beta must be finite and positive, got -3$", [D] * 4, {"beta": -3}),
    (ValueError, "label_smoothing must be in .* got 0.5", [D] * 4, {"label_smoothing": 0.5}),
    (ValueError, r"neg_log_dispersion\[0\] is -0.1", [D] * 4, {"neg_log_dispersion": -D}),
]


@pytest.mark.parametrize("exception, message, errors, options", REFUSED, ids=[case[1] for case in REFUSED])
def test_refused(exception, message, errors, options):
    with pytest.raises(exception, match=message):
        F.diffusion_preference_loss(*errors, **{"neg_log_dispersion": D} | options)


def test_the_defaults_of_this_file_are_accepted():
    assert F.diffusion_preference_loss(D, D, D, D, neg_log_dispersion=D).losses.shape == (3,)
