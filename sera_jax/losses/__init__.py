"""The direct alignment losses and SFT: one equation, one function, one row of the table `LOSSES`.

Notation, for a pair (y_w, y_l) of a prompt x, log-probs summed over response tokens, EOS included:
    c = log π(y_w|x) - log π_ref(y_w|x)      r = log π(y_l|x) - log π_ref(y_l|x)      d = c - r
    L_w, L_l = response tokens               σ = sigmoid                              ε = label_smoothing

Every loss is  f(logp_P2, ref_P2, length_P2, *, beta, <own keys>) -> loss_P  in float32, each pair on its own. A
*coupled* loss takes the whole batch, with valid_P (bool) after the lengths, and is meaningless on a part of it. An
*unpaired* one learns from single responses, desirable or not: P counts these, column 0 is the response, column 1 a
response of another example under the same prompt (the mismatch; not every one reads it), and label_P (+1 or -1) follows
valid_P. So does the target_P2 of a loss that is told more of each response than its log-probs (`Loss.target`).
    logp_P2    log-probs of (chosen, rejected) under the policy, nats     ref_P2   under the reference; unread where
    length_P2  response tokens, 0 in padding slots                                 `reference` is False (may be None)
Every loss names its own implicit reward, reward(logp, ref, length, *, beta, <own keys>), elementwise on any shape.
Padding pairs (all zeros) give finite values and gradients; the caller weights them with 0.

`implicit` has the rewards; `margins` has the losses of d, `apart` those of c and r each on its own. `bradley_terry`, of
a reward model, is no row of the table: it takes rewards.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from sera_jax.losses.apart import apo_down, apo_zero, bco_pair, nca_pair, sppo, sppo_hard
from sera_jax.losses.bradley_terry import bradley_terry
from sera_jax.losses.coupled import (
    aot,
    aot_unpaired,
    apo_zero_unpaired,
    bco_pair_shift,
    kto,
    kto_pair,
    reference_point,
)
from sera_jax.losses.implicit import (
    DIVERGENCES,
    alphapo_reward,
    ipo_reward,
    log_ratio_per_token_reward,
    log_ratio_reward,
    logp_reward,
    margin,
    per_token,
    simpo_reward,
)
from sera_jax.losses.margins import (
    discopop,
    dpo,
    dpo_pessimistic,
    dpop,
    exo_pair,
    ipo,
    ipo_soft,
    rdpo,
    robust_dpo,
    rpo_bwd_kl,
    rpo_fwd_kl,
    rpo_sq,
    sigmoid_norm,
    slic,
)
from sera_jax.losses.reference_free import alphapo, cpo, orpo, simpo, slic_hf

__all__ = [
    "DIVERGENCES",
    "LOSSES",
    "WEIGHTINGS",
    "Loss",
    "alphapo",
    "alphapo_reward",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "bco_pair",
    "bco_pair_shift",
    "bradley_terry",
    "cpo",
    "discopop",
    "dpo",
    "dpo_pessimistic",
    "dpop",
    "exo_pair",
    "ipo",
    "ipo_reward",
    "ipo_soft",
    "kto",
    "kto_pair",
    "log_ratio_per_token_reward",
    "log_ratio_reward",
    "logp_reward",
    "margin",
    "metrics",
    "mixture",
    "nca_pair",
    "optimism",
    "orpo",
    "per_token",
    "rdpo",
    "reference_point",
    "reward_metrics",
    "robust_dpo",
    "rpo_bwd_kl",
    "rpo_fwd_kl",
    "rpo_sq",
    "sft",
    "sigmoid_norm",
    "simpo",
    "simpo_reward",
    "slic",
    "slic_hf",
    "sppo",
    "sppo_hard",
    "told",
    "unpaired_metrics",
    "wpo",
]


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss and what it needs.

    loss, reward: see the module. reference: reads reference log-probs. coupled: needs the global batch and `valid_P`.
    keys: the keyword parameters that it knows beside `beta`; both `loss` and `reward` take them. target: what it takes
    of each response beside log-probs, "" = nothing, a key of `TARGETS`; a loss with "label" learns from labelled single
    responses (unpaired) and is coupled. mismatch: an unpaired one that reads column 1, a response of another example.
    """

    loss: Callable[..., jax.Array]
    reward: Callable[..., jax.Array]
    reference: bool
    coupled: bool
    keys: tuple[str, ...] = ()
    target: str = ""
    mismatch: bool = False

    @property
    def unpaired(self) -> bool:
        return self.target == "label"


TARGETS: dict[str, str] = {
    "label": "+1 desirable, -1 not",
    "win": "probability of beating another response of the policy that sampled it",
    "preference": "probability of being preferred to the other response of its pair",
    "reward": "of whoever scored it, in its units",
    "bonus": "Γ, how uncertain its reward is, in the reward's units",
}
"""What a loss may be told of each response (`records.Tree.values`)."""


def told(loss: Loss, target_P2: jax.Array) -> tuple[jax.Array, ...]:
    """What `loss` takes of a batch's targets, behind valid_P: target_P2, of an unpaired one label_P, or nothing."""
    return (target_P2[..., 0],) if loss.unpaired else (target_P2,) if loss.target else ()


_DIVERGENCE = ("f_divergence", "f_alpha")
_DPO = ("label_smoothing", *_DIVERGENCE)
_GAMMA = ("gamma", "gamma_beta_ratio", "label_smoothing")
_RPO = ("reward_scale",)
_KTO = ("desirable_weight", "undesirable_weight")

LOSSES: dict[str, Loss] = {
    "dpo": Loss(dpo, log_ratio_reward, reference=True, coupled=False, keys=_DPO),
    "robust_dpo": Loss(robust_dpo, log_ratio_reward, reference=True, coupled=False, keys=_DPO),
    "exo_pair": Loss(exo_pair, log_ratio_reward, reference=True, coupled=False, keys=_DPO),
    "discopop": Loss(discopop, log_ratio_reward, reference=True, coupled=False, keys=("discopop_tau", *_DIVERGENCE)),
    "slic": Loss(slic, log_ratio_reward, reference=True, coupled=False, keys=_DIVERGENCE),
    "ipo": Loss(ipo, ipo_reward, reference=True, coupled=False, keys=("normalisation", *_DIVERGENCE)),
    "ipo_soft": Loss(ipo_soft, log_ratio_reward, reference=True, coupled=False, target="preference"),
    "rpo_bwd_kl": Loss(rpo_bwd_kl, log_ratio_reward, reference=True, coupled=False, keys=_RPO, target="reward"),
    "rpo_fwd_kl": Loss(rpo_fwd_kl, log_ratio_reward, reference=True, coupled=False, keys=_RPO, target="reward"),
    "rpo_sq": Loss(rpo_sq, log_ratio_reward, reference=True, coupled=False, keys=_RPO, target="reward"),
    "sigmoid_norm": Loss(sigmoid_norm, log_ratio_per_token_reward, reference=True, coupled=False, keys=_DIVERGENCE),
    "dpop": Loss(dpop, log_ratio_reward, reference=True, coupled=False, keys=("dpop_lambda",)),
    "rdpo": Loss(rdpo, log_ratio_reward, reference=True, coupled=False, keys=("rdpo_alpha",)),
    "dpo_pessimistic": Loss(
        dpo_pessimistic, log_ratio_reward, reference=True, coupled=False, keys=("label_smoothing",), target="bonus"
    ),
    "nca_pair": Loss(nca_pair, log_ratio_reward, reference=True, coupled=False),
    "bco_pair": Loss(bco_pair, log_ratio_reward, reference=True, coupled=False),
    "sppo_hard": Loss(sppo_hard, log_ratio_reward, reference=True, coupled=False),
    "sppo": Loss(sppo, log_ratio_reward, reference=True, coupled=False, target="win"),
    "apo_zero": Loss(apo_zero, log_ratio_reward, reference=True, coupled=False),
    "apo_down": Loss(apo_down, log_ratio_reward, reference=True, coupled=False),
    "simpo": Loss(simpo, simpo_reward, reference=False, coupled=False, keys=_GAMMA),
    "alphapo": Loss(alphapo, alphapo_reward, reference=False, coupled=False, keys=("alphapo_alpha", *_GAMMA)),
    "cpo": Loss(cpo, logp_reward, reference=False, coupled=False, keys=("label_smoothing",)),
    "orpo": Loss(orpo, simpo_reward, reference=False, coupled=False),
    "slic_hf": Loss(slic_hf, logp_reward, reference=False, coupled=False, keys=("slic_delta", "slic_lambda")),
    "kto_pair": Loss(kto_pair, log_ratio_reward, reference=True, coupled=True),
    "bco_pair_shift": Loss(bco_pair_shift, log_ratio_reward, reference=True, coupled=True),
    "aot": Loss(aot, log_ratio_reward, reference=True, coupled=True, keys=("label_smoothing",)),
    "aot_unpaired": Loss(aot_unpaired, log_ratio_reward, reference=True, coupled=True, keys=("label_smoothing",)),
    "kto": Loss(kto, log_ratio_reward, reference=True, coupled=True, keys=_KTO, target="label", mismatch=True),
    "apo_zero_unpaired": Loss(
        apo_zero_unpaired, log_ratio_reward, reference=True, coupled=True, keys=_KTO, target="label"
    ),
}


def wpo(alignment_P2, length_P2):
    """min(1, w_w·w_l), w = exp(1/L · Σ_t [log π(y_t) - log Σ_v π(v)²]): how likely the pair is beside the policy's own
    samples, its weight in WPO (Zhou et al. 2024, eq. 2); detached.

    Cut at 1 as TRL up to 0.28 does; TRL 1.16 does not cut. `alignment_P2` is the sum (score.SlotSums).
    """
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(jnp.sum(per_token(alignment_P2, length_P2), axis=-1)), 1))


WEIGHTINGS: dict[str, Callable[..., jax.Array] | None] = {"none": None, "wpo": wpo}
"""weighting(alignment_P2, length_P2) -> weight_P, which multiplies the loss of each pair; Σ weights of the batch, which
divides it, stays that of the data."""


def sft(logp, length):
    """The pieces of supervised fine-tuning, elementwise: (nll, tokens, nll per token), in nats.

    An SFT stage sums the first two over its batch and divides once (every token counts the same); `mixture` adds the
    third for the chosen response (every pair counts the same).
    """
    return -logp, length, per_token(-logp, length)


def optimism(logp_P2):
    """½(log π(y_w) + log π(y_l)), whichever is chosen: what an optimistic loss pays for, nats.

    With weight α it is the term α·log π(ỹ), ỹ ~ π_ref, of XPO (Xie et al. 2024, algorithm 1), where both responses are
    samples of π_ref: the likelier they are, the less is left for what was not seen. SELM (Zhang et al. 2024) has αβ in
    the place of α, and for ỹ a sample of the policy before, which is its reference.
    """
    return jnp.mean(logp_P2, axis=-1)


def mixture(weights: Mapping[str, float], sft_weight: float = 0.0, optimistic: float = 0.0) -> Loss:
    """Σ weight·loss, plus sft_weight · (NLL per token of the chosen response), plus optimistic · `optimism`: one `Loss`
    built from several.

    Args:
        weights: names of `LOSSES` by weight; they share β. The implicit reward is that of the first name.
        sft_weight: of the SFT term, 0 = none. optimistic: α of the term of optimism, 0 = none.

    Returns:
        A Loss that knows the keys of all its members and is coupled, or needs a reference, if any member does.

    Raises:
        ValueError: no name, or one that `LOSSES` lacks; an unpaired loss with others, or with another term; losses of
            different targets.
    """
    unknown = [name for name in weights if name not in LOSSES]
    if unknown or not weights:
        raise ValueError(
            f"mixture: got {'the unknown loss ' + repr(unknown[0]) if unknown else 'no loss'}, expected names from: "
            f"{', '.join(LOSSES)}."
        )
    members = {name: LOSSES[name] for name in weights}
    unpaired = [name for name, member in members.items() if member.unpaired]
    if unpaired and (len(unpaired) < len(members) or sft_weight or optimistic):
        raise ValueError(
            f"mixture: got {' + '.join(members)} with sft_weight {sft_weight}, optimism {optimistic}, expected "
            f"{unpaired[0]!r} alone: it learns from single responses, desirable or not, the others from pairs and "
            "chosen responses."
        )
    targets = dict.fromkeys(member.target for member in members.values() if member.target)
    if len(targets) > 1:
        raise ValueError(
            f"mixture: got {' + '.join(members)}, which are told different things of each response "
            f"({', '.join(targets)}); expected one of them at most."
        )
    first = next(iter(members.values()))
    known = tuple(dict.fromkeys(key for member in members.values() for key in member.keys))

    def own(member: Loss, keys: dict) -> dict:
        strange = sorted(set(keys) - set(known))
        if strange:
            raise TypeError(
                f"loss {' + '.join(members)}: got the unknown key {strange[0]!r}, expected beta and: {known}."
            )
        return {key: keys[key] for key in member.keys if key in keys}

    def loss(logp_P2, ref_P2, length_P2, *batch, beta, **keys):
        total_P = 0.0
        for name, member in members.items():
            valid, target = (batch[:-1], batch[-1:]) if targets else (batch, ())
            also = (*(valid if member.coupled else ()), *(target if member.target else ()))
            total_P += weights[name] * member.loss(logp_P2, ref_P2, length_P2, *also, beta=beta, **own(member, keys))
        if sft_weight:
            total_P += sft_weight * sft(logp_P2[..., 0], length_P2[..., 0])[2]
        if optimistic:
            total_P += optimistic * optimism(logp_P2)
        return total_P

    def reward(logp, ref, length, *, beta, **keys):
        return first.reward(logp, ref, length, beta=beta, **own(first, keys))

    return Loss(
        loss,
        reward,
        reference=any(member.reference for member in members.values()),
        coupled=any(member.coupled for member in members.values()),
        keys=known,
        target=next(iter(targets), ""),
        mismatch=any(member.mismatch for member in members.values()),
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
    return {
        **reward_metrics(reward_P2, weight_P),
        "logps/chosen": _total(logp_P2[..., 0], weight_P),
        "logps/rejected": _total(logp_P2[..., 1], weight_P),
    }


def reward_metrics(reward_P2, weight_P) -> dict[str, jax.Array]:
    """Those of `metrics` that are of rewards."""
    return {
        "rewards/chosen": _total(reward_P2[..., 0], weight_P),
        "rewards/rejected": _total(reward_P2[..., 1], weight_P),
        "rewards/margins": _total(margin(reward_P2), weight_P),
        "rewards/accuracies": _total(reward_P2[..., 0] > reward_P2[..., 1], weight_P),
    }


def _total(value_P, weight_P):
    return jnp.sum(jnp.where(weight_P > 0, weight_P * value_P, 0))


def unpaired_metrics(logp_P2, ref_P2, reward_P2, weight_P, label_P, *, mismatch: bool) -> dict[str, jax.Array]:
    """TRL's KTO metrics of a *whole* batch, each times Σ weight_P, by which the caller divides as of `metrics`.

    Args:
        as `metrics`; label_P: +1 desirable, -1 not. mismatch: does the loss have a kl?

    Returns:
        float32 scalars: "chosen" is the mean over the desirable responses, "rejected" over the others, NaN where the
        batch has none; kl is z₀ (`reference_point`), nats.
    """

    def mean(value_P, label):
        share_P = jnp.where(label_P == label, weight_P, 0)
        return jnp.sum(jnp.where(share_P > 0, share_P * value_P, 0)) / jnp.sum(share_P)

    told = {
        f"{kind}/{side}": mean(value_P2[:, 0], label)
        for kind, value_P2 in (("rewards", reward_P2), ("logps", logp_P2))
        for side, label in (("chosen", 1), ("rejected", -1))
    }
    told["rewards/margins"] = told["rewards/chosen"] - told["rewards/rejected"]
    if mismatch:
        told["kl"] = reference_point(logp_P2, ref_P2, weight_P > 0)
    return {name: value * jnp.sum(weight_P) for name, value in told.items()}
