"""TRL's DPOTrainer with the objectives and the dispersion of this package: one changed line.

    from mallowspo.integrations.trl import DPOConfig, DPOTrainer  # was: from trl import DPOConfig, DPOTrainer

Data handling, models, adapters, the reference, parallelism and the names of the metrics stay TRL's. Its forward passes
already give log-probability and entropy of every token, of policy and reference; only what is made of them is ours.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard
from packaging.version import Version

from mallowspo import functional as F
from mallowspo.config import ObjectiveArguments, check_dispersion
from mallowspo.data import PAIR_COLUMNS, evaluation_sets
from mallowspo.dispersion import agreement_to_neg_log_dispersion, check_column, chosen_source
from mallowspo.model_card import BIBTEX, described_dispersion, markdown_table
from mallowspo.objective import presets

TESTED = ("1.16", "2")  # from, below; on a CPU 1.15 cannot train
_INSTALL = "run: pip install 'mallowspo[trl]'"

try:
    import trl
except ImportError as error:
    raise ImportError(f"mallowspo.integrations.trl needs the package trl; {_INSTALL}") from error
if not Version(TESTED[0]) <= Version(trl.__version__) < Version(TESTED[1]):
    raise ImportError(
        f"mallowspo.integrations.trl needs trl >= {TESTED[0]}, < {TESTED[1]}, found {trl.__version__}; {_INSTALL}"
    )

from trl.trainer.utils import add_fused_lm_head  # noqa: E402

# The authors' released setting for entropies, 0.29 without the 2 of the theta link.
ENTROPY_SCALE = 0.145
# What makes another loss in TRL; here the objective does.
_REPLACED = (
    *("loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting", "use_liger_kernel"),
)
_DISPERSION = "neg_log_dispersion"
_PAPER = {
    "title": "MallowsPO: Fine-Tune Your LLM with Preference Dispersions",
    "id": "2405.14953",
    "citation": BIBTEX,
}


@dataclass
class DPOConfig(ObjectiveArguments, trl.DPOConfig):
    """TRL's DPOConfig, with the fields of :class:`mallowspo.MallowsConfig` that describe an objective.

    Parameters that control the objective:
        loss_type: a preset's name (``mallowspo.presets()``), or several joined by "+"; none of TRL's. Default
            "mallows-theta".
        beta, gamma, label_smoothing, smoothing, focal_gamma, divergence_alpha, discopop_tau, reference_mixing,
        sft_weight: override the preset's field of that name; None keeps it.

    Parameters that control the dispersion (read where the preset's link begins with ``mallows-``):
        dispersion_source: "neg_log_dispersion" or "agreement" (a column of the data), or "entropy" (of the reference
            model). None: the column if the data has one, else the entropy.
        dispersion_scale: the factor phi_star on the neg-log dispersion, > 0. None: 0.145 for the entropy (the
            authors' 0.29, chosen for Llama-3-8B-Instruct, over the 2 of the theta link), 1 for a column.

    Raises:
        ValueError: an unknown preset, source or value; an option of TRL's that makes another loss.
    """

    loss_type: list[str] = field(
        default_factory=lambda: ["mallows-theta"], metadata={"help": f"One preset: {', '.join(presets())}."}
    )
    dispersion_source: str | None = field(
        default=None, metadata={"help": "neg_log_dispersion, agreement, entropy; None: a column if there is one."}
    )
    dispersion_scale: str | None = field(
        default=None, metadata={"help": "phi_star, a positive number; None: 0.145 for the entropy, 1 for a column."}
    )

    def __post_init__(self):
        super().__post_init__()
        objective = self.objective()
        defaults = {f.name: f.default for f in fields(trl.DPOConfig)}
        for name in _REPLACED:
            is_ours = name == "use_weighting" and objective.on_policy_weighting
            if getattr(self, name) != defaults[name] and not is_ours:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} changes what TRL computes, which the preset "
                    f"{self.loss_type[0]!r} replaces; leave it at {defaults[name]!r}"
                )
        if self.dispersion_scale == "auto":
            raise ValueError(
                "dispersion_scale='auto' needs a pass over the data that TRL's trainer does not make: give a number, "
                "or use mallowspo.MallowsTrainer, which calibrates it (and logs it as dispersion/scale)"
            )
        self.use_weighting = objective.on_policy_weighting  # TRL's head then gives what the weight is aligned to
        for name, needed in (("weighs_tokens", "token weights"), ("reference_weights", "several references")):
            if getattr(objective, name):
                raise ValueError(
                    f"loss_type {self.loss_type[0]!r} has {needed}, which TRL's trainer does not keep apart: use "
                    "mallowspo.MallowsTrainer"
                )
        check_dispersion(self, default_scale=None)


class DPOTrainer(trl.DPOTrainer):
    """TRL's DPOTrainer, same arguments, whose loss is a :class:`mallowspo.PreferenceObjective`.

    The dispersion comes from the reference's entropies in the forward pass that TRL makes anyway, or from a column of
    the data. With ``precompute_ref_log_probs`` TRL keeps no entropies: that goes with a column, or without dispersion.
    ``rewards/*`` are the objective's own (of mean log-ratios where it takes means, without the reference where it is
    reference-free). Added metrics: ``dispersion/neg_log_mean`` (scaled) and ``dispersion/entropy`` (normalised).

    The model card is TRL's, with the objective and its dispersion instead of DPO.

    Raises:
        TypeError: args of TRL's own class. ValueError: a model, data set or setting that cannot be used.
    """

    _tag_names = ["trl", "mallowspo"]

    def __init__(
        self,
        model,
        ref_model=None,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        *others,
        **options,
    ):
        args = DPOConfig() if args is None else args
        if not isinstance(args, DPOConfig):
            raise TypeError(
                f"args must be a mallowspo.integrations.trl.DPOConfig, got {type(args).__module__}."
                f"{type(args).__qualname__}: import both names from mallowspo.integrations.trl"
            )
        self.objective, self._name = args.objective(), args.loss_type[0]
        self._paper = _PAPER if self.objective.uses_dispersion else {}
        self._source = None
        if self.objective.uses_dispersion:
            columns = next(iter(train_dataset or ()), {})
            self._source = chosen_source(args, self.objective, columns)
            check_column(self._source, columns, "the train data set", self.objective.link)
            for name, data in evaluation_sets(eval_dataset).items():
                if data:
                    check_column(self._source, next(iter(data)), f"the {name} data set", self.objective.link)
        if self._source == "entropy" and args.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs keeps the reference's log-probabilities but not the entropies that "
                f"loss_type {args.loss_type[0]!r} reads: leave it out, give the data a column "
                f"{' or '.join(PAIR_COLUMNS)}, or use mallowspo.MallowsTrainer, which caches both"
            )
        super().__init__(model, ref_model, args, data_collator, train_dataset, eval_dataset, *others, **options)
        if self._is_vlm or self.model.config.is_encoder_decoder:
            raise ValueError(
                f"{type(self.model).__name__} with a {type(self.processing_class).__name__} is not a text-only causal "
                "language model; there is no preset for vision or encoder-decoder models"
            )
        # TRL computes its metrics around a loss, which is thrown away: its cheapest, with our beta.
        self.loss_types, self.loss_weights, self.beta = ["sigmoid"], [1.0], self.objective.beta
        self.dispersion_scale = args.dispersion_scale or (ENTROPY_SCALE if self._source == "entropy" else 1.0)
        if self._source == "entropy":
            reference = self.accelerator.unwrap_model(self._reference)
            if self.ref_model is not None:  # TRL asks it for log-probabilities alone
                add_fused_lm_head(reference, outputs=("log_probs", "entropy"))
                # accelerate had wrapped the forward that this one replaces
                reference.forward = self.accelerator.autocast()(reference.forward)
            self._vocabulary = reference.get_output_embeddings().out_features  # the weight's shape may be of a shard
        elif self._source:
            self.data_collator = _WithDispersion(self.data_collator, self._source, self.objective.link)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / "README.md"
            card = ModelCard.load(path)
            objective = markdown_table(("field", "value"), asdict(self.objective).items())
            card.text += f"\n## Objective\n\n{objective}\n\n{described_dispersion(self)}\n"
            card.save(path)

    @property
    def _reference(self):
        return self.model if self.ref_model is None else self.ref_model

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self._source in PAIR_COLUMNS and self._source not in self._signature_columns:
            self._signature_columns.append(self._source)

    def compute_ref_log_probs(self, model, inputs):
        return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k != _DISPERSION})

    def _compute_loss(self, model, inputs, return_outputs):
        """TRL's step with its own loss replaced; from its forward passes come the statistics."""
        inputs = dict(inputs)
        dispersion = inputs.pop(_DISPERSION, None)
        policy, reference = [], []

        def recorded(**kwargs):
            policy.append(model(**kwargs))
            return policy[-1]

        hook = self._reference.register_forward_hook(lambda *call: reference.append(call[-1]))
        try:
            result = super()._compute_loss(recorded, inputs, return_outputs)
        finally:
            hook.remove()
        mode = "train" if self.model.training else "eval"
        mask = inputs["completion_mask"][:, 1:]
        num_tokens = mask.sum(1).clamp(min=1)

        def summed(values):  # prompt learning prepends positions
            return (values[:, -mask.shape[1] :].float() * mask).sum(1)

        if self.precompute_ref_logps:
            ref_logps = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        else:  # after the policy's run, which the hook saw too if an adapter is all that tells them apart
            reference = [output for output in reference if getattr(output, "log_probs", None) is not None][-1]
            ref_logps = summed(reference.log_probs)
        metrics = {}
        if self._source == "entropy":
            entropy = summed(reference.entropy) / num_tokens
            dispersion = F.neg_log_dispersion(*entropy.chunk(2), self._vocabulary, scale=self.dispersion_scale)
            metrics["dispersion/entropy"] = F.normalised_entropy(*entropy.chunk(2), self._vocabulary)
        elif self._source:
            dispersion = self.dispersion_scale * dispersion
        if dispersion is not None:
            metrics["dispersion/neg_log_mean"] = dispersion

        ref_logps = None if self.objective.reference_free else ref_logps
        alignment = summed(policy[0].log_sum_sq_probs) if self.objective.on_policy_weighting else None
        logps = summed(policy[0].log_probs)
        loss = self.objective(logps, num_tokens, ref_logps, dispersion, alignment=alignment)
        total = loss.losses.mean()
        if self.aux_loss_enabled:
            total = total + self.router_aux_loss_coef * policy[0].aux_loss

        chosen, rejected = loss.chosen_rewards, loss.rejected_rewards
        rewards = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
        }
        for name in rewards:
            self._metrics[mode][name].pop()
        metrics |= rewards
        means = self.accelerator.gather(torch.stack(list(metrics.values()), dim=1).detach()).mean(0)
        for name, mean in zip(metrics, means.tolist(), strict=True):
            self._metrics[mode][name].append(mean)
        return (total, result[1]) if return_outputs else total


@dataclass
class _WithDispersion:
    """A collator whose batch also has the neg-log dispersion of each pair, [B] float32, from a column of the data."""

    collator: Any
    source: str
    link: str

    def __call__(self, rows):
        check_column(self.source, rows[0], "a data set", self.link)
        values = [row[self.source] for row in rows]
        if self.source == "agreement":
            values = agreement_to_neg_log_dispersion(values, self.link)
        values = np.asarray(values, dtype=np.float64)  # of None, NaN
        bad = ~((values >= 0) & (values < math.inf))
        if bad.any():
            raise ValueError(f"neg_log_dispersion must be finite and >= 0, got {values[bad][0]}")
        return dict(self.collator(rows)) | {_DISPERSION: torch.tensor(values, dtype=torch.float32)}
