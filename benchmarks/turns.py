"""Contenders that take their steps in turn, each in a process of its own.

So each trains as it does for its users. In one process they would not: the C library adapts to the sizes that it has
freed, and how many page faults a step of one has would depend on what the others did before.
"""

import multiprocessing
import warnings

import datasets
from transformers.utils import logging

from contest import seconds
from trainers import Step, make_trainer

BATCHES = 4  # of a cell, over and over


class Contender:
    """A process that makes a trainer, and an optimiser step whenever it is told to.

    Attributes:
        token_ids: what it trains on, see ``Step.token_ids``; None where it is not installed.

    Raises:
        EOFError: the process has failed, with its traceback on stderr.
    """

    def __init__(self, name, cell, setting):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_train, args=(theirs, name, cell, setting), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.token_ids = self._pipe.recv()

    def step(self):
        """(loss, seconds)"""
        self._pipe.send("step")
        return self._pipe.recv()

    def close(self):
        self._pipe.close()
        self._process.join()


def quieten():
    """Leaves out what the libraries say of every trainer."""
    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _train(pipe, name, cell, setting):
    quieten()
    trainer = make_trainer(name, cell, setting, setting.data(cell.prompts, BATCHES))
    if trainer is None:
        return pipe.send(None)
    step, losses = Step(trainer), []
    pipe.send(step.token_ids())
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        duration = seconds(lambda: losses.append(step()), setting.device)
        pipe.send((losses[-1].item(), duration))
