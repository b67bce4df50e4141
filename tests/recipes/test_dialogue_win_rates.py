"""Replies, on-policy pairs, options and statistics of the dialogue recipe's win rates."""

import numpy as np
import pytest
import torch
from dialogue_recipe import paper_options, write_jsonl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tiny_tokenizer
from win_rates_recipe import PAPER, sampling, win_rate_report, win_rates

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
        (["--methods", "dpo", "mrpo"], "mrpo mixes two references and this recipe has one; leave it out"),
    ],
)
def test_options_that_are_not_read_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        win_rates.parse_arguments(options)


def test_a_wrong_option_ends_the_script_with_its_message(monkeypatch):
    monkeypatch.setattr("sys.argv", ["win_rates.py", "--methods", "mrpo"])
    with pytest.raises(SystemExit, match="^win_rates.py: error: mrpo mixes two references"):
        win_rates.main()


def test_an_option_of_one_method_is_left_to_it():
    recipe, training = win_rates.parse_arguments(["--methods", "dpo", "mallows-phi", "--smoothing", "0.3"])
    assert (recipe.methods, training.smoothing) == (["dpo", "mallows-phi"], 0.3)


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
