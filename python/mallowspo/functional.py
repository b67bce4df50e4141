"""The functions a training loop calls. Needs torch alone.

Symbols: B pairs, N tokens, V vocabulary, D hidden size; log is natural; a = -log phi >= 0 is the neg-log dispersion of
a prompt. Results are float32, for float64 inputs float64. Inputs are checked here, once; what the functions compute is
written in csrc/core and, in plain Python, in :mod:`mallowspo.reference`.

Devices: CPU and CUDA. On the CPU a label outside the vocabulary raises IndexError and a dispersion that is negative,
infinite or NaN raises ValueError; on CUDA, where naming the value would stop the stream, such a label traps the kernel
and such a dispersion makes its own pair NaN.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mallowspo.autograd import MallowsLogProbFunction, PreferenceLossFunction, TokenStatsFunction
from mallowspo.checks import (
    DTYPES,
    HAS_CUDA_KERNELS,
    check_alike,
    check_same_device,
    check_same_dtype,
    check_tensor,
    may_overlap,
)
from mallowspo.choices import LINKS, MALLOWS_LINKS, check_count, check_positive, check_smoothing, operator_settings
from mallowspo.entropy import ENTROPY_CLAMP, neg_log_dispersion, normalised_entropy
from mallowspo.linear import LinearTokenStatsFunction
from mallowspo.mixture import mixed_reference_logps
from mallowspo.token_weights import pair_draws, token_weights

__all__ = ["TokenStats", "token_stats", "linear_token_stats", "pair_draws", "token_weights"]
__all__ += ["PreferenceLoss", "preference_loss", "diffusion_preference_loss", "mallows_log_prob"]
__all__ += ["normalised_entropy", "neg_log_dispersion", "mixed_reference_logps"]
__all__ += ["DTYPES", "ENTROPY_CLAMP", "HAS_CUDA_KERNELS", "LINKS", "MALLOWS_LINKS", "MEMORY_BUDGET"]

# Bytes that linear_token_stats works in. A GPU needs larger products to be busy: beside a head of 128k x 4096 in
# bfloat16, 64 MiB leave tiles of a few hundred columns.
MEMORY_BUDGET = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}


class TokenStats(NamedTuple):
    """Log-probability of each label and entropy (nats) of each row's distribution."""

    logps: Tensor
    entropy: Tensor


class PreferenceLoss(NamedTuple):
    """Loss of each pair, unreduced and differentiable, and the detached rewards beta * log-ratio."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    inplace_backward: bool = False,
) -> TokenStats:
    """Log-probability of the labels and entropy of the softmax, in one pass over the logits.

    Args:
        logits: [..., V], float32, float64, bfloat16 or float16, at most 9 dimensions; any strides in the leading ones
            cost no copy.
            A logit of -inf is a token of probability 0. A NaN, a +inf or a row of -inf makes that row NaN.
        labels: [...], int64.
        ignore_index: label of the rows to leave out; their results and gradients are 0.
        temperature: divides the logits, > 0.
        inplace_backward: the backward writes the gradient over the logits, which saves their size in memory and the
            page faults of a fresh tensor. For logits that nothing else reads afterwards: a later use of theirs in the
            same graph, a second backward too, raises torch's error for tensors changed in place. Ignored under
            torch.compile, where that error would not be raised.

    Returns:
        TokenStats(logps, entropy), both [...], float32 (float64 for float64 logits); each can be differentiated
            on its own.

    Raises:
        TypeError: a dtype that is not listed, a temperature that is no number.
        ValueError: shapes or devices that disagree, an empty vocabulary, a temperature that is not positive,
            inplace_backward for logits whose vocabulary is not contiguous or that share memory among themselves.
        IndexError: a label outside [0, V) that is not ignore_index (CPU).
    """
    check_tensor("logits", logits, DTYPES)
    check_tensor("labels", labels, (torch.int64,))
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V >= 1, got shape {list(logits.shape)}")
    if logits.dim() > 9:
        raise ValueError(
            f"logits may have 9 dimensions, got {logits.dim()}; flatten the leading ones, of the labels too"
        )
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of logits without the vocabulary, {list(logits.shape[:-1])}, "
            f"got {list(labels.shape)}"
        )
    check_same_device(logits=logits, labels=labels)
    check_positive("temperature", temperature)
    inplace_backward = inplace_backward and not torch.compiler.is_compiling()
    if inplace_backward and ((logits.shape[-1] > 1 and logits.stride(-1) != 1) or may_overlap(logits)):
        raise ValueError(
            f"inplace_backward needs logits with a contiguous last dimension and memory of their own, got strides "
            f"{list(logits.stride())}; call logits.contiguous() first, or leave inplace_backward out"
        )
    return TokenStats(*TokenStatsFunction.apply(logits, labels, ignore_index, float(temperature), inplace_backward))


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    memory_budget: int | None = None,
) -> TokenStats:
    """:func:`token_stats` of ``hidden @ weight.T + bias``, without holding more logits than a budget.

    Args:
        hidden: [..., D], float32, float64, bfloat16 or float16. Under autocast, hidden and the head's tensors are cast
            to its dtype, as in ``torch.nn.functional.linear``.
        weight: [V, D], same dtype as hidden.
        labels: [...], int64.
        bias: [V] or None.
        low_rank: (down [..., r], up [V, r]) adds ``down @ up.T`` to the logits, or None. LoRA on the head is
            ``down = scaling * hidden @ A.T``, ``up = B``; a frozen weight then costs no gradient of its size.
        ignore_index: label of the tokens to leave out; their results and gradients are 0. On the CPU they cost
            nothing; on CUDA, and under torch.compile, they are multiplied as well: leave them out of hidden there.
        temperature: divides the (capped) logits, > 0.
        softcap: c > 0 replaces the logits l by c tanh(l / c), as Gemma 2 does; None leaves them.
        chunk_tokens: tokens worked on at a time; default: 2048, fewer where the budget is small.
        memory_budget: bytes to work in, beyond inputs, results and gradients; default: 64 MiB, on CUDA 512.
            With a trained head the logits are kept from the forward to the backward while they fit in this plus the
            buffer of the weight's gradient, [V, D], which is then allocated in the forward; the rest are computed
            again. In half precision the sum of hidden's gradient, [..., D] in float32, comes on top where it
            takes more than half of this.

    Returns:
        TokenStats(logps, entropy), both [...], float32 (float64 for float64 inputs), differentiable in hidden, weight,
        bias and low_rank; the weight's gradient is accumulated in float32.

    Raises:
        TypeError, ValueError, IndexError: as :func:`token_stats`.
    """
    check_tensor("hidden", hidden, DTYPES)
    check_tensor("weight", weight, DTYPES)
    check_tensor("labels", labels, (torch.int64,))
    if low_rank is not None and not (isinstance(low_rank, (tuple, list)) and len(low_rank) == 2):
        raise TypeError(f"low_rank must be a pair (down [..., r], up [V, r]) or None, got {type(low_rank).__name__}")
    down, up = (None, None) if low_rank is None else low_rank
    optional = {"bias": bias, "down": down, "up": up}
    for name, tensor in optional.items():
        if tensor is not None or (name != "bias" and low_rank is not None):
            check_tensor(name, tensor, DTYPES)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        optional = {name: None if x is None else x.to(dtype) for name, x in optional.items()}
    bias, down, up = optional.values()
    if weight.dim() != 2 or 0 in weight.shape or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [..., D] and weight [V, D] with V and D >= 1, "
            f"got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of hidden without its last dimension, {list(hidden.shape[:-1])}, "
            f"got {list(labels.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = [{weight.shape[0]}], got {list(bias.shape)}")
    if low_rank is not None and (
        up.dim() != 2 or len(up) != len(weight) or list(down.shape) != [*labels.shape, up.shape[1]]
    ):
        raise ValueError(
            f"low_rank must be (down [..., r], up [V, r]) beside hidden {list(hidden.shape)} and weight "
            f"{list(weight.shape)}, got {list(down.shape)} and {list(up.shape)}"
        )
    tensors = {"hidden": hidden, "weight": weight} | {name: x for name, x in optional.items() if x is not None}
    check_same_dtype(**tensors)
    check_same_device(**tensors, labels=labels)
    check_positive("temperature", temperature)
    if softcap is not None:
        check_positive("softcap", softcap)
    check_count("chunk_tokens", chunk_tokens, 1)
    check_count("memory_budget", memory_budget, 1)
    if memory_budget is None:
        memory_budget = MEMORY_BUDGET[hidden.device.type]
    hidden, down = (None if x is None else x.reshape(labels.numel(), x.shape[-1]) for x in (hidden, down))
    flat = LinearTokenStatsFunction.apply(
        hidden, weight, down, up, bias, labels.reshape(-1),
        ignore_index, float(temperature), softcap, chunk_tokens, memory_budget, torch.is_grad_enabled(),
    )  # fmt: skip
    return TokenStats(*(stat.reshape(labels.shape) for stat in flat))


def mallows_log_prob(margin: Tensor, neg_log_dispersion: Tensor | float, *, smoothing: float = 1.0) -> Tensor:
    """log g(z; a): the Mallows model's log-probability, under Kendall's distance, that the first response wins.

    g(z) = (1 - sgn z) / 2 + sgn(z) [(|z| + 1) / (1 - phi^(|z| + 1)) - |z| / (1 - phi^|z|)], phi = e^-a (Mallows 1957,
    as used by arXiv 2405.14953). It jumps at 0 and is meant for |z| >= 1, so on |z| < smoothing it is replaced by the
    odd cubic about 1/2 that meets it in value and slope at the ends. The cubic is this library's choice, not the
    paper's.

    Args:
        margin: z, any shape; a tensor or a number, at least one of the two arguments a tensor. An infinite one counts
            as the largest finite one.
        neg_log_dispersion: a >= 0, broadcast against margin. a = 0 gives log 1/2 everywhere.
        smoothing: half-width of the cubic; 0 for the raw function, which at z = 0 is log 1/2 with the slope of its
            sides.

    Returns:
        The broadcast shape, float32 (float64 for float64), finite for finite arguments, differentiable in both.

    Raises:
        TypeError: dtypes that disagree or are not floating point. ValueError: smoothing negative or not finite, shapes
            that do not broadcast, a dispersion that is negative or not finite (CPU).
    """
    if not torch.is_tensor(margin) and torch.is_tensor(neg_log_dispersion):
        margin = neg_log_dispersion.new_full((), margin)  # filled there: a copy would wait for a GPU
    check_tensor("margin", margin, DTYPES)
    if not torch.is_tensor(neg_log_dispersion):
        neg_log_dispersion = margin.new_full((), neg_log_dispersion)
    check_tensor("neg_log_dispersion", neg_log_dispersion, DTYPES)
    check_same_dtype(margin=margin, neg_log_dispersion=neg_log_dispersion)
    check_same_device(margin=margin, neg_log_dispersion=neg_log_dispersion)
    check_smoothing(smoothing)
    try:
        margin, neg_log_dispersion = torch.broadcast_tensors(margin, neg_log_dispersion)
    except RuntimeError as error:
        raise ValueError(f"margin and neg_log_dispersion do not broadcast: {error}") from error
    return MallowsLogProbFunction.apply(margin, neg_log_dispersion, float(smoothing))


def preference_loss(
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
    focal_gamma: float = 0.0,
    clip_rejected: bool = False,
    divergence: str = "reverse-kl",
    divergence_alpha: float = 0.5,
    discopop_tau: float = 0.05,
) -> PreferenceLoss:
    """The loss of each preference pair: -log-likelihood of the margin under a link.

    r_w = chosen_logps - ref_chosen_logps, r_l likewise, z = beta (r_w - r_l) - gamma, and the loss is
    -(1 - label_smoothing) ll(z) - label_smoothing ll(-z), with ll by `link`:

    - ``bradley-terry``: log sigmoid(z) (DPO, arXiv 2305.18290);
    - ``ipo``: -(z - 1/2)^2, which is beta^2 times (h - 1/(2 beta))^2 (arXiv 2310.12036);
    - ``hinge``: -max(0, 1 - z);
    - ``exo``: -KL(sigmoid(z) || 1 - label_smoothing), without the mixing above (arXiv 2402.00856);
    - ``discopop``: -(1 - m) softplus(-z) - m e^-z, m = sigmoid(z / discopop_tau) (arXiv 2406.08414);
    - ``mallows-theta``, ``mallows-ipo``, ``mallows-hinge``, ``mallows-exo``, ``mallows-discopop``: the same of 2 a z,
      a the neg-log dispersion (arXiv 2405.14953; the first is ``bradley-terry``'s);
    - ``mallows-phi``: log g(z; a), see :func:`mallows_log_prob`.

    Links without a margin, of x_w = beta r_w and x_l = beta r_l; s is the sigmoid:

    - ``sppo``: (x_w - 1/2)^2 + (x_l + 1/2)^2, which is beta^2 times the paper's (arXiv 2405.00675);
    - ``nca``: -log s(x_w) - (log s(-x_w) + log s(-x_l)) / 2 (arXiv 2402.05369);
    - ``bco``: -log s(x_w) - log s(-x_l), without the paper's shift of the rewards (arXiv 2404.04656);
    - ``apo-zero``: s(-x_w) + s(x_l); ``apo-down``: s(x_w) + s(x_l - x_w) (arXiv 2408.06266).

    Args:
        chosen_logps, rejected_logps: [B] (any one shape), log-probabilities of the two responses, summed or averaged
            over tokens by the caller; float32, float64, bfloat16 or float16.
        ref_chosen_logps, ref_rejected_logps: the same under the reference model, or both None.
        neg_log_dispersion: a >= 0, [B]; for the mallows links and only for them.
        beta: > 0, scale of the margin. gamma: target margin subtracted from it.
        label_smoothing: in [0, 1/2), the assumed share of flipped labels.
        robust: divide out the smoothing's bias instead: (-(1 - e) ll(z) + e ll(-z)) / (1 - 2 e) (arXiv 2403.00409).
            Unbiased where -z is the flipped pair's margin, so gamma must be 0.
        smoothing: see :func:`mallows_log_prob`; read by ``mallows-phi`` alone.
        focal_gamma: >= 0, FocalPO: the loss is -p^focal_gamma log p, p the probability that the link gives; the power
            is differentiated, so the gradient turns where log p < -1 / focal_gamma (arXiv 2501.06645).
        clip_rejected: MinorDPO: r_l counts only where it is positive (arXiv 2408.09834).
        divergence: what regularises: "reverse-kl" (DPO), "forward-kl", "js" or "alpha". r_w and r_l become s(r), with
            s(r) = 1 - e^-r; log 2 + log sigmoid(r); (e^((A - 1) r) - 1) / (A - 1), A = divergence_alpha, constant
            where (A - 1) r > 80 (f-DPO, arXiv 2309.16240, whose alpha is 1 - A: f'(u) = (1 - u^-alpha) / alpha; TRL's
            f_alpha_divergence_coef is A).
        discopop_tau: > 0, read by the discopop links alone.

    Returns:
        PreferenceLoss(losses, chosen_rewards, rejected_rewards), all [B], float32 (float64 for float64). The losses
        are differentiable in all five tensors; the rewards, beta times the log-ratio, are detached.

    Raises:
        TypeError: dtypes that disagree. ValueError: shapes or devices that disagree, an unknown link, one reference
            without the other, a missing or superfluous dispersion, a number out of its range, choices that exclude
            each other.
    """
    tensors = {"chosen_logps": chosen_logps, "rejected_logps": rejected_logps}
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        raise ValueError("ref_chosen_logps and ref_rejected_logps come together: give both, or neither")
    if ref_chosen_logps is not None:
        tensors |= {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
    settings = operator_settings(
        link, beta, gamma, label_smoothing, robust, smoothing, focal_gamma, clip_rejected, divergence,
        divergence_alpha, discopop_tau,
    )  # fmt: skip
    if (link in MALLOWS_LINKS) != (neg_log_dispersion is not None):
        raise ValueError(
            f"link {link!r} needs neg_log_dispersion"
            if neg_log_dispersion is None
            else f"link {link!r} does not read neg_log_dispersion; leave it out or take a mallows link"
        )
    if neg_log_dispersion is not None:
        tensors["neg_log_dispersion"] = neg_log_dispersion
    for name, tensor in tensors.items():
        check_tensor(name, tensor, DTYPES)
    check_alike(**tensors)
    logps = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    return PreferenceLoss(*PreferenceLossFunction.apply(*logps, neg_log_dispersion, *settings))


def diffusion_preference_loss(
    chosen_errors: Tensor,
    rejected_errors: Tensor,
    ref_chosen_errors: Tensor,
    ref_rejected_errors: Tensor,
    *,
    neg_log_dispersion: Tensor | None = None,
    beta: float = 5000.0,
    **choices: Any,
) -> PreferenceLoss:
    """:func:`preference_loss` of two images under a diffusion model, from the errors of its predicted noise.

    With d the mean squared error of an image's predicted noise, z = -K [(d_w - d_l) - (dref_w - dref_l)] - gamma and
    K = beta / 2: ``bradley-terry`` is Diffusion-DPO (arXiv 2311.12908) in the form of its authors' code, the mallows
    links are its plug-ins. The paper multiplies squared norms, not means, by beta T omega(lambda_t) with a constant
    omega; for noise of D numbers that is K = D beta_paper T omega.

    All four errors of a pair are of the same noise at the same timestep:
    ``(noise_pred.float() - noise.float()).pow(2).flatten(1).mean(1)``, chosen and rejected of one forward pass.

    Args:
        chosen_errors, rejected_errors: [B] (any one shape), of a model that predicts the noise (epsilon), >= 0;
            float32 or float64, because K multiplies differences that half precision would round away.
        ref_chosen_errors, ref_rejected_errors: the same under the reference model.
        neg_log_dispersion: a >= 0, [B]; for the mallows links and only for them. There are no token entropies to
            estimate it from: it comes from the data, such as :mod:`mallowspo.dispersion`'s of the raters' agreement.
        beta: > 0; the authors' default, for latents of Stable Diffusion 1.5 and XL.
        **choices: link, gamma and the others of :func:`preference_loss`.

    Returns:
        PreferenceLoss(losses, chosen_rewards, rejected_rewards), all [B]; the rewards are K (dref - d), detached.

    Raises:
        TypeError, ValueError: as :func:`preference_loss`; errors in half precision.
    """
    errors = {
        "chosen_errors": chosen_errors,
        "rejected_errors": rejected_errors,
        "ref_chosen_errors": ref_chosen_errors,
        "ref_rejected_errors": ref_rejected_errors,
    }
    # Checked here under the caller's names; what is checked below is what preference_loss calls the same.
    tensors = errors if neg_log_dispersion is None else errors | {"neg_log_dispersion": neg_log_dispersion}
    for name, tensor in tensors.items():
        check_tensor(name, tensor, (torch.float32, torch.float64))
    check_alike(**tensors)
    check_positive("beta", beta)
    return preference_loss(
        *(-tensor for tensor in errors.values()),
        neg_log_dispersion=neg_log_dispersion,
        beta=beta / 2,
        **choices,
    )
