"""MallowsTrainer: transformers.Trainer for preference pairs with a dispersion-weighted loss."""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.utils import logging

from mallowspo import functional as F
from mallowspo.adapters import add_adapter, check_adapter_off
from mallowspo.collator import PreferenceCollator
from mallowspo.config import MallowsConfig
from mallowspo.data import PAIR_COLUMNS, evaluation_sets, extent, tokenize_pairs
from mallowspo.differences import mark_differences, stop_word_ids
from mallowspo.dispersion import agreement_to_neg_log_dispersion, calibrated_scale, check_column, chosen_source
from mallowspo.distributed import DistributedTrainer
from mallowspo.metrics import Means, pair_metrics
from mallowspo.mixture import check_reference_count
from mallowspo.model_card import WritesModelCard
from mallowspo.modeling import (
    attach_token_stats,
    check_apart,
    check_embedded,
    check_rope,
    disable_dropout,
    embedding_tables,
    evaluating,
    load_model,
    response_stats,
    share_prompts,
)
from mallowspo.reference_pass import ReadsReferences, numbered
from mallowspo.sharded import check_loaded, fully_sharded, inference_engine, is_partitioned
from mallowspo.token_weights import weighted_logps

logger = logging.get_logger(__name__)

# What of model_init_kwargs says where a model, and so its tokenizer, comes from.
_OF_BOTH = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


class MallowsTrainer(WritesModelCard, ReadsReferences, DistributedTrainer):
    """Fine-tunes a causal language model on preference pairs.

    Where the reference log-probabilities and entropies come from, in this order: the cache of one pass before training
    if ``args.precompute_ref_log_probs`` or the objective needs the entropies beforehand; ``ref_model``; for a
    PEFT model the model itself with its adapter off; a frozen copy of the model as it is now. ZeRO-3 leaves nothing to
    copy: there the model is loaded again, also for the pass, and must be given by its name.

    Args:
        model: a ``PreTrainedModel`` with a linear head, a ``PeftModel`` of one, or a name or folder to load.
        ref_model: the reference, a ``PreTrainedModel``, name or folder; not the same object as model. A list of
            several, with the model's tokenizer, for an objective with ``reference_weights`` (MRPO): the anchor first,
            by whose entropies the dispersion goes; None in it means what giving no ref_model means.
        args: MallowsConfig; default: one with output_dir "<model>-<loss_type>".
        train_dataset, eval_dataset: ``datasets.Dataset`` in one of TRL's preference formats (see
            ``mallowspo.data.tokenize_pairs``); eval_dataset may be a dict of them.
        processing_class: the tokenizer; default: the model's own. Without a pad token it pads with EOS, if it has one.
        peft_config: a ``peft.PeftConfig`` to wrap the model with.
        callbacks, optimizers: as in ``transformers.Trainer``.

    Metrics, each a sum over all ranks divided by a count over all ranks: ``rewards/chosen``, ``rewards/rejected``,
    ``rewards/margins``, ``rewards/accuracies`` (ties count half), ``logps/chosen``, ``logps/rejected``,
    ``log_ratio/chosen``, ``log_ratio/rejected`` (policy over the first reference, per token), ``entropy`` (of the
    policy), and for mallows objectives ``dispersion/neg_log_mean`` (scaled) and ``dispersion/entropy`` (the normalised
    index). The log of training also has ``dispersion/scale``. Token weights are in the rewards and the loss alone.

    Raises:
        TypeError, ValueError: a model, reference or data set that cannot be used, with the reason.
    """

    def __init__(
        self,
        model: torch.nn.Module | str | Path,
        ref_model: torch.nn.Module | str | Path | list | None = None,
        args: MallowsConfig | None = None,
        *,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config=None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers=(None, None),
    ):
        if not isinstance(args, MallowsConfig | None):
            raise TypeError(f"args must be a MallowsConfig, got {type(args).__name__}")
        set_seed((args or MallowsConfig).seed)  # weights that a checkpoint lacks and an adapter's are drawn at random
        references = list(ref_model) if isinstance(ref_model, list | tuple) else [ref_model]
        self._loaded_from = model if isinstance(model, str | Path) else None
        init_kwargs = None if args is None else args.model_init_kwargs
        model = load_model(model, init_kwargs)
        references = [None if reference is None else load_model(reference, init_kwargs) for reference in references]
        name = model.config._name_or_path
        args = args or MallowsConfig(output_dir=f"{Path(name).name or 'model'}-{MallowsConfig.loss_type}")
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs and would split the batch by rows; use accelerate launch, which "
                "starts one process a GPU, or set CUDA_VISIBLE_DEVICES"
            )
        if args.model_init_kwargs and self._loaded_from is None:
            logger.warning(f"model_init_kwargs is for models given by name; this {type(model).__name__} is loaded")
        if train_dataset is None:
            raise ValueError("train_dataset is missing")
        self.objective = args.objective()
        check_reference_count(len(references), self.objective.reference_weights, self.objective.swap_reference_weights)
        loaded = [reference for reference in references if reference is not None]
        for reference in loaded:
            check_apart("ref_model", reference, model)
        if peft_config is not None:
            model = add_adapter(model, peft_config)
        if processing_class is None:
            if not name:
                raise ValueError("the model was not loaded from anywhere: pass its tokenizer as processing_class")
            given = (init_kwargs or {}) if self._loaded_from else {}
            processing_class = AutoTokenizer.from_pretrained(name, **{k: given[k] for k in _OF_BOTH if k in given})
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            kind = type(processing_class).__name__
            raise TypeError(f"processing_class must be a tokenizer, got {kind}; a processor has one in .tokenizer")
        if processing_class.pad_token_id is None:
            processing_class.pad_token = processing_class.eos_token

        self._is_peft = hasattr(model, "get_base_model")
        for m in (model, *loaded):
            self._taught(m, args)
        self._tables = [embedding_tables(m) for m in (model, *loaded)]
        if self._is_peft and args.gradient_checkpointing:
            model.enable_input_require_grads()  # else a checkpointed block sees no input that needs a gradient
        for reference in loaded:
            reference.requires_grad_(False)

        shared = self._shares_prompts(args, model, *references)
        collator = PreferenceCollator(processing_class.pad_token_id, args.pad_to_multiple_of, shared)
        if not shared:
            check_embedded(self._tables, collator.pad_token_id, 0, "the padding")
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._means = Means(self.accelerator)
        self._kept_dataloaders = {}
        # compute_loss divides by the pairs of the whole optimiser step; the base class must not divide again.
        self.model_accepts_loss_kwargs = True
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(["mallowspo"])

        given = {"train": train_dataset} | evaluation_sets(eval_dataset)
        columns = getattr(train_dataset, "column_names", None) or ()
        self._source = chosen_source(args, self.objective, columns) if self.objective.uses_dispersion else None
        with args.main_process_first(desc="tokenisation"):  # the others read the cache that `datasets` keeps
            self._prepared_sets = {id(d): (d, self._prepare(d, name)) for name, d in given.items()}
        self._set_up_references(references, given)

    # ---- setting up ------------------------------------------------------------------------------------------------

    def _prepare(self, dataset, name):
        """A data set as its user has it -> tokenised, a measured dispersion in its column neg_log_dispersion."""
        options = {"max_length": self.args.max_length, "num_proc": self.args.dataset_num_proc}
        options |= {"pair_columns": {self._source}.intersection(PAIR_COLUMNS), "desc": f"Tokenizing {name}"}
        try:
            dataset = tokenize_pairs(dataset, self.processing_class, **options)
        except Exception as error:
            error.add_note(f"This is about the {name} data set.")
            raise
        check_embedded(self._tables, *extent(dataset), f"the {name} data set")
        check_column(self._source, dataset.column_names, f"the {name} data set", self.objective.link)
        if self._source == "agreement":
            values = agreement_to_neg_log_dispersion(dataset["agreement"][:], self.objective.link)
            dataset = dataset.remove_columns("agreement").add_column("neg_log_dispersion", values)
        if self.objective.bridge_delta:
            stop_ids = stop_word_ids(self.processing_class, self.args.diff_stop_words or ())
            dataset = mark_differences(dataset, stop_ids, num_proc=self.args.dataset_num_proc)
        return dataset

    def _prepared(self, dataset):
        """The same, with the reference's columns where the pass saw it."""
        if id(dataset) in self._prepared_sets:
            return self._prepared_sets[id(dataset)][1]
        return self._prepare(dataset, "new")

    def _get_dataloader(self, dataset, *args, **kwargs):
        return super()._get_dataloader(self._prepared(dataset), *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        if self.args.dataloader_persistent_workers:
            # The base class keeps them by the set's name, and "eval" is that of all without: here each set has a
            # dictionary of its own.
            dataset = self.eval_dataset if eval_dataset is None else eval_dataset
            dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
            _, self._eval_dataloaders = self._kept_dataloaders.setdefault(id(dataset), (dataset, {}))
        return super().get_eval_dataloader(eval_dataset)

    @property
    def _cached(self):
        """Whether the references are asked in one pass before training, not in every step."""
        free = self.objective.reference_free
        if self.args.precompute_ref_log_probs and not free:
            return True
        return self._source == "entropy" and (self.args.dispersion_scale == "auto" or free)

    def _set_up_references(self, references, given):
        """Decides where references and dispersion come from and makes the cached pass where one is needed."""
        args, objective = self.args, self.objective
        needs_entropy, needs_logps = self._source == "entropy", not objective.reference_free
        if not (needs_logps or needs_entropy) and (references != [None] or args.precompute_ref_log_probs):
            superfluous = "ref_model" if references != [None] else "precompute_ref_log_probs"
            raise ValueError(f"loss_type {args.loss_type!r} reads no reference; leave out {superfluous}")
        cached = self._cached
        if self._is_peft and None in references and (needs_logps or needs_entropy):
            check_adapter_off(self.model, for_good=not cached)
        anchor = self.model if references[0] is None else references[0]
        self._vocabulary = anchor.get_output_embeddings().out_features  # the weight's shape may be of a shard
        ready, start = partial(self._ready, for_good=not cached), None
        # None among the references: the model itself, with its adapter off if it has one.
        if None in references and (is_partitioned(self.model) if cached else needs_logps and not self._is_peft):
            start = ready(self._second_model())
        references = [None if model is None else ready(model) for model in references]
        self.ref_model, *self.other_references = (start if model is None else model for model in references)
        if cached:
            if None in self.references:
                ready(self.model)
            for name, dataset in {id(d): (name, d) for name, d in given.items()}.values():
                self._prepared_sets[id(dataset)] = dataset, self._with_reference(self._prepared(dataset), name)
            self.ref_model, *self.other_references = references  # a second model has served
        self.dispersion_scale = self._find_scale() if objective.uses_dispersion else None
        if objective.uses_dispersion:
            logger.info(f"dispersion from {self._source}, dispersion_scale = {self.dispersion_scale:.6g}")

    def _second_model(self):
        """The model as it is now, frozen: a copy, or loaded again where no rank has the whole of it."""
        if not is_partitioned(self.model):
            check_loaded(self.model)
            return copy.deepcopy(self.model).requires_grad_(False)
        if self._loaded_from is None:
            raise ValueError(
                "ZeRO-3 splits this model over the ranks, which leaves no copy of it to be the reference: pass the "
                "name of the model instead, to be loaded twice, or pass ref_model"
            )
        set_seed(self.args.seed)  # as for the first one
        model = load_model(self._loaded_from, self.args.model_init_kwargs)
        return self._taught(model, self.args).requires_grad_(False)

    @staticmethod
    def _taught(model, args):
        check_rope(model, args.max_length, args.pad_to_multiple_of)
        attach_token_stats(model)
        if args.disable_dropout:
            disable_dropout(model)
        return model

    def _ready(self, model, for_good):
        """The model, ready to be called; a reference that stays is sharded and rounded as the policy will be."""
        if is_partitioned(model) or (for_good and self.is_deepspeed_enabled):
            return inference_engine(model, self.accelerator)
        check_loaded(model)
        if for_good and self.is_fsdp_enabled and self.accelerator.is_fsdp2:
            return fully_sharded(model, self.accelerator)
        if next(model.parameters()).device != self.args.device:  # FSDP, DeepSpeed leave it on the CPU
            self._move_model_to_device(model, self.args.device)
        return model

    def _find_scale(self):
        if self.args.dispersion_scale != "auto":
            return self.args.dispersion_scale
        if self._source != "entropy":
            return 1.0
        train = self._prepared(self.train_dataset)
        chosen, rejected = (torch.tensor(train[name][:]) for name in ("ref_chosen_entropy", "ref_rejected_entropy"))
        return calibrated_scale(F.neg_log_dispersion(chosen, rejected, self._vocabulary).numpy())

    @staticmethod
    def _shares_prompts(args, *models):
        """Whether batches are packed, the same on every rank; ValueError where they must be and cannot."""
        if args.share_prompt is False or (args.share_prompt is None and args.pad_to_multiple_of is not None):
            return False
        noisy = "neftune_noise_alpha has its noise by the length of a row" if args.neftune_noise_alpha else None
        obstacles = [noisy or share_prompts(model, args.max_length) for model in models if model is not None]
        (obstacle,) = broadcast_object_list([next(filter(None, obstacles), None)])
        if obstacle is None:
            return True
        if args.share_prompt:
            raise ValueError(f"share_prompt=True, but {obstacle}; or set share_prompt=False")
        logger.warning_once(f"prompts are encoded once for each response, in padded rows: {obstacle}")
        return False

    def _dispersion_of(self, batch, references):
        """[B] float32 neg-log dispersion, scaled; None where the objective uses none."""
        if not self.objective.uses_dispersion:
            return None
        if self._source == "entropy":
            return F.neg_log_dispersion(*references[0].entropy.chunk(2), self._vocabulary, scale=self.dispersion_scale)
        return self.dispersion_scale * batch["neg_log_dispersion"]

    # ---- the step --------------------------------------------------------------------------------------------------

    def _pair_losses(self, model, batch):
        """Loss of each pair, its statistics and its metrics: what a step, an evaluation and a score share."""
        references = self._reference_of(batch)
        policy = response_stats(model, batch, aligned=self.objective.on_policy_weighting)
        dispersion = self._dispersion_of(batch, references)
        step = self.state.global_step if self.model.training else 0  # score leaves a wrapper in its mode
        logps, ref_logps = weighted_logps(self.objective, batch, policy, references, seed=self.args.seed, step=step)
        of_policy = {"plain_logps": policy.logps, "alignment": policy.alignment}
        loss = self.objective(logps, batch["num_tokens"], ref_logps, dispersion, **of_policy)
        return loss, policy, references, dispersion

    def _metrics(self, batch, loss, policy, references, dispersion):
        """What is logged of each pair, {name: [B]}."""
        vocabulary = self._vocabulary if self._source == "entropy" else None
        return pair_metrics(loss, policy, next(iter(references), None), dispersion, batch["num_tokens"], vocabulary)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, *found = self._pair_losses(model, inputs)
        values = self._metrics(inputs, loss, *found)
        self._means.add("train" if model.training else "eval", values, inputs.get("counts"))
        if num_items_in_batch is None:
            total = loss.losses.mean()
        else:  # DDP averages over ranks, so the share of this one is scaled up
            total = (loss.losses * inputs["counts"]).sum() * self.accelerator.num_processes / num_items_in_batch
        return (total, {}) if return_outputs else total

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    # ---- metrics ---------------------------------------------------------------------------------------------------

    def log(self, logs, start_time=None):
        if "loss" in logs:  # a log of training; evaluations add theirs in evaluation_loop
            logs |= {name: value for name, value in self._means.read("train").items() if name != "loss"}
            if self.dispersion_scale is not None:
                logs["dispersion/scale"] = self.dispersion_scale
        super().log(logs, start_time)

    def _inner_training_loop(self, *args, **kwargs):
        self._means.drop("train")  # what a training before this one did not come to log
        return super()._inner_training_loop(*args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._means.drop("eval")
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in self._means.read("eval").items()})
        return output

    def use_evaluated_weights(self):
        """As every evaluation does: a schedule-free optimiser puts the weights to evaluate in place of those it trains
        at, and takes them back in the next step."""
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()

    # ---- per-pair results ------------------------------------------------------------------------------------------

    def score(self, dataset: Dataset) -> dict[str, np.ndarray]:
        """What policy and reference say of every pair.

        Args:
            dataset: a data set given to the constructor, or another in the same format where the reference is live.

        Returns:
            dict of float64 arrays, one value a pair, in the order of the data set: ``row`` (int64, the row in it:
            pairs without a completion token within max_length are left out), ``chosen_logps``, ``rejected_logps``,
            ``chosen_tokens``, ``rejected_tokens``, ``losses``, ``chosen_rewards``, ``rejected_rewards``; with a
            reference ``ref_chosen_logps``, ``ref_rejected_logps``, ``ref_chosen_entropy``, ``ref_rejected_entropy``
            (mean nats a token), of further ones the same with ``_1``, ``_2``, ...; with a dispersion
            ``neg_log_dispersion``, scaled.
        """
        self.check_sharded()
        tokenized = self._prepared(dataset)

        def compute(batch):
            loss, policy, references, dispersion = self._pair_losses(self.model_wrapped, batch)
            columns = {
                "losses": loss.losses,
                "chosen_rewards": loss.chosen_rewards,
                "rejected_rewards": loss.rejected_rewards,
            }
            stats = {"{}_logps": policy.logps, "{}_tokens": batch["num_tokens"]}
            for number, reference in enumerate(references):
                stats[numbered("ref_{}_logps", number)] = reference.logps
                stats[numbered("ref_{}_entropy", number)] = reference.entropy
            for name, values in stats.items():
                columns[name.format("chosen")], columns[name.format("rejected")] = values.chunk(2)
            return columns if dispersion is None else columns | {"neg_log_dispersion": dispersion}

        self.use_evaluated_weights()
        with evaluating(self.model):
            columns = self._over_pairs(tokenized, compute, "Scoring")
        return {"row": np.asarray(tokenized["row"][:])} | {k: v.double().numpy() for k, v in columns.items()}
