"""The diffusion recipe: its pictures and votes, its training step, its report, and a whole run of seconds."""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from load_recipe import RECIPES, hide_package, import_recipe

from mallowspo import functional as F
from mallowspo.reference import TORCH_LINKS

run, report, model, pictures = import_recipe("diffusion", "run", "report", "model", "pictures")
AGREEMENT = [0.95, 0.85, 0.65, 0.55]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- pictures and votes --------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_a_picture_shows_what_was_drawn(seed):
    shapes, warm = torch.arange(40) % 4, torch.rand(40, generator=seeded(seed)) < 0.5
    drawn = pictures.draw(shapes, warm, seeded(seed))
    assert drawn.shape == (40, 3, 16, 16) and drawn.min() == -1 and drawn.max() == 1
    for images in (drawn, drawn + 0.3 * torch.randn(drawn.shape, generator=seeded(seed))):
        seen = pictures.look(images)
        assert torch.equal(seen.warmth > 0, warm)
        assert (seen.shapes == shapes).float().mean() > 0.8
    assert torch.equal(pictures.look(drawn).shapes, shapes)
    assert torch.equal(pictures.draw(shapes, warm, seeded(seed)), drawn)


def test_no_two_outlines_are_the_same():
    masks = pictures.MASKS.flatten(0, 1).flatten(1)
    assert len(masks.unique(dim=0)) == len(masks)
    assert masks.sum(1).min() > 10


def test_votes_follow_the_agreement():
    pairs = pictures.draw_pairs(8000, AGREEMENT, seeded())
    warm_wins = pictures.look(pairs.chosen).warmth > 0
    assert torch.equal(warm_wins, pictures.look(pairs.rejected).warmth < 0)
    for shape, share in enumerate(AGREEMENT):
        of_shape = pairs.shapes == shape
        assert of_shape.sum() == 2000
        assert warm_wins[of_shape].float().mean().item() == pytest.approx(
            share, abs=4 * math.sqrt(share * (1 - share) / 2000)
        )
        assert pairs.agreement[of_shape].unique().tolist() == [share]
    consensus = pictures.draw_pairs(400, AGREEMENT, seeded(), consensus=True)
    assert (pictures.look(consensus.chosen).warmth > 0).all()


# ---- the model and its step ----------------------------------------------------------------------------------------


def predictor(function):
    """A UNet that knows no shapes."""
    return lambda noisy, timesteps, shapes: SimpleNamespace(sample=function(noisy, timesteps))


def test_errors_are_mean_squares():
    scheduler = DDPMScheduler(1000)
    pairs = pictures.draw_pairs(4, AGREEMENT, seeded())
    noise, timesteps = model.draw_noise(scheduler, pairs.chosen, seeded())
    kept = scheduler.alphas_cumprod[timesteps].sqrt()[:, None, None, None]
    noisy = kept * pairs.chosen + (1 - kept**2).sqrt() * noise
    half = predictor(lambda noisy, _: 0.5 * noisy)
    found = model.noise_errors(half, scheduler, pairs.chosen, pairs.shapes, noise, timesteps)
    torch.testing.assert_close(found, (0.5 * noisy - noise).pow(2).mean(dim=[1, 2, 3]))


def test_the_first_step_costs_log_two_and_a_pair_shares_its_noise(monkeypatch):
    unet, scheduler = model.make_model([8], seed=0)
    pairs = pictures.draw_pairs(12, AGREEMENT, seeded())
    asked = []
    add_noise = scheduler.add_noise
    monkeypatch.setattr(scheduler, "add_noise", lambda *given: asked.append(given) or add_noise(*given))
    for link in TORCH_LINKS:
        asked.clear()
        dispersion = torch.full((12,), 0.7) if link in F.MALLOWS_LINKS else None
        reference = model.make_model([8], seed=0)[0]
        options = {"link": link, "beta": 100, "steps": 3, "batch_size": 8, "learning_rate": 1e-3, "seed": 0}
        steps = list(model.tune(unet, reference, scheduler, pairs, dispersion, **options))
        unet.load_state_dict(reference.state_dict())
        assert steps[0] == (
            pytest.approx({"ipo": 0.25, "hinge": 1}.get(link.removeprefix("mallows-"), math.log(2))),
            0.5,
        )
        assert len(steps) == 3 and steps[1] != steps[2]
        assert len(asked) == 6  # policy and reference
        for policy, ref in zip(asked[1::2], asked[::2], strict=True):
            assert all(torch.equal(one, two) for one, two in zip(policy, ref, strict=True))
            for shared in policy[1:]:
                assert torch.equal(*shared.chunk(2))
                assert len(shared.unique()) > 2


def test_tuning_learns_the_votes_and_repeats_its_bits():
    pairs = pictures.draw_pairs(64, AGREEMENT, seeded(), consensus=True)
    options = {"link": "bradley-terry", "beta": 20, "batch_size": 16, "learning_rate": 3e-3, "seed": 1}
    found = []
    for steps in (30, 2):
        unet, scheduler = model.make_model([8], seed=0)
        reference = copy.deepcopy(unet)
        found.append(list(model.tune(unet, reference, scheduler, pairs, None, steps=steps, **options)))
        if steps == 30:
            accuracy, distance = model.compare(unet, reference, scheduler, pairs, 4, seed=0)
    assert found[1] == found[0][:2]
    assert accuracy.mean() > 0.75
    assert (distance > 0).all()


def test_the_reward_is_of_the_picture_whose_noise_is_found():
    """A policy that knows the chosen pictures, and a reference that knows nothing."""
    scheduler = DDPMScheduler(1000)
    pairs = pictures.draw_pairs(8, AGREEMENT, seeded())

    def knowing(noisy, timesteps):
        kept = scheduler.alphas_cumprod[timesteps].sqrt()[:, None, None, None]
        noise = (noisy - kept * torch.cat([pairs.chosen, pairs.chosen])) / (1 - kept**2).sqrt()
        return torch.cat([noise[:8], torch.zeros_like(noise[8:])])

    nothing = predictor(lambda noisy, _: torch.zeros_like(noisy))
    accuracy, distance = model.compare(predictor(knowing), nothing, scheduler, pairs, 3, seed=0)
    assert accuracy.tolist() == [1.0] * 8
    assert distance.mean().item() == pytest.approx(
        0.5, abs=0.05
    )  # half the pictures, each off by the noise's variance
    accuracy, distance = model.compare(nothing, nothing, scheduler, pairs, 3, seed=0)
    assert accuracy.tolist() == [0.5] * 8 and not distance.any()
    swapped = pairs._replace(chosen=pairs.rejected, rejected=pairs.chosen)
    with_rejected = predictor(lambda noisy, t: knowing(noisy.roll(8, 0), t).roll(8, 0))
    assert model.compare(with_rejected, nothing, scheduler, swapped, 3, seed=0)[0].tolist() == [0.0] * 8


def test_samples_follow_from_their_noise():
    """A predictor that knows one picture leads there from any noise."""
    scheduler = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    picture = pictures.draw(torch.tensor([1]), torch.tensor([True]), seeded())

    def knowing(noisy, timesteps):
        kept = scheduler.alphas_cumprod[timesteps].sqrt()
        return (noisy - kept * picture) / (1 - kept**2).sqrt()

    noise = torch.randn(3, 3, 16, 16, generator=seeded())
    found = model.sample(predictor(knowing), scheduler, torch.ones(3, dtype=torch.int64), noise, 10)
    torch.testing.assert_close(found, picture.expand(3, -1, -1, -1), atol=1e-3, rtol=0)


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_only_predictions_of_the_noise_are_accepted(kind, tmp_path):
    unet, _ = model.make_model([8], seed=0)
    scheduler = DDPMScheduler(1000, prediction_type=kind)
    with pytest.raises(ValueError, match=f"the model predicts '{kind}'; .*prediction_type='epsilon'"):
        next(
            model.tune(
                unet, unet, scheduler, None, None, link="ipo", beta=1, steps=1, batch_size=1, learning_rate=1, seed=0
            )
        )
    scheduler.save_pretrained(tmp_path / "scheduler")
    unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match=f"the model predicts '{kind}'"):
        run.main(["--pretrained", str(tmp_path), "--output_dir", str(tmp_path / "out")])


def test_a_model_of_other_pictures_is_refused(tmp_path):
    UNet2DModel(
        sample_size=32,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=8,
    ).save_pretrained(tmp_path / "unet")
    DDPMScheduler(1000).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=r"\(32, 3, None\); the pictures are \(16, 3, 4\)"):
        model.load_model(tmp_path)


def test_without_diffusers_the_message_says_what_to_install(monkeypatch):
    hide_package(monkeypatch, "diffusers")
    with pytest.raises(ImportError, match="pip install diffusers"):
        model.make_model([8], seed=0)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--links", "sigmoid"], "unknown link 'sigmoid'"),
        (["--agreement", "0.9", "0.8"], r"4 numbers in \(0.5, 1\], .*got \[0.9, 0.8\]"),
        (["--agreement", "0.9", "0.8", "0.7", "0.5"], r"4 numbers in \(0.5, 1\]"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--samples", "3"], "samples must be at least 4, one a shape, got 3"),
        (["--batch_size", "2000"], "batch_size 2000 is more than train_pairs 1024"),
        (["--channels", "16", "0"], r"channels must be at least 1, got \[16, 0\]"),
        (["--learning_rate", "nan"], "learning_rate must be positive and finite, got nan"),
        (["--beta", "-1"], "beta must be finite and positive, got -1"),
    ],
)
def test_options_out_of_their_range_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run.main([*options, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_wrong_option_ends_the_script_with_its_message(monkeypatch):
    monkeypatch.setattr("sys.argv", ["run.py", "--seeds", "0"])
    with pytest.raises(SystemExit, match="^run.py: error: seeds must be at least 1, got 0"):
        run.main()


# ---- report --------------------------------------------------------------------------------------------------------


def test_intervals_by_hand():
    assert report.interval([1, 2, 3]) == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert report.interval([1, 3]) == (2.0, None)
    assert report.interval(range(30))[1] == pytest.approx(2.0452 * np.std(range(30), ddof=1) / math.sqrt(30), rel=1e-4)


def make_run(preferred, distance):
    shapes = np.arange(8) % 4
    return {
        "preferred": np.where(shapes == 0, preferred, 0.5),
        "right_shape": np.ones(8),
        "accuracy": np.full(4, 0.5),
        "distance": np.full(4, distance),
        "sample_shapes": shapes,
        "held_out_shapes": np.arange(4),
        "history": np.zeros((0, 2)),
        "images": np.zeros((8, 3, 16, 16), dtype=np.uint8),
    }


def test_differences_are_taken_seed_by_seed():
    runs = {("before", seed): make_run(0.5, 0.0) for seed in range(3)}
    for seed in range(3):
        runs["a", seed] = make_run(seed / 10, 1.0 + seed)
        runs["b", seed] = make_run(seed / 10 + 0.25, 1.0 + seed)
    found = report.summarise(runs)
    assert found["preferred"]["disc"]["b - a"] == (pytest.approx(0.25), pytest.approx(0, abs=1e-9))
    assert found["preferred"]["all"]["b - a"][0] == pytest.approx(0.0625)
    assert found["preferred"]["square"]["b - a"] == (0, 0)
    assert found["distance"]["cross"]["a"] == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    text = report.tables(found, AGREEMENT, 3)
    assert "| disc (0.95) | 0.500 ± 0.000 | 0.100 ± 0.248 | 0.350 ± 0.248 | +0.250 ± 0.000 |" in text


# ---- a whole run ---------------------------------------------------------------------------------------------------

TINY = {
    "channels": [8],
    "pretrain_steps": 3,
    "pretrain_batch_size": 8,
    "agreement": AGREEMENT,
    "train_pairs": 16,
    "links": ["bradley-terry", "mallows-theta"],
    "seeds": 3,
    "beta": 100,
    "steps": 2,
    "batch_size": 8,
    "samples": 12,
    "sampling_steps": 2,
    "held_out_pairs": 8,
    "held_out_timesteps": 2,
}


@pytest.fixture
def command(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"output_dir": str(tmp_path / "out")}))
    return ["--config", str(tmp_path / "tiny.yaml")]


def refuse(*_, **__):
    raise AssertionError("this stage was done before")


def test_a_run_is_reported_and_done_once(command, tmp_path, monkeypatch):
    out, tune = tmp_path / "out", model.tune
    calls = []

    def interrupted(*arguments, **options):
        calls.append(options["seed"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return tune(*arguments, **options)

    monkeypatch.setattr(model, "tune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.main(command)
    assert not (out / "results.json").exists()
    monkeypatch.setattr(model, "pretrain", refuse)
    run.main(command)
    assert calls == [0, 0, 1, 1, 1, 2, 2]  # the fourth was interrupted, and is the only one done twice
    assert {path.name for path in out.iterdir()} == {
        "stages",
        "results.json",
        "results.md",
        "samples.png",
        "measures.png",
    }
    results = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["settings"]["steps"] == 2 and "diffusers" in results["versions"]
    assert len(results["loss_and_accuracy_of_each_step"]["mallows-theta seed 2"]) == 2
    for shape in (*pictures.SHAPES, "all"):
        assert results["measures"]["accuracy"][shape]["before"] == [0.5, 0]
        assert results["measures"]["distance"][shape]["before"] == [0, 0]
        assert results["measures"]["distance"][shape]["bradley-terry"][0] > 0
    for name in ("samples.png", "measures.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(model, "tune", refuse)
    text = (out / "results.md").read_text()
    run.main(command)
    assert (out / "results.md").read_text() == text
    with pytest.raises(AssertionError, match="this stage was done before"):
        run.main([*command, "--beta", "200"])


def test_a_damaged_stage_is_named(command, tmp_path):
    run.main([*command, "--links", "ipo", "--seeds", "1"])
    (stage,) = (tmp_path / "out" / "stages").glob("ipo-*.arrays")
    stage.write_bytes(stage.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{stage} is corrupt; delete it"):
        run.main([*command, "--links", "ipo", "--seeds", "1"])


def test_the_yaml_file_says_the_defaults(tmp_path):
    options = yaml.safe_load((RECIPES / "diffusion" / "default.yaml").read_text())
    defaults = run.DiffusionArguments()
    assert options == {name: getattr(defaults, name) for name in options}
    assert set(options) == {name for name in vars(defaults)} - {"config", "pretrained"}


def test_the_training_loop_of_the_readme_runs():
    """The same loss as the recipe's own step takes, on a UNet whose prediction halves its input."""
    readme = (RECIPES / "diffusion" / "README.md").read_text()
    latents, noise = torch.randn(2, 4, 3, 8, 8, generator=seeded())
    scheduler, timesteps = DDPMScheduler(1000), torch.tensor([10, 200, 500, 900])
    half, zero = (lambda x, *_, s=s: SimpleNamespace(sample=s * x) for s in (0.5, 0.0))
    namespace = {"torch": torch, "F": F, "latents": latents, "noise": noise, "timesteps": timesteps}
    namespace |= {"noise_scheduler": scheduler, "unet": half, "ref_unet": zero, "encoder_hidden_states": None}
    exec(readme.split("```python\n")[1].split("```")[0], namespace)
    shared = noise[:2].repeat(2, 1, 1, 1), timesteps[:2].repeat(2)
    own, ref = (model.noise_errors(unet, scheduler, latents, None, *shared).chunk(2) for unet in (half, zero))
    expected = F.diffusion_preference_loss(*own, *ref, link="bradley-terry", beta=5000).losses.mean()
    torch.testing.assert_close(namespace["loss"], expected)
    assert expected > 1e-3
