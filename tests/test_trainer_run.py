"""A run as its user wants it: stops when it should, saves what it is, and comes out the same again."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import lora, plain_stats, tiny_model, tiny_pairs, tiny_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback

from mallowspo.data import tokenize_pairs

EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("metric, better", [("eval_loss", min), ("eval_rewards/accuracies", max)])
def test_early_stopping(tmp_path, metric, better):
    """Random pairs: what is learnt of them does the held-out ones no good for long."""
    held_out = tiny_pairs(20, seed=1)
    trainer = tiny_trainer(
        tmp_path,
        rows=20,
        eval_dataset=held_out,
        metric_for_best_model=metric,
        load_best_model_at_end=True,
        max_steps=40,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        **EVERY_STEP,
    )
    trainer.train()
    seen = [log[metric] for log in trainer.state.log_history if "eval_loss" in log]
    best = seen.index(better(seen)) + 1
    assert len(seen) == trainer.state.global_step == best + 2 < 40
    assert trainer.state.best_global_step == best and trainer.evaluate()[metric] == seen[best - 1] != seen[-1]


@pytest.mark.parametrize("adapter", [False, True])
def test_a_saved_model_is_the_trained_one(tmp_path, adapter):
    trainer = tiny_trainer(tmp_path / "run", **({"peft_config": lora()} if adapter else {}))
    trainer.train()
    trainer.save_model()
    if adapter:
        import peft

        loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "run")
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    rows = tokenize_pairs(trainer.train_dataset, AutoTokenizer.from_pretrained(tmp_path / "run")).to_list()
    with torch.no_grad():
        found, before = (plain_stats(model.eval(), rows)[0].numpy() for model in (loaded, tiny_model()))
    scores = trainer.score(trainer.train_dataset)
    assert found == pytest.approx([*scores["chosen_logps"], *scores["rejected_logps"]], rel=1e-4)
    assert abs(found - before).max() > 0.01


# Reproduction: large enough for several threads to share the work of a kernel.
WIDE = {"vocab_size": 2000, "hidden_size": 64, "num_attention_heads": 4}
RUNS = {
    "all weights": {"bf16": True, "loss_type": "mallows-phi"},
    "adapter": {"peft_config": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
}


def one_run(folder, name, seed=7):
    """Hashes of the weights and of the logs."""
    options = dict(RUNS[name])
    model = tiny_model(attention_dropout=0.1, **WIDE)
    torch.rand(os.getpid() % 1000)  # whatever was drawn before, the seed is what counts
    if options.pop("peft_config", False):
        options["peft_config"] = lora(lora_dropout=0.1)
    trainer = tiny_trainer(
        folder,
        model=model,
        rows=48,
        seed=seed,
        per_device_train_batch_size=16,
        disable_dropout=False,
        max_steps=3,
        eval_dataset=tiny_pairs(5, seed=1),
        eval_strategy="steps",
        eval_steps=2,
        **options,
    )
    trainer.train()
    weights = hashlib.sha256()
    for parameter in trainer.model.parameters():
        weights.update(parameter.detach().numpy().tobytes())
    clock = ("runtime", "per_second")
    logs = [{k: v for k, v in log.items() if not k.endswith(clock)} for log in trainer.state.log_history]
    return weights.hexdigest(), hashlib.sha256(json.dumps(logs).encode()).hexdigest()


def print_runs(folder):
    torch.set_num_threads(3)
    print(json.dumps({name: one_run(Path(folder) / name, name) for name in RUNS}))


def test_a_seed_makes_a_run_again_bit_by_bit(tmp_path):
    pytest.importorskip("peft")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # the threads may outnumber the cores
    environment |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    script = "import sys, test_trainer_run as t; t.print_runs(sys.argv[1])"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / str(number))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for number in range(2)
    ]
    first, second = (json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in processes)
    assert first == second and len(first) == len(RUNS)


def test_an_adapter_is_drawn_by_the_seed(tmp_path):
    def first_factor(seed):
        model = tiny_trainer(tmp_path, peft_config=lora(), seed=seed).model
        return next(value for name, value in model.named_parameters() if "lora_A" in name)

    assert torch.equal(first_factor(1), first_factor(1)) and not torch.equal(first_factor(1), first_factor(2))


def test_another_seed_makes_another_run(tmp_path):
    for name in ("all weights", "adapter"):
        runs = [one_run(tmp_path, name, seed) for seed in (7, 7, 8)]
        assert runs[0] == runs[1] and all(a != b for a, b in zip(runs[1], runs[2], strict=True)), name
