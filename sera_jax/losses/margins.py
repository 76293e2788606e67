"""Losses of a margin: of how much further the policy has moved from its reference on y_w than on y_l."""

import math

import jax
import jax.numpy as jnp

from sera_jax.losses.implicit import ipo_reward, log_ratio_per_token_reward, log_ratio_reward, margin

# `divergence` stands for f_divergence and f_alpha (implicit.divergence): with them, c and r are f'(π/π_ref).


def logistic(margin_P, label_smoothing=0.0):
    """-(1-ε)·log σ(z) - ε·log σ(-z): the negative log-likelihood of a label that is wrong with probability ε."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin_P) - label_smoothing * jax.nn.log_sigmoid(-margin_P)


def dpo(logp_P2, ref_P2, length_P2, *, beta, label_smoothing=0.0, **divergence):
    """-(1-ε)·log σ(βd) - ε·log σ(-βd): DPO (Rafailov et al. 2023, eq. 7); f-DPO (Wang et al. 2024) with a divergence.

    ε = label_smoothing > 0 is cDPO (Mitchell 2023): labels are wrong with probability ε.
    """
    return logistic(margin(log_ratio_reward(logp_P2, ref_P2, length_P2, beta=beta, **divergence)), label_smoothing)


def robust_dpo(logp_P2, ref_P2, length_P2, *, beta, label_smoothing, **divergence):
    """[-(1-ε)·log σ(βd) + ε·log σ(-βd)] / (1-2ε): robust DPO (Chowdhury et al. 2024).

    Unbiased where labels are flipped with probability ε < ½; not bounded below.
    """
    margin_P = margin(log_ratio_reward(logp_P2, ref_P2, length_P2, beta=beta, **divergence))
    clean_P, flipped_P = -jax.nn.log_sigmoid(margin_P), -jax.nn.log_sigmoid(-margin_P)
    return ((1 - label_smoothing) * clean_P - label_smoothing * flipped_P) / (1 - 2 * label_smoothing)


def dpo_pessimistic(logp_P2, ref_P2, length_P2, bonus_P2, *, beta, label_smoothing=0.0):
    """ℓ(βd + Γ_w - Γ_l): GSHF's offline variant (Xiong et al. 2024), DPO for a reward less its uncertainty.

    The policy that is best for r - Γ at a price of β for a nat is π_ref·exp((r - Γ)/β)/Z, so that r = β·log π/π_ref + Γ
    up to what depends on the prompt alone. It is r that explains the labels; the policy is moved less towards what is
    uncertain. Its implicit reward, β·log π/π_ref, is the pessimistic one.

    Args:
        bonus_P2: Γ(x, y) of each response, in the units of the reward.
    """
    margin_P = margin(log_ratio_reward(logp_P2, ref_P2, length_P2, beta=beta))
    return logistic(margin_P + margin(bonus_P2), label_smoothing)


def exo_pair(logp_P2, ref_P2, length_P2, *, beta, label_smoothing, **divergence):
    """KL(q ‖ p) with q = (σ(βd), σ(-βd)) and p = (1-ε, ε): EXO on pairs (Ji et al. 2024, eq. 16); 0 < ε, 1e-3 there."""
    if not label_smoothing > 0:
        raise ValueError(
            f"exo_pair: label_smoothing is {label_smoothing!r}, expected more than 0 (1e-3 in the paper): "
            "KL(q ‖ p) is infinite where p is 0."
        )
    margin_P = margin(log_ratio_reward(logp_P2, ref_P2, length_P2, beta=beta, **divergence))
    log_w, log_l = jax.nn.log_sigmoid(margin_P), jax.nn.log_sigmoid(-margin_P)
    target_w, target_l = math.log1p(-label_smoothing), math.log(label_smoothing)
    return jnp.exp(log_w) * (log_w - target_w) + jnp.exp(log_l) * (log_l - target_l)


def discopop(logp_P2, ref_P2, length_P2, *, beta, discopop_tau=0.05, **divergence):
    """(1-m)·(-log σ(z)) + m·exp(-z), z = βd, m = σ(z/τ): DiscoPOP (Lu et al. 2024, eq. 5); 0 < τ <= 1.

    Not monotone: around z = 0 it rises with the margin. m·exp(-z) is one exponential, which cannot overflow for τ <= 1.
    """
    margin_P = margin(log_ratio_reward(logp_P2, ref_P2, length_P2, beta=beta, **divergence))
    scaled_P = margin_P / discopop_tau
    exponential_P = jnp.exp(jax.nn.log_sigmoid(scaled_P) - margin_P)
    return jax.nn.sigmoid(-scaled_P) * -jax.nn.log_sigmoid(margin_P) + exponential_P


def slic(logp_P2, ref_P2, length_P2, *, beta, **divergence):
    """max(0, 1 - βd): SLiC's hinge with a reference ("hinge-norm" of RSO, Liu et al. 2023; TRL's `hinge`)."""
    return jax.nn.relu(1 - margin(log_ratio_reward(logp_P2, ref_P2, length_P2, beta=beta, **divergence)))


def ipo(logp_P2, ref_P2, length_P2, *, beta, normalisation, **divergence):
    """(d - 1/(2β))²: IPO (Azar et al. 2023, eq. 17), β is their τ.

    normalisation: "sum" as in the paper; "mean" divides c by L_w and r by L_l first, as TRL does since 0.7.11.
    """
    ratio_P2 = ipo_reward(logp_P2, ref_P2, length_P2, beta=1.0, normalisation=normalisation, **divergence)
    return (margin(ratio_P2) - 1 / (2 * beta)) ** 2


def sigmoid_norm(logp_P2, ref_P2, length_P2, *, beta, **divergence):
    """-log σ(β(c/L_w - r/L_l)): DPO per token (TRL's `sigmoid_norm`, Tülu 3's length-normalised DPO with β 5)."""
    reward_P2 = log_ratio_per_token_reward(logp_P2, ref_P2, length_P2, beta=beta, **divergence)
    return logistic(margin(reward_P2))


def dpop(logp_P2, ref_P2, length_P2, *, beta, dpop_lambda):
    """-log σ(β(d - λ·max(0, -c))): DPO-Positive (Pal et al. 2024); y_w may not fall below the reference."""
    ratio_P2 = logp_P2 - ref_P2
    return logistic(beta * (margin(ratio_P2) - dpop_lambda * jax.nn.relu(-ratio_P2[..., 0])))


def rdpo(logp_P2, ref_P2, length_P2, *, beta, rdpo_alpha):
    """-log σ(βd + α(L_w - L_l)): length-regularised DPO (R-DPO, Park et al. 2024).

    The reward that explains the labels is β·log-ratio + α·L; less the length it likes, β·log-ratio is what the policy
    is trained for, and that is its implicit reward here.
    """
    margin_P = margin(log_ratio_reward(logp_P2, ref_P2, length_P2, beta=beta))
    return logistic(margin_P + rdpo_alpha * margin(length_P2))
