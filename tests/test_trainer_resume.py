"""Runs that must be the same run: accumulated gradients and a large batch, a resumed run and a whole one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import cache_files, lora, tiny_model, tiny_pairs, tiny_trainer, train_logs
from transformers import TrainerCallback


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimiser step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


class Stop(TrainerCallback):
    """Ends the run in the middle of things, as a failing machine would."""

    def __init__(self, step, how):
        self.step, self.how = step, how

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.how()


def fail():
    raise RuntimeError("the machine failed")


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


# Rows that divide evenly, that leave a smaller last micro-batch, and a whole last step of fewer micro-batches.
@pytest.mark.parametrize("rows, batch, micro", [(6, 6, 2), (5, 5, 2), (11, 4, 2), (7, 4, 1), (9, 4, 2)])
@pytest.mark.parametrize("loss_type", ["mallows-theta", "simpo"])
def test_accumulated_gradients_are_those_of_one_batch(tmp_path, rows, batch, micro, loss_type):
    results = []
    for size, accumulate in ((batch, 1), (micro, -(-batch // micro))):
        gradients = Gradients()
        trainer = tiny_trainer(
            tmp_path,
            rows=rows,
            loss_type=loss_type,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            max_steps=-1,
            num_train_epochs=2,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            callbacks=[gradients],
        )
        trainer.train()
        results.append((gradients.steps, train_logs(trainer), trainer.model.state_dict()))
    (steps, logs, weights), (found_steps, found_logs, found_weights) = results
    assert len(found_steps) == len(steps) == 2 * -(-rows // batch)
    for found, expected in zip(found_steps, steps, strict=True):
        close(found, expected)
    close(found_weights, weights)
    for found, expected in zip(found_logs, logs, strict=True):
        for name in ("epoch", "rewards/accuracies"):  # counted in micro-batches; ties that rounding decides
            del found[name], expected[name]
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert logs[0]["loss"] != pytest.approx(logs[-1]["loss"], abs=1e-3)


RUNS = {
    "cached": {},
    "copy": {"dispersion_scale": 0.3},
    "adapter": {"dispersion_scale": 0.3, "peft_config": None},
    "accumulated": {"gradient_accumulation_steps": 2, "rows": 7, "max_steps": 5},
    "dropout": {"disable_dropout": False},
    "sampled": {"loss_type": "mallows-theta+sampo"},
}


def whole_run(folder, name, **more):
    options = dict(RUNS[name])
    if "peft_config" in options:
        options["peft_config"] = lora(lora_dropout=0.1)
    model = tiny_model(attention_dropout=0.2)
    options = {"rows": 5, "max_steps": 7, "save_strategy": "steps", "save_steps": 2} | options | more
    torch.manual_seed(3)  # an adapter is drawn at random
    return tiny_trainer(
        folder, model=model, eval_dataset=tiny_pairs(3, seed=1), eval_strategy="steps", eval_steps=3, **options
    )


def evaluations(trainer):
    names = ("eval_loss", "eval_rewards/margins", "step")
    return [{name: log[name] for name in names} for log in trainer.state.log_history if "eval_loss" in log]


@pytest.mark.parametrize(
    "name, step",
    [("cached", 3), ("cached", 4), ("copy", 3), ("adapter", 5), ("accumulated", 3), ("dropout", 4), ("sampled", 3)],
)
def test_a_resumed_run_is_the_whole_run(tmp_path, name, step):
    whole = whole_run(tmp_path / "whole", name)
    whole.train()
    stopped = whole_run(tmp_path / "stopped", name, callbacks=[Stop(step, fail)])
    with pytest.raises(RuntimeError, match="the machine failed"):
        stopped.train()
    resumed = whole_run(tmp_path / "stopped", name)
    resumed.train(resume_from_checkpoint=True)
    assert train_logs(resumed) == train_logs(whole) and evaluations(resumed) == evaluations(whole)
    assert len(train_logs(whole)) == whole.state.max_steps
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key
    # The reference is what training started from, not the checkpoint.
    scores, expected = (trainer.score(trainer.train_dataset) for trainer in (resumed, whole))
    assert (scores["ref_chosen_logps"] == expected["ref_chosen_logps"]).all()
    assert (expected["ref_chosen_logps"] != expected["chosen_logps"]).any()


@pytest.mark.parametrize("ends", ["after its last log", "in a failure"])
def test_a_second_training_logs_its_own_pairs_alone(tmp_path, ends):
    """Nothing moves at this learning rate; the first one logs after two of its three steps."""
    options = {"logging_steps": 2, "max_steps": 3, "learning_rate": 0.0, "train_sampling_strategy": "sequential"}
    trainer = tiny_trainer(tmp_path, ref_model=tiny_model(seed=1), **options)
    if ends == "in a failure":
        stop = Stop(3, fail)
        trainer.add_callback(stop)
        with pytest.raises(RuntimeError, match="the machine failed"):
            trainer.train()
        trainer.remove_callback(stop)
    else:
        trainer.train()
    (first,) = train_logs(trainer)
    trainer.train()
    assert train_logs(trainer) == [first]


def test_resuming_reads_the_cache(tmp_path, monkeypatch):
    stopped = whole_run(tmp_path, "cached", callbacks=[Stop(3, fail)])
    with pytest.raises(RuntimeError, match="the machine failed"):
        stopped.train()
    files = cache_files(tmp_path)
    monkeypatch.setattr("mallowspo.MallowsTrainer._over_pairs", lambda *args: pytest.fail("a second pass"))
    whole_run(tmp_path, "cached").train(resume_from_checkpoint=True)
    assert cache_files(tmp_path) == files


def test_a_killed_process_resumes(tmp_path):
    script = "import sys, test_trainer_resume as t; t.run_until_killed(sys.argv[1])"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "killed")], env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL
    whole = whole_run(tmp_path / "whole", "cached")
    whole.train()
    resumed = whole_run(tmp_path / "killed", "cached")
    resumed.train(resume_from_checkpoint=True)
    found, expected = train_logs(resumed), train_logs(whole)
    assert len(found) == len(expected) == 7
    for ours, theirs in zip(found, expected, strict=True):  # another process may use other threads
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def run_until_killed(folder):
    whole_run(folder, "cached", callbacks=[Stop(5, lambda: os.kill(os.getpid(), signal.SIGKILL))]).train()
