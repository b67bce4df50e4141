"""TRL's DPOTrainer with our objectives: against TRL itself, against MallowsTrainer, and what it refuses."""

import dataclasses
import importlib
import math
import re
import sys
import types

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import lora, plain_stats, tiny_model, tiny_pairs, tiny_tokenizer, tiny_trainer, train_logs
from transformers import HfArgumentParser, TrainerCallback

from mallowspo import preset
from mallowspo.data import tokenize_pairs
from mallowspo.dispersion import agreement_to_neg_log_dispersion

trl = pytest.importorskip("trl", minversion="1.16", reason="trl is not installed: pip install 'mallowspo[trl]'")
from mallowspo.integrations.trl import ENTROPY_SCALE, DPOConfig, DPOTrainer  # noqa: E402

STEPS = 5
SETTINGS = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 3,
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def trainer_of(kind, config, folder, model_type="llama", peft=False, data=None, eval_data=None, **options):
    """One of the two DPOTrainers on the same model, reference and data."""
    torch.manual_seed(0)
    return kind(
        model=tiny_model(model_type),
        ref_model=None if peft else tiny_model(model_type, seed=1),  # another, so that the margins are not all zero
        args=config(output_dir=str(folder), **SETTINGS | options),
        train_dataset=tiny_pairs(2 * STEPS) if data is None else data,
        eval_dataset=tiny_pairs(4, seed=1) if eval_data is None else eval_data,
        processing_class=tiny_tokenizer(),
        peft_config=lora(init_lora_weights=False) if peft else None,
        callbacks=[Gradients()],
    )


def ours(folder, **options):
    return trainer_of(DPOTrainer, DPOConfig, folder, **options)


def trained(trainer):
    """Training and evaluation logs without the clock's, and the gradients of every step."""
    trainer.train()
    metrics = {k: v for k, v in trainer.evaluate().items() if "runtime" not in k and "per_second" not in k}
    (gradients,) = (c.steps for c in trainer.callback_handler.callbacks if isinstance(c, Gradients))
    assert len(gradients) == STEPS and all(max(g.abs().max() for g in step.values()) > 0 for step in gradients)
    return train_logs(trainer), metrics, gradients


def assert_same(found, expected, without=(), rel=1e-5, abs=1e-6):
    (logs, metrics, gradients), (logs_, metrics_, gradients_) = found, expected
    for log, log_ in zip([*logs, metrics], [*logs_, metrics_], strict=True):
        log = {name: value for name, value in log.items() if not any(word in name for word in without)}
        assert log == pytest.approx(log_, rel=rel, abs=abs)
    for step, step_ in zip(gradients, gradients_, strict=True):
        assert step.keys() == step_.keys()
        for name in step:
            torch.testing.assert_close(step[name], step_[name], rtol=1e-4, atol=1e-6)


# Against TRL itself

THEIR_RUNS = {
    "dpo": ({"loss_type": ["dpo"]}, {"loss_type": "sigmoid"}),
    "robust": (
        {"loss_type": ["robust-dpo"], "beta": 0.3},
        {"loss_type": "robust", "label_smoothing": 0.1, "beta": 0.3},
    ),
    "hinge": ({"loss_type": ["hinge"]}, {"loss_type": "hinge"}),
    "accumulated": ({"loss_type": ["dpo"], "gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 2}),
    "adapter": ({"loss_type": ["dpo"], "peft": True}, {"peft": True}),
    "precomputed": ({"loss_type": ["dpo"], "precompute_ref_log_probs": True}, {"precompute_ref_log_probs": True}),
    "checkpointed": ({"loss_type": ["dpo"], "gradient_checkpointing": True}, {"gradient_checkpointing": True}),
    "bfloat16": ({"loss_type": ["dpo"], "bf16": True}, {"bf16": True}),
    "experts": ({"loss_type": ["dpo"], "model_type": "mixtral"}, {"model_type": "mixtral"}),
    # with the dispersion of a = 1/2 the theta link is Bradley-Terry
    "theta at 1/2": ({"data": "halves"}, {}),
}


@pytest.mark.parametrize("name", THEIR_RUNS)
def test_equals_trl_where_the_objective_does(tmp_path, name):
    options, theirs = (dict(setting) for setting in THEIR_RUNS[name])
    if options.get("data") == "halves":
        options["data"] = tiny_pairs(2 * STEPS, neg_log_dispersion=[0.5] * 2 * STEPS)
        options["eval_data"] = tiny_pairs(4, seed=1, neg_log_dispersion=[0.5] * 4)
    expected = trained(trainer_of(trl.DPOTrainer, trl.DPOConfig, tmp_path / "trl", **theirs))
    found = trained(ours(tmp_path / "ours", **options))
    tolerance = {"rel": 2e-2, "abs": 1e-3} if name == "bfloat16" else {}
    assert_same(found, expected, without=["dispersion/"], **tolerance)
    assert len({log["loss"] for log in expected[0]}) == STEPS
    if name == "experts":
        assert expected[0][0]["aux_loss"] > 0


def test_ipo_is_that_of_trl_up_to_its_scale(tmp_path):
    """Ours is (beta delta - 1/2)^2, theirs (delta - 1 / (2 beta))^2."""
    beta = 0.2
    theirs = trainer_of(trl.DPOTrainer, trl.DPOConfig, tmp_path / "trl", loss_type="ipo", beta=beta).evaluate()
    found = ours(tmp_path / "ours", loss_type="ipo", beta=beta).evaluate()
    assert found["eval_loss"] == pytest.approx(beta**2 * theirs["eval_loss"], rel=1e-4)


# Against MallowsTrainer


def mallows(folder, peft=False, data=None, eval_data=None, **options):
    model = tiny_model()
    reference = {} if peft or options["loss_type"] == "simpo" else {"ref_model": tiny_model(seed=1)}
    trl_alone = ("bf16", "gradient_checkpointing")
    return tiny_trainer(
        folder,
        model=model,
        seed=42,  # TRL's default: both draw the adapter's weights after it
        peft_config=lora(init_lora_weights=False) if peft else None,
        train_dataset=tiny_pairs(2 * STEPS) if data is None else data,
        eval_dataset=tiny_pairs(4, seed=1) if eval_data is None else eval_data,
        callbacks=[Gradients()],
        **reference,
        **{name: value for name, value in SETTINGS.items() if name not in trl_alone} | options,
    )


ENTROPY = {"dispersion_scale": 0.2}
AGREEMENT = {"agreement": np.linspace(0.55, 1.0, 2 * STEPS).tolist()}
TOKENS, REFERENCES = ("d2po", "ld-dpo", "sampo", "bmc"), ("mrpo",)
# One of a kind: the formulas of all presets are compared elsewhere.
NAMES = [
    "dpo",
    "ipo",
    "simpo",
    "mallows-phi",
    "mallows-simpo",
    "rainbowpo",
    "apo-down",
    "aot",
    "mallows-theta+focal",
    "wpo",
]
OUR_RUNS = [
    *({"loss_type": name} | (ENTROPY if preset(name).uses_dispersion else {}) for name in NAMES),
    {"loss_type": "mallows-phi", "smoothing": 0.3, "beta": 1.0, "label_smoothing": 0.1} | ENTROPY,
    {"loss_type": "mallows-theta", "sft_weight": 0.3, "gamma": 0.2, "peft": True} | ENTROPY,
    {"loss_type": "mallows-phi", "data": AGREEMENT, "dispersion_scale": 0.7},
    {"loss_type": "mallows-theta", "data": AGREEMENT, "precompute_ref_log_probs": True, "dispersion_scale": 1.0},
]
# Theirs alone, ours alone, or of different meaning: policy's entropy over all tokens or by response; ties.
DIFFERENT = ("num_tokens", "logits/", "mean_token", "/scale", "log_ratio/", "accuracies", "entropy", "epoch")


@pytest.mark.parametrize("options", OUR_RUNS, ids=str)
def test_equals_mallows_trainer(tmp_path, options):
    options = dict(options)
    if "data" in options:
        values = options.pop("data")
        options["data"] = tiny_pairs(2 * STEPS, **values)
        options["eval_data"] = tiny_pairs(4, seed=1, **values)
    expected = trained(mallows(tmp_path / "mallows", **options))
    found = trained(ours(tmp_path / "ours", **options))

    def comparable(logs):
        return {name: value for name, value in logs.items() if not any(word in name for word in DIFFERENT)}

    for side in (found, expected):
        side[0][:] = [comparable(log) for log in side[0]]
    # TRL averages its evaluation by batches, of 3 and 1 pairs here; only the loss is by pairs in both
    evaluations = [{"eval_loss": side[1]["eval_loss"]} for side in (found, expected)]
    assert_same((found[0], evaluations[0], found[2]), (expected[0], evaluations[1], expected[2]), rel=1e-4, abs=1e-5)


def test_the_normalised_entropy_is_that_of_mallows_trainer(tmp_path):
    """And the column gives what the agreement's formula says."""
    trainer, other = (make(tmp_path / make.__name__, loss_type="mallows-phi", **ENTROPY) for make in (ours, mallows))
    trained(trainer), trained(other)
    for log, log_ in zip(train_logs(trainer), train_logs(other), strict=True):
        assert log["dispersion/entropy"] == pytest.approx(log_["dispersion/entropy"], rel=1e-5)
    data = tiny_pairs(2 * STEPS, **AGREEMENT)
    trainer = ours(tmp_path / "column", data=data, eval_data=data, per_device_eval_batch_size=2 * STEPS)
    expected = agreement_to_neg_log_dispersion(AGREEMENT["agreement"], "mallows-theta").mean()
    assert trainer.evaluate()["eval_dispersion/neg_log_mean"] == pytest.approx(expected, rel=1e-6)


def test_the_index_is_over_all_outcomes_of_the_model(tmp_path):
    """A head is often wider than its tokenizer."""
    reference, data = tiny_model(seed=1, vocab_size=30), tiny_pairs(4, seed=1)
    rows = tokenize_pairs(data, tiny_tokenizer()).to_list()
    expected = plain_stats(reference, rows)[1].mean().item() / math.log(30)
    args = DPOConfig(output_dir=str(tmp_path), **SETTINGS | {"per_device_eval_batch_size": 4})
    sets = {"train_dataset": data, "eval_dataset": data, "processing_class": tiny_tokenizer()}
    found = DPOTrainer(tiny_model(vocab_size=30), reference, args, **sets).evaluate()
    assert found["eval_dispersion/entropy"] == pytest.approx(expected, rel=1e-5)


# Names, defaults, options


def test_metric_names_are_those_of_trl_and_the_dispersion(tmp_path):
    theirs = trainer_of(trl.DPOTrainer, trl.DPOConfig, tmp_path / "trl", max_steps=1)
    trainer = ours(tmp_path / "ours", max_steps=1)
    theirs.train(), trainer.train()
    more = {"dispersion/neg_log_mean", "dispersion/entropy"}
    assert train_logs(trainer)[0].keys() == train_logs(theirs)[0].keys() | more
    assert trainer.evaluate().keys() == theirs.evaluate().keys() | {f"eval_{name}" for name in more}


def test_defaults(tmp_path):
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True)
    assert args.loss_type == ["mallows-theta"] and args.objective() == preset("mallows-theta")
    assert ours(tmp_path).dispersion_scale == ENTROPY_SCALE == 0.29 / 2
    data = tiny_pairs(2 * STEPS, **AGREEMENT)
    assert ours(tmp_path, data=data, eval_data=data).dispersion_scale == 1.0
    assert dataclasses.replace(args) == args


def test_without_a_reference_given_trl_makes_one(tmp_path):
    """From the model's path, so that policy and reference are equal and every margin is 0: in bfloat16 as well."""
    tiny_model().save_pretrained(tmp_path / "model")
    args = DPOConfig(output_dir=str(tmp_path), **SETTINGS | {"bf16": True})
    path = str(tmp_path / "model")
    trainer = DPOTrainer(path, args=args, train_dataset=tiny_pairs(4), processing_class=tiny_tokenizer())
    trainer.train()
    first = train_logs(trainer)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["rewards/margins"] == 0
    assert 0 < first["dispersion/entropy"] < 1
    assert first["rewards/accuracies"] == 0  # of ties, as TRL counts them


def test_from_the_command_line(tmp_path):
    line = f"--output_dir {tmp_path} --use_cpu --loss_type mallows-phi --beta 0.2 --dispersion_scale 0.29"
    (args,) = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(line.split())
    assert args.objective() == preset("mallows-phi", beta=0.2) and args.dispersion_scale == 0.29


@pytest.mark.parametrize("preset, papers", [("mallows-phi", 2), ("ipo", 1)])
def test_the_card_names_what_was_trained(tmp_path, preset, papers):
    trainer = ours(tmp_path, loss_type=preset)
    trainer.create_model_card(model_name="mine", tags="liked")
    card = (tmp_path / "README.md").read_text()
    assert f"trained with {preset}" in card and "Direct Preference" not in card and card.count("```bibtex") == papers
    assert f"| link | {trainer.objective.link} |" in card and "- mallowspo" in card and "- liked" in card
    assert ("phi_star = 0.145" in card) == trainer.objective.uses_dispersion


def test_predictions_of_trl_still_work(tmp_path):
    """TRL runs the model once more for the logits it hands to compute_metrics; that run is no reference."""
    trainer = ours(tmp_path, peft=True)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        assert outputs.logits.shape[:2] == batch["input_ids"].shape
        assert loss == trainer.compute_loss(trainer.model, batch)


# Refusals

REFUSED = [
    *(({"loss_type": name}, f"'{name}' has token weights.*use mallowspo.MallowsTrainer") for name in TOKENS),
    *(({"loss_type": name}, f"'{name}' has several references.*MallowsTrainer") for name in REFERENCES),
    ({"loss_type": "sigmoid"}, "unknown preset 'sigmoid'; its name here is 'dpo'"),
    ({"loss_type": ["dpo", "hinge"]}, "loss_type must be one preset, got .'dpo', 'hinge'.*sft_weight"),
    ({"loss_weights": [1.0]}, "loss_weights=.1.0. changes what TRL computes"),
    ({"f_divergence_type": "js_divergence"}, "f_divergence_type='js_divergence' changes.*leave it at 'reverse_kl'"),
    ({"use_liger_kernel": True}, "use_liger_kernel=True changes"),
    ({"ld_alpha": 0.5}, "ld_alpha=0.5 changes"),
    ({"use_weighting": True}, "use_weighting=True changes"),
    ({"dispersion_scale": "auto"}, "dispersion_scale='auto' needs a pass.*mallowspo.MallowsTrainer"),
    ({"dispersion_scale": -1}, "dispersion_scale must be positive and finite, got -1.0"),
    ({"dispersion_scale": "large"}, "dispersion_scale must be a number, got 'large'"),
    ({"dispersion_source": "votes"}, "unknown dispersion_source 'votes'"),
    ({"loss_type": "dpo", "dispersion_scale": 0.3}, "'dpo'.* uses no dispersion"),
    ({"beta": 0.0}, "beta must be finite and positive"),
]


@pytest.mark.parametrize("options, match", REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_settings_that_cannot_be_meant(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        DPOConfig(output_dir=str(tmp_path), **SETTINGS | options)


def test_precomputed_log_probs_have_no_entropies(tmp_path):
    with pytest.raises(ValueError, match="precompute_ref_log_probs keeps.*not the entropies.*column neg_log_disp"):
        ours(tmp_path, precompute_ref_log_probs=True)


def test_columns_that_are_missing_or_wrong(tmp_path):
    with pytest.raises(ValueError, match="the train data set lacks the column 'agreement'"):
        ours(tmp_path, dispersion_source="agreement")
    both = tiny_pairs(2, agreement=[0.6, 0.7], neg_log_dispersion=[1.0, 2.0])
    with pytest.raises(ValueError, match="the data has both 'neg_log_dispersion' and 'agreement'"):
        ours(tmp_path, data=both)
    for sets, name in ((tiny_pairs(2), "eval"), ({"a": both, "b": tiny_pairs(2)}, "eval b")):
        with pytest.raises(ValueError, match=f"the {name} data set lacks the column 'agreement'"):
            ours(tmp_path, data=both, eval_data=sets, dispersion_source="agreement")
    with pytest.raises(ValueError, match="a data set lacks the column 'agreement'"):
        ours(tmp_path, data=both, eval_data=both, dispersion_source="agreement").evaluate(tiny_pairs(2))
    for value, told in ((-1.0, "-1.0"), (None, "nan"), (math.inf, "inf")):
        data = tiny_pairs(2, neg_log_dispersion=[2.0, value])
        with pytest.raises(ValueError, match=f"neg_log_dispersion must be finite and >= 0, got {told}"):
            ours(tmp_path, data=data, eval_data=data).train()


def test_an_agreement_that_the_smoothed_link_would_not_return_is_refused(tmp_path):
    data = tiny_pairs(2, agreement=[0.6, 0.7])
    with pytest.raises(ValueError, match="smoothing=2.0 changes the mallows-phi link.*set smoothing to 1 or less"):
        ours(tmp_path, data=data, loss_type=["mallows-phi"], smoothing=2.0)


def test_the_config_of_trl_is_refused(tmp_path):
    with pytest.raises(TypeError, match="must be a mallowspo.integrations.trl.DPOConfig, got trl.*DPOConfig"):
        trainer_of(DPOTrainer, trl.DPOConfig, tmp_path)


def test_models_of_another_kind_are_refused(tmp_path):
    model = tiny_model()
    model.config.is_encoder_decoder = True
    args = DPOConfig(output_dir=str(tmp_path), **SETTINGS)
    data = {"train_dataset": tiny_pairs(2), "processing_class": tiny_tokenizer()}
    with pytest.raises(ValueError, match="LlamaForCausalLM.* is not a text-only causal"):
        DPOTrainer(model, tiny_model(), args, **data)
    images = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c", "images": []}])
    with pytest.raises(ValueError, match="vision"):
        DPOTrainer(tiny_model(), tiny_model(), args, None, images, processing_class=tiny_tokenizer())


@pytest.mark.parametrize("bf16, adapter", [(False, False), (True, False), (False, True)])
def test_a_model_that_trl_has_trained(tmp_path, bf16, adapter):
    """TRL leaves its own forward on the object, and accelerate another one around it."""

    def fine_tuned():
        settings = SETTINGS | {"max_steps": 1, "per_device_train_batch_size": 1, "bf16": bf16, "max_length": 32}
        args = trl.SFTConfig(output_dir=str(tmp_path / "sft"), **settings)
        texts = Dataset.from_dict({"text": ["red green blue", "one two three"]})
        options = {"processing_class": tiny_tokenizer(), "peft_config": lora() if adapter else None}
        trainer = trl.SFTTrainer(tiny_model(), args, train_dataset=texts, **options)
        trainer.train()
        return trainer.model

    model = fine_tuned()
    owner = "model.get_base_model()" if adapter else "model"
    cure = re.escape(f"`del {owner}.forward` if a trainer of TRL")
    with pytest.raises(TypeError, match=f"forward of this LlamaForCausalLM was replaced.*{cure}"):
        tiny_trainer(tmp_path, model=model)
    for again in (model, fine_tuned()):
        del (again.get_base_model() if adapter else again).forward
        trainer = tiny_trainer(tmp_path, model=again)
        trainer.train()
        assert trainer.state.global_step == 2


@pytest.mark.parametrize("version", [None, "0.24.0", "2.0.0"])
def test_another_trl_is_refused_at_import(monkeypatch, version):
    monkeypatch.delitem(sys.modules, "mallowspo.integrations.trl")
    monkeypatch.setitem(sys.modules, "trl", version and types.SimpleNamespace(__version__=version))
    wrong = f"needs trl >= .*, found {version}" if version else "needs the package trl"
    with pytest.raises(ImportError, match=f"{wrong}; run: pip install 'mallowspo.trl.'"):
        importlib.import_module("mallowspo.integrations.trl")


def test_the_reference_pass_over_another_set_leaves_the_dispersion_out(tmp_path):
    def pairs(rows, seed):
        return tiny_pairs(rows, seed, neg_log_dispersion=[0.5] * rows)

    options = {"loss_type": ["mallows-theta"], "precompute_ref_log_probs": True, "dispersion_scale": 1.0}
    trainer = ours(tmp_path, data=pairs(2 * STEPS, 0), eval_data=pairs(4, 1), **options)
    seen = []
    for model in (trainer.model, trainer.ref_model):
        model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    trainer.evaluate(pairs(4, 2))
    assert seen and not any("neg_log_dispersion" in names for names in seen)
