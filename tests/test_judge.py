"""The judge against a real HTTP server on this machine: labels, both orders, everything that goes wrong on the way,
what is asked again and what is not, where the key may not be, and a run of the loop by it.
"""

import collections
import email.utils
import http.server
import json
import math
import pathlib
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tomllib

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy

from sera_jax import judge, processes
from sera_jax import train as trainer
from sera_jax.disk import DiskError
from sera_jax.judge import endpoint as endpoints
from sera_jax.judge import forms, labels

KEY = "sk-very-secret-0123456789"
PAIR = re.compile(r"### Prompt\n(.*)\n\n### Response A\n(.*)\n\n### Response B\n(.*)\n\n### Which", re.DOTALL)
ONE = re.compile(r"### Prompt\n(.*)\n\n### Response\n(.*)\n\n### Grade", re.DOTALL)


class Server(http.server.ThreadingHTTPServer):
    """/v1/chat/completions. answer: the question's parts → a reply's text, or the probability of A (then the reply has
    log-probs). fault: (question, number of its try) → the name of a fault, or None. seen: (when, question, request,
    fault) of every request, in order.
    """

    daemon_threads, request_queue_size = True, 256

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.fault, self.seen = lambda *parts: "A", lambda question, tries: None, []
        self.after, self.body, self.key, self.lock = "0", "broken", None, threading.Lock()
        self.tries, self.refuses = collections.Counter(), None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """Clients that have gone away are what the tests are about."""

    def answered(self) -> collections.Counter:
        """Question → how often it had a good answer."""
        return collections.Counter(question for _, question, _, fault in self.seen if fault is None)


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (message,) = request["messages"]
        question = message["content"]
        with server.lock:
            server.tries[question] += 1
            fault = server.fault(question, server.tries[question])
            if server.key is not None and self.headers["Authorization"] != f"Bearer {server.key}":
                fault = "401"
            if self.server.refuses in request:
                fault = "refused"
            server.seen.append((time.monotonic(), question, request, fault))
        assert self.path == "/v1/chat/completions" and request["model"] == "m"
        if fault is not None:
            return self.misbehave(fault)
        parts = (PAIR.search(question) or ONE.search(question)).groups()
        self.send(200, json.dumps(completion(server.answer(*parts), "logprobs" in request)))

    def misbehave(self, fault: str) -> None:
        if fault in ("reset", "cut"):
            if fault == "cut":
                self.send(200, '{"choices": [', length=500)
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault == "drop":
            self.close_connection = True
        elif fault == "slow":
            time.sleep(2.0)
        elif fault == "echo":
            self.send(401, json.dumps({"error": {"message": f"bad key: {self.headers['Authorization']}"}}))
        elif fault == "refused":
            self.send(400, json.dumps({"error": {"message": f"Unsupported parameter: '{self.server.refuses}'"}}))
        elif fault.isdigit():
            self.send(int(fault), json.dumps({"error": {"message": self.server.body}}))
        else:
            self.send(200, BODIES[fault])

    def send(self, status: int, body: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length or len(body.encode())))
        if status in (429, 503):
            self.send_header("Retry-After", self.server.after)
        self.end_headers()
        self.wfile.write(body.encode())


def completion(answer: str | float, wanted: bool, **changes) -> dict:
    """A chat completion; a number is the probability of A, shared among ways to write it, with a tenth for others."""
    text = answer if isinstance(answer, str) else "A" if answer >= 0.5 else "B"
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if wanted and not isinstance(answer, str):
        likely = {"A": 0.6 * answer, " A": 0.3 * answer, "B": 0.9 * (1 - answer), "tie": 0.1}
        top = [{"token": token, "logprob": math.log(p) if p else -9999.0} for token, p in likely.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": -0.1, "top_logprobs": top}]}
    usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
    return {"id": "x", "object": "chat.completion", "choices": [choice | changes], "usage": usage}


BODIES = {
    "page": "<html>Bad gateway</html>",
    "nothing": "",
    "deep": "[" * 100_000,
    "list": "[]",
    "empty": json.dumps({"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 0}}),
    "null": json.dumps({"choices": [{"message": {"content": None}}]}),
    "strange": json.dumps({"choices": "A", "usage": 7}),
    "undecided": json.dumps(completion("I cannot say.", False)),
    "wild": json.dumps(
        completion("A", False, logprobs={"content": [{"token": "A", "top_logprobs": [{"token": "A"}]}]})
    ),
}
FAULTS = ["429", "500", "502", "503", "408", "reset", "cut", "drop", *BODIES]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoints, "BACKOFF", 0.002)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def endpoint(server, **changes) -> judge.Endpoint:
    values = {
        "model": "m", "base_url": server.url, "key_env": "OPENAI_API_KEY", "temperature": 0.0, "max_tokens": 16,
        "timeout": 10.0, "retries": 2, "concurrent": 8, "per_minute": 0,
    }  # fmt: skip
    return judge.Endpoint(**values | changes)


def asked(server, cache, prompts, texts_PC, mode="pairwise", prices=None, **changes):
    """Judged by the shipped template."""
    form = judge.template("", mode)
    return judge.MODES[mode](
        endpoint(server, **changes),
        prices or judge.Prices(),
        form,
        prompts,
        texts_PC,
        cache=cache / "judge.jsonl",
        label="judge",
    )


def lines(cache: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (cache / "judge.jsonl").read_text().splitlines()]


# --- labels -----------------------------------------------------------------------------------------------------------

GIVEN = {("p", "a", "b"): 0.9, ("p", "b", "a"): 0.3, ("p", "a", "c"): 0.5, ("p", "c", "a"): 0.6,
         ("p", "b", "c"): 0.25, ("p", "c", "b"): 1.0, ("q", "x", "z"): 0.0, ("q", "z", "x"): 0.2}  # fmt: skip


def test_probabilities_by_hand(server, tmp_path):
    """Both orders of every two; P of i over j is the mean of what both say; rewards are means over the others."""
    server.answer = lambda *parts: GIVEN[parts]
    got = asked(server, tmp_path, ["p", "q", "r"], [["a", "b", "c"], ["x", None, "z"], [None, "alone", None]])
    p = lambda i, j: (GIVEN[i] + 1 - GIVEN[j]) / 2
    ab, ac, bc = (p(("p", i, j), ("p", j, i)) for i, j in ("ab", "ac", "bc"))
    xz, nan = p(("q", "x", "z"), ("q", "z", "x")), np.nan
    want = [
        [[0.5, ab, ac], [1 - ab, 0.5, bc], [1 - ac, 1 - bc, 0.5]],
        [[0.5, nan, xz], [nan, nan, nan], [1 - xz, nan, 0.5]],
        [[nan, nan, nan], [nan, 0.5, nan], [nan, nan, nan]],
    ]
    assert got.prob_PCC.dtype == np.float32 and got.rewards_PC.dtype == np.float32
    np.testing.assert_allclose(got.prob_PCC, want, atol=1e-6)
    rewards = [[(ab + ac) / 2, (1 - ab + bc) / 2, (2 - ac - bc) / 2], [xz, nan, 1 - xz], [nan, 0.5, nan]]
    np.testing.assert_allclose(got.rewards_PC, rewards, atol=1e-6)
    assert {PAIR.search(question).groups() for question in server.answered()} == set(GIVEN)
    assert set(server.answered().values()) == {1}
    for _, _, request, _ in server.seen:
        assert request["temperature"] == 0 and request["max_tokens"] == 16 and request["logprobs"] is True


def test_without_log_probs_a_label_is_one_zero_or_a_tie(server, tmp_path):
    says = {("a", "b"): "A", ("b", "a"): "B", ("a", "c"): "tie", ("c", "a"): "B", ("b", "c"): "B", ("c", "b"): "B"}
    server.answer = lambda prompt, *pair: says[pair]
    got = asked(server, tmp_path, ["p"], [["a", "b", "c"]])
    np.testing.assert_array_equal(got.prob_PCC, [[[0.5, 1, 0.75], [0, 0.5, 0.5], [0.25, 0.5, 0.5]]])
    assert got.told["judge/consistency"] == pytest.approx(1 / 3)  # a over b alone is said twice


def test_a_judge_that_always_takes_the_first_is_found_out(server, tmp_path, capsys):
    got = asked(server, tmp_path, ["p", "q"], [["a", "b"], ["c", "d"]])
    assert got.told["judge/consistency"] == 0 and got.told["judge/first"] == 1
    np.testing.assert_array_equal(got.prob_PCC, np.full((2, 2, 2), 0.5))
    assert "judge m: both orders agree on 0 % of 2 pairs" in capsys.readouterr().out
    server.answer = lambda prompt, first, second: 0.8 if first < second else 0.2
    got = asked(server, tmp_path, ["s", "t"], [["a", "b"], ["c", "d"]])
    assert got.told["judge/consistency"] == 1 and got.told["judge/first"] == pytest.approx(0.5)


def test_grades(server, tmp_path):
    server.answer = lambda prompt, response: {"a": "8/10", "b": "Grade: 7.5", "c": "ten"}[response]
    got = asked(server, tmp_path, ["p", "q"], [["a", None, "b"], ["c"]], mode="grade")
    np.testing.assert_array_equal(got.rewards_PC, [[8, np.nan, 7.5], [10, np.nan, np.nan]])
    assert got.prob_PCC is None and "judge/consistency" not in got.told
    assert not any("logprobs" in request for _, _, request, _ in server.seen)


def test_costs(server, tmp_path, capsys):
    """Tokens and cost are those of the labels, asked for now or before; requests and retries those of this process."""
    server.fault = lambda question, tries: "undecided" if tries == 1 and "### Response A\na" in question else None
    told = asked(server, tmp_path, ["p"], [["a", "b"]], prices=judge.Prices(2.0, 10.0)).told
    want = {"judge/labels": 2, "judge/tokens_in": 300, "judge/tokens_out": 3, "judge/cost": 300 * 2e-6 + 3 * 1e-5}
    assert {key: told[key] for key in want} == pytest.approx(want)
    assert (told["perf/judge_requests"], told["perf/judge_retries"]) == (3, 1)
    said = "judge m: 2 labels, 0 of them known; 3 requests, 1 retries; 300 tokens in, 3 out, cost 0.00063"
    assert said in capsys.readouterr().out
    again = asked(server, tmp_path, ["p"], [["a", "b"]], prices=judge.Prices(2.0, 10.0)).told
    assert {k: v for k, v in again.items() if "perf" not in k} == {k: v for k, v in told.items() if "perf" not in k}
    assert (again["perf/judge_requests"], again["perf/judge_retries"]) == (0, 0) and len(server.seen) == 3
    assert "judge/cost" not in asked(server, tmp_path, ["p"], [["a", "b"]]).told


def test_equal_questions_are_asked_once_and_equal_responses_never(server, tmp_path):
    server.answer = lambda *parts: 0.7
    got = asked(server, tmp_path, ["p", "p", "q"], [["a", "b"], ["b", "a"], ["same", "same"]])
    assert len(server.seen) == 2 == len(lines(tmp_path))
    np.testing.assert_allclose(got.prob_PCC, np.full((3, 2, 2), 0.5))
    assert got.told["judge/labels"] == 2


# --- what it reads ----------------------------------------------------------------------------------------------------


def test_shipped_templates_hold_what_is_judged(server, tmp_path):
    """Also texts that look like fields; messages one below the other."""
    messages = ({"role": "system", "content": "Be {first}."}, {"role": "user", "content": "2 + 2?\nQuick!"})
    asked(server, tmp_path, [messages], [["{second}", "{4}"]])
    want = "[system]\nBe {first}.\n\n[user]\n2 + 2?\nQuick!"
    parts = sorted(PAIR.search(question).groups() for question in server.answered())
    assert parts == [(want, "{4}", "{second}"), (want, "{second}", "{4}")]


def test_shipped_templates_are_installed(tmp_path, monkeypatch):
    """Where there is no checkout beside the package, they are read from where pyproject.toml puts them."""
    root = pathlib.Path(judge.__file__).parents[2]
    ((place, patterns),) = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"][
        "data-files"
    ].items()
    files = {path.name: path.read_text() for pattern in patterns for path in root.glob(pattern)}
    assert set(files) == {f"{mode}.txt" for mode in judge.MODES}
    assert forms.SHIPPED[1] == pathlib.Path(sys.prefix) / place
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(forms, "SHIPPED", (tmp_path / "none", tmp_path))
    assert {f"{mode}.txt": judge.template("", mode) for mode in judge.MODES} == files


def test_templates_of_ones_own(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text('{"p": {prompt}} {first}|{second}')
    form = judge.template(str(file), "pairwise")
    assert forms.filled(form, {"prompt": "P", "first": "1", "second": "2"}) == '{"p": P} 1|2'
    for text, mode, said in (
        (
            "{prompt} {first}",
            "pairwise",
            "lacks the field {second}, expected {prompt}, {first} and {second} for judge.m",
        ),
        ("{first} {second}", "pairwise", "lacks the field {prompt}, expected {prompt}, {first} and {second}"),
        ("{prompt}", "grade", "lacks the field {response}, expected {prompt} and {response} for judge.mode 'grade'."),
        (
            "{prompt} {first} {second} {response}",
            "pairwise",
            "has the field {response}, which judge.mode 'pairwise' doe",
        ),
    ):
        file.write_text(text)
        with pytest.raises(ValueError) as error:
            judge.template(str(file), mode)
        assert str(error.value).startswith(f"judge.template: {file} {said}")
    with pytest.raises(ValueError, match="nowhere.txt cannot be read .*expected a text file with the fields {prompt}"):
        judge.template("nowhere.txt", "grade")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A", 1),
        (" b\n", 0),
        ("**B**", 0),
        ("Tie.", 0.5),
        ("Response A is better.", 1),
        ("(A)", 1),
        ("The answer is: B", 0),
    ]
    + [("A good try, but the other is right: [[B]]", 0), ("[[A]]? No. [[C]]", 0.5), ("", None), ("AB", None)]
    + [("A or B", None), ("A good response", None), ("neither", None), ("I prefer A", None)],
)
def test_verdicts(text, value):
    if value is not None:
        assert forms.verdict(completion(text, False)) == value
        return
    with pytest.raises(ValueError, match="^the reply .* is no verdict, expected A, B or tie$"):
        forms.verdict(completion(text, False))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("10/10", 10),
        ("Grade: 8.5", 8.5),
        ("eight", 8),
        ("**3** out of 10", 3),
        ("On a scale of 1 to 10: 4", 4),
    ]
    + [
        ("2 errors, 1 lie: [[2]]", 2),
        ("0", None),
        ("11", None),
        ("-3", None),
        ("between 3 and 5", None),
        ("good", None),
    ],
)
def test_readings_of_grades(text, value):
    if value is not None:
        assert forms.grade(completion(text, False)) == value
        return
    with pytest.raises(ValueError, match="^the reply .* is no grade, expected one number from 1 to 10$"):
        forms.grade(completion(text, False))


def test_log_probs_are_read_where_the_verdict_stands():
    top = lambda **likely: [{"token": t, "logprob": math.log(p)} for t, p in likely.items()]
    tokens = [
        {"token": "A", "logprob": 0.0, "top_logprobs": top(A=1.0)},
        {"token": " thought", "logprob": 0.0, "top_logprobs": top(B=1.0)},
        {"token": " [[", "logprob": 0.0, "top_logprobs": []},
        {"token": "A", "logprob": 0.0, "top_logprobs": top(A=0.3, b=0.1, C=0.6)},
        {"token": "]]", "logprob": 0.0, "top_logprobs": []},
    ]
    reply = completion("A thought [[A]]", False, logprobs={"content": tokens})
    assert forms.verdict(reply) == pytest.approx(0.75)
    alone = completion("B", False, logprobs={"content": [{"token": "B", "logprob": -0.2, "top_logprobs": []}]})
    assert forms.verdict(alone) == 0
    other = completion("B", False, logprobs={"content": [{"token": "~", "logprob": -0.2, "top_logprobs": []}]})
    assert forms.verdict(other) == 0
    with pytest.raises(ValueError, match="cut off at judge.max_tokens"):
        forms.verdict(completion("Well, I", False, finish_reason="length"))


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_asked_again(server, tmp_path, fault):
    server.answer, server.fault = lambda *parts: 0.75, lambda question, tries: fault if tries <= 2 else None
    got = asked(server, tmp_path, ["p"], [["a", "b"]])
    assert [entry[3] for entry in server.seen].count(fault) == 4 == got.told["perf/judge_retries"]
    assert set(server.answered().values()) == {1} and len(server.answered()) == 2 == len(lines(tmp_path))
    assert [label["value"] for label in lines(tmp_path)] == pytest.approx([0.75, 0.75])


def test_a_slow_reply_is_asked_for_again(server, tmp_path):
    server.fault = lambda question, tries: "slow" if tries == 1 else None
    began = time.monotonic()
    got = asked(server, tmp_path, ["p"], [["a", "b"]], timeout=0.3)
    assert 0.3 < time.monotonic() - began < 1.9 and got.told["perf/judge_retries"] == 2


def test_a_thousand_faults_lose_no_label_and_double_none(server, tmp_path):
    """250 questions, each fails four times, in mixed ways, before it is answered; counted by the server."""
    kinds = [*(FAULTS * 3), "slow"]
    turn = iter(range(10**6))
    server.fault = lambda question, tries: kinds[next(turn) % len(kinds)] if tries <= 4 else None
    value = lambda prompt, first, second: (int(prompt) + 1) / 200 if first < second else 1 - (int(prompt) + 1) / 200
    server.answer = value
    prompts = [str(n) for n in range(125)]
    got = asked(server, tmp_path, prompts, [["a", "b"]] * 125, retries=4, concurrent=32, timeout=1.5)
    faults = collections.Counter(entry[3] for entry in server.seen if entry[3] is not None)
    assert sum(faults.values()) == 1000 and set(faults) == set(kinds) and got.told["perf/judge_retries"] == 1000
    assert len(server.answered()) == 250 and set(server.answered().values()) == {1}
    kept = lines(tmp_path)
    assert len(kept) == len({label["key"] for label in kept}) == 250
    want = [value(prompt, "a", "b") for prompt in prompts]
    np.testing.assert_allclose(got.prob_PCC[:, 0, 1], want, atol=1e-6)
    assert got.told["judge/consistency"] >= 124 / 125  # one pair may stand at 0.5


def test_retry_after_holds_for_all(server, tmp_path):
    server.after = "0.6"
    first = threading.Event()

    def fault(question, tries):
        if not first.is_set():
            first.set()
            return "429"

    server.fault = fault
    asked(server, tmp_path, [str(n) for n in range(6)], [["a", "b"]] * 6, concurrent=2)
    when = np.array([entry[0] for entry in server.seen])
    assert ((when > when[0] + 0.3) & (when < when[0] + 0.55)).sum() == 0 and (when > when[0] + 0.55).sum() >= 9


def test_retry_after_as_a_date():
    assert 18 < endpoints._seconds(email.utils.formatdate(time.time() + 20, usegmt=True)) <= 20
    assert endpoints._seconds(email.utils.formatdate(time.time() - 20, usegmt=True)) == 0
    assert [endpoints._seconds(text) for text in (None, "", "2.5", "-1", "soon", "nan")] == [0, 0, 2.5, 0, 0, 0]
    assert endpoints._seconds("inf") == endpoints._seconds("1e15") == 86400


def test_pauses_grow_and_differ(monkeypatch):
    paused = []
    monkeypatch.setattr(endpoints, "BACKOFF", 1.0)
    traffic = endpoints.Traffic()
    traffic.stop.wait = lambda seconds: paused.append(seconds)
    for tries in (1, 1, 2, 3, 4, 20):
        endpoints._pause(tries, endpoints.Trouble("x"), traffic)
    most = np.array([1, 1, 2, 4, 8, endpoints.LONGEST])
    assert (np.array(paused) >= most / 2).all() and (np.array(paused) <= most).all() and paused[0] != paused[1]


def test_requests_keep_the_rate(server, tmp_path):
    """1,200 a minute are 50 ms apart, retries included, whoever asks."""
    server.fault = lambda question, tries: "500" if tries == 1 else None
    asked(server, tmp_path, list("pqr"), [["a", "b"]] * 3, per_minute=1200, concurrent=8)
    when = np.array([entry[0] for entry in server.seen])
    assert len(when) == 12 and when[-1] - when[0] >= 0.45
    assert max(((when >= start) & (when < start + 0.25)).sum() for start in when) <= 8


@pytest.mark.parametrize("concurrent", [1, 3, 6])
def test_as_many_questions_are_under_way_as_the_config_says(server, tmp_path, concurrent):
    """12 questions: each is answered once so many are with the server, which sees no further one meanwhile."""
    together, lock, inside, most = threading.Barrier(concurrent, timeout=5.0), threading.Lock(), 0, 0

    def answer(*parts):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        together.wait()
        time.sleep(0.05)  # for who else may come
        with lock:  # before the reply: behind it the next question may
            inside -= 1
        return 0.5

    server.answer = answer
    got = asked(server, tmp_path, [str(n) for n in range(6)], [["a", "b"]] * 6, concurrent=concurrent)
    assert most == concurrent and got.told["perf/judge_requests"] == len(server.seen) == 12


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("500", 'status 500 ({"error": {"message": "broken"}}) (try 3 of 3).'),
        ("drop", "no connection (Server disconnected without sending a response.) (try 3 of 3)."),
        ("page", "the reply is no JSON: b'<html>Bad gateway</html>' (try 3 of 3)."),
        ("empty", "the reply has no choices (try 3 of 3)."),
        ("undecided", "the reply 'I cannot say.' is no verdict, expected A, B or tie (try 3 of 3)."),
    ],
)
def test_after_the_last_try_labels_are_kept(server, tmp_path, fault, why):
    """The error says how many; the same command asks for the rest alone."""
    broken = lambda question: "### Prompt\n5\n" in question
    server.fault = lambda question, tries: fault if broken(question) else None
    prompts, texts = [str(n) for n in range(6)], [["a", "b"]] * 6
    with pytest.raises(judge.JudgeError) as error:
        asked(server, tmp_path, prompts, texts, concurrent=1)
    kept = len(lines(tmp_path))
    assert kept == 10 and str(error.value) == (
        f"the judge 'm' at {server.url} gave no answer: {why} 10 labels are kept in {tmp_path / 'judge.jsonl'}: the "
        "same command goes on behind them."
    )
    server.fault = lambda question, tries: None
    before = len(server.seen)
    asked(server, tmp_path, prompts, texts)
    assert len(server.seen) - before == 2 and all(broken(entry[1]) for entry in server.seen[before:])
    assert set(server.answered().values()) == {1} and len(lines(tmp_path)) == 12


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_another_try_will_not_mend(server, tmp_path, status):
    server.fault = lambda question, tries: str(status)
    with pytest.raises(judge.JudgeError) as error:
        asked(server, tmp_path, ["p"], [["a", "b"]], concurrent=1)
    assert len(server.seen) == 1, "the other question was asked after the first had failed"
    assert f"status {status} " in str(error.value)
    hint = "Is the right key in the environment variable OPENAI_API_KEY?"
    assert (hint in str(error.value)) == (status in (401, 403))


def test_nothing_is_asked_after_a_failure(server, tmp_path):
    """Of many questions: those under way end, none begins."""
    server.fault = lambda question, tries: "404"
    with pytest.raises(judge.JudgeError, match="0 labels are kept"):
        asked(server, tmp_path, [str(n) for n in range(200)], [["a", "b"]] * 200, concurrent=4)
    assert len(server.seen) <= 8


@pytest.mark.parametrize("name", ["logprobs", "max_tokens"])
def test_an_endpoint_that_refuses_a_parameter(server, tmp_path, capsys, name):
    """It is asked in another way from then on, also by those whose requests were under way; said once, no retry."""
    server.refuses, server.answer = name, lambda *parts: 0.25
    got = asked(server, tmp_path, [str(n) for n in range(20)], [["a", "b"]] * 20)
    assert capsys.readouterr().out.count(f"judge: the endpoint refuses {name}, asking without it") == 1
    good = [request for _, _, request, fault in server.seen if fault is None]
    assert len(good) == 40 == len(lines(tmp_path)) and got.told["perf/judge_retries"] == 0
    assert len(server.seen) <= 48  # as many as ask at a time
    if name == "logprobs":
        assert {label["value"] for label in lines(tmp_path)} == {0.0}
    else:
        assert all(request["max_completion_tokens"] == 16 for request in good)
        assert [label["value"] for label in lines(tmp_path)] == pytest.approx([0.25] * 40)


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_a_torn_last_line_costs_its_label_alone(server, tmp_path):
    prompts, texts = list("pqr"), [["a", "b"]] * 3
    whole = asked(server, tmp_path, prompts, texts)
    file = tmp_path / "judge.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    before = len(server.seen)
    again = asked(server, tmp_path, prompts, texts)
    assert len(server.seen) - before == 1
    np.testing.assert_array_equal(again.prob_PCC, whole.prob_PCC)
    good = [line for line in file.read_bytes().split(b"\n") if line.endswith(b"}")]
    assert len({json.loads(line)["key"] for line in good}) == 6 == len(good)
    assert asked(server, tmp_path, prompts, texts).told["perf/judge_requests"] == 0


def test_lines_of_another_kind_are_passed_over(tmp_path):
    file = tmp_path / "c.jsonl"
    with labels.opened(file) as (known, keep):
        keep("k", labels.Label(0.5, "tie \ud800 é", 1, 2))
    with file.open("a") as more:
        more.write('5\n[]\n{"key": "x"}\n{"key": "y", "value": 1, "reply": "", "tokens_in": 1}\n\nnothing\n')
    with labels.opened(file) as (known, keep):
        assert known == {"k": labels.Label(0.5, "tie \ud800 é", 1, 2)}


@pytest.mark.parametrize(
    "changes", [{"model": "n"}, {"temperature": 1.0}, {"max_tokens": 32}, {"question": "r"}, {"template": "u"}]
)
def test_a_label_belongs_to_all_that_decides_it(changes):
    asked = {"model": "m", "mode": "grade", "template": "t", "question": "q", "temperature": 0.0, "max_tokens": 16}
    assert labels.key(**asked) == labels.key(**asked) != labels.key(**asked | changes)


def test_another_endpoint_of_the_same_model_is_asked_nothing_known(server, tmp_path):
    asked(server, tmp_path, ["p"], [["a", "b"]])
    moved = asked(server, tmp_path, ["p"], [["a", "b"]], base_url="http://127.0.0.1:9/v1", timeout=0.1, concurrent=1)
    assert moved.told["judge/labels"] == 2 and len(server.seen) == 2


def test_a_full_disk_is_told(server, tmp_path, small_files):
    with small_files(300), pytest.raises(DiskError, match="judge.jsonl could not be written: "):
        asked(server, tmp_path, list("pqr"), [["a", "b"]] * 3, concurrent=1)
    asked(server, tmp_path, list("pqr"), [["a", "b"]] * 3)
    assert 1 <= sum(count > 1 for count in server.answered().values()) <= 2  # what the disk had not taken


def test_killed_and_started_again_asks_nothing_twice(server, tmp_path):
    """SIGKILL in the middle of 80 questions: what was on disk is not asked again."""
    script = f"""
import pathlib, sys
from sera_jax import judge
end = judge.Endpoint("m", {server.url!r}, "OPENAI_API_KEY", 0.0, 16, 10.0, 2, 4, 2400)
form = judge.template("", "pairwise")
prompts = [str(n) for n in range(40)]
cache = pathlib.Path({str(tmp_path)!r}) / "judge.jsonl"
judge.pairwise(end, judge.Prices(), form, prompts, [["a", "b"]] * 40, cache=cache, label="judge")
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(server.answered()) < 20:
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        assert time.monotonic() < deadline, "never got there"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    kept = {label["key"] for label in lines(tmp_path)}
    before = len(server.seen)
    assert 15 <= len(kept) <= before < 80
    got = asked(server, tmp_path, [str(n) for n in range(40)], [["a", "b"]] * 40)
    assert len(server.seen) - before == 80 - len(kept) and got.told["judge/labels"] == 80
    assert len(lines(tmp_path)) == 80 == len({label["key"] for label in lines(tmp_path)})
    assert sum(count > 1 for count in server.answered().values()) <= 4  # under way when it was killed


def test_other_processes_hear_and_ask_nothing(server, tmp_path, monkeypatch):
    """What is told goes through JSON, as to a process elsewhere; there nobody works."""
    server.answer = lambda *parts: GIVEN[parts]
    told = []

    def tells(work):
        told.append(processes._encoded({"value": work()}))
        return processes._decoded(told[-1])["value"]

    monkeypatch.setattr(processes, "once", tells)
    here = asked(server, tmp_path, ["p", "q"], [["a", "b", "c"], ["x", None, "z"]])
    count = len(server.seen)
    monkeypatch.setattr(processes, "once", lambda work: processes._decoded(told[-1])["value"])
    there = asked(server, tmp_path / "elsewhere", ["p", "q"], [["a", "b", "c"], ["x", None, "z"]])
    np.testing.assert_array_equal(there.prob_PCC, here.prob_PCC)
    np.testing.assert_array_equal(there.rewards_PC, here.rewards_PC)
    assert there.told == here.told and count == len(server.seen) == 8 and not (tmp_path / "elsewhere").exists()


# --- the key and the package ------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_told_to_nobody_else(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.key = KEY
    server.answer = lambda *parts: f"Your key is {KEY}. [[A]]"
    asked(server, tmp_path, ["p"], [["a", "b"]])
    assert [label["reply"] for label in lines(tmp_path)] == ["Your key is ***. [[A]]"] * 2
    server.fault = lambda question, tries: "echo"
    with pytest.raises(judge.JudgeError) as error:
        asked(server, tmp_path, ["q"], [["a", "b"]])
    assert "bad key: Bearer ***" in str(error.value)
    assert KEY not in (tmp_path / "judge.jsonl").read_text() + "".join(capsys.readouterr())
    chain, link = [], error.value
    while link is not None:
        chain.append(repr(link))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    assert KEY not in "".join(chain)


def test_a_word_in_the_place_of_a_key_garbles_no_reply(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "A\n")
    server.key = "A"
    server.answer = lambda *parts: 0.75
    asked(server, tmp_path, ["p"], [["a", "b"]])
    assert [label["value"] for label in lines(tmp_path)] == pytest.approx([0.75] * 2)


def test_a_key_of_another_name(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    server.key = KEY
    asked(server, tmp_path, ["p"], [["a", "b"]], key_env="MY_KEY")
    with pytest.raises(judge.JudgeError, match="status 401 .*environment variable OPENAI_API_KEY"):
        asked(server, tmp_path, ["q"], [["a", "b"]])


def test_without_the_package(server, monkeypatch, tiny_config):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError) as error:
        endpoints.client(endpoint(server))
    want = "reward.source 'judge' needs the package openai: pip install 'sera_jax[judge]', or pip install openai."
    assert str(error.value) == want
    config = tiny_config("--reward.source=judge", "--judge.model=m")
    with pytest.raises(ValueError, match="needs the package openai"):
        trainer.train(config)
    assert not pathlib.Path(config.run.dir).exists()  # told before the first update


# --- in the loop ------------------------------------------------------------------------------------------------------


def test_the_loop_with_a_judge(server, tiny, tiny_config, tmp_path, monkeypatch):
    """A gold function answers: what it said is in P, pairs are its best and worst, the same run stopped by a failing
    endpoint in iteration 2 goes on and ends with the same bits, and the key is nowhere.
    """
    count = lambda text: len(set(text.split()))
    chance = lambda first, second: 1 / (1 + math.exp(count(second) - count(first)))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.key = KEY
    server.answer = lambda prompt, first, second: chance(first, second)
    flags = ["--reward.source=judge", "--judge.model=m", f"--judge.base_url={server.url}", "--judge.retries=2"]
    flags += ["--bootstrap.from_iteration=1", "--bootstrap.candidates=3", "--judge.price_in=1", "--bootstrap.fresh=0.4"]
    whole, stopped = tiny_config(*flags, run="whole"), tiny_config(*flags, "--judge.concurrent=3", run="stopped")
    trainer.train(whole)
    run = pathlib.Path(whole.run.dir)
    first = len(server.answered())
    server.tries.clear()
    for t in (1, 2):
        folder = run / "iterations" / str(t)
        texts = {row["id"]: row["responses"] for row in map(json.loads, (folder / "candidates.jsonl").open())}
        told = pyarrow.parquet.read_table(folder / "probabilities.parquet").to_pylist()
        means, questions = collections.defaultdict(list), set()
        for row in told:
            one, other = (texts[row["prompt_id"]][row[side]] for side in ("first", "second"))
            assert row["probability"] == pytest.approx(chance(one, other), abs=1e-6)
            questions |= {(row["prompt_id"], one, other), (row["prompt_id"], other, one)}
            means[row["prompt_id"], one].append(chance(one, other))
            means[row["prompt_id"], other].append(chance(other, one))
        fresh = pyarrow.parquet.read_table(folder / "fresh.parquet").to_pylist()
        assert len(told) > 20 and len(fresh) > 5
        for row in fresh:
            mine = {text: np.mean(p) for (prompt, text), p in means.items() if prompt == row["prompt_id"]}
            assert row["reward_chosen"] == pytest.approx(max(mine.values()), abs=1e-6)
            assert row["reward_chosen"] == pytest.approx(mine[row["chosen"]], abs=1e-6)
            assert row["reward_rejected"] == pytest.approx(min(mine.values()), abs=1e-6)
            assert row["probability"] == pytest.approx(chance(row["chosen"], row["rejected"]), abs=1e-6)
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["judge/labels"] == len(questions)
        assert summary["judge/consistency"] == 1 and summary["judge/first"] == pytest.approx(0.5, abs=1e-6)
        assert summary["judge/cost"] == pytest.approx(summary["judge/labels"] * 100 / 1e6)
    # Stopped where the second iteration asks, resumed: nothing is asked twice, and all is the same.
    asked_before = len(server.seen)
    server.fault = lambda question, tries: "404" if len(server.seen) - asked_before >= first - 20 else None
    with pytest.raises(
        judge.JudgeError, match="labels are kept in .*judge.jsonl: the same command goes on behind them"
    ):
        trainer.train(stopped)
    other = pathlib.Path(stopped.run.dir)
    assert (other / "iterations" / "1" / "summary.json").is_file() and not (other / "export").exists()
    server.fault = lambda question, tries: None
    trainer.train(stopped)
    answered = collections.Counter(entry[1] for entry in server.seen[asked_before:] if entry[3] is None)
    assert set(answered.values()) == {1} and len(answered) == first
    plain = lambda folder: [
        {k: v for k, v in json.loads(line).items() if not k.startswith("perf/")}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert plain(run) == plain(other)
    weights = [safetensors.numpy.load_file(folder / "export" / "model.safetensors") for folder in (run, other)]
    assert all(array.tobytes() == weights[1][name].tobytes() for name, array in weights[0].items())
    assert {*(run / "judge.jsonl").read_text().splitlines()} == {*(other / "judge.jsonl").read_text().splitlines()}
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_another_template_is_another_run(server, tiny_config, tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("### Prompt\n{prompt}\n\n### Response\n{response}\n\n### Grade")
    server.answer = lambda prompt, response: str(1 + len(response) % 10)
    flags = ["--reward.source=judge", "--judge.model=m", f"--judge.base_url={server.url}", "--judge.mode=grade"]
    flags += [f"--judge.template={file}", "--bootstrap.from_iteration=1", "--loop.iterations=1"]
    trainer.train(tiny_config(*flags))
    run = tmp_path / "run"
    fresh = pyarrow.parquet.read_table(run / "iterations/1/fresh.parquet").to_pylist()
    assert fresh and all(row["reward_chosen"] == 1 + len(row["chosen"]) % 10 for row in fresh)
    assert "probability" not in fresh[0] and not (run / "iterations/1/probabilities.parquet").exists()
    trainer.train(tiny_config(*flags, "--judge.concurrent=2", "--judge.price_in=3"))  # they change no number
    file.write_text("Be strict.\n" + file.read_text())
    with pytest.raises(ValueError, match="same config on other data or another model: the files behind it"):
        trainer.train(tiny_config(*flags))
