"""The trainer from its user's side: it learns, reports, scores, and refuses what it cannot do."""

import logging
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from jinja2 import TemplateError
from tiny import Averaging, lora, tiny_model, tiny_pairs, tiny_tokenizer, tiny_trainer, train_logs

import mallowspo
from mallowspo import MallowsConfig, MallowsTrainer
from mallowspo.adapters import add_adapter

PROMPTS = [
    f"{a} {b}" for a in "red green blue one two three".split() for b in "cat dog sky sea up down yes no".split()
]


def learnable(rows, shuffle, seed):
    """Pairs whose chosen response says good and whose rejected one says bad, or either by the toss of a coin."""
    draw = np.random.default_rng(seed)
    data = []
    for prompt in draw.choice(PROMPTS, rows):
        sides = [f" {draw.choice(PROMPTS)} {word}" for word in ("good", "bad")]
        if shuffle and draw.random() < 0.5:
            sides.reverse()
        data.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
    return Dataset.from_list(data)


# Learning


@pytest.mark.parametrize("loss_type", ["mallows-theta", "mallows-phi", "mallows-simpo", "dpo"])
def test_a_separable_preference_is_learnt(tmp_path, loss_type):
    held_out = learnable(100, shuffle=False, seed=1)
    options = {"max_steps": 20, "per_device_train_batch_size": 16, "learning_rate": 2e-2}
    trainer = tiny_trainer(
        tmp_path,
        train_dataset=learnable(64, shuffle=False, seed=0),
        eval_dataset=held_out,
        loss_type=loss_type,
        **options,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_rewards/accuracies"] < 0.75 and after["eval_rewards/accuracies"] > 0.97
    assert after["eval_loss"] < 0.5 * before["eval_loss"] and after["eval_rewards/margins"] > 0.5


def test_shuffled_labels_are_not_learnt(tmp_path):
    """Held-out labels are 400 coins: whatever was learnt, accuracy has mean 1/2 and deviation 0.025; four are 0.1."""
    held_out = learnable(400, shuffle=True, seed=1)
    options = {"max_steps": 20, "per_device_train_batch_size": 16, "learning_rate": 2e-2}
    train = learnable(64, shuffle=True, seed=0)
    trainer = tiny_trainer(tmp_path, train_dataset=train, eval_dataset=held_out, **options)
    trainer.train()
    metrics = trainer.evaluate()
    assert abs(metrics["eval_rewards/accuracies"] - 0.5) < 0.1
    assert metrics["eval_loss"] > math.log(2) - 0.05
    assert train_logs(trainer)[-1]["loss"] != pytest.approx(math.log(2), abs=1e-2)  # it did train


# Metrics

SHARED_WITH_TRL = {
    *("loss", "grad_norm", "learning_rate", "entropy", "logps/chosen", "logps/rejected"),
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
}
OURS = {"log_ratio/chosen", "log_ratio/rejected"}
DISPERSION = {"dispersion/neg_log_mean", "dispersion/entropy"}


@pytest.mark.parametrize("loss_type, more", [("mallows-theta", DISPERSION), ("dpo", set())])
def test_metric_names(tmp_path, loss_type, more):
    trainer = tiny_trainer(tmp_path, loss_type=loss_type, eval_dataset=tiny_pairs(3, seed=1))
    trainer.train()
    scale = {"dispersion/scale"} if more else set()
    assert set(train_logs(trainer)[0]) == SHARED_WITH_TRL | OURS | more | scale | {"epoch", "step"}
    expected = {f"eval_{name}" for name in (SHARED_WITH_TRL - {"grad_norm", "learning_rate"}) | OURS | more}
    clock = {"epoch", *(f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second"))}
    assert set(trainer.evaluate()) == expected | clock


@pytest.mark.parametrize("eval_batch", [1, 2, 3, 5, 8])
def test_evaluation_is_the_mean_over_pairs(tmp_path, eval_batch):
    """Means of batch means would give the pairs of a small last batch more weight."""
    data = tiny_pairs(5, seed=1)
    trainer = tiny_trainer(tmp_path, eval_dataset=data, per_device_eval_batch_size=eval_batch, max_steps=3)
    trainer.train()
    metrics, scores = trainer.evaluate(), trainer.score(data)
    margins = scores["chosen_rewards"] - scores["rejected_rewards"]
    expected = {
        "loss": scores["losses"],
        "rewards/chosen": scores["chosen_rewards"],
        "rewards/margins": margins,
        "rewards/accuracies": margins > 0,
        "logps/rejected": scores["rejected_logps"],
        "log_ratio/chosen": (scores["chosen_logps"] - scores["ref_chosen_logps"]) / scores["chosen_tokens"],
        "dispersion/neg_log_mean": scores["neg_log_dispersion"],
        "dispersion/entropy": (scores["ref_chosen_entropy"] + scores["ref_rejected_entropy"]) / 2 / math.log(20),
    }
    for name, values in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(values.mean(), rel=1e-5, abs=1e-6), name
    assert np.ptp(scores["losses"]) > 1e-3


def test_training_metrics_are_means_over_pairs(tmp_path):
    data = tiny_pairs(5)
    options = {"learning_rate": 0.0, "logging_steps": 3, "max_steps": 3}  # one epoch in batches of 2, 2, 1
    trainer = tiny_trainer(tmp_path, train_dataset=data, loss_type="simpo", **options)
    scores = trainer.score(data)
    trainer.train()
    (log,) = train_logs(trainer)
    assert log["logps/chosen"] == pytest.approx(scores["chosen_logps"].mean(), rel=1e-5)
    assert log["rewards/rejected"] == pytest.approx(scores["rejected_rewards"].mean(), rel=1e-5)


def test_ties_count_half(tmp_path):
    metrics = tiny_trainer(tmp_path, ref_model=tiny_model(), loss_type="dpo", eval_dataset=tiny_pairs(4)).evaluate()
    assert metrics["eval_rewards/accuracies"] == 0.5


def test_evaluating_does_not_disturb_the_metrics_of_training(tmp_path):
    logs = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": tiny_pairs(3, seed=1)}):
        trainer = tiny_trainer(tmp_path, max_steps=4, logging_steps=2, **options)
        trainer.train()
        logs.append(train_logs(trainer))
    assert logs[0] == logs[1] and len(logs[0]) == 2


@pytest.mark.parametrize("workers", [{}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}])
def test_several_evaluation_sets(tmp_path, workers):
    """Persistent workers are kept by name: the second set was evaluated on the first one's."""
    sets = {"a": tiny_pairs(3, seed=1), "b": tiny_pairs(4, seed=2)}
    trainer = tiny_trainer(tmp_path, eval_dataset=sets, eval_strategy="steps", eval_steps=2, **workers)
    trainer.train()
    for _ in range(2):
        metrics = trainer.evaluate()
        for name, data in sets.items():
            assert metrics[f"eval_{name}_loss"] == pytest.approx(trainer.score(data)["losses"].mean(), rel=1e-5)
    assert metrics["eval_a_loss"] != metrics["eval_b_loss"]


def test_an_evaluation_set_beside_the_constructors(tmp_path):
    """Persistent workers are kept under one name for all sets given as objects, here once for each set."""
    first, second = tiny_pairs(3, seed=1), tiny_pairs(4, seed=2)
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = tiny_trainer(tmp_path, ref_model=tiny_model(seed=3), loss_type="dpo", eval_dataset=first, **workers)
    expected = {name: trainer.score(data)["losses"].mean() for name, data in {"a": first, "b": second}.items()}
    assert expected["a"] != pytest.approx(expected["b"], rel=1e-2)
    for _ in range(2):
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected["a"], rel=1e-5)
        assert trainer.evaluate(second)["eval_loss"] == pytest.approx(expected["b"], rel=1e-5)
    metrics = trainer.evaluate({"a": first, "b": second})
    assert {name: metrics[f"eval_{name}_loss"] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert trainer.get_eval_dataloader() is trainer.get_eval_dataloader(first)
    assert trainer.get_eval_dataloader(second) is trainer.get_eval_dataloader(second)


def test_the_best_model_by_accuracy(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        train_dataset=learnable(32, shuffle=False, seed=0),
        eval_dataset=learnable(20, shuffle=False, seed=1),
        metric_for_best_model="eval_rewards/accuracies",
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=4,
        save_steps=4,
        max_steps=12,
        per_device_train_batch_size=8,
    )
    trainer.train()
    seen = [log["eval_rewards/accuracies"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(seen) == 3 and trainer.state.best_metric == max(seen) == trainer.evaluate()["eval_rewards/accuracies"]


# Scores


def test_scores_name_the_rows_that_were_kept(tmp_path):
    rows = tiny_pairs(4).to_list()
    rows[1]["prompt"] = "red " * 10
    trainer = tiny_trainer(tmp_path, train_dataset=tiny_pairs(4), eval_dataset=Dataset.from_list(rows), max_length=10)
    scores, whole = trainer.score(trainer.eval_dataset), trainer.score(trainer.train_dataset)
    assert scores["row"].tolist() == [0, 2, 3] and scores["row"].dtype == np.int64
    for name, values in scores.items():
        assert values.shape == (3,) and values == pytest.approx(whole[name][[0, 2, 3]], rel=1e-5), name
        assert values.dtype == np.float64 or name == "row"


def test_scoring_leaves_the_model_in_its_mode(tmp_path):
    trainer = tiny_trainer(tmp_path)
    for training in (True, False):
        trainer.model.train(training)
        trainer.score(trainer.train_dataset)
        assert trainer.model.training is training
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_scores_are_of_the_point_that_the_optimizer_evaluates(tmp_path):
    model, data = tiny_model(), tiny_pairs(3, seed=1)
    optimizer = Averaging(model.parameters(), lr=0.1)
    trainer = tiny_trainer(tmp_path, model=model, optimizers=(optimizer, None), eval_dataset=data)
    trainer.train()
    assert optimizer.shift == 0.0
    scores = trainer.score(data)
    assert optimizer.shift == 0.3 and scores["losses"].mean() == pytest.approx(trainer.evaluate()["eval_loss"])


# Sizes


@pytest.mark.parametrize("rows, batch", [(1, 4), (3, 8), (1, 1)])
def test_a_data_set_smaller_than_the_batch(tmp_path, rows, batch):
    options = {"rows": rows, "per_device_train_batch_size": batch, "max_steps": -1, "num_train_epochs": 2}
    trainer = tiny_trainer(tmp_path, eval_dataset=tiny_pairs(1, seed=1), **options)
    trainer.train()
    assert len(train_logs(trainer)) == 2 * -(-rows // batch) and math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, adapter, reentrant):
    logs = []
    for checkpointing in (False, True):
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}} if checkpointing else {}
        if adapter:
            options["peft_config"] = lora(init_lora_weights=False)
        trainer = tiny_trainer(tmp_path, gradient_checkpointing=checkpointing, **options)
        calls = []
        trainer.model.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *a, calls=calls: calls.append(1))
        trainer.train()
        logs.append(train_logs(trainer))
    assert len(calls) == 2 * len(logs[0])  # the blocks really ran again
    for found, expected in zip(*logs, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6) and found["grad_norm"] > 0


# Refusals


def test_the_model_itself_as_its_reference(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="ref_model is the model itself"):
        tiny_trainer(tmp_path, model=model, ref_model=model)
    with pytest.raises(ValueError, match="ref_model is the model itself or has its weights"):
        tiny_trainer(tmp_path, model=add_adapter(model, lora()), ref_model=model)


def test_a_reference_is_frozen(tmp_path):
    for options in ({}, {"ref_model": tiny_model()}):
        trainer = tiny_trainer(tmp_path, loss_type="dpo", **options)
        assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())


def test_a_model_that_is_no_reference_with_its_adapter_off(tmp_path):
    def make(loss_type="dpo", ref_model=None, precompute_ref_log_probs=False, **adapter):
        options = {"loss_type": loss_type, "precompute_ref_log_probs": precompute_ref_log_probs}
        tiny_trainer(tmp_path, tiny_model("qwen2"), peft_config=lora(**adapter), ref_model=ref_model, **options)

    for adapter, why in ({"bias": "all"}, "bias is trained"), ({"init_lora_weights": "pissa"}, "below the adapter"):
        with pytest.raises(ValueError, match=why):
            make(**adapter)
        make(ref_model=tiny_model("qwen2"), **adapter)
        make(loss_type="simpo", **adapter)
    make(precompute_ref_log_probs=True, bias="all")


def test_two_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), lora())
    with pytest.raises(ValueError, match="already has an adapter"):
        tiny_trainer(tmp_path, model=model, peft_config=lora())


def test_several_gpus_in_one_process(tmp_path, monkeypatch):
    """torch's DataParallel splits every tensor of a batch by rows, and the flat positions are not rows."""
    monkeypatch.setattr(MallowsConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match="one process sees 2 GPUs.*accelerate launch"):
        tiny_trainer(tmp_path)


BAD_ARGUMENTS = [
    ({"args": "mine"}, TypeError, "args must be a MallowsConfig, got str"),
    ({"model": None}, TypeError, "a model must be a PreTrainedModel, .* name or folder of one, got None"),
    ({"model": 123}, TypeError, "a model must be .*, got 123"),
    ({"ref_model": 123}, TypeError, "a model must be .*, got 123"),
    ({"train_dataset": None}, ValueError, "train_dataset is missing"),
    ({"train_dataset": [{"prompt": "a"}]}, TypeError, "datasets.Dataset.*got list"),
    ({"train_dataset": tiny_pairs(1).select([])}, ValueError, "empty"),
    ({"train_dataset": Dataset.from_dict({"text": ["a"]})}, ValueError, "lacks.*chosen.*rejected"),
    ({"eval_dataset": Dataset.from_dict({"text": ["a"]})}, ValueError, "lacks.*chosen.*rejected"),
    (
        {"eval_dataset": {"a": tiny_pairs(2), "b": None}},
        TypeError,
        r"eval_dataset\['b'\] is None: give a data set, or leave 'b' out",
    ),
    ({"processing_class": object()}, TypeError, "processing_class must be a tokenizer, got object"),
    ({"peft_config": {"r": 2}}, TypeError, "peft_config must be a peft.PeftConfig, .* got dict"),
    ({"processing_class": None}, ValueError, "pass its tokenizer as processing_class"),
]


@pytest.mark.parametrize("change, error, match", BAD_ARGUMENTS, ids=[match for _, _, match in BAD_ARGUMENTS])
def test_bad_arguments(tmp_path, change, error, match):
    arguments = {
        "model": tiny_model(),
        "args": MallowsConfig(output_dir=str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True),
        "train_dataset": tiny_pairs(2),
        "processing_class": tiny_tokenizer(),
    }
    with pytest.raises(error, match=match):
        MallowsTrainer(**arguments | change)


def test_no_evaluation_set(tmp_path):
    with pytest.raises(ValueError, match="eval_dataset"):
        tiny_trainer(tmp_path).evaluate()


def test_a_refused_data_set_is_named(tmp_path):
    sets = {"long": tiny_pairs(2), "short": tiny_pairs(1).select([])}
    with pytest.raises(ValueError, match="data set is empty") as refusal:
        tiny_trainer(tmp_path, eval_dataset=sets)
    assert refusal.value.__notes__ == ["This is about the eval short data set."]
    tokenizer, turns = tiny_tokenizer(), ("prompt", "chosen", "rejected")
    tokenizer.chat_template = "{{ raise_exception('no ' + messages[0].content) }}"
    chats = Dataset.from_list([{turn: [{"role": "user", "content": f"system {turn}"}] for turn in turns}])
    with pytest.raises(TemplateError, match="no system") as refusal:
        tiny_trainer(tmp_path, train_dataset=chats, processing_class=tokenizer)
    assert refusal.value.__notes__ == ["The chat template was given row 0.", "This is about the train data set."]


def test_lengths_that_leave_nothing(tmp_path):
    rows = [{"prompt": "red " * 8, "chosen": " good", "rejected": " bad"}]
    with pytest.raises(ValueError, match="all 1 preference pairs were dropped: 1 with a prompt too long"):
        tiny_trainer(tmp_path, train_dataset=Dataset.from_list(rows), max_length=8)
    rows = [{"prompt": "", "chosen": "", "rejected": " bad"}]
    with pytest.raises(ValueError, match="1 with an empty completion"):
        tiny_trainer(tmp_path, train_dataset=Dataset.from_list(rows))


def test_a_tokenizer_without_a_pad_token_pads_with_eos(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    trainer = tiny_trainer(tmp_path, processing_class=tokenizer)
    assert trainer.data_collator.pad_token_id == tokenizer.eos_token_id == 2
    expected = tiny_trainer(tmp_path)
    for name, values in expected.score(expected.train_dataset).items():
        assert trainer.score(trainer.train_dataset)[name] == pytest.approx(values), name


def test_a_pad_token_is_needed_where_rows_are_padded(tmp_path):
    """A chat model may end its turns without an EOS token, and packed batches have no padding."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    pairs = {"prompt": ["red", "blue"], "chosen": [" good", " yes"], "rejected": [" bad", " no"]}
    data = Dataset.from_dict({k: [[{"role": k, "content": text}] for text in texts] for k, texts in pairs.items()})
    options = {"processing_class": tokenizer, "train_dataset": data}
    trainer = tiny_trainer(tmp_path, **options)
    trainer.train()
    assert trainer.state.global_step == 2
    with pytest.raises(
        TypeError, match="pad_token_id must be an int, got None: set tokenizer.pad_token; any token will"
    ):
        tiny_trainer(tmp_path, share_prompt=False, **options)


@pytest.mark.parametrize("given", [True, False])
def test_model_init_kwargs_beside_a_model_that_is_loaded(tmp_path, caplog, given):
    tiny_model().save_pretrained(tmp_path / "model")
    model = tiny_model() if given else str(tmp_path / "model")
    options = {"ref_model": str(tmp_path / "model"), "model_init_kwargs": {"dtype": "bfloat16"}, "loss_type": "dpo"}
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(tmp_path, model=model, **options)
    assert trainer.ref_model.dtype == torch.bfloat16 and (trainer.model.dtype == torch.float32) == given
    told = [r for r in caplog.records if "model_init_kwargs is for models given by name; this Llama" in r.message]
    assert len(told) == given


def test_default_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    trainer = MallowsTrainer(model, train_dataset=tiny_pairs(2), processing_class=tiny_tokenizer())
    assert trainer.args.output_dir == "model-mallows-theta" and trainer.objective == mallowspo.preset("mallows-theta")
    assert trainer.model is model and "mallowspo" in model.model_tags
