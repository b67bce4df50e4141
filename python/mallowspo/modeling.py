"""Token statistics of a Hugging Face causal language model without its logits.

The model's own ``forward`` and its head's own ``forward`` learn one more way to be called, so whatever wraps the model
(DDP, FSDP, ZeRO, autocast, gradient checkpointing, PEFT) sees an ordinary forward pass and an ordinary head call. Only
the hidden states of the positions that predict a completion token reach the head.
"""

import functools
import inspect
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device
from torch import nn
from transformers import AutoModelForCausalLM

from mallowspo import functional as F
from mallowspo.attention import ATTENTION, CannotShare, packed_inputs, untraced
from mallowspo.collator import pack, pad
from mallowspo.heads import head_modules, knows, learn
from mallowspo.token_weights import response_sums

# What a causal LM may do to its logits after the head, by the name of its config field.
_SOFTCAP = "final_logit_softcapping"
_MULTIPLIER = "logit_scale"
_DIVISOR = "logits_scaling"

# Layers that carry a state from token to token, by what transformers calls them in config.layer_types.
_STATEFUL = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}


class SequenceStats(NamedTuple):
    """Of R sequences, [R]: log-probability of the completion, summed, and mean entropy (nats) of its tokens."""

    logps: torch.Tensor
    entropy: torch.Tensor


class ResponseStats(NamedTuple):
    """SequenceStats and the log-probability of each scored token, [N]: None where only the sums were kept; and the sum
    over the completion's tokens of log sum_v p_v^2, [R], what WPO aligns to: None unless it was asked for."""

    logps: torch.Tensor
    entropy: torch.Tensor
    token_logps: torch.Tensor | None = None
    alignment: torch.Tensor | None = None


def attach_token_stats(model):
    """Teaches a causal LM to return ``TokenStats`` when it is called with ``target_index`` and ``target_ids``.

    ``model(input_ids, attention_mask, target_index=..., target_ids=...)`` returns the statistics of the tokens
    ``target_ids`` [N] as predicted from the flat positions ``target_index`` [N] of [R, T]; with ``aligned=True`` also
    log sum_v p_v^2 [N], not differentiated, for one more product. Any other call is the model's own. A short forward
    pass compares the two ways, so that a model whose head does more than is known here is refused instead of trained
    wrongly. Attaching twice is harmless. Of a ``PeftModel`` it is the base that is taught.

    Raises:
        TypeError: the head is not one that :mod:`mallowspo.heads` knows, or a forward was replaced.
        ValueError: the statistics disagree with the model's logits, or the model looks at later tokens, has an encoder
            besides, adds a loss of its own or an adapter that moves the positions.
    """
    name = "model"
    if hasattr(model, "get_base_model"):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError("prompt learning changes the positions that are scored; use LoRA or another adapter")
        model, name = model.get_base_model(), "model.get_base_model()"
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; use a causal language model")
    head = model.get_output_embeddings()
    lessons = [(module, forward) for module, forward in head_modules(head) if not knows(module, forward)]
    if not lessons:
        return
    if not knows(model, _forward_of(type(model))):
        lessons.append((model, _forward_of(type(model))))
    for module, _ in lessons:
        if not knows(module, type(module).forward):
            hint = f", or `del {name}.forward` if a trainer of TRL left one on it" if "forward" in vars(module) else ""
            raise TypeError(
                f"the forward of this {type(module).__name__} was replaced, by a patch or by a device_map over "
                f"several devices; load the model unpatched and on one device{hint}"
            )
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "output_router_logits adds a router loss that the preference loss leaves out: set it to False"
        )
    settings = {
        "softcap": getattr(config, _SOFTCAP, None),
        "temperature": (getattr(config, _DIVISOR, None) or 1.0) / (getattr(config, _MULTIPLIER, None) or 1.0),
    }
    for module, forward in lessons:
        learn(module, forward, settings)
    try:
        _compare_with_logits(model)
    except Exception:
        for module, _ in lessons:
            del module.forward
        raise


@functools.cache
def _forward_of(model_class):
    """:func:`_model_forward` with the class's own signature, where ``generate`` reads whether to pass positions."""

    def forward(self, *args, **kwargs):  # pickle looks it up by this name: what comes back has the class's own
        return _model_forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(model_class.forward)
    return forward


@untraced
def _model_forward(self, *args, target_index=None, target_ids=None, aligned=False, **kwargs):
    if target_ids is None:
        return type(self).forward(self, *args, **kwargs)
    hidden, head = _hidden_states(self, target_index, *args, **kwargs), self.get_output_embeddings()
    return _stats(head, hidden, target_ids, aligned)


@torch.compiler.disable
def _stats(head, hidden, target_ids, aligned):
    stats = head(hidden, target_ids=target_ids)
    if not aligned:
        return stats
    with torch.no_grad():  # q = p^2 / sum_v p_v^2 is the distribution at half the temperature
        sharp_logps = head(hidden, target_ids=target_ids, sharpness=2.0).logps
        return *stats, 2 * stats.logps - sharp_logps


@untraced
def _hidden_states(model, target_index, *args, segments=None, **kwargs):
    """Last hidden states [N, D] of the positions to score."""
    inputs = {name: value for name, value in kwargs.items() if value is not None}  # PEFT fills in what was not given
    if segments is not None:
        inputs |= packed_inputs(model.config.get_text_config(), inputs["input_ids"], segments)
    decoder = model.get_decoder()
    if decoder is model or decoder is model.get_output_embeddings():  # of Llama4 and Mllama; of ModernBERT
        decoder = model.model
    output = decoder(*args, **{**inputs, "use_cache": False})
    return output.last_hidden_state.flatten(0, 1)[target_index]


@torch.no_grad()
def _compare_with_logits(model):
    if not _has_weights(model):
        return  # before it is wrapped (FSDP, ZeRO-3); a rank that has them compares
    length = 8
    vocabulary = len(model.get_input_embeddings().weight)
    ids = torch.arange(1, length + 1, device=model.device)
    # The other row differs in its second half alone, not in length: roundings go by the shape.
    ids, others = (row[None] % vocabulary for row in (ids, ids + (ids > length // 2)))
    mask = torch.ones_like(ids)
    index = torch.arange(length - 1, device=ids.device)
    with evaluating(model):
        logits, changed = (
            model(input_ids=row, attention_mask=mask, use_cache=False).logits[0, :-1] for row in (ids, others)
        )
        found = model(input_ids=ids, attention_mask=mask, target_index=index, target_ids=ids[0, 1:])
    if logits.isnan().any():
        raise ValueError(
            f"{type(model).__name__} gives logits that are NaN: a weight is, or a number overflows {logits.dtype}; "
            "look at what trained or saved it"
        )
    # A few roundings of a logit to its dtype: of the product, and of each step of a soft cap.
    allowed = 4 * torch.finfo(logits.dtype).eps * logits.abs().max().item() + 1e-5
    seen = (logits - changed)[: length // 2].abs().max().item()
    if seen > allowed and not getattr(model, "is_quantized", False):  # 8 bits are scaled by the whole batch
        raise ValueError(
            f"{type(model).__name__} looks at later tokens, which change the logits before them by {seen:.3g}: load "
            "it as a decoder (is_decoder=True, causal=True for XLM) or use a causal language model"
        )
    expected = F.token_stats(logits, ids[0, 1:])
    for name, a, b in zip(found._fields, found, expected, strict=True):
        worst = (a - b).abs().max().item()
        if not worst <= allowed:
            raise ValueError(
                f"{type(model).__name__} does something to its logits that is not known here: {name} from the head "
                f"differ from those of the logits by {worst:.3g}; report the model class"
            )


def _has_weights(model):
    # All of them: a head that PEFT copied, to train it, is whole where ZeRO-3 has parted the rest.
    return all(parameter.numel() > 0 and not parameter.is_meta for parameter in model.parameters())


def share_prompts(model, longest):
    """Prepares a model for batches of :func:`mallowspo.collator.pack`.

    Their result on a small batch is compared with that of separate sequences, so that a model that carries anything
    from token to token other than by its attention is found out.

    Args:
        model: a ``PreTrainedModel`` that :func:`attach_token_stats` has seen, or a ``PeftModel`` of one.
        longest: the longest sequence there will be, in tokens; None for no limit.

    Returns:
        None, or a sentence that says why the model cannot take them; it is left as it was then.
    """
    if hasattr(model, "get_base_model"):
        if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in model.peft_config.values()):
            return "an activated LoRA looks for its invocation tokens once in each row"
        model = model.get_base_model()
    name, config = type(model).__name__, model.config.get_text_config()
    implementation = config._attn_implementation
    if not (model._supports_sdpa and model._can_set_attn_implementation()):
        return f"{name} has no attention of its own that could leave a response out"
    if implementation not in ("sdpa", "flex_attention", ATTENTION):
        return f"{name} runs with {implementation!r} attention; load it with attn_implementation='sdpa'"
    for window in ("sliding_window", "attention_chunk_size"):
        width = getattr(config, window, None) if getattr(config, "use_sliding_window", True) else None
        if width is not None and (longest is None or longest > width):
            return f"{name} has a {window} of {width} tokens; set max_length to no more than that"
    if any(field.startswith("index_topk") for field in config.to_dict()):
        return f"{name} chooses the tokens that it attends to"
    # In bfloat16 a weak recurrence may pass the comparison below.
    kinds = getattr(config, "layer_types", None) or ()
    if found := _STATEFUL.intersection(kinds):
        return f"{name} has {min(found)} layers, which carry a state from token to token"
    if model._is_stateful and not kinds:
        return f"{name} carries a state from token to token"
    if getattr(config, "attn_temperature_tuning", False):
        return f"{name} scales its attention by the place of a token in its row"
    if not _has_weights(model):
        return f"the weights of {name} are sharded already, so the two ways cannot be compared"
    try:
        worst, allowed = _packed_difference(model, ATTENTION if implementation == "sdpa" else implementation)
    except CannotShare as error:
        model.set_attn_implementation(implementation)
        return f"the layers of {name} {error}"
    if worst <= allowed:
        return None
    model.set_attn_implementation(implementation)
    return f"{name} encodes a response otherwise where its prompt is shared: its hidden states differ by {worst:.2g}"


def check_rope(model, max_length, pad_to_multiple_of=None):
    """ValueError where a sequence of max_length tokens (None: no limit) may change what is said of those beside it.

    transformers takes the last position of the batch, of a pad token too, for the base of "dynamic" RoPE and to choose
    the short or the long factors of "longrope" (Phi-3, Phi-4-mini).
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if kind not in ("dynamic", "longrope"):
                continue
            if kind == "longrope":
                parameters = module.config.rope_parameters
                limit = parameters.get(layer_type, parameters)["original_max_position_embeddings"]
            else:
                limit = module.original_max_seq_len
            limit -= limit % (pad_to_multiple_of or 1)
            if max_length is None or max_length > limit:
                raise ValueError(
                    f"max_length={max_length}, but a sequence of more than {limit} tokens changes the {kind!r} RoPE "
                    f"of {type(model).__name__} for its whole batch: set max_length to no more than {limit}"
                )


def embedding_tables(model):
    """(class name, tokens, positions) that the model has embeddings for; positions None where it computes them."""
    words = model.get_input_embeddings().weight
    num_tokens = getattr(words, "ds_shape", words.shape)[0]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    others = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)} - {num_tokens}
    is_learned = limit is not None and not others.isdisjoint({limit, limit + 2})  # OPT's has two more
    return type(model).__name__, num_tokens, limit if is_learned else None


def check_embedded(tables, largest_id, longest, data):
    """ValueError where a token id or a position of `data`, so named, lies outside one of the `embedding_tables`."""
    for name, num_tokens, num_positions in tables:
        if largest_id >= num_tokens:
            raise ValueError(
                f"{data} has token id {largest_id}, but {name} has embeddings for {num_tokens} tokens: pass the "
                "model's own tokenizer, or after adding tokens call model.resize_token_embeddings(len(tokenizer))"
            )
        if num_positions is not None and longest > num_positions:
            raise ValueError(
                f"{data} has a sequence of {longest} tokens, but {name} has {num_positions} positions: set max_length "
                "to no more than that"
            )


@torch.no_grad()
def _packed_difference(model, implementation):
    """Largest relative difference that packing makes to the hidden state of a scored position, and what may be.

    The rows are encoded with the attention the model has, the packed batch with `implementation`, which it keeps.
    """
    ids = (torch.arange(32) % len(model.get_input_embeddings().weight)).split([5, 3, 6, 2, 4, 12])
    prompt, *pair, other_prompt, one, two = (part.tolist() for part in ids)
    prompts, responses = (prompt, other_prompt), (pair, (one, two))
    rows, batch = pad(prompts, responses, pad_token_id=0), pack(prompts, responses)
    with evaluating(model):
        padded = _hidden_states(model, **_encoded(send_to_device(rows, model.device)))
        model.set_attn_implementation(implementation)
        packed = _hidden_states(model, **_encoded(send_to_device(batch, model.device)))
    worst = ((packed - padded).double().norm(dim=1) / padded.double().norm(dim=1)).max().item()
    return worst, torch.finfo(packed.dtype).eps ** 0.5  # roundings grow through the layers, mistakes are of order one


def _encoded(batch):
    """What of a collated batch the model encodes."""
    names = ("input_ids", "attention_mask", "position_ids", "segments", "target_index")
    return {name: batch[name] for name in names if name in batch}


def sequence_stats(model, batch):
    """The sums of :func:`response_stats`, SequenceStats [R], float32 (float64 for a float64 model); differentiable."""
    return SequenceStats(*response_stats(model, batch)[:2])


def response_stats(model, batch, aligned=False):
    """Runs the model (wrapped or not) on a collated batch.

    Args:
        model: a model that :func:`attach_token_stats` has seen, and :func:`share_prompts` if the batch is packed.
        batch: of :class:`mallowspo.collator.PreferenceCollator`, R = 2B sequences, or of ``pack`` or ``pad``.
        aligned: whether the result has an alignment.

    Returns:
        ResponseStats, float32 (float64 for a float64 model); differentiable.
    """
    found = model(**_encoded(batch), target_ids=batch["target_ids"], aligned=aligned)
    lengths = batch["num_tokens"]
    logps, entropy, *alignment = (response_sums(values, lengths) for values in found)
    return ResponseStats(logps, entropy / lengths, found[0], *alignment)


def load_model(model, init_kwargs=None):
    """A model as it is, or ``AutoModelForCausalLM.from_pretrained`` of a name or folder.

    In float32 unless init_kwargs has a dtype: the checkpoint's own is mostly bfloat16, whose resolution loses updates
    as small as preference tuning's.

    Raises:
        TypeError: neither a model nor a name.
    """
    if isinstance(model, nn.Module):
        return _passing_gradients(unprepared(model))
    if not isinstance(model, str | Path):
        raise TypeError(f"a model must be a PreTrainedModel, a PeftModel or the name or folder of one, got {model!r}")
    kwargs = init_kwargs or {}
    if not {"dtype", "torch_dtype"} & kwargs.keys():
        kwargs = kwargs | {"dtype": torch.float32}
    return _passing_gradients(AutoModelForCausalLM.from_pretrained(model, **kwargs))


def _passing_gradients(model):
    """The model, whose 4-bit layers bitsandbytes must not repack: on some CPUs it does in the first evaluation, and
    from then on no gradient passes them."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # undoes it where it has happened
    return model


def unprepared(model):
    """The model without what an accelerator that prepared it before has left on it: wrapper, autocast, mark."""
    model = extract_model_from_parallel(model)
    original = vars(model).pop("_original_forward", None)
    if original is not None and "forward" in vars(model):  # unless its user has taken both off
        model.forward = original
    vars(model).pop("_is_accelerate_prepared", None)
    return model


def disable_dropout(model):
    """Sets dropout probabilities to 0: of ``nn.Dropout`` modules and of layers that have their own, not of those that
    read the config in every forward (Falcon's, Persimmon's), which would be saved changed."""
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


def check_apart(name, reference, model):
    """ValueError where a reference would be trained with the model."""
    if set(reference.parameters()) & set(model.parameters()):
        raise ValueError(f"{name} is the model itself or has its weights and would be trained; load it again for this")
