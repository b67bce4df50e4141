"""The CUDA kernels against those of the CPU, which the other files test."""

import math
import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator

from mallowspo import _C, reference
from mallowspo import functional as F
from mallowspo.metrics import Means
from mallowspo.token_weights import response_sums

DEVICE = os.environ.get("MALLOWSPO_CUDA_TESTS_ON", "cuda")  # "cpu" is for test_build.py's rehearsal
if DEVICE != "cuda":
    why_not = None
elif not F.HAS_CUDA_KERNELS:
    why_not = f"mallowspo was built without CUDA kernels ({_C.build['cuda']})"
else:
    why_not = None if torch.cuda.is_available() else "torch finds no CUDA device"
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(why_not is not None, reason=why_not or "")]

of_the_device = pytest.mark.skipif(DEVICE != "cuda", reason="of CUDA, not of the numbers")
dtypes = pytest.mark.parametrize("dtype", F.DTYPES)
VIEWS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "all but the last token": lambda x: x[:, :-1],
    "expanded": lambda x: x[:1].expand(7, *x.shape[1:]),
    "unaligned rows": lambda x: x[..., 1:],
    "odd and unaligned rows": lambda x: x[..., 3:-2],
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


# Rows that are one block's, and rows cut into parts that a second kernel merges.
SHAPES = {"whole rows": ((2100,), 301), "rows in parts": ((3,), 20_001)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def on_gpu(dtype, shape):
    """Logits, labels of which every third is ignored, and a gradient for both results."""
    logits, _ = logits_and_labels(dtype, *shape)
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(shape[-1], shape[0], generator=generator)
    labels[1::3] = -100
    grads = torch.randn(2, *labels.shape, generator=generator, dtype=result_dtype(dtype))
    return logits.to(DEVICE), labels.to(DEVICE), grads.to(DEVICE)


def stats_and_gradient(logits, labels, grads):
    logits = logits.detach().requires_grad_()
    stats = F.token_stats(logits, labels)
    return *(x.detach() for x in stats), *torch.autograd.grad(stats, logits, tuple(grads))


def assert_same_bits(first, second):
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@dtypes
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_token_stats(dtype, temperature, view):
    logits, _ = logits_and_labels(dtype)
    shape = view(logits).shape
    labels = torch.randint(shape[-1], shape[:-1], generator=torch.Generator().manual_seed(0))
    labels[..., 1::3] = -100
    assert_same(on_both_devices(lambda x, y: F.token_stats(view(x), y, temperature=temperature), logits, labels))


WIDTHS = [1, 7, 8, 9, 31, 256, 257, 2048, 8192, 8193, 50_257, 151_936]


@dtypes
@pytest.mark.parametrize(
    "rows, vocab", [(1, v) for v in WIDTHS] + [(3, v) for v in WIDTHS] + [(300, v) for v in WIDTHS[:-1]]
)
def test_token_stats_widths(dtype, rows, vocab):
    """The label is everywhere: in the loose elements of a row, in its vectors, in each of its parts."""
    logits, _ = logits_and_labels(dtype, (rows,), vocab)
    labels = torch.arange(rows) * 7919 % vocab
    labels[rows // 2] = vocab - 1
    assert_same(on_both_devices(F.token_stats, logits, labels))


@pytest.mark.parametrize("bound, roundings", [(43, 4), (87, 5)])
def test_error_of_the_exponential(bound, roundings):
    """Beside a logit so much larger that log s is 0, the gradient of the other one is minus its exponential."""
    margin = torch.linspace(17, bound, 100_001)[1:-1]
    logits = torch.stack([torch.zeros_like(margin), -margin], 1).to(DEVICE)
    labels = torch.zeros(len(margin), dtype=torch.long, device=DEVICE)
    grads = torch.stack([torch.ones_like(margin), torch.zeros_like(margin)]).to(DEVICE)
    logps, _, gradient = stats_and_gradient(logits, labels, grads)
    exact = torch.tensor([math.exp(-x) for x in margin.tolist()], dtype=torch.float64)
    assert not logps.any()
    assert ((-gradient[:, 1].cpu() / exact - 1).abs() <= roundings * torch.finfo(torch.float32).eps).all()


@dtypes
@pytest.mark.parametrize("vocab", [300, 20_001])
def test_undefined_rows(dtype, vocab):
    logits, labels = logits_and_labels(dtype, (5,), vocab)
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
    options = {"label_smoothing": 0.1} if link in reference.MARGIN_LINKS else {}

    def function(*tensors):
        a = tensors[4] if dispersion else None
        return F.preference_loss(*tensors[:4], neg_log_dispersion=a, link=link, **options)

    assert_same(on_both_devices(function, *logps, *dispersion))


CHOICES = [
    {"focal_gamma": 0.5, "link": "mallows-phi"},
    {"focal_gamma": 0.5, "clip_rejected": True},
    {"divergence": "js"},
    {"divergence": "alpha", "divergence_alpha": 0.7},
]


@dtypes
@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_preference_loss_choices(dtype, options):
    generator = torch.Generator().manual_seed(0)
    logps = [(-20 * torch.rand(1000, generator=generator)).to(dtype) for _ in range(4)]
    dispersion = torch.rand(1000, generator=generator).to(dtype)

    def function(*tensors):
        return F.preference_loss(*tensors[:4], neg_log_dispersion=tensors[4], **options)

    assert_same(on_both_devices(function, *logps, dispersion))


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


@of_the_device
def test_a_bad_dispersion_makes_its_own_pair_nan():
    dispersion = torch.tensor([0.5, -0.5, math.nan, math.inf, 0.0], device=DEVICE)
    logps = torch.zeros(5, device=DEVICE)
    for result in (
        F.mallows_log_prob(logps, dispersion),
        F.preference_loss(logps, logps, neg_log_dispersion=dispersion).losses,
    ):
        assert result.isnan().tolist() == [False, True, True, True, False]


@dtypes
@shapes
def test_same_bits_every_time(dtype, shape):
    case = on_gpu(dtype, shape)
    first = stats_and_gradient(*case)
    for _ in range(20):
        assert_same_bits(stats_and_gradient(*case), first)


@of_the_device
@shapes
def test_runs_on_the_current_stream(shape):
    """On a side stream that is still busy producing the logits, the kernels have to wait for them."""
    logits, labels, grads = on_gpu(torch.float32, shape)
    expected, late = stats_and_gradient(logits, labels, grads), torch.zeros_like(logits)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(logits)
        results = stats_and_gradient(late, labels, grads)
    stream.synchronize()
    assert_same_bits(results, expected)


def pair_results(logps, dispersion):
    """Losses, log-probabilities and their gradients: one kernel forward, one product backward."""
    logps, dispersion = (x.detach().requires_grad_() for x in (logps, dispersion))
    losses = F.preference_loss(logps, -logps, neg_log_dispersion=dispersion, link="mallows-phi").losses
    log_probs = F.mallows_log_prob(logps, dispersion) + F.mallows_log_prob(logps, 0.5)
    return losses.detach(), log_probs.detach(), *torch.autograd.grad((losses + log_probs).sum(), (logps, dispersion))


@of_the_device
@dtypes
@shapes
def test_graph_capture_and_replay(dtype, shape):
    """Captured on one input and replayed on another, in the same buffers: the results are those of the other."""
    logits, labels, grads = on_gpu(dtype, shape)
    logps, dispersion = grads[0].clone(), grads[1].abs()

    def everything():
        return *stats_and_gradient(logits, labels, grads), *pair_results(logps, dispersion)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # torch wants a warm-up on a side stream
        everything()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    for buffer in (logits, logps, dispersion):
        buffer.copy_(buffer.flip(0) * 0.5)
    expected = everything()
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, expected)


@of_the_device
@shapes
def test_nothing_waits_for_the_device(shape):
    case = on_gpu(torch.bfloat16, shape)
    hidden, weight = (torch.randn(n, 16, device=DEVICE, requires_grad=True) for n in (len(case[1]), 50))
    labels = case[1].clamp(max=49)
    token_logps, num_tokens = case[2][0].requires_grad_(), torch.full((1,), len(case[1]), device=DEVICE)
    means = Means(Accelerator())

    def everything():
        stats_and_gradient(*case)
        pair_results(case[2][0], case[2][1].abs())
        for head in (weight, weight.detach()):
            F.linear_token_stats(hidden, head, labels, chunk_tokens=1000).logps.sum().backward()
        sums = response_sums(token_logps, num_tokens)
        sums.backward()
        means.add("train", {"logps": sums}, num_tokens)

    everything()  # what is set up once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@dtypes
@pytest.mark.parametrize("shape", [*SHAPES.values(), ((5,), 1024), ((5,), 3)], ids=str)
def test_backward_in_place(dtype, shape):
    logits, labels, grads = on_gpu(dtype, shape)
    _, *saved = torch.ops.mallowspo.token_stats(logits, labels, -100, 0.7)
    expected = torch.ops.mallowspo.token_stats_backward(*grads, logits, labels, *saved, -100, 0.7)
    torch.ops.mallowspo.token_stats_backward_tile(logits, *grads, labels, *saved, 0, shape[1], -100, 0.7)
    assert_same_bits([logits], [expected])


@dtypes
@pytest.mark.parametrize("width", [2500, 9001])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_tiles_of_the_vocabulary(dtype, width, shape):
    """A tile's own rows are cut into parts too where they are few and wide enough."""
    logits, labels, _ = on_gpu(dtype, shape)
    whole = torch.ops.mallowspo.token_stats(logits, labels, -100, 0.7)
    for device, numerators in ((DEVICE, False), ("cpu", True), (DEVICE, True)):
        overwritten, on = logits.to(device, copy=True), labels.to(device)
        state = torch.zeros(4, len(labels), dtype=result_dtype(dtype), device=device)
        state[0] = torch.finfo(state.dtype).min
        for first in range(0, shape[1], width):
            tile = overwritten[:, first : first + width]
            torch.ops.mallowspo.token_stats_tile(state, tile, on, first, shape[1], -100, 0.7, numerators)
        row_max, log_sum, entropy, logps = state.cpu()
        assert_same([[x.cpu() for x in whole], [logps, entropy, row_max, log_sum]])
        if not numerators:
            assert_same_bits([overwritten], [logits])
        elif device == "cpu":
            expected = overwritten
    assert_same([[expected], [overwritten.cpu()]])


def test_offsets_beyond_32_bits():
    values, labels, grads = on_gpu(torch.bfloat16, ((2,), 48))
    labels.fill_(3)
    far = torch.empty(2**31 + 48, dtype=torch.bfloat16, device=DEVICE).as_strided((2, 48), (2**31, 1)).copy_(values)
    assert_same_bits(stats_and_gradient(far, labels, grads), stats_and_gradient(values, labels, grads))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_its_tensors():
    logits, labels = (x.to("cuda:1") for x in logits_and_labels(torch.float32))
    with torch.cuda.device(0):
        stats = F.token_stats(logits.requires_grad_(), labels)
        stats.logps.sum().backward()
    assert stats.logps.device == logits.grad.device == logits.device
    torch.testing.assert_close(stats.logps.cpu(), F.token_stats(logits.cpu(), labels.cpu()).logps)


@of_the_device
def test_two_devices_are_refused():
    logits, labels = logits_and_labels(torch.float32)
    with pytest.raises(ValueError, match="move to one device: logits is on cuda:0, labels is on cpu"):
        F.token_stats(logits.to(DEVICE), labels)


def test_opcheck():
    logits, labels = (x.to(DEVICE) for x in logits_and_labels(torch.bfloat16))
    torch.library.opcheck(torch.ops.mallowspo.token_stats, (logits, labels, -100, 1.0))


@of_the_device
def test_a_label_outside_the_vocabulary_stops_the_process():
    code = (
        "import torch; from mallowspo import functional as F; "
        "F.token_stats(torch.zeros(1, 5, device='cuda'), torch.tensor([9], device='cuda')); torch.cuda.synchronize()"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert process.returncode != 0
    assert "label 9 is outside the vocabulary of 5 entries" in process.stdout + process.stderr
