"""The Python of the README and of docs/ runs, and what they say of files, commands and other libraries is so."""

import dataclasses
import re
import shlex
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_pairs, tiny_tokenizer

from mallowspo import MallowsConfig, preset, presets

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
BLOCKS = {
    f"{page.name} {number}": block
    for page in (README, *sorted(DOCS.glob("*.md")))
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S), 1)
}
RECIPES = sorted(path for path in (ROOT / "recipes").iterdir() if any(path.glob("*.py")))


def given():
    """What the pages take as the reader's own."""
    return {
        "model": tiny_model(),
        "ref_model": tiny_model(seed=1),
        "tokenizer": tiny_tokenizer(),
        "pairs": tiny_pairs(8),
    }


@pytest.mark.parametrize("name", BLOCKS)
def test_the_code_of_the_pages_runs(name, tmp_path, monkeypatch):
    if "integrations.trl" in BLOCKS[name]:
        pytest.importorskip("trl", reason="trl is not installed: pip install 'mallowspo[trl]'")
    monkeypatch.chdir(tmp_path)
    for own in (tiny_model(), tiny_tokenizer()):
        own.save_pretrained("path/or/hub-name")
    namespace = given()
    exec(compile(BLOCKS[name], name, "exec"), namespace)
    if "trainer" in namespace:
        assert namespace["trainer"].state.global_step == 4


@pytest.mark.parametrize("folder", ["python/mallowspo", *(f"recipes/{path.name}" for path in RECIPES)])
def test_the_tree_has_every_module_once(folder):
    tree = README.read_text().split("## The tree")[1].split("```")[1]
    (said,) = re.findall(rf"^{folder}/ *(.*(?:\n .*)*)", tree, re.M)
    named = Counter(re.findall(r"(?<![\w/])\w+\.py\b", said))
    assert named == Counter(path.name for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py")


def test_the_tree_has_every_file_beside_it():
    tree = README.read_text().split("## The tree")[1].split("```")[1]
    files = {path.name for path in ROOT.iterdir() if path.is_file()} - {"README.md", ".gitignore", ".git"}
    assert files <= set(re.findall(r"[\w.]+", tree))


def test_what_the_build_needs_is_said_in_full():
    (line,) = re.findall(r"^(pip install .*)\npip install --no-build-isolation \.$", README.read_text(), re.M)
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {*shlex.split(line)[2:], "torch>=2.10"} == set(needed)


def test_every_make_target_there_is():
    makefile = (ROOT / "Makefile").read_text()
    targets = {
        *re.findall(r"^([\w-]+):", makefile, re.M),
        *re.search(r"^EXPERIMENTS := (.*)", makefile, re.M)[1].split(),
    }
    pages = [README, *ROOT.glob("*/README.md"), *ROOT.glob("recipes/*/README.md"), *DOCS.glob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    named = {
        *re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.M),
        *re.findall(r"^\| \[(\w+)\]\(recipes/", text, re.M),
    }
    assert {"demo", "test", "benchmark-step", "rounds"} <= named <= targets


def rows(heading):
    """The cells of the tables under a heading of coming_from.md."""
    text = (DOCS / "coming_from.md").read_text().split(f"## {heading}")[1].split("\n## ")[0]
    return [row.strip("|").split("|") for row in text.splitlines() if row.startswith("| ")]


def names(cell):
    return set(re.findall(r"`([a-z_]+)\b", cell))


def cells(heading, column):
    """The names in backticks of a column of the tables under a heading of coming_from.md."""
    return {name for row in rows(heading) for name in names(row[column])}


def test_every_argument_of_trl_is_in_the_page(tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'mallowspo[trl]'")
    from trl.trainer.base_config import _BaseConfig

    own = {f.name for f in dataclasses.fields(trl.DPOConfig)} - {f.name for f in dataclasses.fields(_BaseConfig)}
    told = cells("TRL: to", 0)
    # Coefficients of what the page says there is none of, and what TRL itself will remove.
    partners = {"f_alpha_divergence_coef", "ref_model_mixup_alpha", "ref_model_sync_steps", "pad_token"}
    assert own - partners <= told
    ours = {f.name for f in dataclasses.fields(MallowsConfig)} - {f.name for f in dataclasses.fields(_BaseConfig)}
    assert ours <= told | cells("TRL: to", 1)
    theirs = {f.name: f.default for f in dataclasses.fields(trl.DPOConfig)}
    same = {name for row in rows("TRL: to") if row[1].startswith(" the same") for name in names(row[0])} & {*theirs}
    assert {"learning_rate", "pad_to_multiple_of", "model_init_kwargs", "discopop_tau"} <= same
    for name in same:  # where we say so, what TRL has is taken
        MallowsConfig(output_dir=str(tmp_path), **{name: theirs[name]})


def refused(make):
    """The presets for which `make` raises."""
    found = set()
    for name in presets():
        try:
            make(name)
        except ValueError:
            found.add(name)
    return found


def test_the_presets_that_refuse_label_smoothing_are_named():
    (row,) = re.findall(r"^\| `label_smoothing` 0\.0.*", (DOCS / "coming_from.md").read_text(), re.M)
    assert refused(lambda name: preset(name, label_smoothing=0.1)) == set(
        re.findall(r"`([\w-]+)`", row.split("refused by")[1])
    )


def test_the_presets_that_trls_trainer_refuses_are_named(tmp_path):
    pytest.importorskip("trl", reason="trl is not installed: pip install 'mallowspo[trl]'")
    from mallowspo.integrations.trl import DPOConfig

    (said,) = re.findall(r"^- Refused, .*(?:\n  .*)*", (DOCS / "coming_from.md").read_text(), re.M)
    named = set(re.findall(r"`([\w-]+)`", said)) & set(presets())
    assert refused(lambda name: DPOConfig(output_dir=str(tmp_path), bf16=False, loss_type=name)) == named


def test_liger_gives_the_dpo_loss_of_the_page():
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger_kernel is not installed")
    (block,) = (block for name, block in BLOCKS.items() if "coming_from" in name and "linear_token_stats" in block)
    namespace = {}
    exec(block, namespace)
    hidden, weight, target = (namespace[name] for name in ("hidden", "weight", "target"))
    loss, _ = liger.LigerFusedLinearDPOLoss(compiled=False, beta=0.1)(
        weight, hidden, target, None, namespace["ref_hidden"], namespace["ref_weight"]
    )
    torch.testing.assert_close(namespace["dpo"], loss, rtol=1e-5, atol=1e-6)
    simpo = liger.LigerFusedLinearSimPOLoss()
    assert (simpo.beta, simpo.gamma, simpo.compute_nll_loss, simpo.alpha) == (0.1, 0.5, True, 1.0)


def test_the_authors_weight_is_twice_our_dispersion():
    """Their w h with w = -0.29 log Hbar, ours 2 a h with a = -0.145 log Hbar: the same loss of a pair."""
    objective = preset("mallows-theta", beta=0.3)
    margins = torch.tensor([[1.3], [-0.4]])
    a = -0.145 * torch.tensor(0.03).log()[None]
    for h in margins:
        found = objective(torch.stack([h[0], torch.tensor(0.0)]), None, torch.zeros(2), a).losses
        expected = -torch.nn.functional.logsigmoid(0.3 * -0.29 * torch.tensor(0.03).log() * h)
        torch.testing.assert_close(found, expected)
