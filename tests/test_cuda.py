"""The CUDA kernels against those of the CPU, which the other files test."""

import math
import subprocess
import sys

import pytest
import torch

from mallowspo import _C, reference
from mallowspo import functional as F

DEVICE = "cuda"
if not F.HAS_CUDA_KERNELS:
    why_not = f"mallowspo was built without CUDA kernels ({_C.build['cuda']})"
else:
    why_not = None if torch.cuda.is_available() else "torch finds no CUDA device"
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(why_not is not None, reason=why_not or "")]

dtypes = pytest.mark.parametrize("dtype", F.DTYPES)
VIEWS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "all but the last token": lambda x: x[:, :-1],
    "expanded": lambda x: x[:1].expand(7, *x.shape[1:]),
    "strided vocabulary": lambda x: x[..., ::2],
    "no rows": lambda x: x[:0],
}


def result_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_both_devices(function, *tensors):
    """Results and gradients of function, for a seeded incoming gradient, once on the CPU and once on the GPU."""
    runs = []
    for device in ("cpu", DEVICE):
        inputs = [x.to(device).detach().requires_grad_(x.is_floating_point()) for x in tensors]
        results = [x for x in function(*inputs) if x.requires_grad]
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(x.shape, generator=generator, dtype=x.dtype).to(device) for x in results]
        leaves = [x for x in inputs if x.requires_grad]
        assert all(x.device.type == device for x in results)
        runs.append([x.detach().cpu() for x in (*results, *torch.autograd.grad(results, leaves, grads))])
    return runs


def assert_same(runs, roundings=8):
    for on_cpu, on_gpu in zip(*runs, strict=True):
        eps = torch.finfo(on_cpu.dtype).eps
        size = on_cpu[on_cpu.isfinite()].abs().max().item() if on_cpu.isfinite().any() else 0.0
        torch.testing.assert_close(
            on_gpu, on_cpu, rtol=roundings * eps, atol=roundings * eps * min(size, 1), equal_nan=True
        )


def logits_and_labels(dtype, rows=(5, 6), vocab=300):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*rows, vocab, generator=generator, dtype=torch.float64) * 3
    logits[torch.rand(logits.shape, generator=generator) < 0.1] = -math.inf
    logits[..., 0] = 0.0
    return logits.to(dtype), torch.zeros(rows, dtype=torch.long)


@dtypes
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_token_stats(dtype, temperature, view):
    logits, _ = logits_and_labels(dtype)
    shape = view(logits).shape
    labels = torch.randint(shape[-1], shape[:-1], generator=torch.Generator().manual_seed(0))
    labels[..., 1::3] = -100
    assert_same(on_both_devices(lambda x, y: F.token_stats(view(x), y, temperature=temperature), logits, labels))


@dtypes
@pytest.mark.parametrize("vocab", [1, 31, 256, 257, 50257])
def test_token_stats_widths(dtype, vocab):
    assert_same(on_both_devices(F.token_stats, *logits_and_labels(dtype, (3,), vocab)))


@dtypes
def test_undefined_rows(dtype):
    logits, labels = logits_and_labels(dtype, (5,))
    logits[0, 200], logits[1, 7], logits[2] = math.nan, math.inf, -math.inf
    runs = on_both_devices(F.token_stats, logits, labels)
    assert all(x[:3].isnan().all() and not x[3:].isnan().any() for x in runs[1])
    assert_same([[x[3:] for x in run] for run in runs])


@dtypes
def test_more_rows_than_blocks(dtype):
    assert_same(on_both_devices(F.token_stats, *logits_and_labels(dtype, (70_000,), 5)))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("columns", [7, 50])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_linear_token_stats(softcap, columns, frozen_head):
    generator = torch.Generator().manual_seed(0)
    shapes = (11, 8), (50, 8), (50,)
    hidden, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    labels = torch.randint(50, (11,), generator=generator)

    def function(hidden, labels, weight=weight, bias=bias):
        cut = {"chunk_tokens": 4, "memory_budget": 4 * 8 * columns}
        weight, bias = weight.to(hidden.device), bias.to(hidden.device)
        stats = F.linear_token_stats(hidden, weight, labels, bias=bias, softcap=softcap, **cut)
        return stats[:1] if frozen_head else stats

    head = () if frozen_head else (weight, bias)
    assert_same(on_both_devices(function, hidden, labels, *head), roundings=100)


@dtypes
@pytest.mark.parametrize("link", reference.LINKS)
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_preference_loss(dtype, link, count):
    generator = torch.Generator().manual_seed(0)
    logps = [(-20 * torch.rand(count, generator=generator)).to(dtype) for _ in range(4)]
    dispersion = [torch.rand(count, generator=generator).to(dtype)] if link in reference.DISPERSION_LINKS else []

    def function(*tensors):
        a = tensors[4] if dispersion else None
        return F.preference_loss(*tensors[:4], neg_log_dispersion=a, link=link, label_smoothing=0.1)

    assert_same(on_both_devices(function, *logps, *dispersion))


@dtypes
@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_mallows_log_prob(dtype, smoothing):
    margin = torch.linspace(-50, 50, 401, dtype=torch.float64).to(dtype)
    dispersion = torch.tensor([0.0, 1e-6, 0.1, 1.9, 2.0, 30.0, 1e3], dtype=torch.float64).to(dtype)

    def function(z, a):
        return (F.mallows_log_prob(z, a, smoothing=smoothing),)

    # Every margin with every dispersion, spelled out: no gradient is a sum.
    every_pair = margin.repeat(7), dispersion.repeat_interleave(401)
    assert_same(on_both_devices(function, *every_pair), roundings=30)


def test_a_bad_dispersion_makes_its_own_pair_nan():
    dispersion = torch.tensor([0.5, -0.5, math.nan, math.inf, 0.0], device=DEVICE)
    logps = torch.zeros(5, device=DEVICE)
    for result in (
        F.mallows_log_prob(logps, dispersion),
        F.preference_loss(logps, logps, neg_log_dispersion=dispersion).losses,
    ):
        assert result.isnan().tolist() == [False, True, True, True, False]


@dtypes
def test_same_bits_every_time(dtype):
    logits, labels = (x.to(DEVICE) for x in logits_and_labels(dtype))
    first, second = (F.token_stats(logits, labels) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_runs_on_the_current_stream():
    """On a side stream that is still busy producing the logits, the kernel has to wait for them."""
    logits, labels = (x.to(DEVICE) for x in logits_and_labels(torch.float32))
    expected, late = F.token_stats(logits, labels), torch.zeros_like(logits)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(logits)
        stats = F.token_stats(late, labels)
    stream.synchronize()
    assert all(torch.equal(one, two) for one, two in zip(stats, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_its_tensors():
    logits, labels = (x.to("cuda:1") for x in logits_and_labels(torch.float32))
    with torch.cuda.device(0):
        stats = F.token_stats(logits.requires_grad_(), labels)
        stats.logps.sum().backward()
    assert stats.logps.device == logits.grad.device == logits.device
    torch.testing.assert_close(stats.logps.cpu(), F.token_stats(logits.cpu(), labels.cpu()).logps)


def test_two_devices_are_refused():
    logits, labels = logits_and_labels(torch.float32)
    with pytest.raises(ValueError, match="move to one device: logits is on cuda:0, labels is on cpu"):
        F.token_stats(logits.to(DEVICE), labels)


def test_opcheck():
    logits, labels = (x.to(DEVICE) for x in logits_and_labels(torch.bfloat16))
    torch.library.opcheck(torch.ops.mallowspo.token_stats, (logits, labels, -100, 1.0))


def test_a_label_outside_the_vocabulary_stops_the_process():
    code = (
        "import torch; from mallowspo import functional as F; "
        "F.token_stats(torch.zeros(1, 5, device='cuda'), torch.tensor([9], device='cuda')); torch.cuda.synchronize()"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert process.returncode != 0
    assert "label 9 is outside the vocabulary of 5 entries" in process.stdout + process.stderr
