"""The files for ``accelerate launch --config_file``: accelerate reads them, and the one for DDP starts two ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
EXPECTED = {
    "ddp": (DistributedType.MULTI_GPU, {}),
    "fsdp2": (DistributedType.FSDP, {"fsdp_version": 2, "fsdp_cpu_ram_efficient_loading": False}),
    "deepspeed_zero2": (DistributedType.DEEPSPEED, {"zero_stage": 2}),
    "deepspeed_zero3": (DistributedType.DEEPSPEED, {"zero_stage": 3, "zero3_init_flag": True}),
}


def test_every_file_is_tested():
    assert {path.stem for path in FOLDER.glob("*")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_file(name):
    kind, settings = EXPECTED[name]
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # raises for keys it does not know
    assert config.distributed_type == kind and config.mixed_precision == "bf16" and config.num_machines == 1
    section = config.fsdp_config | config.deepspeed_config
    assert section.items() >= settings.items()


@pytest.mark.parametrize("name", EXPECTED)
def test_every_setting_is_an_option_of_the_launcher(name):
    """Of the keys in fsdp_config and deepspeed_config accelerate takes any; only those it has an option for count."""
    parser, file = launch_command_parser(), str(FOLDER / f"{name}.yaml")
    config = load_config_from_file(file)
    args = parser.parse_args(["--config_file", file, "script.py"])
    assert all(hasattr(args, key) for key in config.fsdp_config | config.deepspeed_config)
    args, *_ = _validate_launch_command(args)
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == tuple(
        EXPECTED[name][0] == kind
        for kind in (DistributedType.MULTI_GPU, DistributedType.FSDP, DistributedType.DEEPSPEED)
    )
    for key, value in (config.fsdp_config | config.deepspeed_config).items():
        assert str(getattr(args, key)) == str(value), key


SCRIPT = """
import sys
from tiny import tiny_trainer
trainer = tiny_trainer(sys.argv[1], rows=4, per_device_train_batch_size=1, max_steps=2, ddp_timeout=50)
trainer.train()
losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
open(f"{sys.argv[1]}/{trainer.accelerator.process_index}", "w").write(f"{trainer.accelerator.num_processes} {losses}")
"""


def test_ddp_is_launched(tmp_path):
    """On the CPU, with two processes, in full precision; everything else as the file says."""
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "ddp.yaml")]
    launch += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    process = subprocess.run(
        [*launch, str(tmp_path / "script.py"), str(tmp_path)],
        env=environment, timeout=120, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-4000:]
    reports = [(tmp_path / rank).read_text() for rank in "01"]
    assert reports[0] == reports[1] and reports[0].startswith("2 [0.69")
