"""What is logged: means over the pairs that count, each log of its own steps."""

import pytest
import torch
from accelerate import Accelerator
from tiny import plain_stats, tiny_model, tiny_pairs, tiny_trainer, train_logs

from mallowspo.metrics import Means


def test_pairs_that_fill_up_a_batch_are_in_no_mean():
    means = Means(Accelerator(cpu=True))
    means.add("train", {"a": torch.tensor([1.0, 5.0])}, torch.tensor([1.0, 0.0]))
    means.add("train", {"a": torch.tensor([3.0, 2.0])}, torch.tensor([1.0, 1.0]))
    assert means.read("train") == {"a": 2.0} and means.read("train") == {}


def test_many_steps_are_summed_in_double():
    """A float32 sum would stop growing."""
    means = Means(Accelerator(cpu=True))
    for value in (2.0**24, 1.0, 1.0, 1.0, 1.0):
        means.add("train", {"a": torch.tensor([value])})
    assert means.read("train") == {"a": (2**24 + 4) / 5}


def test_the_entropy_is_the_policys_over_both_responses(tmp_path):
    data, policy = tiny_pairs(3), tiny_model(seed=1)
    trainer = tiny_trainer(tmp_path, policy, ref_model=tiny_model(), loss_type="dpo", eval_dataset=data)
    expected = plain_stats(tiny_model(seed=1), list(trainer._prepared(data)))[1].mean().item()
    assert trainer.evaluate()["eval_entropy"] == pytest.approx(expected, rel=1e-5)


def test_a_filler_that_is_not_a_number_is_in_no_mean():
    means = Means(Accelerator(cpu=True))
    means.add("train", {"a": torch.tensor([1.0, float("nan")])}, torch.tensor([1.0, 0.0]))
    assert means.read("train") == {"a": 1.0}


def test_adding_asks_no_device_for_a_value():
    values = torch.empty(3, device="meta")  # which has none
    means = Means(Accelerator(cpu=True))
    for mode in ("train", "eval"):
        means.add(mode, {"a": values, "b": values}, torch.empty(3, device="meta"))


def test_each_log_is_of_the_steps_since_the_last_one(tmp_path):
    options = {"rows": 8, "max_steps": 4, "learning_rate": 0.0, "lr_scheduler_type": "constant"}
    runs = []
    for steps in (1, 2):
        trainer = tiny_trainer(tmp_path, logging_steps=steps, train_sampling_strategy="sequential", **options)
        trainer.train()
        runs.append(train_logs(trainer))
    every, pairs = runs
    assert len({log["logps/chosen"] for log in every}) == 4
    for i, log in enumerate(pairs):
        for name in ("logps/chosen", "rewards/margins", "entropy"):
            expected = (every[2 * i][name] + every[2 * i + 1][name]) / 2
            assert log[name] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def interrupt(trainer, step, run):
    """Ctrl-C in the second call of a step of the run."""
    original, calls = getattr(trainer, step), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    setattr(trainer, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    setattr(trainer, step, original)


def test_an_interrupted_evaluation_leaves_nothing_to_the_next(tmp_path):
    trainer = tiny_trainer(tmp_path, eval_dataset=tiny_pairs(8, seed=1))
    expected = trainer.evaluate()["eval_logps/chosen"]
    interrupt(trainer, "prediction_step", trainer.evaluate)
    assert trainer.evaluate()["eval_logps/chosen"] == pytest.approx(expected, rel=1e-6)


def test_an_interrupted_training_leaves_nothing_to_the_next(tmp_path):
    options = {"logging_steps": 2, "learning_rate": 0.0, "train_sampling_strategy": "sequential"}
    trainer = tiny_trainer(tmp_path, **options)
    trainer.train()
    expected = train_logs(trainer)[0]["logps/chosen"]
    interrupt(trainer, "training_step", trainer.train)
    trainer.train()
    assert train_logs(trainer)[-1]["logps/chosen"] == pytest.approx(expected, rel=1e-6)
