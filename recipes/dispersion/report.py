"""The report of the dispersion recipe: correlations and calibration with intervals, a table, a JSON file, plots."""

import io
import json
import math
from pathlib import Path

import numpy as np
from data import DOMAINS, by_domain, preference_share
from indices import PAPER
from matplotlib.figure import Figure
from preference import DPO, METHODS, PEOPLE

from mallowspo.files import write_whole

RESAMPLES = 2000
BINS = 8
HALF, DISTANCE, SPREAD = "the other half of the raters", "distance of the mean scores", "scatter of the scores"
# 97.5% quantiles of Student's t by degrees of freedom, 1 to 19; beyond, the last is a little too wide.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
T_975 += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)


# ---- numbers -------------------------------------------------------------------------------------------------------


def ranks(values):
    """Ranks from 1, ties at the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def rank_correlation(first, second):
    """Spearman's; 0 where either has only ties."""
    first, second = ranks(first), ranks(second)
    if not first.std() or not second.std():
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def people(pairs, seed=0):
    """What the ratings themselves say of each pair.

    Returns:
        dict of [P] arrays: ``agreement``, the share of rater pairs on the side of the majority, ties half; ``halves``
        [2, P], the same from either half of each sentence's raters, split at random; ``distance`` of the mean scores;
        ``scatter``, the mean of the two standard deviations.
    """
    generator = np.random.default_rng(seed)
    result = {"agreement": [], "halves": [], "distance": [], "scatter": []}
    for pair in pairs:
        scores = [np.array(sentence.ratings) for sentence in pair]
        mixed = [generator.permutation(s) for s in scores]
        halves = [[s[: len(s) // 2] for s in mixed], [s[len(s) // 2 :] for s in mixed]]
        shares = [preference_share(*sides) for sides in (scores, *halves)]
        whole, *split = (max(share, 1 - share) for share in shares)
        result["agreement"].append(whole)
        result["halves"].append(split)
        result["distance"].append(abs(scores[0].mean() - scores[1].mean()))
        result["scatter"].append((scores[0].std() + scores[1].std()) / 2)
    return {name: np.array(values).T for name, values in result.items()}


def correlations(predicted, facts, domains, seed=0):
    """Spearman's correlation of each index with the agreement of people, and 95% intervals.

    Intervals are percentiles over RESAMPLES bootstrap samples of the pairs, drawn within domains.

    Args:
        predicted: {name: [P]}. facts: of :func:`people`. domains: [P] names.

    Returns:
        {name: {"all": (value, low, high), <domain>: ..., "gain": ..., "scatter": ...}}: ``gain`` is over the paper's
        index, ``scatter`` the correlation with the scatter of the scores, sign turned. The indices come first, then
        what the ratings give: HALF (one half predicting the other), DISTANCE, SPREAD.
    """
    groups = by_domain(domains)
    columns = {name: (values, facts["agreement"]) for name, values in predicted.items()}
    columns |= {HALF: tuple(facts["halves"]), DISTANCE: (facts["distance"], facts["agreement"])}
    columns[SPREAD] = (-facts["scatter"], facts["agreement"])

    def once(groups):
        rows = np.concatenate(list(groups.values()))
        found = {}
        for name, (index, target) in columns.items():
            found[name, "all"] = rank_correlation(index[rows], target[rows])
            found[name, "scatter"] = rank_correlation(index[rows], -facts["scatter"][rows])
            for domain, part in groups.items():
                found[name, domain] = rank_correlation(index[part], target[part])
        return found | {(name, "gain"): found[name, "all"] - found[PAPER, "all"] for name in columns}

    value, generator = once(groups), np.random.default_rng(seed)
    draws = [
        once({domain: generator.choice(rows, len(rows)) for domain, rows in groups.items()}) for _ in range(RESAMPLES)
    ]
    result = {name: {} for name in columns}
    for (name, what), number in value.items():
        low, high = np.quantile([draw[name, what] for draw in draws], [0.025, 0.975])
        result[name][what] = (number, float(low), float(high))
    return result


def fitted_scale(index, agreement):
    """k >= 0 for which sigmoid(k index) gives the agreements the greatest likelihood; index [n] >= 0."""
    low, high = 0.0, 1e3 / max(float(np.mean(index)), 1e-12)
    for _ in range(100):  # the slope of the likelihood falls in k
        middle = (low + high) / 2
        rising = np.mean(index * (agreement - _sigmoid(middle * index))) > 0
        low, high = (middle, high) if rising else (low, middle)
    return (low + high) / 2


def _sigmoid(values):
    return 0.5 * (1 + np.tanh(values / 2))


def calibration(predicted, agreement, seed=0):
    """How good a probability each index gives, with one scale that the other half of the pairs chose.

    Returns:
        {name: {"gain": (value, low, high), "bins": [[predicted, actual, standard error], ...]}}: gain in nats a vote
        over the mean agreement alone, its interval from resampled pairs; bins of equally many pairs by rising index.
    """
    generator = np.random.default_rng(seed)
    fold = generator.permutation(len(agreement)) % 2
    result = {}
    for name, index in predicted.items():
        share, constant = np.empty(len(index)), np.empty(len(index))
        for side in (0, 1):
            here, other = fold == side, fold != side
            share[here] = _sigmoid(fitted_scale(index[other], agreement[other]) * index[here])
            constant[here] = agreement[other].mean()
        share = share.clip(0.5, 1 - 1e-6)
        gain = _likelihood(share, agreement) - _likelihood(constant, agreement)
        draws = generator.choice(gain, (RESAMPLES, len(gain))).mean(1)
        bins = [
            [float(share[rows].mean()), float(agreement[rows].mean()), _standard_error(agreement[rows])]
            for rows in np.array_split(np.argsort(share, kind="stable"), min(BINS, len(index)))
        ]
        low, high = np.quantile(draws, [0.025, 0.975])
        result[name] = {"gain": (float(gain.mean()), float(low), float(high)), "bins": bins}
    return result


def _likelihood(share, agreement):
    return agreement * np.log(share) + (1 - agreement) * np.log1p(-share)


def _standard_error(values):
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def seed_summary(seeds):
    """{method: {"log_likelihood", "accuracy", "gain"}}: (mean, low, high) over seeds; gain is of the log-likelihood
    over DPO's with the same seed. The intervals are Student's; seeds share their sentences."""
    result = {}
    for method in (*METHODS, PEOPLE):
        columns = {what: np.array([seed[method][what] for seed in seeds]) for what in ("log_likelihood", "accuracy")}
        columns["gain"] = columns["log_likelihood"] - [seed[DPO]["log_likelihood"] for seed in seeds]
        result[method] = {what: _student(values) for what, values in columns.items()}
    return result


def _student(values):
    half = T_975[min(len(values) - 2, len(T_975) - 1)] * _standard_error(values)
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


# ---- files ---------------------------------------------------------------------------------------------------------


def write_report(output_dir, pairs, predicted, seeds, settings, versions):
    """Writes results.json, results.md, correlation.png, calibration.png, preference.png, each whole or not at all.

    Args:
        output_dir: made if missing. pairs: of ``data.draw_pairs``. predicted: {name: [P]} of ``agreement_indices``.
        seeds: of ``preference.run_seed``. settings, versions: dicts that JSON can hold, for the record.

    Returns:
        The text of results.md.
    """
    output_dir = Path(output_dir)
    domains, facts = [first.domain for first, _ in pairs], people(pairs)
    found = correlations(predicted, facts, domains)
    scaled = calibration(predicted, facts["agreement"])
    trained = seed_summary(seeds)
    agreement = {domain: float(facts["agreement"][rows].mean()) for domain, rows in by_domain(domains).items()}
    text = _table(found, scaled, trained, agreement, seeds)
    results = {"pairs": len(pairs), "mean_agreement": agreement, "correlation": found, "calibration": scaled}
    results |= {"preference": trained, "seeds": seeds, "settings": settings, "versions": versions}
    write_whole(output_dir / "results.json", json.dumps(results, indent=2, allow_nan=False).encode())
    write_whole(output_dir / "results.md", text.encode())
    _write_figure(output_dir / "correlation.png", plot_correlations(found))
    _write_figure(output_dir / "calibration.png", plot_calibration(scaled))
    _write_figure(output_dir / "preference.png", plot_preference(seeds, trained))
    return text


def _write_figure(path, figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_whole(path, buffer.getvalue())


def _interval(interval, digits=2, sign="+"):
    return "{:{f}} [{:{f}}, {:{f}}]".format(*interval, f=f"{sign}.{digits}f")


def _table(found, scaled, trained, agreement, seeds):
    domains = list(agreement)
    mean = ", ".join(f"{domain} {share:.2f}" for domain, share in agreement.items())
    lines = ["# Human dispersion", "", f"Mean agreement on a pair: {mean}.", ""]
    lines += ["Spearman's correlation with the raters' agreement, 95% bootstrap intervals over pairs; and the gain in"]
    lines += ["log-likelihood (millinats a vote) of the index with a fitted scale over the mean agreement alone.", ""]
    lines += [f"| index | all | over the paper's | {' | '.join(domains)} | with the scatter | gain |"]
    lines += ["|---" * (5 + len(domains)) + "|"]
    for name, row in found.items():
        gain = "-"
        if name in scaled:
            gain = _interval([1000 * number for number in scaled[name]["gain"]], 1)
        over = "-" if name == PAPER or name not in scaled else _interval(row["gain"])
        scatter = "-" if name in (HALF, SPREAD) else _interval(row["scatter"])
        cells = (name, _interval(row["all"]), over, *(f"{row[domain][0]:+.2f}" for domain in domains), scatter, gain)
        lines.append("| " + " | ".join(cells) + " |")
    votes, tied = (np.mean([seed[what] for seed in seeds]) for what in ("votes", "tied"))
    lines += ["", f"Linear preference model, {len(seeds)} seeds, {votes:.0f} votes to train on ({tied:.0%} tied, left"]
    lines += ["out); votes of unseen raters on unseen sentences, mean and 95% interval over seeds.", ""]
    lines += ["| dispersion | log-likelihood (nats a vote) | over DPO (millinats) | accuracy |", "|---" * 4 + "|"]
    for method, row in trained.items():
        over = "-" if method == DPO else _interval([1000 * number for number in row["gain"]], 1)
        cells = (method, _interval(row["log_likelihood"], 4), over, _interval(row["accuracy"], 3, ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


# ---- plots ---------------------------------------------------------------------------------------------------------

BLUE, ORANGE, GREY = "#0b62a4", "#d1570d", "#777777"


def plot_correlations(found):
    """Each index's correlation with agreement, over all pairs and by domain, with 95% intervals."""
    titles = ["all", *(domain for domain in DOMAINS if domain in found[PAPER])]
    names = [name for name in found if name != SPREAD][::-1]
    figure = Figure(figsize=(3 + 2.3 * len(titles), 1.2 + 0.36 * len(names)), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(titles), sharey=True), titles, strict=True):
        for i, name in enumerate(names):
            value, low, high = found[name][title]
            color = ORANGE if name == PAPER else GREY if name in (HALF, DISTANCE) else BLUE
            axes.hlines(i, low, high, color=color, linewidth=2)
            axes.plot(value, i, "o", color=color)
        axes.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
        axes.set(title=title, yticks=range(len(names)), yticklabels=names, xlim=(-0.5, 1.02))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", linewidth=0.3)
    figure.suptitle("Does it know where people agree? Spearman's correlation with the raters' agreement\n"
                    "(orange: the paper's index; blue: other things the model says; grey: from ratings)")  # fmt: skip
    return figure


def plot_calibration(scaled):
    """Actual against predicted agreement of each index, in bins of equally many pairs."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    grid = figure.subplots(2, math.ceil(len(scaled) / 2), sharex=True, sharey=True).flatten()
    for axes, (name, row) in zip(grid, scaled.items(), strict=False):
        share, actual, error = np.array(row["bins"]).T
        axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=0.8, linestyle=":")
        color = ORANGE if name == PAPER else BLUE
        axes.errorbar(share, actual, 1.96 * error, fmt="o", color=color, markersize=4, linewidth=1.2)
        gain = 1000 * row["gain"][0]
        axes.set(title=f"{name}\n{gain:+.1f} millinats a vote", xlim=(0.48, 1.02), ylim=(0.48, 1.02))
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("predicted agreement (one scale, fitted on the other half of the pairs)")
    figure.supylabel("raters' agreement, mean of a bin and 95% interval")
    return figure


def plot_preference(seeds, trained):
    """Gain of each method over DPO in the held-out log-likelihood: every seed, the mean and its interval."""
    names = [method for method in trained if method != DPO][::-1]
    figure = Figure(figsize=(8.5, 1.4 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        gains = [1000 * (seed[name]["log_likelihood"] - seed[DPO]["log_likelihood"]) for seed in seeds]
        color = ORANGE if name == PAPER else GREY if name == PEOPLE else BLUE
        mean, low, high = (1000 * number for number in trained[name]["gain"])
        axes.plot(gains, np.full(len(gains), i - 0.18), "o", color=color, alpha=0.35, markersize=4)
        axes.hlines(i, low, high, color=color, linewidth=2)
        axes.plot(mean, i, "o", color=color)
    axes.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(
        yticks=range(len(names)), yticklabels=names, xlabel="millinats a vote over DPO (small dots: one seed each)"
    )
    axes.set_title("Votes of raters not seen, on sentences not seen: log-likelihood")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", linewidth=0.3)
    return figure
