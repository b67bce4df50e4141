"""token_stats: logits [512, V] -> log-probability of the label and entropy.

Least work: the forward reads the logits once; the backward reads them once and writes a gradient of their size, over
them or into new memory, whose page faults cost more than the arithmetic.
"""

import pytest
import torch
import torch.nn.functional

import mallowspo.functional as F
from contest import Contest, optional
from mallowspo.reference import torch_token_stats
from shapes import count, sizes

SHAPES = [
    "TinyLlama-1.1B",
    "GPT-2",
    "Llama-3.2-1B",
    pytest.param("Qwen3-0.6B", marks=pytest.mark.slow),
    "Gemma-3-270M",
]
CASES = ["forward", "forward + backward", "forward + backward in place"]
MEMORY_SHAPE = "Llama-3.2-1B"  # the others' is proportional


def read(logits):
    """One pass over the memory: an integer sum, which no value slows down and which takes any number of bytes."""
    words = logits.view(-1).view(torch.int32)
    return words.view(256, -1).sum(-1, dtype=torch.int32) if words.numel() % 256 == 0 else words.sum(dtype=torch.int32)


def cross_entropy(logits, labels):
    return (-torch.nn.functional.cross_entropy(logits, labels, reduction="none"),)


def competitors(device):
    """name -> function(logits, labels) whose first result are the log-probabilities, None where it is missing."""
    trl = optional("trl.trainer.utils")
    found = {
        # The entropy is for the log: TRL's trainers take no gradient of it.
        "TRL": trl and (lambda x, y: trl.selective_log_softmax_and_entropy(x, y, entropy_requires_grad=False)),
        "eager": torch_token_stats,
        "compiled": torch.compile(torch_token_stats, dynamic=False),
        "cross-entropy": cross_entropy,
    }
    if device == "cuda":
        liger = optional("liger_kernel.transformers.functional")
        found["Liger"] = liger and (lambda x, y: (-liger.liger_cross_entropy(x, y, reduction="none"),))
    return found


def contest(device, dtype, shape, case):
    generator = torch.Generator().manual_seed(0)
    tokens, vocabulary = count(512), sizes(shape)[1]
    logits = torch.randn(tokens, vocabulary, generator=generator).to(device, getattr(torch, dtype))
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    memory = shape == MEMORY_SHAPE
    others = competitors(device)
    if case == "forward":
        runs = {name: other and (lambda other=other: other(logits, labels)[0]) for name, other in others.items()}
        return Contest(
            lambda: F.token_stats(logits, labels).logps, runs, {"read": lambda: read(logits)}, memory=memory
        )

    in_place = case == "forward + backward in place"
    # Ours writes the gradient over the logits then, Liger's kernel always.
    original = logits.clone() if in_place or others.get("Liger") else None
    logits.requires_grad_()

    def gradient(function):
        return torch.autograd.grad(function(logits, labels)[0].sum(), logits)[0]

    def ours():
        return gradient(lambda x, y: F.token_stats(x, y, inplace_backward=in_place))

    def restore():
        with torch.no_grad():
            logits.copy_(original)

    def read_and_copy():
        return read(logits.detach()), logits.detach().clone()

    def read_and_overwrite():
        return read(logits.detach()), logits.detach().neg_()

    return Contest(
        ours,
        {name: other and (lambda other=other: gradient(other)) for name, other in others.items()},
        {"read, read + write": read_and_overwrite} if in_place else {"read, copy to fresh": read_and_copy},
        prepare=None if original is None else restore,
        settle=True,
        memory=memory,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_token_stats(compare, case, shape, dtype):
    compare(contest, dtype, shape, case)
