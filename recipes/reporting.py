"""What the reports of the recipes share: the files that a report is, their tables, versions."""

import io
import json
import math
import platform
from importlib.metadata import version
from pathlib import Path

import mallowspo
from mallowspo.files import write_whole


def package_versions(*packages):
    """{name: version} of mallowspo, Python and these packages: what a report records."""
    found = {"mallowspo": mallowspo.__version__, "python": platform.python_version()}
    return found | {package: version(package) for package in packages}


def write_files(output_dir, results, text, figures):
    """Writes results.json, results.md and <name>.png of each figure, each whole or not at all.

    Args:
        output_dir: made if missing. results: what JSON can hold, without NaN. text: of results.md.
        figures: {name: Figure of matplotlib}.
    """
    output_dir = Path(output_dir)
    write_whole(output_dir / "results.json", json.dumps(results, indent=2, allow_nan=False).encode())
    write_whole(output_dir / "results.md", text.encode())
    for name, figure in figures.items():
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=150)
        write_whole(output_dir / f"{name}.png", image.getvalue())


def table(titles, rows):
    """The lines of a Markdown table; a row is its cells."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (titles, *rows)]
    return [lines[0], "|---" * len(titles) + "|", *lines[1:]]


def plots_section(captions):
    """The end of results.md: the plots of {name: caption}."""
    return "\n".join(["", "## Plots", "", *(f"![{caption}]({name}.png)\n" for name, caption in captions.items())])


def finite(value):
    """The value with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
