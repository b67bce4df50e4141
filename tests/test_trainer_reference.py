"""Where the trainer's reference comes from: every way gives the numbers of the plain formulas."""

import math
import os

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny import (
    WORDS,
    cache_files,
    lora,
    plain_stats,
    tiny_model,
    tiny_pairs,
    tiny_tokenizer,
    tiny_trainer,
    train_logs,
)

from mallowspo import MallowsTrainer, objective, reference
from mallowspo.choices import PAIR_CHOICES
from mallowspo.data import tokenize_pairs
from mallowspo.dispersion import save_cache
from mallowspo.reference_pass import _from_columns

LOG_2 = math.log(2)


def no_pass(self, dataset, compute, description):
    raise AssertionError("a reference pass that the cache should have spared")


# Each way to have a reference: what to pass to the trainer.
MODES = {
    "frozen copy": lambda: {},
    "second model": lambda: {"ref_model": tiny_model()},
    "adapter off": lambda: {"peft_config": lora()},
    "precomputed": lambda: {"precompute_ref_log_probs": True},
    "precomputed from a second model": lambda: {"precompute_ref_log_probs": True, "ref_model": tiny_model()},
    "precomputed, adapter off": lambda: {"precompute_ref_log_probs": True, "peft_config": lora()},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", [{"loss_type": "dpo"}, {"loss_type": "mallows-theta", "dispersion_scale": 0.3}])
def test_first_loss_is_log_2(tmp_path, mode, loss):
    trainer = tiny_trainer(tmp_path, max_steps=1, **loss, **MODES[mode]())
    trainer.train()
    (log,) = train_logs(trainer)
    assert log["loss"] == pytest.approx(LOG_2, abs=1e-6)
    assert log["rewards/margins"] == pytest.approx(0, abs=1e-6)
    if "precomputed" not in mode:  # the same computation on the same batch
        assert log["rewards/chosen"] == log["rewards/rejected"] == log["log_ratio/chosen"] == 0
        assert log["rewards/accuracies"] == 0.5
    assert len(cache_files(tmp_path)) == ("precomputed" in mode)


def test_all_ways_train_alike(tmp_path):
    curves = {}
    for mode, options in MODES.items():
        if "adapter" not in mode:
            trainer = tiny_trainer(tmp_path / mode, rows=5, max_steps=4, dispersion_scale=0.3, **options())
            trainer.train()
            curves[mode] = [log["loss"] for log in train_logs(trainer)]
    first = curves.pop("frozen copy")
    assert first[-1] < first[0] - 1e-3
    for mode, curve in curves.items():
        assert curve == pytest.approx(first, abs=1e-5), mode


@pytest.mark.parametrize("mode", ["frozen copy", "adapter off"])
def test_first_loss_is_log_2_under_bfloat16_autocast(tmp_path, mode):
    """Both forwards run under the same autocast, on the same batch: not even rounding may tell them apart."""
    options = {"loss_type": "dpo", "max_steps": 1, "bf16": True, "eval_dataset": tiny_pairs(4, seed=1)}
    trainer = tiny_trainer(tmp_path, **options, **MODES[mode]())
    before = trainer.evaluate()
    trainer.train()
    log = train_logs(trainer)[0]
    for name in ("rewards/chosen", "rewards/rejected", "log_ratio/chosen"):
        assert log[name] == before[f"eval_{name}"] == 0
    assert log["loss"] == pytest.approx(LOG_2, abs=1e-7) and log["grad_norm"] > 0
    full = tiny_trainer(tmp_path, **options | {"bf16": False}, **MODES[mode]())
    assert full.evaluate()["eval_logps/chosen"] != before["eval_logps/chosen"]  # bfloat16 was really used


def test_bfloat16_evaluation_with_a_second_model(tmp_path):
    """A prepared reference kept the policy from being prepared: it was evaluated in float32 against a bfloat16 one."""
    options = {"loss_type": "dpo", "bf16": True, "eval_dataset": tiny_pairs(4, seed=1)}
    metrics = tiny_trainer(tmp_path, ref_model=tiny_model(), **options).evaluate()
    assert metrics["eval_rewards/chosen"] == metrics["eval_log_ratio/rejected"] == 0


def test_bfloat16_gradients_with_the_adapter_off(tmp_path):
    """Autocast keeps the weights it has cast; casts made for the reference, without a gradient, must not be reused."""
    norms = []
    for options in ({}, {"bf16": True}):
        torch.manual_seed(0)
        trainer = tiny_trainer(tmp_path, loss_type="dpo", max_steps=1, peft_config=lora(), **options)
        trainer.train()
        norms.append(train_logs(trainer)[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.1) and norms[0] > 0


# The numbers, against the formulas


# What is not of one pair and its log-ratios alone, or not read as it is: compared in test_objective.py.
SPECIAL = ("aot", "aot-unpaired", "wpo", "rainbowpo")
# Token weights and several references: test_trainer_tokens.py.
SPECIAL += ("d2po", "ld-dpo", "sampo", "bmc", "mrpo")


@pytest.mark.parametrize("name", [name for name in objective.presets() if name not in SPECIAL])
def test_scores_are_those_of_the_plain_formulas(tmp_path, name):
    policy, other = tiny_model(seed=1), tiny_model(seed=2)
    preset = objective.preset(name)
    uses_reference = preset.uses_dispersion or not preset.reference_free
    options = {"ref_model": other} if uses_reference else {}
    if preset.uses_dispersion:
        options["dispersion_scale"] = 0.7
    data = tiny_pairs(5)
    rows = tokenize_pairs(data, tiny_tokenizer()).to_list()
    with torch.no_grad():
        logps, _ = (values.double().tolist() for values in plain_stats(policy, rows))
        ref_logps, ref_entropy = (values.double().tolist() for values in plain_stats(other, rows))
    scores = tiny_trainer(tmp_path, model=policy, train_dataset=data, loss_type=name, **options).score(data)
    assert scores["row"].tolist() == list(range(5))
    for i, row in enumerate(rows):
        tokens = [len(row["chosen_ids"]), len(row["rejected_ids"])]
        assert [scores["chosen_tokens"][i], scores["rejected_tokens"][i]] == tokens
        assert scores["chosen_logps"][i] == pytest.approx(logps[i], rel=1e-5)
        assert scores["rejected_logps"][i] == pytest.approx(logps[5 + i], rel=1e-5)
        four = [logps[i], logps[5 + i], 0.0, 0.0]
        if not preset.reference_free:
            four[2:] = ref_logps[i], ref_logps[5 + i]
        if preset.token_weights == "mean":
            four = [value / tokens[side % 2] for side, value in enumerate(four)]
        a = None
        if preset.uses_dispersion:
            a = reference.neg_log_dispersion(ref_entropy[i], ref_entropy[5 + i], len(WORDS), scale=0.7)
            assert scores["neg_log_dispersion"][i] == pytest.approx(a, rel=1e-4)
            assert scores["ref_rejected_entropy"][i] == pytest.approx(ref_entropy[5 + i], rel=1e-5)
        expected = reference.preference_loss(
            *four, neg_log_dispersion=a, **{field: getattr(preset, field) for field in PAIR_CHOICES}
        )
        assert scores["losses"][i] == pytest.approx(expected.loss, rel=1e-4, abs=1e-5)
        assert scores["chosen_rewards"][i] == pytest.approx(expected.chosen_reward, rel=1e-4, abs=1e-5)
        assert scores["rejected_rewards"][i] == pytest.approx(expected.rejected_reward, rel=1e-4, abs=1e-5)
    assert ("ref_chosen_logps" in scores) == uses_reference
    assert ("neg_log_dispersion" in scores) == preset.uses_dispersion


# The cached pass


def test_cached_numbers_are_the_live_ones(tmp_path):
    data, options = tiny_pairs(7), {"model": tiny_model(seed=1), "dispersion_scale": 0.3}
    live = tiny_trainer(tmp_path, train_dataset=data, ref_model=tiny_model(seed=2), **options).score(data)
    options |= {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}
    cached = tiny_trainer(tmp_path, train_dataset=data, ref_model=tiny_model(seed=2), **options).score(data)
    assert cached.keys() == live.keys()
    for name, values in live.items():
        assert cached[name] == pytest.approx(values, rel=1e-5, abs=1e-6), name
    assert np.abs(live["ref_chosen_logps"] - live["chosen_logps"]).min() > 1e-3


def test_a_second_run_makes_no_pass(tmp_path, monkeypatch):
    options = {"rows": 5, "eval_dataset": tiny_pairs(3, seed=1), "precompute_ref_log_probs": True}
    first = tiny_trainer(tmp_path, **options)
    files = cache_files(tmp_path)
    assert len(files) == 2  # train and eval
    monkeypatch.setattr(MallowsTrainer, "_over_pairs", no_pass)
    second = tiny_trainer(tmp_path, **options)
    assert cache_files(tmp_path) == files and second.dispersion_scale == first.dispersion_scale
    first.train()
    second.train()
    assert train_logs(first) == train_logs(second)
    with pytest.raises(AssertionError, match="spared"):  # the guard works
        tiny_trainer(tmp_path, **options | {"model": tiny_model(seed=5)})


def test_the_cached_columns_are_what_the_loss_reads(tmp_path):
    """They were ignored unless an unrelated option was set, and the loss stayed at log 2."""
    tiny_trainer(tmp_path, rows=4, loss_type="dpo", precompute_ref_log_probs=True)
    (path,) = cache_files(tmp_path)
    columns = load_file(path)
    columns["ref_rejected_logps"] += 10.0
    save_cache(path, columns, path.stem)
    trainer = tiny_trainer(tmp_path, rows=4, loss_type="dpo", precompute_ref_log_probs=True, max_steps=1)
    calls = []
    trainer.model.lm_head.register_forward_hook(lambda *args: calls.append(1))
    trainer.train()
    log = train_logs(trainer)[0]
    assert log["rewards/margins"] == pytest.approx(0.1 * 10, rel=1e-5)
    assert log["loss"] == pytest.approx(math.log1p(math.exp(-1)), rel=1e-5)
    assert len(calls) == 1 and trainer.ref_model is None  # no second forward, no second model


def test_a_tampered_cache_stops_the_run(tmp_path):
    tiny_trainer(tmp_path, precompute_ref_log_probs=True)
    (path,) = cache_files(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=f"corrupt.*{path}"):
        tiny_trainer(tmp_path, precompute_ref_log_probs=True)


def test_what_changes_the_pass_makes_a_new_file(tmp_path):
    changes = [
        {},
        {"model": tiny_model(seed=1)},
        {"model": tiny_model(rms_norm_eps=1e-2)},
        {"rows": 5},
        {"max_length": 6},
        {"bf16": True},
        {"train_dataset": tiny_pairs(6, seed=1)},
    ]
    for number, change in enumerate(changes, 1):
        tiny_trainer(tmp_path, **change)
        assert len(cache_files(tmp_path)) == number, change
    for same in ({"learning_rate": 1.0}, {"beta": 0.5}, {"peft_config": lora()}, {"ref_model": tiny_model()}):
        tiny_trainer(tmp_path, **same)
        assert len(cache_files(tmp_path)) == len(changes), same


def test_a_reference_with_an_adapter_is_the_whole_of_it(tmp_path):
    peft = pytest.importorskip("peft")
    data, scores = tiny_pairs(3), []
    for number, gain in enumerate((1.0, 2.0), 1):
        torch.manual_seed(0)
        other = peft.get_peft_model(tiny_model(), lora(init_lora_weights=False))
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if "lora_B" in name:
                    parameter *= gain
        trainer = tiny_trainer(tmp_path, ref_model=other, train_dataset=data)
        assert len(cache_files(tmp_path)) == number  # not the other adapter's numbers
        scores.append(trainer.score(data)["ref_chosen_logps"])
        rows = tokenize_pairs(data, tiny_tokenizer()).to_list()
        with torch.no_grad():
            assert scores[-1] == pytest.approx(plain_stats(other, rows)[0][:3].numpy(), rel=1e-5)
    assert np.abs(scores[0] - scores[1]).min() > 1e-4


def test_reference_cache_dir_and_a_full_disk(tmp_path, monkeypatch):
    cache = tmp_path / "elsewhere"
    tiny_trainer(tmp_path / "a", reference_cache_dir=str(cache))
    assert len(os.listdir(cache)) == 1 and not cache_files(tmp_path / "a")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="could not be written.*No space left.*set reference_cache_dir"):
        tiny_trainer(tmp_path / "b")
    assert cache_files(tmp_path / "b") == []


def test_a_new_data_set_needs_a_reference_that_is_still_there(tmp_path):
    new = tiny_pairs(3, seed=9)
    cached = tiny_trainer(tmp_path)
    for use in (cached.evaluate, cached.score, cached.predict):
        with pytest.raises(
            ValueError, match="not given to the constructor.*give it to the constructor, .*or pass ref_model"
        ):
            use(new)
    moving = tiny_trainer(tmp_path, tiny_model("qwen2"), peft_config=lora(bias="all"))
    with pytest.raises(ValueError, match="bias is trained .* would not stay the reference"):
        moving.evaluate(new)
    expected = tiny_trainer(tmp_path, ref_model=tiny_model(), eval_dataset=new)
    for options in ({"ref_model": tiny_model()}, {"peft_config": lora()}):
        trainer = tiny_trainer(tmp_path, **options)
        assert trainer.evaluate(new)["eval_loss"] == pytest.approx(LOG_2, abs=1e-6)
        assert trainer.predict(new).metrics["test_loss"] == pytest.approx(LOG_2, abs=1e-6)
        assert trainer.score(new)["losses"] == pytest.approx([LOG_2] * 3, abs=1e-6)
        assert trainer.score(new)["neg_log_dispersion"] == pytest.approx(expected.score(new)["neg_log_dispersion"])


def test_weights_that_are_elsewhere_are_refused(tmp_path):
    def partitioned():
        model = tiny_model()
        model.lm_head.weight.ds_id = 0  # how deepspeed marks what ZeRO-3 has partitioned
        return model

    with pytest.raises(ValueError, match="weights on every rank.*fsdp_cpu_ram_efficient_loading"):
        tiny_trainer(tmp_path, ref_model=tiny_model().to("meta"))  # what FSDP gives all ranks but one
    for options in ({}, {"loss_type": "dpo"}, {"peft_config": lora()}):
        with pytest.raises(
            ValueError, match="ZeRO-3 splits this model.*pass the name of the model.*or pass ref_model"
        ):
            tiny_trainer(tmp_path, model=partitioned(), **options)
    tiny_trainer(tmp_path, model=partitioned(), loss_type="dpo", peft_config=lora())


# The reference's weights


def test_adapter_training_changes_only_the_adapter(tmp_path):
    trainer = tiny_trainer(tmp_path, peft_config=lora(), max_steps=3, dispersion_scale=0.3)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    reference_before = trainer.score(trainer.train_dataset)
    trainer.train()
    changed = {n for n, value in trainer.model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed and all("lora_" in name for name in changed)
    after = trainer.score(trainer.train_dataset)
    assert after["ref_chosen_logps"] == pytest.approx(reference_before["ref_chosen_logps"], rel=1e-6)
    assert np.abs(after["chosen_logps"] - reference_before["chosen_logps"]).max() > 1e-3
    trainer.save_model(tmp_path / "saved")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path / "saved"))


@pytest.mark.parametrize("options", [{}, {"dispersion_scale": 0.3}])
def test_full_training_leaves_the_reference_alone(tmp_path, options):
    trainer = tiny_trainer(tmp_path, max_steps=3, **options)
    before = trainer.score(trainer.train_dataset)
    trainer.train()
    after = trainer.score(trainer.train_dataset)
    for name in ("ref_chosen_logps", "ref_rejected_logps", "ref_chosen_entropy", "neg_log_dispersion"):
        assert after[name] == pytest.approx(before[name], rel=1e-6), name
    assert np.abs(after["chosen_logps"] - after["ref_chosen_logps"]).max() > 1e-3


@pytest.mark.parametrize("mode", ["frozen copy", "adapter off"])
def test_the_reference_has_no_dropout(tmp_path, mode):
    """It is one forward pass beside a model in training mode, and must not draw its dropout."""
    options = {"rows": 2, "dispersion_scale": 0.3, "learning_rate": 0.0, "disable_dropout": False, "max_steps": 3}
    trainer = tiny_trainer(tmp_path, model=tiny_model(attention_dropout=0.5).train(), **options, **MODES[mode]())
    trainer.train()
    first, *others = train_logs(trainer)
    for log in others:
        assert log["dispersion/entropy"] == first["dispersion/entropy"] and log["entropy"] != first["entropy"]


@pytest.mark.parametrize("evaluate", [False, True])
def test_a_model_that_another_accelerator_prepared(tmp_path, evaluate):
    """Its forward came wrapped in that one's autocast, and marked, so that the next one did not prepare it."""
    options = {"loss_type": "dpo", "max_steps": 2, "eval_dataset": tiny_pairs(3, seed=1)}
    logs = []
    for earlier in (None, {"bf16": True}, {"bf16": False}):
        model = tiny_model()
        if earlier is not None:
            used = tiny_trainer(tmp_path, model=model, learning_rate=0.0, **options | earlier)
            used.evaluate() if evaluate else used.train()
        trainer = tiny_trainer(tmp_path, model=model, **options)
        before = trainer.evaluate()
        trainer.train()
        logs.append((before["eval_logps/chosen"], train_logs(trainer)))
        assert trainer.model is model
    assert logs[0] == logs[1] == logs[2]


def test_a_model_that_another_trainer_prepared(tmp_path):
    """A plain Trainer in bfloat16 leaves autocast around the model's forward: fine-tuning first is the usual order."""
    model = tiny_model()
    AcceleratorState._reset_state(reset_partial_state=True)  # of another test
    Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    assert "forward" in vars(model)
    trainer = tiny_trainer(tmp_path, model=model, loss_type="dpo")
    expected = tiny_trainer(tmp_path, loss_type="dpo")
    for name, values in expected.score(expected.train_dataset).items():
        assert (trainer.score(trainer.train_dataset)[name] == values).all(), name


def test_models_by_name(tmp_path):
    tiny_model(seed=1).to(torch.bfloat16).save_pretrained(tmp_path / "policy")
    tiny_model(seed=2).save_pretrained(tmp_path / "reference")
    tiny_tokenizer().save_pretrained(tmp_path / "policy")
    options = {"processing_class": None, "loss_type": "dpo"}
    trainer = tiny_trainer(tmp_path, model=str(tmp_path / "policy"), ref_model=tmp_path / "reference", **options)
    assert trainer.model.dtype == torch.float32  # steps of the usual size would vanish in a bfloat16 weight
    assert trainer.processing_class.pad_token_id == 0
    rows = tokenize_pairs(trainer.train_dataset, tiny_tokenizer()).to_list()
    with torch.no_grad():
        expected = plain_stats(tiny_model(seed=2), rows)[0][:6]
    assert trainer.score(trainer.train_dataset)["ref_chosen_logps"] == pytest.approx(expected.numpy(), rel=1e-5)
    for name in ("dtype", "torch_dtype"):
        trainer = tiny_trainer(tmp_path, tmp_path / "policy", model_init_kwargs={name: torch.bfloat16}, **options)
        assert trainer.model.dtype == trainer.ref_model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "number, missing, message",
    [
        (0, "ref_rejected_entropy", "the loss reads the reference, whose column 'ref_rejected_entropy'"),
        (0, "ref_rejected_logps", "the loss reads the reference, whose column 'ref_rejected_logps'"),
        (1, "ref_chosen_logps_1", r"reference_weights \(MRPO\) reads reference 2, whose column 'ref_chosen_logps_1'"),
    ],
)
def test_a_missing_column_names_who_reads_it(number, missing, message):
    names = ("ref_chosen_logps", "ref_rejected_logps", "ref_chosen_entropy", "ref_rejected_entropy")
    batch = {name + "_1" * number: torch.zeros(2) for name in names}
    assert _from_columns(batch, number).logps.shape == (4,)
    del batch[missing]
    with pytest.raises(ValueError, match=message):
        _from_columns(batch, number)
