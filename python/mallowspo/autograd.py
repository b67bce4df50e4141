"""Autograd Functions over ``torch.ops.mallowspo.*`` and the fake kernels that let ``torch.compile`` trace them.

Shapes and meaning are those of :mod:`mallowspo.functional`, which also checks the arguments. The operators themselves
know no autograd: a Function's backward is one operator call (of the per-pair operators: one product with the slopes
that the forward gave) and raises under ``create_graph=True``.
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
        losses, chosen_rewards, rejected_rewards, slopes = ops.preference_loss(*tensors, *settings)
        ctx.save_for_backward(slopes)
        ctx.dtype = chosen.dtype
        ctx.mark_non_differentiable(chosen_rewards, rejected_rewards)
        return losses, chosen_rewards, rejected_rewards

    @staticmethod
    @first_order
    def backward(ctx, grad_losses, _chosen_rewards, _rejected_rewards):
        chosen, rejected, dispersion = _scaled(ctx, grad_losses)
        _, _, wants_ref_chosen, wants_ref_rejected, wants_dispersion, *settings = ctx.needs_input_grad
        return (
            chosen,
            rejected,
            -chosen if wants_ref_chosen else None,
            -rejected if wants_ref_rejected else None,
            dispersion if wants_dispersion else None,
            *(None for _ in settings),
        )


class MallowsLogProbFunction(torch.autograd.Function):
    """(margin, neg_log_dispersion) of one shape -> log g of that shape."""

    @staticmethod
    def forward(ctx, margin, neg_log_dispersion, smoothing):
        log_probs, slopes = ops.mallows_log_prob(margin, neg_log_dispersion, smoothing)
        ctx.save_for_backward(slopes)
        ctx.dtype = margin.dtype
        return log_probs

    @staticmethod
    @first_order
    def backward(ctx, grad):
        return *_scaled(ctx, grad), None


def _scaled(ctx, grad):
    """The gradients in an operator's inputs, of which the forward has taken the slopes."""
    return (grad * ctx.saved_tensors[0]).to(ctx.dtype).unbind()


def _outputs_like(tensor, count, slopes):
    dtype = accumulator_dtype(tensor.dtype)
    outputs = (tensor.new_empty(tensor.shape, dtype=dtype) for _ in range(count))
    return *outputs, tensor.new_empty((slopes, *tensor.shape), dtype=dtype)


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
    return _outputs_like(chosen, 3, slopes=3)


@torch.library.register_fake("mallowspo::mallows_log_prob")
def _(margin, neg_log_dispersion, smoothing):
    return _outputs_like(margin, 1, slopes=2)
