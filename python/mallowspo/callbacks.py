"""GenerationSamples: what the model says to a few held-out prompts, logged at every evaluation."""

import json
from itertools import islice
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback, is_deepspeed_zero3_enabled

from mallowspo.data import evaluation_sets
from mallowspo.files import write_whole
from mallowspo.model_card import markdown_table
from mallowspo.modeling import evaluating

FILE_NAME = "generations.jsonl"
COLUMNS = ("step", "prompt", "completion")


class GenerationSamples(TrainerCallback):
    """At every evaluation, greedy continuations of held-out prompts, under the model's own generation_config.

    They go as a table to TensorBoard and Weights & Biases where the trainer reports there, and as rows of ``step``,
    ``prompt`` and ``completion`` to ``generations.jsonl`` in output_dir, which ``push_to_hub`` uploads too. An
    evaluation that is run again, as by a resumed run, replaces the rows of its step, and a training drops those of
    later steps than its own. Nothing is drawn at random: training is the same with it and without.

        trainer.add_callback(GenerationSamples(trainer, num_prompts=4))

    Args:
        trainer: the MallowsTrainer it is added to; its evaluation sets, as its ``_prepared`` gives them, have the
            prompts.
        num_prompts: the first so many different prompts of each evaluation set that are not empty and leave the model
            room to answer.
        max_new_tokens: longest continuation, in tokens.

    Raises:
        ValueError: no evaluation set, none of whose prompts can be continued, a number below 1, or weights that are
            split over the ranks.
    """

    def __init__(self, trainer, num_prompts=4, max_new_tokens=64):
        if trainer.eval_dataset is None:
            raise ValueError("the samples continue held-out prompts: give the trainer an eval_dataset")
        if min(num_prompts, max_new_tokens) < 1:
            raise ValueError(f"num_prompts and max_new_tokens must be at least 1, got {num_prompts}, {max_new_tokens}")
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "generation needs the whole weights on one rank, which FSDP and ZeRO-3 split; leave it out"
            )
        self.trainer, self.max_new_tokens = trainer, max_new_tokens
        sets = evaluation_sets(trainer.eval_dataset).values()
        self._prompts = [ids for data in sets for ids in self._first_prompts(data, num_prompts)]
        if not self._prompts:
            raise ValueError(
                f"no held-out prompt leaves the model room for {max_new_tokens} tokens; lower max_new_tokens"
            )
        self._last_step = None

    def _first_prompts(self, dataset, number):
        room = getattr(self.trainer.model.config.get_text_config(), "max_position_embeddings", float("inf"))
        prompts = (tuple(ids) for ids in self.trainer._prepared(dataset)["prompt_ids"])
        usable = dict.fromkeys(ids for ids in prompts if ids and len(ids) + self.max_new_tokens <= room)
        return [list(ids) for ids in islice(usable, number)]

    def on_train_begin(self, args, state, control, **kwargs):
        self._last_step = None
        if state.is_world_process_zero:
            self._write(Path(args.output_dir) / FILE_NAME, (), lambda step: step <= state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self._last_step = None  # the best model may have been loaded

    def on_evaluate(self, args, state, control, **kwargs):
        if not state.is_world_process_zero or state.global_step == self._last_step:
            return  # the evaluation of several sets comes here once for each
        tokenizer = self.trainer.processing_class
        prompts = tokenizer.batch_decode(self._prompts, skip_special_tokens=True)
        rows = [(state.global_step, *texts) for texts in zip(prompts, self._completions(), strict=True)]
        self._write(Path(args.output_dir) / FILE_NAME, rows, lambda step: step != state.global_step)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text("generations", markdown_table(COLUMNS, rows), state.global_step)
            elif isinstance(callback, WandbCallback):
                import wandb

                table = wandb.Table(columns=list(COLUMNS), data=rows)
                wandb.log({"generations": table, "train/global_step": state.global_step})
        self._last_step = state.global_step

    def _completions(self):
        trainer, tokenizer = self.trainer, self.trainer.processing_class
        size, texts = trainer.args.per_device_eval_batch_size, []
        with evaluating(trainer.model), trainer.accelerator.autocast():
            for start in range(0, len(self._prompts), size):
                prompts = {"input_ids": self._prompts[start : start + size]}
                batch = tokenizer.pad(prompts, padding_side="left", return_attention_mask=True, return_tensors="pt")
                found = trainer.model.generate(
                    **batch.to(trainer.args.device),
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    num_return_sequences=1,
                    return_dict_in_generate=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
                texts += tokenizer.batch_decode(found[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return texts

    def _write(self, path, rows, stays):
        """Adds rows to those whose step stays."""
        found = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        kept = [line for line in found if stays(json.loads(line)["step"])]
        new = [json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False) for row in rows]
        if kept + new != found:
            write_whole(path, "".join(f"{line}\n" for line in (*kept, *new)).encode())
