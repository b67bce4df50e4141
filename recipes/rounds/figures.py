"""Tables and plots of the studies: means over seeds with 95% intervals."""

import numpy as np
from matplotlib.figure import Figure

from reporting import table
from stats import mean_and_half

TITLES = {
    "accelerated": "Accelerated preference optimisation",
    "advantages": "Learning from advantages",
    "discriminator": "Discriminator-guided DPO",
}
CAPTIONS = {
    "accelerated": "{comparisons} comparisons a context and round. Beside each alpha stands plain iterative DPO with "
    "beta (1 - alpha), whose steps are as large as momentum's become.",
    "advantages": "{rewards} rewards a context and round; the number is the temperature. APA and the policy gradient "
    "are held to the reference by it, AWR is not.",
    "discriminator": "{candidates} pairs a context and round. People see {gold} a round, of all contexts together; in "
    "the last row they see all. The other pairs are dropped (gold), or a discriminator labels them: a table, which "
    "knows nothing of other contexts (silver), or one that carries over what it learns (shared silver).",
}
PLOT_CAPTION = "Expected reward over the rounds, and what it costs in KL; grey: the most reward that a KL can buy."


def summarise(history, methods):
    """{method: {metric: {"mean": [rounds + 1], "half": the same}}} of {metric: [rounds + 1, M, S]}.

    The metric "reward_minus_first" is the difference to the first method, seed by seed.
    """
    values = {name: np.moveaxis(value.double().numpy(), -1, 0) for name, value in history.items()}  # [S, rounds+1, M]
    values["reward_minus_first"] = values["reward"] - values["reward"][..., :1]
    return {
        method: {name: mean_and_half(value[..., i]) for name, value in values.items()}
        for i, method in enumerate(methods)
    }


def tables(results, options):
    """Markdown: each study after a quarter of the rounds and at the end, with its plot."""
    last = options.rounds
    early = max(1, last // 4)
    parts = [
        "# Three methods around the objective, on a bandit\n",
        f"Means over {options.num_seeds} seeds and {len(options.dispersions)} contexts, ± half a 95% interval. Reward "
        "is an action's place in the central ranking, from 0 to 1. Differences are taken seed by seed.",
    ]
    for name, study in results.items():
        first = next(iter(study))
        caption = CAPTIONS[name].format(**vars(options))
        parts.append(f"\n## {TITLES[name]}\n\n{caption}\n")
        head = [f"reward, round {early}", f"minus {first}", f"reward, round {last}", f"minus {first}", "KL (nats)"]
        rows = []
        for method, values in study.items():
            cells = []
            for at in (early, last):
                cells.append(_cell(values["reward"], at))
                cells.append("" if method == first else _cell(values["reward_minus_first"], at, sign="+"))
            rows.append([method, *cells, _cell(values["kl"], last)])
        parts += table(["method", *head], rows)
        parts.append(f"\n![{PLOT_CAPTION}]({name}.png)")
    return "\n".join(parts) + "\n"


def _cell(values, at, sign=""):
    return f"{values['mean'][at]:{sign}.3f} ± {values['half'][at]:.3f}"


def plot(name, study, frontier):
    """Reward over the rounds, and reward against KL with the best that any policy can do."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    rounds, spent = figure.subplots(1, 2)
    groups = list(dict.fromkeys(method.split()[0].rstrip(",") for method in study))
    colors = {"iterative": "#222222", "gold": "#222222", "all": "#2a7f3f", "APA": "#0b62a4", "alpha": "#0b62a4"}
    colors |= {"beta": "#d1570d", "AWR": "#d1570d", "policy": "#7b7b7b", "silver": "#0b62a4", "shared": "#d1570d"}
    seen = dict.fromkeys(groups, 0)
    for method, values in study.items():
        group = method.split()[0].rstrip(",")
        style = {"color": colors[group], "linestyle": ("-", "--", "-.", ":")[seen[group] % 4]}
        seen[group] += 1
        mean, half = (np.array(values["reward"][part]) for part in ("mean", "half"))
        rounds.plot(mean, label=method, **style)
        rounds.fill_between(range(len(mean)), mean - half, mean + half, color=style["color"], alpha=0.12, linewidth=0)
        spent.plot(values["kl"]["mean"], mean, marker=".", markersize=4, **style)
    spent.plot(frontier["kl"], frontier["reward"], color="#999999", linewidth=3, zorder=0, label="best for its KL")
    rounds.set(xlabel="round", ylabel="expected reward", title="Over the rounds, with 95% intervals")
    spent.set(xlabel="KL to the reference (nats)", ylabel="expected reward", title="What it costs, a point a round")
    for axes in (rounds, spent):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(TITLES[name])
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    return figure
