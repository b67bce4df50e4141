"""Token statistics of a Hugging Face causal language model without its logits.

The model's own ``forward`` and its head's own ``forward`` learn one more way to be called, so whatever wraps the model
(DDP, FSDP, ZeRO, autocast, gradient checkpointing, PEFT) sees an ordinary forward pass and an ordinary head call. Only
the hidden states of the positions that predict a completion token reach the head.
"""

import types
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import AutoModelForCausalLM

from mallowspo import functional as F

# What a causal LM may do to its logits after the head, by the name of its config field.
_SOFTCAP = "final_logit_softcapping"
_MULTIPLIER = "logit_scale"
_DIVISOR = "logits_scaling"


class SequenceStats(NamedTuple):
    """Of R sequences, [R]: log-probability of the completion, summed, and mean entropy (nats) of its tokens."""

    logps: torch.Tensor
    entropy: torch.Tensor


def attach_token_stats(model):
    """Teaches a causal LM to return ``TokenStats`` when it is called with ``target_index`` and ``target_ids``.

    ``model(input_ids, attention_mask, target_index=..., target_ids=...)`` returns the statistics of the tokens
    ``target_ids`` [N] as predicted from the flat positions ``target_index`` [N] of [R, T]. Any other call is the
    model's own. A short forward pass compares the two ways, so that a model whose head does more than is known here is
    refused instead of trained wrongly. Attaching twice is harmless. Of a ``PeftModel`` it is the base that is taught.

    Raises:
        TypeError: the head is not a plain ``nn.Linear`` (LoRA on the head, for one), or a forward was replaced.
        ValueError: the statistics disagree with the model's logits, or the model adds a loss of its own or an adapter
            that moves the positions.
    """
    if hasattr(model, "get_base_model"):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError("prompt learning changes the positions that are scored; use LoRA or another adapter")
        model = model.get_base_model()
    head = model.get_output_embeddings()
    if getattr(getattr(head, "forward", None), "__func__", None) is _head_forward:
        return
    if type(head) is not nn.Linear:
        raise TypeError(
            f"the output head is a {type(head).__name__}, not a plain nn.Linear; "
            "adapters on the head are not supported: leave it out of target_modules and modules_to_save"
        )
    for module in (model, head):
        if getattr(module.forward, "__func__", None) is not type(module).forward:
            raise TypeError(
                f"the forward of this {type(module).__name__} was replaced, by a patch or by a device_map over "
                "several devices; load the model unpatched and on one device"
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


# Pickle looks a bound method up by this name: a model that comes back from one has its class's own forward.
_model_forward.__name__ = _head_forward.__name__ = "forward"


@torch.no_grad()
def _compare_with_logits(model):
    parameter = model.get_output_embeddings().weight
    if parameter.is_meta or parameter.numel() == 0:
        return  # this rank holds no weights before the model is wrapped (FSDP, ZeRO-3); one that does compares
    length = 8
    ids = torch.arange(1, length + 1, device=parameter.device)[None] % parameter.shape[0]
    mask = torch.ones_like(ids)
    index = torch.arange(length - 1, device=ids.device)
    with evaluating(model):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, :-1]
        found = model(input_ids=ids, attention_mask=mask, target_index=index, target_ids=ids[0, 1:])
    expected = F.token_stats(logits, ids[0, 1:])
    # A few roundings of a logit to its dtype: of the product, and of each step of a soft cap.
    allowed = 4 * torch.finfo(logits.dtype).eps * logits.abs().max().item() + 1e-5
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


def load_model(model, init_kwargs=None):
    """A model as it is, or ``AutoModelForCausalLM.from_pretrained`` of a name or folder.

    In float32 unless init_kwargs has a dtype: the checkpoint's own is mostly bfloat16, whose resolution loses updates
    as small as preference tuning's.
    """
    if not isinstance(model, str | Path):
        return unprepared(model)
    kwargs = init_kwargs or {}
    if not {"dtype", "torch_dtype"} & kwargs.keys():
        kwargs = kwargs | {"dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(model, **kwargs)


def unprepared(model):
    """The model without what an accelerator that prepared it before has left on it: wrapper, autocast, mark."""
    model = extract_model_from_parallel(model)
    if "_original_forward" in vars(model):
        model.forward = vars(model).pop("_original_forward")
    vars(model).pop("_is_accelerate_prepared", None)
    return model


def add_adapter(model, peft_config):
    """The model wrapped as a ``PeftModel``. Raises ImportError without peft, ValueError for a second adapter."""
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ImportError("peft_config needs the package peft; run: pip install 'mallowspo[peft]'") from error
    if hasattr(model, "get_base_model"):
        raise ValueError("model already has an adapter; pass either a PeftModel or peft_config, not both")
    return get_peft_model(model, peft_config)


def disable_dropout(model):
    """Sets every dropout probability to 0: of ``nn.Dropout`` modules and of layers that apply it themselves."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(module, nn.Dropout))):
                setattr(module, name, 0.0)


@contextmanager
def evaluating(model):
    """The model in evaluation mode for a while; then each module in its own, which DDP's may differ from."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def whole(model):
    """The model, if this rank holds all its weights; ValueError otherwise."""
    if any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "the reference needs whole weights on every rank before training: with FSDP set "
            "fsdp_cpu_ram_efficient_loading to false; with ZeRO-3 use a PEFT model, and a number for dispersion_scale "
            "or a measured dispersion"
        )
    return model
