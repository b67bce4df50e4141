"""Runs that stop in the middle: a rank that fails, a save that is cut off, and what the next run makes of them."""

from pathlib import Path

import distributed_worker
import pytest
from test_trainer_resume import Stop, close, whole_run
from tiny import tiny_trainer
from transformers import TrainerState

from mallowspo import MallowsTrainer
from mallowspo.distributed import newest_checkpoint


def test_a_rank_that_fails_stops_all_with_its_reason(tmp_path):
    """The other one waits for its gradients, and would do so for ddp_timeout."""
    status, output = distributed_worker.launch("ddp", "fail", tmp_path)
    assert status != 0
    assert "RuntimeError: rank 1 cannot read its data" in output
    assert not list(tmp_path.glob("*.pt"))
    assert Path(newest_checkpoint(tmp_path / "saved")).name == "checkpoint-2"


def test_a_rank_killed_while_it_saves_leaves_the_checkpoint_before(tmp_path):
    status, output = distributed_worker.launch("ddp", "kill", tmp_path)
    assert status != 0 and "SIGKILL" in output
    saved = tmp_path / "saved"
    assert (saved / "checkpoint-4" / "optimizer.pt").exists()  # it was all but finished
    assert Path(newest_checkpoint(saved)).name == "checkpoint-2"
    resumed = distributed_worker.resumable(tmp_path, "saved", checkpoint=True)
    expected = distributed_worker.resumable(tmp_path, "whole")
    close(resumed["weights"], expected["weights"])
    assert resumed["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert (saved / "checkpoint-4" / "trainer_state.json").exists()  # written anew


def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")


def half_a_file(self, path):
    Path(path).write_text("{" + 100 * " ")
    fail()


# Where the save of step 4 fails, from the first file to the last.
STAGES = {
    "weights": (MallowsTrainer, "_save", fail),
    "optimiser": (MallowsTrainer, "_save_optimizer_and_scheduler", fail),
    "random state": (MallowsTrainer, "_save_rng_state", fail),
    "trainer state": (TrainerState, "save_to_json", half_a_file),
}


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_save_leaves_the_checkpoint_before(tmp_path, monkeypatch, stage):
    whole = whole_run(tmp_path / "whole", "cached")
    whole.train()
    options = {"save_total_limit": 1}  # the older one goes when the newer one is whole
    with monkeypatch.context() as patch:
        breaks = Stop(4, lambda: patch.setattr(*STAGES[stage]))
        stopped = whole_run(tmp_path / "stopped", "cached", callbacks=[breaks], **options)
        with pytest.raises(OSError, match="No space left"):
            stopped.train()
    assert Path(newest_checkpoint(tmp_path / "stopped")).name == "checkpoint-2"
    with pytest.raises(ValueError, match="checkpoint-4 is no checkpoint that was written to the end"):
        stopped.train(str(tmp_path / "stopped" / "checkpoint-4"))
    resumed = whole_run(tmp_path / "stopped", "cached", **options)
    resumed.train(resume_from_checkpoint=True)
    close(resumed.model.state_dict(), whole.model.state_dict())


def test_a_checkpoint_written_over_is_not_whole_until_it_is(tmp_path, monkeypatch):
    """What an earlier run left in its place must not vouch for it."""
    whole_run(tmp_path, "cached").train()
    assert Path(newest_checkpoint(tmp_path)).name == "checkpoint-7"
    monkeypatch.setattr("mallowspo.MallowsTrainer._save_rng_state", fail)
    with pytest.raises(OSError, match="No space left"):
        tiny_trainer(tmp_path, rows=5, max_steps=7, save_strategy="steps", save_steps=7).train()
    assert Path(newest_checkpoint(tmp_path)).name == "checkpoint-6"


def test_nothing_to_resume_from(tmp_path):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ValueError, match=f"no checkpoint in {tmp_path}.*leave resume_from_checkpoint out"):
        trainer.train(resume_from_checkpoint=True)
