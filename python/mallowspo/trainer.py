"""MallowsTrainer: transformers.Trainer for preference pairs with a dispersion-weighted loss."""

import copy
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from transformers.utils import logging

from mallowspo import _C
from mallowspo import functional as F
from mallowspo.config import MallowsConfig
from mallowspo.data import REFERENCE_COLUMNS, PreferenceCollator, tokenize_pairs
from mallowspo.dispersion import (
    agreement_to_neg_log_dispersion,
    calibrated_scale,
    fingerprint,
    load_cache,
    save_cache,
)
from mallowspo.modeling import SequenceStats, attach_token_stats, sequence_stats

logger = logging.get_logger(__name__)


class MallowsTrainer(Trainer):
    """Fine-tunes a causal language model on preference pairs.

    Where the reference log-probabilities and entropies come from, in this order: the cache of one pass before training,
    if ``args.precompute_ref_log_probs`` or the objective needs the entropies beforehand; ``ref_model``; for a PEFT model
    the model itself with its adapter off; a frozen copy of the model as it is now.

    Args:
        model: a ``PreTrainedModel`` with a plain linear head, a ``PeftModel`` of one, or a name or folder to load.
        ref_model: the reference, a ``PreTrainedModel``, name or folder; not the same object as model.
        args: MallowsConfig; default: one with output_dir "<model>-<loss_type>".
        train_dataset, eval_dataset: ``datasets.Dataset`` in one of TRL's preference formats (see
            ``mallowspo.data.tokenize_pairs``); eval_dataset may be a dict of them.
        processing_class: the tokenizer; default: the model's own. Without a pad token it pads with EOS.
        peft_config: a ``peft.PeftConfig`` to wrap the model with.
        callbacks, optimizers: as in ``transformers.Trainer``.

    Metrics, each a sum over all ranks divided by a count over all ranks: ``rewards/chosen``, ``rewards/rejected``,
    ``rewards/margins``, ``rewards/accuracies`` (ties count half), ``logps/chosen``, ``logps/rejected``,
    ``log_ratio/chosen``, ``log_ratio/rejected`` (policy over reference, per token), ``entropy`` (of the policy), and for
    mallows objectives ``dispersion/neg_log_mean`` and ``dispersion/entropy`` (the normalised index).

    Raises:
        TypeError, ValueError: a model, reference or data set that cannot be used, with the reason.
    """

    def __init__(
        self,
        model,
        ref_model=None,
        args=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        callbacks=None,
        optimizers=(None, None),
    ):
        name = model if isinstance(model, str) else model.config._name_or_path
        if args is None:
            args = MallowsConfig(output_dir=f"{Path(name).name or 'model'}-{MallowsConfig.loss_type}")
        if not isinstance(args, MallowsConfig):
            raise TypeError(f"args must be a MallowsConfig, got {type(args).__name__}")
        self.objective = args.objective()
        model, ref_model = (self._load(m, args) if isinstance(m, str) else m for m in (model, ref_model))
        if ref_model is model:
            raise ValueError(
                "ref_model is the model itself and would be trained with it; leave it out or load it again"
            )
        if peft_config is not None:
            model = self._with_adapter(model, peft_config)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(name)
        if processing_class.pad_token_id is None:
            processing_class.pad_token = processing_class.eos_token
        if train_dataset is None:
            raise ValueError("train_dataset is missing")

        self._is_peft = hasattr(model, "peft_config")
        for m in filter(None, (model, ref_model)):
            if getattr(getattr(m, "active_peft_config", None), "is_prompt_learning", False):
                raise ValueError("prompt learning changes the positions that are scored; use LoRA or another adapter")
            attach_token_stats(m.get_base_model() if hasattr(m, "peft_config") else m)
            if args.disable_dropout:
                _disable_dropout(m)
        if self._is_peft and args.gradient_checkpointing:
            model.enable_input_require_grads()  # else a checkpointed block sees no input that needs a gradient
        if ref_model is not None:
            ref_model.requires_grad_(False)

        evals = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        given = {"train": train_dataset} | {f"eval {k}": d for k, d in evals.items() if d is not None}
        self._sums = {"train": {}, "eval": {}}
        with PartialState().main_process_first():  # the others read the cache that `datasets` keeps
            self._prepared_sets = {id(d): (d, self._tokenize(d, args, processing_class)) for d in given.values()}
        super().__init__(
            model=model,
            args=args,
            data_collator=PreferenceCollator(processing_class.pad_token_id, args.pad_to_multiple_of),
            train_dataset=self._prepared(train_dataset),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # compute_loss divides by the number of pairs of the whole optimiser step; the base class must not divide again.
        self.model_accepts_loss_kwargs = True
        self.model.add_model_tags(["mallowspo"])
        self._set_up_reference(ref_model, given)

    # ---- setting up ------------------------------------------------------------------------------------------------

    @staticmethod
    def _load(name, args):
        return AutoModelForCausalLM.from_pretrained(name, **(args.model_init_kwargs or {}))

    @staticmethod
    def _with_adapter(model, peft_config):
        try:
            from peft import get_peft_model
        except ImportError as error:
            raise ImportError("peft_config needs the package peft; run: pip install 'mallowspo[peft]'") from error
        if hasattr(model, "peft_config"):
            raise ValueError("model already has an adapter; pass either a PeftModel or peft_config, not both")
        return get_peft_model(model, peft_config)

    @staticmethod
    def _tokenize(dataset, args, tokenizer):
        return tokenize_pairs(dataset, tokenizer, max_length=args.max_length, num_proc=args.dataset_num_proc)

    def _prepared(self, dataset):
        """A data set as its user has it -> tokenised, with the reference's columns where the pass saw it."""
        if id(dataset) in self._prepared_sets:
            return self._prepared_sets[id(dataset)][1]
        return (
            dataset
            if "prompt_ids" in dataset.column_names
            else self._tokenize(dataset, self.args, self.processing_class)
        )

    def get_eval_dataloader(self, eval_dataset=None):
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        chosen = self.eval_dataset[chosen] if isinstance(chosen, str) else chosen
        if chosen is None:
            raise ValueError("there is no eval_dataset; pass one to the constructor or to evaluate()")
        return super().get_eval_dataloader(self._prepared(chosen))

    def _set_up_reference(self, ref_model, given):
        """Decides where reference and dispersion come from and makes the cached pass where one is needed."""
        args, objective = self.args, self.objective
        self._source = self._dispersion_source() if objective.uses_dispersion else None
        needs_entropy, needs_logps = self._source == "entropy", not objective.reference_free
        if not (needs_logps or needs_entropy) and (ref_model is not None or args.precompute_ref_log_probs):
            raise ValueError(
                f"loss_type {args.loss_type!r} reads no reference; leave ref_model and precompute_ref_log_probs out"
            )
        cached = (needs_logps and args.precompute_ref_log_probs) or (
            needs_entropy and (args.dispersion_scale == "auto" or objective.reference_free)
        )
        self.ref_model = None
        if ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        elif needs_logps and not cached and not self._is_peft:
            self.ref_model = copy.deepcopy(self.model).requires_grad_(False)
        if cached:
            for name, dataset in {id(d): (name, d) for name, d in given.items()}.values():
                self._prepared_sets[id(dataset)] = dataset, self._with_reference(self._prepared(dataset), name)
            self.train_dataset = self._prepared(given["train"])
        # A model fully fine-tuned without a copy is its own reference until its first step, that is until here.
        self._has_live_reference = self.ref_model is not None or self._is_peft
        self.dispersion_scale = self._find_scale() if objective.uses_dispersion else None
        if objective.uses_dispersion:
            logger.info(f"dispersion from {self._source}, dispersion_scale = {self.dispersion_scale:.6g}")

    def _dispersion_source(self):
        columns = self.train_dataset.column_names
        found = [name for name in ("neg_log_dispersion", "agreement") if name in columns]
        source = self.args.dispersion_source
        if source is None and len(found) > 1:
            raise ValueError(f"the data has both {found[0]!r} and {found[1]!r}; choose one by dispersion_source")
        if source not in (None, "entropy", *found):
            raise ValueError(f"dispersion_source is {source!r}, a column that the data lacks")
        return source or (found[0] if found else "entropy")

    def _find_scale(self):
        if self.args.dispersion_scale != "auto":
            return self.args.dispersion_scale
        if self._source != "entropy":
            return 1.0
        chosen, rejected = (
            torch.tensor(self.train_dataset[name][:]) for name in ("ref_chosen_entropy", "ref_rejected_entropy")
        )
        return calibrated_scale(F.neg_log_dispersion(chosen, rejected, self._vocabulary()).numpy())

    def _vocabulary(self):
        return self.accelerator.unwrap_model(self.model).get_output_embeddings().weight.shape[0]

    # ---- the reference ---------------------------------------------------------------------------------------------

    def _with_reference(self, dataset, name):
        """The data set with the reference's columns, from the cache or from one pass."""
        model = self.accelerator.unwrap_model(self.model if self.ref_model is None else self.ref_model)
        settings = {
            "version": _C.build["version"],
            "mixed_precision": self.accelerator.mixed_precision,
            "attention": model.config._attn_implementation,
        }
        key = fingerprint(model, dataset, settings)
        directory = Path(self.args.reference_cache_dir or Path(self.args.output_dir) / "reference_cache")
        path = directory / f"{key}.safetensors"
        self.accelerator.wait_for_everyone()  # no rank looks for the file while another writes it
        if path.exists():
            logger.info(f"reference log-probabilities and entropies of {name} read from {path}")
            columns = load_cache(path, key, len(dataset))
        else:
            columns = self._over_pairs(dataset, self._reference_columns, f"Reference pass ({name})")
            if self.accelerator.is_main_process:
                save_cache(path, columns, key)
        for column, values in columns.items():
            dataset = dataset.add_column(column, values.numpy())
        return dataset

    def _reference_columns(self, batch):
        stats = self._reference_stats(batch)
        halves = *stats.logps.chunk(2), *stats.entropy.chunk(2)
        return dict(zip(REFERENCE_COLUMNS, halves, strict=True))

    @torch.no_grad()
    def _over_pairs(self, dataset, compute, description):
        """``compute(batch)`` -> dict of [B] tensors, over the data set split over the ranks -> dict of [rows] on the CPU."""
        size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        # Every rank makes as many passes as the others, who may wait for it; what hangs over is cut off again.
        share = -(-len(dataset) // world)
        parts = []
        for start in tqdm(range(0, share, size), desc=description, disable=rank != 0):
            rows = [(rank * share + i) % len(dataset) for i in range(start, min(start + size, share))]
            batch = self._prepare_inputs(self.data_collator([dataset[row] for row in rows]))
            with self.accelerator.autocast():
                parts.append(compute(batch))
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name: self.accelerator.gather(values)[: len(dataset)].cpu() for name, values in columns.items()}

    @torch.no_grad()
    def _reference_stats(self, batch):
        """SequenceStats [2B] of the live reference."""
        model = self.model_wrapped if self.ref_model is None else self.ref_model
        without_adapter = nullcontext()
        if self.ref_model is None and self._is_peft:
            without_adapter = self.accelerator.unwrap_model(self.model).disable_adapter()
        training = model.training
        model.eval()
        try:
            with without_adapter, self.accelerator.autocast():
                return sequence_stats(model, batch)
        finally:
            model.train(training)

    def _reference_of(self, batch):
        """Reference SequenceStats [2B] of a batch: from its columns, else from the live model, else None."""
        if "ref_chosen_logps" in batch:
            logps, entropy = (
                torch.cat([batch[f"ref_chosen_{name}"], batch[f"ref_rejected_{name}"]])
                for name in ("logps", "entropy")
            )
            return SequenceStats(logps, entropy)
        if self.objective.reference_free and self._source != "entropy":
            return None
        if not self._has_live_reference:
            raise ValueError(
                "this data set was not given to the constructor, so the reference never saw it, and by now the model has "
                "changed: pass it as eval_dataset, or pass ref_model"
            )
        return self._reference_stats(batch)

    def _dispersion_of(self, batch, reference):
        """[B] float32 neg-log dispersion, scaled; None where the objective uses none."""
        if not self.objective.uses_dispersion:
            return None
        if self._source == "entropy":
            return F.neg_log_dispersion(*reference.entropy.chunk(2), self._vocabulary(), scale=self.dispersion_scale)
        values = batch[self._source]
        if self._source == "agreement":
            values = torch.as_tensor(agreement_to_neg_log_dispersion(values.cpu(), self.objective.link)).to(values)
        return self.dispersion_scale * values

    # ---- the step --------------------------------------------------------------------------------------------------

    def _pair_losses(self, model, batch):
        """Loss of each pair, its statistics and its metrics: everything that a step, an evaluation and a score share."""
        reference = self._reference_of(batch)
        policy = sequence_stats(model, batch)
        dispersion = self._dispersion_of(batch, reference)
        tokens = batch["num_tokens"]
        ref_logps = None if self.objective.reference_free else reference.logps
        loss = self.objective(policy.logps, tokens, ref_logps, dispersion)
        return loss, policy, reference, dispersion

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, policy, reference, dispersion = self._pair_losses(model, inputs)
        self._record("train" if model.training else "eval", inputs, loss, policy, reference, dispersion)
        if num_items_in_batch is None:
            total = loss.losses.mean()
        else:  # DDP averages over ranks, so the share of this one is scaled up
            total = loss.losses.sum() * self.accelerator.num_processes / num_items_in_batch
        return (total, {}) if return_outputs else total

    def _get_num_items_in_batch(self, batch_samples, device):
        """Pairs in the whole optimiser step, over micro-batches and ranks: what its loss is divided by."""
        if not batch_samples:
            return None
        pairs = torch.tensor(sum(len(batch["num_tokens"]) // 2 for batch in batch_samples), device=device)
        return self.accelerator.gather(pairs).sum()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    # ---- metrics: sums and counts, reduced over the ranks once when they are read -----------------------------------

    def _record(self, mode, batch, loss, policy, reference, dispersion):
        tokens = batch["num_tokens"]
        chosen, rejected = loss.chosen_rewards, loss.rejected_rewards
        values = {
            "loss": loss.losses,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": ((chosen > rejected).float() + (chosen >= rejected).float()) / 2,
            "logps/chosen": policy.logps.chunk(2)[0],
            "logps/rejected": policy.logps.chunk(2)[1],
            "entropy": policy.entropy,
        }
        if reference is not None:
            ratio = (policy.logps - reference.logps) / tokens
            values["log_ratio/chosen"], values["log_ratio/rejected"] = ratio.chunk(2)
        if dispersion is not None:
            values["dispersion/neg_log_mean"] = dispersion
            if self._source == "entropy":
                values["dispersion/entropy"] = reference.entropy / np.log(self._vocabulary())
        sums = self._sums[mode]
        for name, value in values.items():
            value = value.detach().double()
            sums[name] = sums.get(name, 0) + torch.stack([value.sum(), torch.ones_like(value).sum()])

    def _read_metrics(self, mode):
        """Means over everything recorded since the last call, over all ranks; the same keys on every rank."""
        sums, self._sums[mode] = self._sums[mode], {}
        if not sums:
            return {}
        names = sorted(sums)
        total = self.accelerator.reduce(torch.stack([sums[name] for name in names]), reduction="sum").cpu()
        return {name: (value / count).item() for name, (value, count) in zip(names, total, strict=True)}

    def log(self, logs, start_time=None):
        if "loss" in logs:  # a log of training; evaluations add theirs in evaluation_loop
            metrics = self._read_metrics("train")
            metrics.pop("loss", None)
            logs |= metrics
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._sums["eval"].clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in self._read_metrics("eval").items()})
        return output

    # ---- per-pair results ------------------------------------------------------------------------------------------

    def score(self, dataset):
        """What policy and reference say of every pair.

        Args:
            dataset: a data set given to the constructor, or another in the same format where the reference is live.

        Returns:
            dict of float64 arrays, one value a pair, in the order of the data set: ``row`` (int64, the row in it: pairs
            without a completion token within max_length are left out), ``chosen_logps``, ``rejected_logps``,
            ``chosen_tokens``, ``rejected_tokens``, ``losses``, ``chosen_rewards``, ``rejected_rewards``; with a
            reference ``ref_chosen_logps``, ``ref_rejected_logps``, ``ref_chosen_entropy``, ``ref_rejected_entropy``
            (mean nats a token); with a dispersion ``neg_log_dispersion``, scaled.
        """
        tokenized = self._prepared(dataset)
        if tokenized is not None and "row" not in tokenized.column_names:
            raise ValueError("score() takes a data set of text or messages")

        def compute(batch):
            loss, policy, reference, dispersion = self._pair_losses(self.model_wrapped, batch)
            columns = {
                "losses": loss.losses,
                "chosen_rewards": loss.chosen_rewards,
                "rejected_rewards": loss.rejected_rewards,
            }
            stats = {"{}_logps": policy.logps, "{}_tokens": batch["num_tokens"]}
            if reference is not None:
                stats |= {"ref_{}_logps": reference.logps, "ref_{}_entropy": reference.entropy}
            for name, values in stats.items():
                columns[name.format("chosen")], columns[name.format("rejected")] = values.chunk(2)
            return columns if dispersion is None else columns | {"neg_log_dispersion": dispersion}

        training = self.model.training
        self.model.eval()
        columns = self._over_pairs(tokenized, compute, "Scoring")
        self.model.train(training)
        return {"row": np.asarray(tokenized["row"][:])} | {k: v.double().numpy() for k, v in columns.items()}


def _disable_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
