"""Preference data: `tokenize_pairs` turns a data set of pairs, text or conversations, into token ids once.

The formats are TRL's preference formats.
"""

import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from mallowspo.choices import check_count

logger = logging.getLogger(__name__)

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")  # what tokenize_pairs makes
PAIR_COLUMNS = ("neg_log_dispersion", "agreement")  # one number a pair, which it keeps
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps", "ref_chosen_entropy", "ref_rejected_entropy")
TOKEN_REFERENCE_COLUMNS = ("ref_chosen_token_logps", "ref_rejected_token_logps")  # a list for each pair

_PROMPT_TOO_LONG, _EMPTY_COMPLETION = "prompt too long", "empty completion"
_REVISION = 6  # raise when the result changes: the `datasets` cache knows _tokenize_pair by its name, not by its code


def tokenize_pairs(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    num_proc: int | None = None,
    desc: str = "Tokenizing preference pairs",
    pair_columns: Iterable[str] = PAIR_COLUMNS,
    drop_counts: dict[str, int] | None = None,
) -> Dataset:
    """Tokenizes a preference data set.

    Formats, all with the columns `chosen` and `rejected`:

    - standard: `prompt`, `chosen`, `rejected` are strings; the text of a side is `prompt + chosen`. Tokenized with the
      tokenizer's own special tokens; a completion that does not end with EOS gets one, no BOS or EOS is doubled.
    - conversational: the three are lists of messages `{"role": ..., "content": ...}`. The chat template is applied
      once to `prompt + chosen`, and nothing is added to what it renders. The optional columns `tools` (a list, or a
      JSON string of one) and `chat_template_kwargs` (a dict) are passed to it.
    - implicit prompt: no column `prompt`. For conversations the prompt is the leading messages that both sides share,
      all but the last message of a side at most. For strings it is the longest common text that both sides continue
      with whitespace, so that no word is cut and the whitespace belongs to the completion; it may be empty.

    Each sequence is the tokenization of its whole text, not of two halves: the prompt ids are what the tokenizations
    of the prompt (with the generation prompt), of prompt + chosen and of prompt + rejected have in common, and a token
    that straddles the boundary belongs to the completion.

    A sequence is cut to its first `max_length` tokens. A pair with a side that keeps no completion token to score is
    dropped: the prompt fills `max_length`, or the completion is empty (when nothing precedes the completion, not even
    BOS, its first token has no prediction and does not count). A text of no characters is not empty, it has its EOS,
    nor is a message of none, which has its end of turn. One warning states how many were dropped and why, another how
    many have two completions of the same tokens; these stay.

    Args:
        dataset: The pairs, as its transform gives them if it has one. Further columns are ignored, except those of
            `pair_columns`.
        tokenizer: Needs a chat template for conversations, an EOS token for plain text (a policy trained without
            one never learns to stop).
        max_length: Longest sequence in tokens, prompt included, at least 2. None: no limit.
        num_proc: Processes to tokenize with. None: this one.
        desc: Label of the progress bar.
        pair_columns: Which of `neg_log_dispersion` (finite, >= 0; 0 is phi = 1) and `agreement` (in (0.5, 1]) to read
            if the data has them; they are kept as float64.
        drop_counts: If given, receives the number of dropped pairs under "prompt too long" and "empty completion".

    Returns:
        A data set with `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of int32; the last two are completion tokens
        only), `length` (tokens of the three together, by which a sampler may group), `row` (the pair's row in
        `dataset`) and the kept columns, in the order of the input.

    Raises:
        TypeError: `dataset` is no `datasets.Dataset`, or a row holds neither text nor messages.
        ValueError: The data set is empty, lacks columns or loses all its pairs; a row holds None, mixes text and
            messages, has an illegal number or more than text; the tokenizer lacks what the format needs;
            `max_length` is below 2.
    """
    is_transformed = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"
    pair_columns = tuple(pair_columns)
    columns = _checked_columns(dataset, is_transformed, pair_columns)
    check_count("max_length", max_length, 2)
    limit = sys.maxsize if max_length is None else max_length
    features = {name: List(Value("int32")) for name in TOKEN_COLUMNS}
    features |= {"length": Value("int32"), "row": Value("int64"), "dropped": Value("string")}
    features |= {name: Value("bool") for name in ("cut", "same")}
    features |= {name: Value("float64") for name in pair_columns if name in columns}
    pairs = dataset if is_transformed else dataset.with_format(None).select_columns(columns)
    tokenized = pairs.map(
        _tokenize_pair,
        with_indices=True,
        fn_kwargs={"tokenizer": tokenizer, "max_length": limit, "pair_columns": pair_columns, "revision": _REVISION},
        remove_columns=pairs.column_names,
        features=Features(features),
        num_proc=num_proc,
        desc=desc,
    )
    tokenized = tokenized.with_format(None)
    reasons, is_cut, is_same = (tokenized[name][:] for name in ("dropped", "cut", "same"))
    counts = Counter(reasons)
    if drop_counts is not None:
        drop_counts.update({reason: counts[reason] for reason in (_PROMPT_TOO_LONG, _EMPTY_COMPLETION)})
    tokenized = tokenized.remove_columns(["dropped", "cut", "same"])
    if any(is_cut):
        logger.warning(
            "the last tokens of %d of %d prompts are not in prompt + completion and are left out: the completion "
            "begins where the two part. Either the chat template adds to a generation prompt what a finished turn "
            "lacks, such as an empty thought, or tokens merge across the boundary, as after a space",
            sum(is_cut),
            len(is_cut),
        )
    num_same = sum(same and not reason for same, reason in zip(is_same, reasons, strict=True))
    if num_same:
        logger.warning(
            "%d of %d pairs have the same tokens on both sides (max_length=%s), in which there is no preference to "
            "learn: remove them, or raise max_length where it leaves the difference out",
            num_same,
            len(reasons),
            max_length,
        )
    num_dropped = len(reasons) - counts[""]
    if num_dropped == 0:
        return tokenized
    summary = (
        f"{counts[_PROMPT_TOO_LONG]} with a prompt too long (max_length={max_length} tokens or more), "
        f"{counts[_EMPTY_COMPLETION]} with an empty completion (no token to score)"
    )
    if num_dropped == len(reasons):
        raise ValueError(
            f"all {num_dropped} preference pairs were dropped: {summary}; raise max_length or shorten the prompts, "
            "and give every pair two completions with text"
        )
    logger.warning("dropped %d of %d preference pairs: %s", num_dropped, len(reasons), summary)
    return tokenized.select([row for row, reason in enumerate(reasons) if not reason])


def evaluation_sets(eval_dataset: Any) -> dict[str, Any]:
    """The evaluation sets of a trainer, which takes one, a dict of several or None, each with its name in messages."""
    if isinstance(eval_dataset, dict):
        for name, dataset in eval_dataset.items():
            if dataset is None:
                raise TypeError(f"eval_dataset[{name!r}] is None: give a data set, or leave {name!r} out")
        return {f"eval {name}": dataset for name, dataset in eval_dataset.items()}
    return {} if eval_dataset is None else {"eval": eval_dataset}


def _checked_columns(dataset: Dataset, is_transformed: bool, pair_columns: tuple[str, ...]) -> list[str]:
    """The columns of `dataset` that are read; raises where it is no data set of pairs."""
    if isinstance(dataset, IterableDataset):
        raise TypeError("an IterableDataset is not supported; materialise it: Dataset.from_list(list(dataset))")
    if not isinstance(dataset, Dataset):
        raise TypeError(f"dataset must be a datasets.Dataset (one split), got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError("the preference data set is empty")
    found = list(dataset[0]) if is_transformed else dataset.column_names
    images = [name for name in ("image", "images") if name in found]
    if images:
        raise ValueError(f"the preference data set has a column {images[0]!r}, which would not be seen: remove it")
    missing = [name for name in ("chosen", "rejected") if name not in found]
    if missing:
        raise ValueError(
            f"the preference data set lacks {missing}: it needs the columns 'chosen' and 'rejected', and 'prompt' "
            f"unless both hold the prompt; found {found}"
        )
    known = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs", *pair_columns)
    return [name for name in known if name in found]


def _tokenize_pair(
    row: dict[str, Any],
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    pair_columns: tuple[str, ...],
    revision: int,
) -> dict[str, Any]:
    """One output row of `tokenize_pairs`, with the reason to drop it, or "", in `dropped`; in `cut` whether the
    prompt's end is no part of the sequences; in `same` whether the completions are of the same tokens."""
    prompt, chosen, rejected = _split_row(row, index)
    if isinstance(prompt, str):
        if tokenizer.eos_token_id is None:
            raise ValueError("plain text needs an EOS token to end the completions with: set tokenizer.eos_token")
        sequences = _encode_texts([prompt, prompt + chosen, prompt + rejected], tokenizer)
    else:
        if tokenizer.chat_template is None:
            raise ValueError(
                "conversations need a chat template: set tokenizer.chat_template, or give plain text in 'prompt', "
                "'chosen' and 'rejected'"
            )
        try:
            texts = [_render(prompt, row, tokenizer, add_generation_prompt=True)]
            texts += [_render(prompt + completion, row, tokenizer) for completion in (chosen, rejected)]
        except Exception as error:  # the template's own
            error.add_note(f"The chat template was given row {index}.")
            raise
        sequences = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    prompt_length = _common_length(*sequences)
    completions = [ids[prompt_length:] for ids in sequences[1:]]
    if isinstance(prompt, str):
        for completion in completions:
            if completion[-1:] != [tokenizer.eos_token_id]:
                completion.append(tokenizer.eos_token_id)

    dropped = ""
    if prompt_length >= max_length:
        dropped = _PROMPT_TOO_LONG
    elif prompt_length + min(map(len, completions)) <= max(prompt_length, 1):  # token 0 has no prediction
        dropped = _EMPTY_COMPLETION
    chosen, rejected = (completion[: max_length - prompt_length] for completion in completions)
    return {
        "prompt_ids": sequences[0][:prompt_length],
        "chosen_ids": chosen,
        "rejected_ids": rejected,
        "length": prompt_length + len(chosen) + len(rejected),
        **{name: _checked_number(name, row[name], index) for name in pair_columns if name in row},
        "row": index,
        "dropped": dropped,
        "cut": prompt_length < len(sequences[0]),
        "same": chosen == rejected,
    }


def _split_row(row: dict[str, Any], index: int) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected completion of a row: three strings, or three lists of messages."""
    names = [name for name in ("prompt", "chosen", "rejected") if name in row]
    for name in names:
        _check_text_or_messages(name, row[name], index)
    if len({isinstance(row[name], str) for name in names}) > 1:
        kinds = ", ".join(f"{name!r} is a {type(row[name]).__name__}" for name in names)
        raise ValueError(
            f"row {index} mixes text and messages ({kinds}); use one of them throughout, and remove the column "
            "'prompt' if 'chosen' and 'rejected' hold the whole conversation"
        )
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        prompt = row["prompt"]
        if isinstance(prompt, list) and prompt and all(side[: len(prompt)] == prompt for side in (chosen, rejected)):
            raise ValueError(
                f"row {index}: 'chosen' and 'rejected' begin with the messages of 'prompt', which would be there "
                "twice; remove the column 'prompt'"
            )
        return prompt, chosen, rejected
    length = _common_length(chosen, rejected)
    if isinstance(chosen, str):
        while length and not all(_word_ends(text, length) for text in (chosen, rejected)):
            length -= 1
    else:
        length = max(0, min(length, len(chosen) - 1, len(rejected) - 1))
    return chosen[:length], chosen[length:], rejected[length:]


def _word_ends(text: str, position: int) -> bool:
    return text[position : position + 1].isspace() and not text[position - 1].isspace()


def _check_text_or_messages(name: str, value: Any, index: int) -> None:
    """Raises unless `value` is a string or a list of messages that say something."""
    if value is None:
        raise ValueError(f"row {index}: {name!r} is None; fill it in or remove the row")
    if isinstance(value, str):
        return
    if not isinstance(value, list) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
        raise TypeError(
            f"row {index}: {name!r} must be a string or a list of messages with 'role' and 'content', got {value!r}"
        )
    for message in value:
        if all(content is None for key, content in message.items() if key != "role"):
            raise ValueError(f"row {index}: {name!r} has a message without content: {message!r}")
        parts = message["content"] if isinstance(message.get("content"), list) else []
        if any(isinstance(part, dict) and part.get("type") != "text" for part in parts):
            raise ValueError(
                f"row {index}: {name!r} has a message with more than text, which is not supported: {message}"
            )


def _checked_number(name: str, value: Any, index: int) -> float:
    """`value` of a pair column as a float; raises ValueError outside its range."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "agreement":
        legal, wanted = is_number and 0.5 < value <= 1.0, "a number in (0.5, 1]"
    else:
        legal, wanted = is_number and 0.0 <= value < math.inf, "a finite number >= 0"
    if not legal:
        raise ValueError(f"row {index}: {name!r} must be {wanted}, got {value!r}")
    return float(value)


def _encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text, with the tokenizer's own special tokens except the EOS it appends itself.

    That EOS would end the prompt and hide where it continues. A text that begins with BOS keeps one BOS only.
    """
    encoded = tokenizer(texts, return_special_tokens_mask=True, verbose=False)
    sequences = []
    for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        start = 1 if ids[:2] == [tokenizer.bos_token_id] * 2 else 0
        # The mask marks what the tokenizer added: an EOS of the text stays. So does a lone BOS that is also EOS.
        added_eos = special[-1:] == [1] and ids[-1] == tokenizer.eos_token_id
        added_eos &= len(ids) > start + (tokenizer.bos_token_id == tokenizer.eos_token_id)
        sequences.append(ids[start : len(ids) - added_eos])
    return sequences


def _render(messages: list, row: dict, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False) -> str:
    """The chat template's text for `messages`; "" for none, which templates do not accept."""
    if not messages:
        return ""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else _without_none(tools)
    options = _without_none(row.get("chat_template_kwargs") or {})
    messages = [
        message | {"tool_calls": _without_none(message["tool_calls"])} if message.get("tool_calls") else message
        for message in messages
    ]
    return tokenizer.apply_chat_template(
        messages, tools=tools or None, add_generation_prompt=add_generation_prompt, tokenize=False, **options
    )


def _without_none(value: Any) -> Any:
    """`value` less what Arrow fills the keys with that a row does not have; a template would take it for a value."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _common_length(*sequences: Any) -> int:
    """Length of the longest common prefix."""
    length = 0
    for items in zip(*sequences, strict=False):
        if items.count(items[0]) < len(items):
            break
        length += 1
    return length


def scored_tokens(dataset: Dataset) -> dict[str, list[int]]:
    """How many tokens of each row's "chosen" and "rejected" response have a prediction, of `tokenize_pairs`' rows."""
    without = [not ids for ids in dataset["prompt_ids"]]
    return {
        side: [len(ids) - first for ids, first in zip(dataset[f"{side}_ids"], without, strict=True)]
        for side in ("chosen", "rejected")
    }


def extent(dataset: Dataset) -> tuple[int, int]:
    """The largest token id and the longest sequence, a prompt with one completion, of `tokenize_pairs`' rows."""
    largest, longest = 0, 0
    for batch in dataset.select_columns(list(TOKEN_COLUMNS)).with_format("arrow").iter(batch_size=1000):
        columns = [batch[name].combine_chunks() for name in TOKEN_COLUMNS]
        prompt, *completions = (column.value_lengths().to_numpy() for column in columns)
        longest = max(longest, int((prompt + np.maximum(*completions)).max()))
        largest = max(largest, *(int(column.flatten().to_numpy().max(initial=0)) for column in columns))
    return largest, longest
