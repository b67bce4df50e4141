"""Token weights and several references in the trainer: every way to train gives the numbers of the plain formulas."""

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from tiny import WORDS, cache_files, lora, tiny_model, tiny_pairs, tiny_tokenizer, tiny_trainer, train_logs

from mallowspo import objective, reference
from mallowspo.collator import PreferenceCollator
from mallowspo.data import tokenize_pairs
from mallowspo.differences import diff_masks
from mallowspo.mixture import mixed_reference_logps
from mallowspo.model_card import model_card
from mallowspo.token_weights import pair_draws, token_weights

PRESETS = ("d2po", "ld-dpo", "sampo", "bmc")
COMPOSED = ("ld-dpo", "mallows-theta+sampo", "mallows-phi+d2po+bmc", "mallows-theta+d2po+mrpo")


def references(loss_type):
    return [None, tiny_model(seed=2)] if "mrpo" in loss_type else tiny_model(seed=2)


def trainer_of(folder, loss_type, model_seed=1, **options):
    defaults = {"rows": 6, "ref_model": references(loss_type)}
    if "mallows" in loss_type:
        defaults["dispersion_scale"] = 0.4
    return tiny_trainer(folder, model=tiny_model(seed=model_seed), loss_type=loss_type, **defaults | options)


def trained(folder, loss_type, **options):
    trainer = trainer_of(folder, loss_type, **options)
    trainer.train()
    return train_logs(trainer)


def plain_tokens(model, rows):
    """Log-probability of every completion token from the whole logits: for each of the 2B responses a list."""
    tokens = []
    with torch.no_grad():
        for side in ("chosen_ids", "rejected_ids"):
            for row in rows:
                ids = torch.tensor([row["prompt_ids"] + row[side]])
                log_p = nnf.log_softmax(model(input_ids=ids).logits[0].double(), -1)
                tokens.append([log_p[t - 1, ids[0, t]].item() for t in range(len(row["prompt_ids"]), ids.shape[1])])
    return tokens


def plain_weights(name, i, rows, policy):
    """The definitions, response by response: (chosen, rejected)."""
    pair = policy[i], policy[len(rows) + i]
    shared = min(map(len, pair))
    if name == "d2po":
        return [[0.98 ** (t + 1) for t in range(len(tokens))] for tokens in pair]
    if name == "ld-dpo":
        return [[1.0 if t < shared else 0.5 for t in range(len(tokens))] for tokens in pair]
    if name == "bmc":
        masks = diff_masks(rows[i]["chosen_ids"], rows[i]["rejected_ids"])
        return [
            [1 + min(np.exp(-logp), 2.0) * differs for logp, differs in zip(tokens, mask, strict=True)]
            for tokens, mask in zip(pair, masks, strict=True)
        ]
    lengths = torch.tensor([len(tokens) for tokens in pair])  # a score's draw is that of step 0 for the pair's row
    weights = token_weights(torch.zeros(int(lengths.sum())), lengths, draws=pair_draws(torch.tensor([i]), 0, 0))
    return [part.tolist() for part in weights.split(lengths.tolist())]


@pytest.mark.parametrize("name", PRESETS)
def test_scores_are_those_of_the_plain_formulas(tmp_path, name):
    data = tiny_pairs(6)
    rows = tokenize_pairs(data, tiny_tokenizer()).to_list()
    policy, ref = (plain_tokens(tiny_model(seed=seed), rows) for seed in (1, 2))
    scores = trainer_of(tmp_path, name, train_dataset=data).score(data)
    for i in range(len(rows)):
        weights = plain_weights(name, i, rows, policy)
        sums = [
            sum(w * logp for w, logp in zip(weights[side], tokens[side * len(rows) + i], strict=True))
            for tokens in (policy, ref)
            for side in (0, 1)
        ]
        expected = reference.preference_loss(*sums, link="bradley-terry", beta=0.1)
        assert scores["losses"][i] == pytest.approx(expected.loss, rel=1e-4)
        assert scores["chosen_rewards"][i] == pytest.approx(expected.chosen_reward, rel=1e-4, abs=1e-5)
        assert scores["rejected_rewards"][i] == pytest.approx(expected.rejected_reward, rel=1e-4, abs=1e-5)
        assert scores["chosen_logps"][i] == pytest.approx(sum(policy[i]), rel=1e-5)  # what is reported is not weighted
        assert scores["ref_rejected_logps"][i] == pytest.approx(sum(ref[len(rows) + i]), rel=1e-5)
    plain = trainer_of(tmp_path, "dpo", train_dataset=data).score(data)["losses"]
    assert np.abs(scores["losses"] - plain).max() > 1e-3


def test_where_every_word_is_a_stop_word_bmc_is_dpo(tmp_path):
    data = tiny_pairs(6)
    plain, one, every = (
        trainer_of(tmp_path, name, train_dataset=data, **options).score(data)["losses"]
        for name, options in (
            ("dpo", {}),
            ("bmc", {"diff_stop_words": WORDS[4:5]}),
            ("bmc", {"diff_stop_words": WORDS[4:]}),
        )
    )
    np.testing.assert_allclose(every, plain, rtol=1e-6)
    assert np.abs(one - plain).max() > 1e-3


def test_several_references_are_their_mixture(tmp_path):
    data = tiny_pairs(5)
    rows = tokenize_pairs(data, tiny_tokenizer()).to_list()
    models = [tiny_model(seed=seed) for seed in (2, 3, 4)]
    scores = trainer_of(tmp_path, "mrpo", train_dataset=data, ref_model=models).score(data)
    sums = [torch.tensor([sum(tokens) for tokens in plain_tokens(tiny_model(seed=s), rows)]) for s in (1, 2, 3, 4)]
    mixed = mixed_reference_logps(*torch.stack(sums[1:]).chunk(2, dim=1), reference_clip=0.1, adaptive_clip=True)
    for side, of_policy, of_reference in zip(("chosen", "rejected"), sums[0].chunk(2), mixed, strict=True):
        rewards = (0.1 * (of_policy - of_reference)).tolist()
        assert scores[f"{side}_rewards"] == pytest.approx(rewards, rel=1e-4, abs=1e-5)
        for number, suffix in enumerate(("", "_1", "_2"), 1):
            half = sums[number].chunk(2)[side == "rejected"]
            assert scores[f"ref_{side}_logps{suffix}"] == pytest.approx(half.tolist(), rel=1e-5)


def test_identical_references_are_one(tmp_path):
    models = [tiny_model(seed=2), tiny_model(seed=2)]
    several, one = (
        trained(tmp_path, name, ref_model=ref, max_steps=3) for name, ref in (("mrpo", models), ("dpo", models[0]))
    )
    for found, expected in zip(several, one, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_dispersion_is_the_anchors(tmp_path):
    models = [tiny_model(seed=2), tiny_model(seed=3)]
    data = tiny_pairs(4)
    for cached in (False, True):
        options = {"train_dataset": data, "precompute_ref_log_probs": cached}
        several = trainer_of(tmp_path, "mallows-theta+mrpo", ref_model=models, **options).score(data)
        for number, suffix in enumerate(("", "_1")):
            one = trainer_of(tmp_path, "mallows-theta", ref_model=models[number], **options).score(data)
            assert several[f"ref_chosen_entropy{suffix}"] == pytest.approx(one["ref_chosen_entropy"], rel=1e-6)
            same = several["neg_log_dispersion"] == pytest.approx(one["neg_log_dispersion"], rel=1e-6)
            assert same == (number == 0)


def test_the_card_names_every_reference(tmp_path):
    other = tiny_model(seed=2)
    other.config._name_or_path = "maker/other"
    text = str(model_card(trainer_of(tmp_path, "mrpo", ref_model=[None, other], peft_config=lora())))
    assert "Reference: the model with its adapter off, `maker/other`." in text
    assert "Reference: `maker/other`." in str(model_card(trainer_of(tmp_path, "d2po", ref_model=other)))


# All ways to train are one


@pytest.mark.parametrize("loss_type", COMPOSED)
def test_a_cached_reference_is_the_live_one(tmp_path, loss_type):
    live, cached = (
        trained(tmp_path, loss_type, max_steps=4, precompute_ref_log_probs=cached, precompute_ref_batch_size=size)
        for cached, size in ((False, None), (True, 4))
    )
    assert len(cache_files(tmp_path)) == (2 if "mrpo" in loss_type else 1)
    for found, expected in zip(cached, live, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert live[0]["loss"] != pytest.approx(live[-1]["loss"], abs=1e-3)


@pytest.mark.parametrize("loss_type", COMPOSED)
def test_packed_batches_are_padded_ones(tmp_path, loss_type):
    packed, padded = (trained(tmp_path, loss_type, max_steps=3, share_prompt=share) for share in (True, False))
    for found, expected in zip(packed, padded, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("loss_type", ["mallows-theta+sampo+bmc", "mrpo"])
def test_two_runs_are_the_same_bits(tmp_path, loss_type):
    options = {"max_steps": 4, "eval_dataset": tiny_pairs(3, seed=1), "eval_strategy": "steps", "eval_steps": 2}
    first, second = (trained(tmp_path, loss_type, **options) for _ in range(2))
    assert first == second


def test_accumulated_gradients_are_those_of_one_batch(tmp_path):
    logs = []
    for size, accumulate in ((4, 1), (2, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate, "rows": 7}
        options |= {"max_steps": -1, "num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.1}
        logs.append(trained(tmp_path, "mallows-theta+sampo+bmc", **options))
    for found, expected in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "rewards/chosen", "rewards/margins"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4)


def test_the_adapter_off_is_a_reference_like_any_other(tmp_path):
    """First step: policy and reference are one model, so whatever the weights the log-ratios are 0."""
    for cached in (False, True):
        options = {"ref_model": None, "peft_config": lora(), "precompute_ref_log_probs": cached}
        log = trained(tmp_path, "sampo", max_steps=1, **options)[0]
        assert log["loss"] == pytest.approx(np.log(2), abs=1e-6)
        data = tiny_pairs(4)
        options |= {"ref_model": [None, tiny_model(seed=2)], "train_dataset": data}
        scores = trainer_of(tmp_path, "mrpo", **options).score(data)
        assert scores["ref_chosen_logps"] == pytest.approx(scores["chosen_logps"], rel=1e-5)
        assert (np.abs(scores["ref_chosen_logps_1"] - scores["chosen_logps"]) > 1e-3).all()


def test_own_draws_make_noise_where_shared_ones_make_none(tmp_path):
    options = {"model_seed": 2, "max_steps": 1, "per_device_train_batch_size": 6}
    assert trained(tmp_path, "sampo", **options)[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    own = trained(tmp_path, "sampo", own_token_weights=True, **options)[0]
    assert abs(own["loss"] - np.log(2)) > 1e-4


# When SamPO draws


def test_every_step_draws_anew_and_evaluations_do_not(tmp_path):
    """The model does not change, so only the draws do."""
    data = tiny_pairs(4)
    options = {"train_dataset": data, "eval_dataset": data, "learning_rate": 0.0, "max_steps": 4}
    options |= {"per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_of(tmp_path, "sampo", **options)
    trainer.train()
    assert len({log["loss"] for log in train_logs(trainer)}) == 4
    assert len({log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}) == 1
    assert trainer.score(data)["losses"].mean() == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    other = trainer_of(tmp_path, "sampo", seed=1, **options).evaluate()["eval_loss"]
    assert other != trainer.evaluate()["eval_loss"]


class Wrapper(torch.nn.Module):
    """As DDP's: it stays in training mode around a model in evaluation."""

    def __init__(self, module):
        super().__init__()
        self.module, self.forward = module, module.forward


def test_a_score_draws_alike_at_every_step(tmp_path):
    trainer = trainer_of(tmp_path, "sampo")
    expected = trainer.score(trainer.train_dataset)
    trainer.state.global_step = 3
    trainer.model_wrapped = Wrapper(trainer.model).train()
    trainer.model.eval()
    assert (trainer.score(trainer.train_dataset)["losses"] == expected["losses"]).all()


# The cache


def test_one_pass_serves_every_weight(tmp_path):
    options = {"precompute_ref_log_probs": True}
    for loss_type, more, files in (
        ("d2po", {}, 1),
        ("d2po", {"token_decay": 0.9}, 1),
        ("sampo", {}, 1),
        ("bmc", {"bridge_delta": 3.0}, 1),
        ("dpo", {}, 2),  # keeps sums alone
        ("d2po", {"rows": 5}, 3),
    ):
        trainer_of(tmp_path, loss_type, **options, **more)
        assert len(cache_files(tmp_path)) == files, (loss_type, more)


def test_a_second_run_reads_token_values_from_the_cache(tmp_path, monkeypatch):
    options = {"precompute_ref_log_probs": True, "max_steps": 2}
    first = trained(tmp_path, "mrpo+d2po", **options)
    monkeypatch.setattr("mallowspo.MallowsTrainer._over_pairs", lambda *args: pytest.fail("a second pass"))
    assert trained(tmp_path, "mrpo+d2po", **options) == first


def test_the_rows_of_a_token_column_are_as_long_as_their_responses(tmp_path):
    trainer = trainer_of(tmp_path, "d2po", precompute_ref_log_probs=True, max_length=6)
    rows = trainer._prepared(trainer.train_dataset).to_list()
    batch = PreferenceCollator(pad_token_id=0)(rows)
    tokens = torch.cat([batch["ref_chosen_token_logps"], batch["ref_rejected_token_logps"]])
    sums = torch.segment_reduce(tokens, "sum", lengths=batch["num_tokens"], axis=0)
    torch.testing.assert_close(sums, torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]]))
    (path,) = cache_files(tmp_path)
    raw = path.read_bytes()
    path.write_bytes(raw[:-4])
    with pytest.raises(ValueError, match="corrupt"):
        trainer_of(tmp_path, "d2po", precompute_ref_log_probs=True, max_length=6)


# What cannot be


def test_the_number_of_references(tmp_path):
    several = [tiny_model(seed=2), tiny_model(seed=3)]
    with pytest.raises(ValueError, match="2 references need reference_weights"):
        trainer_of(tmp_path, "dpo", ref_model=several)
    with pytest.raises(ValueError, match=r"reference_weights \(MRPO\) mix several references.*list of models"):
        trainer_of(tmp_path, "mrpo", ref_model=several[0])
    with pytest.raises(ValueError, match="reference_weights has 3 numbers for 2 references"):
        trainer_of(tmp_path, "mrpo", ref_model=several, reference_weights=[0.5, 0.25, 0.25])
    model = tiny_model()
    with pytest.raises(ValueError, match="ref_model is the model itself"):
        tiny_trainer(tmp_path, model=model, loss_type="mrpo", ref_model=[several[0], model])


def test_fields_from_the_arguments(tmp_path):
    trainer = trainer_of(tmp_path, "mrpo", reference_weights=[0.25, 0.75], reference_clip=0.2, adaptive_clip=False)
    expected = objective.preset("mrpo", reference_weights=(0.25, 0.75), reference_clip=0.2, adaptive_clip=False)
    assert trainer.objective == expected
    assert trainer_of(tmp_path, "ld-dpo", ld_alpha=0.0).objective.ld_alpha == 0
