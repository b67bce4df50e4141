"""What every rank of the distributed tests runs: ``accelerate launch ... distributed_worker.py FOLDER``.

The test calls the same functions in one process, and compares. Each rank leaves FOLDER/<name>.<rank>.pt.
"""

import os
import sys
from pathlib import Path

import torch
from tiny import lora, tiny_model, tiny_pairs, tiny_tokenizer, tiny_trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback

from mallowspo.collator import PreferenceCollator
from mallowspo.data import tokenize_pairs
from mallowspo.modeling import add_adapter, attach_token_stats, sequence_stats

# Sizes that do not divide by two: the eval sets and, in "odd", the train set, whose pass must still keep its order.
RUNS = {
    "cached": {"eval_rows": 5},
    "adapter": {"eval_rows": 3, "loss_type": "dpo", "peft_config": True},
    "copy": {"eval_rows": 1, "dispersion_scale": 0.3, "gradient_accumulation_steps": 2},
    "reference-free": {"eval_rows": 7, "loss_type": "mallows-simpo"},
}
GLOBAL_BATCH = 8
STEPS = 3


class Record(TrainerCallback):
    """Gradients of every step and every log, as this rank sees them."""

    def __init__(self):
        self.gradients, self.logs = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def run(folder):
    """One training of each kind; the global batch is the same for any number of processes."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    for name, options in RUNS.items():
        options = dict(options)
        if options.pop("peft_config", False):
            torch.manual_seed(0)
            options["peft_config"] = lora(init_lora_weights=False)
        record, held_out = Record(), tiny_pairs(options.pop("eval_rows"), seed=1)
        trainer = tiny_trainer(
            folder / name,
            rows=STEPS * GLOBAL_BATCH,
            eval_dataset=held_out,
            max_steps=STEPS,
            per_device_train_batch_size=GLOBAL_BATCH // world // options.get("gradient_accumulation_steps", 1),
            per_device_eval_batch_size=2,
            train_sampling_strategy="sequential",
            optim="sgd",
            learning_rate=0.1,
            ddp_timeout=50,
            callbacks=[record],
            **options,
        )
        before = trainer.evaluate()
        trainer.train()
        facts = {
            "world": trainer.accelerator.num_processes,
            "scale": trainer.dispersion_scale,
            "columns": {
                column: trainer._prepared(data)[column][:]
                for data in (trainer.train_dataset, held_out)
                for column in trainer._prepared(data).column_names
                if column.startswith("ref_")
            },
            "before": before,
            "after": trainer.evaluate(),
            "scores": trainer.score(held_out),
            "gradients": record.gradients,
            "logs": record.logs,
            "weights": trainer.model.state_dict(),
        }
        torch.save(facts, folder / f"{name}.{trainer.accelerator.process_index}.pt")


def sharded(folder, adapter):
    """Gradients of a model that FSDP2 shards over the ranks, its head's weights apart from the rest and one another
    (as peft's wrapping policy has it), each rank with a pair.

    In one process, what FSDP must give: the mean of the gradients of the two pairs.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    model = base = tiny_model()
    if adapter:
        torch.manual_seed(0)
        model = add_adapter(base, lora(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    attach_token_stats(model)
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        owners = [module for module in base.lm_head.modules() if list(module.parameters(recurse=False))]
        for module in (*base.model.layers, base.model, *owners, model):
            fully_shard(module, mesh=mesh)
    pairs = tokenize_pairs(tiny_pairs(2), tiny_tokenizer())
    for row in [rank] if world > 1 else [0, 1]:
        logps, entropy = sequence_stats(model, PreferenceCollator(pad_token_id=0)([pairs[row]]))
        ((entropy.sum() - logps.sum()) * world / 2).backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    gradients = {n: grad.full_tensor() if world > 1 else grad for n, grad in trained.items()}
    torch.save(gradients, folder / f"{'sharded adapter' if adapter else 'sharded'}.{rank}.pt")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
    for adapter in (False, True):
        sharded(Path(sys.argv[1]), adapter)
