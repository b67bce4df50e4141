"""Output heads that give token statistics from inside their own forward.

A head is an ``nn.Linear``, one under peft's LoRA, or one of which peft trains a copy (``modules_to_save``). Whoever
shards a model (FSDP, ZeRO-3) brings weights back only around the call of the module that owns them. So each is called
as a module, and LoRA's ``lora_B`` calls the frozen layer within its own forward: both weights are there at once.
"""

import functools
import types

import torch
from torch import nn
from transformers.utils import is_peft_available

from mallowspo import functional as F

if is_peft_available():
    from peft.tuners.lora import Linear as LoraLinear
    from peft.utils import ModulesToSaveWrapper
else:
    LoraLinear = ModulesToSaveWrapper = ()


def head_modules(head):
    """[(module, the forward it is to learn)] of an output head; TypeError for a head that is not known here."""
    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:  # FSDP2's subclasses too
        return [(head, _linear_forward)]
    if isinstance(head, ModulesToSaveWrapper):
        return [pair for copy in (head.original_module, *head.modules_to_save.values()) for pair in head_modules(copy)]
    if isinstance(head, LoraLinear) and type(head).forward is LoraLinear.forward:
        if head.lora_variant:
            variant = type(next(iter(head.lora_variant.values()))).__name__
            raise TypeError(f"the adapter on the output head is a {variant}, not plain LoRA: leave the head out of it")
        ups = [(up, _up_forward) for up in head.lora_B.values()]
        return [(head, _lora_forward), *head_modules(head.base_layer), *ups]
    raise TypeError(
        f"the output head is a {type(head).__name__}, not an nn.Linear, nor one under LoRA or modules_to_save: leave "
        "the head out of quantisation, of other adapters and of trainable_token_indices"
    )


def knows(module, forward):
    """Whether the module has learned this forward."""
    return getattr(module.forward, "__func__", None) is forward


def learn(module, forward, settings):
    """Gives the module its further forward; settings: softcap and temperature of ``linear_token_stats``."""
    module.mallowspo_settings = settings
    # Bound methods, not closures: deepcopy rebinds them to the copy, and accelerate can wrap and unwrap them.
    module.forward = types.MethodType(forward, module)


def _linear_forward(self, hidden, target_ids=None, sharpness=1.0, low_ranks=()):
    """TokenStats of target_ids [N] from hidden [N, D], of the distribution p^sharpness; low_ranks: (down [N, r],
    up [V, r], bias [V] or None) each."""
    if target_ids is None:
        return type(self).forward(self, hidden)
    if type(self.weight) not in (nn.Parameter, torch.Tensor):
        raise TypeError(
            f"the output head's weight is a {type(self.weight).__name__}: leave the head out of tensor parallelism "
            "and of quantisation"
        )
    biases = [bias for bias in (self.bias, *(bias for *_, bias in low_ranks)) if bias is not None]
    low_rank = None
    if low_ranks:  # in the dtype of the logits, which peft casts to as well
        down, up = (torch.cat(factors, dim=1).to(hidden.dtype) for factors in list(zip(*low_ranks, strict=True))[:2])
        low_rank = down, up
    bias = functools.reduce(torch.add, biases).to(hidden.dtype) if biases else None
    settings = self.mallowspo_settings
    settings = settings | {"temperature": settings["temperature"] / sharpness}
    return F.linear_token_stats(hidden, self.weight, target_ids, bias=bias, low_rank=low_rank, **settings)


def _lora_forward(self, hidden, target_ids=None, **kwargs):
    if target_ids is None:
        return type(self).forward(self, hidden, **kwargs)
    if self.disable_adapters or self.merged:
        return type(self).forward(self, hidden, target_ids=target_ids, **kwargs)
    call = functools.partial(self.base_layer, hidden, target_ids=target_ids, **kwargs)
    for name in self.active_adapters:
        if name not in self.lora_A:
            continue
        if not hasattr(self.lora_B[name], "mallowspo_settings"):
            raise ValueError(f"the adapter {name!r} came after attach_token_stats; call it again")
        x = self._cast_input_dtype(hidden, self.lora_A[name].weight.dtype)
        down = self.lora_A[name](self.lora_dropout[name](x))
        call = functools.partial(self.lora_B[name], down, call, self.scaling[name])
    return call()


def _up_forward(self, down, then=None, scaling=None, low_ranks=()):
    if then is None:
        return type(self).forward(self, down)
    bias = None if self.bias is None else self.bias * scaling
    return then(low_ranks=(*low_ranks, (down * scaling, self.weight, bias)))


# Pickle looks a bound method up by this name: a model that comes back from one has its class's own forward.
_linear_forward.__name__ = _lora_forward.__name__ = _up_forward.__name__ = "forward"
