"""Trains the network: ``python -m training.train --faces runs/faces.npz --out runs/default --seed 0 --minutes 55``.

A batch holds pairs, each a real crop and its fake. The learning rate follows the clock: it warms up and then falls as a
cosine to zero when the minutes are over. What is kept and evaluated is the moving average of the weights. A checkpoint
is two files, tensors and JSON. ``--resume`` goes on from the last one: batches and weights go on as if there had been
no break; the learning rate does too, as far as two runs ever spend the same seconds on a step.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from torch.nn import functional as F

from .degrade import crop, crop_masks, jitter_boxes, random_camera, random_codec, random_face_px, shrink, store
from .faces import FaceSet, split
from .fakes import make_pairs
from .metrics import auc
from .model import MASK_HW, SPEC, FaceNet, make_model

PAIRS = 32  # a batch; 64 crops are enough for stable batch statistics
GROUP = 8  # pairs that share a codec setting: one encoder is opened for 16 images
SWAP_RATIO = 0.3  # the rest are self-blended images, which the literature finds to generalise better
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.05  # usual for AdamW from scratch; not tuned
MASK_WEIGHT = 2.0  # a guess where faces are costs .26 for the mask, and a guess costs .69 for the label
# Degradation grows to its full strength over so many steps, half of a run. Without this the held-out AUC was .516 after
# 300 steps, with it .529.
RAMP_STEPS = 1200
WARM_UP = 0.03  # share of the run
EMA_DECAY = 0.995  # averages about the last 200 of some 3,000 steps
EPOCH_STEPS = 100  # between two looks at the held-out people
HELD_OUT_PAIRS = 256


@dataclass
class Progress:
    """Everything about a run that is not a tensor."""

    seed: int
    step: int = 0
    seconds: float = 0.0  # spent training, over all sittings


@dataclass(frozen=True, eq=False)
class Batch:
    """2 B crops of B pairs: the reals, then their fakes in the same order."""

    crops: Tensor  # (2 B, 3, H, W)
    labels: Tensor  # (2 B,), 1 is fake
    masks: Tensor  # (2 B, 1, 9, 9), share of each cell that comes from the source; 0 in reals


def make_batch(faces: FaceSet, rows: np.ndarray, severity: float, rng: Generator) -> Batch:
    """Makes a pair from each of the photos ``rows``, (B,), degraded up to ``severity``."""
    others = torch.randint(len(faces), (len(rows),), generator=rng).numpy()
    donors = np.where(torch.rand(len(rows), generator=rng).numpy() < SWAP_RATIO, others, rows)
    crops, masks = [], []
    for start in range(0, len(rows), GROUP):
        part = slice(start, start + GROUP)
        pairs = make_pairs(*photos(faces, rows[part]), *photos(faces, donors[part])[::2], rng)
        boxes = jitter_boxes(pairs.xyxy, rng)
        both = torch.stack([pairs.real, pairs.fake], dim=1).flatten(0, 1)  # real, fake, real, fake, ...
        small, scale = shrink(both, random_face_px(severity, rng))
        stored = store(random_camera(small, severity, rng), random_codec(severity, rng))
        crops.append(crop(stored, boxes.repeat_interleave(2, dim=0) * scale, SPEC))
        masks.append(crop_masks(pairs.mask, boxes, SPEC, MASK_HW))
    batch, mask = torch.from_numpy(np.concatenate(crops)), torch.cat(masks)
    return Batch(
        torch.cat([batch[0::2], batch[1::2]]).contiguous(memory_format=torch.channels_last),
        torch.arange(2).repeat_interleave(len(rows)).float(),
        torch.cat([torch.zeros_like(mask), mask]),
    )


def batch_of_step(faces: FaceSet, seed: int, step: int) -> Batch:
    """The batch of one step; it depends on the seed and the step only, so a run can be resumed anywhere."""
    rng = Generator().manual_seed(seed * 1_000_003 + step)
    rows = torch.randint(len(faces), (PAIRS,), generator=rng).numpy()
    return make_batch(faces, rows, min(step / RAMP_STEPS, 1.0), rng)


def stream_batches(faces: FaceSet, progress: Progress) -> Iterator[Batch]:
    """The batches from this step on; a thread makes the next ones while the network learns from this one."""
    with ThreadPoolExecutor(1) as worker:
        steps = itertools.count(progress.step)
        ready = deque(worker.submit(batch_of_step, faces, progress.seed, next(steps)) for _ in range(2))
        try:
            while True:
                yield ready.popleft().result()
                ready.append(worker.submit(batch_of_step, faces, progress.seed, next(steps)))
        finally:
            for batch in ready:
                batch.cancel()


def make_held_out_batches(faces: FaceSet) -> list[Batch]:
    """Fixed pairs of the people held out, degraded at random as the training pairs are."""
    rng = Generator().manual_seed(0)
    return [
        make_batch(faces, torch.randint(len(faces), (PAIRS,), generator=rng).numpy(), 1.0, rng)
        for _ in range(HELD_OUT_PAIRS // PAIRS)
    ]


class Trainer:
    """A network, its moving average and its optimiser, from the first step or from a checkpoint."""

    def __init__(self, seed: int, seconds: float) -> None:
        self.seconds = seconds
        self.progress = Progress(seed)
        self.model, self.average = make_model(seed), make_model(seed)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    @property
    def done(self) -> bool:
        return self.progress.seconds >= self.seconds

    def step(self, batch: Batch) -> float:
        """One step on one batch; returns the loss."""
        share = min(self.progress.seconds / self.seconds, 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_factor(share)
        torch.manual_seed(self.progress.step)  # dropout
        self.model.train()
        logits, masks = self.model.forward_with_mask(batch.crops)
        loss = batch_loss(logits.squeeze(1), masks, batch)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.progress.step += 1
        # An average that starts at random weights would drag them along: it grows with the run.
        decay = min(EMA_DECAY, self.progress.step / (self.progress.step + 10))
        with torch.no_grad():
            for mean, new in zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True):
                mean.lerp_(new, 1 - decay) if mean.is_floating_point() else mean.copy_(new)
        return loss.item()

    def save(self, folder: Path) -> None:
        """Writes checkpoint.safetensors and checkpoint.json; either the old or the new ones are whole."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        names = [name for name, _ in self.model.named_parameters()]
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{names[index]}.{k}": v for k, v in state.items()}
        tensors["step"] = torch.tensor(self.progress.step)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "checkpoint.new")
        (folder / "checkpoint.json").write_text(json.dumps(asdict(self.progress), indent=2) + "\n")
        (folder / "checkpoint.new").replace(folder / "checkpoint.safetensors")

    def load(self, folder: Path) -> None:
        tensors = load_file(folder / "checkpoint.safetensors")
        self.progress = Progress(**json.loads((folder / "checkpoint.json").read_text()))
        if tensors["step"] != self.progress.step:
            raise ValueError(f"{folder}: checkpoint.json is of step {self.progress.step}, the tensors are of another")
        self.model.load_state_dict(_below(tensors, "model."))
        self.average.load_state_dict(_below(tensors, "average."))
        state = self.optimiser.state_dict()
        for index, (name, _) in enumerate(self.model.named_parameters()):
            state["state"][index] = _below(tensors, f"optimiser.{name}.")
        self.optimiser.load_state_dict(state)


def load_average(folder: Path) -> FaceNet:
    """The network to use from a run's checkpoint, in eval mode."""
    model = make_model(0)
    model.load_state_dict(_below(load_file(folder / "checkpoint.safetensors"), "average."))
    return model.eval()


def batch_loss(logits: Tensor, masks: Tensor, batch: Batch) -> Tensor:
    """Cross entropy of label and mask, and of the order within each pair.

    Two crops of a pair differ in nothing but the fake, so their order is learned long before a threshold that fits all
    photos: after 300 steps without this term 65 % of the pairs were in order at an AUC of .53.
    """
    real, fake = logits.chunk(2)
    label = F.binary_cross_entropy_with_logits(logits, batch.labels)
    mask = F.binary_cross_entropy_with_logits(masks, batch.masks)
    return label + F.softplus(real - fake).mean() + MASK_WEIGHT * mask


def learning_rate_factor(share: float) -> float:
    """``share`` of the run that is over -> factor in 0..1: warm-up, then half a cosine."""
    if share < WARM_UP:
        return (share + 1e-3) / (WARM_UP + 1e-3)
    return 0.5 + 0.5 * math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP))


@torch.no_grad()
def predict(model: FaceNet, crops: Tensor) -> np.ndarray:
    """Logits of crops (B, 3, H, W), (B,)."""
    return model.eval()(crops.contiguous(memory_format=torch.channels_last)).squeeze(1).numpy()


def held_out_auc(model: FaceNet, batches: list[Batch]) -> float:
    logits = np.concatenate([predict(model, b.crops) for b in batches])
    return auc(np.concatenate([b.labels.numpy() for b in batches]), logits)


def photos(faces: FaceSet, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """(RGB in 0..1 (B, 3, S, S), boxes, landmarks) of some rows."""
    rgb = torch.from_numpy(faces.rgb[rows]).permute(0, 3, 1, 2).float() / 255
    return rgb, torch.from_numpy(faces.xyxy[rows]), torch.from_numpy(faces.landmarks[rows])


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faces", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=55, help="on the clock of one core, all sittings together")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(1)
    train, held_out = split(FaceSet.load(args.faces))
    trainer = Trainer(args.seed, args.minutes * 60)
    if args.resume:
        trainer.load(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "command.json").write_text(json.dumps(vars(args), default=str, indent=2) + "\n")
    batches = make_held_out_batches(held_out)
    metrics = csv.writer(open(args.out / "metrics.csv", "a" if args.resume else "w", newline="", buffering=1))  # noqa: SIM115
    if not args.resume:
        metrics.writerow(["step", "samples", "minutes", "train_loss", "held_out_auc"])
    losses: list[float] = []
    start = time.monotonic()
    for batch in stream_batches(train, trainer.progress):
        losses.append(trainer.step(batch))
        now = time.monotonic()
        trainer.progress.seconds += now - start
        start = now
        step, minutes = trainer.progress.step, trainer.progress.seconds / 60
        if step % EPOCH_STEPS == 0 or trainer.done:
            trainer.save(args.out)
            row = [
                step,
                step * 2 * PAIRS,
                f"{minutes:.2f}",
                f"{np.mean(losses):.4f}",
                f"{held_out_auc(trainer.average, batches):.4f}",
            ]
            metrics.writerow(row)
            print("step {}  samples {}  minutes {}  loss {}  held-out AUC {}".format(*row), flush=True)
            losses.clear()
        if trainer.done:
            break


if __name__ == "__main__":
    main()
