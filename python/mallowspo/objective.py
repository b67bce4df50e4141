"""What is optimised, as one small dataclass, and the named points in its space.

Every method is a choice of fields; :func:`preset` returns the published ones (:mod:`mallowspo.family`) and composes
them, ``dataclasses.replace`` changes them.
"""

import math
from dataclasses import dataclass
from typing import Literal

from mallowspo import functional as F
from mallowspo.choices import MALLOWS_LINKS, PAIR_CHOICES, check_choice, check_pair_choices
from mallowspo.family import FAMILY

TOKEN_WEIGHTS = ("uniform", "mean")


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
        check_pair_choices(**self._pair_choices)
        check_choice("token_weights", self.token_weights, TOKEN_WEIGHTS)
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
        return self.link in MALLOWS_LINKS

    @property
    def _pair_choices(self):
        return {name: getattr(self, name) for name in PAIR_CHOICES}

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
        loss = F.preference_loss(
            *(half for score in self._scores(logps, num_tokens, ref_logps) for half in score.chunk(2)),
            neg_log_dispersion=neg_log_dispersion,
            **self._pair_choices,
        )
        if self.sft_weight:
            nll = -(logps / num_tokens).chunk(2)[0]
            loss = loss._replace(losses=loss.losses + self.sft_weight * nll)
        return loss

    def _scores(self, logps, num_tokens, ref_logps):
        """What the log-ratio of each response is made of: [2B] of the policy and, unless reference-free, [2B] of the
        reference, with the token weights in them."""
        scores = [logps] if ref_logps is None else [logps, ref_logps]
        if self.token_weights == "mean":
            scores = [score / num_tokens for score in scores]
        return scores


def presets():
    """Names that :func:`preset` knows and composes; docs/methods.md describes them."""
    return tuple(FAMILY)


def preset(name, **overrides):
    """The objective of a published method, or of several joined by "+", with the given fields replaced.

    Each name brings the fields that are its own: ``preset("mallows-theta+simpo")`` is SimPO's margin under the theta
    link. Names that set the same field do not compose. A link that none of them sets is "bradley-terry".

    Raises:
        ValueError: an unknown name (the message lists the known ones), two names that set one field, an impossible
            value or combination. TypeError: an unknown field.
    """
    fields, owners = {"link": "bradley-terry"}, {}
    for part in name.split("+"):
        if part not in FAMILY:
            known = ", ".join(FAMILY)
            raise ValueError(f"unknown preset {part!r}; choose one of {known} (TRL's 'sigmoid' is 'dpo')")
        for field, value in FAMILY[part].fields.items():
            if field in owners:
                raise ValueError(f"presets {owners[field]!r} and {part!r} both set {field}, so they do not compose")
            fields[field], owners[field] = value, part
    return PreferenceObjective(**(fields | overrides))
