"""MallowsConfig: transformers.TrainingArguments plus what a preference objective needs."""

from dataclasses import dataclass, field, fields
from os import PathLike
from typing import Any

from transformers import TrainingArguments

from mallowspo.choices import check_count
from mallowspo.dispersion import SOURCES
from mallowspo.objective import PreferenceObjective, preset, presets


@dataclass
class ObjectiveArguments:
    """The fields of a PreferenceObjective that the arguments of every trainer override; None keeps the preset's.

    A base of the dataclasses of arguments, ours and the integrations', which document them. MallowsConfig has more:
    those that weigh tokens or mix references. ``objective`` reads every field that has the name of one there.
    """

    beta: float | None = field(default=None, metadata={"help": "Scale of the margin; None: the preset's."})
    gamma: float | None = field(default=None, metadata={"help": "Target margin; None: the preset's."})
    label_smoothing: float | None = field(
        default=None, metadata={"help": "Assumed share of flipped labels, in [0, 0.5); None: the preset's."}
    )
    smoothing: float | None = field(
        default=None, metadata={"help": "Half-width of the smoothed mallows-phi link; None: the preset's."}
    )
    focal_gamma: float | None = field(
        default=None, metadata={"help": "FocalPO's power of the probability; None: the preset's."}
    )
    divergence_alpha: float | None = field(
        default=None, metadata={"help": "Order of the alpha-divergence; None: the preset's."}
    )
    discopop_tau: float | None = field(default=None, metadata={"help": "DiscoPOP's temperature; None: the preset's."})
    reference_mixing: float | None = field(
        default=None, metadata={"help": "RainbowPO's share of the reference, in [0, 1]; None: the preset's."}
    )
    sft_weight: float | None = field(
        default=None, metadata={"help": "Weight of the chosen response's NLL per token; None: the preset's."}
    )

    def objective(self):
        """The PreferenceObjective these arguments describe."""
        names = {f.name for f in fields(self)}
        given = {f.name: getattr(self, f.name) for f in fields(PreferenceObjective) if f.name in names}
        return preset(
            one_preset(self.loss_type), **{name: value for name, value in given.items() if value is not None}
        )


def one_preset(loss_type):
    """The name in a loss_type that is one, or TRL's list of one; ValueError for several or another type."""
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    if not (isinstance(names, list | tuple) and len(names) == 1 and isinstance(names[0], str)):
        raise ValueError(f"loss_type must be one preset, got {names}; sft_weight adds the SFT loss")
    return names[0]


# What MallowsConfig's fields take that the objective does not check, and how a refusal says it.
_TYPES = {
    **dict.fromkeys(("precompute_ref_log_probs", "disable_dropout"), (bool, "True or False")),
    **dict.fromkeys(
        ("own_token_weights", "adaptive_clip", "swap_reference_weights", "share_prompt"),
        (bool | None, "True or False, or None for the default"),
    ),
    "reference_cache_dir": (str | PathLike | None, "a path or None"),
    "model_init_kwargs": (dict | None, "a dictionary or None"),
}
_LEAST = {"precompute_ref_batch_size": 1, "max_length": 2, "pad_to_multiple_of": 1, "dataset_num_proc": 0}


@dataclass
class MallowsConfig(ObjectiveArguments, TrainingArguments):
    """Arguments of :class:`mallowspo.MallowsTrainer`; names as in TRL's DPOConfig where the meaning is the same.

    Defaults that differ from TrainingArguments: learning_rate 1e-6, logging_steps 10, remove_unused_columns False.

    Parameters that control the objective:
        loss_type: a preset's name (``mallowspo.presets()``, docs/methods.md), or several joined by "+"; a list of one
            such name is that name.
        beta, gamma, label_smoothing, smoothing, focal_gamma, divergence_alpha, discopop_tau, reference_mixing,
        sft_weight, token_decay, ld_alpha, bridge_delta, own_token_weights, reference_weights, reference_clip,
        adaptive_clip, swap_reference_weights: override the preset's field of that name, see
            :class:`mallowspo.PreferenceObjective`; None keeps it.
        diff_stop_words: words whose tokens never count as differing between the responses, for bmc. Its authors' code
            leaves out NLTK's English stop words (``nltk.corpus.stopwords.words("english")``); None: no words.

    Parameters that control the dispersion (read where the preset's link begins with ``mallows-``):
        dispersion_source: "neg_log_dispersion" or "agreement" (a column of the data), or "entropy" (of the reference
            model). None: the column if the data has one, else the entropy.
        dispersion_scale: the factor phi_star on the neg-log dispersion, > 0, or "auto". For the entropy, "auto"
            calibrates on the training set so that the factor 2a has mean 1; a measured column it leaves as it is.

    Parameters that control the reference:
        precompute_ref_log_probs: one pass of the reference over the data before training, cached, instead of a
            reference forward in every step. Done in any case where the objective needs the reference's entropies
            beforehand: for dispersion_scale="auto" and for a reference-free objective.
        reference_cache_dir: where that pass is kept; None: ``<output_dir>/_reference_cache``, which
            ``push_to_hub`` leaves out.
        precompute_ref_batch_size: pairs a device in that pass; None: per_device_eval_batch_size.

    Parameters that control model and data:
        max_length: longest sequence, prompt and completion, in tokens; None for no limit.
        share_prompt: encode each prompt once for both of its responses, in batches without padding. None: where the
            model's attention takes such batches; else a warning says why not, and rows are padded. True: raise there.
        pad_to_multiple_of: pad rows to a multiple of this; share_prompt is False then. None, or TRL's "auto": to the
            longest of the batch.
        dataset_num_proc: processes that tokenise.
        disable_dropout: set every dropout of policy and reference to 0, but for what Falcon and Persimmon read in
            their config (0 by default); router_jitter_noise stays, by which PhiMoE routes at random in training.
        model_init_kwargs: for ``AutoModelForCausalLM.from_pretrained`` where the model is given by name; its dtype is
            float32 unless given here.

    Raises:
        TypeError: a value of another type.
        ValueError: an unknown preset, source or value.
    """

    # HfArgumentParser and the CLI take dictionaries as JSON for the fields named here.
    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["model_init_kwargs"]

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every this many optimiser steps."})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay False: the collator reads columns that no model's forward names."}
    )

    loss_type: str = field(
        default="mallows-theta", metadata={"help": f"Preset, or several joined by '+': {', '.join(presets())}."}
    )
    token_decay: float | None = field(default=None, metadata={"help": "Decay a token, d2po; None: the preset's."})
    ld_alpha: float | None = field(
        default=None, metadata={"help": "Weight beyond the shorter response's length, ld-dpo; None: the preset's."}
    )
    bridge_delta: float | None = field(
        default=None, metadata={"help": "Bound of a differing token's weight, bmc; None: the preset's."}
    )
    diff_stop_words: list[str] | None = field(
        default=None, metadata={"help": "Words that never count as differing, bmc; its authors': NLTK's for English."}
    )
    own_token_weights: bool | None = field(
        default=None, metadata={"help": "The reference draws and weighs for itself, sampo, bmc; None: the preset's."}
    )
    reference_weights: list[str] | None = field(
        default=None, metadata={"help": "Weights of the references, or adaptive, mrpo; None: the preset's."}
    )
    reference_clip: float | None = field(
        default=None, metadata={"help": "Clips references around the first, mrpo; None: the preset's."}
    )
    adaptive_clip: bool | None = field(
        default=None, metadata={"help": "Share the clip between a pair's responses, mrpo; None: the preset's."}
    )
    swap_reference_weights: bool | None = field(
        default=None, metadata={"help": "Each of two references with the other's weight, mrpo; None: the preset's."}
    )

    dispersion_source: str | None = field(
        default=None, metadata={"help": "neg_log_dispersion, agreement, entropy; None: a column if there is one."}
    )
    dispersion_scale: str = field(default="auto", metadata={"help": "phi_star, a positive number, or auto."})

    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "One cached pass of the reference instead of a forward in every step."}
    )
    reference_cache_dir: str | None = field(
        default=None, metadata={"help": "Where the reference pass is cached; None: <output_dir>/_reference_cache."}
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Pairs a device in the reference pass; None: per_device_eval_batch_size."}
    )

    max_length: int | None = field(default=1024, metadata={"help": "Longest sequence in tokens; None: no limit."})
    share_prompt: bool | None = field(
        default=None, metadata={"help": "Encode each prompt once, without padding; None: where the model can."}
    )
    pad_to_multiple_of: int | str | None = field(
        default=None, metadata={"help": "Pad rows to a multiple of this; None, auto: to the longest."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    disable_dropout: bool = field(default=True, metadata={"help": "Set the dropout of policy and reference to 0."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained where the model is a name (JSON)."}
    )

    def __post_init__(self):
        super().__post_init__()
        multiple = self.pad_to_multiple_of
        if isinstance(multiple, str) and (multiple == "auto" or multiple.isdecimal()):  # from the command line
            self.pad_to_multiple_of = None if multiple == "auto" else int(multiple)
        for name, (kind, wanted) in _TYPES.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        for name, least in _LEAST.items():
            check_count(name, getattr(self, name), least)
        self.loss_type = one_preset(self.loss_type)
        if isinstance(self.reference_weights, list):  # from the command line, of strings
            self.reference_weights = _numbers_or_adaptive(self.reference_weights)
        self.objective()
        if self.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor smooths token labels, not preferences; set label_smoothing instead"
            )
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns must be False: the collator reads columns no model's forward names"
            )
        if getattr(self, "train_sampling_strategy", None) == "batch_rebalance" and not self.dataloader_drop_last:
            raise ValueError(
                "train_sampling_strategy='batch_rebalance' fills up the last step of an epoch with pairs that cannot "
                "be told from the others and would count twice: set dataloader_drop_last=True, which leaves that step "
                "out (and an evaluation's last incomplete batch), or choose 'group_by_length'"
            )
        if self.length_column_name != "length":
            raise ValueError(
                f"length_column_name={self.length_column_name!r} is no column of the tokenised data, whose lengths "
                "are in 'length'; leave it out"
            )
        if self.use_liger_kernel:
            raise ValueError("use_liger_kernel replaces the forward that gives token statistics; leave it out")
        if self.share_prompt and self.pad_to_multiple_of is not None:
            raise ValueError("share_prompt packs batches without padding; leave pad_to_multiple_of out")
        if self.diff_stop_words is not None and not self.objective().bridge_delta:
            raise ValueError(f"diff_stop_words is for bmc, loss_type is {self.loss_type!r}; leave one of them out")
        words = [] if self.diff_stop_words is None else self.diff_stop_words
        if not (isinstance(words, list | tuple | set) and all(isinstance(word, str) for word in words)):
            raise ValueError(f"diff_stop_words must be a list of words, got {words!r}")
        check_dispersion(self, default_scale="auto")


def _numbers_or_adaptive(weights):
    try:
        return "adaptive" if weights == ["adaptive"] else [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise ValueError(f"reference_weights must be 'adaptive' or one number a reference, got {weights}") from None


def check_dispersion(args, default_scale):
    """ValueError for dispersion arguments that cannot be meant; makes a number of a scale from the command line."""
    if args.dispersion_source not in (None, *SOURCES):
        raise ValueError(f"unknown dispersion_source {args.dispersion_source!r}; choose one of {', '.join(SOURCES)}")
    if args.dispersion_scale != default_scale:
        try:
            if isinstance(args.dispersion_scale, bool):
                raise TypeError
            args.dispersion_scale = float(args.dispersion_scale)
        except (TypeError, ValueError):
            wanted = "'auto' or a number" if default_scale == "auto" else "a number"
            raise ValueError(f"dispersion_scale must be {wanted}, got {args.dispersion_scale!r}") from None
        if not 0 < args.dispersion_scale < float("inf"):
            raise ValueError(f"dispersion_scale must be positive and finite, got {args.dispersion_scale}")
    given = args.dispersion_source is not None or args.dispersion_scale != default_scale
    if given and not args.objective().uses_dispersion:
        raise ValueError(
            f"loss_type {args.loss_type!r} uses no dispersion; leave out dispersion_source and dispersion_scale"
        )
