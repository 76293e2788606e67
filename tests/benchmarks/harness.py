"""What the benchmarks share: the machine in words, times of repeated work, tables, a child's JSON, the files of a work.

A benchmark is a script that is run by hand. Each side of a comparison runs in a process of its own, so that its peak
memory is its own; each first shows that it computes what the others compute. Peers live in environments of their own
(`peers.sh`).
"""

import argparse
import gzip
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

HERE = pathlib.Path(__file__).parent
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 256,
    "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
    "tie_word_embeddings": False, "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""The 19 M parameters of the comparisons on a CPU."""


def parser(doc: str) -> argparse.ArgumentParser:
    """The arguments of every comparison with peers."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True)
    p.add_argument("--peers", help="folder of peers.sh")
    p.add_argument("--work", default="/tmp/sera_jax_benchmarks")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--out")
    return p


def python_of(peers: str, name: str) -> str:
    """The interpreter of one of the environments of peers.sh."""
    return str(pathlib.Path(peers) / name / "bin" / "python")


def machine() -> dict[str, Any]:
    """Hardware and versions, as far as this process can know them."""
    cpu = platform.processor()
    if os.path.isfile("/proc/cpuinfo"):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    versions = {"python": platform.python_version()}
    for name in ("sera_jax", "jax", "jaxlib", "flax", "libtpu", "torch", "trl", "transformers", "google-tunix"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    told = {"cpu": cpu, "cores": os.cpu_count(), "versions": versions}
    commit = subprocess.run(["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if commit.returncode == 0:
        told["commit"] = commit.stdout.strip()
    return told


def timed(run: Callable[[], Any], times: int) -> list[float]:
    """Seconds of each of `times` calls, after one that is not counted; run returns when its work is done."""
    run()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return seconds


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, least, most, and how many."""
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds), "times": len(seconds)}


def child(python: str, script: str, *words: Any, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs a script that prints one JSON object as its last line; what else it prints is shown when it fails.

    Raises:
        SystemExit: it failed.
    """
    command = [python, str(HERE / script), *map(str, words)]
    print("+", " ".join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; numbers to three figures."""
    shown = lambda v: f"{v:.3g}" if isinstance(v, float) else "" if v is None else str(v)
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(shown(row.get(h)) for h in heads) + " |" for row in rows])


def finish(name: str, out: str | None, rows: Sequence[dict[str, Any]], **told: Any) -> None:
    """Prints the table and the JSON; appends the latter to a file if one is given."""
    print(table(rows))
    line = json.dumps({"benchmark": name, "command": sys.argv, "machine": machine(), "rows": list(rows), **told})
    print(line)
    if out:
        with open(out, "a", encoding="utf-8") as file:
            file.write(line + "\n")


# --- works ------------------------------------------------------------------------------------------------------------


def model_folder(folder: pathlib.Path, tokenizer: pathlib.Path, **changes: Any) -> pathlib.Path:
    """A folder with random weights (seed 0, float32) of LLAMA's shape and a tokenizer, made once."""
    return random_model(folder, {file.name: file.read_bytes() for file in tokenizer.iterdir()}, **changes)


def random_model(folder: pathlib.Path, files: dict[str, bytes] | None = None, **changes: Any) -> pathlib.Path:
    """The same with other files beside the weights than a tokenizer's, or with none."""
    import jax
    import jax.numpy as jnp

    from sera_jax import hf, model

    if not (folder / "model.safetensors").is_file():
        source = folder.with_suffix(".source")
        source.mkdir(parents=True, exist_ok=True)
        for name, content in (files or {}).items():
            (source / name).write_bytes(content)
        (source / "config.json").write_text(json.dumps({**LLAMA, **changes}))
        arch = hf.read_arch(source)
        hf.save(folder, arch, jax.jit(lambda: model.init(arch, jax.random.key(0)))(), source=source, dtype=jnp.float32)
    return folder


def hh_pairs(path: pathlib.Path, data: pathlib.Path, tokenizer: pathlib.Path, count: int, max_length: int) -> None:
    """Token ids of the first `count` HH-RLHF helpful pairs in which no side is longer than max_length, as JSONL.

    Ids rather than texts, so that every program trains on the same tokens: BOS, prompt, response, EOS.
    """
    if path.is_file():
        return
    with open(path, "w", encoding="utf-8") as file:
        for _, tree in _fitting(data, tokenizer, count, max_length):
            ids = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), (tree.prompt, *tree.branches)))
            file.write(json.dumps({name: value.tolist() for name, value in ids.items()}) + "\n")


def text_pairs(path: pathlib.Path, data: pathlib.Path, tokenizer: pathlib.Path, count: int, max_length: int) -> None:
    """The same pairs as texts, with prompts of their own each."""
    if path.is_file():
        return
    with open(path, "w", encoding="utf-8") as file:
        for pair, _ in _fitting(data, tokenizer, count, max_length):
            texts = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            file.write(json.dumps(texts) + "\n")


def _fitting(data: pathlib.Path, tokenizer: pathlib.Path, count: int, max_length: int) -> list[tuple]:
    """The first `count` pairs that nobody truncates, as texts and as trees."""
    from sera_jax import data as datalib
    from sera_jax import records

    pairs = []
    with gzip.open(data / "hh_rlhf" / "helpful_train.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            pairs.append(records.Pair(f"{len(pairs)}", row["prompt"], row["chosen"], row["rejected"]))
    loaded = datalib.load_tokenizer(str(tokenizer))
    eos = datalib.eos_ids(str(tokenizer), loaded)
    limit = 1 << 20
    trees, _ = datalib.tokenise_pairs(
        pairs, loaded, eos, max_length=limit, max_prompt_length=limit - 1, truncation="keep_end"
    )
    by_id = {pair.id: pair for pair in pairs}
    fitting = (t for t in trees if len(t.prompt) + max(map(len, t.branches)) <= max_length)
    return [(by_id[t.id], t) for _, t in zip(range(count), fitting)]


def read_trees(path: str) -> list:
    """The pairs of `hh_pairs` as trees."""
    import numpy as np

    from sera_jax.records import Tree

    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    ids = lambda row, name: np.array(row[name], np.int32)
    return [
        Tree(f"{i}", ids(row, "prompt_ids"), (ids(row, "chosen_ids"), ids(row, "rejected_ids")))
        for i, row in enumerate(rows)
    ]


def shared_data(path: str) -> pathlib.Path:
    """The folder of real data, or the end, with the reason."""
    folder = pathlib.Path(path)
    if not (folder / "tokenizers" / "llama2").is_dir() or not (folder / "hh_rlhf").is_dir():
        raise SystemExit(
            f"skipped: no real data at {folder}; --data names a folder with hh_rlhf/ and tokenizers/llama2."
        )
    return folder
