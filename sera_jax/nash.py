"""Preferences as a game: N responses to one prompt, P[i, j] the probability that i is preferred to j, two policies that
each try to be preferred. Its Nash policy is what no other policy is preferred to; it exists where preferences go in a
circle and no reward explains them (Munos et al. 2023, "Nash learning from human feedback").

All in float64 NumPy, exact: what losses and samples estimate is held against this. Notation:
    P(i, π) = Σ_j P[i, j]·π_j        μ: the reference        τ: strength of the KL to it (the losses' β)
    the regularised game: P(π', π) - τ·KL(π' ‖ μ) + τ·KL(π ‖ μ), in which both players pay for leaving μ

prob_NN: P[i, j] + P[j, i] = 1. Policies [N] are positive where they count, and sum to 1.
"""

import numpy as np


def win_rates(prob_NN: np.ndarray, policy_N: np.ndarray) -> np.ndarray:
    """[N]: P(i, π), how probably each response is preferred to one of the policy."""
    return prob_NN @ policy_N


def normalised(log_N: np.ndarray) -> np.ndarray:
    """The policy in proportion to exp(log_N)."""
    mass_N = np.exp(log_N - np.max(log_N))
    return mass_N / mass_N.sum()


def mixture(policy_N: np.ndarray, reference_N: np.ndarray, alpha: float) -> np.ndarray:
    """π^(1-α)·μ^α / Z: the geometric mixture of Nash-MD (Munos et al. 2023, eq. 6)."""
    return normalised((1 - alpha) * np.log(policy_N) + alpha * np.log(reference_N))


def best_response(prob_NN: np.ndarray, opponent_N: np.ndarray, reference_N: np.ndarray, tau: float) -> np.ndarray:
    """μ·exp(P(·, π)/τ) / Z: what wins most against an opponent in the regularised game.

    It minimises IPO's loss on pairs of the opponent's own samples (Azar et al. 2023, eq. 11), so it is one round of
    self-play IPO (Calandriello et al. 2024) with all the updates that it takes.
    """
    return normalised(np.log(reference_N) + win_rates(prob_NN, opponent_N) / tau)


def sppo_step(prob_NN: np.ndarray, policy_N: np.ndarray, eta: float) -> np.ndarray:
    """π·exp(η·P(·, π)) / Z: a round of SPPO, which is multiplicative weights (Wu et al. 2024, eq. 4.1)."""
    return normalised(np.log(policy_N) + eta * win_rates(prob_NN, policy_N))


def nash_md_step(
    prob_NN: np.ndarray, policy_N: np.ndarray, reference_N: np.ndarray, eta: float, tau: float
) -> np.ndarray:
    """Nash-MD (Munos et al. 2023, eq. 7): the multiplicative step from, and against, the mixture with α = ητ <= 1.

    Where it stays put (`fixed_mixture`), the policy is the best response to the mixture, which is the Nash policy of
    τ/(1-ητ) itself; with η → 0 both are that of τ.
    """
    mixed_N = mixture(policy_N, reference_N, eta * tau)
    return normalised(np.log(mixed_N) + eta * win_rates(prob_NN, mixed_N))


def exploitability(prob_NN: np.ndarray, policy_N: np.ndarray, reference_N: np.ndarray, tau: float) -> float:
    """By how much the best opponent does better than ½ in the regularised game; 0 at its Nash policy alone.

    It is τ·KL(π ‖ best response to π); with τ = 0, max_i P(i, π) - ½. The duality gap is twice it.
    """
    if tau == 0:
        return float(np.max(win_rates(prob_NN, policy_N)) - 0.5)
    best_N = best_response(prob_NN, policy_N, reference_N, tau)
    return float(tau * kl(policy_N, best_N))


def kl(policy_N: np.ndarray, other_N: np.ndarray) -> float:
    """KL(π ‖ other), nats."""
    some_N = policy_N > 0
    return float(np.sum(policy_N[some_N] * np.log(policy_N[some_N] / other_N[some_N])))


def total_variation(policy_N: np.ndarray, other_N: np.ndarray) -> float:
    """½·Σ|π - other|: 0 = the same, 1 = nothing in common."""
    return float(np.abs(policy_N - other_N).sum() / 2)


def nash(prob_NN: np.ndarray, reference_N: np.ndarray, tau: float, *, most: int = 200_000) -> np.ndarray:
    """The Nash policy of the regularised game, by optimistic mirror descent (Cen et al. 2021, alg. 2), which
    converges at the rate (1-ητ)^t; until its exploitability is below 1e-14.

    Args:
        tau: more than 0. most: steps.

    Raises:
        ValueError: τ that is not positive, probabilities that do not add up to 1, or no convergence.
    """
    if not tau > 0:
        raise ValueError(f"nash: tau is {tau}, expected more than 0: without it the game may have many Nash policies.")
    if np.abs(prob_NN + prob_NN.T - 1).max() > 1e-9:
        raise ValueError(
            "nash: P[i, j] + P[j, i] is not 1 everywhere, expected probabilities that one of two is preferred."
        )
    eta = 1 / (2 * tau + 1)
    policy_N = middle_N = reference_N
    for _ in range(most):
        stay_N = (1 - eta * tau) * np.log(policy_N) + eta * tau * np.log(reference_N)
        middle_N = normalised(stay_N + eta * win_rates(prob_NN, middle_N))
        policy_N = normalised(stay_N + eta * win_rates(prob_NN, middle_N))
        if exploitability(prob_NN, policy_N, reference_N, tau) < 1e-14:
            return policy_N
    raise ValueError(f"nash: {most} steps were not enough for tau {tau}; raise most, or tau.")


def fixed_mixture(prob_NN: np.ndarray, reference_N: np.ndarray, tau: float, alpha: float) -> np.ndarray:
    """The policy at which Nash-MD with a constant α = ητ stays: the best response, in τ, to the Nash policy of
    τ/(1-α), which is its own mixture with the reference.
    """
    return best_response(prob_NN, nash(prob_NN, reference_N, tau / (1 - alpha)), reference_N, tau)


def bradley_terry(prob_NN: np.ndarray, policy_N: np.ndarray) -> np.ndarray:
    """[N] rewards of mean 0 under the policy: the maximum-likelihood fit of σ(r_i - r_j) to P[i, j] on pairs of its
    samples, by Newton's method. Where P goes in a circle no rewards fit, and these are the nearest.
    """
    weight_NN = np.outer(policy_N, policy_N) * (1 - np.eye(len(policy_N)))
    reward_N = np.zeros(len(policy_N))
    for _ in range(100):
        sigma_NN = 1 / (1 + np.exp(reward_N[None] - reward_N[:, None]))
        slope_N = (weight_NN * (prob_NN - sigma_NN)).sum(1)
        bend_NN = weight_NN * sigma_NN * (1 - sigma_NN)
        hessian_NN = np.diag(bend_NN.sum(1)) - bend_NN
        reward_N = reward_N + np.linalg.pinv(hessian_NN) @ slope_N
        if np.abs(slope_N).max() < 1e-15:
            break
    return reward_N - reward_N @ policy_N


def win_rewards(prob_PCC: np.ndarray) -> np.ndarray:
    """float32 [P, C]: the mean probability of being better than the other candidates of the prompt, as in SPPO (Wu et
    al. 2024, sec. 4.2); 0.5 where there is no other, NaN where there is no candidate.

    Args:
        prob_PCC: of P prompts' candidates, 0.5 on the diagonal, NaN where there is no candidate.
    """
    there_PC = np.isfinite(np.diagonal(prob_PCC, axis1=1, axis2=2))
    others_P1 = there_PC.sum(axis=1, keepdims=True) - 1
    wins_PC = np.nansum(prob_PCC, axis=2) - 0.5  # without the diagonal
    mean_PC = np.where(others_P1 > 0, wins_PC / np.maximum(others_P1, 1), 0.5)
    return np.where(there_PC, mean_PC, np.nan).astype(np.float32)
