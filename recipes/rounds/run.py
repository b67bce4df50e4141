"""Three methods around the objective, on a bandit: accelerated rounds, learning from advantages, a discriminator.

    python recipes/rounds/run.py                       # default.yaml, a minute on one core
    python recipes/rounds/run.py --num_seeds 50 --beta 1

Every option can stand in the YAML file or on the command line, which wins. Writes results.json, results.md and a plot
of each study into output_dir.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bandit"))  # the problem, its people and the metrics
sys.path.insert(0, str(Path(__file__).parents[1]))  # what the recipes share
import experiment
import figures
import studies

from options import (
    check_at_least_one,
    check_not_negative,
    check_positive,
    config_field,
    list_field,
    parse_options,
)
from reporting import package_versions, write_files


@dataclass
class Options(experiment.ProblemOptions):
    """The bandits, what every study shares, and what each of the three has of its own."""

    config: str = config_field(__file__)
    output_dir: str = field(default="outputs/rounds", metadata={"help": "Tables, JSON and plots."})
    distance: str = field(default="kendall", metadata={"help": "Mallows model of people's rankings, or spearman."})
    rounds: int = field(default=16, metadata={"help": "Of sampling and learning."})
    steps: int = field(default=40, metadata={"help": "Of Adam, in each round."})
    learning_rate: float = field(default=0.02, metadata={"help": "Of Adam."})
    beta: float = field(default=4.0, metadata={"help": "Of DPO, in the first study and in the third."})
    num_seeds: int = field(default=20, metadata={"help": "At least 5, for the intervals."})
    alphas: list[float] = list_field(0.3, 0.6, 0.9, about="First study: extrapolation, in (0, 1).")
    comparisons: int = field(default=60, metadata={"help": "First study: pairs a context and round."})
    temperatures: list[float] = list_field(0.05, 0.1, 0.2, 0.5, about="Second study: lambda.")
    rewards: int = field(default=10, metadata={"help": "Second study: actions a context and round."})
    reward_noise: float = field(default=0.3, metadata={"help": "Second study: standard deviation of a reward."})
    candidates: int = field(default=8, metadata={"help": "Third study: pairs a context and round."})
    gold: int = field(default=8, metadata={"help": "Third study: of them, over all contexts, shown to people."})

    def __post_init__(self):
        super().__post_init__()
        check_at_least_one(self, "rounds", "steps", "comparisons", "rewards", "candidates", "gold")
        check_positive(self, "learning_rate", "beta", "temperatures")
        check_not_negative(self, "reward_noise")
        if self.gold > self.candidates * len(self.dispersions):
            raise ValueError(f"gold={self.gold} is more than all {self.candidates} candidates of every context")
        if not all(0 < alpha < 1 for alpha in self.alphas):
            raise ValueError(f"alphas must be in (0, 1), got {self.alphas}; 0 is there in any case")


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
        "gold, random": ("random", "none"),
        "gold, uncertain": ("uncertain", "none"),
        "silver, random": ("random", "table"),
        "silver, uncertain": ("uncertain", "table"),
        "shared silver, random": ("random", "shared"),
        "shared silver, uncertain": ("uncertain", "shared"),
        "all gold": ("all", "none"),
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
    (options,) = parse_options(Options, __doc__.split("\n")[0], arguments)
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)  # before the work, which is lost where it cannot be
    torch.set_num_threads(1)  # the tables are small
    seeds = range(options.num_seeds)
    problem = options.make_problem(options.distance, 1)  # of a fixed data set, which no study here reads
    histories, methods = run_studies(options, problem, seeds)
    results = {name: figures.summarise(history, methods[name]) for name, history in histories.items()}
    frontier = studies.frontier(problem)
    text = figures.tables(results, options)
    versions = package_versions("torch")
    record = {"settings": asdict(options), "versions": versions, "frontier": frontier, "studies": results}
    plots = {name: figures.plot(name, study, frontier) for name, study in results.items()}
    write_files(options.output_dir, record, text, plots)
    print(text)
    print(f"written to {options.output_dir}")


if __name__ == "__main__":
    main()
