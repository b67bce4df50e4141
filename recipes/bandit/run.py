"""Does the dispersion-weighted loss keep diversity and trade accuracy against KL better than DPO, in a bandit?

    python recipes/bandit/run.py                                       # default.yaml, minutes on two cores
    python recipes/bandit/run.py --config recipes/bandit/paper.yaml    # more of everything

Every option can stand in the YAML file of --config or on the command line, which wins: ``--steps 500``.
Writes results.json, results.md and the plots into output_dir.
"""

import itertools
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the recipes share
import experiment
import report
import sampling

import mallowspo
import mallowspo.functional as F
from options import parse_options


def _values(*values, about):
    return field(default_factory=lambda: list(values), metadata={"help": about})


@dataclass
class Options:
    """The size of everything. A setting is one of distances x preferences x optimizers."""

    config: str = field(
        default=str(Path(__file__).with_name("default.yaml")), metadata={"help": "YAML file of options."}
    )
    output_dir: str = field(default="outputs/bandit", metadata={"help": "Table, JSON and plots."})
    dispersions: list[float] = _values(
        *(0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95), about="phi of each context, in (0, 1)."
    )
    num_actions: int = field(default=6, metadata={"help": "K; at most 8 for spearman."})
    distances: list[str] = _values(*sampling.DISTANCES, about="Mallows models that people's rankings come from.")
    preferences: list[int] = _values(
        15, 1000, about="Comparisons a context: each of 6 actions' 15 pairs once on average, and plenty."
    )
    demonstrations: int = field(default=100, metadata={"help": "First choices a context the reference is made of."})
    prior: float = field(default=0.1, metadata={"help": "Pseudo-observations of each action beside them, > 0."})
    betas: list[float] = _values(*(2.0**power for power in range(-4, 9)), about="Rising.")
    optimizers: list[str] = _values(*experiment.OPTIMIZERS, about="adam, sgd or both.")
    steps: int = field(default=150, metadata={"help": "Full-batch steps."})
    kl_targets: list[float] = _values(
        *(0.01, 0.02, 0.05, 0.1, 0.2), about="Nats at which methods are compared; the table is at the middle one."
    )
    num_seeds: int = field(default=10, metadata={"help": "At least 5, for the intervals."})

    def __post_init__(self):
        if self.num_seeds < 5:
            raise ValueError(f"num_seeds must be at least 5 for an interval, got {self.num_seeds}")
        if len(self.dispersions) < 2 or max(self.dispersions) <= 0.5:
            raise ValueError(f"dispersions must be two or more, one of them above 0.5, got {self.dispersions}")
        for name in ("betas", "kl_targets"):
            values = getattr(self, name)
            if values != sorted(values) or values[0] <= 0:
                raise ValueError(f"{name} must be positive and rise, got {values}")
        unknown = set(self.optimizers) - set(experiment.OPTIMIZERS)
        if unknown:
            raise ValueError(f"unknown optimizers {sorted(unknown)}; choose from {', '.join(experiment.OPTIMIZERS)}")


def make_problem(options, distance, preferences):
    """The bandits of a setting."""
    return experiment.make_problem(
        options.dispersions,
        num_actions=options.num_actions,
        kind=distance,
        preferences=preferences,
        demonstrations=options.demonstrations,
        prior=options.prior,
        seeds=range(options.num_seeds),
    )


def run_setting(options, distance, preferences, optimizer):
    """Trains and summarises one setting, on one thread: the settings run beside each other."""
    torch.set_num_threads(1)
    problem = make_problem(options, distance, preferences)
    steps, history = experiment.train(problem, options.betas, optimizer=optimizer, steps=options.steps)
    reference = experiment.evaluate(problem, problem.ref_logps)
    history, reference = (
        {name: values.double().numpy() for name, values in found.items()} for found in (history, reference)
    )
    return report.summarise(steps, history, reference, options)


def measure_estimates(options):
    """{distance: what the reference's entropy says of the dispersion; the entropy of everybody's first choices}"""
    true = -torch.tensor(options.dispersions, dtype=torch.float64).log()
    result = {}
    for distance in options.distances:
        raw = make_problem(options, distance, options.preferences[0]).neg_log_dispersion["raw"]
        top = sampling.top_choice_probabilities(true, options.num_actions, distance)
        entropy = torch.special.entr(top).sum(-1)
        result[distance] = report.estimate_summary(raw.double().numpy(), true.numpy())
        result[distance]["limit"] = F.neg_log_dispersion(entropy, entropy, options.num_actions).tolist()
        result[distance]["people_entropy"] = (entropy / torch.tensor(options.num_actions).log()).tolist()
    return result


def main(arguments=None):
    (options,) = parse_options(Options, __doc__.split("\n")[0], arguments)
    keys = list(itertools.product(options.distances, options.preferences, options.optimizers))
    estimates, settings = measure_estimates(options), {}
    workers = min(len(keys), os.cpu_count())
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(run_setting, options, *key): key for key in keys}
        for done in tqdm(as_completed(running), total=len(keys), desc="settings"):
            settings[running[done]] = done.result()
    versions = {"mallowspo": mallowspo.__version__, "python": platform.python_version(), "torch": version("torch")}
    print(report.write_report({key: settings[key] for key in keys}, estimates, options, versions))
    print(f"written to {options.output_dir}")


if __name__ == "__main__":
    main()
