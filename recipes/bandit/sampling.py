"""Rankings from Mallows models, exactly: P(ranking) proportional to phi^distance(ranking, central ranking).

Items are numbered by their place in the central ranking, 0 the best. A ranking is the vector of the items' places,
so ``places[i] < places[j]`` says that i is preferred to j. C contexts, K items, n rankings a context.
"""

import itertools
import math

import torch

import mallowspo.functional as F

MOST_ENUMERATED = 8  # 8! = 40,320 rankings
DISTANCES = ("kendall", "spearman")


def all_rankings(num_items):
    """Every ranking: [K!, K] int64 places. Raises ValueError above MOST_ENUMERATED items."""
    if num_items > MOST_ENUMERATED:
        raise ValueError(f"{num_items}! rankings are too many to enumerate; take at most {MOST_ENUMERATED} items")
    return torch.tensor(list(itertools.permutations(range(num_items))))


def distance(places, kind):
    """Of rankings [..., K] to the central one: Kendall's tau (discordant pairs) or Spearman's rho (squared places)."""
    if kind == "kendall":
        earlier, later = torch.triu_indices(places.shape[-1], places.shape[-1], offset=1)
        return (places[..., earlier] > places[..., later]).sum(-1)
    if kind == "spearman":
        return (places - torch.arange(places.shape[-1])).square().sum(-1)
    raise ValueError(f"unknown distance {kind!r}; choose one of {', '.join(DISTANCES)}")


def probabilities(rankings, neg_log_dispersion, kind):
    """[C, K!] float64 probabilities of all rankings under each dispersion [C]."""
    return (-neg_log_dispersion.double()[:, None] * distance(rankings, kind)).softmax(-1)


def sample_rankings(neg_log_dispersion, num_items, samples, kind, generator):
    """Independent rankings of each context.

    Kendall's tau: repeated insertion (Doignon, Pekec and Regenwetter 2004). Item i enters i + 1 places, v of them
    before the last with probability proportional to phi^v. Spearman's rho has no such sampler: enumeration.

    Args:
        neg_log_dispersion: [C] floats, a = -log phi > 0.

    Returns:
        [C, n, K] int64 places. Raises ValueError for an unknown kind, or too many items to enumerate.
    """
    contexts = len(neg_log_dispersion)
    if kind != "kendall":
        rankings = all_rankings(num_items)
        chances = probabilities(rankings, neg_log_dispersion, kind)
        return rankings[torch.multinomial(chances, samples, replacement=True, generator=generator)]
    places = torch.empty(contexts, samples, num_items, dtype=torch.int64)
    for item in range(num_items):
        chances = (-neg_log_dispersion.double()[:, None] * torch.arange(item + 1)).softmax(-1)
        place = item - torch.multinomial(chances, samples, replacement=True, generator=generator)
        before = places[..., :item]
        before += before >= place[..., None]
        places[..., item] = place
    return places


def top_choice_probabilities(neg_log_dispersion, num_items, kind):
    """[C, K] float64: the share of rankings that put each item first."""
    if kind == "kendall":  # item r gets there by r adjacent swaps
        return (-neg_log_dispersion.double()[:, None] * torch.arange(num_items)).softmax(-1)
    rankings = all_rankings(num_items)
    return probabilities(rankings, neg_log_dispersion, kind) @ (rankings == 0).double()


def pairwise_probabilities(neg_log_dispersion, num_items, kind):
    """[C, K, K] float64: the share of rankings that prefer i to j, 1/2 on the diagonal.

    Kendall's tau: the phi link at the difference of the central places, without smoothing, which is exact there.
    """
    if kind == "kendall":
        item = torch.arange(num_items, dtype=torch.float64)
        gap = (item - item[:, None]).expand(len(neg_log_dispersion), -1, -1)
        return F.mallows_log_prob(gap, neg_log_dispersion.double()[:, None, None], smoothing=0.0).exp()
    rankings = all_rankings(num_items)
    chances = probabilities(rankings, neg_log_dispersion, kind)
    result = torch.full((len(chances), num_items, num_items), 0.5, dtype=torch.float64)
    for i, j in itertools.permutations(range(num_items), 2):
        result[:, i, j] = chances @ (rankings[:, i] < rankings[:, j]).double()
    return result


def sample_preferences(neg_log_dispersion, num_items, samples, kind, generator):
    """How often i was preferred to j in each context, each time by a fresh ranking asked about one random pair.

    Returns:
        [C, K, K] int64 counts that sum to ``samples`` in each context.
    """
    places = sample_rankings(neg_log_dispersion, num_items, samples, kind, generator)
    pairs = torch.combinations(torch.arange(num_items))
    asked = pairs[torch.randint(len(pairs), places.shape[:2], generator=generator)]
    first_wins = places.gather(-1, asked).diff(dim=-1).squeeze(-1) > 0
    winner = torch.where(first_wins, asked[..., 0], asked[..., 1])
    loser = asked.sum(-1) - winner
    counts = torch.zeros(len(places), num_items * num_items, dtype=torch.int64)
    counts.scatter_add_(1, winner * num_items + loser, torch.ones_like(winner))
    return counts.view(-1, num_items, num_items)


def sample_reference(neg_log_dispersion, num_items, samples, prior, kind, generator):
    """A supervised model of each context's first choices: their shares among sampled rankings, smoothed.

    Its entropy over log K is the paper's dispersion index of a bandit.

    Args:
        prior: > 0, pseudo-observations of each item: no action has probability 0.

    Returns:
        [C, K] float64 probabilities.
    """
    if not 0 < prior < math.inf:
        raise ValueError(f"prior must be finite and positive, got {prior}: an unseen action would have probability 0")
    places = sample_rankings(neg_log_dispersion, num_items, samples, kind, generator)
    counts = (places == 0).sum(1).double() + prior
    return counts / counts.sum(-1, keepdim=True)
