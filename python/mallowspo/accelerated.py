"""Accelerated preference optimisation (arXiv 2410.06293): rounds of preference optimisation with momentum.

Round t trains pi_hat_{t+1} against the policy pi_t that the pairs were sampled from. Before the next round pi_hat is
extrapolated, as in Nesterov's method: pi_{t+1} is proportional to pi_hat_{t+1} (pi_hat_{t+1} / pi_hat_t)^alpha.

- As a reference this is exact: log pi_t(y) = (1 + alpha) log pi_hat_t(y) - alpha log pi_hat_{t-1}(y) + const(x), and
  the constant of a prompt cancels in every loss of pairs.
- For sampling no model has exactly those probabilities; the parameters are extrapolated instead,
  theta + alpha (theta - theta_before). The two agree where log-probabilities are linear in the parameters.

The paper's full text was not read: the order of the steps is from memory, the log form is derived, and neither its
alpha is known nor which of the two its experiments use. alpha = 0 is iterative DPO, exactly.
"""

import copy
from pathlib import Path

import torch
from transformers import TrainerCallback

from mallowspo.choices import check_number
from mallowspo.data import REFERENCE_COLUMNS, TOKEN_REFERENCE_COLUMNS
from mallowspo.modeling import check_apart, load_model, unprepared
from mallowspo.trainer import MallowsTrainer


def extrapolated(current, previous, alpha):
    """``(1 + alpha) current - alpha previous``, exactly ``current`` where alpha is 0 or the two are equal.

    Args:
        current, previous: tensors or arrays of one shape: log-probabilities, or parameters.
        alpha: in [0, 1).

    Raises:
        TypeError: alpha is no number. ValueError: alpha outside [0, 1).
    """
    _check_alpha(alpha)
    return current + alpha * (current - previous)


def _check_alpha(alpha):
    check_number("alpha", alpha)
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must be in [0, 1), got {alpha}; 0 is iterative preference optimisation")


@torch.no_grad()
def extrapolate_parameters_(model, previous_model, alpha):
    """Moves the floating-point parameters of a model, in place, on from those of an earlier copy of it."""
    for parameter, before in zip(model.parameters(), previous_model.parameters(), strict=True):
        if parameter.is_floating_point():
            parameter.copy_(extrapolated(parameter, before.to(parameter.device), alpha))


class AcceleratedTrainer(MallowsTrainer):
    """One round: a MallowsTrainer whose reference log-probabilities are extrapolated over two models.

    Both are asked in every step, or once before training (``precompute_ref_log_probs``), each with its own file in the
    cache. The dispersion, where one comes from entropies, is that of ``ref_model``: the extrapolated policy has no
    token distributions.

    Args:
        model: what is trained, as in MallowsTrainer.
        ref_model: pi_hat_t, the result of the round before, or the start.
        previous_model: pi_hat_{t-1}, the result of the round before that; None in the first round, where ref_model
            alone is the reference.
        alpha: in [0, 1).
        args: MallowsConfig.
        **kwargs: as in MallowsTrainer.

    Raises:
        ValueError: alpha outside [0, 1), an objective without a reference, several references, and what MallowsTrainer
            raises.
    """

    def __init__(self, model, ref_model, previous_model=None, *, alpha, args, **kwargs):
        _check_alpha(alpha)
        if isinstance(ref_model, list | tuple):
            raise ValueError("ref_model must be one model, the result of the round before; a mixture has no round")
        if args.objective().reference_free:
            raise ValueError(f"loss_type {args.loss_type!r} has no reference, which is what acceleration extrapolates")
        self.alpha, self.previous_model = alpha, None
        if previous_model is not None:
            self.previous_model = load_model(previous_model, args.model_init_kwargs)
            if isinstance(model, torch.nn.Module):
                check_apart("previous_model", self.previous_model, model)
            self._taught(self.previous_model, args).requires_grad_(False)
        super().__init__(model, ref_model, args, **kwargs)

    def _shares_prompts(self, args, *models):
        return super()._shares_prompts(args, *models, self.previous_model)

    def _described_reference(self):
        if self.previous_model is None:
            return super()._described_reference()
        return f"the results of the two rounds before, extrapolated with alpha = {self.alpha:g}"

    def _columns_of(self, model, dataset, name):
        current = super()._columns_of(model, dataset, name)
        if self.previous_model is None:
            return current
        previous = super()._columns_of(self.previous_model, dataset, f"{name}, previous")
        for column in {*REFERENCE_COLUMNS[:2], *TOKEN_REFERENCE_COLUMNS} & current.keys():
            values = extrapolated(current[column].double(), previous[column].double(), self.alpha)
            current[column] = values.to(current[column].dtype)
        return current

    def _set_up_references(self, references, given):
        if self.previous_model is not None:
            self.previous_model = self._ready(self.previous_model, for_good=not self._cached)
        super()._set_up_references(references, given)

    def _reference_of(self, batch):
        references = super()._reference_of(batch)
        if self.previous_model is None or REFERENCE_COLUMNS[0] in batch:
            return references
        (current,), previous = references, self._reference_stats(self.previous_model, batch)
        pairs = {name: (getattr(current, name), getattr(previous, name)) for name in ("logps", "token_logps")}
        return [current._replace(**{name: extrapolated(*pair, self.alpha) for name, pair in pairs.items()})]

    def check_rounds(self):
        """ValueError where :meth:`next_round` is not possible."""
        if self.ref_model is None:
            raise ValueError("the rounds need a reference of their own: pass ref_model")
        if self._cached:
            raise ValueError(
                "the cached reference is that of the first round: set precompute_ref_log_probs=False, and "
                "dispersion_scale to a number where the dispersion comes from entropies"
            )
        _check_whole(self)
        ours, theirs = ({name: p.shape for name, p in m.named_parameters()} for m in (self.model, self.ref_model))
        if ours != theirs:
            raise ValueError(
                "the rounds move the model on from ref_model, parameter by parameter: pass one with the same "
                "parameters, of a model with an adapter a copy with that adapter"
            )

    @torch.no_grad()
    def next_round(self):
        """Ends a round: the model becomes the reference, the reference the one before, and the model moves on.

        Raises:
            ValueError: a reference that is cached, is the model itself without its adapter or has other parameters
                than the model; weights that are split over the ranks.
        """
        self.check_rounds()
        self.use_evaluated_weights()
        current = unprepared(copy.deepcopy(self.model)).requires_grad_(False)
        self.ref_model, self.previous_model = current, self.ref_model
        extrapolate_parameters_(self.model, self.previous_model, self.alpha)


class AcceleratedRounds(TrainerCallback):
    """Makes every epoch of one ``train()`` a round, on the same pairs.

        trainer = AcceleratedTrainer("path/or/name", "path/or/name", alpha=0.3, args=args, train_dataset=pairs)
        trainer.add_callback(AcceleratedRounds(trainer))

    The optimiser and its schedule go on through all rounds; :func:`accelerated_rounds` starts them anew, samples new
    pairs and can cache the reference. What is evaluated and saved at the end of an epoch is pi_hat of that round; it
    moves on when the next epoch begins. Memory: as for :func:`accelerated_rounds`.

    Args:
        trainer: the AcceleratedTrainer it is added to.

    Raises:
        TypeError: another trainer. ValueError: of ``next_round``; when training begins, a run that is resumed.
    """

    def __init__(self, trainer):
        if not isinstance(trainer, AcceleratedTrainer):
            raise TypeError(f"AcceleratedRounds needs an AcceleratedTrainer, got {type(trainer).__name__}")
        trainer.check_rounds()
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            raise ValueError("a checkpoint holds no models of earlier rounds: start again, without resuming")

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step:
            self.trainer.next_round()


def _check_whole(trainer):
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError("rounds copy the whole model, which FSDP and DeepSpeed split: launch with DDP")


def accelerated_rounds(model, pairs, args, *, rounds, alpha, eval_dataset=None, processing_class=None, callbacks=None):
    """Trains round by round; a generator of the rounds' trainers, so that a caller can evaluate, save or stop.

        for trainer in accelerated_rounds("path/or/name", sample_and_label, args, rounds=3, alpha=0.3):
            print(trainer.evaluate())

    When a trainer is handed out its model holds pi_hat of that round, and stays so if it is the last one; before the
    next round it is extrapolated in place. Every round has a new optimiser and learning rate schedule. Memory: two
    frozen copies of the model, from the second round on.

    Args:
        model: as in MallowsTrainer. An adapter's two factors are extrapolated each for itself, so their product is
            only to first order.
        pairs: ``pairs(model, number)`` -> the data set of round 0, 1, ...; the model holds the extrapolated parameters
            of pi_t, to sample from. A function that returns the same data each time makes the rounds offline.
        args: MallowsConfig, of each round; its output_dir gets a folder a round, ``round-1``, ...
        rounds: at least 1.
        alpha: in [0, 1).
        eval_dataset, processing_class, callbacks: as in MallowsTrainer.

    Raises:
        ValueError: what AcceleratedTrainer raises, rounds < 1, weights that are split over the ranks.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    model = load_model(model, args.model_init_kwargs)
    previous, current = None, copy.deepcopy(model)
    for number in range(rounds):
        own = copy.copy(args)
        own.output_dir = str(Path(args.output_dir) / f"round-{number + 1}")
        own.precompute_ref_log_probs = True
        own.model_init_kwargs = None  # the model is loaded
        own.reference_cache_dir = args.reference_cache_dir or str(Path(args.output_dir) / "_reference_cache")
        trainer = AcceleratedTrainer(
            model,
            current,
            previous,
            alpha=alpha,
            args=own,
            train_dataset=pairs(model, number),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        _check_whole(trainer)
        trainer.train()
        trainer.use_evaluated_weights()
        yield trainer
        if number + 1 < rounds:
            model = unprepared(trainer.model)
            previous, current = current, copy.deepcopy(model)
            extrapolate_parameters_(model, previous, alpha)
