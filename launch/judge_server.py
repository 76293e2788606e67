"""A stand-in for a judge: an OpenAI-compatible endpoint on this machine that answers by the toy world's gold reward.

    python launch/judge_server.py --port 8001 [--noise 0.3] [--temperature 0.1]

It reads configs/judge/pairwise.txt's questions and answers with the log-probs of A and B: P(A) = σ((s_A - s_B) /
temperature), where s = gold + noise · a standard normal number of the (prompt, response). Asked again it says the same,
and the order of the two changes nothing but which letter is which. For experiments; nothing of it is learned.
"""

import argparse
import http.server
import json
import math
import re
import statistics

from sera_jax.toyworld import gold
from sera_jax.toyworld.facts import hashed

QUESTION = re.compile(
    r"### Prompt\n(.*?)\n\n### Response A\n(.*?)\n\n### Response B\n(.*?)\n\n### Which response", re.DOTALL
)


def seen(prompt: str, response: str, noise: float) -> float:
    """Gold as this judge perceives it."""
    uniform = (hashed(f"judge {prompt}\n{response}") + 0.5) / 2**64
    return gold(prompt, response) + noise * statistics.NormalDist().inv_cdf(uniform)


def reply(question: str, noise: float, temperature: float) -> dict:
    """A chat completion of one token with its log-probs."""
    found = QUESTION.search(question)
    if found is None:
        raise ValueError(f"got {question[:200]!r}, expected a question as configs/judge/pairwise.txt asks it")
    prompt, a, b = found.groups()
    z = (seen(prompt, a, noise) - seen(prompt, b, noise)) / temperature
    logp = {"A": -math.log1p(math.exp(min(-z, 700))), "B": -math.log1p(math.exp(min(z, 700)))}
    best = max(logp, key=logp.get)
    top = [{"token": letter, "logprob": value} for letter, value in logp.items()]
    return {
        "choices": [
            {
                "message": {"role": "assistant", "content": best},
                "logprobs": {"content": [{"token": best, "logprob": logp[best], "top_logprobs": top}]},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": len(question.split()), "completion_tokens": 1},
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--port", type=int, default=8001)
    p.add_argument("--noise", type=float, default=0.0)
    p.add_argument("--temperature", type=float, default=0.1)
    a = p.parse_args()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                status, told = 200, reply(asked["messages"][-1]["content"], a.noise, a.temperature)
            except ValueError as error:
                status, told = 400, {"error": {"message": str(error)}}
            body = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", a.port), Handler) as server:
        print(f"judging at http://127.0.0.1:{server.server_port}/v1", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
