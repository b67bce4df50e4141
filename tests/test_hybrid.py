"""Hybrid preference optimisation: its loss by hand and in plain Python, kappa 0 as its host, the value head."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny import lora, split_weights, tiny_model, tiny_pairs, tiny_tokenizer, tiny_trainer, train_logs

from mallowspo import HybridTrainer
from mallowspo.data import tokenize_pairs
from mallowspo.hybrid import VALUE_FILE, hybrid_loss

numbers = st.lists(st.floats(-4, 4), min_size=4, max_size=4)


def rewarded(rows, seed=0):
    """Pairs with rewards: what HybridTrainer reads."""
    generator = np.random.default_rng(seed)
    columns = {name: generator.normal(size=rows).tolist() for name in ("chosen_reward", "rejected_reward")}
    return tiny_pairs(rows, seed, **columns)


def hybrid_trainer(folder, model=None, train_dataset=None, **options):
    """HybridTrainer with the settings of tiny_trainer; options go where they belong."""
    names = ("kappa", "temperature", "expectile", "max_exponent", "eval_dataset", "peft_config")
    given_ = {name: options.pop(name) for name in names if name in options}
    return HybridTrainer(
        model=model or tiny_model(),
        args=tiny_trainer(
            folder, rows=2, eval_dataset=given_.get("eval_dataset"), **{"loss_type": "dpo"} | options
        ).args,
        train_dataset=rewarded(6) if train_dataset is None else train_dataset,
        processing_class=tiny_tokenizer(),
        **{"kappa": 0.5, "temperature": 1.0} | given_,
    )


# ---- the loss ------------------------------------------------------------------------------------------------------


def test_worked_example():
    """One pair of three tokens each: log-probabilities -1 -1 -2 = -4 and -2 -2 -2 = -6, rewards 2 and 1 where 1 was
    expected, alpha 1 / ln 2: weights 2 and 1. With kappa 1/2 the loss 3 becomes 3 + (2 * 4 + 1 * 6) / 4 = 6.5."""
    logps = torch.tensor([[-1.0, -1.0, -2.0], [-2.0, -2.0, -2.0]]).sum(1).requires_grad_()
    rewards, values = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0])
    loss = hybrid_loss(torch.tensor([3.0]), logps, rewards, values, kappa=0.5, temperature=1 / math.log(2))
    assert loss.tolist() == pytest.approx([6.5])
    assert torch.autograd.grad(loss.sum(), logps)[0].tolist() == pytest.approx([-0.5, -0.25])


@given(numbers, numbers, numbers, st.floats(0.01, 5), st.floats(0.1, 5), st.floats(0.1, 5))
def test_it_is_the_formula(logps, rewards, values, kappa, temperature, cap):
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (logps, rewards, values)]
    host = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    loss = hybrid_loss(host, *tensors, kappa=kappa, temperature=temperature, max_exponent=cap)
    weights = [math.exp(min((r - v) / temperature, cap)) for r, v in zip(rewards, values, strict=True)]
    terms = [w * lp for w, lp in zip(weights, logps, strict=True)]
    expected = [base - kappa * (terms[b] + terms[b + 2]) / 2 for b, base in enumerate((0.5, 1.5))]
    assert loss.tolist() == pytest.approx(expected)
    gradients = torch.autograd.grad(loss.sum(), [host, *tensors], allow_unused=True)
    assert gradients[0].tolist() == [1, 1] and gradients[2:] == (None, None)
    assert gradients[1].tolist() == pytest.approx([-kappa * w / 2 for w in weights])


@given(numbers, numbers, numbers)
def test_kappa_0_is_the_host(logps, rewards, values):
    tensors = [torch.tensor(x, requires_grad=True) for x in (logps, rewards, values)]
    host = tensors[0].chunk(2)[0].square()
    loss = hybrid_loss(host, *tensors, kappa=0, temperature=1.0)
    found, expected = (torch.autograd.grad(x.sum(), tensors[0], retain_graph=True)[0] for x in (loss, host))
    assert torch.equal(loss, host) and torch.equal(found, expected)


def test_kappa_0_beside_an_impossible_response():
    logps, nothing = torch.tensor([-math.inf, -1.0]), torch.zeros(2)
    assert hybrid_loss(torch.ones(1), logps, nothing, nothing, kappa=0, temperature=1.0).tolist() == [1.0]


X = torch.zeros(4)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((X[:2], X, X, X[:2]), {}, "shapes must agree"),
        ((X, X, X, X), {}, r"logps must be \[2B\] beside losses \[B\], got \[4\] and \[4\]"),
        ((X[:2], X[:, None], X[:, None], X[:, None]), {}, r"got \[4, 1\] and \[2\]"),
        ((X[:2], X, X, X), {"kappa": -1.0}, "kappa must be finite and >= 0, got -1.0"),
        ((X[:2], X, X, X), {"temperature": 0.0}, "temperature must be finite and positive, got 0.0"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        hybrid_loss(*arguments, **{"kappa": 1.0, "temperature": 1.0} | options)


# ---- the trainer ---------------------------------------------------------------------------------------------------

WAYS = {
    "packed": {},
    "padded": {"share_prompt": False},
    "precomputed": {"precompute_ref_log_probs": True},
    "adapter": {"peft_config": lora},
    "head under lora": {"peft_config": lambda: lora(target_modules=["q_proj", "lm_head"])},
    "dispersion": {"loss_type": "mallows-theta"},
}


def options_of(way):
    return {name: value() if callable(value) else value for name, value in WAYS[way].items()}


@pytest.mark.parametrize("way", WAYS)
def test_kappa_0_trains_as_the_host(tmp_path, way):
    """With dropout, so that a random number more or less would show."""
    runs = []
    for build in (tiny_trainer, hybrid_trainer):
        options = {"train_dataset": rewarded(6), "disable_dropout": False, "max_steps": 3, "loss_type": "dpo"}
        options |= {"kappa": 0.0} if build is hybrid_trainer else {}
        trainer = build(tmp_path, model=tiny_model(attention_dropout=0.2), **options | options_of(way))
        trainer.train()
        runs.append((trainer.model.state_dict(), train_logs(trainer)))
    (weights, logs), (ours, own_logs) = runs
    assert all(torch.equal(ours[name], weight) for name, weight in weights.items())
    assert [{name: log[name] for name in first} for first, log in zip(logs, own_logs, strict=True)] == logs


@pytest.mark.parametrize("way", WAYS)
def test_values_read_the_prompts_last_hidden_state(tmp_path, way):
    """The head's values, from the hidden states of the whole model run on each prompt alone."""
    data = rewarded(4)
    trainer = hybrid_trainer(tmp_path, train_dataset=data, max_steps=4, eval_dataset=data, **options_of(way))
    trainer.train()
    metrics = trainer.evaluate()
    values = []
    for row in tokenize_pairs(data, tiny_tokenizer()):
        states = trainer.model(torch.tensor([row["prompt_ids"]]), output_hidden_states=True).hidden_states
        values.append(trainer.value_head(states[-1][0, -1]).item())
    assert len(set(values)) == 4 and max(map(abs, values)) > 1e-4
    errors = np.array([data["chosen_reward"][:], data["rejected_reward"][:]]) - np.array(values)
    assert metrics["eval_hybrid/value_loss"] == pytest.approx((errors**2).mean() / 2, rel=1e-4)
    assert metrics["eval_hybrid/advantage"] == pytest.approx(errors.mean(), rel=1e-3, abs=1e-6)
    assert metrics["eval_hybrid/weight"] == pytest.approx(np.exp(errors).mean(), rel=1e-4)


def test_the_term_pulls_the_rewarded_response_up(tmp_path):
    """Two runs whose pairs differ in which response is rewarded."""
    found = []
    for better in ("chosen_reward", "rejected_reward"):
        rewards = {name: [4.0 if name == better else -4.0] * 4 for name in ("chosen_reward", "rejected_reward")}
        data = tiny_pairs(4, **rewards)
        trainer = hybrid_trainer(tmp_path, kappa=5.0, train_dataset=data, max_steps=4, learning_rate=1e-3)
        before = trainer.score(data)["rejected_logps"]
        trainer.train()
        found.append((trainer.score(data)["rejected_logps"] - before).mean())
    assert found[1] > max(found[0], 0)


def test_the_value_head_learns(tmp_path):
    data = tiny_pairs(6, chosen_reward=[5.0] * 6, rejected_reward=[1.0] * 6)
    trainer = hybrid_trainer(
        tmp_path, train_dataset=data, kappa=0.0, max_steps=90, learning_rate=0.0, logging_steps=30
    )
    trainer._value_optimizer.param_groups[0]["lr"] = 0.05
    trainer.train()
    losses = [log["hybrid/value_loss"] for log in train_logs(trainer)]
    # The mean of the rewards, 3, leaves half of 2^2.
    assert losses[-1] == pytest.approx(2.0, abs=0.2) and losses[0] > losses[-1] + 0.1


def test_the_steps_of_the_value_head_are_those_of_plain_torch(tmp_path):
    """Adam on the mean of each batch, of 2, 2 and 1 pairs, from the model's hidden states; none in an evaluation."""
    data = rewarded(5)
    options = {"max_steps": 3, "learning_rate": 0.0, "train_sampling_strategy": "sequential"}
    trainer = hybrid_trainer(tmp_path, train_dataset=data, eval_dataset=data, expectile=0.8, **options)
    trainer.train()
    trainer.evaluate()
    rows = tokenize_pairs(data, tiny_tokenizer())["prompt_ids"][:]
    states = [tiny_model()(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1] for ids in rows]
    states, rewards = torch.stack(states).detach(), torch.tensor([data["chosen_reward"], data["rejected_reward"]])
    weight, bias = torch.zeros(16, requires_grad=True), torch.zeros(1, requires_grad=True)
    adam = torch.optim.Adam([weight, bias], lr=1e-3)
    for batch in (slice(0, 2), slice(2, 4), slice(4, 5)):
        error = rewards[:, batch] - (states[batch] @ weight + bias)
        adam.zero_grad()
        (torch.where(error < 0, 0.2, 0.8) * error**2).mean().backward()
        adam.step()
    torch.testing.assert_close(trainer.value_head.weight[0], weight, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(trainer.value_head.bias, bias, rtol=1e-4, atol=1e-7)


def test_rewards_stay_with_their_pairs(tmp_path):
    """Where a pair is left out."""
    rows = rewarded(4).to_list()
    rows[1]["prompt"] = "red " * 20
    trainer = hybrid_trainer(tmp_path, train_dataset=Dataset.from_list(rows), max_length=15)
    for name in ("chosen_reward", "rejected_reward"):
        assert trainer._prepared(trainer.train_dataset)[name][:] == [rows[i][name] for i in (0, 2, 3)]


def test_a_resumed_run_is_the_whole_run(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "precompute_ref_log_probs": True}
    whole = hybrid_trainer(tmp_path / "whole", max_steps=4, **options)
    whole.train()
    assert (tmp_path / "whole" / "checkpoint-2" / VALUE_FILE).exists()
    resumed = hybrid_trainer(tmp_path / "whole", max_steps=4, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert train_logs(resumed) == train_logs(whole)
    for ours, theirs in zip(resumed.value_head.parameters(), whole.value_head.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.abs().max() > 0


def test_the_best_model_has_its_own_value_head(tmp_path):
    every_step = {name: "steps" for name in ("eval_strategy", "save_strategy")} | {"eval_steps": 1, "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_logps/chosen", "greater_is_better": False}
    trainer = hybrid_trainer(tmp_path, eval_dataset=rewarded(4, seed=1), max_steps=3, **every_step, **best)
    trainer.train()
    assert trainer.state.best_global_step < 3
    found = trainer.value_head.state_dict()
    saved = [torch.load(tmp_path / f"checkpoint-{step}" / VALUE_FILE)["head"] for step in (1, 2, 3)]
    matching = [all(torch.equal(found[name], value) for name, value in head.items()) for head in saved]
    assert [step for step, match in zip((1, 2, 3), matching, strict=True) if match] == [trainer.state.best_global_step]


def test_the_value_is_float32_under_autocast(tmp_path):
    data = rewarded(6)
    trainer = hybrid_trainer(tmp_path, train_dataset=data, bf16=True)
    dtypes = []
    trainer.value_head.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    trainer.score(data)
    assert dtypes and set(dtypes) == {torch.float32}


def test_the_card_names_the_term(tmp_path):
    trainer = hybrid_trainer(tmp_path, expectile=0.8)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    for name, value in (trainer._term | {"expectile": 0.8}).items():
        assert f"| {name} (HPO) | {value} |" in card


def test_the_checkpoint_of_another_trainer_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    tiny_trainer(tmp_path, train_dataset=rewarded(6), **options).train()
    with pytest.raises(ValueError, match="the checkpoint is not a HybridTrainer's"):
        hybrid_trainer(tmp_path, max_steps=3, **options).train(resume_from_checkpoint=True)


def train_and_save(folder):
    """What every rank does; ten pairs fill two and a half batches of four."""
    trainer = hybrid_trainer(
        folder,
        train_dataset=rewarded(10),
        eval_dataset=rewarded(5, seed=1),
        per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1)),
        max_steps=5,
        train_sampling_strategy="sequential",
        optim="sgd",
        learning_rate=0.1,
    )
    trainer.train()
    metrics = {name: value for name, value in trainer.evaluate().items() if "hybrid" in name or name == "eval_loss"}
    facts = trainer.model.state_dict(), trainer.value_head.state_dict(), train_logs(trainer), metrics
    torch.save(facts, folder / f"facts.{trainer.accelerator.process_index}.pt")


def test_two_ranks_train_as_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    train_and_save(tmp_path / "one")
    config = Path(__file__).parents[1] / "recipes" / "accelerate" / "ddp.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--main_process_port", "0", __file__, tmp_path / "two"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([*map(str, command)], env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    files = (tmp_path / "one" / "facts.0.pt", tmp_path / "two" / "facts.0.pt", tmp_path / "two" / "facts.1.pt")
    one, *two = (torch.load(file, weights_only=False) for file in files)
    for rank in two:
        for found, expected in zip(rank[:2], one[:2], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert rank[3] == pytest.approx(one[3], rel=1e-4)
    for found, expected in zip(two[0][2], one[2], strict=True):
        names = [name for name in expected if name.startswith("hybrid/") or name == "loss"]
        assert len(names) == 4 and all(found[name] == pytest.approx(expected[name], rel=1e-4) for name in names)


@pytest.mark.parametrize(
    "data, message",
    [
        (lambda: tiny_pairs(2), "train data set lacks the column 'chosen_reward'.*HPO"),
        (lambda: tiny_pairs(2, chosen_reward=[1.0, 1.0]), "train data set lacks the column 'rejected_reward'"),
        (
            lambda: tiny_pairs(2, chosen_reward=[1.0, 1.0], rejected_reward=[1.0, math.nan]),
            "'rejected_reward' nan in row 1",
        ),
    ],
)
def test_rewards_that_are_missing(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        hybrid_trainer(tmp_path, train_dataset=data())


@pytest.mark.parametrize("options", [{"kappa": -1.0}, {"temperature": 0.0}, {"expectile": 1.0}, {"max_exponent": 0.0}])
def test_numbers_out_of_range(tmp_path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        hybrid_trainer(tmp_path, **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_and_save(Path(sys.argv[1]))
    PartialState().destroy_process_group()  # an exit with gloo's threads at work aborts now and then


def test_every_number_reaches_its_place(tmp_path):
    data, options = rewarded(4), {"temperature": 0.1, "max_exponent": 0.5, "expectile": 0.9}
    trainer = hybrid_trainer(tmp_path, train_dataset=data, eval_dataset=data, **options)
    rewards = np.array([data["chosen_reward"][:], data["rejected_reward"][:]])  # the values are 0 yet
    metrics = trainer.evaluate()
    assert metrics["eval_hybrid/weight"] == pytest.approx(np.exp(np.minimum(rewards / 0.1, 0.5)).mean(), rel=1e-5)
    expected = (np.where(rewards < 0, 0.1, 0.9) * rewards**2).mean()
    assert metrics["eval_hybrid/value_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_rate_of_the_value_head(tmp_path):
    options = {"kappa": 0.5, "temperature": 1.0, "value_learning_rate": 0.25, "processing_class": tiny_tokenizer()}
    args = tiny_trainer(tmp_path, rows=2, loss_type="dpo").args
    trainer = HybridTrainer(tiny_model(), args=args, train_dataset=rewarded(2), **options)
    assert trainer._value_optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("name", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_split_weights_are_refused(tmp_path, monkeypatch, name):
    split_weights(monkeypatch, name)
    with pytest.raises(ValueError, match="does not know FSDP and DeepSpeed"):
        hybrid_trainer(tmp_path)
