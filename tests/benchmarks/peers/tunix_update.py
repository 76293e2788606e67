"""Tunix's DPOTrainer on token ids: tunix_update.py --model DIR --pairs FILE --batch B --steps S.

Prints one JSON object: losses, seconds of each step, peak memory. Needs google-tunix (Python 3.12). Tunix pads to fixed
lengths, so prompts and responses get those of the longest.
"""

import argparse
import importlib.metadata
import json
import os
import resource
import time

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.sft.dpo import dpo_trainer

p = argparse.ArgumentParser()
p.add_argument("--model", required=True)
p.add_argument("--pairs", required=True)
p.add_argument("--batch", type=int, required=True)
p.add_argument("--steps", type=int, required=True)
p.add_argument("--lr", type=float, required=True)
a = p.parse_args()
hf = transformers.AutoConfig.from_pretrained(a.model)
config = llama.ModelConfig(
    num_layers=hf.num_hidden_layers, vocab_size=hf.vocab_size, embed_dim=hf.hidden_size,
    hidden_dim=hf.intermediate_size, num_heads=hf.num_attention_heads, head_dim=hf.head_dim,
    num_kv_heads=hf.num_key_value_heads, rope_theta=1_000_000, norm_eps=hf.rms_norm_eps,
    weight_tying=hf.tie_word_embeddings,
)  # fmt: skip
mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
rows = [json.loads(line) for line in open(a.pairs, encoding="utf-8")][: a.batch * a.steps]
most = {name: max(len(row[name]) for row in rows) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
response = max(most["chosen_ids"], most["rejected_ids"])


def fixed(part, name, length, left):
    ids, mask = np.zeros((2, len(part), length), np.int32)
    for i, row in enumerate(part):
        own = row[name]
        at = slice(length - len(own), None) if left else slice(0, len(own))
        ids[i, at], mask[i, at] = own, 1
    return ids, mask


def batches():
    for i in range(a.steps):
        part = rows[i * a.batch : (i + 1) * a.batch]
        yield dpo_trainer.TrainingInput(
            *fixed(part, "prompt_ids", most["prompt_ids"], True),
            *fixed(part, "chosen_ids", response, False),
            *fixed(part, "rejected_ids", response, False),
        )


stamps, losses = [], []


class Timed(dpo_trainer.DPOTrainer):
    def _post_process_train_step(self, aux):
        super()._post_process_train_step(aux)
        jax.block_until_ready(nnx.state(self.model))
        stamps.append(time.perf_counter())

    def _buffer_metrics(self, *args, loss, **keywords):
        losses.append(float(loss))
        return super()._buffer_metrics(*args, loss=loss, **keywords)


def load():
    return llama_params.create_model_from_safe_tensors(a.model, config, mesh, jnp.float32)


with mesh:
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(a.lr, weight_decay=0.0))
    asked = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**9, max_steps=a.steps, beta=0.1)
    trainer = Timed(load(), load(), transform, asked)
    trainer.train(list(batches()))
print(
    json.dumps(
        {
            "seconds": [b - c for b, c in zip(stamps[1:], stamps)],
            "losses": losses,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "versions": {n: importlib.metadata.version(n) for n in ("google-tunix", "jax", "flax")},
        }
    )
)
