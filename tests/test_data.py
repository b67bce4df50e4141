"""Tokenization of preference data, against texts rendered by hand."""

import json
import math
import os

import datasets
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_text import (
    AB,
    BOS,
    BOS_ID,
    CHOSEN,
    EOS,
    EOS_ID,
    PROMPTS,
    REJECTED,
    TEMPLATES,
    TOKENIZERS,
    A,
    B,
    C,
    assistant,
    build,
    chatml_text,
    conversational,
    letters,
    pair,
    raw_ids,
    standard,
    user,
)

from mallowspo.data import PAIR_COLUMNS, TOKEN_COLUMNS, tokenize_pairs

pytestmark = pytest.mark.usefixtures("no_progress_bars")


@pytest.fixture(params=TOKENIZERS)
def kind(request):
    return request.param


# Tokenization: whole sequences and the boundary


@pytest.mark.parametrize("implicit", [False, True])
def test_standard_text(kind, implicit):
    tokenizer, options = build(kind)
    rows = tokenize_pairs(standard(implicit), tokenizer)
    assert rows.column_names == [*TOKEN_COLUMNS, "length", "row"]
    assert rows["row"][:] == list(range(len(PROMPTS)))
    bos = [tokenizer.bos_token_id] * bool(options.get("add_bos"))
    for row, prompt, chosen, rejected in zip(rows, PROMPTS, CHOSEN, REJECTED, strict=True):
        whole = [bos + raw_ids(tokenizer, prompt + side) for side in (chosen, rejected)]
        assert row["prompt_ids"] == os.path.commonprefix([bos + raw_ids(tokenizer, prompt), *whole])
        for ids, side, completion in zip(whole, (chosen, rejected), ("chosen_ids", "rejected_ids"), strict=True):
            sequence = row["prompt_ids"] + row[completion]
            assert sequence == ids + [tokenizer.eos_token_id]
            assert tokenizer.decode(sequence, skip_special_tokens=True) == prompt + side
            specials = [token for token in sequence if token in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
            assert specials == bos + [tokenizer.eos_token_id]


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
def test_conversations(kind, template, implicit):
    source, render = TEMPLATES[template]
    tokenizer, _ = build(kind, source)
    rows = tokenize_pairs(conversational(implicit), tokenizer)
    for row, example in zip(rows, conversational(), strict=True):
        texts = [
            render(example["prompt"], True),
            *(render(example["prompt"] + example[s]) for s in ("chosen", "rejected")),
        ]
        texts = [text.replace(BOS, tokenizer.bos_token) for text in texts]
        prompt, *whole = (raw_ids(tokenizer, text) for text in texts)
        assert row["prompt_ids"] == os.path.commonprefix([prompt, *whole])
        for ids, text, completion in zip(whole, texts[1:], ("chosen_ids", "rejected_ids"), strict=True):
            assert len(row[completion]) > 0
            assert row["prompt_ids"] + row[completion] == ids
            assert tokenizer.decode(ids) == text
            assert ids[:2].count(tokenizer.bos_token_id) == (template == "bos")


def test_thinking_template_moves_the_boundary():
    tokenizer, _ = build("bpe", TEMPLATES["think"][0])
    row = tokenize_pairs(conversational(), tokenizer)[0]
    assert tokenizer.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n")  # <think> is not shared
    assert tokenizer.decode(row["rejected_ids"]) == "It is green.<|im_end|>\n"


MERGES = [
    # options, prompt, chosen, rejected -> prompt ids, chosen ids, rejected ids
    ({}, "ca", "b", "c", [C], [AB, EOS_ID], [A, C, EOS_ID]),
    ({}, "a", "b", "b", [], [AB, EOS_ID], [AB, EOS_ID]),
    ({"add_bos": True, "add_eos": True}, "ca", "b", "c", [BOS_ID, C], [AB, EOS_ID], [A, C, EOS_ID]),
    # Equal completions, one a prefix of the other, an empty one.
    ({}, "c", "ab", "ab", [C], [AB, EOS_ID], [AB, EOS_ID]),
    ({}, "c", "c", "cc", [C], [C, EOS_ID], [C, C, EOS_ID]),
    ({}, "c", "", "a", [C], [EOS_ID], [A, EOS_ID]),
    ({"add_eos": True}, "c", "", "a", [C], [EOS_ID], [A, EOS_ID]),
    ({"add_bos": True, "add_eos": True}, "", "", "a", [BOS_ID], [EOS_ID], [A, EOS_ID]),
    ({"add_bos": True, "bos": EOS}, "", "", "a", [EOS_ID], [EOS_ID], [A, EOS_ID]),
    # EOS and BOS that the text brings itself.
    ({}, "c", "a</s>", "b", [C], [A, EOS_ID], [B, EOS_ID]),
    ({"add_bos": True, "add_eos": True}, "c", "a</s>", "b", [BOS_ID, C], [A, EOS_ID], [B, EOS_ID]),
    ({"add_bos": True, "add_eos": True}, "<s>c", "a", "</s>", [BOS_ID, C], [A, EOS_ID], [EOS_ID]),
    ({"add_eos": True}, "c</s>", "a", "b", [C, EOS_ID], [A, EOS_ID], [B, EOS_ID]),
    ({}, "c</s>", "a", "", [C, EOS_ID], [A, EOS_ID], [EOS_ID]),
]


@pytest.mark.parametrize("options, prompt, chosen, rejected, prompt_ids, chosen_ids, rejected_ids", MERGES)
def test_boundary_by_hand(options, prompt, chosen, rejected, prompt_ids, chosen_ids, rejected_ids):
    row = tokenize_pairs(pair(prompt, chosen, rejected), letters(**options))[0]
    assert row.pop("length") == len(prompt_ids) + len(chosen_ids) + len(rejected_ids)
    assert row == {"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids, "row": 0}


@settings(max_examples=40, deadline=None)
@given(
    st.text("abc", max_size=4), st.text("abc", max_size=4), st.text("abc", max_size=4), st.booleans(), st.booleans()
)
def test_sequences_are_whole_tokenizations(prompt, chosen, rejected, add_bos, add_eos):
    tokenizer = letters(add_bos=add_bos, add_eos=add_eos)
    dataset = pair(prompt + "c", chosen + "c", rejected + "c")
    row = tokenize_pairs(dataset, tokenizer)[0]
    for side, completion in (("chosen_ids", chosen), ("rejected_ids", rejected)):
        body = raw_ids(tokenizer, prompt + "c" + completion + "c")
        assert row["prompt_ids"] + row[side] == [BOS_ID] * add_bos + body + [EOS_ID]


IMPLICIT_TEXTS = [
    ("a b c", "a b a", "a b"),
    ("a bc", "a ba", "a"),  # no word is cut
    ("a b", "a b c", "a"),  # both keep a word
    ("a b", "a b", "a"),
    ("a  b", "a  c", "a"),  # all the whitespace belongs to the completion
    ("ab", "ac", ""),
    (" a", " b", ""),
]


@pytest.mark.parametrize("chosen, rejected, prompt", IMPLICIT_TEXTS)
def test_implicit_prompt_of_texts(chosen, rejected, prompt):
    rows = tokenize_pairs(Dataset.from_list([{"chosen": chosen, "rejected": rejected}]), letters())
    explicit = tokenize_pairs(pair(prompt, chosen[len(prompt) :], rejected[len(prompt) :]), letters())
    assert rows[0] == explicit[0]
    assert rows[0]["prompt_ids"] == raw_ids(letters(), prompt)


@pytest.mark.parametrize(
    "chosen, rejected, shared",
    [
        ([user("c"), assistant("a"), user("b"), assistant("a")], [user("c"), assistant("a"), user("b"), user("c")], 3),
        ([user("c"), assistant("a")], [user("c"), assistant("a")], 1),
        ([user("c"), assistant("a")], [user("c"), assistant("a"), user("c"), assistant("b")], 1),
        ([assistant("a")], [assistant("b")], 0),
    ],
)
def test_implicit_prompt_of_conversations(chosen, rejected, shared):
    tokenizer = letters(template=TEMPLATES["chatml"][0])
    rows = tokenize_pairs(Dataset.from_list([{"chosen": chosen, "rejected": rejected}]), tokenizer)
    explicit = pair(chosen[:shared], chosen[shared:], rejected[shared:])
    assert rows[0] == tokenize_pairs(explicit, tokenizer)[0]
    assert rows[0]["prompt_ids"] + rows[0]["chosen_ids"] == raw_ids(tokenizer, chatml_text(chosen))
    assert len(rows[0]["prompt_ids"]) >= len(raw_ids(tokenizer, chatml_text(chosen[:shared])))


def test_template_arguments():
    template = (
        "{{ 'no tools ' if tools is none }}{% for tool in tools or [] %}{{ tool.name }} {% endfor %}"
        "{{ 'none' if style is not defined else style }}:"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    tokenizer, _ = build("bpe", template)
    rows = [
        {"tools": '[{"name": "search"}, {"name": "run"}]', "chat_template_kwargs": {"style": "short"}},
        {"tools": None, "chat_template_kwargs": {"other": 1}},
        {"tools": "[]", "chat_template_kwargs": None},
    ]
    turn = {"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]}
    result = tokenize_pairs(Dataset.from_list([turn | row for row in rows]), tokenizer)
    texts = [tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]) for row in result]
    assert texts == ["search run short:QA", "no tools none:QA", "no tools none:QA"]
    listed = Dataset.from_list([turn | {"tools": [{"name": "search"}]}])
    row = tokenize_pairs(listed, tokenizer)[0]
    assert tokenizer.decode(row["prompt_ids"]) == "search none:Q"


def test_tools_hold_nothing_that_arrow_added():
    """Rows of one column have one type: each has the keys of all, with None in them."""
    tokenizer, _ = build("bpe", "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}")
    tools = [{"a": {"city": "string"}}, {"a": {"n": "integer"}}]
    turn = {"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]}
    rows = tokenize_pairs(Dataset.from_list([turn | {"tools": [tool]} for tool in tools]), tokenizer)
    assert [tokenizer.decode(row["prompt_ids"]) for row in rows] == [f"[{json.dumps(tool)}]Q" for tool in tools]
    tokenizer, _ = build("bpe", "{% for m in messages %}{{ (m.tool_calls or m.content) | tojson }}{% endfor %}")
    calls = [turn | {"chosen": [assistant("A") | {"tool_calls": [tool]}]} for tool in tools]
    rows = tokenize_pairs(Dataset.from_list(calls), tokenizer)
    assert all(json.dumps(tool) in tokenizer.decode(row["chosen_ids"]) for tool, row in zip(tools, rows, strict=True))


def test_a_transform_is_applied():
    plain = pair("no", " a", " b")
    moved = plain.with_transform(lambda rows: {**rows, "prompt": ["yes" for _ in rows["chosen"]], "agreement": [0.7]})
    (row,) = tokenize_pairs(moved, letters())
    (expected,) = tokenize_pairs(pair("yes", " a", " b"), letters())
    assert row == expected | {"agreement": 0.7}


# Columns, formats and processes


def test_pair_columns_are_kept_as_float64_and_others_dropped():
    dataset = standard().add_column("neg_log_dispersion", [0, 1, 2]).add_column("agreement", [1.0, 0.6, 0.75])
    dataset = dataset.add_column("source", ["x", "y", "z"]).add_column("sounds", [[b"0"]] * 3)
    result = tokenize_pairs(dataset, letters())
    assert set(result.column_names) == {*TOKEN_COLUMNS, "length", "row", *PAIR_COLUMNS}
    assert all(result.features[name] == datasets.Value("float64") for name in PAIR_COLUMNS)
    assert result["neg_log_dispersion"][:] == [0.0, 1.0, 2.0]
    assert result["agreement"][:] == [1.0, 0.6, 0.75]


def test_pair_columns_that_are_not_read_may_mean_anything():
    dataset = standard().add_column("agreement", ["much", "none", "some"]).add_column("neg_log_dispersion", [0, 1, 2])
    result = tokenize_pairs(dataset, letters(), pair_columns=["neg_log_dispersion"])
    assert result["neg_log_dispersion"][:] == [0.0, 1.0, 2.0] and "agreement" not in result.column_names


def test_format_of_the_input_does_not_matter():
    dataset = standard().add_column("agreement", [1.0, 0.6, 0.75])
    expected = tokenize_pairs(dataset, letters())[:]
    assert tokenize_pairs(dataset.with_format("torch"), letters())[:] == expected


def test_processes_and_cache_key():
    tokenizer, _ = build("bpe-bos")
    first, again, parallel = (tokenize_pairs(standard(), tokenizer, num_proc=n) for n in (None, None, 2))
    assert first[:] == parallel[:]
    source = standard()
    assert tokenize_pairs(source, tokenizer)._fingerprint == tokenize_pairs(source, tokenizer)._fingerprint
    assert tokenize_pairs(source, tokenizer)._fingerprint != tokenize_pairs(source, letters())._fingerprint
    assert again[:] == first[:]


# Bad input

CHAT = [user("c")]
TEXT = {"prompt": "c", "chosen": "a", "rejected": "b"}
BAD = [
    ([TEXT], TypeError, "datasets.Dataset.*got list"),
    (DatasetDict(train=Dataset.from_list([TEXT])), TypeError, "one split.*DatasetDict"),
    (
        Dataset.from_list([TEXT]).to_iterable_dataset(),
        TypeError,
        "IterableDataset is not supported.*Dataset.from_list",
    ),
    (Dataset.from_list([TEXT]).select([]), ValueError, "empty"),
    (
        Dataset.from_dict({"prompt": ["c"], "good": ["a"]}),
        ValueError,
        r"\['chosen', 'rejected'\].*\['prompt', 'good'\]",
    ),
    (Dataset.from_list([TEXT, TEXT | {"rejected": None}]), ValueError, "row 1: 'rejected' is None"),
    (Dataset.from_list([TEXT, TEXT | {"prompt": None}]), ValueError, "row 1: 'prompt' is None"),
    (Dataset.from_dict({"prompt": [1], "chosen": ["a"], "rejected": ["b"]}), TypeError, "row 0: 'prompt' must be.*1"),
    (Dataset.from_list([{"chosen": ["a"], "rejected": ["b"]}]), TypeError, r"row 0: 'chosen' must be.*\['a'\]"),
    (pair("c", CHAT, CHAT), ValueError, "row 0 mixes text and messages.*remove the column 'prompt'"),
    (Dataset.from_list([{"chosen": "a", "rejected": CHAT}]), ValueError, "row 0 mixes"),
    (pair(CHAT, [assistant(None)], CHAT), ValueError, "row 0: 'chosen' has a message without content"),
    (pair(CHAT, [{"role": None, "content": "a"}], CHAT), TypeError, "row 0: 'chosen' must be"),
    (pair(CHAT, [assistant("a")], CHAT), ValueError, "set tokenizer.chat_template"),
    (
        pair(CHAT, [*CHAT, assistant("a")], CHAT),
        ValueError,
        "row 0: .* begin with .* 'prompt'.*twice; remove the column",
    ),
    (Dataset.from_list([TEXT | {"images": ["a.png"]}]), ValueError, "column 'images', which would not be seen"),
    (pair(CHAT, [assistant([{"type": "audio"}])], CHAT), ValueError, "row 0: 'chosen' has .* more than text"),
]
BAD_NUMBERS = [("neg_log_dispersion", value) for value in (-0.1, math.nan, math.inf, -math.inf, None, "1", True)]
BAD_NUMBERS += [("agreement", value) for value in (0.5, 0.0, 1.01, math.nan, None, "0.7")]


@pytest.mark.parametrize("dataset, error, match", BAD, ids=[match for _, _, match in BAD])
def test_bad_data(dataset, error, match):
    with pytest.raises(error, match=match):
        tokenize_pairs(dataset, letters())


@pytest.mark.parametrize("name, value", BAD_NUMBERS)
def test_bad_numbers(name, value):
    rows = [TEXT | {name: value}]
    if not isinstance(value, (str, bool)):  # a column of one type
        rows.insert(0, TEXT | {name: 1.0})
    with pytest.raises(ValueError, match=f"row {len(rows) - 1}: '{name}' must be .* got {value!r}"):
        tokenize_pairs(Dataset.from_list(rows), letters())


@pytest.mark.parametrize("max_length", [1, 0, -5, 2.5, "8"])
def test_bad_max_length(max_length):
    with pytest.raises(ValueError, match=f"max_length.*{max_length!r}"):
        tokenize_pairs(pair("c", "a", "b"), letters(), max_length=max_length)


def test_plain_text_needs_eos():
    with pytest.raises(ValueError, match="set tokenizer.eos_token"):
        tokenize_pairs(pair("c", "a", "b"), letters(eos=None))
    chat = letters(eos=None, template=TEMPLATES["chatml"][0])  # the template ends the turns itself
    assert len(tokenize_pairs(pair(CHAT, [assistant("a")], [assistant("b")]), chat)) == 1
