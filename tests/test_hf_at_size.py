"""Hugging Face folders at size: the memory that import and export of a checkpoint of 2.2 GB take, and what a killed
export leaves.

Memory is the kernel's RssAnon of a child process, read from outside: files that are mapped do not count.
"""

import json
import math
import os
import pathlib
import re
import select
import shutil
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors

from sera_jax import hf
from sera_jax.hf import writing

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
SHARD = 256_000_000


def shapes() -> dict[str, tuple[int, int] | tuple[int]]:
    """The tensors of CONFIG, written out by hand: 1.1 billion weights."""
    d, f, v = 2048, 8192, 8192
    layer = {f"self_attn.{n}_proj": (d, d) for n in "qkvo"} | {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d)}
    layer |= {"mlp.down_proj": (d, f), "input_layernorm": (d,), "post_attention_layernorm": (d,)}
    return {
        "model.embed_tokens.weight": (v, d),
        **{f"model.layers.{i}.{n}.weight": shape for i in range(16) for n, shape in layer.items()},
        "model.norm.weight": (d,),
        "lm_head.weight": (v, d),
    }


def mark(name: str) -> list[float]:
    """Numbers that tell the tensors apart, exact in bfloat16: the first and the last element."""
    place = list(shapes()).index(name)
    return [1.0 + place % 128, -1.0 - place // 128]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Ten files in bfloat16, all zeros but the marks, so that they take no room on the disk."""
    path = tmp_path_factory.mktemp("at_size")
    (path / "config.json").write_text(json.dumps(CONFIG))
    files: list[dict[str, tuple]] = [{}]
    for name, shape in shapes().items():
        if sum(2 * math.prod(s) for s in files[-1].values()) + 2 * math.prod(shape) > SHARD:
            files.append({})
        files[-1][name] = shape
    for i, held in enumerate(files):
        header, offset = {}, 0
        for name, shape in held.items():
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + 2 * math.prod(shape)]}
            offset += 2 * math.prod(shape)
        text = json.dumps(header).encode()
        with open(path / f"{i}.safetensors", "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + offset)
            for name in held:
                for at, number in zip(header[name]["data_offsets"], mark(name)):
                    stream.seek(8 + len(text) + at - 2 * (number < 0))
                    stream.write(ml_dtypes.bfloat16(number).tobytes())
    index = {"weight_map": {name: f"{i}.safetensors" for i, held in enumerate(files) for name in held}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sum(2 * math.prod(shape) for shape in shapes().values()) > 2.2e9 and len(files) == 10
    return path


# Runs a line of Python for each line that comes in, and answers in a line.
CHILD = """
import json, pathlib, sys
import jax, jax.numpy as jnp, numpy as np, safetensors.numpy
from sera_jax import hf, mesh as meshes
from sera_jax.hf import layout, writing
mesh = meshes.make()
path, out = map(pathlib.Path, sys.argv[1:])
arch = hf.read_arch(path)
jax.block_until_ready(jax.jit(lambda x: x + 1)(meshes.put(np.zeros(8), meshes.replicated(mesh))))
def held():
    return sum(s.data.nbytes for a in jax.tree.leaves(params) for s in a.addressable_shards)
for line in sys.stdin:
    answer = None
    exec(line)
    print(json.dumps(answer), flush=True)
"""


class Child:
    """A process of so many devices; `run` gives the most anonymous memory that it had meanwhile (bytes), its answer."""

    def __init__(self, devices: int, *args):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *map(str, args)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.run("pass")  # it has started

    def anonymous(self) -> int:
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:"))

    def run(self, line: str):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        peak = self.anonymous()
        heard = select.poll()  # select() takes no descriptor beyond 1023, and a long session has many
        heard.register(self.process.stdout, select.POLLIN | select.POLLHUP)
        while not heard.poll(2):
            peak = max(peak, self.anonymous())
        answer = self.process.stdout.readline()
        assert answer, f"the child ended: {line}"
        return peak, json.loads(answer)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
@pytest.mark.parametrize("devices, dtype", [(1, "float32"), (8, "bfloat16")])
def test_host_memory_of_import_and_export(checkpoint, tmp_path, devices, dtype):
    """Above what the devices hold (on CPU anonymous memory, too) at most 1.3 of the largest file. Measured: 0.43 and
    0.64 of it on import, 0.45 and 0.37 on export; with all layers of a weight stacked on the host 3.9 and 2.6, 4.3 and
    1.6.
    """
    largest = max(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    with Child(devices, checkpoint, tmp_path / "out") as child:
        try:
            before = child.anonymous()
            peak, held = child.run(f"params = hf.load(path, arch, mesh, dtype='{dtype}'); answer = held()")
            assert held >= 1.1e9 * np.dtype(dtype).itemsize
            assert peak - before <= held + 1.3 * largest, f"{(peak - before - held) / largest:.2f} of a file"
            assert peak - before >= held  # the meter sees them
            before = child.anonymous()
            peak, _ = child.run(f"hf.save(out, arch, params, dtype='bfloat16', max_shard_bytes={SHARD})")
            assert peak - before <= 1.3 * SHARD, f"{(peak - before) / SHARD:.2f} of a file"
            check_written(tmp_path / "out")
            # What the bound is there to catch: files that are read whole.
            before = child.anonymous()
            peak, _ = child.run(
                "x = [safetensors.numpy.load_file(out / f'model-0000{i}-of-00010.safetensors') for i in (1, 2)]"
            )
            assert peak - before > 1.3 * SHARD
        finally:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)


def check_written(out: pathlib.Path) -> None:
    """No file is over the limit, none could have been left out, the index is right, and every tensor has its marks."""
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * math.prod(shape) for shape in shapes().values())
    assert index["weight_map"].keys() == shapes().keys()
    sizes, seen = [], {}
    for file in sorted(out.glob("*.safetensors")):
        with safetensors.safe_open(file, "np") as opened:
            seen |= dict.fromkeys(opened.keys(), file.name)
            sizes.append(sum(2 * math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()))
            for name in opened.keys():
                array = opened.get_tensor(name)
                assert array.dtype == ml_dtypes.bfloat16 and array.shape == shapes()[name]
                assert [float(array.flat[0]), float(array.flat[-1])] == mark(name), name
    assert seen == index["weight_map"]
    assert max(sizes) <= SHARD and all(a + b > SHARD for a, b in zip(sizes, sizes[1:]))


# --- exports that are killed ------------------------------------------------------------------------------------------

TINY = CONFIG | dict(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
TINY |= dict(intermediate_size=8, head_dim=4)

# Writes weights 1 (if there is to be an earlier export) and 2. Whenever the second touches a name in its folder (Python
# tells an audit hook before it does), and whenever it fetches a tensor, the folder is copied as a kill at that moment
# would leave it: what is in the process's own buffers is not there. At a given one it is killed; -1: after the swap.
EXPORTS = """
import contextlib, os, pathlib, shutil, signal, sys
import jax, jax.numpy as jnp
from sera_jax import disk, hf, model
from sera_jax.hf import writing
folder, earlier, swap, kill = pathlib.Path(sys.argv[1]), *(int(a) for a in sys.argv[2:])
source, work, count = folder / "source", folder / "work", None
work.mkdir()
arch = hf.read_arch(source)
params = lambda value: jax.tree.map(lambda w: jnp.full(w.shape, value), model.abstract(arch))
export = lambda value: hf.save(
    work / "export", arch, params(value), source=source, dtype="float32", max_shard_bytes=800, card=["# Model"]
)
if not swap:
    disk.exchange = lambda one, other: False

def moment():
    global count
    if count is None:
        return
    now, count = count + 1, None  # the copy itself is no moment
    if now == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    if not kill:
        shutil.copytree(work, folder / f"{now:03}")
    count = now

named = "open os.mkdir os.rename shutil.copyfile".split()
unnamed = "os.remove os.rmdir ctypes.dlsym".split()  # shutil.rmtree gives names within a folder
def hook(event, args):
    global kill
    if event == "ctypes.dlsym" and kill == -1:
        kill = count + 2  # the moment after the swap
    if count is not None and (event in unnamed or (event in named and str(work) in str(args))):
        moment()

scan = os.scandir  # a folder whose weights and config.json are the last that go, if nobody sees to it
late = lambda entry: entry.name == "config.json" or entry.name.endswith((".safetensors", ".index.json"))
os.scandir = lambda place: contextlib.nullcontext(iter(sorted(scan(place), key=late)))

fetch = writing.fetch
def fetching(*args):
    moment()
    return fetch(*args)

if earlier:
    export(1.0)
    shutil.copytree(work / "export", folder / "earlier")
writing.fetch = fetching
sys.addaudithook(hook)
count = 0
export(2.0)
count = None
shutil.copytree(work / "export", folder / "new")
"""


def exports(folder: pathlib.Path, earlier: bool, swap: bool, kill: int = 0) -> int:
    """Exit code of EXPORTS."""
    source = folder / "source"
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(TINY))
    (source / "additional_chat_templates").mkdir()
    for name in ("tokenizer.json", "generation_config.json", "additional_chat_templates/tool.jinja"):
        (source / name).write_text("{}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    numbers = [str(int(n)) for n in (earlier, swap, kill)]
    return subprocess.run([sys.executable, "-c", EXPORTS, folder, *numbers], env=environment).returncode


def content(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def loads(folder: pathlib.Path, mesh) -> bool:
    try:
        hf.load(folder, hf.read_arch(folder), mesh)
    except (ValueError, OSError):
        return False
    return True


def moments(folder: pathlib.Path) -> list[pathlib.Path]:
    found = sorted(place for place in folder.iterdir() if re.fullmatch(r"\d{3}", place.name))
    assert len(found) >= 40
    return found


@pytest.mark.slow
@pytest.mark.parametrize("earlier, swap", [(False, True), (True, True), (True, False)])
def test_a_killed_export_leaves_nothing_that_loads_and_is_not_whole(tmp_path, one_device, monkeypatch, earlier, swap):
    """At every moment of an export: what loads is an export, the earlier one or the new one, to the last byte. The
    earlier one stays where it is until the new one is there; where folders cannot be swapped it is away for one moment,
    and the next export brings it back.
    """
    assert exports(tmp_path, earlier, swap) == 0
    names = ["earlier", "new"] if earlier else ["new"]
    whole = [content(tmp_path / name) for name in names]
    assert all(loads(tmp_path / name, one_device) for name in names)
    found, away = [], 0
    for moment in moments(tmp_path):
        for folder in moment.iterdir():
            assert not loads(folder, one_device) or content(folder) in whole, folder
        place = moment / "export"
        if earlier and not place.exists():
            away += 1
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(writing, "fetch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                arch = hf.read_arch(tmp_path / "new")
                hf.save(place, arch, hf.load(tmp_path / "new", arch, one_device), dtype=np.float32)
        found.append(content(place) if place.exists() else None)
        assert found[-1] in whole or not (earlier or place.exists())
    assert away == (not swap)
    assert [found[0], found[-1]] == [whole[0] if earlier else None, whole[-1]]  # both sides of the change were seen


@pytest.mark.slow
def test_transformers_loads_nothing_of_a_killed_export_that_is_not_whole(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    assert exports(tmp_path, True, True) == 0
    whole = [content(tmp_path / name) for name in ("earlier", "new")]
    folders = [folder for moment in moments(tmp_path) for folder in moment.iterdir()]
    different = {tuple(sorted(content(folder).items())): folder for folder in folders}
    loaded = []
    for folder in different.values():
        try:
            transformers.AutoModelForCausalLM.from_pretrained(folder)
        except (ValueError, OSError):
            continue
        loaded.append(content(folder))
    assert (
        sorted(map(whole.index, loaded)) == [0, 1] and len(different) > 12
    )  # the earlier one and the new one, no other


@pytest.mark.slow
@pytest.mark.parametrize("kill, left", [(5, 1.0), (20, 1.0), (-1, 2.0)])
def test_an_export_is_killed(tmp_path, one_device, kill, left):
    """By SIGKILL: among the tensors, between two files, after the swap."""
    assert exports(tmp_path, True, True, kill) == -signal.SIGKILL
    export = tmp_path / "work" / "export"
    params = hf.load(export, hf.read_arch(export), one_device)
    assert all((leaf == left).all() for leaf in jax.tree.leaves(params))
