"""Several reference models as one: MRPO's weighted harmonic mean (arXiv 2405.16388). Needs torch alone."""

import math

import torch

_NOTHING = 1e-6  # the authors' guard against references that prefer neither response: their anchor's share then


def mixed_reference_logps(
    ref_chosen_logps, ref_rejected_logps, *, weights="adaptive", clip=None, adaptive_clip=False, swap_weights=False
):
    """Log-probability of each response under the virtual reference 1 / sum_k weights_k / ref_k(y).

    The first reference is the anchor: the model's own start, as a rule. The form for more than two references is this
    library's; for two it is the authors' code with ``swap_weights``, which pairs each reference with the other one's
    weight; the paper's reading, the default, pairs it with its own.

    Args:
        ref_chosen_logps, ref_rejected_logps: [K, B] each, K >= 2 references, the anchor first.
        weights: K positive numbers that add up to 1, or "adaptive": for each pair in proportion to |log ref_k(y_w) -
            log ref_k(y_l)|, how clearly the reference prefers one of the two; from the values before clipping.
        clip: keeps log ref_k(y) within clip times |log ref_1(y)| of the anchor's log ref_1(y); None: no limit.
        adaptive_clip: share that width between a pair's responses, as |m_w| to |m_l| with m the mean of
            log ref_k and log ref_1: clip |m_w| / (|m_w| + |m_l|) for the chosen one.
        swap_weights: see above; for K = 2.

    Returns:
        (chosen, rejected), [B] each.

    Raises:
        ValueError: shapes that disagree, fewer than two references, a number of weights that is not K, or what
            :func:`check_mixture` raises.
    """
    shapes = [list(logps.shape) for logps in (ref_chosen_logps, ref_rejected_logps)]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] < 2:
        raise ValueError(
            f"the log-probabilities of K >= 2 references must be [K, B] for both responses, got {shapes[0]} and "
            f"{shapes[1]}; one reference alone is itself"
        )
    count = shapes[0][0]
    check_mixture(weights, clip, adaptive_clip, swap_weights)
    logps = torch.stack([ref_chosen_logps, ref_rejected_logps])  # [2, K, B]
    if weights == "adaptive":
        clarity = (ref_chosen_logps - ref_rejected_logps).abs()
        clarity = torch.cat([clarity[:1] + _NOTHING, clarity[1:]])
        log_weights = clarity.log() - clarity.sum(0).log()
    else:
        if len(weights) != count:
            raise ValueError(f"reference_weights has {len(weights)} numbers for {count} references")
        log_weights = logps.new_tensor(weights).log()[:, None]
    if swap_weights:
        if count != 2:
            raise ValueError(f"swap_reference_weights is defined for two references, got {count}")
        log_weights = log_weights.flip(0)
    if clip is not None:
        anchor = logps[:, :1]
        width = clip * anchor.abs()
        if adaptive_clip:
            means = (logps + anchor).abs()
            width = width * means / means.sum(0).clamp(min=torch.finfo(means.dtype).tiny)
        logps = torch.minimum(torch.maximum(logps, anchor - width), anchor + width)
    return (-torch.logsumexp(log_weights - logps, dim=1)).unbind()


def check_mixture(weights, clip, adaptive_clip, swap_weights):
    """ValueError for what :func:`mixed_reference_logps` cannot take; names as in ``PreferenceObjective``."""
    if isinstance(weights, str):
        if weights != "adaptive":
            raise ValueError(f"reference_weights must be 'adaptive' or one number a reference, got {weights!r}")
    elif weights is not None and (not all(w > 0 for w in weights) or abs(math.fsum(weights) - 1) > 1e-6):
        raise ValueError(f"reference_weights must be positive and add up to 1, got {weights}")
    if clip is not None and not 0 <= clip < math.inf:
        raise ValueError(f"reference_clip must be finite and >= 0 (None: no limit), got {clip}")
    if adaptive_clip and clip is None:
        raise ValueError("adaptive_clip=True shares out the width reference_clip, which is None; set reference_clip")
    for name, value in {
        "reference_clip": clip is not None,
        "swap_reference_weights": swap_weights,
    }.items():
        if value and weights is None:
            raise ValueError(f"{name} is for several references: set reference_weights")
