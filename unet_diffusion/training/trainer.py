"""The training loop, which is the same for every task and runs on Accelerate.

A task (`unet_diffusion.training.task`) defines what is learnt, and how it is validated and shown. The loop does the
rest: accumulation, clipping, the learning rate, the moving average, precision, logging, checkpoints and resuming.
"""

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.modeling_utils import ModelMixin
from diffusers.optimization import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from unet_diffusion.data.record import DataRecord
from unet_diffusion.network.precision import PRECISIONS
from unet_diffusion.randomness import keyed_generator, keyed_seed
from unet_diffusion.training.accelerator import RunContext, choose_kernels, memory_layout, steps_ahead
from unet_diffusion.training.checkpoints import (
    Checkpoint,
    load_latest,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    weights_digest,
)
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.metrics_log import MetricsLog, read_metrics
from unet_diffusion.training.moving_average import MovingAverage
from unet_diffusion.training.optimizer import make_optimizer
from unet_diffusion.training.run_folder import UNCHANGED, claim, only_run_in
from unet_diffusion.training.stopping import BestWeights, SkippedSteps, stop_requests
from unet_diffusion.training.task import Task

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a task in a folder, resuming from the newest checkpoint there.

    Args:
        task: what is learnt.
        config: the options of the loop.
        output: the folder of the run.
        resolved: the whole configuration of the run, written as `config.json`; a run is resumed only with an equal one.
        accelerator: from `make_accelerator`, made before the task, whose data depend on the process.
        record: what is known about the data, written as `data.json`; a run is resumed only with equal data.

    Raises:
        ValueError: the folder holds a run of another configuration or of other data.
        RuntimeError: another process is training in the folder.
    """

    def __init__(
        self,
        task: Task,
        config: TrainingConfig,
        output: Path,
        resolved: dict[str, Any],
        accelerator: Accelerator,
        record: DataRecord | None = None,
    ) -> None:
        self.task, self.config, self.output, self.accelerator = task, config, output, accelerator
        self.context = RunContext(config, accelerator)
        task.batch_size = config.batch_size
        facts: dict[str, Any] = {
            "processes": accelerator.num_processes,
            "images_per_step": self.context.images_per_step,
            "threads": torch.get_num_threads(),
        }
        optimizer_name = task.optimizer if config.optimizer == "auto" else config.optimizer
        facts |= {"mixed_precision": accelerator.mixed_precision, "optimizer": optimizer_name}  # which may be "auto"
        facts |= {} if task.unchanged is None else {UNCHANGED: weights_digest(task.unchanged)}
        self.resolved = json.loads(json.dumps({**resolved, **facts}, default=str))
        self.record = record
        if config.warmup_steps > config.steps and accelerator.is_main_process:
            logger.warning(
                "warmup_steps is %d, but the run has %d steps, so the learning rate never reaches its peak; lower "
                "warmup_steps, or raise steps",
                config.warmup_steps,
                config.steps,
            )
        self.step = 0
        self.loss_sums: dict[str, Tensor] = {}  # since the last log line
        self.loss_counts: dict[str, Tensor] = {}  # steps in each of these sums; only "loss" has all that were not lost
        self.seconds = 0.0  # of training since then
        self.best = BestWeights(task.patience)
        self.skipped = SkippedSteps(config.max_skipped_steps)
        self.unread: list[Tensor] = []  # whether each of the last steps was lost, bool (), still on the device
        self.read_every = steps_ahead(accelerator.device, config.max_skipped_steps)

        choose_kernels(accelerator.device)
        task.network.to(accelerator.device, memory_format=memory_layout(accelerator.device))
        self.ema = MovingAverage(task.network.parameters(), decay=config.ema_decay, foreach=True)
        self.ema.to(accelerator.device)
        rate, decay = config.learning_rate, config.weight_decay
        products = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        optimizer = make_optimizer(optimizer_name, task.network, task.parameter_groups(), rate, decay, products)
        if config.compile:
            task.network.compile_repeated_blocks()
        self.network, self.optimizer = accelerator.prepare(task.network, optimizer)

    def run(self) -> Path:
        """Trains to the last step, exports, and returns the folder of the run."""
        alone = only_run_in(self.output) if self.accelerator.is_main_process else nullcontext()
        with alone, stop_requests() as stop:
            self._start()
            loading = closing(self.task.batches(self.context, self.step))  # ends the data workers
            hidden = not self.accelerator.is_main_process
            progress = tqdm(
                total=self.config.steps,
                initial=self.step,
                unit="step",
                desc=PRECISIONS[self.accelerator.mixed_precision],
                disable=hidden,
                dynamic_ncols=True,
            )
            with loading as batches, progress as bar:
                while self.step < self.config.steps and not self.best.exhausted:
                    self._train_step(batches)
                    bar.update()
                    if self._due(self.read_every):
                        self._read_lost_steps()
                    if self._due(self.config.log_every):
                        self._log(bar)
                    if self._due(self.config.validate_every):
                        self._validate()
                    if self._due(self.config.preview_every):
                        self._preview()
                    stopping = self._stopping(bool(stop))
                    if self._due(self.config.checkpoint_every) or stopping or self.best.exhausted:
                        self._save()
                    if stopping:
                        stop.leave(f"step {self.step} is saved in {self.output}; the same command resumes")
            if self.best.exhausted and self.step < self.config.steps and self.accelerator.is_main_process:
                logger.warning(
                    "the run ended at step %d of %d, since %d validations in a row were not better than that of step "
                    "%d; with a higher patience, the same command goes on",
                    self.step,
                    self.config.steps,
                    self.best.misses,
                    self.best.step,
                )
            if self._any_process(self._lacks_validation()):
                self._validate()
            self._export()
        # The reducer of the gradients holds the process group. If it were freed after `end_training`, it would hold the
        # interpreter's lock while waiting for threads of the group, which may need the lock to end.
        self.network = self.task.network
        self.accelerator.free_memory()
        self.accelerator.end_training()
        return self.output

    def _train_step(self, batches: Iterator[dict[str, Tensor]]) -> None:
        accelerator, config, started = self.accelerator, self.config, time.perf_counter()
        self.network.train()
        buffers = [buffer.clone() for buffer in self.task.network.buffers()]  # such as running means
        sums, finite = dict(self.loss_sums), torch.ones((), dtype=torch.bool, device=accelerator.device)
        for micro in range(config.accumulate):
            batch = next(batches)
            torch.manual_seed(keyed_seed(config.seed, "dropout", self.step, self._first_sample(micro)))
            with accelerator.accumulate(self.network):
                losses = self.task.loss(self.network, batch, self._generators(self.step, micro))
                losses = losses if isinstance(losses, dict) else {"loss": losses}
                accelerator.backward(losses["loss"])
                finite &= losses["loss"].isfinite()
                if accelerator.sync_gradients:
                    finite &= accelerator.clip_grad_norm_(self.network.parameters(), config.max_grad_norm).isfinite()
                    lost = self._lost(finite)
                    self._optimize_unless(lost)
                self.optimizer.zero_grad()
            sums |= {name: sums.get(name, 0) + loss.detach() / config.accumulate for name, loss in losses.items()}
        for buffer, before in zip(self.task.network.buffers(), buffers):
            buffer.copy_(torch.where(lost, before, buffer))
        self.loss_sums = {name: torch.where(lost, self.loss_sums.get(name, 0.0), sums[name]) for name in sums}
        self.loss_counts |= {name: self.loss_counts.get(name, 0) + ~lost for name in losses}
        self.ema.step_unless(lost, self.task.network.parameters())
        self.task.finish_step(lost, accelerator)
        self.unread.append(lost)
        self.schedule.step()
        self.step += 1
        self.seconds += time.perf_counter() - started

    def _lost(self, finite: Tensor) -> Tensor:
        """Returns whether the loss or gradient of a process is not finite, bool (), without waiting for the device."""
        if self.accelerator.num_processes == 1:
            return ~finite
        return self.accelerator.reduce((~finite).float(), "sum") > 0

    def _optimize_unless(self, lost: Tensor) -> None:
        """Takes a step of the optimizer, whose kernel changes nothing if `lost` is true on the device."""
        if self.accelerator.scaler:  # it skips the step in the same way, and lowers its scale
            self.optimizer.step()
            return
        self.optimizer.optimizer.found_inf = lost.float()
        self.optimizer.step()
        del self.optimizer.optimizer.found_inf

    def _read_lost_steps(self) -> None:
        """Waits for the device, then counts and reports the lost steps among the last ones."""
        if not self.unread:
            return
        started, first = time.perf_counter(), self.step - len(self.unread)
        lost = torch.stack(self.unread).tolist()
        self.unread = []
        for step, skipped in enumerate(lost, start=first):
            if not skipped:
                self.skipped.in_a_row = 0
                continue
            generators = [each for micro in range(self.config.accumulate) for each in self._generators(step, micro)]
            self.skipped.add(step, self.task.describe(self.context, step, generators))
        self.seconds += time.perf_counter() - started

    def _first_sample(self, micro: int) -> int:
        """Returns the position of a micro-batch's first sample among all samples of its step."""
        return (micro * self.accelerator.num_processes + self.accelerator.process_index) * self.config.batch_size

    def _generators(self, step: int, micro: int) -> list[torch.Generator]:
        """Returns a generator for each sample of a micro-batch of a step."""
        first = self._first_sample(micro)
        positions = range(first, first + self.config.batch_size)
        return [keyed_generator(self.config.seed, "sample", step, position) for position in positions]

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(int(flag), device=self.accelerator.device), "sum").item())

    def _stopping(self, stop: bool) -> bool:
        """Returns whether any process was asked to stop; several processes check this where lost steps are read."""
        if self.accelerator.num_processes == 1:
            return stop
        return self._due(self.read_every) and self._any_process(stop)

    def _log(self, bar: tqdm) -> None:
        self._read_lost_steps()
        counts = {name: count.item() for name, count in self.loss_counts.items()}
        sums = self._mean_over_processes()
        losses = {name: total.item() / counts[name] for name, total in sums.items() if counts[name]}
        rate = counts.get("loss", 0) * self.context.images_per_step / self.seconds
        self.loss_sums, self.loss_counts, self.seconds = {}, {}, 0.0
        bar.set_postfix(loss=f"{losses.get('loss', math.nan):.4f}", images_per_second=f"{rate:.0f}")
        self._record(
            **losses,  # none, if all steps since the last line were skipped
            skipped_steps=self.skipped.total,
            learning_rate=self.config.learning_rate * self._share_of_peak(),
            images_per_second=round(rate, 1),
        )

    def _share_of_peak(self) -> float:
        """Returns the learning rate as a share of its peak, which is the same for all groups of parameters."""
        return float(self.schedule.get_last_lr()[0]) / float(self.schedule.base_lrs[0])

    def _mean_over_processes(self) -> dict[str, Tensor]:
        """Returns the sums of losses since the last log line."""
        return {name: self.accelerator.reduce(total, "mean") for name, total in self.loss_sums.items()}

    def _validate(self) -> None:
        with self._averaged_weights() as network:
            scores = self.task.validate(network, self.accelerator)
            if self.task.best_by is not None:
                self.best.offer(scores[self.task.best_by], self.step, network)
        self._record(**scores)

    def _preview(self) -> None:
        with self._averaged_weights() as network:
            if self.accelerator.is_main_process:
                self.task.preview(network, self.output / "previews" / f"step-{self.step:08d}.png")
        self.accelerator.wait_for_everyone()

    def _record(self, **values: float) -> None:
        if self.accelerator.is_main_process:
            self.metrics.append(self.step, **values)
        self.accelerator.log(values, step=self.step)

    @contextmanager
    def _averaged_weights(self) -> Iterator[ModelMixin]:
        """Yields the network in evaluation mode, with the moving average of its weights for the length of a block."""
        network = self.task.network
        self.ema.store(network.parameters())
        self.ema.copy_to(network.parameters())
        network.eval()
        try:
            with torch.no_grad():
                yield network
        finally:
            self.ema.restore(network.parameters())

    def _save(self) -> None:
        self._read_lost_steps()
        self.loss_sums = self._mean_over_processes()  # so that every process can resume from one checkpoint
        if self.accelerator.is_main_process:
            network, scaler = self.task.network, self.accelerator.scaler
            names = {parameter: name for name, parameter in network.named_parameters()}
            checkpoint = Checkpoint(
                step=self.step,
                tensors={
                    "model": network.state_dict(),
                    "ema": dict(zip(names.values(), self.ema.shadow_params)),
                    "optimizer": optimizer_tensors(self.optimizer.optimizer, names),
                    **({"best": self.best.tensors} if self.best.tensors else {}),
                    **({"task": dict(self.task.state)} if self.task.state else {}),
                },
                state={
                    "best": self.best.state(),
                    "skipped": self.skipped.state(),
                    "ema_steps": int(self.ema.optimization_step),
                    "loss_sums": {name: total.item() for name, total in self.loss_sums.items()},
                    "loss_counts": {name: count.item() for name, count in self.loss_counts.items()},
                    "seconds": self.seconds,
                    "scaler": scaler.state_dict() if scaler else None,
                },
            )
            save_checkpoint(self.output / "checkpoints", checkpoint, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _start(self) -> None:
        """Resumes from the newest checkpoint, or starts."""
        if self.accelerator.is_main_process:
            claim(self.output, self.resolved, self.record, image_channels=self.task.train.channels)
        self.accelerator.wait_for_everyone()
        checkpoint = load_latest(self.output / "checkpoints")
        if checkpoint:
            self._restore(checkpoint)
        steps = self.accelerator.gather(torch.tensor([self.step], device=self.accelerator.device)).unique().tolist()
        if len(steps) > 1:
            raise ValueError(
                f"the processes would resume from different steps, {', '.join(map(str, steps))}, since they do not see "
                f"the same {self.output}; give an output folder that all machines share."
            )
        self.schedule = self._make_schedule()
        if self.accelerator.is_main_process:
            self.metrics = MetricsLog(self.output / "metrics.jsonl", self.step)
        self.accelerator.init_trackers("metrics")

    def _restore(self, checkpoint: Checkpoint) -> None:
        network, state = self.task.network, checkpoint.state
        shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in checkpoint.tensors["model"].items()}:
            raise ValueError(
                f"the checkpoint of step {checkpoint.step} in {self.output} belongs to another network than these "
                "options build; resume with the model that the run was started with, or choose another output folder."
            )
        network.load_state_dict(checkpoint.tensors["model"])
        names = {parameter: name for name, parameter in network.named_parameters()}
        for name, average in zip(names.values(), self.ema.shadow_params):
            average.copy_(checkpoint.tensors["ema"][name])
        self.ema.optimization_step = state["ema_steps"]
        restore_optimizer(self.optimizer.optimizer, names, checkpoint.tensors["optimizer"])
        self.best.restore(state["best"], checkpoint.tensors.get("best", {}))
        self.task.state = {**self.task.state, **checkpoint.tensors.get("task", {})}
        self.skipped.restore(state["skipped"])
        device, earlier = self.accelerator.device, dict.fromkeys(state["loss_sums"], state.get("loss_count", 0))
        counts = state.get("loss_counts", earlier)  # checkpoints of earlier versions have one count for all losses
        self.loss_sums = {name: torch.tensor(total, device=device) for name, total in state["loss_sums"].items()}
        self.loss_counts = {name: torch.tensor(count, device=device) for name, count in counts.items()}
        self.seconds = state.get("seconds", 0.0)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = checkpoint.step

    def _make_schedule(self) -> LRScheduler:
        """Makes the schedule from `step` on. It is not prepared, since Accelerate would step it once per process."""
        optimizer, config = self.optimizer.optimizer, self.config
        for group in optimizer.param_groups:
            group["initial_lr"] = group["share"] * config.learning_rate
        if config.schedule == "constant":
            return get_constant_schedule_with_warmup(optimizer, config.warmup_steps, last_epoch=self.step - 1)
        return get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, config.steps, last_epoch=self.step - 1)

    def _lacks_validation(self) -> bool:
        """Returns whether the last step was not validated, since `steps` was lowered to those of a stopped run."""
        if not self.accelerator.is_main_process:
            return False
        rows = read_metrics(self.metrics.path)
        return not any(row["step"] == self.step and "learning_rate" not in row for row in rows)

    def _export(self) -> None:
        if self.accelerator.is_main_process:
            with self._averaged_weights() as network:
                self.best.load_into(network)
                self.task.export(network, self.output, read_metrics(self.metrics.path), self.resolved)
        self.accelerator.wait_for_everyone()
