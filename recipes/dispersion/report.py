"""The report of the dispersion recipe: correlations and calibration with intervals, a table, a JSON file, plots."""

import math

import numpy as np
from data import by_domain, preference_share, real_dispersion, win_shares
from indices import PAPER
from matplotlib.figure import Figure
from preference import DPO, METHODS, PEOPLE

from mallowspo.dispersion import fit_log_odds
from reporting import plots_section, table, write_files
from reviews import DOMAINS
from stats import correlation, half_width, percentiles, ranks

RESAMPLES = 1000
BINS = 8
HALF, DISTANCE, SPREAD = "the other half of the raters", "distance of the mean scores", "scatter of the scores"


# ---- numbers -------------------------------------------------------------------------------------------------------


def people(pairs, seed=0):
    """What the ratings themselves say of each pair.

    Returns:
        dict of [P] arrays: ``agreement``, the share of rater pairs on the side of the majority, ties half; ``untied``,
        the same with ties left out (1/2 where all tie); ``tied``, their share; ``halves`` [2, P], the agreement from
        either half of each sentence's raters, split at random; ``distance`` of the mean scores; ``scatter``, the mean
        of the two standard deviations.
    """
    generator = np.random.default_rng(seed)
    result = {name: [] for name in ("agreement", "untied", "tied", "halves", "distance", "scatter")}
    for pair in pairs:
        scores = [np.array(sentence.ratings) for sentence in pair]
        mixed = [generator.permutation(s) for s in scores]
        halves = [[s[: len(s) // 2] for s in mixed], [s[len(s) // 2 :] for s in mixed]]
        shares = [preference_share(*sides) for sides in (scores, *halves)]
        whole, *split = (max(share, 1 - share) for share in shares)
        win, tied = win_shares(*scores)
        result["agreement"].append(whole)
        result["untied"].append(max(win, 1 - tied - win) / (1 - tied) if tied < 1 else 0.5)
        result["tied"].append(tied)
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
        {name: {"all": (value, low, high), <domain>: ..., "gain": ..., "untied": ..., "scatter": ...}}: ``gain`` over
        the paper's index, ``untied`` the correlation with the agreement without ties, ``scatter`` that with the
        scatter of the scores, sign turned. The indices come first, then what the ratings give: HALF (one half
        predicting the other), DISTANCE, SPREAD.
    """
    groups = by_domain(domains)
    one_half, other_half = facts["halves"]
    names = [*predicted, HALF, DISTANCE, SPREAD]
    columns = predicted | {HALF: one_half, DISTANCE: facts["distance"], SPREAD: -facts["scatter"]}
    columns |= {"half": other_half, "agreement": facts["agreement"], "untied": facts["untied"]}

    def once(groups):
        found = {}
        for part, rows in {"all": np.concatenate(list(groups.values())), **groups}.items():
            ranked = {name: ranks(values[rows]) for name, values in columns.items()}
            for name in names:
                found[name, part] = correlation(ranked[name], ranked["half" if name == HALF else "agreement"])
                if part == "all":
                    found[name, "untied"] = correlation(ranked[name], ranked["untied"])
                    found[name, "scatter"] = correlation(ranked[name], ranked[SPREAD])
        return found | {(name, "gain"): found[name, "all"] - found[PAPER, "all"] for name in names}

    value, generator = once(groups), np.random.default_rng(seed)
    draws = [
        once({domain: generator.choice(rows, len(rows)) for domain, rows in groups.items()}) for _ in range(RESAMPLES)
    ]
    result = {name: {} for name in names}
    for (name, what), number in value.items():
        result[name][what] = (number, *percentiles([draw[name, what] for draw in draws]))
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
    """How good a probability each index gives, with numbers that the other half of the pairs chose.

    ``scale``: sigmoid(2 scale index), the theta link with its dispersion scale; ``line``: with an offset too, the
    slope not below 0 (:func:`mallowspo.dispersion.fit_log_odds`).

    Returns:
        {name: {"scale" or "line": {"gain": (value, low, high), "fit": ..., "bins": [...]}}}: gain in nats a vote over
        the mean agreement alone, its interval from resampled pairs; fit of all pairs, the scale or (offset, slope);
        bins of equally many pairs by rising prediction: [predicted, actual, standard error].
    """
    generator = np.random.default_rng(seed)
    fold = generator.permutation(len(agreement)) % 2
    resamples = generator.integers(len(agreement), size=(RESAMPLES, len(agreement)))
    result = {}
    for name, index in predicted.items():
        result[name] = {}
        for kind in ("scale", "line"):
            share, constant = np.empty(len(index)), np.empty(len(index))
            for side in (0, 1):
                here, other = fold == side, fold != side
                offset, slope = _fit(kind, index[other], agreement[other])
                share[here] = _sigmoid(offset + slope * index[here])
                constant[here] = agreement[other].mean()
            share = share.clip(0.5, 1 - 1e-6)
            gain = _likelihood(share, agreement) - _likelihood(constant, agreement)
            bins = [
                [float(share[rows].mean()), float(agreement[rows].mean()), _standard_error(agreement[rows])]
                for rows in np.array_split(np.argsort(share, kind="stable"), min(BINS, len(index)))
            ]
            offset, slope = _fit(kind, index, agreement)
            fit = slope / 2 if kind == "scale" else (offset, slope)
            interval = (float(gain.mean()), *percentiles(gain[resamples].mean(1)))
            result[name][kind] = {"gain": interval, "fit": fit, "bins": bins}
    return result


def _fit(kind, index, agreement):
    return (0.0, fitted_scale(index, agreement)) if kind == "scale" else fit_log_odds(index, agreement)


def _likelihood(share, agreement):
    return agreement * np.log(share) + (1 - agreement) * np.log1p(-share)


def _standard_error(values):
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def seed_summary(seeds):
    """{method: {"log_likelihood", "accuracy", "gain", "gain_without"}}: (mean, low, high) over seeds.

    The gains are over DPO with the same seed, ``gain_without`` with the dispersion in training only. The intervals are
    Student's. Seeds share their sentences, so that another set of sentences may differ by more.
    """
    dpo = np.array([seed[DPO]["log_likelihood"] for seed in seeds])
    result = {}
    for method in (*METHODS, PEOPLE):
        columns = {what: np.array([seed[method][what] for seed in seeds]) for what in ("log_likelihood", "accuracy")}
        columns["gain"] = columns["log_likelihood"] - dpo
        if method != PEOPLE:
            columns["gain_without"] = np.array([seed[method]["without"] for seed in seeds]) - dpo
        result[method] = {what: _student(values) for what, values in columns.items()}
    return result


def domain_facts(pairs, predicted, facts):
    """{domain: {"pairs", "raters", "agreement", "tied", "real_phi", "entropy"}}: means over its pairs.

    ``raters`` of a sentence; ``real_phi``, the dispersion that the agreement stands for; ``entropy``, the mean token
    entropy over log V that the paper's index takes for it.
    """
    result = {}
    for domain, rows in by_domain([first.domain for first, _ in pairs]).items():
        raters = [len(sentence.ratings) for row in rows for sentence in pairs[row]]
        phi = np.exp(-real_dispersion(facts["agreement"][rows]))
        columns = {"raters": raters, "agreement": facts["agreement"][rows], "tied": facts["tied"][rows]}
        columns |= {"real_phi": phi, "entropy": np.exp(-predicted[PAPER][rows])}
        result[domain] = {"pairs": len(rows)} | {name: float(np.mean(values)) for name, values in columns.items()}
    return result


def _student(values):
    mean, half = float(values.mean()), float(half_width(values))
    return mean, mean - half, mean + half


# ---- files ---------------------------------------------------------------------------------------------------------


def write_report(output_dir, pairs, predicted, seeds, settings, versions):
    """Writes results.json, results.md, correlation.png, calibration.png, preference.png, each whole or not at all.

    Args:
        output_dir: made if missing. pairs: of ``data.draw_pairs``. predicted: {name: [P]} of ``agreement_indices``.
        seeds: of ``preference.run_seed``. settings, versions: dicts that JSON can hold, for the record.

    Returns:
        The text of results.md.
    """
    domains, facts = [first.domain for first, _ in pairs], people(pairs)
    found = correlations(predicted, facts, domains)
    scaled = calibration(predicted, facts["agreement"])
    trained = seed_summary(seeds)
    of_domains = domain_facts(pairs, predicted, facts)
    figures = {
        "correlation": (
            plot_correlations(found),
            "Rank correlation of each index with the raters' agreement, over all pairs and by domain, 95% intervals.",
        ),
        "calibration": (
            plot_calibration(scaled),
            "Raters' agreement against that which an index predicts, in bins of equally many pairs: with a scale, as "
            "in the paper (grey), and with an offset and a slope (colour).",
        ),
        "preference": (
            plot_preference(seeds, trained),
            "Gain over DPO in log-likelihood of votes not seen: each seed, the mean and its 95% interval.",
        ),
    }
    text = _table(found, scaled, trained, of_domains, seeds)
    text += plots_section({name: caption for name, (_, caption) in figures.items()})
    results = {"domains": of_domains, "correlation": found, "calibration": scaled, "preference": trained}
    results |= {"seeds": seeds, "settings": settings, "versions": versions}
    write_files(output_dir, results, text, {name: figure for name, (figure, _) in figures.items()})
    return text


def _interval(interval, digits=2, sign="+"):
    return "{:{f}} [{:{f}}, {:{f}}]".format(*interval, f=f"{sign}.{digits}f")


def _table(found, scaled, trained, of_domains, seeds):
    lines = ["# Human dispersion", "", "Means over the pairs of a domain; phi by the theta link, one rank apart.", ""]
    names = {"pairs": "", "raters": ".0f", "agreement": ".3f", "tied": ".3f", "real_phi": ".3f", "entropy": ".3f"}
    titles = ("pairs", "raters a sentence", "agreement", "tied", "real phi", "entropy / log V (the paper's phi)")
    rows = [[domain, *(format(row[name], form) for name, form in names.items())] for domain, row in of_domains.items()]
    lines += table(["domain", *titles], rows)
    lines += ["", "Spearman's correlation with the raters' agreement, 95% bootstrap intervals over pairs.", ""]
    columns = ["all", "gain", *of_domains, "untied", "scatter"]
    titles = {"gain": "over the paper's", "untied": "agreement without ties", "scatter": "scatter of the scores"}
    rows = []
    for name, row in found.items():
        left_out = {"gain"} if name == PAPER or name not in scaled else set()
        left_out |= {HALF: {"untied", "scatter"}, SPREAD: {"scatter"}}.get(name, set())
        rows.append([name, *("-" if what in left_out else _interval(row[what]) for what in columns)])
    lines += table(["index", *(titles.get(what, what) for what in columns)], rows)
    lines += [
        "",
        "The index as a probability: gain in log-likelihood (millinats a vote) over the mean agreement alone.",
    ]
    lines += ["Scale, offset and slope are those of the other half of the pairs.", ""]
    rows = [[name, *(_milli(row[kind]["gain"]) for kind in ("scale", "line"))] for name, row in scaled.items()]
    lines += table(["index", "with a scale, as in the paper", "with an offset and a slope >= 0"], rows)
    votes, tied = (np.mean([seed[what] for seed in seeds]) for what in ("votes", "tied"))
    lines += ["", f"Linear preference model, {len(seeds)} seeds, {votes:.0f} votes to train on ({tied:.0%} tied, left"]
    lines += [
        "out); untied votes of unseen raters on unseen sentences, mean and 95% interval over seeds. Gains over DPO"
    ]
    lines += ["in millinats a vote: with the dispersion told to the judge too, and used in training only.", ""]
    rows = []
    for method, row in trained.items():
        gains = ("-" if method == DPO or what not in row else _milli(row[what]) for what in ("gain", "gain_without"))
        rows.append((method, _interval(row["log_likelihood"], 4), *gains, _interval(row["accuracy"], 3, "")))
    lines += table(["dispersion", "log-likelihood", "gain, told", "gain, training only", "accuracy"], rows)
    return "\n".join([*lines, ""])


def _milli(interval):
    return _interval([1000 * number for number in interval], 1)


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
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    grid = figure.subplots(2, math.ceil(len(scaled) / 2), sharex=True, sharey=True).flatten()
    for axes, (name, row) in zip(grid, scaled.items(), strict=False):
        axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=0.8, linestyle=":")
        for kind, color in (("scale", GREY), ("line", ORANGE if name == PAPER else BLUE)):
            share, actual, error = np.array(row[kind]["bins"]).T
            axes.errorbar(share, actual, 1.96 * error, fmt="o", color=color, markersize=4, linewidth=1.2)
        gains = [1000 * row[kind]["gain"][0] for kind in ("scale", "line")]
        axes.set(title="{}\n{:+.1f} and {:+.1f} millinats".format(name, *gains), xlim=(0.48, 1.02), ylim=(0.48, 1.02))
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(scaled) :]:
        axes.set_visible(False)
    figure.suptitle(
        "Is it a probability? Grey: one scale, as in the paper; colour: offset and slope. Title: gain a vote"
    )
    figure.supxlabel("predicted agreement (fitted on the other half of the pairs)")
    figure.supylabel("raters' agreement, mean of a bin and 95% interval")
    return figure


def plot_preference(seeds, trained):
    """Gain of each method over DPO in the held-out log-likelihood: every seed, the mean and its interval."""
    names = [method for method in METHODS if method != DPO][::-1]
    figure = Figure(figsize=(11, 1.6 + 0.5 * len(names)), layout="constrained")
    kinds = {
        "log_likelihood": ("gain", "the judge knows the dispersion too"),
        "without": ("gain_without", "in training only"),
    }
    for axes, (what, (gain, title)) in zip(figure.subplots(1, 2, sharey=True), kinds.items(), strict=True):
        for i, name in enumerate(names):
            gains = [1000 * (seed[name][what] - seed[DPO][what]) for seed in seeds]
            color = ORANGE if name == PAPER else BLUE
            mean, low, high = (1000 * number for number in trained[name][gain])
            axes.plot(gains, np.full(len(gains), i - 0.18), "o", color=color, alpha=0.35, markersize=4)
            axes.hlines(i, low, high, color=color, linewidth=2)
            axes.plot(mean, i, "o", color=color)
        axes.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
        axes.set(yticks=range(len(names)), yticklabels=names, xlabel="millinats a vote over DPO", title=title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", linewidth=0.3)
    figure.suptitle("Log-likelihood of votes of raters not seen, on sentences not seen (small dots: one seed each)")
    return figure
