"""What the reference models say of a batch: in every step, or in one cached pass over the data before training."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers.utils import logging

from mallowspo import _C
from mallowspo.adapters import check_adapter_off, without_adapter
from mallowspo.data import REFERENCE_COLUMNS, TOKEN_REFERENCE_COLUMNS, scored_tokens
from mallowspo.dispersion import check_cache_folder, fingerprint, load_cache, save_cache
from mallowspo.modeling import ResponseStats, evaluating, response_stats
from mallowspo.sharded import is_partitioned

logger = logging.get_logger(__name__)


def numbered(column, number):
    """The name of a reference's column: that of the first reference is bare."""
    return column if number == 0 else f"{column}_{number}"


class ReadsReferences:
    """For a trainer with ``ref_model``, by whose entropies the dispersion goes, and ``other_references``, a list.

    None among them is the trainer's own model with its adapter off. Of the trainer it also reads ``objective``;
    ``_source``, where the dispersion comes from, or None; ``_is_peft``; ``_cached``, whether the references are asked
    before training.
    """

    @property
    def references(self):
        """All K references, the anchor first."""
        return [self.ref_model, *self.other_references]

    def _with_reference(self, dataset, name):
        """The data set with the columns of each reference, from the cache or from one pass."""
        lengths = None
        for number, model in enumerate(self.references):
            columns = self._columns_of(model, dataset, name)
            for column, values in columns.items():
                values = values.numpy()
                if column in TOKEN_REFERENCE_COLUMNS:
                    lengths = lengths or scored_tokens(dataset)
                    of_side = lengths["chosen" if column == TOKEN_REFERENCE_COLUMNS[0] else "rejected"]
                    values = pa.LargeListArray.from_arrays(np.cumsum([0, *of_side]), values)
                dataset = dataset.add_column(numbered(column, number), values)
        return dataset

    def _columns_of(self, model, dataset, name):
        """What one reference says of every pair: {column: float32 values}, token columns row after row."""
        columns, per_token = None, self.objective.weighs_tokens
        weights = self.accelerator.unwrap_model(self.model if model is None else model)
        is_main = self.accelerator.is_main_process
        if is_main or is_partitioned(weights):
            settings = {
                "version": _C.build["version"],
                "mixed_precision": self.accelerator.mixed_precision,
                "token_logps": per_token,
            }
            key = fingerprint(weights, dataset, settings, with_adapter=model is not None)
        if is_main:  # one rank decides, so that all agree where they share no disk
            path = Path(self.args.reference_cache_dir or Path(self.args.output_dir) / "_reference_cache")
            path = path / f"{key}.safetensors"
            if path.exists():
                logger.info(f"reference log-probabilities and entropies of {name} read from {path}")
                counts = scored_tokens(dataset).values() if per_token else ()
                lengths = dict(zip(TOKEN_REFERENCE_COLUMNS, map(sum, counts), strict=False))
                columns = load_cache(path, key, len(dataset), lengths)
            else:
                check_cache_folder(path.parent)
        (columns,) = broadcast_object_list([columns])
        if columns is None:

            def compute(batch):
                return self._reference_columns(self._reference_stats(model, batch), batch["num_tokens"])

            columns = self._over_pairs(dataset, compute, f"Reference pass ({name})")
            columns = {k: v if torch.is_tensor(v) else torch.from_numpy(np.concatenate(v)) for k, v in columns.items()}
            if is_main:
                save_cache(path, columns, key)
        return columns

    def _reference_columns(self, stats, num_tokens):
        columns = dict(zip(REFERENCE_COLUMNS, (*stats.logps.chunk(2), *stats.entropy.chunk(2)), strict=True))
        if self.objective.weighs_tokens:
            rows = [row.numpy() for row in stats.token_logps.cpu().split(num_tokens.tolist())]
            columns |= zip(TOKEN_REFERENCE_COLUMNS, (rows[: len(rows) // 2], rows[len(rows) // 2 :]), strict=True)
        return columns

    @torch.no_grad()
    def _over_pairs(self, dataset, compute, description):
        """``compute(batch)`` -> dict of [B] tensors or lists of B arrays, over the data set split over the ranks ->
        dict of tensors [rows] or lists of arrays, on the CPU."""
        size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        # Every rank makes as many passes as the others, who may wait for it; what hangs over is cut off again.
        share = -(-len(dataset) // world)
        parts = []
        for start in tqdm(range(0, share, size), desc=description, disable=rank != 0 or self.args.disable_tqdm):
            rows = [(rank * share + i) % len(dataset) for i in range(start, min(start + size, share))]
            batch = self._prepare_inputs(self.data_collator([dataset[row] for row in rows]))
            with self.accelerator.autocast():
                parts.append(compute(batch))
        return {name: self._joined([part[name] for part in parts])[: len(dataset)] for name in parts[0]}

    def _joined(self, parts):
        """Of all ranks, in their order."""
        if torch.is_tensor(parts[0]):
            return self.accelerator.gather(torch.cat(parts)).cpu()
        return gather_object([row for part in parts for row in part])

    @torch.no_grad()
    def _reference_stats(self, model, batch):
        """ResponseStats [2B] of a live reference; None is the model with its adapter off."""
        off = nullcontext()
        if model is None and self._is_peft:
            off = without_adapter(self.accelerator.unwrap_model(self.model))
        model = self.model_wrapped if model is None else model
        # An autocast of its own: the policy's would reuse the weights that were cast here, without a gradient.
        with evaluating(model), off, self.accelerator.autocast():
            return response_stats(model, batch)

    def _reference_of(self, batch):
        """[ResponseStats [2B]] of a batch: from its columns, else from the live models; [] if none is read."""
        if "ref_chosen_logps" in batch:
            return [_from_columns(batch, number) for number in range(len(self.references))]
        if self.objective.reference_free and self._source != "entropy":
            return []
        if None in self.references and not self._is_peft:
            raise ValueError(
                "this data set was not given to the constructor, so the reference never saw it, and no reference was "
                "kept: give it to the constructor, as train_dataset or in eval_dataset, or pass ref_model"
            )
        if None in self.references and self._cached:
            check_adapter_off(self.accelerator.unwrap_model(self.model), for_good=True)
        return [self._reference_stats(model, batch) for model in self.references]


def _from_columns(batch, number):
    missing = [name for name in REFERENCE_COLUMNS if numbered(name, number) not in batch]
    if missing:
        what = f"reference_weights (MRPO) reads reference {number + 1}" if number else "the loss reads the reference"
        raise ValueError(f"{what}, whose column {numbered(missing[0], number)!r} the batch lacks")
    columns = [batch[numbered(name, number)] for name in REFERENCE_COLUMNS]
    tokens = [batch[numbered(name, number)] for name in TOKEN_REFERENCE_COLUMNS if name in batch]
    return ResponseStats(torch.cat(columns[:2]), torch.cat(columns[2:]), torch.cat(tokens) if tokens else None)
