"""The table of ratios, and the files it is kept in.

The JSON file holds::

    {"schema": 1,
     "facts": {name: text, ...},                       # machine and software
     "rows": [{"kernel", "shape", "dtype", "case",     # text
               "rounds": int,
               "ours": spread,
               "competitors": {name: spread or null},  # null: not installed
               "limits": {name: spread},
               "extra_memory_mib": {contender: MiB} or null}, ...]}  # null: not measured

where a spread is {"median", "low", "high"} of the rounds in seconds, low and high being the quartiles. A competitor
that is absent from a row offers nothing of the kind. Markdown, PNG and the printed table are made from it alone:
``python ratios.py FILE.json`` makes them again.
"""

import io
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator  # noqa: E402

from mallowspo.files import write_whole  # noqa: E402

SCHEMA = 1
NOT_INSTALLED, NOT_OFFERED = "not installed", "-"
LEGEND = (
    "Ours in milliseconds (median; in brackets the quartiles), every competitor as its time over ours (above 1: ours "
    "is faster), the limit's time over ours in per cent. After the figure the extra memory of one call in MiB, with "
    f"results and gradients. `{NOT_OFFERED}`: the competitor has nothing of the kind."
)


def table(rows):
    """The table's cells, [[text]], the heading first."""
    competitors = names(rows)
    cells = [["kernel", "shape", "dtype", "case", "ours, ms", *competitors, "of the limit's speed"]]
    for row in rows:
        ours, memory = row["ours"], row["extra_memory_mib"] or {}
        own = f"{milliseconds(ours['median'])} ({milliseconds(ours['low'])}..{milliseconds(ours['high'])})"
        line = [row["kernel"], row["shape"], row["dtype"], row["case"], own + mebibytes(memory, "ours")]
        for name in competitors:
            if name not in row["competitors"]:
                line.append(NOT_OFFERED)
            elif row["competitors"][name] is None:
                line.append(NOT_INSTALLED)
            else:
                line.append(f"{ratio(row, name):.2f}x{mebibytes(memory, name)}")
        limits = (f"{name} {100 * limit['median'] / ours['median']:.0f}%" for name, limit in row["limits"].items())
        cells.append([*line, "; ".join(limits) or NOT_OFFERED])
    return cells


def names(rows):
    """Every competitor of any row, in the order of their first."""
    return list(dict.fromkeys(name for row in rows for name in row["competitors"]))


def ratio(row, name):
    """A competitor's time over ours."""
    return row["competitors"][name]["median"] / row["ours"]["median"]


def milliseconds(value):
    """Three significant digits."""
    return f"{1e3 * value:.3g}" if value < 1 else f"{1e3 * value:.0f}"


def mebibytes(memory, name):
    """What stands after a figure."""
    return f", {memory[name]:.0f} MiB" if name in memory else ""


def markdown_table(cells):
    """Aligned, so that it reads the same in a terminal."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def markdown(results):
    """The whole Markdown file."""
    facts = "\n".join(f"- {name}: {text}" for name, text in results["facts"].items())
    return f"# Benchmarks\n\n{LEGEND}\n\n{markdown_table(table(results['rows']))}\n\n{facts}\n"


def plot(results, path):
    """Horizontal bars of the ratios, one panel a kernel, on a logarithmic axis."""
    rows = [row for row in results["rows"] if any(row["competitors"].values())]
    kernels, competitors = list(dict.fromkeys(row["kernel"] for row in rows)), names(rows)
    colours = dict(zip(competitors, plt.get_cmap("tab10").colors, strict=False))
    groups = [[row for row in rows if row["kernel"] == kernel] for kernel in kernels]
    heights = [sum(1 + sum(map(bool, row["competitors"].values())) for row in group) for group in groups]
    figure, panels = plt.subplots(
        len(kernels), 1, figsize=(10, 1.5 + 0.1 * sum(heights)), height_ratios=heights, squeeze=False, sharex=True,
        layout="constrained",
    )  # fmt: skip
    for panel, kernel, group in zip(panels[:, 0], kernels, groups, strict=True):
        at, ticks = 0, []
        for row in group:
            present = [name for name in competitors if row["competitors"].get(name)]
            ticks.append((at + (len(present) - 1) / 2, f"{row['shape']}, {row['dtype']}, {row['case']}"))
            for name in present:
                panel.barh(at, ratio(row, name) - 1, left=1, height=0.9, color=colours[name])
                at += 1
            at += 1
        panel.set_yticks([y for y, _ in ticks], [text for _, text in ticks], fontsize=7)
        panel.set_ylim(at - 0.5, -1)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("")
        panel.axvline(1, color="black", linewidth=0.8)
        panel.grid(axis="x", which="both", alpha=0.2)
        panel.set_title(kernel, fontsize=9, loc="left")
    ends = [ratio(row, name) for row in rows for name in row["competitors"] if row["competitors"][name]]
    panels[0, 0].set_xlim(min(0.9, 0.9 * min(ends)), 1.1 * max(ends))
    panels[-1, 0].set_xlabel("time of the competitor over ours (1: as fast as ours)")
    figure.legend(
        handles=[plt.Rectangle((0, 0), 1, 1, color=colours[name], label=name) for name in competitors],
        loc="outside upper center", ncols=len(competitors), fontsize=8,
    )  # fmt: skip
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(results, folder, name, markdown=markdown):
    """NAME.json, NAME.md and NAME.png in a folder; what is there stays whole until each new file is complete."""
    plot(results, picture := io.BytesIO())
    texts = {"json": json.dumps(results, indent=1) + "\n", "md": markdown(results)}
    files = {ending: text.encode() for ending, text in texts.items()} | {"png": picture.getvalue()}
    for ending, data in files.items():
        write_whole(Path(folder) / f"{name}.{ending}", data)
    return [Path(folder) / f"{name}.{ending}" for ending in files]


if __name__ == "__main__":
    source = Path(sys.argv[1])
    kept = json.loads(source.read_text())
    if kept["schema"] != SCHEMA:
        sys.exit(f"{source} has schema {kept['schema']}, this reads {SCHEMA}: measure again")
    print(*write(kept, source.parent, source.stem), sep="\n")
