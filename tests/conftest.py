"""The floor under every test: eight simulated CPU devices, no silent rank promotion, one shared compilation cache."""

import contextlib
import gc
import importlib.util
import os
import pathlib
import resource
import tempfile
import types
from collections.abc import Callable

# Eight devices on two cores can keep a collective waiting for longer than XLA's default patience.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    )
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Doors that are called by tests keep their compiled programs apart from the user's.
os.environ["XDG_CACHE_HOME"] = os.path.join(tempfile.gettempdir(), "sera_jax_test")

import jax
import pytest

from sera_jax import mesh as meshes
from sera_jax import programs

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.path.join(os.environ["XDG_CACHE_HOME"], "sera_jax", "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

SHARED = pathlib.Path(os.environ.get("SERA_JAX_SHARED", pathlib.Path(__file__).parents[2] / "shared"))


MAPS = pathlib.Path("/proc/self/maps")
MOST_MAPS = 40_000  # Linux gives a process 65,530 (vm.max_map_count); XLA dies of the next one by a segmentation fault


@pytest.fixture(autouse=True, scope="module")
def own_programs():
    """A file's compiled programs go when it is done: each holds memory maps, and together they would be too many."""
    yield
    jax.clear_caches()
    gc.collect()
    if MAPS.is_file():
        count = len(MAPS.read_bytes().splitlines())
        assert count < MOST_MAPS, f"{count} memory maps are left, expected fewer than {MOST_MAPS}: who keeps programs?"


@pytest.fixture(scope="session")
def one_device():
    """A mesh of one device."""
    return meshes.make(1, 1, 1, jax.devices()[:1])


@pytest.fixture(scope="session")
def eight_devices():
    """data 2 × fsdp 2 × tensor 2."""
    return meshes.make(2, 2, 2)


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data and the real small Llama; tests that need it skip where it is absent."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set SERA_JAX_SHARED)")
    return folder


class Stopped(Exception):
    """In the place of a kill."""


@pytest.fixture
def stopped_at(monkeypatch):
    """stopped_at(name, call): what `programs.<name>` builds raises at its call of this number, from 1 and counted over
    all that are built within the block, which has to end there.
    """

    @contextlib.contextmanager
    def stopped(name: str, call: int):
        build, made = getattr(programs, name), [0]

        def building(*args, **keywords):
            program = build(*args, **keywords)

            def counted(*a, **k):
                made[0] += 1
                if made[0] == call:
                    raise Stopped
                return program(*a, **k)

            return counted

        with monkeypatch.context() as patched, pytest.raises(Stopped):
            patched.setattr(programs, name, building)
            yield

    return stopped


@pytest.fixture
def small_files(monkeypatch):
    """small_files(n): within it the kernel lets no file of this process grow beyond n bytes. As on a full disk, the
    write that gets there is cut off in its middle and the next one fails.
    """

    monkeypatch.setattr("sera_jax.metrics._emit", lambda content: None)  # what a test prints goes to a file, too

    @contextlib.contextmanager
    def limit(most: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


WORDS = (
    "<unk> <s> </s> red blue green ball box cat dog sits runs sees the a on in big small and or it is was to".split()
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a model (config.json, word tokenizer; weights are drawn), preference pairs, prompts, and a reward
    function `tiny_reward:count` (different words of a response) and a preference function `tiny_reward:longer`; the
    pairs once more with gold (that function, a quarter of the labels flipped), and scored candidates of the prompts.
    """
    import json

    import numpy as np
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("tiny")
    model = folder / "model"
    model.mkdir()
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    ).save_pretrained(model)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (model / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    text = lambda low, high: " ".join(rng.choice(WORDS[3:], rng.integers(low, high)))
    rows = lambda count, make: "".join(json.dumps(make(i)) + "\n" for i in range(count))
    prompts = [text(3, 9) for _ in range(64)]
    pair = lambda i: {"id": f"p{i}", "prompt": prompts[i], "chosen": text(3, 12), "rejected": text(1, 9)}
    (folder / "pairs.jsonl").write_text(rows(44, pair))
    (folder / "prompts.jsonl").write_text(rows(20, lambda i: {"id": f"q{i}", "prompt": prompts[i + 44]}))
    count = lambda text: len(set(text.split()))
    known = []
    for i, line in enumerate((folder / "pairs.jsonl").read_text().splitlines()):
        row = json.loads(line)
        sides = sorted((row["chosen"], row["rejected"]), key=count, reverse=i % 4 != 1)
        gold = {"gold_chosen": count(sides[0]), "gold_rejected": count(sides[1]), "flipped": i % 4 == 1}
        known.append(row | gold | {"chosen": sides[0], "rejected": sides[1], "author": "tiny"})
    (folder / "gold.jsonl").write_text(rows(len(known), known.__getitem__))
    made = lambda i: {
        "prompt": prompts[i + 44],
        "responses": [text(1, 9) for _ in range(2 + i % 3)],
        "finished": [True, *[i % 2 == 0] * (1 + i % 3)],
        "scores": rng.normal(size=2 + i % 3).tolist(),
    }
    (folder / "candidates.jsonl").write_text(rows(18, made))
    (folder / "tiny_reward.py").write_text(
        "def count(prompt, response):\n    return len(set(response.split()))\n\n\n"
        "def longer(prompt, first, second):\n"
        "    gap = len(first.split()) - len(second.split())\n    return 0.5 + ((gap > 0) - (gap < 0)) / 4\n"
    )
    return folder


@pytest.fixture
def tiny_config(tiny, tmp_path, monkeypatch):
    """flags → TrainConfig of a small run in tmp_path on the tiny world, one device."""
    from sera_jax import config as configs

    monkeypatch.syspath_prepend(tiny)
    of_devices = meshes.make
    monkeypatch.setattr(
        meshes,
        "make",
        lambda d, f, t, devices=None, slices=1: of_devices(
            d, f, t, devices or jax.devices()[: d * f * t], slices=slices
        ),
    )

    def make(*flags: str, run: str = "run"):
        base = [
            f"--run.dir={tmp_path / run}",
            "--run.compilation_cache=off",
            "--run.log_every=1",
            "--run.save_every=2",
            f"--model.path={tiny / 'model'}",
            "--model.weights=random",
            f"--data.pairs=[{tiny / 'pairs.jsonl'}]",
            f"--data.prompts=[{tiny / 'prompts.jsonl'}]",
            "--data.max_length=48",
            "--data.max_prompt_length=24",
            "--optimizer.batch_size=8",
            "--optimizer.learning_rate=3e-3",
            "--optimizer.row_tokens=128",
            "--optimizer.microbatch_rows=1",
            "--loop.iterations=2",
            "--bootstrap.max_new_tokens=10",
            "--bootstrap.slots=16",
            "--bootstrap.unfinished=keep",
            "--mesh.fsdp=1",
        ]
        return configs.parse(configs.TrainConfig, [*base, *flags])

    return make


@pytest.fixture(scope="session")
def script() -> Callable[[str], types.ModuleType]:
    """Path from the root of the repository → a script that is no part of the package (launch/, tests/benchmarks/) as a
    module."""

    def loaded(path: str) -> types.ModuleType:
        spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, pathlib.Path(__file__).parents[1] / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return loaded
