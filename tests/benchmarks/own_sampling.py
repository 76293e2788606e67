"""sera_jax's own side of sampling.py, in its own process: seconds of each batch (of the processors too, which say more
on a machine that others use), new tokens of each, peak memory.

python tests/benchmarks/own_sampling.py --model DIR --prompts FILE --batch 8 --candidates 4 --new-tokens 128
"""

import argparse
import json
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

from sera_jax import hf, programs, sample
from sera_jax import mesh as meshes
from sera_jax.programs import Compute


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--model", required=True)
    p.add_argument("--prompts", required=True)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--batches", type=int, default=6)
    p.add_argument("--candidates", type=int, default=4)
    p.add_argument("--new-tokens", type=int, default=128)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--short", type=int, default=0, help="tokens of all but each `long-every`-th candidate")
    p.add_argument("--long-every", type=int, default=4)
    p.add_argument("--refill", type=int, default=1, help="prompts of a call, in those for which there are slots")
    p.add_argument("--greedy", action="store_true")
    p.add_argument("--devices", type=int, default=1, help="prompts are split over so many; CPUs are cut into them")
    a = p.parse_args()
    jax.config.update("jax_num_cpu_devices", a.devices)
    mesh = meshes.make(a.devices, 1, 1, jax.devices()[: a.devices])
    arch, compute = hf.read_arch(a.model), Compute(jnp.dtype(a.dtype))
    weights = programs.to_decode(arch, mesh, compute.dtype)(hf.load(a.model, arch, mesh))
    many, slots = a.batch * a.refill, a.batch * a.candidates
    given = [json.loads(line)["prompt_ids"] for line in open(a.prompts, encoding="utf-8")][: many * a.batches]
    given = [np.array(ids, np.int32) for ids in given]
    values = sample.sampling(
        temperature=0.0 if a.greedy else 1.0, top_k=0, top_p=1.0, min_p=0.0, eos_ids=(arch.vocab,)
    )  # an EOS outside of the vocabulary: nothing ends before its time
    candidate = np.arange(many * a.candidates).reshape(many, a.candidates)
    limit_PC = np.where((candidate % a.long_every == 0) | (a.short == 0), a.new_tokens, a.short).astype(np.int32)
    run = programs.sample_prompts(
        programs.prefiller(arch, mesh, compute),
        programs.decoder(arch, mesh, compute, candidates=a.candidates, max_new_tokens=a.new_tokens, slots=slots),
        weights,
        sample.seeded(0),
        values,
        mesh,
        limit_PC,
    )

    def batch(number: int) -> list:
        part = given[number * many : (number + 1) * many]
        size = max(sample.bucket(len(ids)) for ids in part)  # one bucket, as generate() pads a batch to its longest
        return [out for _, out, _ in sample.run_batches(run, part, [(size, np.arange(len(part)))], many)][0]

    seconds, cpu_seconds, tokens, first = [], [], [], None
    for number in range(a.batches):  # each bucket compiles once
        batch(number)
    for number in range(a.batches):
        began, cpu_began = time.perf_counter(), time.process_time()
        out = batch(number)
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
        tokens.append(sum(len(ids) for candidates in out for ids in candidates))
        first = first or [ids.tolist() for candidates in out for ids in candidates]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    told = {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": tokens, "peak_mib": peak}
    print(json.dumps({**told, "first": first if a.greedy else None}))


if __name__ == "__main__":
    main()
