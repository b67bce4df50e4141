"""benchmarks/: the table maker on hand-made numbers, and the machinery from end to end at toy sizes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from tiny_text import TEMPLATES, build

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"


def load(name):
    specification = importlib.util.spec_from_file_location(f"mallowspo_benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


contest, ratios = load("contest"), load("ratios")


def spread(median):
    return {"median": median, "low": 0.9 * median, "high": 1.2 * median}


def row(**changes):
    made = {
        "kernel": "token_stats", "shape": "GPT-2", "dtype": "float32", "case": "forward", "rounds": 5,
        "ours": spread(0.010), "competitors": {"TRL": spread(0.205), "Liger": None},
        "limits": {"read": spread(0.008)}, "extra_memory_mib": {"ours": 0.4, "TRL": 790.2},
    }  # fmt: skip
    return made | changes


def test_kernels_are_timed_on_the_device_behind_a_head_start(monkeypatch):
    """The events of a device stand around the calls alone, and what is queued before them is not counted."""
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append(self)

        def elapsed_time(self, end):
            assert [self, "call", "call", end] == happened[2:6]
            return 3.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("synchronize"))
    found = contest.kernel_seconds(
        lambda: happened.append("call"), "cuda", prepare=lambda: happened.append("prepare"), calls=2
    )
    assert found == 1.5e-3 and happened[:2] == ["prepare", "sleep"] and happened[6:] == ["synchronize"]


def test_cells_of_a_row():
    heading, cells = ratios.table([row()])
    assert dict(zip(heading, cells, strict=True)) == {
        "kernel": "token_stats", "shape": "GPT-2", "dtype": "float32", "case": "forward",
        "ours, ms": "10 (9..12), 0 MiB", "TRL": "20.50x, 790 MiB", "Liger": "not installed",
        "of the limit's speed": "read 80%",
    }  # fmt: skip


def test_competitors_of_other_rows_are_not_offered_here():
    heading, first, second = ratios.table([row(), row(competitors={"eager": spread(0.005)}, extra_memory_mib=None)])
    assert heading[5:8] == ["TRL", "Liger", "eager"]
    assert first[5:8] == ["20.50x, 790 MiB", "not installed", "-"]
    assert second[5:8] == ["-", "-", "0.50x"]
    assert second[4] == "10 (9..12)"


def test_no_limit():
    assert ratios.table([row(limits={})])[1][-1] == "-"


@pytest.mark.parametrize(
    "value, text", [(2.345e-6, "0.00234"), (0.0123456, "12.3"), (0.9876, "988"), (1.2346, "1235"), (0.4, "400")]
)
def test_milliseconds(value, text):
    assert ratios.milliseconds(value) == text


def test_markdown_table_is_aligned_and_parses():
    cells = ratios.table([row(), row(shape="a longer name")])
    lines = ratios.markdown_table(cells).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:1] + lines[2:]] == cells


def test_files(tmp_path):
    results = {"schema": ratios.SCHEMA, "facts": {"CPU model": "abacus"}, "rows": [row()]}
    paths = ratios.write(results, tmp_path / "new", "machine")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["machine.json", "machine.md", "machine.png"]
    assert json.loads(paths[0].read_text()) == results
    assert "20.50x" in paths[1].read_text() and "abacus" in paths[1].read_text()
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_write_leaves_the_old_files_whole(tmp_path, monkeypatch):
    results = {"schema": ratios.SCHEMA, "facts": {}, "rows": [row()]}
    paths = ratios.write(results, tmp_path, "machine")
    before = [path.read_bytes() for path in paths]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ratios, "plot", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ratios.write(results | {"rows": [row(shape="another")]}, tmp_path, "machine")
    assert [path.read_bytes() for path in paths] == before


def test_a_competitor_that_computes_something_else_is_refused():
    right, wrong = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.1])
    contest.warm_up(contest.Contest(lambda: right, {"same": lambda: right.clone(), "missing": None}), "cpu")
    with pytest.raises(AssertionError, match="other differs"):
        contest.warm_up(contest.Contest(lambda: right, {"other": lambda: wrong}), "cpu")


class Pedantic:
    """pytest-benchmark's fixture, as far as a contest uses it."""

    def pedantic(self, function, setup, rounds):
        for _ in range(rounds):
            setup()
            function()


def test_prepare_comes_before_every_single_call():
    work = torch.zeros(1)

    def run():
        work.add_(1)
        return work.clone()

    made = contest.Contest(run, {"same": run}, {"limit": run}, prepare=work.zero_)
    spreads, rounds = contest.time_contest(made, "cpu", Pedantic())
    assert set(spreads) == {"ours", "same", "limit"}
    assert contest.ROUNDS[0] <= rounds <= contest.ROUNDS[1]
    assert work.item() == 1


def run_toy(select, results, *paths):
    """pytest on benchmarks/ at toy sizes; compilation, which takes seconds a contest, is off."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}
    environment |= {
        "MALLOWSPO_BENCHMARK_TOY": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    options = ["-q", "-p", "no:cacheprovider", "--benchmark-quiet", "--device", "cpu", "--results", str(results)]
    command = [sys.executable, "-m", "pytest", str(FOLDER), *map(str, paths), *options, "-k", select]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_a_run_at_toy_sizes(tmp_path):
    run = run_toy("(place and Llama-3 and float32) or ipo-8", tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    rows = {measured["kernel"]: measured for measured in results["rows"]}
    assert set(rows) == {"token_stats", "preference_loss"}
    for measured in rows.values():
        spreads = [measured["ours"], *measured["competitors"].values(), *measured["limits"].values()]
        assert len(spreads) >= 3
        assert all(0 < found["low"] <= found["median"] <= found["high"] for found in spreads)
    assert {"ours", "eager"} <= set(rows["token_stats"]["extra_memory_mib"])
    assert {"CPU model", "threads", "torch", "trl", "liger-kernel", "mallowspo", "git commit", "date"} <= set(
        results["facts"]
    )
    table = ratios.markdown_table(ratios.table(results["rows"]))
    assert table in run.stdout
    assert table in path.with_suffix(".md").read_text()


def test_a_failed_run_writes_nothing(tmp_path):
    failing = tmp_path / "test_failing.py"
    failing.write_text("def test_failing():\n    assert False\n")
    run = run_toy("ipo-8 or failing", tmp_path / "results", failing)
    assert run.returncode == pytest.ExitCode.TESTS_FAILED
    assert "1 passed" in run.stdout and "stays as it is" in run.stdout
    assert not (tmp_path / "results").exists()


# A whole training step


def test_the_dialogues_have_the_wanted_lengths():
    pytest.importorskip("chatterbot_corpus", reason="pip install 'mallowspo[recipes]'")
    tokenizer, _ = build("bpe", TEMPLATES["chatml"][0])
    lengths = 400, 200  # of bytes, about
    pairs = load("dialogues").dialogue_pairs(tokenizer, 6, lengths)
    assert len({str(row) for row in pairs}) == len(pairs) == 6
    for row in pairs:
        turns = [message["role"] for message in row["prompt"]]
        assert turns == (["user", "assistant"] * len(turns))[: len(turns)] and turns[-1] == "user"
        text = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        for side in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
            assert whole.startswith(text)
            found = [len(tokenizer(part)["input_ids"]) for part in (text, whole.removeprefix(text))]
            assert all(0.9 * wanted <= tokens <= wanted for tokens, wanted in zip(found, lengths, strict=True))


def test_a_training_step_at_toy_sizes(tmp_path):
    """One cell with everything around it: the same tokens, times, memory, losses, profile and files."""
    for package in ("trl", "peft", "chatterbot_corpus"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'mallowspo[test]'")
    tokenizer, _ = build("bpe", TEMPLATES["chatml"][0])
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    options = ["--device", "cpu", "--model", tmp_path / "model", "--results", tmp_path / "results", "--rounds", 2]
    options += ["--loss-steps", 3, "--select", "LoRA", "--select", "as they are, reference on the fly"]
    command = [sys.executable, FOLDER / "training_step.py", *options]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = (tmp_path / "results").glob("training-step-*.json")
    results = json.loads(path.read_text())
    (measured,) = results["rows"]
    others = {"TRL", "TRL, checkpointed"}
    assert set(measured["competitors"]) == others
    assert all(found["median"] > 0 for found in (measured["ours"], *measured["competitors"].values()))
    assert set(measured["extra_memory_mib"] or others | {"ours"}) == others | {"ours"}
    assert measured["pairs"] == 2 and measured["loss_difference"] < 1e-3
    (losses,) = results["losses"]
    assert losses["ours"] == pytest.approx(losses["TRL"], abs=1e-4) and len(losses["ours"]) == 3
    (profile,) = results["profile"]
    spent = {name: value for name, value in profile["seconds"].items() if name != "other"}
    assert all(value > 0 for value in spent.values())
    assert ratios.ratio(measured, "TRL") > 0 and path.with_suffix(".md").read_text() in run.stdout
    assert path.with_suffix(".png").exists()
