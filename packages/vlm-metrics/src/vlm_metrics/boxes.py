"""Boxes in pictures."""

from collections.abc import Sequence


def box_iou(a: Sequence[float | int], b: Sequence[float | int]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1), x1 >= x0 and y1 >= y0, in any one unit; in [0, 1].

    Edges are borders, not pixels: the area is (x1 - x0) * (y1 - y0). Two boxes of no area give 0.

    Raises:
        ValueError: not four numbers, or corners in the wrong order.
    """
    for box in (a, b):
        if not _is_box(box):
            raise ValueError(f"box: expected (x0, y0, x1, y1) with x1 >= x0 and y1 >= y0, got {box}; sort the corners")
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def grounding_accuracy(
    predictions: Sequence[Sequence[float | int] | None],
    answers: Sequence[Sequence[float | int]],
    *,
    threshold: float = 0.5,
) -> float:
    """Share of boxes whose IoU with the answer is at least the threshold (Acc@0.5 of RefCOCO), in [0, 1].

    A prediction that is None (nothing could be read out of the text) or no box (see `box_iou`) is wrong.

    Source: arXiv:1608.00272; lmms-eval 75571cf, tasks/refcoco/utils_rec.py.

    Raises:
        ValueError: different lengths, none at all, or an answer that is no box.
    """
    if len(predictions) != len(answers) or not answers:
        raise ValueError(
            f"predictions: expected one for each answer and at least one, got {len(predictions)} predictions and "
            f"{len(answers)} answers; pair them first"
        )
    right = 0
    for box, answer in zip(predictions, answers, strict=True):
        # An answer that is no box is the file's fault, and is told even where there is no prediction.
        box_iou(answer, answer)
        if box is not None and _is_box(box):
            right += box_iou(box, answer) >= threshold
    return right / len(answers)


def _is_box(box: Sequence[float | int]) -> bool:
    return len(box) == 4 and box[2] >= box[0] and box[3] >= box[1]
