"""The library's mathematics in its plainest form: the oracle of the tests and the baseline of the benchmarks.

The first part is pure Python, one row or one pair at a time, with every derivative written out by hand. It favours
being obviously right over speed; the Mallows link is evaluated in `decimal` with enough digits that no formula needs
a stable rearrangement. The second part (`torch_*`) is the same in eager PyTorch, differentiable by autograd.

Notation: r_w and r_l are the log-ratios of the chosen and of the rejected response, z = beta (r_w - r_l) - gamma the
margin and a = -log phi >= 0 the neg-log dispersion.
"""

import decimal
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ENTROPY_CLAMP = 1e-6  # the normalised entropy is kept this far from 0 and from 1


class TokenStats(NamedTuple):
    """Log-probability of the label, entropy in nats and log-sum-exp of one row of logits over the temperature."""

    logp: float
    entropy: float
    lse: float


class PairLoss(NamedTuple):
    """Loss of one pair, its implicit rewards, and the derivatives of the loss.

    `grad_chosen` and `grad_rejected` are those in chosen_logp and rejected_logp, minus those in the references'.
    """

    loss: float
    chosen_reward: float
    rejected_reward: float
    grad_chosen: float
    grad_rejected: float
    grad_neg_log_dispersion: float


# --- Pure Python: token statistics -----------------------------------------------------------------------------------


def _log_softmax(logits: Sequence[float], temperature: float) -> tuple[list[float], float]:
    """Log-probabilities and log-sum-exp; all NaN if a logit is NaN or +inf, or if every logit is -inf."""
    scaled = [logit / temperature for logit in logits]
    largest = max(scaled)
    if any(math.isnan(x) for x in scaled) or math.isinf(largest):
        return [math.nan] * len(scaled), math.nan
    top = scaled.index(largest)
    others = math.fsum(math.exp(x - largest) for v, x in enumerate(scaled) if v != top)
    log_sum = math.log1p(others)  # the largest logit contributes exactly 1
    return [(x - largest) - log_sum for x in scaled], largest + log_sum


def _entropy(log_probs: list[float]) -> float:
    return math.fsum(-math.exp(lp) * lp for lp in log_probs if lp != -math.inf)  # 0 log 0 = 0


def token_stats(logits: Sequence[float], label: int, temperature: float = 1.0) -> TokenStats:
    """Statistics of softmax(logits / temperature); a logit of -inf is an outcome of probability zero.

    A NaN or +inf logit, or a row of nothing but -inf, makes all three NaN.
    """
    log_probs, lse = _log_softmax(logits, temperature)
    return TokenStats(log_probs[label], _entropy(log_probs), lse)


def token_stats_grad(
    logits: Sequence[float], label: int, grad_logp: float, grad_entropy: float, temperature: float = 1.0
) -> list[float]:
    """Gradient of grad_logp * logp + grad_entropy * entropy in the logits.

    d logp / d l_v = 1[v = label] - p_v and d H / d l_v = -p_v (log p_v + H), over the temperature.
    """
    log_probs, _ = _log_softmax(logits, temperature)
    entropy = _entropy(log_probs)
    gradient = []
    for v, lp in enumerate(log_probs):
        d_logp = -math.expm1(lp) if v == label else -math.exp(lp)
        d_entropy = 0.0 if lp == -math.inf else -math.exp(lp) * (lp + entropy)
        gradient.append((grad_logp * d_logp + grad_entropy * d_entropy) / temperature)
    return gradient


def neg_log_dispersion(
    chosen_entropy: float, rejected_entropy: float, num_outcomes: int, scale: float = 1.0, eps: float = ENTROPY_CLAMP
) -> float:
    """a = -scale log(Hbar), Hbar the mean of the two entropies (nats) over log(num_outcomes), in [eps, 1 - eps]."""
    normalised = (chosen_entropy + rejected_entropy) / 2 / math.log(num_outcomes)
    return -scale * math.log(min(max(normalised, eps), 1 - eps))


# --- Pure Python: the Mallows link with Kendall's distance -----------------------------------------------------------
# g(z) = k(z + 1) - k(z) for z > 0, where k(x) = x / (1 - phi^x) = x + b(x) and b(x) = x / (e^(a x) - 1). Hence the
# losing probability is q(r) = 1 - g(r) = b(r) - b(r + 1), and g(-r) = q(r).


def _b(x: Decimal, a: Decimal) -> tuple[Decimal, Decimal, Decimal, Decimal]:
    """b and its derivatives d/dx, d/da and d2/dxda; at x = 0 their limits."""
    if x == 0:
        return 1 / a, Decimal("-0.5"), -1 / a**2, Decimal(0)
    e = (a * x).exp()
    d = e - 1
    return x / d, 1 / d - a * x * e / d**2, -(x**2) * e / d**2, -2 * x * e / d**2 + a * x**2 * e * (e + 1) / d**3


def _losing_probability(r: Decimal, a: Decimal) -> tuple[Decimal, Decimal, Decimal, Decimal]:
    """q and its derivatives d/dr, d/da and d2/drda; at a = 0 those of its series 1/2 - a (2r + 1) / 12."""
    if a == 0:
        return Decimal("0.5"), Decimal(0), -(2 * r + 1) / 12, Decimal(-1) / 6
    q, q_r, q_a, q_ra = (near - far for near, far in zip(_b(r, a), _b(r + 1, a), strict=True))
    return q, q_r, q_a, q_ra


def mallows_log_prob(z: float, a: float, smoothing: float = 1.0) -> tuple[float, float, float]:
    """log g(z; a) with its derivatives in z and in a, for a >= 0, smoothing >= 0 and a |z| up to 1e17.

    On |z| < smoothing, g is the odd cubic about 1/2 that meets it in value and slope at the ends. The raw function
    at z = 0 is 1/2 with the slope of its one-sided limits. At a = 0, d/da is the one-sided derivative.
    """
    if math.isnan(z) or math.isnan(a):
        return math.nan, math.nan, math.nan
    z, a, s = Decimal(z), Decimal(a), Decimal(smoothing)
    r = max(abs(z), s)
    # b ~ 1/a and its mixed derivative ~ 1/(a^2 r) cancel down to order 1; four times the small exponent covers both.
    lost = max(0, -(a * min(r or 1, 1)).adjusted()) if a else 0
    with decimal.localcontext(decimal.Context(prec=80 + 4 * lost, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN)):
        q, q_r, q_a, q_ra = _losing_probability(r, a)
        half = Decimal("0.5")
        if abs(z) < s:

            def cubic(end: Decimal, slope: Decimal) -> tuple[Decimal, Decimal]:  # c1 z + c3 z^3 and its derivative
                c1, c3 = (3 * end / s - slope) / 2, (slope - end / s) / (2 * s**2)
                return c1 * z + c3 * z**3, c1 + 3 * c3 * z**2

            p, p_z = cubic(half - q, -q_r)
            p, p_a = p + half, cubic(-q_a, -q_ra)[0]
        elif z == 0:
            p, p_z, p_a = half, -q_r, Decimal(0)
        elif z > 0:
            p, p_z, p_a = 1 - q, -q_r, -q_a
        else:
            p, p_z, p_a = q, -q_r, q_a
        # 1 - q rounds to 1 once q is below the precision; two terms of log(1 - q) are then more than enough.
        log_p = -q - q**2 / 2 if z > 0 and z >= s and q < Decimal("1e-30") else p.ln()
        return float(log_p), float(p_z / p), float(p_a / p)


# --- Pure Python: the loss of one pair -------------------------------------------------------------------------------


def _logistic(x: float) -> tuple[float, float]:
    e = math.exp(-abs(x))
    return min(x, 0.0) - math.log1p(e), (e if x >= 0 else 1.0) / (1.0 + e)


def _squared(x: float) -> tuple[float, float]:
    return -(x - 0.5) * (x - 0.5), -2.0 * (x - 0.5)


def _hinge(x: float) -> tuple[float, float]:
    return -max(0.0, 1.0 - x), 1.0 if x < 1.0 else 0.0


def _exo(x: float, eps: float) -> tuple[float, float]:
    (log_p, q), (log_q, p) = _logistic(x), _logistic(-x)
    log_keep, log_swap = math.log(1 - eps), math.log(eps)
    return -p * (log_p - log_keep) - q * (log_q - log_swap), -p * q * (x - (log_keep - log_swap))


def _discopop(x: float, tau: float) -> tuple[float, float]:
    log_m, rest = _logistic(x / tau)
    m, (win, slope) = math.exp(log_m), _logistic(x)
    exponential = math.exp(log_m - x) if log_m - x < 700 else math.inf
    d_m = m * rest / tau
    return rest * win - exponential, rest * slope - d_m * win - exponential * (rest / tau - 1)


# The margin links whose argument is z, and the same with the plug-in, 2 a z.
_HOSTS = ("bradley-terry", "ipo", "hinge", "exo", "discopop")
_PLUG_INS = {"mallows-theta" if host == "bradley-terry" else f"mallows-{host}": host for host in _HOSTS}
DISPERSION_LINKS = (*_PLUG_INS, "mallows-phi")
MARGIN_LINKS = (*_HOSTS, *DISPERSION_LINKS)
SEPARATE_LINKS = ("sppo", "nca", "bco", "apo-zero", "apo-down")
LINKS = (*MARGIN_LINKS, *SEPARATE_LINKS)
# Those whose likelihood is a probability's, which is what the focal modulation takes a power of.
PROBABILITY_LINKS = ("bradley-terry", "mallows-theta", "mallows-phi")


def _host_likelihood(host: str, x: float, label_smoothing: float, discopop_tau: float) -> tuple[float, float]:
    if host == "exo":
        return _exo(x, label_smoothing)
    if host == "discopop":
        return _discopop(x, discopop_tau)
    return {"bradley-terry": _logistic, "ipo": _squared, "hinge": _hinge}[host](x)


def _check_link(link: str, a: object) -> None:
    if link not in LINKS:
        raise ValueError(f"unknown link {link!r}; choose one of {', '.join(LINKS)}")
    if link in DISPERSION_LINKS and a is None:
        raise ValueError(f"link {link!r} needs neg_log_dispersion")


def _mixing_weights(label_smoothing: float, robust: bool) -> tuple[float, float]:
    """Weights of -ll(z) and -ll(-z)."""
    if robust:
        return (1 - label_smoothing) / (1 - 2 * label_smoothing), -label_smoothing / (1 - 2 * label_smoothing)
    return 1 - label_smoothing, label_smoothing


def log_likelihood(
    link: str,
    z: float,
    a: float | None = None,
    smoothing: float = 1.0,
    *,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    discopop_tau: float = 0.05,
) -> tuple[float, float, float]:
    """Log-likelihood ll(z) that the chosen response wins, with its derivatives in z and in a.

    With focal_gamma, p^focal_gamma log p. label_smoothing is read by the exo links, discopop_tau by discopop's.
    """
    _check_link(link, a)
    if link == "mallows-phi":
        out = mallows_log_prob(z, a, smoothing)
    elif link in _PLUG_INS:
        value, slope = _host_likelihood(_PLUG_INS[link], 2 * a * z, label_smoothing, discopop_tau)
        out = value, 2 * a * slope, 2 * z * slope
    else:
        out = *_host_likelihood(link, z, label_smoothing, discopop_tau), 0.0
    if focal_gamma == 0:
        return out
    log_p, p_z, p_a = out
    p = math.exp(focal_gamma * log_p)
    return p * log_p, p * (1 + focal_gamma * log_p) * p_z, p * (1 + focal_gamma * log_p) * p_a


def score(r: float, divergence: str = "reverse-kl", alpha: float = 0.5) -> tuple[float, float]:
    """f'(e^r) of the divergence, zero at r = 0, with its derivative; constant where its exponent exceeds 80."""
    if divergence == "reverse-kl" or (divergence == "alpha" and alpha == 1):
        return r, 1.0
    if divergence == "js":
        log_p, slope = _logistic(r)
        return math.log(2) + log_p, slope
    k = {"forward-kl": 0.0, "alpha": alpha}[divergence] - 1
    return math.expm1(min(k * r, 80.0)) / k, math.exp(k * r) if k * r < 80 else 0.0


def _separate_loss(link: str, x_w: float, x_l: float) -> tuple[float, float, float]:
    """Loss and derivatives in x_w and x_l of the links that are sums over the two responses."""
    (log_w, not_w), (log_not_w, is_w) = _logistic(x_w), _logistic(-x_w)
    (_, not_l), (log_not_l, is_l) = _logistic(x_l), _logistic(-x_l)
    if link == "sppo":
        return (x_w - 0.5) ** 2 + (x_l + 0.5) ** 2, 2 * (x_w - 0.5), 2 * (x_l + 0.5)
    if link == "nca":
        return -log_w - log_not_w / 2 - log_not_l / 2, -not_w + is_w / 2, is_l / 2
    if link == "bco":
        return -log_w - log_not_l, -not_w, is_l
    if link == "apo-zero":
        return not_w + is_l, -is_w * not_w, is_l * not_l
    (_, lose), (_, win) = _logistic(x_w - x_l), _logistic(x_l - x_w)
    return is_w + lose, is_w * not_w - win * lose, win * lose


def preference_loss(
    chosen_logp: float,
    rejected_logp: float,
    ref_chosen_logp: float = 0.0,
    ref_rejected_logp: float = 0.0,
    *,
    neg_log_dispersion: float | None = None,
    link: str = "mallows-theta",
    beta: float = 0.1,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    robust: bool = False,
    smoothing: float = 1.0,
    focal_gamma: float = 0.0,
    clip_rejected: bool = False,
    divergence: str = "reverse-kl",
    divergence_alpha: float = 0.5,
    discopop_tau: float = 0.05,
) -> PairLoss:
    """Loss of one pair: -(1 - eps) ll(z) - eps ll(-z), or its robust (unbiased) form with eps the label smoothing.

    Raises:
        ValueError: for an unknown link, or a Mallows link without a dispersion.
    """
    _check_link(link, neg_log_dispersion)
    chosen, rejected = chosen_logp - ref_chosen_logp, rejected_logp - ref_rejected_logp
    rewards = beta * chosen, beta * rejected
    if link in SEPARATE_LINKS:
        loss, on_chosen, on_rejected = _separate_loss(link, *rewards)
        return PairLoss(loss, *rewards, beta * on_chosen, beta * on_rejected, 0.0)
    s_w, slope_w = score(chosen, divergence, divergence_alpha)
    s_l, slope_l = score(rejected, divergence, divergence_alpha)
    if clip_rejected and rejected <= 0:  # where s is, which may round to 0
        s_l, slope_l = 0.0, 0.0
    z = beta * (s_w - s_l) - gamma
    options = {"label_smoothing": label_smoothing, "focal_gamma": focal_gamma, "discopop_tau": discopop_tau}
    keep, swap = (1, 0) if link in ("exo", "mallows-exo") else _mixing_weights(label_smoothing, robust)
    win, win_z, win_a = log_likelihood(link, z, neg_log_dispersion, smoothing, **options)
    flip, flip_z, flip_a = log_likelihood(link, -z, neg_log_dispersion, smoothing, **options) if swap else (0.0,) * 3
    grad_margin = beta * (-keep * win_z + swap * flip_z)
    loss, on_dispersion = -keep * win - swap * flip, -keep * win_a - swap * flip_a
    return PairLoss(loss, *rewards, grad_margin * slope_w, -grad_margin * slope_l, on_dispersion)


# --- Plain PyTorch ---------------------------------------------------------------------------------------------------


def torch_token_stats(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(logps, entropy) of logits [..., V] at labels [...], in at least float32; 0 where the label is ignored."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = F.log_softmax(wide / temperature, dim=-1)
    ignored = labels == ignore_index
    logps = log_probs.gather(-1, labels.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_probs.exp() * log_probs.masked_fill(log_probs == -math.inf, 0.0)).sum(-1)
    return logps.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)


def _torch_losing_probability(r: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """q and dq/dr for r > 0, both times e^(a r) so that they neither underflow nor overflow."""
    near, far, decay = -torch.expm1(-a * r), -torch.expm1(-a * (r + 1)), torch.exp(-a)
    q = r / near - (r + 1) * decay / far
    return q, (1 - a * r / near) / near - (1 - a * (r + 1) / far) * decay / far


def torch_mallows_log_prob(margin: Tensor, neg_log_dispersion: Tensor, smoothing: float = 1.0) -> Tensor:
    """log g, broadcast, for a > 0 and, without smoothing, a margin other than 0; loses digits as a -> 0."""
    z, a = torch.broadcast_tensors(margin, neg_log_dispersion)
    r = torch.where(z < 0, -z, z)  # not abs, whose slope at 0 is 0
    inside = r < smoothing
    outer = torch.where(inside, smoothing, r)
    log_q = torch.log(_torch_losing_probability(outer, a)[0]) - a * outer
    if smoothing > 0:
        q, q_r = (torch.exp(-a * smoothing) * x for x in _torch_losing_probability(torch.full_like(a, smoothing), a))
        x = torch.where(inside, r, 0.0) / smoothing
        # 1/2 minus the odd cubic, in the form whose terms are all positive.
        cubic = (1 - x) ** 2 * (2 + x) / 4 + q * x * (3 - x**2) / 2 - q_r * smoothing * x * (1 - x**2) / 2
        log_q = torch.where(inside, torch.log(cubic), log_q)
    return torch.where(z < 0, log_q, torch.log1p(-torch.exp(log_q)))


TORCH_LINKS = ("bradley-terry", "mallows-theta", "mallows-phi", "ipo", "mallows-ipo", "hinge", "mallows-hinge")


def torch_preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    neg_log_dispersion: Tensor | None = None,
    link: str = "mallows-theta",
    beta: float = 0.1,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    robust: bool = False,
    smoothing: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, chosen_rewards, rejected_rewards) of pairs [B]; the rewards are detached. For TORCH_LINKS alone."""
    _check_link(link, neg_log_dispersion)
    if link not in TORCH_LINKS:
        raise ValueError(f"torch_preference_loss knows {', '.join(TORCH_LINKS)}, not {link!r}")
    chosen = chosen_logps if ref_chosen_logps is None else chosen_logps - ref_chosen_logps
    rejected = rejected_logps if ref_rejected_logps is None else rejected_logps - ref_rejected_logps
    z = beta * (chosen - rejected) - gamma
    x = 2 * neg_log_dispersion * z if link in DISPERSION_LINKS and link != "mallows-phi" else z

    def likelihood(sign: float) -> Tensor:
        if link == "mallows-phi":
            return torch_mallows_log_prob(sign * z, neg_log_dispersion, smoothing)
        if link in ("bradley-terry", "mallows-theta"):
            return F.logsigmoid(sign * x)
        if link in ("ipo", "mallows-ipo"):
            return -((sign * x - 0.5) ** 2)
        return -torch.relu(1 - sign * x)

    keep, swap = _mixing_weights(label_smoothing, robust)
    losses = -keep * likelihood(1.0)
    if label_smoothing > 0:
        losses = losses - swap * likelihood(-1.0)
    return losses, (beta * chosen).detach(), (beta * rejected).detach()
