"""Three methods that sample, learn and repeat, on the bandits of recipes/bandit: policies are tables of logits.

M methods, S seeds, C contexts, K actions, n samples a context; all methods and seeds are one tensor program, whose
loss is a sum over them and whose optimiser works number by number, so none knows of another. Methods of one study draw
with the same random numbers.
"""

from typing import NamedTuple

import experiment
import torch

import mallowspo.functional as F
from mallowspo.accelerated import extrapolated
from mallowspo.advantage import advantage_loss, advantage_weights, expectile_loss

METRICS = ("reward", "kl", "optimal", "entropy")


class Draws:
    """Random numbers of each seed, which do not depend on the other seeds."""

    def __init__(self, seeds):
        self._generators = [torch.Generator().manual_seed(2**32 + seed) for seed in seeds]

    def uniform(self, *shape):
        """[S, *shape] in (0, 1)."""
        found = torch.stack([torch.rand(shape, generator=generator) for generator in self._generators])
        return found.clamp(1e-7, 1 - 1e-7)

    def gumbel(self, *shape):
        return -(-self.uniform(*shape).log()).log()


class Pairs(NamedTuple):
    """n comparisons in each context, [M, S, C, n]: two different actions and whether the first won."""

    first: torch.Tensor
    second: torch.Tensor
    first_won: torch.Tensor


def sample_pairs(problem, logits, number, draws):
    """Pairs: two actions drawn from a policy [M, S, C, K] without replacement, judged by one person each."""
    contexts, actions = logits.shape[-2:]
    noise = draws.gumbel(contexts, number, actions)
    first, second = (logits[..., None, :] + noise).topk(2).indices.unbind(-1)
    share = at_pair(problem.preferred.expand(len(logits), -1, -1, -1, -1), first, second)
    return Pairs(first, second, draws.uniform(contexts, number) < share)


def at_pair(table, first, second):
    """[..., K, K] -> its entries [..., n]."""
    return table.flatten(-2).gather(-1, first * table.shape[-1] + second)


def count_wins(pairs, actions, weights=1.0):
    """[M, S, C, K, K] float: how often i won against j, each pair counted with its weight [M, S, C, n]."""
    winner = torch.where(pairs.first_won, pairs.first, pairs.second)
    index = winner * actions + (pairs.first + pairs.second - winner)
    counts = torch.zeros(*index.shape[:-1], actions * actions)
    return counts.scatter_add_(-1, index, weights * torch.ones(index.shape)).unflatten(-1, (actions, -1))


def preference_losses(scores, ref_scores, wins, betas):
    """[M, S, C]: DPO's loss summed over the wins; with betas 1 and references 0 Bradley-Terry's, of a reward model.

    Args:
        scores, ref_scores: [M, S, C, K]; normalisers cancel. wins: [M, S, C, K, K].
        betas: [M, 1, 1, 1]; they multiply the scores here, because the library takes one beta a call.
    """
    sides = [
        side for table in (betas * scores, betas * ref_scores) for side in (table[..., None], table[..., None, :])
    ]
    sides = [side.expand(wins.shape).contiguous() for side in sides]
    return (F.preference_loss(*sides, link="bradley-terry", beta=1.0).losses * wins).sum((-2, -1))


def descend(parameters, losses, steps, learning_rate):
    """Adam on the sum of ``losses()``."""
    optimizer = experiment.OPTIMIZERS["adam"](parameters, lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        losses().sum().backward()
        optimizer.step()


class History:
    """METRICS after each round, means over the contexts."""

    def __init__(self, problem):
        self._problem, self._rounds = problem, []

    def add(self, logits):
        found = experiment.evaluate(self._problem, logits.detach())
        self._rounds.append({name: found[name].mean(-1) for name in METRICS})

    def read(self):
        """{metric: [rounds + 1, M, S]}."""
        return {name: torch.stack([found[name] for found in self._rounds]) for name in METRICS}


def column(values):
    """[M] -> [M, 1, 1, 1]."""
    return torch.tensor(values).view(-1, 1, 1, 1)


def accelerated(problem, methods, seeds, *, rounds, samples, steps, learning_rate):
    """Iterative DPO with extrapolation; methods: {name: (alpha, beta)}.

    A table's log-probabilities are linear in its logits, up to the normaliser: extrapolated logits are the exact
    policy to sample from and the exact reference in one.
    """
    draws, history = Draws(seeds), History(problem)
    alphas, betas = zip(*methods.values(), strict=True)
    current = previous = problem.ref_logps.expand(len(methods), -1, -1, -1)
    history.add(current)
    for _ in range(rounds):
        tables = zip(current, previous, alphas, strict=True)
        reference = torch.stack([extrapolated(*table) for table in tables])
        wins = count_wins(sample_pairs(problem, reference, samples, draws), reference.shape[-1])
        logits = reference.clone().requires_grad_()

        def losses(logits=logits, reference=reference, wins=wins):
            return preference_losses(logits, reference, wins, column(betas)) / samples

        descend([logits], losses, steps, learning_rate)
        previous, current = current, logits.detach()
        history.add(current)
    return history.read()


def advantages(problem, methods, seeds, *, rounds, samples, steps, learning_rate, noise):
    """Policies that learn from rewards; methods: {name: (loss, temperature)}, loss "apa", "awr" or "pg".

    Each round samples actions from the policy, whose reward is the utility and normal noise, and takes steps on them:
    APA's squared error; advantage-weighted regression, which has no reference; or the policy gradient of the reward
    minus temperature times the KL, importance-weighted and not clipped. Values are a table too, fitted to the round's
    rewards from where the round before left it.
    """
    draws, history = Draws(seeds), History(problem)
    ref = problem.ref_logps.expand(len(methods), -1, -1, -1)
    logits, values = ref.clone().requires_grad_(), torch.zeros(*ref.shape[:-1], 1, requires_grad=True)
    utility = problem.utility.expand_as(ref)
    history.add(logits)
    for _ in range(rounds):
        behaviour = logits.detach().log_softmax(-1)
        actions = (behaviour[..., None, :] + draws.gumbel(ref.shape[-2], samples, ref.shape[-1])).argmax(-1)
        error = torch.special.ndtri(draws.uniform(ref.shape[-2], samples))
        rewards = utility.gather(-1, actions) + noise * error
        descend([values], lambda r=rewards: expectile_loss(values.expand_as(r), r), steps, 10 * learning_rate)
        advantage = rewards - values.detach()
        ref_logps, old = ref.gather(-1, actions), behaviour.gather(-1, actions)

        def losses(advantage=advantage, ref_logps=ref_logps, old=old, actions=actions):
            logps = logits.log_softmax(-1).gather(-1, actions)
            found = []
            for i, (loss, temperature) in enumerate(methods.values()):
                if loss == "apa":
                    found.append(advantage_loss(logps[i], ref_logps[i], advantage[i], temperature=temperature))
                elif loss == "awr":
                    found.append(-advantage_weights(advantage[i], temperature=temperature) * logps[i])
                else:
                    signal = advantage[i] - temperature * (old[i] - ref_logps[i])
                    found.append(-(logps[i] - old[i]).exp() * signal)
            return torch.stack(found).mean(-1)

        descend([logits], losses, steps, learning_rate)
        history.add(logits)
    return history.read()


def smallest(values, number):
    """[S, N] -> bool: which are the ``number`` smallest of their row."""
    chosen = values.topk(number, largest=False).indices
    return torch.zeros(values.shape, dtype=torch.bool).scatter_(-1, chosen, True)


def discriminator(problem, methods, seeds, *, rounds, samples, steps, learning_rate, beta, gold):
    """Discriminator-guided DPO; methods: {name: (query, silver)}.

    Each round samples pairs; ``gold`` of them, over all contexts of a seed, are shown to people: those the
    discriminator is least certain of (query "uncertain"), any ("random") or, whatever ``gold`` is, all ("all"). The
    discriminator, Bradley-Terry scores, learns from every gold pair so far. The policy takes DPO steps on the round's
    gold pairs and on the others as the discriminator then orders them; with silver "none" on the gold ones alone.

    A "table" discriminator has a score for each action of each context and so knows nothing of a context without gold
    pairs. A "shared" one has the same scores in all contexts for the actions at the same place of the central ranking:
    it carries over what it learns, as a reward model does that reads the text.
    """
    draws, history = Draws(seeds), History(problem)
    ref = problem.ref_logps.expand(len(methods), -1, -1, -1)
    actions = ref.shape[-1]
    place = ((1 - problem.utility) * (actions - 1)).round().long().expand_as(ref)
    logits, table = ref.clone().requires_grad_(), torch.zeros_like(ref, requires_grad=True)
    common = torch.zeros_like(ref[..., :1, :], requires_grad=True)
    queries, silvers = zip(*methods.values(), strict=True)
    shared, silver = (
        column([float(kind in kinds) for kind in silvers]) for kinds in (["shared"], ["shared", "table"])
    )
    known, ones = torch.zeros(*ref.shape, actions), column([1.0] * len(methods))

    def scores():
        return torch.where(shared > 0, common.expand_as(ref).gather(-1, place), table)

    def gaps(pairs):
        found = scores().detach()
        return found.gather(-1, pairs.first) - found.gather(-1, pairs.second)

    history.add(logits)
    for _ in range(rounds):
        pairs = sample_pairs(problem, logits.detach(), samples, draws)
        chance = draws.uniform(*pairs.first.shape[2:])
        asked = []
        for query, gap in zip(queries, gaps(pairs), strict=True):
            # Of equally certain pairs, as at the start, chance decides.
            order = gap.abs() + 1e-6 * chance if query == "uncertain" else chance
            number = chance[0].numel() if query == "all" else gold
            asked.append(smallest(order.flatten(1), number).view_as(order))
        asked = torch.stack(asked)
        known = known + count_wins(pairs, actions, asked.float())
        descend([table, common], lambda k=known: preference_losses(scores(), 0 * ref, k, ones), steps, learning_rate)
        gap = gaps(pairs)
        labelled = pairs._replace(first_won=torch.where(asked, pairs.first_won, gap > 0))
        # Where nothing is known of either action there is no silver label.
        wins = count_wins(labelled, actions, torch.where(asked, 1.0, silver * (gap != 0)))
        descend([logits], lambda w=wins: preference_losses(logits, ref, w, beta * ones), steps, learning_rate)
        history.add(logits)
    return history.read()


def frontier(problem, points=60):
    """{"kl", "reward"}: of ref exp(utility / temperature), the most reward for its KL, over temperatures."""
    temperatures = torch.logspace(1.5, -1.7, points).view(-1, 1, 1, 1)
    found = experiment.evaluate(problem, problem.ref_logps + problem.utility / temperatures)
    return {name: found[name].mean((-2, -1)).tolist() for name in ("kl", "reward")}
