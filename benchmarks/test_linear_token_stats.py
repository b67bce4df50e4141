"""linear_token_stats: hidden states [1024, D] and a head [V, D] -> log-probabilities and entropies, and DPO on them.

The tokens are two pairs of responses of 256 tokens, or of 64. Least work: one product of [N, D] with [D, V] for the
forward, two with the hidden states' gradient (head frozen), three with the head's (head trained). With a memory_budget
of 32 MiB ours takes less memory than any competitor here.
"""

import pytest
import torch

import mallowspo.functional as F
from contest import Contest, optional
from mallowspo.linear import WIDENED, widen
from mallowspo.reference import torch_token_stats
from shapes import count, sizes

SMALL = "trained head, 32 MiB"
PRODUCTS = {"forward": 1, "frozen head": 2, "trained head": 3, "trained head, 256 tokens": 3, SMALL: 3}
SLOW = pytest.mark.slow
MEMORY_SHAPE = "SmolLM2-135M", "float32"
SHAPES = [
    pytest.param(*MEMORY_SHAPE),
    pytest.param("SmolLM2-135M", "bfloat16"),
    pytest.param("TinyLlama-1.1B", "float32", marks=SLOW),
    pytest.param("TinyLlama-1.1B", "bfloat16"),
    pytest.param("Llama-3.2-1B", "float32", marks=SLOW),
    pytest.param("Llama-3.2-1B", "bfloat16", marks=SLOW),
]
BETA = 0.1
TORCH_CHUNK = 256  # tokens at a time; torch's own choice, a dozen, is many times slower on a CPU
TRL_CHUNK = 32768  # columns of the head at a time, as TRL's DPOTrainer has it


def dpo(logps):
    """DPO's loss without a reference, from log-probabilities [responses, tokens], the chosen half first."""
    chosen, rejected = logps.float().sum(-1).chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def materialised(hidden, weight, labels):
    return torch_token_stats(hidden @ weight.T, labels)[0]


def log_probs():
    """name -> function(hidden [B, T, D], weight, labels [B, T]) -> log-probabilities [B, T], None where missing."""
    trl = optional("trl.kernels")
    nn = torch.nn.functional

    def trl_chunked(hidden, weight, labels):
        arguments = hidden.flatten(0, 1), weight, None, labels.flatten(), 1.0, TRL_CHUNK, None, 1.0, ("entropy",)
        return trl.ChunkedLogProbFunction.apply(*arguments)[0].view(labels.shape)

    def torch_chunked(hidden, weight, labels):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=TORCH_CHUNK)
        arguments = hidden.flatten(0, 1), weight, labels.flatten()
        return -nn.linear_cross_entropy(*arguments, reduction="none", options=options).view(labels.shape)

    return {
        "TRL": trl and trl_chunked,
        "eager": materialised,
        "cross-entropy": torch_chunked if hasattr(nn, "linear_cross_entropy") else None,
    }


def liger_dpo(hidden, weight, labels, wanted):
    """name -> function -> gradients, of Liger's fused head and DPO, None where it is missing."""
    liger = optional("liger_kernel.chunked_loss")
    labels = labels.clone()  # Liger marks its own as dynamic for torch.compile

    def step(loss):
        return torch.autograd.grad(loss(weight, hidden, labels)[0], wanted)

    found = {}
    for name, is_compiled in (("Liger", False), ("Liger compiled", True)):
        loss = liger and liger.LigerFusedLinearDPOLoss(beta=BETA, compiled=is_compiled, use_ref_model=False)
        found[name] = loss and (lambda loss=loss: step(loss))
    return found


def products(hidden, weight, number):
    """The first `number` of the three products, into buffers that exist; in float32 where the CPU multiplies that
    faster than the dtype."""
    hidden, weight = widen(hidden.detach().flatten(0, 1)), widen(weight.detach())
    logits = hidden @ weight.T
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run():
        torch.mm(hidden, weight.T, out=logits)
        if number > 1:
            torch.mm(logits, weight, out=grad_hidden)
        if number > 2:
            torch.mm(logits.T, hidden, out=grad_weight)

    return {f"{number} product{'s' if number > 1 else ''}": run}


def contest(device, dtype, shape, case):
    generator = torch.Generator().manual_seed(0)
    width, vocabulary = sizes(shape)

    def normal(*shape, scale):
        return (scale * torch.randn(*shape, generator=generator)).to(device, getattr(torch, dtype))

    length = 64 if case.endswith("256 tokens") else 256
    hidden, weight = normal(4, count(length), width, scale=1.0), normal(vocabulary, width, scale=width**-0.5)
    labels = torch.randint(vocabulary, hidden.shape[:-1], generator=generator).to(device)
    others, memory = log_probs(), shape == MEMORY_SHAPE[0]
    limits = products(hidden, weight, PRODUCTS[case])
    if case == "forward":
        runs = {name: other and (lambda other=other: other(hidden, weight, labels)) for name, other in others.items()}
        return Contest(lambda: F.linear_token_stats(hidden, weight, labels).logps, runs, limits, memory=memory)

    wanted = (hidden, weight) if case.startswith("trained") else (hidden,)
    for tensor in wanted:
        tensor.requires_grad_()

    def step(function):
        return torch.autograd.grad(dpo(function(hidden, weight, labels)), wanted)

    budget = 32 * 2**20 if case == SMALL else None
    return Contest(
        lambda: step(lambda *tensors: F.linear_token_stats(*tensors, memory_budget=budget).logps),
        {name: other and (lambda other=other: step(other)) for name, other in others.items()}
        | liger_dpo(hidden, weight, labels, wanted),
        limits,
        settle=case.startswith("trained"),  # the head's gradient is new memory
        memory=memory,
    )


# Where torch multiplies bfloat16 number by number, a gradient of the competitors takes a minute or more.
GRADIENT_SHAPES = [
    pytest.param(*shape.values, marks=SLOW) if torch.bfloat16 in WIDENED and "bfloat16" in shape.values else shape
    for shape in SHAPES
]


@pytest.mark.parametrize(("shape", "dtype"), SHAPES)
def test_forward(compare, shape, dtype):
    compare(contest, dtype, shape, "forward")


@pytest.mark.parametrize(("shape", "dtype"), GRADIENT_SHAPES)
@pytest.mark.parametrize("case", [case for case in PRODUCTS if case not in ("forward", SMALL)])
def test_gradients(compare, case, shape, dtype):
    compare(contest, dtype, shape, case)


def test_within_less_memory(compare):
    shape, dtype = MEMORY_SHAPE
    compare(contest, dtype, shape, SMALL)
