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
        when="A known share of the labels is flipped at random: the loss is unbiased for the clean one. gamma must be "
        "0, so that -z is the flipped pair's margin.",
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
    "ln-dpo": Method(
        "Length-normalised DPO",
        "LN-DPO, RainbowPO's arXiv 2410.04203; TRL's sigmoid_norm",
        certainty=PEER + "; beta as in RainbowPO's authors' runs",
        formula="-log sigmoid(beta [r(y_w)/|y_w| - r(y_l)/|y_l|])",
        when="Responses of unlike lengths, with a reference: a per-token margin asks for a beta near 10.",
        fields={"beta": 10.0, "token_weights": "mean"},
    ),
    "exo-pair": Method(
        "EXO",
        "Efficient Exact Optimization, arXiv 2402.00856",
        certainty=PEER + ", whose documentation gives the smoothing",
        formula="p log(p / (1 - label_smoothing)) + (1 - p) log((1 - p) / label_smoothing), p = sigmoid(z)",
        when="The reverse KL to the labels' distribution: mode-seeking where DPO covers.",
        fields={"link": "exo", "label_smoothing": 1e-3},
    ),
    "discopop": Method(
        "DiscoPOP",
        "Discovering Preference Optimization Algorithms, arXiv 2406.08414",
        certainty=PEER + ", its temperature too",
        formula="(1 - m) log(1 + e^-z) + m e^-z, m = sigmoid(z / discopop_tau)",
        when="A loss found by search; it is not convex near z = 0.",
        fields={"link": "discopop"},
    ),
    "sppo-hard": Method(
        "SPPO, hard labels",
        "Self-Play Preference Optimization, arXiv 2405.00675",
        certainty=PEER + ", times beta^2",
        formula="(beta r(y_w) - 1/2)^2 + (beta r(y_l) + 1/2)^2",
        when="Self-play rounds: each response is pulled to its own win rate, 1 or 0.",
        fields={"link": "sppo"},
    ),
    "nca-pair": Method(
        "NCA",
        "Noise Contrastive Alignment, arXiv 2402.05369",
        certainty=PEER,
        formula="-log sigmoid(beta r(y_w)) - [log sigmoid(-beta r(y_w)) + log sigmoid(-beta r(y_l))] / 2",
        when="The likelihood of the chosen response must not fall.",
        fields={"link": "nca"},
    ),
    "bco-pair": Method(
        "BCO on pairs",
        "Binary Classifier Optimization, arXiv 2404.04656",
        certainty=PEER + " 1.16, which leaves out the paper's running mean of the rewards, as this does",
        formula="-log sigmoid(beta r(y_w)) - log sigmoid(-beta r(y_l))",
        when="Responses are good or bad each on its own.",
        fields={"link": "bco"},
    ),
    "apo-zero": Method(
        "APO-zero",
        "Anchored Preference Optimization, arXiv 2408.06266",
        certainty=PEER,
        formula="sigmoid(-beta r(y_w)) + sigmoid(beta r(y_l))",
        when="The chosen responses are better than what the model writes.",
        fields={"link": "apo-zero"},
    ),
    "apo-down": Method(
        "APO-down",
        "Anchored Preference Optimization, arXiv 2408.06266",
        certainty=PEER,
        formula="sigmoid(beta r(y_w)) + sigmoid(-beta [r(y_w) - r(y_l)])",
        when="The chosen responses are worse than what the model writes.",
        fields={"link": "apo-down"},
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
        certainty="formula as in the authors' code times beta^2, whose weight has the 2 inside its scale and whose "
        "default beta is 10; here it is IPO's",
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
    "mallows-exo": Method(
        "Mallows-EXO",
        "the plug-in of arXiv 2405.14953 on EXO, arXiv 2402.00856",
        certainty="this library's combination",
        formula="p log(p / (1 - label_smoothing)) + (1 - p) log((1 - p) / label_smoothing), p = sigmoid(2 a z)",
        when="EXO on prompts that differ in how contested they are.",
        fields={"link": "mallows-exo", "label_smoothing": 1e-3},
    ),
    "mallows-discopop": Method(
        "Mallows-DiscoPOP",
        "the plug-in of arXiv 2405.14953 on DiscoPOP, arXiv 2406.08414",
        certainty="this library's combination",
        formula="(1 - m) log(1 + e^-x) + m e^-x, x = 2 a z, m = sigmoid(x / discopop_tau)",
        when="DiscoPOP on prompts that differ in how contested they are.",
        fields={"link": "mallows-discopop"},
    ),
    "mallows-simpo": Method(
        "Mallows-SimPO",
        "MallowsPO, arXiv 2405.14953, on SimPO",
        certainty="formula as in the authors' code, whose defaults are beta 10 and no margin; here they are SimPO's",
        formula="-log sigmoid(2 a (beta [log pi(y_w)/|y_w| - log pi(y_l)/|y_l|] - gamma))",
        when="SimPO where a reference is at hand once, for the entropies.",
        fields={"link": "mallows-theta", **_SIMPO},
    ),
    "rainbowpo": Method(
        "RainbowPO",
        "RainbowPO, arXiv 2410.04203",
        certainty="formula and defaults as in the authors' code, whose home_advantage is gamma / beta here and whose "
        "weight has the 2 inside its scale",
        formula="-log sigmoid(2 a (beta [D_pi - A D_ref] - (1 - A) gamma)), A = reference_mixing, "
        "D = log p(y_w)/|y_w| - log p(y_l)/|y_l|",
        when="Length normalisation, a reference of which only a part is trusted, and contested prompts, at once.",
        fields={
            "link": "mallows-theta",
            "beta": 10.0,
            "gamma": 1.0,
            "token_weights": "mean",
            "reference_mixing": 0.25,
        },
    ),
    # ---- changes to a host ------------------------------------------------------------------------------------------
    "focal": Method(
        "FocalPO",
        "arXiv 2501.06645",
        certainty="formula as in a third-party implementation, its direction as in the abstract; the default "
        "0.05 from memory",
        formula="-p^focal_gamma log p, p the probability that the link gives (sigmoid(z) for DPO)",
        when="Pairs that the model ranks wrongly are thought to be mislabelled or out of reach.",
        fields={"focal_gamma": 0.05},
    ),
    "minor": Method(
        "MinorDPO",
        "Minor DPO reject penalty, arXiv 2408.09834",
        certainty="formula as in a third-party implementation and a secondary page",
        formula="-log sigmoid(beta [r(y_w) - max(0, r(y_l))] - gamma)",
        when="High learning rates: a rejected response is pushed no further down than the reference has it.",
        fields={"clip_rejected": True},
    ),
    "forward-kl": Method(
        "f-DPO, forward KL",
        "Beyond Reverse KL, arXiv 2309.16240",
        certainty=PEER,
        formula="the host's at the margin beta [s(y_w) - s(y_l)] - gamma, s = 1 - e^-r",
        when="The policy should keep covering what the reference does.",
        fields={"divergence": "forward-kl"},
    ),
    "js": Method(
        "f-DPO, Jensen-Shannon",
        "Beyond Reverse KL, arXiv 2309.16240",
        certainty=PEER,
        formula="the host's at the margin beta [s(y_w) - s(y_l)] - gamma, s = log 2 + log sigmoid(r)",
        when="Between the two KLs; the reward of a response is bounded above.",
        fields={"divergence": "js"},
    ),
    "alpha": Method(
        "f-DPO, alpha-divergence",
        "Beyond Reverse KL, arXiv 2309.16240",
        certainty=PEER,
        formula="the host's at the margin beta [s(y_w) - s(y_l)] - gamma, s = (e^((A - 1) r) - 1) / (A - 1), "
        "A = divergence_alpha",
        when="A path from the forward KL (A = 0) to DPO's reverse KL (A = 1). A is 1 - alpha in the paper's "
        "f'(u) = (1 - u^-alpha) / alpha.",
        fields={"divergence": "alpha"},
    ),
    "aot": Method(
        "AOT, paired",
        "Distributional Preference Alignment, arXiv 2406.05882",
        certainty=PEER,
        formula="the host's of the i-th smallest margin of the policy and the i-th smallest of the reference",
        when="Labels are right in distribution rather than pair by pair. Sorted within the batch of one device, so "
        "that batch should be large; micro-batches and ranks are not sorted together.",
        fields={"rearrangement": "paired"},
    ),
    "aot-unpaired": Method(
        "AOT, unpaired",
        "Distributional Preference Alignment, arXiv 2406.05882",
        certainty=PEER + " (its aot_unpaired, formerly aot_pair)",
        formula="the host's of the i-th smallest r(y_w) and the i-th smallest r(y_l)",
        when="Chosen and rejected responses that were not written to the same prompts; else as aot.",
        fields={"rearrangement": "unpaired"},
    ),
    "wpo": Method(
        "WPO",
        "Weighted Preference Optimization, arXiv 2406.11827",
        certainty=PEER + " (its use_weighting: the paper's sampled alignment)",
        formula="the host's times w(y_w) w(y_l), not differentiated; log w(y): the mean over its tokens of "
        "log p_y - log sum_v p_v^2",
        when="Off-policy pairs: those that the policy would not write count less.",
        fields={"on_policy_weighting": True},
    ),
    # ---- token weights ---------------------------------------------------------------------------------------------
    "d2po": Method(
        "D2PO, temporal decay",
        "Earlier Tokens Contribute More, arXiv 2502.14340",
        certainty=CODE,
        formula="-log sigmoid(z), r(y) = sum over t of token_decay^t [log pi(y^t) - log ref(y^t)], t = 1, 2, ...",
        when="Long responses whose quality is settled early: at 0.98 the 50th token counts 0.36.",
        fields={"token_decay": 0.98},
    ),
    "ld-dpo": Method(
        "LD-DPO",
        "Length Desensitization in DPO, arXiv 2409.06411",
        certainty=PEER + ", which leaves ld_alpha to its user; 0.5 is an example",
        formula="-log sigmoid(z), r(y) = sum over t of w_t [log pi(y^t) - log ref(y^t)], w_t = 1 up to the length of "
        "the shorter response, ld_alpha beyond",
        when="The policy grows verbose because the longer response is often the chosen one.",
        fields={"ld_alpha": 0.5},
    ),
    "sampo": Method(
        "SamPO",
        "Eliminating Biased Length Reliance, arXiv 2406.10957",
        certainty="formula as in the authors' code, but for positions shared by policy and reference: "
        "own_token_weights=True draws them apart, as that code does",
        formula="-log sigmoid(z), r(y) = sum over t in S(y) of [log pi(y^t) - log ref(y^t)], S(y) min(|y_w|, |y_l|) "
        "positions drawn without replacement in each step",
        when="As ld-dpo, with an unbiased sample of the longer response instead of its beginning.",
        fields={"down_sampling": True},
    ),
    "bmc": Method(
        "BMC",
        "Bridging and Modeling Correlations in Pairwise Data, arXiv 2408.07471",
        certainty="formula and delta as in the authors' code, but for three things: one weight for policy and "
        "reference (own_token_weights=True: the reference by its own, as that code does), no stop words left out "
        "of the difference (diff_stop_words of MallowsConfig: those given), and the difference of the responses alone",
        formula="-log sigmoid(z), r(y) = sum over t of w_t [log pi(y^t) - log ref(y^t)], w_t = 1 where the responses "
        "agree, 1 + min(1 / pi(y^t), bridge_delta) where they differ, without a gradient of its own",
        when="The chosen response is an edit of the rejected one, as a model makes it on request.",
        fields={"bridge_delta": 2.0},
    ),
    # ---- several references ----------------------------------------------------------------------------------------
    "mrpo": Method(
        "MRPO",
        "Multi-Reference Preference Optimization, arXiv 2405.16388",
        certainty="formula and defaults as in the authors' code, which has two references; any number, and "
        "each weight with its own reference, are this library's (swap_reference_weights=True: that code's way)",
        formula="-log sigmoid(z), ref(y) = 1 / sum over k of w_k / ref_k(y), ref_k clipped around ref_1",
        when="Several models that share the policy's tokenizer know something of the task: pass them as ref_model.",
        fields={"reference_weights": "adaptive", "reference_clip": 0.1, "adaptive_clip": True},
    ),
}
