"""The autograd Function of ``linear_token_stats``: matrix products and row kernels over tiles of the vocabulary.

A tile is the product of a chunk of tokens with a slice of the head's weight, small enough that the row kernel still
finds it in the cache. What each case costs, in products of [N, D] with [D, V]:

- forward alone: one;
- head frozen: two. The hidden gradient of a token's log-probability is g (W[y] - sum_v p_v W[v]); all but g is known
  in the forward, where a running rescale, as the maximum grows from tile to tile, sums it up without the logits. It is
  kept, [N, D]. With a gradient of the entropy, and under torch.compile, where each output has one, the logits are
  computed again: four;
- head trained: three for the tiles whose logits stay until the backward, where they become their own gradient; four
  for the others, which are computed again there. They stay in the budget, and in the memory of the weight's gradient,
  which is thus taken in the forward already: all but a tile where N <= D, D/N of them where N is larger. A trained
  low-rank change of a frozen head costs the same less the product for the weight's gradient, and has the budget alone;
  its own products cost r/D of one each.

Not in the budget: what a frozen head keeps, [N, D]; a few numbers a token and an entry of the vocabulary; and, where
a half-precision head is trained, the float32 sum of the hidden gradient over tiles, [N, D], as far as it takes more
than half of the budget: the backward goes tile by tile, so that the sum of the weight's gradient over chunks has a
tile's size. Where the head is frozen it goes chunk by chunk, and the sum of the hidden gradient has a chunk's size.
"""

import itertools
from typing import NamedTuple

import torch

from mallowspo.autograd import accumulator_dtype, first_order, ops

# More tokens would not make the products faster: the weight is read once a chunk, 4 KFLOP for each of its elements.
CHUNK_TOKENS = 2048

# Bytes of a tile on the CPU, where it should stay in the last level of the cache.
CPU_TILE = 8 * 2**20

# Elsewhere, where the logits are to stay: of smaller tiles the weight's gradient holds more; with larger ones the
# hidden gradient is read and written fewer times.
KEPT_TILE = 64 * 2**20

# Dtypes that torch, where oneDNN has no product of them, multiplies number by number on this CPU: bfloat16 before
# AVX-512, float16 on most. In float32, and rounded after it, that takes an eighth to a sixtieth of the time.
WIDENED = frozenset(
    dtype
    for dtype, is_supported in {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }.items()
    if not (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, is_supported)())
)


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
        keeps_direction = wants_hidden and not any(wants_head) and softcap is None
        keeps_logits = (wants_hidden or any(wants_head)) and not keeps_direction
        lefts, rights = _factors(hidden, down), _factors(weight, up)
        wants = keeps_logits, wants_head[0], wants_head[2]
        layout = _layout(lefts, rights, labels, ignore_index, chunk_tokens, budget, softcap is not None, *wants)
        stats = hidden.new_zeros(4, len(hidden), dtype=total)
        direction = torch.zeros_like(hidden) if keeps_direction else None
        memory = layout.memory(hidden, weight, wants_head[0])
        for i, rows in enumerate(layout.chunks):
            parts, part_labels = [left[rows] for left in lefts], labels[rows]
            part = parts[0]
            state = stats.new_zeros(4, len(part))
            state[0] = torch.finfo(total).min
            summed = torch.zeros_like(part, dtype=total) if keeps_direction else None
            for j, columns in enumerate(layout.tiles):
                logits = layout.place(*memory, i, j)
                _multiply(logits, parts, *_entries(rights, bias, columns))
                before = state[0].clone()
                ops.token_stats_tile(
                    state, logits if softcap is None else _bent(logits, softcap).mul_(softcap), part_labels,
                    columns.start, len(weight), ignore_index, temperature, keeps_direction,
                )  # fmt: skip
                if keeps_direction:
                    summed *= torch.exp(before - state[0])[:, None]
                    _add_product(summed, logits, weight[columns])
            stats[:, rows] = state
            if keeps_direction:
                direction[rows] = _direction(summed, state, weight, part_labels, ignore_index, temperature)
        row_max, log_sum, entropy, logps = stats.unbind()
        ctx.save_for_backward(hidden, weight, down, up, bias, labels, entropy, row_max, log_sum, direction)
        ctx.layout, ctx.memory = layout, memory if keeps_logits else None
        ctx.settings = ignore_index, temperature, softcap
        ctx.set_materialize_grads(False)
        return logps.clone(), entropy.clone()

    @staticmethod
    @first_order
    def backward(ctx, grad_logps, grad_entropy):
        hidden, weight, down, up, bias, labels, entropy, row_max, log_sum, direction = ctx.saved_tensors
        ignore_index, temperature, softcap = ctx.settings
        layout = ctx.layout
        chunks, tiles = layout.chunks, layout.tiles
        if grad_logps is None and grad_entropy is None:
            return (None,) * 12
        if direction is not None and grad_entropy is None:
            grad_hidden = torch.zeros_like(hidden)
            for rows in chunks:  # the products are in the accumulator's dtype
                grad_hidden[rows] = (direction[rows] * grad_logps[rows, None]).to(hidden.dtype)
            return grad_hidden, *(None,) * 11
        memory, ctx.memory = ctx.memory, None  # overwritten below; a second backward computes all tiles again
        is_new = memory is None
        if is_new:
            memory = layout.memory(hidden, weight, ctx.needs_input_grad[1])
        total = accumulator_dtype(hidden.dtype)
        one_chunk, is_narrow = len(chunks) == 1, hidden.dtype != total
        lefts, rights = _factors(hidden, down), _factors(weight, up)
        needed = [ctx.needs_input_grad[2 * i : 2 * i + 2] for i in range(len(lefts))]
        by_chunk = _goes_by_chunk(is_narrow, any(wants_right for _, wants_right in needed))
        grad_lefts, grad_rights = [], []
        for i, (wants_left, wants_right) in enumerate(needed):
            grad_lefts.append(torch.zeros_like(lefts[i], dtype=None if by_chunk else total) if wants_left else None)
            grad_rights.append(None if not wants_right else memory[1] if i == 0 else torch.empty_like(rights[i]))
            if wants_right and not chunks:
                grad_rights[-1].zero_()
        grad_bias = torch.zeros_like(bias, dtype=total) if ctx.needs_input_grad[4] else None
        order = list(itertools.product(range(len(tiles)), range(len(chunks))))
        if by_chunk:
            order.sort(key=lambda place: place[::-1])
        for j, i in reversed(order):
            columns, rows = tiles[j], chunks[i]
            parts = [left[rows] for left in lefts]
            if i == len(chunks) - 1:
                sums = [None if g is None else g[columns] for g in grad_rights]
                if not one_chunk:  # a sum over chunks loses nothing to rounding in between
                    sums = [None if g is None else g.zero_().to(total) for g in sums]
            if not by_chunk:
                summed_lefts, summed_rows = grad_lefts, rows
            elif j == len(tiles) - 1:
                summed_lefts, summed_rows = [None if g is None else g[rows].to(total) for g in grad_lefts], slice(None)
            logits = layout.place(*memory, i, j)
            if is_new or layout.is_lost(i, j):
                _multiply(logits, parts, *_entries(rights, bias, columns))
            grads = [None if g is None else g[rows].contiguous() for g in (grad_logps, grad_entropy)]
            saved = labels[rows], entropy[rows], row_max[rows], log_sum[rows]
            place = columns.start, len(weight), ignore_index
            _differentiate(logits, softcap, *grads, *saved, *place, temperature)
            for part, summed_left, right, summed in zip(parts, summed_lefts, rights, sums, strict=True):
                if summed_left is not None:
                    _add_product(summed_left, logits, right[columns], summed_rows)
                if summed is not None and one_chunk:
                    _multiply(summed, [logits.T], [part.T])
                elif summed is not None:
                    _add_product(summed, logits.T, part)
            if grad_bias is not None:
                grad_bias[columns] += logits.sum(0, dtype=total)
            if i == 0:
                for grad_right, summed in zip(grad_rights, sums, strict=True):
                    if summed is not None and summed.dtype != grad_right.dtype:
                        grad_right[columns] = summed
            if by_chunk and j == 0:
                for grad_left, summed_left in zip(grad_lefts, summed_lefts, strict=True):
                    if grad_left is not None:
                        grad_left[rows] = summed_left.to(grad_left.dtype)
                summed_lefts = summed_left = None  # freed before the next chunk's
        grad_lefts = [None if g is None else g.to(hidden.dtype) for g in grad_lefts]
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        grads = [g for pair in zip(grad_lefts, grad_rights, strict=True) for g in pair]
        return *grads, *(None,) * (4 - len(grads)), grad_bias, *(None,) * 7


def _factors(first, second):
    return [first] if second is None else [first, second]


def _entries(rights, bias, columns):
    return [right[columns] for right in rights], None if bias is None else bias[columns]


def _is_widened(tensor):
    return tensor.device.type == "cpu" and tensor.dtype in WIDENED


def widen(tensor):
    """The tensor in the dtype that it is multiplied in."""
    return tensor.float() if _is_widened(tensor) else tensor


def _goes_by_chunk(is_narrow, wants_rights):
    """Whether the backward finishes a chunk of tokens before the next, rather than a tile of the vocabulary: where
    only the gradients of the tokens are sums in a wider dtype than their own."""
    return is_narrow and not wants_rights


class _Layout(NamedTuple):
    """How the work is cut into parts, a chunk of tokens by a tile of the vocabulary each, and where their logits lie.

    Parts are numbered chunk by chunk within a tile, and the backward goes from the last one to the first. Those of the
    last tiles lie in the memory of the weight's gradient. The others have a slot each until the last slot, where the
    rest overwrite one another and the last one stays: the backward meets that one first, then the overwritten ones,
    which the same slot holds again, then those with a slot of their own.
    """

    chunks: list  # slices of the tokens, or the indices of those that are not ignored
    tiles: list  # slices of the vocabulary
    tokens: int  # of a chunk
    all_tokens: int
    lent: int  # tiles in the memory of the gradient
    slots: int

    @property
    def in_slots(self):
        """The number of parts that are not in the memory of the gradient."""
        return (len(self.tiles) - self.lent) * len(self.chunks)

    def memory(self, hidden, weight, wants_weight):
        """The slots, and the weight's gradient where it is wanted."""
        elements = self.tokens * self.tiles[0].stop
        return _fresh(hidden, (self.slots, elements)), _fresh(weight, weight.shape) if wants_weight else None

    def place(self, slots, gradient, i, j):
        """The memory [n, W] for the logits of chunk i and tile j.

        In the gradient [V, D], a tile has room for the logits of all tokens, and for no less than its own gradient.
        The last tile's room ends where its gradient begins, each other's where that of the next tile begins: then the
        backward writes every gradient where nothing is, or logits that have become a gradient already.
        """
        columns, start, number = self.tiles[j], i * self.tokens, j * len(self.chunks) + i
        width = columns.stop - columns.start
        shape = min(self.tokens, self.all_tokens - start), width
        if number < self.in_slots:
            memory, begin = slots[min(number, self.slots - 1)], 0
        else:
            depth, room = gradient.shape[1], max(self.all_tokens, gradient.shape[1])
            begin = gradient.numel() - self.tiles[0].stop * (depth + (len(self.tiles) - j) * room) + start * width
            memory = gradient.view(-1)
        return memory[begin : begin + shape[0] * width].view(shape)

    def is_lost(self, i, j):
        """Whether another part has overwritten this one."""
        return self.slots - 1 <= j * len(self.chunks) + i < self.in_slots - 1


def _fresh(like, shape):
    """Memory in huge pages: of many megabytes, page faults of 4 KiB would take half a product's time."""
    memory = like.new_empty(shape)
    ops.advise_huge_pages(memory)
    return memory


def _layout(lefts, rights, labels, ignore_index, chunk_tokens, budget, caps, keeps_logits, wants_weight, wants_up):
    """The layout of a call, within its budget.

    Finding the ignored tokens would wait for a CUDA device, and would make shapes depend on data, which torch.compile
    does not trace: there all tokens go in.
    """
    on_cpu, vocab, depth = labels.device.type == "cpu", len(rights[0]), sum(left.shape[1] for left in lefts)
    item, total = lefts[0].element_size(), accumulator_dtype(lefts[0].dtype).itemsize
    is_narrow, wants_rights, kept = item < total, wants_weight or wants_up, None
    widened = total * _is_widened(lefts[0])
    by_chunk = _goes_by_chunk(is_narrow, wants_rights)
    if on_cpu and not torch.compiler.is_compiling():
        kept = (labels != ignore_index).nonzero().squeeze(1)
        kept = None if len(kept) == len(labels) else kept
    count = len(labels if kept is None else kept)

    # Bytes beside the tile. A token's: four arrays [n, D + r] while a direction is summed up; else what a product is
    # added to the hidden gradient with (itself, its cast), that gradient so far where it is a chunk's or gathered, and
    # the hidden state where it is gathered.
    if not keeps_logits:
        token = 4 * total * depth
    elif kept is None:
        token = (item + total + total * by_chunk) * depth if is_narrow else 0
    else:
        token = 2 * (item + total) * depth
    size = chunk_tokens or max(1, min(CHUNK_TOKENS, budget // 2 // max(1, token)))
    n = max(1, min(size, count))
    if kept is None:
        chunks = [slice(start, start + size) for start in range(0, count, size)]
    else:
        chunks = kept.split(size) if count else ()
    room = budget - n * token
    if keeps_logits and is_narrow and not by_chunk:  # the sum of the hidden gradient
        room = max(room // 2, room - count * depth * total)
    # Bytes of a column: of a tile; of its capped logits, their slope and product, and of it in float32; of the sum of
    # the weight's gradient, and of the weight or its gradient in float32.
    column, wider = n * item, n * (3 * total * caps + widened)
    summed = depth * ((item + 2 * total) * (wants_rights and is_narrow and len(chunks) > 1) + widened)

    most = min(room, CPU_TILE if on_cpu else KEPT_TILE if keeps_logits else room)
    slots = -(-room // most) if keeps_logits and room > 0 else 1
    width = max(1, min(most // (column + wider), room // (slots * column + wider + summed)))
    # Tiles of nearly one size, and of whole cache lines: products whose rows end within one are a quarter slower.
    line = 16 if width >= 16 else 1
    width = -(-vocab // -(-vocab // (width - width % line)))
    width += -width % line
    tiles = [slice(start, min(start + width, vocab)) for start in range(0, vocab, width)]
    columns, weight_depth = tiles[0].stop, lefts[0].shape[1]
    lent = wants_weight * (vocab - columns) * weight_depth // (columns * max(count, weight_depth))
    in_slots = len(chunks) * (len(tiles) - lent)
    return _Layout(chunks, tiles, n, count, lent, max(1, min(slots, in_slots)))


def _multiply(out, lefts, rights, bias=None):
    """out = sum of left @ right.T + bias. Products with `out` are those that autocast leaves alone."""
    product = torch.empty_like(out, dtype=torch.float32) if _is_widened(out) else out
    (left, *more_lefts), (right, *more_rights) = ([widen(tensor) for tensor in side] for side in (lefts, rights))
    if bias is None:
        torch.mm(left, right.T, out=product)
    else:
        torch.addmm(widen(bias), left, right.T, out=product)
    for left, right in zip(more_lefts, more_rights, strict=True):
        product.addmm_(left, right.T)
    if product is not out:
        out.copy_(product)


def _bent(logits, softcap):
    """The capped logits over the cap, in the accumulator's dtype, where tanh costs no digits."""
    return torch.tanh(logits.to(accumulator_dtype(logits.dtype)) / softcap)


def _differentiate(logits, softcap, *arguments):
    """Overwrites a tile with the gradient in it; arguments: those of the operator."""
    if softcap is None:
        ops.token_stats_backward_tile(logits, *arguments)
        return
    bent = _bent(logits, softcap)
    capped = softcap * bent
    ops.token_stats_backward_tile(capped, *arguments)
    # The slope from `bent`: inductor would take one made from `capped` after the operator has overwritten that.
    logits.copy_(capped.mul_(bent.square_().neg_().add_(1)))


def _direction(summed, state, weight, labels, ignore_index, temperature):
    """W[y] - sum_v p_v W[v] over the temperature, the label's own terms as (1 - p_y) W[y]: no sum cancels where p_y is
    near 1. `summed` [n, D] is minus the sum over the other entries before the division by s."""
    _, log_sum, _, logps = state
    own = weight[labels.masked_fill(labels == ignore_index, 0)].to(summed.dtype)
    own *= (-torch.expm1(logps) / temperature)[:, None]
    summed *= torch.exp(-log_sum)[:, None]
    return (summed + own).masked_fill_((labels == ignore_index)[:, None], 0).to(weight.dtype)


def _add_product(total, left, right, rows=slice(None)):
    """total[rows] += left @ right; a product in a narrower dtype is rounded once and added in total's."""
    left, right, part = widen(left), widen(right), total[rows]
    if isinstance(rows, slice) and total.dtype == left.dtype:
        part.addmm_(left, right)
        return
    part += torch.mm(left, right, out=left.new_empty(part.shape))
    if not isinstance(rows, slice):  # then it is a copy
        total[rows] = part
