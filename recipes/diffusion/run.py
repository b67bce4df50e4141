"""Diffusion-DPO and its Mallows plug-in on a small diffusion model of pictures whose preferences are known.

    python recipes/diffusion/run.py                                      # default.yaml
    python recipes/diffusion/run.py --links bradley-terry mallows-phi --beta 500
    python recipes/diffusion/run.py --pretrained folder/with/unet/and/scheduler

Every option can stand in the YAML file or on the command line, which wins. Writes results.json, results.md,
samples.png and measures.png into output_dir. Each stage (the pretrained model, each link and seed) is kept in
output_dir/stages under a hash of what it depends on: an interrupted run goes on with the stage it was in, and options
of the tuning do not pretrain again.
"""

import copy
import functools
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import xxhash
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the recipes share
import model
import pictures
import report

from mallowspo import functional as F
from mallowspo.choices import PAIR_CHOICES, operator_settings
from mallowspo.dispersion import agreement_to_neg_log_dispersion, calibrated_scale
from options import check_at_least_one, check_positive, config_field, ends_the_script, list_field, parse_options
from reporting import package_versions
from stages import Stages


@dataclass
class DiffusionArguments:
    """What is pretrained, what is tuned and how it is measured."""

    config: str = config_field(__file__)
    output_dir: str = field(default="outputs/diffusion", metadata={"help": "Results and stages."})
    pretrained: str | None = field(
        default=None,
        metadata={"help": "Folder with unet/ and scheduler/ of a model of these pictures; None: make one."},
    )
    channels: list[int] = list_field(16, 32, 32, about="Of each resolution.")
    pretrain_steps: int = field(default=1800, metadata={"help": "Optimiser steps."})
    pretrain_batch_size: int = field(default=32, metadata={"help": "Pictures a step."})
    pretrain_learning_rate: float = field(default=2e-3, metadata={"help": "Largest of the one-cycle schedule."})
    agreement: list[float] = list_field(
        0.95, 0.85, 0.65, 0.55, about=f"Share of raters with the majority, by shape: {', '.join(pictures.SHAPES)}."
    )
    train_pairs: int = field(default=1024, metadata={"help": "Pairs with one vote each, drawn by each seed."})
    links: list[str] = list_field("bradley-terry", "mallows-theta", about="The first is compared with.")
    seeds: int = field(default=5, metadata={"help": "Runs of each link: own pairs, votes, noise and samples."})
    beta: float = field(default=1000.0, metadata={"help": "K of the loss is half of it."})
    steps: int = field(default=60, metadata={"help": "Optimiser steps of a run."})
    batch_size: int = field(default=16, metadata={"help": "Pairs a step."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Of a run, after ten steps of warm-up."})
    samples: int = field(default=64, metadata={"help": "Pictures sampled before and after each run."})
    sampling_steps: int = field(default=16, metadata={"help": "DDIM steps of a sample."})
    held_out_pairs: int = field(default=48, metadata={"help": "Pairs of the majority's order, drawn by each seed."})
    held_out_timesteps: int = field(default=4, metadata={"help": "Timesteps at which a held-out pair is scored."})


@ends_the_script
def parse_arguments(arguments=None):
    """DiffusionArguments; see options.parse_options. Raises ValueError for options that no run can have, too."""
    (found,) = parse_options((DiffusionArguments,), __doc__.split("\n")[0], arguments)
    check_arguments(found)
    return found


def check_arguments(arguments):
    """ValueError for options that no run can have."""
    check_at_least_one(arguments, "pretrain_steps", "pretrain_batch_size", "train_pairs", "seeds", "steps")
    check_at_least_one(arguments, "batch_size", "sampling_steps", "held_out_timesteps", "channels")
    check_positive(arguments, "pretrain_learning_rate", "learning_rate")
    for name in ("samples", "held_out_pairs"):
        if getattr(arguments, name) < len(pictures.SHAPES):
            raise ValueError(
                f"{name} must be at least {len(pictures.SHAPES)}, one a shape, got {getattr(arguments, name)}"
            )
    if arguments.batch_size > arguments.train_pairs:
        raise ValueError(f"batch_size {arguments.batch_size} is more than train_pairs {arguments.train_pairs}")
    for link in arguments.links:
        operator_settings(**PAIR_CHOICES | {"link": link, "beta": arguments.beta})
    pictures.check_agreement(arguments.agreement)


def pretrained_model(arguments, stages):
    """(unet, scheduler) from the folder given, from the stage of an earlier run, or made now and kept there."""
    folder = arguments.pretrained
    if folder is None:
        names = ("channels", "pretrain_steps", "pretrain_batch_size", "pretrain_learning_rate")

        def pretrain(folder):
            unet, scheduler = model.make_model(arguments.channels, seed=0)
            unet = model.pretrain(
                unet,
                scheduler,
                arguments.pretrain_steps,
                arguments.pretrain_batch_size,
                arguments.pretrain_learning_rate,
                seed=0,
            )
            unet.save_pretrained(folder / "unet")
            scheduler.save_pretrained(folder / "scheduler")

        folder = stages.folder("pretrained", {name: getattr(arguments, name) for name in names}, pretrain)
    return model.load_model(folder)


def run_seed(arguments, unet, scheduler, link, seed):
    """Tunes a copy of the UNet under a link (None: leaves it as it is) and measures it; a dict of arrays.

    The pairs, the held-out pairs and the noise of the samples depend on the seed alone, so that the links and the
    model before tuning can be compared picture by picture.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    train = pictures.draw_pairs(arguments.train_pairs, arguments.agreement, generator)
    held_out = pictures.draw_pairs(arguments.held_out_pairs, arguments.agreement, generator, consensus=True)
    shapes = torch.arange(arguments.samples) % len(pictures.SHAPES)
    noise = torch.randn(arguments.samples, *train.chosen.shape[1:], generator=generator)
    dispersion = None
    if link in F.MALLOWS_LINKS:
        dispersion = agreement_to_neg_log_dispersion(train.agreement, link)
        dispersion = torch.tensor(dispersion * calibrated_scale(dispersion), dtype=torch.float32)
    tuned, history = copy.deepcopy(unet), []
    if link is not None:
        steps = model.tune(
            tuned,
            unet,
            scheduler,
            train,
            dispersion,
            link=link,
            beta=arguments.beta,
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            seed=seed,
        )
        history = list(tqdm(steps, total=arguments.steps, desc=f"{link}, seed {seed}", mininterval=1))
    images = model.sample(tuned, scheduler, shapes, noise, arguments.sampling_steps)
    seen = pictures.look(images)
    accuracy, distance = model.compare(tuned, unet, scheduler, held_out, arguments.held_out_timesteps, seed)
    return {
        "preferred": (seen.warmth > 0).numpy(),
        "right_shape": (seen.shapes == shapes).numpy(),
        "accuracy": accuracy,
        "distance": distance,
        "sample_shapes": shapes.numpy(),
        "held_out_shapes": held_out.shapes.numpy(),
        "history": np.array(history).reshape(-1, 2),
        "images": ((images.clamp(-1, 1) + 1) * 127.5).round().byte().numpy(),
    }


def main(argv=None):
    arguments = parse_arguments(argv)
    output_dir = Path(arguments.output_dir)
    stages = Stages(output_dir / "stages")
    unet, scheduler = pretrained_model(arguments, stages)

    weights = b"".join(tensor.numpy().tobytes() for tensor in unet.state_dict().values())
    others = ("config", "output_dir", "pretrained", "channels", "links", "seeds")
    options = {k: v for k, v in asdict(arguments).items() if k not in others and not k.startswith("pretrain_")}
    inputs = [xxhash.xxh3_128_hexdigest(weights), dict(scheduler.config), options]
    runs = {}
    for seed in range(arguments.seeds):
        for link in (None, *arguments.links):
            name = link or "before"
            make = functools.partial(run_seed, arguments, unet, scheduler, link, seed)
            runs[name, seed] = stages.arrays(f"{name}-seed{seed}", inputs, make)

    versions = package_versions("torch", "diffusers", "numpy")
    print(report.write_report(output_dir, runs, arguments.agreement, asdict(arguments), versions))
    print(f"written to {output_dir}")


if __name__ == "__main__":
    main()
