"""What mallowspo.functional refuses: the exception, and that its message names the offending value."""

import math
import re

import numpy as np
import pytest
import torch

from mallowspo import functional as F
from mallowspo.checks import check_alike, may_overlap

LOGITS, LABELS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
HIDDEN, WEIGHT, BIAS = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(5)
LOGPS = torch.zeros(3)
ONE = torch.ones(3)
NOT_POSITIVE = [0, 0.0, -0.5, math.nan, math.inf]


def token_stats(logits=LOGITS, labels=LABELS, **options):
    return F.token_stats(logits, labels, **options)


def linear(hidden=HIDDEN, weight=WEIGHT, labels=LABELS, **options):
    return F.linear_token_stats(hidden, weight, labels, **options)


def dispersion(chosen=ONE, rejected=ONE, num_outcomes=50, **options):
    return F.neg_log_dispersion(chosen, rejected, num_outcomes, **options)


def link(margin=LOGPS, neg_log_dispersion=ONE, **options):
    return F.mallows_log_prob(margin, neg_log_dispersion, **options)


def loss(chosen=LOGPS, rejected=LOGPS, *references, neg_log_dispersion=ONE, **options):
    return F.preference_loss(chosen, rejected, *references, neg_log_dispersion=neg_log_dispersion, **options)


def dpo(*arguments, **options):
    return loss(*arguments, link="bradley-terry", **{"neg_log_dispersion": None} | options)


def refused(exception, message, function, *arguments, **options):
    return pytest.param(exception, message, function, arguments, options, id=f"{function.__name__}: {message}")


WRONG_TYPES = [
    refused(TypeError, "logits must be a torch.Tensor, got list", token_stats, [[0.0]]),
    refused(TypeError, "logits must be float32 or .*, got int64", token_stats, LOGITS.long()),
    refused(TypeError, "logits must be float32 or .*, got complex64", token_stats, LOGITS.cfloat()),
    refused(TypeError, "labels must be int64, got float32", token_stats, LOGITS, LABELS.float()),
    refused(TypeError, "labels must be int64, got int32", token_stats, LOGITS, LABELS.int()),
    refused(TypeError, "labels must be a torch.Tensor, got int", token_stats, LOGITS[0, 0], 3),
    refused(TypeError, "hidden must be a torch.Tensor, got NoneType", linear, None),
    refused(TypeError, "weight must be float32 or .*, got int8", linear, HIDDEN, WEIGHT.to(torch.int8)),
    refused(TypeError, "bias must be a torch.Tensor, got float", linear, bias=0.5),
    refused(TypeError, "down must be a torch.Tensor, got NoneType", linear, low_rank=(None, WEIGHT)),
    refused(TypeError, "down is float32, up is float64", linear, low_rank=(HIDDEN, WEIGHT.double())),
    refused(TypeError, "low_rank must be a pair .*got Tensor", linear, low_rank=HIDDEN),
    refused(TypeError, "low_rank must be a pair .*got tuple", linear, low_rank=(HIDDEN,)),
    refused(TypeError, "hidden is float32, weight is bfloat16", linear, HIDDEN, WEIGHT.bfloat16()),
    refused(TypeError, "weight is float32, bias is float64", linear, bias=BIAS.double()),
    refused(TypeError, "chosen_entropy must be a torch.Tensor, got float", dispersion, 0.3),
    refused(TypeError, "chosen_entropy is float32, rejected_entropy is float64", dispersion, ONE, ONE.double()),
    refused(TypeError, "margin must be a torch.Tensor, got float", link, 0.3, 0.5),
    refused(TypeError, "margin must be float32 or .*, got int64", link, torch.arange(3)),
    refused(TypeError, "margin is float32, neg_log_dispersion is float64", link, LOGPS, ONE.double()),
    refused(TypeError, "rejected_logps must be a torch.Tensor, got int", loss, LOGPS, 0),
    refused(TypeError, "chosen_logps is float32, rejected_logps is float16", loss, LOGPS, LOGPS.half()),
    refused(TypeError, "ref_chosen_logps is bfloat16", loss, LOGPS, LOGPS, LOGPS.bfloat16(), LOGPS),
    refused(TypeError, "neg_log_dispersion must be a torch.Tensor, got float", loss, neg_log_dispersion=0.5),
    *(
        refused(TypeError, f"beta must be a number, got {re.escape(repr(x))}$", loss, beta=x)
        for x in ("0.1", None, True, LOGPS[0])
    ),
    *(
        refused(TypeError, f"{name} must be a number, got '0.1'$", loss, **{name: "0.1"})
        for name in ("gamma", "label_smoothing", "smoothing", "focal_gamma", "divergence_alpha", "discopop_tau")
    ),
    *(refused(TypeError, "temperature must be a number, got '1'$", f, temperature="1") for f in (token_stats, linear)),
    refused(TypeError, "softcap must be a number, got '30'$", linear, softcap="30"),
    refused(TypeError, "num_outcomes must be a number, got '50'$", dispersion, ONE, ONE, "50"),
    refused(TypeError, "smoothing must be a number, got True$", link, smoothing=True),
]

WRONG_SHAPES_AND_DEVICES = [
    refused(ValueError, r"the vocabulary, \[2, 3\], got \[2\]", token_stats, LOGITS, LABELS[:, 0]),
    refused(ValueError, r"the vocabulary, \[2, 3\], got \[3, 2\]", token_stats, LOGITS, LABELS.T),
    refused(ValueError, r"V >= 1, got shape \[2, 3, 0\]", token_stats, LOGITS[..., :0]),
    refused(ValueError, r"V >= 1, got shape \[\]", token_stats, LOGITS[0, 0, 0], LABELS[0, 0]),
    refused(ValueError, "9 dimensions, got 10; flatten", token_stats, torch.zeros([1] * 9 + [5]), LABELS[(None,) * 7]),
    refused(ValueError, "logits is on meta; .* cpu and cuda", token_stats, LOGITS.to("meta")),
    refused(ValueError, "labels is on meta", token_stats, LOGITS, LABELS.to("meta")),
    refused(ValueError, r"got \[2, 3, 4\] and \[5, 3\]", linear, HIDDEN, WEIGHT[:, :3]),
    refused(ValueError, r"low_rank must be .*got \[2, 3, 4\] and \[5, 3\]", linear, low_rank=(HIDDEN, WEIGHT[:, :3])),
    refused(ValueError, r"low_rank must be .*got \[2, 3, 4\] and \[4, 4\]", linear, low_rank=(HIDDEN, WEIGHT[:4])),
    refused(ValueError, r"low_rank must be .*got \[3, 4\] and \[5, 4\]", linear, low_rank=(HIDDEN[0], WEIGHT)),
    refused(ValueError, r"got \[2, 3, 4\] and \[4\]", linear, HIDDEN, WEIGHT[0]),
    refused(ValueError, r"got \[2, 3, 4\] and \[0, 4\]", linear, HIDDEN, WEIGHT[:0]),
    refused(ValueError, r"got \[\] and \[5, 4\]", linear, HIDDEN[0, 0, 0], WEIGHT, LABELS[0, 0]),
    refused(ValueError, r"last dimension, \[2, 3\], got \[2, 2\]", linear, HIDDEN, WEIGHT, LABELS[:, :2]),
    refused(ValueError, r"bias must be \[V\] = \[5\], got \[4\]", linear, bias=BIAS[:4]),
    refused(ValueError, r"bias must be \[V\] = \[5\], got \[1, 5\]", linear, bias=BIAS[None]),
    refused(ValueError, "weight is on meta", linear, HIDDEN, WEIGHT.to("meta")),
    refused(ValueError, r"chosen_entropy is \[3\], rejected_entropy is \[1\]", dispersion, ONE, ONE[:1]),
    refused(ValueError, "do not broadcast: .*3.*2", link, LOGPS, ONE[:2]),
    refused(ValueError, r"chosen_logps is \[3\], rejected_logps is \[2\]", loss, LOGPS, LOGPS[:2]),
    refused(ValueError, r"neg_log_dispersion is \[1\]", loss, neg_log_dispersion=ONE[:1]),
    refused(ValueError, r"ref_rejected_logps is \[3, 1\]", loss, LOGPS, LOGPS, LOGPS, LOGPS[:, None]),
    refused(ValueError, "rejected_logps is on meta", loss, LOGPS, LOGPS.to("meta")),
]

WRONG_VALUES = [
    *(refused(ValueError, f"temperature .* positive, got {x}$", token_stats, temperature=x) for x in NOT_POSITIVE),
    *(refused(ValueError, f"temperature .* positive, got {x}$", linear, temperature=x) for x in NOT_POSITIVE),
    *(refused(ValueError, f"softcap .* positive, got {x}$", linear, softcap=x) for x in NOT_POSITIVE),
    *(refused(ValueError, f"beta .* positive, got {x}$", loss, beta=x) for x in NOT_POSITIVE),
    *(refused(ValueError, f"scale .* positive, got {x}$", dispersion, scale=x) for x in NOT_POSITIVE),
    *(
        refused(ValueError, f"{name} .* got {x}$", linear, **{name: x})
        for name in ("chunk_tokens", "memory_budget")
        for x in (0, -1, 2.5, True)
    ),
    *(refused(ValueError, f"at least 2, got {x}$", dispersion, ONE, ONE, x) for x in (1, 0, -3, math.nan)),
    *(refused(ValueError, f"smoothing .* got {x}$", link, smoothing=x) for x in (-0.5, math.nan, math.inf)),
    *(refused(ValueError, f"smoothing .* got {x}$", loss, smoothing=x) for x in (-0.5, math.nan, math.inf)),
    *(refused(ValueError, f"gamma must be finite, got {x}$", loss, gamma=x) for x in (math.nan, math.inf, -math.inf)),
    *(refused(ValueError, f"label_smoothing .* got {x}$", loss, label_smoothing=x) for x in (-0.1, 0.5, 1, math.nan)),
    refused(ValueError, "unknown link 'sigmoid'; choose one of bradley-terry, ", loss, link="sigmoid"),
    refused(ValueError, "come together: give both, or neither", loss, LOGPS, LOGPS, LOGPS),
    refused(ValueError, "come together: give both, or neither", dpo, LOGPS, LOGPS, None, LOGPS),
    refused(ValueError, "'mallows-theta' needs neg_log_dispersion", loss, neg_log_dispersion=None),
    refused(ValueError, "'bradley-terry' does not read neg_log_dispersion", dpo, neg_log_dispersion=ONE),
]


@pytest.mark.parametrize(
    "exception, message, function, arguments, options", [*WRONG_TYPES, *WRONG_SHAPES_AND_DEVICES, *WRONG_VALUES]
)
def test_refused(exception, message, function, arguments, options):
    with pytest.raises(exception, match=message):
        function(*arguments, **options)


@pytest.mark.parametrize("function", [token_stats, linear, dispersion, link, loss, dpo])
def test_the_defaults_of_this_file_are_accepted(function):
    function()


# --- values inside the tensors, which only the kernels see -----------------------------------------------------------


@pytest.mark.parametrize("label", [5, -1, -101, 2**40])
@pytest.mark.parametrize("function", [token_stats, linear])
def test_a_label_outside_the_vocabulary(function, label):
    labels = LABELS.clone()
    labels[1, 1] = label
    with pytest.raises(IndexError, match=f"label {label} is .* vocabulary of 5 entries.*ignore_index .-100."):
        function(labels=labels)


def test_a_label_outside_the_vocabulary_in_a_later_chunk():
    labels = torch.tensor([0, 0, 0, 7])
    with pytest.raises(IndexError, match="label 7 .* vocabulary of 5 "):
        F.linear_token_stats(torch.zeros(4, 4), WEIGHT, labels, chunk_tokens=2)


@pytest.mark.parametrize("value", [-0.5, -1e-7, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", [link, loss])
@pytest.mark.parametrize("dtype", F.DTYPES)
def test_a_dispersion_that_is_none(function, value, dtype):
    bad = ONE.to(dtype, copy=True)
    bad[1] = value
    with pytest.raises(ValueError, match=r"neg_log_dispersion\[1\] is .*must be finite and >= 0"):
        function(LOGPS.to(dtype), **{"rejected": LOGPS.to(dtype)} if function is loss else {}, neg_log_dispersion=bad)


def test_a_bias_that_is_no_tensor_under_autocast():
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match="bias must be a torch.Tensor, got list"),
    ):
        linear(bias=[0.0] * 5)


def test_the_message_names_the_dispersion():
    with pytest.raises(ValueError, match=r"neg_log_dispersion\[2\] is -2.5e-07;"):
        loss(neg_log_dispersion=torch.tensor([1.0, 2.0, -2.5e-7]))


def test_tensors_of_two_devices():
    """Of those that the functions accept, seen where there is a GPU."""
    with pytest.raises(ValueError, match="move to one device: a is on cpu, b is on meta"):
        check_alike(a=ONE, b=ONE.to("meta"))


def test_no_bad_value_no_exception():
    """Zero dispersion and nothing to work on are ordinary."""
    assert link(neg_log_dispersion=torch.zeros(3)).isfinite().all()
    assert token_stats(LOGITS[:0], LABELS[:0]).logps.shape == (0, 3)
    assert linear(HIDDEN[:, :0], labels=LABELS[:, :0]).entropy.shape == (2, 0)
    assert token_stats(LOGITS[(None,) * 6], LABELS[(None,) * 6]).logps.shape == (1,) * 6 + (2, 3)  # nine dimensions
    assert linear(HIDDEN[(None,) * 9], labels=LABELS[(None,) * 9]).logps.dim() == 11
    assert loss(beta=np.float32(0.1), gamma=np.int64(1)).losses.shape == (3,)  # numbers, too
    assert loss(LOGPS[:0], LOGPS[:0], neg_log_dispersion=ONE[:0]).losses.shape == (0,)
    assert token_stats(labels=torch.full_like(LABELS, -7), ignore_index=-7).logps.abs().sum() == 0


@pytest.mark.skipif(F.HAS_CUDA_KERNELS or not torch.cuda.is_available(), reason="needs CUDA and a build without it")
def test_cuda_tensors_without_cuda_kernels():
    with pytest.raises(ValueError, match="logits is on cuda:0 but mallowspo was built without CUDA kernels"):
        token_stats(LOGITS.cuda(), LABELS.cuda())


def test_a_star_import_brings_what_a_training_loop_calls():
    names = {}
    exec("from mallowspo.functional import *", names)
    found = names.keys() - {"__builtins__"}
    assert {"token_stats", "preference_loss", "neg_log_dispersion", "LINKS"} <= found
    assert not [name for name in found if name.startswith("check") or name in ("torch", "NamedTuple")]


def test_what_overlaps():
    assert not may_overlap(torch.zeros(4).as_strided((1, 4), (0, 1)))
    assert may_overlap(torch.zeros(4).as_strided((2, 4), (0, 1)))
    assert not may_overlap(torch.zeros(2, 3, 4).transpose(0, 1))
