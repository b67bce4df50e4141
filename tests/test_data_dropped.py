"""Preference pairs that are cut, dropped or of no use, and what is said of them."""

import logging

import pytest
from datasets import Dataset
from tiny_text import (
    EOS_ID,
    PROMPTS,
    TEMPLATES,
    A,
    B,
    C,
    assistant,
    build,
    conversational,
    letters,
    pair,
    standard,
    user,
)

from mallowspo.data import tokenize_pairs

pytestmark = pytest.mark.usefixtures("no_progress_bars")


@pytest.mark.parametrize(
    "max_length, chosen, rejected",
    [
        (None, [A, C, A, C, EOS_ID], [B, EOS_ID]),
        (8, [A, C, A, C, EOS_ID], [B, EOS_ID]),
        (7, [A, C, A, C], [B, EOS_ID]),
        (5, [A, C], [B, EOS_ID]),
        (4, [A], [B]),
    ],
)
def test_truncation_keeps_the_start(max_length, chosen, rejected):
    row = tokenize_pairs(pair("ccc", "acac", "b"), letters(), max_length=max_length)[0]
    assert row.pop("length") == 3 + len(chosen) + len(rejected)
    assert row == {"prompt_ids": [C, C, C], "chosen_ids": chosen, "rejected_ids": rejected, "row": 0}


def test_dropped_pairs_are_counted(caplog):
    rows = [("ccc", "a", "b"), ("cc", "a", "b"), ("cccc", "a", "b"), ("", "", "a"), ("", "b", "a")]
    dataset = Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows])
    counts = {}
    with caplog.at_level(logging.WARNING, logger="mallowspo.data"):
        result = tokenize_pairs(dataset, letters(), max_length=3, drop_counts=counts)
    assert counts == {"prompt too long": 2, "empty completion": 1}
    assert result["prompt_ids"][:] == [[C, C], []]
    assert result["chosen_ids"][:] == [[A], [B, EOS_ID]]
    assert result["row"][:] == [1, 4]  # of the data set as given
    (record,) = caplog.records
    assert "dropped 3 of 5" in record.message
    assert "2 with a prompt too long" in record.message and "1 with an empty completion" in record.message


@pytest.mark.parametrize(
    "dataset, tokenizer, told",
    [
        (conversational(), build("bpe", TEMPLATES["think"][0])[0], "2 of 2"),  # the rejected one does not think
        (
            Dataset.from_dict({"prompt": ["ca", "c"], "chosen": ["b", "b"], "rejected": ["c", "c"]}),
            letters(),
            "1 of 2",
        ),
        (conversational(), build("bpe", TEMPLATES["chatml"][0])[0], None),
    ],
)
def test_ends_of_prompts_that_are_left_out_are_counted(caplog, dataset, tokenizer, told):
    with caplog.at_level(logging.WARNING, logger="mallowspo.data"):
        tokenize_pairs(dataset, tokenizer)
    assert len(caplog.records) == (told is not None)
    for record in caplog.records:
        assert f"the last tokens of {told} prompts are not in prompt + completion and are left out" in record.message


def test_nothing_dropped_is_silent(caplog):
    counts = {}
    result = tokenize_pairs(standard(), letters(), drop_counts=counts)
    assert len(result) == len(PROMPTS) and not caplog.records
    assert counts == {"prompt too long": 0, "empty completion": 0}


def test_empty_completion_of_a_conversation_is_dropped():
    tokenizer = letters(template="{% for m in messages %}{{ m.content }}{% endfor %}")
    rows = [
        {"prompt": [user("c")], "chosen": [], "rejected": [assistant("a")]},
        {"prompt": [user("c")], "chosen": [assistant("b")], "rejected": [assistant("a")]},
    ]
    counts = {}
    result = tokenize_pairs(Dataset.from_list(rows), tokenizer, drop_counts=counts)
    assert result["chosen_ids"][:] == [[B]] and result["row"][:] == [1]
    assert counts["empty completion"] == 1


def test_all_dropped():
    with pytest.raises(ValueError, match=r"all 1 preference pairs.*1 with a prompt too long.*max_length=3.*raise max"):
        tokenize_pairs(pair("cccc", "a", "b"), letters(), max_length=3)
    with pytest.raises(ValueError, match="1 with an empty completion"):
        tokenize_pairs(pair("", "", ""), letters())


@pytest.mark.parametrize(
    "max_length, told",
    [
        (None, ["2 of 4 pairs have the same tokens on both sides (max_length=None)"]),
        (4, ["2 of 4 pairs have the same tokens on both sides (max_length=4)"]),
        (3, ["2 of 4 pairs have the same tokens on both sides (max_length=3)", "dropped 2 of 4"]),
    ],
)
def test_pairs_without_a_difference_are_counted_and_stay(caplog, max_length, told):
    rows = [("c", "a", "a"), ("c", "aca", "acb"), ("ccc", "a", "b"), ("ccc", "a", "a")]
    dataset = Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows])
    with caplog.at_level(logging.WARNING, logger="mallowspo.data"):
        result = tokenize_pairs(dataset, letters(), max_length=max_length)
    assert len(result) == (2 if max_length == 3 else 4)
    for record, text in zip(caplog.records, told, strict=True):
        assert text in record.message
