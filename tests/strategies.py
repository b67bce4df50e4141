"""Hypothesis strategies shared by the tests. Every number drawn is exact in float32, so that a test can run the code
under test in float32 or float64 on the very values that the oracle sees."""

import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from mallowspo import reference


class Pair(NamedTuple):
    chosen_logp: float
    rejected_logp: float
    ref_chosen_logp: float
    ref_rejected_logp: float
    neg_log_dispersion: float


def to_float32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()


links = st.sampled_from(reference.TORCH_LINKS)  # the others read other options: pair_choices
smoothings = st.sampled_from([0.0, 0.25, 1.0, 2.0])
loss_options = st.fixed_dictionaries(
    {
        "beta": st.sampled_from([0.01, 0.1, 1.0]),
        "gamma": st.sampled_from([0.0, 0.3]),
        "label_smoothing": st.sampled_from([0.0, 0.1, 0.4]),
        "robust": st.booleans(),
        "smoothing": st.sampled_from([0.25, 1.0]),
    }
).filter(lambda options: not (options["robust"] and options["gamma"]))


@st.composite
def pair_choices(draw):
    """Keyword arguments of preference_loss that go together, of every link and every choice."""
    link, beta = draw(st.sampled_from(reference.LINKS)), draw(st.sampled_from([0.01, 0.1, 1.0]))
    options = {"link": link, "beta": beta}
    if link in reference.SEPARATE_LINKS:
        return options
    options |= {"gamma": draw(st.sampled_from([0.0, 0.25]))}
    options |= {"divergence": draw(st.sampled_from(["reverse-kl", "reverse-kl", "forward-kl", "js", "alpha"]))}
    options |= {"divergence_alpha": draw(st.sampled_from([-1.0, 0.5, 1.0, 1.5]))}
    options |= {"smoothing": draw(st.sampled_from([0.25, 1.0])), "discopop_tau": draw(st.sampled_from([0.05, 0.5]))}
    if link in ("exo", "mallows-exo"):
        return options | {"label_smoothing": draw(st.sampled_from([1e-3, 0.1]))}
    if draw(st.booleans()):
        robust = draw(st.booleans())
        options |= {"label_smoothing": draw(st.sampled_from([0.1, 0.4])), "robust": robust}
        return options | {"gamma": 0.0 if robust else options["gamma"]}
    if link in reference.PROBABILITY_LINKS:
        options |= {"focal_gamma": draw(st.sampled_from([0.0, 0.05, 1.0]))}
    return options | {"clip_rejected": draw(st.booleans())}


def dispersions(low: float = 1e-6, high: float = 1e3) -> st.SearchStrategy[float]:
    """Neg-log dispersions, log-uniform."""
    return st.floats(math.log(low), math.log(high)).map(lambda x: to_float32(min(max(math.exp(x), low), high)))


def margins(limit: float = 1e4, smoothing: float = 1.0) -> st.SearchStrategy[float]:
    """Margins in [-limit, limit], with the places where the link changes its form."""
    below = to_float32(math.nextafter(smoothing, 0) * (1 - 2**-23))
    edges = [0.0, *(sign * x for x in (smoothing, below, 1e-12, limit) for sign in (1, -1))]
    near = st.floats(-3 * smoothing, 3 * smoothing)
    return st.one_of(st.sampled_from(edges), near, st.floats(-limit, limit)).map(to_float32)


@st.composite
def pairs(draw, dispersion: st.SearchStrategy[float] | None = None) -> Pair:
    """Sequence log-probabilities of a pair under the policy and the reference, which may be the same, and its a."""
    logp = st.floats(-1000, 0).map(to_float32)
    chosen, rejected = draw(logp), draw(logp)
    same = draw(st.booleans())
    refs = (chosen, rejected) if same else (draw(logp), draw(logp))
    return Pair(chosen, rejected, *refs, draw(dispersions() if dispersion is None else dispersion))


@st.composite
def finite_logits(draw, rows: int, vocab: int, with_masked: bool = True) -> torch.Tensor:
    """Float32 logits [rows, vocab], from flat to one-hot; masked entries are -inf, at least one a row is not.

    Drawn from a seed, not entry by entry, so that wide rows stay cheap.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 10.0, 1e3]))
    shift = draw(st.sampled_from([0.0, -50.0, 1e3]))
    logits = torch.randn(rows, vocab, generator=generator) * scale + shift
    share = draw(st.sampled_from([0.0, 0.1, 0.9])) if with_masked else 0.0
    masked = torch.rand(rows, vocab, generator=generator) < share
    masked[torch.arange(rows), torch.randint(vocab, (rows,), generator=generator)] = False
    return logits.masked_fill(masked, -math.inf)
