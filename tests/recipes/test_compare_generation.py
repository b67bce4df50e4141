"""The comparison of every preset in controllable generation: its numbers by hand, bad input, a whole small run."""

import gc
import json
import re

import numpy as np
import pytest
from generation_recipe import FOLDER, command, compare, run

from mallowspo import preset, presets
from methods import COMPOSITIONS

EVERYTHING = {(name, preset(name).beta) for name in (*presets(), *COMPOSITIONS)}


def never():
    pytest.fail("this stage was run again")


def test_every_preset_has_a_point_at_its_own_beta_and_dpo_more():
    points = compare.points_of([("dpo", 1.0), ("dpo", preset("dpo").beta)])
    assert len(points) == len(set(points))
    assert set(points) == EVERYTHING | {("dpo", 1.0)}
    with pytest.raises(ValueError, match="betas of dpo alone, got ipo, simpo; run.py takes others"):
        compare.points_of([("dpo", 1.0), ("simpo", 2.0), ("ipo", 2.0)])


def test_the_recipes_own_file_parses():
    recipe, training, grid = run.parse_arguments(["--config", str(FOLDER / "compare.yaml")], compare.Options)
    assert recipe.seeds >= 5
    assert {method for method, _ in grid} == {"dpo"}
    for method, beta in compare.points_of(grid):
        assert run.training_of(training, method, beta, 3, FOLDER).objective() == preset(method, beta=beta)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grid", '{"ppo": [1]}'], "unknown methods ppo"),
        (["--seeds", "0"], "seeds must be at least 1"),
        (["--grid", '{"ipo": [1]}'], "betas of dpo alone, got ipo"),
        (["--label_smoothing", "0.1"], "label_smoothing=0.1 changes a margin"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compare.main([*options, "--use_cpu", "true"])


# ---- numbers -------------------------------------------------------------------------------------------------------


def fake_runs(seeds=4, prefixes=4):
    """Rewards that seeds shift alike, but for ipo's, which a prefix of its own sets apart."""
    points = [("reference", None, 0.1, 0.0), ("dpo", 0.1, 0.5, 4.0), ("dpo", 1.0, 0.3, 1.0)]
    points += [("ipo", 0.1, 0.5, 4.0), ("mallows-theta", 0.1, 0.5, 2.0), ("simpo", 2.0, 0.9, 8.0)]
    grid = np.zeros((prefixes, 2))
    runs = []
    for seed in range(seeds):
        for method, beta, reward, kl in points:
            rewards = grid + reward + seed / 10
            rewards[0] += method == "ipo"
            found = {"rewards": rewards.tolist(), "log_ratios": (grid + kl).tolist()}
            found |= {"tokens": [[3, 5]] * prefixes, "texts": [["a b a", f"c d {seed}"]] * prefixes}
            runs.append({"method": method, "beta": beta, "seed": seed, "domains": {run.MOVIE: found}, "log": {}})
    return runs


def test_differences_to_dpo_at_equal_steps_and_at_equal_kl():
    rows = {(row["method"], row["beta"]): row for row in compare.summarise(fake_runs())}
    assert rows["dpo", 0.1]["minus_dpo"] == rows["reference", None]["minus_dpo"] == {}
    assert rows["simpo", 2.0]["gain"]["mean"] == pytest.approx(0.8)
    theta, simpo, ipo = (rows[key]["minus_dpo"] for key in (("mallows-theta", 0.1), ("simpo", 2.0), ("ipo", 0.1)))
    # In roots, KL 2 is sqrt(2) - 1 of the way from dpo's 1 to its 4; dpo's 4 is sqrt(1/2) of the way to simpo's 8.
    assert theta["equal_steps"]["mean"] == pytest.approx(0)
    assert theta["equal_kl"]["mean"] == pytest.approx(0.5 - 0.3 - 0.2 * (2**0.5 - 1))
    assert simpo["equal_steps"]["mean"] == pytest.approx(0.4)
    assert (simpo["equal_kl"]["mean"], simpo["at_kl"]) == (pytest.approx(0.1 + 0.8 * 0.5**0.5 - 0.5), 4)
    assert simpo["equal_steps"]["at_once"] and compare.sign(simpo["equal_steps"]) == 1
    # One prefix in four: some resamplings have none of it.
    assert ipo["equal_steps"]["mean"] == pytest.approx(0.25)
    assert ipo["equal_steps"]["low"] == 0 and compare.sign(ipo["equal_steps"]) == 0


def test_intervals_for_all_at_once_are_wider_than_each_by_itself():
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(40, 5000))
    alone = [compare.beyond_at_once([(mean, mean + noise[0])])[0] for mean in (1.9, 2.1)]
    assert alone == [False, True]
    # The largest of 40 independent |t| stays within 3.2 in 95%.
    means = np.concatenate([[3.0, 3.4], np.zeros(38)])
    together = compare.beyond_at_once(list(zip(means, means[:, None] + noise, strict=True)))
    assert together == [False, True] + [False] * 38
    assert compare.beyond_at_once([(0.0, np.zeros(9)), (0.0, np.zeros(9))]) == [False, False]
    assert compare.beyond_at_once([(1.0, None)]) == [None]


# ---- a whole run ---------------------------------------------------------------------------------------------------


def test_a_whole_run_trains_every_preset_and_a_repeated_one_none(small_archive, byte_model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    options = command(byte_model, out, grid='{"dpo": [1.0]}', seeds=1, train_prefixes=3, logging_steps=1)
    gc.freeze()  # each training collects garbage, among all the objects that the tests have imported
    compare.main(options)
    gc.unfreeze()
    assert {path.name for path in out.iterdir()} == {"results.json", "results.md", "comparison.png", "stages"}
    rows = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)["rows"]
    found = {(row["method"], row["beta"]): row for row in rows}
    assert found.keys() == EVERYTHING | {("dpo", 1.0), ("reference", None)}
    assert found["reference", None]["kl"]["mean"] == pytest.approx(0, abs=1e-4)
    assert all(row["kl"]["mean"] != 0 for key, row in found.items() if key[1])
    first, second = (out / "stages").glob("reference-*")  # mrpo's
    assert run.model_digest(first) != run.model_digest(second)
    text = (out / "results.md").read_text()
    assert re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)[1:] == [row["method"] for row in rows]
    assert f"of {len(EVERYTHING) - 1} differences" in text
    monkeypatch.setattr(run, "train", lambda *args: never())
    compare.main(options)
    assert (out / "results.md").read_text() == text


def test_mrpo_needs_a_reference_that_was_tuned(small_archive, byte_model, tmp_path):
    options = command(byte_model, tmp_path / "out", grid='{"mrpo": [0.1]}', seeds=1, sft_texts=0)
    with pytest.raises(ValueError, match="sft_texts must be at least 1, got 0"):
        run.main(options)
