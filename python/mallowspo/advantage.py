"""Losses on advantages: how much better a response's reward is than its prompt let expect. Needs torch alone.

Unreduced, as :func:`mallowspo.functional.preference_loss`: the caller masks and averages.
"""

from mallowspo.autograd import accumulator_dtype
from mallowspo.checks import DTYPES, check_alike, check_tensor
from mallowspo.choices import check_positive

# exp of this, 20, is the largest weight of :func:`advantage_weights` by default.
MAX_EXPONENT = 3.0


def advantage_loss(logps, ref_logps, advantages, *, temperature=0.1):
    """Advantage-induced policy alignment (APA, arXiv 2306.02231): (log pi - log ref - A / lambda)^2.

    Regresses the policy on ref exp(A / lambda), whose normaliser is taken as 1: exact where the advantages are, and
    small beside lambda.

    Args:
        logps: any shape, log-probability of each response token (of each action, for a bandit) under the policy.
        ref_logps: the same under the frozen initial model, which is not the policy that sampled.
        advantages: the same shape. The authors estimate them by GAE (gamma 1, lambda 0.95) with the reward on the
            last token, and whiten them.
        temperature: lambda > 0; the authors' 0.1 goes with whitened advantages.

    Returns:
        The shape of logps, float32 (float64 for float64); differentiable in logps alone.

    Raises:
        TypeError: dtypes that disagree or are not floating point. ValueError: shapes that disagree, a temperature that
            is not positive.
    """
    _check(logps=logps, ref_logps=ref_logps, advantages=advantages)
    check_positive("temperature", temperature)
    logps, ref_logps, advantages = map(_wide, (logps, ref_logps.detach(), advantages.detach()))
    return (logps - ref_logps - advantages / temperature).square()


def advantage_weights(advantages, *, temperature, max_exponent=MAX_EXPONENT):
    """exp(A / temperature), detached: what multiplies a response's log-likelihood in advantage-weighted regression.

    Args:
        advantages: any shape. temperature: > 0.
        max_exponent: A / temperature counts as no more than this, so that one response cannot outweigh a batch; ours.

    Returns:
        The shape of advantages, float32 (float64 for float64), without gradient.

    Raises:
        TypeError: a dtype that is not floating point. ValueError: a temperature or exponent that is not positive.
    """
    _check(advantages=advantages)
    check_positive("temperature", temperature)
    check_positive("max_exponent", max_exponent)
    return (_wide(advantages.detach()) / temperature).clamp(max=max_exponent).exp()


def expectile_loss(values, targets, *, expectile=0.5):
    """|tau - 1{u < 0}| u^2 with u = target - value: its minimiser is the tau-expectile of the targets.

    Args:
        values: any shape, the estimates. targets: the same shape, detached here.
        expectile: tau in (0, 1): 1/2 is half the squared error, more than that looks at the better outcomes.

    Returns:
        The shape of values, float32 (float64 for float64); differentiable in values alone.

    Raises:
        TypeError: dtypes that disagree or are not floating point. ValueError: shapes that disagree, tau out of range.
    """
    _check(values=values, targets=targets)
    if not 0 < expectile < 1:
        raise ValueError(f"expectile must be in (0, 1), got {expectile}")
    error = _wide(targets.detach()) - _wide(values)
    return (expectile - (error < 0).to(error.dtype)).abs() * error.square()


def _check(**tensors):
    for name, tensor in tensors.items():
        check_tensor(name, tensor, DTYPES)
    check_alike(**tensors)


def _wide(tensor):
    return tensor.to(accumulator_dtype(tensor.dtype))
