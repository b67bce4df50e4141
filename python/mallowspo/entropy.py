"""The dispersion of a prompt from the reference model's entropies (MallowsPO, arXiv 2405.14953). Needs torch alone.

The dispersion from other sources, and its scale: :mod:`mallowspo.dispersion`.
"""

import math

import torch
from torch import Tensor

from mallowspo.autograd import accumulator_dtype
from mallowspo.checks import DTYPES, check_alike, check_tensor
from mallowspo.choices import check_number, check_positive

# Normalised entropies are kept this far from 0 and 1, where -log is infinite and zero: a <= 13.8 times the scale.
ENTROPY_CLAMP = 1e-6


def normalised_entropy(chosen_entropy: Tensor, rejected_entropy: Tensor, num_outcomes: int) -> Tensor:
    """Hbar = (chosen_entropy + rejected_entropy) / (2 log num_outcomes), what :func:`neg_log_dispersion` is made of.

    Args:
        chosen_entropy, rejected_entropy: [B] tensors, in nats. num_outcomes: see there.

    Returns:
        [B], float32 (float64 for float64 entropies), in [0, 1].

    Raises:
        TypeError, ValueError: as :func:`mallowspo.functional.token_stats`; num_outcomes below 2.
    """
    check_tensor("chosen_entropy", chosen_entropy, DTYPES)
    check_tensor("rejected_entropy", rejected_entropy, DTYPES)
    check_alike(chosen_entropy=chosen_entropy, rejected_entropy=rejected_entropy)
    check_number("num_outcomes", num_outcomes)
    if not num_outcomes >= 2:
        raise ValueError(f"num_outcomes must be at least 2, got {num_outcomes}")
    # Half precision cannot hold the upper clamp: 1 - 1e-6 would round to 1 and the dispersion to 0.
    dtype = accumulator_dtype(chosen_entropy.dtype)
    return (chosen_entropy.to(dtype) + rejected_entropy.to(dtype)) / (2 * math.log(num_outcomes))


def neg_log_dispersion(
    chosen_entropy: Tensor, rejected_entropy: Tensor, num_outcomes: int, *, scale: float = 1.0
) -> Tensor:
    """The paper's estimate of -log phi(x) from the reference model's entropies.

    a = -scale * log(Hbar), Hbar of :func:`normalised_entropy` clamped to [ENTROPY_CLAMP, 1 - ENTROPY_CLAMP].
    MallowsPO, arXiv 2405.14953, section on the dispersion index, in the form of the authors' code.

    Args:
        chosen_entropy, rejected_entropy: [B], mean entropy in nats over the completion tokens of each response (for a
            bandit: the entropy of the policy, twice).
        num_outcomes: what the entropy ranges over: the vocabulary size, or a bandit's number of responses; >= 2.
        scale: the paper's phi_star, > 0.

    Returns:
        [B], float32 (float64 for float64 entropies), > 0: large where the reference is sure, small where it is not.

    Raises:
        TypeError, ValueError: as :func:`normalised_entropy`; scale not positive.
    """
    check_positive("scale", scale)
    share = normalised_entropy(chosen_entropy, rejected_entropy, num_outcomes)
    return -scale * torch.log(share.clamp(ENTROPY_CLAMP, 1 - ENTROPY_CLAMP))
