"""Which tokens of a pair differ: BMC's masks, in the data and in the batch."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_pairs, tiny_tokenizer

from mallowspo.collator import PreferenceCollator
from mallowspo.data import scored_tokens, tokenize_pairs
from mallowspo.differences import DIFF_COLUMNS, diff_masks, mark_differences, stop_word_ids


@pytest.mark.parametrize(
    "chosen, rejected, expected",
    [
        ([1, 2, 3], [1, 2, 3], ("...", "...")),
        ([1, 9, 3], [1, 2, 3], (".x.", ".x.")),  # replaced
        ([1, 2, 9, 3], [1, 2, 3], ("..x.", "...")),  # inserted
        ([1, 3], [1, 2, 3], ("..", ".x.")),  # deleted
        ([7, 8], [1, 2, 3], ("xx", "xxx")),
        ([1, 9, 8, 2], [1, 7, 2, 6], (".xx.", ".x.x")),
    ],
)
def test_masks_by_hand(chosen, rejected, expected):
    found = diff_masks(chosen, rejected)
    assert tuple("".join("x" if differs else "." for differs in mask) for mask in found) == expected


def test_stop_words_do_not_differ():
    assert diff_masks([1, 9, 8, 2], [1, 7, 2, 6], {8, 6}) == ([False, True, False, False], [False, True, False, False])


def test_stop_words_are_single_known_tokens():
    tokenizer = tiny_tokenizer()
    known = stop_word_ids(tokenizer, ["red", "nowhere", "cat sky"])
    assert known == {tokenizer("red", add_special_tokens=False)["input_ids"][0]}
    assert stop_word_ids(tokenizer, []) == set()


IDS = st.lists(st.integers(0, 5), min_size=1, max_size=12)


@given(IDS, IDS)
def test_what_does_not_differ_is_a_common_subsequence(chosen, rejected):
    masks = diff_masks(chosen, rejected)
    kept = [
        [token for token, differs in zip(ids, mask, strict=True) if not differs]
        for ids, mask in zip((chosen, rejected), masks, strict=True)
    ]
    assert kept[0] == kept[1]
    if chosen == rejected:
        assert not any(masks[0] + masks[1])
    if not set(chosen) & set(rejected):
        assert all(masks[0] + masks[1])


def test_a_token_that_is_frequent_in_a_long_response_still_matches():
    """difflib's heuristic drops tokens of more than 1% in sequences of 200 and more."""
    long = [1] * 100 + [2] * 100
    assert not any(map(any, diff_masks(long, long[:])))
    assert diff_masks(long, [*long, 3]) == ([False] * 200, [False] * 200 + [True])


def test_the_columns_of_a_data_set():
    rows = tokenize_pairs(tiny_pairs(6), tiny_tokenizer())
    stop_ids = {rows["chosen_ids"][0][0]}
    for stops in ((), stop_ids):
        marked = mark_differences(rows, stops)
        assert set(marked.column_names) == {*rows.column_names, *DIFF_COLUMNS}
        for row in marked.to_list():
            expected = diff_masks(row["chosen_ids"], row["rejected_ids"], stops)
            assert (row["chosen_differs"], row["rejected_differs"]) == expected
            assert any(expected[0] + expected[1])


ROW = st.fixed_dictionaries(
    {"prompt_ids": st.lists(st.integers(3, 9), max_size=2), "chosen_ids": IDS, "rejected_ids": IDS}
)


@settings(max_examples=30)
@given(st.lists(ROW, min_size=1, max_size=4), st.booleans())
def test_columns_of_a_batch_lie_as_its_tokens_do(rows, share):
    """differs and the reference's token values: of scored tokens, chosen responses first, packed and padded alike."""
    for number, row in enumerate(rows):
        for name in ("chosen_ids", "rejected_ids"):
            row[name] = row[name] + [2] * (not row["prompt_ids"])  # its first token is not scored
        row["row"] = 10 + number
        masks = diff_masks(row["chosen_ids"], row["rejected_ids"])
        row |= dict(zip(DIFF_COLUMNS, masks, strict=True))
        for side in ("chosen", "rejected"):
            scored = row[f"{side}_ids"][0 if row["prompt_ids"] else 1 :]
            row[f"ref_{side}_token_logps"] = [-float(token) for token in scored]
        row["ref_chosen_logps_1"] = -0.5 * number
    batch = PreferenceCollator(pad_token_id=0, share_prompt=share)(rows)
    assert batch["row"].tolist() == [10 + number for number in range(len(rows))]
    assert batch["ref_chosen_logps_1"].tolist() == [-0.5 * number for number in range(len(rows))]
    tokens = torch.cat([batch["ref_chosen_token_logps"], batch["ref_rejected_token_logps"]])
    assert torch.equal(tokens, -batch["target_ids"].float())
    sides = [
        (row[f"{side}_ids"], row[f"{side}_differs"], row["prompt_ids"])
        for side in ("chosen", "rejected")
        for row in rows
    ]
    expected = [m for ids, mask, prompt in sides for m in mask[0 if prompt else 1 :]]
    assert batch["differs"].dtype == torch.bool and batch["differs"].tolist() == expected
    counts = scored_tokens(Dataset.from_list(rows))
    assert batch["num_tokens"].tolist() == counts["chosen"] + counts["rejected"]


def test_frequent_tokens_of_long_responses_are_compared_too():
    """Python's heuristic would take the one frequent token for junk and mark every token as different."""
    chosen, rejected = diff_masks([6] + [5] * 300, [5] * 300)
    assert chosen == [True] + [False] * 300 and rejected == [False] * 300
