"""What to type so that another program writes with a draft: transformers, vLLM, llama.cpp."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

GGUF = ".gguf"


def draft_lines(model: str, draft: str, draft_tokens: int) -> dict[str, str]:
    """The lines for each program, by its name.

    Args:
        model: directory, Hub id or GGUF file of the intact model.
        draft: the same of the draft.
        draft_tokens: tokens that it proposes in each step.
    """
    return {
        "transformers": transformers_lines(model, draft, draft_tokens),
        "vLLM": vllm_line(model, draft, draft_tokens),
        "llama.cpp": llama_cpp_lines(model, draft, draft_tokens),
    }


def transformers_lines(model: str, draft: str, draft_tokens: int) -> str:
    """Python for transformers 5; `tokenizer` splits text for both models."""
    tokenizer = f"AutoTokenizer.from_pretrained({_arguments(model)})"
    return "\n".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"tokenizer = {tokenizer}",
            f"model = AutoModelForCausalLM.from_pretrained({_arguments(model)})",
            f"draft = AutoModelForCausalLM.from_pretrained({_arguments(draft)})",
            f"draft.generation_config.num_assistant_tokens = {draft_tokens}",
            'draft.generation_config.num_assistant_tokens_schedule = "constant"',
            "draft.generation_config.assistant_confidence_threshold = 0.0",
            'inputs = tokenizer("Once upon a time", return_tensors="pt")',
            "output = model.generate(**inputs, assistant_model=draft, max_new_tokens=100)",
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
    places = [place for place in (model, draft) if not place.endswith(GGUF)]
    converted = [
        f"python convert_hf_to_gguf.py {shlex.quote(place)} --outfile {_as_gguf(place)}"
        for place in places
    ]
    serve = (
        f"llama-server --model {_as_gguf(model)} --model-draft {_as_gguf(draft)} "
        f"--spec-type draft-simple --spec-draft-n-max {draft_tokens}"
    )
    return "\n".join([*converted, serve])


def _as_gguf(place: str) -> str:
    """The GGUF file of a model: itself, or what its directory is converted to."""
    return shlex.quote(place if place.endswith(GGUF) else Path(place).name + GGUF)


def _arguments(place: str) -> str:
    """What `from_pretrained` takes for a model."""
    if not place.endswith(GGUF):
        return repr(place)
    return f"{str(Path(place).parent)!r}, gguf_file={Path(place).name!r}"
