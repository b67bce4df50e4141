"""Hybrid preference optimisation (HPO, arXiv 2405.17956): a preference loss and rewards of any kind, offline.

    policy: L_pref - kappa E[exp(A / alpha) log pi(y|x)],   A = R(x, y) - V(x), the weight without gradient
    value:  E[|tau - 1{R < V}| (R - V)^2]

What was read of the paper (abstract, introduction, reviews) has a preference loss, an advantage-weighted likelihood
term and a value network trained by expectile regression, all without sampling. From memory, and not verified, is where
kappa and alpha stand, and that the expectations run over both responses of a pair. Its kappa, alpha and tau are not
known. The cap on the exponent and the value head's design are ours.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from mallowspo.advantage import MAX_EXPONENT, advantage_weights, expectile_loss
from mallowspo.checks import check_alike
from mallowspo.choices import check_not_negative
from mallowspo.trainer import MallowsTrainer

REWARD_COLUMNS = ("chosen_reward", "rejected_reward")
VALUE_FILE = "value_head.pt"


def hybrid_loss(losses, logps, rewards, values, *, kappa, temperature, max_exponent=MAX_EXPONENT):
    """A preference loss of pairs plus HPO's advantage-weighted likelihood of both responses.

    Args:
        losses: [B], of :func:`mallowspo.functional.preference_loss` or an objective.
        logps: [2B] summed log-probability of each response, chosen first, then rejected.
        rewards: [2B] auxiliary reward R of each response: a weighted sum, if there are several.
        values: [2B] what was to be expected of its prompt, V.
        kappa: >= 0, weight of the term; 0 is the preference loss, exactly.
        temperature: alpha > 0, in the units of the reward; less follows the better responses alone.
        max_exponent: A / alpha counts as no more than this.

    Returns:
        [B], ``losses - kappa (w_c lp_c + w_r lp_r) / 2``; differentiable in losses and logps alone.

    Raises:
        TypeError: dtypes that disagree. ValueError: shapes that disagree, a number out of its range.
    """
    check_alike(logps=logps, rewards=rewards, values=values)
    if logps.dim() != 1 or len(logps) != 2 * len(losses):
        raise ValueError(f"logps must be [2B] beside losses [B], got {list(logps.shape)} and {list(losses.shape)}")
    check_not_negative("kappa", kappa)
    weights = advantage_weights(rewards - values, temperature=temperature, max_exponent=max_exponent)
    if kappa == 0:  # a response that is impossible, 0 * inf, would make it NaN
        return losses
    return losses - kappa / 2 * sum((weights * logps).chunk(2))


class HybridTrainer(MallowsTrainer):
    """A MallowsTrainer whose loss has HPO's reward term added to that of any objective.

    The data sets need the columns ``chosen_reward`` and ``rejected_reward``, finite numbers. V(x) is a linear head on
    the last hidden state of the prompt (of an empty prompt: of the first token), through which no gradient passes to
    the model; it has an Adam of its own, one step a batch, and lies in every checkpoint. Beside MallowsTrainer's, the
    metrics are ``hybrid/value_loss``, ``hybrid/advantage`` and ``hybrid/weight``, means over both responses; ``loss``
    is the policy's.

    Args:
        kappa: >= 0; 0 trains as MallowsTrainer does, bit for bit.
        temperature: alpha > 0, in the units of the reward.
        expectile: tau in (0, 1) of the value.
        value_learning_rate: of the head's Adam.
        max_exponent: see :func:`hybrid_loss`.
        *args, **kwargs: as in MallowsTrainer.

    Raises:
        ValueError: a number out of its range, a data set without the rewards or with one that is not finite, and what
            MallowsTrainer raises.
    """

    def __init__(
        self,
        *args,
        kappa,
        temperature,
        expectile=0.5,
        value_learning_rate=1e-3,
        max_exponent=MAX_EXPONENT,
        **kwargs,
    ):
        self._term = {"kappa": kappa, "temperature": temperature, "max_exponent": max_exponent}
        self.expectile = expectile
        one = torch.zeros(1)
        hybrid_loss(one, *torch.zeros(3, 2), **self._term)  # refuses numbers before a model is loaded
        expectile_loss(one, one, expectile=expectile)
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("HybridTrainer does not know FSDP and DeepSpeed, which split weights: launch with DDP")
        self._head = self.model.get_output_embeddings()
        # Without the random numbers of an ordinary initialisation, which the training would miss.
        self.value_head = nn.utils.skip_init(nn.Linear, self._head.in_features, 1, device=self.args.device)
        for parameter in self.value_head.parameters():
            nn.init.zeros_(parameter)
        self._value_optimizer = torch.optim.Adam(self.value_head.parameters(), lr=value_learning_rate)
        self.data_collator = _WithRewards(self.data_collator)

    def _prepare(self, dataset, name):
        tokenized = super()._prepare(dataset, name)
        rows = np.asarray(tokenized["row"][:])
        for column in REWARD_COLUMNS:
            if column not in dataset.column_names:
                raise ValueError(f"the {name} data set lacks the column {column!r}, the reward that HPO adds")
            values = np.asarray(dataset.with_format(None)[column][:], dtype=np.float64)
            if not np.isfinite(values).all():
                row = int(np.argmin(np.isfinite(values)))
                raise ValueError(f"the {name} data set has {column!r} {values[row]} in row {row}; rewards are finite")
            tokenized = tokenized.add_column(column, values[rows])
        return tokenized

    def _pair_losses(self, model, batch):
        states = []
        hook = self._head.register_forward_pre_hook(lambda module, args: states.append(args[0].detach()))
        try:
            loss, policy, reference, dispersion = super()._pair_losses(model, batch)
        finally:
            hook.remove()
        lengths = batch["num_tokens"]
        prompts = states[-1][lengths.cumsum(0) - lengths]  # of the last call, which is the policy's
        with torch.autocast(prompts.device.type, enabled=False):
            values = self.value_head(prompts.float()).squeeze(-1)
        rewards = torch.cat([batch[name] for name in REWARD_COLUMNS])
        losses = hybrid_loss(loss.losses, policy.logps, rewards, values.detach(), **self._term)
        advantages = (rewards - values).detach()
        weights = advantage_weights(advantages, **{k: v for k, v in self._term.items() if k != "kappa"})
        found = {"value_loss": expectile_loss(values, rewards, expectile=self.expectile)}
        found |= {"advantage": advantages, "weight": weights}
        self._hybrid = {f"hybrid/{name}": sum(both.chunk(2)) / 2 for name, both in found.items()}
        return loss._replace(losses=losses), policy, reference, dispersion

    def _objective_facts(self):
        term = self._term | {"expectile": self.expectile}
        return super()._objective_facts() | {f"{name} (HPO)": value for name, value in term.items()}

    def _metrics(self, *args):
        return super()._metrics(*args) | self._hybrid

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            self._value_step(inputs.get("counts"))
        return result

    def _value_step(self, counts):
        """One step of the head on the batch of all ranks."""
        losses = self._hybrid["hybrid/value_loss"]
        counts = torch.ones_like(losses) if counts is None else counts
        self._value_optimizer.zero_grad()
        (losses * counts).sum().backward()
        pairs = self.accelerator.reduce(counts.sum(), reduction="sum")
        for parameter in self.value_head.parameters():
            parameter.grad = self.accelerator.reduce(parameter.grad, reduction="sum") / pairs
        self._value_optimizer.step()

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        parts = {"head": self.value_head.state_dict(), "optimizer": self._value_optimizer.state_dict()}
        torch.save(parts, Path(output_dir or self.args.output_dir) / VALUE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_value_head(resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        self._load_value_head(self.state.best_model_checkpoint)

    def _load_value_head(self, checkpoint):
        path = Path(checkpoint) / VALUE_FILE
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: the checkpoint is not a HybridTrainer's; resume with its own trainer"
            )
        parts = torch.load(path, map_location=self.args.device, weights_only=True)
        self.value_head.load_state_dict(parts["head"])
        self._value_optimizer.load_state_dict(parts["optimizer"])


class _WithRewards:
    """A collator that adds REWARD_COLUMNS, [B] float32, to the batches of another."""

    def __init__(self, collate):
        self._collate = collate

    def __call__(self, rows):
        rewards = {name: torch.tensor([row[name] for row in rows], dtype=torch.float32) for name in REWARD_COLUMNS}
        return self._collate(rows) | rewards
