"""Whole runs of the dialogue recipe's win rates on a model of a few weights, interrupted ones too."""

import json
import sys

import pytest
import yaml
from dialogue_recipe import ASSISTANT, HUMAN, write_jsonl
from jinja2 import TemplateError
from tiny import tiny_model, tiny_tokenizer
from win_rates_recipe import PAPER, endpoint, judges, more_e, reward_folder, win_rates


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
        run(*judge, "--logging_steps", "7")
        assert len(trained) == 4

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
