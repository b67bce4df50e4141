"""What a trainer logs of preference pairs, and the means of it over all ranks."""

import torch

from mallowspo import functional as F


def pair_metrics(loss, policy, reference, dispersion, num_tokens, vocabulary):
    """Values of each of B pairs, [B], by the name they are logged under.

    Args:
        loss: ``PreferenceLoss`` of the pairs.
        policy, reference: ``ResponseStats`` [2B], chosen then rejected; reference may be None.
        dispersion: [B] scaled neg-log dispersion, or None.
        num_tokens: [2B] scored tokens of each sequence.
        vocabulary: V where the dispersion is the entropy index of the reference, else None.
    """
    chosen, rejected = loss.chosen_rewards, loss.rejected_rewards
    values = {
        "loss": loss.losses,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": ((chosen > rejected).float() + (chosen >= rejected).float()) / 2,
        "logps/chosen": policy.logps.chunk(2)[0],
        "logps/rejected": policy.logps.chunk(2)[1],
        "entropy": sum(policy.entropy.chunk(2)) / 2,
    }
    if reference is not None:
        ratio = (policy.logps - reference.logps) / num_tokens
        values["log_ratio/chosen"], values["log_ratio/rejected"] = ratio.chunk(2)
    if dispersion is not None:
        values["dispersion/neg_log_mean"] = dispersion
        if vocabulary is not None:
            values["dispersion/entropy"] = F.normalised_entropy(*reference.entropy.chunk(2), vocabulary)
    return values


class Means:
    """Means of what was added since they were last read, by mode: "train" or "eval".

    Sums and counts are kept, and reduced over the ranks once, when they are read.
    """

    def __init__(self, accelerator):
        self._accelerator = accelerator
        self._sums = {}

    def add(self, mode, values, counts=None):
        """Adds {name: [B]}, the same names every time; in training only of pairs whose counts [B] are not 0."""
        columns = [value.detach().double() for value in values.values()]
        table = torch.stack([*columns, torch.ones_like(columns[0])], dim=1)  # the last column counts the pairs
        if mode == "eval":  # the ranks' last batches are filled up with pairs seen before; this cuts them off again
            table = self._accelerator.gather_for_metrics(table)
        elif counts is not None:
            table = table.where(counts[:, None] > 0, 0)  # rows taken by a mask would make the host wait for a GPU
        self._sums[mode] = list(values), table.sum(0) + self._sums.get(mode, (None, 0))[1]

    def drop(self, mode):
        self._sums.pop(mode, None)

    def read(self, mode):
        """{name: mean over all ranks}, the same names on every rank; {} if nothing was added."""
        if mode not in self._sums:
            return {}
        names, sums = self._sums.pop(mode)
        *sums, count = self._accelerator.reduce(sums, reduction="sum").tolist()
        return {name: value / count for name, value in zip(names, sums, strict=True)}
