"""Where the dialogue recipe's pairs come from.

The package ``chatterbot-corpus``, transcripts in the format of Anthropic/hh-rlhf, or any data set in one of TRL's
preference formats.
"""

import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import yaml
from datasets import Dataset, DatasetDict, load_dataset
from tqdm.auto import tqdm

from models import package_folder

CORPUS_PACKAGE = "chatterbot-corpus"
MOST_REPLIES = 5  # of one prompt: "Tell me a joke" alone has thirty
NEAREST_IN_LENGTH = 5  # a wrong reply is one of this many replies closest in length to the right one


# ---- chatterbot-corpus ---------------------------------------------------------------------------------------------


@dataclass
class Prompt:
    """A prompt, its distinct replies, and everything known to have been said after it (normalised)."""

    text: str
    topic: str
    replies: list[str] = field(default_factory=list)
    known: set[str] = field(default_factory=set)


def normalise(text):
    """Lower case, words only: two texts that agree in this say the same."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.casefold()).split())


def read_prompts(folder):
    """The prompts of a folder of chatterbot-corpus YAML files.

    A conversation gives its first turn as the prompt and its second as the reply. Some files list further replies
    after those and some go on talking; the two cannot be told apart, so later turns are only kept from serving as
    wrong replies. A prompt that several files have belongs to the topic of the first.

    Args:
        folder: of files with ``categories`` (the first is the topic) and ``conversations`` (lists of turns).

    Returns:
        (prompts, dropped): list of Prompt, in the order of the files, one per distinct prompt over all topics; a
        Counter of the conversations left out by reason. Raises ValueError where the folder holds no prompt.
    """
    prompts, dropped = {}, Counter()
    for path in tqdm(sorted(Path(folder).glob("*.yml")), desc="Reading dialogues"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        topic = content["categories"][0].lower()
        for turns in content["conversations"]:
            if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, str) for turn in turns):
                dropped["no list of two or more texts"] += 1
                continue
            text, reply = (turn.strip() for turn in turns[:2])
            key, said = normalise(text), normalise(reply)
            if not key or not said:
                dropped["an empty prompt or reply"] += 1
                continue
            prompt = prompts.setdefault(key, Prompt(text, topic, known={key}))
            if said == key:
                dropped["a reply that repeats the prompt"] += 1
            elif said in map(normalise, prompt.replies):
                dropped["the same prompt and reply again"] += 1
            else:
                prompt.replies.append(reply)
            prompt.known.update(map(normalise, turns[1:]))
    if not prompts:
        raise ValueError(f"no conversations in {folder}: expected *.yml with 'categories' and 'conversations'")
    return [prompt for prompt in prompts.values() if prompt.replies], dropped


def split_prompts(prompts, held_out, seed):
    """(train, held out): the given share of each topic's prompts, drawn by the seed.

    A topic with fewer than two prompts to hold out gives none: a wrong reply needs another prompt of its topic.
    """
    by_topic = defaultdict(list)
    for prompt in prompts:
        by_topic[prompt.topic].append(prompt)
    generator = random.Random(seed)
    train, held = [], []
    for topic in sorted(by_topic):
        chosen = generator.sample(by_topic[topic], len(by_topic[topic]))
        count = round(held_out * len(chosen))
        count = count if count >= 2 else 0
        held += chosen[:count]
        train += chosen[count:]
    return train, held


def pair_replies(prompts, seed):
    """Rows (prompt, chosen, rejected, topic) for the first MOST_REPLIES replies of every prompt.

    The rejected reply answers another of the given prompts of the same topic and is no known reply of this one. So
    that neither length nor the reply alone gives the answer away, it is the least used so far among the
    NEAREST_IN_LENGTH candidates closest to the chosen reply in characters: a reply is chosen and rejected about
    equally often. The order in which pairs are made and ties are broken follows the seed.

    Returns:
        (rows in an order drawn by the seed, number of replies without any candidate).
    """
    items = [(prompt, reply) for prompt in prompts for reply in prompt.replies[:MOST_REPLIES]]
    random.Random(seed).shuffle(items)
    pools = defaultdict(dict)  # topic -> normalised reply -> reply
    for prompt, reply in items:
        pools[prompt.topic].setdefault(normalise(reply), reply)
    uses = Counter()
    rows, unpaired = [], 0
    for prompt, reply in items:
        others = [(said, other) for said, other in pools[prompt.topic].items() if said not in prompt.known]
        if not others:
            unpaired += 1
            continue
        distances = [(abs(len(other) - len(reply)), uses[said], said, other) for said, other in others]
        nearest = sorted(distances, key=lambda candidate: candidate[:2])[:NEAREST_IN_LENGTH]
        _, _, said, rejected = min(nearest, key=lambda candidate: candidate[1])
        uses[said] += 1
        rows.append(
            {
                "prompt": [{"role": "user", "content": prompt.text}],
                "chosen": [{"role": "assistant", "content": reply}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "topic": prompt.topic,
            }
        )
    return rows, unpaired


# ---- transcripts of Anthropic/hh-rlhf ------------------------------------------------------------------------------

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def parse_transcript(text):
    """Messages of a text "\\n\\nHuman: ...\\n\\nAssistant: ...".

    Only the one space after a colon is taken off, so that the format of ``paper.yaml`` gives the same text back.

    Raises:
        ValueError: the text does not begin with a Human turn or does not end with an Assistant turn that says
            something.
    """
    start, *turns = _SPEAKER.split(text)
    messages = [
        {"role": _ROLES[speaker], "content": content.removeprefix(" ")}
        for speaker, content in zip(turns[::2], turns[1::2], strict=True)
    ]
    if start.strip() or not messages or messages[0]["role"] != "user":
        raise ValueError("a transcript must begin with a Human turn")
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise ValueError("a transcript must end with an Assistant turn that is not empty")
    return messages


def parse_transcript_pair(row):
    """A row with transcripts ``chosen`` and ``rejected`` -> prompt (all turns but the last), chosen, rejected.

    Raises:
        ValueError: a malformed transcript, two that do not share all turns but the last, or identical ones.
    """
    chosen, rejected = (parse_transcript(row[side]) for side in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("the transcripts must share all turns but the last")
    if chosen == rejected:
        raise ValueError("the transcripts are identical")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def parse_transcripts(dataset):
    """(conversational Dataset, Counter of the rows left out by reason); ValueError where no row is left."""
    rows, dropped = [], Counter()
    for row in tqdm(dataset, desc="Parsing transcripts"):
        try:
            rows.append(parse_transcript_pair(row))
        except ValueError as error:
            dropped[str(error)] += 1
    if not rows:
        raise ValueError(f"no row of the transcripts can be used: {dict(dropped)}")
    return Dataset.from_list(rows), dropped


# ---- any data set --------------------------------------------------------------------------------------------------


def load_pairs(name, held_out, seed, max_train_pairs=None, max_eval_pairs=None):
    """The train and the held-out pairs, and a sentence about each thing left out.

    Args:
        name: ``chatterbot-corpus``, a hub name, a folder or a .json, .jsonl or .parquet file.
        held_out: share of the prompts to hold out, in (0, 1). A data set with a split ``test`` brings its own.
        seed: of the split, of the wrong replies and of the order.
        max_train_pairs, max_eval_pairs: keep this many, taking the topics in turn; None: all.

    Returns:
        (train, held out, notes): two Datasets in a TRL preference format with the further columns ``topic`` (str) and
        ``prompt_id`` (int), and a list of str. No prompt is on both sides.

    Raises:
        ValueError: a share or a number out of its range, no such file, no split to train on, no pairs, texts without a
            column ``prompt``, too little data to hold any out.
    """
    check_held_out(held_out)
    for option, number in (("max_train_pairs", max_train_pairs), ("max_eval_pairs", max_eval_pairs)):
        if number is not None and number < 1:
            raise ValueError(f"{option} must be at least 1 or left out for all pairs, got {number}")
    if name == CORPUS_PACKAGE:
        prompts, dropped = read_prompts(package_folder("chatterbot_corpus", CORPUS_PACKAGE) / "data" / "english")
        extra = sum(max(0, len(prompt.replies) - MOST_REPLIES) for prompt in prompts)
        notes = [f"{len(prompts)} prompts with {sum(len(prompt.replies) for prompt in prompts)} distinct replies"]
        notes.append(f"left out {extra} replies: a prompt gives {MOST_REPLIES} at most")
        notes += [f"left out {count} conversations: {reason}" for reason, count in dropped.items()]
        sides = []
        for side in split_prompts(prompts, held_out, seed):
            rows, unpaired = pair_replies(side, seed)
            if unpaired:
                notes.append(f"left out {unpaired} replies: no other prompt of their topic gives a wrong one")
            sides.append(Dataset.from_list(rows))
    else:
        sides, notes = _load_named(name, held_out, seed)
    ids = {}
    for i, side in enumerate(sides):
        keys = [prompt_key(row) for row in side]
        if "topic" not in side.column_names:
            side = side.add_column("topic", [Path(name).stem] * len(side))
        sides[i] = side.add_column("prompt_id", [ids.setdefault(key, len(ids)) for key in keys])
    train, held = sides
    train = _limited(train, max_train_pairs)
    shared = set(train["prompt_id"]) & set(held["prompt_id"])
    if shared:  # a data set's own test split may repeat prompts
        held = held.filter(lambda row: row["prompt_id"] not in shared, desc="Removing training prompts")
        notes.append(f"left out the held-out pairs of {len(shared)} prompts that are also trained on")
    held = _limited(held, max_eval_pairs)
    if not len(train) or not len(held):
        raise ValueError(f"{name} gives {len(train)} training and {len(held)} held-out pairs; both need at least one")
    return train, held, notes


def check_held_out(held_out):
    """ValueError for a share that leaves one side without prompts."""
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be in (0, 1), got {held_out}")


def _limited(side, limit):
    return side if limit is None else side.select(take_in_turn(side["topic"][:], limit))


def _load_named(name, held_out, seed):
    path = Path(name)
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(path.suffix)
    if path.is_file() and kind is None:
        raise ValueError(f"the data set file must end in .json, .jsonl or .parquet, got {name!r}")
    if kind is not None and not path.exists():
        raise ValueError(f"there is no data set file {name!r}")
    try:
        loaded = load_dataset(kind, data_files=name) if path.is_file() else load_dataset(name)
    except StopIteration as error:  # of an empty file
        raise ValueError(f"the data set {name!r} has no rows") from error
    if not isinstance(loaded, DatasetDict) or "train" not in loaded:
        raise ValueError(f"the data set {name!r} has no split 'train'")
    notes, sides = [], {}
    for split in ("train", "test"):
        if split not in loaded:
            continue
        sides[split] = loaded[split].shuffle(seed=seed)
        if not len(sides[split]):
            raise ValueError(f"the split {split!r} of the data set {name!r} has no rows")
        first = sides[split][0]
        if not {"chosen", "rejected"} <= set(first):
            raise ValueError(f"{name} needs the columns 'chosen' and 'rejected', of pairs; it has {', '.join(first)}")
        if "prompt" not in first and str(first["chosen"]).startswith("\n\nHuman:"):
            sides[split], dropped = parse_transcripts(sides[split])
            notes += [f"left out {count} {split} rows: {reason}" for reason, count in dropped.items()]
        elif "prompt" not in first and isinstance(first["chosen"], str):
            raise ValueError(f"{name} needs a column 'prompt': two texts do not tell where their prompt ends")
    if "test" in sides:
        return [sides["train"], sides["test"]], notes
    keys = [prompt_key(row) for row in sides["train"]]
    distinct = sorted(set(keys))
    held = set(random.Random(seed).sample(distinct, round(held_out * len(distinct))))
    rows = [[i for i, key in enumerate(keys) if (key in held) == side] for side in (False, True)]
    return [sides["train"].select(side) for side in rows], notes


def prompt_key(row):
    """What makes two rows the same prompt: the column ``prompt``, else the messages that both sides begin with."""
    if "prompt" in row:
        return json.dumps(row["prompt"])
    sides = zip(row["chosen"], row["rejected"], strict=False)
    return json.dumps([message for message, _ in takewhile(lambda pair: pair[0] == pair[1], sides)])


def take_in_turn(topics, count):
    """Indices of `count` rows (all, if there are fewer): the first of each topic, then the second of each, ..."""
    seen = Counter()
    turns = []
    for index, topic in enumerate(topics):
        turns.append((seen[topic], index))
        seen[topic] += 1
    return [index for _, index in sorted(turns)[:count]]
