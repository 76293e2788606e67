"""The paper on arrays: ensembles of implicit rewards, margins, scores, exact selection, pairs from candidates.

SeRA (Ko et al., ICLR 2025, arXiv 2410.09362): the implicit reward margin of the policy, mixed over past iterates,
decides which given pairs are worth training on and makes new pairs of the policy's own samples. Everything here is
pure; what works on arrays can be jitted, in float32, and gives the same mask on any mesh: selection compares float
*bits* and only integer counts cross devices. Arrays over N may be padded; `valid_N` (bool) marks what is real.
"""

import fractions
import inspect
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

# --- The reward of an iteration: an ensemble over past iterates -------------------------------------------------------


def current(iterates: int, gamma: float) -> np.ndarray:
    """r_t = ρ_t: the newest iterate alone (γ unread)."""
    return np.eye(iterates)[-1]


def two_term(iterates: int, gamma: float) -> np.ndarray:
    """r_t = (1-γ)·ρ_t + γ·ρ_{t-1}: our reading of SeRA's eq. 7. ρ_0 = 0, so that r_1 = (1-γ)·ρ_1."""
    weights_E = np.zeros(iterates)
    weights_E[-2:] = [gamma, 1 - gamma][-iterates:]
    return weights_E


def ema(iterates: int, gamma: float) -> np.ndarray:
    """r_t = (1-γ)·ρ_t + γ·r_{t-1}, r_0 = 0: the recursive reading of eq. 7."""
    return (1 - gamma) * gamma ** np.arange(iterates - 1, -1, -1.0)


def mean(iterates: int, gamma: float) -> np.ndarray:
    """r_t = (ρ_1 + .. + ρ_t) / t (γ unread)."""
    return np.full(iterates, 1 / iterates)


ENSEMBLES: dict[str, Callable[[int, float], np.ndarray]] = {
    "current": current,
    "two_term": two_term,
    "ema": ema,
    "mean": mean,
}


def ensemble_weights(iterates: int, scheme: str, gamma: float) -> np.ndarray:
    """The weights of the iterates' implicit rewards ρ_1 .. ρ_E in the reward of the next iteration.

    Args:
        iterates: E >= 1, the policies trained so far. π_0, the reference, has reward 0 and is not one of them.
        scheme: a name of `ENSEMBLES`.
        gamma: γ in [0, 1].

    Returns:
        float32 [E], oldest first. An iterate of weight 0 needs no scoring.

    Raises:
        ValueError: no iterate yet, or weights that are all 0 (γ = 1): every margin would be 0.
    """
    if iterates < 1:
        raise ValueError(
            f"ensemble {scheme}: got {iterates} trained iterates, expected at least 1: before any update the policy is "
            "its own reference and every margin would be 0. Select and bootstrap from iteration 2 on."
        )
    weights_E = np.asarray(ENSEMBLES[scheme](iterates, gamma), np.float32)
    if not weights_E.any():
        raise ValueError(
            f"ensemble {scheme}: got gamma {gamma} over {iterates} iterates, whose weights are all 0, so that every "
            "margin would be 0; expected gamma < 1 (reward.gamma)."
        )
    return weights_E


def ensemble(rewards_EN2: jax.Array, weights_E: np.ndarray) -> jax.Array:
    """Σ_e weight_e · reward_e, in the order of the iterates, so that rounding is the same everywhere.

    Args:
        rewards_EN2: float32; any axes after E.
        weights_E: NumPy, static: an iterate of weight 0 is not read (its rewards may be NaN, because never computed).
    """
    weights_E = np.asarray(weights_E, np.float32)
    return sum(weight * rewards_EN2[e] for e, weight in enumerate(weights_E) if weight)


def margins(rewards_N2: jax.Array) -> jax.Array:
    """The implicit reward margin (IRM) r(x, y_w) - r(x, y_l), β left in; negative where the policy doubts the label."""
    return rewards_N2[..., 0] - rewards_N2[..., 1]


def check_references(policy_tag: str, reference_tag: str | None, what: str) -> None:
    """Raises ValueError if the policy that scores is its own reference.

    By model tag and never by value: in bf16 two packings of the same policy differ by hundredths of a nat.

    Args:
        policy_tag: model tag of the policy.
        reference_tag: model tag of its reference, None = reference-free.
        what: the key of the config, e.g. "reward.reference".
    """
    if policy_tag == reference_tag:
        raise ValueError(
            f"{what}: got the policy {policy_tag!r} as its own reference, so that every margin would be 0; expected "
            "another model. Use 'initial' or 'none', or begin to select and to bootstrap one iteration later."
        )


# --- Scores: what a selection ranks. The higher, the sooner it is kept. -----------------------------------------------
# A score takes exactly the signals it names, so that nothing else has to be computed (see `needs`):
#     reward_N2          float32, the ensemble's reward of (chosen, rejected)
#     length_N2          int32, response tokens
#     reference_logp_N2  float32, log-probs under the reference, nats
#     gap_N, gold_N      float32, annotator's and gold score of the chosen minus that of the rejected response
#     reward_gap_N       float32, the same of the reward function
#     loss_N             float32, the loss of each pair under the policy
#     key, example_N     PRNG key folded by iteration; int32, index in the set
#     valid_N            bool


def _per_token(value, length):
    return value / jnp.maximum(length, 1)


def irm(*, reward_N2):
    """The implicit reward margin: SeRA's choice."""
    return margins(reward_N2)


def irm_per_token(*, reward_N2, length_N2):
    """Margin of rewards divided by their response's tokens (a reward that is per token already is divided again)."""
    return margins(_per_token(reward_N2, length_N2))


def irm_magnitude(*, reward_N2):
    """|IRM|: how sure the policy is, whatever the label says. A selection that does not look at labels leaves the share
    of right ones among pairs of one margin as it is, so that logistic losses keep a finite optimum on what it keeps.
    """
    return jnp.abs(margins(reward_N2))


def reference_logp(*, reference_logp_N2, length_N2):
    """log π_ref(y_w|x) per token of the *chosen* response: compared in SeRA's fig. 3 (per token is our reading)."""
    return _per_token(reference_logp_N2[:, 0], length_N2[:, 0])


def annotator_gap(*, gap_N):
    """The larger the annotator's preference, the better (the GPT-4 score selection of SeRA's fig. 3)."""
    return gap_N


def reward_gap(*, reward_gap_N):
    """The larger the preference of the reward function (a reward model, a rule), the better; labels may differ."""
    return reward_gap_N


def gold_gap(*, gold_N):
    """The larger the true preference, the better: what selection could give at most. Wrong labels come last."""
    return gold_N


def loss(*, loss_N):
    """Minus the loss: pairs that the policy finds easy stay (small-loss selection)."""
    return -loss_N


def random(*, key, example_N):
    """Uniform noise by example: independent of order, padding and mesh."""
    return jax.vmap(lambda example: jax.random.uniform(jax.random.fold_in(key, example)))(example_N)


def alignment_potential(*, reward_N2, length_N2, gap_N, valid_N):
    """M_AP (Huang et al., ICML 2025): z(annotator gap) - z(|margin of per-token rewards|), z over the valid pairs."""
    implicit_N = jnp.abs(irm_per_token(reward_N2=reward_N2, length_N2=length_N2))
    return _standardise(gap_N, valid_N) - _standardise(implicit_N, valid_N)


SCORES: dict[str, Callable[..., jax.Array]] = {
    "irm": irm,
    "irm_per_token": irm_per_token,
    "irm_magnitude": irm_magnitude,
    "reference_logp": reference_logp,
    "annotator_gap": annotator_gap,
    "reward_gap": reward_gap,
    "gold_gap": gold_gap,
    "loss": loss,
    "random": random,
    "alignment_potential": alignment_potential,
}


def needs(name: str) -> tuple[str, ...]:
    """The signals that a score takes."""
    return tuple(inspect.signature(SCORES[name]).parameters)


def score(name: str, **signals) -> jax.Array:
    """The score `name` from those of the `signals` that it needs -> float32 [N].

    Raises:
        ValueError: a signal that it needs is missing or None.
    """
    missing = [need for need in needs(name) if signals.get(need) is None]
    if missing:
        raise ValueError(
            f"score {name}: got no {missing[0]}, expected {', '.join(needs(name))}. Give pairs that have it "
            "(annotator_gap and alignment_potential need the annotator's scores, gold_gap those of gold), or use "
            "another score."
        )
    return SCORES[name](**{need: signals[need] for need in needs(name)})


def _standardise(value_N, valid_N):
    """(value - mean) / standard deviation over the valid ones (population form); 0 where all are alike."""
    centred_N = jnp.where(valid_N, value_N - _exact_mean(value_N, valid_N), 0)
    deviation = jnp.sqrt(_exact_mean(centred_N**2, valid_N))
    # A set of equal values has a deviation of rounding size, not 0.
    flat = deviation <= 1e-6 * jnp.max(jnp.where(valid_N, jnp.abs(value_N), 0))
    scaled_N = centred_N / jnp.where(flat, 1, deviation)
    # What is not finite must stay so: the selection reports it by its index.
    return jnp.where(jnp.isfinite(value_N), jnp.where(flat, 0, scaled_N), value_N)


def _exact_mean(value_N, valid_N):
    """Mean of the valid, finite values, the same to the bit on any mesh and with any padding.

    A float sum depends on its order; so values are rounded to 20 bits of the largest magnitude (itself exact in any
    order) and summed as integers, in two halves that cannot overflow below 2**21 examples.
    """
    if value_N.size >= 2**21:
        raise ValueError(f"alignment_potential: got {value_N.size} examples, expected fewer than 2**21; split the set.")
    used_N = valid_N & jnp.isfinite(value_N)
    largest = jnp.max(jnp.where(used_N, jnp.abs(value_N), 0))
    scale = jnp.where(largest > 0, largest, 1)
    units_N = jnp.round(jnp.where(used_N, value_N, 0) / scale * 2**20).astype(jnp.int32)
    high, low = jnp.sum(units_N >> 10), jnp.sum(units_N & 1023)
    total = high.astype(jnp.float32) * 2.0**10 + low.astype(jnp.float32)
    return total / jnp.maximum(jnp.sum(used_N), 1) * scale / 2.0**20


def soft_weight(score_N: jax.Array) -> jax.Array:
    """sigmoid(score): with the IRM, how likely the policy itself thinks the label (Bradley-Terry)."""
    return jax.nn.sigmoid(score_N)


def relabel(value_N2: jax.Array, kept_N: jax.Array) -> jax.Array:
    """Swaps chosen and rejected where not kept."""
    return jnp.where(kept_N[:, None], value_N2, value_N2[:, ::-1])


# --- Rules: which pairs a score keeps ---------------------------------------------------------------------------------


def keep_counts(share: float, group_N: np.ndarray, groups: int) -> np.ndarray:
    """K = ⌊share · n⌋ of each group of n examples, and at least one -> int32 [G], on the host.

    Args:
        share: read as the decimal that was written (0.29 of 100 is 29, though 0.29 * 100 < 29 in floating point).
        group_N: int, the group in [0, G) of each (real) example.
    """
    exact = fractions.Fraction(repr(float(share)))
    least = 1 if share > 0 else 0  # small groups (one pair a prompt, say) must not vanish
    counts = [max(math.floor(exact * int(n)), min(least, int(n))) for n in np.bincount(group_N, minlength=groups)]
    return np.array(counts, np.int32)


def _ordered_bits(score_N):
    """uint32 in the order of the floats: -0 and 0 alike, denormals told apart even where arithmetic flushes them."""
    bits_N = jax.lax.bitcast_convert_type(score_N.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    bits_N = jnp.where(bits_N == sign, 0, bits_N)
    return jnp.where(bits_N >= sign, ~bits_N, bits_N | sign)


def _largest(bits_N, valid_N, group_N, keep_G):
    """The keep_G[g] largest of each group, ties by lowest index, by bisection: 32 + ⌈log2 N⌉ passes.

    Neither a sort nor a gather: a pass compares and counts per group, so with N sharded the counts [G] are all that
    crosses devices.
    """
    index_N = jnp.arange(bits_N.size, dtype=jnp.uint32)

    def count(flag_N):
        if keep_G.size == 1:
            return jnp.sum(flag_N, dtype=jnp.int32)[None]
        return jax.ops.segment_sum(flag_N.astype(jnp.int32), group_N, keep_G.size)

    def of_group(value_G):
        return value_G[0] if keep_G.size == 1 else value_G[group_N]

    def bisect(passes, fits):
        """The largest uint32 of so many bits for which `fits` holds, per group; 0 if none."""

        def halve(i, found_G):
            tried_G = found_G | (jnp.uint32(1) << (passes - 1 - i).astype(jnp.uint32))
            return jnp.where(fits(tried_G), tried_G, found_G)

        return jax.lax.fori_loop(0, passes, halve, jnp.zeros(keep_G.size, jnp.uint32))

    # The K-th largest value: the largest that K or more examples reach (K = 0: the largest uint32; no number has it).
    kth_G = bisect(32, lambda tried_G: count(valid_N & (bits_N >= of_group(tried_G))) >= keep_G)
    above_N = valid_N & (bits_N > of_group(kth_G))
    tied_N = valid_N & (bits_N == of_group(kth_G))
    wanted_G = keep_G - count(above_N)
    # The last tie that is wanted: the largest index with fewer than that many ties before it.
    passes = (bits_N.size - 1).bit_length()
    last_G = bisect(passes, lambda tried_G: count(tied_N & (index_N < of_group(tried_G))) < wanted_G)
    return above_N | (tied_N & (index_N <= of_group(last_G)))


def top_k_mask(score_N, group_N, keep_G, valid_N=None) -> jax.Array:
    """The keep_G[g] highest scores of each group, exactly; ties go to the lowest index (as a stable argsort of -score).

    Args:
        score_N: float32, finite where valid (see `non_finite`).
        group_N: int32 in [0, G).
        keep_G: int32; more than a group has keeps the group.
        valid_N: bool, None = all.

    Returns:
        bool [N], sharded as the scores are; False where not valid. The same on any mesh.
    """
    valid_N = jnp.ones(score_N.shape, bool) if valid_N is None else valid_N
    return _largest(_ordered_bits(score_N), valid_N, group_N, jnp.asarray(keep_G))


def top_k(score_N, *, valid_N, group_N, keep_G, threshold):
    """The K highest of each group (SeRA)."""
    return top_k_mask(score_N, group_N, keep_G, valid_N)


def bottom_k(score_N, *, valid_N, group_N, keep_G, threshold):
    """The K lowest of each group (the hard pairs of Qi et al. 2025); ties go to the lowest index."""
    return _largest(~_ordered_bits(score_N), valid_N, group_N, jnp.asarray(keep_G))


def middle(score_N, *, valid_N, group_N, keep_G, threshold):
    """The K in the middle of each group: of its n, the ⌊(n-K)/2⌋ highest and ⌈(n-K)/2⌉ lowest go (arXiv 2510.13212)."""
    keep_G = jnp.asarray(keep_G)
    size_G = jax.ops.segment_sum(valid_N.astype(jnp.int32), group_N, keep_G.size)
    over_G = jnp.maximum(size_G - keep_G, 0) // 2
    within_N = top_k_mask(score_N, group_N, over_G + keep_G, valid_N)
    return within_N & ~top_k_mask(score_N, group_N, over_G, valid_N)


def threshold(score_N, *, valid_N, group_N, keep_G, threshold):
    """Scores strictly above the threshold, in the unit of the score; neither K nor groups."""
    return valid_N & (score_N > threshold)


def all_(score_N, *, valid_N, group_N, keep_G, threshold):
    """Every valid pair."""
    return valid_N


def none(score_N, *, valid_N, group_N, keep_G, threshold):
    """No pair: fresh pairs alone are trained on (SPIN, RLHF Workflow's code)."""
    return jnp.zeros_like(valid_N)


RULES: dict[str, Callable[..., jax.Array]] = {
    "top_k": top_k,
    "bottom_k": bottom_k,
    "middle": middle,
    "threshold": threshold,
    "all": all_,
    "none": none,
}
"""rule(score_N, *, valid_N, group_N, keep_G, threshold) -> bool [N]; shapes as in `top_k_mask`. Groups are the strata:
one group, with keep_G [1], is no stratification. The mask means nothing where `non_finite` counts a score."""


def non_finite(score_N: jax.Array, valid_N: jax.Array) -> jax.Array:
    """How many valid scores are NaN or infinite, and the first one's index (N if none): int32 [2].

    It leaves the jitted program beside the mask, and the host gives it to `check_finite`.
    """
    exponent = jnp.uint32(0x7F800000)
    bits_N = jax.lax.bitcast_convert_type(score_N.astype(jnp.float32), jnp.uint32)
    bad_N = valid_N & ((bits_N & exponent) == exponent)
    index_N = jnp.arange(score_N.size, dtype=jnp.int32)
    return jnp.stack([jnp.sum(bad_N, dtype=jnp.int32), jnp.min(jnp.where(bad_N, index_N, score_N.size))])


def check_finite(bad: np.ndarray, ids: Sequence[str], what: str) -> None:
    """Raises ValueError if `non_finite` found any, naming the first example.

    Args:
        bad: int32 [2], from `non_finite`.
        ids: of the examples, in order.
        what: was scored, e.g. "score irm of iteration 2".
    """
    count, first = (int(x) for x in bad)
    if count:
        raise ValueError(
            f"{what}: got {count} scores that are not finite, the first at index {first} (example {ids[first]!r}); "
            "expected finite numbers. Look at that example (empty response? no annotator score?), and at the learning "
            "rate if the log-probs of the policy are themselves not finite."
        )


# --- Win rates: how a candidate stands among those of its prompt ------------------------------------------------------


def probabilities(rewards_PC, prob_PCC=None):
    """P(i > j) -> float32 [P, C, C]: those of a source that compares, else Bradley-Terry's σ(r_i - r_j)."""
    return jax.nn.sigmoid(rewards_PC[:, :, None] - rewards_PC[:, None, :]) if prob_PCC is None else prob_PCC


def win_rates(rewards_PC, valid_PC, prob_PCC=None, against_PC=None):
    """Mean probability of beating the prompt's other valid candidates -> float32 [P, C].

    It is P(y > π | x) of the policy that sampled them, estimated as in SPPO (Wu et al. 2024, sec. 4.2), but without the
    candidate itself; with other opponents than the candidates, P(y > π' | x) of who sampled those.

    Args:
        rewards_PC: Bradley-Terry rewards: P(i > j) = σ(r_i - r_j) where nothing better is known.
        prob_PCC: P(i > j), need not be transitive; NaN = not compared, which is left out.
        against_PC: int, how many opponents say what a candidate says; None = each valid candidate is one. A candidate
            that is one of them itself does not count, but others that say the same do: against those it has 0.5.

    Returns:
        NaN for a candidate that is not valid, or that no other one was compared with.
    """
    prob_PCC, itself_CC = probabilities(rewards_PC, prob_PCC), jnp.eye(valid_PC.shape[1], dtype=jnp.int32)
    against_PC = valid_PC.astype(jnp.int32) if against_PC is None else against_PC
    others_PCC = jnp.maximum(against_PC[:, None, :] - itself_CC[None], 0)
    others_PCC = jnp.where(valid_PC[:, :, None] & ~jnp.isnan(prob_PCC), others_PCC, 0)
    return jnp.sum(jnp.where(others_PCC > 0, others_PCC * prob_PCC, 0), axis=2) / jnp.sum(others_PCC, axis=2)


# --- Pair rules: a prompt's candidates become pairs -------------------------------------------------------------------


def _bounds(rewards_PC, valid_PC):
    """Rewards with what is not valid at -inf, and at +inf."""
    return jnp.where(valid_PC, rewards_PC, -jnp.inf), jnp.where(valid_PC, rewards_PC, jnp.inf)


def _noise(key, shape):
    """Uniform [rows, columns], a row's noise depending on its number alone."""
    return jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row), shape[1:]))(jnp.arange(shape[0]))


def _pick(flag_PX, key):
    """A random one of the flagged, by row; 0 if none is."""
    return jnp.argmax(jnp.where(flag_PX, _noise(key, flag_PX.shape), -1), axis=1)


def best_worst(rewards_PC, valid_PC, key):
    """The highest against the lowest reward (SeRA, algorithm 1; RLHF Workflow's max_min)."""
    high_PC, low_PC = _bounds(rewards_PC, valid_PC)
    pair_PQ2 = jnp.stack([jnp.argmax(high_PC, axis=1), jnp.argmin(low_PC, axis=1)], axis=1)[:, None]
    ok_PQ = (jnp.max(high_PC, axis=1) > jnp.min(low_PC, axis=1))[:, None]
    return pair_PQ2.astype(jnp.int32), ok_PQ


def best_random(rewards_PC, valid_PC, key):
    """The highest reward against a random one of those strictly below it (RLHF Workflow's max_random)."""
    high_PC, low_PC = _bounds(rewards_PC, valid_PC)
    below_PC = low_PC < jnp.max(high_PC, axis=1, keepdims=True)
    pair_PQ2 = jnp.stack([jnp.argmax(high_PC, axis=1), _pick(below_PC, key)], axis=1)[:, None]
    return pair_PQ2.astype(jnp.int32), jnp.any(below_PC, axis=1)[:, None]


def best_second(rewards_PC, valid_PC, key):
    """The two highest rewards (RLHF Workflow's max_max); as there, no pair where these two are equal."""
    high_PC, _ = _bounds(rewards_PC, valid_PC)
    best_P = jnp.argmax(high_PC, axis=1)
    other_PC = valid_PC & (jnp.arange(high_PC.shape[1])[None] != best_P[:, None])
    second_P = jnp.max(jnp.where(other_PC, high_PC, -jnp.inf), axis=1)
    pick_P = jnp.argmax(other_PC & (high_PC == second_P[:, None]), axis=1)
    ok_PQ = (jnp.any(other_PC, axis=1) & (jnp.max(high_PC, axis=1) > second_P))[:, None]
    return jnp.stack([best_P, pick_P], axis=1)[:, None].astype(jnp.int32), ok_PQ


def best_each(rewards_PC, valid_PC, key):
    """The highest reward against each one strictly below it, C pairs in the order of the candidates (Curry-DPO)."""
    high_PC, low_PC = _bounds(rewards_PC, valid_PC)
    best_PC = jnp.broadcast_to(jnp.argmax(high_PC, axis=1)[:, None], high_PC.shape)
    other_PC = jnp.broadcast_to(jnp.arange(high_PC.shape[1])[None], high_PC.shape)
    ok_PQ = low_PC < jnp.max(high_PC, axis=1, keepdims=True)
    return jnp.stack([best_PC, other_PC], axis=2).astype(jnp.int32), ok_PQ


def all_pairs(rewards_PC, valid_PC, key):
    """Every two candidates of unlike reward, C(C-1)/2 pairs in the order (0,1), (0,2), .."""
    one_Q, other_Q = np.triu_indices(rewards_PC.shape[1], 1)
    first_PQ, second_PQ = rewards_PC[:, one_Q], rewards_PC[:, other_Q]
    better_PQ = first_PQ > second_PQ
    ok_PQ = valid_PC[:, one_Q] & valid_PC[:, other_Q] & (better_PQ | (second_PQ > first_PQ))
    ordered_1Q2 = np.stack([one_Q, other_Q], axis=1).astype(np.int32)[None]
    return jnp.where(better_PQ[:, :, None], ordered_1Q2, ordered_1Q2[..., ::-1]), ok_PQ


def random_pair(rewards_PC, valid_PC, key):
    """A random one of `all_pairs`."""
    pair_PQ2, ok_PQ = all_pairs(rewards_PC, valid_PC, key)
    picked_P = _pick(ok_PQ, key)
    return jnp.take_along_axis(pair_PQ2, picked_P[:, None, None], axis=1), jnp.any(ok_PQ, axis=1)[:, None]


def _met(prob_PCC, valid_PC):
    """bool [P, C, C]: two valid candidates of which P knows."""
    apart = ~jnp.eye(valid_PC.shape[1], dtype=bool)[None]
    return valid_PC[:, :, None] & valid_PC[:, None, :] & apart & jnp.isfinite(prob_PCC)


def most_certain(prob_PCC, valid_PC, key):
    """The pair (i, j) with the highest P[i, j]: there is one even where preferences go in a circle and no candidate is
    better than another on average."""
    count = valid_PC.shape[1]
    flat_PX = jnp.where(_met(prob_PCC, valid_PC), prob_PCC, -jnp.inf).reshape(-1, count * count)
    first_P = jnp.argmax(flat_PX, axis=1)
    pair_PQ2 = jnp.stack([first_P // count, first_P % count], axis=1)[:, None]
    return pair_PQ2.astype(jnp.int32), (jnp.max(flat_PX, axis=1) > 0.5)[:, None]


def condorcet(prob_PCC, valid_PC, key):
    """The Condorcet winner, preferred to every other valid candidate, against the Condorcet loser, to which every other
    is preferred; none where either is missing, as where preferences go in a circle."""
    met_PCC = _met(prob_PCC, valid_PC)
    others_P1 = jnp.sum(valid_PC, axis=1, keepdims=True) - 1
    count = lambda flag_PCC: jnp.sum(flag_PCC & met_PCC, axis=2)
    whole_PC = valid_PC & (others_P1 > 0)
    wins_PC = whole_PC & (count(prob_PCC > 0.5) == others_P1)
    loses_PC = whole_PC & (count(prob_PCC < 0.5) == others_P1)
    pair_PQ2 = jnp.stack([jnp.argmax(wins_PC, axis=1), jnp.argmax(loses_PC, axis=1)], axis=1)[:, None]
    return pair_PQ2.astype(jnp.int32), (jnp.any(wins_PC, axis=1) & jnp.any(loses_PC, axis=1))[:, None]


WIN_RULES: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "most_certain": most_certain,
    "condorcet": condorcet,
}
"""rule(prob_PCC, valid_PC, key) -> (pair_PQ2, ok_PQ), Q = 1: as PAIR_RULES, but of P[p, i, j], the probability that
candidate i is better than j, which need not be transitive; NaN = they were not compared. The chosen one's P against the
rejected one is above ½."""

PAIR_RULES: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "best_worst": best_worst,
    "best_random": best_random,
    "best_second": best_second,
    "best_each": best_each,
    "random": random_pair,
    "all_pairs": all_pairs,
}
"""rule(rewards_PC, valid_PC, key) -> (pair_PQ2, ok_PQ): int32 candidates (chosen, rejected) of Q pairs a prompt, Q = 1,
C or C(C-1)/2 and C >= 2, and whether the pair exists: two valid candidates, the chosen one's reward strictly greater
(ties make no pair). Of equal rewards the lowest index is taken. Rewards that are not valid may be anything, NaN too;
give those that are valid to `non_finite` first. Where not ok, the indices are in range and mean nothing. Only the
random rules read `key`, and a prompt's noise depends on its row alone."""
