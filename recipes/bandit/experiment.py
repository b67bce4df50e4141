"""Every run of a bandit as one tensor program: policies are free tables of logits, trained together.

M methods, B betas, S seeds, C contexts, K actions, P distinct preferences of a context. The loss is the sum over
[M, B, S, C] and both optimisers work number by number, so no run knows of another.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import sampling
import torch

import mallowspo.functional as F
from mallowspo.dispersion import calibrated_scale
from options import check_at_least_one, list_field


class Method(NamedTuple):
    """A link and where its dispersion comes from: nowhere, the truth or the reference policy's entropy."""

    link: str
    dispersion: str | None = None


METHODS = {
    "dpo": Method("bradley-terry"),
    "ipo": Method("ipo"),
    "theta, true": Method("mallows-theta", "true"),
    "theta, estimated": Method("mallows-theta", "estimated"),
    "phi, true": Method("mallows-phi", "true"),
    "phi, estimated": Method("mallows-phi", "estimated"),
}
# Adam's default of 1e-8 is the size of the rounding of a gradient that is zero, which it would magnify to full steps.
OPTIMIZERS = {"adam": partial(torch.optim.Adam, lr=0.05, eps=1e-6), "sgd": partial(torch.optim.SGD, lr=0.5)}
EVALUATIONS = 16  # evenly spaced in the logarithm of the step
METRICS = ("optimal", "reward", "win_rate", "entropy", "top_choice_distance", "kl")


@dataclass
class Problem:
    """Bandits of S seeds, each with the same C dispersions and its own central rankings, reference and preferences."""

    neg_log_dispersion: dict  # "true", "estimated" (calibrated), "raw" (its scale 1): [S, C]
    ref_logps: torch.Tensor  # [S, C, K]
    chosen: torch.Tensor  # [S, C, P] actions; repetitions of a preference are one with more weight
    rejected: torch.Tensor
    weights: torch.Tensor  # [S, C, P] sum to 1 over P, 0 where there are fewer than P
    utility: torch.Tensor  # [S, C, K] from 1, the best by the central ranking, to 0
    preferred: torch.Tensor  # [S, C, K, K] share of the people who prefer one action to another
    top_choices: torch.Tensor  # [S, C, K] share of the people who prefer an action to all others


@dataclass
class ProblemOptions:
    """What a recipe's options say of its bandits, whatever it does with them."""

    dispersions: list[float] = list_field(
        *(0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95), about="phi of each context, in (0, 1)."
    )
    num_actions: int = field(default=6, metadata={"help": "K; at most 8 for spearman."})
    demonstrations: int = field(default=100, metadata={"help": "First choices a context the reference is made of."})
    prior: float = field(default=0.1, metadata={"help": "Pseudo-observations of each action beside them, > 0."})
    num_seeds: int = field(default=10, metadata={"help": "At least 5, for the intervals."})

    def __post_init__(self):
        if self.num_seeds < 5:
            raise ValueError(f"num_seeds must be at least 5 for an interval, got {self.num_seeds}")
        if self.num_actions < 2:
            raise ValueError(f"num_actions must be at least 2 to choose from, got {self.num_actions}")
        check_at_least_one(self, "demonstrations")

    def make_problem(self, distance, preferences):
        """The bandits under a distance, with so many comparisons a context."""
        return make_problem(
            self.dispersions,
            num_actions=self.num_actions,
            kind=distance,
            preferences=preferences,
            demonstrations=self.demonstrations,
            prior=self.prior,
            seeds=range(self.num_seeds),
        )


def make_problem(dispersions, *, num_actions, kind, preferences, demonstrations, prior, seeds):
    """Samples a Problem. A seed's draws do not depend on which other seeds there are.

    Args:
        dispersions: C values of phi in (0, 1).
        preferences, demonstrations: comparisons and first choices sampled in each context.
        prior: smoothing of the reference, see :func:`sampling.sample_reference`.
    """
    if not all(0 < phi < 1 for phi in dispersions):
        raise ValueError(f"dispersions must be between 0 and 1, got {dispersions}")
    a = -torch.tensor(dispersions, dtype=torch.float64).log()
    refs, counts, places = [], [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        central = torch.rand(len(a), num_actions, generator=generator).argsort(-1)  # each action's place
        ref = sampling.sample_reference(a, num_actions, demonstrations, prior, kind, generator)
        wins = sampling.sample_preferences(a, num_actions, preferences, kind, generator)
        places.append(central)
        refs.append(ref.gather(-1, central))
        counts.append(_by_action(wins, central))
    places, ref, counts = torch.stack(places), torch.stack(refs), torch.stack(counts).flatten(-2)

    distinct = int((counts > 0).sum(-1).max())
    weights, pair = counts.sort(dim=-1, descending=True, stable=True)
    weights, pair = weights[..., :distinct], pair[..., :distinct]
    entropy = torch.special.entr(ref).sum(-1)
    raw = F.neg_log_dispersion(entropy, entropy, num_actions)
    scale = torch.tensor([[calibrated_scale(row.numpy())] for row in raw], dtype=torch.float64)
    dispersion = {"true": a.expand(len(places), -1), "raw": raw, "estimated": scale * raw}
    preferred = sampling.pairwise_probabilities(a, num_actions, kind).expand(len(places), -1, -1, -1)
    top_choices = sampling.top_choice_probabilities(a, num_actions, kind).expand(len(places), -1, -1)
    return Problem(
        neg_log_dispersion={name: value.float() for name, value in dispersion.items()},
        ref_logps=ref.log().float(),
        chosen=pair // num_actions,
        rejected=pair % num_actions,
        weights=weights / preferences,
        utility=1 - places / (num_actions - 1),
        preferred=_by_action(preferred, places).float(),
        top_choices=top_choices.gather(-1, places).float(),
    )


def _by_action(matrix, places):
    """[..., K, K] of items in the order of the central ranking -> of actions at these places."""
    rows = places[..., None].expand(*places.shape, places.shape[-1])
    return matrix.gather(-2, rows).gather(-1, rows.transpose(-1, -2))


def losses(problem, logits, method, betas):
    """[B, S, C]: each context's mean loss over its preferences.

    Args:
        logits: [B, S, C, K] of one method. betas: [B]; they multiply the log-probabilities here, because the library
            takes one beta a call.
    """
    scaled, ref = betas[:, None, None, None], problem.ref_logps.expand_as(logits)
    shape = (len(betas), *problem.chosen.shape)
    sides = [actions.expand(shape) for actions in (problem.chosen, problem.rejected)]
    dispersion = None
    if method.dispersion:
        dispersion = problem.neg_log_dispersion[method.dispersion][..., None].expand(shape)
    result = F.preference_loss(
        # Logits for log-probabilities: the normaliser cancels in the margin.
        *(scaled * table.gather(-1, actions) for table in (logits, ref) for actions in sides),
        neg_log_dispersion=dispersion,
        link=method.link,
        beta=1.0,
    )
    return (result.losses * problem.weights).sum(-1)


@torch.no_grad()
def evaluate(problem, logits):
    """METRICS of policies [..., S, C, K], exact expectations: each [..., S, C].

    optimal: probability of the best action. reward: expected utility. win_rate: share of people who prefer the
    policy's action to the reference's. entropy: over log K. top_choice_distance: total variation from the people's
    first choices. kl: to the reference, nats.
    """
    logps = logits.log_softmax(-1)
    policy = logps.exp()
    against_ref = (problem.preferred @ problem.ref_logps.exp()[..., None]).squeeze(-1)
    return {
        "optimal": (policy * (problem.utility == 1)).sum(-1),
        "reward": (policy * problem.utility).sum(-1),
        "win_rate": (policy * against_ref).sum(-1),
        "entropy": torch.special.entr(policy).sum(-1) / math.log(logits.shape[-1]),
        "top_choice_distance": (policy - problem.top_choices).abs().sum(-1) / 2,
        "kl": (policy * (logps - problem.ref_logps)).sum(-1),
    }


def evaluation_steps(steps):
    """Steps after which to evaluate: 0, and up to EVALUATIONS others, the last among them."""
    return sorted({0} | {round(steps ** (i / (EVALUATIONS - 1))) for i in range(EVALUATIONS)})


def train(problem, betas, *, optimizer, steps):
    """Trains every policy from the reference on all its preferences at once, without batches.

    A policy's loss is divided by max(beta, beta^2): the slope of every link at the reference grows with beta and its
    curvature with beta^2, so one learning rate then suits all betas. (Adam does not notice.)

    Args:
        betas: B values. optimizer: name in OPTIMIZERS.

    Returns:
        (list of T steps, {metric: [T, M, B, S, C]}): before the first step and at EVALUATIONS later ones, the last
        among them; METRICS and "loss", methods in the order of METHODS, float32.
    """
    logits = problem.ref_logps.expand(len(METHODS), len(betas), *problem.ref_logps.shape).clone().requires_grad_()
    betas = torch.tensor(betas)
    rates = (1 / torch.maximum(betas, betas.square()))[:, None, None]
    optimizer = OPTIMIZERS[optimizer]([logits])
    at = evaluation_steps(steps)
    found = {name: [] for name in (*METRICS, "loss")}
    for step in range(steps + 1):
        optimizer.zero_grad()
        loss = torch.stack([losses(problem, *pair, betas) for pair in zip(logits, METHODS.values(), strict=True)])
        if step in at:
            for name, value in (evaluate(problem, logits) | {"loss": loss.detach()}).items():
                found[name].append(value)
        if step < steps:
            (rates * loss).sum().backward()
            optimizer.step()
    return at, {name: torch.stack(values) for name, values in found.items()}
