"""Who orders the pairs that a policy sampled: gold for a few of them, a discriminator (D2PO) for the others.

The discriminator is a Bradley-Terry reward model apart from the policy: scores linear in the sentence embeddings of
all-MiniLM-L6-v2, with a ridge penalty, refitted from nothing to all gold pairs so far. What one prefix teaches counts
for every other; with few labels a linear fit is convex, needs no schedule and has nothing to restore but those labels.
"""

from typing import NamedTuple

import numpy as np
import preferences
import torch

import mallowspo.functional as F


class Pair(NamedTuple):
    """Two completions of a prefix, as of ``sampling.sample``, and their gold rewards."""

    prefix: str
    completions: tuple
    rewards: tuple


def sampled_pairs(prefixes, completions, rewards):
    """Pairs of neighbours among each prefix's completions, those left out of which one says nothing."""
    return [
        Pair(prefix, tuple(group[k : k + 2]), tuple(values[k : k + 2]))
        for prefix, group, values in zip(prefixes, completions, rewards, strict=True)
        for k in range(0, len(group) - 1, 2)
        if all(c["text"].strip() for c in group[k : k + 2])
    ]


def gold_labels(pairs, min_gap):
    """[N] int: 1 where the first is better, -1 where the second is, 0 for a tie: no more than min_gap apart."""
    gaps = np.array([first - second for first, second in (pair.rewards for pair in pairs)])
    return np.where(np.abs(gaps) > min_gap, np.sign(gaps), 0).astype(int)


def query(gaps, number, uncertain, generator):
    """[N] bool: the ``number`` pairs to ask gold for, those of the smallest |gap| or any; chance decides equal ones.

    Raises:
        ValueError: number is more than there are pairs.
    """
    if number > len(gaps):
        raise ValueError(f"gold={number} labels were to be asked for, but only {len(gaps)} pairs have two texts")
    chance = generator.random(len(gaps))
    order = np.lexsort((chance, np.abs(gaps))) if uncertain else np.argsort(chance)
    asked = np.zeros(len(gaps), dtype=bool)
    asked[order[:number]] = True
    return asked


@torch.no_grad()
def feature_gaps(features, pairs):
    """[N, D]: features of the first text minus those of the second, prefix and completion together."""
    texts = [pair.prefix + c["text"] for pair in pairs for c in pair.completions]
    found = features(texts)
    return found[::2] - found[1::2]


def fit(differences, penalty):
    """[D] weights of the scores.

    Args:
        differences: [G, D] features of the better text minus those of the worse; with G = 0 the weights are 0.
        penalty: > 0, of half the squared weights, beside the mean loss of a pair.
    """
    weights = torch.zeros(differences.shape[1], dtype=torch.float64, requires_grad=True)
    if len(differences):
        optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            margins = differences.double() @ weights
            losses = F.preference_loss(margins, torch.zeros_like(margins), link="bradley-terry", beta=1.0).losses
            loss = losses.mean() + penalty / 2 * weights.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return weights.detach()


def label(pairs, features, known, *, gold, uncertain, silver, penalty, min_gap, seed):
    """One round: query, refit, order the rest.

    Args:
        pairs: of :func:`sampled_pairs`. features: a function from texts to [N, D].
        known: [G, D] feature differences of the gold pairs of the rounds before.
        gold: labels to ask for; None: of every pair. silver: whether the discriminator orders the others.

    Returns:
        (labels [N] as of :func:`gold_labels`, 0 where a pair is left out; known with this round's; what happened:
        ``pairs``, ``asked``, ``ties`` among those, ``silver``, and of the silver labels that are no gold ties
        ``judged`` and ``right``: the recipe's own gold tells, the methods do not see it).

    Raises:
        ValueError: of :func:`query`.
    """
    truth, gaps = gold_labels(pairs, min_gap), feature_gaps(features, pairs)
    before = (gaps.double() @ fit(known, penalty)).numpy()
    asked = query(before, len(pairs) if gold is None else gold, uncertain, np.random.default_rng(seed))
    new = torch.from_numpy(truth[asked & (truth != 0)])[:, None] * gaps[torch.from_numpy(asked & (truth != 0))]
    known = torch.cat([known, new])
    labels = np.where(asked, truth, 0)
    if silver:
        after = np.sign((gaps.double() @ fit(known, penalty)).numpy()).astype(int)
        labels = np.where(asked, truth, after)
    judged = ~asked & (labels != 0) & (truth != 0)
    counts = {
        "pairs": len(pairs),
        "asked": asked.sum(),
        "ties": (asked & (truth == 0)).sum(),
        "silver": (~asked & (labels != 0)).sum(),
        "judged": judged.sum(),
        "right": (judged & (labels == truth)).sum(),
    }
    return labels, known, {name: int(count) for name, count in counts.items()}


def rows_of(pairs, labels, eos_token):
    """Rows to train on, as of ``preferences.make_pairs``, with labels in place of the rewards.

    Raises:
        ValueError: no pair is left.
    """
    groups = [list(pair.completions) for pair in pairs]
    rewards = [[float(value), 0.0] for value in labels]
    rows, _ = preferences.make_pairs([pair.prefix for pair in pairs], groups, rewards, eos_token, 0.5)
    return rows
