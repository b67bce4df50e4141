"""The choices of a pair's loss: their names, ranges, and which of them go together.

:func:`mallowspo.functional.preference_loss` and :class:`mallowspo.objective.PreferenceObjective` share these checks.
"""

import math
from numbers import Real

from mallowspo import _C

# The links by name; those that read the neg-log dispersion, those that are functions of one margin, and those whose
# likelihood is the logarithm of a probability. Plain values, so that torch.compile traces past them.
LINKS = {link.name.replace("_", "-"): int(link) for link in _C.Link}
MALLOWS_LINKS = frozenset(name for name, value in LINKS.items() if _C.uses_dispersion(_C.Link(value)))
MARGIN_LINKS = frozenset(name for name, value in LINKS.items() if _C.has_margin(_C.Link(value)))
PROBABILITY_LINKS = ("bradley-terry", "mallows-theta", "mallows-phi")
EXO_LINKS = ("exo", "mallows-exo")
DISCOPOP_LINKS = ("discopop", "mallows-discopop")

# The divergences by name: the operator's enum, and the alpha that it stands for where that is fixed.
DIVERGENCES = {
    "reverse-kl": (_C.Divergence.alpha, 1.0),
    "forward-kl": (_C.Divergence.alpha, 0.0),
    "js": (_C.Divergence.jensen_shannon, 1.0),
    "alpha": (_C.Divergence.alpha, None),
}

# The keyword arguments of preference_loss after the tensors, with their defaults, in the order of the operator's.
PAIR_CHOICES = {
    "link": "mallows-theta",
    "beta": 0.1,
    "gamma": 0.0,
    "label_smoothing": 0.0,
    "robust": False,
    "smoothing": 1.0,
    "focal_gamma": 0.0,
    "clip_rejected": False,
    "divergence": "reverse-kl",
    "divergence_alpha": 0.5,
    "discopop_tau": 0.05,
}


def operator_settings(
    link,
    beta,
    gamma,
    label_smoothing,
    robust,
    smoothing,
    focal_gamma,
    clip_rejected,
    divergence,
    divergence_alpha,
    discopop_tau,
):
    """The choices as the operator takes them.

    Raises:
        TypeError: what is no number.
        ValueError: a choice that does not exist, a number out of its range, or two choices that cannot both be.
    """
    check_choice("link", link, LINKS)
    check_choice("divergence", divergence, DIVERGENCES)
    check_positive("beta", beta)
    check_finite("gamma", gamma)
    check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    check_smoothing(smoothing)
    check_not_negative("focal_gamma", focal_gamma)
    check_finite("divergence_alpha", divergence_alpha)
    check_positive("discopop_tau", discopop_tau)

    if link not in MARGIN_LINKS:
        given = {"gamma": gamma, "label_smoothing": label_smoothing, "clip_rejected": clip_rejected}
        for name, value in (given | {"robust": robust, "divergence": divergence}).items():
            if value != PAIR_CHOICES[name]:
                raise ValueError(f"{name}={value!r} changes a margin, and the link {link!r} has none; leave it out")
    if focal_gamma and link not in PROBABILITY_LINKS:
        raise ValueError(
            f"focal_gamma={focal_gamma} is a power of a probability, which the link {link!r} does not give; "
            f"choose link from {', '.join(PROBABILITY_LINKS)}"
        )
    for name, value in (("focal_gamma", focal_gamma), ("clip_rejected", clip_rejected)):
        if value and label_smoothing:
            what = f"target of {link!r}," if link in EXO_LINKS else "flipped pair of"
            raise ValueError(f"{name}={value!r} has no meaning for the {what} label_smoothing; leave it out")
    if robust and gamma:
        raise ValueError(
            f"robust=True with gamma={gamma!r} is not unbiased: the flipped pair's margin is -beta h - gamma, and the "
            "correction takes it for -z; leave one of them out"
        )
    if link in EXO_LINKS and (robust or not label_smoothing):
        raise ValueError(
            f"the link {link!r} reads label_smoothing as the rejected response's target probability: "
            f"label_smoothing must be > 0 (1e-3, say) and robust False, got {label_smoothing} and {robust}"
        )
    kind, alpha = DIVERGENCES[divergence]
    return (
        LINKS[link],
        float(beta),
        float(gamma),
        float(label_smoothing),
        bool(robust),
        float(smoothing),
        float(focal_gamma),
        bool(clip_rejected),
        int(kind),
        float(divergence_alpha if alpha is None else alpha),
        float(discopop_tau),
    )


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")


def check_number(name, value):
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_positive(name, value):
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and positive, got {value}")


def check_not_negative(name, value, hint=""):
    """hint: what a special value means, for the message."""
    check_number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and >= 0{hint and f' ({hint})'}, got {value}")


def check_finite(name, value):
    check_number(name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")


def check_count(name, value, least):
    """For an int of at least so many, or None."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (is_int and value >= least):
        raise ValueError(f"{name} must be None or an int of at least {least}, got {value!r}")


def check_smoothing(smoothing):
    check_not_negative("smoothing", smoothing, "0: the raw function")
