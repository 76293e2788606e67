"""The loss of TRL's own RLOOTrainer and GRPOTrainer, on the same log-probs and advantages, and its advantages."""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import policy_gradient

torch = pytest.importorskip("torch", reason="parity with TRL needs torch: install the `parity` extra")
grpo = pytest.importorskip("trl.trainer.grpo_trainer", reason="parity with TRL needs trl: install the `parity` extra")
rloo = pytest.importorskip("trl.trainer.rloo_trainer", reason="parity with TRL needs trl: install the `parity` extra")

B, T = 6, 9


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    logp = rng.normal(-2, 0.7, (B, T))
    mask = np.arange(T) < rng.integers(1, T + 1, B)[:, None]
    mask[0] = True
    return {
        "logp": logp,
        "old": logp + 0.25 * rng.normal(size=(B, T)),
        "reference": logp + 0.5 * rng.normal(size=(B, T)),
        "advantage": rng.normal(size=B),
        "mask": mask,
    }


def of_trl(trainer: type, a: dict, **config) -> tuple[float, np.ndarray]:
    """(loss, its gradient by log-probs) of `_compute_loss`, whose forward pass is given."""
    tensor = lambda name: torch.tensor(a[name], dtype=torch.float64)
    logp = tensor("logp").requires_grad_()
    mask = torch.tensor(a["mask"], dtype=torch.float64)
    same = lambda x, **_: x
    stub = types.SimpleNamespace(
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(reduce=same, gather=same, gather_for_metrics=same, num_processes=1),
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": collections.defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
        **config,
    )
    inputs = {
        "prompt_ids": torch.zeros((B, 2), dtype=torch.long),
        "prompt_mask": torch.ones((B, 2), dtype=torch.long),
        "completion_ids": torch.zeros((B, T), dtype=torch.long),
        "completion_mask": mask,
        "advantages": tensor("advantage"),
        "old_per_token_logps": tensor("old"),
        "old_logps": (tensor("old") * mask).sum(1),
        "ref_per_token_logps": tensor("reference"),
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(stub, None, inputs)
    loss.backward()
    return float(loss.detach()), logp.grad.numpy()


def of_room(a: dict, **keys) -> tuple[float, np.ndarray]:
    """One response a row."""
    slot = jnp.asarray(np.where(a["mask"], 0, 1), jnp.int32)
    f32 = lambda name: jnp.asarray(a[name], jnp.float32)

    def mean(logp):
        reference = f32("reference") if keys["beta"] else None
        total, weight, _ = policy_gradient.loss(logp, f32("old"), reference, slot, f32("advantage")[:, None], **keys)
        return total / weight

    value, gradient = jax.jit(jax.value_and_grad(mean))(f32("logp"))
    return float(value), np.asarray(gradient)


CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.28}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("average, loss_type", [("sequence", "grpo"), ("token", "bnpo"), ("token", "dapo")])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo(seed, average, loss_type, beta):
    a = arrays(seed)
    want = of_trl(grpo.GRPOTrainer, a, loss_type=loss_type, beta=beta, importance_sampling_level="token", **CLIP)
    got = of_room(a, ratio="token", average=average, clip=0.2, clip_high=0.28, beta=beta)
    np.testing.assert_allclose(got[0], want[0], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_rloo(seed):
    a = arrays(seed)
    want = of_trl(rloo.RLOOTrainer, a, **CLIP)
    got = of_room(a, ratio="sequence", average="sequence", clip=0.2, clip_high=0.28, beta=0.0)
    np.testing.assert_allclose(got[0], want[0], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=2e-5, atol=1e-6)


def test_group_advantages_by_trl_s_own_deviation():
    """GRPOTrainer's lines need a whole trainer; its deviation, which could differ (n - 1 or n), does not."""
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    rewards = np.random.default_rng(0).normal(size=(5, 4))
    rewards[1, 2] = np.nan
    r = torch.tensor(rewards)
    want = (r - torch.nanmean(r, dim=1, keepdim=True)) / (nanstd(r, dim=1, keepdim=True) + 1e-4)
    np.testing.assert_allclose(policy_gradient.group(rewards), want.numpy(), rtol=1e-6)  # its n / (n - 1) is float32
