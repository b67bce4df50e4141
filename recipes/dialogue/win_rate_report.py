"""The report of win_rates.py: win rates with their uncertainty and length taken out, tables, JSON, plots."""

from collections import defaultdict

import numpy as np
from matplotlib.figure import Figure
from report import BLUE, GREY, ORANGE, interval

from reporting import plots_section, table, write_files
from stats import crossed_shares, percentiles

RESAMPLES = 1000
ALL = "all"  # temperatures together
CAPTIONS = {
    "win_rates": "Win rates with 95% intervals over prompts and training seeds; hollow: at equal lengths.",
    "length_bias": "Left: win rate by how many tokens a reply has more than the other, all temperatures and places "
    "together. Right: mean length of the replies; dashed: topics held out of training.",
}
PRIOR_SD = 3.0  # of the coefficients of the length control: keeps them finite where one side wins everything

# ---- statistics ----------------------------------------------------------------------------------------------------


def length_controlled(wins, differences, weights):
    """The win rate at equal lengths: a logistic regression of the wins on the length difference, read at 0.

    As in AlpacaEval's length-controlled win rate, the regressor is tanh(difference / its standard deviation).

    Args:
        wins: [n] of 1, 1/2, 0. differences: [n] tokens, first less second.
        weights: [r, n] of r regressions, each with sum 1.

    Returns:
        [r] in (0, 1).
    """
    spread = differences.std() or 1.0
    x = np.tanh(differences / spread)
    intercept, slope = np.zeros((2, len(weights), 1))
    counts, precision = weights * len(wins), PRIOR_SD**-2
    for _ in range(30):  # Newton's method on a strictly concave log-posterior
        p = 1 / (1 + np.exp(-(intercept + slope * x)))
        residual, curvature = counts * (wins - p), counts * p * (1 - p)
        g0 = residual.sum(1, keepdims=True) - precision * intercept
        g1 = (residual * x).sum(1, keepdims=True) - precision * slope
        h00 = curvature.sum(1, keepdims=True) + precision
        h01 = (curvature * x).sum(1, keepdims=True)
        h11 = (curvature * x**2).sum(1, keepdims=True) + precision
        determinant = h00 * h11 - h01**2
        intercept = intercept + (h11 * g0 - h01 * g1) / determinant
        slope = slope + (h00 * g1 - h01 * g0) / determinant
    return 1 / (1 + np.exp(-intercept[:, 0]))


def summarise(wins, differences):
    """A win rate and what belongs to it.

    Args:
        wins: [seeds, prompts, temperatures] of 1, 1/2, 0. differences: the same shape, tokens, first less second.

    Returns:
        dict: ``win_rate`` and ``length_controlled``, each with ``_low`` and ``_high`` (95%, over prompts and seeds;
        None for fewer than three prompts or two seeds), ``ties``, ``length_difference`` (mean), ``length_correlation``
        (of win and difference; None where either is constant), ``comparisons``.
    """
    seeds, prompts, temperatures = wins.shape
    of_seeds, of_prompts = crossed_shares(seeds, prompts, RESAMPLES)
    shares = (of_seeds[:, :, None] * of_prompts[:, None]).reshape(RESAMPLES, -1)
    weights = np.repeat(shares / temperatures, temperatures, axis=1)
    even = np.full((1, wins.size), 1 / wins.size)
    won, lengths = wins.ravel(), differences.ravel().astype(float)
    estimates = {
        "win_rate": (won.mean(), weights @ won),
        "length_controlled": (length_controlled(won, lengths, even)[0], length_controlled(won, lengths, weights)),
    }
    summary = {}
    for name, (estimate, draws) in estimates.items():
        low, high = percentiles(draws) if prompts >= 3 and seeds >= 2 else (None, None)
        summary |= {name: float(estimate), f"{name}_low": low, f"{name}_high": high}
    constant = won.std() == 0 or lengths.std() == 0
    return summary | {
        "ties": float((won == 0.5).mean()),
        "length_difference": float(lengths.mean()),
        "length_correlation": None if constant else float(np.corrcoef(won, lengths)[0, 1]),
        "comparisons": wins.size,
    }


def by_length(wins, differences, bins=6):
    """Win rate by length difference: rows of ``difference`` (mean tokens), ``win_rate``, ``comparisons``.

    The parts are of about equal size; equal differences stay together.
    """
    won, lengths = wins.ravel(), differences.ravel()
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, bins + 1)[1:-1]))
    part = np.searchsorted(edges, lengths, side="right")
    return [
        {
            "difference": float(lengths[part == i].mean()),
            "win_rate": float(won[part == i].mean()),
            "comparisons": int((part == i).sum()),
        }
        for i in np.unique(part)
    ]


# ---- what was measured ---------------------------------------------------------------------------------------------


def describe_pairs(pairs, dropped):
    """Their number, the prompts without one by reason, and which side is longer."""
    chosen, rejected = (np.array([pair[f"{side}_tokens"] for pair in pairs]) for side in ("chosen", "rejected"))
    return {
        "pairs": len(pairs),
        "prompts_without": dict(dropped),
        "chosen_tokens": float(chosen.mean()),
        "rejected_tokens": float(rejected.mean()),
        "chosen_longer": float((chosen > rejected).mean()),
        "rejected_longer": float((chosen < rejected).mean()),
    }


def describe_training(logs):
    """{method: mean over the seeds of the numbers in the last log of training}."""
    by_method = defaultdict(list)
    for (method, _), log in logs.items():
        by_method[method].append(log)
    return {
        method: {name: float(np.mean([log[name] for log in found])) for name in found[0]}
        for method, found in by_method.items()
    }


def evaluate(rows, temperatures, said, scores, verdicts):
    """Tables of replies and of comparisons.

    Args:
        rows: [prompts] dicts with ``place``.
        temperatures: of the replies.
        said: {(model, seed): [temperature][prompt] replies}. scores: the same keys and shape, the judge's.
        verdicts: {(first, second, seed): [temperature][prompt] of 1, 1/2, 0}; "sft" has one seed, None.

    Returns:
        {"replies", "comparisons", "by_length"}: lists of dicts that JSON can hold.
    """
    places = np.array([row["place"] for row in rows])
    tokens = {key: np.array([[reply["tokens"] for reply in part] for part in found]) for key, found in said.items()}
    replies, comparisons, lengths = [], [], []
    for model in dict.fromkeys(model for model, _ in said):
        keys = [key for key in said if key[0] == model]
        for place in dict.fromkeys(places):
            columns = np.flatnonzero(places == place)
            for t, temperature in enumerate(temperatures):
                found = [said[key][t][column] for key in keys for column in columns]
                replies.append(
                    {
                        "model": model,
                        "place": place,
                        "temperature": temperature,
                        "tokens": float(np.mean([reply["tokens"] for reply in found])),
                        "finished": float(np.mean([reply["finished"] for reply in found])),
                        "score": float(np.mean([scores[key][t][column] for key in keys for column in columns])),
                    }
                )
    for first, second in dict.fromkeys(key[:2] for key in verdicts):
        seeds = [seed for a, b, seed in verdicts if (a, b) == (first, second)]
        wins = np.array([verdicts[first, second, seed] for seed in seeds])  # [seeds, temperatures, prompts]
        differences = np.array(
            [tokens[first, seed] - tokens[second, None if second == "sft" else seed] for seed in seeds]
        )
        names = {"first": first, "second": second}
        lengths += [names | part for part in by_length(wins, differences)]
        for place in dict.fromkeys(places):
            here = [np.moveaxis(table[:, :, places == place], 1, 2) for table in (wins, differences)]
            for temperature in [*temperatures, ALL] if len(temperatures) > 1 else temperatures:
                part = slice(None) if temperature == ALL else [temperatures.index(temperature)]
                summary = summarise(*(table[..., part] for table in here))
                comparisons.append(names | {"place": place, "temperature": temperature, "seeds": len(seeds)} | summary)
    return {"replies": replies, "comparisons": comparisons, "by_length": lengths}


# ---- files ---------------------------------------------------------------------------------------------------------


def write_report(output_dir, results):
    """Writes results.json, results.md, win_rates.png, length_bias.png, each whole; returns the text of results.md."""
    text = _text(results)
    figures = {"win_rates": plot_win_rates(results), "length_bias": plot_length_bias(results)}
    write_files(output_dir, results, text, figures)
    return text


def _text(results):
    """The text of results.md."""
    pairs = results["pairs"]
    without = "; ".join(f"{count} prompts without one: {reason}" for reason, count in pairs["prompts_without"].items())
    lines = ["# Dialogue: win rates", "", f"Judge: {results['judge'].splitlines()[0]}.", ""]
    lines += [
        f"{pairs['pairs']} on-policy pairs{f' ({without})' if without else ''}. The chosen reply is the longer one in "
        f"{pairs['chosen_longer']:.0%}, the shorter one in {pairs['rejected_longer']:.0%}; mean tokens "
        f"{pairs['chosen_tokens']:.1f} and {pairs['rejected_tokens']:.1f}.",
        "",
        "Win rates (ties count half), 95% intervals over prompts and training seeds, both resampled (none with fewer "
        "than three prompts or two seeds). "
        "Length-controlled: a logistic regression on the length difference, read at 0.",
        "",
    ]
    columns = ("", "where", "temperature", "win rate", "length-controlled", "ties", "more tokens", "comparisons")
    rows = [
        (
            f"{row['first']} against {row['second']}",
            row["place"],
            row["temperature"],
            interval(row, "win_rate"),
            interval(row, "length_controlled"),
            f"{row['ties']:.0%}",
            f"{row['length_difference']:+.1f}",
            row["comparisons"],
        )
        for row in results["comparisons"]
    ]
    lines += [*table(columns, rows), "", "Replies, means over prompts and seeds.", ""]
    columns = ("model", "where", "temperature", "tokens", "came to an end", "judge's score")
    rows = [
        (
            *(row[name] for name in ("model", "place", "temperature")),
            f"{row['tokens']:.1f}",
            f"{row['finished']:.0%}",
            f"{row['score']:.3f}",
        )
        for row in results["replies"]
    ]
    return "\n".join([*lines, *table(columns, rows), plots_section(CAPTIONS)])


# ---- plots ---------------------------------------------------------------------------------------------------------

COLORS = (BLUE, ORANGE, "#3b7d3b", "#7a4fa3", "#a33f5f", GREY)


def _colors(rows):
    return dict(zip(dict.fromkeys((row["first"], row["second"]) for row in rows), COLORS * 9, strict=False))


def plot_win_rates(results):
    """Win rate against temperature by place, with 95% intervals; hollow: length-controlled."""
    rows = [row for row in results["comparisons"] if row["temperature"] != ALL]
    colors, places = _colors(rows), list(dict.fromkeys(row["place"] for row in rows))
    temperatures = sorted({row["temperature"] for row in rows})
    figure = Figure(figsize=(1.5 + 4.5 * len(places), 4.8), layout="constrained")
    for axes, place in zip(figure.subplots(1, len(places), sharey=True, squeeze=False)[0], places, strict=True):
        for i, ((first, second), color) in enumerate(colors.items()):
            part = [row for row in rows if (row["first"], row["second"], row["place"]) == (first, second, place)]
            for name, shift, style in (("win_rate", 0.0, "full"), ("length_controlled", 0.4, "none")):
                label = f"{first} against {second}" if name == "win_rate" else None
                for row in part:
                    x = temperatures.index(row["temperature"]) + 0.8 * (i + shift + 0.3) / len(colors) - 0.4
                    if row[f"{name}_low"] is not None:
                        axes.vlines(x, row[f"{name}_low"], row[f"{name}_high"], color=color, linewidth=1.5)
                    axes.plot(x, row[name], "o", color=color, fillstyle=style, label=label)
                    label = None
        axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(temperatures)), temperatures)
        axes.set(title=place, xlabel="sampling temperature", ylim=(0, 1))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("win rate, 95% interval\n(hollow: length-controlled)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    return figure


def plot_length_bias(results):
    """Left: win rate by length difference; right: mean length of the replies by temperature."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = _colors(results["by_length"])
    for (first, second), color in colors.items():
        part = [row for row in results["by_length"] if (row["first"], row["second"]) == (first, second)]
        points = [[row[name] for row in part] for name in ("difference", "win_rate")]
        left.plot(*points, color=color, marker="o", label=f"{first} against {second}")
    left.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    left.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
    left.set(title="Does the judge like long replies?", xlabel="tokens more than the other reply", ylabel="win rate")
    left.set_ylim(0, 1)
    for model in dict.fromkeys(row["model"] for row in results["replies"]):
        color = colors.get((model, "sft"), GREY)
        for place, style in zip(dict.fromkeys(row["place"] for row in results["replies"]), ("-", "--"), strict=False):
            part = [row for row in results["replies"] if (row["model"], row["place"]) == (model, place)]
            points = [[row[name] for row in part] for name in ("temperature", "tokens")]
            right.plot(*points, style, color=color, marker="o", label=f"{model}, {place}")
    right.set(title="Length of the replies", xlabel="sampling temperature", ylabel="mean tokens")
    right.set_ylim(0, 1.1 * max(row["tokens"] for row in results["replies"]) + 1)
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
