"""The dispersion recipe's preference model, its votes and dispersions, and the numbers of the report."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from load_recipe import import_recipe

indices, preference, report, reviews, _ = import_recipe(
    "dispersion", "indices", "preference", "report", "reviews", "data"
)


def test_head_is_at_the_minimum_of_loss_and_penalty():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    chosen, rejected = torch.randint(30, (2, 60), generator=generator)
    a = torch.rand(60, generator=generator, dtype=torch.float64)
    for dispersion, factor in ((None, torch.ones(60)), (a, 2 * a)):
        weights = preference.fit_head(features, chosen, rejected, dispersion, 0.1)
        difference = factor[:, None] * (features[chosen] - features[rejected])
        gradient = -(torch.sigmoid(-difference @ weights)[:, None] * difference).mean(0) + 0.1 * weights
        assert gradient.abs().max() < 1e-5


def test_judging_counts_each_side_of_the_votes():
    votes = preference.Votes(np.array([[0, 1], [1, 2]]), np.array([0.9, 0.5]), None, None, None)
    scores = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
    likelihood, accuracy = preference.judge(scores, votes, None)
    p = 1 / (1 + math.exp(-2))
    assert likelihood == pytest.approx((0.9 * math.log(p) + 0.1 * math.log(1 - p) + math.log(0.5)) / 2)
    assert accuracy == pytest.approx((0.9 + 0.5) / 2)


def test_the_validation_votes_choose_and_the_held_out_ones_judge():
    def votes(wins):
        return preference.Votes(np.array([[0, 1], [1, 2]]), np.array(wins), None, None, None)

    scores = {name: torch.tensor(values, dtype=torch.float64) for name, values in
              {(1.0, 1.0): [2, 0, -2], (1.0, 2.0): [0, 2, 4]}.items()}  # fmt: skip
    drawn = {"validation": votes([0.9, 0.9]), "held out": votes([0.2, 0.2])}
    got = preference._judge_best(scores, drawn, None)
    assert (got["penalty"], got["temperature"]) == (1.0, 1.0)
    p = 1 / (1 + math.exp(-2))
    assert got["log_likelihood"] == pytest.approx(0.2 * math.log(p) + 0.8 * math.log(1 - p))
    assert got["accuracy"] == pytest.approx(0.2)
    # With a dispersion of its own for each part, the theta link's factor 2 a = 2 at the judgement.
    told = {part: torch.ones(2, dtype=torch.float64) for part in drawn}
    p = 1 / (1 + math.exp(-4))
    got = preference._judge_best(scores, drawn, told)
    assert got["log_likelihood"] == pytest.approx(0.2 * math.log(p) + 0.8 * math.log(1 - p))


def test_votes_are_of_seen_raters_and_judged_by_the_unseen():
    sentences = [reviews.Sentence("tweet", str(i), ()) for i in range(4)]
    seen, unseen = [[3], [1], [1], [0]], [[0, 0], [0, 1], [2, 2], [0, 0]]
    votes = preference.draw_votes(sentences, np.arange(4), 400, seen, unseen, np.random.default_rng(0))
    for (a, b), win, share, chosen, tied in zip(*votes, strict=True):
        assert a != b and {a, b} != {0, 3}  # their unseen raters all tie
        assert share == (np.sign(seen[a][0] - seen[b][0]) + 1) / 2
        assert (chosen, tied) == (seen[a] > seen[b], seen[a] == seen[b])
        untied = [x > y for x, y in product(unseen[a], unseen[b]) if x != y]
        assert win == pytest.approx(np.mean(untied))


def test_nothing_but_ties_is_refused():
    sentences, scores = [reviews.Sentence("tweet", str(i), ()) for i in range(4)], [[0]] * 4
    with pytest.raises(ValueError, match="the raters tie on each of 40 pairs"):
        preference.draw_votes(sentences, np.arange(4), 40, scores, scores, np.random.default_rng(0))


def test_dispersions_are_told_by_name_and_have_mean_factor_one():
    generator = np.random.default_rng(0)
    rows = generator.integers(10, size=(200, 2))
    share = generator.random(200)
    found = {
        f"{prompt}_{what}": torch.as_tensor(generator.random(10) + 1)
        for prompt in indices.WRITE
        for what in ("logps", "entropy", "tokens")
    } | {"asked": torch.as_tensor(generator.normal(size=(10, 3))), "features": torch.zeros(10, 2)}
    votes = {part: preference.Votes(rows, share, share, share > 0.5, share == 0.5) for part in preference.PARTS}
    got = preference._dispersions(votes, found, 50, generator)
    assert list(got) == [preference.DPO, *(m for m in got if m != preference.DPO)] and set(got) == set(
        preference.METHODS
    )
    assert got.pop(preference.DPO) is None
    for parts in got.values():
        assert (2 * parts["fit"]).mean().item() == pytest.approx(1) and (parts["fit"] >= 0).all()
    paper = -np.log((found["neutral_entropy"][rows].sum(1) / 2 / math.log(50)).numpy())
    ratio = got[indices.PAPER]["fit"].numpy() / paper
    assert ratio == pytest.approx(ratio[0])
    assert sorted(got[preference.SHUFFLED]["fit"].tolist()) == pytest.approx(
        sorted(got[indices.PAPER]["fit"].tolist())
    )


def test_people_count_ties_half_or_not_at_all():
    def pair(first, second):
        return reviews.Sentence("tweet", "a", first), reviews.Sentence("tweet", "b", second)

    facts = report.people([pair((2, 2), (1, 1)), pair((0, 0), (0, 0)), pair((1, 0), (0, 0)), pair((0, 0), (1, -1))])
    assert facts["agreement"].tolist() == [1, 0.5, 0.75, 0.5]
    assert facts["untied"].tolist() == [1, 0.5, 1, 0.5]
    assert facts["tied"].tolist() == [0, 1, 0.5, 0]
    assert facts["distance"].tolist() == [1, 0, 0.5, 0]


def test_calibration_of_a_true_index_a_shifted_and_a_useless_one(monkeypatch):
    monkeypatch.setattr(report, "RESAMPLES", 100)
    generator = np.random.default_rng(0)
    index = generator.uniform(0, 3, size=2000)  # below the ceiling of an agreement
    predicted = {"true": index, "shifted": index + 3, "useless": generator.permutation(index)}
    found = report.calibration(predicted, 1 / (1 + np.exp(-1.4 * index)))
    assert found["true"]["scale"]["fit"] == pytest.approx(0.7)
    assert found["shifted"]["line"]["fit"] == pytest.approx((-4.2, 1.4), rel=1e-4)
    best = found["true"]["scale"]["gain"][0]
    assert best > 0.05 and found["shifted"]["line"]["gain"][0] == pytest.approx(best, rel=1e-2)
    assert abs(found["useless"]["line"]["gain"][0]) < 0.002 and found["useless"]["scale"]["gain"][0] < -0.05
    assert all(low <= value <= high for row in found.values() for value, low, high in [row["line"]["gain"]])
    for predicted_share, actual, error in found["true"]["scale"]["bins"]:
        assert predicted_share == pytest.approx(actual, abs=1e-3) and 0 <= error < 0.01


def test_correlations_by_domain_and_with_intervals(monkeypatch):
    monkeypatch.setattr(report, "RESAMPLES", 200)
    generator = np.random.default_rng(0)
    agreement, domains = generator.uniform(0.5, 1, 80), ["tweet"] * 40 + ["movie review"] * 40
    facts = {"agreement": agreement, "halves": np.array([agreement, agreement**2]), "untied": -agreement}
    facts |= {"distance": agreement + generator.normal(0, 0.1, 80), "scatter": generator.random(80)}
    turned = np.where(np.arange(80) < 40, agreement, -agreement)
    found = report.correlations({indices.PAPER: -agreement, "turned": turned}, facts, domains)
    assert found[indices.PAPER]["all"] == pytest.approx((-1, -1, -1))
    assert found[indices.PAPER]["untied"] == pytest.approx((1, 1, 1))
    assert found["turned"]["tweet"] == pytest.approx((1, 1, 1))
    assert found["turned"]["movie review"] == pytest.approx((-1, -1, -1))
    assert found["turned"]["gain"][0] == pytest.approx(found["turned"]["all"][0] + 1)
    assert found[report.HALF]["all"] == pytest.approx((1, 1, 1))
    value, low, high = found[report.DISTANCE]["all"]
    assert 0.5 < low < value < high < 1
    # About as wide as theory says for 80 pairs: 2 * 1.96 * (1 - r^2) / sqrt(80).
    assert high - low == pytest.approx(2 * 1.96 * (1 - value**2) / math.sqrt(80), rel=0.5)


def test_intervals_over_seeds_are_students():
    row = {"log_likelihood": -1.0, "accuracy": 0.5, "without": -1.0}
    rows = dict.fromkeys((*preference.METHODS, preference.PEOPLE), row)
    seeds = [rows | {preference.TRUE: row | {"log_likelihood": -1.0 + gain}} for gain in (0.1, 0.3)]
    found = report.seed_summary(seeds)[preference.TRUE]
    assert found["gain"] == pytest.approx((0.2, 0.2 - 12.706 * 0.1, 0.2 + 12.706 * 0.1))
    assert found["gain_without"] == (0, 0, 0)
