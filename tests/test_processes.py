"""One process is a plain call; what is told arrives as it was; who finds whom. Two processes: tests/distributed/."""

import re

import jax
import numpy as np
import pytest

from sera_jax import processes


def test_one_process_does_its_own_work():
    thing = object()  # not even something that could be told
    assert processes.leads() and processes.once(lambda: thing) is thing and processes.held(lambda: thing) is thing
    assert processes.agreed(lambda: thing, lambda value: pytest.fail("nobody to agree with"), "things") is thing
    with pytest.raises(KeyError):
        processes.once(lambda: {}["no"])


def test_what_is_told_arrives_bit_for_bit():
    value = {
        "numbers": [1, 2.5, float("nan"), None, True, "ü\n"],
        "arrays": [np.float32([[1, np.nan], [3e-45, -0.0]]), np.zeros((0, 3), bool), np.int64(7), np.float32(0.1)],
        "nested": {"a": [np.arange(3, dtype=np.uint8)[::-1]]},
    }
    back = processes._decoded(processes._encoded(value))
    assert back["numbers"][:2] == [1, 2.5] and np.isnan(back["numbers"][2])
    assert back["numbers"][3:] == [None, True, "ü\n"]
    for got, want in zip([*back["arrays"], *back["nested"]["a"]], [*value["arrays"], *value["nested"]["a"]]):
        assert got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()
        assert not got.shape or got.flags.writeable
    with pytest.raises(TypeError, match="once: got a set, expected what JSON can hold, or NumPy arrays"):
        processes._encoded({1, 2})


@pytest.fixture
def asked(monkeypatch):
    """What jax.distributed.initialize is called with; it can be called once in the life of a process."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **keywords: calls.append(keywords))
    return calls


def test_alone_is_the_default_and_several_are_asked_for(asked):
    environment = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    processes.join(False, environment)
    assert asked == []
    processes.join(True, environment)
    processes.join(True, {})  # the cluster knows
    processes.join(True, {"JAX_COORDINATOR_ADDRESS": "host:1234"})  # and JAX reads this one by itself
    leave = {"shutdown_timeout_seconds": 60}
    own = {"coordinator_address": "host:1234", "num_processes": 2, "process_id": 1}
    assert asked == [own | leave, leave, leave]


@pytest.mark.parametrize(
    "given",
    [
        {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
        {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2"},
        {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
        {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
    ],
)
def test_an_environment_that_does_not_say_who_is_who(asked, given):
    told = ", ".join(
        f"{name}={given.get(name, '')!r}" for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    )
    said = (
        f"mesh.distributed: the environment has {told}; expected host:port of process 0, the number of processes, and"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        processes.join(True, given)
    assert asked == []


def test_a_machine_that_is_no_cluster_is_told_what_to_set():
    jax.devices()  # JAX itself refuses now
    with pytest.raises(ValueError, match=r"^mesh\.distributed is true, but this process cannot join others \(.*JAX_P"):
        processes.join(True, {})
