"""How ranks agree on yes-or-no questions while they train."""

from __future__ import annotations

import torch

from dist_cifar.distributed.collectives import Communicator


class AsyncAnyReduce:
    """An any-reduce in the background, by which ranks agree on yes-or-no questions.

    `start` it before a step and take its `result` after the step: the exchange is hidden behind the computation. A
    result is about the answers of the step `delay` steps before. In each step a rank sends one message: all that it
    knows of the answers of the last few steps. From step to step it goes twice as far, so that each rank knows the
    answers of all after log2(ranks) steps.

    Source: Hensgen, Finkel and Manber, "Two algorithms for barrier synchronization", 1988 (dissemination).
    """

    def __init__(self, communicator: Communicator, questions: int) -> None:
        """`questions` is how many are answered at once."""
        self._communicator = communicator
        rounds = max(1, (communicator.world_size - 1).bit_length())
        self.delay = rounds - 1
        self._known = torch.zeros(rounds, questions, dtype=torch.uint8)
        """Row i: whether a rank that this one has heard of answered yes, i steps ago."""
        self._received = torch.zeros_like(self._known)

    def start(self, step: int, *answers: bool) -> None:
        """Sends this rank's answers; `step` is the one that begins, counted from 1."""
        newest = torch.tensor([answers], dtype=torch.uint8)
        self._known = torch.cat([newest, self._known[:-1]])
        distance = 2 ** (step % len(self._known))
        self._communicator.start_shift(self._received, self._known, distance, "any-reduce", step=step)

    def result(self) -> list[bool]:
        """Whether any rank answered yes `delay` steps ago, for each question; the same on every rank."""
        self._communicator.wait_for_shift()
        self._known = self._known | self._received
        return self._known[-1].bool().tolist()
