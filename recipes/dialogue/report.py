"""The report of the dialogue recipe: numbers with their uncertainty, a table, a JSON file and two plots."""

import math
from collections import defaultdict

import numpy as np
from matplotlib.figure import Figure

from reporting import finite, table, write_files
from stats import correlation, percentiles, ranks, resampled_shares, wins

RESAMPLES = 2000

# How contested two replies of a topic are, as a person would say from the topics' names and prompts. Written down
# before any dispersion was measured. 1: one right answer ... 5: a matter of feeling.
HUMAN_ORDER = {
    "trivia": (1, "one right answer"),
    "science": (1, "one right answer"),
    "history": (1, "one right answer"),
    "computers": (2, "facts, worded in several ways"),
    "tech support": (2, "few remedies work, and they can be checked"),
    "coding": (2, "several programs work, and they can be checked"),
    "ai": (3, "definitions mixed with opinion"),
    "money": (3, "definitions mixed with opinion"),
    "sports": (3, "rules mixed with favourites"),
    "profile": (3, "questions to a persona: some invention"),
    "greetings": (3, "set phrases, many of them"),
    "health": (3, "advice that depends on the person"),
    "movies": (4, "taste"),
    "literature": (4, "taste"),
    "food": (4, "taste"),
    "politics": (4, "opinion"),
    "gossip": (4, "anything goes"),
    "conversations": (4, "anything goes"),
    "humor": (5, "what one finds funny"),
    "emotion": (5, "feelings"),
    "psychology": (5, "feelings and self-image"),
}

# Key in the log and its name in the table.
METRICS = (
    ("rewards/accuracies", "preference accuracy (reward of chosen > rejected; ties, as at the start, count half)"),
    ("likelihood_accuracy", "likelihood accuracy (mean token log-prob of chosen > rejected)"),
    ("rewards/margins", "reward margin"),
    ("loss", "loss"),
    ("log_ratio/chosen", "mean token log-ratio of chosen (nats)"),
    ("log_ratio/rejected", "mean token log-ratio of rejected (nats)"),
)


def clustered_mean(values, clusters, seed=0):
    """Mean of values and its 95% interval from resampling clusters: pairs of one prompt are not independent.

    Args:
        values: [n] floats. clusters: [n] integers.

    Returns:
        (mean, low, high); low and high are None for fewer than three clusters, which say nothing about the spread.
    """
    values = np.asarray(values, dtype=np.float64)
    _, cluster = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(cluster, weights=values), np.bincount(cluster)
    mean = float(values.mean())
    if len(sums) < 3:
        return mean, None, None
    draws = resampled_shares(len(sums), RESAMPLES, np.random.default_rng(seed))
    return mean, *percentiles((draws @ sums) / (draws @ counts))


def clustered_share(wins, clusters):
    """Mean of 0, 1/2 and 1 and its 95% Wilson interval, honest at 0 and 1 too, where resampling sees no spread.

    The number of trials is that of clusters where they are equally large, and else the effective one of weights in
    proportion to their sizes n, (sum n)^2 / sum n^2. Ties alone are no measurement: 1/2 without a spread.

    Args and Returns: as :func:`clustered_mean`.
    """
    wins = np.asarray(wins, dtype=np.float64)
    sizes = np.unique(clusters, return_counts=True)[1]
    mean, trials = float(wins.mean()), float(sizes.sum() ** 2 / (sizes**2).sum())
    if (wins == 0.5).all():
        return mean, mean, mean
    extra = 1.96**2 / trials
    centre = (mean + extra / 2) / (1 + extra)
    half = 1.96 * math.sqrt(mean * (1 - mean) / trials + extra / (4 * trials)) / (1 + extra)
    return mean, centre - half, centre + half


def summarise(scores, prompt_ids):
    """The METRICS of scored pairs, each with its 95% interval over prompts.

    Args:
        scores: of ``MallowsTrainer.score``. prompt_ids: [n], one a scored pair.

    Returns:
        dict of floats: ``<metric>``, ``<metric>_low``, ``<metric>_high``. Left out: log-ratios where the objective has
        no reference, intervals where there are fewer than three prompts.
    """
    per_token = {side: scores[f"{side}_logps"] / scores[f"{side}_tokens"] for side in ("chosen", "rejected")}
    shares = {
        "rewards/accuracies": wins(scores["chosen_rewards"], scores["rejected_rewards"]),
        "likelihood_accuracy": wins(per_token["chosen"], per_token["rejected"]),
    }
    values = {"rewards/margins": scores["chosen_rewards"] - scores["rejected_rewards"], "loss": scores["losses"]}
    if "ref_chosen_logps" in scores:
        for side, logps in per_token.items():
            values[f"log_ratio/{side}"] = logps - scores[f"ref_{side}_logps"] / scores[f"{side}_tokens"]
    found = {name: clustered_share(value, prompt_ids) for name, value in shares.items()}
    found |= {name: clustered_mean(value, prompt_ids) for name, value in values.items()}
    result = {}
    for name, interval in found.items():
        keyed = zip((name, f"{name}_low", f"{name}_high"), interval, strict=True)
        result.update((key, number) for key, number in keyed if number is not None)
    return result


def by_topic(sides):
    """Dispersion and held-out accuracy of each topic.

    Args:
        sides: {"train": part, "held out": part}, a part being (scores, topics, prompt_ids) of its scored pairs.

    Returns:
        list of dicts, by rising dispersion phi where there is one, else by name. phi = exp(-neg_log_dispersion) comes
        from the reference alone, so both sides count; accuracy from the held-out side alone.
    """
    phi, prompts, correct = defaultdict(list), defaultdict(list), defaultdict(list)
    for side, (scores, topics, prompt_ids) in sides.items():
        accuracy = wins(scores["chosen_rewards"], scores["rejected_rewards"])
        dispersion = np.exp(-scores.get("neg_log_dispersion", np.full(len(topics), np.nan)))
        for i, topic in enumerate(topics):
            phi[topic].append(dispersion[i])
            prompts[topic].append(prompt_ids[i])
            if side == "held out":
                correct[topic].append(accuracy[i])
    rows = []
    for topic in phi:
        mean, low, high = clustered_mean(phi[topic], prompts[topic])
        rows.append(
            {
                "topic": topic,
                "prompts": len(set(prompts[topic])),
                "pairs": len(phi[topic]),
                "phi": None if math.isnan(mean) else mean,
                "phi_low": None if math.isnan(mean) else low,
                "phi_high": None if math.isnan(mean) else high,
                "human_level": HUMAN_ORDER.get(topic, (None,))[0],
                "held_out_pairs": len(correct[topic]),
                "held_out_accuracy": float(np.mean(correct[topic])) if correct[topic] else None,
            }
        )
    return sorted(rows, key=lambda row: (row["phi"] or 0, row["topic"]))


def compare_with_human_order(topics, permutations=10_000, seed=0):
    """Spearman correlation of the topics' phi with HUMAN_ORDER.

    Returns:
        {"spearman", "p_value", "topics"}: p_value is two-sided, the share of random orders of the topics that
        correlate as much. The first two are None with fewer than three topics or where either order has only ties.
    """
    known = [(row["phi"], row["human_level"]) for row in topics if row["phi"] is not None and row["human_level"]]
    result = {"spearman": None, "p_value": None, "topics": len(known)}
    if len(known) < 3:
        return result
    index, human = (ranks(np.array(column)) for column in zip(*known, strict=True))
    if not index.std() or not human.std():
        return result
    spearman, generator = correlation(index, human), np.random.default_rng(seed)
    shuffled = np.array([correlation(generator.permutation(index), human) for _ in range(permutations)])
    as_much = int((np.abs(shuffled) >= abs(spearman) - 1e-12).sum())
    return result | {"spearman": spearman, "p_value": (as_much + 1) / (permutations + 1)}


# ---- files ---------------------------------------------------------------------------------------------------------


def write_report(output_dir, history, topics, settings, versions, saved_step=None):
    """Writes results.json, results.md, training.png and dispersion_by_topic.png, each whole or not at all.

    Args:
        output_dir: made if missing.
        history: evaluations in the order of their ``step``, before training first; the ``eval_`` entries of
            ``trainer.state.log_history`` with that prefix off.
        topics: of :func:`by_topic`.
        settings, versions: dicts that JSON can hold, for the record.
        saved_step: of the evaluation of the model that was saved; None: the last.

    Returns:
        The text of results.md.
    """
    after = history[-1] if saved_step is None else next(row for row in history if row["step"] == saved_step)
    order = compare_with_human_order(topics)
    results = {
        "before": history[0],
        "after": after,
        "topics": topics,
        "human_order": order,
        "history": history,
        "settings": settings,
        "versions": versions,
    }
    text = _table(history[0], after, topics, order)
    figures = {"training": plot_training(history), "dispersion_by_topic": plot_topics(topics, order)}
    write_files(output_dir, finite(results), text, figures)
    return text


def _table(before, after, topics, order):
    intervals = "mean and 95% interval over prompts (accuracies: Wilson; others: bootstrap)"
    lines = ["# Dialogue", "", f"Held-out pairs: {intervals}.", ""]
    rows = [(title, interval(before, name), interval(after, name)) for name, title in METRICS if name in after]
    lines += table(["", "before", f"after {after['step']} steps"], rows)
    lines += ["", "Topics by dispersion (phi near 0: people agree; near 1: they do not).", ""]
    rows = []
    for row in topics:
        accuracy, level = "-", row["human_level"] or "-"
        if row["held_out_pairs"]:
            accuracy = f"{row['held_out_accuracy']:.2f} ({row['held_out_pairs']})"
        rows.append((row["topic"], interval(row, "phi"), row["prompts"], row["pairs"], level, accuracy))
    lines += table(["topic", "phi", "prompts", "pairs", "human level", "held-out accuracy (pairs)"], rows)
    return "\n".join([*lines, "", order_sentence(order), ""])


def interval(row, name):
    """A cell: the number with its interval, - where there is none."""
    if row.get(name) is None:
        return "-"
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return f"{row[name]:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def order_sentence(order):
    """What :func:`compare_with_human_order` found, in words."""
    if order["spearman"] is None:
        return f"The index cannot be compared with a person's order of the topics ({order['topics']} of them known)."
    verdict = "more than chance gives" if order["spearman"] > 0 else "the other way round, more than chance gives"
    if order["p_value"] >= 0.05:
        verdict = "chance could give this"
    return (
        f"Does the index order topics as a person would? Spearman correlation {order['spearman']:+.2f} "
        f"over {order['topics']} topics, p = {order['p_value']:.3f}: {verdict}."
    )


# ---- plots ---------------------------------------------------------------------------------------------------------

BLUE, ORANGE, GREY = "#0b62a4", "#d1570d", "#777777"


def plot_training(history):
    """Held-out accuracies and mean token log-ratios over the optimiser steps, with 95% bands."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curve(left, history, "rewards/accuracies", BLUE, "by reward")
    _curve(left, history, "likelihood_accuracy", ORANGE, "by mean token log-prob")
    left.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    left.set(title="Held-out preference accuracy", xlabel="optimiser step", ylabel="share of pairs")
    _curve(right, history, "log_ratio/chosen", BLUE, "chosen")
    _curve(right, history, "log_ratio/rejected", ORANGE, "rejected")
    right.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
    right.set(title="Held-out log-ratio to the reference", xlabel="optimiser step", ylabel="nats per token")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines[1:]:
            axes.legend(frameon=False)
    return figure


def _curve(axes, history, name, color, label):
    rows = [row for row in history if name in row]
    if not rows:
        return
    steps, values = [row["step"] for row in rows], [row[name] for row in rows]
    axes.plot(steps, values, color=color, label=label, marker="o", markersize=4)
    if all(f"{name}_low" in row for row in rows):
        axes.fill_between(
            steps, [row[f"{name}_low"] for row in rows], [row[f"{name}_high"] for row in rows], color=color, alpha=0.15
        )


def plot_topics(topics, order):
    """Mean dispersion phi of each topic with its 95% interval, coloured by the person's level."""
    shown = [row for row in topics if row["phi"] is not None]
    figure = Figure(figsize=(8, 1.6 + 0.28 * max(len(shown), 3)), layout="constrained")
    axes = figure.subplots()
    levels = ("#0b3c5d", "#328cc1", "#8a8a8a", "#e58a3c", "#b3331e")
    for i, row in enumerate(shown):
        color = levels[row["human_level"] - 1] if row["human_level"] else GREY
        if row["phi_low"] is not None:
            axes.hlines(i, row["phi_low"], row["phi_high"], color=color, linewidth=2)
        axes.plot(row["phi"], i, "o", color=color, fillstyle="full" if row["phi_low"] is not None else "none")
    names = [f"{row['topic']}  ({row['prompts']} prompts, {row['pairs']} pairs)" for row in shown]
    axes.set_yticks(range(len(shown)), names)
    axes.set_xlabel("phi, mean and 95% interval over prompts\n(hollow: fewer than three prompts, no interval)")
    meanings = ("one right answer", "can be checked", "some opinion", "taste, opinion", "feeling")
    found = {row["human_level"] for row in shown} - {None}
    for level in sorted(found):
        axes.plot([], [], "o", color=levels[level - 1], label=f"{level}: {meanings[level - 1]}")
    if found:
        axes.legend(title="a person's order", frameon=False, loc="lower right")
    title = "Dispersion by topic"
    if order["spearman"] is not None:
        title += f"\nSpearman with a person's order {order['spearman']:+.2f} (p = {order['p_value']:.3f})"
    axes.set_title(title)
    axes.grid(axis="x", linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
