"""The implicit rewards, and what they are built of: divergences from the reference, means per token.

Each is reward(logp, ref, length, *, beta, <keys of its loss>), elementwise on any shape; keys that only the loss needs
are taken and unread.
"""

import math

import jax
import jax.numpy as jnp

# exp goes on as its tangent from here: far beyond what a ratio of a sound policy reaches, and its square is finite.
EXPONENT = 30.0


def margin(value_P2):
    """chosen - rejected."""
    return value_P2[..., 0] - value_P2[..., 1]


def per_token(value, length):
    """value / length, and value where there is no token (padding), so that neither value nor gradient is NaN."""
    return value / jnp.maximum(length, 1)


def expm1(x):
    """exp(x) - 1 up to x = 30, its tangent beyond: finite, and still rising, wherever x is."""
    return jnp.where(x < EXPONENT, jnp.expm1(jnp.minimum(x, EXPONENT)), math.exp(EXPONENT) * (1 + x - EXPONENT) - 1)


def reverse_kl(ratio, alpha):
    """u: f'(t) = 1 + log t without its constant, DPO as it is (α unread)."""
    return ratio


def forward_kl(ratio, alpha):
    """1 - exp(-u): f'(t) = 1 - 1/t (α unread)."""
    return -expm1(-ratio)


def js_divergence(ratio, alpha):
    """log 2 + log σ(u): f'(t) = log(2t / (1+t)) (α unread)."""
    return math.log(2) + jax.nn.log_sigmoid(ratio)


def alpha_divergence(ratio, alpha):
    """(exp((α-1)u) - 1) / (α-1): f'(t) = (t^(α-1) - 1) / (α-1), in TRL's convention: α → 1 is reverse_kl, 0 forward_kl.

    The paper's own α is 1 minus this one.
    """
    return ratio if abs(alpha - 1) < 1e-6 else expm1((alpha - 1) * ratio) / (alpha - 1)


DIVERGENCES = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}
"""f'(t) at t = exp(u), u = log π - log π_ref: f-DPO (Wang et al. 2024, table 1); 0 at u = 0."""


def divergence(logp, ref, *, f_divergence="reverse_kl", f_alpha=0.5):
    """f'(π/π_ref), elementwise: what the policy pays for its distance from the reference, in nats for reverse_kl.

    Args:
        f_divergence: name of `DIVERGENCES`. f_alpha: α of alpha_divergence.

    Raises:
        ValueError: no such divergence.
    """
    if f_divergence not in DIVERGENCES:
        raise ValueError(f"f_divergence is {f_divergence!r}, expected one of: {', '.join(DIVERGENCES)}.")
    return DIVERGENCES[f_divergence](logp - ref, f_alpha)


def log_ratio_reward(logp, ref, length, *, beta, f_divergence="reverse_kl", f_alpha=0.5, **_keys):
    """β·(log π - log π_ref): the implicit reward of the DPO family (Rafailov et al. 2023, eq. 5, without β·log Z).

    β·f'(π/π_ref) for another divergence than the reverse KL (Wang et al. 2024).
    """
    return beta * divergence(logp, ref, f_divergence=f_divergence, f_alpha=f_alpha)


def log_ratio_per_token_reward(logp, ref, length, *, beta, f_divergence="reverse_kl", f_alpha=0.5, **_keys):
    """log_ratio_reward / length."""
    return per_token(log_ratio_reward(logp, ref, length, beta=beta, f_divergence=f_divergence, f_alpha=f_alpha), length)


_IPO = {"sum": log_ratio_reward, "mean": log_ratio_per_token_reward}


def ipo_reward(logp, ref, length, *, beta, normalisation, **divergence):
    """log_ratio_reward in IPO's own normalisation (TRL logs the sums whatever the loss divides)."""
    if normalisation not in _IPO:
        raise ValueError(
            f"ipo: normalisation is {normalisation!r}, expected 'sum' (log-ratios as sums, as in the paper) or 'mean' "
            "(per token, as in TRL); the two are different losses."
        )
    return _IPO[normalisation](logp, ref, length, beta=beta, **divergence)


def logp_reward(logp, ref, length, *, beta, **_keys):
    """β·log π: reference-free (Xu et al. 2024)."""
    return beta * logp


def simpo_reward(logp, ref, length, *, beta, **_keys):
    """β·log π / length: reference-free (Meng et al. 2024, eq. 4)."""
    return beta * per_token(logp, length)


def alphapo_reward(logp, ref, length, *, beta, alphapo_alpha, **_keys):
    """β·(1 - p^-α) / α with p = exp(log π / length): AlphaPO (Gupta et al. 2025); α → 0 is SimPO's."""
    mean = per_token(logp, length)
    return beta * (mean if abs(alphapo_alpha) < 1e-6 else -expm1(-alphapo_alpha * mean) / alphapo_alpha)
