"""Exploration where the truth is known: bandit.py OUT_DIR [--seeds N] [--again] [--tune] [--confirm]

A linear contextual bandit. A prompt has ACTIONS responses with features φ in R^d; their reward is ⟨θ*, φ⟩, θ* known;
labels are Bradley-Terry's. The policy is the best one for the fitted reward at a price of η a nat from π_0, the uniform
one: π ∝ exp(⟨θ̂, φ⟩/η), so that its value J = E r* - η·KL(π ‖ π_0) has a closed form. An iteration samples C candidates
of m prompts from the policy, makes pairs of them by a rule, has them labelled, and fits θ̂ to all labels so far (ridge,
Newton). Rules are those of the program: sera.PAIR_RULES, and explore.enhancer on explore's Σ; `unbound` is the enhancer
without its budget. Seeds share θ*, prompts, noise and the first d pairs, which are random ones of π_0.

    even   φ ~ N(0, I): every direction shows in every prompt
    rare   half of the directions, which hold most of the reward, show in one response of twenty alone

The gap is the theorem's: J(π*) - J(π) + η·KL(π* ‖ π), on 256 other prompts. OUT_DIR gets curves.parquet (every run) and
dimensions.parquet (labels to ε by d), and what they say as table.md and bandit.png, which --again makes anew. --tune:
the weight β of Γ, on seeds set aside. --confirm: one figure alone, which was named before its seeds were drawn
(confirm.parquet): how many times as many labels best_worst needs to the regret that it has at 600.

    python launch/bandit.py configs/results/bandit --seeds 20
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pyarrow
import pyarrow.parquet

from sera_jax import explore, sera

ACTIONS, CANDIDATES, ETA, LAMBDA, HELD_OUT = 32, 8, 0.5, 1.0, 256
WEIGHT = 1.0  # β of Γ at d = 8, chosen with --tune; otherwise it grows as √d, as in the theory
RULES = ("explore", "best_worst", "best_random", "random", "unbound")
WORLDS = ("even", "rare")
SWEPT = ("explore", "best_worst", "random", "unbound")
DIMENSIONS = (4, 8, 16, 32)
EPSILON, EPSILONS, LABELS = 0.2, (0.4, 0.2, 0.1), 600
TUNING, CONFIRMING = range(1000, 1015), range(2000, 2040)
KEPT = ("labels", "regret", "gap")  # of each iteration, in curves.parquet


@dataclasses.dataclass(frozen=True)
class Bandit:
    """theta_D: θ*, its length 1.5 whatever D. rare_D bool: directions that few responses show."""

    theta_D: np.ndarray
    rare_D: np.ndarray


def bandit(world: str, dimension: int, rng: np.random.Generator) -> Bandit:
    rare_D = np.arange(dimension) >= dimension // 2 if world == "rare" else np.zeros(dimension, bool)
    theta_D = rng.normal(size=dimension)
    theta_D[rare_D] *= 3
    return Bandit(1.5 * theta_D / np.linalg.norm(theta_D), rare_D)


def features(of: Bandit, prompts: int, rng: np.random.Generator) -> np.ndarray:
    """float64 [P, ACTIONS, D], of variance 1 in each direction."""
    phi_PAD = rng.normal(size=(prompts, ACTIONS, len(of.theta_D)))
    shows_PA = rng.random((prompts, ACTIONS)) < 0.05
    return np.where(of.rare_D, phi_PAD * shows_PA[..., None] / np.sqrt(0.05), phi_PAD)


def log_policy(reward_PA: np.ndarray) -> np.ndarray:
    """log π(a|x) of the best policy for a reward."""
    scaled_PA = reward_PA / ETA
    top_P1 = scaled_PA.max(axis=1, keepdims=True)
    return scaled_PA - top_P1 - np.log(np.exp(scaled_PA - top_P1).sum(axis=1, keepdims=True))


def gap(reward_PA: np.ndarray, believed_PA: np.ndarray) -> tuple[float, float]:
    """(J(π*) - J(π), η·KL(π* ‖ π)) of the best policy for a believed reward, mean over prompts."""
    best, own = log_policy(reward_PA), log_policy(believed_PA)
    value = lambda log_PA: (np.exp(log_PA) * (reward_PA - ETA * (log_PA + np.log(ACTIONS)))).sum(axis=1).mean()
    return value(best) - value(own), ETA * (np.exp(best) * (best - own)).sum(axis=1).mean()


def fitted(dphi_ND: np.ndarray, theta_D: np.ndarray) -> np.ndarray:
    """θ̂ = argmin Σ -log σ(⟨θ, Δφ⟩) + λ/2·‖θ‖², from theta_D on; Δφ is chosen - rejected. The step is halved until the
    value falls."""
    value = lambda t: np.logaddexp(0, -dphi_ND @ t).sum() + LAMBDA / 2 * t @ t
    for _ in range(50):
        wrong_N = 1 / (1 + np.exp(dphi_ND @ theta_D))
        slope_D = LAMBDA * theta_D - dphi_ND.T @ wrong_N
        if np.abs(slope_D).max() < 1e-8 * (1 + len(dphi_ND)):
            break
        curve_DD = LAMBDA * np.eye(len(theta_D)) + (dphi_ND * (wrong_N * (1 - wrong_N))[:, None]).T @ dphi_ND
        step_D, share = np.linalg.solve(curve_DD, slope_D), 1.0
        while value(theta_D - share * step_D) > value(theta_D) and share > 1e-6:
            share /= 2
        theta_D = theta_D - share * step_D
    return theta_D


@functools.cache
def _rule(rule: str) -> Callable:
    """(rewards_PC, key, Σ, φ_PCD, weight) → (pair_P2, ok_P), jitted."""

    def run(rewards_PC, key, sigma_DD, phi_PCD, weight):
        valid_PC = jnp.ones(rewards_PC.shape, bool)
        if rule not in ("explore", "unbound"):
            pair_PQ2, ok_PQ = sera.PAIR_RULES[rule](rewards_PC, valid_PC, key)
            return pair_PQ2[:, 0], ok_PQ[:, 0]
        best_P = explore.leader(rewards_PC, valid_PC)
        dphi_PCD = phi_PCD - jnp.take_along_axis(phi_PCD, best_P[:, None, None], axis=1)
        norm = explore.norms(explore.factor(sigma_DD), dphi_PCD.reshape(-1, dphi_PCD.shape[2]))
        gamma_PC = weight * norm.reshape(rewards_PC.shape)
        if rule == "unbound":
            return jnp.stack([best_P, jnp.argmax(gamma_PC, axis=1)], axis=1), jnp.max(gamma_PC, axis=1) > 0
        pair_PQ2, ok_PQ = explore.enhancer(rewards_PC, valid_PC, key, gamma_PC, eta=ETA)
        return pair_PQ2[:, 0], ok_PQ[:, 0]

    return jax.jit(run)


def walk(
    world: str, rule: str, seed: int, *, dimension: int, prompts: int, labels: int, weight: float, until: float = 0.0
) -> list[dict]:
    """One run: after the first pairs and after each iteration, how many labels were used, the gap, and the smallest
    eigenvalue of Σ (known).

    Args:
        prompts: m, of an iteration. labels: ends the run, as does a gap of `until`, or 20 iterations without a pair.
    """
    rng = np.random.default_rng([seed, dimension])
    of, observe = bandit(world, dimension, rng), jax.jit(explore.observed)
    held_PAD = features(of, HELD_OUT, rng)
    sigma_DD, theta_D = explore.prior(LAMBDA, dimension), np.zeros(dimension)
    dphi_ND, told, dry = np.zeros((0, dimension)), [], 0
    for t in range(10**6):
        many = dimension if t == 0 else prompts
        draw = np.random.default_rng([seed, dimension, t + 1])  # the same for every rule
        phi_PAD, noise_PCA = features(of, many, draw), draw.gumbel(size=(many, CANDIDATES, ACTIONS))
        coin_P = draw.random(many)
        believed_PA = phi_PAD @ theta_D
        action_PC = np.argmax(log_policy(believed_PA)[:, None] + noise_PCA, axis=2)
        phi_PCD = np.take_along_axis(phi_PAD, action_PC[..., None], axis=1)
        if t == 0:
            pair_P2, ok_P = np.tile([0, 1], (many, 1)), np.ones(many, bool)
        else:
            key = jax.random.fold_in(jax.random.key(seed), t)
            arrays = (np.take_along_axis(believed_PA, action_PC, axis=1).astype(np.float32), key, sigma_DD)
            pair_P2, ok_P = jax.device_get(_rule(rule)(*arrays, phi_PCD.astype(np.float32), weight))
        pair_P2D = np.take_along_axis(phi_PCD, pair_P2[..., None], axis=1)
        one_PD = (pair_P2D[:, 0] - pair_P2D[:, 1]) * ok_P[:, None]
        sigma_DD = observe(sigma_DD, one_PD.astype(np.float32))
        first_P = coin_P < 1 / (1 + np.exp(-one_PD @ of.theta_D))
        dphi_ND = np.concatenate((dphi_ND, np.where(first_P, 1, -1)[ok_P, None] * one_PD[ok_P]))
        theta_D = fitted(dphi_ND, theta_D)
        regret, behind = gap(held_PAD @ of.theta_D, held_PAD @ theta_D)
        known = float(np.linalg.eigvalsh(np.asarray(sigma_DD, np.float64))[0])
        row = {"iteration": t, "labels": len(dphi_ND), "regret": regret, "gap": regret + behind, "known": known}
        told.append(row)
        dry = 0 if ok_P.any() else dry + 1
        if len(dphi_ND) >= labels or regret + behind <= until or dry == 20:
            return told


def labels_to(told: list[dict], epsilon: float, measure: str = "gap") -> float:
    """Labels when the gap, or the regret, is first at most ε; infinite where it never is."""
    return next((float(one["labels"]) for one in told if one[measure] <= epsilon), np.inf)


def interval(value_N: np.ndarray, of: Callable = np.median, seed: int = 0) -> tuple[float, float]:
    """95 %, by resampling the seeds."""
    rng = np.random.default_rng(seed)
    drawn = [of(value_N[rng.integers(0, len(value_N), len(value_N))]) for _ in range(2000)]
    return tuple(np.quantile(drawn, [0.025, 0.975], method="nearest"))


def exponent(labels_GS: np.ndarray, of_G: np.ndarray | tuple[float, ...]) -> tuple[float, float, float]:
    """Slope of log(labels) over log(of), least squares on the seeds' means of logs, with its interval over seeds."""
    x_G = np.log(of_G) - np.log(of_G).mean()
    slope = lambda logs_SG: float(x_G @ logs_SG.mean(axis=0) / (x_G @ x_G))
    logs_SG = np.log(labels_GS).T
    return slope(logs_SG), *interval(logs_SG, slope)


# --- what is run ------------------------------------------------------------------------------------------------------


def tune() -> None:
    """Labels to a gap of 0.2 and of 0.1, median over the seeds set aside, by world and weight."""
    for world in WORLDS:
        for weight in (0.25, 0.5, 1.0, 2.0, 4.0):
            runs = [walk(world, "explore", s, dimension=8, prompts=8, labels=400, weight=weight) for s in TUNING]
            print(world, weight, *(np.median([labels_to(run, e) for run in runs]) for e in (0.2, 0.1)), flush=True)


def curves(seeds: range, rules: tuple[str, ...] = RULES) -> list[dict]:
    """Rules in both worlds, d = 8, 8 prompts an iteration."""
    return [
        {"world": world, "rule": rule, "seed": seed, **{key: one[key] for key in KEPT}}
        for world in WORLDS
        for rule in rules
        for seed in seeds
        for one in walk(world, rule, seed, dimension=8, prompts=8, labels=LABELS, weight=WEIGHT)
    ]


def dimensions(seeds: int) -> list[dict]:
    """Labels to ε by d, d prompts an iteration."""
    found = []
    for rule in SWEPT:
        for dimension in DIMENSIONS:
            for seed in range(seeds):
                of = {"dimension": dimension, "prompts": dimension, "labels": 200 * dimension, "until": EPSILON}
                told = walk("even", rule, seed, **of, weight=WEIGHT * (dimension / 8) ** 0.5)
                row = {"rule": rule, "dimension": dimension, "seed": seed, "labels": labels_to(told, EPSILON)}
                found.append({**row, "iterations": told[-1]["iteration"]})
    return found


def columns(rows: list[dict]) -> dict[str, np.ndarray]:
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def runs_of(c: dict[str, np.ndarray], world: str, rule: str) -> list[list[dict]]:
    """The walks of a rule, by seed."""
    keys = ("labels", "regret", "gap")
    mine = (c["world"] == world) & (c["rule"] == rule)
    return [
        [dict(zip(keys, one)) for one in zip(*(c[key][mine & (c["seed"] == seed)] for key in keys))]
        for seed in np.unique(c["seed"])
    ]


def late(c: dict[str, np.ndarray], world: str, rule: str) -> np.ndarray:
    """Labels that a rule needs to the regret that best_worst has at LABELS, by seed."""
    level_S = [run[-1]["regret"] for run in runs_of(c, world, "best_worst")]
    runs = zip(runs_of(c, world, rule), level_S, strict=True)
    return np.array([min(labels_to(run, level, "regret"), LABELS) for run, level in runs])


def confirmed(curves_: list[dict]) -> dict[str, tuple[float, float, float]]:
    """World → how many times as many of those labels best_worst needs as explore: geometric mean by seed, 95 %."""
    c = columns(curves_)
    logs = {world: np.log(late(c, world, "best_worst") / late(c, world, "explore")) for world in WORLDS}
    return {
        world: tuple(float(np.exp(x)) for x in (log_S.mean(), *interval(log_S, np.mean)))
        for world, log_S in logs.items()
    }


def table(curves_: list[dict], dimensions_: list[dict]) -> str:
    """Markdown: labels to ε by rule, what best_worst needs and leaves beside it by seed; the exponents of 1/ε and d."""
    c, lines = columns(curves_), []
    seeds = len(np.unique(c["seed"]))
    for world in WORLDS:
        lines += [
            f"**{world}**: labels to a gap of ε, median over {seeds} seeds, and their exponent of 1/ε; "
            f"how many times as many labels best_worst needs, mean over ε, and to the regret that it has at {LABELS}; "
            f"how many times as much regret it has there: geometric means by seed [95 %]",
            "",
            f"| rule | {' | '.join(f'ε {e:g}' for e in EPSILONS)} | exponent | labels of best_worst | late | regret |",
            "|---|" + "---|" * (len(EPSILONS) + 4),
        ]
        needed, left = {}, {}
        later = {rule: late(c, world, rule) for rule in RULES}
        for rule in RULES:
            runs = runs_of(c, world, rule)
            needed[rule] = np.array([[min(labels_to(run, e), LABELS) for run in runs] for e in EPSILONS])
            left[rule] = np.array([run[-1]["regret"] for run in runs])
        for rule in RULES:
            shown = [f"{np.median(labels_S):g}" for labels_S in needed[rule]]
            slope, low, high = exponent(needed[rule], 1 / np.array(EPSILONS))
            shown.append(f"{slope:.2f} [{low:.2f}, {high:.2f}]")
            saved_S = np.log(needed["best_worst"] / needed[rule]).mean(axis=0)
            for log_S in (saved_S, *(np.log(of["best_worst"] / of[rule]) for of in (later, left))):
                low, high = np.exp(interval(log_S, np.mean))
                shown.append(f"{np.exp(log_S.mean()):.2f} [{low:.2f}, {high:.2f}]")
            lines.append(f"| {rule} | {' | '.join(shown)} |")
        lines.append("")
    d = columns(dimensions_)
    lines += [
        f"Labels to a gap of {EPSILON:g} by d (even), median, and iterations; the exponent of d, least squares over "
        "logs [95 %]",
        "",
        "| rule | " + " | ".join(f"d {n}" for n in DIMENSIONS) + " | exponent |",
        "|---|" + "---|" * (len(DIMENSIONS) + 1),
    ]
    for rule in SWEPT:
        of = [(d["rule"] == rule) & (d["dimension"] == n) for n in DIMENSIONS]
        shown = [f"{np.median(d['labels'][m]):g} in {np.median(d['iterations'][m]):g}" for m in of]
        slope, low, high = exponent(np.array([d["labels"][m] for m in of]), DIMENSIONS)
        lines.append(f"| {rule} | {' | '.join(shown)} | {slope:.2f} [{low:.2f}, {high:.2f}] |")
    return "\n".join(lines) + "\n"


def figure(curves_: list[dict], dimensions_: list[dict], path: pathlib.Path) -> None:
    """Mean log gap against labels, with intervals over seeds, and labels to ε against d."""
    c, d = columns(curves_), columns(dimensions_)
    drawn = matplotlib.figure.Figure(figsize=(12, 3.6), layout="constrained")
    panels = drawn.subplots(1, 3)
    grid = np.arange(8, 601, 8)
    for world, axes in zip(WORLDS, panels):
        for rule in RULES:
            logs_SG = np.array(
                [
                    np.interp(grid, [one["labels"] for one in run], [np.log(one["gap"]) for one in run])
                    for run in runs_of(c, world, rule)
                ]
            )
            middle, spread = logs_SG.mean(axis=0), 1.96 * logs_SG.std(axis=0, ddof=1) / np.sqrt(len(logs_SG))
            line = axes.plot(grid, np.exp(middle), label=rule, color=f"C{RULES.index(rule)}")[0]
            shade = {"color": line.get_color(), "alpha": 0.15, "linewidth": 0}
            axes.fill_between(grid, np.exp(middle - spread), np.exp(middle + spread), **shade)
        axes.set(yscale="log", xscale="log", xlabel="labels", ylabel="gap", title=f"{world}, d = 8")
        axes.legend(fontsize=7)
    for rule in SWEPT:
        needed = [d["labels"][(d["rule"] == rule) & (d["dimension"] == n)] for n in DIMENSIONS]
        low, high = np.array([interval(n) for n in needed]).T
        middle = np.array([np.median(n) for n in needed])
        panels[2].errorbar(
            DIMENSIONS, middle, (middle - low, high - middle), capsize=3, label=rule, color=f"C{RULES.index(rule)}"
        )
    panels[2].set(xscale="log", yscale="log", xlabel="d", ylabel=f"labels to {EPSILON:g}", title="even")
    panels[2].set_xticks(DIMENSIONS, [str(n) for n in DIMENSIONS], minor=False)
    panels[2].minorticks_off()
    panels[2].legend(fontsize=7)
    drawn.savefig(path, dpi=110, metadata={"Software": None})


def main(args: list[str]) -> None:
    if "--tune" in args:
        tune()
        return
    out = pathlib.Path(args[0])
    if "--again" in args:
        read = lambda name: pyarrow.parquet.read_table(out / f"{name}.parquet").to_pylist()
        write(read("curves"), read("dimensions"), out)
        return
    seeds = int(args[args.index("--seeds") + 1]) if "--seeds" in args else 20
    out.mkdir(parents=True, exist_ok=True)

    def keep(rows: list[dict], name: str) -> None:
        made = {key: v.astype(np.float32) if v.dtype == np.float64 else v for key, v in columns(rows).items()}
        pyarrow.parquet.write_table(pyarrow.table(made), out / f"{name}.parquet", compression="zstd")

    if "--confirm" in args:
        rows = curves(CONFIRMING, ("explore", "best_worst"))
        keep(rows, "confirm")
        for world, (times, low, high) in confirmed(rows).items():
            print(f"{world}: {times:.2f} [{low:.2f}, {high:.2f}] times as many labels, {len(CONFIRMING)} seeds")
        return
    curves_, dimensions_ = curves(range(seeds)), dimensions(seeds)
    keep(curves_, "curves")
    keep(dimensions_, "dimensions")
    write(curves_, dimensions_, out)


def write(curves_: list[dict], dimensions_: list[dict], out: pathlib.Path) -> None:
    """table.md and bandit.png, of what the files of `out` hold."""
    (out / "table.md").write_text(table(curves_, dimensions_), encoding="utf-8")
    figure(curves_, dimensions_, out / "bandit.png")
    print((out / "table.md").read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
