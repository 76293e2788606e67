"""Losses that hold y_w and y_l against the reference each on its own: where they stand, not only how far apart."""

import jax

from sera_jax.losses.implicit import log_ratio_reward


def _rewards(logp_P2, ref_P2, length_P2, beta):
    """(βc, βr)."""
    reward_P2 = log_ratio_reward(logp_P2, ref_P2, length_P2, beta=beta)
    return reward_P2[..., 0], reward_P2[..., 1]


def nca_pair(logp_P2, ref_P2, length_P2, *, beta):
    """-log σ(βc) - ½·log σ(-βc) - ½·log σ(-βr): NCA on pairs (Chen et al. 2024)."""
    chosen_P, rejected_P = _rewards(logp_P2, ref_P2, length_P2, beta)
    return -jax.nn.log_sigmoid(chosen_P) - (jax.nn.log_sigmoid(-chosen_P) + jax.nn.log_sigmoid(-rejected_P)) / 2


def bco_pair(logp_P2, ref_P2, length_P2, *, beta):
    """-log σ(βc) - log σ(-βr): BCO on pairs (Jung et al. 2024) without reward shift, as TRL 1.x has it."""
    chosen_P, rejected_P = _rewards(logp_P2, ref_P2, length_P2, beta)
    return -jax.nn.log_sigmoid(chosen_P) - jax.nn.log_sigmoid(-rejected_P)


def sppo_hard(logp_P2, ref_P2, length_P2, *, beta):
    """(c - 1/(2β))² + (r + 1/(2β))²: SPPO (Wu et al. 2024, eq. 4.7) with win probabilities 1 and 0; β is their 1/η."""
    ratio_P2 = logp_P2 - ref_P2
    return (ratio_P2[..., 0] - 0.5 / beta) ** 2 + (ratio_P2[..., 1] + 0.5 / beta) ** 2


def sppo(logp_P2, ref_P2, length_P2, win_P2, *, beta):
    """(c - (p_w - ½)/β)² + (r - (p_l - ½)/β)²: SPPO (Wu et al. 2024, eq. 4.6), β is their 1/η.

    Args:
        win_P2: p, how probably each response beats one of the policy that sampled it, by the candidates of its prompt.
    """
    return ((logp_P2 - ref_P2 - (win_P2 - 0.5) / beta) ** 2).sum(-1)


def apo_zero(logp_P2, ref_P2, length_P2, *, beta):
    """1 - σ(βc) + σ(βr): APO-zero (D'Oosterlinck et al. 2024, eq. 7), for y_w better than what the model says."""
    chosen_P, rejected_P = _rewards(logp_P2, ref_P2, length_P2, beta)
    return jax.nn.sigmoid(-chosen_P) + jax.nn.sigmoid(rejected_P)


def apo_down(logp_P2, ref_P2, length_P2, *, beta):
    """σ(βc) + 1 - σ(βd): APO-down (D'Oosterlinck et al. 2024, eq. 8), for y_w worse than what the model says.

    Pushes both down, y_l further: where c = r = 0 the two terms cancel on y_w, elsewhere it may rise with c.
    """
    chosen_P, rejected_P = _rewards(logp_P2, ref_P2, length_P2, beta)
    return jax.nn.sigmoid(chosen_P) + jax.nn.sigmoid(rejected_P - chosen_P)
