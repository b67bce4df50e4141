"""What the reports of the recipes share: the files that a report is, versions, Student's t, ranks."""

import io
import json
import math
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np

import mallowspo
from mallowspo.files import write_whole

# 97.5% quantiles of Student's t by degrees of freedom, 1 to 19; beyond, the last is a little too wide.
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_T_975 += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)


def t_975(degrees):
    """The 97.5% quantile of Student's t with 1, 2, ... degrees of freedom."""
    return _T_975[min(degrees, len(_T_975)) - 1]


def ranks(values):
    """Ranks from 1, ties at the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


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
