"""generate: greedy against full forward passes and transformers; the same bytes for any slots and after any stop."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import attention, config, data, generate, hf, model, policies, programs, score
from sera_jax import mesh as meshes
from sera_jax import rows as rowlib
from sera_jax.records import Tree
from sera_jax.rows import Plan


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A Hugging Face folder with drawn weights."""
    arch = hf.read_arch(tiny / "model")
    params = jax.jit(lambda key: model.init(arch, key))(jax.random.key(3))
    path = tmp_path_factory.mktemp("generate") / "model"
    return hf.save(path, arch, params, source=tiny / "model", dtype=jnp.float32)


@pytest.fixture
def ask(tiny, folder, tmp_path, monkeypatch):
    """flags → config of the tiny world on one device."""
    of_devices = meshes.make
    monkeypatch.setattr(meshes, "make", lambda d, f, t, slices: of_devices(d, f, t, jax.devices()[: d * f * t]))

    def make(*flags: str, out: str = "out.jsonl"):
        base = [f"--model.path={folder}", f"--prompts=[{tiny / 'prompts.jsonl'}]", f"--out={tmp_path / out}"]
        return [*base, "--max_new_tokens=8", "--slots=12", "--mesh.fsdp=1", *flags]

    return make


SAMPLED = ("--candidates=3", "--temperature=1.0", "--top_p=0.95")


def run(args):
    return generate.generate(config.parse(config.GenerateConfig, args))


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, prompts):
    path.write_text("".join(json.dumps(p) + "\n" for p in prompts))
    return path


def test_greedy_is_the_arg_max_of_full_forward_passes(tiny, folder, ask, one_device):
    arch = hf.read_arch(folder)
    params = hf.load(folder, arch, one_device)
    tokenizer = data.load_tokenizer(str(folder))
    vocabulary = {i: word for word, i in tokenizer.get_vocab().items()}

    @jax.jit
    def logits(tokens_1L, length):
        index = jnp.arange(tokens_1L.shape[1])[None]
        mask = attention.tree_mask((index < length).astype(jnp.int32), jnp.zeros_like(index))
        attend = lambda q, k, v, *_: (attention.attend(q, k, v, mask), ())
        hidden, _ = model.hidden(arch, params, tokens_1L, index, attend, longest=1 << 20, dtype=jnp.float32)
        return (hidden[0] @ model.head_table(arch, params).T)[length - 1]

    given = rows(tiny / "prompts.jsonl")
    made = rows(run(ask()))
    assert [(r["id"], r["prompt"]) for r in made] == [(p["id"], p["prompt"]) for p in given]
    for row in made:
        ids = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        begin, eos = len(ids), 2
        while len(ids) - begin < 8 and (len(ids) == begin or ids[-1] != eos):
            padded = np.zeros((1, 32), np.int32)
            padded[0, : len(ids)] = ids
            ids.append(int(logits(padded, len(ids)).argmax()))
        words = [vocabulary[i] for i in ids[begin:] if i > 2]
        assert row["responses"] == [" ".join(words)]
        assert row["lengths"] == [len(ids) - begin]
        assert row["finished"] == [ids[-1] == eos]
    assert len({row["responses"][0] for row in made}) > 10


def test_candidates_depend_on_seed_prompt_and_number_alone(tiny, ask, tmp_path):
    first = run(ask(*SAMPLED))
    assert len(rows(first)) == 20 and all(len(r["responses"]) == 3 for r in rows(first))
    assert len({text for r in rows(first) for text in r["responses"]}) > 40
    again = run(ask(*SAMPLED, out="again.jsonl"))
    assert again.read_bytes() == first.read_bytes()
    fewer_slots = run(ask(*SAMPLED, "--slots=3", out="slots.jsonl"))
    assert fewer_slots.read_bytes() == first.read_bytes()
    two = run(ask(*SAMPLED, "--candidates=2", out="two.jsonl"))
    assert [r["responses"] for r in rows(two)] == [r["responses"][:2] for r in rows(first)]
    seeded = run(ask(*SAMPLED, "--seed=1", out="seed.jsonl"))
    assert [r["responses"] for r in rows(seeded)] != [r["responses"] for r in rows(first)]
    given = rows(tiny / "prompts.jsonl")
    backwards = write(tmp_path / "backwards.jsonl", given[::-1])
    turned = run(ask(*SAMPLED, f"--prompts=[{backwards}]", out="turned.jsonl"))
    assert rows(turned) == rows(first)[::-1]
    assert rows(run(ask(*SAMPLED, "--limit=4", out="limit.jsonl"))) == rows(first)[:4]


def test_an_interrupted_command_goes_on_to_the_same_bytes(ask, tmp_path, monkeypatch, stopped_at):
    whole = run(ask(*SAMPLED, out="whole.jsonl"))
    bind, calls = programs.sample_prompts, []
    sampler = lambda *bound: lambda *prompts: calls.append(1) or bind(*bound)(*prompts)
    monkeypatch.setattr(programs, "sample_prompts", sampler)
    with stopped_at("sample_prompts", 3):
        run(ask(*SAMPLED))
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    assert not out.exists() and len(rows(partial / "candidates.jsonl")) == 8
    with open(partial / "candidates.jsonl", "a") as file:
        file.write('{"index": 8, "id": "q')  # a line that a killed process did not finish
    assert run(ask(*SAMPLED)) == out
    assert out.read_bytes() == whole.read_bytes() and not partial.exists()
    assert len(calls) == 2 + 3  # five batches of four prompts; two were there already


def test_best_of_n_keeps_the_best_candidate(tiny, folder, ask, tmp_path, one_device, monkeypatch):
    """By a function; by a reward model, which says for itself which one that is."""
    monkeypatch.syspath_prepend(tiny)
    every = rows(run(ask(*SAMPLED, out="all.jsonl")))
    made = rows(run(ask(*SAMPLED, "--best_by=tiny_reward:count", out="best.jsonl")))
    count = lambda text: len(set(text.split()))
    for row, before in zip(made, every, strict=True):
        best = max(range(3), key=lambda c, before=before: count(before["responses"][c]))
        for key in ("responses", "finished", "lengths"):
            assert row[key] == [before[key][best]]
    assert any(row["responses"][0] != before["responses"][0] for row, before in zip(made, every))
    # A policy with a scalar head; its rewards of the candidates, each alone in a row.
    start = policies.open_folder(str(folder), one_device, compute="float32")
    ranker = policies.with_score(start, 0)
    save = tmp_path / "ranker"
    params = jax.tree.map(lambda w: w, ranker.load())
    hf.save(save, ranker.arch, params, source=folder, dtype=jnp.float32)
    monkeypatch.setattr(generate.shutil, "rmtree", lambda path, **_: None)  # it holds the tokens
    made = rows(run(ask(*SAMPLED, f"--best_by={save}", out="ranked.jsonl")))
    sampled = {row["id"]: row["tokens"] for row in rows(tmp_path / "ranked.jsonl.partial" / "candidates.jsonl")}
    tokenizer = data.load_tokenizer(str(folder))
    trees = [
        Tree("", np.array(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"], np.int32), (np.array(ids),))
        for row in every
        for ids in sampled[row["id"]]
    ]
    together = jax.tree.map(lambda *a: np.concatenate(a), *(rowlib.pack([t], Plan(32, 32, 1, 1)) for t in trees))
    reward_BS, _ = score.row_rewards(ranker.arch, params, together, mesh=one_device, dtype=jnp.float32)
    best = np.argmax(np.asarray(reward_BS).reshape(-1, 3), axis=1)
    assert len(set(best)) == 3
    assert [row["responses"] for row in made] == [[row["responses"][c]] for row, c in zip(every, best, strict=True)]
    with pytest.raises(config.ConfigError, match="best_by is 'tiny_reward:count' with candidates 1, expected at least"):
        run(ask("--best_by=tiny_reward:count", out="one.jsonl"))
    with pytest.raises(ValueError, match="'nowhere:f' cannot be imported"):
        run(ask(*SAMPLED, "--best_by=nowhere:f", out="none.jsonl"))
    assert not (tmp_path / "none.jsonl.partial").exists()


def test_messages_go_through_the_chat_template(folder, ask, tmp_path):
    chat = tmp_path / "chat"
    shutil.copytree(folder, chat)
    (chat / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'][0] | replace('u', 'the') }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}a {% endif %}"
    )
    messages = [{"role": "user", "content": "red ball"}]
    as_chat = write(tmp_path / "chat.jsonl", [{"id": "x", "prompt": messages}])
    as_text = write(tmp_path / "text.jsonl", [{"id": "x", "prompt": "the red ball a"}])
    one = rows(run(ask(f"--model.path={chat}", f"--prompts=[{as_chat}]")))
    other = rows(run(ask(f"--prompts=[{as_text}]", out="text_out.jsonl")))
    assert one[0]["prompt"] == messages
    assert one[0]["responses"] == other[0]["responses"] != [""]


def test_drawn_weights_and_all_devices(tiny, tmp_path):
    """The whole mesh of eight devices, a model that has no weights: `weights: random`, drawn from the seed."""
    args = [f"--model.path={tiny / 'model'}", "--model.weights=random", f"--prompts=[{tiny / 'prompts.jsonl'}]"]
    args += ["--limit=3", "--max_new_tokens=4", "--slots=8", "--mesh.data=2"]
    out = run([*args, f"--out={tmp_path / 'out.jsonl'}"])
    assert [r["id"] for r in rows(out)] == ["q0", "q1", "q2"]


def test_what_is_said_and_how_errors_end(tiny, ask, tmp_path, capsys):
    generate.main(ask())
    closing = capsys.readouterr().out.splitlines()[-1]
    assert "out.jsonl: 20 prompts, 20 responses, mean length " in closing
    assert " % finished, " in closing and closing.endswith(" tokens/s")
    with pytest.raises(SystemExit) as exit:
        generate.main(ask())
    assert (
        exit.value.code
        == f"error: {tmp_path}/out.jsonl exists, expected a new file. Remove it, or choose another `out`."
    )
    with pytest.raises(ValueError, match=r"slots is 2, expected at least candidates \(3\)"):
        run(ask("--candidates=3", "--slots=2", out="a.jsonl"))
    with pytest.raises(ValueError, match="nowhere: got no folder"):
        run(ask(f"--model.path={tmp_path / 'nowhere'}", out="a.jsonl"))
    with pytest.raises(config.ConfigError, match="max_new_tokens is 0, expected at least 1"):
        run(ask("--max_new_tokens=0", out="a.jsonl"))


def test_a_partial_folder_belongs_to_one_request(ask, tmp_path, stopped_at):
    with stopped_at("sample_prompts", 1):
        run(ask(*SAMPLED))
    with pytest.raises(ValueError, match=r"out.jsonl.partial was begun by another request.*seed \(0 → 1\)\. Remove"):
        run(ask(*SAMPLED, "--seed=1"))
    with pytest.raises(ValueError, match=r"it differs in prompts \('"):
        run(ask(*SAMPLED, "--limit=3"))
    assert len(rows(run(ask(*SAMPLED, "--slots=9")))) == 20  # another layout of the same work may go on


def test_a_real_model_writes_what_transformers_writes(shared_data, ask, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    path = shared_data / "models" / "stories260K"
    prompts = ["Once upon a time, there was", "The little dog", "Lily and Tom went to the park. They"]
    given = write(tmp_path / "p.jsonl", [{"prompt": p} for p in prompts])
    made = rows(run(ask(f"--model.path={path}", f"--prompts=[{given}]", "--max_new_tokens=24")))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = data.load_tokenizer(str(path))
    trees, _ = data.tokenise_prompts(data.load_prompts([str(given)])[0], tokenizer, max_prompt_length=64)
    for row, tree in zip(made, trees):
        ids = torch.tensor(tree.prompt[None].astype(np.int64))
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        response = out[0, len(tree.prompt) :].numpy()
        assert row["responses"] == [tokenizer.decode(response, skip_special_tokens=True)]
        assert row["lengths"] == [len(response)]
