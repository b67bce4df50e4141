"""One training of the many: its settings, the training itself, and what its result depends on."""

from pathlib import Path

from datasets import Dataset
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

import methods
import models
from mallowspo import MallowsTrainer, preset
from mallowspo.modeling import unprepared


def training_of(training, method, beta, seed, folder):
    """The MallowsConfig of one training; the pass of the reference is shared by all."""
    objective = preset(method)
    reads = objective.uses_dispersion or not objective.reference_free
    return methods.config_of(
        training,
        method,
        beta=beta,
        seed=seed,
        precompute_ref_log_probs=training.precompute_ref_log_probs and reads,
        reference_cache_dir=training.reference_cache_dir or str(folder / "reference_cache"),
        disable_tqdm=True,
    )


class ShowSteps(TrainerCallback):
    """Names the step of a training behind the bar over all of them."""

    def __init__(self, bar, name):
        self._bar, self._name = bar, name

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.set_postfix_str(f"{self._name}, step {state.global_step} of {state.max_steps}")


def train(reference, tokenizer, rows, training, rank, second=None, callbacks=()):
    """(trained model, the last line of its log); goes on at a checkpoint that an interrupted training left.

    Args:
        second: the second reference, for MRPO alone.

    Raises:
        ValueError: the checkpoint's weights are corrupt.
    """
    trainer = MallowsTrainer(
        model=reference,
        ref_model=None if second is None else [None, second],
        args=training,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=models.lora_config(rank),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    checkpoints = Path(training.output_dir).glob(f"checkpoint-*/{TRAINER_STATE_NAME}")  # its last file
    try:
        trainer.train(resume_from_checkpoint=True if any(checkpoints) else None)
    except SafetensorError as error:
        raise ValueError(f"a checkpoint in {training.output_dir} is corrupt ({error}); delete that folder") from error
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return unprepared(trainer.model), logs[-1] if logs else {}
