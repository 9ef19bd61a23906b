import math, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

path, file, length, bos, count = *sys.argv[1:3], int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
tokenizer, lines = AutoTokenizer.from_pretrained(path), open(file, encoding="utf-8")
rows = [line if "wiki" in file and line.strip() else line.strip() for line in lines]
ids = tokenizer("\n\n".join(rows), add_special_tokens=False).input_ids
ids = [tokenizer.bos_token_id] * (bos == "first") + ids
ids = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)[:count]
ids = torch.nn.functional.pad(ids, (int(bos == "every"), 0), value=tokenizer.bos_token_id)
with torch.no_grad():
    nll = sum(model(input_ids=i[None], labels=i[None]).loss.item() for i in ids) / len(ids)
print(math.exp(nll))
