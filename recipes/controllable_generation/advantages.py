"""Policy updates from advantages of sampled completions: APA and, as its control, advantage-weighted regression."""

import random

import torch

from mallowspo.advantage import advantage_loss, advantage_weights
from mallowspo.collator import pad
from mallowspo.modeling import attach_token_stats, response_stats

LOSSES = ("apa", "awr")


def token_advantages(rewards, lengths, gae_lambda):
    """Whitened advantage of each token: GAE with gamma 1, the reward on the last token and no value network.

    The value of every token of a completion is its prefix's mean reward V, so the only error of prediction is R - V at
    the end, and the token k places before it has lambda^k (R - V). Whitened over all tokens together; where all
    rewards of each prefix are equal they are 0.

    Args:
        rewards: P lists of K floats. lengths: P lists of K token counts. gae_lambda: in [0, 1].

    Returns:
        P * K float32 tensors.
    """
    found = []
    for values, counts in zip(rewards, lengths, strict=True):
        baseline = sum(values) / len(values)
        for value, count in zip(values, counts, strict=True):
            found.append((value - baseline) * gae_lambda ** torch.arange(count - 1, -1, -1, dtype=torch.float64))
    every = torch.cat(found)
    mean, scale = every.mean(), (every.var(correction=0) + 1e-8).sqrt()  # as the authors' library whitens
    return [((values - mean) / scale).float() for values in found]


def update(model, reference, pad_token_id, prompts, responses, advantages, *, loss, temperature, training, seed):
    """``training.max_steps`` steps of AdamW on batches of as many completions as a batch of pairs has.

    Args:
        model: trained in place. reference: frozen. prompts, responses: N lists of token ids.
        advantages: N tensors, a number a token. loss: "apa" or "awr".
        training: MallowsConfig: batch size, learning rate (constant), weight decay and clipping.

    Returns:
        The mean loss of the last step.
    """
    attach_token_stats(model)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {"lr": training.learning_rate, "weight_decay": training.weight_decay, "eps": training.adam_epsilon}
    optimizer = torch.optim.AdamW(weights, betas=(training.adam_beta1, training.adam_beta2), **settings)
    size, shuffled, order = 2 * training.per_device_train_batch_size, random.Random(seed), []
    for _ in range(training.max_steps):
        if not order:
            order = shuffled.sample(range(len(prompts)), len(prompts))
        chosen, order = order[:size], order[size:]
        batch = pad([prompts[i] for i in chosen], [(responses[i],) for i in chosen], pad_token_id)
        batch = {name: value.to(model.device) for name, value in batch.items()}
        wanted = torch.cat([advantages[i] for i in chosen]).to(model.device)
        logps = response_stats(model, batch).token_logps
        if loss == "apa":
            with torch.no_grad():
                ref_logps = response_stats(reference, batch).token_logps
            value = advantage_loss(logps, ref_logps, wanted, temperature=temperature).mean()
        else:
            value = -(advantage_weights(wanted, temperature=temperature) * logps).mean()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, training.max_grad_norm)
        optimizer.step()
    return value.item()
