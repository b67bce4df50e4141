"""Preference pairs of a wanted length, of real dialogue: the exchanges of chatterbot-corpus, strung together."""

import bisect
import functools
import itertools
import sys
from collections import defaultdict
from pathlib import Path

from datasets import Dataset

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path += [str(RECIPES / "dialogue"), str(RECIPES)]

import sources  # noqa: E402

import models  # noqa: E402, F401  (trainers.py takes the packaged model from it)

ROWS_OF_A_TOPIC = 40  # at least, so that a long conversation does not repeat itself


def dialogue_pairs(tokenizer, count, lengths=None):
    """`count` pairs in TRL's conversational format.

    A conversation is made of exchanges of one topic, one after the other; its last question, and its chosen and its
    rejected response, are several of the corpus joined and cut between words, at most at the wanted lengths.

    Args:
        tokenizer: has the chat template that the lengths count.
        count: number of pairs.
        lengths: tokens of the prompt and of each response; None: the pairs of the dialogue recipe as they are.

    Returns:
        Dataset with the columns prompt, chosen, rejected.
    """
    rows = _rows()
    if lengths is None:
        return rows.select(range(count)).select_columns(["prompt", "chosen", "rejected"])
    topics = defaultdict(list)
    for row in rows:
        topics[row["topic"]].append(tuple(row[column][0]["content"] for column in ("prompt", "chosen", "rejected")))
    streams = [itertools.cycle(found) for found in topics.values() if len(found) >= ROWS_OF_A_TOPIC]
    turns = itertools.islice(itertools.cycle(streams), count)
    return Dataset.from_list([_conversation(tokenizer, stream, *lengths) for stream in turns])


@functools.cache
def _rows():
    return sources.load_pairs(sources.CORPUS_PACKAGE, held_out=0.2, seed=0)[0]


def _conversation(tokenizer, stream, prompt_tokens, response_tokens):
    """One row; takes what it needs from an endless iterator of (question, right reply, wrong reply)."""

    def length(messages, **options):
        return len(tokenizer.apply_chat_template(messages, return_dict=False, **options))

    def asked(text):
        return length([*messages, _message("user", text)], add_generation_prompt=True)

    def answered(text):
        return length([*prompt, _message("assistant", text)]) - length(prompt, add_generation_prompt=True)

    messages = []
    while True:
        question, reply, _ = next(stream)
        exchange = [_message("user", question), _message("assistant", reply)]
        if length([*messages, *exchange, _message("user", question)], add_generation_prompt=True) > prompt_tokens:
            break
        messages += exchange
    # More text than is needed: every exchange has a token at least on each side.
    questions = [question, *(row[0] for row in itertools.islice(stream, prompt_tokens))]
    prompt = [*messages, _message("user", _fill(questions, asked, prompt_tokens))]
    _, *replies = zip(*itertools.islice(stream, response_tokens), strict=True)
    chosen, rejected = ([_message("assistant", _fill(side, answered, response_tokens))] for side in replies)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _message(role, content):
    return {"role": role, "content": content}


def _fill(texts, length, limit):
    """The first words of the texts, as many as keep ``length(text)`` within the limit; one at least."""
    words = " ".join(texts).split()

    def length_of(number):
        return length(" ".join(words[:number]))

    return " ".join(words[: max(1, bisect.bisect_right(range(1, len(words) + 1), limit, key=length_of))])
