"""Batches of preference pairs: what of them the model reads and which positions are scored.

Two layouts of the same sequences, prompt + response: `pad` gives each a row of its own; `pack` puts all into one row,
each prompt once. In both, response k of prompt b is sequence k * B + b, for B prompts with K responses each.
"""

import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from mallowspo.data import PAIR_COLUMNS
from mallowspo.differences import DIFF_COLUMNS


@dataclass
class PreferenceCollator:
    """Makes one batch of B tokenized pairs; the chosen responses are sequences 0..B-1, the rejected ones B..2B-1.

    A completion token is predicted by the position before it; the first token of a sequence with an empty prompt has
    none and is not scored.

    Args:
        pad_token_id: The id to pad with; padded positions are masked and never scored. None only with `share_prompt`.
        pad_to_multiple_of: If set, the length of padded rows is rounded up to a multiple of it.
        share_prompt: Encode each prompt once, in a batch without padding, for a model that
            :func:`mallowspo.modeling.share_prompts` has prepared.

    Raises:
        TypeError: `pad_token_id` is not an int where rows are padded.
    """

    pad_token_id: int | None
    pad_to_multiple_of: int | None = None
    share_prompt: bool = False

    def __post_init__(self) -> None:
        if not self.share_prompt and not isinstance(self.pad_token_id, int):
            raise TypeError(
                f"pad_token_id must be an int, got {self.pad_token_id!r}: set tokenizer.pad_token; any token will do, "
                "since padding is masked"
            )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Collates rows of `tokenize_pairs`.

        Returns:
            What `pad` or `pack` returns, and of what the rows have: `row` [B] int64; `PAIR_COLUMNS` and the columns
            that begin with "ref_", float32, [B] or, where a row has a list with a value for each scored token, one
            after the other [tokens]; `differs` [N] bool from `DIFF_COLUMNS`.
        """
        prompts = [row["prompt_ids"] for row in rows]
        responses = [(row["chosen_ids"], row["rejected_ids"]) for row in rows]
        if self.share_prompt:
            batch = pack(prompts, responses)
        else:
            batch = pad(prompts, responses, self.pad_token_id, self.pad_to_multiple_of)
        for name, first in rows[0].items():
            if name in PAIR_COLUMNS or name.startswith("ref_"):
                values = [row[name] for row in rows]
                values = list(chain.from_iterable(values)) if isinstance(first, list) else values
                batch[name] = torch.tensor(values, dtype=torch.float32)
        if "row" in rows[0]:
            batch["row"] = torch.tensor([row["row"] for row in rows])
        if DIFF_COLUMNS[0] in rows[0]:  # of scored tokens: the first of a sequence is not
            masks = [row[name][0 if row["prompt_ids"] else 1 :] for name in DIFF_COLUMNS for row in rows]
            batch["differs"] = torch.tensor(list(chain.from_iterable(masks)))
        return batch


def pad(prompts, responses, pad_token_id, pad_to_multiple_of=None):
    """A row for each sequence, padded on the right to the longest (T tokens).

    Args:
        prompts: B lists of token ids, which may be empty.
        responses: for each prompt K lists of token ids, none empty.
        pad_token_id, pad_to_multiple_of: as of `PreferenceCollator`.

    Returns:
        `input_ids`, `attention_mask`: [K * B, T] int64.
        `target_index`: [N] int64, the flat position whose hidden state predicts a scored token.
        `target_ids`: [N] int64, the scored tokens, sequence by sequence.
        `num_tokens`: [K * B] int64, scored tokens of each sequence.
    """
    sides = zip(*responses, strict=True)
    sequences = [prompt + side[b] for side in sides for b, prompt in enumerate(prompts)]
    lengths = torch.tensor([len(ids) for ids in sequences])[:, None]
    width = int(lengths.max())
    if pad_to_multiple_of is not None:
        width = math.ceil(width / pad_to_multiple_of) * pad_to_multiple_of
    position = torch.arange(width)
    real = position < lengths
    input_ids = torch.full(real.shape, pad_token_id)
    input_ids[real] = torch.tensor(list(chain.from_iterable(sequences)))
    first_scored = torch.tensor([max(len(prompt), 1) for prompt in prompts]).repeat(len(responses[0]))[:, None]
    predicts = (position >= first_scored - 1) & (position < lengths - 1)
    target_index = predicts.flatten().nonzero().squeeze(1)
    return {
        "input_ids": input_ids,
        "attention_mask": real.long(),
        "target_index": target_index,
        "target_ids": input_ids.flatten()[target_index + 1],
        "num_tokens": predicts.sum(1),
    }


def pack(prompts, responses):
    """All in one row of T tokens: each prompt, and behind it its responses.

    Args:
        prompts, responses: as of `pad`.

    Returns:
        `input_ids`, `position_ids`: [1, T] int64; each response continues the positions of its prompt.
        `segments`: for each prompt its length and a tuple of those of its responses.
        `target_index`, `target_ids`, `num_tokens`: as of `pad`.
    """
    flat, positions, segments = [], [], []
    index, targets = ([[] for _ in responses[0]] for _ in range(2))  # by the response's number, then by prompt
    for prompt, group in zip(prompts, responses, strict=True):
        flat += prompt
        positions += range(len(prompt))
        before = [len(flat) - 1] if prompt else []  # the prompt's last token predicts the first one of each response
        for k, response in enumerate(group):
            index[k].append([*before, *range(len(flat), len(flat) + len(response) - 1)])
            targets[k].append(response[len(response) - len(index[k][-1]) :])
            flat += response
            positions += range(len(prompt), len(prompt) + len(response))
        segments.append((len(prompt), tuple(map(len, group))))
    targets = list(chain.from_iterable(targets))
    return {
        "input_ids": torch.tensor([flat]),
        "position_ids": torch.tensor([positions]),
        "segments": segments,
        "target_index": torch.tensor(list(chain.from_iterable(chain.from_iterable(index))), dtype=torch.int64),
        "target_ids": torch.tensor(list(chain.from_iterable(targets)), dtype=torch.int64),
        "num_tokens": torch.tensor([len(ids) for ids in targets]),
    }
