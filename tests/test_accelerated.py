"""Accelerated rounds: the extrapolated reference against plain formulas; alpha 0 is iterative DPO, bit for bit."""

import copy
import os

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import (
    Averaging,
    cache_files,
    lora,
    plain_stats,
    split_weights,
    tiny_model,
    tiny_pairs,
    tiny_tokenizer,
    tiny_trainer,
    train_logs,
)
from transformers import TrainerCallback
from transformers.trainer_utils import sort_checkpoints

from mallowspo import AcceleratedRounds, AcceleratedTrainer, MallowsConfig, MallowsTrainer, accelerated_rounds
from mallowspo.adapters import add_adapter
from mallowspo.data import REFERENCE_COLUMNS, TOKEN_REFERENCE_COLUMNS


def config(folder, **options):
    """MallowsConfig of tiny_trainer's settings."""
    args = tiny_trainer(folder, **{"loss_type": "dpo"} | options).args
    args.precompute_ref_log_probs = True
    return args


# ---- a round --------------------------------------------------------------------------------------------------------


def test_the_loss_has_the_extrapolated_reference(tmp_path):
    """The first loss, from the whole logits of three models."""
    pairs, models = tiny_pairs(2), [tiny_model(seed=seed) for seed in range(3)]
    args = config(tmp_path, beta=0.2, learning_rate=0.0, max_steps=1)
    trainer = AcceleratedTrainer(
        *(copy.deepcopy(model) for model in models),
        alpha=0.4,
        args=args,
        train_dataset=pairs,
        processing_class=tiny_tokenizer(),
    )
    rows = list(trainer._prepared(pairs))
    policy, current, previous = (plain_stats(model, rows)[0].detach() for model in models)
    chosen, rejected = (policy - (1.4 * current - 0.4 * previous)).chunk(2)
    trainer.train()
    (log,) = train_logs(trainer)
    expected = -torch.nn.functional.logsigmoid(0.2 * (chosen - rejected)).mean()
    assert log["loss"] == pytest.approx(expected.item(), rel=1e-4)
    cached = trainer.score(pairs)
    np.testing.assert_allclose(cached["ref_chosen_entropy"], plain_stats(models[1], rows)[1][:2].detach(), rtol=1e-4)
    live = trainer.score(Dataset.from_list(list(pairs)))  # a data set of its own, which the pass has not seen
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        np.testing.assert_allclose(live[name], cached[name], rtol=1e-4, atol=1e-5)


def test_token_columns_are_extrapolated_too(tmp_path):
    pairs = tiny_pairs(2)
    trainer = AcceleratedTrainer(
        *(tiny_model(seed=seed) for seed in range(3)),
        alpha=0.4,
        args=config(tmp_path, loss_type="d2po"),
        train_dataset=pairs,
        processing_class=tiny_tokenizer(),
    )
    prepared = trainer._prepared(pairs)
    for whole, tokens in zip(REFERENCE_COLUMNS[:2], TOKEN_REFERENCE_COLUMNS, strict=True):
        assert [sum(row) for row in prepared[tokens][:]] == pytest.approx(prepared[whole][:], rel=1e-5)


def by_hand(model, data, args, rounds):
    """Iterative DPO: every round against a frozen copy of what the round before gave."""
    weights = []
    for number in range(rounds):
        trainer = MallowsTrainer(
            model, copy.deepcopy(model), args, train_dataset=data(number), processing_class=tiny_tokenizer()
        )
        trainer.train()
        weights.append(copy.deepcopy(trainer.model.state_dict()))
    return weights


@pytest.mark.parametrize("peft", [False, True])
def test_alpha_0_is_iterative_dpo(tmp_path, peft):
    def fresh():
        torch.manual_seed(0)
        return add_adapter(tiny_model(), lora()) if peft else tiny_model()

    def data(number):
        return tiny_pairs(6, seed=number)

    args = config(tmp_path / "a")
    rounds = accelerated_rounds(
        fresh(), lambda model, number: data(number), args, rounds=3, alpha=0, processing_class=tiny_tokenizer()
    )
    found = [copy.deepcopy(trainer.model.state_dict()) for trainer in rounds]
    for ours, theirs in zip(found, by_hand(fresh(), data, config(tmp_path / "b"), 3), strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_rounds_start_from_extrapolated_parameters(tmp_path):
    """Offline: each model's log-probabilities are computed once, though two rounds read them."""
    seen, pairs = [], tiny_pairs(6)

    def sample(model, number):
        seen.append(copy.deepcopy(model.state_dict()))
        return pairs

    args, after = config(tmp_path), []
    for trainer in accelerated_rounds(
        tiny_model(), sample, args, rounds=3, alpha=0.5, processing_class=tiny_tokenizer()
    ):
        after.append(copy.deepcopy(trainer.model.state_dict()))
        assert trainer.args.output_dir == str(tmp_path / f"round-{len(after)}")
    for name, weight in seen[0].items():
        assert torch.equal(weight, tiny_model().state_dict()[name])
        torch.testing.assert_close(seen[1][name], 1.5 * after[0][name] - 0.5 * weight)
        torch.testing.assert_close(seen[2][name], 1.5 * after[1][name] - 0.5 * after[0][name])
    assert all(torch.equal(weight, after[2][name]) for name, weight in trainer.model.state_dict().items())
    assert len(cache_files(tmp_path)) == 3 and not args.output_dir.endswith("round-3")


def accelerated_trainer(folder, alpha=0.5, model=None, ref_model=None, eval_dataset=None, **options):
    """An AcceleratedTrainer with a live reference unless options say otherwise."""
    options |= {} if eval_dataset is None else {"eval_dataset": eval_dataset}
    args = config(folder, **{"num_train_epochs": 3, "max_steps": -1} | options)
    args.precompute_ref_log_probs = options.get("precompute_ref_log_probs", False)
    return AcceleratedTrainer(
        model or tiny_model(),
        tiny_model() if ref_model is None else ref_model,
        alpha=alpha,
        args=args,
        train_dataset=tiny_pairs(4),
        eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer(),
    )


class Watch(TrainerCallback):
    """Runs a function at every event of a name."""

    def __init__(self, event, function):
        setattr(self, event, lambda *args, **kwargs: function())


@pytest.mark.parametrize("loss_type", ["dpo", "d2po"])
@pytest.mark.parametrize("alpha", [0, 0.5])
def test_every_epoch_is_a_round(tmp_path, alpha, loss_type):
    trainer = accelerated_trainer(tmp_path, alpha, loss_type=loss_type)
    start, before, after, references = tiny_model(), [], [], []
    batch = trainer.data_collator(list(trainer._prepared(trainer.train_dataset)))
    trainer.add_callback(AcceleratedRounds(trainer))
    trainer.add_callback(Watch("on_epoch_begin", lambda: after.append(copy.deepcopy(trainer.model))))
    trainer.add_callback(Watch("on_epoch_begin", lambda: references.append(trainer._reference_of(batch)[0])))
    trainer.add_callback(Watch("on_epoch_end", lambda: before.append(copy.deepcopy(trainer.model))))
    trainer.train()
    results = [start, *before]
    assert all(map(torch.equal, after[0].parameters(), start.parameters()))
    for number in (1, 2):
        moved, result, earlier = (m.state_dict() for m in (after[number], results[number], results[number - 1]))
        for name, weight in moved.items():
            torch.testing.assert_close(weight, (1 + alpha) * result[name] - alpha * earlier[name])
        rows = list(trainer._prepared(trainer.train_dataset))
        current, previous = (plain_stats(m, rows)[0].detach() for m in (results[number], results[number - 1]))
        expected = (1 + alpha) * current - alpha * previous
        torch.testing.assert_close(references[number].logps, expected, rtol=1e-4, atol=1e-4)
        assert references[number].token_logps.sum() == pytest.approx(expected.sum().item(), rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before[2].parameters(), trainer.model.parameters(), strict=True))
    assert not torch.equal(next(before[0].parameters()), next(before[1].parameters()))


def test_an_epoch_is_evaluated_and_saved_as_its_round_ended(tmp_path):
    """With SGD, which keeps nothing from round to round: against accelerated_rounds."""
    options = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": -1}
    options |= {"train_sampling_strategy": "sequential", "eval_dataset": tiny_pairs(3, seed=1)}
    trainer = accelerated_trainer(tmp_path / "one", eval_strategy="epoch", save_strategy="epoch", **options)
    trainer.add_callback(AcceleratedRounds(trainer))
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    saved = [load_file(f"{path}/model.safetensors") for path in sort_checkpoints(trainer.args.output_dir)]
    rounds = accelerated_rounds(
        tiny_model(),
        lambda model, number: tiny_pairs(4),
        config(tmp_path / "many", num_train_epochs=1, **options),
        rounds=3,
        alpha=0.5,
        eval_dataset=options["eval_dataset"],
        processing_class=tiny_tokenizer(),
    )
    names = ("eval_loss", "eval_rewards/margins", "eval_logps/chosen")
    for one, found, weights in zip(rounds, evaluations, saved, strict=True):
        expected = one.evaluate()
        assert {n: found[n] for n in names} == pytest.approx({n: expected[n] for n in names}, rel=1e-4)
        for name, weight in one.model.state_dict().items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-6)


def test_a_round_ends_with_the_weights_that_the_optimizer_evaluates(tmp_path, monkeypatch):
    def averaging(self, *args):
        self.optimizer = self.optimizer or Averaging(self.model.parameters(), lr=0.1)
        return self.optimizer

    monkeypatch.setattr(AcceleratedTrainer, "create_optimizer", averaging)
    trainer = accelerated_trainer(tmp_path / "epochs", num_train_epochs=1)
    trainer.train()
    trained = trainer.model.lm_head.weight.detach().clone()
    trainer.next_round()
    torch.testing.assert_close(trainer.ref_model.lm_head.weight, trained + 0.3)
    options = {"rounds": 1, "alpha": 0.5, "processing_class": tiny_tokenizer()}
    (trainer,) = accelerated_rounds(tiny_model(), lambda *_: tiny_pairs(4), config(tmp_path), **options)
    assert trainer.optimizer.optimizer.shift == 0.3


def test_what_has_no_rounds_of_epochs(tmp_path):
    with pytest.raises(TypeError, match="needs an AcceleratedTrainer, got MallowsTrainer"):
        AcceleratedRounds(tiny_trainer(tmp_path))
    for options in ({"precompute_ref_log_probs": True}, {"loss_type": "mallows-theta"}):
        with pytest.raises(ValueError, match="that of the first round"):
            AcceleratedRounds(accelerated_trainer(tmp_path, **options))
        with pytest.raises(ValueError, match="that of the first round"):
            accelerated_trainer(tmp_path, **options).next_round()
    AcceleratedRounds(accelerated_trainer(tmp_path, loss_type="mallows-theta", dispersion_scale=0.3))
    trainer = accelerated_trainer(tmp_path / "resumed", save_strategy="epoch", num_train_epochs=2)
    trainer.add_callback(AcceleratedRounds(trainer))
    trainer.train()
    with pytest.raises(ValueError, match="no models of earlier rounds"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "simpo", "precompute_ref_log_probs": False}, "has no reference"),
    ],
)
def test_what_cannot_be_accelerated(tmp_path, options, message):
    args = MallowsConfig(
        str(tmp_path), **{"loss_type": "dpo", "precompute_ref_log_probs": True, "use_cpu": True} | options
    )
    with pytest.raises(ValueError, match=message):
        AcceleratedTrainer(tiny_model(), tiny_model(), alpha=0.3, args=args, train_dataset=tiny_pairs(2))


def test_the_card_names_the_reference(tmp_path):
    models = {"ref_model": tiny_model(seed=1), "previous_model": tiny_model(seed=2)}
    tiny_trainer(tmp_path, kind=AcceleratedTrainer, alpha=0.3, loss_type="dpo", **models).create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "Reference: the results of the two rounds before, extrapolated with alpha = 0.3." in card


def test_the_model_before_must_be_another(tmp_path):
    """An adapter would be put into it too."""
    model = tiny_model()
    options = {"kind": AcceleratedTrainer, "ref_model": tiny_model(), "loss_type": "dpo", "alpha": 0.3}
    with pytest.raises(ValueError, match="previous_model is the model itself or has its weights"):
        tiny_trainer(tmp_path, model, previous_model=model, peft_config=lora(), **options)


def test_a_mixture_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be one model"):
        AcceleratedTrainer(tiny_model(), [tiny_model(), tiny_model()], alpha=0.3, args=config(tmp_path))


def test_the_model_before_must_share_prompts_too(tmp_path):
    models = {"ref_model": tiny_model(seed=1), "previous_model": tiny_model("mistral", sliding_window=16)}
    trainer = tiny_trainer(tmp_path, kind=AcceleratedTrainer, alpha=0.3, loss_type="dpo", **models)
    assert trainer.data_collator.share_prompt is False


def test_every_round_has_callbacks_and_evaluation_set(tmp_path):
    begun, options = [], {"rounds": 2, "alpha": 0.3, "processing_class": tiny_tokenizer()}
    options["callbacks"] = [Watch("on_train_begin", lambda: begun.append(1))]
    options["eval_dataset"] = tiny_pairs(3, seed=1)
    trainers = accelerated_rounds(tiny_model(), lambda *_: tiny_pairs(2), config(tmp_path), **options)
    assert all(trainer.evaluate()["eval_loss"] > 0 for trainer in trainers) and len(begun) == 2


def test_no_rounds(tmp_path):
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        next(accelerated_rounds(tiny_model(), None, config(tmp_path), rounds=0, alpha=0.3))


def test_rounds_keep_the_cache_where_they_are_told(tmp_path):
    args = config(tmp_path / "rounds", reference_cache_dir=str(tmp_path / "cache"))
    options = {"rounds": 1, "alpha": 0.3, "processing_class": tiny_tokenizer()}
    next(accelerated_rounds(tiny_model(), lambda *_: tiny_pairs(2), args, **options))
    assert len(os.listdir(tmp_path / "cache")) == 1


def test_the_model_of_rounds_is_loaded_as_it_is_told(tmp_path, caplog):
    """Once, so that no round warns that its model is loaded."""
    tiny_model().save_pretrained(tmp_path / "model")
    args = config(tmp_path / "rounds", model_init_kwargs={"dtype": "bfloat16"})
    caplog.clear()
    options = {"rounds": 1, "alpha": 0.3, "processing_class": tiny_tokenizer()}
    trainer = next(accelerated_rounds(str(tmp_path / "model"), lambda *_: tiny_pairs(2), args, **options))
    assert trainer.model.dtype == torch.bfloat16 and args.model_init_kwargs
    assert not any("model_init_kwargs" in record.message for record in caplog.records)


def test_the_model_before_is_loaded_as_the_others(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    names = {"ref_model": str(tmp_path / "model"), "previous_model": str(tmp_path / "model")}
    options = {"kind": AcceleratedTrainer, "alpha": 0.3, "loss_type": "dpo"}
    trainer = tiny_trainer(tmp_path, model_init_kwargs={"dtype": "bfloat16"}, **names, **options)
    assert trainer.previous_model.dtype == trainer.ref_model.dtype == torch.bfloat16
    frozen = [trainer.previous_model, trainer.ref_model]
    trainer.next_round()
    frozen.append(trainer.ref_model)
    assert not any(parameter.requires_grad for model in frozen for parameter in model.parameters())


@pytest.mark.parametrize("name", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_split_weights_have_no_rounds(tmp_path, monkeypatch, name):
    trainer = accelerated_trainer(tmp_path)
    setattr(trainer, name, True)
    for use in (lambda: AcceleratedRounds(trainer), trainer.next_round):
        with pytest.raises(ValueError, match="rounds copy the whole model"):
            use()
    split_weights(monkeypatch, name)
    options = {"rounds": 1, "alpha": 0.3, "processing_class": tiny_tokenizer()}
    with pytest.raises(ValueError, match="rounds copy the whole model"):
        next(accelerated_rounds(tiny_model(), lambda *_: tiny_pairs(2), config(tmp_path), **options))
