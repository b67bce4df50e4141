"""The report of the diffusion recipe: means over the seeds with their intervals, tables, a JSON file and two plots."""

import numpy as np
import pictures
from matplotlib.figure import Figure

from reporting import table, write_files
from stats import half_width

# Name in a run, name of its column of shapes, title.
MEASURES = (
    ("preferred", "sample_shapes", "Share of samples in the warm colours that most raters prefer"),
    ("right_shape", "sample_shapes", "Share of samples in which the nearest outline is the shape asked for"),
    ("accuracy", "held_out_shapes", "Held-out preference accuracy (reward of the majority's picture is the larger)"),
    ("distance", "held_out_shapes", "Distance from the reference (mean squared difference of the predicted noise)"),
)
ALL = "all"
SAMPLES_CAPTION = "Samples of the first seed; the same place is the same noise before and after."


def interval(values):
    """(mean, half-width of its 95% interval over the seeds); the half-width is None for fewer than three seeds."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 3:
        return float(values.mean()), None
    return float(values.mean()), float(half_width(values))


def summarise(runs):
    """Means over the seeds.

    Args:
        runs: {(method, seed): the arrays of a run}, the first method being the model before tuning and the second the
            one that the others are compared with.

    Returns:
        {measure: {shape or "all": {method: interval}}}; a method "b - a" is the difference, seed by seed.
    """
    methods = list(dict.fromkeys(method for method, _ in runs))
    seeds = sorted({seed for _, seed in runs})
    found = {}
    for measure, column, _ in MEASURES:
        found[measure] = {}
        for name in (*pictures.SHAPES, ALL):
            values = {
                method: np.array([_mean(runs[method, seed], measure, column, name) for seed in seeds])
                for method in methods
            }
            for method in methods[2:]:
                values[f"{method} - {methods[1]}"] = values[method] - values[methods[1]]
            found[measure][name] = {method: interval(value) for method, value in values.items()}
    return found


def _mean(run, measure, column, name):
    """The mean of a run's measure over the pictures or pairs of one shape, or over all."""
    rows = slice(None) if name == ALL else run[column] == pictures.SHAPES.index(name)
    return run[measure][rows].mean()


def write_report(output_dir, runs, agreement, settings, versions):
    """Writes results.json, results.md, samples.png and measures.png, each whole or not at all; the text of results.md.

    Args:
        output_dir: a path, made if missing. runs: as :func:`summarise`. agreement: of each shape.
        settings, versions: dicts that JSON can hold, for the record.
    """
    found = summarise(runs)
    results = {
        "measures": found,
        "loss_and_accuracy_of_each_step": {
            f"{method} seed {seed}": run["history"].tolist()
            for (method, seed), run in runs.items()
            if len(run["history"])
        },
        "settings": settings,
        "versions": versions,
    }
    text = tables(found, agreement, len({seed for _, seed in runs}))
    figures = {"samples": plot_samples(runs, agreement), "measures": plot_measures(found, agreement)}
    write_files(output_dir, results, text, figures)
    return text


def tables(found, agreement, seeds):
    """The measures as Markdown, one table each, a row a shape."""
    lines = ["# Diffusion-DPO on pictures of shapes", ""]
    about = "means and 95% intervals over the seeds (Student's t, which may pass 0 and 1)" if seeds > 2 else "means"
    lines.append(f"{seeds} seed{'s' * (seeds > 1)}, {about}; a difference is taken seed by seed.")
    for measure, _, title in MEASURES:
        rows = found[measure]
        cells = [
            [_label(name, agreement), *(_cell(value, plus=" - " in method) for method, value in row.items())]
            for name, row in rows.items()
        ]
        lines += ["", f"**{title}**", "", *table(["shape (agreement)", *rows[ALL]], cells)]
    lines += ["", f"![{SAMPLES_CAPTION}](samples.png)", "", "![The tables as a plot.](measures.png)", ""]
    return "\n".join(lines)


def _label(name, agreement):
    if name == ALL:
        return ALL
    return f"{name} ({agreement[pictures.SHAPES.index(name)]:.2f})"


def _cell(value, plus):
    mean, half = value
    return f"{mean:{'+' if plus else ''}.3f}" + ("" if half is None else f" ± {half:.3f}")


# ---- plots ---------------------------------------------------------------------------------------------------------

COLOURS = ("#777777", "#0b62a4", "#d1570d", "#2a7f3b", "#7a3b9a", "#8a6d1d", "#b3331e", "#1b8a8a")


def plot_samples(runs, agreement, columns=8):
    """Samples of the first seed before and after, a row a shape; the same place is the same noise in every block."""
    methods = list(dict.fromkeys(method for method, _ in runs))
    first = min(seed for _, seed in runs)
    figure = Figure(figsize=(0.5 + 3.1 * len(methods), 2.0), layout="constrained")
    blocks = figure.subplots(1, len(methods), squeeze=False)[0]
    for block, method in zip(blocks, methods, strict=True):
        run = runs[method, first]
        rows = [run["images"][run["sample_shapes"] == shape][:columns] for shape in range(len(pictures.SHAPES))]
        framed = [[np.pad(image, ((0, 0), (1, 1), (1, 1)), constant_values=255) for image in row] for row in rows]
        columns = min(len(row) for row in framed)
        grid = np.concatenate([np.concatenate(row[:columns], axis=2) for row in framed], axis=1)
        block.imshow(grid.transpose(1, 2, 0), interpolation="nearest")
        block.set_title(method, fontsize=9)
        block.set_xticks([])
        block.set_yticks([])
        block.spines[:].set_visible(False)
    side = pictures.SIZE + 2
    blocks[0].set_yticks(
        [side * (row + 0.5) for row in range(len(pictures.SHAPES))],
        [_label(name, agreement) for name in pictures.SHAPES],
        fontsize=7,
    )
    blocks[0].tick_params(length=0)
    return figure


def plot_measures(found, agreement):
    """The measures by shape, one panel each, with their 95% intervals over the seeds."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    names = list(found[MEASURES[0][0]])
    methods = [method for method in found[MEASURES[0][0]][ALL] if " - " not in method]
    for axes, (measure, _, title) in zip(figure.subplots(2, 2).flat, MEASURES, strict=True):
        for i, method in enumerate(methods):
            means, halves = zip(*(found[measure][name][method] for name in names), strict=True)
            places = np.arange(len(names)) + 0.12 * (i - (len(methods) - 1) / 2)
            bars = None if halves[0] is None else halves
            axes.errorbar(places, means, bars, fmt="o", color=COLOURS[i % len(COLOURS)], capsize=3, label=method)
        axes.set_title(title.replace(" (", "\n("), fontsize=9)
        if measure != "distance":  # the others are shares, which the intervals do not know
            axes.set_ylim(-0.02, 1.02)
        axes.set_xticks(range(len(names)), [_label(name, agreement) for name in names], fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4)
    figure.axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    return figure
