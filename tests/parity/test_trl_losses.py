"""Our losses, gradients and metrics against the loss code of the TRL that is installed, run on a stub model.

TRL 1.16 no longer has `kto_pair` (0.7.5 to 0.9.4 had it) and never had `dpop`, `rdpo`, `slic_hf`; its `bco_pair` has no
shift any more. tests/test_losses.py holds them against golden values and transcriptions instead.
"""

import collections
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import losses

torch = pytest.importorskip("torch", reason="parity with TRL needs torch: install the `parity` extra")
dpo_trainer = pytest.importorskip(
    "trl.trainer.dpo_trainer", reason="parity with TRL needs trl: install the `parity` extra"
)

PROMPT = 2


def draw(seed, pairs=5):
    """Token log-probs of the policy [2P, T] (chosen, then rejected), lengths [2P], reference sums [2P]; float64."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, 2 * pairs)
    steps = np.arange(PROMPT + lengths.max() - 1)  # token t is predicted at t - 1
    mask = (steps >= PROMPT - 1) & (steps < PROMPT - 1 + lengths[:, None])
    tokens = np.where(mask, -rng.gamma(2.0, 0.5, mask.shape), 0.0)
    return tokens, lengths, tokens.sum(1) + rng.normal(size=2 * pairs)


def trl(loss_type, seed, beta, label_smoothing=0.0, f_divergence="reverse_kl", f_alpha=0.5, discopop_tau=0.05):
    """(loss, its gradient by sequence [2P], metrics) of TRL's DPOTrainer."""
    tokens, lengths, reference = draw(seed)
    dtype = torch.float32 if f_divergence == "alpha_divergence" else torch.float64  # its clamp knows no float64
    per_token = torch.tensor(tokens, requires_grad=True, dtype=dtype)
    width = tokens.shape[1] + 1
    steps = torch.arange(width)
    completion = ((steps >= PROMPT) & (steps < PROMPT + torch.tensor(lengths)[:, None])).long()
    zeros = torch.zeros(tokens.shape, dtype=dtype)
    outputs = types.SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    def model(**inputs):
        return outputs

    model.training = True
    trainer = types.SimpleNamespace(
        model=model,
        accelerator=types.SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        args=types.SimpleNamespace(discopop_tau=discopop_tau),
        beta=beta,
        label_smoothing=label_smoothing,
        loss_types=[loss_type],
        loss_weights=[1.0],
        f_divergence_type=f_divergence,
        f_alpha_divergence_coef=f_alpha,
        ld_alpha=None,
        use_weighting=False,
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen, rejected = torch.tensor(reference, dtype=dtype).chunk(2)
    inputs = {
        "input_ids": torch.ones(completion.shape, dtype=torch.long),
        "attention_mask": torch.ones(completion.shape, dtype=torch.long),
        "completion_mask": completion,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, model, inputs, False)
    loss.backward()
    # Every token of a response has the gradient of its sum: read it at the first one.
    gradient = per_token.grad[:, PROMPT - 1].numpy()
    return float(loss.detach()), gradient, {k: v[0] for k, v in trainer._metrics["train"].items()}


def pairs(seed):
    tokens, lengths, reference = draw(seed)
    as_pairs = lambda x: jnp.asarray(x.reshape(2, -1).T, jnp.float32)
    return as_pairs(tokens.sum(1)), as_pairs(reference), as_pairs(lengths)


@functools.cache
def ours(name, **keys):
    """(logp, ref, length) → (mean loss over the pairs, its gradient by logp), compiled."""
    loss = losses.LOSSES[name]

    def mean(logp, ref, length):
        batch = (jnp.ones(len(logp), bool),) if loss.coupled else ()
        return loss.loss(logp, ref, length, *batch, **keys).mean()

    return jax.jit(jax.value_and_grad(mean))


# TRL's name, ours, keys of both, keys of ours. cDPO is not in TRL 1.x: its `sigmoid` takes no smoothing.
SHAPES = [
    {},
    dict(f_divergence="forward_kl"),
    dict(f_divergence="js_divergence"),
    dict(f_divergence="alpha_divergence", f_alpha=0.3),
]
DPO_TRAINER = [
    *(("sigmoid", "dpo", keys, {}) for keys in SHAPES),
    *(("hinge", "slic", keys, {}) for keys in SHAPES),
    *(("ipo", "ipo", keys, dict(normalisation="mean")) for keys in SHAPES),
    *(("robust", "robust_dpo", dict(label_smoothing=0.1, **keys), {}) for keys in SHAPES),
    *(("exo_pair", "exo_pair", dict(label_smoothing=1e-3, **keys), {}) for keys in SHAPES),
    *(("discopop", "discopop", dict(discopop_tau=tau, **keys), {}) for keys, tau in zip(SHAPES, (0.05, 1.0, 0.2, 0.5))),
    *(("sigmoid_norm", "sigmoid_norm", keys, {}) for keys in SHAPES),
    *((name, name, {}, {}) for name in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")),
    *((name, name, dict(label_smoothing=eps), {}) for name in ("aot", "aot_unpaired") for eps in (0.0, 0.1)),
]


@pytest.mark.parametrize("loss_type, name, keys, own", DPO_TRAINER)
def test_dpo_trainer(loss_type, name, keys, own):
    for seed, beta in ((0, 0.1), (1, 0.1), (2, 2.0)):
        expected, wanted, _ = trl(loss_type, seed, beta, **keys)
        got, gradient = ours(name, beta=beta, **keys, **own)(*pairs(seed))
        np.testing.assert_allclose(got, expected, rtol=2e-5)
        np.testing.assert_allclose(gradient, wanted.reshape(2, -1).T, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("seed", range(3))
def test_metrics(seed):
    _, _, expected = trl("sigmoid", seed, 0.1)
    logp, ref, length = pairs(seed)
    got = losses.metrics(logp, losses.LOSSES["dpo"].reward(logp, ref, length, beta=0.1), jnp.ones(len(logp)))
    for key, total in got.items():
        assert float(total) / len(logp) == pytest.approx(expected[key], abs=1e-5), key


@pytest.mark.parametrize("seed", range(3))
def test_sft_is_the_token_mean(seed):
    expected, _, _ = trl("sft", seed, 0.1)
    logp, _, length = pairs(seed)
    nll, tokens, _ = losses.sft(logp[:, 0], length[:, 0])
    np.testing.assert_allclose(nll.sum() / tokens.sum(), expected, rtol=1e-5)


def by_torch(loss, seed, per_token):
    """(loss_P, gradient of its sum by logp [P, 2], what else it returns) of loss(chosen, rejected) → (loss_P, ..)."""
    logp, _, length = (np.asarray(x, np.float64) for x in pairs(seed))
    logp = torch.tensor(logp, requires_grad=True)
    chosen, rejected = (logp / torch.tensor(length) if per_token else logp).T
    value, *rest = loss(chosen, rejected)
    value.sum().backward()
    return value.detach().numpy(), logp.grad.numpy(), rest


CPO_TRAINER = [
    ("simpo", "simpo", {}, dict(gamma=0.7)),
    ("simpo", "simpo", dict(label_smoothing=0.1), dict(gamma_beta_ratio=0.35)),  # β is 2 below
    ("simpo", "alphapo", dict(alpha=0.25), dict(gamma=0.7, alphapo_alpha=0.25)),
    ("simpo", "alphapo", dict(alpha=-0.5, label_smoothing=0.1), dict(gamma_beta_ratio=0.35, alphapo_alpha=-0.5)),
    ("sigmoid", "cpo", {}, {}),
    ("sigmoid", "cpo", dict(label_smoothing=0.1), {}),
]


@pytest.mark.parametrize("loss_type, name, theirs, own", CPO_TRAINER)
def test_cpo_trainer(loss_type, name, theirs, own):
    module = pytest.importorskip(
        "trl.experimental.cpo", reason="SimPO, AlphaPO and CPO are those of trl.experimental.cpo"
    )
    theirs = dict(alpha=0.0, label_smoothing=0.0) | theirs
    keys = dict(beta=2.0, label_smoothing=theirs["label_smoothing"], **own)
    trainer = types.SimpleNamespace(
        **theirs,
        beta=2.0,
        loss_type=loss_type,
        simpo_gamma=0.7,
        accelerator=types.SimpleNamespace(device=torch.device("cpu")),
    )
    for seed in range(3):
        loss = lambda *logps: module.CPOTrainer.cpo_loss(trainer, *logps)
        expected, wanted, rewards = by_torch(loss, seed, per_token=loss_type == "simpo")
        logp, _, length = pairs(seed)
        got, gradient = ours(name, **keys)(logp, None, length)
        np.testing.assert_allclose(got, expected.mean(), rtol=1e-5)
        np.testing.assert_allclose(gradient * len(logp), wanted, rtol=1e-4, atol=1e-6)
        reward = losses.LOSSES[name].reward(logp, None, length, **keys)
        np.testing.assert_allclose(reward, torch.stack(rewards, 1), rtol=1e-5)


def test_orpo_trainer():
    """The odds term, and the reward that is logged; the NLL beside it is ours, over the response."""
    module = pytest.importorskip("trl.experimental.orpo", reason="ORPO is that of trl.experimental.orpo")
    trainer = types.SimpleNamespace(beta=0.5, accelerator=types.SimpleNamespace(device=torch.device("cpu")))
    for seed in range(3):
        loss = lambda *logps: module.ORPOTrainer.odds_ratio_loss(trainer, *logps)
        expected, wanted, rest = by_torch(loss, seed, per_token=True)  # to be subtracted
        logp, _, length = pairs(seed)
        nll = -logp[:, 0] / length[:, 0]
        got, gradient = ours("orpo", beta=0.5)(logp, None, length)
        np.testing.assert_allclose(got, np.mean(nll - expected), rtol=1e-5)
        with_nll = np.stack([-1 / length[:, 0], 0 * length[:, 0]], 1) - wanted
        np.testing.assert_allclose(gradient * len(logp), with_nll, rtol=1e-4, atol=1e-6)
        reward = losses.LOSSES["orpo"].reward(logp, None, length, beta=0.5)
        np.testing.assert_allclose(reward, torch.stack(rest[:2], 1), rtol=1e-5)
