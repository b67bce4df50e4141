"""The comparison of every preset in the bandit: its losses against plain calls, a whole small run."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from load_recipe import RECIPES, import_recipe

from mallowspo.objective import preset, presets

compare, experiment, report, run, sampling, options = import_recipe(
    "bandit", "compare", "experiment", "report", "run", "sampling", "options"
)
OPTIONS = compare.Options(dispersions=[0.2, 0.5, 0.8], num_actions=4, num_seeds=5, betas=[0.5, 4.0])
PREFERENCES = 12


@pytest.fixture(scope="module")
def bandit():
    """A problem, its pairs and policies [S, C, K] some way from the reference."""
    problem = OPTIONS.make_problem("kendall", PREFERENCES)
    logits = problem.ref_logps.double() + torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(7))
    return problem, compare.make_pairs(problem, OPTIONS, "kendall", PREFERENCES), logits


def sides(values, pairs):
    """Log-probabilities [S, C, K] -> those of the chosen and the rejected actions, [S, C, P] each."""
    return [values.gather(-1, actions) for actions in pairs.actions]


def test_pairs_are_the_preferences_with_their_repetitions(bandit):
    problem, pairs, _ = bandit
    given = torch.zeros(5, 3, 16, dtype=torch.float64)
    found = given.scatter_add(-1, 4 * pairs.actions[0] + pairs.actions[1], torch.ones(5, 3, PREFERENCES).double())
    given.scatter_add_(-1, 4 * problem.chosen + problem.rejected, problem.weights.double())
    assert (found / PREFERENCES).allclose(given)
    assert (found > 1).any()


@pytest.mark.parametrize("name", presets())
def test_methods_for_long_responses_are_their_hosts_on_one_token(bandit, name):
    objective = preset(name)
    expected = compare.pair_losses(compare.host(objective), *bandit[1:])
    assert compare.pair_losses(objective, *bandit[1:]).equal(expected)


def test_what_is_dpo_here_and_what_is_not(bandit):
    def losses(name, **fields):
        return compare.pair_losses(preset(name, **fields), *bandit[1:])

    assert losses("sampo").equal(losses("dpo")) and losses("ld-dpo").equal(losses("dpo"))
    assert losses("ln-dpo", beta=0.1).equal(losses("dpo"))
    assert losses("d2po").allclose(losses("dpo", beta=0.098), rtol=1e-12)  # the first token's weight is 0.98
    assert not losses("bmc").allclose(losses("dpo"), rtol=1e-3)


def test_losses_by_hand(bandit):
    """DPO, WPO and MRPO with even weights, from their formulas."""
    _, pairs, logits = bandit
    (chosen, rejected), refs = sides(logits.log_softmax(-1), pairs), pairs.ref_logps.unflatten(1, (2, 5, 3, -1))
    dpo = torch.log1p(torch.exp(-0.1 * (chosen - rejected - refs[0, 0] + refs[0, 1])))
    assert compare.pair_losses(preset("dpo"), pairs, logits).allclose(dpo.flatten())
    weight = chosen.exp() * rejected.exp() / logits.softmax(-1).square().sum(-1, keepdim=True) ** 2
    assert compare.pair_losses(preset("wpo"), pairs, logits).allclose((weight * dpo).flatten())
    harmonic = -(0.5 / refs[0].exp() + 0.5 / refs[1].exp()).log()
    mrpo = torch.log1p(torch.exp(-0.1 * (chosen - rejected - harmonic[0] + harmonic[1])))
    even = preset("mrpo", reference_weights=(0.5, 0.5), reference_clip=None, adaptive_clip=False)
    assert compare.pair_losses(even, pairs, logits).allclose(mrpo.flatten())


@pytest.mark.parametrize("name", ["aot", "aot-unpaired"])
def test_every_context_is_sorted_by_itself(bandit, name):
    _, pairs, logits = bandit
    objective, ref = preset(name), pairs.ref_logps[0].view(2, 5, 3, PREFERENCES)
    logps = torch.stack(sides(logits.log_softmax(-1), pairs))
    found = compare.pair_losses(objective, pairs, logits).view(5, 3, PREFERENCES)
    tokens = torch.ones(2 * PREFERENCES)
    for seed in range(5):
        for context in range(3):
            alone = objective(logps[:, seed, context].flatten(), tokens, ref[:, seed, context].flatten()).losses
            assert found[seed, context].sort()[0].allclose(alone.sort()[0], rtol=1e-9)
    assert not found.flatten().allclose(compare.pair_losses(preset("dpo"), pairs, logits), rtol=1e-3)


def test_the_second_reference_is_of_other_people_with_the_same_opinions():
    many = replace(OPTIONS, demonstrations=100_000)
    problem = many.make_problem("kendall", PREFERENCES)
    second = compare.second_reference(problem, many, "kendall").exp()
    assert second.allclose(problem.top_choices.double(), atol=0.01)
    assert not second.allclose(problem.ref_logps.exp().double(), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "method"),
    [("dpo", "dpo"), ("ipo", "ipo"), ("mallows-theta", "theta, estimated"), ("mallows-phi", "phi, estimated")],
)
def test_training_is_run_pys(bandit, name, method):
    problem, pairs, _ = bandit
    at, history = experiment.train(problem, [0.5, 4.0], optimizer="sgd", steps=20)
    found = compare.train(preset(name, beta=4.0), problem, pairs, "sgd", at)
    for metric, values in found.items():
        expected = history[metric][:, list(experiment.METHODS).index(method), 1].double().numpy()
        assert values == pytest.approx(expected, abs=1e-4), metric


def test_an_output_dir_that_cannot_be_is_found_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "out").touch()
    monkeypatch.setattr(compare, "run_setting", lambda *_: pytest.fail("the work began"))
    with pytest.raises(FileExistsError):
        compare.main(["--output_dir", str(tmp_path / "out")])


def test_a_whole_run(tmp_path):
    size = "--dispersions 0.2 0.8 --num_actions 4 --betas 0.25 16 --steps 12 --num_seeds 5 --kl_targets 0.01"
    command = [sys.executable, str(RECIPES / "bandit" / "compare.py"), "--output_dir", str(tmp_path), *size.split()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "comparison.png"}
    rows = json.loads((tmp_path / "results.json").read_text())["results"]["kendall, 15, adam"]["rows"]
    assert list(rows) == [*presets(), *compare.COMPOSITIONS, compare.EARLY]
    text = (tmp_path / "results.md").read_text()
    assert re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)[1:] == [compare.label(*item) for item in rows.items()]
    same = {name: row["same_as"] for name, row in rows.items() if row["same_as"]}
    assert same == {"ln-dpo": "dpo", "ld-dpo": "dpo", "sampo": "dpo"}
    dpo, theta = (rows[name]["matched"]["0.01"]["reward"] for name in ("dpo", "mallows-theta"))
    assert dpo["minus_dpo"] == {"mean": 0.0, "half": 0.0}
    assert theta["minus_dpo"]["mean"] == pytest.approx(theta["mean"] - dpo["mean"])
    early = {name for name, row in rows.items() if row["stopped_early"]}
    assert early == {"robust-dpo", "simpo", "mallows-simpo", "rainbowpo", compare.EARLY}
    # By beta: two policies at most; stopped early: one for each step that was looked at, the reference last.
    lengths = {name: len(row["path_kl"]["mean"]) for name, row in rows.items()}
    assert {lengths[name] for name in early} == {len(experiment.evaluation_steps(12))}
    assert {lengths[name] for name in rows.keys() - early} <= {1, 2}
    assert rows["simpo"]["path_kl"]["mean"][-1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("recipe", ["bandit", "controllable_generation"])
def test_the_page_has_a_row_for_every_preset(recipe):
    text = (RECIPES / recipe / "README.md").read_text()
    rows = {name.split(",")[0] for name in re.findall(r"^\| ([^|]+?) \|", text, re.M)}
    assert set(presets()) - {"dpo"} <= rows
