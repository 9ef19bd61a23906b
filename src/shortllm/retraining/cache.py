"""What a teacher says about every target, kept on disk so that it need not stay in memory.

Of each target's distribution the k likeliest tokens are kept, 6 bytes each. A file holds
`WINDOWS_PER_FILE` windows and is whole or not there: an interrupted pass goes on behind the files
it wrote, and several processes each write every so many.

    000000.safetensors   ids        int32 [targets, k]
                         log_probs  float16 [targets, k]
                         first      int64 [windows + 1]: where the targets of each window begin
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shortllm.files import PARTIAL, translate_os_errors
from shortllm.retraining.windows import NO_TARGET, Windows, collate
from shortllm.runtime import Ranks

WINDOWS_PER_FILE = 64


class CachedTeacher:
    """Reads what `write_cache` wrote, window by window."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def of(self, window: int) -> dict[str, Tensor]:
        """`teacher_ids` and `teacher_log_probs`, `[targets, k]`, in the order of the targets."""
        from safetensors import safe_open

        number, place = divmod(window, WINDOWS_PER_FILE)
        with safe_open(_file(self._directory, number), framework="pt") as held:
            first = held.get_tensor("first")
            span = slice(int(first[place]), int(first[place + 1]))
            return {f"teacher_{name}": held.get_slice(name)[span] for name in ("ids", "log_probs")}


@torch.no_grad()
def write_cache(
    teacher: nn.Module,
    windows: Windows,
    directory: Path,
    *,
    k: int,
    batch: int,
    ranks: Ranks,
    advance: Callable[[float], None],
) -> None:
    """Run the teacher over all windows, and keep what it says; files that are there are kept.

    Args:
        batch: windows that go through the teacher at a time.
        advance: called with the number of windows done since its last call.
    """
    directory.mkdir(parents=True, exist_ok=True)
    count = -(-len(windows) // WINDOWS_PER_FILE)
    for number in range(ranks.rank, count, ranks.count):
        span = range(number * WINDOWS_PER_FILE, min((number + 1) * WINDOWS_PER_FILE, len(windows)))
        if not _file(directory, number).exists():
            _write_file(_file(directory, number), teacher, windows, span, k, batch)
        advance(len(span) * ranks.count)
    ranks.wait()


def _write_file(
    path: Path, teacher: nn.Module, windows: Windows, span: range, k: int, batch: int
) -> None:
    from safetensors.torch import save_file

    ids, log_probs, first = [], [], [0]
    for start in range(span.start, span.stop, batch):
        items = [windows[window] for window in range(start, min(start + batch, span.stop))]
        kept_NK, log_NK, counts = _likeliest(teacher, collate(items), k)
        ids.append(kept_NK)
        log_probs.append(log_NK)
        for count in counts:
            first.append(first[-1] + count)
    tensors = {
        "ids": torch.cat(ids),
        "log_probs": torch.cat(log_probs),
        "first": torch.tensor(first),
    }
    with translate_os_errors(path.parent):
        partial = path.with_name(path.name + PARTIAL)
        save_file(tensors, partial)
        os.replace(partial, path)


def _likeliest(
    teacher: nn.Module, batch: dict[str, Tensor], k: int
) -> tuple[Tensor, Tensor, list[int]]:
    """Ids and log-probabilities `[N, K]` of a batch's targets, and the targets of each window."""
    device = next(teacher.parameters()).device
    inputs = {
        name: batch[name].to(device) for name in ("input_ids", "position_ids") if name in batch
    }
    rows_N = target_rows(batch["labels"]).to(device)
    logits_NV = teacher(**inputs, use_cache=False).logits.flatten(0, 1)[rows_N]
    log_NV = F.log_softmax(logits_NV.float(), dim=-1)
    top = log_NV.topk(min(k, log_NV.shape[-1]), dim=-1)
    counts = (batch["labels"][:, 1:] != NO_TARGET).sum(dim=-1).tolist()
    return top.indices.int().cpu(), top.values.half().cpu(), counts


def target_rows(labels_BT: Tensor) -> Tensor:
    """Of all positions of a batch, flattened, those whose next token is learnt; int64 `[N]`."""
    next_BT = F.pad(labels_BT[:, 1:], (0, 1), value=NO_TARGET)
    return next_BT.flatten().ne(NO_TARGET).nonzero().squeeze(-1)


def _file(directory: Path, number: int) -> Path:
    return directory / f"{number:06d}.safetensors"
