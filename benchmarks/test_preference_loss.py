"""preference_loss: log-probabilities of B pairs -> losses and rewards, and the gradients of the mean loss.

A batch is small, so what counts is the overhead of a call; torch's formula of the same link stands beside it.
"""

import pytest
import torch

import mallowspo.functional as F
from contest import Contest
from mallowspo.reference import torch_preference_loss
from shapes import count

LINKS = ["bradley-terry", "ipo", "mallows-theta", "mallows-phi"]
PAIRS = [8, 512, 4096]


def contest(device, dtype, shape, case):
    generator = torch.Generator().manual_seed(0)
    pairs = count(int(shape.split()[0]))
    tensors = [torch.randn(pairs, generator=generator).to(device, getattr(torch, dtype)) for _ in range(4)]
    wanted = [tensor.requires_grad_() for tensor in tensors[:2]]
    settings = {"link": case}
    if case in F.MALLOWS_LINKS:
        settings["neg_log_dispersion"] = (0.1 + torch.rand(pairs, generator=generator)).to(device, tensors[0].dtype)

    def step(function):
        return torch.autograd.grad(function(*tensors, **settings)[0].mean(), wanted)

    fast = torch.compile(torch_preference_loss, dynamic=False)
    return Contest(
        lambda: step(F.preference_loss),
        {"eager": lambda: step(torch_preference_loss), "compiled": lambda: step(fast)},
    )


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("link", LINKS)
def test_preference_loss(compare, link, pairs):
    compare(contest, "float32", f"{pairs} pairs", link)
