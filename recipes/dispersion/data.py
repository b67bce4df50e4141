"""Pairs of review sentences, and the real share of raters who prefer one of two."""

from collections import defaultdict

import numpy as np

from mallowspo.dispersion import agreement_to_neg_log_dispersion

LEAST_AGREEMENT = 0.505  # of a pair that splits its raters evenly: at 1/2 its weight would be 0


def win_shares(first, second):
    """Over all pairs of a rater of one sentence and a rater of another: the shares that (prefer the first, tie)."""
    difference = np.subtract.outer(np.asarray(first), np.asarray(second))
    return float((difference > 0).mean()), float((difference == 0).mean())


def preference_share(first, second):
    """P(a rater's score of the first > a rater's score of the second), ties counting half; all pairs of raters."""
    win, tie = win_shares(first, second)
    return win + tie / 2


def real_dispersion(share):
    """Neg-log dispersion [n] of shares [n] who prefer the first of two, by the theta link one rank apart."""
    agreement = np.maximum(0.5 + np.abs(np.asarray(share) - 0.5), LEAST_AGREEMENT)
    return agreement_to_neg_log_dispersion(agreement, "mallows-theta")


def draw_pairs(sentences, pairs_per_domain, seed):
    """Disjoint pairs within each domain: no sentence is in two, so that pairs are independent.

    Args:
        sentences: of :func:`reviews.read_sentences`.
        pairs_per_domain: >= 1. seed: draws the sentences; more pairs with the same seed contain fewer.

    Returns:
        list of (Sentence, Sentence), domain by domain. Raises ValueError where a domain has too few sentences.
    """
    if pairs_per_domain < 1:
        raise ValueError(f"pairs_per_domain must be at least 1, got {pairs_per_domain}")
    pairs = []
    for domain, pool in sentences.items():
        if len(pool) < 2 * pairs_per_domain:
            raise ValueError(f"{domain} has {len(pool)} sentences, too few for {pairs_per_domain} disjoint pairs")
        order = np.random.default_rng(seed).permutation(len(pool))[: 2 * pairs_per_domain]
        pairs += [(pool[a], pool[b]) for a, b in order.reshape(-1, 2)]
    return pairs


def by_domain(domains):
    """{domain: indices} of a list of domain names."""
    rows = defaultdict(list)
    for i, domain in enumerate(domains):
        rows[domain].append(i)
    return {domain: np.array(indices) for domain, indices in rows.items()}
