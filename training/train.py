"""Trains what a recipe says: ``python -m training.train RECIPE.toml --faces DIR --out RUN [--resume]``.

RUN gets recipe.json, metrics.csv and curves.png (a row an epoch), last.safetensors (everything a run needs to go on)
and best.safetensors (the network with the lowest validation log loss so far; what training.evaluate and training.export
take). A recipe with members makes one such folder for each, RUN/NAME.

Everything that chance decides depends on the seed, the epoch and the step alone, so a run that was killed at any moment
and goes on with ``--resume`` ends with the numbers of an unbroken one. ``torchrun`` runs it on several processes or
nodes: each takes its share of every batch, and the gradients are those of one process with the whole batch, as far as
the network has no batch statistics and no dropout, and train.order_weight is 0 (each process sees the pairs of its own
share).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dfengine.bundle import Calibration
from dfengine.errors import DfengineError
from dfengine.settings import to_plain
from dfengine.stages.aggregate import sigmoid

from . import metrics
from .checkpoint import load_checkpoint, save_checkpoint, write_atomically
from .data import Batch, Batches
from .distributed import World
from .errors import CheckpointError, TrainingError
from .models import Network, make_network
from .optimise import Average, Schedule, label_loss, make_optimiser, mask_loss, order_loss
from .progress import Bar, Done, write_history
from .recipe import Recipe, load_recipe
from .scoring import (
    Trained,
    load_weights,
    make_audio_loader,
    make_bundle,
    make_evaluation_batches,
    predict,
    score_videos,
)
from .table import FaceTable

LAST, BEST = "last.safetensors", "best.safetensors"

# Keys of a recipe that say how the work is done and not what comes of it: a run may go on with others.
NOT_COMPUTED_WITH = frozenset({"data.workers", "train.checkpoint_steps"})


class Trainer:
    """A network, its optimiser, schedule and average, from the first step or from a checkpoint."""

    def __init__(self, recipe: Recipe, name: str, faces: str, steps: int, world: World) -> None:
        """``faces``: sha256 of the table. ``steps``: of an epoch."""
        self.recipe, self.name, self.faces, self.world, self.settings = recipe, name, faces, world, recipe.train
        self.done = Done()
        network = make_network(recipe.model, self.settings.seed).to(world.device)
        self.network = network
        self.forward: nn.Module = network if world.size == 1 else DistributedDataParallel(network)
        self.average = Average(network, self.settings.ema_decay) if self.settings.ema_decay else None
        self.optimiser = make_optimiser(network, self.settings)
        self.schedule = Schedule(self.optimiser, self.settings, steps * self.settings.epochs)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.settings.amp == "fp16")
        self.seen = torch.zeros(0, 3)  # of this epoch: loss, logit, label of every row

    @property
    def kept(self) -> Network:
        """The network that is validated and kept."""
        return self.average.network if self.average else self.network

    def is_done(self) -> bool:
        s = self.settings
        return self.done.epoch >= s.epochs or bool(s.early_stop and self.done.stale >= s.early_stop)

    def step(self, batch: Batch) -> float:
        """One step on this process's share of a batch; returns the loss of labels and masks over the whole of it."""
        s, world, done = self.settings, self.world, self.done
        torch.manual_seed((s.seed * 1_000_003 + done.total_steps) * 4099 + world.rank)  # dropout
        self.forward.train()
        logits, losses = self._losses(batch)
        mine = torch.stack([losses.detach(), logits.detach(), batch.y, batch.weight], dim=1)
        whole = world.gather_rows(mine, s.batch)
        # DDP takes the mean over processes of these sums: the weighted mean over the whole batch.
        loss = (losses * batch.weight).sum() / whole[:, 3].sum() * world.size
        if s.order_weight:
            loss = loss + s.order_weight * order_loss(logits, batch.y, batch.source_id)
        self._descend(loss)
        done.step += 1
        done.total_steps += 1
        if self.average:
            self.average.update(self.network, done.total_steps)
        self.seen = torch.cat([self.seen, whole[:, :3].cpu()])
        mean = float((whole[:, 0] * whole[:, 3]).sum() / whole[:, 3].sum())
        if not np.isfinite(mean):
            raise TrainingError(
                f"the loss is {mean} at step {done.total_steps}; lower train.lr, or set train.clip_norm"
            )
        return mean

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and losses of labels and masks of this process's rows, both (b,)."""
        s = self.settings
        kind = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[s.amp]
        with torch.autocast(self.world.device.type, kind, enabled=s.amp != "off"):
            out = self.forward(batch.x, batch.audio)
        logits: Tensor = (out[0] if s.mask_weight else out).float().squeeze(1)
        losses = label_loss(logits, batch.y, s.label_smoothing)
        if s.mask_weight:
            if batch.mask is None:
                raise TrainingError("train.mask_weight needs pseudo-fakes, and the batch has none; set fakes.ratio")
            losses = losses + s.mask_weight * mask_loss(out[1].float(), batch.mask)
        return logits, losses

    def _descend(self, loss: Tensor) -> None:
        self.optimiser.zero_grad()
        self.scaler.scale(loss).backward()
        if self.settings.clip_norm:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.clip_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # else the gradients overflowed float16, and no step was taken
            self.schedule.after_step()

    def end_epoch(self, validation: dict[str, float]) -> bool:
        """Notes the epoch's numbers; returns whether its network is the best so far."""
        loss, logits, labels = (c.numpy() for c in self.seen.double().T)
        labels = (labels > 0.5).astype(float)  # mixed ones count as what they are more of
        row: dict[str, float] = {
            "epoch": self.done.epoch + 1,
            "lr": self.optimiser.param_groups[0]["lr"],
            "loss": float(loss.mean()),  # of labels and masks, without the weights of classes
            "log_loss": metrics.log_loss(labels, sigmoid(logits)),
            "accuracy": metrics.accuracy(labels, sigmoid(logits)),
            "auc": metrics.auc(labels, logits),
        }
        self.done.history.append(row | {f"val_{k}": v for k, v in validation.items()})
        self.schedule.after_epoch(validation["log_loss"])
        better = self.done.best is None or validation["log_loss"] < self.done.best
        self.done.best = validation["log_loss"] if better else self.done.best
        self.done.stale = 0 if better else self.done.stale + 1
        self.done.epoch, self.done.step, self.seen = self.done.epoch + 1, 0, self.seen[:0]
        return better

    def save(self, path: Path) -> None:
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()} | {"seen": self.seen}
        if self.average:
            tensors |= {f"average.{k}": v for k, v in self.average.network.state_dict().items()}
        state = self.optimiser.state_dict()
        numbers: dict[str, Any] = {}  # what an optimiser keeps of a parameter beside tensors
        for index, values in state["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimiser.{index}.{key}"] = value
                else:
                    numbers[f"{index}.{key}"] = value
        save_checkpoint(
            path,
            tensors,
            {
                "kind": "last",
                "name": self.name,
                "recipe": to_plain(self.recipe),
                "faces": self.faces,
                "done": asdict(self.done),
                "optimiser": {"groups": state["param_groups"], "numbers": numbers},
                "schedule": self.schedule.state_dict(),
                "scaler": self.scaler.state_dict(),
            },
        )

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint. Raises CheckpointError if it is of another recipe or of other faces."""
        tensors, state = load_checkpoint(path)
        if state.get("kind") != "last":
            raise CheckpointError("this is no state of a run to go on from; give a RUN folder that has one", path=path)
        check_same_recipe(state["recipe"], to_plain(self.recipe), path)
        if state["faces"] != self.faces:
            raise CheckpointError(
                "the run began with other faces (faces.parquet has changed); go on with the same, or begin in "
                "another folder",
                path=path,
            )
        load_weights(self.network, _below(tensors, "network."), path)
        if self.average:
            load_weights(self.average.network, _below(tensors, "average."), path)
        per_parameter: dict[int, dict[str, Any]] = {}
        for key, value in _below(tensors, "optimiser.").items():
            per_parameter.setdefault(int(key.split(".")[0]), {})[key.split(".", 1)[1]] = value
        for key, value in state["optimiser"]["numbers"].items():
            per_parameter.setdefault(int(key.split(".")[0]), {})[key.split(".", 1)[1]] = value
        self.optimiser.load_state_dict({"state": per_parameter, "param_groups": state["optimiser"]["groups"]})
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.done, self.seen = Done(**state["done"]), tensors["seen"]

    def save_best(self, path: Path, about: dict[str, Any]) -> None:
        """The network alone, for training.evaluate and training.export."""
        state: dict[str, Any] = {
            "kind": "best",
            "name": self.name,
            "recipe": to_plain(self.recipe),
            "torch": torch.__version__,
        }
        state |= {"epochs": self.done.epoch, "steps": self.done.total_steps, "validation": self.done.history[-1]}
        save_checkpoint(path, self.kept.state_dict(), state | about)


def check_same_recipe(former: Any, now: Any, path: Path, where: str = "") -> None:
    """Raises CheckpointError, naming the first key that differs and has a say in the numbers."""
    if isinstance(former, dict) and isinstance(now, dict):
        for key in sorted(former.keys() | now.keys()):
            check_same_recipe(former.get(key), now.get(key), path, f"{where}.{key}" if where else key)
    elif former != now and where not in NOT_COMPUTED_WITH:
        raise CheckpointError(
            f"the run began with {where} = {former!r}, the recipe says {now!r}; go on with the same recipe, or begin "
            "in another folder",
            path=path,
        )


class Validation:
    """The validation split, scored as the engine would without a calibration."""

    def __init__(self, table: FaceTable, trained: Trained, world: World) -> None:
        self._trained, self._world = trained, world
        self._batches = make_evaluation_batches(table, trained, "val", world.device, rank=world.rank, world=world.size)
        self._bundle = make_bundle([trained], [trained.spec])

    def measure(self) -> dict[str, float]:
        """Log loss, accuracy and AUC by video, the same in all processes."""
        mine = predict(self._trained.network, self._batches.epoch(0))
        predictions = {self._trained.name: self._world.gather_predictions(mine)}
        scored = score_videos(self._batches.faces, predictions, self._bundle)
        p_fake = scored.logits.p_fake(Calibration())
        return {
            "log_loss": metrics.log_loss(scored.label, p_fake),
            "accuracy": metrics.accuracy(scored.label, p_fake),
            "auc": metrics.auc(scored.label, p_fake),
        }


def train(
    recipe: Recipe, name: str, faces: Path, out: Path, *, resume: bool = False, world: World | None = None
) -> dict[str, float]:
    """Trains one network and returns its best epoch's numbers."""
    world = world or World()
    table = FaceTable.load(faces)
    spec, s = recipe.model.spec(name), recipe.train
    batches = Batches(
        table,
        spec.crop,
        recipe.data,
        recipe.augment,
        recipe.fakes,
        split="train",
        seed=s.seed,
        batch=s.batch,
        device=world.device,
        clip_frames=spec.clip_frames if spec.takes_clips else None,
        audio=make_audio_loader(spec),
        rank=world.rank,
        world=world.size,
    )
    digest = hashlib.sha256((faces / "faces.parquet").read_bytes()).hexdigest()
    trainer = Trainer(recipe, name, digest, len(batches), world)
    if (out / LAST).exists():
        if not resume:
            raise TrainingError("there is a run already; go on with --resume, or give another folder", path=out)
        trainer.load(out / LAST)
    validation = Validation(table, Trained(name, trainer.kept, recipe, {}, ""), world)
    about = describe_data(table)
    if world.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(to_plain(recipe), indent=2, ensure_ascii=False)
        write_atomically(out / "recipe.json", (text + "\n").encode())
    with Bar(name, s.epochs, len(batches), silent=world.rank > 0) as bar:
        while not trainer.is_done():
            for batch in batches.epoch(trainer.done.epoch, start=trainer.done.step):
                loss = trainer.step(batch)
                bar.show(trainer.done, loss, s.batch * spec.clip_frames)
                if world.rank == 0 and trainer.done.step % s.checkpoint_steps == 0:
                    trainer.save(out / LAST)
            for network in (trainer.network, trainer.kept):  # batch statistics: what is validated is what is saved
                world.share_buffers(network)
            better = trainer.end_epoch(validation.measure())
            if world.rank == 0:
                if better:
                    trainer.save_best(out / BEST, about)
                trainer.save(out / LAST)
                write_history(trainer.done.history, out)
            world.barrier()
            bar.end_epoch(trainer.done)
    return min(trainer.done.history, key=lambda row: row["val_log_loss"])


def describe_data(table: FaceTable) -> dict[str, Any]:
    """What a bundle says about where its networks come from."""
    rows = table.split("train").faces
    videos = {path: (dataset, label) for path, dataset, label in zip(rows.path, rows.dataset, rows.label, strict=True)}
    counts: dict[str, dict[str, int]] = {}
    for dataset, label in videos.values():
        counts.setdefault(dataset, {"real": 0, "fake": 0})["fake" if label == 1 else "real"] += 1
    return {"data": counts, "sources": len(set(rows.source_id)), "faces": len(rows)}


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--faces", type=Path, required=True, help="what training.faces wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="wins over the recipe")
    parser.add_argument("--member", help="train only this member of an ensemble")
    parser.add_argument("--resume", action="store_true", help="go on where a run stopped, or begin")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    try:
        recipes = load_recipe(args.recipe, args.set)
        if args.member is not None and args.member not in recipes:
            raise TrainingError(f"there is no member {args.member!r}, only {', '.join(recipes)}", path=args.recipe)
        world = World.join(args.device)
        for name, recipe in recipes.items():
            if args.member in (None, name):
                out = args.out if len(recipes) == 1 else args.out / name
                train(recipe, name, args.faces, out, resume=args.resume, world=world)
    except DfengineError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command with --resume goes on from the last checkpoint")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
