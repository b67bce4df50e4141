"""The report of controllable generation: reward, KL and diversity with intervals, as table, JSON file and plots."""

from collections import Counter
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from reporting import table, write_files
from stats import at_kl, crossed_shares, percentiles

RESAMPLES = 2000
REFERENCE = "reference"
HOSTS = {
    "mallows-theta": "dpo",
    "mallows-phi": "dpo",
    "mallows-ipo": "ipo",
    "mallows-simpo": "simpo",
    "mallows-hinge": "hinge",
}
COLORS = ("#328cc1", "#b3331e", "#e58a3c", "#3f8f5b", "#7a5ba8", "#8a6d3b", "#d16ba5")
GREY = "#555555"
OUT = "out of distribution"
NOTE = (
    "Means over seeds, held-out prefixes and completions, with 95% percentile intervals from resampling seeds and "
    "prefixes together (none with fewer than three of either; with five seeds they are somewhat too narrow). KL: mean "
    "over drawn completions of log pi - log ref, summed over the tokens, in nats; unbiased, so a small one can come "
    "out negative. distinct-n: different n-grams of words over all of them in what one training writes for the domain."
)
CAPTIONS = {
    "frontier": "Reward against KL to the reference by domain: a line a method, from the reference (star) through its "
    "betas (labels); bars are 95% intervals, faint dots single seeds.",
    "diversity": "distinct-1, the share of different words, against KL to the reference, in the same manner.",
}


class Resampling(NamedTuple):
    """Weights of seeds [R, S] and of prefixes [R, P], rows of sum 1; None where there are too few for an interval."""

    seeds: np.ndarray | None
    prefixes: np.ndarray | None

    @classmethod
    def draw(cls, seeds, prefixes):
        """Both of :func:`stats.crossed_shares`."""
        if min(seeds, prefixes) < 3:
            return cls(None, None)
        return cls(*crossed_shares(seeds, prefixes, RESAMPLES))

    def means(self, values):
        """[R] resampled means of values [S, P], or of [S] over the seeds alone."""
        if values.ndim == 1:
            return self.seeds @ values
        return np.einsum("rs,sp,rp->r", self.seeds, values, self.prefixes, optimize=True)

    def interval(self, values):
        """{"mean", "low", "high"}; the last two None without weights."""
        return summary(values.mean(), None if self.seeds is None else self.means(values))


def summary(mean, resampled):
    """{"mean", "low", "high"}: a 95% percentile interval, None without resampled means."""
    low, high = (None, None) if resampled is None else percentiles(resampled)
    return {"mean": float(mean), "low": low, "high": high}


def distinct(texts, n):
    """Different word n-grams over all word n-grams of the texts together; 0 where there is none."""
    grams = Counter(
        gram for text in texts for gram in zip(*(text.lower().split()[i:] for i in range(n)), strict=False)
    )
    return len(grams) / max(1, grams.total())


def measure(runs, domains):
    """What the runs of one method and beta wrote in some domains.

    Args:
        runs: one a seed, with ``domains`` as of ``run.evaluate``.

    Returns:
        {"reward", "kl", "tokens": [S, P], mean over the completions of a prefix; "distinct-1", "distinct-2": [S]}
    """

    def stack(name):
        return np.array([[np.mean(group) for d in domains for group in run["domains"][d][name]] for run in runs])

    texts = [[text for d in domains for group in run["domains"][d]["texts"] for text in group] for run in runs]
    found = {"reward": stack("rewards"), "kl": stack("log_ratios"), "tokens": stack("tokens")}
    return found | {f"distinct-{n}": np.array([distinct(group, n) for group in texts]) for n in (1, 2)}


def summarise(runs):
    """Points and comparisons, domain by domain and for all but the first together.

    Args:
        runs: dicts with ``method``, ``beta`` (None for the reference), ``seed`` and ``domains``; the same seeds for
            every method and beta.

    Returns:
        (points, comparisons). A point has ``domain``, ``method``, ``beta``, six intervals (``gain``: reward above that
        of the reference on the same prefixes) and ``seeds``, the means of reward and KL of each. A comparison of a
        plug-in with its host has ``domain``, ``method``, ``host`` and either ``beta`` with the differences in reward
        and KL, or ``at_kl`` with the difference in reward on the two frontiers there, at the largest KL that both
        reach: a frontier goes from the reference at KL 0 from point to point, linear in the root of the KL.
    """
    names = list(runs[0]["domains"])
    groups = {name: [name] for name in names} | ({OUT: names[1:]} if len(names) > 2 else {})
    keys = list(dict.fromkeys((run["method"], run["beta"]) for run in runs))
    points, comparisons = [], []
    for group, domains in groups.items():
        found = {key: measure([run for run in runs if (run["method"], run["beta"]) == key], domains) for key in keys}
        resampling = Resampling.draw(*found[keys[0]]["reward"].shape)
        for (method, beta), values in found.items():
            intervals = {name: resampling.interval(value) for name, value in values.items()}
            intervals["gain"] = resampling.interval(values["reward"] - found[REFERENCE, None]["reward"])
            by_seed = {name: values[name].mean(1).tolist() for name in ("reward", "kl")}
            points.append({"domain": group, "method": method, "beta": beta, **intervals, "seeds": by_seed})
        for method, beta in keys:
            host = HOSTS.get(method)
            if (host, beta) in found:
                ours, theirs = found[method, beta], found[host, beta]
                gaps = {name: resampling.interval(ours[name] - theirs[name]) for name in ("reward", "kl")}
                comparisons.append({"domain": group, "method": method, "host": host, "beta": beta, **gaps})
        for method in dict.fromkeys(method for method, _ in keys if HOSTS.get(method) in dict(keys)):
            at, gap, resampled = frontier_gap(found, method, HOSTS[method], resampling)
            gap = {"at_kl": at, "reward": summary(gap, resampled)}
            comparisons.append({"domain": group, "method": method, "host": HOSTS[method], **gap})
    return points, comparisons


def frontier_gap(found, method, host, resampling):
    """Reward of the method minus that of its host at the largest KL that both reach: (KL, gap, [R] resampled gaps).

    Every resampling has its own largest KL, as every data set has.

    Args:
        found: {(method, beta): of :func:`measure`}, with the reference. resampling: without weights the last is None.
    """

    def gap(mean):
        curves = []
        for name in (method, host):
            points = [values for (other, _), values in found.items() if other in (name, REFERENCE)]
            kl, reward = (np.array([mean(values[key]) for values in points]) for key in ("kl", "reward"))
            order = np.argsort(kl, axis=0)
            curves.append([np.take_along_axis(values, order, 0) for values in (kl, reward)])
        at = np.minimum(*(kl[-1] for kl, _ in curves))
        ours, theirs = (at_kl(kl, reward, at) for kl, reward in curves)
        return at, ours - theirs

    (at,), (mean,) = gap(lambda values: [values.mean()])
    return float(at), float(mean), None if resampling.seeds is None else gap(resampling.means)[1]


def describe_pairs(rows, dropped, prefixes, completions, rewards):
    """What the stages before training gave, for the record."""
    flat = [c for group in completions for c in group]
    return {
        "prefixes": len(prefixes),
        "completions": len(flat),
        "finished": float(np.mean([c["finished"] for c in flat])),
        "mean_tokens": float(np.mean([len(c["ids"]) for c in flat])),
        "mean_reward": float(np.mean(np.concatenate(rewards))),
        "pairs": len(rows),
        "mean_gap": float(np.mean([row["chosen_reward"] - row["rejected_reward"] for row in rows])),
        "left_out": dropped,
    }


def describe(pairs):
    """The same as a sentence."""
    left_out = ", ".join(f"{number} {reason}" for reason, number in pairs["left_out"].items() if number)
    return (
        f"{pairs['pairs']} pairs from {pairs['completions']} completions of {pairs['prefixes']} prefixes (mean reward "
        f"{pairs['mean_reward']:+.3f}, mean gap of a pair {pairs['mean_gap']:.2f}); left out: {left_out or 'nothing'}."
    )


# ---- files ---------------------------------------------------------------------------------------------------------


def write_report(output_dir, runs, pairs, settings, versions):
    """Writes results.json, results.md, frontier.png and diversity.png, each whole or not at all.

    Args:
        runs: as of :func:`summarise`. pairs: of :func:`describe_pairs`. settings, versions: dicts for the record.

    Returns:
        The text of results.md.
    """
    points, comparisons = summarise(runs)
    results = {"pairs": pairs, "points": points, "comparisons": comparisons}
    results |= {"examples": examples(runs), "settings": settings, "versions": versions}
    text = _tables(points, comparisons, pairs, len({run["seed"] for run in runs}))
    write_files(output_dir, results, text, {"frontier": plot_frontier(points), "diversity": plot_diversity(points)})
    return text


def examples(runs):
    """The first completion of the first two prefixes of each domain, by each method and beta, of the first seed."""
    return [
        {"method": run["method"], "beta": run["beta"], "domain": domain, "text": group[0]}
        for run in runs
        if run["seed"] == runs[0]["seed"]
        for domain, found in run["domains"].items()
        for group in found["texts"][:2]
    ]


def _tables(points, comparisons, pairs, seeds):
    lines = [
        f"# Controllable generation: reward against KL, {seeds} seeds\n",
        describe(pairs) + "\n",
        NOTE,
        *(f"\n![{caption}]({name}.png)" for name, caption in CAPTIONS.items()),
    ]
    for domain in dict.fromkeys(point["domain"] for point in points):
        rows = []
        for p in points:
            if p["domain"] == domain:
                gain = "" if p["method"] == REFERENCE else cell(p["gain"], 3, "+")
                cells = [cell(p["reward"], 3), gain, cell(p["kl"], 2), cell(p["distinct-1"], 2)]
                beta = "" if p["beta"] is None else f"{p['beta']:g}"
                ends = f"{p['distinct-2']['mean']:.2f}", f"{p['tokens']['mean']:.1f}"
                rows.append([p["method"], beta, *cells, *ends])
        titles = ["method", "beta", "reward", "gain over the reference", "KL", "distinct-1", "distinct-2", "tokens"]
        lines += [f"\n## {domain}\n", *table(titles, rows)]
        rows = []
        for row in (row for row in comparisons if row["domain"] == domain):
            at, kl = f"KL {row['at_kl']:.2f}" if "at_kl" in row else f"beta {row['beta']:g}", row.get("kl")
            cells = cell(row["reward"], 3, "+"), cell(kl, 2, "+") if kl else "0, by interpolation"
            rows.append([f"{row['method']} - {row['host']}", at, *cells])
        if rows:
            lines += ["", *table(["plug-in - host", "at", "difference in reward", "difference in KL"], rows)]
    return "\n".join(lines) + "\n"


def cell(interval, places, sign=""):
    """The mean and its interval, as the tables have it."""
    mean, low, high = (
        None if interval[name] is None else f"{round(interval[name], places) + 0.0:{sign}.{places}f}"  # no -0.00
        for name in ("mean", "low", "high")
    )
    return mean if low is None else f"{mean} [{low}, {high}]"


def plot_frontier(points):
    """Reward against KL, one panel a domain: a line a method, 95% intervals, a faint dot a seed."""
    return _plot(points, "reward", "mean reward", "Reward against KL to the reference", seeds=True)


def plot_diversity(points):
    """distinct-1 against KL, in the same manner."""
    return _plot(points, "distinct-1", "distinct-1", "Diversity against KL to the reference", seeds=False)


def _plot(points, name, label, title, seeds):
    domains = [domain for domain in dict.fromkeys(point["domain"] for point in points) if domain != OUT]
    figure = Figure(figsize=(5 * min(2, len(domains)), 3.6 * -(-len(domains) // 2) + 0.8), layout="constrained")
    panels = figure.subplots(-(-len(domains) // 2), min(2, len(domains)), squeeze=False).flat
    methods = [m for m in dict.fromkeys(point["method"] for point in points) if m != REFERENCE]
    for axes, domain in zip(panels, domains, strict=False):
        shown = [point for point in points if point["domain"] == domain]
        start = next((point for point in shown if point["method"] == REFERENCE), None)
        for method, color in zip(methods, COLORS, strict=False):
            chosen = sorted((p for p in shown if p["method"] == method), key=lambda p: p["kl"]["mean"])
            path = ([start] if start else []) + chosen
            axes.plot([p["kl"]["mean"] for p in path], [p[name]["mean"] for p in path], color=color, linewidth=1)
            for p in chosen:
                at = {"x": p["kl"]["mean"], "y": p[name]["mean"]}
                bars = {f"{side}err": bar(p[key]) for side, key in (("x", "kl"), ("y", name))}
                axes.errorbar(**at, **bars, fmt="o", color=color, markersize=5, elinewidth=0.8, alpha=0.9)
                axes.annotate(f"{p['beta']:g}", (at["x"], at["y"]), (4, 4), textcoords="offset points", fontsize=7)
                if seeds:
                    axes.plot(p["seeds"]["kl"], p["seeds"][name], ".", color=color, alpha=0.3, markersize=4)
        if start:
            axes.errorbar(0, start[name]["mean"], yerr=bar(start[name]), fmt="*", color=GREY, markersize=10)
        axes.set(title=domain, xlabel="KL to the reference (nats a completion)", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(panels)[len(domains) :]:
        axes.set_visible(False)
    handles = [figure.axes[0].plot([], [], "o-", color=c, label=m)[0] for m, c in zip(methods, COLORS, strict=False)]
    handles.append(figure.axes[0].plot([], [], "*", color=GREY, markersize=10, label=REFERENCE)[0])
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    dots = ", dots: single seeds" if seeds else ""
    figure.suptitle(f"{title}\n(labels: beta; bars: 95% intervals{dots})", fontsize=11)
    return figure


def bar(interval):
    """Lengths of an error bar, never negative: the percentile interval need not hold the mean."""
    if interval["low"] is None:
        return None
    return [[max(0.0, interval["mean"] - interval["low"])], [max(0.0, interval["high"] - interval["mean"])]]
