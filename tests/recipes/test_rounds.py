"""The rounds recipe: its sampling against its chances, its studies against plain loops, a whole small run."""

import json
import math

import numpy as np
import pytest
import torch
from load_recipe import RECIPES, import_recipe

# run comes first: it finds what the others import; the bandit's modules are named to be forgotten again.
run, studies, figures, experiment, _, _ = import_recipe(
    "rounds", "run", "studies", "figures", "experiment", "report", "sampling"
)
SMALL = {"rounds": 2, "samples": 4, "steps": 3, "learning_rate": 0.1}


def problem(seeds=(0, 1), phis=(0.2, 0.8), actions=4):
    return experiment.make_problem(
        phis, num_actions=actions, kind="kendall", preferences=1, demonstrations=20, prior=0.5, seeds=seeds
    )


def small_study(name, data, seeds, methods=None):
    """{metric: [rounds + 1, M, S]} and the methods."""
    known = {
        "accelerated": ({"plain": (0.0, 1.0), "fast": (0.5, 1.0), "larger": (0.0, 0.5)}, {}),
        "advantages": ({"apa": ("apa", 0.2), "awr": ("awr", 0.2), "pg": ("pg", 0.2)}, {"noise": 0.1}),
        "discriminator": (
            {"gold": ("random", "none"), "sure": ("uncertain", "table"), "same": ("random", "shared")},
            {"beta": 1.0, "gold": 3},
        ),
    }
    own, more = known[name]
    own = own if methods is None else {method: own[method] for method in methods}
    return getattr(studies, name)(data, own, seeds, **SMALL, **more), list(own)


# ---- sampling ------------------------------------------------------------------------------------------------------


def test_pairs_have_their_chances():
    """The first action by the policy, the second among the others, the winner by the share of the people."""
    data, number = problem(seeds=(3,), phis=(0.5,)), 40_000
    pairs = studies.sample_pairs(data, data.ref_logps[None], number, studies.Draws((3,)))
    first, second, won = (values.flatten().numpy() for values in pairs)
    policy = data.ref_logps.exp().flatten().double().numpy()
    for i in range(4):
        for j in range(4):
            chosen = (first == i) & (second == j)
            chance = 0 if i == j else policy[i] * policy[j] / (1 - policy[i])
            assert chosen.mean() == pytest.approx(chance, abs=5 * math.sqrt(chance / number) + 1e-9)
            if chosen.sum() > 200:
                share = float(data.preferred[0, 0, i, j])
                assert won[chosen].mean() == pytest.approx(share, abs=5 * math.sqrt(0.25 / chosen.sum()))


def test_counts_and_losses_are_those_of_plain_loops():
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(4, (2, 3, 2, 5), generator=generator)
    second = (first + torch.randint(1, 4, first.shape, generator=generator)) % 4
    pairs = studies.Pairs(first, second, torch.rand(first.shape, generator=generator) < 0.5)
    weights = torch.rand(first.shape, generator=generator)
    wins = studies.count_wins(pairs, 4, weights)
    scores, refs = (torch.randn(2, 3, 2, 4, generator=generator) for _ in range(2))
    betas = studies.column([0.5, 2.0])
    found = studies.preference_losses(scores, refs, wins, betas)
    for m, s, c in np.ndindex(2, 3, 2):
        counts, loss = np.zeros((4, 4)), 0.0
        for n in range(5):
            i, j = int(first[m, s, c, n]), int(second[m, s, c, n])
            i, j = (i, j) if pairs.first_won[m, s, c, n] else (j, i)
            counts[i, j] += weights[m, s, c, n]
            margin = (scores - refs)[m, s, c, i] - (scores - refs)[m, s, c, j]
            loss += float(weights[m, s, c, n]) * math.log1p(math.exp(-float(betas[m, 0, 0, 0] * margin)))
        np.testing.assert_allclose(wins[m, s, c], counts, rtol=1e-5)
        assert found[m, s, c].item() == pytest.approx(loss, rel=1e-4)


def test_the_smallest_are_asked():
    values = torch.tensor([[3.0, 0.5, 2.0, 0.1], [0.0, 1.0, 2.0, 3.0]])
    assert studies.smallest(values, 2).tolist() == [[False, True, False, True], [True, True, False, False]]


# ---- the studies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["accelerated", "advantages", "discriminator"])
def test_runs_know_nothing_of_each_other(name):
    """Fewer methods or seeds give the same numbers, and every study moves."""
    whole, methods = small_study(name, problem(), (0, 1))
    one, _ = small_study(name, problem(seeds=(1,)), (1,), methods=methods[1:])
    for metric in studies.METRICS:
        assert whole[metric].shape == (3, 3, 2)
        torch.testing.assert_close(one[metric], whole[metric][:, 1:, 1:], rtol=1e-4, atol=1e-6)
        assert torch.equal(whole[metric][0, 0], whole[metric][0, 1])
    assert (whole["kl"][0].abs() < 1e-6).all() and (whole["kl"][-1] > 1e-4).all()


def test_alpha_0_is_iterative_dpo():
    """Against a loop that writes DPO out, each round from and against the policy of the round before."""
    data, seeds = problem(), (0, 1)
    found, _ = small_study("accelerated", data, seeds, methods=["plain"])
    draws, policy = studies.Draws(seeds), data.ref_logps[None].double()
    for number in range(SMALL["rounds"]):
        pairs = studies.sample_pairs(data, policy.float(), SMALL["samples"], draws)
        winner, loser = (torch.where(pairs.first_won == first, pairs.first, pairs.second) for first in (True, False))
        logits = policy.clone().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=SMALL["learning_rate"], eps=1e-6)
        for _ in range(SMALL["steps"]):
            ratio = logits.log_softmax(-1) - policy.log_softmax(-1)
            loss = -torch.nn.functional.logsigmoid(ratio.gather(-1, winner) - ratio.gather(-1, loser)).mean(-1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        policy = logits.detach()
        reward = (policy.softmax(-1) * data.utility).sum(-1).mean(-1)
        torch.testing.assert_close(found["reward"][number + 1], reward.float(), rtol=1e-4, atol=1e-5)


def test_apa_finds_the_regularised_optimum():
    """With plenty of exact rewards it is ref exp(utility / temperature), which the policy gradient finds as well."""
    data, temperature = problem(seeds=(0,)), 0.5
    methods = {name: (name, temperature) for name in ("apa", "pg")}
    many = {"rounds": 60, "samples": 2000, "steps": 3, "learning_rate": 0.02, "noise": 0.0}
    found = studies.advantages(data, methods, (0,), **many)
    best = experiment.evaluate(data, data.ref_logps + data.utility / temperature)
    start = found["reward"][0, 0].item()
    for metric in ("reward", "kl"):
        expected = best[metric].mean().item()
        assert abs(expected - (start if metric == "reward" else 0)) > 0.04
        assert found[metric][-10:].mean(0).flatten().tolist() == pytest.approx([expected] * 2, abs=0.02)


def test_all_gold_is_dpo_and_silver_needs_knowledge():
    """With every pair shown, silver labels are none; with none shown nothing is known, so nothing is learned."""
    methods = {
        f"{query}, {kind}": (query, kind) for query in ("all", "random") for kind in ("none", "table", "shared")
    }
    reward = studies.discriminator(problem(), methods, (0, 1), **SMALL, beta=1.0, gold=0)["reward"]
    for i in (1, 2):
        assert torch.equal(reward[:, i], reward[:, 0]) and (reward[-1, 0] != reward[0, 0]).all()
    assert torch.equal(reward[-1, 3:], reward[0, 3:])


def test_a_shared_discriminator_carries_over_to_unseen_contexts(monkeypatch):
    """People are only ever shown pairs of the first context, where they all but agree."""
    data = problem(phis=(0.01, 0.01))
    monkeypatch.setattr(
        studies, "smallest", lambda values, number: torch.arange(values.shape[1]).expand_as(values) < 8
    )
    seen = {}

    class Recorded(studies.History):
        def add(self, logits):
            super().add(logits)
            seen["last"] = logits.detach().softmax(-1)

    monkeypatch.setattr(studies, "History", Recorded)
    methods = {"table": ("random", "table"), "shared": ("random", "shared")}
    options = {"rounds": 6, "samples": 8, "steps": 10, "learning_rate": 0.1, "beta": 1.0, "gold": 8}
    studies.discriminator(data, methods, (0, 1), **options)
    reward = (seen["last"] * data.utility).sum(-1)  # [M, S, C]
    start = (data.ref_logps.exp() * data.utility).sum(-1)[:, 1]
    assert torch.allclose(reward[0, :, 1], start, atol=1e-5) and (reward[1, :, 1] > start + 0.02).all()


def test_nothing_beats_the_frontier():
    data = problem()
    frontier = studies.frontier(data)
    assert all(np.diff(frontier["kl"]) > -1e-6) and all(np.diff(frontier["reward"]) > -1e-6)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.3, 1.0, 3.0):
        logits = data.ref_logps + scale * (data.utility + torch.randn(50, *data.utility.shape, generator=generator))
        found = experiment.evaluate(data, logits)
        kl, reward = (found[name].mean((-2, -1)).numpy() for name in ("kl", "reward"))
        assert (reward <= np.interp(kl, frontier["kl"], frontier["reward"]) + 2e-3).all()


# ---- the whole recipe ----------------------------------------------------------------------------------------------


def test_a_small_run(tmp_path, capsys):
    options = {"num_seeds": 5, "rounds": 4, "steps": 2, "num_actions": 3, "output_dir": tmp_path / "out"}
    run.main([f"--{name}={value}" for name, value in options.items()] + ["--alphas", "0.5"])
    text = (tmp_path / "out" / "results.md").read_text()
    assert text in capsys.readouterr().out and "nan" not in text
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["settings"]["rounds"] == 4 and set(record["studies"]) == set(figures.TITLES)
    assert list(record["studies"]["accelerated"]) == ["iterative DPO", "alpha 0.5", "beta 2"]
    for name, study in record["studies"].items():
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        for method, values in study.items():
            assert len(values["reward"]["mean"]) == 5
            row = next(line for line in text.splitlines() if line.startswith(f"| {method} |"))
            assert f"{values['reward']['mean'][4]:.3f}" in row and f"{values['kl']['mean'][4]:.3f}" in row


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"beta": -4.0}, "beta must be positive and finite, got -4.0"),
        ({"beta": float("nan")}, "beta must be positive and finite, got nan"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"temperatures": [0.1, 0.0]}, "temperatures must be positive and finite"),
        ({"reward_noise": -1.0}, "reward_noise must be finite and at least 0, got -1.0"),
        ({"gold": 1000}, "gold=1000 is more than all 8 candidates"),
        ({"alphas": [1.0]}, r"alphas must be in \(0, 1\)"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run.Options(**options)


def test_an_output_dir_that_cannot_be_is_found_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "out").touch()
    monkeypatch.setattr(run, "run_studies", lambda *_: pytest.fail("the work began"))
    with pytest.raises(FileExistsError):
        run.main(["--output_dir", str(tmp_path / "out")])


def test_the_readme_has_the_tables_of_the_default_run():
    """Each row of its tables names a method that the default options run."""
    (options,) = run.parse_options(run.Options, "", [])
    readme = (RECIPES / "rounds" / "README.md").read_text()
    for alpha in options.alphas:
        assert f"| alpha {alpha:g} |" in readme
    for temperature in options.temperatures:
        assert f"| APA, {temperature:g} |" in readme
