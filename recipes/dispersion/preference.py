"""A linear preference model on frozen sentence features, trained on single votes and judged by raters not seen.

A sentence's log-probability ratio to the reference is w . x, with x the language model's standardised features; the
loss is :func:`mallowspo.functional.preference_loss` plus a ridge penalty. No language model is tuned here.
"""

from typing import NamedTuple

import numpy as np
import torch
from data import by_domain, preference_share, real_dispersion, win_shares
from indices import ASKED, PAPER, agreement_indices

from mallowspo import functional as F
from mallowspo.dispersion import calibrated_scale, fit_log_odds, log_odds_to_neg_log_dispersion

PARTS = {"fit": 0.6, "validation": 0.15, "held out": 0.25}  # of the sentences of each domain
PENALTIES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)
TEMPERATURES = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)  # the scores are multiplied by one
DPO, TRUE = "DPO", "true agreement (seen raters)"
SHUFFLED = "entropy index, shuffled"
FITTED = {PAPER: "entropy index, fitted", ASKED: "asked margin, fitted"}
METHODS = (DPO, PAPER, SHUFFLED, FITTED[PAPER], ASKED, FITTED[ASKED], TRUE)
PEOPLE = "seen raters' own share"
CERTAIN = 0.95  # the most that the seen raters' share is believed


class Votes(NamedTuple):
    """n pairs of one domain each: rows [n, 2], what unseen raters say, and the seen raters' share for the first."""

    rows: np.ndarray
    wins: np.ndarray  # share of the unseen raters' untied votes for the first
    seen_share: np.ndarray
    first_chosen: np.ndarray  # one vote of two seen raters
    tied: np.ndarray  # whether that vote was a tie


def draw_votes(sentences, members, count, seen, unseen, generator):
    """`count` random pairs within domains and their votes; pairs whose unseen raters all tie are left out.

    Args:
        sentences: list of Sentence. members: rows that may be drawn, two or more of each domain.
        seen, unseen: a list of scores for each sentence.

    Raises:
        ValueError: nothing but ties.
    """
    domains = by_domain([sentences[row].domain for row in members])
    pairs = []
    for rows in domains.values():
        left = generator.integers(len(rows), size=count // len(domains))
        step = generator.integers(1, len(rows), size=len(left))  # never 0: the two differ
        pairs.append(members[rows[np.stack([left, (left + step) % len(rows)], axis=1)]])
    pairs = np.concatenate(pairs)
    shares = np.array([win_shares(unseen[a], unseen[b]) for a, b in pairs])
    pairs, shares = pairs[shares[:, 1] < 1], shares[shares[:, 1] < 1]
    if not len(pairs):
        raise ValueError(f"the raters tie on each of {count} pairs: there is nothing to prefer")
    vote = np.array([np.sign(generator.choice(seen[a]) - generator.choice(seen[b])) for a, b in pairs])
    seen_share = np.array([preference_share(seen[a], seen[b]) for a, b in pairs])
    return Votes(pairs, shares[:, 0] / (1 - shares[:, 1]), seen_share, vote > 0, vote == 0)


def fit_head(features, chosen, rejected, neg_log_dispersion, penalty, start=None):
    """The weights [D] that minimise mean loss + penalty / 2 |w|^2: a convex problem.

    Args:
        features: [S, D] float64. chosen, rejected: [n] rows of it.
        neg_log_dispersion: [n] float64 for the theta link, None for Bradley-Terry.
        penalty: > 0. start: [D] to start from; None: 0.
    """
    weights = torch.zeros(features.shape[1], dtype=torch.float64) if start is None else start.clone()
    weights.requires_grad_()
    stop = {"max_iter": 300, "tolerance_grad": 1e-6, "tolerance_change": 1e-12}
    optimiser = torch.optim.LBFGS([weights], line_search_fn="strong_wolfe", **stop)

    def closure():
        optimiser.zero_grad()
        scores = features @ weights
        loss = losses(scores[chosen], scores[rejected], neg_log_dispersion).mean() + penalty / 2 * weights @ weights
        loss.backward()
        return loss

    optimiser.step(closure)
    return weights.detach()


def losses(chosen, rejected, neg_log_dispersion):
    """preference_loss of scores: Bradley-Terry without a dispersion, theta with one; beta 1, the penalty sets it."""
    link = "bradley-terry" if neg_log_dispersion is None else "mallows-theta"
    return F.preference_loss(chosen, rejected, neg_log_dispersion=neg_log_dispersion, link=link, beta=1.0).losses


def judge(scores, votes, neg_log_dispersion):
    """(log-likelihood in nats, accuracy) of an unseen rater's untied vote, means over pairs."""
    first, second = (scores[rows] for rows in torch.as_tensor(votes.rows).T)
    wins = torch.as_tensor(votes.wins)
    lost = wins * losses(first, second, neg_log_dispersion) + (1 - wins) * losses(second, first, neg_log_dispersion)
    right = torch.where(first == second, 0.5, torch.where(first > second, wins, 1 - wins))
    return -lost.mean().item(), right.mean().item()


def run_seed(sentences, found, vocabulary, seed, train_votes, held_out_pairs):
    """One split of sentences and raters, every method.

    Args:
        sentences: list of S Sentence. found: of ``indices.read_with_model``, flattened to one row a sentence.
        vocabulary: as of ``agreement_indices``. seed: draws the split of sentences and of raters, pairs and votes.
        train_votes, held_out_pairs: pairs to draw; ties are then left out.

    Returns:
        {method: {"log_likelihood", "accuracy", "penalty", "temperature", "without"}}, with PEOPLE as a last one that
        has the first two, and {"votes", "tied"}: how many training votes, and the share of ties among those drawn.
        Penalty and temperature are those of the greatest likelihood of the validation votes. ``without`` is
        Bradley-Terry's log-likelihood, the dispersion used in training only, penalty and temperature chosen for it.
    """
    generator = np.random.default_rng(seed)
    members = {part: [] for part in PARTS}
    for rows in by_domain([sentence.domain for sentence in sentences]).values():
        ends = np.round(np.cumsum(list(PARTS.values())) * len(rows)).astype(int)[:-1]
        for part, rows_of_part in zip(PARTS, np.split(generator.permutation(rows), ends), strict=True):
            members[part].extend(rows_of_part)
    raters = [generator.permutation(sentence.ratings) for sentence in sentences]
    seen, unseen = [r[: len(r) // 2] for r in raters], [r[len(r) // 2 :] for r in raters]
    counts = {"fit": train_votes, "validation": held_out_pairs, "held out": held_out_pairs}
    votes = {
        part: draw_votes(sentences, np.array(members[part]), counts[part], seen, unseen, generator) for part in PARTS
    }
    dispersion = _dispersions(votes, found, vocabulary, generator)

    features = found["features"].double()
    fitted = features[members["fit"]]
    features = (features - fitted.mean(0)) / (fitted.std(0) + 1e-6) / features.shape[1] ** 0.5
    fit = votes["fit"]
    if fit.tied.all():
        raise ValueError(f"each of {len(fit.tied)} votes to train on is a tie; draw more with train_votes")
    kept = torch.as_tensor(~fit.tied)
    rows = torch.as_tensor(np.where(fit.first_chosen[:, None], fit.rows, fit.rows[:, ::-1]))[kept]
    result = {}
    for method in METHODS:
        a = dispersion[method]
        weights, scores = None, {}
        for penalty in PENALTIES:
            weights = fit_head(features, *rows.T, a and a["fit"][kept], penalty, weights)
            scores |= {(penalty, temperature): temperature * (features @ weights) for temperature in TEMPERATURES}
        known, without = (_judge_best(scores, votes, told) for told in (a, None))
        result[method] = known | {"without": without["log_likelihood"]}
    held = votes["held out"]
    belief = held.seen_share.clip(1 - CERTAIN, CERTAIN)
    likelihood = held.wins * np.log(belief) + (1 - held.wins) * np.log1p(-belief)
    right = np.where(belief == 0.5, 0.5, np.where(belief > 0.5, held.wins, 1 - held.wins))
    result[PEOPLE] = {"log_likelihood": float(likelihood.mean()), "accuracy": float(right.mean())}
    return result | {"votes": int(kept.sum()), "tied": float(fit.tied.mean())}


def _judge_best(scores, votes, dispersion):
    """The held-out numbers of those scores {(penalty, temperature): [S]} that the validation votes choose."""
    told = dispersion or dict.fromkeys(votes)
    best = max(scores, key=lambda choice: judge(scores[choice], votes["validation"], told["validation"]))
    likelihood, accuracy = judge(scores[best], votes["held out"], told["held out"])
    return {"log_likelihood": likelihood, "accuracy": accuracy, "penalty": best[0], "temperature": best[1]}


def _dispersions(votes, found, vocabulary, generator):
    """{method: None or {part: [n] neg-log dispersions}}, scaled so that the theta factor is 1 on average over the fit.

    The FITTED ones are first put on the line that fits the seen raters' agreement on the fit part.
    """
    columns = {name: column for name, column in found.items() if name != "features"}
    raw = {method: {} for method in METHODS if method != DPO}
    for part, drawn in votes.items():
        indices = agreement_indices({name: column[drawn.rows] for name, column in columns.items()}, vocabulary)
        raw[PAPER][part], raw[ASKED][part] = indices[PAPER], indices[ASKED]
        raw[SHUFFLED][part] = generator.permutation(indices[PAPER])
        raw[TRUE][part] = real_dispersion(drawn.seen_share)
    share = votes["fit"].seen_share
    for name, fitted in FITTED.items():
        offset, slope = fit_log_odds(raw[name]["fit"], np.maximum(share, 1 - share))
        raw[fitted] = {
            part: log_odds_to_neg_log_dispersion(index, "mallows-theta", offset=offset, slope=slope)
            for part, index in raw[name].items()
        }
    scaled = {DPO: None}
    for method, parts in raw.items():
        scale = calibrated_scale(parts["fit"])
        scaled[method] = {part: torch.as_tensor(scale * values) for part, values in parts.items()}
    return scaled
