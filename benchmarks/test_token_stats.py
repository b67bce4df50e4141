"""token_stats: logits [512, V] -> log-probability and entropy, forward and with the backward of the log-probability.

Roofline: the forward reads 512 V logits once, the backward reads and writes them once; a streaming sum of the same
logits and a copy of them are the floors beside it.
"""

import pytest
import torch
from shapes import MODELS

import mallowspo.functional as F
from mallowspo.reference import torch_token_stats

TOKENS = 512
COMPILED = torch.compile(torch_token_stats, dynamic=False)


def trl_token_stats(logits, labels):
    trl = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed: pip install trl")
    return trl.selective_log_softmax(logits, labels), trl.entropy_from_logits(logits)


def data(model, dtype):
    generator = torch.Generator().manual_seed(0)
    vocabulary = MODELS[model][1]
    logits = torch.randn(TOKENS, vocabulary, generator=generator).to(dtype)
    return logits, torch.randint(vocabulary, (TOKENS,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_forward(in_turn, model, dtype):
    logits, labels = data(model, dtype)
    in_turn(
        lambda: F.token_stats(logits, labels),
        {
            "TRL": lambda: trl_token_stats(logits, labels),
            "eager": lambda: torch_token_stats(logits, labels),
            "inductor": lambda: COMPILED(logits, labels),
            "floor: read": lambda: logits.view(torch.int32).sum(-1, dtype=torch.int32),
        },
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["SmolLM2-135M", "Llama-3-8B"])
def test_forward_backward(in_turn, model, dtype):
    logits, labels = data(model, dtype)
    logits.requires_grad_()

    def step(function):
        logits.grad = None
        function(logits, labels)[0].sum().backward()

    in_turn(
        lambda: step(F.token_stats),
        {
            "TRL": lambda: step(trl_token_stats),
            "eager": lambda: step(torch_token_stats),
            "inductor": lambda: step(COMPILED),
            "floor: read + copy": lambda: (logits.detach().view(torch.int32).sum(-1), logits.detach().clone()),
        },
    )
