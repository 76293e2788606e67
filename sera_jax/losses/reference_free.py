"""Losses of the policy's own log-probs: `ref_P2` is unread and may be None."""

import jax
import jax.numpy as jnp

from sera_jax.losses.implicit import alphapo_reward, logp_reward, margin, per_token, simpo_reward
from sera_jax.losses.margins import logistic


def cpo(logp_P2, ref_P2, length_P2, *, beta, label_smoothing=0.0):
    """-(1-ε)·log σ(z) - ε·log σ(-z), z = β(log π(y_w) - log π(y_l)): CPO's preference term (Xu et al. 2024, eq. 3).

    Its behaviour-cloning term is `mixture`'s sft_weight.
    """
    return logistic(margin(logp_reward(logp_P2, ref_P2, length_P2, beta=beta)), label_smoothing)


def target_margin(beta, gamma, gamma_beta_ratio):
    """γ, from γ itself or from γ/β: exactly one of them, since 0.5 means another loss in each.

    Raises:
        ValueError: both, or neither.
    """
    if (gamma is None) == (gamma_beta_ratio is None):
        raise ValueError(
            f"target margin: got gamma {gamma!r} and gamma_beta_ratio {gamma_beta_ratio!r}, expected exactly one of "
            "them: gamma is γ itself (as TRL's simpo_gamma), gamma_beta_ratio is γ/β (as in SimPO's own code)."
        )
    return gamma if gamma_beta_ratio is None else beta * gamma_beta_ratio


def simpo(logp_P2, ref_P2, length_P2, *, beta, gamma=None, gamma_beta_ratio=None, label_smoothing=0.0):
    """-log σ(β·log π(y_w)/L_w - β·log π(y_l)/L_l - γ): SimPO (Meng et al. 2024, eq. 6).

    gamma, gamma_beta_ratio: see target_margin. label_smoothing: as in cpo.
    """
    margin_P = margin(simpo_reward(logp_P2, ref_P2, length_P2, beta=beta))
    return logistic(margin_P - target_margin(beta, gamma, gamma_beta_ratio), label_smoothing)


def alphapo(logp_P2, ref_P2, length_P2, *, beta, alphapo_alpha, gamma=None, gamma_beta_ratio=None, label_smoothing=0.0):
    """SimPO with the reward β·(1 - p^-α)/α, p = exp(log π/L): AlphaPO (Gupta et al. 2025)."""
    margin_P = margin(alphapo_reward(logp_P2, ref_P2, length_P2, beta=beta, alphapo_alpha=alphapo_alpha))
    return logistic(margin_P - target_margin(beta, gamma, gamma_beta_ratio), label_smoothing)


def slic_hf(logp_P2, ref_P2, length_P2, *, beta, slic_delta, slic_lambda):
    """max(0, δ - log π(y_w) + log π(y_l)) - λ·log π(y_w): SLiC-HF (Zhao et al. 2023), regularised on y_w as in
    HALOs (whose `beta` is δ). Sums over tokens; β scales the implicit reward only.
    """
    return jax.nn.relu(slic_delta - margin(logp_P2)) - slic_lambda * logp_P2[..., 0]


# p = 1 - 1e-6: closer to 1, float32 log-probs are rounding error.
_CERTAIN = -1e-6


def log_odds(logp, length):
    """log p/(1-p) with p = exp(log π/L), elementwise, float32.

    Log-probs above -1e-6 per token count as -1e-6, and have the slope of that place: 1/(1-p) is what makes up for the
    1-p of the softmax behind it, so that cutting it would stop the push on a certain answer.
    """
    mean = per_token(logp, length)
    mean = jnp.where(mean > _CERTAIN, _CERTAIN + (mean - jax.lax.stop_gradient(mean)), mean)
    # log(1 - exp(x)) cancels on one side of log ½ or the other.
    log_rest = jnp.where(mean > -0.6931472, jnp.log(-jnp.expm1(mean)), jnp.log1p(-jnp.exp(mean)))
    return mean - log_rest


def orpo(logp_P2, ref_P2, length_P2, *, beta):
    """-log π(y_w)/L_w - β·log σ(log odds(y_w) - log odds(y_l)): ORPO (Hong et al. 2024, eqs. 6-7), β is their λ.

    The NLL is over the response; in TRL and in the paper's code over prompt and response. The implicit reward is
    SimPO's, as TRL logs it: it orders as the log-odds do.
    """
    odds_P = margin(log_odds(logp_P2, length_P2))
    return -per_token(logp_P2[..., 0], length_P2[..., 0]) + beta * logistic(odds_P)
