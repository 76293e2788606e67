"""The floor under every test: eight simulated CPU devices, no silent rank promotion, one shared compilation cache."""

import os
import pathlib
import tempfile

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

import jax
import pytest

from sera_jax import mesh as meshes

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "sera_jax_test_xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

SHARED = pathlib.Path(os.environ.get("SERA_JAX_SHARED", pathlib.Path(__file__).parents[2] / "shared"))


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
