"""What ranks, explores and samples beside the policy, on two processes of two devices each: the same as on one of four.

A reward model is trained, with adapters, and ranks candidates; Γ chooses pairs, and lowers rewards; a mixture of two
models samples the opponents; a judge is asked; rounds of policy gradient and RAFT learn from their own samples.
"""

import collections
import http.server
import json
import pathlib
import shutil
import threading

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy

SCRIPT = """
import json, sys
from sera_jax import config as configs, processes, programs, reward_model, train

several, out, tiny, url = json.loads(sys.argv[1]), *sys.argv[2:]
processes.join(several)
shared = [
    "--run.compilation_cache=off", "--run.log_every=1", "--run.save_every=100", f"--model.path={tiny}/model",
    "--model.weights=random", f"--data.pairs=[{tiny}/pairs.jsonl]", "--data.max_length=48",
    "--data.max_prompt_length=24", "--optimizer.batch_size=8", "--optimizer.learning_rate=1e-3", "--mesh.fsdp=2",
    "--mesh.tensor=2", "--model.remat=none",
]
samples = [
    f"--data.prompts=[{tiny}/prompts.jsonl]", "--bootstrap.max_new_tokens=8", "--bootstrap.slots=16",
    "--bootstrap.unfinished=keep",
]
reward_model.train(configs.parse(configs.RewardModelConfig, [
    *shared, f"--run.dir={out}/judge", "--data.validation=0.2", "--lora.rank=2",
]))
runs = {
    "explore": [
        "--reward.source=model", f"--reward.model={out}/judge/export", "--bootstrap.pair_rule=explore",
        "--bootstrap.from_iteration=1", "--explore.dimension=8", "--loop.iterations=1",
    ],
    "asked": [
        "--reward.source=judge", "--judge.model=m", "--judge.mode=grade", f"--judge.base_url={url}",
        "--bootstrap.from_iteration=1", "--loop.iterations=1",
    ],
    "pessimistic": [
        "--loss.name=dpo_pessimistic", "--bootstrap.fresh=0", "--explore.dimension=8", "--loop.iterations=1",
    ],
    "mixture": [
        "--loss.name=sppo", "--reward.source=preference_function", "--reward.function=tiny_reward:longer",
        "--select.from_iteration=1", "--select.score=random", "--select.keep=0", "--bootstrap.from_iteration=1",
        "--bootstrap.fresh=1", "--bootstrap.mixture=0.5", "--bootstrap.pair_rule=random", "--loop.iterations=2",
    ],
    "ppo": [
        "--reward.source=function", "--reward.function=tiny_reward:count", "--on_policy.rounds=2",
        "--on_policy.prompts=8", "--on_policy.algorithm=policy_gradient", "--on_policy.passes=2",
        "--on_policy.kl=loss", "--on_policy.ratio=token", "--on_policy.advantage=group", "--on_policy.average=token",
        "--loop.iterations=1",
    ],
    "rloo": [
        "--reward.source=function", "--reward.function=tiny_reward:count", "--on_policy.rounds=2",
        "--on_policy.prompts=8", "--on_policy.algorithm=policy_gradient", "--on_policy.beta=0.1",
        "--loop.iterations=1",
    ],
    "raft": [
        "--reward.source=model", f"--reward.model={out}/judge/export", "--on_policy.rounds=2", "--on_policy.prompts=8",
        "--on_policy.algorithm=raft", "--on_policy.beta=0.1", "--on_policy.kl=reward", "--loop.iterations=1",
    ],
}
for name, flags in runs.items():
    train.train(configs.parse(configs.TrainConfig, [*shared, f"--run.dir={out}/{name}", *samples, *flags]))
"""
RUNS = ("explore", "asked", "pessimistic", "mixture", "ppo", "rloo", "raft")


class Judge(http.server.ThreadingHTTPServer):
    """/{run}/chat/completions, a grade by the question's length. asked: how often each run asked each question."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked, self.lock = collections.defaultdict(collections.Counter), threading.Lock()


class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (question,) = (message["content"] for message in request["messages"])
        with self.server.lock:
            self.server.asked[self.path.split("/")[1]][question] += 1
        message = {"role": "assistant", "content": str(1 + len(question) % 10)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
        told = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def judge():
    with Judge() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    shutil.copy(tiny / "tiny_reward.py", folder)
    return folder


@pytest.fixture(scope="module")
def made(world, tiny, joined, judge):
    """The folders of what two processes made, and of what one did."""

    def command(several: str, out: str) -> list[str]:
        (world / out).mkdir(exist_ok=True)
        url = f"http://127.0.0.1:{judge.server_address[1]}/{out}"
        return ["-c", SCRIPT, several, str(world / out), str(tiny), url]

    both = command("true", "together")
    two, one = joined(both, both, devices=2), joined(command("false", "alone"), devices=4)
    assert two.ended() == [0, 0], two.said()
    assert one.ended() == [0], one.said()
    talk, silence = two.said()
    said = {line for line in talk.splitlines() if line.strip() and "Gloo" not in line}
    assert "reward model" in talk and not said & set(silence.splitlines()), silence
    return world / "together", world / "alone"


def tables(run: pathlib.Path, pattern: str) -> dict[str, dict]:
    return {str(p.relative_to(run)): pyarrow.parquet.read_table(p).to_pydict() for p in sorted(run.rglob(pattern))}


def logged(run: pathlib.Path, key: str) -> list[float]:
    return [r[key] for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if key in r]


def assert_near(one: dict, other: dict, exact: tuple[str, ...], near: dict[str, float]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        for column in exact:
            assert one[name][column] == other[name][column], (name, column)
        for column, least in near.items():
            np.testing.assert_allclose(one[name][column], other[name][column], atol=least, err_msg=f"{name} {column}")


@pytest.mark.parametrize("name", ["judge", *RUNS])
def test_two_processes_train_what_one_does(made, name):
    """The same samples, updates and weights. Measured: bit for bit, since a sum of two has one order; 1e-6 is left for
    machines that sum all four devices otherwise, 1/1000 of what an update moves."""
    together, alone = (folder / name for folder in made)
    texts = [
        {str(p.relative_to(run)): p.read_text() for p in run.rglob("candidates*.jsonl")} for run in (together, alone)
    ]
    assert texts[0] == texts[1] and bool(texts[0]) == (name in ("explore", "asked", "mixture"))
    losses = [logged(run, "loss") for run in (together, alone)]
    assert len(losses[0]) >= 2
    np.testing.assert_allclose(*losses, rtol=1e-6, atol=1e-6)
    two, one = (safetensors.numpy.load_file(run / "export" / "model.safetensors") for run in (together, alone))
    assert two.keys() == one.keys()
    for key in one:
        np.testing.assert_allclose(two[key], one[key], atol=1e-6, err_msg=key)


def test_a_reward_model_says_the_same_of_held_out_pairs(made):
    two, one = (json.loads((run / "judge" / "result.json").read_text()) for run in made)
    assert two["validation/accuracy"] == one["validation/accuracy"]
    assert two["validation/loss"] == pytest.approx(one["validation/loss"], abs=1e-5)


def test_pairs_by_a_reward_model_and_by_uncertainty(made):
    together, alone = (tables(folder / "explore", "fresh.parquet") for folder in made)
    assert len(together) == 1
    near = {"reward_chosen": 1e-5, "reward_rejected": 1e-5, "gamma": 1e-4}
    assert_near(together, alone, ("id", "kept", "chosen", "rejected"), near)
    assert min(min(table["gamma"]) for table in together.values()) > 0.01


def test_the_covariance_of_given_pairs(made):
    """Split over both processes while it grows; the bonus of each response is behind the losses that are compared."""
    together, alone = (np.load(folder / "pessimistic/covariance/0.npz") for folder in made)
    assert together["sigma"].shape == (8, 8) and not np.allclose(together["sigma"], np.eye(8), atol=0.1)
    for name in ("sigma", "centre"):
        np.testing.assert_allclose(together[name], alone[name], rtol=1e-5, atol=1e-5)


def test_a_judge_is_asked_by_one_process(made, judge):
    together, alone = (tables(folder / "asked", "fresh.parquet") for folder in made)
    assert_near(together, alone, ("id", "kept", "chosen", "rejected", "reward_chosen", "reward_rejected"), {})
    assert together and judge.asked["together"] == judge.asked["alone"]
    assert set(judge.asked["together"].values()) == {1} and judge.asked["together"].total() > 10


def test_opponents_of_a_mixture(made):
    together, alone = (tables(folder / "mixture", "*.parquet") for folder in made)
    opponents = [name for name in together if "opponents" in name or "probabilit" in name]
    assert opponents, sorted(together)
    for name in opponents:
        assert repr(together[name]) == repr(alone[name])


@pytest.mark.parametrize("name", ["ppo", "rloo", "raft"])
def test_rounds(made, name):
    together, alone = (tables(folder / name, "rounds/*.parquet") for folder in made)
    assert len(together) == 2
    near = {"reward": 1e-5, "kl": 1e-5, "weight": 1e-5}  # of RAFT 1 or 0: the same ones are imitated
    assert_near(together, alone, ("prompt_id", "response", "length", "finished"), near)
    assert any(np.abs(table["kl"]).max() > 1e-3 for table in together.values())
