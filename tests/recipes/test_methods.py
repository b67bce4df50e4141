"""Several presets trained from one set of options: each gets those that it reads."""

import pytest
from load_recipe import import_recipe

from mallowspo import MallowsConfig

(methods,) = import_recipe(".", "methods")


def shared(**options):
    return methods.SharedConfig(output_dir="out", use_cpu=True, **options)


def test_a_method_gets_the_options_that_it_reads():
    training = shared(smoothing=0.3, dispersion_scale="0.145", dispersion_source="agreement", diff_stop_words=["the"])
    chosen = ("dpo", "mallows-theta", "mallows-phi", "bmc")
    methods.check_methods(training, chosen)
    dpo, theta, phi, bmc = (methods.config_of(training, method, seed=3, beta=0.7) for method in chosen)
    assert [type(config) for config in (dpo, theta, phi, bmc)] == [MallowsConfig] * 4
    assert {(config.seed, config.beta, config.output_dir) for config in (dpo, theta, phi, bmc)} == {(3, 0.7, "out")}
    assert [config.smoothing for config in (dpo, theta, phi, bmc)] == [None, None, 0.3, None]
    assert [config.dispersion_scale for config in (dpo, theta, phi, bmc)] == ["auto", 0.145, 0.145, "auto"]
    assert [config.dispersion_source for config in (dpo, theta)] == [None, "agreement"]
    assert [config.diff_stop_words for config in (dpo, theta, phi, bmc)] == [None, None, None, ["the"]]
    assert phi.objective().smoothing == 0.3


def test_trained_weights_depend_on_no_place_and_on_nothing_that_is_shown():
    def facts(**options):
        return methods.training_facts(MallowsConfig(**{"output_dir": "out", "use_cpu": True} | options))

    shown = {"output_dir": "x", "reference_cache_dir": "x", "run_name": "x", "disable_tqdm": True, "logging_steps": 3}
    assert facts(**shown) == facts()
    for option in ({"learning_rate": 0.1}, {"seed": 3}, {"loss_type": "dpo"}, {"max_steps": 2}):
        assert facts(**option) != facts()


@pytest.mark.parametrize(
    ("options", "chosen", "message"),
    [
        (
            {"smoothing": 0.3},
            ("dpo", "mallows-theta"),
            "smoothing=0.3 is read by none of dpo, mallows-theta; leave it",
        ),
        ({"dispersion_scale": "0.145"}, ("dpo", "simpo"), "dispersion_scale=0.145 is read by none of dpo, simpo"),
        ({"diff_stop_words": ["the"]}, ("dpo",), "diff_stop_words=.* is read by none of dpo"),
        ({"dispersion_scale": "-1"}, ("dpo", "mallows-phi"), "dispersion_scale must be positive and finite, got -1"),
        ({"smoothing": -1.0}, ("dpo", "mallows-phi"), "smoothing must be finite and >= 0"),
        ({"label_smoothing": 0.1}, ("dpo", "sppo-hard"), "label_smoothing=0.1 changes a margin"),
    ],
)
def test_options_that_no_method_or_one_cannot_have_are_refused(options, chosen, message):
    with pytest.raises(ValueError, match=message):
        methods.check_methods(shared(**options), chosen)
