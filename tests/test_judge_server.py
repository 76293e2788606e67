"""launch/judge_server.py, the stand-in for a judge: asked over HTTP by our own judge, against a closed form."""

import pathlib
import statistics
import subprocess
import sys

import numpy as np
import pytest

from sera_jax import judge
from sera_jax.toyworld import gold
from sera_jax.toyworld.facts import hashed

SERVER = pathlib.Path(__file__).parent.parent / "launch" / "judge_server.py"
PROMPTS = ["now report : una vehicle ; pam pet food ; ned town ?", "tell us : ann colour ?"]
TEXTS_PC = [
    ["una drives wagon , pam keeps dog , eats figs .", "una drives plane , quite frankly .", "pam keeps dog ."],
    ["ann likes red .", "ann likes blue , so of course red .", "of course ."],
]


@pytest.fixture
def served(request):
    """The server with flags on a free port; its address."""
    command = [sys.executable, str(SERVER), "--port", "0", *request.param]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().split()[-1]
        process.terminate()


def seen(prompt: str, text: str, noise: float) -> float:
    z = statistics.NormalDist().inv_cdf((hashed(f"judge {prompt}\n{text}") + 0.5) / 2**64)
    return gold(prompt, text) + noise * z


@pytest.mark.parametrize(
    "served, noise, temperature",
    [(("--temperature", "0.5"), 0.0, 0.5), (("--noise", "0.3"), 0.3, 0.1)],
    indirect=["served"],
)
def test_it_answers_by_gold_and_a_noise_of_its_own(served, noise, temperature, tmp_path, monkeypatch):
    """P(A) = σ of the difference of what it sees, the same in both orders."""
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    asked = judge.Endpoint(
        model="gold",
        base_url=served,
        key_env="OPENAI_API_KEY",
        temperature=0.0,
        max_tokens=16,
        timeout=10.0,
        retries=2,
        concurrent=8,
        per_minute=0,
    )
    form = judge.template("", "pairwise")
    told = judge.pairwise(asked, judge.Prices(), form, PROMPTS, TEXTS_PC, cache=tmp_path / "judge.jsonl", label="judge")
    seen_PC = np.array([[seen(p, text, noise) for text in texts] for p, texts in zip(PROMPTS, TEXTS_PC)])
    want_PCC = 1 / (1 + np.exp((seen_PC[:, None, :] - seen_PC[:, :, None]) / temperature))
    np.testing.assert_allclose(told.prob_PCC, want_PCC, atol=1e-6)
    assert np.abs(want_PCC - 0.5).max() > 0.2  # there is something to tell apart
    assert told.told["judge/consistency"] == 1.0


@pytest.mark.parametrize("served", [()], indirect=True)
def test_it_refuses_what_it_cannot_read(served):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError, match="expected a question as configs/judge/pairwise.txt asks it"):
        openai.OpenAI(base_url=served, api_key="none").chat.completions.create(
            model="gold", messages=[{"role": "user", "content": "Who is better?"}]
        )
