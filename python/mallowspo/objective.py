"""What is optimised, as one small dataclass, and the named points in its space.

Every method is a choice of fields; :func:`preset` returns the published ones and ``dataclasses.replace`` changes them.
"""

import math
from dataclasses import dataclass
from typing import Literal

from mallowspo import functional as F


@dataclass(frozen=True)
class PreferenceObjective:
    """A preference loss on the log-probabilities of pairs.

    Args:
        link: how a margin becomes a log-likelihood, one of ``mallowspo.functional.LINKS``; the names that begin with
            ``mallows-`` read the dispersion of each pair.
        beta: scale of the log-ratio margin, > 0.
        gamma: target margin, subtracted after beta (SimPO's gamma, beta times its gamma_beta_ratio).
        token_weights: "uniform" sums a response's token log-ratios, "mean" divides them by their number |y|.
        reference_free: leave the reference model out of the margin. (A mallows link still takes the dispersion
            from it.)
        label_smoothing: assumed share of flipped labels, in [0, 1/2): conservative DPO.
        robust: make the label smoothing robust DPO's unbiased one.
        smoothing: half-width of the smoothed part of the mallows-phi link, in units of the margin.
        sft_weight: >= 0, adds this times the chosen response's negative log-likelihood per token.

    Raises:
        ValueError: an unknown choice or a number out of its range, with what is allowed.
    """

    link: str = "mallows-theta"
    beta: float = 0.1
    gamma: float = 0.0
    token_weights: Literal["uniform", "mean"] = "uniform"
    reference_free: bool = False
    label_smoothing: float = 0.0
    robust: bool = False
    smoothing: float = 1.0
    sft_weight: float = 0.0

    def __post_init__(self):
        F.check_link(self.link)
        F.check_objective_numbers(self.beta, self.gamma, self.label_smoothing, self.smoothing)
        if self.token_weights not in ("uniform", "mean"):
            raise ValueError(f"unknown token_weights {self.token_weights!r}; choose 'uniform' or 'mean'")
        if not (math.isfinite(self.sft_weight) and self.sft_weight >= 0):
            raise ValueError(f"sft_weight must be finite and >= 0, got {self.sft_weight}")
        if self.smoothing != 1 and self.link != "mallows-phi":
            raise ValueError(
                f"smoothing={self.smoothing} is read by the link 'mallows-phi' alone, not by {self.link!r}"
            )
        if self.robust and self.label_smoothing == 0:
            raise ValueError(
                "robust=True corrects label_smoothing, which is 0; set label_smoothing > 0 or robust=False"
            )

    @property
    def uses_dispersion(self):
        """Whether each pair needs a neg-log dispersion."""
        return self.link in F.MALLOWS_LINKS

    def __call__(self, logps, num_tokens, ref_logps=None, neg_log_dispersion=None):
        """The loss of each pair.

        Args:
            logps: [2B] summed log-probability of each response under the policy, chosen first, then rejected.
            num_tokens: [2B] their numbers of tokens.
            ref_logps: [2B] the same under the reference; None for a reference-free objective and only then.
            neg_log_dispersion: [B] for a mallows link and only then.

        Returns:
            mallowspo.functional.PreferenceLoss; the losses include the SFT term.

        Raises:
            ValueError: a reference that is missing or superfluous, and what ``preference_loss`` raises.
        """
        if (ref_logps is None) != self.reference_free:
            raise ValueError(
                f"reference_free is {self.reference_free}, so ref_logps must{' not' * self.reference_free} be given"
            )
        scores = [logps] if ref_logps is None else [logps, ref_logps]
        if self.token_weights == "mean":
            scores = [score / num_tokens for score in scores]
        loss = F.preference_loss(
            *(half for score in scores for half in score.chunk(2)),
            neg_log_dispersion=neg_log_dispersion,
            link=self.link,
            beta=self.beta,
            gamma=self.gamma,
            label_smoothing=self.label_smoothing,
            robust=self.robust,
            smoothing=self.smoothing,
        )
        if self.sft_weight:
            nll = -(logps / num_tokens).chunk(2)[0]
            loss = loss._replace(losses=loss.losses + self.sft_weight * nll)
        return loss


# beta and gamma of the SimPO family: its authors' Llama-3-Base setting. IPO is length-normalised, as TRL's.
_SIMPO = {"beta": 2.0, "gamma": 1.0, "token_weights": "mean", "reference_free": True}
_PRESETS = {
    "dpo": {"link": "bradley-terry"},
    "cdpo": {"link": "bradley-terry", "label_smoothing": 0.1},
    "robust-dpo": {"link": "bradley-terry", "label_smoothing": 0.1, "robust": True},
    "ipo": {"link": "ipo", "token_weights": "mean"},
    "hinge": {"link": "hinge"},
    "simpo": {"link": "bradley-terry", **_SIMPO},
    "mallows-theta": {"link": "mallows-theta"},
    "mallows-phi": {"link": "mallows-phi"},
    "mallows-ipo": {"link": "mallows-ipo", "token_weights": "mean"},
    "mallows-hinge": {"link": "mallows-hinge"},
    "mallows-simpo": {"link": "mallows-theta", **_SIMPO},
}


def presets():
    """Names that :func:`preset` knows."""
    return tuple(_PRESETS)


def preset(name, **overrides):
    """The objective of a published method, with the given fields replaced.

    Raises:
        ValueError: an unknown name (the message lists the known ones) or value. TypeError: an unknown field.
    """
    if name not in _PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(_PRESETS)} (TRL's 'sigmoid' is 'dpo')")
    return PreferenceObjective(**(_PRESETS[name] | overrides))
