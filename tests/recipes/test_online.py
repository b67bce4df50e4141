"""Online training on completed reviews: labels and advantages by hand, bad input, whole runs of a tiny model."""

import json

import numpy as np
import pytest
import torch
from load_recipe import import_recipe
from tiny import tiny_model, tiny_tokenizer

from mallowspo.modeling import attach_token_stats

online, online_report, labels, advantages, preferences, run, judges, *_ = import_recipe(
    "controllable_generation",
    *("online", "online_report", "labels", "advantages", "preferences", "run", "judges", "sampling", "report"),
)
TRAIN = ["red cat", "one two", "sea", "blue sky", "dog up", "three"]
GOOD = ("good", "yes", "up", "red")


def embed(texts):
    """[N, 20] counts of words, in place of sentence embeddings."""
    rows = [np.bincount(tiny_tokenizer()(text)["input_ids"], minlength=20) for text in texts]
    return torch.tensor(np.array(rows), dtype=torch.float32)


def words(texts):
    """The share of good words, in place of the sentiment."""
    return [sum(word in GOOD for word in text.split()) / len(text.split()) for text in texts]


# ---- labels --------------------------------------------------------------------------------------------------------


def completion(text):
    return {"text": text, "ids": [5], "logp": -1.0, "finished": True}


def pair(first, second, rewards):
    return labels.Pair("sea", (completion(first), completion(second)), rewards)


def test_the_least_certain_pairs_are_asked_and_chance_decides_equal_ones():
    gaps = np.array([0.5, -0.1, 2.0, 0.3, -0.2])
    generator = np.random.default_rng(0)
    assert labels.query(gaps, 2, True, generator).tolist() == [False, True, False, False, True]
    drawn = [labels.query(np.zeros(4), 1, True, generator).tolist() for _ in range(60)]
    assert {row.index(True) for row in drawn} == {0, 1, 2, 3}
    drawn = [labels.query(gaps, 2, False, generator) for _ in range(60)]
    assert {found.sum() for found in drawn} == {2} and np.sum(drawn, 0).min() > 0
    with pytest.raises(ValueError, match="gold=6 labels were to be asked for, but only 5 pairs"):
        labels.query(gaps, 6, True, generator)


def test_neighbours_are_pairs_unless_one_says_nothing():
    group = [completion(text) for text in (" a", " b", " ", " c", " d", " e")]
    found = labels.sampled_pairs(["sea"], [group], [[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    assert [[c["text"] for c in p.completions] for p in found] == [[" a", " b"], [" d", " e"]]
    assert [p.rewards for p in found] == [(0.1, 0.2), (0.5, 0.6)]


def test_a_round_of_labels_by_hand():
    """The discriminator knows that good beats bad. Most uncertain is the pair without either, a tie of gold."""
    known = embed(["good"]) - embed(["bad"])
    pairs = [
        pair(" good", " bad", (-1.0, 1.0)),  # the discriminator is wrong
        pair(" red", " blue", (0.5, 0.55)),  # gold: a tie
        pair(" bad", " one", (-0.5, 0.5)),
    ]
    asking = {"gold": 1, "uncertain": True, "penalty": 0.1, "min_gap": 0.1, "seed": 0}
    found, after, counts = labels.label(pairs, embed, known, silver=True, **asking)
    assert found.tolist() == [1, 0, -1] and torch.equal(after, known)
    assert counts == {"pairs": 3, "asked": 1, "ties": 1, "silver": 2, "judged": 2, "right": 1}
    found, after, counts = labels.label(pairs, embed, known, silver=False, **asking | {"gold": None})
    assert found.tolist() == [-1, 0, -1] and len(after) == 3
    assert torch.equal(after[1], (embed([" bad"]) - embed([" good"]))[0])
    rows = labels.rows_of(pairs, found, "</s>")
    assert [row["chosen"][0]["content"] for row in rows] == [" bad</s>", " one</s>"]
    with pytest.raises(ValueError, match="no pair is left"):
        labels.rows_of(pairs, np.zeros(3), "</s>")


def test_the_discriminator_is_the_ridge_optimum_and_carries_over():
    """One pair with difference d: w = c d, where penalty c = sigmoid(-c |d|^2)."""
    weights = labels.fit(torch.tensor([[1.0, -1.0, 0.0]]), 0.1)
    c = weights[0].item()
    assert weights.tolist() == pytest.approx([c, -c, 0])
    assert 0.1 * c == pytest.approx(1 / (1 + np.exp(2 * c)), abs=1e-6)
    assert labels.fit(torch.zeros(0, 3), 0.1).tolist() == [0, 0, 0]


# ---- advantages ----------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    """Mean reward 1/2 of one prefix, whose errors decay towards the front; the other prefix has no error."""
    found = advantages.token_advantages([[1.0, 0.0], [3.0, 3.0]], [[2, 1], [1, 1]], 0.5)
    plain = np.array([0.25, 0.5, -0.5, 0.0, 0.0])
    expected = (plain - plain.mean()) / plain.std()
    assert [len(values) for values in found] == [2, 1, 1, 1]
    np.testing.assert_allclose(torch.cat(found), expected, rtol=1e-5)
    assert torch.cat(found).mean().item() == pytest.approx(0, abs=1e-6)
    assert torch.cat(advantages.token_advantages([[2.0, 2.0]], [[2, 1]], 0.95)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("loss", advantages.LOSSES)
def test_a_step_follows_the_written_loss(loss, tmp_path):
    """Against plain log-softmax and the two formulas, one step of AdamW on every completion."""
    prompts, responses = [[4, 5], [6]], [[7, 8], [9]]
    wanted = [torch.tensor([1.0, -1.0]), torch.tensor([0.5])]
    options = ["--max_steps", "1", "--learning_rate", "0.01", "--use_cpu", "true", "--output_dir", str(tmp_path)]
    _, training, _ = online.parse_arguments(options)
    models = [tiny_model(gain=3.0) for _ in range(2)]
    reference = tiny_model(seed=1, gain=3.0)
    attach_token_stats(reference)
    material = [reference, 0, prompts, responses, wanted]
    value = advantages.update(models[0], *material, loss=loss, temperature=2.0, training=training, seed=0)

    def logps(model):
        found = []
        for prompt, response in zip(prompts, responses, strict=True):
            table = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            found += [table[len(prompt) - 1 + t, token] for t, token in enumerate(response)]
        return torch.stack(found)

    target = torch.cat(wanted) / 2.0
    if loss == "apa":
        expected = (logps(models[1]) - logps(reference).detach() - target).square().mean()
    else:
        expected = -(target.exp() * logps(models[1])).mean()
    assert value == pytest.approx(expected.item(), rel=1e-4)
    optimizer = torch.optim.AdamW(models[1].parameters(), lr=0.01, weight_decay=0.0)
    expected.backward()
    torch.nn.utils.clip_grad_norm_(models[1].parameters(), 1.0)
    optimizer.step()
    torch.testing.assert_close(logps(models[0]), logps(models[1]), rtol=1e-3, atol=1e-3)


# ---- options -------------------------------------------------------------------------------------------------------


def test_the_default_parses():
    recipe, training, methods = online.parse_arguments([])
    assert recipe.seeds >= 5 and training.max_steps > 0
    assert [method.study for method in methods] == ["discriminator"] * 4 + ["advantages"] * 2
    assert str(methods[2]) == "dpo 0.3, silver, uncertain" and str(methods[4]) == "apa 1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--gold", "0"], "gold must be at least 1, got 0"),
        (["--gold", "17"], "gold=17 is more than the 16 pairs of a round"),
        (["--samples", "3"], "samples must be even"),
        (["--train_prefixes", "25"], "train_prefixes=25 is no multiple of rounds=3"),
        (["--max_steps", "0"], "must be at least 1, got 0"),
        (["--lora_rank", "0"], "lora_rank must be at least 1, got 0"),
        (["--temperature", "0"], "temperature must be positive and finite, got 0"),
        (["--penalty", "nan"], "penalty must be positive and finite, got nan"),
        (["--gae_lambda", "1.5"], r"gae_lambda must be in \[0, 1\], got 1.5"),
        (["--gradient_accumulation_steps", "2"], "gradient_accumulation_steps must be 1, .*, got 2"),
        (["--lr_scheduler_type", "linear"], "lr_scheduler_type must be constant"),
        (["--grid", '{"apa": [1]}'], "unknown methods apa"),
        (["--grid", '{"mrpo": [1]}'], "mrpo mixes two references and this recipe has one"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        online.parse_arguments(options)


def test_a_wrong_option_ends_the_script_with_its_message(monkeypatch):
    monkeypatch.setattr("sys.argv", ["online.py", "--gold", "0"])
    with pytest.raises(SystemExit, match="^online.py: error: gold must be at least 1, got 0"):
        online.main()


# ---- report --------------------------------------------------------------------------------------------------------


def measured(reward, kl, **counts):
    """What a round gave on four prefixes, the same for each."""
    domain = {"rewards": [[reward] * 2] * 4, "log_ratios": [[kl] * 2] * 4, "tokens": [[3] * 2] * 4}
    return {"domains": {run.MOVIE: domain | {"texts": [["a b"] * 2] * 4}}} | counts


def test_gains_and_differences_are_taken_seed_by_seed(tmp_path):
    counts = {"pairs": 8, "asked": 3, "ties": 1, "silver": 5, "rows": 7, "judged": 4}
    runs, starts = [], [measured(seed / 10, 0.0) for seed in range(4)]
    for seed in range(4):
        for method, gain in (("a", 0.1), ("b", 0.3)):
            records = [measured(seed / 10 + n * gain, 10 * n * gain, right=2 + n % 2, **counts) for n in (1, 2)]
            runs.append({"method": method, "study": "discriminator", "seed": seed, "records": records})
    study = online_report.summarise(starts, runs)["discriminator"]
    assert [point["gain"]["mean"] for point in study["b"]["rounds"]] == pytest.approx([0, 0.3, 0.6])
    assert study["b"]["rounds"][2]["reward"]["mean"] == pytest.approx(0.15 + 0.6)
    # The spread over seeds is in both and cancels.
    assert study["b"]["minus_first"]["reward"] == {key: pytest.approx(0.4) for key in ("mean", "low", "high")}
    assert study["b"]["minus_first"]["kl"]["mean"] == pytest.approx(4)
    assert study["a"]["labels"]["right"] == pytest.approx((3 + 2) / 8) and study["a"]["labels"]["half"] == 0
    assert "| b | 0.750 [" in online_report.tables({"discriminator": study}, 4)
    online_report.plot("discriminator", study).savefig(tmp_path / "bars.png")


# ---- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command line of a small run, given its output folder."""
    tiny_model(gain=3.0).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    split = {"tune": [], "train": TRAIN, "held out": {run.MOVIE: ["green", "two cat", "down sea"]}}
    monkeypatch.setattr(run, "split_reviews", lambda *args: split)
    monkeypatch.setattr(preferences, "load_reward", lambda *args: words)

    class Judge:
        def __init__(self, device):
            self.embed = embed

    monkeypatch.setattr(judges, "EmbeddingJudge", Judge)
    options = {"model": tmp_path / "model", "seeds": 2, "rounds": 2, "gold": 3, "train_prefixes": 6, "max_steps": 2}
    options |= {"sft_texts": 0, "max_new_tokens": 5, "min_gap": 0, "learning_rate": 0.05, "use_cpu": "true"}
    options |= {"lora_rank": 2, "per_device_train_batch_size": 2}
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return lambda out: [*given, "--output_dir", str(out)]


def read(out):
    return json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)


def test_an_interrupted_run_goes_on_at_its_round_and_gives_the_same(command, tmp_path, monkeypatch):
    monkeypatch.setattr(online, "package_versions", lambda *names: {})
    online.main(command(tmp_path / "whole"))
    whole = read(tmp_path / "whole")
    played, play = [], online.play_round

    def interrupted(task, method, seed, state):
        if len(played) == 3:
            raise KeyboardInterrupt
        played.append((str(method), seed, len(state["records"])))
        return play(task, method, seed, state)

    monkeypatch.setattr(online, "play_round", interrupted)
    with pytest.raises(KeyboardInterrupt):
        online.main(command(tmp_path / "parts"))
    assert len(list((tmp_path / "parts" / "stages").glob("online-*.pt"))) == 1
    rest = []

    def recorded(task, method, seed, state):
        rest.append((str(method), seed, len(state["records"])))
        return play(task, method, seed, state)

    monkeypatch.setattr(online, "play_round", recorded)
    online.main(command(tmp_path / "parts"))
    parts = read(tmp_path / "parts")
    assert parts["studies"] == whole["studies"] and parts["samples"] == whole["samples"]
    assert not set(played) & set(rest) and len(played) + len(rest) == 6 * 2 * 2
    assert not list((tmp_path / "parts" / "stages").glob("*.pt"))
    monkeypatch.setattr(online, "play_round", lambda *args: pytest.fail("a round was played again"))
    online.main(command(tmp_path / "parts"))
    check(whole, tmp_path / "whole")


def check(results, out):
    """Every method moves, asks as often as it should, and is in the table."""
    text = (out / "results.md").read_text()
    assert "nan" not in text
    for name, study in results["studies"].items():
        assert f"]({name}.png)" in text and (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        for method, values in study.items():
            assert f"| {method} |" in text and len(values["rounds"]) == 3
            assert values["rounds"][0]["kl"]["mean"] == pytest.approx(0, abs=1e-4)
            assert abs(values["rounds"][-1]["kl"]["mean"]) > 1e-4
    guided = results["studies"]["discriminator"]
    counts = {method.split(", ", 1)[1]: values["labels"] for method, values in guided.items()}
    assert counts["gold"]["asked"] == counts["silver, uncertain"]["asked"] == counts["silver, random"]["asked"] == 3
    assert counts["gold"]["silver"] == counts["all gold"]["silver"] == 0 < counts["silver, random"]["silver"]
    assert counts["all gold"]["asked"] == counts["all gold"]["pairs"] > 3
    assert 0 <= counts["silver, uncertain"]["right"] <= 1


def test_what_cannot_be_learned_from_is_refused(command, tmp_path, monkeypatch):
    for value, message in ((float("nan"), "is nan; it must be a finite number"), (0.5, "no pair is left")):
        monkeypatch.setattr(preferences, "load_reward", lambda *args, v=value: lambda texts: [v] * len(texts))
        with pytest.raises(ValueError, match=message):
            online.main(command(tmp_path / str(value)))


def test_a_round_whose_every_answer_is_a_tie_leaves_the_policy_alone(command, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "train", lambda *args, **kwargs: pytest.fail("there is nothing to train on"))
    recipe, training, methods = online.parse_arguments(command(tmp_path / "out"))
    task = online.set_up(recipe, training)
    task.reward = lambda texts: [0.5] * len(texts)
    for method in methods[:3]:
        state = online.play_round(task, method, 42, {"weights": {}, "known": torch.zeros(0, 20), "records": []})
        (record,) = state["records"]
        assert (record["asked"], record["ties"], record["rows"], record["silver"]) == (3, 3, 0, 0)
        assert np.abs(record["domains"][run.MOVIE]["log_ratios"]).max() < 1e-4
    with pytest.raises(ValueError, match="no pair is left of"):
        online.play_round(task, methods[3], 42, state | {"records": []})


def test_a_corrupt_state_is_refused_by_name(tmp_path):
    state = {"weights": {"a": torch.ones(2)}, "known": torch.zeros(0, 3), "records": [{"loss": None, "rows": 1}]}
    online.write_state(tmp_path / "state.pt", state)
    assert online.read_state(tmp_path / "state.pt")["records"] == state["records"]
    data = bytearray((tmp_path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "state.pt").write_bytes(data)
    with pytest.raises(ValueError, match="state.pt is corrupt; delete it"):
        online.read_state(tmp_path / "state.pt")
    assert online.read_state(tmp_path / "none.pt") is None
