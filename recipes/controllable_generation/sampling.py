"""Completions drawn from a language model, with their exact log-probabilities; supervised tuning of the reference."""

import random

import torch
from tqdm.auto import tqdm

from mallowspo import functional as F
from mallowspo.collator import pad
from mallowspo.modeling import attach_token_stats, evaluating, sequence_stats

# Prompt and completion as they are, with no words around them; the trainer adds nothing to a conversation.
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def encode(tokenizer, texts):
    """Token ids of each text, nothing added. Raises ValueError for a text without a token."""
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    for text, tokens in zip(texts, ids, strict=True):
        if not tokens:
            raise ValueError(f"the text {text!r} has no tokens to begin with")
    return ids


@torch.no_grad()
def sample(model, tokenizer, prefixes, num_samples, max_new_tokens, seed):
    """Draws completions at temperature 1 from the whole distribution: what is drawn is what the model says.

    A draw is the first arrival of a race whose exponential clocks depend on the seed alone, so two models that are
    close draw the same tokens mostly: comparing them with the same seed takes much of the noise away.

    Args:
        model: a causal LM. prefixes: P texts, none empty. num_samples: K, completions of each prefix.
        max_new_tokens: the longest completion in tokens, EOS included.

    Returns:
        P lists of K dicts: ``ids`` (tokens, with EOS if drawn), ``text`` (without), ``logp`` (of ids, nats, summed),
        ``finished`` (EOS was drawn).
    """
    prompts = [ids for ids in encode(tokenizer, prefixes) for _ in range(num_samples)]
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    inputs, mask = batch["input_ids"], batch["attention_mask"]
    generator = torch.Generator(model.device).manual_seed(seed)
    alive = torch.ones(len(prompts), dtype=torch.bool, device=model.device)
    logps = torch.zeros(len(prompts), device=model.device)
    lengths, drawn, cache = torch.zeros_like(logps, dtype=torch.int64), [], None
    with evaluating(model):
        for _ in tqdm(range(max_new_tokens), desc="tokens", leave=False):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
            output = model(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, logits = output.past_key_values, output.logits[:, -1].float()
            inputs = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            logps += alive * F.token_stats(logits, inputs[:, 0]).logps
            lengths += alive
            drawn.append(inputs)
            alive &= inputs[:, 0] != tokenizer.eos_token_id
            mask = torch.cat([mask, torch.ones_like(inputs)], 1)
            if not alive.any():
                break
    rows = [
        {"ids": ids[:length], "text": _text(tokenizer, ids[:length]), "logp": logp, "finished": not unfinished}
        for ids, length, logp, unfinished in zip(
            torch.cat(drawn, 1).tolist(), lengths.tolist(), logps.tolist(), alive.tolist(), strict=True
        )
    ]
    return [rows[start : start + num_samples] for start in range(0, len(rows), num_samples)]


def _text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@torch.no_grad()
def log_probs(model, tokenizer, prefixes, completions, batch_size):
    """Summed log-probability (nats) of each prefix's completions.

    Args:
        model: one that ``mallowspo.modeling.attach_token_stats`` has seen.
        completions: of :func:`sample`, P lists of K.

    Returns:
        P lists of K floats.
    """
    prompts = [ids for ids in encode(tokenizer, prefixes) for _ in completions[0]]
    responses = [(completion["ids"],) for group in completions for completion in group]
    found = []
    with evaluating(model):
        for start in tqdm(range(0, len(prompts), batch_size), desc="log-probabilities", leave=False):
            rows = slice(start, start + batch_size)
            batch = pad(prompts[rows], responses[rows], tokenizer.pad_token_id)
            found += sequence_stats(model, {k: v.to(model.device) for k, v in batch.items()}).logps.tolist()
    size = len(completions[0])
    return [found[start : start + size] for start in range(0, len(found), size)]


def tune(model, tokenizer, texts, learning_rate, batch_size, max_length, seed):
    """One epoch of next-token prediction: the model writes texts of this kind and ends them; AdamW, linear decay.

    Args:
        model: a causal LM or a PeftModel, trained in place. texts: each is followed by EOS.
        max_length: of a text, in tokens.

    Returns:
        mean loss (nats a token) of the first and of the last tenth of the steps.
    """
    attach_token_stats(model)
    rows = [[*ids, tokenizer.eos_token_id][:max_length] for ids in encode(tokenizer, texts)]
    random.Random(seed).shuffle(rows)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    losses = []
    for group in tqdm(batches, desc="reference"):
        batch = pad([ids[:1] for ids in group], [(ids[1:],) for ids in group], tokenizer.pad_token_id)
        batch = {name: value.to(model.device) for name, value in batch.items()}
        loss = -sequence_stats(model, batch).logps.sum() / batch["num_tokens"].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        losses.append(loss.item())
    tenth = max(1, len(losses) // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
