"""Every preset of the library, and a few compositions, in the bandit: the same data, optimiser and steps, at equal KL.

    python recipes/bandit/compare.py                                   # compare.yaml
    python recipes/bandit/compare.py --preferences 15 100 --num_seeds 20

The options are run.py's. Writes results.json, results.md and comparison.png into output_dir.
"""

import itertools
import sys
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the recipes share
import experiment
import report
import run
import sampling

from mallowspo.modeling import ResponseStats
from mallowspo.objective import preset, presets
from mallowspo.token_weights import weighted_logps
from methods import COMPOSITIONS
from options import config_field, parse_options
from reporting import finite, package_versions, plots_section, table, write_files

EARLY = "dpo, stopped early"  # the yardstick of the presets that no beta holds at the reference
METRICS = ("optimal", "reward", "entropy_contested", "top_choice_distance")
COMPARED = [row for row in report.COMPARED if row[0] in METRICS]


@dataclass
class Options(run.Options):
    config: str = config_field(__file__, "compare.yaml")


# ---- training ------------------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """The preferences of a problem, as the trainer's batches: B = S * C * P pairs of one-token responses."""

    actions: torch.Tensor  # [2, S, C, P], chosen first
    ref_logps: torch.Tensor  # [2, 2B] of the reference and of a second one, for MRPO
    neg_log_dispersion: torch.Tensor  # [B], estimated
    offset: torch.Tensor  # [B], see pair_losses


def make_pairs(problem, options, distance, preferences):
    """Pairs, a preference that was given twice being two of them."""
    counts = (problem.weights * preferences).round().long()
    seeds, contexts, _ = counts.shape
    actions = torch.stack(
        [
            side.flatten().repeat_interleave(counts.flatten()).view(seeds, contexts, preferences)
            for side in (problem.chosen, problem.rejected)
        ]
    )
    second = second_reference(problem, options, distance)
    refs = [logps.double().expand(2, -1, -1, -1).gather(-1, actions) for logps in (problem.ref_logps, second)]
    contexts = torch.arange(seeds * contexts, dtype=torch.float64)
    return Pairs(
        actions=actions,
        ref_logps=torch.stack(refs).flatten(1),
        neg_log_dispersion=problem.neg_log_dispersion["estimated"].double().flatten().repeat_interleave(preferences),
        offset=(1000 * contexts).repeat_interleave(preferences),
    )


def second_reference(problem, options, distance):
    """[S, C, K] log-probabilities: made as the first reference is, from as many other people's first choices."""
    a = -torch.tensor(options.dispersions, dtype=torch.float64).log()
    places = ((1 - problem.utility) * (options.num_actions - 1)).round().long()
    generator = torch.Generator().manual_seed(2**32)
    draws = [
        sampling.sample_reference(
            a, options.num_actions, options.demonstrations, options.prior, distance, generator
        ).gather(-1, central)
        for central in places
    ]
    return torch.stack(draws).log()


def pair_losses(objective, pairs, logits, step=0):
    """[B]: the objective's losses of all pairs, the policies' logits being [S, C, K] float64."""
    logps = logits.log_softmax(-1).expand(2, *logits.shape).gather(-1, pairs.actions).flatten()
    num_tokens = torch.ones(len(logps), dtype=torch.int64)
    batch = {"num_tokens": num_tokens, "row": torch.arange(len(logps) // 2), "differs": num_tokens.bool()}
    refs = pairs.ref_logps if objective.reference_weights is not None else pairs.ref_logps[:1]
    stats = [ResponseStats(values, entropy=None, token_logps=values) for values in (logps, *refs)]
    scores, ref_scores = weighted_logps(objective, batch, stats[0], stats[1:], step=step)
    if objective.rearrangement != "none":
        # Sorts each context by itself: the offset is in every difference that is sorted, and in no margin.
        scores = scores + torch.cat([2 * pairs.offset, pairs.offset])
        ref_scores = ref_scores + torch.cat([pairs.offset, 0 * pairs.offset])
    dispersion = pairs.neg_log_dispersion if objective.uses_dispersion else None
    alignment = (2 * logits.log_softmax(-1)).logsumexp(-1, keepdim=True).expand_as(pairs.actions).flatten()
    of_policy = {"plain_logps": logps, "alignment": alignment}
    return objective(scores, num_tokens, ref_scores, dispersion, **of_policy).losses


def train(objective, problem, pairs, optimizer, at):
    """Metrics of the policies at the given steps, the last of which ends the training: {metric: [T, S, C]}."""
    logits = problem.ref_logps.double().requires_grad_()
    optimizer = experiment.OPTIMIZERS[optimizer]([logits])
    rate = 1 / (max(objective.beta, objective.beta**2) * pairs.actions.shape[-1])
    found = []
    for step in range(at[-1] + 1):
        if step in at:
            found.append(experiment.evaluate(problem, logits.float()))
        if step < at[-1]:
            optimizer.zero_grad()
            (rate * pair_losses(objective, pairs, logits, step)).sum().backward()
            optimizer.step()
    return {name: torch.stack([values[name] for values in found]).double().numpy() for name in found[0]}


# ---- comparison ----------------------------------------------------------------------------------------------------


def host(objective):
    """The simplest objective whose loss is this one's on responses of one token."""
    return replace(objective, token_weights="uniform", ld_alpha=1.0, down_sampling=False)


def is_held(objective):
    """Whether a large beta holds the policy at the reference: not where the loss leaves it out or has no minimum."""
    return not (objective.reference_free or objective.reference_mixing is not None or objective.robust)


def run_setting(options, distance, preferences, optimizer):
    """{"reference": ..., "rows": {name: row}}: see :func:`summarise`."""
    problem = options.make_problem(distance, preferences)
    pairs = make_pairs(problem, options, distance, preferences)
    at = experiment.evaluation_steps(options.steps)
    contested = np.array(options.dispersions) > 0.5

    def means(found):
        return {name: values.mean(-1) for name, values in found.items()} | {
            "entropy_contested": found["entropy"][..., contested].mean(-1)
        }

    @cache
    def trained(objective):
        return means(train(objective, problem, pairs, optimizer, at))

    reference = means(
        {name: x.double().numpy() for name, x in experiment.evaluate(problem, problem.ref_logps).items()}
    )
    rows, first = {}, {}
    for name in tqdm((*presets(), *COMPOSITIONS, EARLY), desc=f"{distance}, {preferences}, {optimizer}"):
        objective = host(preset("dpo" if name == EARLY else name))
        own, same_as = trained(objective), None
        if stopped_early := name == EARLY or not is_held(objective):
            path = {metric: values[::-1] for metric, values in own.items()}
        else:
            finals = [trained(replace(objective, beta=beta)) for beta in options.betas]
            # Beyond the beta of the least KL, the optimiser's steps are too large for the loss.
            kept = 1 + np.argmin([final["kl"][-1].mean() for final in finals])
            path = {metric: np.stack([final[metric][-1] for final in finals[:kept]]) for metric in own}
            same_as = first.setdefault(replace(objective, beta=1.0), name)
        rows[name] = {
            "path": path,
            "own_kl": own["kl"][-1],
            "stopped_early": stopped_early,
            "same_as": None if same_as == name else same_as,
        }
    return summarise(rows, reference, options)


def summarise(rows, reference, options):
    """The setting in numbers: means over seeds with half-widths.

    Args:
        rows: {preset: {"path": {metric: [N, S]} of policies nearer and nearer to the reference, by rising beta or, if
            "stopped_early", by falling step; "own_kl": [S], "same_as": preset or None}}. reference: {metric: [S]}.

    Returns:
        {"reference": ..., "rows": {preset: {"stopped_early", "same_as", "path_kl", "own_kl": at the preset's own beta
        after all steps, "matched": {KL: {metric: with "minus_dpo"}}}}}
    """

    def matched(name, target):
        path = rows[name]["path"]
        return {metric: report.at_kl(path["kl"], path[metric], reference[metric], target) for metric in METRICS}

    found = {
        name: {
            "stopped_early": row["stopped_early"],
            "same_as": row["same_as"],
            "own_kl": report.mean_and_half(row["own_kl"]),
            "path_kl": report.mean_and_half(row["path"]["kl"].T),
            "matched": {},
        }
        for name, row in rows.items()
    }
    for target in options.kl_targets:
        dpo = matched("dpo", target)
        for name, row in found.items():
            row["matched"][str(target)] = {
                metric: report.mean_and_half(values) | {"minus_dpo": report.mean_and_half(values - dpo[metric])}
                for metric, values in matched(name, target).items()
            }
    return {"reference": {name: report.mean_and_half(values) for name, values in reference.items()}, "rows": found}


# ---- report --------------------------------------------------------------------------------------------------------


def write_comparison(settings, options, versions):
    """Writes results.json, results.md and comparison.png into ``options.output_dir``; the text of results.md."""
    target = str(report.middle(options.kl_targets))
    results = {", ".join(map(str, key)): setting for key, setting in settings.items()}
    results = {"results": results, "settings": asdict(options), "versions": versions}
    caption = f"Differences to DPO at a KL of {target} nats, seed by seed, with 95% t intervals."
    lines = ["# Every preset in the bandit", "", f"Means and 95% t intervals over {options.num_seeds} seeds.", ""]
    lines += [f"At a KL of {target} nats to the reference. In brackets: the difference to DPO's, seed by seed;"]
    lines += ["▲ better, ▼ worse beyond the interval. The last column: after all steps, at the preset's own beta."]
    lines += ["†: no beta holds it at the reference; stopped early instead, at its own beta."]
    for key, setting in settings.items():
        rows = []
        for name, row in setting["rows"].items():
            cells = [cell(name, row, row["matched"][target][metric], more) for metric, _, more in COMPARED]
            rows.append([label(name, row), *cells, report.plain(row["own_kl"])])
        titles = ["preset", *(title for _, title, _ in COMPARED), "KL at its own beta"]
        lines += ["", f"## {key[0]}, {key[1]} preferences a context, {key[2]}", "", *table(titles, rows)]
    text = "\n".join(lines) + "\n" + plots_section({"comparison": caption})
    write_files(options.output_dir, finite(results), text, {"comparison": plot(settings, target)})
    return text


def label(name, row):
    return f"{name} †" if row["stopped_early"] else name


def cell(name, row, value, more_is_better):
    """The mean, and the difference to DPO; for a preset that is another one here, the other one's name."""
    if row["same_as"]:
        return f"is {row['same_as']} here"
    difference = report.cell(name, value, more_is_better)
    return difference if name == "dpo" or np.isnan(value["mean"]) else f"{report.plain(value)} ({difference})"


def plot(settings, target):
    """Dots with intervals: a row a preset, a column a metric, a colour a setting."""
    rows = next(iter(settings.values()))["rows"]
    names = [name for name, row in rows.items() if not row["same_as"] and name != "dpo"]
    figure = Figure(figsize=(12, 1.5 + 0.24 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(COMPARED), sharey=True)
    colors = ("#0b62a4", "#d1570d", "#2a7f3f", "#222222")
    for axes, (metric, title, more) in zip(panels, COMPARED, strict=True):
        axes.axvline(0, color="#222222", linewidth=0.8)
        for i, (key, setting) in enumerate(settings.items()):
            gains = [setting["rows"][name]["matched"][target][metric]["minus_dpo"] for name in names]
            mean, half = (np.array([gain[of] for gain in gains], float) for of in ("mean", "half"))
            places = np.arange(len(names)) + 0.25 * (i - (len(settings) - 1) / 2)
            style = {"fmt": "o", "markersize": 3.5, "linewidth": 1, "color": colors[i % len(colors)]}
            axes.errorbar(mean, places, xerr=half, label=", ".join(map(str, key)), **style)
        axes.set_xlabel(f"{title}\n({'more' if more else 'less'} is better)", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.3)
    panels[0].set_yticks(range(len(names)), [label(name, rows[name]) for name in names])
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    figure.suptitle(f"Differences to DPO at a KL of {target} nats (†: stopped early)", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def main(arguments=None):
    (options,) = parse_options(Options, __doc__.split("\n")[0], arguments)
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)  # before the work, which is lost where it cannot be
    torch.set_num_threads(1)  # the tensors are small
    keys = itertools.product(options.distances, options.preferences, options.optimizers)
    settings = {key: run_setting(options, *key) for key in keys}
    versions = package_versions("torch")
    print(write_comparison(settings, options, versions))
    print(f"written to {options.output_dir}")


if __name__ == "__main__":
    main()
