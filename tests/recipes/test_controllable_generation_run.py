"""Controllable generation: whole runs of a tiny model, interrupted ones too."""

import json

import pytest
from generation_recipe import command, run, save_classifier
from tiny import tiny_model, tiny_tokenizer


def never():
    pytest.fail("this stage was run again")


def test_a_run_that_was_interrupted_goes_on_and_a_repeated_one_trains_nothing(
    small_archive, byte_model, tmp_path, monkeypatch
):
    train, trained = run.train, []

    def interrupted(*args):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append((args[3].loss_type, args[3].seed))
        return train(*args)

    monkeypatch.setattr(run, "train", interrupted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run.main(command(byte_model, out))
    small_archive.unlink()  # the stages that are done need nothing of what they read
    monkeypatch.setattr(run, "train", lambda *args: trained.append((args[3].loss_type, args[3].seed)) or train(*args))
    run.main(command(byte_model, out))
    assert trained == [(method, seed) for seed in (42, 43) for method in ("dpo", "mallows-simpo")]
    results = json.loads((out / "results.json").read_text())
    points = {(p["domain"], p["method"]): p for p in results["points"]}
    assert points["movie review", "reference"]["kl"]["mean"] == pytest.approx(0, abs=1e-4)
    assert min(map(abs, points["movie review", "dpo"]["seeds"]["kl"])) > 1e-3  # few samples: its sign is chance
    assert len(points["tweet", "mallows-simpo"]["seeds"]["kl"]) == 2
    assert results["pairs"]["pairs"] == 8
    monkeypatch.setattr(run, "train", lambda *args: never())
    run.main(command(byte_model, out))
    run.main(command(byte_model, out, seeds=1, grid='{"dpo": [0.1]}'))
    assert "1 seeds" in (out / "results.md").read_text()


def test_no_step_is_trained_twice_that_a_checkpoint_has(small_archive, byte_model, tmp_path, monkeypatch):
    options = {"seeds": 1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    run.main(command(byte_model, tmp_path / "whole", **options))
    evaluate, show, steps = run.evaluate, run.ShowSteps.on_step_end, []

    def interrupted(self, args, state, control, **kwargs):
        steps.append((args.loss_type, state.global_step))
        if len(steps) == 6:  # the second step of the second training, not yet saved
            raise KeyboardInterrupt
        show(self, args, state, control, **kwargs)

    def interrupted_evaluation(*args):
        if steps:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(run.ShowSteps, "on_step_end", interrupted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(run, "evaluate", interrupted_evaluation)
        run.main(command(byte_model, out, **options))
    with pytest.raises(KeyboardInterrupt):
        run.main(command(byte_model, out, **options))
    run.main(command(byte_model, out, **options))
    first, second = ([(method, step) for step in (1, 2, 3, 4)] for method in ("dpo", "mallows-simpo"))
    assert steps == [*first, *second[:2], *second[1:]]
    assert not list((out / "stages").rglob("checkpoint-*"))
    found, expected = (json.loads((folder / "results.json").read_text()) for folder in (out, tmp_path / "whole"))
    assert found["points"] == expected["points"]


def test_a_corrupt_checkpoint_is_refused(small_archive, byte_model, tmp_path, monkeypatch):
    options = {"seeds": 1, "grid": '{"dpo": [0.1]}', "save_strategy": "steps"}
    evaluate, reference = run.evaluate, []

    def interrupted(*args):
        if reference:
            raise KeyboardInterrupt
        reference.append(args)
        return evaluate(*args)

    monkeypatch.setattr(run, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.main(command(byte_model, tmp_path / "out", **options))
    (weights,) = (tmp_path / "out").rglob("checkpoint-*/*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"a checkpoint in {weights.parents[1]} is corrupt .*delete that folder"):
        run.main(command(byte_model, tmp_path / "out", **options))


def test_a_run_of_the_papers_kind_trains_every_weight_under_a_classifier(small_archive, tmp_path):
    # gpt2 reads whole words here; a classifier's reward has no ties.
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    save_classifier(tmp_path / "classifier")
    (tmp_path / "imdb").mkdir()
    words = ["red green blue one", "two cat dog sky", "sea up down yes", "no good bad red", "green one sea cat"] * 6
    rows = [{"text": f"{text} {'good ' * (i + 2)}"} for i, text in enumerate(words)]
    (tmp_path / "imdb" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"dataset": tmp_path / "imdb", "reward": tmp_path / "classifier", "lora_rank": 0, "min_gap": 0}
    options |= {"prefix_words": 2, "train_prefixes": 3, "eval_prefixes": 1, "sft_texts": 0, "seeds": 1}
    run.main(command(str(tmp_path / "model"), tmp_path / "out", **options))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0 < results["pairs"]["mean_reward"] < 1
    assert {p["method"] for p in results["points"]} == {"reference", "dpo", "mallows-simpo"}
    assert next(p for p in results["points"] if p["method"] == "dpo")["kl"]["mean"] != 0
