"""Arrays in the memory of a GPU: pointer, shape, strides, and whose memory it is.

Note [Why not PyCUDA's pool and GPUArray]
Read in the sources of PyCUDA 2026.1. Its memory, streams and events are freed by destructors, which make the context
current only on the thread that made it, and else warn and leak (scoped_context_activation in cuda.hpp). Frames die on
whichever of 16 threads drops them last.

tools.DeviceMemoryPool keeps blocks by size and knows no streams: what one lane drops, another may get while the first
one's stream still reads it. One pool a lane would do, but for its way back: the first block that comes back takes the
context that is current, and where none is the destructor throws, which ends the process (mempool.cpp, mempool.hpp).
Nor has it a limit for what it keeps.

gpuarray.GPUArray says "stream": None in __cuda_array_interface__, so that who reads it may do so before it is written;
a[4:2] has two rows instead of none; strides are not checked against the memory that there is. Its arithmetic, which
is most of it, is not needed. What is used of PyCUDA is what calls the driver: contexts, streams, events, mem_alloc,
pagelocked_empty and copies.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

if TYPE_CHECKING:
    from dfengine.gpu.lanes import Lane

__all__ = ["Block", "DeviceArray"]


class DeviceArray:
    """Memory on the device, or a view of some; goes back to its lane when the last view dies (Note [Ownership]).

    Strides are in bytes, none is negative. Foreign memory is wrapped by giving its ``owner``, which is kept alive.
    ``lane``: on whose stream it is worked on. ``available``: bytes from ``pointer`` on that views may use.
    """

    def __init__(
        self,
        pointer: int,
        shape: tuple[int, ...],
        dtype: DTypeLike,
        *,
        strides: tuple[int, ...] | None = None,
        owner: object,
        lane: Lane,
        available: int | None = None,
    ) -> None:
        self.pointer = int(pointer)
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.strides = tuple(strides) if strides is not None else _contiguous(self.shape, self.dtype.itemsize)
        if len(self.strides) != len(self.shape) or any(s < 0 for s in (*self.strides, *self.shape)):
            raise ValueError(f"strides {self.strides} do not fit shape {self.shape}; one each, none negative")
        self.lane = lane
        self._owner = owner
        self._available = available if available is not None else self.span
        if self.span > self._available:
            raise ValueError(f"a view of {self.span} bytes does not fit into the {self._available} bytes there are")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last."""
        if self.size == 0:
            return 0
        return sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        return self.row_bytes == self.nbytes

    @property
    def row_bytes(self) -> int:
        """Length of the longest pieces without a gap; all bytes if the array is C-contiguous."""
        run = self.dtype.itemsize
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1:
                if stride != run:
                    break
                run *= n
        return run

    def pitch(self, row_bytes: int) -> int:
        """The distance at which rows of this length lie. Raises ValueError if it is not the same throughout."""
        pitch, expected, run = row_bytes, 0, self.dtype.itemsize
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n == 1:
                continue
            if run < row_bytes:
                run *= n  # within a row
            elif not expected:
                pitch, expected = stride, stride * n
            elif stride != expected:
                break
            else:
                expected *= n
        else:
            if run == row_bytes:
                return pitch
        raise ValueError(
            f"only rows that lie one pitch apart can be copied; got shape {self.shape} with strides {self.strides}"
        )

    def view(
        self,
        *,
        offset: int = 0,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
        dtype: DTypeLike | None = None,
    ) -> DeviceArray:
        """Other eyes on the same memory, ``offset`` bytes from here. Raises ValueError where it would leave it."""
        return DeviceArray(
            self.pointer + offset, shape, dtype if dtype is not None else self.dtype, strides=strides,
            owner=self._owner, lane=self.lane, available=self._available - offset,
        )  # fmt: skip

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> DeviceArray:
        start, stop, step = rows.indices(len(self))
        if step < 1:
            raise ValueError(f"the step must be positive, got {step}")
        return self.view(
            offset=start * self.strides[0] if start < stop else 0,
            shape=(len(range(start, stop, step)), *self.shape[1:]),
            strides=(self.strides[0] * step, *self.strides[1:]),
        )

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": self.strides,
            "stream": self.lane.stream,
        }


class Block:
    """Memory of a lane in use; given back to its free list when it dies (Note [Ownership] in dfengine/gpu/lanes.py)."""

    __slots__ = ("_allocation", "_home", "pointer")

    def __init__(self, allocation: Any, home: deque[Any]) -> None:
        self._allocation, self._home = allocation, home
        self.pointer = int(allocation)

    def __del__(self) -> None:
        self._home.append(self._allocation)


def _contiguous(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))
