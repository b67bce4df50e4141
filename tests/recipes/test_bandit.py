"""The bandit recipe: its samplers against enumeration, its tensor program against plain loops, a whole small run."""

import itertools
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from load_recipe import RECIPES, import_recipe

from mallowspo import reference
from mallowspo.report import page

sampling, experiment, report, run, options = import_recipe(
    "bandit", "sampling", "experiment", "report", "run", "options"
)
dispersions = st.floats(0.05, 0.95)
kinds = st.sampled_from(sampling.DISTANCES)


def parse(arguments):
    return options.parse_options(run.Options, "", arguments)


def neg_log(*phis):
    return -torch.tensor(phis, dtype=torch.float64).log()


def enumerate_mallows(phi, items, kind):
    """{places: probability} from the definition, in plain Python."""
    weights = {}
    for places in itertools.permutations(range(items)):
        if kind == "kendall":
            distance = sum(places[i] > places[j] for i, j in itertools.combinations(range(items), 2))
        else:
            distance = sum((place - item) ** 2 for item, place in enumerate(places))
        weights[places] = phi**distance
    total = sum(weights.values())
    return {places: weight / total for places, weight in weights.items()}


def chi_square(counts, chances):
    """Pearson's statistic in standard deviations of its null distribution; cells expecting below 5 are pooled."""
    counts = np.asarray(counts, float)
    expected = np.asarray(chances) * counts.sum()
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / np.maximum(expected, 1)).sum() - freedom) / math.sqrt(2 * max(freedom, 1))


# ---- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sampling.DISTANCES)
def test_rankings_have_the_models_probabilities(kind):
    phis, samples = (0.2, 0.6, 0.95), 20_000
    drawn = sampling.sample_rankings(neg_log(*phis), 4, samples, kind, torch.Generator().manual_seed(0))
    for phi, places in zip(phis, drawn.tolist(), strict=True):
        truth = enumerate_mallows(phi, 4, kind)
        seen = dict.fromkeys(truth, 0)
        for ranking in places:
            seen[tuple(ranking)] += 1
        assert chi_square(list(seen.values()), list(truth.values())) < 5


def test_the_chi_square_test_can_fail():
    drawn = sampling.sample_rankings(neg_log(0.6), 4, 20_000, "kendall", torch.Generator().manual_seed(0))[0].tolist()
    wrong = enumerate_mallows(0.63, 4, "kendall")
    assert chi_square([drawn.count(list(places)) for places in wrong], list(wrong.values())) > 5


@given(phi=dispersions, kind=kinds, items=st.integers(2, 5))
def test_probabilities_are_those_of_the_enumeration(phi, kind, items):
    truth, a = enumerate_mallows(phi, items, kind), neg_log(phi)
    found = sampling.probabilities(sampling.all_rankings(items), a, kind)[0]
    assert found.tolist() == pytest.approx(list(truth.values()), rel=1e-9, abs=1e-300)
    pairwise = sampling.pairwise_probabilities(a, items, kind)[0]
    top = sampling.top_choice_probabilities(a, items, kind)[0]
    for i in range(items):
        assert float(top[i]) == pytest.approx(sum(p for places, p in truth.items() if places[i] == 0), abs=1e-9)
        for j in range(items):
            share = sum(p for places, p in truth.items() if places[i] < places[j]) if i != j else 0.5
            assert float(pairwise[i, j]) == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize("kind", sampling.DISTANCES)
def test_preferences_ask_every_pair_and_agree_with_the_model(kind):
    phis, samples = (0.3, 0.9), 30_000
    counts = sampling.sample_preferences(neg_log(*phis), 5, samples, kind, torch.Generator().manual_seed(1))
    chances = sampling.pairwise_probabilities(neg_log(*phis), 5, kind)
    chances.diagonal(dim1=-2, dim2=-1).zero_()
    assert counts.sum((-1, -2)).tolist() == [samples] * 2
    for row, chance in zip(counts, chances / 10, strict=True):  # 10 pairs
        assert chi_square(row.flatten(), chance.flatten()) < 5


def test_the_samples_give_the_dispersion_back():
    """Adjacent items disagree with the central ranking with odds phi (Kendall's tau): the estimate of maximum
    likelihood from a context's first comparison of neighbours finds phi."""
    phis = (0.1, 0.5, 0.9)
    places = sampling.sample_rankings(neg_log(*phis), 6, 40_000, "kendall", torch.Generator().manual_seed(2))
    inverted = (places[..., 0] > places[..., 1]).double().mean(-1)
    assert (inverted / (1 - inverted)).tolist() == pytest.approx(phis, rel=0.05)


def test_refusals():
    generator = torch.Generator()
    with pytest.raises(ValueError, match="9! rankings"):
        sampling.sample_rankings(neg_log(0.5), 9, 2, "spearman", generator)
    with pytest.raises(ValueError, match="'cayley'.*kendall, spearman"):
        sampling.sample_rankings(neg_log(0.5), 3, 2, "cayley", generator)
    with pytest.raises(ValueError, match="probability 0"):
        sampling.sample_reference(neg_log(0.5), 3, 2, 0.0, "kendall", generator)
    with pytest.raises(ValueError, match="between 0 and 1"):
        problem(phis=(0.5, 1.0))


# ---- the tensor program --------------------------------------------------------------------------------------------


def problem(phis=(0.2, 0.7, 0.95), num_actions=4, kind="kendall", preferences=12, seeds=(0, 1)):
    return experiment.make_problem(
        list(phis),
        num_actions=num_actions,
        kind=kind,
        preferences=preferences,
        demonstrations=50,
        prior=0.1,
        seeds=seeds,
    )


def test_actions_are_named_at_random_and_everything_follows_the_names():
    found = problem(phis=(0.3,) * 40, preferences=2000)
    best = found.utility.argmax(-1)
    assert set(best.flatten().tolist()) == {0, 1, 2, 3}
    assert (found.top_choices.argmax(-1) == best).all()
    assert (found.ref_logps.argmax(-1) == best).double().mean() > 0.95
    ordered = found.utility[..., :, None] > found.utility[..., None, :]
    assert ((found.preferred > 0.5) == ordered).all()
    agree = found.utility.gather(-1, found.chosen) > found.utility.gather(-1, found.rejected)
    share = (found.weights * agree).sum(-1).mean()
    gaps = torch.arange(1, 4).repeat_interleave(torch.tensor([3, 2, 1]))
    expected = np.mean([math.exp(reference.mallows_log_prob(int(gap), -math.log(0.3), 0.0)[0]) for gap in gaps])
    assert float(share) == pytest.approx(expected, abs=0.01)
    assert found.weights.sum(-1).allclose(torch.ones(2, 40))


def test_a_seed_does_not_depend_on_the_others():
    both, second = problem(seeds=(0, 1)), problem(seeds=(1,))
    assert both.utility[1].equal(second.utility[0]) and both.ref_logps[1].equal(second.ref_logps[0])
    assert both.neg_log_dispersion["estimated"][1].equal(second.neg_log_dispersion["estimated"][0])


@pytest.mark.parametrize("optimizer", experiment.OPTIMIZERS)
@pytest.mark.parametrize("name", experiment.METHODS)
def test_a_run_of_the_program_is_a_plain_loop_over_its_context(name, optimizer):
    """One policy, one pair at a time, through the library's plain-Python loss."""
    found, betas, steps, rate = problem(), [0.5, 2.0], 6, {"adam": 0.05, "sgd": 0.5}[optimizer]
    at, history = experiment.train(found, betas, optimizer=optimizer, steps=steps)
    assert at == [0, 1, 2, 3, 4, 5, 6]
    method, beta, seed, context = list(experiment.METHODS).index(name), 1, 1, 2
    link, source = experiment.METHODS[name]
    a = float(found.neg_log_dispersion[source][seed, context]) if source else None
    ref = found.ref_logps[seed, context].double()
    pairs = [
        (int(winner), int(loser), float(share))
        for winner, loser, share in zip(
            *(x[seed, context] for x in (found.chosen, found.rejected, found.weights)), strict=True
        )
        if share > 0
    ]
    logits = ref.clone()
    first, second = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)

    def loss_at(policy):
        logps = policy.log_softmax(-1)
        ratio = (logps - ref).tolist()
        margin = [betas[beta] * (ratio[winner] - ratio[loser]) for winner, loser, _ in pairs]
        return sum(
            -share * reference.log_likelihood(link, z, a)[0] for (_, _, share), z in zip(pairs, margin, strict=True)
        )

    for step in range(1, steps + 1):
        gradient = torch.zeros(4, dtype=torch.float64)
        for k in range(4):
            nudge = torch.zeros(4, dtype=torch.float64)
            nudge[k] = 1e-5
            gradient[k] = (loss_at(logits + nudge) - loss_at(logits - nudge)) / 2e-5
        if optimizer == "sgd":
            logits = logits - rate * gradient / max(betas[beta], betas[beta] ** 2)
            continue
        gradient = gradient / max(betas[beta], betas[beta] ** 2)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        logits = logits - rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-6)
    policy = logits.softmax(-1)
    final = {metric: float(values[-1, method, beta, seed, context]) for metric, values in history.items()}
    assert final["loss"] == pytest.approx(loss_at(logits), rel=1e-3)
    best = int(found.utility[seed, context].argmax())
    assert final["optimal"] == pytest.approx(float(policy[best]), abs=1e-4)
    people, ref = found.preferred[seed, context].double(), ref.exp()
    expected = {
        "reward": (policy * found.utility[seed, context]).sum(),
        "win_rate": sum(policy[i] * ref[j] * people[i, j] for i in range(4) for j in range(4)),
        "entropy": -(policy * policy.log()).sum() / math.log(4),
        "top_choice_distance": (policy - found.top_choices[seed, context]).clamp(min=0).sum(),
        "kl": (policy * (policy / ref).log()).sum(),
    }
    for metric, value in expected.items():
        assert final[metric] == pytest.approx(float(value), abs=5e-4), metric


def converged(found, name):
    """The rewards log pi - log ref at a method's minimum with beta 1, best action first: [C, K]."""
    logits = found.ref_logps[None].clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = experiment.losses(found, logits, experiment.METHODS[name], torch.ones(1)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    rewards = (logits.detach() - found.ref_logps)[0, 0]
    best_first = rewards.gather(-1, found.utility[0].argsort(-1, descending=True))
    return best_first - best_first[:, :1]


def test_plenty_of_data_and_the_true_dispersion_undo_it():
    """The phi link's minimum is at the difference of the ranks whatever phi is; DPO's follows phi."""
    found = problem(phis=(0.3, 0.6), preferences=400_000, seeds=(0,))
    assert converged(found, "phi, true").allclose(-torch.arange(4.0).expand(2, 4), atol=0.15)
    agreed, contested = converged(found, "dpo")
    assert float(agreed[3]) < 1.5 * float(contested[3]) < 0


def test_the_estimate_orders_contexts_and_is_calibrated():
    found = problem(phis=(0.1, 0.4, 0.7, 0.9), num_actions=8)
    raw, scaled = (found.neg_log_dispersion[name].double().numpy() for name in ("raw", "estimated"))
    assert (2 * scaled).mean(-1) == pytest.approx([1, 1], rel=1e-5)
    assert [report.spearman(row, -np.log([0.1, 0.4, 0.7, 0.9])) for row in raw] == pytest.approx([1, 1])
    share = -(found.ref_logps.exp() * found.ref_logps).sum(-1) / math.log(8)
    assert raw == pytest.approx(-share.log().double().numpy(), rel=1e-3)


# ---- report --------------------------------------------------------------------------------------------------------


def test_at_kl_takes_the_largest_beta_that_spends_it():
    kl = np.array([[0.04, 0.25], [0.09, 0.16], [0.01, 0.04]])  # [B, S] by rising beta, not monotone in the first seed
    values = np.sqrt(kl)[..., None] * [1.0, 2.0] + 5
    found = report.at_kl(kl, values, np.full((2, 2), 5.0), 0.0625)
    assert found == pytest.approx(np.array([[5.25, 5.5]] * 2))
    below = report.at_kl(kl, values, np.full((2, 2), 5.0), 0.0025)
    assert below == pytest.approx(np.array([[5.05, 5.1]] * 2))
    assert np.isnan(report.at_kl(kl, values, np.full((2, 2), 5.0), 0.2)).tolist() == [[True, True], [False, False]]


def test_a_target_that_no_policy_spends_is_said(tmp_path):
    """In the table, and as null in the JSON file."""
    found = problem(seeds=range(5))
    options = run.Options(
        output_dir=str(tmp_path), dispersions=[0.2, 0.7, 0.95], betas=[8.0, 16.0], kl_targets=[90.0], num_seeds=5
    )
    steps, history = experiment.train(found, options.betas, optimizer="sgd", steps=2)
    arrays = [
        {name: value.numpy() for name, value in values.items()}
        for values in (history, experiment.evaluate(found, found.ref_logps))
    ]
    settings = {("kendall", 12, "sgd"): report.summarise(steps, *arrays, options)}
    true = -np.log(options.dispersions)
    estimates = report.estimate_summary(found.neg_log_dispersion["raw"].double().numpy(), true)
    estimates |= {"limit": true.tolist(), "people_entropy": true.tolist()}
    text = report.write_report(settings, {"kendall": estimates}, options, {})
    assert text.count("not reached") == 6 * 5
    matched = json.loads((tmp_path / "results.json").read_text())["results"]["kendall, 12, sgd"]["matched"]["90.0"]
    assert matched["ipo"]["reward"]["minus_dpo"] == {"mean": None, "half": None}


# ---- the whole run -------------------------------------------------------------------------------------------------


def test_a_whole_run(tmp_path):
    size = "--dispersions 0.2 0.6 0.9 --num_actions 4 --betas 0.25 2 --steps 20 --num_seeds 5 --preferences 100"
    command = [sys.executable, str(RECIPES / "bandit" / "run.py"), "--output_dir", str(tmp_path / "out")]
    command += [*size.split(), "--distances", "spearman", "--kl_targets", "0.01", "0.02", "0.05"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "phi, estimated" in done.stdout, done.stderr
    plots = {f"{kind}_{name}" for kind in ("frontier", "gain") for name in ("optimal", "reward")}
    plots |= {"dispersion_estimate", "entropy", "training_reward", "training_entropy_contested"}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"results.json", "results.md", "stages"} | {f"{name}.png" for name in plots}
    assert set(re.findall(r"!\[.+\]\((.+)\.png\)", (tmp_path / "out" / "results.md").read_text())) == plots
    assert page(tmp_path / "out").count("<figcaption>") == len(plots)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["results"]) == 2 and results["settings"]["num_seeds"] == 5
    setting = results["results"]["spearman, 100, sgd"]
    dpo = setting["final"]["dpo"]["kl"]["mean"]
    assert dpo[0] > dpo[1] > 0
    matched = setting["matched"]["0.02"]
    difference = matched["ipo"]["reward"]["mean"] - matched["dpo"]["reward"]["mean"]
    assert matched["ipo"]["reward"]["minus_dpo"]["mean"] == pytest.approx(difference)
    assert matched["dpo"]["reward"]["minus_dpo"] == {"mean": 0.0, "half": 0.0}
    assert setting["training"]["ipo"]["reward"]["mean"][-1] == pytest.approx(matched["ipo"]["reward"]["mean"])
    assert setting["training"]["ipo"]["reward"]["mean"][0] == pytest.approx(setting["reference"]["reward"]["mean"])


def test_an_interrupted_run_goes_on_with_the_settings_that_are_missing(tmp_path, monkeypatch):
    size = ["--dispersions", "0.2", "0.6", "--num_actions", "3", "--betas", "1", "--steps", "2", "--num_seeds", "5"]
    (options,) = parse(["--output_dir", str(tmp_path), *size])
    trained, train = [], experiment.train

    def interrupted(*args, optimizer, **options):
        trained.append(optimizer)
        if trained == ["adam", "sgd"]:
            raise KeyboardInterrupt
        return train(*args, optimizer=optimizer, **options)

    monkeypatch.setattr(experiment, "train", interrupted)
    keys = [("kendall", 15, optimizer) for optimizer in ("adam", "sgd")]
    first = run.run_setting(options, *keys[0])
    with pytest.raises(KeyboardInterrupt):
        run.run_setting(options, *keys[1])
    assert repr(run.run_setting(options, *keys[0])) == repr(first) != repr(run.run_setting(options, *keys[1]))
    assert trained == ["adam", "sgd", "sgd"]


def test_options_of_files_and_command_line(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("steps: 7\nbetas: [1.0, 2]\nnum_seeds: 5\n")
    (found,) = parse(["--config", str(path), "--num_seeds", "6"])
    assert (found.steps, found.betas, found.num_seeds, found.num_actions) == (7, [1.0, 2.0], 6, 6)
    assert parse([])[0].output_dir == "outputs/bandit"
    assert parse(["--config", str(RECIPES / "bandit" / "paper.yaml")])[0].preferences == [28, 100, 1000, 10000]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("stepz: 7", ValueError, "unknown options: stepz"),
        ("- 7", ValueError, "must hold options"),
        ("betas: [1, many]", SystemExit, "2"),
        ("num_seeds: 4", ValueError, "at least 5 for an interval, got 4"),
        ("betas: [2, 1]", ValueError, "betas must be positive and rise"),
        ("betas: [1, .inf]", ValueError, "betas must be positive and finite"),
        ("steps: 0", ValueError, "steps must be at least 1, got 0"),
        ("preferences: [15, 0]", ValueError, r"preferences must be at least 1, got \[15, 0\]"),
        ("num_actions: 1", ValueError, "num_actions must be at least 2"),
        ("demonstrations: 0", ValueError, "demonstrations must be at least 1, got 0"),
        ("kl_targets: [0, 1]", ValueError, "kl_targets must be positive and rise"),
        ("dispersions: [0.1, 0.5]", ValueError, "one of them above 0.5"),
        ("optimizers: [adamw]", ValueError, "adamw.*choose from adam, sgd"),
    ],
)
def test_options_that_are_refused(tmp_path, text, error, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(error, match=message):
        parse(["--config", str(tmp_path / "x.yaml")])
