"""What goes into a network of each kind and what comes out; whether one is of its kind is found out before it runs.

The shapes that a compiled network states are compared, which takes .1 ms. A run of two rows would tell hardly more and
costs each start 19 to 86 ms a network, measured on the packaged ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from dfengine.bundle import ModelSpec
from dfengine.errors import InferenceError

__all__ = ["Seen", "check_network", "input_shapes", "output_shapes"]

Shape = tuple[int, ...]  # without the batch; 0 is any size
Seen = tuple[int | None, ...] | None  # with the batch; None is what is only known when it runs

# facenet-pytorch's order: probability and offsets of the box, at each place of the picture for P-Net; landmarks.
_DETECTOR_OUTPUTS: dict[str, tuple[Shape, ...]] = {
    "pnet": ((0, 0), (4, 0, 0)),
    "rnet": ((), (4,)),
    "onet": ((), (4,), (10,)),
}


def input_shapes(spec: ModelSpec) -> tuple[Shape, ...]:
    """Crops or pictures, by clip or alone, and the log-mel for members that hear."""
    clip = () if spec.kind in ("frame", "detector") else (spec.clip_frames,)
    sound = ((spec.audio.bands, spec.audio.frames),) if spec.kind == "audio" else ()
    return ((*clip, 3, *spec.crop.input_hw), *sound)


def output_shapes(spec: ModelSpec) -> tuple[Shape, ...]:
    """One logit, or what the networks of a detector give."""
    return _DETECTOR_OUTPUTS.get(spec.name, ()) if spec.kind == "detector" else ((1,),)


def check_network(name: str, spec: ModelSpec, inputs: Sequence[Seen], outputs: Sequence[Seen]) -> None:
    """Raises InferenceError if a network is not one of its kind. ``name`` is for the message.

    The batch must be of any size. Axes of length 1 are not counted in outputs: (B, 1) is as good as (B,).
    """
    wanted_in, wanted_out = input_shapes(spec), output_shapes(spec)
    if len(inputs) != len(wanted_in) or not all(map(_takes, inputs, wanted_in)):
        raise _other_kind(name, spec, "inputs", inputs, wanted_in)
    if len(outputs) != len(wanted_out) or not all(map(_gives, outputs, wanted_out)):
        raise _other_kind(name, spec, "outputs", outputs, wanted_out)


def _takes(seen: Seen, wanted: Shape) -> bool:
    return seen is None or (bool(seen) and seen[0] is None and _agree(seen[1:], wanted))


def _gives(seen: Seen, wanted: Shape) -> bool:
    if seen is None:
        return True
    counted = tuple(n for n in seen[1:] if n != 1)
    return bool(seen) and (_agree(counted, tuple(n for n in wanted if n != 1)) or _agree(seen[1:], wanted))


def _agree(seen: tuple[int | None, ...], wanted: Shape) -> bool:
    return len(seen) == len(wanted) and all(n is None or m in (0, n) for n, m in zip(seen, wanted, strict=True))


def _other_kind(
    name: str, spec: ModelSpec, what: str, seen: Sequence[Seen], wanted: tuple[Shape, ...]
) -> InferenceError:
    expected = _show([(None, *(n or None for n in shape)) for shape in wanted])
    return InferenceError(
        f"network {name} has the {what} {_show(seen)}, one of kind {spec.kind!r} has {expected}; export it again, or "
        "correct what bundle.json says of it",
        stage="runtime",
    )


def _show(shapes: Sequence[Seen]) -> str:
    """((None, 3, 8, 8),) -> "(?, 3, 8, 8)"."""
    return " and ".join("?" if s is None else f"({', '.join('?' if n is None else str(n) for n in s)})" for s in shapes)
