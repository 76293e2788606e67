"""Reward models against transformers and torch: exports load as AutoModelForSequenceClassification with equal scores, a
folder that transformers saved is read, and the loss is torch's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import config as configs
from sera_jax import hf, losses, model, programs, reward_model, score
from sera_jax import rows as rowlib
from sera_jax.config import RewardModelConfig
from sera_jax.programs import Compute
from sera_jax.records import Tree

torch = pytest.importorskip("torch", reason="parity with transformers needs torch: install the `parity` extra")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "initializer_range": 0.2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "llama": transformers.LlamaConfig(num_key_value_heads=2, **SIZES),
    "llama, tied": transformers.LlamaConfig(num_key_value_heads=4, tie_word_embeddings=True, **SIZES),
    "mistral": transformers.MistralConfig(num_key_value_heads=2, sliding_window=9, **SIZES),
    "qwen2": transformers.Qwen2Config(num_key_value_heads=2, **SIZES),
    "gemma": transformers.GemmaConfig(num_key_value_heads=1, head_dim=16, **SIZES),
    "phi": transformers.PhiConfig(num_key_value_heads=4, **SIZES),
    "neox": transformers.GPTNeoXConfig(**SIZES),
}


def trees(seed: int = 0) -> list[Tree]:
    """Pairs of unequal lengths that end in EOS, and some that were cut; no padding id among them."""
    rng = np.random.default_rng(seed)
    ids = lambda n: rng.integers(3, 96, n).astype(np.int32)
    shapes = [(5, 7, 3), (2, 1, 9), (12, 1, 1), (3, 25, 2), (8, 6, 15)]
    ended = lambda branch, cut: branch if cut else np.append(branch, 2).astype(np.int32)
    return [
        Tree(f"t{i}", ids(p), (ended(ids(a), i % 3 == 1), ended(ids(b), False))) for i, (p, a, b) in enumerate(shapes)
    ]


def theirs_say(folder, some: list[Tree]) -> np.ndarray:
    """Scores of transformers, one padded batch of all branches."""
    told, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert told.config.num_labels == 1 and told.config.pad_token_id is not None
    texts = [np.concatenate((tree.prompt, branch)) for tree in some for branch in tree.branches]
    longest = max(map(len, texts))
    ids = np.full((len(texts), longest), told.config.pad_token_id)
    mask = np.zeros((len(texts), longest), int)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    with torch.no_grad():
        return told.eval()(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits[:, 0].numpy()


def ours_say(folder, mesh, some: list[Tree]) -> np.ndarray:
    arch = hf.read_reward_arch(folder)
    scorer = programs.reward_scorer(arch, mesh, Compute(jnp.dtype("float32")))
    run = programs.score_rows(scorer, hf.load(folder, arch, mesh), mesh)
    return score.logps(some, run, score.plan_for(some, arch, mesh))


def shaken(theirs):
    """Weights that no transposition or swap leaves as they are."""
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weight.add_(0.2 * torch.randn_like(weight))
    return theirs


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saves_scores_alike(name, tmp_path, one_device):
    torch.manual_seed(0)
    config = MODELS[name]
    config.num_labels = 1
    shaken(transformers.AutoModelForSequenceClassification.from_config(config)).save_pretrained(tmp_path)
    want = theirs_say(tmp_path, trees())
    assert want.std() > 0.05
    np.testing.assert_allclose(ours_say(tmp_path, one_device, trees()), want, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_what_we_save_scores_alike(name, tmp_path, one_device):
    torch.manual_seed(1)
    shaken(transformers.AutoModelForCausalLM.from_config(MODELS[name])).save_pretrained(tmp_path / "base")
    base = hf.read_arch(tmp_path / "base")
    arch = dataclasses.replace(base, scored=True)
    head_1D = jax.random.normal(jax.random.key(0), (1, arch.width))
    params = model.with_score(hf.load(tmp_path / "base", base, one_device), head_1D)
    out = hf.save(
        tmp_path / "out", arch, params, source=tmp_path / "base", dtype=jnp.float32, extra={"pad_token_id": 0}
    )
    got = ours_say(out, one_device, trees())
    assert got.std() > 0.05
    np.testing.assert_allclose(got, theirs_say(out, trees()), atol=1e-4)


def test_the_export_of_a_run_scores_alike(tiny, tiny_config, tmp_path, one_device):
    """With the tokenizer that comes with it, from text, padded by it; tiny_config: meshes of one device."""
    config = configs.parse(
        RewardModelConfig,
        [
            f"--run.dir={tmp_path / 'run'}",
            f"--model.path={tiny / 'model'}",
            "--model.weights=random",
            f"--data.pairs=[{tiny / 'pairs.jsonl'}]",
            "--data.max_length=48",
            "--data.max_prompt_length=24",
            "--optimizer.batch_size=16",
            "--optimizer.learning_rate=1e-2",
            "--run.compilation_cache=off",
            "--mesh.fsdp=1",
        ],
    )
    export = reward_model.train(config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    told = transformers.AutoModelForSequenceClassification.from_pretrained(export).eval()
    assert tokenizer.pad_token_id == told.config.pad_token_id
    texts = ["<s> red cat runs </s>", "<s> a small dog sees the big blue ball </s>", "<s> it </s>"]
    tokens = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        want = told(**tokens).logits[:, 0].numpy()
    split = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    some = [Tree("", np.array(ids[:2], np.int32), (np.array(ids[2:], np.int32),)) for ids in split]
    np.testing.assert_allclose(ours_say(export, one_device, some), want, atol=1e-4)
    assert len(set(np.round(want, 3))) == 3


def test_the_loss_and_its_gradient_are_torchs():
    """As TRL's RewardTrainer writes it, in float64."""
    rng = np.random.default_rng(0)
    reward, gap = rng.normal(0, 3, (50, 2)), rng.normal(0, 1, (50, 2))
    length = rng.integers(1, 20, (50, 2))
    theirs = torch.tensor(reward, requires_grad=True)
    c, r = theirs[:, 0], theirs[:, 1]
    margin = torch.tensor(0.3 * (gap[:, 0] - gap[:, 1]) - 0.05 * (length[:, 0] - length[:, 1]))
    loss = -torch.nn.functional.logsigmoid(c - r - margin).mean() + 0.01 * torch.mean((c + r) ** 2)
    loss.backward()
    arrays = (jnp.asarray(length, jnp.float32), jnp.asarray(gap, jnp.float32))
    ours = lambda x: losses.bradley_terry(x, *arrays, margin=0.3, center=0.01, length_alpha=0.05).mean()
    value, gradient = jax.value_and_grad(ours)(jnp.asarray(reward, jnp.float32))
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-4, atol=1e-7)


def test_packed_trees_score_as_single_texts(tmp_path, one_device, eight_devices):
    torch.manual_seed(0)
    config = MODELS["mistral"]
    config.num_labels = 1
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    some = trees() + [Tree("c", trees(1)[0].prompt, tuple(t.branches[0] for t in trees(2)))]
    want = theirs_say(tmp_path, some)
    np.testing.assert_allclose(ours_say(tmp_path, eight_devices, some), want, atol=1e-4)
    assert rowlib.pack(some, score.plan_for(some, hf.read_reward_arch(tmp_path), one_device)).tree_BL.max() > 2
