"""Replies of a model: batches padded on the left, plain sampling at a temperature."""

import torch
from tqdm.auto import tqdm

from mallowspo.modeling import evaluating


@torch.inference_mode()
def sample_replies(model, tokenizer, prompts, *, temperature, max_new_tokens, seed, batch_size=32, desc="Sampling"):
    """One reply to each prompt.

    Args:
        model: a causal language model, on its device.
        tokenizer: its tokenizer; without a pad token it pads with EOS.
        prompts: [n] texts, or lists of messages, which the chat template renders.
        temperature: of the softmax, nothing else cut off; 0: the most likely token.
        max_new_tokens: a reply that has not ended by then is cut off.
        seed: of the draws.

    Returns:
        [n] dicts: ``text`` (what follows a text prompt, with the space before it; of a message its content),
        ``tokens`` (their number, the end not counted), ``finished`` (False: cut off).

    Raises:
        ValueError: a temperature below 0.
    """
    if temperature < 0:
        raise ValueError(f"a temperature must be at least 0, got {temperature}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    plain = isinstance(prompts[0], str)
    texts = prompts if plain else tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
    draw = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    replies = [None] * len(texts)
    torch.manual_seed(seed)
    with evaluating(model):
        for start in tqdm(range(0, len(order), batch_size), desc=desc):
            rows = order[start : start + batch_size]
            batch = tokenizer(
                [texts[row] for row in rows],
                padding=True,
                padding_side="left",
                add_special_tokens=plain,  # a chat template writes its own
                return_tensors="pt",
            ).to(model.device)
            found = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **({"do_sample": False} | draw),
            )[:, batch["input_ids"].shape[1] :]
            pads = (~batch["attention_mask"].bool()).sum(1).tolist()
            starts = [ids[pad:] for ids, pad in zip(batch["input_ids"].tolist(), pads, strict=True)]
            for row, start_ids, ids in zip(rows, starts, found.tolist(), strict=True):
                finished = tokenizer.eos_token_id in ids
                ids = ids[: ids.index(tokenizer.eos_token_id)] if finished else ids
                if plain:  # the space between the two belongs to the reply
                    before, after = (
                        tokenizer.decode(start_ids + more, skip_special_tokens=True) for more in ([], ids)
                    )
                    text = after[len(before) :].rstrip()
                else:
                    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                replies[row] = {"text": text, "tokens": len(ids), "finished": finished}
    return replies
