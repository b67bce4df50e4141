"""token_stats against the oracle of mallowspo.reference, judged by the error of eager PyTorch on the same input."""

import math
import os
import subprocess
import sys

import pytest
import strategies
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mallowspo import functional as F
from mallowspo import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = st.sampled_from(DTYPES)
# Around the vector widths (8, 16), the unrolled group (32, 64) and the block (512) of the kernels.
widths = st.sampled_from([1, 2, 7, 8, 15, 16, 17, 33, 63, 64, 65, 511, 512, 513, 1000, 1024, 2500])


def result_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_case(rows, vocab, dtype, seed=0, scale=2.0):
    """Logits [rows, vocab], labels [rows] and the gradients of both results [rows]."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale).to(dtype)
    labels = torch.randint(vocab, (rows,), generator=generator)
    grads = torch.randn(2, rows, generator=generator, dtype=torch.float64).to(result_dtype(dtype))
    return logits, labels, tuple(grads)


def with_gradient(function, logits, labels, grads, **options):
    """(logps, entropy, gradient of the logits); a gradient that is None leaves its result out."""
    logits = logits.detach().requires_grad_()
    results = function(logits, labels, **options)
    used = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    used, grads = zip(*used, strict=True)
    (gradient,) = torch.autograd.grad(used, logits, grads)
    return *(result.detach() for result in results), gradient


def truth(logits, labels, grads, ignore_index=-100, temperature=1.0):
    """What with_gradient should return, in float64, row by row in plain Python."""
    rows = []
    for i, (row, label) in enumerate(zip(logits.double().tolist(), labels.tolist(), strict=True)):
        if label == ignore_index:
            rows.append((0.0, 0.0, [0.0] * len(row)))
            continue
        g_logp, g_entropy = (0.0 if grad is None else grad[i].item() for grad in grads)
        stats = reference.token_stats(row, label, temperature)
        rows.append((*stats[:2], reference.token_stats_grad(row, label, g_logp, g_entropy, temperature)))
    return tuple(torch.tensor(part, dtype=torch.float64) for part in zip(*rows, strict=True))


def rounding_units(logits, labels, grads, exact, temperature):
    """What one rounding can cost each result: the size of the terms it is a sum of, times the accumulator's eps / 2.

    A temperature that is no power of two also rounds every scaled logit once. Gradients are rounded to the logits'
    dtype, and probabilities under the smallest normal number may count as 0. The oracle has an error too, felt in
    float64: eps / 2 of the log-sum moves every term of its entropy the same way.
    """
    accumulator, storage = torch.finfo(result_dtype(logits.dtype)), torch.finfo(logits.dtype)
    roundoff = accumulator.eps / 2
    scaled = logits.double() / temperature
    largest = scaled.abs().masked_fill(scaled.isinf(), 0).amax(-1) if math.frexp(temperature)[0] != 0.5 else 0.0
    logps, entropy, gradient = exact
    log_p = torch.log_softmax(scaled, -1).clamp(min=-800)
    oracle = torch.finfo(torch.float64).eps / 2 * (1 + entropy) * -log_p.amax(-1)
    depth = 1 - log_p + torch.as_tensor(largest).unsqueeze(-1)
    on_logp, on_entropy = (torch.zeros(len(logits), 1) if g is None else g.abs().unsqueeze(-1) for g in grads)
    terms = log_p.exp() * (on_logp + on_entropy * (1 - log_p + entropy.unsqueeze(-1)))
    floor = accumulator.tiny * (on_logp + on_entropy * 1000) + storage.tiny * storage.eps
    on_label = on_logp * torch.nn.functional.one_hot(labels.clamp(0, logits.shape[-1] - 1), logits.shape[-1])
    return (
        roundoff * (1 + logps.abs() + largest),
        roundoff * (1 + entropy + largest) + oracle,
        (roundoff * (terms + on_label) * depth + floor) / temperature + storage.eps / 2 * gradient.abs(),
    )


def assert_as_accurate_as_torch(logits, labels, grads, **options):
    """The error of each number is at most that of eager PyTorch plus four roundings."""
    ours = with_gradient(F.token_stats, logits, labels, grads, **options)
    torchs = with_gradient(reference.torch_token_stats, logits, labels, grads, **options)
    exact = truth(logits, labels, grads, **options)
    units = rounding_units(logits, labels, grads, exact, options.get("temperature", 1.0))
    assert ours[0].dtype == ours[1].dtype == result_dtype(logits.dtype) and ours[2].dtype == logits.dtype
    names = "logps", "entropy", "gradient"
    for name, our, peer, right, unit in zip(names, ours, torchs, exact, units, strict=True):
        assert our.shape == right.shape
        finite = right.isfinite()
        assert torch.equal(our[~finite].double(), right[~finite]), name  # a label on a masked logit: -inf
        error, allowed = (our - right).abs()[finite], ((peer - right).abs() + 4 * unit)[finite]
        excess = (error - allowed).nan_to_num(nan=math.inf)
        assert (excess <= 0).all(), (name, our[finite][excess.argmax()], right[finite][excess.argmax()])
    return ours


@settings(max_examples=150)
@given(
    data=st.data(),
    dtype=dtypes,
    vocab=widths,
    rows=st.integers(1, 3),
    temperature=st.sampled_from([1.0, 0.5, 0.7, 2.0]),
    ignore_index=st.sampled_from([-100, -1, 0]),
    outputs=st.sampled_from(["logps", "entropy", "both"]),
    seed=st.integers(0, 2**31 - 1),
)
def test_values_and_gradients(data, dtype, vocab, rows, temperature, ignore_index, outputs, seed):
    logits = data.draw(strategies.finite_logits(rows, vocab)).to(dtype)
    _, labels, (on_logps, on_entropy) = random_case(rows, vocab, dtype, seed)
    labels[torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < 0.2] = ignore_index
    grads = (None if outputs == "entropy" else on_logps, None if outputs == "logps" else on_entropy)
    options = {"ignore_index": ignore_index, "temperature": temperature}
    logps, entropy, _ = assert_as_accurate_as_torch(logits, labels, grads, **options)
    bound = math.log(vocab)
    assert (logps <= 0).all() and (entropy >= 0).all()  # both hold to the last bit: sums of terms of one sign
    assert (entropy <= bound + 4 * torch.finfo(entropy.dtype).eps * (1 + bound)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab, scale", [(50257, 3.0), (128_256, 0.0)])
def test_large_vocabularies(dtype, vocab, scale):
    logits, labels, grads = random_case(2, vocab, dtype, scale=scale)
    labels[1] = vocab - 1
    assert_as_accurate_as_torch(logits, labels, grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_large_offset_costs_no_digits(dtype, offset):
    logits, labels, grads = random_case(4, 1500, dtype, scale=1.0)
    assert_as_accurate_as_torch((logits + offset).to(dtype), labels, grads)


@settings(max_examples=40)
@given(dtype=dtypes, logit=st.floats(-3e4, 3e4), temperature=st.floats(0.1, 10), vocab=st.sampled_from([1, 20, 1100]))
@example(dtype=torch.float32, logit=1e4, temperature=0.7, vocab=1)
@example(dtype=torch.float32, logit=torch.finfo(torch.float32).min, temperature=1.0, vocab=20)
def test_equal_logits_are_uniform_at_any_temperature(dtype, logit, temperature, vocab):
    logps, entropy = F.token_stats(
        torch.full((1, vocab), logit, dtype=dtype), torch.tensor([vocab - 1]), temperature=temperature
    )
    exact, tolerance = math.log(vocab), 8 * torch.finfo(result_dtype(dtype)).eps * math.log(vocab)
    assert abs(logps.item() + exact) <= tolerance and abs(entropy.item() - exact) <= tolerance


@pytest.mark.parametrize("dtype, low, high", [(torch.float32, 17, 87), (torch.float64, 37, 708)])
def test_the_exponential_is_within_one_eps(dtype, low, high):
    """Beside a logit so much larger that log s is 0, the gradient of the other one is minus its exponential."""
    margin = torch.linspace(low, high, 20_001, dtype=torch.float64)[1:-1].to(dtype)
    logits, labels = torch.stack([torch.zeros_like(margin), -margin], 1), torch.zeros(len(margin), dtype=torch.long)
    logps, _, gradient = with_gradient(F.token_stats, logits, labels, (torch.ones_like(margin), None))
    exact = torch.tensor([math.exp(-x) for x in margin.tolist()], dtype=torch.float64)
    assert not logps.any()
    assert ((-gradient[:, 1] / exact - 1).abs() <= torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_half_precision_is_float32_rounded_once(dtype, temperature):
    logits, labels, grads = random_case(20, 1100, dtype, scale=4.0)
    narrow = with_gradient(F.token_stats, logits, labels, grads, temperature=temperature)
    wide = with_gradient(F.token_stats, logits.float(), labels, grads, temperature=temperature)
    for ours, other in zip(narrow[:2], wide[:2], strict=True):  # the order of the sums may differ
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)
    exact = wide[2].double()
    rounded_once = (wide[2].to(dtype).double() - exact).abs()
    assert ((narrow[2].double() - exact).abs() <= rounded_once + 4e-6 * exact.abs()).all()


def test_half_precision_rounds_ties_to_even_and_keeps_every_nan():
    """A logit with all the probability has minus the incoming gradient: a tie or a NaN of all bits, in any lane."""
    rows, certain = torch.arange(384), torch.tensor([6, 7, 550]).repeat_interleave(128)
    incoming = (0x3F808000 + (rows % 128 << 16)).masked_fill(rows % 128 == 0, 0x7FFFFFFF).int().view(torch.float32)
    logits = torch.where(torch.arange(600) == certain.unsqueeze(1), 0.0, -1e4).bfloat16()
    gradient = with_gradient(F.token_stats, logits, torch.full((384,), 599), (incoming, None))[2]
    torch.testing.assert_close(gradient[rows, certain], -incoming.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [0.5, 60.0, 700.0, 1500.0])
def test_large_steps_to_a_new_maximum(dtype, step):
    """Later parts of a row may lie above everything before them by any amount."""
    vocab = 20_000
    logits, labels, grads = random_case(2, vocab, dtype, scale=1.0)
    logits += (step * torch.linspace(0, 5, vocab).round()).to(dtype)
    assert_as_accurate_as_torch(logits, labels, grads)


@pytest.mark.parametrize("narrower", ["avx2", "default"])
def test_narrower_instruction_sets(narrower):
    """The accuracy tests of this file again, in a process that may use no more than this."""
    chosen = "values or large or equal or exponential or half or infinity or nan"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": narrower}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [40, 4096])
def test_same_bits_for_one_and_two_threads(dtype, vocab):
    logits, labels, grads = random_case(2000 if vocab == 40 else 65, vocab, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(with_gradient(F.token_stats, logits, labels, grads))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


# --- shapes and strides ----------------------------------------------------------------------------------------------

LEADING_VIEWS = {
    "expanded": ((1, 5, 37), lambda x: x.expand(4, 5, 37)),
    "transposed": ((5, 4, 37), lambda x: x.transpose(0, 1)),
    "all but the last token": ((4, 6, 37), lambda x: x[:, :-1]),
    "every other row": ((8, 5, 37), lambda x: x[::2]),
    "wider rows": ((4, 5, 40), lambda x: x[..., 2:39]),
}
VOCABULARY_VIEWS = {
    "vocabulary not last": ((4, 37, 5), lambda x: x.transpose(1, 2)),
    "every other logit": ((4, 5, 74), lambda x: x[..., ::2]),
    "expanded vocabulary": ((4, 5, 1), lambda x: x.expand(4, 5, 37)),
}
VIEWS = LEADING_VIEWS | VOCABULARY_VIEWS


def view_case(name):
    shape, view = VIEWS[name]
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(37, (5, 4), generator=generator).T  # not contiguous either
    grads = tuple(torch.randn(2, 5, 4, generator=generator).mT)
    return torch.randn(shape, generator=generator), view, labels, grads


@pytest.mark.parametrize("name", VIEWS)
def test_strides(name):
    base, view, labels, grads = view_case(name)
    strided = with_gradient(lambda x, y: F.token_stats(view(x), y), base, labels, grads)
    plain = with_gradient(lambda x, y: F.token_stats(view(x).contiguous(), y), base, labels, grads)
    assert strided[0].shape == (4, 5)
    assert all(torch.equal(one, two) for one, two in zip(strided, plain, strict=True))


@pytest.mark.parametrize("name", VIEWS)
def test_only_a_strided_vocabulary_is_copied(name):
    base, view, labels, grads = view_case(name)
    labels, grads = labels.contiguous(), tuple(x.contiguous() for x in grads)
    logits = view(base).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(F.token_stats(logits, labels), logits, grads)
    assert ("aten::clone" in {event.key for event in profile.key_averages()}) == (name in VOCABULARY_VIEWS)


def test_offsets_beyond_32_bits():
    """Two rows 2^31 elements apart, in 4 GiB of address space of which a few pages are touched."""
    values, labels, grads = random_case(2, 48, torch.bfloat16)
    far = torch.empty(2**31 + 48, dtype=torch.bfloat16).as_strided((2, 48), (2**31, 1)).copy_(values)
    near, expected = (with_gradient(F.token_stats, x, labels, grads) for x in (far, values))
    assert all(torch.equal(one, two) for one, two in zip(near, expected, strict=True))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 2, 1, 2, 1, 2, 1, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(shape, dtype):
    logits = torch.randn(*shape, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.full(shape, 3)
    grads = (torch.ones(shape, dtype=result_dtype(dtype)),) * 2
    logps, entropy, gradient = with_gradient(F.token_stats, logits, labels, grads)
    assert logps.shape == entropy.shape == shape and gradient.shape == logits.shape
    flat = with_gradient(F.token_stats, logits.reshape(-1, 5), labels.reshape(-1), tuple(g.reshape(-1) for g in grads))
    assert torch.equal(logps.reshape(-1), flat[0]) and torch.equal(gradient.reshape(-1, 5), flat[2])


# --- undefined and left-out rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 15, 16, 1023, 1024, 1099])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_undefined_logit_makes_its_own_row_nan(dtype, place, bad):
    logits, labels, grads = random_case(3, 1100, dtype)
    expected = with_gradient(F.token_stats, logits, labels, grads)
    logits[1, place] = bad
    for actual, right in zip(with_gradient(F.token_stats, logits, labels, grads), expected, strict=True):
        assert actual[1].isnan().all()
        assert torch.equal(actual[::2], right[::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 30, 1100])
def test_a_row_without_any_outcome_is_nan(dtype, vocab):
    logits, labels, grads = random_case(3, vocab, dtype)
    logits[1] = -math.inf
    for result in with_gradient(F.token_stats, logits, labels, grads):
        assert result[1].isnan().all() and not result[::2].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_number_masks_like_minus_infinity(dtype):
    logits, labels, grads = random_case(4, 1100, dtype)
    hidden = torch.zeros(4, 1100, dtype=torch.bool)
    hidden[:, :1050] = True  # the whole first block of the kernel
    hidden[3] = False
    labels.clamp_(min=1050)
    by_number, by_infinity = (
        with_gradient(F.token_stats, logits.masked_fill(hidden, value), labels, grads)
        for value in (torch.finfo(dtype).min, -math.inf)
    )
    assert all(torch.equal(one, two) for one, two in zip(by_number, by_infinity, strict=True))
    assert all(x.isfinite().all() for x in by_infinity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("digits", [1.0, 1.7, 3.1])
def test_any_large_negative_number_masks_like_minus_infinity(dtype, digits):
    """The exponential of every magnitude is 0, and no step on the way to it overflows unseen."""
    logits, labels, _ = random_case(3, 1500, dtype)
    hidden = torch.rand(3, 1500, generator=torch.Generator().manual_seed(0)) < 0.3
    hidden[:, -20:] = False
    labels.clamp_(min=1480)
    by_infinity = F.token_stats(logits.masked_fill(hidden, -math.inf), labels)
    for power in range(4, int(math.log10(torch.finfo(dtype).max))):
        by_number = F.token_stats(logits.masked_fill(hidden, -digits * 10.0**power), labels)
        for one, two in zip(by_number, by_infinity, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_are_zero_whatever_they_hold(dtype):
    logits, labels, grads = random_case(4, 70, dtype)
    logits[1], logits[2] = math.nan, -math.inf
    labels[1] = labels[2] = 7
    labels[0], labels[3] = 8, -100
    logps, entropy, gradient = with_gradient(
        F.token_stats, logits[:3], labels[:3], tuple(g[:3] for g in grads), ignore_index=7
    )
    assert not logps[1:].any() and not entropy[1:].any() and not gradient[1:].any()
    assert logps[0] < 0 and entropy[0] > 0 and gradient[0].any()
    with pytest.raises(IndexError, match="label -100 "):  # no longer the one to ignore
        F.token_stats(logits, labels, ignore_index=7)


def test_no_gradient_for_logits_that_need_none():
    logits, labels, _ = random_case(2, 5, torch.float32)
    assert not any(x.requires_grad for x in F.token_stats(logits, labels))


# --- the gradient over the logits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_inplace_backward_gives_the_same_gradient_in_the_logits_own_memory(dtype, temperature):
    logits, labels, grads = random_case(6, 1100, dtype)
    labels[2] = -100
    expected = with_gradient(F.token_stats, logits, labels, grads, temperature=temperature)[2]
    leaf = logits.clone().requires_grad_()
    own = leaf * 1
    results = F.token_stats(own[:, :900], labels.clamp(max=899), temperature=temperature, inplace_backward=True)
    right = with_gradient(F.token_stats, logits[:, :900], labels.clamp(max=899), grads, temperature=temperature)[2]
    torch.autograd.backward(results, grads)
    assert torch.equal(leaf.grad[:, :900], right) and not leaf.grad[:, 900:].any()
    assert torch.equal(own.detach()[:, :900], right) and torch.equal(own.detach()[:, 900:], logits[:, 900:])
    whole = with_gradient(F.token_stats, logits, labels, grads, temperature=temperature, inplace_backward=True)[2]
    assert torch.equal(whole, expected) and torch.equal(whole, logits)


def test_logits_read_after_an_inplace_backward_are_refused():
    leaf, labels, _ = random_case(3, 40, torch.float32)
    logits = leaf.requires_grad_() * 1
    other = logits.square().sum()
    loss = F.token_stats(logits, labels, inplace_backward=True).logps.sum()
    loss.backward(retain_graph=True)
    for late in (loss, other):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward()


SHARED = {
    "transposed": lambda x: x.T,
    "expanded": lambda x: x[:1].expand(40, 40),
    "overlapping": lambda x: x.flatten()[:79].unfold(0, 40, 1),
}


@pytest.mark.parametrize("view", SHARED.values(), ids=SHARED)
def test_inplace_backward_needs_memory_of_its_own(view):
    with pytest.raises(ValueError, match="inplace_backward needs logits with a contiguous last dimension"):
        F.token_stats(view(torch.zeros(40, 40)), torch.zeros(40, dtype=torch.int64), inplace_backward=True)
