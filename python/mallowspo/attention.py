"""Prompt sharing: several responses behind one encoding of their prompt, in a batch without padding.

A batch is one row of tokens: for each prompt its tokens, then those of each response. A response attends to its prompt
and to itself; its positions continue the prompt's. Every token is encoded once and none is a pad token, so the result
is that of the separate sequences, for less, unless the longest of them changes the RoPE of all, against which
`mallowspo.modeling.check_rope` guards. `mallowspo.collator.pack` lays batches out like this; its `segments` are, for
each prompt, its length and those of its responses.

The layers find a `Packed` among the keyword arguments of their model's forward. Under the name in `ATTENTION`,
transformers knows an attention function that attends to each sequence by itself with torch's SDPA: no mask over the
whole batch exists. A model loaded with "flex_attention" gets the same pattern as a block mask, for GPUs.
"""

from functools import partial
from itertools import islice

import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "mallowspo"  # the name of the attention below among those of transformers

# Of what cuts a batch to its own lengths, torch.compile would make code for every batch again; what it calls, unless
# that is marked too, may be compiled.
untraced = partial(torch.compiler.disable, recursive=False)


class CannotShare(RuntimeError):
    """The layers of a model keep a `Packed` from their attention, or have masks of their own."""


class Packed:
    """The segments of a batch, and the masks that the first layer makes for all.

    No container: FSDP would copy one for every layer, and torch.compile would make code for its contents.
    """

    def __init__(self, segments):
        self.segments, self.masks = segments, {}


@torch.compiler.disable
def _attention(module, query, key, value, attention_mask, packed=None, **kwargs):
    """SDPA of each sequence of a packed batch [1, heads, T, head size]; of any other batch as it was meant."""
    if packed is None:
        if _is_unread(attention_mask):
            raise CannotShare(f"hand nothing on to their {type(module).__name__}")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if not _is_unread(attention_mask):
        raise CannotShare(f"make a mask of their own for their {type(module).__name__}")
    # The first response follows its prompt, so the two are an ordinary causal sequence.
    lengths = [n for prompt, (first, *others) in packed.segments for n in (prompt + first, *others)]
    pieces = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = []
    for prompt, responses in packed.segments:
        q, k, v = next(pieces)
        outputs.append(sdpa_attention_forward(module, q, k, v, None, **kwargs)[0])
        prompt_k, prompt_v = k[:, :, :prompt], v[:, :, :prompt]
        for q, k, v in islice(pieces, len(responses) - 1):
            k, v = torch.cat([prompt_k, k], dim=2), torch.cat([prompt_v, v], dim=2)
            outputs.append(_continuation(q, k, v, prompt, packed.masks, **kwargs))
    return torch.cat(outputs, dim=1), None


def _continuation(query, key, value, prompt, masks, dropout=0.0, scaling=None, **_):
    """SDPA [1, R, heads, head size] of a response's queries to the keys of its prompt and its own.

    Query heads that share a key head are a batch with the same keys, none of which is repeated.
    """
    length, shared, device = query.shape[2], query.shape[1] // key.shape[1], query.device.type
    if torch.is_autocast_enabled(device):  # SDPA would cast, and keep, every layer's mask and all shared keys
        query, key, value = (states.to(torch.get_autocast_dtype(device)) for states in (query, key, value))
    name = length, prompt, query.dtype  # one mask for all layers, which would each keep its own for the backward
    if name not in masks:
        width = prompt + length  # with strides not of whole eights, memory-efficient SDPA would copy it in every layer
        masks[name] = query.new_full((length, width + -width % 8), -torch.inf).triu(prompt + 1)[:, :width]
    query = query.unflatten(1, (-1, shared))[0].transpose(0, 1)
    key, value = key.expand(shared, -1, -1, -1), value.expand(shared, -1, -1, -1)
    output = scaled_dot_product_attention(query, key, value, masks[name], dropout_p=dropout, scale=scaling)
    return output.permute(2, 1, 0, 3).flatten(1, 2)[None]


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@untraced
def packed_inputs(config, input_ids, segments):
    """The keyword arguments by which the layers of a model learn who attends to whom in a packed batch."""
    if config._attn_implementation == "flex_attention":
        return {"attention_mask": block_mask(segments, input_ids.device)}
    # A mask of four dimensions is handed to the layers as it is: none is built, and none is read.
    unread = input_ids.new_ones(1, 1, 1, 1, dtype=torch.int64)
    return {"attention_mask": unread, "packed": Packed(segments)}


def _is_unread(mask):
    """Whether a mask is that of :func:`packed_inputs`: the ones that are read hold booleans or floats."""
    return mask is not None and mask.dtype == torch.int64


@untraced
def block_mask(segments, device):
    """FlexAttention's BlockMask over the tokens of a packed batch."""
    lengths = torch.tensor([n for prompt, responses in segments for n in (prompt, *responses)])
    prompts = torch.tensor([i for i, (_, responses) in enumerate(segments) for _ in range(1 + len(responses))])
    is_prompt = torch.tensor([i == 0 for _, responses in segments for i in range(1 + len(responses))])
    own = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
    prompts, is_prompt = prompts.to(device), is_prompt.to(device)

    def mask(batch, head, q, kv):
        same_prompt = prompts[own[q]] == prompts[own[kv]]
        return (q >= kv) & same_prompt & (is_prompt[own[kv]] | (own[q] == own[kv]))

    size = len(own)
    create = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask  # else [size, size] bool
    return create(mask, None, None, size, size, device=device)
