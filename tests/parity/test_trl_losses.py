"""Our losses, gradients and metrics against the loss code of the TRL that is installed, run on a stub model.

TRL 1.16 no longer has `kto_pair` (0.7.5 to 0.9.4 had it): tests/test_losses.py holds it against golden values instead.
"""

import collections
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


def trl(loss_type, seed, beta):
    """(loss, its gradient by sequence [2P], metrics) of TRL's DPOTrainer."""
    tokens, lengths, reference = draw(seed)
    per_token = torch.tensor(tokens, requires_grad=True)
    width = tokens.shape[1] + 1
    steps = torch.arange(width)
    completion = ((steps >= PROMPT) & (steps < PROMPT + torch.tensor(lengths)[:, None])).long()
    zeros = torch.zeros(tokens.shape, dtype=torch.float64)
    outputs = types.SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    def model(**inputs):
        return outputs

    model.training = True
    trainer = types.SimpleNamespace(
        model=model,
        accelerator=types.SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        args=types.SimpleNamespace(),
        beta=beta,
        label_smoothing=0.0,
        loss_types=[loss_type],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen, rejected = torch.tensor(reference).chunk(2)
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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize(
    "loss_type, name, keys",
    [("sigmoid", "dpo", {}), ("hinge", "slic", {}), ("ipo", "ipo", {"normalisation": "mean"})],
)
def test_dpo_trainer(loss_type, name, keys, beta, seed):
    expected, wanted, _ = trl(loss_type, seed, beta)
    logp, ref, length = pairs(seed)
    mean = lambda x: losses.LOSSES[name].loss(x, ref, length, beta=beta, **keys).mean()
    got, gradient = jax.value_and_grad(mean)(logp)
    np.testing.assert_allclose(got, expected, rtol=2e-5)
    np.testing.assert_allclose(gradient, wanted.reshape(2, -1).T, rtol=2e-4, atol=1e-6)


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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cpo_trainer(seed, smoothing):
    cpo = pytest.importorskip("trl.experimental.cpo", reason="SimPO and cDPO are compared with trl.experimental.cpo")
    logp, _, length = pairs(seed)

    def trl_loss(loss_type, logp, beta, label_smoothing):
        trainer = types.SimpleNamespace(
            alpha=0.0,
            beta=beta,
            label_smoothing=label_smoothing,
            loss_type=loss_type,
            simpo_gamma=0.7,
            accelerator=types.SimpleNamespace(device=torch.device("cpu")),
        )
        chosen, rejected = (torch.tensor(np.asarray(x, np.float64)) for x in logp.T)
        value, *rewards = cpo.CPOTrainer.cpo_loss(trainer, chosen, rejected)
        return value, torch.stack(rewards, 1)

    value, reward = trl_loss("simpo", logp / length, 2.0, 0.0)
    np.testing.assert_allclose(losses.simpo(logp, None, length, beta=2.0, gamma=0.7), value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(losses.simpo_reward(logp, None, length, beta=2.0, gamma=0.7), reward, rtol=1e-5)
    # Reference-free cDPO is CPO's sigmoid without its SFT term.
    value, _ = trl_loss("sigmoid", logp, 0.1, smoothing)
    got = losses.dpo(logp, jnp.zeros_like(logp), length, beta=0.1, label_smoothing=smoothing)
    np.testing.assert_allclose(got, value, rtol=1e-5)
