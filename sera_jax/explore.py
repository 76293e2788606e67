"""How uncertain a reward that is linear in features is of a pair of responses, and the pair that says most about it.

RLHF Workflow (Dong et al., TMLR 2024, algorithm 1, after GSHF, Xiong et al. 2024), linear case. A reward ⟨θ, φ(x, a)⟩
is fitted to preferences; what is known of θ is what the differences of features of labelled pairs have spanned:
    Σ = λI + Σ_n Δφ_n Δφ_nᵀ          Δφ = φ(x, a¹) - φ(x, a²)
    Γ(x, a¹, a²) = β ‖φ(x, a¹) - φ(x, a²)‖_{Σ⁻¹}          ‖v‖_{Σ⁻¹} = √(vᵀ Σ⁻¹ v)
Of policies it is the same with their expected features. The main agent takes what it thinks best; the enhancer takes
the response of which, beside that one, least is known, as far from the main agent as Γ is worth.

Float32 throughout, whatever the matrix precision of the device. Against float64 the relative error of a norm is about
10⁻⁷ · (largest eigenvalue of Σ) / λ at most, so that λ has to be more than 10⁻⁴ of that eigenvalue for three digits.
D here is the dimension of the features.
"""

import jax
import jax.numpy as jnp


def prior(lam: float, dimension: int) -> jax.Array:
    """λI, float32 [D, D]: Σ before any pair. λ > 0 counts as so many pairs in every direction."""
    return lam * jnp.eye(dimension, dtype=jnp.float32)


def observed(sigma_DD: jax.Array, dphi_ND: jax.Array) -> jax.Array:
    """Σ + ΔφᵀΔφ, float32 [D, D]: a block of pairs more is known. Rows of zeros add nothing."""
    dphi_ND = dphi_ND.astype(jnp.float32)
    return sigma_DD + jnp.einsum("nd,ne->de", dphi_ND, dphi_ND, precision=jax.lax.Precision.HIGHEST)


def factor(sigma_DD: jax.Array) -> jax.Array:
    """The Cholesky factor L of Σ = LLᵀ, float32 [D, D] lower triangular; NaN where Σ is not positive definite."""
    return jax.lax.linalg.cholesky(sigma_DD, symmetrize_input=True)


def norms(factor_DD: jax.Array, vector_ND: jax.Array) -> jax.Array:
    """‖v‖_{Σ⁻¹} = ‖L⁻¹v‖ of every row, float32 [N]; `factor_DD`: of `factor`."""
    solved_DN = jax.lax.linalg.triangular_solve(factor_DD, vector_ND.astype(jnp.float32).T, left_side=True, lower=True)
    return jnp.sqrt(jnp.sum(solved_DN**2, axis=0))


def projection(seed: int, width: int, dimension: int) -> jax.Array:
    """float32 [width, D]: independent N(0, 1/D), so that lengths keep their mean (Johnson and Lindenstrauss)."""
    return jax.random.normal(jax.random.key(seed), (width, dimension)) / jnp.sqrt(jnp.float32(dimension))


def leader(rewards_PC: jax.Array, valid_PC: jax.Array) -> jax.Array:
    """int32 [P]: the valid candidate of the highest reward, of equal ones the first: the main agent's response."""
    return jnp.argmax(jnp.where(valid_PC, rewards_PC, -jnp.inf), axis=1).astype(jnp.int32)


def best_of_kl(count: jax.Array) -> jax.Array:
    """log n - (n-1)/n, nats: KL of the best of n samples from the policy that drew them, whatever it is the best by
    (Beirami et al. 2024: never more than this)."""
    return jnp.log(count) - (count - 1) / count


def enhancer(
    rewards_PC: jax.Array, valid_PC: jax.Array, key: jax.Array, gamma_PC: jax.Array, *, eta: float
) -> tuple[jax.Array, jax.Array]:
    """The highest reward against, of the first n others, the one of the largest Γ, n as large as the budget lets it be.

    Algorithm 1 takes argmax Γ over the policies π' with η·KL(π' ‖ π) ≤ Γ, where π drew the candidates. The best of n by
    Γ is such a policy where η·(log n - (n-1)/n) ≤ its Γ. With little known that is the best of all; as Γ falls n falls,
    to n = 1, which costs nothing: just another sample.

    Args:
        gamma_PC: float32, Γ of each candidate against `leader`. eta: η > 0, what a nat of KL costs, in the units of Γ.
            The others, and what comes back, are as sera.PAIR_RULES has them (Q = 1); `key` is unread.
    """
    best_P = leader(rewards_PC, valid_PC)
    others_PC = valid_PC & (rewards_PC < jnp.take_along_axis(rewards_PC, best_P[:, None], axis=1))
    known_PC = jnp.where(others_PC, gamma_PC, -1.0)
    cost_PC = eta * best_of_kl(jnp.maximum(jnp.cumsum(others_PC, axis=1), 1).astype(jnp.float32))
    fits_PC = others_PC & (cost_PC <= jax.lax.cummax(known_PC, axis=1))
    number_1C = jnp.arange(fits_PC.shape[1])[None]
    last_P1 = jnp.max(jnp.where(fits_PC, number_1C, -1), axis=1, keepdims=True)
    among_PC = jnp.where(number_1C <= last_P1, known_PC, -1.0)
    other_P = jnp.argmax(among_PC, axis=1).astype(jnp.int32)
    return jnp.stack([best_P, other_P], axis=1)[:, None], jnp.any(others_PC, axis=1)[:, None]
