"""Token weights: worked examples, the methods' identities on values and gradients, and the draws of SamPO."""

import math
from collections import Counter
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mallowspo.functional import pair_draws, token_weights
from mallowspo.modeling import ResponseStats
from mallowspo.objective import PreferenceObjective, preset
from mallowspo.token_weights import response_sums, weighted_logps

# One pair by hand: the chosen response has three tokens, the rejected one two. Log-ratios 0.5, 1, -1 and 0.25, 0.5.
NUM_TOKENS = torch.tensor([3, 2])
POLICY = torch.tensor([-0.5, -1.0, -2.0, -0.75, -1.5], dtype=torch.float64)
REFERENCE = torch.tensor([-1.0, -2.0, -1.0, -1.0, -2.0], dtype=torch.float64)
DIFFERS = torch.tensor([False, True, False, False, True])
ROW = torch.tensor([0])
HOSTS = ("bradley-terry", "ipo", "hinge", "mallows-theta", "mallows-phi")
TOKEN_PRESETS = ("d2po", "ld-dpo", "sampo", "bmc")


def stats(token_logps, num_tokens):
    return ResponseStats(response_sums(token_logps, num_tokens), None, token_logps)


def batch_of(num_tokens, differs, rows=None):
    rows = torch.arange(len(num_tokens) // 2) if rows is None else rows
    return {"num_tokens": num_tokens, "row": rows, "differs": differs}


def loss_of(objective, policy, reference, batch, dispersion=None, step=0):
    num_tokens = batch["num_tokens"]
    references = [stats(tokens, num_tokens) for tokens in reference]
    logps, ref_logps = weighted_logps(objective, batch, stats(policy, num_tokens), references, step=step)
    return objective(logps, num_tokens, ref_logps, dispersion, plain_logps=response_sums(policy, num_tokens)).losses


def by_hand(name, **options):
    objective = preset(name, beta=1.0, **options)
    return loss_of(objective, POLICY, [REFERENCE], batch_of(NUM_TOKENS, DIFFERS)).item()


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


# Sums


def test_lengths_are_checked_where_that_waits_for_no_device(monkeypatch):
    with pytest.raises(RuntimeError, match="lengths"):
        response_sums(torch.ones(4), torch.tensor([3, 2]))
    found, original = [], torch.segment_reduce

    def recorded(*args, **kwargs):
        found.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "segment_reduce", recorded)
    response_sums(torch.ones(5, device="meta"), torch.ones(2, dtype=torch.int64, device="meta"))
    assert found[0]["unsafe"]


# Worked examples


def test_decay_by_hand():
    """0.5 * 0.5 + 1 * 0.25 - 1 * 0.125 = 0.375 against 0.25 * 0.5 + 0.5 * 0.25 = 0.25."""
    assert by_hand("d2po", token_decay=0.5) == pytest.approx(-log_sigmoid(0.375 - 0.25), abs=1e-12)


def test_decayed_means_divide_by_the_count_of_tokens():
    """The authors' code divides by |y|, not by the sum of the weights."""
    expected = -log_sigmoid(0.375 / 3 - 0.25 / 2)
    assert by_hand("d2po", token_decay=0.5, token_weights="mean") == pytest.approx(expected, abs=1e-12)


def test_ld_alpha_by_hand():
    """The third token of the chosen response counts a quarter: 0.5 + 1 - 0.25 against 0.75."""
    assert by_hand("ld-dpo", ld_alpha=0.25) == pytest.approx(-log_sigmoid(1.25 - 0.75), abs=1e-12)
    assert by_hand("ld-dpo", ld_alpha=0.0) == pytest.approx(-log_sigmoid(1.5 - 0.75), abs=1e-12)


def test_down_sampling_by_hand():
    """Two of the three tokens: 1.5, -0.5 or 0 against 0.75, each at some step."""
    objective = preset("sampo", beta=1.0)
    batch = batch_of(NUM_TOKENS, DIFFERS)
    seen = {round(loss_of(objective, POLICY, [REFERENCE], batch, step=s).item(), 9) for s in range(30)}
    assert seen == {round(-log_sigmoid(score - 0.75), 9) for score in (1.5, -0.5, 0.0)}


def test_bridges_by_hand():
    """The second tokens differ. 1 / pi is e and e^1.5 there: at most delta = 2, and e where delta = 3."""
    assert by_hand("bmc") == pytest.approx(-log_sigmoid(0.5 + 3 * 1 - 1 - (0.25 + 3 * 0.5)), abs=1e-12)
    expected = -log_sigmoid(0.5 + (1 + math.e) * 1 - 1 - (0.25 + 4 * 0.5))
    assert by_hand("bmc", bridge_delta=3.0) == pytest.approx(expected, abs=1e-12)


def test_the_reference_weighs_its_own_tokens_in_the_authors_bmc():
    """delta = 3: the policy's second tokens count 1 + e and 4, the reference's, of probability e^-2, 4 and 4."""
    chosen = (-0.5 - (1 + math.e) * 1.0 - 2.0) - (-1.0 - 4 * 2.0 - 1.0)
    rejected = (-0.75 - 4 * 1.5) - (-1.0 - 4 * 2.0)
    found = by_hand("bmc", bridge_delta=3.0, own_token_weights=True)
    assert found == pytest.approx(-log_sigmoid(chosen - rejected), abs=1e-12)


def test_the_reference_draws_its_own_tokens_in_the_authors_sampo():
    """All nine pairs of draws occur; shared, only three."""
    policy = [-0.5 - 1.0, -0.5 - 2.0, -1.0 - 2.0]
    reference = [-1.0 - 2.0, -1.0 - 1.0, -2.0 - 1.0]
    rejected = (-0.75 - 1.5) - (-1.0 - 2.0)
    expected = {round(-log_sigmoid(p - r - rejected), 9) for p in policy for r in reference}
    objective = preset("sampo", beta=1.0, own_token_weights=True)
    batch = batch_of(NUM_TOKENS, DIFFERS)
    assert {round(loss_of(objective, POLICY, [REFERENCE], batch, step=s).item(), 9) for s in range(200)} == expected


def test_the_sft_term_is_not_weighted():
    plain, with_sft = by_hand("d2po", token_decay=0.5), by_hand("d2po", token_decay=0.5, sft_weight=2.0)
    assert with_sft - plain == pytest.approx(2.0 * 3.5 / 3, abs=1e-12)
    objective = preset("d2po", sft_weight=1.0)
    with pytest.raises(ValueError, match="sft_weight need plain_logps where tokens are weighted"):
        objective(torch.zeros(2), NUM_TOKENS, torch.zeros(2))


# Identities

LOGP = st.floats(-8, 0, width=32)


@st.composite
def batches(draw, equal_lengths=False):
    """num_tokens [2B], policy and reference log-probabilities [N] float64, differs [N], dispersion [B], a link."""
    pairs = draw(st.integers(1, 4))
    length = st.integers(1, 6)
    chosen = draw(st.lists(length, min_size=pairs, max_size=pairs))
    rejected = chosen if equal_lengths else draw(st.lists(length, min_size=pairs, max_size=pairs))
    total = sum(chosen) + sum(rejected)
    policy, reference = (draw(st.lists(LOGP, min_size=total, max_size=total)) for _ in range(2))
    return SimpleNamespace(
        num_tokens=torch.tensor(chosen + rejected),
        policy=torch.tensor(policy, dtype=torch.float64),
        reference=torch.tensor(reference, dtype=torch.float64),
        differs=torch.tensor(draw(st.lists(st.booleans(), min_size=total, max_size=total))),
        dispersion=torch.tensor(
            draw(st.lists(st.floats(0.01, 3), min_size=pairs, max_size=pairs)), dtype=torch.float64
        ),
        link=draw(st.sampled_from(HOSTS)),
        step=draw(st.integers(0, 1000)),
    )


def loss_and_gradient(case, differs=None, **fields):
    objective = PreferenceObjective(link=case.link, **fields)
    policy = case.policy.clone().requires_grad_()
    batch = batch_of(case.num_tokens, case.differs if differs is None else differs)
    reference = [] if objective.reference_free else [case.reference]
    dispersion = case.dispersion if objective.uses_dispersion else None
    losses = loss_of(objective, policy, reference, batch, dispersion, case.step)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    return losses.detach(), gradient


def same(case, expected_fields=None, differs=None, **fields):
    expected = loss_and_gradient(case, **expected_fields or {})
    found = loss_and_gradient(case, differs, **fields)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=40)
@given(batches())
def test_no_decay_is_the_host(case):
    same(case, token_decay=1.0)
    same(case, {"token_weights": "mean"}, token_decay=1.0, token_weights="mean")
    # next to 1, where the weights are formed, it is nearly so
    near = loss_and_gradient(case, token_decay=1 - 1e-9)
    torch.testing.assert_close(near, loss_and_gradient(case), rtol=1e-5, atol=1e-5)


@settings(max_examples=40)
@given(batches(equal_lengths=True), st.booleans())
def test_equal_lengths_make_sampo_and_ld_dpo_the_host(case, own):
    same(case, down_sampling=True, own_token_weights=own)
    same(case, ld_alpha=0.3)


@settings(max_examples=40)
@given(batches())
def test_alpha_1_makes_ld_dpo_the_host(case):
    same(case, ld_alpha=1.0)
    near = loss_and_gradient(case, ld_alpha=1 - 1e-9)
    torch.testing.assert_close(near, loss_and_gradient(case), rtol=1e-5, atol=1e-5)


@settings(max_examples=40)
@given(batches(), st.booleans())
def test_no_differing_tokens_make_bmc_the_host(case, own):
    same(case, differs=torch.zeros_like(case.differs), bridge_delta=2.0, own_token_weights=own)


@settings(max_examples=40)
@given(batches())
def test_no_gradient_flows_through_the_weights_of_bmc(case):
    """d loss / d log pi_t is the weight times what it is for a score of that value."""
    losses, gradient = loss_and_gradient(case, bridge_delta=2.5)
    weights = 1 + torch.where(case.differs, torch.exp(-case.policy).clamp(max=2.5), 0.0)
    frozen = SimpleNamespace(**vars(case) | {"policy": weights * case.policy, "reference": weights * case.reference})
    expected, per_score = loss_and_gradient(frozen)
    torch.testing.assert_close((losses, gradient), (expected, weights * per_score), rtol=1e-9, atol=1e-12)


@settings(max_examples=40)
@given(batches(), st.sampled_from([{"token_decay": 0.5}, {"ld_alpha": 0.5}, {"down_sampling": True}]))
def test_policy_and_reference_are_weighed_alike(case, fields):
    """The log-ratios of tokens that agree are 0 whatever their weight."""
    case.reference = case.policy.clone()
    objective = PreferenceObjective("bradley-terry", **fields)
    batch = batch_of(case.num_tokens, case.differs)
    losses = loss_of(objective, case.policy, [case.reference], batch, step=case.step)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), rtol=1e-12, atol=0)


@settings(max_examples=40)
@given(batches())
def test_the_factors_multiply(case):
    draws = pair_draws(torch.arange(len(case.num_tokens) // 2), 0, case.step)
    options = {"token_decay": 0.7}, {"ld_alpha": 0.2}, {"draws": draws}, {"bridge_delta": 2.0, "differs": case.differs}
    each = [token_weights(case.policy, case.num_tokens, **one) for one in options]
    together = token_weights(case.policy, case.num_tokens, **{k: v for one in options for k, v in one.items()})
    torch.testing.assert_close(together, each[0] * each[1] * each[2] * each[3], rtol=1e-12, atol=0)
    assert not together.requires_grad and together.dtype == torch.float64


@settings(max_examples=40)
@given(batches())
def test_weights_against_loops(case):
    """The definitions, token by token."""
    lengths = case.num_tokens.tolist()
    pairs = len(lengths) // 2
    decayed = token_weights(case.policy, case.num_tokens, token_decay=0.8).split(lengths)
    discounted = token_weights(case.policy, case.num_tokens, ld_alpha=0.3).split(lengths)
    draws = pair_draws(torch.arange(pairs), 5, case.step)
    sampled = token_weights(case.policy, case.num_tokens, draws=draws).split(lengths)
    for r, length in enumerate(lengths):
        shared = min(lengths[r % pairs], lengths[r % pairs + pairs])
        assert decayed[r].tolist() == pytest.approx([0.8 ** (t + 1) for t in range(length)])
        assert discounted[r].tolist() == [1.0 if t < shared else 0.3 for t in range(length)]
        assert sorted(sampled[r].tolist()) == [0.0] * (length - shared) + [1.0] * shared


def test_reference_free_objectives_weigh_the_policy_alone():
    objective = preset("d2po", token_decay=0.5, reference_free=True, beta=1.0)
    loss = loss_of(objective, POLICY, [], batch_of(NUM_TOKENS, DIFFERS)).item()
    chosen, rejected = -0.25 - 0.25 - 0.25, -0.375 - 0.375
    assert loss == pytest.approx(-log_sigmoid(chosen - rejected), abs=1e-12)


# The draws


def kept_of(rows, num_tokens, seed=0, step=0, stream=0):
    num_tokens = torch.tensor(num_tokens)
    weights = token_weights(
        torch.zeros(int(num_tokens.sum())), num_tokens, draws=pair_draws(torch.tensor(rows), seed, step, stream)
    )
    return [tuple(part.nonzero().flatten().tolist()) for part in weights.split(num_tokens.tolist())]


def test_draws_are_uniform_over_the_subsets():
    """2 of 5: each of ten subsets 6,000 times in 60,000 (rows, steps and seeds), deviation 73; five of them."""
    counts = Counter()
    for step in range(20):
        for seed in range(3):
            kept = kept_of(list(range(1000)), [2] * 1000 + [5] * 1000, seed, step)
            counts.update(kept[1000:])
    assert set(counts) == set(combinations(range(5), 2))
    assert all(abs(count - 6000) < 5 * 74 for count in counts.values())


def test_a_draw_depends_on_pair_seed_and_step_alone():
    alone = kept_of([7], [3, 30])
    assert kept_of([2, 7, 9], [4, 3, 8, 6, 30, 1])[4] == alone[1]  # in another batch
    assert kept_of([7], [30, 3])[0] == alone[1]  # on the other side
    others = [kept_of([7], [3, 30], **change)[1] for change in ({"seed": 1}, {"step": 1}, {"stream": 1})]
    assert len({alone[1], kept_of([8], [3, 30])[1], *others}) == 5


def test_numbers_of_draws_do_not_collide():
    rows = torch.arange(100)
    numbers = [pair_draws(rows, seed, step, stream) for seed in range(5) for step in range(20) for stream in range(3)]
    assert len(set(torch.cat(numbers).tolist())) == 100 * 5 * 20 * 3


def test_sampling_is_right_on_average():
    """The mean over draws is the sum over all tokens times the share that is kept."""
    num_tokens, logps = torch.tensor([2, 6]), torch.arange(8, dtype=torch.float64)
    sums = [
        response_sums(logps, num_tokens, token_weights(logps, num_tokens, draws=pair_draws(ROW, 0, step)))[1]
        for step in range(1000)
    ]
    assert torch.stack(sums).mean().item() == pytest.approx(27 * 2 / 6, abs=0.35)  # deviation 2.16 / sqrt(1000)


# What cannot be


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"token_decay": 0.0}, r"token_decay must be in \(0, 1\] .*, got 0.0"),
        ({"token_decay": 1.1}, r"token_decay must be in \(0, 1\] .*, got 1.1"),
        ({"token_decay": math.nan}, "token_decay must be .*, got nan"),
        ({"ld_alpha": -0.1}, r"ld_alpha must be in \[0, 1\] .*, got -0.1"),
        ({"ld_alpha": 1.5}, r"ld_alpha must be in \[0, 1\] .*, got 1.5"),
        ({"bridge_delta": -1.0}, "bridge_delta must be finite and >= 0 .*, got -1.0"),
        ({"bridge_delta": math.inf}, "bridge_delta must be finite and >= 0 .*, got inf"),
        (
            {"down_sampling": True, "token_weights": "mean"},
            "down_sampling=True .* does not go with token_weights='mean'",
        ),
        ({"down_sampling": True, "ld_alpha": 0.5}, "down_sampling=True .* does not go with ld_alpha=0.5"),
        ({"token_decay": 0.9, "divergence": "js"}, "divergence='js' .* does not go with token_decay=0.9"),
        ({"own_token_weights": True}, "own_token_weights is about down_sampling or bridge_delta"),
        (
            {"own_token_weights": True, "down_sampling": True, "reference_free": True},
            "reference_free=True .* does not go with own_token_weights=True",
        ),
    ],
)
def test_impossible_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        PreferenceObjective(**fields)


@pytest.mark.parametrize("field", ["token_decay", "ld_alpha", "bridge_delta", "sft_weight"])
def test_what_is_no_number(field):
    with pytest.raises(TypeError, match=f"{field} must be a number, got '0.5'"):
        PreferenceObjective(**{field: "0.5"})


def test_what_a_batch_lacks():
    policy = stats(POLICY, NUM_TOKENS)
    for name, column, message in (
        ("sampo", "row", r"down_sampling \(SamPO\).*lacks 'row'"),
        ("bmc", "differs", r"bridge_delta=2.0 \(BMC\) needs differs.*diff_masks"),
    ):
        batch = batch_of(NUM_TOKENS, DIFFERS)
        del batch[column]
        with pytest.raises(ValueError, match=message):
            weighted_logps(preset(name), batch, policy, [policy])
    with pytest.raises(ValueError, match="differs is read where bridge_delta > 0"):
        token_weights(POLICY, NUM_TOKENS, differs=DIFFERS)


@pytest.mark.parametrize("name", TOKEN_PRESETS)
def test_presets_compose_with_the_mallows_links(name):
    both = preset(f"mallows-theta+{name}")
    assert both.uses_dispersion and both.weighs_tokens and both == preset(f"{name}+mallows-theta")
    half = torch.tensor([0.5], dtype=torch.float64)  # where the theta link is DPO's
    batch = batch_of(NUM_TOKENS, DIFFERS)
    found = loss_of(both, POLICY, [REFERENCE], batch, half)
    torch.testing.assert_close(found, loss_of(preset(name), POLICY, [REFERENCE], batch), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["d2po", "ld-dpo", "sampo", "bmc"])
def test_missing_token_log_probabilities_name_who_weighs_them(name):
    stats = ResponseStats(torch.zeros(2), torch.zeros(2), None)
    with pytest.raises(ValueError, match=r"\(D2PO\).*\(LD-DPO\).*\(SamPO\).*\(BMC\).*'ref_chosen_token_logps'"):
        weighted_logps(preset(name), {"num_tokens": torch.ones(2, dtype=torch.int64)}, stats, [stats])
