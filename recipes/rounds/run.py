"""Three methods around the objective, on a bandit: accelerated rounds, learning from advantages, a discriminator.

    python recipes/rounds/run.py                       # default.yaml, a minute on one core
    python recipes/rounds/run.py --num_seeds 50 --beta 1

Every option can stand in the YAML file or on the command line, which wins. Writes results.json, results.md and a plot
of each study into output_dir.
"""

import json
import platform
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bandit"))  # the problem, its people and the metrics
sys.path.insert(0, str(Path(__file__).parents[1]))  # what the recipes share
import experiment
import figures
import studies

import mallowspo
from mallowspo.files import write_whole
from options import parse_options


@dataclass
class Options:
    """What default.yaml has, where each is explained."""

    output_dir: str
    dispersions: list[float]
    num_actions: int
    distance: str
    demonstrations: int
    prior: float
    rounds: int
    steps: int
    learning_rate: float
    beta: float
    alphas: list[float]
    comparisons: int
    temperatures: list[float]
    rewards: int
    reward_noise: float
    candidates: int
    gold: int
    num_seeds: int
    seed: int
    config: str = field(default=str(Path(__file__).with_name("default.yaml")), metadata={"help": "YAML file."})


def run_studies(options, problem, seeds):
    """{study: {metric: [rounds + 1, M, S]}} and {study: names of its methods}, the first one what it is compared with.

    The first study has a control for each alpha: no extrapolation, but beta (1 - alpha), which is how far momentum
    carries rounds whose steps all go the same way.
    """
    shared = {name: getattr(options, name) for name in ("rounds", "steps", "learning_rate")}
    beta = options.beta
    plain = {"iterative DPO": (0.0, beta)}
    faster = {f"alpha {alpha:g}": (alpha, beta) for alpha in options.alphas}
    larger = {f"beta {(1 - alpha) * beta:g}": (0.0, (1 - alpha) * beta) for alpha in options.alphas}
    losses = {"apa": "APA", "awr": "AWR", "pg": "policy gradient"}
    advantages = {f"{losses[loss]}, {t:g}": (loss, t) for loss in losses for t in options.temperatures}
    labels = {
        "gold, random": ("random", False),
        "gold, uncertain": ("uncertain", False),
        "silver, random": ("random", True),
        "silver, uncertain": ("uncertain", True),
        "all gold": ("all", False),
    }
    found = {
        "accelerated": studies.accelerated(
            problem, plain | faster | larger, seeds, samples=options.comparisons, **shared
        ),
        "advantages": studies.advantages(
            problem, advantages, seeds, samples=options.rewards, noise=options.reward_noise, **shared
        ),
        "discriminator": studies.discriminator(
            problem, labels, seeds, samples=options.candidates, beta=beta, gold=options.gold, **shared
        ),
    }
    return found, dict(zip(found, map(list, (plain | faster | larger, advantages, labels)), strict=True))


def main(arguments=None):
    (options,) = parse_options((Options,), __doc__.split("\n")[0], arguments)
    torch.set_num_threads(1)  # the tables are small
    seeds = range(options.seed, options.seed + options.num_seeds)
    problem = experiment.make_problem(
        options.dispersions,
        num_actions=options.num_actions,
        kind=options.distance,
        preferences=1,  # of a fixed data set, which no study here reads
        demonstrations=options.demonstrations,
        prior=options.prior,
        seeds=seeds,
    )
    histories, methods = run_studies(options, problem, seeds)
    results = {name: figures.summarise(history, methods[name]) for name, history in histories.items()}
    frontier = studies.frontier(problem)
    text = figures.tables(results, options)
    folder = Path(options.output_dir)
    versions = {"mallowspo": mallowspo.__version__, "python": platform.python_version(), "torch": version("torch")}
    record = {"options": asdict(options), "versions": versions, "frontier": frontier, "studies": results}
    write_whole(folder / "results.json", json.dumps(record, indent=1).encode())
    write_whole(folder / "results.md", text.encode())
    for name, study in results.items():
        write_whole(folder / f"{name}.png", figures.plot(name, study, frontier))
    print(text)
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
