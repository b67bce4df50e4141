"""The published methods, each a point in the space of :class:`mallowspo.objective.PreferenceObjective`.

To add one, add an entry here and, where it brings a new choice, a field there; docs/methods.md is made from this table
(``python -m mallowspo.methods > docs/methods.md``).
"""

from dataclasses import dataclass

# How much of a method could be checked, as the pages say it.
CODE = "formula and defaults as in the authors' code"
PEER = "formula as in TRL"


@dataclass(frozen=True)
class Method:
    """One named preset.

    Args:
        title: its name in the literature.
        source: paper and arXiv id.
        certainty: where formula and defaults were read, and what could not be.
        formula: the loss of a pair, in the symbols of docs/methods.md.
        when: when to use it.
        fields: what it sets in ``PreferenceObjective``. Presets compose where these do not meet, so leave out what is
            not the method's own; a link that nothing sets is "bradley-terry", everything else is the field's default.
    """

    title: str
    source: str
    certainty: str
    formula: str
    when: str
    fields: dict


# beta and gamma of the SimPO family: its authors' Llama-3-Base setting. IPO is length-normalised, as TRL's.
_SIMPO = {"beta": 2.0, "gamma": 1.0, "token_weights": "mean", "reference_free": True}

FAMILY = {
    # ---- hosts -----------------------------------------------------------------------------------------------------
    "dpo": Method(
        "DPO",
        "Direct Preference Optimization, arXiv 2305.18290",
        certainty=CODE,
        formula="-log sigmoid(z)",
        when="The baseline: pairs with clear labels and a reference close to the policy.",
        fields={"link": "bradley-terry"},
    ),
    "cdpo": Method(
        "Conservative DPO",
        "Mitchell, A note on DPO with noisy preferences, 2023; arXiv 2305.18290",
        certainty="formula as in the DPO authors' code; the share 0.1 is an example",
        formula="-(1 - label_smoothing) log sigmoid(z) - label_smoothing log sigmoid(-z)",
        when="A known share of the labels is flipped, and margins should stay bounded.",
        fields={"label_smoothing": 0.1},
    ),
    "robust-dpo": Method(
        "Robust DPO",
        "Provably Robust DPO, arXiv 2403.00409",
        certainty=PEER + "; the share 0.1 is an example",
        formula="[-(1 - label_smoothing) log sigmoid(z) + label_smoothing log sigmoid(-z)] / (1 - 2 label_smoothing)",
        when="A known share of the labels is flipped at random: the loss is unbiased for the clean one.",
        fields={"label_smoothing": 0.1, "robust": True},
    ),
    "ipo": Method(
        "IPO",
        "A General Theoretical Paradigm, arXiv 2310.12036",
        certainty="formula as in TRL, whose authors confirmed the length normalisation with the paper's; times beta^2",
        formula="(z - 1/2)^2",
        when="Nearly deterministic labels, where DPO's margins would grow without bound.",
        fields={"link": "ipo", "token_weights": "mean"},
    ),
    "hinge": Method(
        "SLiC hinge",
        "SLiC-HF, arXiv 2305.10425, with DPO's log-ratios as in arXiv 2309.06657",
        certainty=PEER,
        formula="max(0, 1 - z)",
        when="Pairs that are won by a margin of 1 should be left alone.",
        fields={"link": "hinge"},
    ),
    "simpo": Method(
        "SimPO",
        "Simple Preference Optimization, arXiv 2405.14734",
        certainty=CODE + " (Llama-3-Base setting)",
        formula="-log sigmoid(beta [log pi(y_w)/|y_w| - log pi(y_l)/|y_l|] - gamma)",
        when="No memory for a reference, and responses of unlike lengths.",
        fields=_SIMPO,
    ),
    # ---- MallowsPO -------------------------------------------------------------------------------------------------
    "mallows-theta": Method(
        "MallowsPO-theta",
        "MallowsPO, arXiv 2405.14953 (Spearman's rho)",
        certainty="formula as in the authors' code, whose weight has the 2 inside its scale",
        formula="-log sigmoid(2 a z)",
        when="Prompts differ in how contested they are: pairs of unsure prompts pull less.",
        fields={"link": "mallows-theta"},
    ),
    "mallows-phi": Method(
        "MallowsPO-phi",
        "MallowsPO, arXiv 2405.14953 (Kendall's tau); Mallows 1957",
        certainty="g derived again from the Mallows model; the paper's smoothing near z = 0 could not be recovered, "
        "the cubic here is this library's",
        formula="-log g(z; a)",
        when="As mallows-theta, for labels that come close to a Mallows ranking model of Kendall's distance.",
        fields={"link": "mallows-phi"},
    ),
    "mallows-ipo": Method(
        "Mallows-IPO",
        "MallowsPO, arXiv 2405.14953",
        certainty=CODE + ", times beta^2",
        formula="(2 a z - 1/2)^2",
        when="IPO on prompts that differ in how contested they are.",
        fields={"link": "mallows-ipo", "token_weights": "mean"},
    ),
    "mallows-hinge": Method(
        "Mallows hinge",
        "the plug-in of arXiv 2405.14953 on the hinge",
        certainty="this library's combination",
        formula="max(0, 1 - 2 a z)",
        when="The hinge, with a margin that unsure prompts reach later.",
        fields={"link": "mallows-hinge"},
    ),
    "mallows-simpo": Method(
        "Mallows-SimPO",
        "MallowsPO, arXiv 2405.14953, on SimPO",
        certainty=CODE + " (what its defaults run, with a target margin)",
        formula="-log sigmoid(2 a (beta [log pi(y_w)/|y_w| - log pi(y_l)/|y_l|] - gamma))",
        when="SimPO where a reference is at hand once, for the entropies.",
        fields={"link": "mallows-theta", **_SIMPO},
    ),
}
