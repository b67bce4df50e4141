"""The card of a trained model: method, dispersion, data, settings and versions, as README.md beside its weights."""

import json
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from mallowspo import _C
from mallowspo.data import evaluation_sets
from mallowspo.env import installed

# Under these names PEFT looks for its own line, to add it where it is missing.
_PACKAGES = {
    "PEFT": "peft",
    "Transformers": "transformers",
    "PyTorch": "torch",
    "Datasets": "datasets",
    "Accelerate": "accelerate",
    "bitsandbytes": "bitsandbytes",
}
_SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "num_train_epochs", "max_steps"),
    *("max_length", "disable_dropout", "gradient_checkpointing", "bf16", "fp16", "seed"),
)
_CLOCK = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
BIBTEX = """@inproceedings{chen2025mallowspo,
  title     = {{MallowsPO}: Fine-Tune Your {LLM} with Preference Dispersions},
  author    = {Chen, Haoxian and Zhao, Hanyang and Lam, Henry and Yao, David and Tang, Wenpin},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  note      = {arXiv:2405.14953}
}"""
_CITATION = f"## Citation\n\n```bibtex\n{BIBTEX}\n```\n"


class WritesModelCard:
    """For a trainer: a card beside every model it saves or pushes.

    Of the trainer it reads ``objective``, ``references`` and ``dispersion_scale``; ``_source``, where the dispersion
    comes from, or None; ``_is_peft``; ``_prepared_sets`` and ``_prepared``, the data sets as they are trained on.
    """

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, *, license=None, language=None):
        """Writes README.md into ``args.output_dir``, on the first rank.

        ``save_model``, every checkpoint and ``push_to_hub`` do it too; ``push_to_hub`` hands on these arguments.

        Args:
            model_name: the heading; default: the last part of the hub name or of output_dir.
            dataset_name: the hub name of the training data; default: not in the metadata.
            tags: a tag or several, besides ours.
            license, language: as in ``huggingface_hub.ModelCardData``.
        """
        if self.is_world_process_zero():
            card = model_card(self, model_name, dataset_name, tags, license=license, language=language)
            card.save(Path(self.args.output_dir) / "README.md")

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # over the card that PEFT leaves there
            model_card(self).save(Path(output_dir or self.args.output_dir) / "README.md")

    def step_of_weights(self):
        """The step whose weights the model has: after training that of the best checkpoint, where one was loaded."""
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best and not self.is_in_train:
            return int(best.rsplit("-")[-1])
        return self.state.global_step

    def _objective_facts(self):
        """What the card's table says of the objective, {name: value}."""
        return asdict(self.objective)

    def _described_reference(self):
        """What the card calls the reference."""
        if self.objective.reference_free and self._source != "entropy":
            return "none"
        own = "the model with its adapter off" if self._is_peft else "the model as it was before training"
        unwrapped = self.accelerator.unwrap_model  # of an engine
        paths = ["" if model is None else unwrapped(model).config._name_or_path for model in self.references]
        return ", ".join(f"`{_public(path)}`" if path else own for path in paths)

    def _push_from_checkpoint(self, checkpoint_folder):
        self.create_model_card()  # what is pushed is output_dir, and a checkpoint's card is in its own folder
        super()._push_from_checkpoint(checkpoint_folder)


def model_card(trainer, model_name=None, dataset_name=None, tags=None, **metadata):
    """``huggingface_hub.ModelCard`` of the trainer's model as it is now; arguments as in ``create_model_card``."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    model_name = model_name or (trainer.hub_model_id or Path(args.output_dir).resolve().name).split("/")[-1]
    adapter = model.active_peft_config if trainer._is_peft else None
    base = model.config._name_or_path or ""
    on_hub = _on_hub(base)
    metrics = _evaluation(trainer)
    tags = [tags] if isinstance(tags, str) else tags or []
    data = ModelCardData(
        base_model=base if on_hub else None,
        datasets=[dataset_name] if dataset_name else None,
        library_name="transformers" if adapter is None else "peft",
        pipeline_tag="text-generation",
        tags=["generated_from_trainer", "mallowspo", args.loss_type, *_adapter_tags(adapter, on_hub and base), *tags],
        model_name=model_name,
        eval_results=_eval_results(metrics, dataset_name),
        **{name: value for name, value in metadata.items() if value is not None},
    )
    origin = f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{_public(base) or model.config.model_type}`"
    text = f"""# {model_name}

Fine-tuned from {origin} on preference pairs with mallowspo, method `{args.loss_type}`.

## Quick start

{_quick_start(trainer, model_name)}

## Training procedure

### Objective

{markdown_table(("field", "value"), trainer._objective_facts().items())}

{described_dispersion(trainer)}

Reference: {trainer._described_reference()}.

### Data

{markdown_table(("set", "name", "pairs", "pairs used", "fingerprint"), _data(trainer, dataset_name))}

### Settings

{markdown_table(("argument", "value"), _settings(trainer, model, adapter))}

## Evaluation

{markdown_table(("metric", "value"), metrics.items()) if metrics else "These weights were not evaluated."}

### Framework versions

- mallowspo {_C.build["version"]}
{_versions()}

{_CITATION if trainer.objective.uses_dispersion else ""}"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.rstrip()}\n")


def markdown_table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    cells = ([str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _on_hub(name):
    """Whether a model's name can be one of the hub's: neither a folder here nor the path of one that is gone."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name) and not Path(name).is_dir()


def _public(name):
    """A model's name without the folders it lies in: the card is for others."""
    return name if _on_hub(name) else Path(name).name


def _adapter_tags(adapter, base):
    """As PEFT's own; by the second one the hub finds the adapters of a model."""
    if adapter is None:
        return []
    return [adapter.peft_type.value.lower(), *([f"base_model:adapter:{base}"] if base else [])]


def _quick_start(trainer, model_name):
    question = "What is a GPU?"
    if trainer.processing_class.chat_template is not None:
        question = [{"role": "user", "content": question}]
    return f"""```python
from transformers import pipeline

generator = pipeline("text-generation", model={json.dumps(trainer.hub_model_id or model_name)})
print(generator({json.dumps(question)}, max_new_tokens=64, return_full_text=False)[0]["generated_text"])
```"""


def described_dispersion(trainer):
    """The sentence about the dispersion of a trainer with ``objective``, ``_source`` and ``dispersion_scale``."""
    if not trainer.objective.uses_dispersion:
        return "Dispersion: the method uses none."
    source = {
        "entropy": "the token entropies of the reference model",
        "agreement": "the column `agreement`, the share of annotators who chose the chosen response",
        "neg_log_dispersion": "the column `neg_log_dispersion`",
    }[trainer._source]
    calibrated = trainer.args.dispersion_scale == "auto" and trainer._source == "entropy"
    how = ", calibrated on the training set" if calibrated else ""
    return f"Dispersion: from {source}; dispersion scale phi_star = {trainer.dispersion_scale:.6g}{how}."


def _data(trainer, dataset_name):
    for name, data in {"train": trainer.train_dataset, **evaluation_sets(trainer.eval_dataset)}.items():
        if id(data) in trainer._prepared_sets:
            source = dataset_name or data.info.dataset_name or "not named"
            yield name, source, len(data), len(trainer._prepared(data)), data._fingerprint


def _settings(trainer, model, adapter):
    args = trainer.args
    batch_size = trainer._train_batch_size  # auto_find_batch_size may have made it smaller than the argument
    for name in _SETTINGS:
        value = batch_size if name == "per_device_train_batch_size" else getattr(args, name)
        yield name, getattr(value, "value", value)
    yield "steps done", trainer.state.global_step
    yield "pairs per step", batch_size * args.gradient_accumulation_steps * args.world_size
    trained = (p for p in model.parameters() if p.requires_grad)
    yield "parameters trained", sum(getattr(p, "ds_numel", p.numel()) for p in trained)  # ds_numel: under ZeRO-3
    if adapter is not None:
        fields = {name: getattr(adapter, name, None) for name in ("r", "lora_alpha", "lora_dropout")}
        known = (f"{name} {value}" for name, value in fields.items() if value is not None)
        yield "adapter", ", ".join([adapter.peft_type.value, *known])
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None:
        facts = quantization if isinstance(quantization, dict) else quantization.to_diff_dict()
        facts = {name: value for name, value in facts.items() if not name.startswith("_")}
        yield "quantization", json.dumps(facts, sort_keys=True, default=str)


def _evaluation(trainer):
    """The metrics logged for the weights as they are now; {} where there are none."""
    step, logged = trainer.step_of_weights(), {}
    for entry in trainer.state.log_history:
        if entry.get("step") == step:
            logged |= {name: value for name, value in entry.items() if name.startswith("eval_")}
    logged = {name: value for name, value in logged.items() if not name.endswith(_CLOCK)}
    metrics = {n: f"{value:.6g}" if isinstance(value, float) else value for n, value in logged.items()}
    return {"step": step} | metrics if metrics else {}


def _eval_results(metrics, dataset_name):
    """The accuracies for the hub's own table, which needs the data set's name there; None without one."""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset_name,
            dataset_name=dataset_name,
            metric_type="accuracy",
            metric_name=name,
            metric_value=float(value),
        )
        for name, value in metrics.items()
        if name.endswith("rewards/accuracies") and dataset_name
    ]
    return results or None


def _versions():
    found = {name: installed(package) for name, package in _PACKAGES.items()}
    return "\n".join(f"- {name} {version}" for name, version in found.items() if version is not None)
