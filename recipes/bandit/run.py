"""Does the dispersion-weighted loss keep diversity and trade accuracy against KL better than DPO, in a bandit?

    python recipes/bandit/run.py                                       # default.yaml, minutes on two cores
    python recipes/bandit/run.py --config recipes/bandit/paper.yaml    # more of everything

Every option can stand in the YAML file of --config or on the command line, which wins: ``--steps 500``.
Writes results.json, results.md and the plots into output_dir. Each setting's result is kept in output_dir/stages: an
interrupted run goes on with the settings that are missing.
"""

import itertools
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the recipes share
import experiment
import report
import sampling

import mallowspo.functional as F
from options import check_at_least_one, check_positive, config_field, list_field, parse_options
from reporting import package_versions
from stages import Stages


@dataclass
class Options(experiment.ProblemOptions):
    """The size of everything. A setting is one of distances x preferences x optimizers."""

    config: str = config_field(__file__)
    output_dir: str = field(default="outputs/bandit", metadata={"help": "Table, JSON and plots."})
    distances: list[str] = list_field(*sampling.DISTANCES, about="Mallows models that people's rankings come from.")
    preferences: list[int] = list_field(
        15, 1000, about="Comparisons a context: each of 6 actions' 15 pairs once on average, and plenty."
    )
    betas: list[float] = list_field(*(2.0**power for power in range(-4, 9)), about="Rising.")
    optimizers: list[str] = list_field(*experiment.OPTIMIZERS, about="adam, sgd or both.")
    steps: int = field(default=150, metadata={"help": "Full-batch steps."})
    kl_targets: list[float] = list_field(
        *(0.01, 0.02, 0.05, 0.1, 0.2), about="Nats at which methods are compared; the table is at the middle one."
    )

    def __post_init__(self):
        super().__post_init__()
        if len(self.dispersions) < 2 or max(self.dispersions) <= 0.5:
            raise ValueError(f"dispersions must be two or more, one of them above 0.5, got {self.dispersions}")
        for name in ("betas", "kl_targets"):
            values = getattr(self, name)
            if values != sorted(values) or values[0] <= 0:
                raise ValueError(f"{name} must be positive and rise, got {values}")
        check_positive(self, "betas", "kl_targets")
        check_at_least_one(self, "steps", "preferences")
        unknown = set(self.optimizers) - set(experiment.OPTIMIZERS)
        if unknown:
            raise ValueError(f"unknown optimizers {sorted(unknown)}; choose from {', '.join(experiment.OPTIMIZERS)}")


def run_setting(options, distance, preferences, optimizer):
    """Trains and summarises one setting, on one thread: the settings run beside each other."""
    torch.set_num_threads(1)

    def train():
        problem = options.make_problem(distance, preferences)
        steps, history = experiment.train(problem, options.betas, optimizer=optimizer, steps=options.steps)
        reference = experiment.evaluate(problem, problem.ref_logps)
        found = {f"history {name}": values for name, values in history.items()}
        found |= {f"reference {name}": values for name, values in reference.items()}
        return {"steps": np.array(steps)} | {name: values.double().numpy() for name, values in found.items()}

    others = ("config", "output_dir", "distances", "preferences", "optimizers", "kl_targets")
    inputs = {name: value for name, value in asdict(options).items() if name not in others}
    inputs |= {"distance": distance, "preferences": preferences, "optimizer": optimizer}
    kept = Stages(Path(options.output_dir) / "stages").arrays("setting", inputs, train)
    steps = kept.pop("steps").tolist()
    history, reference = (
        {name.removeprefix(kind): values for name, values in kept.items() if name.startswith(kind)}
        for kind in ("history ", "reference ")
    )
    return report.summarise(steps, history, reference, options)


def measure_estimates(options):
    """{distance: what the reference's entropy says of the dispersion; the entropy of everybody's first choices}"""
    true = -torch.tensor(options.dispersions, dtype=torch.float64).log()
    result = {}
    for distance in options.distances:
        raw = options.make_problem(distance, options.preferences[0]).neg_log_dispersion["raw"]
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
    versions = package_versions("torch")
    print(report.write_report({key: settings[key] for key in keys}, estimates, options, versions))
    print(f"written to {options.output_dir}")


if __name__ == "__main__":
    main()
