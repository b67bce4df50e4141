"""Every preset that TRL has too, against the loss and the gradient that TRL's own DPOTrainer computes."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from mallowspo.objective import preset

trl = pytest.importorskip("trl", minversion="1.16", reason="trl is not installed: pip install 'mallowspo[trl]'")

PAIRS, LENGTH = 12, 9
BETA = 0.3


class Recorded:
    """A model whose forward gives the log-probabilities it holds, and for WPO a log sum_v p_v^2 of each token."""

    def __init__(self, log_probs):
        self.log_probs = log_probs

    def __call__(self, **inputs):
        nothing = torch.zeros_like(self.log_probs)
        return SimpleNamespace(
            log_probs=self.log_probs,
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
            log_sum_sq_probs=alignment_of(self.log_probs),
        )


def alignment_of(log_probs):
    return 0.7 * log_probs.detach() - 0.1


def batch(seed=0):
    """Per-token log-probabilities [2B, T] of policy and reference, 0 where there is no token, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LENGTH + 1, (2 * PAIRS, 1), generator=generator)
    mask = torch.arange(LENGTH) < lengths
    policy, reference = (-3 * torch.rand(2, 2 * PAIRS, LENGTH, generator=generator)).mul(mask)
    return policy.requires_grad_(), reference, mask


def losses_of_trl(policy, reference, mask, **options):
    """The mean loss as trl.DPOTrainer computes it, from a trainer that is only as much of one as that takes."""
    identity = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    model = torch.nn.Identity().eval()
    model.is_gradient_checkpointing = False
    settings = {
        "model": model,
        "ref_model": Recorded(reference),
        "accelerator": identity,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        "_metrics": {"eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "loss_weights": [1.0],
        "beta": BETA,
        "ld_alpha": None,
        "precompute_ref_logps": False,
        "aux_loss_enabled": False,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "label_smoothing": 0.0,
        "use_weighting": False,
    }
    trainer = SimpleNamespace(**settings | options)
    completion_mask = torch.cat([torch.zeros(2 * PAIRS, 1), mask], dim=1).long()
    inputs = {"input_ids": completion_mask, "attention_mask": completion_mask, "completion_mask": completion_mask}
    return trl.DPOTrainer._compute_loss(trainer, Recorded(policy), inputs, False)


# preset: (TRL's options, what its loss is multiplied by to be ours)
SAME = {
    "dpo": ({"loss_types": ["sigmoid"]}, 1),
    "robust-dpo": ({"loss_types": ["robust"], "label_smoothing": 0.1}, 1),
    "hinge": ({"loss_types": ["hinge"]}, 1),
    "ipo": ({"loss_types": ["ipo"]}, BETA**2),
    "ln-dpo": ({"loss_types": ["sigmoid_norm"]}, 1),
    "exo-pair": ({"loss_types": ["exo_pair"], "label_smoothing": 1e-3}, 1),
    "discopop": ({"loss_types": ["discopop"]}, 1),
    "sppo-hard": ({"loss_types": ["sppo_hard"]}, BETA**2),
    "nca-pair": ({"loss_types": ["nca_pair"]}, 1),
    "bco-pair": ({"loss_types": ["bco_pair"]}, 1),
    "apo-zero": ({"loss_types": ["apo_zero"]}, 1),
    "apo-down": ({"loss_types": ["apo_down"]}, 1),
    "aot": ({"loss_types": ["aot"]}, 1),
    "aot-unpaired": ({"loss_types": ["aot_unpaired"]}, 1),
    "aot+cdpo": ({"loss_types": ["aot"], "label_smoothing": 0.1}, 1),
    "forward-kl": ({"loss_types": ["sigmoid"], "f_divergence_type": "forward_kl"}, 1),
    "js": ({"loss_types": ["sigmoid"], "f_divergence_type": "js_divergence"}, 1),
    "alpha": ({"loss_types": ["sigmoid"], "f_divergence_type": "alpha_divergence"}, 1),
    "hinge+js": ({"loss_types": ["hinge"], "f_divergence_type": "js_divergence"}, 1),
    "exo-pair+alpha": (
        {"loss_types": ["exo_pair"], "label_smoothing": 1e-3, "f_divergence_type": "alpha_divergence"},
        1,
    ),
    "wpo": ({"loss_types": ["sigmoid"], "use_weighting": True}, 1),
    "apo-zero+wpo": ({"loss_types": ["apo_zero"], "use_weighting": True}, 1),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_of_trl(name, seed):
    options, scale = SAME[name]
    policy, reference, mask = batch(seed)
    expected = scale * losses_of_trl(policy, reference, mask, **options)
    objective = preset(name, beta=BETA)
    num_tokens = mask.sum(1)
    alignment = (alignment_of(policy) * mask).sum(1) if objective.on_policy_weighting else None
    found = objective(policy.sum(1), num_tokens, reference.sum(1), alignment=alignment).losses.mean()
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, policy)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert gradients[0].abs().max() > 1e-4
