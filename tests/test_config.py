"""MallowsConfig: every field changes something, and values that cannot be meant are refused."""

import dataclasses
import re

import pytest
import torch
from tiny import WORDS, cache_files, tiny_model, tiny_pairs, tiny_tokenizer, tiny_trainer, train_logs
from transformers import HfArgumentParser, TrainingArguments

from mallowspo import MallowsConfig, presets
from mallowspo.data import tokenize_pairs

BOTH_COLUMNS = {"agreement": [0.6, 0.9, 0.75], "neg_log_dispersion": [0.1, 1.0, 3.0]}


def losses(folder, **options):
    """The losses of a short run, the first of which depends on no beta and the second on everything."""
    trainer = tiny_trainer(folder, **{"train_dataset": tiny_pairs(3, **BOTH_COLUMNS)} | options)
    trainer.train()
    return [log["loss"] for log in train_logs(trainer)]


def files(folder, **options):
    """Where the reference pass was kept."""
    tiny_trainer(folder, **options)
    return [path.name for path in cache_files(folder)]


def pass_lengths(folder, **options):
    """Tokens that each forward of the reference pass sends to the head."""
    model, seen = tiny_model(), []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[:-1].numel()))
    tiny_trainer(folder, model=model, **options)
    return seen


def width(folder, **options):
    trainer = tiny_trainer(folder, **options)
    return trainer.data_collator(list(tokenize_pairs(trainer.train_dataset, tiny_tokenizer())))["input_ids"].shape[1]


def lengths(folder, **options):
    trainer = tiny_trainer(folder, **options)
    return trainer.score(trainer.train_dataset)["chosen_tokens"].tolist()


def dtype(folder, **options):
    tiny_model().save_pretrained(folder / "model")
    return tiny_trainer(folder, model=str(folder / "model"), **options).model.dtype


MEASURED = {"dispersion_source": "neg_log_dispersion"}
MIXED = {"loss_type": "mrpo", "ref_model": [tiny_model(seed=1), tiny_model(seed=2)]}
# field: (value, what else must be set, what to look at). The field's default gives another outcome.
TABLE = {
    "learning_rate": (0.1, MEASURED, losses),
    "logging_steps": (1, {"max_steps": 10, **MEASURED}, lambda *a, **k: len(losses(*a, **k))),
    "loss_type": ("mallows-phi", MEASURED, losses),
    "beta": (0.7, MEASURED, losses),
    "gamma": (0.3, MEASURED, losses),
    "label_smoothing": (0.2, MEASURED, losses),
    "smoothing": (0.2, {"loss_type": "mallows-phi", "beta": 2.0, **MEASURED}, losses),
    "focal_gamma": (0.5, MEASURED, losses),
    "divergence_alpha": (-3.0, {"loss_type": "alpha"}, losses),
    "discopop_tau": (2.0, {"loss_type": "discopop"}, losses),
    "reference_mixing": (0.5, MEASURED, losses),
    "sft_weight": (0.5, MEASURED, losses),
    "token_decay": (0.9, MEASURED, losses),
    "ld_alpha": (0.5, MEASURED, losses),
    "bridge_delta": (2.0, MEASURED, losses),
    "diff_stop_words": (WORDS[4:], {"bridge_delta": 2.0, **MEASURED}, losses),
    "own_token_weights": (True, {"bridge_delta": 99.0, **MEASURED}, losses),
    "reference_weights": ([0.3, 0.7], MIXED, losses),
    "reference_clip": (0.01, MIXED, losses),
    "adaptive_clip": (False, MIXED, losses),
    "swap_reference_weights": (True, MIXED, losses),
    "dispersion_source": ("agreement", {"train_dataset": tiny_pairs(3, neg_log_dispersion=[1.0, 2.0, 3.0])}, None),
    "dispersion_scale": (3.0, MEASURED, losses),
    "precompute_ref_log_probs": (True, {"loss_type": "dpo"}, files),
    "reference_cache_dir": ("elsewhere", {}, files),
    "precompute_ref_batch_size": (1, {}, pass_lengths),
    "max_length": (5, {}, lengths),
    "share_prompt": (False, {}, width),
    "pad_to_multiple_of": (32, {}, width),
    "dataset_num_proc": (2, {}, None),
    "disable_dropout": (False, {"model": "dropout", **MEASURED}, losses),
    "model_init_kwargs": ({"dtype": "bfloat16"}, {}, dtype),
    "remove_unused_columns": (True, {}, None),
}


def own_fields():
    inherited = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    return {
        f.name for f in dataclasses.fields(MallowsConfig) if inherited.get(f.name, dataclasses.MISSING) != f.default
    }


def test_the_table_has_every_field():
    assert own_fields() == TABLE.keys()


@pytest.mark.parametrize("field", [name for name, (*_, look) in TABLE.items() if look])
def test_every_field_changes_something(tmp_path, monkeypatch, field):
    monkeypatch.chdir(tmp_path)
    value, others, look = TABLE[field]
    default = next(f.default for f in dataclasses.fields(MallowsConfig) if f.name == field)
    outcomes = []
    for number, setting in enumerate((default, default, value)):
        options = dict(others)
        if "model" in options:
            options["model"] = tiny_model(attention_dropout=0.5)
        outcomes.append(look(tmp_path / str(number), **options, **{field: setting}))
    assert outcomes[0] == outcomes[1] != outcomes[2]


def test_dataset_num_proc_is_handed_on(tmp_path, monkeypatch):
    seen = []

    def spy(*args, num_proc, **kwargs):
        seen.append(num_proc)
        return tokenize_pairs(*args, **kwargs)

    monkeypatch.setattr("mallowspo.trainer.tokenize_pairs", spy)
    tiny_trainer(tmp_path)
    tiny_trainer(tmp_path, dataset_num_proc=2)
    assert seen == [None, 2]


def test_dispersion_source(tmp_path):
    data = tiny_pairs(3, **BOTH_COLUMNS)
    found = {
        s: losses(tmp_path / s, train_dataset=data, dispersion_source=s, seed=1) for s in ("agreement", "entropy")
    }
    found["column"] = losses(tmp_path / "column", train_dataset=data, seed=1, **MEASURED)
    assert len({curve[-1] for curve in found.values()}) == 3


REFUSED = [
    ({"loss_type": "sigmoid"}, "unknown preset 'sigmoid'; its name here is 'dpo'"),
    ({"loss_type": "exo_pair"}, "unknown preset 'exo_pair'; its name here is 'exo-pair'"),
    ({"loss_type": "dpo + cdpo"}, "unknown preset 'dpo '; its name here is 'dpo'"),
    ({"loss_type": "mallows"}, "unknown preset 'mallows'; choose one of dpo, .*mallows-theta"),
    (
        {"loss_type": ["sigmoid", "bco_pair", "sft"]},
        "must be one preset, got .'sigmoid', 'bco_pair', 'sft'.; sft_weight",
    ),
    *(
        ({"loss_type": value}, f"must be one preset, got {re.escape(repr(value))}")
        for value in ([], None, 3, [3], True)
    ),
    ({"beta": 0.0}, "beta must be finite and positive, got 0.0"),
    ({"beta": float("nan")}, "beta must be finite"),
    ({"gamma": float("inf")}, "gamma must be finite, got inf"),
    ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
    ({"loss_type": "robust-dpo", "label_smoothing": 0.0}, "robust=True corrects label_smoothing, which is 0"),
    ({"smoothing": 0.5}, "smoothing=0.5 is read by the link 'mallows-phi' alone"),
    ({"sft_weight": -1.0}, "sft_weight must be finite and >= 0, got -1.0"),
    ({"loss_type": "d2po", "token_decay": 0.0}, r"token_decay must be in \(0, 1\]"),
    ({"loss_type": "sampo+simpo"}, "down_sampling=True takes the length out"),
    ({"loss_type": "mrpo", "reference_weights": [0.5]}, r"must be positive and add up to 1, got \(0.5,\)"),
    ({"loss_type": "mrpo", "reference_weights": ["0.5", "half"]}, "'adaptive' or one number .* got .'0.5', 'half'"),
    (
        {"loss_type": "mrpo", "reference_weights": ["adaptive", 0.5]},
        "'adaptive' or one number .* got .'adaptive', 0.5",
    ),
    *(
        ({"pad_to_multiple_of": value}, f"pad_to_multiple_of must be None or an int of at least 1, got {value!r}")
        for value in (0, -8, 8.0, True, "wide")
    ),
    ({"dispersion_scale": 0}, "dispersion_scale must be positive and finite, got 0.0"),
    ({"dispersion_scale": -0.3}, "positive and finite, got -0.3"),
    ({"dispersion_scale": float("nan")}, "positive and finite, got nan"),
    ({"dispersion_scale": "inf"}, "positive and finite, got inf"),
    ({"dispersion_scale": "large"}, "dispersion_scale must be 'auto' or a number, got 'large'"),
    ({"dispersion_scale": None}, "dispersion_scale must be 'auto' or a number, got None"),
    ({"dispersion_scale": True}, "dispersion_scale must be 'auto' or a number, got True"),
    ({"dispersion_source": "votes"}, "unknown dispersion_source 'votes'.*neg_log_dispersion, agreement, entropy"),
    (
        {"loss_type": "dpo", "dispersion_source": "entropy"},
        "'dpo' uses no .* out dispersion_source and dispersion_scale",
    ),
    ({"loss_type": "ipo", "dispersion_scale": 0.3}, "'ipo' uses no dispersion"),
    ({"loss_type": "dpo", "diff_stop_words": ["the"]}, "diff_stop_words is for bmc, loss_type is 'dpo'"),
    ({"loss_type": "dpo", "diff_stop_words": []}, "diff_stop_words is for bmc, loss_type is 'dpo'"),
    ({"loss_type": "bmc", "diff_stop_words": "the"}, "diff_stop_words must be a list of words, got 'the'"),
    *(
        ({"loss_type": "bmc", "diff_stop_words": value}, f"must be a list of words, got {re.escape(repr(value))}")
        for value in ([3], 3)
    ),
    ({"loss_type": "mrpo", "reference_weights": 0.5}, "'adaptive' or one number a reference, got 0.5"),
    *(
        ({name: value}, f"{name} must be None or an int of at least {least}, got {value!r}")
        for name, least in {"max_length": 2, "precompute_ref_batch_size": 1, "dataset_num_proc": 0}.items()
        for value in (least - 1, -2, float(8), "8", True)
    ),
    ({"use_liger_kernel": True}, "use_liger_kernel replaces the forward .* leave it out"),
    ({"label_smoothing_factor": 0.1}, "smooths token labels, not preferences; set label_smoothing"),
    ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
    ({"train_sampling_strategy": "batch_rebalance"}, "would count twice: set dataloader_drop_last=True"),
    ({"length_column_name": "tokens"}, "length_column_name='tokens' is no column of the tokenised data"),
]


@pytest.mark.parametrize("options, match", REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_impossible_values(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        MallowsConfig(output_dir=str(tmp_path), **options)


OF_ANOTHER_TYPE = [
    *(
        (
            {**others, name: value},
            f"{name} must be True or False{', or None for the default' * may_be_none}, got {value!r}",
        )
        for others, name, may_be_none in (
            ({}, "precompute_ref_log_probs", False),
            ({}, "disable_dropout", False),
            ({}, "share_prompt", True),
            ({"loss_type": "bmc"}, "own_token_weights", True),
            ({"loss_type": "mrpo", "reference_clip": 0.1}, "adaptive_clip", True),
            ({"loss_type": "mrpo"}, "swap_reference_weights", True),
        )
        for value in ("false", "auto", 0)
    ),
    ({"disable_dropout": None}, "disable_dropout must be True or False, got None"),
    ({"reference_cache_dir": 3}, "reference_cache_dir must be a path or None, got 3"),
    *(
        ({"model_init_kwargs": value}, f"model_init_kwargs must be a dictionary or None, got {re.escape(repr(value))}")
        for value in ("bfloat16", ["dtype"], 3)
    ),
    ({"reference_mixing": "0.5"}, "reference_mixing must be a number, got '0.5'"),
    ({"beta": "0.1"}, "beta must be a number, got '0.1'"),
]


@pytest.mark.parametrize("options, match", OF_ANOTHER_TYPE, ids=[str(options) for options, _ in OF_ANOTHER_TYPE])
def test_values_of_another_type(tmp_path, options, match):
    """As a configuration file may have them; a string is true, whatever it says."""
    with pytest.raises(TypeError, match=match):
        MallowsConfig(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_a_loss_type(tmp_path, name):
    args = MallowsConfig(output_dir=str(tmp_path), loss_type=name, beta=0.5)
    assert args.objective().beta == 0.5 and dataclasses.replace(args).objective() == args.objective()


def test_what_trl_has_by_default(tmp_path):
    args = MallowsConfig(output_dir=str(tmp_path), loss_type=["dpo"], pad_to_multiple_of="auto", share_prompt=True)
    assert args.loss_type == "dpo" and args.pad_to_multiple_of is None


def test_the_least_values(tmp_path):
    least = {"max_length": 2, "precompute_ref_batch_size": 1, "dataset_num_proc": 0, "pad_to_multiple_of": 1}
    args = MallowsConfig(output_dir=str(tmp_path), reference_cache_dir=tmp_path, **least)
    assert {name: getattr(args, name) for name in least} == least and args.reference_cache_dir == tmp_path


@pytest.mark.parametrize("given, multiple", [("auto", None), ("8", 8)])
def test_a_multiple_from_the_command_line(tmp_path, given, multiple):
    line = f"--output_dir {tmp_path} --pad_to_multiple_of {given}"
    (args,) = HfArgumentParser(MallowsConfig).parse_args_into_dataclasses(line.split())
    assert args.pad_to_multiple_of == multiple == dataclasses.replace(args).pad_to_multiple_of


@pytest.mark.parametrize("given, multiple", [("auto", None), ("8", 8), ("'8'", 8), ("null", None)])
def test_a_multiple_from_trls_file(tmp_path, monkeypatch, given, multiple):
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'mallowspo[trl]'")
    file = tmp_path / "config.yaml"
    file.write_text(f"pad_to_multiple_of: {given}\n")
    line = ["--config", str(file), "--output_dir", str(tmp_path)]
    (args,) = trl.TrlParser((MallowsConfig,)).parse_args_and_config(line)
    assert args.pad_to_multiple_of == multiple


@pytest.mark.parametrize("given, weights", [("adaptive", "adaptive"), ("0.25 0.75", (0.25, 0.75))])
def test_weights_of_references_from_the_command_line(tmp_path, given, weights):
    line = f"--output_dir {tmp_path} --loss_type mrpo --reference_weights {given}"
    (args,) = HfArgumentParser(MallowsConfig).parse_args_into_dataclasses(line.split())
    assert args.objective().reference_weights == weights
    assert dataclasses.replace(args).objective() == args.objective()


def test_from_the_command_line(tmp_path):
    line = f"--output_dir {tmp_path} --loss_type mallows-phi --beta 0.2 --dispersion_scale 0.29 --smoothing 0.5"
    line += " --max_length 99 --precompute_ref_log_probs true --learning_rate 5e-7"
    (args,) = HfArgumentParser(MallowsConfig).parse_args_into_dataclasses(
        [*line.split(), "--model_init_kwargs", '{"dtype": "bfloat16"}']
    )
    assert (args.beta, args.smoothing, args.dispersion_scale, args.max_length) == (0.2, 0.5, 0.29, 99)
    assert args.precompute_ref_log_probs is True and args.learning_rate == 5e-7
    assert args.model_init_kwargs == {"dtype": torch.bfloat16} or args.model_init_kwargs == {"dtype": "bfloat16"}
    (args,) = HfArgumentParser(MallowsConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert args == MallowsConfig(output_dir=str(tmp_path)) and args.dispersion_scale == "auto" and args.beta is None
