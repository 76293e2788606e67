"""evaluate: numbers that can be computed from the responses themselves; files and folders give the same; wordings."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import attention, config, evaluate, generate, hf, model
from sera_jax import mesh as meshes


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """Two models of the tiny world."""
    arch = hf.read_arch(tiny / "model")
    path = tmp_path_factory.mktemp("evaluate")
    init = jax.jit(lambda key: model.init(arch, key))
    return [
        hf.save(path / name, arch, init(jax.random.key(seed)), source=tiny / "model", dtype=jnp.float32)
        for name, seed in (("policy", 1), ("baseline", 2))
    ]


@pytest.fixture
def world(tiny, folders, tmp_path, monkeypatch):
    """flags → result, on one device; and the files that generate writes for both models."""
    monkeypatch.syspath_prepend(tiny)
    of_devices = meshes.make
    monkeypatch.setattr(meshes, "make", lambda d, f, t, slices: of_devices(d, f, t, jax.devices()[: d * f * t]))
    prompts = f"[{tiny / 'prompts.jsonl'}]"

    def run(policy, baseline, *flags: str):
        args = [f"--policy={policy}", f"--baseline={baseline}", f"--evaluate.prompts={prompts}"]
        args += ["--evaluate.function=tiny_reward:count", "--evaluate.max_new_tokens=8", "--slots=16", "--mesh.fsdp=1"]
        return evaluate.evaluate(config.parse(config.EvaluateDoorConfig, [*args, *flags]))

    def responses(folder, name, *flags: str):
        args = [f"--model.path={folder}", f"--prompts={prompts}", f"--out={tmp_path / name}", "--max_new_tokens=8"]
        return generate.generate(config.parse(config.GenerateConfig, [*args, "--slots=16", "--mesh.fsdp=1", *flags]))

    return run, responses


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_two_folders_are_compared_by_the_function(world, folders, tmp_path, capsys):
    run, responses = world
    out = tmp_path / "deep" / "result.json"
    result = run(*folders, f"--out={out}")
    assert json.loads(out.read_text()) == result
    texts = {}
    for name, folder in zip(("policy", "baseline"), folders):
        made = rows(responses(folder, f"{name}.jsonl"))
        texts[name] = [row["responses"][0].split() for row in made]
        side = result[name]
        assert side["reward"] == np.mean([len(set(words)) for words in texts[name]])
        assert side["length"] == np.mean([row["lengths"][0] for row in made])
        assert side["finished"] == np.mean([row["finished"][0] for row in made])
        pairs = [pair for words in texts[name] for pair in zip(words, words[1:])]
        assert side["distinct_2"] == len(set(pairs)) / len(pairs)
    gaps = [len(set(a)) - len(set(b)) for a, b in zip(texts["policy"], texts["baseline"])]
    wins, ties, losses = (sum(test(g) for g in gaps) for test in (lambda g: g > 0, lambda g: g == 0, lambda g: g < 0))
    assert wins and ties and losses
    assert (result["wins"], result["ties"], result["losses"], result["prompts"]) == (wins, ties, losses, 20)
    assert result["win_rate"] == (wins + ties / 2) / 20
    assert result["low"] < result["win_rate"] < result["high"]
    said = capsys.readouterr().out
    assert f"{wins} wins, {ties} ties, {losses} losses; KL to the baseline" in said and "distinct-2" in said


def test_files_and_folders_give_the_same_numbers(world, folders):
    run, responses = world
    flags = ("--temperature=1.0", "--top_p=0.9", "--seed=5")
    policy, baseline = (responses(f, f"{f.name}.jsonl", *flags) for f in folders)
    flags = ("--evaluate.temperature=1.0", "--evaluate.top_p=0.9", "--seed=5")
    results = [run(p, b, *flags) for p in (folders[0], policy) for b in (folders[1], baseline)]
    kl = [result.pop("kl") for result in results]
    assert kl[0] is not None and kl[1:] == [None] * 3
    assert all(result == results[0] for result in results)
    first = run(policy, baseline, "--evaluate.limit=7")
    assert first["prompts"] == 7
    assert first["policy"]["length"] == np.mean([row["lengths"][0] for row in rows(policy)[:7]])


def test_a_model_against_itself_ties(world, folders):
    run, _ = world
    result = run(folders[0], folders[0])
    assert (result["win_rate"], result["ties"], result["kl"]) == (0.5, 20, 0)
    assert result["policy"] == result["baseline"]


def test_kl_is_that_of_full_forward_passes(world, folders, one_device, monkeypatch):
    run, _ = world
    sides = []
    monkeypatch.setattr(evaluate, "_kl", lambda *both, kl=evaluate._kl: sides.append(both) or kl(*both))
    result = run(*folders)
    arch = hf.read_arch(folders[0])

    @jax.jit
    def log_probs(params, tokens_1L):
        index = jnp.arange(tokens_1L.shape[1])[None]
        mask = attention.tree_mask(jnp.ones_like(index), jnp.zeros_like(index))
        attend = lambda q, k, v, *_: (attention.attend(q, k, v, mask), ())
        hidden, _ = model.hidden(arch, params, tokens_1L, index, attend, longest=1 << 20, dtype=jnp.float32)
        return jax.nn.log_softmax(hidden[0] @ model.head_table(arch, params).T)

    both = [hf.load(folder, arch, one_device) for folder in folders]
    sums = []
    candidates = sides[0][0].candidates
    for prompt, (answer,) in zip(candidates.prompts, candidates.tokens_PC):
        ids = np.zeros((1, 32), np.int32)
        ids[0, : len(prompt) + len(answer)] = [*prompt, *answer]
        at = np.arange(len(prompt), len(prompt) + len(answer))
        one, other = (np.asarray(log_probs(params, ids))[at - 1, ids[0, at]].sum() for params in both)
        sums.append(one - other)
    np.testing.assert_allclose(result["kl"], np.mean(sums), rtol=1e-4)
    assert result["kl"] > 0.1


def test_no_kl_between_models_of_other_tokens(world, folders, tmp_path):
    run, _ = world
    other = tmp_path / "other"
    shutil.copytree(folders[1], other)
    tokens = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    assert run(folders[0], other)["kl"] is None


def test_files_of_other_prompts_are_refused(world, folders, tmp_path):
    run, responses = world
    file = responses(folders[1], "b.jsonl")
    lines = rows(file)

    def refused(changed, match, *flags):
        path = write(tmp_path / "changed.jsonl", changed)
        with pytest.raises(ValueError, match=match):
            run(file, path, *flags)

    refused(lines[:-1], r"changed.jsonl holds responses to 19 prompts, expected the 20 of evaluate.prompts")
    refused(lines[::-1], r"line 1: id is 'q19', expected 'q0' of evaluate.prompts. Write it with sera_jax.generate")
    refused([{**lines[0], "prompt": "x"}, *lines[1:]], r"line 1: prompt is 'x', expected '")
    refused([*lines[:3], {"id": "q3"}], r"line 4: .* is no object with id, prompt, responses, finished, lengths")
    two = {**lines[0], "responses": ["a", "b"], "finished": [True] * 2, "lengths": [2, 2]}
    refused([two], r"line 1: got 2 responses, 2 finished, 2 lengths, expected one response a prompt: candidates 1")
    (tmp_path / "text.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match="text.jsonl, line 1: 'not json' is no object"):
        run(file, tmp_path / "text.jsonl")


def test_errors(world, folders, tmp_path):
    run, _ = world
    with pytest.raises(ValueError, match="baseline: .*nowhere is neither a folder nor a file, expected a Hugging Face"):
        run(folders[0], tmp_path / "nowhere")
    with pytest.raises(config.ConfigError, match="evaluate.prompts is empty"):
        run(*folders, "--evaluate.prompts=[]")
    with pytest.raises(config.ConfigError, match="evaluate.function is 'count', expected 'module:function'"):
        run(*folders, "--evaluate.function=count")
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--policy=a", "--baseline=b", "--evaluate.function=no_such_module:f", "--evaluate.prompts=[x]"])
    assert exit.value.code.startswith("error: reward function 'no_such_module:f' cannot be imported")
