"""TRL's DPOTrainer on token ids: trl_update.py --model DIR --pairs FILE --batch B --steps S [--precompute-reference].

Prints one JSON object: losses, seconds of each step, peak memory. Needs torch and trl.
"""

import argparse
import json
import os
import resource
import tempfile
import time

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
import datasets
import torch
import transformers
import trl

p = argparse.ArgumentParser()
p.add_argument("--model", required=True)
p.add_argument("--pairs", required=True)
p.add_argument("--batch", type=int, required=True)
p.add_argument("--steps", type=int, required=True)
p.add_argument("--max-length", type=int, required=True)
p.add_argument("--lr", type=float, required=True)
p.add_argument("--precompute-reference", action="store_true")
a = p.parse_args()
torch.set_num_threads(os.cpu_count())
cuda = torch.cuda.is_available()
rows = [json.loads(line) for line in open(a.pairs, encoding="utf-8")][: a.batch * a.steps]
tokenizer = transformers.AutoTokenizer.from_pretrained(a.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = transformers.AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
config = trl.DPOConfig(
    output_dir=tempfile.mkdtemp(), per_device_train_batch_size=a.batch, max_steps=a.steps, max_length=a.max_length,
    beta=0.1, learning_rate=a.lr, lr_scheduler_type="constant", report_to=[], logging_steps=1, save_strategy="no",
    use_cpu=not cuda, bf16=cuda, gradient_checkpointing=False, disable_tqdm=True, max_grad_norm=1.0, weight_decay=0.0,
    precompute_ref_log_probs=a.precompute_reference, train_sampling_strategy="sequential",
)  # fmt: skip
stamps, losses = [], []


class FromIds(trl.DPOTrainer):
    """The data set holds ids already."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


class Watch(transformers.TrainerCallback):
    def on_step_begin(self, *_, **__):
        if cuda:
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in (logs or {}):
            losses.append(float(logs["loss"]))


trainer = FromIds(model=model, args=config, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(rows))
trainer.add_callback(Watch())
trainer.train()
# From one step's begin to the next one's: the first, which warms up, is not counted.
print(
    json.dumps(
        {
            "seconds": [b - c for b, c in zip(stamps[2:], stamps[1:])],
            "losses": losses,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "peak_gpu_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
            "versions": {"torch": torch.__version__, "trl": trl.__version__, "transformers": transformers.__version__},
        }
    )
)
