"""The other doors on two processes: the files of one process on as many devices, each written once."""

import json
import shutil

import jax
import numpy as np
import pyarrow.parquet
import pytest

from sera_jax import hf, preference, programs
from sera_jax.preference import Form

SCRIPT = """
import json, sys
from sera_jax import config as configs, evaluate, generate, ledger, mesh as meshes, policies, processes, review

several, out, policy, reference, judge, tiny = json.loads(sys.argv[1]), *sys.argv[2:]
processes.join(several)
mesh = ["--mesh.fsdp=2", "--mesh.tensor=2"]
prompts = f"[{tiny}/prompts.jsonl]"
ask = lambda record, *flags: configs.parse(record, [*mesh, *flags])
generate.generate(ask(
    configs.GenerateConfig, f"--model.path={policy}", f"--prompts={prompts}", f"--out={out}/said.jsonl",
    "--candidates=2", "--temperature=1", "--max_new_tokens=8", "--slots=16",
))
evaluate.evaluate(ask(
    configs.EvaluateDoorConfig, f"--policy={policy}", f"--baseline={reference}", f"--evaluate.prompts={prompts}",
    "--evaluate.function=tiny_reward:count", "--evaluate.max_new_tokens=8", "--slots=16", f"--out={out}/result.json",
))
review.review(ask(
    configs.ReviewConfig, f"--policy={policy}", f"--reference={reference}", f"--data.pairs=[{tiny}/pairs.jsonl]",
    f"--out={out}/review",
))
folder, form = policies.open_preference_model(judge, meshes.make(1, 2, 2), compute="float32")
asked = [("the cat", one, other) for one in ("red ball", "dog", "a box") for other in ("blue", "on the ball")]
prob, _ = policies.folder_preferences(folder, form, asked, ledger=ledger.Ledger(f"{out}/asked"), label="asked")
processes.once(lambda: open(f"{out}/asked.json", "w").write(json.dumps(prob.tolist())))
assert processes.once(lambda: prob.tolist()) == prob.tolist()  # the same on all
"""


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory, one_device):
    """A folder with two models and a reward function."""
    folder = tmp_path_factory.mktemp("doors")
    shutil.copy(tiny / "tiny_reward.py", folder)
    arch = hf.read_arch(tiny / "model")
    for seed, name in enumerate(("policy", "reference")):
        params = programs.random_params(arch, one_device)(jax.random.key(seed))
        hf.save(folder / name, arch, params, source=tiny / "model", dtype=np.float32)
    form = preference.told(Form(False, ("red", "blue"), max_length=96, max_prompt_length=48))
    hf.save(folder / "judge", arch, params, source=tiny / "model", dtype=np.float32, extra=form)
    return folder


def test_doors_on_two_processes(world, tiny, joined):
    def command(several: str, out: str) -> list[str]:
        (world / out).mkdir(exist_ok=True)
        paths = [
            str(path) for path in (world / out, *(world / name for name in ("policy", "reference", "judge")), tiny)
        ]
        return ["-c", SCRIPT, several, *paths]

    both = command("true", "together")
    two, one = joined(both, both, devices=2), joined(command("false", "alone"), devices=4)
    assert two.ended() == [0, 0], two.said()
    assert one.ended() == [0], one.said()
    together, alone = world / "together", world / "alone"
    names = lambda folder: sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix != ".logp")
    assert names(together) == names(alone)
    assert (together / "said.jsonl").read_text() == (alone / "said.jsonl").read_text()
    results = [json.loads((folder / "result.json").read_text()) for folder in (together, alone)]
    kl = [result.pop("kl") for result in results]
    assert results[0] == results[1] and kl[0] == pytest.approx(kl[1], abs=1e-5) and abs(kl[0]) > 0.1
    assert (together / "review/kept.jsonl").read_text() == (alone / "review/kept.jsonl").read_text()
    tables = [pyarrow.parquet.read_table(folder / "review/review.parquet").to_pydict() for folder in (together, alone)]
    assert tables[0]["kept"] == tables[1]["kept"]
    np.testing.assert_allclose(tables[0]["margin"], tables[1]["margin"], atol=1e-5)
    said = [np.array(json.loads((folder / "asked.json").read_text())) for folder in (together, alone)]
    np.testing.assert_allclose(*said, atol=1e-5)
    assert np.ptp(said[0]) > 0.01
    talk, silence = two.said()
    assert "win rate" in talk
    said = {line for line in talk.splitlines() if line.strip() and "Gloo" not in line}
    assert not said & set(silence.splitlines()), silence
