"""The trainings of several presets from one set of options."""

from dataclasses import dataclass, fields

from transformers import TrainingArguments

from mallowspo import MallowsConfig, preset
from mallowspo.objective import READ_BY

# What the comparisons of every preset train beside the presets themselves.
COMPOSITIONS = (
    "mallows-theta+focal",
    "mallows-phi+focal",
    "mallows-theta+minor",
    "mallows-theta+js",
    "mallows-theta+wpo",
    "mallows-theta+bmc",
)


@dataclass
class SharedConfig(MallowsConfig):
    """Options of several trainings; those of the objective are checked with each method, by :func:`check_methods`."""

    def __post_init__(self):
        TrainingArguments.__post_init__(self)


def config_of(training, method, **changes):
    """The MallowsConfig of one training: the shared options but those that only other methods read, and the changes.

    Raises:
        ValueError: of MallowsConfig.
    """
    unread = _unread(training, method)
    given = {f.name: getattr(training, f.name) for f in fields(MallowsConfig) if f.init and f.name not in unread}
    return MallowsConfig(**given | {"loss_type": method} | changes)


def training_facts(config):
    """What of a MallowsConfig the trained weights depend on: all but names of places and what is shown."""
    shown = ("output_dir", "reference_cache_dir", "run_name", "disable_tqdm", "report_to")
    facts = {name: value for name, value in config.to_dict().items() if not name.startswith("logging_")}
    return {name: value for name, value in facts.items() if name not in shown}


def check_methods(training, methods):
    """ValueError for an option that one of the methods cannot have or that none of them reads."""
    for name in sorted(set.intersection(*(_unread(training, method) for method in methods))):
        value = getattr(training, name)
        if value != getattr(MallowsConfig, name):
            raise ValueError(f"{name}={value} is read by none of {', '.join(methods)}; leave it out")
    for method in methods:
        config_of(training, method)


def mixes_references(method):
    """Whether a method needs a second reference, as MRPO does."""
    return preset(method).reference_weights is not None


def check_one_reference(methods):
    """ValueError for a method that a recipe with one reference cannot train."""
    for method in methods:
        if mixes_references(method):
            raise ValueError(
                f"{method} mixes two references and this recipe has one; leave it out, "
                "controllable_generation/run.py and compare.py train it"
            )


def _unread(training, method):
    """Names of the options that MallowsConfig refuses beside a method because it does not read them."""
    objective = preset(method)
    names = {name for name, (choice, readers) in READ_BY.items() if getattr(objective, choice) not in readers}
    if not objective.uses_dispersion:
        names |= {"dispersion_source", "dispersion_scale"}
    if not (objective.bridge_delta or training.bridge_delta):
        names.add("diff_stop_words")
    return names
