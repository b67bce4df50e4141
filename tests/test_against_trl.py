"""MallowsTrainer with DPO's link trains as TRL's DPOTrainer does: the same losses and rewards, step by step."""

import pytest
import torch
from tiny import lora, tiny_model, tiny_pairs, tiny_tokenizer, train_logs

from mallowspo import MallowsConfig, MallowsTrainer

trl = pytest.importorskip("trl", minversion="1.16", reason="trl is not installed: pip install 'mallowspo[trl]'")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STEPS = 20
METRICS = "loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"
SEED = 3


def logs_of(kind, config, folder, peft, **options):
    args = config(
        output_dir=str(folder),
        beta=0.3,
        learning_rate=1e-3,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=SEED,
        **options,
    )
    model = tiny_model()
    ref_model = None if peft or args.precompute_ref_log_probs else tiny_model()
    torch.manual_seed(SEED)  # as TRL does before it draws the adapter's weights
    trainer = kind(
        model=model,
        ref_model=ref_model,
        args=args,
        train_dataset=tiny_pairs(2 * STEPS),
        processing_class=tiny_tokenizer(),
        peft_config=lora() if peft else None,
    )
    trainer.train()
    return train_logs(trainer)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_twenty_steps_equal_those_of_trl(tmp_path, peft, cached):
    shared = {"peft": peft, "precompute_ref_log_probs": cached}
    found = logs_of(MallowsTrainer, MallowsConfig, tmp_path / "ours", loss_type="dpo", **shared)
    expected = logs_of(trl.DPOTrainer, trl.DPOConfig, tmp_path / "trl", loss_type="sigmoid", **shared)
    assert len({log["loss"] for log in expected}) == STEPS
    for log, log_ in zip(found, expected, strict=True):
        assert {name: log[name] for name in METRICS} == pytest.approx(
            {name: log_[name] for name in METRICS}, rel=1e-4, abs=1e-5
        )


@pytest.mark.parametrize("peft", [False, True], ids=["full", "LoRA"])
def test_wpo_is_that_of_trl(tmp_path, peft):
    found = logs_of(MallowsTrainer, MallowsConfig, tmp_path / "ours", peft, loss_type="wpo")
    expected = logs_of(trl.DPOTrainer, trl.DPOConfig, tmp_path / "trl", peft, loss_type="sigmoid", use_weighting=True)
    plain = logs_of(MallowsTrainer, MallowsConfig, tmp_path / "dpo", peft, loss_type="dpo")
    for log, theirs, dpo in zip(found, expected, plain, strict=True):
        for name in METRICS:
            assert log[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
        assert log["loss"] != pytest.approx(dpo["loss"], rel=1e-2)


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_ld_alpha_is_that_of_trl(tmp_path, cached):
    """``logps`` are the plain sums here, the discounted ones there."""
    shared = {"peft": False, "precompute_ref_log_probs": cached, "ld_alpha": 0.3}
    found = logs_of(MallowsTrainer, MallowsConfig, tmp_path / "ours", loss_type="ld-dpo", **shared)
    expected = logs_of(trl.DPOTrainer, trl.DPOConfig, tmp_path / "trl", loss_type="sigmoid", **shared)
    plain = logs_of(MallowsTrainer, MallowsConfig, tmp_path / "dpo", loss_type="dpo", **shared | {"ld_alpha": None})
    for log, theirs, dpo in zip(found, expected, plain, strict=True):
        for name in METRICS[:4]:
            assert log[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
        assert log["grad_norm"] != pytest.approx(dpo["grad_norm"], rel=1e-3)
