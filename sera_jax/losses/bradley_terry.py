"""The loss of a reward model: Bradley-Terry on pairs of rewards."""

import jax.numpy as jnp

from sera_jax.losses.margins import logistic


def bradley_terry(reward_P2, length_P2, score_P2, *, margin=0.0, center=0.0, length_alpha=0.0):
    """-log σ(r_w - r_l + α(L_w - L_l) - m) + λ·(r_w + r_l)²: Bradley-Terry (Ouyang et al. 2022, eq. 1), in float32.

    m = margin · (score_w - score_l), scores of the annotator (Llama 2, Touvron et al. 2023, eq. 2, with a constant
    factor; TRL's `margin` column is m). λ = center, against rewards that drift together (Eisenstein et al. 2023; TRL's
    center_rewards_coefficient). α = length_alpha: what explains the labels is r + α·L, so a pair whose longer response
    won teaches r less, and r itself likes no length (as R-DPO, Park et al. 2024, does with the implicit reward).

    Args:
        reward_P2: float32 [P, 2] of (chosen, rejected). length_P2: response tokens. score_P2: unread without margin.
    """
    apart = lambda x_P2: x_P2[..., 0] - x_P2[..., 1]
    margin_P = apart(reward_P2) + length_alpha * apart(length_P2)
    if margin:
        margin_P -= margin * apart(score_P2)
    return logistic(margin_P) + center * jnp.square(reward_P2[..., 0] + reward_P2[..., 1])
