"""The report of the bandit recipe: comparisons with DPO at equal KL, seed by seed; a table, a JSON file and plots."""

import math
from dataclasses import asdict

import numpy as np
from experiment import METHODS
from matplotlib.figure import Figure

import stats
from reporting import finite, plots_section, table, write_files
from stats import mean_and_half, spearman

# Key in METRICS of experiment.py, name in the table and on the axes, and whether more is better.
COMPARED = (
    ("optimal", "share of the optimal action", True),
    ("reward", "expected reward", True),
    ("win_rate", "win rate over the reference", True),
    ("entropy_contested", "entropy where phi > 1/2", True),
    ("top_choice_distance", "distance from the people's first choices", False),
)
TITLES = {name: title for name, title, _ in COMPARED}
STYLES = {
    "dpo": {"color": "#222222"},
    "ipo": {"color": "#8a8a8a"},
    "theta, true": {"color": "#0b62a4"},
    "theta, estimated": {"color": "#0b62a4", "linestyle": "--"},
    "phi, true": {"color": "#d1570d"},
    "phi, estimated": {"color": "#d1570d", "linestyle": "--"},
}
GREEN = "#2a7f3f"


# ---- numbers -------------------------------------------------------------------------------------------------------


def at_kl(kl, values, reference, target):
    """:func:`stats.at_kl` of a method: between the largest beta that spends the target and the next one.

    Args:
        kl: [B, S] by rising beta. values: [B, S, ...]. reference: [S, ...] at KL 0.
    """
    kl = np.concatenate([np.zeros_like(kl[:1]), kl[::-1]])
    return stats.at_kl(kl, np.concatenate([reference[None], values[::-1]]), target)


def estimate_summary(raw, true):
    """How well the reference's entropy tells the dispersion.

    Args:
        raw: [S, C] estimates with scale 1. true: [C].

    Returns:
        dict: "true"; "raw" and, over seeds, "spearman" (rank correlation over contexts), "scale" (the best factor, by
        least squares) and "r2" (share of the variance of the truth that it then explains), each mean and half-width.
    """
    scale = (raw * true).sum(-1) / np.square(raw).sum(-1)
    r2 = 1 - np.square(scale[:, None] * raw - true).sum(-1) / np.square(true - true.mean()).sum()
    ranks = np.array([spearman(row, true) for row in raw])
    found = {"raw": raw, "spearman": ranks, "scale": scale, "r2": r2}
    return {"true": true.tolist()} | {name: mean_and_half(values) for name, values in found.items()}


def middle(targets):
    """The KL of the table and of the plots that are at one KL."""
    return targets[len(targets) // 2]


def summarise(steps, history, reference, options):
    """One setting in numbers.

    Args:
        steps, history: of ``experiment.train``, as arrays. reference: {metric: [S, C]}. options: ``run.Options``.

    Returns:
        dict. "final": each method's metrics over betas. "matched": at each KL of ``kl_targets``, with "minus_dpo", the
        difference seed by seed. At the middle one of these "entropy_by_dispersion", and "training" over "steps": the
        curves of the two betas around it, mixed as their ends are. "reference": the same metrics of the reference.
        Numbers are means over seeds with the half-widths of their 95% intervals.
    """
    contested = np.array(options.dispersions) > 0.5
    per_context = [found | {"entropy_contested": found["entropy"][..., contested]} for found in (history, reference)]
    history, reference = ({name: values.mean(-1) for name, values in found.items()} for found in per_context)
    entropies, reference_entropy = (found["entropy"] for found in per_context)
    at_start = {name: np.repeat(values[:, None], len(steps), axis=1) for name, values in reference.items()}
    target = middle(options.kl_targets)
    result = {"steps": steps, "final": {}, "training": {}, "matched": {}}
    result["reference"] = {name: mean_and_half(values) for name, values in reference.items()}
    result["entropy_by_dispersion"] = {"reference": mean_and_half(reference_entropy)}
    for i, method in enumerate(METHODS):
        curves = {name: np.moveaxis(values[:, i], 0, -1) for name, values in history.items()}  # [B, S, T]
        kl = curves["kl"][..., -1]
        result["final"][method] = {name: mean_and_half(values[..., -1].T) for name, values in curves.items()}
        result["training"][method] = {
            name: mean_and_half(at_kl(kl, curves[name], at_start[name], target)) for name in TITLES
        }
        entropy = at_kl(kl, entropies[-1, i], reference_entropy, target)
        result["entropy_by_dispersion"][method] = mean_and_half(entropy)
    for kl_target in options.kl_targets:
        matched = {
            method: {
                name: at_kl(history["kl"][-1, i], history[name][-1, i], reference[name], kl_target) for name in TITLES
            }
            for i, method in enumerate(METHODS)
        }
        result["matched"][str(kl_target)] = {
            method: {
                name: mean_and_half(value) | {"minus_dpo": mean_and_half(value - matched["dpo"][name])}
                for name, value in row.items()
            }
            for method, row in matched.items()
        }
    return result


# ---- files ---------------------------------------------------------------------------------------------------------


def write_report(settings, estimates, options, versions):
    """Writes results.json, results.md and the plots into ``options.output_dir``, each whole or not at all.

    Args:
        settings: {(distance, preferences, optimizer): of :func:`summarise`}. estimates: of ``run.measure_estimates``.
        options: ``run.Options``. versions: dict of str, for the record.

    Returns:
        The text of results.md.
    """
    target = middle(options.kl_targets)
    results = {
        "results": {", ".join(map(str, key)): value for key, value in settings.items()},
        "estimates": estimates,
        "settings": asdict(options),
        "versions": versions,
    }
    figures = {
        "dispersion_estimate": (
            plot_estimates(estimates),
            "The reference's entropy as an estimate of the dispersion, over contexts.",
        ),
        "entropy": (
            plot_entropy(settings, estimates, options.dispersions),
            f"Policy entropy by context, each method at an average KL of {target} nats.",
        ),
    }
    for name, title in list(TITLES.items())[:2]:
        figures[f"frontier_{name}"] = (
            plot_frontier(settings, name, title),
            f"Frontier: {title} against KL to the reference, one point a beta, from the reference on the left.",
        )
        figures[f"gain_{name}"] = (
            plot_gain(settings, name, title, options.kl_targets),
            f"The same as a difference to DPO at equal KL, seed by seed: {title}.",
        )
    for name in ("reward", "entropy_contested"):
        figures[f"training_{name}"] = (
            plot_training(settings, name, TITLES[name]),
            f"Training: {TITLES[name]}, for policies that end at an average KL of {target} nats.",
        )
    text = _table(settings, estimates, options)
    text += plots_section({name: caption for name, (_, caption) in figures.items()})
    write_files(options.output_dir, finite(results), text, {name: figure for name, (figure, _) in figures.items()})
    return text


def _table(settings, estimates, options):
    """The tables of results.md: the estimate, and every setting at the middle KL."""
    lines = ["# Bandit", "", f"Means and 95% t intervals over {options.num_seeds} seeds.", ""]
    lines += ["## The dispersion estimate", ""]
    titles = ["distance", "rank correlation with the truth", "R2 with the best scale", "best scale"]
    names = ("spearman", "r2", "scale")
    lines += table(titles, [[distance, *(plain(row[name]) for name in names)] for distance, row in estimates.items()])
    target = middle(options.kl_targets)
    lines += ["", f"## At a KL of {target} nats to the reference, averaged over contexts", ""]
    lines += ["DPO's rows: means. The others: difference to DPO, seed by seed; ▲ better, ▼ worse beyond the interval."]
    rows = {}
    for (distance, preferences, optimizer), setting in settings.items():
        rows.setdefault(f"### {distance}, {preferences} preferences a context", []).extend(
            (optimizer, method, *(cell(method, row[name], more) for name, _, more in COMPARED))
            for method, row in setting["matched"][str(target)].items()
        )
    for heading, found in rows.items():
        lines += ["", heading, "", *table(["optimizer", "method", *TITLES.values()], found)]
    return "\n".join([*lines, ""])


def plain(value):
    return f"{value['mean']:.3f} ± {value['half']:.3f}"


def cell(method, value, more_is_better):
    if math.isnan(value["mean"]):
        return "not reached"
    if method == "dpo":
        return plain(value)
    difference, half = value["minus_dpo"]["mean"], value["minus_dpo"]["half"]
    if math.isnan(difference):
        return f"{plain(value)}, DPO not reached"
    verdict = ""
    if abs(difference) > half:
        verdict = " ▲" if (difference > 0) == more_is_better else " ▼"
    return f"{difference:+.3f} ± {half:.3f}{verdict}"


# ---- plots ---------------------------------------------------------------------------------------------------------


def plot_estimates(estimates):
    """Estimated against true neg-log dispersion, one panel a distance."""
    figure = Figure(figsize=(4.8 * len(estimates), 4.2), layout="constrained")
    panels = figure.subplots(1, len(estimates), squeeze=False)[0]
    for axes, (distance, found) in zip(panels, estimates.items(), strict=True):
        scale, raw = found["scale"]["mean"], found["raw"]
        axes.axline((0, 0), slope=1, color="#777777", linewidth=0.8, linestyle=":", label="truth")
        axes.plot(found["true"], found["limit"], color="#222222", label="scale 1, all people asked")
        axes.errorbar(found["true"], raw["mean"], raw["half"], fmt="o", color="#0b62a4", markersize=4, label="sampled")
        scaled = scale * np.array(raw["mean"])
        axes.plot(found["true"], scaled, "x", color="#d1570d", label=f"sampled, best scale {scale:.2f}")
        axes.set(title=distance, xlabel="true -log phi", ylabel="estimated -log phi")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _panels(settings, xlabel, ylabel):
    """A figure with a panel a setting: a row for distance and preferences, a column for the optimizer.

    Returns:
        (figure, [(axes, (key, setting)), ...])
    """
    optimizers = list(dict.fromkeys(optimizer for _, _, optimizer in settings))
    rows = len(settings) // len(optimizers)
    figure = Figure(figsize=(4.8 * len(optimizers), 2.9 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, len(optimizers), squeeze=False, sharey="row")
    for axes, (distance, preferences, optimizer) in zip(grid.flat, settings, strict=True):
        axes.set_title(f"{distance}, {preferences} preferences, {optimizer}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelleft=True)
    for axes in grid[-1]:
        axes.set_xlabel(xlabel)
    figure.supylabel(ylabel, fontsize="medium")
    return figure, list(zip(grid.flat, settings.items(), strict=True))


def _legend(figure, panels):
    axes = panels[0][0]
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _curve(axes, x, values, method):
    mean, half = np.array(values["mean"], float), np.array(values["half"], float)
    axes.plot(x, mean, **STYLES[method], label=method, marker="o", markersize=3, linewidth=1.2)
    axes.fill_between(x, mean - half, mean + half, color=STYLES[method]["color"], alpha=0.08, linewidth=0)


def plot_entropy(settings, estimates, dispersions):
    """Policy entropy against the dispersion of the context, all methods at the same average KL."""
    figure, panels = _panels(settings, "true phi", "entropy / log K")
    for axes, ((distance, _, _), setting) in panels:
        entropies = dict(setting["entropy_by_dispersion"])
        axes.plot(dispersions, entropies.pop("reference")["mean"], color=GREEN, label="reference")
        people = estimates[distance]["people_entropy"]
        axes.plot(dispersions, people, color=GREEN, linestyle=":", label="people's first choices")
        for method, values in entropies.items():
            _curve(axes, dispersions, values, method)
        axes.set_ylim(0, 1.02)
    return _legend(figure, panels)


def plot_frontier(settings, metric, title):
    """A metric against the KL to the reference, one curve a method: from the reference at KL 0 through falling betas.

    It ends at the greatest KL; still smaller betas train too slowly to get there.
    """
    figure, panels = _panels(settings, "KL to the reference (nats)", title)
    for axes, (_, setting) in panels:
        start = setting["reference"][metric]
        for method, final in setting["final"].items():
            kl = final["kl"]["mean"]
            kept = range(len(kl) - 1, int(np.argmax(kl)) - 1, -1)
            values = {name: [start[name], *(final[metric][name][i] for i in kept)] for name in ("mean", "half")}
            _curve(axes, [0, *(kl[i] for i in kept)], values, method)
    return _legend(figure, panels)


def plot_gain(settings, metric, title, targets):
    """The difference of a metric to DPO's, seed by seed, at equal KL."""
    figure, panels = _panels(settings, "KL to the reference (nats)", f"{title}, minus DPO's")
    for axes, (_, setting) in panels:
        axes.axhline(0, color=STYLES["dpo"]["color"], linewidth=0.8)
        for i, method in enumerate(list(METHODS)[1:]):
            gains = [setting["matched"][str(target)][method][metric]["minus_dpo"] for target in targets]
            mean, half = (np.array([gain[name] for gain in gains], float) for name in ("mean", "half"))
            beside = np.array(targets) * 1.07 ** (i - 2)  # so that the bars do not hide each other
            axes.errorbar(beside, mean, half, **STYLES[method], label=method, marker="o", markersize=3, linewidth=1)
        axes.set(xscale="log", xlim=(targets[0] / 1.3, targets[-1] * 1.3))
        axes.set_xticks(targets, map(str, targets))
        axes.minorticks_off()
    return _legend(figure, panels)


def plot_training(settings, metric, title):
    """A metric over the steps, of policies that end at the same KL."""
    figure, panels = _panels(settings, "step", title)
    for axes, (_, setting) in panels:
        for method, curves in setting["training"].items():
            _curve(axes, setting["steps"], curves[metric], method)
        axes.set_xscale("symlog")
    return _legend(figure, panels)
