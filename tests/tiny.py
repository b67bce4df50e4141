"""Tiny random models, a tokenizer of twenty words and preference pairs for the tests of models and trainer."""

import random

import pytest
import torch
import torch.nn.functional as nnf
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mallowspo import MallowsConfig, MallowsTrainer

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    *"red green blue one two three cat dog sky sea up down yes no good bad".split(),
]
VOCABULARY = len(WORDS)
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SHAPE = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}


def tiny_model(model_type="llama", seed=0, gain=12.0, **config):
    """A random causal LM in evaluation mode; the gain on its matrices makes its distributions differ from uniform."""
    if model_type == "gpt2":
        config = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2} | GPT2_SHAPE | config
    else:
        config = SHAPE | config
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= gain
    return model.eval()


def tiny_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(WORDS[:4])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def tiny_pairs(rows, seed=0, **columns):
    """Random prompts and completions of different lengths, with further columns as given."""
    draw = random.Random(seed)

    def text(low, high):
        return " ".join(draw.choices(WORDS[4:], k=draw.randint(low, high)))

    pairs = [{"prompt": text(1, 5), "chosen": " " + text(1, 6), "rejected": " " + text(1, 6)} for _ in range(rows)]
    return Dataset.from_list(pairs).map(lambda row, i: {k: v[i] for k, v in columns.items()}, with_indices=True)


def tiny_trainer(output_dir, model=None, rows=6, train_dataset=None, seed=0, kind=MallowsTrainer, **options):
    """A MallowsTrainer; options that MallowsConfig has go there, the others to the constructor."""
    names = ("ref_model", "eval_dataset", "peft_config", "callbacks", "processing_class", "optimizers")
    names += ("previous_model", "alpha")  # of an AcceleratedTrainer
    given = {name: options.pop(name) for name in names if name in options}
    settings = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "max_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": seed,
    }
    return kind(
        model=tiny_model() if model is None else model,
        args=MallowsConfig(output_dir=str(output_dir), **settings | options),
        train_dataset=tiny_pairs(rows) if train_dataset is None else train_dataset,
        **{"processing_class": tiny_tokenizer()} | given,
    )


def plain_stats(model, rows, dtype=torch.float32):
    """Summed log-probability and mean entropy of each row's completion from the whole logits, row by row: [2B] each.

    The definition: nothing here is shared with the code under test.
    """
    logps, entropies = [], []
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows:
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            log_p = nnf.log_softmax(model(input_ids=ids).logits[0].to(dtype), -1)
            first = max(len(row["prompt_ids"]), 1)
            scored = range(first, ids.shape[1])
            logps.append(sum(log_p[t - 1, ids[0, t]] for t in scored))
            entropies.append(sum(-(log_p[t - 1].exp() * log_p[t - 1]).sum() for t in scored) / len(scored))
    return torch.stack(logps), torch.stack(entropies)


def plain_alignment(model, rows, dtype=torch.float32):
    """Sum over each row's completion of log sum_v p_v^2, in the same way."""
    sums = []
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows:
            p = model(input_ids=torch.tensor([row["prompt_ids"] + row[side]])).logits[0].to(dtype).softmax(-1)
            first = max(len(row["prompt_ids"]), 1)
            sums.append(p[first - 1 : -1].square().sum(-1).log().sum())
    return torch.stack(sums)


def train_logs(trainer):
    """The logs of training, without what depends on the clock."""
    clock = ("runtime", "per_second")
    return [
        {name: value for name, value in log.items() if not any(word in name for word in clock)}
        for log in trainer.state.log_history
        if "loss" in log
    ]


def lora(**options):
    """A LoRA configuration; skips the test where peft is missing."""
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "v_proj"]} | options)


class Averaging(torch.optim.SGD):
    """Trains at one point and evaluates another, as the schedule-free optimisers do."""

    def _add(self, shift):
        for parameter in self.param_groups[0]["params"] * (self.shift != shift):
            parameter.data += shift - self.shift
        self.shift = shift

    shift = 0.0

    def train(self):
        self._add(0.0)

    def eval(self):
        self._add(0.3)


def cache_files(folder):
    """Files of the cached reference pass under an output_dir."""
    folder = folder / "_reference_cache"
    return sorted(folder.iterdir()) if folder.exists() else []


def split_weights(monkeypatch, name):
    """Trainers made after this take their weights for split; name: is_fsdp_enabled or is_deepspeed_enabled."""
    original = MallowsTrainer.__init__

    def split(self, *args, **kwargs):
        original(self, *args, **kwargs)
        setattr(self, name, True)

    monkeypatch.setattr(MallowsTrainer, "__init__", split)
