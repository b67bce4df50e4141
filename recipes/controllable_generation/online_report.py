"""The report of online training: reward and KL round by round, as table, JSON file and a plot of each study."""

import numpy as np
import report
from matplotlib.figure import Figure

from reporting import plots_section, table, write_files
from reviews import MOVIE
from stats import half_width

TITLES = {"discriminator": "Discriminator-guided rounds", "advantages": "Learning from advantages"}
COLORS = ("#222222", "#0b62a4", "#d1570d", "#2a7f3f")
STYLES = ("-", "--", "-.", ":")
NOTE = (
    "Held-out movie prefixes. Means over seeds, prefixes and completions, with 95% percentile intervals from "
    "resampling seeds and prefixes together (none with fewer than three of either; with five seeds they are somewhat "
    "too narrow). Gain: reward above the reference's on the same prefixes. KL: nats a completion; a small one can "
    "come out negative."
)
ABOUT = {
    "discriminator": "Every method takes the same number of updates. Gold: trained on the pairs that gold was asked "
    "for, alone. Silver: a discriminator, refitted to all gold so far, orders the other pairs; asked are random pairs "
    "or those it is least certain of. All gold: what the answers to all pairs give. Labels: a round, mean over rounds "
    "and seeds; right: of the silver ones that are no gold ties, ± half a 95% interval over seeds.",
    "advantages": "Reward on the last token, the mean reward of a prefix as its value, whitened. The number is the "
    "temperature; APA is held to the reference by it, AWR is not.",
}
CAPTION = "Reward after each round, and against the KL that it costs; bars are 95% intervals, dotted: the reference."


def summarise(starts, runs):
    """{study: {method: {"rounds": [{"reward", "gain", "kl", "tokens"}], "minus_first", "labels"}}}.

    Args:
        starts: {"domains"} of the reference, one a seed. runs: ``method``, ``study``, ``seed`` and ``records``, the
            same seeds in the same order for every method.

    The list begins with the reference. "minus_first" has the differences in reward and KL after the last round to the
    study's first method; "labels" the mean number a round of each kind and the share of right silver ones.
    """
    studies = {}
    for name, study in dict.fromkeys((made["method"], made["study"]) for made in runs):
        records = [made["records"] for made in runs if made["method"] == name]
        rounds = [starts, *zip(*records, strict=True)]
        studies.setdefault(study, {})[name] = [report.measure(group, [MOVIE]) for group in rounds], records
    found = {}
    for study, methods in studies.items():
        first = next(iter(methods.values()))[0][-1]
        for name, (rounds, records) in methods.items():
            resampling = report.Resampling.draw(*first["reward"].shape)
            points = [
                {key: resampling.interval(values[key]) for key in ("reward", "kl", "tokens")}
                | {"gain": resampling.interval(values["reward"] - rounds[0]["reward"])}
                for values in rounds
            ]
            gaps = {key: resampling.interval(rounds[-1][key] - first[key]) for key in ("reward", "kl")}
            found.setdefault(study, {})[name] = {"rounds": points, "minus_first": gaps, "labels": _labels(records)}
    return found


def _labels(records):
    """Means of the counts of ``labels.label``, and the share of right silver labels; {} where nothing was labelled."""
    if "asked" not in records[0][0]:
        return {}
    counts = {
        name: float(np.mean([[record[name] for record in one] for one in records]))
        for name in ("pairs", "asked", "ties", "silver", "rows")
    }
    judged, right = (
        np.array([sum(record[name] for record in one) for one in records]) for name in ("judged", "right")
    )
    if not judged.all():
        return counts | {"right": None, "half": None}
    shares = right / judged
    half = float(half_width(shares)) if len(shares) > 1 else None
    return counts | {"right": float(shares.mean()), "half": half}


def write_report(output_dir, starts, runs, settings, versions):
    """Writes results.json, results.md and a plot of each study; returns the text."""
    studies = summarise(starts, runs)
    results = {"studies": studies, "samples": examples(runs), "settings": settings, "versions": versions}
    text = tables(studies, len(starts))
    write_files(output_dir, results, text, {name: plot(name, study) for name, study in studies.items()})
    return text


def examples(runs):
    """What each method of the first seed wrote in the end: the first completion of the first two prefixes."""
    return [
        {"method": made["method"], "text": group[0]}
        for made in runs
        if made["seed"] == runs[0]["seed"]
        for group in made["records"][-1]["domains"][MOVIE]["texts"][:2]
    ]


def tables(studies, seeds):
    """The text of results.md."""
    rounds = len(next(iter(next(iter(studies.values())).values()))["rounds"]) - 1
    lines = [f"# Online training on completed reviews: {rounds} rounds, {seeds} seeds\n", NOTE]
    for name, study in studies.items():
        first = next(iter(study))
        head = [f"reward, round {rounds}", "gain", f"minus {first}", "KL", f"minus {first}", "tokens"]
        rows, labelled = [], []
        for method, values in study.items():
            last, gaps = values["rounds"][-1], values["minus_first"]
            minus = ["", ""] if method == first else [report.cell(gaps[key], 3, "+") for key in ("reward", "kl")]
            cells = [report.cell(last["reward"], 3), report.cell(last["gain"], 3, "+"), minus[0]]
            cells += [report.cell(last["kl"], 2), minus[1], f"{last['tokens']['mean']:.1f}"]
            rows.append([method, *cells])
            if counts := values["labels"]:
                cells = [f"{counts[key]:.1f}" for key in ("pairs", "asked", "ties", "silver", "rows")]
                share = "" if counts["right"] is None else f"{counts['right']:.2f}"
                share += "" if counts["half"] is None else f" ± {counts['half']:.2f}"
                labelled.append([method, *cells, share])
        lines += [f"\n## {TITLES[name]}\n", ABOUT[name] + "\n", *table(["method", *head], rows)]
        if labelled:
            titles = ["method", "pairs", "asked", "ties of these", "silver", "trained on", "right"]
            lines += ["", *table(titles, labelled)]
    return "\n".join(lines) + "\n" + plots_section(dict.fromkeys(studies, CAPTION))


def plot(name, study):
    """Reward against round and reward against KL, a line a method."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    over, spent = figure.subplots(1, 2, sharey=True)
    for i, (method, values) in enumerate(study.items()):
        style = {"color": COLORS[i % len(COLORS)], "linestyle": STYLES[i // len(COLORS) % len(STYLES)]}
        style |= {"marker": "o", "markersize": 4, "elinewidth": 0.8, "label": method}
        points = values["rounds"]
        reward, kl = ([point[key]["mean"] for point in points] for key in ("reward", "kl"))
        shift = 0.06 * (i - (len(study) - 1) / 2)  # so that the bars of one round stand side by side
        over.errorbar([n + shift for n in range(len(points))], reward, yerr=_bars(points, "reward"), **style)
        spent.errorbar(kl[:-1], reward[:-1], **style | {"label": None})
        last = {"xerr": _bars(points[-1:], "kl"), "yerr": _bars(points[-1:], "reward")}
        spent.errorbar(kl[-2:], reward[-2:], **style | {"label": None, "marker": None})
        spent.errorbar(kl[-1:], reward[-1:], **last, **style | {"label": None, "linestyle": "none"})
    over.set(xlabel="round", ylabel="mean reward", title="Over the rounds", xticks=range(len(points)))
    spent.set(xlabel="KL to the reference (nats a completion)", title="What it costs, a point a round")
    for axes in (over, spent):
        axes.axhline(points[0]["reward"]["mean"], color="#999999", linestyle=":", linewidth=1, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(TITLES[name])
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return figure


def _bars(points, key):
    """[2, N] lengths of error bars, None without intervals."""
    bars = [report.bar(point[key]) for point in points]
    return None if bars[0] is None else np.concatenate(bars, axis=1)
