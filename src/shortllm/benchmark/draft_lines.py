"""What to type so that another program writes with a draft: transformers, vLLM, llama.cpp."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from shortllm.checkpoint.hub import EMBEDDED
from shortllm.embedded import MODEL_DIR

GGUF = ".gguf"


def draft_lines(
    model: str, draft: str, draft_tokens: int, temperature: float = 0.0
) -> dict[str, str]:
    """The lines for each program, by its name.

    Args:
        model: directory, Hub id or GGUF file of the intact model, or 'embedded'.
        draft: directory or GGUF file of the draft.
        draft_tokens: tokens that it proposes in each step.
        temperature: of the sampling; 0 takes the likeliest token.
    """
    model = str(MODEL_DIR) if model == EMBEDDED else model
    return {
        "transformers": transformers_lines(model, draft, draft_tokens, temperature),
        "vLLM": vllm_line(model, draft, draft_tokens),
        "llama.cpp": llama_cpp_lines(model, draft, draft_tokens),
    }


def transformers_lines(model: str, draft: str, draft_tokens: int, temperature: float) -> str:
    """Python for transformers 5; `tokenizer` splits text for both models."""
    tokenizer = f"AutoTokenizer.from_pretrained({_arguments(model)})"
    names, how = "AutoModelForCausalLM, AutoTokenizer", "do_sample=False"
    if temperature:  # as a processor, which is applied once to each model
        names += ", TemperatureLogitsWarper"
        how = (
            "do_sample=True, temperature=1.0, top_k=0, "
            f"logits_processor=[TemperatureLogitsWarper({temperature:g})]"
        )
    return "\n".join(
        [
            f"from transformers import {names}",
            "",
            f"tokenizer = {tokenizer}",
            f"model = AutoModelForCausalLM.from_pretrained({_arguments(model)})",
            f"draft = AutoModelForCausalLM.from_pretrained({_arguments(draft)})",
            f"draft.generation_config.num_assistant_tokens = {draft_tokens}",
            'draft.generation_config.num_assistant_tokens_schedule = "constant"',
            "draft.generation_config.assistant_confidence_threshold = 0.0",
            'inputs = tokenizer("Once upon a time", return_tensors="pt")',
            f"how = dict({how}, max_new_tokens=100)",
            "output = model.generate(**inputs, assistant_model=draft, **how)",
            "print(tokenizer.decode(output[0]))",
        ]
    )


def vllm_line(model: str, draft: str, draft_tokens: int) -> str:
    """As documented for vLLM 0.20; versions up to 0.13 have no such drafts."""
    config = {"model": draft, "num_speculative_tokens": draft_tokens, "method": "draft_model"}
    return f"vllm serve {shlex.quote(model)} --speculative-config {shlex.quote(json.dumps(config))}"


def llama_cpp_lines(model: str, draft: str, draft_tokens: int) -> str:
    """For llama.cpp of May 2026 and later, which no longer has `--draft-max`; directories are
    converted first."""
    own, other = _as_gguf(model), _as_gguf(draft)
    other = f"short-{other}" if other == own else other
    lines, place = [], model
    if not model.endswith(GGUF) and not Path(model).is_dir():
        place = Path(model).name
        lines.append(f"hf download {shlex.quote(model)} --local-dir {shlex.quote(place)}")
    lines += [
        f"python convert_hf_to_gguf.py {shlex.quote(one)} --outfile {shlex.quote(file)}"
        for one, file in ((place, own), (draft, other))
        if not one.endswith(GGUF)
    ]
    lines.append(
        f"llama-server --model {shlex.quote(own)} --model-draft {shlex.quote(other)} "
        f"--spec-type draft-simple --spec-draft-n-max {draft_tokens}"
    )
    return "\n".join(lines)


def _as_gguf(place: str) -> str:
    """The GGUF file of a model: itself, or what its directory is converted to."""
    return place if place.endswith(GGUF) else Path(place).name + GGUF


def _arguments(place: str) -> str:
    """What `from_pretrained` takes for a model."""
    if not place.endswith(GGUF):
        return repr(place)
    return f"{str(Path(place).parent)!r}, gguf_file={Path(place).name!r}"
