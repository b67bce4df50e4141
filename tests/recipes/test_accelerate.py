"""The files for ``accelerate launch --config_file``: accelerate reads them. tests/test_distributed.py starts each."""

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
