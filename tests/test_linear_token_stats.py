"""linear_token_stats: the numbers and gradients of token_stats on the logits of a head, without holding those."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mallowspo import functional as F
from mallowspo import linear, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
N, D, V = 13, 6, 41
KEPT = 11  # tokens of head_inputs that are not ignored
CHUNKS = pytest.mark.parametrize("chunk_tokens", [1, 5, N, 100, None])
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0},
    "softcap and temperature": {"softcap": 30, "temperature": 2},
}


def head_inputs(dtype, with_bias=True, rows=N, seed=0):
    """hidden, weight, bias that need gradients, labels of which two are ignored, gradients of both results."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = randn(rows, D), randn(V, D), randn(V) if with_bias else None
    leaves = [None if x is None else x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    labels = torch.randint(V, (rows,), generator=generator)
    labels[1::7] = -100
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    return (*leaves, labels, tuple(randn(2, rows).to(accumulator)))


def materialised(hidden, weight, labels, *, bias=None, softcap=None, **options):
    """The definition, in eager PyTorch on whole logits."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return reference.torch_token_stats(logits, labels, **options)


def with_gradients(function, hidden, weight, bias, labels, grads, **options):
    """[logps, entropy, gradients of hidden, weight and, where there is one, bias]."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    results = function(*leaves[:2], labels, bias=leaves[2] if bias is not None else None, **options)
    gradients = torch.autograd.grad(results, leaves, [g.to(results[0].dtype) for g in grads])
    return [*(x.detach() for x in results), *gradients]


def widened(*tensors):
    return [None if x is None else x.double() for x in tensors]


@CHUNKS
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_whole_logits_in_float64(chunk_tokens, options, with_bias):
    inputs = head_inputs(torch.float64, with_bias)
    ours = with_gradients(F.linear_token_stats, *inputs, chunk_tokens=chunk_tokens, **options)
    for actual, expected in zip(ours, with_gradients(materialised, *inputs, **options), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@CHUNKS
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_accurate_as_whole_logits(dtype, chunk_tokens, options):
    """Against the same in float64: an error of at most that of whole logits in this dtype, plus the roundings of the
    terms that a logit is the sum of (half precision multiplies in float32 and rounds once)."""
    inputs = head_inputs(dtype)
    ours = with_gradients(F.linear_token_stats, *inputs, chunk_tokens=chunk_tokens, **options)
    peers = with_gradients(materialised, *inputs, **options)
    exact = with_gradients(materialised, *widened(*inputs[:3]), *inputs[3:], **options)
    hidden, weight, bias = (x.detach().abs() for x in inputs[:3])
    terms = (hidden @ weight.T + bias).max().item() / options.get("temperature", 1)
    rounding = torch.finfo(dtype).eps / 2 * terms * (D + 1 if dtype == torch.float32 else 1)
    for i, (actual, peer, right) in enumerate(zip(ours, peers, exact, strict=True)):
        assert actual.dtype == peer.dtype
        unit = rounding if i < 2 else rounding * right.abs().max()
        assert (actual - right).abs().max() <= (peer - right).abs().max() + unit


def test_weight_gradients_add_up_in_float32():
    """One token a chunk and many tokens: sums kept in the weight's own dtype would stop growing."""
    rows = 512
    inputs = torch.ones(rows, 2).bfloat16(), torch.zeros(4, 2).bfloat16(), torch.zeros(4).bfloat16()
    grads = torch.ones(rows), torch.zeros(rows)
    *_, on_weight, on_bias = with_gradients(
        F.linear_token_stats, *inputs, torch.zeros(rows, dtype=torch.long), grads, chunk_tokens=1
    )
    expected = torch.tensor([3, -1, -1, -1], dtype=torch.bfloat16) * rows / 4
    assert torch.equal(on_weight, expected.unsqueeze(-1).expand(4, 2)) and torch.equal(on_bias, expected)


def test_one_chunk_of_float32_is_token_stats_to_the_bit():
    hidden, weight, bias, labels, _ = head_inputs(torch.float32)
    labels.clamp_(min=0)  # without the ignored tokens the product would be another one
    expected = F.token_stats(torch.nn.functional.linear(hidden, weight, bias), labels)
    for actual, right in zip(F.linear_token_stats(hidden, weight, labels, bias=bias), expected, strict=True):
        assert torch.equal(actual, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_no_tokens(dtype, with_bias):
    inputs = head_inputs(dtype, with_bias, rows=0)
    logps, entropy, *gradients = with_gradients(F.linear_token_stats, *inputs)
    assert logps.shape == entropy.shape == (0,)
    assert logps.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for gradient, leaf in zip(gradients, (x for x in inputs[:3] if x is not None), strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == dtype and not gradient.any()


def test_leading_dimensions_and_strides():
    hidden, weight, _, labels, grads = head_inputs(torch.float64, rows=12)
    expected = with_gradients(F.linear_token_stats, hidden, weight, None, labels, grads)

    def folded(hidden, weight, labels, bias):
        hidden = hidden.reshape(3, 4, D).transpose(0, 1)
        weight = weight.T.contiguous().T
        stats = F.linear_token_stats(hidden, weight, labels.reshape(3, 4).T, bias=bias, chunk_tokens=5)
        assert stats.logps.shape == stats.entropy.shape == (4, 3)
        return [x.T.reshape(12) for x in stats]

    for actual, right in zip(with_gradients(folded, hidden, weight, None, labels, grads), expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-13, atol=1e-13)


def test_one_token_without_leading_dimensions():
    hidden, weight, _, labels, _ = head_inputs(torch.float64)
    one, all_of_them = F.linear_token_stats(hidden[0], weight, labels[0]), F.linear_token_stats(hidden, weight, labels)
    assert one.logps.shape == () and one.entropy.item() == pytest.approx(all_of_them.entropy[0].item(), rel=1e-13)


def test_each_output_alone():
    hidden, weight, bias, labels, (on_logps, on_entropy) = head_inputs(torch.float64)
    stats = F.linear_token_stats(hidden, weight, labels, bias=bias, chunk_tokens=4)
    whole = materialised(hidden, weight, labels, bias=bias)
    for i, grad in enumerate((on_logps, on_entropy)):
        actual = torch.autograd.grad(stats[i], (hidden, weight, bias), grad, retain_graph=True)
        expected = torch.autograd.grad(whole[i], (hidden, weight, bias), grad, retain_graph=True)
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options):
    generator = torch.Generator().manual_seed(0)
    shapes = (5, 3), (7, 3), (7,)
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    labels = torch.tensor([0, 6, -100, 3, 3])

    def function(hidden, weight, bias):
        return F.linear_token_stats(hidden, weight, labels, bias=bias, chunk_tokens=2, **options)

    torch.autograd.gradcheck(function, leaves)


# --- what is computed and held ---------------------------------------------------------------------------------------


def budget_of(columns, rows=KEPT, item=4, depth=D):
    """Room for tiles of so many float32 columns beside the scratch."""
    return rows * (item * columns + 4 * depth * 4)


def products(run):
    """Matrix products of the kept tokens [KEPT, D] with [D, V], or of that size, that `run` makes."""
    in_place = {torch.ops.aten.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run()
    return counter.get_total_flops() / (2 * KEPT * D * V)


@pytest.mark.parametrize(
    ("trained", "budget", "forward", "backward"),
    [
        ([], None, 1, None),
        (["hidden"], None, 2, 0),
        (["hidden"], budget_of(7), 2, 0),
        (["hidden", "weight", "bias"], None, 1, 2),
        # Of six tiles two stay in the gradient's memory, 6 + 7 columns, and one, or three, of 7 in the budget.
        (["hidden", "weight", "bias"], budget_of(7), 1, 3 - 20 / V),
        (["hidden", "weight", "bias"], budget_of(3 * 7), 1, 3 - 34 / V),
        (["weight"], None, 1, 1),
        (["bias"], budget_of(7), 1, 1 - 6 / V),
    ],
)
def test_products_and_gradients(trained, budget, forward, backward, monkeypatch):
    """What is not asked for, and no ignored token, is multiplied: the counts that linear.py's docstring states."""
    monkeypatch.setattr(linear, "CPU_TILE", linear.CPU_TILE if budget is None else 4 * KEPT * 7)
    hidden, weight, bias, labels, (grad, _) = head_inputs(torch.float32)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in trained)
    options = {} if budget is None else {"memory_budget": budget, "chunk_tokens": KEPT}
    results = []
    run = lambda: results.append(F.linear_token_stats(hidden, weight, labels, bias=bias, **options))  # noqa: E731
    assert products(run) == forward
    if backward is not None:
        assert products(lambda: results[0].logps.backward(grad)) == pytest.approx(backward)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in trained)


@pytest.mark.parametrize(("budget", "backward"), [(None, 1), (budget_of(7, depth=D + D // 2), 2 - 6 / V)])
def test_a_low_rank_change_costs_no_product_for_the_frozen_weight(budget, backward):
    hidden, weight, _, labels, (grad, _) = head_inputs(torch.float32)
    down, up = torch.randn(N, D // 2, requires_grad=True), torch.randn(V, D // 2, requires_grad=True)
    options = {} if budget is None else {"memory_budget": budget, "chunk_tokens": KEPT}
    results = []
    run = lambda: results.append(  # noqa: E731
        F.linear_token_stats(hidden, weight.detach(), labels, low_rank=(down, up), **options)
    )
    assert products(run) == 1 + 1 / 2
    assert products(lambda: results[0].logps.backward(grad)) == pytest.approx(backward * (1 + 1 / 2) + 1 / 2)


@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_a_low_rank_change_by_the_head_itself(chunk_tokens):
    """One tensor as both right factors: its two gradients add up."""
    hidden, weight, _, labels, grads = head_inputs(torch.float64)
    down = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    stats = F.linear_token_stats(hidden, weight, labels, low_rank=(down, weight), chunk_tokens=chunk_tokens)
    expected = materialised(hidden + down, weight, labels)
    leaves = hidden, weight, down
    for actual, right in zip(*(torch.autograd.grad(x, leaves, grads) for x in (stats, expected)), strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-13, atol=1e-13)


def test_a_low_rank_change_of_rank_0_is_none():
    hidden, weight, bias, labels, grads = head_inputs(torch.float32)
    nothing = torch.zeros(N, 0, requires_grad=True), torch.zeros(V, 0, requires_grad=True)
    expected = with_gradients(F.linear_token_stats, hidden, weight, bias, labels, grads)
    actual = with_gradients(F.linear_token_stats, hidden, weight, bias, labels, grads, low_rank=nothing)
    assert all(torch.equal(one, two) for one, two in zip(actual, expected, strict=True))


def test_no_gradient_is_prepared_without_grad_mode():
    hidden, weight, _, labels, _ = head_inputs(torch.float32)
    weight.requires_grad_(False)
    with torch.no_grad():
        assert products(lambda: F.linear_token_stats(hidden, weight, labels)) == 1


@pytest.mark.parametrize("trained", [["hidden"], ["hidden", "weight"]])
def test_a_second_backward_gives_the_same(trained):
    hidden, weight, _, labels, grads = head_inputs(torch.float32)
    leaves = {"hidden": hidden, "weight": weight}
    stats = F.linear_token_stats(hidden, weight.requires_grad_("weight" in trained), labels)
    first, again = (
        torch.autograd.grad(stats, [leaves[name] for name in trained], grads, retain_graph=True) for _ in range(2)
    )
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class LargestRows(TorchDispatchMode):
    """The most bytes of any tensor of `rows` rows, other than [rows, D], that an operator makes or views."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.bytes = rows, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if torch.is_tensor(x) and x.dim() == 2 and x.shape[0] == self.rows and x.shape[1] != D:
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return result


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("columns", [3, 9])
def test_never_holds_more_logits_than_the_budget(softcap, columns):
    hidden, weight, _, labels, grads = head_inputs(torch.float32)
    # Capped logits, slope and product stand beside the product.
    options = {"memory_budget": budget_of(columns, item=16 if softcap else 4), "chunk_tokens": KEPT}
    with LargestRows(KEPT) as largest:
        stats = F.linear_token_stats(hidden, weight, labels, softcap=softcap, **options)
        torch.autograd.backward(stats, grads)
    assert largest.bytes == 4 * KEPT * columns


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made by operators held at any time."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if torch.is_tensor(x) and x.untyped_storage()._cdata not in given:
                storage = x.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {at: kept for at, kept in self.storages.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.storages.values()))
        return result


@pytest.mark.usefixtures("half_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_tokens", [64, None])
@pytest.mark.parametrize("ignores", [True, False])
@pytest.mark.parametrize("trained", ["hidden", "hidden weight", "hidden up"])
def test_works_within_the_budget(dtype, softcap, chunk_tokens, ignores, trained, monkeypatch):
    """All that is held, from the forward to the end of the backward, less the results and the gradients."""
    monkeypatch.setattr(linear, "CPU_TILE", 2**15)
    rows, depth, vocab = 384, 32, 1024  # a frozen head's budget does not hold [rows, depth] beside a tile
    budget = 2**16 if trained == "hidden" else 2**17
    shapes = {"hidden": rows, "weight": vocab, "down": rows, "up": vocab}
    tensors = {name: torch.randn(n, depth).to(dtype) for name, n in shapes.items()}
    labels = torch.zeros(rows, dtype=torch.long)
    labels[: 7 if ignores else 0] = -100
    leaves = [tensors[name].requires_grad_() for name in trained.split()]
    hidden, weight, *low_rank = tensors.values()
    options = {"softcap": softcap, "chunk_tokens": chunk_tokens, "memory_budget": budget}
    options |= {"low_rank": low_rank} if "up" in trained else {}
    with PeakBytes() as held:
        stats = F.linear_token_stats(hidden, weight, labels, **options)
        gradients = torch.autograd.grad(stats, leaves, [torch.ones(rows)] * 2)
    own = sum(x.nbytes for x in (*stats, *gradients))
    if trained == "hidden" and softcap is None:
        own += hidden.nbytes  # kept for a gradient of the log-probabilities alone
    numbers = 8 * 4 * rows  # eight a token
    assert budget / 4 <= held.peak - own <= budget + numbers


@pytest.mark.parametrize("trained", [["hidden"], ["hidden", "weight", "bias"]])
@pytest.mark.parametrize("chunk_tokens", [4, None])
def test_without_any_label_all_is_zero(trained, chunk_tokens):
    hidden, weight, bias, labels, grads = head_inputs(torch.bfloat16)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in trained)
    stats = F.linear_token_stats(hidden, weight, labels.fill_(-100), bias=bias, chunk_tokens=chunk_tokens)
    torch.autograd.backward(stats, grads)
    assert not stats.logps.any() and not stats.entropy.any()
    for name in trained:
        assert leaves[name].grad.dtype == torch.bfloat16 and not leaves[name].grad.any()


@pytest.mark.parametrize("chunk_tokens", [4, None])  # tiles computed again, tiles kept
def test_ignored_tokens_in_a_compiled_function(chunk_tokens):
    """There all tokens are multiplied, and the numbers are the same."""
    inputs = head_inputs(torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(F.linear_token_stats, fullgraph=True, backend="aot_eager")
    ours, expected = (with_gradients(f, *inputs, chunk_tokens=chunk_tokens) for f in (compiled, F.linear_token_stats))
    for actual, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-13, atol=1e-13)


# --- autocast --------------------------------------------------------------------------------------------------------


def test_autocast_casts_as_linear_does():
    hidden, weight, bias, labels, grads = head_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = with_gradients(F.linear_token_stats, hidden, weight, bias, labels, grads, chunk_tokens=4)
        assert torch.nn.functional.linear(hidden, weight).dtype == torch.bfloat16

    def cast_by_hand(hidden, weight, labels, bias):
        hidden, weight, bias = (x.bfloat16() for x in (hidden, weight, bias))
        return F.linear_token_stats(hidden, weight, labels, bias=bias, chunk_tokens=4)

    expected = with_gradients(cast_by_hand, hidden, weight, bias, labels, grads)
    for actual, right in zip(ours, expected, strict=True):
        assert actual.dtype == right.dtype == torch.float32 and torch.equal(actual, right)


def test_autocast_leaves_float64():
    hidden, weight, bias, labels, _ = head_inputs(torch.float64)
    expected = F.linear_token_stats(hidden, weight, labels, bias=bias)
    with torch.autocast("cpu", torch.bfloat16):
        stats = F.linear_token_stats(hidden, weight, labels, bias=bias)
    assert all(torch.equal(actual, right) for actual, right in zip(stats, expected, strict=True))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_backward_under_autocast_sees_the_logits_of_the_forward(softcap):
    hidden, weight, bias, labels, grads = head_inputs(torch.float32)
    leaves = hidden, weight, bias
    expected, actual = (
        F.linear_token_stats(hidden, weight, labels, bias=bias, softcap=softcap, chunk_tokens=4) for _ in range(2)
    )
    expected = torch.autograd.grad(expected, leaves, grads)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(actual, leaves, grads)
    assert all(torch.equal(one, two) for one, two in zip(actual, expected, strict=True))
