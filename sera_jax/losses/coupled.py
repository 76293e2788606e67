"""Losses of the whole batch, meaningless on a part of it, and those of labelled single responses. Padding pairs have
loss 0 and take no part."""

import jax
import jax.numpy as jnp

from sera_jax.losses.implicit import log_ratio_reward, margin
from sera_jax.losses.margins import logistic


def kto_pair(logp_P2, ref_P2, length_P2, valid_P, *, beta):
    """½·[1 - σ(β(c - KL_l))] + ½·[1 - σ(β(KL_w - r))]: paired KTO (Ethayarajh et al. 2024), as TRL 0.7.5-0.9.4 has it.

    KL_w = max(0, mean c) and KL_l = max(0, mean r) over the valid pairs of the batch; gradients flow through them. The
    mean over pairs equals TRL's mean over its 2P terms.
    """
    ratio_P2 = jnp.where(valid_P[:, None], logp_P2 - ref_P2, 0)
    mean_2 = jnp.sum(ratio_P2, axis=0) / jnp.maximum(jnp.sum(valid_P), 1)
    # Not jnp.maximum: its gradient at 0 is one half, torch's clamp passes all of it, and a policy that still equals its
    # reference stands exactly there.
    kl_2 = jnp.where(mean_2 >= 0, mean_2, 0)
    chosen_P = jax.nn.sigmoid(-beta * (ratio_P2[:, 0] - kl_2[1]))
    rejected_P = jax.nn.sigmoid(-beta * (kl_2[0] - ratio_P2[:, 1]))
    return jnp.where(valid_P, (chosen_P + rejected_P) / 2, 0)


def bco_pair_shift(logp_P2, ref_P2, length_P2, valid_P, *, beta):
    """-log σ(βc - δ) - log σ(-(βr - δ)): BCO on pairs with its reward shift δ (Jung et al. 2024).

    δ is the mean of the batch's 2P rewards, no gradient through it. TRL < 1 has the running mean of it over all
    updates, which is no function of a batch.
    """
    reward_P2 = jnp.where(valid_P[:, None], log_ratio_reward(logp_P2, ref_P2, length_P2, beta=beta), 0)
    shift = jax.lax.stop_gradient(jnp.sum(reward_P2) / (2 * jnp.maximum(jnp.sum(valid_P), 1)))
    loss_P = -jax.nn.log_sigmoid(reward_P2[:, 0] - shift) - jax.nn.log_sigmoid(shift - reward_P2[:, 1])
    return jnp.where(valid_P, loss_P, 0)


def of_equal_rank(value_P, like_P, valid_P):
    """For each pair the one of `value_P` that has the rank among them which the pair has in `like_P`.

    Both are ranked over the valid pairs, ascending; gradients flow to the values, ranks have none.
    """

    def ascending(x_P):
        return jnp.argsort(jnp.where(valid_P, jax.lax.stop_gradient(x_P), jnp.inf))  # stable: padding behind +inf

    rank_P = jnp.argsort(ascending(like_P))
    return value_P[ascending(value_P)][rank_P]


def aot(logp_P2, ref_P2, length_P2, valid_P, *, beta, label_smoothing=0.0):
    """-(1-ε)·log σ(βΔ) - ε·log σ(-βΔ), Δ = log π(y_w)/π(y_l) less the log π_ref(y_w)/π_ref(y_l) of the same rank.

    Paired AOT (Melnyk et al. 2024): both are sorted over the batch; the term of a rank belongs to the pair that has it
    under the policy. TRL sorts the batch of a device, here it is the global one.
    """
    policy_P, reference_P = (margin(jnp.where(valid_P[:, None], x, 0)) for x in (logp_P2, ref_P2))
    delta_P = policy_P - of_equal_rank(reference_P, policy_P, valid_P)
    return jnp.where(valid_P, logistic(beta * delta_P, label_smoothing), 0)


def aot_unpaired(logp_P2, ref_P2, length_P2, valid_P, *, beta, label_smoothing=0.0):
    """The same with Δ = c less the r of the same rank: unpaired AOT; the term belongs to the pair of c."""
    ratio_P2 = jnp.where(valid_P[:, None], logp_P2 - ref_P2, 0)
    delta_P = ratio_P2[:, 0] - of_equal_rank(ratio_P2[:, 1], ratio_P2[:, 0], valid_P)
    return jnp.where(valid_P, logistic(beta * delta_P, label_smoothing), 0)


def reference_point(logp_P2, ref_P2, valid_P):
    """z₀ = max(0, mean log π/π_ref of the mismatches of the batch): KTO's estimate of KL(π ‖ π_ref), nats, detached."""
    ratio_P = jnp.where(valid_P, logp_P2[:, 1] - ref_P2[:, 1], 0)
    return jax.lax.stop_gradient(jnp.maximum(jnp.sum(ratio_P) / jnp.maximum(jnp.sum(valid_P), 1), 0))


def kto(logp_P2, ref_P2, length_P2, valid_P, label_P, *, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """λ_D·[1 - σ(β(u - z₀))] of a desirable response, λ_U·[1 - σ(β(z₀ - u))] of another: KTO (Ethayarajh et al. 2024,
    eq. 7), u = log π/π_ref of the response.

    λ_D, λ_U = desirable_weight, undesirable_weight. The mean over the batch is TRL's; its z₀ is that of a device batch.
    """
    ratio_P = jnp.where(valid_P, logp_P2[:, 0] - ref_P2[:, 0], 0)
    above_P = beta * (ratio_P - reference_point(logp_P2, ref_P2, valid_P))
    weight_P = jnp.where(label_P > 0, desirable_weight, undesirable_weight)
    return jnp.where(valid_P, weight_P * jax.nn.sigmoid(-label_P * above_P), 0)


def apo_zero_unpaired(
    logp_P2, ref_P2, length_P2, valid_P, label_P, *, beta, desirable_weight=1.0, undesirable_weight=1.0
):
    """λ_D·[1 - σ(βu)] of a desirable response, λ_U·σ(βu) of another: APO-zero (D'Oosterlinck et al. 2024, eq. 7) on
    single responses, as TRL's KTOTrainer has it: `kto` with 0 in the place of z₀.

    Each response on its own. It takes the batch as `kto` does, since its metrics are means over either side of it.
    """
    ratio_P = jnp.where(valid_P, logp_P2[:, 0] - ref_P2[:, 0], 0)
    weight_P = jnp.where(label_P > 0, desirable_weight, undesirable_weight)
    return jnp.where(valid_P, weight_P * jax.nn.sigmoid(-label_P * beta * ratio_P), 0)
