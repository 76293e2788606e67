"""The direct alignment losses and SFT: one equation, one function, one row of the table `LOSSES`.

Notation, for a pair (y_w, y_l) of a prompt x, log-probs summed over response tokens, EOS included:
    c = log π(y_w|x) - log π_ref(y_w|x)      r = log π(y_l|x) - log π_ref(y_l|x)      d = c - r
    L_w, L_l = response tokens               σ = sigmoid

Every loss is  f(logp_P2, ref_P2, length_P2, *, beta, <own keys>) -> loss_P  in float32, each pair on its own. A
*coupled* loss takes the whole batch, with valid_P (bool) after the lengths, and is meaningless on a part of it.
    logp_P2    log-probs of (chosen, rejected) under the policy, nats     ref_P2   under the reference; unread where
    length_P2  response tokens, 0 in padding slots                                 `reference` is False (may be None)
Every loss names its own implicit reward, reward(logp, ref, length, *, beta, <own keys>), elementwise on any shape.
Padding pairs (all zeros) give finite values and gradients; the caller weights them with 0.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss and what it needs.

    loss, reward: see the module. reference: reads reference log-probs. coupled: needs the global batch and `valid_P`.
    keys: the keyword parameters that it knows beside `beta`; both `loss` and `reward` take them.
    """

    loss: Callable[..., jax.Array]
    reward: Callable[..., jax.Array]
    reference: bool
    coupled: bool
    keys: tuple[str, ...] = ()


def per_token(value, length):
    """value / length, and value where there is no token (padding), so that neither value nor gradient is NaN."""
    return value / jnp.maximum(length, 1)


def _margin(value_P2):
    return value_P2[..., 0] - value_P2[..., 1]


def log_ratio_reward(logp, ref, length, *, beta, **_keys):
    """β·(log π - log π_ref): the implicit reward of the DPO family (Rafailov et al. 2023, eq. 5, without β·log Z)."""
    return beta * (logp - ref)


def dpo(logp_P2, ref_P2, length_P2, *, beta, label_smoothing=0.0):
    """-(1-ε)·log σ(βd) - ε·log σ(-βd): DPO (Rafailov et al. 2023, eq. 7).

    ε = label_smoothing > 0 is cDPO (Mitchell 2023): labels are wrong with probability ε.
    """
    margin_P = _margin(log_ratio_reward(logp_P2, ref_P2, length_P2, beta=beta))
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin_P) - label_smoothing * jax.nn.log_sigmoid(-margin_P)


_NORMALISE = {"sum": lambda value, length: value, "mean": per_token}


def _normalise(value, length, normalisation):
    if normalisation not in _NORMALISE:
        raise ValueError(
            f"ipo: normalisation is {normalisation!r}, expected 'sum' (log-ratios as sums, as in the paper) or 'mean' "
            "(per token, as in TRL); the two are different losses."
        )
    return _NORMALISE[normalisation](value, length)


def ipo(logp_P2, ref_P2, length_P2, *, beta, normalisation):
    """(d - 1/(2β))²: IPO (Azar et al. 2023, eq. 17), β is their τ.

    normalisation: "sum" as in the paper; "mean" divides c by L_w and r by L_l first, as TRL does since 0.7.11.
    """
    return (_margin(_normalise(logp_P2 - ref_P2, length_P2, normalisation)) - 1 / (2 * beta)) ** 2


def ipo_reward(logp, ref, length, *, beta, normalisation):
    """β·(log π - log π_ref) in IPO's own normalisation (TRL logs the sums whatever the loss divides)."""
    return beta * _normalise(logp - ref, length, normalisation)


def slic(logp_P2, ref_P2, length_P2, *, beta):
    """max(0, 1 - βd): SLiC's hinge with a reference ("hinge-norm" of RSO, Liu et al. 2023; TRL's `hinge`)."""
    return jax.nn.relu(1 - _margin(log_ratio_reward(logp_P2, ref_P2, length_P2, beta=beta)))


def kto_pair(logp_P2, ref_P2, length_P2, valid_P, *, beta):
    """½·[1 - σ(β(c - KL_l))] + ½·[1 - σ(β(KL_w - r))]: paired KTO (Ethayarajh et al. 2024), as TRL 0.7.5-0.9.4 has it.

    KL_w = max(0, mean c) and KL_l = max(0, mean r) over the valid pairs of the batch; gradients flow through them. The
    mean over pairs equals TRL's mean over its 2P terms. Padding pairs have loss 0 and take no part in the means.
    """
    ratio_P2 = jnp.where(valid_P[:, None], logp_P2 - ref_P2, 0)
    mean_2 = jnp.sum(ratio_P2, axis=0) / jnp.maximum(jnp.sum(valid_P), 1)
    # Not jnp.maximum: its gradient at 0 is one half, torch's clamp passes all of it, and a policy that still equals its
    # reference stands exactly there.
    kl_2 = jnp.where(mean_2 >= 0, mean_2, 0)
    chosen_P = jax.nn.sigmoid(-beta * (ratio_P2[:, 0] - kl_2[1]))
    rejected_P = jax.nn.sigmoid(-beta * (kl_2[0] - ratio_P2[:, 1]))
    return jnp.where(valid_P, (chosen_P + rejected_P) / 2, 0)


def simpo(logp_P2, ref_P2, length_P2, *, beta, gamma):
    """-log σ(β·log π(y_w)/L_w - β·log π(y_l)/L_l - γ): SimPO (Meng et al. 2024, eq. 6); gamma is γ, not γ/β."""
    return -jax.nn.log_sigmoid(_margin(simpo_reward(logp_P2, ref_P2, length_P2, beta=beta)) - gamma)


def simpo_reward(logp, ref, length, *, beta, **_keys):
    """β·log π / length (Meng et al. 2024, eq. 4)."""
    return beta * per_token(logp, length)


LOSSES: dict[str, Loss] = {
    "dpo": Loss(dpo, log_ratio_reward, reference=True, coupled=False, keys=("label_smoothing",)),
    "ipo": Loss(ipo, ipo_reward, reference=True, coupled=False, keys=("normalisation",)),
    "slic": Loss(slic, log_ratio_reward, reference=True, coupled=False),
    "kto_pair": Loss(kto_pair, log_ratio_reward, reference=True, coupled=True),
    "simpo": Loss(simpo, simpo_reward, reference=False, coupled=False, keys=("gamma",)),
}


def sft(logp, length):
    """The pieces of supervised fine-tuning, elementwise: (nll, tokens, nll per token), in nats.

    An SFT stage sums the first two over its batch and divides once (every token counts the same); `mixture` adds the
    third for the chosen response (every pair counts the same).
    """
    return -logp, length, per_token(-logp, length)


def mixture(weights: Mapping[str, float], sft_weight: float = 0.0) -> Loss:
    """Σ weight·loss, plus sft_weight · (NLL per token of the chosen response): one `Loss` built from several.

    Args:
        weights: names of `LOSSES` by weight; they share β. The implicit reward is that of the first name.
        sft_weight: of the SFT term, 0 = none.

    Returns:
        A Loss that knows the keys of all its members and is coupled, or needs a reference, if any member does.

    Raises:
        ValueError: no name, or one that `LOSSES` lacks.
    """
    unknown = [name for name in weights if name not in LOSSES]
    if unknown or not weights:
        raise ValueError(
            f"mixture: got {'the unknown loss ' + repr(unknown[0]) if unknown else 'no loss'}, expected names from: "
            f"{', '.join(LOSSES)}."
        )
    members = {name: LOSSES[name] for name in weights}
    first = next(iter(members.values()))
    known = tuple(dict.fromkeys(key for member in members.values() for key in member.keys))

    def own(member: Loss, keys: dict) -> dict:
        strange = sorted(set(keys) - set(known))
        if strange:
            raise TypeError(
                f"loss {' + '.join(members)}: got the unknown key {strange[0]!r}, expected beta and: {known}."
            )
        return {key: keys[key] for key in member.keys if key in keys}

    def loss(logp_P2, ref_P2, length_P2, *valid_P, beta, **keys):
        total_P = 0.0
        for name, member in members.items():
            batch = valid_P if member.coupled else ()
            total_P += weights[name] * member.loss(logp_P2, ref_P2, length_P2, *batch, beta=beta, **own(member, keys))
        if sft_weight:
            total_P += sft_weight * sft(logp_P2[..., 0], length_P2[..., 0])[2]
        return total_P

    def reward(logp, ref, length, *, beta, **keys):
        return first.reward(logp, ref, length, beta=beta, **own(first, keys))

    return Loss(
        loss,
        reward,
        reference=any(member.reference for member in members.values()),
        coupled=any(member.coupled for member in members.values()),
        keys=known,
    )


def metrics(logp_P2, reward_P2, weight_P) -> dict[str, jax.Array]:
    """TRL's preference metrics as *sums* over pairs: add up the microbatches, divide by Σ weight_P once.

    Args:
        logp_P2: float32, nats.
        reward_P2: float32, the loss's own implicit reward.
        weight_P: float32, 0 = padding, whose values are not read.

    Returns:
        float32 scalars; rewards/accuracies counts reward(chosen) > reward(rejected), strictly.
    """

    def total(value_P):
        return jnp.sum(jnp.where(weight_P > 0, weight_P * value_P, 0))

    return {
        "rewards/chosen": total(reward_P2[..., 0]),
        "rewards/rejected": total(reward_P2[..., 1]),
        "rewards/margins": total(_margin(reward_P2)),
        "rewards/accuracies": total(reward_P2[..., 0] > reward_P2[..., 1]),
        "logps/chosen": total(logp_P2[..., 0]),
        "logps/rejected": total(logp_P2[..., 1]),
    }
