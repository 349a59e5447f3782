"""The training loop: a meta-batch of architectures, each with its batch of images, one step of the GHN."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from timm_ghn.graph import ComputationGraph
from timm_ghn.hypernet import GHN, GHNConfig
from timm_ghn.training.checkpoint import TrainingError, export, has_checkpoint, load_checkpoint, save_checkpoint
from timm_ghn.training.config import TrainConfig
from timm_ghn.training.data import ImageDataset
from timm_ghn.training.objectives import OBJECTIVES, VAL_BATCH
from timm_ghn.training.optimizers import new_optimizer, optimizer_tensors, restore_optimizer
from timm_ghn.training.pool import Schedule, TaskPool, draw_architecture
from timm_ghn.training.records import FAMILY_COLUMNS, Log, model_card, plot_curves
from timm_ghn.training.task import Task, prepare

logger = logging.getLogger("timm_ghn.training")

_SKIP_WINDOW = 1000
_FINAL_LR = 0.01  # of the peak, where the cosine ends
_ROW_EVERY = 100  # steps, in the log
_AVERAGED = ("loss", "accuracy", "gradient_norm", "learning_rate")
_STATE = ("step", "first_step", "progress", "seconds", "skipped", "best")  # of a trainer, beside its tensors
_SUMS = 5
_HEAD = re.compile(r"bias_class\.|decoder\.class_layer_predictor\.")


def new_ghn(config: GHNConfig, seed: int) -> GHN:
    """A GHN with fresh weights that decide nothing yet but can be trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ghn = GHN(config)
        if ghn.gnn.sums_many:
            for module in ghn.modules():
                if isinstance(module, nn.Embedding):
                    nn.init.trunc_normal_(module.weight, std=config.hid**-0.5)
            outputs: list[Any] = []
            for part in (module for module in ghn.modules() if isinstance(module, GHN)):  # itself and its experts
                outputs += [*part.decoder.output_layers(), part.decoder_1d.fc[-1]]
            with torch.no_grad():
                for layer in outputs:
                    layer.weight /= 5
                    layer.bias.zero_()
    return ghn


class Trainer:
    """A training run in a directory.

    The directory gets ``log.csv``, ``families.csv`` (validation and gradients' norms by family), ``curves.png``, the
    GHN with the best validation so far (``model.safetensors``, ``config.json``, ``README.md``), and ``checkpoints/``.
    A run that resumes from there gets the same weights, bit for bit, as one that never stopped, as long as the clock
    does not drive the learning rate and the number of threads is the same: random numbers are a function of the seed,
    the step and the place in the meta-batch.

    Under `torch.distributed` each process trains its share of the meta-batch.

    Args:
        config: What to compute.
        train: Images to train on; several data sets of them where the config's `head` takes more than one.
        val: Images to validate on, likewise.
        directory: The run's directory.
        device: Where to compute; `train` and `val` are moved there.
        workers: Processes that prepare architectures; 0 for none.
        init: Weights to start from.
        resume: Go on from the directory's checkpoint; without it, a directory that has one is refused.
        cooldown_from: Another run's directory, from whose checkpoint a new run goes on under another schedule.
        teacher: A teacher's logits for the training images, [images, classes], see `soft_labels`.

    Raises:
        TrainingError: If the arguments do not fit each other or the directory's checkpoint.
    """

    def __init__(
        self,
        config: TrainConfig,
        train: ImageDataset | Sequence[ImageDataset],
        val: ImageDataset | Sequence[ImageDataset],
        directory: Path,
        *,
        device: torch.device | str = "cpu",
        workers: int = 1,
        init: GHN | None = None,
        resume: bool = False,
        cooldown_from: Path | None = None,
        teacher: Tensor | None = None,
    ):
        self.config, self.directory, self.workers = config, directory, workers
        self.device = torch.device(device)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if config.meta_batch % self.world:
            raise TrainingError(
                f"A meta-batch of {config.meta_batch} cannot be shared equally by {self.world} processes; "
                "choose a multiple."
            )
        lanes = config.meta_batch // self.world
        self.lanes = range(self.rank * lanes, (self.rank + 1) * lanes)
        sets = [(data,) if isinstance(data, ImageDataset) else tuple(data) for data in (train, val)]
        _check_data(*sets)
        self.objective = OBJECTIVES[config.head](config, *sets, self.device, teacher)

        self.ghn = new_ghn(config.ghn, config.seed)
        if init is not None:
            self.ghn.load_state_dict(_starting_weights(init, self.ghn))
        self.ghn.to(self.device).train()
        self.ema = copy.deepcopy(self.ghn).requires_grad_(False).eval()
        self.ema.config = dataclasses.replace(config.ghn, images=self.objective.described())
        # Gradients are views of one tensor, with sums behind them that travel along: loss, correct predictions,
        # networks left out, the clock, and whether somebody wants to stop. One call then averages over processes, and
        # one reads it all.
        self._names, parameters = zip(*self.ghn.named_parameters(), strict=True)
        sizes = [parameter.numel() for parameter in parameters]
        self.gradient = torch.zeros(sum(sizes) + _SUMS, device=self.device)
        for parameter, part in zip(parameters, self.gradient[:-_SUMS].split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        self.optimizer = new_optimizer(config.optimizer, parameters, config.lr, config.betas, config.weight_decay)

        self.step = 0
        self.first_step = 0  # of this schedule
        self.progress = 0.0  # of the learning rate's schedule, 0 to 1
        self.seconds = 0.0  # of training, over all resumptions
        self.skipped: list[int] = []  # steps of the networks that were left out lately
        self.best: dict[str, float] = {}  # the best validation
        self._stop = False
        checkpoints = directory / "checkpoints"
        if resume:
            self._restore(*load_checkpoint(checkpoints))
        elif has_checkpoint(checkpoints):
            raise TrainingError(f"{directory} holds a run already; resume it, or choose another directory.")
        elif cooldown_from is not None:
            self._restore(*load_checkpoint(cooldown_from / "checkpoints"), free=("schedule", "steps", "warmup"))
            self.first_step, self.progress, self.best = self.step, 0.0, {}
        self._norms: dict[str, list[float]] = {}  # of the networks' gradients, by family, since the last validation
        self._prepare_validation()

    # ---- one step ---------------------------------------------------------------------------------------------------

    def learning_rate(self) -> float:
        """Of the current step."""
        warm = min(1.0, (self.step + 1) / self.config.warmup) if self.config.warmup else 1.0
        if self.config.schedule == "constant":
            return self.config.lr * warm
        if self.config.schedule == "linear":
            return self.config.lr * warm * (1 - self.progress)
        if self.config.schedule == "steps":
            return self.config.lr * warm * 0.1 ** ((self.progress >= 2 / 3) + (self.progress >= 5 / 6))
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress))
        return self.config.lr * warm * (_FINAL_LR + (1 - _FINAL_LR) * cosine)

    def pool(self) -> TaskPool:
        """The tasks from this step on, which workers prepare; to be closed."""
        config = self.config
        schedule = Schedule(config.architectures, config.seed, config.meta_batch, config.uses, config.spacing)
        return TaskPool(
            schedule, self.lanes, self.step, config.ghn.num_classes, self.objective.image_size, self.device,
            self.workers, untie=config.ghn.split_attention, headless=not self.objective.predict_head,
        )  # fmt: skip

    def train_step(self, tasks: list[Task], clock: float = 0.0) -> dict[str, float]:
        """Trains on one task for each lane of this process.

        Args:
            tasks: The tasks.
            clock: A number of the first process that all are to know.

        Returns:
            Loss and accuracy over all lanes of all processes, the gradient's norm, whether any process wants to
            ``stop``, and the first one's ``clock``.
        """
        config = self.config
        lr = self.learning_rate()
        self.gradient.zero_()
        sums = self.gradient[-_SUMS:]
        predicted: list[Tensor] = []
        gradients: list[Tensor] = []
        batches, states = [], []
        for lane, task in zip(self.lanes, tasks, strict=True):
            generator = self._generator(lane)
            batches.append(self.objective.draw(generator, self._image_size(task, generator)))
            states.append(generator.get_state())
        predictions = self.ghn(
            [task.graph for task in tasks], self.objective.predict_head, [batch.sketch for batch in batches]
        )
        for task, batch, state, tiles in zip(tasks, batches, states, predictions, strict=True):
            generator.set_state(state)  # for what networks draw themselves
            # Each network's backward pass ends at what was predicted for it, so that only one network's activations
            # are in memory at a time. One pass through the GHN then takes all of them further.
            leaves = {name: tile.detach().requires_grad_() for name, tile in tiles.items() if name in task.shapes}
            parameters = task.parameters(leaves)
            loss, right = self.objective.loss(task.output(parameters, batch.images, config.bf16), batch)
            if config.penalty:
                loss = loss + config.penalty * torch.stack(torch._foreach_norm(list(parameters.values()))).sum()
            loss.backward()
            # A scale of branches is a constant, and has no graph behind it.
            trained = {n: x.grad for n, x in leaves.items() if x.grad is not None and tiles[n].requires_grad}
            norm = float(torch.stack(torch._foreach_norm(list(trained.values()))).norm()) if trained else 0.0
            self._norms.setdefault(task.architecture.family, []).append(norm)
            if not math.isfinite(norm):
                sums[2] += 1
                continue
            clip = math.inf if config.network_clip is None else config.network_clip
            scale = min(1.0, clip / (norm + 1e-6)) / config.meta_batch
            predicted += [tiles[name] for name in trained]
            gradients += torch._foreach_mul(list(trained.values()), scale)
            sums[0] += loss.detach() / config.meta_batch
            sums[1] += right / config.meta_batch
        if predicted:
            torch.autograd.backward(predicted, gradients)
        sums[3] = clock if self.rank == 0 else 0.0
        sums[4] = float(self._stop)
        if self.world > 1:
            dist.all_reduce(self.gradient)

        gradient = self.gradient[:-_SUMS]
        norm, total_loss, right, left_out, clock, stop = torch.cat((gradient.norm()[None], sums)).tolist()
        if left_out or not math.isfinite(norm):
            self._count_skipped(int(left_out) or config.meta_batch)
        if math.isfinite(norm) and left_out < config.meta_batch:
            gradient *= min(1.0, config.clip / (norm + 1e-6))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            decay = min(config.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.ema.parameters()), [p.detach() for p in self.ghn.parameters()], 1 - decay)
        self.step += 1
        if config.steps is not None:
            self.progress = (self.step - self.first_step) / (config.steps - self.first_step)
        return {
            "loss": total_loss, "accuracy": 100 * right, "gradient_norm": norm, "learning_rate": lr, "clock": clock,
            "stop": stop,
        }  # fmt: skip

    def stop(self) -> None:
        """Ends `run` after the step under way, in all processes."""
        self._stop = True

    def _generator(self, lane: int) -> torch.Generator:
        """The device's generator, in a state that only the seed, the step and the lane decide."""
        torch.manual_seed((self.config.seed * 1_000_003 + self.step) * self.config.meta_batch + lane)
        if self.device.type == "cuda":
            return torch.cuda.default_generators[self.device.index or 0]
        return torch.default_generator

    def _image_size(self, task: Task, generator: torch.Generator) -> int:
        """The size of the images of this network and step."""
        if not self.config.image_sizes or task.architecture.fixed_size:
            return self.objective.image_size
        drawn = torch.randint(len(self.config.image_sizes), (), generator=generator, device=generator.device)
        return self.config.image_sizes[int(drawn)]

    def _count_skipped(self, networks: int) -> None:
        self.skipped = [step for step in (*self.skipped, *[self.step] * networks) if step > self.step - _SKIP_WINDOW]
        logger.warning("step %d: %d networks are left out, their gradients are not finite", self.step, networks)
        if len(self.skipped) > self.config.max_skipped:
            raise TrainingError(
                f"In the last {min(self.step + 1, _SKIP_WINDOW)} steps, {len(self.skipped)} networks had no finite "
                "gradient; lower the learning rate or the clip, and resume from the last checkpoint."
            )

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def run(self, minutes: float | None = None, until: int | None = None) -> dict[str, float]:
        """Trains until the steps are done or the time is up, whichever comes first; then validates and saves.

        Ctrl-C and SIGTERM end it after the step under way, in the same orderly way.

        Args:
            minutes: Wall-clock budget of this call. In a run without a number of steps it also sets the pace of the
                learning rate, which decays over what is left of it.
            until: Stop before this step.

        Returns:
            The last validation: mean, min and max of top-1 in percent.
        """
        config = self.config
        if config.steps is None and minutes is None:
            raise TrainingError("Neither a number of steps nor of minutes is given; give at least one.")
        if minutes is not None and minutes <= 0:
            raise TrainingError(f"minutes is {minutes}; it must be above 0.")
        if config.steps is None and self.progress >= 1:
            self.progress = 0.0  # the clock has been through once: start over from the peak
        end = min(limit for limit in (config.steps, until, math.inf) if limit is not None)
        if self.step >= end:
            raise TrainingError(
                f"All {self.step} steps of the run in {self.directory} are done; start another from its weights."
            )
        self._stop = False
        started, earlier = time.monotonic(), self.seconds
        first_step, first_progress = self.step, self.progress
        recent: list[dict[str, float]] = []
        row_started = started
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(contextlib.closing(self.pool()))
            stack.enter_context(_orderly_stop(self))
            stack.enter_context(_own_random_state(self.device))
            log, log_family = stack.enter_context(self._logs())
            show = stack.enter_context(self._display())
            while True:
                result = self.train_step(pool.tasks(self.step), time.monotonic() - started)
                recent.append(result)
                self.seconds = earlier + result["clock"]
                time_used = result["clock"] / (60 * minutes) if minutes else 0.0
                if config.steps is None:
                    self.progress = min(1.0, first_progress + (1 - first_progress) * time_used)
                show(max(time_used, (self.step - first_step) / (end - first_step)), result)

                done = self.step >= end or time_used >= 1 or result["stop"] > 0
                validate = done or self.step % config.eval_every == 0
                if validate or self.step % _ROW_EVERY == 0:
                    row = {name: sum(r[name] for r in recent) / len(recent) for name in _AVERAGED}
                    row["steps_per_second"] = len(recent) / (time.monotonic() - row_started)
                    validation = {}
                    if validate:
                        accuracies = self.validate()
                        kinds = {"mean": accuracies.mean(), "min": accuracies.min(), "max": accuracies.max()}
                        validation = {f"val_{kind}": value.item() for kind, value in kinds.items()}
                        for family_row in self._family_rows(accuracies):
                            log_family(**family_row)
                    log(step=self.step, minutes=self.seconds / 60, skipped=len(self.skipped), **row, **validation)
                    if validate:
                        self._save(validation)
                    recent, row_started = [], time.monotonic()
                if done:
                    return validation

    @torch.no_grad()
    def validate(self) -> Tensor:
        """Top-1 in percent of what the averaged weights predict, for each of the validation architectures."""
        accuracies = torch.zeros(self.config.val_architectures, device=self.device)
        for index, task in self._val_tasks.items():

            def network(sketch: Tensor | None, task: Task = task) -> Callable[[Tensor], Tensor]:
                tiles = self.ema([task.graph], self.objective.predict_head, [sketch])[0]
                parameters = task.parameters(tiles)
                return lambda images: task.output(parameters, images, self.config.bf16)

            accuracies[index] = self.objective.accuracy(network)
        if self.world > 1:
            dist.all_reduce(accuracies)
        return accuracies

    def _family_rows(self, accuracies: Tensor) -> Iterator[dict[str, float | str]]:
        """For each family, its validation, and this process's gradients' norms since the last one."""
        norms, self._norms = self._norms, {}
        for family in sorted({*self._val_families, *norms}):
            row: dict[str, float | str] = {"step": self.step, "family": family}
            if own := [i for i, name in enumerate(self._val_families) if name == family]:
                row |= {"val_networks": len(own), "val_mean": accuracies[own].mean().item()}
            if family in norms:
                # A norm that is not finite is larger than any.
                found = torch.tensor(norms[family]).nan_to_num(math.inf, math.inf)
                median, upper, largest = found.quantile(torch.tensor([0.5, 0.9, 1.0]), interpolation="nearest").tolist()
                row |= {"trained": len(norms[family]), "norm_median": median, "norm_90": upper, "norm_max": largest}
            yield row

    def _prepare_validation(self) -> None:
        config, size = self.config, self.objective.image_size
        headless = not self.objective.predict_head
        self._val_tasks = {}
        try:
            for share in config.architectures:
                draw_architecture([share], "train", 0, size)
            drawn = [
                draw_architecture(config.architectures, "val", index, size) for index in range(config.val_architectures)
            ]
            self._val_families = [found.family for found in drawn]
            for index in range(self.rank, config.val_architectures, self.world):
                prepared = prepare(drawn[index], config.ghn.num_classes, size)
                self._val_tasks[index] = Task(prepared, config.ghn.num_classes, size, self.device, headless)
        except ValueError as error:
            raise TrainingError(f"The mixture of architectures cannot be drawn from: {error}") from error

    @property
    def validation_graphs(self) -> list[tuple[str, ComputationGraph]]:
        """Families and graphs of this process's validation networks."""
        return [(task.architecture.family, task.graph) for task in self._val_tasks.values()]

    # ---- what is kept -----------------------------------------------------------------------------------------------

    def _save(self, validation: dict[str, float]) -> None:
        """Exports the GHN if it is the best so far, and writes a checkpoint."""
        better = validation["val_mean"] > self.best.get("val_mean", -math.inf)
        if better:
            self.best = {"step": self.step, **validation}
        if self.rank > 0:
            return
        logger.info("step %d: validation %.2f %% (%.2f to %.2f)", self.step, *validation.values())
        if better:
            export(self.directory, self.ema, self._card())
        tensors = {
            "ghn": self.ghn.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, list(self._names)),
        }
        state = {
            "config": self.config.to_dict(),
            "data": self.objective.facts(),
            **{name: getattr(self, name) for name in _STATE},
        }
        save_checkpoint(self.directory / "checkpoints", self.step, tensors, state)
        plot_curves(self.directory / "log.csv", self.directory / "curves.png")

    def _restore(
        self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], free: tuple[str, ...] = ()
    ) -> None:
        """Takes over a checkpoint of a run under the same config, but for the fields that are `free` to differ."""
        try:
            saved, config = TrainConfig.from_dict(state["config"]).to_dict(), self.config.to_dict()
            for name in saved:
                if saved[name] != config[name] and name not in free:
                    raise TrainingError(
                        f"The run in {self.directory} has {name} = {saved[name]}, not {config[name]}; resume it under "
                        "its own config, or start another run from its weights."
                    )
            data = state["data"]
            # Runs from before there were several data sets state theirs alone.
            if ([data] if isinstance(data, dict) else data) != self.objective.facts():
                raise TrainingError(f"The run in {self.directory} trained on other images; give it the same data.")
            self.ghn.load_state_dict(tensors["ghn"])
            self.ema.load_state_dict(tensors["ema"])
            restore_optimizer(self.optimizer, list(self._names), tensors["optimizer"])
            for name in _STATE:
                setattr(self, name, state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise TrainingError(
                f"The checkpoint in {self.directory} is damaged ({error}); start again from its exported weights."
            ) from error

    def _card(self) -> str:
        facts = {
            "classes": self.config.ghn.num_classes,
            "images": sum(facts["images"] for facts in self.objective.facts()),
            "size": self.objective.image_size,
            "steps": self.step,
            "architecture_steps": self.step * self.config.meta_batch,
            "minutes": self.seconds / 60,
            "processes": f"{self.world} × {self.device.type.upper()}",
            "validation": "mean {val_mean:.2f} %, {val_min:.2f} to {val_max:.2f} %".format(**self.best),
            "val_batch": VAL_BATCH,
        }
        return model_card(self.config.to_dict(), facts)

    @contextlib.contextmanager
    def _logs(self) -> Iterator[tuple[Callable[..., None], Callable[..., None]]]:
        """What writes to the log, and to that of the families."""
        if self.rank > 0:
            yield lambda **row: None, lambda **row: None
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            log = Log(self.directory / "log.csv", self.step)
            families = Log(self.directory / "families.csv", self.step, FAMILY_COLUMNS)
        except OSError as error:
            raise TrainingError(f"Cannot write to {self.directory} ({error}); choose another directory.") from error
        with contextlib.closing(log), contextlib.closing(families):
            yield log.write, families.write

    @contextlib.contextmanager
    def _display(self) -> Iterator[Callable[[float, dict[str, float]], None]]:
        columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True), disable=self.rank > 0) as progress:
            task = progress.add_task("preparing", total=1.0)

            def show(share: float, result: dict[str, float]) -> None:
                text = f"step {self.step}  loss {result['loss']:.3f}  accuracy {result['accuracy']:.1f} %"
                progress.update(task, completed=share, description=text)

            yield show


def _starting_weights(init: GHN, fresh: GHN) -> dict[str, Tensor]:
    """A GHN's tensors for a fresh one of another config, if they fit it.

    With split attention, operands start out as equals; what tasks change starts at nothing; a head may be left out;
    experts start out as the whole.
    """
    config = fresh.config
    if config.experts and {*init.config.experts} <= {*config.experts}:
        tensors = _starting_weights(init.alone(), fresh.alone())
        for kind in config.experts:
            source = init.alone(kind if kind in init.config.experts else None)
            started = _starting_weights(source, fresh.alone(kind))
            tensors |= {f"experts.{kind}.{name}": tensor for name, tensor in started.items()}
        return tensors
    tensors, own = init.state_dict(), fresh.state_dict()
    if config.split_attention and not init.config.split_attention:
        tensors["operand_embed.weight"] = torch.zeros_like(own["operand_embed.weight"])
    if config.conditioned and not init.config.conditioned:
        tensors |= {name: tensor for name, tensor in own.items() if name.startswith("modulation.")}
    if init.config.predicts_head and not config.predicts_head:
        tensors = {name: tensor for name, tensor in tensors.items() if not _HEAD.match(name)}
    if {name: tensor.shape for name, tensor in tensors.items()} != {n: tensor.shape for n, tensor in own.items()}:
        differing = [name for name, value in init.config.to_dict().items() if config.to_dict().get(name) != value]
        raise TrainingError(f"The weights to start from are another GHN's: it differs in {', '.join(differing)}.")
    return tensors


def _check_data(train: Sequence[ImageDataset], val: Sequence[ImageDataset]) -> None:
    for name, data in (*(("training", data) for data in train), *(("validation", data) for data in val)):
        if len(data) == 0:
            raise TrainingError(f"There are no {name} images; give a data set with at least one.")
        low, high = data.labels.aminmax()
        if low < 0 or high >= data.num_classes:
            raise TrainingError(
                f"The {name} labels are {low} to {high}, those of {data.num_classes} classes 0 to "
                f"{data.num_classes - 1}; correct the labels or the number of classes."
            )


@contextlib.contextmanager
def _orderly_stop(trainer: Trainer) -> Iterator[None]:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop after the step under way; a second one is obeyed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        trainer.stop()
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Training seeds torch's generators at each step; afterwards they are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
