"""transformers' generate(): N sampled candidates a prompt, each of a given number of tokens; prompts are ids.

    python generate.py --model DIR --prompts FILE --batch 8 --candidates 4 --new-tokens 128 [--short 16 --long-every 4]

Prints one JSON object: seconds of each batch, new tokens of each, peak memory. With --short three of four candidates
(every one but each `long-every`-th) end after so many tokens; generate() goes on until the batch's last one has ended.
Needs torch and transformers.
"""

import argparse
import json
import os
import resource
import time

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
import torch
import transformers

p = argparse.ArgumentParser()
p.add_argument("--model", required=True)
p.add_argument("--prompts", required=True)
p.add_argument("--batch", type=int, default=8)
p.add_argument("--batches", type=int, default=6)
p.add_argument("--candidates", type=int, default=4)
p.add_argument("--new-tokens", type=int, default=128)
p.add_argument("--short", type=int, default=0)
p.add_argument("--long-every", type=int, default=4)
p.add_argument("--greedy", action="store_true")
a = p.parse_args()
torch.set_num_threads(os.cpu_count())
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = transformers.AutoModelForCausalLM.from_pretrained(
    a.model, dtype=torch.bfloat16 if device == "cuda" else torch.float32
)
model = model.to(device).eval()
prompts = [json.loads(line)["prompt_ids"] for line in open(a.prompts, encoding="utf-8")][: a.batch * a.batches]


class Ended(transformers.StoppingCriteria):
    """Candidates end at their own lengths."""

    def __init__(self, prompt: int, most: torch.Tensor):
        self.prompt, self.most = prompt, most

    def __call__(self, input_ids, scores, **_):
        return input_ids.shape[1] - self.prompt >= self.most


def run(part: list[list[int]]) -> torch.Tensor:
    width = max(map(len, part))
    ids = torch.tensor([[0] * (width - len(x)) + x for x in part], device=device)
    mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in part], device=device)
    many = a.candidates * len(part)
    if a.greedy:  # generate() gives one greedy response a prompt
        ids, mask = (x.repeat_interleave(a.candidates, 0) for x in (ids, mask))
    most = torch.tensor([a.new_tokens if i % a.long_every == 0 or not a.short else a.short for i in range(many)])
    how = {"do_sample": False} if a.greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=mask, num_return_sequences=1 if a.greedy else a.candidates,
            max_new_tokens=a.new_tokens,
            eos_token_id=None, pad_token_id=0, stopping_criteria=[Ended(width, most.to(device))], **how,
        )  # fmt: skip
    if device == "cuda":
        torch.cuda.synchronize()
    return out[:, width:], int(most.sum())


seconds, tokens, first = [], [], None
run(prompts[: a.batch])
for start in range(0, len(prompts), a.batch):
    began = time.perf_counter()
    out, count = run(prompts[start : start + a.batch])
    seconds.append(time.perf_counter() - began)
    tokens.append(count)
    first = out if first is None else first
print(
    json.dumps(
        {
            "seconds": seconds,
            "tokens": tokens,
            "first": first.tolist() if a.greedy else None,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
    )
)
