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


def ipo_soft(logp_P2, ref_P2, length_P2, preferred_P2, *, beta):
    """(d - (p_w - p_l)/(2β))²: IPO (Azar et al. 2023, eq. 10) with the probability p_w that y_w is preferred to y_l.

    Up to a constant it is the mean of IPO's loss over labels that are drawn with that probability, so which of the two
    is called y_w does not matter. On pairs of the policy's own samples it is online IPO, with samples of a mixture
    IPO-MD (Calandriello et al. 2024).

    Args:
        preferred_P2: (p_w, p_l = 1 - p_w); (1, 0) is IPO.
    """
    return (margin(logp_P2 - ref_P2) - margin(preferred_P2) / (2 * beta)) ** 2


def reward_margins(logp_P2, ref_P2, length_P2, reward_P2, beta, reward_scale):
    """(βd, δ): the implicit reward's margin, and reward_scale times that of the rewards that are told."""
    return margin(log_ratio_reward(logp_P2, ref_P2, length_P2, beta=beta)), reward_scale * margin(reward_P2)


def bernoulli_kl(one_P, other_P):
    """KL(σ(one) ‖ σ(other)) of two coins, from their logits."""
    log = jax.nn.log_sigmoid
    heads_P, tails_P = log(one_P) - log(other_P), log(-one_P) - log(-other_P)
    return jax.nn.sigmoid(one_P) * heads_P + jax.nn.sigmoid(-one_P) * tails_P


def rpo_bwd_kl(logp_P2, ref_P2, length_P2, reward_P2, *, beta, reward_scale=1.0):
    """KL(σ(δ) ‖ σ(βd)), δ the gap of known rewards: reward-aware preference optimisation (Adler et al. 2024,
    "Nemotron-4 340B", sec. 3.3.2) as in NeMo-Aligner, whose gt_reward_scale is reward_scale.

    Unlike DPO it stops where the policy's margin explains the gap: near pairs are pushed less than far ones.

    Args:
        reward_P2: of (chosen, rejected), of whoever scored them.
    """
    own_P, known_P = reward_margins(logp_P2, ref_P2, length_P2, reward_P2, beta, reward_scale)
    return bernoulli_kl(known_P, own_P)


def rpo_fwd_kl(logp_P2, ref_P2, length_P2, reward_P2, *, beta, reward_scale=1.0):
    """KL(σ(βd) ‖ σ(δ)): the other direction."""
    own_P, known_P = reward_margins(logp_P2, ref_P2, length_P2, reward_P2, beta, reward_scale)
    return bernoulli_kl(own_P, known_P)


def rpo_sq(logp_P2, ref_P2, length_P2, reward_P2, *, beta, reward_scale=1.0):
    """(βd - δ)²: the margins themselves (as REBEL, Gao et al. 2024, has it on its own samples)."""
    own_P, known_P = reward_margins(logp_P2, ref_P2, length_P2, reward_P2, beta, reward_scale)
    return (own_P - known_P) ** 2


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
