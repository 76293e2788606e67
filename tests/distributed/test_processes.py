"""Two processes: one works and both know, an error too; both work and must agree; keys and arrays on all devices."""

import json

import pytest

SAID = """
import json, os, sys
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from sera_jax import mesh as meshes, processes

processes.join(True)
me, out = jax.process_index(), {}
done = []
out["told"] = processes.once(lambda: done.append(me) or {"a": np.arange(3), "b": [None, 0.1, "x"], "big": "y" * 5000})
out["told"]["a"] = out["told"]["a"].tolist()
out["done"] = done
out["held"] = processes.held(lambda: sys.stdout) is not None

def raised(call):
    try:
        return call()
    except Exception as error:
        return [type(error).__name__, str(error)]

def fails(error):
    raise error

out["user's"] = raised(lambda: processes.once(lambda: fails(ValueError("no such file"))))
out["other"] = raised(lambda: processes.once(lambda: fails(KeyError("k"))))
out["not plain"] = raised(lambda: processes.once(lambda: {1}))
out["agree"] = processes.agreed(lambda: 7 + me, lambda value: "the same", "things")
out["differ"] = raised(lambda: processes.agreed(lambda: me, str, "things"))
out["one fails"] = raised(lambda: processes.agreed(lambda: fails(ValueError("lost")) if me else 1, str, "things"))
out["one breaks"] = raised(lambda: processes.agreed(lambda: fails(OSError(5, "io")) if me == 0 else 1, str, "things"))

mesh = meshes.make(1, 2, 2)
key = meshes.put(jax.random.key(3), meshes.replicated(mesh))
rows = meshes.put(np.arange(8.0).reshape(4, 2), meshes.rows_sharding(mesh))
out["devices"] = [[d.process_index for d in line] for line in mesh.devices[0]]
noise = jax.jit(lambda k, x: x + jax.random.normal(k, x.shape), out_shardings=rows.sharding)(key, rows)
out["whole"] = [key.is_fully_addressable, noise.is_fully_addressable, meshes.get(noise).tolist()]
with open(f"said-{me}.json", "w") as file:
    json.dump(out, file)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tmp_path_factory.mktemp("said")


def test_what_two_processes_do_and_know(world, joined):
    group = joined(["-c", SAID], ["-c", SAID], devices=2)
    assert group.ended() == [0, 0], group.said()
    zero, one = (json.loads((world / f"said-{i}.json").read_text()) for i in (0, 1))
    assert zero["told"] == one["told"] == {"a": [0, 1, 2], "b": [None, 0.1, "x"], "big": "y" * 5000}
    assert (zero["done"], one["done"]) == ([0], []) and (zero["held"], one["held"]) == (True, False)
    assert zero["user's"] == one["user's"] == ["ValueError", "no such file"]
    assert zero["other"] == ["KeyError", "'k'"] and one["other"] == ["RuntimeError", "process 0: KeyError: 'k'"]
    assert zero["not plain"][0] == "TypeError" and "expected what JSON can hold" in one["not plain"][1]
    assert (zero["agree"], one["agree"]) == (7, 8)
    differ = "things of process 0 and of 1 differ, expected the same on all 2 processes: give each the same command"
    assert (
        zero["differ"][0] == "ValueError" and zero["differ"][1].startswith(differ) and one["differ"] == zero["differ"]
    )
    assert zero["one fails"] == one["one fails"] == ["ValueError", "lost"]
    assert zero["one breaks"][0] == "OSError" and one["one breaks"] == [
        "RuntimeError",
        "process 0: OSError: [Errno 5] io",
    ]
    assert zero["devices"] == one["devices"] == [[0, 0], [1, 1]]
    assert zero["whole"] == one["whole"] and zero["whole"][:2] == [False, False]
    assert len({value for row in zero["whole"][2] for value in row}) == 8
