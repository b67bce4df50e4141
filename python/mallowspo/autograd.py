"""Autograd Functions over ``torch.ops.mallowspo.*`` and the fake kernels that let ``torch.compile`` trace them.

Shapes and meaning are those of :mod:`mallowspo.functional`, which also checks the arguments. The operators themselves
know no autograd: a Function's backward is one operator call and raises under ``create_graph=True``.
"""

import functools

import torch

from mallowspo import _C  # noqa: F401  importing it registers the operators

ops = torch.ops.mallowspo


def accumulator_dtype(dtype):
    """float64 for float64, float32 for everything else: the dtype of sums and of results."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def first_order(backward):
    """Makes a backward raise where a second derivative is wanted.

    torch's ``once_differentiable`` does so only if the incoming gradient itself needs one; else it would be left out.
    """

    @functools.wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError("mallowspo's operators have no second derivative; differentiate without create_graph")
        return backward(ctx, *grads)

    return checked


class TokenStatsFunction(torch.autograd.Function):
    """(logits [..., V], labels [...]) -> (logps [...], entropy [...])."""

    @staticmethod
    def forward(ctx, logits, labels, ignore_index, temperature, inplace_backward):
        logps, entropy, row_max, log_sum = ops.token_stats(logits, labels, ignore_index, temperature)
        ctx.save_for_backward(logits, labels, entropy, row_max, log_sum)
        ctx.settings = ignore_index, temperature
        ctx.inplace_backward = inplace_backward
        ctx.set_materialize_grads(False)
        return logps, entropy

    @staticmethod
    @first_order
    def backward(ctx, grad_logps, grad_entropy):
        if not ctx.needs_input_grad[0] or (grad_logps is None and grad_entropy is None):
            return (None,) * 5
        if ctx.inplace_backward:
            grad, *saved = ctx.saved_tensors
            vocab = grad.shape[-1]
            ops.token_stats_backward_tile(grad, grad_logps, grad_entropy, *saved, 0, vocab, *ctx.settings)
            torch.autograd.graph.increment_version(grad)  # whoever reads the logits after this gets torch's error
        else:
            grad = ops.token_stats_backward(grad_logps, grad_entropy, *ctx.saved_tensors, *ctx.settings)
        return grad, *(None,) * 4


class PreferenceLossFunction(torch.autograd.Function):
    """Five tensors [B] (references and dispersion may be None) -> (losses, chosen_rewards, rejected_rewards) [B]."""

    @staticmethod
    def forward(ctx, chosen, rejected, ref_chosen, ref_rejected, neg_log_dispersion, *settings):
        tensors = chosen, rejected, ref_chosen, ref_rejected, neg_log_dispersion
        losses, chosen_rewards, rejected_rewards = ops.preference_loss(*tensors, *settings)
        ctx.save_for_backward(*tensors)
        ctx.settings = settings
        ctx.mark_non_differentiable(chosen_rewards, rejected_rewards)
        return losses, chosen_rewards, rejected_rewards

    @staticmethod
    @first_order
    def backward(ctx, grad_losses, _chosen_rewards, _rejected_rewards):
        tensors = ctx.saved_tensors
        chosen, rejected, dispersion = ops.preference_loss_backward(grad_losses, *tensors, *ctx.settings)
        grads = chosen, rejected, chosen, rejected, dispersion
        signed = [grad.neg() if i in (2, 3) and ctx.needs_input_grad[i] else grad for i, grad in enumerate(grads)]
        needed = zip(signed, tensors, ctx.needs_input_grad, strict=False)  # a reference's has the other sign
        grads = [grad.to(tensor.dtype) if wanted else None for grad, tensor, wanted in needed]
        return *grads, *(None for _ in ctx.settings)


class MallowsLogProbFunction(torch.autograd.Function):
    """(margin, neg_log_dispersion) of one shape -> log g of that shape."""

    @staticmethod
    def forward(ctx, margin, neg_log_dispersion, smoothing):
        ctx.save_for_backward(margin, neg_log_dispersion)
        ctx.smoothing = smoothing
        return ops.mallows_log_prob(margin, neg_log_dispersion, smoothing)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        margin, neg_log_dispersion = ctx.saved_tensors
        grad_margin, grad_dispersion = ops.mallows_log_prob_backward(grad, margin, neg_log_dispersion, ctx.smoothing)
        wants_margin, wants_dispersion, _ = ctx.needs_input_grad
        return (
            grad_margin.to(margin.dtype) if wants_margin else None,
            grad_dispersion.to(neg_log_dispersion.dtype) if wants_dispersion else None,
            None,
        )


def _outputs_like(tensor, count):
    return tuple(tensor.new_empty(tensor.shape, dtype=accumulator_dtype(tensor.dtype)) for _ in range(count))


@torch.library.register_fake("mallowspo::token_stats")
def _(logits, labels, ignore_index, temperature):
    return tuple(labels.new_empty(labels.shape, dtype=accumulator_dtype(logits.dtype)) for _ in range(4))


@torch.library.register_fake("mallowspo::token_stats_backward")
def _(grad_logps, grad_entropy, logits, labels, entropy, row_max, log_sum, ignore_index, temperature):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("mallowspo::token_stats_tile")
def _(state, *rest):
    return None


@torch.library.register_fake("mallowspo::token_stats_backward_tile")
def _(logits, *rest):
    return None


@torch.library.register_fake("mallowspo::advise_huge_pages")
def _(t):
    return None


@torch.library.register_fake("mallowspo::preference_loss")
def _(chosen, *rest):
    return _outputs_like(chosen, 3)


@torch.library.register_fake("mallowspo::preference_loss_backward")
def _(grad_losses, chosen, *rest):
    return _outputs_like(chosen, 3)


@torch.library.register_fake("mallowspo::mallows_log_prob")
def _(margin, neg_log_dispersion, smoothing):
    return _outputs_like(margin, 1)[0]


@torch.library.register_fake("mallowspo::mallows_log_prob_backward")
def _(grad, margin, neg_log_dispersion, smoothing):
    return _outputs_like(margin, 2)
