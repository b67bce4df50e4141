"""Which tokens of a pair's two responses differ: the masks of BMC's bridges."""

from collections.abc import Collection, Iterable
from difflib import SequenceMatcher
from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

DIFF_COLUMNS = ("chosen_differs", "rejected_differs")  # what mark_differences adds

_REVISION = 1  # raise when the result changes: the `datasets` cache knows _mark_row by its name, not by its code


def mark_differences(dataset: Dataset, stop_ids: Iterable[int] = (), num_proc: int | None = None) -> Dataset:
    """Adds `DIFF_COLUMNS`, the masks of `diff_masks`, to a data set of :func:`mallowspo.data.tokenize_pairs`."""
    features = dataset.features.copy() | {name: List(Value("bool")) for name in DIFF_COLUMNS}
    return dataset.map(
        _mark_row,
        fn_kwargs={"stop_ids": sorted(stop_ids), "revision": _REVISION},
        features=Features(features),
        num_proc=num_proc,
        desc="Comparing the responses of each pair",
    )


def _mark_row(row: dict[str, Any], stop_ids: list[int], revision: int) -> dict[str, list[bool]]:
    return dict(zip(DIFF_COLUMNS, diff_masks(row["chosen_ids"], row["rejected_ids"], stop_ids), strict=True))


def stop_word_ids(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> set[int]:
    """Ids of the words that are one known token, as they are and capitalised, with a space before and without."""
    forms = [space + form for word in words for form in (word, word.capitalize()) for space in ("", " ")]
    encoded = tokenizer(forms, add_special_tokens=False)["input_ids"] if forms else []
    return {ids[0] for ids in encoded if len(ids) == 1} - {tokenizer.unk_token_id}


def diff_masks(
    chosen_ids: list[int], rejected_ids: list[int], stop_ids: Collection[int] = ()
) -> tuple[list[bool], list[bool]]:
    """Which tokens of each of two responses an edit of the rejected into the chosen one touches (BMC's diff).

    The edit is that of `difflib.SequenceMatcher`, as in the authors' code, but of the responses alone, and without its
    heuristic for frequent elements, which sets in at a length of 200.

    Args:
        chosen_ids, rejected_ids: Token ids.
        stop_ids: Tokens that never count as different; in the authors' code NLTK's English stop words, of
            :func:`stop_word_ids`.

    Returns:
        Masks of the chosen response (tokens replaced or inserted) and the rejected one (replaced or deleted).
    """
    chosen, rejected = [False] * len(chosen_ids), [False] * len(rejected_ids)
    edit = SequenceMatcher(None, rejected_ids, chosen_ids, autojunk=False).get_opcodes()
    for tag, *ends in edit:
        if tag != "equal":
            for mask, ids, start, end in ((rejected, rejected_ids, *ends[:2]), (chosen, chosen_ids, *ends[2:])):
                mask[start:end] = [token not in stop_ids for token in ids[start:end]]
    return chosen, rejected
