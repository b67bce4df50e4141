"""Rewards of completions, and the pairs that they make."""

import math
from collections import Counter

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from models import package_folder


def load_reward(name, label, device="cpu", batch_size=32):
    """A function from a list of texts to a list of rewards.

    Args:
        name: ``vader``, the compound score of vaderSentiment in [-1, 1]; else the hub name or folder of a
            text-classification model, whose reward is the probability of a label.
        label: that label, as the model's config spells it.

    Raises:
        ImportError: vaderSentiment is not installed. ValueError: the model has no such label.
    """
    if name == "vader":
        package_folder("vaderSentiment", "vaderSentiment")
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        analyzer = SentimentIntensityAnalyzer()
        return lambda texts: [analyzer.polarity_scores(text)["compound"] for text in texts]
    model = AutoModelForSequenceClassification.from_pretrained(name).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    if label not in model.config.label2id:
        raise ValueError(f"{name} has no label {label!r}; choose one of {', '.join(model.config.label2id)}")

    @torch.no_grad()
    def probability(texts):
        found = []
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(texts[start : start + batch_size], padding=True, truncation=True, return_tensors="pt")
            logits = model(**batch.to(device)).logits.float()
            found += logits.softmax(-1)[:, model.config.label2id[label]].tolist()
        return found

    return probability


def score(reward, prefixes, completions):
    """The reward of prefix and completion together: P lists of K floats, from the results of ``sampling.sample``.

    Raises:
        ValueError: a reward that is not finite, with its text.
    """
    texts = [prefix + c["text"] for prefix, group in zip(prefixes, completions, strict=True) for c in group]
    values = reward(texts)
    for text, value in zip(texts, values, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"the reward of {text!r} is {value}; it must be a finite number")
    values = iter(values)
    return [[float(next(values)) for _ in group] for group in completions]


def make_pairs(prefixes, completions, rewards, eos_token, min_gap):
    """Pairs of the completions of each prefix: best and worst, second best and second worst, and so on.

    Each completion is in one pair at most. One that says nothing (no visible character) is left out, and so is a pair
    whose rewards are no more than min_gap apart: a tie.

    Returns:
        (rows, dropped): conversational ``prompt``, ``chosen``, ``rejected`` and the two rewards; a dict of counts:
        empty completions, ties, prefixes without a completion, prefixes without a pair.

    Raises:
        ValueError: no pair is left.
    """
    rows, dropped = [], Counter()
    groups = zip(prefixes, completions, rewards, strict=True)
    for prefix, group, values in tqdm(groups, desc="pair", total=len(prefixes), leave=None):
        usable = [(value, c) for value, c in zip(values, group, strict=True) if c["text"].strip()]
        dropped["empty completions"] += len(group) - len(usable)
        dropped["prefixes without a completion"] += not usable
        ranked = sorted(usable, key=lambda item: item[0], reverse=True)
        made = len(rows)
        for k in range(len(ranked) // 2):
            (high, chosen), (low, rejected) = ranked[k], ranked[-1 - k]
            if not high - low > min_gap:
                dropped["ties"] += 1
                continue
            sides = {
                side: [{"role": "assistant", "content": c["text"] + eos_token * c["finished"]}]
                for side, c in (("chosen", chosen), ("rejected", rejected))
            }
            prompt = [{"role": "user", "content": prefix}]
            rows.append({"prompt": prompt, **sides, "chosen_reward": high, "rejected_reward": low})
        dropped["prefixes without a pair"] += made == len(rows)
    if not rows:
        raise ValueError(
            f"no pair is left of {len(prefixes)} prefixes ({_counts(dropped)}); sample more completions, lower "
            "min_gap or use another reward"
        )
    return rows, dict(dropped)


def _counts(dropped):
    return ", ".join(f"{number} {reason}" for reason, number in dropped.items() if number)
