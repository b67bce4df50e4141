"""What a run on several ranks, or an interrupted one, needs from the loop around the loss.

A pair counts once in every epoch, however the batches fall on the ranks; a checkpoint is whole or is passed over.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import logging

from mallowspo.modeling import unprepared

logger = logging.get_logger(__name__)


def newest_checkpoint(folder):
    """The path of the checkpoint with the most steps among those in the folder that were written to the end.

    Raises:
        ValueError: there is none.
    """
    for path in reversed(sort_checkpoints(str(folder))):
        if _is_whole(path):
            return path
        logger.warning(f"{path} was not written to the end; it is passed over")
    raise ValueError(
        f"no checkpoint in {folder} was written to the end; leave resume_from_checkpoint out to start anew"
    )


def _is_whole(checkpoint):
    try:
        json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True


class DistributedTrainer(Trainer):
    """A Trainer of pairs, for any number of ranks: of its batches only ``num_tokens`` [2B] is read."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.accelerator.dispatch_batches:
            raise ValueError(
                "accelerator_config's dispatch_batches=True cuts all tensors of a batch into the same rows, but those "
                "of pairs have different ones: leave it out, and each rank reads its own batches"
            )
        if not self.accelerator.even_batches and self.accelerator.num_processes > 1:
            raise ValueError(
                "accelerator_config's even_batches=False leaves some ranks with a batch less, for whom the others "
                "would wait: leave it out; the pairs that fill up the last batch do not count"
            )
        if not self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            raise ValueError(
                "average_tokens_across_devices=False would divide the loss of each rank by its own pairs, and here it "
                "is divided by those of all: leave it out"
            )
        sizes = {"context": self.get_cp_size(), "sequence": self.get_sp_size(), "tensor": self.get_tp_size()}
        for kind, size in sizes.items():
            if size > 1:
                raise ValueError(
                    f"parallelism that splits sequences or layers over the ranks, with {kind} size {size}, does not "
                    "go with a head that reads whole ones: leave the size at 1; FSDP2 and DeepSpeed shard weights"
                )
        dynamo = self.accelerator.state.dynamo_plugin
        if dynamo.dynamic is False:  # as accelerate launch has it by default; no two batches have one length
            dynamo.dynamic = None
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            # accelerate would round what the model returns, log-probabilities in float32, to the dtype of its layers.
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As in ``transformers.Trainer``; True resumes from the newest checkpoint that was written to the end.

        Raises:
            ValueError: nothing to train, an optimizer of something else, no such checkpoint, or a second time under
                DeepSpeed.
        """
        trained = {parameter for parameter in self.model.parameters() if parameter.requires_grad}
        if not trained:
            raise ValueError(
                f"no parameter of this {type(self.model).__name__} requires a gradient, so there is nothing to train: "
                "load an adapter by peft's from_pretrained with is_trainable=True, not by its folder as model; after "
                "merge_and_unload() call model.requires_grad_(True) or give a peft_config"
            )
        if self.deepspeed is not None:
            raise ValueError("DeepSpeed's engine serves one train(): save the model and make a new trainer of it")
        held = {parameter for group in getattr(self.optimizer, "param_groups", ()) for parameter in group["params"]}
        if held and not held & trained:
            raise ValueError(
                "the optimizer holds no parameter of this model that requires a gradient: make it of the model that "
                "is given, which for an adapter is peft's get_peft_model(model, config), without peft_config; or "
                "leave optimizers out"
            )
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not sharded and not isinstance(self.model_wrapped, nn.parallel.DistributedDataParallel):
            # What an evaluation prepared, accelerate would not wrap again: no rank would see the others' gradients.
            self.model_wrapped = unprepared(self.model)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint and not _is_whole(resume_from_checkpoint):
            raise ValueError(f"{resume_from_checkpoint} is no checkpoint that was written to the end; choose another")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _prepare_input(self, data):
        if torch.is_tensor(data):  # the base class rounds floats to DeepSpeed's dtype, as if layers read them
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def check_sharded(self):
        """ValueError where FSDP or DeepSpeed is to split the model over the ranks and has not yet."""
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and not self.accelerator._models:
            engine = "FSDP" if self.is_fsdp_enabled else "DeepSpeed"
            raise ValueError(
                f"{engine} splits the model over the ranks in train(), together with its optimiser; evaluate() and "
                "score() need it split: call train() before, with eval_on_start=True to evaluate the model as it was"
            )

    def evaluation_loop(self, *args, **kwargs):
        self.check_sharded()
        return super().evaluation_loop(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples, device):
        """Pairs in the whole optimiser step, over micro-batches and ranks: what its loss is divided by.

        Gives each batch ``counts`` [B] float32, 1 for a pair and 0 for one that only fills up the last batch.
        """
        if not batch_samples:
            return None
        for batch in batch_samples:
            batch["counts"] = torch.ones(len(batch["num_tokens"]) // 2, device=device)
        state, world = self.accelerator.gradient_state, self.accelerator.num_processes
        if state.end_of_dataloader and world > 1 and not self.args.dataloader_drop_last:
            # accelerate fills the last batch up with pairs of the first, so that all ranks have as many. Its own count
            # of them (gradient_state.remainder) is missing in a resumed epoch.
            counts = batch_samples[-1]["counts"]
            fillers = -len(state.active_dataloader.dataset) % (len(counts) * world)
            place = self.accelerator.process_index * len(counts) + torch.arange(len(counts), device=device)
            counts[place >= len(counts) * world - fillers] = 0
        pairs = torch.stack([batch["counts"].sum() for batch in batch_samples]).sum()
        return self.accelerator.gather(pairs).sum()

    # trainer_state.json is the last file of a checkpoint, and older ones are deleted after it: here it is also written
    # after all that the other ranks write. Where it can be read, the checkpoint is whole.

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # of an earlier run, whose files are overwritten
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
