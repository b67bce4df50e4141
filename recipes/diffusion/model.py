"""A small denoising diffusion model of pictures: made, pretrained, tuned on preferences, sampled and measured."""

import numpy as np
import pictures
import torch
from tqdm.auto import tqdm

from mallowspo import functional as F
from models import package_folder
from stats import wins


def import_diffusers():
    """The package; ImportError says how to install it."""
    package_folder("diffusers", "diffusers")
    import diffusers

    return diffusers


def make_model(channels, seed):
    """(UNet2DModel conditioned on the shape, DDPMScheduler that predicts the noise), with fresh weights.

    Args:
        channels: of each resolution, a multiple of 8; each next one has half the width and height.
    """
    diffusers = import_diffusers()
    torch.manual_seed(seed)
    unet = diffusers.UNet2DModel(
        sample_size=pictures.SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=tuple(channels),
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        norm_num_groups=8,
        add_attention=False,
        num_class_embeds=len(pictures.SHAPES),
    )
    return unet, diffusers.DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")


def check_scheduler(scheduler):
    """ValueError for a model that does not predict the noise, which is what the loss is derived for."""
    kind = scheduler.config.prediction_type
    if kind != "epsilon":
        raise ValueError(
            f"the model predicts {kind!r}; Diffusion-DPO compares errors of the predicted noise: take a model whose "
            "scheduler has prediction_type='epsilon', or turn its prediction into the noise before taking the error"
        )


def noise_errors(unet, scheduler, images, shapes, noise, timesteps):
    """Mean squared error [B] of the predicted noise, in float32."""
    predicted = unet(scheduler.add_noise(images, noise, timesteps), timesteps, shapes).sample
    return (predicted.float() - noise.float()).square().flatten(1).mean(1)


def draw_noise(scheduler, images, generator):
    """Noise of the images' shape and uniform timesteps [B]."""
    noise = torch.randn(images.shape, generator=generator)
    return noise, torch.randint(scheduler.config.num_train_timesteps, images.shape[:1], generator=generator)


def pretrain(unet, scheduler, steps, batch_size, learning_rate, seed):
    """A model of all pictures, half of them warm: the exponential moving average of the weights over the steps."""
    generator = torch.Generator().manual_seed(seed)
    average = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    bar = tqdm(range(steps), desc="Pretraining", mininterval=1)
    for _ in bar:
        shapes = torch.randint(len(pictures.SHAPES), (batch_size,), generator=generator)
        images = pictures.draw(shapes, torch.rand(batch_size, generator=generator) < 0.5, generator)
        loss = noise_errors(unet, scheduler, images, shapes, *draw_noise(scheduler, images, generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(unet)
        bar.set_postfix(loss=f"{loss.item():.4f}")
    return average.module


@torch.no_grad()
def sample(unet, scheduler, shapes, noise, steps):
    """Pictures of the shapes [B] from their noise [B, 3, SIZE, SIZE]: deterministic DDIM, so the noise decides all."""
    ddim = import_diffusers().DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(steps)
    images = noise
    for timestep in ddim.timesteps:
        images = ddim.step(unet(images, timestep, shapes).sample, timestep, images).prev_sample
    return images


def tune(unet, reference, scheduler, pairs, neg_log_dispersion, *, link, beta, steps, batch_size, learning_rate, seed):
    """Trains the UNet in place on preference pairs; yields the mean loss and the rewards' accuracy of each step.

    Both pictures of a pair get the same noise at the same timestep, drawn anew in every step.

    Args:
        unet: starts as a copy of reference. scheduler: of both, with prediction_type epsilon.
        pairs: ``pictures.Pairs``. neg_log_dispersion: [pairs] float32 for a mallows link, else None.
    """
    check_scheduler(scheduler)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate, weight_decay=0.0)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / 10)
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(pairs.shapes), generator=generator)])
        rows, order = order[:batch_size], order[batch_size:]
        noise, timesteps = draw_noise(scheduler, pairs.chosen[rows], generator)
        both = (
            torch.cat([pairs.chosen[rows], pairs.rejected[rows]]),
            pairs.shapes[rows].repeat(2),
            noise.repeat(2, 1, 1, 1),
            timesteps.repeat(2),
        )
        with torch.no_grad():
            ref_errors = noise_errors(reference, scheduler, *both)
        loss = F.diffusion_preference_loss(
            *noise_errors(unet, scheduler, *both).chunk(2),
            *ref_errors.chunk(2),
            neg_log_dispersion=None if neg_log_dispersion is None else neg_log_dispersion[rows],
            link=link,
            beta=beta,
        )
        optimizer.zero_grad()
        loss.losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rewards = loss.chosen_rewards.numpy(), loss.rejected_rewards.numpy()
        yield loss.losses.mean().item(), wins(*rewards).mean().item()


@torch.no_grad()
def compare(unet, reference, scheduler, pairs, timesteps, seed):
    """What the UNet has learned of held-out pairs, per pair.

    Args:
        pairs: ``pictures.Pairs``. timesteps: each pair is seen at this many, evenly spaced, with fresh noise.

    Returns:
        (accuracy, distance), arrays [pairs]: whether the chosen picture's reward, the mean of dref - d over the
        timesteps, is the larger one (a tie counts half); the mean squared difference of the two models' predictions.
    """
    generator = torch.Generator().manual_seed(seed)
    last = scheduler.config.num_train_timesteps - 1
    rewards = distance = 0.0
    for timestep in torch.linspace(last / (2 * timesteps), last * (1 - 1 / (2 * timesteps)), timesteps).long():
        noise = torch.randn(pairs.chosen.shape, generator=generator).repeat(2, 1, 1, 1)
        times, shapes = timestep.repeat(len(noise)), pairs.shapes.repeat(2)
        noisy = scheduler.add_noise(torch.cat([pairs.chosen, pairs.rejected]), noise, times)
        own, ref = (model(noisy, times, shapes).sample for model in (unet, reference))
        error, ref_error, apart = (x.square().flatten(1).mean(1) for x in (own - noise, ref - noise, own - ref))
        rewards = rewards + (ref_error - error)
        distance = distance + apart / timesteps
    return wins(*np.split(rewards.numpy(), 2)), (sum(distance.chunk(2)) / 2).numpy()


def load_model(folder):
    """(unet, scheduler) of a diffusers folder with ``unet`` and ``scheduler``, of pictures like ours.

    Raises:
        ValueError: a model of other pictures or conditions, or one that does not predict the noise.
        OSError: the folder has no such model.
    """
    diffusers = import_diffusers()
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    check_scheduler(scheduler)
    unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
    found = (unet.config.sample_size, unet.config.in_channels, unet.config.num_class_embeds)
    wanted = (pictures.SIZE, 3, len(pictures.SHAPES))
    if found != wanted:
        raise ValueError(
            f"{folder} has (sample_size, in_channels, num_class_embeds) {found}; the pictures are {wanted}"
        )
    return unet, scheduler
