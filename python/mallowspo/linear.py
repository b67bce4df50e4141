"""The autograd Function of ``linear_token_stats``: matrix products and row kernels over tiles of the vocabulary.

A tile is the product of a chunk of tokens with a slice of the head's weight, small enough that the row kernel still
finds it in the cache. What each case costs, in products of [N, D] with [D, V]:

- forward alone: one;
- head frozen: two. The hidden gradient of a token's log-probability is g (W[y] - sum_v p_v W[v]); all but g is known
  in the forward, where a running rescale, as the maximum grows from tile to tile, sums it up without the logits. It is
  kept, [N, D];
- head trained, logits within the budget: three. The logits are kept and become their own gradient;
- otherwise four. The tiles are computed again in the backward.

A trained low-rank change of a frozen head is one of the latter two less the product for the weight's gradient; its own
products cost r/D of one each.
"""

import torch

from mallowspo.autograd import accumulator_dtype, first_order, ops

# More tokens would not make the products faster: the weight is read once a chunk, 4 KFLOP for each of its elements.
CHUNK_TOKENS = 2048

# What a chunk works with beside its tile: at most so many arrays [n, D], and [n, r], in the accumulator's dtype.
SCRATCH = 4

# Bytes of a tile on the CPU, where it should stay in the last level of the cache.
CPU_TILE = 16 * 2**20


class LinearTokenStatsFunction(torch.autograd.Function):
    """(hidden [N, D], weight [V, D], down [N, r] and up [V, r] or None twice, bias [V] or None, labels [N]) ->
    (logps [N], entropy [N]) of the logits hidden @ weight.T + down @ up.T + bias."""

    @staticmethod
    def forward(
        ctx, hidden, weight, down, up, bias, labels,
        ignore_index, temperature, softcap, chunk_tokens, budget, grad_enabled,
    ):  # fmt: skip
        total = accumulator_dtype(hidden.dtype)
        wants_hidden, *wants_head = (grad_enabled and needed for needed in ctx.needs_input_grad[:5])
        trains_head = any(wants_head)
        lefts, rights = _factors(hidden, down), _factors(weight, up)
        keeps_direction = wants_hidden and not trains_head and softcap is None
        chunks = _chunks(lefts, labels, ignore_index, chunk_tokens, budget)
        stats = hidden.new_zeros(4, len(hidden), dtype=total)
        direction = torch.zeros_like(hidden) if keeps_direction else None
        kept = None
        for rows in chunks:
            parts, part_labels = [left[rows] for left in lefts], labels[rows]
            part = parts[0]
            state = stats.new_zeros(4, len(part))
            state[0] = torch.finfo(total).min
            summed = torch.zeros_like(part, dtype=total) if keeps_direction else None
            fits = trains_head and len(chunks) == 1 and _kept_bytes(parts, weight) <= budget
            for columns, logits in _tiles(parts, rights, bias, softcap, budget, whole=fits):
                before = state[0].clone()
                ops.token_stats_tile(
                    state, logits, part_labels, columns.start, len(weight), ignore_index, temperature, keeps_direction
                )
                if keeps_direction:
                    summed *= torch.exp(before - state[0])[:, None]
                    _add_product(summed, logits, weight[columns])
                elif fits:
                    kept = logits
            stats[:, rows] = state
            if keeps_direction:
                direction[rows] = _direction(summed, state, weight, part_labels, ignore_index, temperature)
        row_max, log_sum, entropy, logps = stats.unbind()
        ctx.save_for_backward(hidden, weight, down, up, bias, labels, entropy, row_max, log_sum, direction)
        ctx.chunks = chunks
        ctx.kept_logits = kept
        ctx.settings = ignore_index, temperature, softcap, budget
        ctx.set_materialize_grads(False)
        return logps.clone(), entropy.clone()

    @staticmethod
    @first_order
    def backward(ctx, grad_logps, grad_entropy):
        hidden, weight, down, up, bias, labels, entropy, row_max, log_sum, direction = ctx.saved_tensors
        ignore_index, temperature, softcap, budget = ctx.settings
        if grad_logps is None and grad_entropy is None:
            return (None,) * 12
        if direction is not None and grad_entropy is None:
            grad_hidden = torch.zeros_like(hidden)
            for rows in ctx.chunks:  # the products are in the accumulator's dtype
                grad_hidden[rows] = (direction[rows] * grad_logps[rows, None]).to(hidden.dtype)
            return grad_hidden, *(None,) * 11
        kept, ctx.kept_logits = ctx.kept_logits, None  # overwritten below; a second backward computes them again
        total = accumulator_dtype(hidden.dtype)
        one_chunk = len(ctx.chunks) == 1
        lefts, rights = _factors(hidden, down), _factors(weight, up)
        needed = [ctx.needs_input_grad[2 * i : 2 * i + 2] for i in range(len(lefts))]
        grad_lefts, grad_rights = [], []
        for left, right, (wants_left, wants_right) in zip(lefts, rights, needed, strict=True):
            grad_lefts.append(torch.zeros_like(left) if wants_left else None)
            if not wants_right:
                grad_rights.append(None)
            else:  # a sum over chunks loses nothing to rounding in between
                grad_rights.append(torch.empty_like(right) if one_chunk else torch.zeros_like(right, dtype=total))
        grad_bias = torch.zeros_like(bias, dtype=total) if ctx.needs_input_grad[4] else None
        for rows in ctx.chunks:
            parts = [left[rows] for left in lefts]
            grads = [None if g is None else g[rows].contiguous() for g in (grad_logps, grad_entropy)]
            saved = labels[rows], entropy[rows], row_max[rows], log_sum[rows]
            sums = [g if g is None else torch.zeros_like(g[rows], dtype=total) for g in grad_lefts]
            if kept is not None:
                tiles = [(slice(0, len(weight)), kept)]
            else:
                tiles = _tiles(parts, rights, bias, softcap, budget)
            for columns, logits in tiles:
                slope = None if softcap is None else 1 - (logits / softcap) ** 2
                ops.token_stats_backward_tile(
                    logits, *grads, *saved, columns.start, len(weight), ignore_index, temperature
                )
                grad = logits if slope is None else (logits * slope).to(hidden.dtype)
                for part, summed, right, grad_right in zip(parts, sums, rights, grad_rights, strict=True):
                    if summed is not None:
                        _add_product(summed, grad, right[columns])
                    if grad_right is not None and one_chunk:
                        torch.mm(grad.T, part, out=grad_right[columns])
                    elif grad_right is not None:
                        _add_product(grad_right[columns], grad.T, part)
                if grad_bias is not None:
                    grad_bias[columns] += grad.sum(0, dtype=total)
            for grad_left, summed in zip(grad_lefts, sums, strict=True):
                if summed is not None:
                    grad_left[rows] = summed.to(hidden.dtype)
        grad_rights = [None if g is None else g.to(weight.dtype) for g in grad_rights]
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        grads = [g for pair in zip(grad_lefts, grad_rights, strict=True) for g in pair]
        return *grads, *(None,) * (4 - len(grads)), grad_bias, *(None,) * 7


def _factors(first, second):
    return [first] if second is None else [first, second]


def _scratch_bytes(lefts):
    return SCRATCH * sum(left.shape[1] for left in lefts) * accumulator_dtype(lefts[0].dtype).itemsize


def _kept_bytes(lefts, weight):
    """Bytes that keeping all logits takes."""
    return len(lefts[0]) * (len(weight) * weight.element_size() + _scratch_bytes(lefts))


def _chunks(lefts, labels, ignore_index, chunk_tokens, budget):
    """Slices of the tokens, or the indices of those that are not ignored. Finding these would wait for a CUDA device,
    and would make shapes depend on data, which torch.compile does not trace: there all tokens go in."""
    size = chunk_tokens or max(1, min(CHUNK_TOKENS, budget // 2 // _scratch_bytes(lefts)))
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        kept = (labels != ignore_index).nonzero().squeeze(1)
        if len(kept) < len(labels):
            return kept.split(size) if len(kept) else ()
    return [slice(start, start + size) for start in range(0, len(labels), size)]


def _tiles(lefts, rights, bias, softcap, budget, whole=False):
    """(columns, logits [n, W]) over slices of the vocabulary; a tile overwrites the one before."""
    (hidden, *down), (weight, *up) = lefts, rights
    item = hidden.element_size() if softcap is None else hidden.element_size() + 3 * 4  # capped logits, slope, product
    room = budget - len(hidden) * _scratch_bytes(lefts)
    if hidden.device.type == "cpu":
        room = min(room, CPU_TILE)
    width = len(weight) if whole else min(len(weight), max(1, room // (len(hidden) * item)))
    buffer = hidden.new_empty(len(hidden) * width)
    for start in range(0, len(weight), width):
        columns = slice(start, min(start + width, len(weight)))
        logits = buffer[: len(hidden) * (columns.stop - start)].view(len(hidden), -1)
        if bias is None:
            torch.mm(hidden, weight[columns].T, out=logits)
        else:
            torch.addmm(bias[columns], hidden, weight[columns].T, out=logits)
        for left, right in zip(down, up, strict=True):
            logits.addmm_(left, right[columns].T)
        if softcap is not None:  # in the accumulator's dtype, where tanh costs no digits
            logits = softcap * torch.tanh(logits.to(accumulator_dtype(logits.dtype)) / softcap)
        yield columns, logits


def _direction(summed, state, weight, labels, ignore_index, temperature):
    """W[y] - sum_v p_v W[v] over the temperature; the label's own term is (1 - p_y) W[y], which keeps its digits where
    p_y is near 1. `summed` [n, D] is minus the sum over the other entries before the division by s."""
    _, log_sum, _, logps = state
    own = weight[labels.masked_fill(labels == ignore_index, 0)].to(summed.dtype)
    own *= (-torch.expm1(logps) / temperature)[:, None]
    summed *= torch.exp(-log_sum)[:, None]
    return (summed + own).masked_fill_((labels == ignore_index)[:, None], 0).to(weight.dtype)


def _add_product(total, left, right):
    """total += left @ right; a product in a narrower dtype is rounded once and added in total's."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
