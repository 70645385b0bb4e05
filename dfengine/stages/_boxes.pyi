import numpy as np
from numpy.typing import NDArray

def propose(
    prob: NDArray[np.float32], reg: NDArray[np.float32], scale: float, threshold: float
) -> tuple[NDArray[np.int32], NDArray[np.float32]]: ...
def nms(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    group: NDArray[np.int32],
    max_overlap: float,
    *,
    of_smaller: bool = False,
    pixel: float = 0.0,
) -> NDArray[np.int64]: ...
def regress(boxes: NDArray[np.float32], reg: NDArray[np.float32], pixel: float = 0.0) -> None: ...
def make_square(boxes: NDArray[np.float32]) -> None: ...
def iou_matrix(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]: ...
