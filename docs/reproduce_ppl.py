import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = load_file(f"{sys.argv[2]}/calibration.safetensors")["ids"]
blocks, model.config.num_hidden_layers = model.model.layers, len(model.model.layers) - 1
for b, value in enumerate(json.load(open(f"{sys.argv[2]}/scores.json"))["values"]):
    model.model.layers = torch.nn.ModuleList(blocks[:b] + blocks[b + 1 :])
    ppl = model(input_ids=ids, labels=ids, use_cache=False).loss.exp().item()
    print(b, ppl, value, abs(ppl - value) / value)
