"""What each token of a response counts in its score, S(y) = sum over t of w_t (log pi(y_t) - log ref(y_t)).

The one place that makes the weights w, [N], of a batch. Tokens come response by response, those of the B chosen ones
before those of the B rejected ones, as :mod:`mallowspo.collator` lays them out; tokens of the prompt are not among
them. Needs torch alone.

Weights are formed in every step from per-token log-probabilities, of a cached reference too: BMC's follow the policy
and SamPO draws anew in every step, so no sum made before training could serve them, and one cached pass serves every
decay, discount and delta. It takes four bytes a token, as the token ids do.
"""

import torch
from torch import Tensor

from mallowspo.choices import check_not_negative, check_number

# Odd constants of the generator splitmix64 (Steele, Lea, Flood 2014), as the signed integers that torch has.
_STRIDE, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def token_weights(
    token_logps: Tensor,
    num_tokens: Tensor,
    *,
    token_decay: float = 1.0,
    ld_alpha: float = 1.0,
    draws: Tensor | None = None,
    bridge_delta: float = 0.0,
    differs: Tensor | None = None,
) -> Tensor:
    """The product of four factors, each 1 by default; t = 1, 2, ... counts the tokens of a response.

    - D2PO (arXiv 2502.14340): token_decay^t; as in the authors' code the first token already has token_decay^1.
    - LD-DPO (arXiv 2409.06411, TRL's ``ld_alpha``): ld_alpha for t beyond the length of the pair's shorter response.
    - SamPO (arXiv 2406.10957): 1 for as many tokens of the longer response as the shorter one has, drawn uniformly
      without replacement, 0 for its others; 1 for all of the shorter one.
    - BMC (arXiv 2408.07471): 1 + min(1 / pi, bridge_delta) for a token that differs from the other response.

    Args:
        token_logps: [N] floating point, log-probability of each token under the model whose 1 / pi is meant.
        num_tokens: [2B] int64, tokens of each response, at least 1.
        token_decay: in (0, 1]. ld_alpha: in [0, 1]. bridge_delta: finite, >= 0; 0 bridges nothing.
        draws: [B] int64 of :func:`pair_draws`: the same number draws the same positions, in any batch and on any
            device. None keeps all tokens.
        differs: [N] bool, of :func:`mallowspo.differences.diff_masks`; for a bridge_delta > 0 and only then.

    Returns:
        [N], dtype of token_logps, without gradient.

    Raises:
        ValueError: a number out of its range; ``differs`` missing or superfluous.
    """
    check_token_weights(token_decay, ld_alpha, bridge_delta)
    if (differs is not None) != (bridge_delta > 0):
        raise ValueError(
            f"bridge_delta={bridge_delta} (BMC) needs differs, the mask of the tokens that differ between the two "
            "responses: mallowspo.differences.diff_masks makes it"
            if differs is None
            else "differs is read where bridge_delta > 0 (BMC); leave it out or set bridge_delta"
        )
    owner = torch.repeat_interleave(num_tokens, output_size=len(token_logps))  # [N], the response of a token
    place = torch.arange(len(owner), device=owner.device) - (num_tokens.cumsum(0) - num_tokens)[owner]
    is_shared = place < torch.minimum(*num_tokens.chunk(2)).repeat(2)[owner]
    weights = torch.ones_like(token_logps, requires_grad=False)
    if token_decay != 1:
        weights = token_decay ** (place + 1).to(weights.dtype)
    if ld_alpha != 1:
        weights = torch.where(is_shared, weights, ld_alpha * weights)
    if draws is not None:
        keys = _mixed(draws.repeat(2)[owner] + _STRIDE * place)
        order = keys.argsort(stable=True)
        order = order[owner[order].argsort(stable=True)]  # response by response, each in the order of its keys
        weights = weights * torch.empty_like(is_shared).scatter_(0, order, is_shared)
    if differs is not None:
        weights = torch.where(
            differs, weights * (1 + torch.exp(-token_logps.detach()).clamp(max=bridge_delta)), weights
        )
    return weights


def check_token_weights(token_decay, ld_alpha, bridge_delta):
    """ValueError for a number that :func:`token_weights` cannot take."""
    for name, value in (("token_decay", token_decay), ("ld_alpha", ld_alpha)):
        check_number(name, value)
    if not 0 < token_decay <= 1:
        raise ValueError(f"token_decay must be in (0, 1] (1: no decay), got {token_decay}")
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha must be in [0, 1] (1: no discount), got {ld_alpha}")
    check_not_negative("bridge_delta", bridge_delta, "0: no bridges")


def pair_draws(rows: Tensor, seed: int, step: int, stream: int = 0) -> Tensor:
    """A number for each pair that seeds SamPO's draw: a hash of its row, the seed, the step and the stream.

    So a draw depends neither on the batch, the rank or the layout a pair comes in, nor on what else was drawn.

    Args:
        rows: [B] int64, any number that names a pair.
        seed, step, stream: integers.

    Returns:
        [B] int64.
    """
    state = _mixed(rows)
    for number in (stream, step, seed):
        state = _mixed(state + number)
    return state


def _mixed(x):
    """The output function of splitmix64: a bijection of int64 whose every bit depends on all of x's."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x, bits):
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's own shift repeats the sign


def response_sums(token_values, num_tokens, weights=None):
    """Sum of the values [N] of each response's tokens, times their weights [N] if given: [R].

    Whether num_tokens [R] add up to N is checked on the CPU alone: elsewhere the host would wait for the device.
    """
    if weights is not None:
        token_values = token_values * weights
    unchecked = token_values.device.type != "cpu"
    return torch.segment_reduce(token_values, "sum", lengths=num_tokens, axis=0, unsafe=unchecked)


def weighted_logps(objective, batch, policy, references, *, seed=0, step=0):
    """The log-probability of each response, its tokens weighted by the objective: what the objective is called with.

    Args:
        objective: a ``PreferenceObjective``.
        batch: of :class:`mallowspo.collator.PreferenceCollator`; ``num_tokens`` is read, for SamPO ``row``, for BMC
            ``differs``.
        policy: ``ResponseStats`` of the policy. references: a list of those of K references, the anchor first, or [].
        seed, step: what SamPO's draw depends on besides the pair.

    Returns:
        (logps [2B], ref_logps): ref_logps is [2B], for several references [K, 2B], and None if reference-free.

    Raises:
        ValueError: the batch lacks what a method needs.
    """
    scored = [policy] if objective.reference_free else [policy, *references]
    sums = [stats.logps for stats in scored]
    if objective.weighs_tokens:
        num_tokens, weights = batch["num_tokens"], None
        for stream, stats in enumerate(scored):
            if weights is None or objective.own_token_weights:
                weights = _weights_of(objective, batch, stats.token_logps, seed, step, stream)
            sums[stream] = response_sums(stats.token_logps, num_tokens, weights)
    logps, *ref_logps = sums
    return logps, torch.stack(ref_logps) if len(ref_logps) > 1 else next(iter(ref_logps), None)


def _weights_of(objective, batch, token_logps, seed, step, stream):
    draws = None
    if token_logps is None:
        raise ValueError(
            "token_decay (D2PO), ld_alpha (LD-DPO), down_sampling (SamPO) and bridge_delta (BMC) weigh tokens: the "
            "reference's columns 'ref_chosen_token_logps' and 'ref_rejected_token_logps' are missing"
        )
    if objective.down_sampling:
        if "row" not in batch:
            raise ValueError("down_sampling (SamPO) seeds its draw by the pair's number: the batch lacks 'row'")
        draws = pair_draws(batch["row"], seed, step, stream)
    return token_weights(
        token_logps,
        batch["num_tokens"],
        token_decay=objective.token_decay,
        ld_alpha=objective.ld_alpha,
        draws=draws,
        bridge_delta=objective.bridge_delta,
        differs=batch.get("differs") if objective.bridge_delta else None,
    )
