"""MallowsPO: preference fine-tuning with the dispersion of the preferences in the loss (arXiv 2405.14953).

``mallowspo.functional`` needs torch alone; the trainer and what it stands on (transformers, datasets, accelerate) are
imported on first use.
"""

import importlib
from typing import TYPE_CHECKING

import torch

MINIMUM_TORCH = "2.10"

# Checked before the extension is loaded: an older torch lacks symbols and would fail with a linker's message.
if torch.__version__ < MINIMUM_TORCH:
    raise ImportError(
        f"mallowspo needs torch {MINIMUM_TORCH} or newer, found {torch.__version__}; "
        f"run: pip install 'torch>={MINIMUM_TORCH}'"
    )

try:
    import mallowspo._C as _C  # `from mallowspo import _C` would name a circular import instead
except ModuleNotFoundError as error:
    raise ImportError("the native extension of mallowspo is not built; run: pip install .") from error

__version__ = _C.build["version"]

_EXPORTS = {
    "AcceleratedRounds": "accelerated",
    "AcceleratedTrainer": "accelerated",
    "GenerationSamples": "callbacks",
    "HybridTrainer": "hybrid",
    "MallowsConfig": "config",
    "MallowsTrainer": "trainer",
    "PreferenceObjective": "objective",
    "accelerated_rounds": "accelerated",
    "preset": "objective",
    "presets": "objective",
}
__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:  # what is exported below, for editors and type checkers, which do not run it
    from mallowspo.accelerated import AcceleratedRounds as AcceleratedRounds
    from mallowspo.accelerated import AcceleratedTrainer as AcceleratedTrainer
    from mallowspo.accelerated import accelerated_rounds as accelerated_rounds
    from mallowspo.callbacks import GenerationSamples as GenerationSamples
    from mallowspo.config import MallowsConfig as MallowsConfig
    from mallowspo.hybrid import HybridTrainer as HybridTrainer
    from mallowspo.objective import PreferenceObjective as PreferenceObjective
    from mallowspo.objective import preset as preset
    from mallowspo.objective import presets as presets
    from mallowspo.trainer import MallowsTrainer as MallowsTrainer


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"mallowspo.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'mallowspo' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
