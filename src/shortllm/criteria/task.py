"""What a block is worth by the answers to multiple-choice questions, removals in shared walks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shortllm.criteria import criterion

if TYPE_CHECKING:
    from torch import Tensor


def mistakes(right_I: Tensor, margin_I: Tensor) -> Tensor:
    """Of each item 1 if it is answered wrongly, and the less, the higher its margin is: for all
    items together between 0 and 1 item, by which models of equal accuracy are ordered."""
    tie_I = (1.0 - margin_I / (1.0 + margin_I.abs())) / 2.0
    return 1.0 - right_I + tie_I / len(right_I)


@criterion(
    "task",
    needs="choices",
    label="accuracy lost without the block",
    paper="accuracy on multiple-choice items",
    compared=False,
)
def accuracy_lost(
    right_I: Tensor,
    margin_I: Tensor,
    intact_I: Tensor,
    *,
    tasks: str | None = None,
    items: int = 100,
) -> Tensor:
    """Accuracy on multiple-choice items that is lost when the block is removed.

    Equal accuracies are told apart by the margins m, the log-likelihood of the right choice above
    that of the best other one: by the mean of m / (1 + |m|), which is less than one item. Every
    item weighs the same.

    Args:
        right_I: 1 for each item that is answered correctly without the block, else 0.
        margin_I: the margin of each item, nats; per character where the task's metric is.
        intact_I: 1 for each item that the intact model answers correctly.
        tasks: tasks of lm-evaluation-harness or sets of them; default: arc_easy,piqa, and those of
            the embedded model.
        items: of each task the last documents, this many, so that `eval --limit` measures others.
    """
    return mistakes(right_I, margin_I) - (1.0 - intact_I)
