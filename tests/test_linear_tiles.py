"""linear_token_stats over tiles, chunks and a frozen head: every way to the numbers ends at the same numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mallowspo import functional as F
from mallowspo import linear, reference

N, D, V = 9, 4, 23
ops = torch.ops.mallowspo
OPTIONS = ({}, {"temperature": 0.7}, {"softcap": 3.0})
TRAINED = (["hidden"], ["hidden", "bias"], ["weight"], ["hidden", "weight", "bias"])
OUTPUTS = {"logps": (0,), "entropy": (1,), "both": (0, 1)}


def head(dtype=torch.float64, scale=1.0):
    """{hidden, weight, bias}, labels of which two are ignored, gradients of both results."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (N, D), "weight": (V, D), "bias": (V,)}
    tensors = {
        name: (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for name, shape in shapes.items()
    }
    labels = torch.randint(V, (N,), generator=generator)
    labels[2::5] = -100
    return tensors, labels, torch.randn(2, N, generator=generator, dtype=torch.float64)


def whole(hidden, weight, labels, *, bias=None, softcap=None, **options):
    """The definition, in eager PyTorch on whole logits."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return reference.torch_token_stats(logits, labels, **options)


def run(function, tensors, labels, grads, trained, outputs=(0, 1), **options):
    """[logps, entropy, gradients of what is trained]."""
    leaves = {name: x.detach().requires_grad_(name in trained) for name, x in tensors.items()}
    stats = function(leaves["hidden"], leaves["weight"], labels, bias=leaves.get("bias"), **options)
    used = [stats[i] for i in outputs]
    gradients = torch.autograd.grad(
        used, [leaves[name] for name in trained], [grads[i].to(x.dtype) for i, x in zip(outputs, used, strict=True)]
    )
    return [*(x.detach() for x in stats), *gradients]


def tiles(columns, chunk_tokens, dtype=torch.float64, softcap=None):
    """The options that make tiles of so many columns, or a few less where that makes them all alike."""
    total = 8 if dtype == torch.float64 else 4
    item = dtype.itemsize + (3 * total if softcap else 0)
    return {"memory_budget": chunk_tokens * (columns * item + 4 * D * total), "chunk_tokens": chunk_tokens}


@pytest.mark.parametrize("trained", TRAINED, ids="+".join)
@pytest.mark.parametrize("columns", [1, 7, V])
@pytest.mark.parametrize("chunk_tokens", [1, 4, N])
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_every_way_in_float64(trained, columns, chunk_tokens, outputs):
    for options in OPTIONS:
        cut = tiles(columns, chunk_tokens, softcap=options.get("softcap"))
        arguments = *head(), trained, OUTPUTS[outputs]
        actual, expected = run(F.linear_token_stats, *arguments, **options, **cut), run(whole, *arguments, **options)
        for one, two in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)


LOW_RANK = (["down"], ["up"], ["hidden", "down"], ["hidden", "down", "up"], ["hidden", "weight", "down", "up", "bias"])


@pytest.mark.parametrize("trained", LOW_RANK, ids="+".join)
@pytest.mark.parametrize("columns", [7, V])
@pytest.mark.parametrize("chunk_tokens", [4, N])
def test_a_low_rank_change_in_float64(trained, columns, chunk_tokens):
    """It is a wider hidden and a wider weight."""
    tensors, labels, grads = head()
    generator = torch.Generator().manual_seed(1)
    for name, rows in (("down", N), ("up", V)):
        tensors[name] = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    for options in OPTIONS:
        results = []
        for whole_logits in (False, True):
            leaves = {name: x.clone().requires_grad_(name in trained) for name, x in tensors.items()}
            hidden, weight, bias, down, up = leaves.values()
            if whole_logits:
                stats = whole(torch.cat([hidden, down], 1), torch.cat([weight, up], 1), labels, bias=bias, **options)
            else:
                cut = tiles(columns, chunk_tokens, softcap=options.get("softcap"))
                stats = F.linear_token_stats(hidden, weight, labels, bias=bias, low_rank=(down, up), **options, **cut)
            torch.autograd.backward(tuple(stats), list(grads))
            results.append([*stats, *(leaves[name].grad for name in trained)])
            assert all(leaf.grad is None for name, leaf in leaves.items() if name not in trained)
        for one, two in zip(*results, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)


@pytest.fixture
def layouts(monkeypatch):
    """The layouts of the calls so far: {(chunks, parts not in the gradient's memory, slots for those), ...}."""
    seen, layout = set(), linear._layout

    def recorded(*args):
        made = layout(*args)
        seen.add((len(made.chunks), made.in_slots, made.slots))
        return made

    monkeypatch.setattr(linear, "_layout", recorded)
    return seen


@pytest.mark.parametrize("trained", [["weight"], ["hidden", "weight", "bias"]], ids="+".join)
@pytest.mark.parametrize("chunk_tokens", [3, N])
@pytest.mark.parametrize("ignores", [True, False])
def test_any_number_of_tiles_may_stay_in_memory(trained, chunk_tokens, ignores, layouts, monkeypatch):
    tensors, labels, grads = head()
    labels = labels if ignores else labels.clamp(min=0)
    monkeypatch.setattr(linear, "CPU_TILE", 5 * 8 * min(chunk_tokens, int((labels >= 0).sum())))
    for options in OPTIONS:
        expected = run(whole, tensors, labels, grads, trained, **options)
        for budget in (600, 1200, 1600, 2000, 2400, 10**6):
            cut = {"memory_budget": budget, "chunk_tokens": chunk_tokens}
            actual = run(F.linear_token_stats, tensors, labels, grads, trained, **options, **cut)
            for one, two in zip(actual, expected, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)
    some = {slots for _, parts, slots in layouts if 1 < slots < parts}
    assert len(some) > 1 and any(slots == parts for _, parts, slots in layouts)
    assert {chunks > 1 for chunks, _, _ in layouts} == {chunk_tokens < N}


@pytest.mark.usefixtures("half_products")
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_tiles_in_memory_are_the_ones_computed_again(softcap, layouts, monkeypatch):
    """To the bit: a second backward computes all of them, the first those that did not stay."""
    for dtype, budget in ((torch.float32, 800), (torch.bfloat16, 500)):
        tensors, labels, grads = head(dtype)
        leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight")]
        monkeypatch.setattr(linear, "CPU_TILE", 5 * 4 * dtype.itemsize)
        cut = {"chunk_tokens": 4, "memory_budget": budget + 500 * bool(softcap)}
        stats = F.linear_token_stats(*leaves, labels, softcap=softcap, **cut)
        grads = [grad.float() for grad in grads]
        first, again = (torch.autograd.grad(stats, leaves, grads, retain_graph=True) for _ in range(2))
        assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert all(1 < slots < parts for _, parts, slots in layouts), layouts


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 60)),
    chunk_tokens=st.sampled_from([1, 4, 7, None]),
    tile=st.integers(1, 12),
    budget=st.integers(1, 6000),
    narrow=st.booleans(),
)
def test_no_gradient_is_written_over_logits_that_are_still_needed(sizes, chunk_tokens, tile, budget, narrow):
    """With more tokens than numbers in a hidden state the gradient holds some of the tiles, with fewer all but one."""
    tokens, depth, vocab = sizes
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, depth, generator=generator).double() for n in (tokens, vocab))
    labels = torch.randint(vocab, (tokens,), generator=generator)
    grads = torch.randn(2, tokens, generator=generator).double()
    dtype = torch.bfloat16 if narrow else torch.float64
    tensors = {"hidden": hidden.to(dtype), "weight": weight.to(dtype)}
    cut = {"chunk_tokens": chunk_tokens, "memory_budget": budget}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "CPU_TILE", tile * dtype.itemsize * min(chunk_tokens or tokens, tokens))
        actual = run(F.linear_token_stats, tensors, labels, grads, ["hidden", "weight"], **cut)
    wide = {name: x.double() for name, x in tensors.items()}
    expected = run(whole, wide, labels, grads, ["hidden", "weight"])
    # A logit is rounded to half precision, and a gradient's terms; of float64 the roundings of all sums are allowed.
    rounding = torch.finfo(dtype).eps * (1 if narrow else 64) * (wide["hidden"].abs() @ wide["weight"].abs().T).max()
    for one, two in zip(actual, expected, strict=True):
        assert (one - two).abs().max() <= 2 * rounding * two.abs().max().clamp(min=1)


@pytest.mark.parametrize(("tokens", "lost"), [(512, 0), (4096, 0), (16384, 0.8)])
def test_the_head_of_an_8b_model_on_an_accelerator(tokens, lost):
    """Within the budget there, with nothing computed again up to as many tokens as a hidden state has numbers."""
    hidden, weight = (torch.empty(n, 4096, dtype=torch.bfloat16, device="meta") for n in (tokens, 128256))
    labels, budget = torch.empty(tokens, dtype=torch.long, device="meta"), F.MEMORY_BUDGET["cuda"]
    layout = linear._layout([hidden], [weight], labels, -100, None, budget, False, True, True, False)
    slots, gradient = layout.memory(hidden, weight, True)
    assert slots.nbytes <= budget and gradient.shape == weight.shape
    parts = [(i, j) for i in range(len(layout.chunks)) for j in range(len(layout.tiles))]
    assert sum(layout.is_lost(*part) for part in parts) <= lost * len(parts)
    assert sum(layout.place(slots, gradient, *part).numel() for part in parts) == tokens * len(weight)


@pytest.mark.usefixtures("half_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [["hidden"], ["hidden", "weight", "bias"]], ids="+".join)
@pytest.mark.parametrize("columns", [5, V])
def test_every_way_is_as_accurate_as_whole_logits(dtype, trained, columns):
    """Against the same in float64: an error of at most that of whole logits in this dtype, plus the roundings of the
    terms that a logit, and a gradient, is the sum of (half precision multiplies in float32 and rounds once a tile)."""
    tensors, labels, grads = head(dtype)
    wide = {name: x.double() for name, x in tensors.items()}
    terms = (wide["hidden"].abs() @ wide["weight"].abs().T + wide["bias"].abs()).max()
    roundings = D + 1 if dtype == torch.float32 else math.ceil(V / columns)
    for outputs in OUTPUTS.values():
        ours = run(F.linear_token_stats, tensors, labels, grads, trained, outputs, **tiles(columns, N, dtype))
        peers = run(whole, tensors, labels, grads, trained, outputs)
        exact = run(whole, wide, labels, grads, trained, outputs)
        for i, (actual, peer, right) in enumerate(zip(ours, peers, exact, strict=True)):
            unit = roundings * torch.finfo(dtype).eps / 2 * terms * (1 if i < 2 else right.abs().max())
            assert actual.dtype == peer.dtype
            assert (actual - right).abs().max() <= (peer - right).abs().max() + unit


@pytest.mark.parametrize("ignore_index", [-100, 3, V, 10**6])
@pytest.mark.parametrize("trained", TRAINED, ids="+".join)
def test_any_label_can_be_the_ignored_one(ignore_index, trained):
    tensors, labels, grads = head()
    labels[labels == 3] = 4
    labels[2::5] = ignore_index
    for columns in (7, V):
        actual = run(
            F.linear_token_stats, tensors, labels, grads, trained, ignore_index=ignore_index, **tiles(columns, N)
        )
        expected = run(whole, tensors, labels, grads, trained, ignore_index=ignore_index)
        assert not actual[0][2::5].any() and not actual[1][2::5].any()
        for one, two in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("trained", [["hidden"], ["hidden", "weight"]], ids="+".join)
@pytest.mark.parametrize("masked", [slice(0, 8), slice(8, 16), slice(16, V)], ids=["first", "middle", "last"])
def test_masked_entries_of_the_vocabulary(trained, masked):
    """A bias of -inf, as for padding rows of a head, over the whole of the first, a middle or the last tile."""
    tensors, labels, grads = head()
    tensors["bias"][masked] = -math.inf
    labels[0] = masked.start  # a label on a masked entry: -inf
    for outputs in OUTPUTS.values():
        actual = run(F.linear_token_stats, tensors, labels, grads, trained, outputs, **tiles(8, N))
        expected = run(whole, tensors, labels, grads, trained, outputs)
        assert actual[0][0] == -math.inf and actual[1].isfinite().all()
        for one, two in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("trained", [["hidden"], ["hidden", "weight"]], ids="+".join)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("columns", [7, V])
def test_an_undefined_token_is_nan_alone(trained, bad, columns):
    tensors, labels, grads = head()
    clean = run(F.linear_token_stats, tensors, labels, grads, ["hidden"], **tiles(columns, N))
    tensors["hidden"][1, 0] = bad
    actual = run(F.linear_token_stats, tensors, labels, grads, trained, **tiles(columns, N))
    others = torch.arange(N) != 1
    for one, right in zip(actual[:3], clean, strict=True):
        assert one[1].isnan().all()
        torch.testing.assert_close(one[others], right[others], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", [1, -1])
def test_a_maximum_that_leaps_from_tile_to_tile(dtype, order):
    """Each tile's logits are 200 above, or below, the last one's: one of the two is scaled away to 0, not to NaN."""
    tensors, labels, grads = head(dtype, scale=0.1)
    leaps = torch.arange(V) // 5
    tensors["bias"] = tensors["bias"] + 200 * (leaps if order > 0 else leaps.flip(0))
    actual = run(F.linear_token_stats, tensors, labels, grads, ["hidden"], (0,), **tiles(5, N, dtype))
    wide = {name: x.double() for name, x in tensors.items()}
    expected = run(whole, wide, labels, grads, ["hidden"], (0,))
    tolerance = 1000 * torch.finfo(dtype).eps  # of a logit near 1000
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("trained", "softcap"), [(["hidden"], None), (["hidden"], 3.0), (["hidden", "weight"], None)], ids=str
)
def test_hidden_gradients_add_up_in_float32(trained, softcap):
    """One column a tile and many tiles: sums kept in the hidden state's own dtype would stop growing."""
    weight = torch.zeros(1024, 1).bfloat16()
    weight[512:] = 1
    tensors = {"hidden": torch.zeros(1, 1).bfloat16(), "weight": weight}
    labels, grads = torch.zeros(1, dtype=torch.long), torch.ones(2, 1)
    options = {"softcap": softcap, "memory_budget": 1}
    _, _, on_hidden, *_ = run(F.linear_token_stats, tensors, labels, grads, trained, (0,), **options)
    assert on_hidden.item() == -0.5


def test_a_bias_gradient_adds_up_in_float32():
    """A chunk's sum has more digits than half precision, in which three of them would make 192."""
    tensors = {"hidden": torch.zeros(771, 1), "weight": torch.zeros(4, 1), "bias": torch.zeros(4)}
    tensors = {name: x.bfloat16() for name, x in tensors.items()}
    labels, grads = torch.zeros(771, dtype=torch.long), torch.ones(2, 771)
    *_, on_bias = run(F.linear_token_stats, tensors, labels, grads, ["bias"], (0,), chunk_tokens=257)
    assert on_bias.tolist() == [580, -193, -193, -193]


def test_a_gradient_that_half_precision_does_not_hold():
    """A loss scale makes one; its product with what a frozen head has kept is in float32."""
    tensors = {"hidden": torch.zeros(1, 1).half(), "weight": torch.tensor([[2.0**-10], [0.0]]).half()}
    labels, grads = torch.zeros(1, dtype=torch.long), torch.full((2, 1), 2.0**17)
    *_, on_hidden = run(F.linear_token_stats, tensors, labels, grads, ["hidden"], (0,))
    assert on_hidden.item() == 64


@pytest.mark.parametrize("trained", [["hidden"], ["hidden", "weight"]], ids="+".join)
def test_results_may_be_changed_in_place(trained):
    """They share no memory with what the backward reads."""
    tensors, labels, grads = head()

    def scaled(*args, **options):
        stats = F.linear_token_stats(*args, **options)
        return stats._replace(logps=stats.logps.mul_(2), entropy=stats.entropy.mul_(3))

    twice, once = (run(f, tensors, labels, grads, trained) for f in (scaled, F.linear_token_stats))
    scaled_grads = run(F.linear_token_stats, tensors, labels, grads * torch.tensor([[2.0], [3.0]]), trained)
    for one, two in zip(twice, [2 * once[0], 3 * once[1], *scaled_grads[2:]], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)


def test_a_cap_costs_no_digits():
    """Logits that half precision holds exactly are capped in float32."""
    tensors, labels, _ = head(torch.bfloat16)
    hidden, weight = torch.ones(N, 1).bfloat16(), tensors["weight"][:, :1]
    actual = F.linear_token_stats(hidden, weight, labels, softcap=3.0)
    for one, two in zip(actual, whole(hidden.double(), weight.double(), labels, softcap=3.0), strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("columns", [7, V])
def test_a_frozen_head_that_multiplies_ignored_tokens(columns, monkeypatch):
    """As on an accelerator and in a compiled function, which do not look for them: they have no gradient."""
    arguments, cut = (*head(), ["hidden"], (0,)), tiles(columns, 4)
    expected = run(F.linear_token_stats, *arguments, **cut)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for one, two in zip(run(F.linear_token_stats, *arguments, **cut), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_no_gradient_at_all_is_none():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    for head in (weight, weight.clone().requires_grad_()):
        other = torch.zeros(3, requires_grad=True)
        stats = F.linear_token_stats(hidden, head, torch.tensor([0, 1, 2]))
        (Nothing.apply(stats.logps) + other).sum().backward()
        assert hidden.grad is None and head.grad is None
