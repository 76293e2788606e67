"""Policy gradients on arrays: advantages of sampled candidates, PPO's clipped ratio, RLOO, the KL to a reference.

What is maximised is E_π[r(x, y)] - β·KL(π ‖ π_ref), from samples of π_old, the policy as it was when it sampled:

    advantage  A of a candidate, from the rewards of all candidates of its prompt (ADVANTAGES)
    ratio      ρ = π/π_old, of each token (PPO, GRPO) or of the whole response (RLOO) (RATIOS)
    loss       -min(ρ·A, clip(ρ, 1-ε, 1+ε_high)·A), Schulman et al. 2017, eq. 7; with ρ = 1 its gradient is REINFORCE's
    KL         in the reward, r - β·(log π_old(y|x) - log π_ref(y|x)), as in RLOO (Ahmadian et al. 2024); or in the
               loss, β·k3 of each token, k3 = π_ref/π - log(π_ref/π) - 1 (Schulman 2020), as in GRPO (Shao et al. 2024,
               eq. 4)

A candidate whose reward or advantage is NaN takes no part. RAFT (Dong et al. 2023) needs nothing of this but `best`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# --- rewards → advantages, on the host --------------------------------------------------------------------------------


def leave_one_out(rewards_PC: np.ndarray) -> np.ndarray:
    """r less the mean of the *other* candidates of the prompt: RLOO (Kool et al. 2019; Ahmadian et al. 2024, eq. 9)."""
    count_P1 = np.isfinite(rewards_PC).sum(axis=1, keepdims=True)
    others_PC = np.nansum(rewards_PC, axis=1, keepdims=True) - rewards_PC
    return np.where(count_P1 > 1, rewards_PC - others_PC / np.maximum(count_P1 - 1, 1), 0 * rewards_PC)


def centred(rewards_PC: np.ndarray) -> np.ndarray:
    """r less the mean of all candidates of the prompt, its own included: Dr. GRPO (Liu et al. 2025); of n candidates
    (n-1)/n times `leave_one_out`.
    """
    count_P1 = np.isfinite(rewards_PC).sum(axis=1, keepdims=True)
    return rewards_PC - np.nansum(rewards_PC, axis=1, keepdims=True) / np.maximum(count_P1, 1)


def group(rewards_PC: np.ndarray) -> np.ndarray:
    """`centred`, divided by (standard deviation + 1e-4) of the prompt's rewards: GRPO (Shao et al. 2024), the deviation
    with n - 1 as in TRL.
    """
    apart_PC = centred(rewards_PC)
    count_P1 = np.isfinite(rewards_PC).sum(axis=1, keepdims=True)
    variance_P1 = np.nansum(apart_PC**2, axis=1, keepdims=True) / np.maximum(count_P1 - 1, 1)
    return apart_PC / (np.sqrt(variance_P1) + 1e-4)


ADVANTAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "leave_one_out": leave_one_out,
    "group": group,
    "centred": centred,
}
"""float [P, C], NaN = takes no part → the same, NaN in the same places; 0 for a candidate alone with its prompt."""


def best(rewards_PC: np.ndarray) -> np.ndarray:
    """int [P]: the candidate of the highest reward, the first of equal ones; -1 where all rewards are NaN."""
    known_PC = np.isfinite(rewards_PC)
    return np.where(known_PC.any(axis=1), np.argmax(np.where(known_PC, rewards_PC, -np.inf), axis=1), -1)


# --- the loss, on devices ---------------------------------------------------------------------------------------------


def _of_token(log_ratio_BM: jax.Array, slot_BM: jax.Array, slots: int) -> jax.Array:
    return log_ratio_BM


def _of_sequence(log_ratio_BM: jax.Array, slot_BM: jax.Array, slots: int) -> jax.Array:
    return _gathered(_by_slot(log_ratio_BM, slot_BM, slots), slot_BM)


RATIOS: dict[str, Callable[[jax.Array, jax.Array, int], jax.Array]] = {"token": _of_token, "sequence": _of_sequence}
"""(log π/π_old of each token, its slot, slots S) → log ρ at each token: its own, or the sum over its response."""


def loss(
    logp_BM: jax.Array,
    old_BM: jax.Array | None,
    reference_BM: jax.Array | None,
    slot_BM: jax.Array,
    advantage_BS: jax.Array,
    *,
    ratio: str,
    average: str,
    clip: float,
    clip_high: float,
    beta: float,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Weighted sum of the tokens' losses, Σ weight, and metric sums likewise: add up, then divide by Σ weight once.

    Args:
        logp_BM: float32, of each response token under the policy; slot_BM: the slot of its response, S = no token.
        old_BM: under the policy that sampled, None = this one, before any update (ρ = 1). reference_BM: under the
            reference; read with beta > 0.
        advantage_BS: of each slot's response, NaN = takes no part.
        ratio: of RATIOS. average: token = every token weighs the same (TRL's dapo and bnpo); sequence = every response
            does, its tokens share its weight (TRL's grpo). A ratio of sequences is alike at all tokens of a response.
        clip, clip_high: ε and ε_high; inf = not clipped. beta: of k3 in the loss.
    """
    slots = advantage_BS.shape[1]
    valid_BM = (slot_BM < slots) & _gathered(jnp.isfinite(advantage_BS), slot_BM)
    advantage_BM = _gathered(jnp.nan_to_num(advantage_BS, nan=0.0), slot_BM)
    # What stands where no token is may be anything; it must not reach a sum or an exponent.
    known = lambda value_BM: jnp.where(slot_BM < slots, value_BM, 0.0)
    logp_BM = known(logp_BM)
    old_BM = jax.lax.stop_gradient(logp_BM) if old_BM is None else known(old_BM)
    ratio_BM = jnp.exp(RATIOS[ratio](logp_BM - old_BM, slot_BM, slots))
    within_BM = jnp.clip(ratio_BM, 1 - clip, 1 + clip_high)
    loss_BM = -jnp.minimum(ratio_BM * advantage_BM, within_BM * advantage_BM)
    low_BM = (ratio_BM < 1 - clip) & (advantage_BM < 0)
    high_BM = (ratio_BM > 1 + clip_high) & (advantage_BM > 0)
    told = {"clip_ratio/low_mean": low_BM, "clip_ratio/high_mean": high_BM, "clip_ratio/region_mean": low_BM | high_BM}
    if reference_BM is not None:
        kl_BM = k3(logp_BM, known(reference_BM))
        loss_BM += beta * kl_BM
        told["kl"] = jax.lax.stop_gradient(kl_BM)
    weight_BM = valid_BM.astype(jnp.float32)
    if average == "sequence":
        length_BS = _by_slot(weight_BM, slot_BM, slots)
        weight_BM = weight_BM / jnp.maximum(_gathered(length_BS, slot_BM), 1)
    total = lambda value_BM: jnp.sum(jnp.where(valid_BM, weight_BM * value_BM, 0))
    return total(loss_BM), jnp.sum(weight_BM), {name: total(value_BM) for name, value_BM in told.items()}


def k3(logp: jax.Array, reference: jax.Array) -> jax.Array:
    """π_ref/π - log(π_ref/π) - 1, elementwise, >= 0: its mean over tokens of π is KL(π ‖ π_ref) (Schulman 2020)."""
    return jnp.exp(reference - logp) - (reference - logp) - 1


def _by_slot(value_BM: jax.Array, slot_BM: jax.Array, slots: int) -> jax.Array:
    return jax.vmap(lambda value_M, slot_M: jax.ops.segment_sum(value_M, slot_M, num_segments=slots))(value_BM, slot_BM)


def _gathered(value_BS: jax.Array, slot_BM: jax.Array) -> jax.Array:
    """What each token's slot has; arbitrary where there is no token."""
    return jnp.take_along_axis(value_BS, jnp.minimum(slot_BM, value_BS.shape[1] - 1), axis=1)
