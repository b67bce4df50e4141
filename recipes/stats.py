"""The statistics of the recipes' reports: intervals over seeds and over prompts, ranks, wins, values at equal KL."""

import math
from statistics import NormalDist

import numpy as np

# 97.5% quantiles of Student's t by degrees of freedom, 1 to 9.
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

# ---- intervals -----------------------------------------------------------------------------------------------------


def t_975(degrees):
    """The 97.5% quantile of Student's t with 1, 2, ... degrees of freedom, right to three decimals.

    Beyond the table its Cornish-Fisher series.
    """
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z, v = NormalDist().inv_cdf(0.975), degrees
    quantile = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    return quantile + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)


def half_width(values):
    """Half of the 95% t interval of the mean over the first axis: the seeds, two or more."""
    return t_975(len(values) - 1) * np.std(values, axis=0, ddof=1) / math.sqrt(len(values))


def mean_and_half(values):
    """{"mean", "half"} over the first axis, as lists or floats."""
    return {"mean": np.mean(values, axis=0).tolist(), "half": half_width(values).tolist()}


def percentiles(resampled):
    """(low, high): the 95% percentile interval of resampled values."""
    return tuple(np.quantile(resampled, [0.025, 0.975]).tolist())


def resampled_shares(number, resamples, generator):
    """[resamples, number]: the share that each of so many has in a sample of as many, drawn with replacement."""
    return generator.multinomial(number, np.full(number, 1 / number), size=resamples) / number


def crossed_shares(seeds, prompts, resamples):
    """Shares of seeds [resamples, S] and of prompts [resamples, P], drawn independently (pigeonhole bootstrap).

    Results that share a prompt or a trained model are not independent; drawing both with replacement counts either
    and errs on the cautious side (Owen, The pigeonhole bootstrap, 2007), but for few seeds that disagree: with five,
    intervals are somewhat too narrow there. The same for the same numbers, so that comparisons stay paired.
    """
    generator = np.random.default_rng(0)
    return [resampled_shares(number, resamples, generator) for number in (seeds, prompts)]


# ---- ranks and wins ------------------------------------------------------------------------------------------------


def ranks(values):
    """Ranks from 1, ties at the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def correlation(first, second):
    """Pearson's; 0 where either has only ties."""
    first, second = first - first.mean(), second - second.mean()
    size = math.sqrt((first @ first) * (second @ second))
    return float(first @ second) / size if size else 0.0


def spearman(first, second):
    """Rank correlation; 0 where either has only ties."""
    return correlation(ranks(first), ranks(second))


def wins(first, second):
    """1 where first > second, 1/2 where equal, else 0, of two arrays."""
    return (np.sign(first - second) + 1) / 2


# ---- at equal KL ---------------------------------------------------------------------------------------------------


def at_kl(kl, values, target):
    """Values at the target KL, between the first point of a path that spends it and the point before.

    Linear in the root of the KL: reward grows about so near the reference, and in the KL itself a longer step would be
    read off a chord below the curve.

    Args:
        kl: [N, S], N points of each of S paths, the reference first; what is estimated may be below 0 and counts as 0.
        values: [N, S, ...]. target: a number or [S].

    Returns:
        [S, ...], NaN for a path no point of which spends the target.
    """
    above, paths = np.argmax(kl >= target, axis=0), np.arange(kl.shape[1])
    below = np.maximum(above - 1, 0)
    low, high, wanted = (np.sqrt(np.maximum(x, 0)) for x in (kl[below, paths], kl[above, paths], target))
    share = np.divide(wanted - low, high - low, out=np.ones(len(paths)), where=high != low)
    share[kl[above, paths] < target] = np.nan
    share = share.reshape(-1, *[1] * (values.ndim - 2))
    return values[below, paths] * (1 - share) + values[above, paths] * share
