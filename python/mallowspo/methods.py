"""``python -m mallowspo.methods > docs/methods.md``: the page of all presets, made from the presets themselves."""

import argparse
from dataclasses import fields

from mallowspo.family import FAMILY
from mallowspo.objective import PreferenceObjective, preset

HEAD = """# The methods

Made from `mallowspo.family` by `python -m mallowspo.methods > docs/methods.md`; change it there.

`preset("name")`, `loss_type="name"` and `--loss_type name` take any name below, or several joined by `+`:
`preset("mallows-theta+simpo")` is SimPO's margin under the theta link. Each name sets the fields listed as its own; a
link that none sets is `bradley-terry`, every other field keeps its default. Two names that set the same field raise
`ValueError` with both names. `preset(name, beta=...)` and `dataclasses.replace` change fields, and what cannot go
together raises `ValueError` with both field names.

Symbols: y_w is the chosen, y_l the rejected response of a prompt x, |y| its number of tokens, pi the policy, ref the
reference, r(y) = log pi(y) - log ref(y) the log-ratio (each log-probability over |y| with `token_weights="mean"`,
without ref where `reference_free`), z = beta (r(y_w) - r(y_l)) - gamma the margin, a = -log phi(x) >= 0 the
dispersion.
"""


def page():
    """The text of docs/methods.md."""
    lines = [HEAD, "| preset | method | its own fields |", "|---|---|---|"]
    lines += [
        f"| [`{name}`](#{name}) | {method.title} | {_fields(method.fields)} |" for name, method in FAMILY.items()
    ]
    for name, method in FAMILY.items():
        lines += ["", f"## {name}", "", f"{method.title}. {method.source}.", ""]
        lines += ["```", f"loss = {method.formula}", "```", ""]
        lines += [f"- When: {method.when}", f"- Basis: {method.certainty}."]
        lines += [f"- Fields: {_fields(_not_default(preset(name)))}; the rest at its default."]
    lines += ["", "## Every field and its default", "", "| field | default |", "|---|---|"]
    lines += [f"| `{field.name}` | `{field.default!r}` |" for field in fields(PreferenceObjective)]
    return "\n".join(lines) + "\n"


def _not_default(objective):
    values = {field.name: getattr(objective, field.name) for field in fields(objective)}
    return {f.name: values[f.name] for f in fields(objective) if f.name == "link" or values[f.name] != f.default}


def _fields(values):
    return ", ".join(f"`{name}={value!r}`" for name, value in values.items())


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m mallowspo.methods", description=__doc__).parse_args()
    print(page(), end="")
