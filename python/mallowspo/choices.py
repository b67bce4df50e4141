"""The choices of a pair's loss: their names, ranges, and which of them go together.

:func:`mallowspo.functional.preference_loss` and :class:`mallowspo.objective.PreferenceObjective` share these checks.
"""

import math

from mallowspo import _C

# The links by name, and those that read the neg-log dispersion: plain values, so that torch.compile traces past them.
LINKS = {link.name.replace("_", "-"): int(link) for link in _C.Link}
MALLOWS_LINKS = frozenset(name for name, value in LINKS.items() if _C.uses_dispersion(_C.Link(value)))

# The keyword arguments of preference_loss after the tensors, in the order of the operator's.
PAIR_CHOICES = ("link", "beta", "gamma", "label_smoothing", "robust", "smoothing")


def check_pair_choices(link, beta, gamma, label_smoothing, robust, smoothing):
    """ValueError for a choice that does not exist, a number out of its range, or two choices that cannot both be."""
    check_choice("link", link, LINKS)
    check_positive("beta", beta)
    if not -math.inf < gamma < math.inf:
        raise ValueError(f"gamma must be finite, got {gamma}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    check_smoothing(smoothing)


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")


def check_positive(name, value):
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and positive, got {value}")


def check_smoothing(smoothing):
    if not 0 <= smoothing < math.inf:
        raise ValueError(f"smoothing must be finite and >= 0 (0: the raw function), got {smoothing}")
