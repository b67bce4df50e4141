"""The table of presets: composition by "+", and the page that is made of it."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from mallowspo import methods
from mallowspo.family import FAMILY
from mallowspo.objective import PreferenceObjective, preset, presets

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
PAIRS = list(itertools.combinations(FAMILY, 2))


def test_every_method_says_what_it_is():
    names = {field.name for field in dataclasses.fields(PreferenceObjective)}
    assert tuple(FAMILY) == presets()
    for name, method in FAMILY.items():
        assert "+" not in name and method.fields.keys() <= names and method.fields
        assert all((method.title, method.source, method.certainty, method.formula, method.when))


@pytest.mark.parametrize("first, second", PAIRS, ids="+".join)
def test_composition_is_the_union_or_an_error(first, second):
    one, two = FAMILY[first].fields, FAMILY[second].fields
    if shared := one.keys() & two.keys():
        with pytest.raises(ValueError, match=f"presets '{first}' and '{second}' both set ({'|'.join(shared)})"):
            preset(f"{first}+{second}")
        return
    try:
        expected = PreferenceObjective(**{"link": "bradley-terry"} | one | two)
    except ValueError as error:
        with pytest.raises(ValueError) as raised:
            preset(f"{first}+{second}")
        assert str(raised.value) == str(error)
        assert any(field in str(error) for field in one) and any(field in str(error) for field in two)
    else:
        assert preset(f"{first}+{second}") == preset(f"{second}+{first}") == expected


def test_names_compose():
    assert preset("mallows-theta+simpo") == preset("mallows-simpo")
    assert preset("mallows-phi+simpo", beta=3.0) == dataclasses.replace(preset("simpo"), link="mallows-phi", beta=3.0)
    assert preset("dpo+cdpo") == preset("cdpo")
    for name in ("dpo+", "+dpo", "dpo +cdpo", ""):
        with pytest.raises(ValueError, match="unknown preset"):
            preset(name)
    with pytest.raises(ValueError, match="presets 'dpo' and 'dpo' both set link"):
        preset("dpo+dpo")


def test_the_page_is_made_of_the_table():
    assert PAGE.read_text() == methods.page(), "stale: python -m mallowspo.methods > docs/methods.md"
    command = [sys.executable, "-m", "mallowspo.methods"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == PAGE.read_text()
    refused = subprocess.run([*command, "--all"], capture_output=True, text=True)
    assert refused.returncode == 2 and not refused.stdout and "unrecognized arguments: --all" in refused.stderr
    for name, method in FAMILY.items():
        assert f"\n## {name}\n" in PAGE.read_text() and method.formula in PAGE.read_text()
