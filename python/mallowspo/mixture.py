"""Several reference models as one: MRPO's weighted harmonic mean (arXiv 2405.16388). Needs torch alone."""

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from mallowspo.choices import check_not_negative

_NOTHING = 1e-6  # the authors' guard against references that prefer neither response: their anchor's share then


def mixed_reference_logps(
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    reference_weights: str | Sequence[float] = "adaptive",
    reference_clip: float | None = None,
    adaptive_clip: bool = False,
    swap_reference_weights: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each response under the virtual reference 1 / sum_k w_k / ref_k(y).

    The first reference is the anchor: the model's own start, as a rule. The form for more than two references is this
    library's. For two, the authors' code gives each reference the other one's weight (``swap_reference_weights``); the
    default gives it its own, as the method is described.

    Args:
        ref_chosen_logps, ref_rejected_logps: [K, B] each, K >= 2 references, the anchor first.
        reference_weights: w, K positive numbers that add up to 1, or "adaptive": for each pair in proportion to
            |log ref_k(y_w) - log ref_k(y_l)|, how clearly the reference prefers one of the two, before clipping.
        reference_clip: eps >= 0 keeps log ref_k(y) within eps |log ref_1(y)| of the anchor's; None: no limit.
        adaptive_clip: share eps between a pair's responses: eps |m_w| / (|m_w| + |m_l|) for the chosen one, with m
            the mean of log ref_k and log ref_1.
        swap_reference_weights: see above; for K = 2.

    Returns:
        (chosen, rejected), [B] each.

    Raises:
        ValueError: shapes that disagree, fewer than two references, a number of weights that is not K, and what
            :func:`check_mixture` raises.
    """
    shapes = [list(logps.shape) for logps in (ref_chosen_logps, ref_rejected_logps)]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2:
        raise ValueError(f"the references' log-probabilities must be [K, B] twice, got {shapes[0]} and {shapes[1]}")
    check_reference_count(len(ref_chosen_logps), reference_weights, swap_reference_weights)
    check_mixture(reference_weights, reference_clip, adaptive_clip, swap_reference_weights)
    logps = torch.stack([ref_chosen_logps, ref_rejected_logps])  # [2, K, B]
    if reference_weights == "adaptive":
        clarity = (ref_chosen_logps - ref_rejected_logps).abs()
        clarity = torch.cat([clarity[:1] + _NOTHING, clarity[1:]])
        log_weights = clarity.log() - clarity.sum(0).log()
    else:
        weights = [logps.new_full((1,), weight) for weight in reference_weights]  # a copy would wait for a GPU
        log_weights = torch.stack(weights).log()
    if swap_reference_weights:
        log_weights = log_weights.flip(0)
    if reference_clip is not None:
        anchor = logps[:, :1]
        width = reference_clip * anchor.abs()
        if adaptive_clip:
            means = (logps + anchor).abs()
            width = width * means / means.sum(0).clamp(min=torch.finfo(means.dtype).tiny)
        logps = torch.minimum(torch.maximum(logps, anchor - width), anchor + width)
    return (-torch.logsumexp(log_weights - logps, dim=1)).unbind()


def check_mixture(reference_weights, reference_clip, adaptive_clip, swap_reference_weights):
    """ValueError for what :func:`mixed_reference_logps` cannot take; reference_weights of None mean one reference."""
    if isinstance(reference_weights, str | Real):
        if reference_weights != "adaptive":
            raise ValueError(
                f"reference_weights must be 'adaptive' or one number a reference, got {reference_weights!r}"
            )
    elif reference_weights is None:
        for name, given in (
            ("reference_clip", reference_clip is not None),
            ("adaptive_clip", adaptive_clip),
            ("swap_reference_weights", swap_reference_weights),
        ):
            if given:
                raise ValueError(f"{name} is for several references: set reference_weights, or leave it out")
    elif not all(weight > 0 for weight in reference_weights) or abs(math.fsum(reference_weights) - 1) > 1e-6:
        raise ValueError(f"reference_weights must be positive and add up to 1, got {reference_weights}")
    if reference_clip is not None:
        check_not_negative("reference_clip", reference_clip, "None: no limit")
    if adaptive_clip and reference_clip is None:
        raise ValueError("adaptive_clip shares out the width reference_clip, which is None: set reference_clip")


def check_reference_count(count, reference_weights, swap_reference_weights):
    """ValueError unless so many references go with the weights."""
    if reference_weights is None and count > 1:
        raise ValueError(f"{count} references need reference_weights, which say how to mix them (MRPO)")
    if reference_weights is not None and count == 1:
        raise ValueError("reference_weights (MRPO) mix several references: pass a list of models as ref_model")
    if not isinstance(reference_weights, str | None) and len(reference_weights) != count:
        raise ValueError(f"reference_weights has {len(reference_weights)} numbers for {count} references")
    if swap_reference_weights and count != 2:
        raise ValueError(f"swap_reference_weights is defined for two references, got {count}")
