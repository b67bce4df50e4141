"""Online training on completed reviews: discriminator-guided preference rounds, and learning from advantages.

    python recipes/controllable_generation/online.py                     # online.yaml
    python recipes/controllable_generation/online.py --rounds 6 --gold 8

Each round samples completions of new prefixes from the policy, labels them, updates the policy and measures it on
held-out prefixes. Every method has the same prefixes, random numbers and number of updates. The options are run.py's
and those below: each preset and beta of the grid is trained by each of LABELLINGS, then APA and AWR. A run that was
interrupted goes on at its round. Writes results.json, results.md, discriminator.png and advantages.png.
"""

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import disable_progress_bars
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, set_seed
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the recipes share
sys.path.append(str(Path(__file__).parents[1] / "dialogue"))  # judges; last, for its other names are used here too
import advantages
import judges
import labels
import online_report
import preferences
import run
import sampling

import models
from mallowspo.adapters import add_adapter
from methods import check_one_reference, training_facts
from options import check_at_least_one, check_positive, config_field, ends_the_script
from reporting import package_versions
from stages import digest, read_checked, write_checked

# What is asked for gold (the least certain pairs, any, or every one), and whether the discriminator orders the rest.
LABELLINGS = {
    "gold": {"uncertain": False, "silver": False},
    "silver, random": {"uncertain": False, "silver": True},
    "silver, uncertain": {"uncertain": True, "silver": True},
    "all gold": {"uncertain": False, "silver": False},
}

# What the updates from advantages do not know.
PLAIN = {"gradient_accumulation_steps": 1, "lr_scheduler_type": "constant", "warmup_steps": 0, "bf16": False}
PLAIN |= {"fp16": False}


@dataclass
class Options(run.RecipeArguments):
    """Those of run.py; train_prefixes is divided among the rounds, max_steps is the updates of each."""

    config: str = config_field(__file__, "online.yaml")
    rounds: int = field(default=3, metadata={"help": "Of sampling, labelling and training."})
    gold: int = field(default=4, metadata={"help": "Pairs a round whose gold label is asked for."})
    penalty: float = field(default=0.1, metadata={"help": "Ridge penalty of the discriminator."})
    temperature: float = field(default=1.0, metadata={"help": "Of APA and AWR, beside whitened advantages."})
    gae_lambda: float = field(default=0.95, metadata={"help": "Of the advantages, in [0, 1]."})


class Method(NamedTuple):
    """A preset or one of advantages.LOSSES, its beta or temperature, and a key of LABELLINGS or None."""

    loss: str
    number: float
    labelling: str | None

    @property
    def study(self):
        return "advantages" if self.labelling is None else "discriminator"

    def __str__(self):
        return f"{self.loss} {self.number:g}" + (f", {self.labelling}" if self.labelling else "")


@ends_the_script
def parse_arguments(arguments=None):
    """(Options, MallowsConfig, methods).

    Raises:
        ValueError: of ``run.parse_arguments``, and for numbers out of range.
    """
    recipe, training, grid = run.parse_arguments(arguments, Options)
    check_one_reference(method for method, _ in grid)
    check_at_least_one(recipe, "rounds", "gold", "lora_rank")
    if training.max_steps < 1:
        raise ValueError(f"max_steps, the updates of a round, must be at least 1, got {training.max_steps}")
    for name, wanted in PLAIN.items():
        if getattr(training, name) != wanted:
            raise ValueError(f"{name} must be {wanted}, the same in every method, got {getattr(training, name)}")
    if recipe.samples % 2:
        raise ValueError(f"samples must be even, so that each is in a pair, got {recipe.samples}")
    if recipe.train_prefixes % recipe.rounds:
        raise ValueError(f"train_prefixes={recipe.train_prefixes} is no multiple of rounds={recipe.rounds}")
    pairs = recipe.train_prefixes // recipe.rounds * recipe.samples // 2
    if recipe.gold > pairs:
        raise ValueError(f"gold={recipe.gold} is more than the {pairs} pairs of a round; lower it or sample more")
    check_positive(recipe, "penalty", "temperature")
    if not 0 <= recipe.gae_lambda <= 1:
        raise ValueError(f"gae_lambda must be in [0, 1], got {recipe.gae_lambda}")
    methods = [Method(*point, labelling) for point in grid for labelling in LABELLINGS]
    methods += [Method(loss, recipe.temperature, None) for loss in advantages.LOSSES]
    return recipe, replace(training, save_strategy="no"), methods


# ---- one training --------------------------------------------------------------------------------------------------


@dataclass
class Task(run.Shared):
    """What all trainings share."""

    features: Callable  # from texts to [N, D]

    @property
    def held_out(self):
        """{the movies: prefixes}."""
        return {run.MOVIE: self.split["held out"][run.MOVIE]}


def policy_of(task, state, seed):
    """The policy as a round left it, from the reference's files: the same whether the run was interrupted or not."""
    set_seed(seed)  # draws the adapter
    model = AutoModelForCausalLM.from_pretrained(task.name, dtype=torch.float32).to(task.training.device).eval()
    model = add_adapter(model, models.lora_config(task.recipe.lora_rank))
    model.load_state_dict(state["weights"], strict=False)
    return model


def play_round(task, method, seed, state):
    """The state after one more round; ``records`` has what each so far gave.

    Raises:
        ValueError: a reward that is not finite, fewer pairs than gold, all pairs gold ties.
    """
    recipe, training, tokenizer = task.recipe, task.training, task.tokenizer
    number = len(state["records"])
    chance = 1000 * seed + number  # the same for every method
    prefixes = task.split["train"][number :: recipe.rounds]
    model = policy_of(task, state, seed)
    drawn = sampling.sample(model, tokenizer, prefixes, recipe.samples, recipe.max_new_tokens, chance)
    rewards = preferences.score(task.reward, prefixes, drawn)
    known, record = state["known"], {"sampled": float(np.mean(rewards))}
    if method.labelling is None:
        prompts = [ids for ids in sampling.encode(tokenizer, prefixes) for _ in range(recipe.samples)]
        responses = [c["ids"] for group in drawn for c in group]
        lengths = [[len(c["ids"]) for c in group] for group in drawn]
        found = advantages.token_advantages(rewards, lengths, recipe.gae_lambda)
        chosen = {"loss": method.loss, "temperature": method.number, "training": training, "seed": chance}
        material = prompts, responses, found
        record["loss"] = advantages.update(model, task.reference, tokenizer.pad_token_id, *material, **chosen)
    else:
        pairs = labels.sampled_pairs(prefixes, drawn, rewards)
        gold = None if method.labelling == "all gold" else recipe.gold
        asking = {"gold": gold, "penalty": recipe.penalty, "min_gap": recipe.min_gap, "seed": chance}
        asking |= LABELLINGS[method.labelling]
        found, known, counts = labels.label(pairs, task.features, known, **asking)
        record |= counts | {"rows": int((found != 0).sum()), "loss": None}
        if found.any() or counts["asked"] == counts["pairs"]:  # a few answers may all be ties: nothing to learn from
            rows = labels.rows_of(pairs, found, tokenizer.eos_token)
            settings = run.training_of(training, method.loss, method.number, chance, task.folder)
            _, log = run.train(model, tokenizer, rows, settings, rank=0)  # it has its adapter
            record["loss"] = log.get("loss")
    record["domains"] = run.evaluate(model, task.reference, tokenizer, task.reward, recipe, task.held_out, seed)
    weights = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    return {"weights": weights, "known": known, "records": [*state["records"], record]}


# ---- what an interrupted training left -----------------------------------------------------------------------------


def write_state(path, state):
    """Writes a state and its checksum, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_checked(path, buffer.getvalue())


def read_state(path):
    """The state, None where there is no file. Raises ValueError for a corrupt one."""
    return torch.load(io.BytesIO(read_checked(path)), weights_only=True) if path.exists() else None


def train(task, method, seed, path, bar):
    """The records of all rounds; after each the state is in the file of that path, from where an earlier run goes on.

    Args:
        bar: of tqdm, moved by one a round.
    """
    state = read_state(path) or {"weights": {}, "known": torch.zeros(0, len(task.features(["a"])[0])), "records": []}
    bar.update(len(state["records"]))
    while len(state["records"]) < task.recipe.rounds:
        state = play_round(task, method, seed, state)
        write_state(path, state)
        bar.update()
    return state["records"]


# ---- the whole -----------------------------------------------------------------------------------------------------


def set_up(recipe, training):
    """The Task: the prefixes and the tuned reference, kept as run.py keeps them."""
    features = judges.EmbeddingJudge(training.device).embed
    return Task(**vars(run.prepare(recipe, training)), features=features)


def main(arguments=None):
    recipe, training, methods = parse_arguments(arguments)
    task = set_up(recipe, training)
    stages, shared = task.stages, task.evaluation_facts(task.held_out)
    sizes = ("rounds", "gold", "penalty", "gae_lambda", "samples", "min_gap", "lora_rank")
    facts = {"sizes": {name: getattr(recipe, name) for name in sizes}, "train": task.split["train"]}
    seeds, starts, runs = range(training.seed, training.seed + recipe.seeds), [], []
    with tqdm(total=len(seeds) * len(methods) * recipe.rounds, desc="rounds") as bar:
        for seed in seeds:  # seed by seed, so that an interrupted run has whole seeds
            measured = (task.reference, task.reference, task.tokenizer, task.reward, recipe, task.held_out, seed)
            start = stages.value("start", shared | {"seed": seed}, lambda given=measured: run.evaluate(*given))
            starts.append({"domains": start})
            for method in methods:
                bar.set_postfix_str(f"{method}, seed {seed}")
                settings = training_facts(replace(training, seed=seed))
                inputs = shared | facts | {"method": list(method), "training": settings}
                path, done = task.folder / f"online-{digest(inputs)[:12]}.pt", bar.n
                records = stages.value("online", inputs, lambda m=method, s=seed, p=path: train(task, m, s, p, bar))
                path.unlink(missing_ok=True)
                bar.update(done + recipe.rounds - bar.n)  # where nothing was left to do
                runs.append({"method": str(method), "study": method.study, "seed": seed, "records": records})
    settings, versions = run.record(recipe, training)
    versions |= package_versions(judges.EMBEDDING_PACKAGE)
    print(online_report.write_report(training.output_dir, starts, runs, settings, versions))
    print(f"written to {training.output_dir}")


if __name__ == "__main__":
    # One bar over all rounds instead of a log of each training.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    main()
