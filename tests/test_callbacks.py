"""Generation samples: what the model would say alone, kept through kills, told to trackers, no trace in training."""

import json
import os
import sys
import types

import pytest
import torch
from datasets import Dataset
from tiny import lora, tiny_model, tiny_pairs, tiny_tokenizer, tiny_trainer, train_logs
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from mallowspo import GenerationSamples
from mallowspo.data import tokenize_pairs

EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}


def sampled(folder, step=None):
    rows = [json.loads(line) for line in open(folder / "generations.jsonl", encoding="utf-8")]
    return rows if step is None else [(row["prompt"], row["completion"]) for row in rows if row["step"] == step]


def with_samples(folder, rows=4, eval_dataset=None, number=3, **options):
    held_out = tiny_pairs(rows, seed=1) if eval_dataset is None else eval_dataset
    trainer = tiny_trainer(folder, eval_dataset=held_out, **options)
    trainer.add_callback(GenerationSamples(trainer, num_prompts=number, max_new_tokens=5))
    return trainer


@torch.no_grad()
def greedy(model, ids, steps=5):
    """One prompt alone, no padding, no cache."""
    found = []
    while len(found) < steps and 2 not in found:
        found.append(model(torch.tensor([[*ids, *found]])).logits[0, -1].argmax().item())
    return tiny_tokenizer().decode(found, skip_special_tokens=True)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])  # gpt2: wrong positions past the padding would show
def test_completions_are_those_of_each_prompt_alone(tmp_path, model_type):
    trainer = with_samples(tmp_path, model=tiny_model(model_type), per_device_eval_batch_size=2, **EVERY_STEP)
    trainer.train()
    plain = tiny_model(model_type)
    plain.load_state_dict(trainer.model.state_dict())
    prompts = [row["prompt_ids"] for row in tokenize_pairs(tiny_pairs(4, seed=1), tiny_tokenizer())][:3]
    assert len({len(ids) for ids in prompts}) > 1
    expected = [(tiny_tokenizer().decode(ids), greedy(plain, ids)) for ids in prompts]
    assert sampled(tmp_path, 2) == expected
    first = sampled(tmp_path, 1)
    assert [prompt for prompt, _ in first] == [prompt for prompt, _ in expected] and first != expected


@pytest.mark.parametrize("options", [{}, {"peft_config": True}, {"bf16": True}, {"gradient_checkpointing": True}])
def test_training_is_the_same_with_it(tmp_path, options):
    logs = []
    for build in (tiny_trainer, with_samples):
        given = options | ({"peft_config": lora(lora_dropout=0.2)} if "peft_config" in options else {})
        given |= {"model": tiny_model(attention_dropout=0.2), "disable_dropout": False}  # draws at random
        trainer = build(tmp_path, eval_dataset=tiny_pairs(4, seed=1), **EVERY_STEP, **given)
        side = trainer.processing_class.padding_side
        trainer.train()
        logs.append(train_logs(trainer))
        assert trainer.processing_class.padding_side == side
    assert logs[0] == logs[1] and len(sampled(tmp_path)) == 6


def test_the_mode_of_every_module_is_kept(tmp_path):
    trainer = with_samples(tmp_path)
    trainer.model.train()
    trainer.model.model.layers[0].eval()
    before = [module.training for module in trainer.model.modules()]
    trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, {})
    assert len(sampled(tmp_path)) == 3 and [module.training for module in trainer.model.modules()] == before


class Fail(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise RuntimeError("the machine failed")


def test_a_resumed_run_has_the_samples_of_the_whole_run(tmp_path):
    """Killed after step 4, saved at step 2: what was sampled before stays, what is done again is not there twice."""
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6} | EVERY_STEP
    whole = with_samples(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(RuntimeError, match="the machine failed"):
        with_samples(tmp_path / "stopped", callbacks=[Fail()], **options).train()
    assert [row["step"] for row in sampled(tmp_path / "stopped")] == [step for step in range(1, 5) for _ in range(3)]
    with_samples(tmp_path / "stopped", **options).train(resume_from_checkpoint=True)
    assert sampled(tmp_path / "stopped") == sampled(tmp_path / "whole") and len(sampled(tmp_path / "whole")) == 18


def test_the_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    trainer = with_samples(tmp_path)
    trainer.evaluate()
    before = (tmp_path / "generations.jsonl").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    trainer.state.global_step = 1
    with pytest.raises(OSError, match="No space left"):
        trainer.evaluate()
    assert (tmp_path / "generations.jsonl").read_bytes() == before
    assert [name for name in os.listdir(tmp_path) if "generations" in name] == ["generations.jsonl"]


def test_the_best_model_is_sampled_anew(tmp_path):
    """At the step of the last evaluation, but with other weights."""
    options = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 4} | EVERY_STEP
    trainer = with_samples(tmp_path, learning_rate=0.1, **options)
    trainer.train()
    best, last = trainer.state.best_global_step, sampled(tmp_path, 4)
    trainer.evaluate()
    assert sampled(tmp_path, 4) == sampled(tmp_path, best) != last


def test_a_new_run_drops_the_samples_of_the_old_one(tmp_path):
    for steps in (3, 2):
        with_samples(tmp_path, max_steps=steps, **EVERY_STEP).train()
    assert [row["step"] for row in sampled(tmp_path)] == [1] * 3 + [2] * 3


def test_text_that_looks_like_several_lines(tmp_path, monkeypatch):
    text = 'a\nb\r\n\u2028"\x85|\u00e9'
    trainer = with_samples(tmp_path)
    monkeypatch.setattr(GenerationSamples, "_completions", lambda self: [text] * 3)
    for step in (0, 1, 2, 1):
        trainer.state.global_step = step
        trainer.evaluate()
    assert sorted(row["step"] for row in sampled(tmp_path)) == [0] * 3 + [1] * 3 + [2] * 3
    assert {row["completion"] for row in sampled(tmp_path)} == {text}
    assert "\u00e9" in (tmp_path / "generations.jsonl").read_text(encoding="utf-8")  # for people to read, no escape


def test_which_prompts(tmp_path):
    """Different ones, not empty, with room for the answer; of every set."""
    long, rows = "red " * 62, {"chosen": " red", "rejected": " blue"}
    texts = {"a": ["", long, "cat", "cat", "dog", "sky"], "b": ["up", "down", "yes"]}
    sets = {name: Dataset.from_list([{"prompt": text, **rows} for text in some]) for name, some in texts.items()}
    trainer = with_samples(tmp_path, eval_dataset=sets, number=2)
    trainer.evaluate()
    assert [prompt for prompt, _ in sampled(tmp_path, 0)] == ["cat", "dog", "up", "down"]


class Writer:
    def __init__(self):
        self.texts = []

    def add_text(self, name, text, step=None):
        self.texts.append((name, text, step))

    def add_scalar(self, *args):
        pass

    flush = close = add_scalar


class Board(TensorBoardCallback):
    def __init__(self, writer):
        self.tb_writer, self.logging_dir = writer, "unused"


class Biases(WandbCallback):
    def __init__(self):
        self._wandb = None  # what it does itself


def test_trackers_get_a_table(tmp_path, monkeypatch):
    logged = []
    wandb = types.ModuleType("wandb")
    wandb.Table = lambda columns, data: (columns, data)
    wandb.log = logged.append
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(Biases, "on_log", lambda *args, **kwargs: None)
    monkeypatch.setattr(Biases, "on_train_begin", lambda *args, **kwargs: None)
    monkeypatch.setattr(Biases, "on_train_end", lambda *args, **kwargs: None)
    writer = Writer()
    trainer = with_samples(tmp_path, callbacks=[Board(writer), Biases()], eval_strategy="steps", eval_steps=2)
    trainer.train()
    rows = [(2, *texts) for texts in sampled(tmp_path, 2)]
    ((_, text, step),) = [entry for entry in writer.texts if entry[0] == "generations"]
    assert step == 2 and text.splitlines()[0] == "| step | prompt | completion |"
    assert [tuple(line.strip("|").split("|")) for line in text.splitlines()[2:]] == [
        tuple(f" {cell} " for cell in row) for row in rows
    ]
    assert logged == [{"generations": (["step", "prompt", "completion"], rows), "train/global_step": 2}]


def test_other_ranks_leave_it_to_the_first(tmp_path):
    trainer = with_samples(tmp_path)
    trainer.state.is_world_process_zero = False
    trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, {})
    assert not (tmp_path / "generations.jsonl").exists()


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="give the trainer an eval_dataset"):
        GenerationSamples(tiny_trainer(tmp_path))
    trainer = tiny_trainer(tmp_path, eval_dataset=tiny_pairs(3, seed=1))
    for numbers in ({"num_prompts": 0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            GenerationSamples(trainer, **numbers)
    with pytest.raises(ValueError, match="room for 64 tokens; lower max_new_tokens"):
        GenerationSamples(trainer, max_new_tokens=64)
    with monkeypatch.context() as patch:
        patch.setattr("mallowspo.callbacks.is_deepspeed_zero3_enabled", lambda: True)
        with pytest.raises(ValueError, match="whole weights on one rank"):
            GenerationSamples(trainer, max_new_tokens=4)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.raises(ValueError, match="whole weights on one rank"):
        GenerationSamples(trainer, max_new_tokens=4)


def test_several_sets_are_sampled_once(tmp_path, monkeypatch):
    calls, sets = [], {"a": tiny_pairs(2, seed=1), "b": tiny_pairs(2, seed=2)}
    trainer = with_samples(tmp_path, eval_dataset=sets)
    monkeypatch.setattr(GenerationSamples, "_completions", lambda self: calls.append(1) or ["x"] * len(self._prompts))
    trainer.evaluate()
    assert len(calls) == 1


@pytest.mark.parametrize(
    "own",
    [
        {"do_sample": True, "temperature": 9.0},
        {"num_beams": 3, "num_return_sequences": 3},
        {"return_dict_in_generate": True},
    ],
)
def test_greedy_whatever_the_model_is_set_to(tmp_path, own):
    trainer = with_samples(tmp_path)
    trainer.evaluate()
    expected = sampled(tmp_path, 0)
    trainer.model.generation_config.update(**own)
    trainer.state.global_step = 1
    trainer.evaluate()
    assert sampled(tmp_path, 1) == expected


def test_an_answer_that_ends_before_the_others(tmp_path):
    """It is filled up with the tokenizer's padding, which is no text, whatever the model itself would pad with."""
    trainer = with_samples(tmp_path)
    trainer.evaluate()
    whole = [completion.split() for _, completion in sampled(tmp_path, 0)]
    end, other = trainer.processing_class.convert_tokens_to_ids([whole[0][0], "sky"])
    assert any(whole[0][0] not in words for words in whole)
    trainer.model.generation_config.update(eos_token_id=end, pad_token_id=other)
    trainer.state.global_step = 1
    trainer.evaluate()
    assert sampled(tmp_path, 1)[0][1] == whole[0][0]


def test_a_prompt_that_just_leaves_the_room(tmp_path):
    rows = [{"prompt": "red " * n, "chosen": " red", "rejected": " blue"} for n in (60, 59)]
    trainer = with_samples(tmp_path, eval_dataset=Dataset.from_list(rows))
    trainer.evaluate()
    ((prompt, _),) = sampled(tmp_path, 0)
    assert len(prompt.split()) == 59


def test_samples_have_the_precision_of_training_and_no_dropout(tmp_path):
    model, dtypes = tiny_model(attention_dropout=0.9), set()
    trainer = with_samples(tmp_path, model=model, disable_dropout=False, bf16=True)
    trainer.evaluate()
    trainer.model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    trainer.model.train()
    trainer.state.global_step = 1
    trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, {})
    assert dtypes == {torch.bfloat16} and sampled(tmp_path, 1) == sampled(tmp_path, 0)


def test_a_training_after_one_that_failed(tmp_path):
    trainer = with_samples(tmp_path, callbacks=[Fail()], eval_strategy="steps", eval_steps=4, max_steps=6)
    with pytest.raises(RuntimeError, match="the machine failed"):
        trainer.train()
    trainer.remove_callback(Fail)
    trainer.train()
    assert [row["step"] for row in sampled(tmp_path)] == [4] * 3 + [6] * 3


def test_prompts_without_their_special_tokens(tmp_path):
    held_out = Dataset.from_list([{"prompt": "<s> cat", "chosen": " red", "rejected": " blue"}])
    trainer = with_samples(tmp_path, eval_dataset=held_out)
    trainer.evaluate()
    ((prompt, _),) = sampled(tmp_path, 0)
    assert prompt == "cat"
