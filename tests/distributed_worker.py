"""What every rank of the distributed tests runs: ``accelerate launch ... distributed_worker.py WHAT FOLDER ...``.

The tests call the same functions in one process, and compare. Each rank leaves FOLDER/<name>.<rank>.pt.
"""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from tiny import lora, tiny_model, tiny_pairs, tiny_tokenizer, tiny_trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback, training_args
from transformers.integrations import is_deepspeed_zero3_enabled

from mallowspo import AcceleratedTrainer
from mallowspo.adapters import add_adapter
from mallowspo.callbacks import GenerationSamples
from mallowspo.collator import PreferenceCollator
from mallowspo.data import tokenize_pairs
from mallowspo.modeling import attach_token_stats, sequence_stats

# Numbers of pairs that do not divide: the last batches are filled up, and the ranks' shares of the passes as well.
RUNS = {
    "cached": {"eval_rows": 6, "rows": 24, "max_length": 20, "dropped": [3, 5]},
    "adapter": {"eval_rows": 3, "rows": 24, "dispersion_scale": 0.3, "peft_config": ["q_proj", "lm_head"]}
    | {"loss_type": "mallows-theta+wpo", "beta": 0.5},
    "copy": {"eval_rows": 1, "rows": 21, "dispersion_scale": 0.3, "gradient_accumulation_steps": 2},
    "reference-free": {"eval_rows": 7, "rows": 24, "loss_type": "mallows-simpo"},
    "one pair": {"eval_rows": 1, "rows": 1},
    "tokens": {"eval_rows": 3, "rows": 21, "loss_type": "mallows-theta+sampo+bmc"},
    "several": {"eval_rows": 5, "rows": 21, "loss_type": "mrpo", "references": 2, "precompute_ref_log_probs": True},
    "no reference": {"eval_rows": 3, "rows": 21, "loss_type": "simpo"},
    "trained head": {"eval_rows": 3, "rows": 21, "loss_type": "dpo", "peft_config": ["q_proj"], "save": ["lm_head"]},
    "extrapolated": {"eval_rows": 3, "rows": 21, "loss_type": "dpo", "references": 1, "previous": 2},
}
SHARDED = ("fsdp2", "deepspeed_zero2", "deepspeed_zero3")
SHARDED_RUNS = [name for name in RUNS if name not in ("reference-free", "one pair")]
HALF = {  # layers in bfloat16
    "half": {"eval_rows": 5, "rows": 24, "loss_type": "dpo"},
    "half cached": {"eval_rows": 5, "rows": 24},
    "half adapter": {"eval_rows": 5, "rows": 24, "loss_type": "dpo", "peft_config": ["q_proj", "lm_head"]},
}
GLOBAL_BATCH = 8
STEPS = 3
RECIPES = Path(__file__).parents[1] / "recipes" / "accelerate"


def launch(config, *arguments, processes=2):
    """Starts this file as the recipe says, but on the CPU and in full precision; its exit status and its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    if config in SHARDED:
        environment |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(RECIPES / f"{config}.yaml")]
    command += ["--num_processes", str(processes), "--mixed_precision", "no", "--main_process_port", "0", __file__]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        env=environment, timeout=240, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout


class Record(TrainerCallback):
    """Gradients of every step and every log, as this rank sees them."""

    def __init__(self):
        self.gradients, self.logs = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None})

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def is_split(model):
    """Whether the layers are; FSDP keeps the head of a model that has no backward pass whole after its first use."""
    return all(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.get_decoder().layers.parameters())


def weights_of(model):
    gathered = nullcontext()
    if is_deepspeed_zero3_enabled():
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(model.parameters()))
    with gathered:
        return {name: whole(value) for name, value in model.state_dict().items()}


def with_dropped_pairs(pairs, dropped):
    return pairs.map(lambda row, i: {"prompt": "red " * 30 if i in dropped else row["prompt"]}, with_indices=True)


def saved_model(folder, seed=0):
    """The name of a tiny model of this rank's, to be loaded."""
    path = folder / f"model-{seed}.{os.environ.get('RANK', 0)}"
    if not path.exists():
        tiny_model(seed=seed).save_pretrained(path)
    return path


def run(folder, runs=RUNS, **settings):
    """One training of each kind; the global batch is the same for any number of processes."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    for name, options in runs.items():
        options = dict(options)
        if "peft_config" in options:
            torch.manual_seed(0)
            targets, whole = options["peft_config"], options.pop("save", None)
            options["peft_config"] = lora(target_modules=targets, modules_to_save=whole, init_lora_weights=False)
        if "references" in options:
            options["ref_model"] = [saved_model(folder, seed) for seed in range(1, 1 + options.pop("references"))]
        if "previous" in options:
            options |= {"kind": AcceleratedTrainer, "alpha": 0.5, "ref_model": options["ref_model"][0]}
            options["previous_model"] = saved_model(folder, options.pop("previous"))
        dropped = options.pop("dropped", ())
        record, held_out = Record(), with_dropped_pairs(tiny_pairs(options.pop("eval_rows"), seed=1), dropped)
        trainer = tiny_trainer(
            folder / name,
            train_dataset=with_dropped_pairs(tiny_pairs(options.pop("rows")), dropped),
            eval_dataset=held_out,
            eval_on_start=True,
            max_steps=STEPS,
            per_device_train_batch_size=GLOBAL_BATCH // world // options.get("gradient_accumulation_steps", 1),
            per_device_eval_batch_size=2,
            train_sampling_strategy="sequential",
            optim="sgd",
            learning_rate=0.1,
            ddp_timeout=120,
            callbacks=[record],
            **options,
            **settings,
        )
        samples = partial(GenerationSamples, trainer, num_prompts=3, max_new_tokens=4)
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            with pytest.raises(ValueError, match="needs the whole weights on one rank"):
                samples()
        else:
            trainer.add_callback(samples())
        before = None
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # the evaluation in train() must do
            for early in (trainer.evaluate, partial(trainer.score, held_out)):
                with pytest.raises(ValueError, match="splits the model over the ranks in train.*eval_on_start=True"):
                    early()
        else:
            before = trainer.evaluate()
        trainer.train()
        references = [trainer.ref_model, getattr(trainer, "previous_model", None)]
        facts = {
            "world": trainer.accelerator.num_processes,
            "engine": trainer.accelerator.distributed_type.value,
            "split": is_split(trainer.model),
            "reference split": references[0] is not None and all(map(is_split, filter(None, references))),
            "scale": trainer.dispersion_scale,
            "columns": {
                (which, column): trainer._prepared(data)[column][:]
                for which, data in (("train", trainer.train_dataset), ("eval", held_out))
                for column in trainer._prepared(data).column_names
                if column.startswith("ref_")
            },
            "before": before or record.logs[0],
            "after": trainer.evaluate(),
            "scores": trainer.score(held_out),
            "gradients": record.gradients,
            "logs": record.logs,
            "weights": weights_of(trainer.model),
        }
        torch.save(facts, folder / f"{name}.{trainer.accelerator.process_index}.pt")
        trainer.save_model()
        if trainer.is_deepspeed_enabled:
            with pytest.raises(ValueError, match="engine serves one train.*make a new trainer"):
                trainer.train()


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


def resumable(folder, name, checkpoint=None, **options):
    """A run that saves after every second step, shuffles its pairs and ends its epochs with a smaller batch."""
    trainer = tiny_trainer(
        folder / name,
        rows=21,  # three steps an epoch
        max_steps=5,
        per_device_train_batch_size=GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", 1)),
        adam_epsilon=1e-3,  # else Adam makes whole steps of rounding errors
        save_strategy="steps",
        save_steps=2,
        ddp_timeout=120,
        **options,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    facts = {
        "weights": weights_of(trainer.model),
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
    }
    torch.save(facts, folder / f"{name}.{trainer.accelerator.process_index}.pt")
    return facts


class Failing(TrainerCallback):
    """Rank 1 fails in the middle of its third step, while the other waits for its gradients."""

    def on_step_begin(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 2:
            raise RuntimeError("rank 1 cannot read its data")


def kill_in_the_second_save():
    """Rank 1 dies when everything else of checkpoint-4 is written."""
    from mallowspo.distributed import Trainer

    save = Trainer._save_rng_state

    def save_or_die(self, output_dir):
        if self.args.process_index == 1 and self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, output_dir)

    Trainer._save_rng_state = save_or_die


def refused(folder, match, **options):
    """What no trainer takes on several ranks."""
    with pytest.raises(ValueError, match=match):
        tiny_trainer(folder / "refused", **options)


def main(what, folder, *checkpoint):
    folder = Path(folder)
    for seed in range(3):  # before there are processes that save together
        saved_model(folder, seed)
    if what == "ddp":
        run(folder)
        uneven = {"even_batches": False}
        refused(folder, "even_batches=False leaves some ranks with a batch less", accelerator_config=uneven)
        refused(folder, "average_tokens_across_devices=False.*leave it out", average_tokens_across_devices=False)
        for adapter in (False, True):
            sharded(folder, adapter)
        resumable(folder, "saved")
        resumable(folder, "resumed", *checkpoint)
    elif what == "fail":
        resumable(folder, "saved", callbacks=[Failing()])
    elif what == "kill":
        kill_in_the_second_save()
        resumable(folder, "saved")
    else:
        # accelerate shards on GPUs alone, and falls back to DDP without a word; this shows it the CPU as one.
        PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
        options = {"use_cpu": False}
        if what == "deepspeed_zero3":  # by name: sharded from the moment it is loaded
            options["model"] = saved_model(folder)
        if what in SHARDED:
            run(folder, {name: RUNS[name] for name in SHARDED_RUNS}, **options)
            training_args.is_torch_bf16_gpu_available = lambda: True
            run(folder, HALF, bf16=True, **options)
        if what == "deepspeed_zero3":
            loaded = AutoModelForCausalLM.from_pretrained(options["model"])
            refused(folder, "ZeRO-3 splits this model.*pass the name of the model", **options | {"model": loaded})
        if what == "fsdp2":
            config = ParallelismConfig(cp_size=2)
            refused(folder, "splits sequences or layers.*context size 2.*leave", parallelism_config=config, **options)
        if what in SHARDED:
            resumable(folder, "saved", **options)
        resumable(folder, "resumed", *checkpoint, **options)


if __name__ == "__main__":
    main(*sys.argv[1:])
    PartialState().destroy_process_group()  # an exit with gloo's threads at work aborts now and then
