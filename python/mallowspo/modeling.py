"""Token statistics of a Hugging Face causal language model without its logits.

The model's own ``forward`` and its head's own ``forward`` learn one more way to be called, so whatever wraps the model
(DDP, FSDP, ZeRO, autocast, gradient checkpointing, PEFT) sees an ordinary forward pass and an ordinary head call. Only
the hidden states of the positions that predict a completion token reach the head.
"""

import types
from typing import NamedTuple

import torch
from torch import nn

from mallowspo import functional as F

# What a causal LM may do to its logits after the head, by the name of its config field.
_SOFTCAP = "final_logit_softcapping"
_MULTIPLIER = "logit_scale"
_DIVISOR = "logits_scaling"


class SequenceStats(NamedTuple):
    """Of each of R sequences: log-probability of the completion, summed, and mean entropy (nats) of its tokens; [R]."""

    logps: torch.Tensor
    entropy: torch.Tensor


def attach_token_stats(model):
    """Teaches a causal LM to return ``TokenStats`` when it is called with ``target_index`` and ``target_ids``.

    ``model(input_ids, attention_mask, target_index=..., target_ids=...)`` returns the statistics of the tokens
    ``target_ids`` [N] as predicted from the flat positions ``target_index`` [N] of [R, T]. Any other call is the model's
    own. A short forward pass compares the two ways, so that a model whose head does more than is known here is refused
    instead of trained wrongly. Attaching twice is harmless.

    Raises:
        TypeError: the head is not a plain ``nn.Linear`` (LoRA on the head, for one).
        ValueError: the statistics disagree with the model's logits, or the model adds a loss of its own.
    """
    if getattr(model, "_mallowspo_attached", False):
        return
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise TypeError(
            f"the output head is a {type(head).__name__}, not a plain nn.Linear; "
            "adapters on the head are not supported: leave it out of target_modules and modules_to_save"
        )
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "output_router_logits adds a router loss that the preference loss leaves out: set it to False"
        )
    head.mallowspo_settings = {
        "softcap": getattr(config, _SOFTCAP, None),
        "temperature": (getattr(config, _DIVISOR, None) or 1.0) / (getattr(config, _MULTIPLIER, None) or 1.0),
    }
    # Bound methods, not closures: deepcopy rebinds them to the copy, and accelerate can wrap and unwrap them.
    model.forward = types.MethodType(_model_forward, model)
    head.forward = types.MethodType(_head_forward, head)
    try:
        _compare_with_logits(model)
    except Exception:
        del model.forward, head.forward
        raise
    model._mallowspo_attached = True


def _model_forward(self, *args, target_index=None, target_ids=None, **kwargs):
    if target_ids is None:
        return type(self).forward(self, *args, **kwargs)
    given = {name: value for name, value in kwargs.items() if value is not None}  # PEFT fills in what was not
    hidden = self.get_decoder()(*args, **{**given, "use_cache": False}).last_hidden_state
    return self.get_output_embeddings()(hidden.flatten(0, 1)[target_index], target_ids)


def _head_forward(self, hidden, target_ids=None):
    if target_ids is None:
        return type(self).forward(self, hidden)
    return F.linear_token_stats(hidden, self.weight, target_ids, bias=self.bias, **self.mallowspo_settings)


@torch.no_grad()
def _compare_with_logits(model):
    parameter = model.get_output_embeddings().weight
    if parameter.is_meta:
        return
    training = model.training
    model.eval()
    length = 8
    ids = torch.arange(1, length + 1, device=parameter.device)[None] % parameter.shape[0]
    mask = torch.ones_like(ids)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, :-1]
    expected = F.token_stats(logits, ids[0, 1:])
    index = torch.arange(length - 1, device=ids.device)
    found = model(input_ids=ids, attention_mask=mask, target_index=index, target_ids=ids[0, 1:])
    model.train(training)
    allowed = 16 * torch.finfo(logits.dtype).eps * max(1.0, logits.abs().max().item())
    for name, a, b in zip(found._fields, found, expected, strict=True):
        worst = (a - b).abs().max().item()
        if not worst <= allowed:
            raise ValueError(
                f"{type(model).__name__} does something to its logits that is not known here: {name} from the head "
                f"differ from those of the logits by {worst:.3g}; report the model class"
            )


def sequence_stats(model, batch):
    """Runs the model (wrapped or not) on a collated batch.

    Args:
        model: a model that :func:`attach_token_stats` has seen.
        batch: of :class:`mallowspo.data.PreferenceCollator`, R = 2B sequences.

    Returns:
        SequenceStats, [R] float32; differentiable.
    """
    stats = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        target_index=batch["target_index"],
        target_ids=batch["target_ids"],
    )
    lengths = batch["num_tokens"]
    logps, entropy = (torch.segment_reduce(values, "sum", lengths=lengths, axis=0) for values in stats)
    return SequenceStats(logps, entropy / lengths)
