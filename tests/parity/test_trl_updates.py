"""One update against TRL's trainers on the same small Llama, from token ids to the gradient of every weight: the losses
that read more than a response's summed log-probs."""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from sera_jax import hf, losses, programs, score
from sera_jax import mesh as meshes
from sera_jax import rows as rowlib
from sera_jax.programs import Compute
from sera_jax.records import Batch, Tree
from sera_jax.rows import Plan

torch = pytest.importorskip("torch", reason="parity with TRL needs torch: install the `parity` extra")
transformers = pytest.importorskip("transformers", reason="parity with TRL needs transformers")
dpo_trainer = pytest.importorskip(
    "trl.trainer.dpo_trainer", reason="parity with TRL needs trl: install the `parity` extra"
)
kto_trainer = pytest.importorskip(
    "trl.trainer.kto_trainer", reason="parity with TRL needs trl: install the `parity` extra"
)

VOCAB, BETA = 64, 0.3
PLAN = Plan(128, 128, 4, 1)  # two or three trees a row, several microbatches


@pytest.fixture(scope="module")
def models(tmp_path_factory, one_device):
    """(transformers' policy, reference, arch, our weights of both, the policy's folder), float32."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False, max_position_embeddings=128,
        initializer_range=0.2, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    theirs, ours, folders = [], [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        arch = hf.read_arch(folder)
        dpo_trainer.add_fused_lm_head(
            model, outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
        )
        theirs.append(model)
        ours.append(hf.load(folder, arch, one_device))
        folders.append(folder)
    return *theirs, arch, *ours, folders[0]


def trees_of(shapes) -> list[Tree]:
    rng = np.random.default_rng(10)  # where the mismatches' mean log-ratio is above 0
    ids = lambda n: rng.integers(3, VOCAB, n).astype(np.int32)
    return [Tree(f"{i}", ids(p), (ids(a), ids(b)), label=(-1) ** i) for i, (p, a, b) in enumerate(shapes)]


TREES = trees_of([(5, 7, 3), (1, 1, 9), (12, 4, 4), (3, 20, 2)])


def padded(trees, branch: int, prefix: str = "") -> dict:
    """What TRL's collators make of one branch of each tree."""
    texts = [np.concatenate((t.prompt, t.branches[branch])) for t in trees]
    width = max(len(t.prompt) + len(b) for t in trees for b in t.branches)
    fill = lambda rows: torch.tensor(np.stack([np.pad(r, (0, width - len(r))) for r in rows]).astype(np.int64))
    completion = [np.arange(len(text)) >= len(t.prompt) for t, text in zip(trees, texts)]
    return {
        f"{prefix}input_ids": fill(texts),
        f"{prefix}attention_mask": fill([np.ones(len(text)) for text in texts]),
        f"{prefix}completion_mask": fill(completion),
    }


def trainer_of(models, **values) -> types.SimpleNamespace:
    """What a trainer's `_compute_loss` reads of itself."""
    accelerator = types.SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda x: x
    )
    return types.SimpleNamespace(
        model=models[0],
        ref_model=models[1],
        accelerator=accelerator,
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None),
        beta=BETA,
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **values,
    )


def their_gradient(models, loss) -> dict[str, np.ndarray]:
    models[0].zero_grad()
    loss.backward()
    return {name: weight.grad.numpy().copy() for name, weight in models[0].named_parameters()}


def update(models, one_device, tmp_path, reference_F, loss, keys, **options) -> tuple[dict, dict]:
    """(metrics, gradient by the file's tensor names) of one update of ours."""
    _, _, arch, params, _, folder = models
    transform = optax.trace(decay=0.0)  # its state is the gradient itself
    packed = rowlib.pack(TREES, PLAN)
    stacked, count = rowlib.microbatches(packed, PLAN, len(packed.tokens_BL) // PLAN.rows)
    assert count > 1
    label_F = np.repeat([tree.label for tree in TREES], 2)
    slots = [rowlib.spread(values_F, stacked.example_BS) for values_F in (reference_F, np.ones(8), label_F)]
    batch = meshes.put(Batch(stacked, *slots, np.int32(count)), programs.batch_shardings(one_device))
    run = programs.preference_update(
        arch,
        one_device,
        Compute(jnp.float32, "none", 16),
        transform,
        loss,
        keys,
        {"peak": 0.0, "schedule": "constant", "warmup": 0.0},
        **options,
    )
    copied = jax.tree.map(jnp.copy, params)
    state = programs.fresh_state(arch, one_device, transform)(copied)
    state, metrics = run(state, {}, batch, jnp.int32(1), jax.random.key(0))
    # Our gradient in the file's names and layouts: written as if it were the weights.
    written = hf.save(tmp_path / "gradient", arch, state.moments.trace, source=folder, dtype=jnp.float32)
    return meshes.get(metrics), safetensors.numpy.load_file(written / "model.safetensors")


def logps(params, arch, one_device, trees) -> np.ndarray:
    packed = rowlib.pack(trees, Plan(128, 128, 8, 1))
    logp, _ = score.row_logps(arch, params, packed, mesh=one_device, dtype=jnp.float32)
    return rowlib.unpack(np.asarray(logp), packed.example_BS, 2 * len(trees))


def same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name in want:
        # Measured floor: 2.3e-6 of the largest entry.
        np.testing.assert_allclose(got[name], want[name], atol=1e-5 * np.abs(want[name]).max(), err_msg=name)


def test_ld_dpo_and_wpo(models, one_device, tmp_path):
    """TRL's `ld_alpha` with `use_weighting`: the reference is weighted like the policy; no gradient of the weights."""
    alpha = 0.4
    trainer = trainer_of(
        models,
        label_smoothing=0.0,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        ld_alpha=alpha,
        use_weighting=True,
    )
    parts = padded(TREES, 0), padded(TREES, 1)
    inputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, models[0], inputs, False)
    want = their_gradient(models, loss)
    their_metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}

    _, _, arch, _, reference, _ = models
    cut = [
        Tree(t.id, t.prompt, tuple(b[: min(map(len, t.branches))] for b in t.branches)) for t in TREES
    ]  # what the branches of a pair share
    whole_F, shared_F = (logps(reference, arch, one_device, trees) for trees in (TREES, cut))
    metrics, got = update(
        models,
        one_device,
        tmp_path,
        alpha * whole_F + (1 - alpha) * shared_F,
        losses.LOSSES["dpo"],
        {"beta": BETA},
        ld_alpha=alpha,
        weighting=losses.wpo,
    )
    np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        np.testing.assert_allclose(metrics[name], their_metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
    same(got, want)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_labelled_single_responses(models, one_device, tmp_path, name):
    """Two desirable and two undesirable responses. TRL's mismatches are our second branches; of `apo_zero_unpaired` TRL
    computes no KL, and ours are not read, whatever they are."""
    loss = losses.LOSSES[name]
    trainer = trainer_of(
        models, loss_type=name, calculate_KL=loss.mismatch, desirable_weight=1.5, undesirable_weight=0.7
    )
    trainer._compute_kl_logps = types.MethodType(kto_trainer.KTOTrainer._compute_kl_logps, trainer)
    label = torch.tensor([tree.label > 0 for tree in TREES])
    inputs = padded(TREES, 0) | (padded(TREES, 1, "KL_") if loss.mismatch else {}) | {"label": label}
    theirs = kto_trainer.KTOTrainer._compute_loss(trainer, models[0], inputs, False)
    want = their_gradient(models, theirs)
    their_metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    assert their_metrics["kl"] > 0.1 if loss.mismatch else their_metrics["kl"] == 0

    _, _, arch, _, reference, _ = models
    keys = {"beta": BETA, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    reference_F = logps(reference, arch, one_device, TREES)
    metrics, got = update(models, one_device, tmp_path, reference_F, loss, keys)
    np.testing.assert_allclose(metrics["loss"], theirs.item(), rtol=1e-5)
    compared = set(metrics) & set(their_metrics)
    assert compared == {"rewards/margins"} | ({"kl"} if loss.mismatch else set()) | {
        f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected")
    }
    for measure in compared:
        np.testing.assert_allclose(metrics[measure], their_metrics[measure], rtol=1e-5, atol=1e-6, err_msg=measure)
    same(got, want)
