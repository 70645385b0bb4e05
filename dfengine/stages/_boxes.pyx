# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Box work of the MTCNN cascade and of the tracker. All loops run without the GIL.

Boxes are xyxy float32. Coordinates follow the cascade's own conventions where noted: they are what its
weights were trained with, and they end in dfengine.stages.detect.
"""
import numpy as np

from libc.math cimport floorf


def propose(const float[:, :, ::1] prob, const float[:, :, :, ::1] reg, double scale, double threshold):
    """Decodes one pyramid level's P-Net output.

    prob: (N, H, W) face probability. reg: (N, 4, H, W) box regression.
    Returns image (P,) int32 and rows (P, 9) float32: x1 y1 x2 y2 score dx1 dy1 dx2 dy2, in full-resolution
    pixels, floored as in the original (stride 2, cell 12).
    """
    cdef Py_ssize_t n = prob.shape[0], h = prob.shape[1], w = prob.shape[2]
    cdef Py_ssize_t i, y, x, count = 0, k = 0
    cdef float t = threshold, s = scale
    with nogil:
        for i in range(n):
            for y in range(h):
                for x in range(w):
                    if prob[i, y, x] >= t:
                        count += 1
    image = np.empty(count, np.int32)
    rows = np.empty((count, 9), np.float32)
    cdef int[::1] image_v = image
    cdef float[:, ::1] rows_v = rows
    cdef int j
    with nogil:
        for i in range(n):
            for y in range(h):
                for x in range(w):
                    if prob[i, y, x] >= t:
                        image_v[k] = <int>i
                        rows_v[k, 0] = floorf((2 * x + 1) / s)
                        rows_v[k, 1] = floorf((2 * y + 1) / s)
                        rows_v[k, 2] = floorf((2 * x + 12) / s)
                        rows_v[k, 3] = floorf((2 * y + 12) / s)
                        rows_v[k, 4] = prob[i, y, x]
                        for j in range(4):
                            rows_v[k, 5 + j] = reg[i, j, y, x]
                        k += 1
    return image, rows


def nms(const float[:, :] boxes, const float[:] scores, const int[:] group, double max_overlap,
        *, bint of_smaller=False, double pixel=0.0):
    """Greedy non-maximum suppression within groups.

    Overlap is intersection over union, or over the smaller box (``of_smaller``). ``pixel`` is added to every
    width and height: 1.0 gives the inclusive boxes of the cascade's last stage. Returns the kept indices,
    int64, by descending score (equal scores: the earlier first).
    """
    cdef Py_ssize_t n = boxes.shape[0], a, b, i, j
    order_np = np.argsort(-np.asarray(scores), kind="stable")
    # Grouped order: a box is only compared within its group, so that cost is the sum of squares by group.
    order_np = order_np[np.argsort(np.asarray(group)[order_np], kind="stable")]
    cdef long long[::1] order = order_np.astype(np.int64)
    dead_np = np.zeros(n, np.uint8)
    cdef unsigned char[::1] dead = dead_np
    cdef double area_a, area_b, iw, ih, inter, base
    with nogil:
        for a in range(n):
            i = order[a]
            if dead[i]:
                continue
            area_a = (boxes[i, 2] - boxes[i, 0] + pixel) * (boxes[i, 3] - boxes[i, 1] + pixel)
            for b in range(a + 1, n):
                j = order[b]
                if group[j] != group[i]:
                    break
                if dead[j]:
                    continue
                iw = min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0]) + pixel
                ih = min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1]) + pixel
                if iw <= 0 or ih <= 0:
                    continue
                inter = iw * ih
                area_b = (boxes[j, 2] - boxes[j, 0] + pixel) * (boxes[j, 3] - boxes[j, 1] + pixel)
                base = min(area_a, area_b) if of_smaller else area_a + area_b - inter
                if base > 0 and inter / base > max_overlap:
                    dead[j] = 1
    kept = np.flatnonzero(dead_np == 0)
    return kept[np.argsort(-np.asarray(scores)[kept], kind="stable")]


def regress(float[:, ::1] boxes, const float[:, :] reg, double pixel=0.0):
    """Moves xyxy ``boxes`` (N, 4) by ``reg`` (N, 4), in units of their width and height (+ ``pixel``), in place."""
    cdef Py_ssize_t n = boxes.shape[0], i
    cdef float w, h
    with nogil:
        for i in range(n):
            w = boxes[i, 2] - boxes[i, 0] + pixel
            h = boxes[i, 3] - boxes[i, 1] + pixel
            boxes[i, 0] += reg[i, 0] * w
            boxes[i, 1] += reg[i, 1] * h
            boxes[i, 2] += reg[i, 2] * w
            boxes[i, 3] += reg[i, 3] * h


def make_square(float[:, ::1] boxes):
    """Grows the shorter side of each xyxy box (N, 4) about its centre, in place."""
    cdef Py_ssize_t n = boxes.shape[0], i
    cdef float w, h, side
    with nogil:
        for i in range(n):
            w = boxes[i, 2] - boxes[i, 0]
            h = boxes[i, 3] - boxes[i, 1]
            side = max(w, h)
            boxes[i, 0] = boxes[i, 0] + w * 0.5 - side * 0.5
            boxes[i, 1] = boxes[i, 1] + h * 0.5 - side * 0.5
            boxes[i, 2] = boxes[i, 0] + side
            boxes[i, 3] = boxes[i, 1] + side


def iou_matrix(const float[:, :] a, const float[:, :] b):
    """Intersection over union of every pair: (A, 4), (B, 4) xyxy -> (A, B) float32."""
    cdef Py_ssize_t n = a.shape[0], m = b.shape[0], i, j
    out = np.zeros((n, m), np.float32)
    cdef float[:, ::1] out_v = out
    cdef float iw, ih, inter, union_
    with nogil:
        for i in range(n):
            for j in range(m):
                iw = min(a[i, 2], b[j, 2]) - max(a[i, 0], b[j, 0])
                ih = min(a[i, 3], b[j, 3]) - max(a[i, 1], b[j, 1])
                if iw > 0 and ih > 0:
                    inter = iw * ih
                    union_ = ((a[i, 2] - a[i, 0]) * (a[i, 3] - a[i, 1])
                              + (b[j, 2] - b[j, 0]) * (b[j, 3] - b[j, 1]) - inter)
                    out_v[i, j] = inter / union_
    return out
