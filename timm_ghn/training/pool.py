"""Which architectures train at which step, and their preparation ahead of time.

A *lane* is one place in the meta-batch. What a lane trains at a step is a pure function of the configuration, the lane
and the step: it depends neither on how many processes share the lanes nor on how often training was interrupted.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from timm_ghn.training.architectures import SPLITS, Architecture, architecture
from timm_ghn.training.sampling import Draw
from timm_ghn.training.task import Prepared, Task, prepare


@dataclass(frozen=True)
class Share:
    """A part of the mixture of architectures.

    Attributes:
        source: "timm" or "deepnets".
        families: Families of the source; empty for those of its splits.
        max_macs: Upper limit for the multiply-accumulates of one image; None for that of its splits.
        weight: How often, relative to the other shares.
        from_step: The step at which the share joins.
    """

    source: str = "timm"
    families: tuple[str, ...] = ()
    max_macs: int | None = None
    weight: float = 1.0
    from_step: int = 0


def draw_architecture(
    shares: Sequence[Share], split: str, index: int, image_size: int, step: int | None = None
) -> Architecture:
    """The architecture at an index of the mixture; before `step`, only the shares that have joined by then count."""
    joined = [share for share in shares if step is None or share.from_step <= step]
    point = Draw("share", split, index).uniform(0, sum(share.weight for share in joined))
    for share in joined:
        point -= share.weight
        if point < 0:
            break
    families = share.families or None
    size = SPLITS[share.source][split].size
    return architecture(
        share.source, split, index % size, families=families, max_macs=share.max_macs, image_size=image_size
    )


@dataclass(frozen=True)
class Schedule:
    """When the architectures of a lane take their turns.

    Preparing an architecture takes about as long as training on it, so each is used several times. A lane's
    architectures are numbered by their first use: every `uses` steps one is new, and the others of these steps were new
    n, 2 · n, … rounds ago, where n is `spacing` and the lane's number. Workers therefore have the same amount to do at
    any time, and an architecture returns when the GHN has seen n others in its lane.

    Attributes:
        shares: The mixture to draw from.
        seed: Where in the sequence of a million training architectures to start.
        lanes: Size of the meta-batch.
        uses: How often an architecture is used.
        spacing: Rounds of `uses` steps between two uses in the first lane.
    """

    shares: tuple[Share, ...]
    seed: int
    lanes: int
    uses: int
    spacing: int

    def number(self, lane: int, step: int) -> int:
        """Which of the lane's architectures trains at a step."""
        round_, use = divmod(step, self.uses)
        # Lanes differ in their spacing, so that an architecture meets others each time.
        number = round_ - use * (self.spacing + lane)
        return number if number >= 0 else number % (round_ + 1)  # nothing is that old yet: take any

    def last_step(self, lane: int, number: int) -> int:
        """A step after which an architecture is never used."""
        return (number + (self.uses - 1) * (self.spacing + lane) + 1) * self.uses - 1

    def architecture(self, lane: int, number: int, image_size: int) -> Architecture:
        """What a lane's number stands for."""
        start = Draw("start", self.seed).between(0, SPLITS["timm"]["train"].size - 1)
        index = start + number * self.lanes + lane
        return draw_architecture(self.shares, "train", index, image_size, step=number * self.uses)


class _Preparation(Dataset[Prepared]):
    """Work for the worker processes: an item is what `Schedule.number` numbers."""

    def __init__(self, schedule: Schedule, num_classes: int, image_size: int, untie: bool):
        self.schedule, self.num_classes, self.image_size, self.untie = schedule, num_classes, image_size, untie

    def __getitem__(self, key: tuple[int, int]) -> Prepared:
        prepared = prepare(self.schedule.architecture(*key, self.image_size), self.num_classes, self.image_size)
        if self.untie:
            _ = prepared.graph.untied  # which the graph keeps, and takes along
        return prepared


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, but how training ends is up to the trainer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class TaskPool:
    """The tasks of some lanes, prepared by worker processes in the order in which training will ask for them.

    Args:
        schedule: Which architecture is whose turn.
        lanes: The lanes of this process.
        first_step: The step that training starts or resumes at.
        num_classes: Of the data set.
        image_size: Of the data set.
        device: Where the tasks' fixed values go.
        workers: Worker processes; 0 prepares in this process.
        untie: Whether the GHN reads untied graphs (`GHNConfig.split_attention`).
        headless: Whether the networks have no classifier.
    """

    def __init__(
        self,
        schedule: Schedule,
        lanes: Sequence[int],
        first_step: int,
        num_classes: int,
        image_size: int,
        device: torch.device,
        workers: int,
        untie: bool = False,
        headless: bool = False,
    ):
        self.schedule, self.lanes, self.first_step, self.headless = schedule, lanes, first_step, headless
        self.num_classes, self.image_size, self.device = num_classes, image_size, device
        self._tasks: dict[tuple[int, int], Task] = {}
        loader = DataLoader(
            _Preparation(schedule, num_classes, image_size, untie),
            batch_size=None,
            sampler=self._order(),
            num_workers=workers,
            prefetch_factor=16 if workers else None,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # otherwise it would draw from the caller's
        )
        self._prepared: Iterator[tuple[tuple[int, int], Prepared]] = zip(self._order(), loader, strict=True)

    def close(self) -> None:
        """Ends the worker processes at once; garbage collection would do so at some time."""
        self._prepared = iter(())

    def _order(self) -> Iterator[tuple[int, int]]:
        """Every key once, by the step that needs it first."""
        known: set[tuple[int, int]] = set()
        for step in itertools.count(self.first_step):
            for lane in self.lanes:
                key = lane, self.schedule.number(lane, step)
                if key not in known:
                    known.add(key)
                    yield key
            if step % 1000 == 0:
                known = {key for key in known if self.schedule.last_step(*key) > step}

    def tasks(self, step: int) -> list[Task]:
        """The tasks of a step, one for each lane; steps must be asked for one after the other."""
        tasks = []
        for lane in self.lanes:
            wanted = lane, self.schedule.number(lane, step)
            while wanted not in self._tasks:
                key, prepared = next(self._prepared)
                self._tasks[key] = Task(prepared, self.num_classes, self.image_size, self.device, self.headless)
            tasks.append(self._tasks[wanted])
            if self.schedule.last_step(*wanted) <= step:
                del self._tasks[wanted]
        return tasks
