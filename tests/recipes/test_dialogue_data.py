"""The dialogue recipe's data: pairs from conversations, transcripts and files."""

import functools
from collections import Counter, defaultdict

import numpy as np
import pytest
import yaml
from dialogue_recipe import ASSISTANT, HUMAN, report, sources, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

# ---- chatterbot-corpus ---------------------------------------------------------------------------------------------


def corpus_folder():
    return sources.package_folder("chatterbot_corpus", "chatterbot-corpus") / "data" / "english"


def words(text):
    """An own idea of what makes two texts the same: their letters and digits."""
    return "".join(character for character in text.lower() if character.isalnum())


@functools.cache
def spoken():
    """(topic, turns) of every conversation, straight from the package's files."""
    found = []
    for path in corpus_folder().glob("*.yml"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        topic = content["categories"][0].lower()
        found += [(topic, turns) for turns in content["conversations"] if isinstance(turns, list)]
    return found


@functools.cache
def corpus_prompts():
    return sources.read_prompts(corpus_folder())[0]


def test_prompts_are_read_from_small_files(tmp_path):
    conversations = [
        ["Hello", "Hi!"],
        ["hello?", "hi"],
        ["Hello", "Good day", "How are you?"],
        ["What?", "what"],
        ["Is it?", True],
        ["Silence", " ... "],
        ["alone"],
        "Hello - Hi",
    ]
    (tmp_path / "a.yml").write_text(yaml.safe_dump({"categories": ["Talk", "x"], "conversations": conversations}))
    (tmp_path / "b.yml").write_text(yaml.safe_dump({"categories": ["late"], "conversations": [["HELLO", "Ahoy"]]}))
    found, dropped = sources.read_prompts(tmp_path)
    (hello,) = found
    assert (hello.text, hello.topic, hello.replies) == ("Hello", "talk", ["Hi!", "Good day", "Ahoy"])
    assert hello.known == {"hello", "hi", "good day", "how are you", "ahoy"}
    assert sorted(dropped.values()) == [1, 1, 1, 3]
    assert dropped["the same prompt and reply again"] == 1
    assert dropped["no list of two or more texts"] == 3


def test_a_folder_without_conversations_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no conversations"):
        sources.read_prompts(tmp_path)


def test_corpus_has_distinct_prompts_with_distinct_replies_of_known_topics():
    prompts = corpus_prompts()
    assert len(prompts) > 700
    assert len({words(prompt.text) for prompt in prompts}) == len(prompts)
    assert all(len({words(reply) for reply in prompt.replies}) == len(prompt.replies) >= 1 for prompt in prompts)
    assert {prompt.topic for prompt in prompts} <= set(report.HUMAN_ORDER)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), held_out=st.floats(0.05, 0.95))
def test_split_is_by_prompt_and_follows_the_seed(seed, held_out):
    prompts = corpus_prompts()
    train, held = sources.split_prompts(prompts, held_out, seed)
    assert sorted(map(id, train + held)) == sorted(map(id, prompts))
    assert ([p.text for p in train], [p.text for p in held]) == tuple(
        [p.text for p in side] for side in sources.split_prompts(prompts, held_out, seed)
    )
    total, held_of = Counter(p.topic for p in prompts), Counter(p.topic for p in held)
    assert all(held_of[topic] != 1 and abs(held_of[topic] - held_out * total[topic]) <= 1.5 for topic in total)


@settings(max_examples=5)
@given(seed=st.integers(0, 2**32))
def test_a_wrong_reply_answers_another_prompt_of_the_topic_and_never_this_one(seed):
    replies_to, topics_of, prompts_with = defaultdict(set), defaultdict(set), defaultdict(set)
    for topic, (first, *others) in spoken():
        topics_of[words(first)].add(topic)
        for reply in map(words, map(str, others)):
            replies_to[words(first)].add(reply)
            prompts_with[reply].add(words(first))
    side = sources.split_prompts(corpus_prompts(), 0.2, seed)[1]
    rows, _ = sources.pair_replies(side, seed)
    assert rows == sources.pair_replies(side, seed)[0]
    here = {words(reply) for prompt in side for reply in prompt.replies}
    for row in rows:
        prompt, chosen, rejected = (words(row[part][0]["content"]) for part in ("prompt", "chosen", "rejected"))
        assert chosen in replies_to[prompt]
        assert rejected not in replies_to[prompt] | {prompt}
        assert rejected in here
        assert any(row["topic"] in topics_of[other] for other in prompts_with[rejected] - {prompt})
        assert [row[part][0]["role"] for part in ("prompt", "chosen", "rejected")] == ["user", *["assistant"] * 2]


def test_neither_length_nor_the_reply_alone_gives_the_answer_away():
    rows, unpaired = sources.pair_replies(corpus_prompts(), 0)
    assert unpaired <= 1
    chosen, rejected = (np.array([len(row[side][0]["content"]) for row in rows]) for side in ("chosen", "rejected"))
    assert 0.45 < (chosen > rejected).mean() + (chosen == rejected).mean() / 2 < 0.55
    assert np.median(np.abs(chosen - rejected)) <= 2
    used = Counter(row["rejected"][0]["content"] for row in rows)
    assert max(used.values()) <= 6
    assert len(used) > 0.6 * len(rows)


def test_a_prompt_gives_a_few_replies_and_a_lone_prompt_none():
    jokes = [f"joke number {i}" for i in range(9)]
    joke = sources.Prompt("joke", "fun", jokes, set(jokes))
    other = sources.Prompt("riddle", "fun", ["an answer"], {"an answer"})
    rows, unpaired = sources.pair_replies([joke, other], 0)
    assert Counter(row["prompt"][0]["content"] for row in rows) == {"joke": sources.MOST_REPLIES, "riddle": 1}
    assert unpaired == 0
    assert sources.pair_replies([joke], 0) == ([], sources.MOST_REPLIES)


def test_limits_take_the_topics_in_turn():
    assert sources.take_in_turn(["a", "a", "a", "b", "c", "b"], 4) == [0, 3, 4, 1]
    assert sorted(sources.take_in_turn(["a", "b"], 9)) == [0, 1]
    train, held, notes = sources.load_pairs("chatterbot-corpus", 0.2, 3, max_train_pairs=60, max_eval_pairs=30)
    assert (len(train), len(held)) == (60, 30)
    assert max(Counter(train["topic"]).values()) <= 4
    assert not set(train["prompt_id"]) & set(held["prompt_id"])
    assert any(note.startswith("746 prompts") for note in notes)


@pytest.mark.parametrize("options", [{"held_out": 0.0}, {"held_out": 1.0}, {"max_train_pairs": 0}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="got 0|got 1"):
        sources.load_pairs("chatterbot-corpus", **({"held_out": 0.2, "seed": 0} | options))


# ---- transcripts ---------------------------------------------------------------------------------------------------

GOOD = {
    "chosen": f"{HUMAN}hello{ASSISTANT}Hi.{HUMAN}how are\n\nyou?{ASSISTANT}Well. ",
    "rejected": f"{HUMAN}hello{ASSISTANT}Hi.{HUMAN}how are\n\nyou?{ASSISTANT}No",
}
MALFORMED = {
    "begin": {"chosen": f"x{HUMAN}a{ASSISTANT}b", "rejected": f"x{HUMAN}a{ASSISTANT}c"},
    "begin with a Human": {"chosen": f"{ASSISTANT}b", "rejected": f"{ASSISTANT}c"},
    "end": {"chosen": f"{HUMAN}a{ASSISTANT}b{HUMAN}c", "rejected": f"{HUMAN}a{ASSISTANT}b{HUMAN}d"},
    "not empty": {"chosen": f"{HUMAN}a\n\nAssistant:", "rejected": f"{HUMAN}a{ASSISTANT}b"},
    "share all turns": {"chosen": f"{HUMAN}a{ASSISTANT}b", "rejected": f"{HUMAN}z{ASSISTANT}b"},
    "identical": {"chosen": f"{HUMAN}a{ASSISTANT}b", "rejected": f"{HUMAN}a{ASSISTANT}b"},
}


def test_transcripts_become_a_conversation():
    assert sources.parse_transcript_pair(GOOD) == {
        "prompt": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "how are\n\nyou?"},
        ],
        "chosen": [{"role": "assistant", "content": "Well. "}],
        "rejected": [{"role": "assistant", "content": "No"}],
    }


@pytest.mark.parametrize("reason", MALFORMED)
def test_malformed_transcripts_are_refused(reason):
    with pytest.raises(ValueError, match=reason):
        sources.parse_transcript_pair(MALFORMED[reason])


turn = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20).filter(
    lambda text: "Human:" not in text and "Assistant:" not in text
)


@given(turns=st.lists(st.tuples(turn, turn), min_size=1, max_size=3), reply=turn.filter(str.strip))
def test_the_papers_template_gives_the_transcript_back(tiny_tokenizer, turns, reply):
    text = "".join(f"{HUMAN}{question}{ASSISTANT}{answer}" for question, answer in turns[:-1])
    text += f"{HUMAN}{turns[-1][0]}{ASSISTANT}"
    messages = sources.parse_transcript(text + reply)
    assert tiny_tokenizer.apply_chat_template(messages, tokenize=False) == text + reply + "<eos>"
    start = tiny_tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert start == text.removesuffix(" ")


def test_a_file_of_transcripts_is_loaded_and_what_is_malformed_is_counted(tmp_path):
    rows = [
        {"chosen": f"{HUMAN}question {i // 2}{ASSISTANT}yes {i}", "rejected": f"{HUMAN}question {i // 2}{ASSISTANT}no"}
        for i in range(20)
    ]
    path = write_jsonl(tmp_path / "hh.jsonl", rows + list(MALFORMED.values()))
    train, held, notes = sources.load_pairs(path, 0.2, 0)
    assert (len(train), len(held)) == (16, 4)
    questions = [{row["prompt"][0]["content"] for row in side} for side in (train, held)]
    assert not questions[0] & questions[1]
    assert sum(int(note.split()[2]) for note in notes) == len(MALFORMED)
    assert set(train["topic"]) == {"hh"}
    with pytest.raises(ValueError, match="no row of the transcripts"):
        sources.load_pairs(write_jsonl(tmp_path / "bad.jsonl", MALFORMED.values()), 0.2, 0)


def test_a_folder_brings_its_own_test_split(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": " a", "rejected": " b"} for i in range(6)]
    write_jsonl(tmp_path / "train.jsonl", rows[:4])
    write_jsonl(tmp_path / "test.jsonl", rows[3:])
    train, held, notes = sources.load_pairs(str(tmp_path), 0.2, 0)
    assert sorted(train["prompt"]) == ["p0", "p1", "p2", "p3"]
    assert sorted(held["prompt"]) == ["p4", "p5"]
    assert "1 prompts" in notes[-1]


def test_implicit_prompts_pass_through_and_are_split_by_prompt(tmp_path):
    question = [[{"role": "user", "content": f"q{i % 5}"}] for i in range(15)]
    answer = [[{"role": "assistant", "content": f"a{i}"}] for i in range(16)]
    rows = [{"chosen": question[i] + answer[i], "rejected": question[i] + answer[i + 1]} for i in range(15)]
    train, held, _ = sources.load_pairs(write_jsonl(tmp_path / "x.jsonl", rows), 0.2, 1)
    assert set(train.column_names) == {"chosen", "rejected", "topic", "prompt_id"}
    assert (len(train), len(held)) == (12, 3)
    assert len({row["chosen"][0]["content"] for row in held}) == 1


def test_a_prompt_is_on_one_side_whatever_its_replies_begin_with(tmp_path):
    rows = [
        {side: messages(f"q{i}", f"{word[0]} {j}", "go on", f"{word} {j}") for side, word in SIDES}
        for i in range(10)
        for j in range(3)
    ]
    train, held, _ = sources.load_pairs(write_jsonl(tmp_path / "x.jsonl", rows), 0.3, 0)
    asked = [{row["chosen"][0]["content"] for row in side} for side in (train, held)]
    assert not asked[0] & asked[1] and (len(train), len(held)) == (21, 9)
    # Of texts it cannot be known: "q0: a 0" and "q0: a 1" share the first word of their replies.
    texts = [{side: f"q{i}: {j} {word}" for side, word in SIDES} for i in range(10) for j in range(3)]
    with pytest.raises(ValueError, match="y.jsonl needs a column 'prompt': two texts"):
        sources.load_pairs(write_jsonl(tmp_path / "y.jsonl", texts), 0.3, 0)


SIDES = (("chosen", "good"), ("rejected", "bad"))


def messages(*turns):
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def test_the_held_out_limit_counts_prompts_that_are_not_trained_on(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": " a", "rejected": " b"} for i in range(70)]
    write_jsonl(tmp_path / "train.jsonl", rows[:40])
    write_jsonl(tmp_path / "test.jsonl", rows[10:])
    train, held, notes = sources.load_pairs(str(tmp_path), 0.2, 0, max_eval_pairs=28)
    assert (len(train), len(held)) == (40, 28) and not set(train["prompt"]) & set(held["prompt"])
    assert "30 prompts" in notes[-1]
    train, held, _ = sources.load_pairs(str(tmp_path), 0.2, 0, max_train_pairs=5, max_eval_pairs=55)
    assert (len(train), len(held)) == (5, 55)  # what is not trained on can be held out


def test_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(ValueError, match="must end in .json"):
        sources.load_pairs(str(tmp_path / "x.txt"), 0.2, 0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "there is no data set file '.*x.jsonl'"),
        ([], "the data set '.*x.jsonl' has no rows"),
        (
            [{"prompt": "a", "rejected": "b"}],
            "x.jsonl needs the columns 'chosen' and 'rejected', .* has prompt, rejected",
        ),
        ([{"prompt": "a", "completion": "b", "label": True}], "it has prompt, completion, label"),
        ([{"question": "a", "answer": "b"}], "it has question, answer"),
    ],
)
def test_files_without_pairs_are_refused(tmp_path, rows, message):
    path = tmp_path / "x.jsonl"
    if rows is not None:
        write_jsonl(path, rows * 5)
    with pytest.raises(ValueError, match=message):
        sources.load_pairs(str(path), 0.2, 0)
