"""``python -m mallowspo.sizing``: the memory a rank needs and the bytes it sends in a step, on paper.

Arithmetic for models built as Llama is; docs/scaling.md has the symbols and where each term is from.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from mallowspo.functional import MEMORY_BUDGET

GPUS = {"80 GB": 72e9, "141 GB": 127e9}  # nine tenths: CUDA's context, NCCL and fragmentation take the rest
NVLINK, PORT = 370e9, 50e9  # bytes/s one way: NVLink 4 as NCCL reaches it, the line rate of a 400 Gb/s port
FLOPS = 0.35 * 989e12  # a second: utilisation times the dense bfloat16 peak of an H100 or H200 SXM
COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # what configs call them


class Model(NamedTuple):
    """A Llama; the default is Llama-3-8B."""

    vocab: int = 128256
    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    mlp: int = 14336
    head_size: int = 128
    tied: bool = False

    @classmethod
    def from_config(cls, path):
        """The model of a config.json, or of the folder that has it.

        Raises:
            FileNotFoundError: there is none. ValueError: no JSON object, a count that is missing or no whole number
                >= 1, or a mixture of experts.
        """
        path = Path(path, "config.json") if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file; give a config.json, or the folder that has it")
        try:
            c = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({error}); give a config.json") from error
        if not isinstance(c, dict):
            raise ValueError(f"{path} must hold a JSON object, not a {type(c).__name__}; give a config.json")
        for name in EXPERTS:
            if c.get(name):
                raise ValueError(
                    f"{path} has {name}={c[name]}, a mixture of experts; give a dense model's config.json"
                )
        optional = [name for name in ("num_key_value_heads", "head_dim") if c.get(name) is not None]
        if wrong := [name for name in (*COUNTS, *optional) if type(c.get(name)) is not int or c[name] < 1]:
            raise ValueError(
                f"{path} has no whole number >= 1 as {', '.join(wrong)}; give the config.json of a Llama-like model"
            )
        vocab, hidden, layers, heads, mlp = (c[name] for name in COUNTS)
        kv_heads, head_size = c.get("num_key_value_heads") or heads, c.get("head_dim") or hidden // heads
        return cls(vocab, hidden, layers, heads, kv_heads, mlp, head_size, c.get("tie_word_embeddings", False))

    def sizes(self, rank=0):
        """(all parameters P, those of a layer, those of the head, those of LoRA on every linear layer but the head)"""
        d, m, q, kv = self.hidden, self.mlp, self.heads * self.head_size, self.kv_heads * self.head_size
        layer, head = 2 * d * (q + kv) + 3 * d * m + 2 * d, self.vocab * d
        adapters = self.layers * rank * (2 * (d + q) + 2 * (d + kv) + 3 * (d + m))
        return self.layers * layer + head * (1 if self.tied else 2) + d, layer, head, adapters


class Batch(NamedTuple):
    """A packed micro-batch of one rank: its pairs, and the tokens of a prompt and of a response."""

    pairs: int = 4
    prompt: int = 1024
    response: int = 512

    scored = property(lambda self: self.pairs * 2 * self.response)
    tokens = property(lambda self: self.pairs * self.prompt + self.scored)
    padded = property(lambda self: self.pairs * 2 * self.prompt + self.scored)  # with the prompt in two rows


def states(model, sharding, n, rank=0):
    """Bytes of weights, gradients and optimiser on a rank. LoRA if rank; sharding None: a process in float32."""
    parameters, layer, head, adapters = model.sizes(rank)
    trained, frozen = (adapters, parameters) if rank else (parameters, 0)
    if sharding is None:
        return 16 * trained + 4 * frozen
    if sharding == "ddp":  # weights 4, gradients 4, buckets 4, moments 8; autocast's copies of what is multiplied 2
        return 20 * trained + 2 * (trained if rank else model.layers * layer + head) + 2 * frozen
    if sharding == "zero2":  # weights 2; sharded: master 4, moments 8, gradients 2 and then 4; a bucket
        return 2 * (trained + frozen) + 18 * trained / n + 2 * min(5e8, trained)
    gathered = head + 2 * layer + (0 if rank else head)  # the head, two layers; what the head's gradient is sent from
    return (16 * trained + 2 * frozen) / n + 2 * gathered  # weights 4, gradients 4, moments 8


def dtypes(sharding, rank):
    """Bytes an element of what is multiplied, and of the residual stream."""
    return (4, 4) if sharding is None else (2, 4) if sharding == "ddp" and not rank else (2, 2)


def saved_by_layer(model, batch, sharding, rank=0):
    """Bytes that a layer saves for the backward pass."""
    (s, residual), d, t = dtypes(sharding, rank), model.hidden, batch.tokens
    q, kv = model.heads * model.head_size, model.kv_heads * model.head_size
    norms = 2 * (4 * d + 4 + (0 if rank else residual * d))  # input; normalised, where the gain is trained
    inputs = s * d * (5 if sharding == "ddp" else 2)  # of q, k, v and of gate, up: autocast casts each its own
    attention = s * (3 * q + 2 * kv) + 4 * model.heads  # q, k, v, the output twice, its log-sum-exp
    each = s * (batch.prompt + batch.response) * 2 * kv  # a second response: k and v again
    return t * (norms + inputs + attention + s * (4 * model.mlp + 7 * rank)) + batch.pairs * each


def activations(model, batch, sharding, rank=0, checkpointing=False, budget=MEMORY_BUDGET["cuda"]):
    """Bytes beyond the states at the peak of a step: saved for the backward pass, and worked in by it."""
    (s, residual), d, t, n = dtypes(sharding, rank), model.hidden, batch.tokens, batch.scored
    layer, head = saved_by_layer(model, batch, sharding, rank), model.sizes()[2]
    end = t * (4 * d + 2 * model.head_size * residual) + n * d * (2 * s + 4)  # last norm, rotary angles; scored states
    end += n * d * s if rank else t * residual * d + head * {None: 4, "ddp": 6}.get(sharding, 2)  # its gradient
    end += min(budget, n * model.vocab * s)
    mask = s * batch.response * (batch.prompt + batch.response)  # of second responses, one for all layers
    work = 2 * s * t * model.mlp  # gradients within an MLP, less what it has freed by then
    if checkpointing:
        return mask + model.layers * residual * t * d + max(end, layer + work)
    return mask + model.layers * layer + max(end, work)


def sent(model, sharding, n, rank=0):
    """Bytes that a rank sends in a step of one micro-batch, by ring collectives."""
    parameters, _, head, adapters = model.sizes(rank)
    trained = adapters if rank else parameters
    if sharding == "ddp":  # all-reduce, float32
        return (n - 1) / n * 2 * 4 * trained
    if sharding == "zero2":  # all-reduce and all-gather, bfloat16
        return (n - 1) / n * (2 + 1) * 2 * trained
    passes = 3 if rank else 2  # forward, backward; LoRA's reference. The head stays from its first one on.
    return (n - 1) / n * 2 * (passes * (parameters + adapters - head) + head + trained)


def flops(model, batch, rank=0, checkpointing=False, reference=False):
    """Of one micro-batch; reference: with a forward pass of it."""
    _, layer, head, _ = model.sizes()
    attended = batch.pairs * (batch.prompt**2 / 2 + 2 * batch.response * (batch.prompt + batch.response / 2))
    layers = model.layers * (2 * layer * batch.tokens + 4 * model.heads * model.head_size * attended)
    products = (2 if rank else 3) + reference  # of scored states and head
    return layers * ((2 if rank else 3) + checkpointing + reference) + products * 2 * head * batch.scored


def report(model, batch, gpus, rank):
    """The tables of docs/scaling.md: GB of 1e9 bytes, seconds."""
    rows = [["GPUs", "sharding", "trains", "states", "peak", "ckpt", *GPUS, "sent", "s fast", "s slow", "s math"]]
    for n, r, sharding in ((n, r, s) for n in gpus for r in (0, rank) for s in ("ddp", "zero2", "fsdp2")):
        held, volume = states(model, sharding, n, r), sent(model, sharding, n, r)
        memory = held, *(held + activations(model, batch, sharding, r, ckpt) for ckpt in (False, True))
        fits = ["yes" if memory[1] < size else "ckpt" if memory[2] < size else "no" for size in GPUS.values()]
        seconds = volume / NVLINK, volume / (PORT if n > 8 else NVLINK), flops(model, batch, r, True, r > 0) / FLOPS
        rows.append([f"{n}", sharding, f"LoRA {r}" if r else "full", *(f"{b / 1e9:.1f}" for b in memory), *fits])
        rows[-1] += [f"{volume / 1e9:.1f}", *(f"{t:.2f}" for t in seconds)]
    again = f"{(flops(model, batch, reference=True) - flops(model, batch)) / FLOPS:.2f}"
    changes = [["instead", "GB more", "s more"]]
    for t, b in (("float32", 4), ("bfloat16", 2)):
        changes.append([f"a live {t} reference, whole on every rank", f"{b * model.sizes()[0] / 1e9:.1f}", again])
    for t, count in (("the scored positions", batch.scored), ("all positions of padded rows", batch.padded)):
        changes.append([f"logits of {t}", f"{10 * model.vocab * count / 1e9:.1f}", "-"])
    tables = ([lines[0], ["---"] * len(lines[0]), *lines[1:]] for lines in (rows, changes))
    return "\n\n".join("\n".join(f"| {' | '.join(line)} |" for line in lines) for lines in tables)


def _count(text):
    """A whole number >= 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m mallowspo.sizing", description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="PATH", help="a config.json, or its folder; default Llama-3-8B")
    parser.add_argument("--gpus", type=_count, nargs="+", default=(8, 64))
    parser.add_argument("--rank", type=_count, default=16, help="of LoRA; full fine-tuning stands beside it")
    for name, default in Batch()._asdict().items():
        parser.add_argument(f"--{name}", type=_count, default=default)
    a = parser.parse_args(arguments)
    try:
        model = Model.from_config(a.model) if a.model else Model()
    except (OSError, ValueError) as error:
        parser.error(f"--model: {error}")
    print(report(model, Batch(a.pairs, a.prompt, a.response), a.gpus, a.rank))


if __name__ == "__main__":
    main()
