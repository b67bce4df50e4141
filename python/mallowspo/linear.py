"""The autograd Function of ``linear_token_stats``: matrix products and row kernels over tiles of the vocabulary.

A tile is the product of a chunk of tokens with a slice of the head's weight. The weight is read once a chunk, a tile
stays within the memory budget, and the gradient of a slice of the weight is one product over all tokens of the chunk.
What each case costs, in products of [N, D] with [D, V]:

- forward alone: one;
- head frozen: two. The hidden gradient of a token's log-probability is g (W[y] - sum_v p_v W[v]); all but g is known
  in the forward, where a running rescale, as the maximum grows from tile to tile, sums it up without the logits. It is
  kept, [N, D];
- head trained, logits within the budget: three. The logits are kept and become their own gradient;
- otherwise four. The tiles are computed again in the backward.
"""

import torch

from mallowspo.autograd import accumulator_dtype, first_order, ops

# A chunk has at most so many tokens that a tile of the budget still has this many columns: narrower products are slow.
MIN_TILE_COLUMNS = 2048


class LinearTokenStatsFunction(torch.autograd.Function):
    """(hidden [N, D], weight [V, D], bias [V] or None, labels [N]) -> (logps [N], entropy [N])."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, labels, ignore_index, temperature, softcap, chunk_tokens, budget, grad_enabled
    ):
        total = accumulator_dtype(hidden.dtype)
        wants_hidden, wants_weight, wants_bias = (grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        trains_head = wants_weight or wants_bias
        keeps_direction = wants_hidden and not trains_head and softcap is None
        state = hidden.new_zeros(4, len(hidden), dtype=total)
        state[0] = torch.finfo(total).min
        direction = torch.zeros_like(hidden, dtype=total) if keeps_direction else None
        kept = None
        for rows in _chunks(hidden, chunk_tokens, budget):
            chunk = state[:, rows].contiguous()
            for columns, logits in _tiles(hidden[rows], weight, bias, softcap, budget):
                before = chunk[0].clone()
                ops.token_stats_tile(
                    chunk, logits, labels[rows], columns.start, len(weight), ignore_index, temperature
                )
                if keeps_direction:
                    numerators = _numerators(logits, labels[rows], columns, chunk[0], ignore_index, temperature)
                    direction[rows] *= torch.exp(before - chunk[0])[:, None]
                    _add_product(direction[rows], numerators, weight[columns])
                elif trains_head and logits.shape == (len(hidden), len(weight)):
                    kept = logits
            state[:, rows] = chunk
        row_max, log_sum, entropy, logps = state.unbind()
        if keeps_direction:
            own = -torch.expm1(logps)[:, None] * weight[labels.masked_fill(labels == ignore_index, 0)] / temperature
            direction = own + direction * torch.exp(-log_sum)[:, None]
            direction = direction.masked_fill_((labels == ignore_index)[:, None], 0).to(hidden.dtype)
        ctx.save_for_backward(hidden, weight, bias, labels, entropy, row_max, log_sum, direction)
        ctx.kept_logits = kept
        ctx.settings = ignore_index, temperature, softcap, chunk_tokens, budget
        ctx.set_materialize_grads(False)
        return logps.clone(), entropy.clone()

    @staticmethod
    @first_order
    def backward(ctx, grad_logps, grad_entropy):
        hidden, weight, bias, labels, entropy, row_max, log_sum, direction = ctx.saved_tensors
        ignore_index, temperature, softcap, chunk_tokens, budget = ctx.settings
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        if grad_logps is None and grad_entropy is None:
            return (None,) * 10
        if direction is not None and grad_entropy is None:
            return (direction * grad_logps[:, None]).to(hidden.dtype), *(None,) * 9
        kept, ctx.kept_logits = ctx.kept_logits, None  # overwritten below; a second backward computes them again
        total = accumulator_dtype(hidden.dtype)
        grad_hidden = torch.zeros_like(hidden, dtype=total) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=total) if wants_bias else None
        chunks = _chunks(hidden, chunk_tokens, budget)
        if wants_weight and len(chunks) > 1:  # sums over chunks lose nothing to rounding in between
            grad_weight = grad_weight.to(total)
        for rows in chunks:
            grads = [None if g is None else g[rows].contiguous() for g in (grad_logps, grad_entropy)]
            saved = entropy[rows], row_max[rows], log_sum[rows]
            if kept is not None:
                tiles = [(slice(0, len(weight)), kept)]
            else:
                tiles = _tiles(hidden[rows], weight, bias, softcap, budget)
            for columns, logits in tiles:
                slope = None if softcap is None else 1 - (logits / softcap) ** 2
                ops.token_stats_backward_tile(
                    logits, *grads, labels[rows], *saved, columns.start, len(weight), ignore_index, temperature
                )
                grad = logits if slope is None else (logits * slope).to(hidden.dtype)
                if wants_hidden:
                    _add_product(grad_hidden[rows], grad, weight[columns])
                if wants_weight:
                    _add_product(grad_weight[columns], grad.T, hidden[rows])
                if wants_bias:
                    grad_bias[columns] += grad.sum(0, dtype=total)
        if wants_hidden:
            grad_hidden = grad_hidden.to(hidden.dtype)
        if wants_weight:
            grad_weight = grad_weight.to(weight.dtype)
        if wants_bias:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, *(None,) * 7


def _chunks(hidden, chunk_tokens, budget):
    """Slices of the tokens; one where the budget allows."""
    size = chunk_tokens or max(1, budget // (MIN_TILE_COLUMNS * hidden.element_size()))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def _tiles(hidden, weight, bias, softcap, budget):
    """(columns, logits [n, W]) over slices of the vocabulary; a tile overwrites the one before."""
    item = hidden.element_size() if softcap is None else hidden.element_size() + 3 * 4  # capped logits, slope, product
    width = min(len(weight), max(1, budget // (len(hidden) * item)))
    buffer = hidden.new_empty(len(hidden) * width)
    for start in range(0, len(weight), width):
        columns = slice(start, min(start + width, len(weight)))
        logits = buffer[: len(hidden) * (columns.stop - start)].view(len(hidden), -1)
        if bias is None:
            torch.mm(hidden, weight[columns].T, out=logits)
        else:
            torch.addmm(bias[columns], hidden, weight[columns].T, out=logits)
        if softcap is not None:  # in the accumulator's dtype, where tanh costs no digits
            logits = softcap * torch.tanh(logits.to(accumulator_dtype(logits.dtype)) / softcap)
        yield columns, logits


def _numerators(logits, labels, columns, row_max, ignore_index, temperature):
    """-e^(l - m) / temperature in place of the tile's logits, 0 for the label: its term is added from its probability,
    because 1 - p would lose its digits where p is near 1."""
    zeros, entries = torch.zeros_like(row_max), columns.stop
    ops.token_stats_backward_tile(
        logits, zeros + 1, None, torch.where(labels == ignore_index, labels, 0), zeros, row_max, zeros,
        entries, entries, ignore_index, temperature,
    )  # fmt: skip
    own = (labels - columns.start).clamp(0, logits.shape[1] - 1)[:, None]
    inside = ((labels >= columns.start) & (labels < columns.stop))[:, None]
    logits.scatter_(1, own, torch.where(inside, 0, logits.gather(1, own)))
    return logits


def _add_product(total, left, right):
    """total += left @ right; a product in a narrower dtype is rounded once and added in total's."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
