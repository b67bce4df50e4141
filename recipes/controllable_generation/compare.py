"""Every preset of the library, and a few compositions, in controllable generation: the same pairs, steps and LoRA.

    python recipes/controllable_generation/compare.py                                   # compare.yaml
    python recipes/controllable_generation/compare.py --seeds 10 --grid '{"dpo": [0.3, 1, 3, 10]}'

Each is trained at its own beta, dpo at those of the grid too: its frontier, against which the others are held at their
own KL. The options are run.py's, and so are the stages. Completes held-out movie reviews alone. Writes results.json,
results.md and comparison.png into output_dir.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the recipes share
import report
import run

from mallowspo import preset, presets
from methods import COMPOSITIONS
from options import config_field
from reporting import plots_section, table, write_files

DPO = "dpo"
AT_EQUAL = {"equal_steps": "equal steps", "equal_kl": "equal KL"}  # ways to compare with dpo
BLACK, COLORS = "#222222", {"equal_steps": "#0b62a4", "equal_kl": "#d1570d"}
NOTES = (
    "Means over seeds, held-out prefixes and completions, with 95% percentile intervals from resampling seeds and "
    "prefixes together; with five seeds they are somewhat too narrow, and the pairs are the same in all.",
    "KL: nats a completion; a small one can come out negative. Gain: reward above the reference's. Equal steps: "
    "against dpo at its own beta. Equal KL: against dpo's frontier, from the reference through its betas, at the KL "
    "of the preset or, if dpo nowhere goes as far, at its largest, on the preset's own way from the reference; both "
    "are linear in the root of the KL.",
    "▲ higher, ▼ lower than dpo's, beyond the interval; bold: also beyond intervals that hold for all at once.",
)
CAPTION = "Dots are means, bars 95% intervals, each by itself; dotted: dpo at its own beta."


@dataclass
class Options(run.RecipeArguments):
    config: str = config_field(__file__, "compare.yaml")
    grid: str = field(default='{"dpo": [0.3, 1.0, 3.0]}', metadata={"help": "More betas of dpo, as JSON."})


def points_of(grid):
    """[(preset, beta), ...]: every preset and composition at its own beta, dpo at those of the grid too.

    Raises:
        ValueError: the grid has another preset.
    """
    others = sorted({method for method, _ in grid} - {DPO})
    if others:
        raise ValueError(f"the comparison's grid has betas of dpo alone, got {', '.join(others)}; run.py takes others")
    own = [(name, preset(name).beta) for name in (DPO, *presets(), *COMPOSITIONS)]
    return list(dict.fromkeys([own[0], *grid, *own]))


# ---- numbers -------------------------------------------------------------------------------------------------------


def summarise(runs):
    """The rows of the table: of the reference, then of each (preset, beta).

    Args:
        runs: of ``run.train_and_evaluate``.

    Returns:
        dicts of ``method``, ``beta``, the intervals of ``report.measure`` and ``gain``, and ``minus_dpo``:
        {"equal_steps", "equal_kl": difference in reward, {"mean", "low", "high", "at_once"}; "at_kl"}, empty for the
        reference and dpo. At_once: whether it is beyond intervals that hold for all presets together; None without.
    """
    groups = {}
    for made in runs:
        groups.setdefault((made["method"], made["beta"]), []).append(made)
    found = {key: report.measure(group, [run.MOVIE]) for key, group in groups.items()}
    reference, dpo = found[report.REFERENCE, None], found[DPO, preset(DPO).beta]
    resampling = report.Resampling.draw(*dpo["reward"].shape)
    rows = []
    for (method, beta), values in found.items():
        intervals = {name: resampling.interval(value) for name, value in values.items()}
        intervals["gain"] = resampling.interval(values["reward"] - reference["reward"])
        rows.append({"method": method, "beta": beta, **intervals, "minus_dpo": {}})
    compared = [row for row in rows if row["method"] not in (report.REFERENCE, DPO)]
    differences = {way: [] for way in AT_EQUAL}
    for row in compared:
        gap = found[row["method"], row["beta"]]["reward"] - dpo["reward"]
        resampled = None if resampling.seeds is None else resampling.means(gap)
        differences["equal_steps"].append((gap.mean(), resampled))
        row["minus_dpo"]["at_kl"], *gap = report.frontier_gap(found, row["method"], DPO, resampling)
        differences["equal_kl"].append(gap)
    for way, gaps in differences.items():
        for row, gap, at_once in zip(compared, gaps, beyond_at_once(gaps), strict=True):
            row["minus_dpo"][way] = report.summary(*gap) | {"at_once": at_once}
    return rows


def beyond_at_once(gaps):
    """Whether each gap is beyond zero in intervals of equal width in standard deviations that hold together in 95%.

    Args:
        gaps: (mean, [R] resampled means or None) of each, from the same resampling.

    Returns:
        list of bool, or of None without resampled means.
    """
    if gaps[0][1] is None:
        return [None] * len(gaps)
    means, resampled = np.array([mean for mean, _ in gaps]), np.array([values for _, values in gaps])
    deviations = resampled.std(1)
    varies = deviations > 0  # not what is dpo to the bit
    away = np.abs(resampled - means[:, None])[varies] / deviations[varies, None]
    width = np.quantile(away.max(0), 0.95) if varies.any() else 0.0
    return (np.abs(means) > width * deviations).tolist()


def sign(interval):
    """1 or -1 where zero is outside of the interval, else 0."""
    if interval["low"] is None:
        return 0
    return int(interval["low"] > 0) - int(interval["high"] < 0)


# ---- report --------------------------------------------------------------------------------------------------------


def write_comparison(output_dir, runs, pairs, settings, versions):
    """Writes results.json, results.md and comparison.png; the text of results.md. Arguments as of report's."""
    rows = summarise(runs)
    results = {"rows": rows, "pairs": pairs, "settings": settings, "versions": versions}
    seeds = len({made["seed"] for made in runs})
    lines = [f"# Every preset in controllable generation, {seeds} seeds", "", report.describe(pairs)]
    lines += [part for note in NOTES for part in ("", note)]
    lines += ["", *(count(rows, way) for way in AT_EQUAL), ""]
    titles = ["preset", "beta", "KL", "gain", *(f"reward - dpo's, {way}" for way in AT_EQUAL.values())]
    titles += ["distinct-1", "tokens"]
    shown = []
    for row in rows:
        gain = f"reward {report.cell(row['reward'], 2)}"
        if row["method"] != report.REFERENCE:
            gain = report.cell(row["gain"], 2, "+")
        cells = [row["method"], "" if row["beta"] is None else f"{row['beta']:g}", report.cell(row["kl"], 1), gain]
        cells += [marked(row["minus_dpo"].get(way)) for way in AT_EQUAL]
        cells += [report.cell(row["distinct-1"], 2), f"{row['tokens']['mean']:.1f}"]
        shown.append(cells)
    text = "\n".join([*lines, *table(titles, shown)]) + "\n" + plots_section({"comparison": CAPTION})
    write_files(output_dir, results, text, {"comparison": plot(rows)})
    return text


def count(rows, way):
    """How many differences are beyond their intervals, as a sentence."""
    gaps = [row["minus_dpo"][way] for row in rows if row["minus_dpo"]]
    signs, once = [sign(gap) for gap in gaps], sum(bool(gap["at_once"]) for gap in gaps)
    return (
        f"At {AT_EQUAL[way]}, {signs.count(1)} of {len(gaps)} differences are above zero and {signs.count(-1)} below, "
        f"each beyond its own interval, where chance gives some {0.05 * len(gaps):.0f}; {once} beyond intervals for "
        "all at once."
    )


def marked(gap):
    """The cell of a difference; none for dpo and the reference."""
    if gap is None:
        return ""
    text = report.cell(gap, 2, "+") + ("", " ▲", " ▼")[sign(gap)]
    return f"**{text}**" if gap["at_once"] else text


def plot(rows):
    """A row a preset: KL, gain, differences to dpo in two colours, distinct-1."""
    rows = [row for row in rows if row["method"] != report.REFERENCE]
    dpo = next(row for row in rows if (row["method"], row["beta"]) == (DPO, preset(DPO).beta))
    figure = Figure(figsize=(13, 1.5 + 0.22 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)

    def dots(axes, values, color, shift=0.0, label=None):
        places = [i + shift for i, value in enumerate(values) if value]
        values = [value for value in values if value]
        bars = [report.bar(value) for value in values]
        bars = None if None in bars else np.array(bars)[:, :, 0].T
        style = {"fmt": "o", "markersize": 3.5, "linewidth": 1, "color": color, "label": label}
        axes.errorbar([value["mean"] for value in values], places, xerr=bars, **style)

    titles = {"kl": "KL to the reference (nats)", "gain": "reward above the reference's", "distinct-1": "distinct-1"}
    for axes, (name, title) in zip((panels[0], panels[1], panels[3]), titles.items(), strict=True):
        axes.axvline(dpo[name]["mean"], color=BLACK, linewidth=0.8, linestyle=":")
        dots(axes, [row[name] for row in rows], BLACK)
        axes.set_xlabel(title, fontsize=9)
    panels[2].axvline(0, color=BLACK, linewidth=0.8, linestyle=":")
    for shift, (way, title) in zip((-0.15, 0.15), AT_EQUAL.items(), strict=True):
        dots(panels[2], [row["minus_dpo"].get(way) for row in rows], COLORS[way], shift, f"at {title}")
    panels[2].set_xlabel("reward minus dpo's", fontsize=9)
    panels[2].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=8)
    panels[0].set_yticks(range(len(rows)), [f"{row['method']} ({row['beta']:g})" for row in rows], fontsize=8)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.3)
    figure.suptitle("Every preset at its own beta (in brackets), with 95% intervals", fontsize=10)
    return figure


def main(arguments=None):
    recipe, training, points = run.parse_arguments(arguments, Options, points_of)
    shared = run.prepare(recipe, training)
    rows, pairs = run.collect_pairs(shared)
    runs = run.train_and_evaluate(shared, rows, points, [run.MOVIE])
    print(write_comparison(training.output_dir, runs, pairs, *run.record(recipe, training)))
    print(f"written to {training.output_dir}")


if __name__ == "__main__":
    # One bar over all trainings instead of a log of each.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    run.disable_progress_bars()
    main()
