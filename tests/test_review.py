"""review: margins against a Llama in float64 NumPy; flipped labels are found; nothing is scored twice."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy

from sera_jax import config, data, hf, model, review
from sera_jax import mesh as meshes

EOS = 2


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """A reference, and a policy a step away from it."""
    arch = hf.read_arch(tiny / "model")
    path = tmp_path_factory.mktemp("review")
    start, step = (jax.jit(lambda key: model.init(arch, key))(jax.random.key(seed)) for seed in (1, 2))
    moved = jax.tree.map(lambda a, b: a + 0.15 * b, start, step)
    return [
        hf.save(path / name, arch, params, source=tiny / "model", dtype=jnp.float32)
        for name, params in (("policy", moved), ("reference", start))
    ]


@pytest.fixture
def run(tiny, folders, tmp_path, monkeypatch):
    """flags → table of review.parquet, on one device."""
    of_devices = meshes.make
    monkeypatch.setattr(meshes, "make", lambda d, f, t, slices=1: of_devices(d, f, t, jax.devices()[: d * f * t]))

    def ask(*flags: str, out: str = "out"):
        args = [f"--policy={folders[0]}", f"--reference={folders[1]}", f"--data.pairs=[{tiny / 'pairs.jsonl'}]"]
        args += [f"--out={tmp_path / out}", "--mesh.fsdp=1", *flags]
        assert review.review(config.parse(config.ReviewConfig, args)) == tmp_path / out
        return pyarrow.parquet.read_table(tmp_path / out / "review.parquet").to_pydict()

    return ask


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- the witness: log-probs by a Llama in float64 NumPy, from the files of the folder ---------------------------------


class Witness:
    def __init__(self, folder):
        self.w = {k: v.astype(np.float64) for k, v in safetensors.numpy.load_file(folder / "model.safetensors").items()}
        self.c = json.loads((folder / "config.json").read_text())
        self.ids = data.load_tokenizer(str(folder)).get_vocab()

    def norm(self, x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.c["rms_norm_eps"]) * self.w[name]

    def log_probs(self, ids):
        w, c, n = self.w, self.c, len(ids)
        heads, kv, h = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        angle = np.arange(n)[:, None] / c["rope_theta"] ** (np.arange(0, h, 2) / h)
        cos, sin = (np.tile(f(angle), 2)[:, None] for f in (np.cos, np.sin))
        turn = lambda x: x * cos + np.concatenate((-x[..., h // 2 :], x[..., : h // 2]), -1) * sin
        x = w["model.embed_tokens.weight"][ids]
        for i in range(c["num_hidden_layers"]):
            at = f"model.layers.{i}."
            y = self.norm(x, at + "input_layernorm.weight")
            q, k, v = (
                (y @ w[f"{at}self_attn.{p}_proj.weight"].T).reshape(n, m, h) for p, m in zip("qkv", (heads, kv, kv))
            )
            q, k, v = turn(q), np.repeat(turn(k), heads // kv, 1), np.repeat(v, heads // kv, 1)
            scores = np.einsum("qnh,knh->nqk", q, k) / np.sqrt(h) + np.triu(np.full((n, n), -np.inf), 1)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            y = np.einsum("nqk,knh->qnh", p / p.sum(-1, keepdims=True), v).reshape(n, -1)
            x = x + y @ w[at + "self_attn.o_proj.weight"].T
            y = self.norm(x, at + "post_attention_layernorm.weight")
            gate, up = (y @ w[f"{at}mlp.{p}_proj.weight"].T for p in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[at + "mlp.down_proj.weight"].T
        z = self.norm(x, "model.norm.weight") @ w["model.embed_tokens.weight"].T
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    def logp(self, prompt, response):
        prompt, response = ([self.ids[word] for word in text.split()] for text in (prompt, response))
        ids = np.array([*prompt, *response, EOS])
        at = np.arange(len(prompt), len(ids))
        return self.log_probs(ids)[at - 1, ids[at]].sum()


def reward(logp, ref, words, loss):
    """The losses' own implicit rewards, β 0.1, of a response of so many words and an EOS."""
    return 0.1 * {"dpo": logp - ref, "ipo": (logp - ref) / (words + 1), "simpo": logp / (words + 1)}[loss]


@pytest.fixture(scope="module")
def margins(tiny, folders):
    """loss → margins of the tiny pairs."""
    policy, reference = map(Witness, folders)
    pairs = rows(tiny / "pairs.jsonl")
    told = [
        [
            (f(p["prompt"], p[side]), len(p[side].split()))
            for side in ("chosen", "rejected")
            for f in (policy.logp, reference.logp)
        ]
        for p in pairs
    ]

    def of(loss):
        return np.array([reward(c[0], cr[0], c[1], loss) - reward(r[0], rr[0], r[1], loss) for c, cr, r, rr in told])

    return of


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo"])
def test_margins_are_those_of_a_float64_llama(run, margins, loss, tiny):
    flags = {"ipo": ["--loss.normalisation=mean"], "simpo": ["--reference=not read", "--loss.gamma=0.5"]}.get(loss, [])
    table = run(f"--loss.name={loss}", *flags)
    pairs = rows(tiny / "pairs.jsonl")
    assert table["id"] == [p["id"] for p in pairs]
    for column in ("prompt", "chosen", "rejected"):
        assert table[column] == [p[column] for p in pairs]
    want = margins(loss)
    assert np.abs(want).max() > 0.05
    np.testing.assert_allclose(table["margin"], want, atol=2e-5)
    assert table["score"] == table["margin"]
    order = np.argsort(-want, kind="stable")
    assert np.array_equal(np.argsort(table["rank"]), order)
    assert np.array_equal(np.flatnonzero(table["kept"]), np.sort(order[: int(0.7 * len(pairs))]))


def test_flipped_labels_are_doubted(run, tiny, margins, tmp_path, capsys):
    """Labels as the policy sees them, a quarter of them flipped: exactly these are doubted."""
    pairs, want = rows(tiny / "pairs.jsonl"), margins("dpo")
    swap = lambda p: {**p, "chosen": p["rejected"], "rejected": p["chosen"]}
    flipped = {i for i in range(len(pairs)) if i % 4 == 1}
    labelled = [swap(p) if (want[i] < 0) != (i in flipped) else p for i, p in enumerate(pairs)]
    clean = write(tmp_path / "clean.jsonl", [p for i, p in enumerate(labelled) if i < 20])
    noisy = write(tmp_path / "noisy.jsonl", [p for i, p in enumerate(labelled) if i >= 20])
    table = run(f"--data.pairs=[{clean},{noisy}]", "--select.rule=threshold")
    assert {i for i, flag in enumerate(table["flag"]) if "doubted" in flag.split(",")} == flipped
    assert [not kept for kept in table["kept"]] == [i in flipped for i in range(len(pairs))]
    small = np.abs(want) <= 0.1 * np.median(np.abs(want))
    assert small.any() and ["uninformative" in flag for flag in table["flag"]] == small.tolist()
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    length = lambda p: len(p["chosen"].split()) - len(p["rejected"].split())
    for name, part in (("clean", labelled[:20]), ("noisy", labelled[20:]), ("all", labelled)):
        n, longer = len(part), np.mean([(np.sign(length(p)) + 1) / 2 for p in part])
        assert f"{name} {n} 0.75 {1.96 * (0.75 * 0.25 / n) ** 0.5:.4g} {longer:.4g}" in said
    assert "doubted 11 0.25" in said and "kept 33 0.75" in said
    begin = said.index("the most doubtful pairs")
    worst = np.argsort(table["margin"])[:5]
    for line, i in zip(said[begin + 4 :], worst):
        assert line.startswith(f"{table['id'][i]} {table['margin'][i]:.4g} ")
    page = (tmp_path / "out" / "report.html").read_text()
    assert table["id"][worst[0]] in page and "flag/doubted" in page
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"review.parquet", "kept.jsonl", "report.html", "ledger"}


def test_a_repetition_scores_nothing(run, tmp_path, monkeypatch):
    first = run()
    monkeypatch.setattr(hf, "load", lambda *_: pytest.fail("weights were read again"))
    assert run() == first
    other = run("--select.keep=0.5", "--loss.name=ipo", "--loss.beta=0.3")
    assert sum(other["kept"]) == 22 and other["margin"] != first["margin"]


def test_cut_long_and_unusable_pairs(run, tmp_path):
    word = "red ball "
    pairs = [{"prompt": "the dog", "chosen": f"sees {w}", "rejected": f"runs {w}"} for w in ("cat", "ball", "a", "big")]
    pairs += [{"prompt": "the cat", "chosen": word * 9, "rejected": "runs"}]  # 19 tokens
    pairs += [{"prompt": "the cat", "chosen": word * 30, "rejected": "sits"}]  # cut to 22
    pairs += [{"prompt": "the cat", "chosen": "sits", "rejected": "sits "}]  # the same tokens
    table = run(
        f"--data.pairs=[{write(tmp_path / 'p.jsonl', pairs)}]",
        "--data.max_length=24",
        "--data.max_prompt_length=8",
        "--uninformative=0",
        "--select.rule=all",
    )
    flags = [set(flag.split(",")) - {"doubted", ""} for flag in table["flag"]]
    assert flags == [set()] * 4 + [{"long"}, {"cut", "long"}, {"unscored"}]
    assert table["kept"] == [True] * 6 + [False]
    assert np.isnan(table["margin"][6]) and table["rank"][6] == -1 and table["length_chosen"] == [3] * 4 + [19, 22, 0]
    assert len(rows(tmp_path / "out" / "kept.jsonl")) == 6
    exact = run(f"--data.pairs=[{tmp_path / 'p.jsonl'}]", "--data.max_length=600", "--long=30", out="whole")
    assert not any({"cut", "long"} & set(flag.split(",")) for flag in exact["flag"])


def test_kept_pairs_are_read_back_as_they_were(run, folders, tmp_path):
    text = [
        {
            "id": f"t{i}",
            "prompt": "the dog",
            "chosen": f"sees {w}",
            "rejected": f"runs {w} to",
            "source": "s",
            "weight": 0.5,
        }
        | {"score_chosen": 2.0 + i, "score_rejected": 1.0}
        | {"gold_chosen": 0.5, "gold_rejected": 0.25 * i, "flipped": i == 2, "upset": True, "author": "me"}
        for i, w in enumerate(("cat", "ball", "a", "big"))
    ]
    turn = lambda role, content: {"role": role, "content": content}
    chat = [
        {"id": f"c{i}", "chosen": [turn("user", "the cat"), turn("assistant", f"sits {w}")]}
        | {"rejected": [turn("user", "the cat"), turn("assistant", f"runs {w} the")]}
        for i, w in enumerate(("in", "on"))
    ]
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    paths = [str(write(tmp_path / "t.jsonl", text)), str(write(tmp_path / "c.jsonl", chat))]
    given, _ = data.load_pairs(paths)
    flags = [f"--data.pairs=[{','.join(paths)}]", f"--data.chat_template={template}"]
    table = run(*flags, "--select.keep=0.5")
    file = str(tmp_path / "out" / "kept.jsonl")
    back = lambda: data.load_pairs([file], format="auto")[0]
    kept_text = [p for p, k in zip(given, table["kept"]) if k]
    assert len(kept_text) == 3
    read = [
        data.load_pairs([str(write(tmp_path / "one.jsonl", [row]))])[0][0]
        for row in rows(tmp_path / "out" / "kept.jsonl")
    ]
    assert read == kept_text

    text_only = [f"--data.pairs=[{paths[0]}]"]
    given, _ = data.load_pairs(paths[:1])
    table = run(*text_only, "--select.rule=threshold", "--select.unselected=relabel")
    assert 0 < sum(table["kept"]) < 4
    for pair, other, kept in zip(given, back(), table["kept"]):
        same = (pair.chosen, pair.rejected, pair.scores) == (other.chosen, other.rejected, other.scores)
        turned = (pair.rejected, pair.chosen, pair.scores[::-1]) == (other.chosen, other.rejected, other.scores)
        truth = dataclasses.replace(pair.truth, gold=pair.truth.gold[::-1], flipped=not pair.truth.flipped)
        assert other.truth == (truth if turned else pair.truth)
        assert (same, turned) == (kept, not kept)
    table = run(*text_only, "--select.unselected=soft_weight")
    want = 0.5 / (1 + np.exp(-np.array(table["score"])))
    np.testing.assert_allclose([pair.weight for pair in back()], want, rtol=1e-6)


def test_pairs_of_ranked_responses(run, tmp_path):
    rows_ = [{"prompt": "the dog", "responses": ["sits on", "runs", "sees it"], "scores": [0, 2, 1]}]
    table = run(f"--data.pairs=[{write(tmp_path / 'k.jsonl', rows_)}]", "--data.ranked=all_pairs", "--select.rule=all")
    assert table["id"] == ["k:1/1>0", "k:1/2>0", "k:1/1>2"]
    pairs, _ = data.load_pairs([str(tmp_path / "out" / "kept.jsonl")])
    assert [pair.scores for pair in pairs] == [(2.0, 0.0), (1.0, 0.0), (2.0, 1.0)]


def test_what_cannot_be_reviewed(run, folders, tmp_path, tiny):
    same = r"reference: got the policy '[0-9a-f]{16}' as its own reference, so that every margin would be 0"
    copy = tmp_path / "copy"
    shutil.copytree(folders[0], copy)
    with pytest.raises(ValueError, match=same):
        run(f"--reference={copy}")  # told by content, whatever the folder is called
    tokens = json.loads((copy / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["extra"] = 99
    (copy / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(
        ValueError, match="reference: the tokeniser of .*reference differs from that of .*copy, expected"
    ):
        run(f"--policy={copy}")
    with pytest.raises(config.ConfigError, match=r"loss.reference is 'previous', expected 'initial' \(the folder"):
        run("--loss.reference=previous")
    with pytest.raises(config.ConfigError, match="data.pairs is empty"):
        run("--data.pairs=[]")
    with pytest.raises(ValueError, match="score annotator_gap: got 44 scores that are not finite"):
        run("--select.score=annotator_gap")
    with pytest.raises(SystemExit) as exit:
        review.main([f"--policy={tmp_path}/no", f"--reference={copy}", f"--out={tmp_path}", "--data.pairs=[x]"])
    assert exit.value.code.startswith(f"error: {tmp_path}/no: got no folder")


def test_a_real_model(shared_data, run, folders, tmp_path):
    """A reviewer that fits stories: real continuations against shuffled ones."""
    path = shared_data / "models" / "stories260K"
    arch, mesh = hf.read_arch(path), meshes.make(1, 1, 1)
    noisy = jax.tree.map(lambda w: w + 0.05 * jax.random.normal(jax.random.key(0), w.shape), hf.load(path, arch, mesh))
    worse = hf.save(tmp_path / "worse", arch, noisy, source=path, dtype=jnp.float32)
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog."
    words = story.split()
    pairs = [
        {
            "prompt": " ".join(words[:n]),
            "chosen": " " + " ".join(words[n:]),
            "rejected": " " + " ".join(words[n:][::-1]),
        }
        for n in range(4, 16)
    ]
    file = write(tmp_path / "p.jsonl", pairs)
    table = run(f"--policy={path}", f"--reference={worse}", f"--data.pairs=[{file}]")
    assert np.mean(np.array(table["margin"]) > 0) >= 0.9
