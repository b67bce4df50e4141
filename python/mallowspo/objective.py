"""What is optimised, as one small dataclass, and the named points in its space.

Every method is a choice of fields; :func:`preset` returns the published ones (:mod:`mallowspo.family`) and composes
them, ``dataclasses.replace`` changes them.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch

from mallowspo import functional as F
from mallowspo.choices import (
    DISCOPOP_LINKS,
    MALLOWS_LINKS,
    MARGIN_LINKS,
    PAIR_CHOICES,
    check_choice,
    check_not_negative,
    check_number,
    operator_settings,
)
from mallowspo.family import FAMILY
from mallowspo.mixture import check_mixture, check_reference_count
from mallowspo.token_weights import check_token_weights

TOKEN_WEIGHTS = ("uniform", "mean")
REARRANGEMENTS = ("none", "paired", "unpaired")
# The fields that weigh single tokens, and those of several references.
TOKEN_FIELDS = ("token_decay", "ld_alpha", "down_sampling", "bridge_delta")
MIXTURE_FIELDS = ("reference_weights", "reference_clip", "adaptive_clip", "swap_reference_weights")
# Fields that one choice alone reads: another value of theirs would be silently ignored under any other choice.
READ_BY = {
    "smoothing": ("link", ("mallows-phi",)),
    "discopop_tau": ("link", DISCOPOP_LINKS),
    "divergence_alpha": ("divergence", ("alpha",)),
}


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
        robust: make the label smoothing robust DPO's unbiased one; for gamma = 0.
        smoothing: half-width of the smoothed part of the mallows-phi link, in units of the margin.
        focal_gamma: FocalPO's power of the pair's probability, >= 0; warns where it is so large that the gradient
            points the wrong way at the first step.
        clip_rejected: MinorDPO's reject penalty: the rejected log-ratio counts only where it is positive.
        divergence, divergence_alpha: f-DPO's divergence from the reference: "reverse-kl", "forward-kl", "js", "alpha".
        discopop_tau: the temperature of the discopop links, > 0.
        reference_mixing: RainbowPO's alpha in [0, 1]: reference log-probabilities are multiplied by alpha,
            gamma by 1 - alpha; None leaves both as they are.
        rearrangement: AOT's: "paired" sets the sorted margins of the policy against the sorted ones of the reference,
            "unpaired" the sorted log-ratios of the chosen responses against those of the rejected ones. Sorted within
            the call's batch alone: each rank and micro-batch by itself.
        on_policy_weighting: WPO's, with its sampled alignment: multiplies each loss by both responses' geometric means
            of p_y / sum_v p_v^2 over their tokens, not differentiated.
        sft_weight: >= 0, adds this times the chosen response's negative log-likelihood per token.
        token_decay: in (0, 1], weight token_decay^t of the t-th token (D2PO). 1: none.
        ld_alpha: in [0, 1], weight of the tokens beyond the length of the shorter response (LD-DPO). 1: none.
        down_sampling: count as many tokens of the longer response as the shorter one has, drawn at random (SamPO).
        bridge_delta: >= 0, weight 1 + min(1 / pi, bridge_delta) of the tokens in which the responses differ (BMC).
            0: none.
        own_token_weights: the reference has its own draw (SamPO) and its own 1 / ref (BMC) instead of the policy's,
            as in the authors' code of both.
        reference_weights: None for one reference; to mix several (MRPO), a number for each, which add up to 1, or
            "adaptive", see :func:`mallowspo.functional.mixed_reference_logps`.
        reference_clip, adaptive_clip, swap_reference_weights: see there.

    The fields that describe a pair's loss are the arguments of ``mallowspo.functional.preference_loss``.

    Raises:
        ValueError: an unknown choice, a number out of its range, or two fields that do not go together.
    """

    link: str = "mallows-theta"
    beta: float = 0.1
    gamma: float = 0.0
    token_weights: Literal["uniform", "mean"] = "uniform"
    reference_free: bool = False
    label_smoothing: float = 0.0
    robust: bool = False
    smoothing: float = 1.0
    focal_gamma: float = 0.0
    clip_rejected: bool = False
    divergence: Literal["reverse-kl", "forward-kl", "js", "alpha"] = "reverse-kl"
    divergence_alpha: float = 0.5
    discopop_tau: float = 0.05
    reference_mixing: float | None = None
    rearrangement: Literal["none", "paired", "unpaired"] = "none"
    on_policy_weighting: bool = False
    sft_weight: float = 0.0
    token_decay: float = 1.0
    ld_alpha: float = 1.0
    down_sampling: bool = False
    bridge_delta: float = 0.0
    own_token_weights: bool = False
    reference_weights: tuple[float, ...] | str | None = None
    reference_clip: float | None = None
    adaptive_clip: bool = False
    swap_reference_weights: bool = False

    def __post_init__(self):
        operator_settings(**self._pair_choices)
        check_choice("token_weights", self.token_weights, TOKEN_WEIGHTS)
        check_choice("rearrangement", self.rearrangement, REARRANGEMENTS)
        check_not_negative("sft_weight", self.sft_weight)
        if self.reference_mixing is not None:
            check_number("reference_mixing", self.reference_mixing)
            if not 0 <= self.reference_mixing <= 1:
                raise ValueError(f"reference_mixing must be None or in [0, 1], got {self.reference_mixing}")
        for name, (choice, readers) in READ_BY.items():
            if getattr(self, name) != PAIR_CHOICES[name] and getattr(self, choice) not in readers:
                raise ValueError(
                    f"{name}={getattr(self, name)} is read by the {choice} {' and '.join(map(repr, readers))} alone, "
                    f"not by {getattr(self, choice)!r}"
                )
        if isinstance(self.reference_weights, list):
            object.__setattr__(self, "reference_weights", tuple(self.reference_weights))
        check_token_weights(self.token_decay, self.ld_alpha, self.bridge_delta)
        check_mixture(**self._mixture)
        if self.own_token_weights and not (self.down_sampling or self.bridge_delta):
            raise ValueError("own_token_weights is about down_sampling or bridge_delta; set one of them")
        if self.robust and self.label_smoothing == 0:
            raise ValueError(
                "robust=True corrects label_smoothing, which is 0; set label_smoothing > 0 or robust=False"
            )
        for name, why, excluded in self._exclusions():
            for other in excluded:
                if getattr(self, other) != getattr(PreferenceObjective, other):
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} {why}, so it does not go with {other}="
                        f"{getattr(self, other)!r}; leave one of them out"
                    )
        # The gradient turns where log p < -1 / focal_gamma; at pi = ref the margin is -gamma (for theta, at 2a = 1).
        initial_loss = max(self._offset, 0) + math.log1p(math.exp(-abs(self._offset)))
        if self.focal_gamma * initial_loss >= 1:
            warnings.warn(
                f"focal_gamma={self.focal_gamma} is at least {1 / initial_loss:.3g}: at the first step every gradient "
                "is zero or points the wrong way; take one well below, 0.05 say",
                stacklevel=3,
            )

    def _exclusions(self):
        """(field, what it is about, fields that must keep their default) of the fields that are set."""
        if self.link not in MARGIN_LINKS:
            excluded = ("reference_free", "reference_mixing", "rearrangement")
            yield "link", "compares each response with the reference", excluded
        if self.uses_dispersion:
            yield "link", "weighs each pair by its own dispersion", ("rearrangement",)
        if self.rearrangement != "none":
            excluded = ("reference_free", "clip_rejected", "divergence", "on_policy_weighting", "robust")
            yield "rearrangement", "sorts margins, which are no longer those of one pair", excluded
        if self.clip_rejected:
            yield "clip_rejected", "clips at the reference's log-probability", ("reference_free", "reference_mixing")
        if self.divergence != "reverse-kl":
            excluded = ("token_weights", *TOKEN_FIELDS, "reference_free", "reference_mixing")
            yield "divergence", "is between whole responses of the policy and of the reference", excluded
        if self.down_sampling:
            yield "down_sampling", "takes the length out", ("token_weights", "ld_alpha")
        if self.reference_free:
            excluded = ("reference_mixing", "reference_weights", "own_token_weights")
            yield "reference_free", "leaves the reference out", excluded

    @property
    def weighs_tokens(self):
        """Whether the loss needs the log-probability of every token, of the reference too."""
        return any(getattr(self, name) != getattr(PreferenceObjective, name) for name in TOKEN_FIELDS)

    @property
    def _mixture(self):
        return {name: getattr(self, name) for name in MIXTURE_FIELDS}

    @property
    def uses_dispersion(self):
        """Whether each pair needs a neg-log dispersion."""
        return self.link in MALLOWS_LINKS

    @property
    def _offset(self):
        return self.gamma if self.reference_mixing is None else (1 - self.reference_mixing) * self.gamma

    @property
    def _pair_choices(self):
        return {name: getattr(self, name) for name in PAIR_CHOICES}

    def __call__(self, logps, num_tokens, ref_logps=None, neg_log_dispersion=None, plain_logps=None, alignment=None):
        """The loss of each pair.

        Args:
            logps: [2B] summed log-probability of each response under the policy, chosen first, then rejected; where
                the objective weighs tokens, those of :func:`mallowspo.token_weights.weighted_logps`.
            num_tokens: [2B] their numbers of tokens.
            ref_logps: [2B] the same under the reference, [K, 2B] for reference_weights; None for a reference-free
                objective and only then.
            neg_log_dispersion: [B] for a mallows link and only then.
            plain_logps: [2B] the logps without weights, for WPO's weight and the SFT term; None: logps are.
            alignment: [2B] sums over each response's tokens of log sum_v p_v^2 under the policy; read for
                on_policy_weighting and only then.

        Returns:
            mallowspo.functional.PreferenceLoss; the losses include the SFT term.

        Raises:
            ValueError: a reference that is missing or superfluous, a missing alignment, and what ``preference_loss``
                raises.
        """
        if (ref_logps is None) != self.reference_free:
            raise ValueError(
                f"reference_free is {self.reference_free}, so ref_logps must{' not' * self.reference_free} be given"
            )
        scores = [half for score in self._scores(logps, num_tokens, ref_logps) for half in score.chunk(2)]
        choices = self._pair_choices | {"gamma": self._offset}
        loss = F.preference_loss(*scores, neg_log_dispersion=neg_log_dispersion, **choices)
        if self.rearrangement != "none":
            first, second, order = self._rearranged(*scores)
            sorted_losses = F.preference_loss(first, second, **choices).losses
            loss = loss._replace(losses=sorted_losses.index_select(0, order.argsort()))
        if plain_logps is None:
            if self.weighs_tokens and (self.on_policy_weighting or self.sft_weight):
                raise ValueError("on_policy_weighting and sft_weight need plain_logps where tokens are weighted")
            plain_logps = logps
        if self.on_policy_weighting:
            if alignment is None:
                raise ValueError(
                    "on_policy_weighting needs alignment, the sum over a response's tokens of log sum_v p_v^2; zeros "
                    "weigh by the probability alone"
                )
            weight = sum(((plain_logps - alignment).detach() / num_tokens).chunk(2)).exp()
            loss = loss._replace(losses=weight * loss.losses)
        if self.sft_weight:
            nll = -(plain_logps / num_tokens).chunk(2)[0]
            loss = loss._replace(losses=loss.losses + self.sft_weight * nll)
        return loss

    def _rearranged(self, chosen, rejected, ref_chosen, ref_rejected):
        """Two sorted [B] whose differences are the margins, and the order of the first: a loss is put down to the pair
        whose margin (paired) or chosen response (unpaired) it was made of."""
        if self.rearrangement == "paired":
            (first, order), (second, _) = (chosen - rejected).sort(), (ref_chosen - ref_rejected).sort()
        else:
            (first, order), (second, _) = (chosen - ref_chosen).sort(), (rejected - ref_rejected).sort()
        return first, second, order

    def _scores(self, logps, num_tokens, ref_logps):
        """What the log-ratio of each response is made of: [2B] of the policy and, unless reference-free, [2B] of the
        reference, with the token weights in them."""
        scores = [logps]
        if ref_logps is not None:
            ref_logps = torch.atleast_2d(ref_logps)
            check_reference_count(len(ref_logps), self.reference_weights, self.swap_reference_weights)
            if len(ref_logps) > 1:
                ref_logps = torch.cat(F.mixed_reference_logps(*ref_logps.chunk(2, dim=1), **self._mixture))
            scores.append(ref_logps.flatten())
        if self.token_weights == "mean":
            scores = [score / num_tokens for score in scores]
        if self.reference_mixing is not None:
            scores[1] = self.reference_mixing * scores[1]
        return scores


# TRL's names and those of the authors' code, for the message, where more than the hyphen differs.
_NAMES_ELSEWHERE = {
    "aot-pair": "aot",
    "mallows-dpo": "mallows-theta",
    "robust": "robust-dpo",
    "sigmoid": "dpo",
    "sigmoid-norm": "ln-dpo",
}


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
            here = part.strip().replace("_", "-")
            here = _NAMES_ELSEWHERE.get(here, here)
            advice = f"its name here is {here!r}" if here in FAMILY else f"choose one of {', '.join(FAMILY)}"
            raise ValueError(f"unknown preset {part!r}; {advice}")
        for field, value in FAMILY[part].fields.items():
            if field in owners:
                raise ValueError(f"presets {owners[field]!r} and {part!r} both set {field}, so they do not compose")
            fields[field], owners[field] = value, part
    return PreferenceObjective(**(fields | overrides))
