"""The collator, against loops over the definition, and the whole path from text to batch against TRL's."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_text import (
    PAD_ID,
    TEMPLATES,
    build,
    conversational,
    letters,
    standard,
)

from mallowspo.collator import PreferenceCollator
from mallowspo.data import tokenize_pairs


def test_collator_by_hand():
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9], "agreement": 0.75, "ref_chosen_logps": -1.5},
        {
            "prompt_ids": [],
            "chosen_ids": [3, 4, 5],
            "rejected_ids": [6, 7],
            "agreement": 1.0,
            "ref_chosen_logps": -2.0,
        },
    ]
    batch = PreferenceCollator(pad_token_id=0)(rows)
    expected = {
        "input_ids": [[5, 6, 7, 8], [3, 4, 5, 0], [5, 6, 9, 0], [6, 7, 0, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]],
        "target_index": [1, 2, 4, 5, 9, 12],
        "target_ids": [7, 8, 4, 5, 9, 7],
        "num_tokens": [2, 2, 1, 1],
    }
    assert batch.keys() == {*expected, "agreement", "ref_chosen_logps"}
    for name, values in expected.items():
        assert batch[name].dtype == torch.int64 and batch[name].tolist() == values, name
    assert batch["agreement"].dtype == torch.float32 and batch["agreement"].tolist() == [0.75, 1.0]
    assert batch["ref_chosen_logps"].tolist() == [-1.5, -2.0]


def test_packed_by_hand():
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9], "agreement": 0.75},
        {"prompt_ids": [], "chosen_ids": [3, 4, 5], "rejected_ids": [6, 7], "agreement": 1.0},
    ]
    batch = PreferenceCollator(pad_token_id=0, share_prompt=True)(rows)
    expected = {
        "input_ids": [[5, 6, 7, 8, 9, 3, 4, 5, 6, 7]],
        "position_ids": [[0, 1, 2, 3, 2, 0, 1, 2, 0, 1]],
        "target_index": [1, 2, 5, 6, 1, 8],
        "target_ids": [7, 8, 4, 5, 9, 7],
        "num_tokens": [2, 2, 1, 1],
    }
    assert batch.keys() == {*expected, "segments", "agreement"}
    for name, values in expected.items():
        assert batch[name].dtype == torch.int64 and batch[name].tolist() == values, name
    assert batch["segments"] == [(2, (2, 1)), (0, (3, 2))] and batch["agreement"].tolist() == [0.75, 1.0]


def test_collator_needs_a_pad_token():
    with pytest.raises(TypeError, match="pad_token_id must be an int, got None.*tokenizer.pad_token"):
        PreferenceCollator(pad_token_id=None)


IDS = st.integers(0, 9)
ROW = st.fixed_dictionaries(
    {
        "prompt_ids": st.lists(IDS, max_size=4),
        "chosen_ids": st.lists(IDS, min_size=1, max_size=5),
        "rejected_ids": st.lists(IDS, min_size=1, max_size=5),
    }
)


@settings(max_examples=100, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=5), st.sampled_from([None, 1, 4, 8]))
def test_collator_against_loops(rows, multiple):
    batch = PreferenceCollator(pad_token_id=0, pad_to_multiple_of=multiple)(rows)
    sequences = [row["prompt_ids"] + row["chosen_ids"] for row in rows]
    sequences += [row["prompt_ids"] + row["rejected_ids"] for row in rows]
    width = max(map(len, sequences))
    while multiple and width % multiple:
        width += 1
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2 * len(rows), width)
    targets, counts = [], []
    for r, sequence in enumerate(sequences):
        assert batch["input_ids"][r].tolist() == sequence + [0] * (width - len(sequence))
        assert batch["attention_mask"][r].tolist() == [1] * len(sequence) + [0] * (width - len(sequence))
        prompt_length = len(rows[r % len(rows)]["prompt_ids"])
        scored = [(r * width + t - 1, sequence[t]) for t in range(prompt_length, len(sequence)) if t > 0]
        targets += scored
        counts.append(len(scored))
    found = (batch[name].tolist() for name in ("target_index", "target_ids"))
    assert list(zip(*found, strict=True)) == targets
    assert batch["num_tokens"].tolist() == counts


@settings(max_examples=100, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=5))
def test_packed_scores_what_padded_rows_score(rows):
    """The same tokens in the same order, each predicted behind the same tokens of its sequence."""
    packed, padded = (PreferenceCollator(pad_token_id=0, share_prompt=share)(rows) for share in (True, False))
    assert torch.equal(packed["target_ids"], padded["target_ids"])
    assert torch.equal(packed["num_tokens"], padded["num_tokens"])
    width = padded["input_ids"].shape[1]
    assert torch.equal(packed["position_ids"][0][packed["target_index"]], padded["target_index"] % width)
    predicting = (batch["input_ids"].flatten()[batch["target_index"]] for batch in (packed, padded))
    assert torch.equal(*predicting)
    lengths = [n for prompt, responses in packed["segments"] for n in (prompt, *responses)]
    assert lengths == [len(row[name]) for row in rows for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    assert packed["input_ids"].shape == packed["position_ids"].shape == (1, sum(lengths))


def test_every_kept_pair_has_a_scored_token():
    texts = ["", "a", "ab", "ca", "cc"]
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p in texts for c in texts for r in texts]
    for options in ({}, {"add_bos": True}):
        result = tokenize_pairs(Dataset.from_list(rows), letters(**options), max_length=3)
        batch = PreferenceCollator(PAD_ID)(result.to_list())
        assert batch["num_tokens"].min() >= 1 and batch["input_ids"].shape[1] <= 3


# TRL


@pytest.mark.parametrize("make_dataset, max_length", [(standard, 8), (standard, 1024), (conversational, 24)])
@pytest.mark.parametrize("name", ["word", "bpe", "bpe-bos"])
def test_same_tokens_as_trl(name, make_dataset, max_length):
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    tokenizer, _ = build(name, TEMPLATES["chatml"][0])
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    theirs = dpo_trainer.DPOTrainer._prepare_dataset(trainer, make_dataset(), tokenizer, args, "train").to_list()
    assert len(theirs) > 0, "the comparison needs pairs that fit"
    batch = dpo_trainer.DataCollatorForPreference(pad_token_id=PAD_ID, max_length=max_length)(theirs)
    rows = tokenize_pairs(make_dataset(), tokenizer, max_length=max_length)
    ours = PreferenceCollator(pad_token_id=PAD_ID)(rows.to_list())
    assert torch.equal(ours["input_ids"], batch["input_ids"])
    assert torch.equal(ours["attention_mask"], batch["attention_mask"])
    mask = torch.zeros_like(batch["completion_mask"])
    mask.view(-1)[ours["target_index"] + 1] = 1
    assert torch.equal(mask, batch["completion_mask"])
