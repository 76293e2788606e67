"""C candidate responses to each prompt, on device. The only room that knows the cache's layout and writes to it.

A prompt is computed once; its cache is shared by its candidates. The loop leaves early when every candidate has emitted
an end-of-text token. Prompts are padded on the right, as everywhere. The log-probs of this room are never used as
rewards: candidates are rescored by the training forward pass (`score`).

Noise: threefry, folded by (iteration: the caller's key) → 64-bit hash of the prompt → candidate → response position.
The number of slots is constant and the padded length of a prompt depends on the prompt alone, so on one kind of machine
and device count a candidate is the same bit for bit whatever prompts it shares a batch with.

Letters: P prompts, C candidates, T response positions, J prompt positions, K key/value heads, H head size, V
vocabulary.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sera_jax import attention, model
from sera_jax import mesh as meshes
from sera_jax.model import Arch
from sera_jax.records import Sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefilled:
    """What the candidates of P prompts start from.

    cache: keys and values [layers, P, K, J, H]; length_P int32: prompt tokens; logits_PV float32 of the first response
    token.
    """

    cache: tuple[jax.Array, jax.Array]
    length_P: jax.Array
    logits_PV: jax.Array


def prefill(
    arch: Arch,
    params: dict,
    tokens_PJ: jax.Array,
    length_P: jax.Array,
    *,
    mesh: Mesh,
    dtype: Any,
    backend: str = "auto",
) -> Prefilled:
    """One forward pass over the prompts.

    Args:
        params: weights on the decode layout. tokens_PJ: int32, padded on the right; length_P: at least 1 each.
        backend: key of attention.ATTENTION, or "auto"; prompts that no kernel takes are computed by xla.
    """
    p, j = tokens_PJ.shape
    index_PJ = jnp.broadcast_to(jnp.arange(j), (p, j))
    real_PJ = (index_PJ < length_P[:, None]).astype(jnp.int32)
    within_rows = attention.over_rows(
        backend if j % attention.LANES == 0 else "xla",
        real_PJ,
        jnp.zeros_like(real_PJ),
        index_PJ,
        mesh=mesh,
        layout="decode",
        scale=arch.score_scale,
        cap=arch.score_cap,
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: Any, window: jax.Array | None) -> tuple[jax.Array, tuple]:
        return within_rows(q, k, v, window), (k.swapaxes(1, 2), v.swapaxes(1, 2))

    placement = meshes.placement(mesh, "decode")
    hidden_PJD, cache = model.hidden(
        arch, params, tokens_PJ, index_PJ, attend, longest=j, dtype=dtype, placement=placement
    )
    last_PD = jnp.take_along_axis(hidden_PJD, (length_P - 1)[:, None, None], axis=1)[:, 0]
    return Prefilled(cache, length_P, model.logits(arch, params, last_PD, dtype))


def decode(
    arch: Arch,
    params: dict,
    start: Prefilled,
    hash_P2: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    *,
    candidates: int,
    max_new_tokens: int,
    mesh: Mesh,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Samples until every candidate is finished or has max_new_tokens tokens.

    Args:
        hash_P2: uint32, `prompt_hash` of each prompt (a prompt of length 0 is padding and starts finished).
        key: of the iteration; not consumed, only folded. sampling: arrays, any change of value reuses the program.

    Returns:
        tokens_PCT int32: the response with its EOS, then -1; finished_PC bool: ended by an EOS.
    """
    p, c, t_max = start.length_P.shape[0], candidates, max_new_tokens
    layers, _, k, _, h = start.cache[0].shape
    placement = meshes.placement(mesh, "decode")
    keys_PC = candidate_keys(key, hash_P2, candidates)
    j_max = start.cache[0].shape[3]
    prompt_PJ = jnp.broadcast_to(jnp.arange(j_max)[None], (p, j_max))  # positions of the cached keys
    own_PT = start.length_P[:, None] + jnp.arange(t_max)[None]
    prompt_mask_PCJ = jnp.broadcast_to((prompt_PJ < start.length_P[:, None])[:, None], (p, c, j_max))

    def step(state: tuple) -> tuple:
        t, last_PC, tokens_PCT, finished_PC, own = state  # `last` is token t-1; it is in no cache yet
        own_mask_PCT = jnp.broadcast_to(jnp.arange(t_max)[None, None] < t - 1, (p, c, t_max))
        position_PC = jnp.broadcast_to(start.length_P[:, None] + t - 1, (p, c))

        def attend(
            q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, window: jax.Array | None
        ) -> tuple[jax.Array, tuple]:
            prompt, mine = cache
            prompt_seen = attention.within(prompt_mask_PCJ, position_PC, prompt_PJ, window)
            own_seen = attention.within(own_mask_PCT, position_PC, own_PT, window)
            scores = {"scale": arch.score_scale, "cap": arch.score_cap}
            return attention.attend_decode(q, (k, v), prompt, mine, prompt_seen, own_seen, **scores), (k, v)

        hidden_PCD, new = model.hidden(
            arch,
            params,
            last_PC,
            position_PC,
            attend,
            longest=j_max + t_max,
            dtype=dtype,
            placement=placement,
            cache=(start.cache, own),
        )
        own = jax.tree.map(
            lambda cache, one: jax.lax.dynamic_update_slice_in_dim(cache, one[:, :, :, :, None], t - 1, axis=4),
            own,
            new,
        )
        token_PC = pick(model.logits(arch, params, hidden_PCD, dtype), keys_PC, t, sampling)
        return _emit(t, token_PC, tokens_PCT, finished_PC, sampling.eos_ids) + (own,)

    own = tuple(jnp.zeros((layers, p, c, k, t_max, h), start.cache[0].dtype) for _ in range(2))
    first_PC = pick(jnp.broadcast_to(start.logits_PV[:, None], (p, c, arch.vocab)), keys_PC, jnp.int32(0), sampling)
    empty = jnp.full((p, c, t_max), -1, jnp.int32)
    padding_PC = jnp.broadcast_to(start.length_P[:, None] == 0, (p, c))
    state = _emit(jnp.int32(0), first_PC, empty, padding_PC, sampling.eos_ids) + (own,)
    state = jax.lax.while_loop(lambda s: (s[0] < t_max) & ~jnp.all(s[3]), step, state)
    return state[2], state[3]


def pick(logits_PCV: jax.Array, keys_PC: jax.Array, t: jax.Array, sampling: Sampling) -> jax.Array:
    """One token each: the arg-max of filtered logits / temperature + Gumbel noise; plain arg-max at temperature 0.

    Filters as in transformers: temperature, then top-k, then top-p on what is left, then min-p.
    """
    noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, t), logits_PCV.shape[-1:])))(
        keys_PC
    )
    scaled = logits_PCV / jnp.maximum(sampling.temperature, 1e-6)
    active = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    filtered = jax.lax.cond(active, lambda x: _filter(x, sampling), lambda x: x, scaled)
    greedy = jnp.argmax(logits_PCV, axis=-1)
    return jnp.where(sampling.temperature == 0, greedy, jnp.argmax(filtered + noise, axis=-1)).astype(jnp.int32)


def _filter(logits_PCV: jax.Array, sampling: Sampling) -> jax.Array:
    """-inf outside of the top-k, of the nucleus, and below min_p × the likeliest."""
    v = logits_PCV.shape[-1]
    ordered = -jnp.sort(-logits_PCV, axis=-1)
    kth = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, v), v) - 1
    likeliest = jnp.arange(v)[None, None] <= kth
    ordered = jnp.where(likeliest, ordered, -jnp.inf)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability  # mass of the likelier tokens
    # Like transformers, min-p looks at what top-p left, renormalised: the ratio to the likeliest is the same.
    nucleus = (before < sampling.top_p) | (sampling.top_p >= 1)  # rounding must not cut the tail when it is off
    keep = likeliest & nucleus & (probability >= sampling.min_p * probability[..., :1])
    least = jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_PCV >= least, logits_PCV, -jnp.inf)


def _emit(
    t: jax.Array, token_PC: jax.Array, tokens_PCT: jax.Array, finished_PC: jax.Array, eos_ids: jax.Array
) -> tuple:
    """Writes token t of the unfinished candidates; returns (t + 1, last token, tokens, finished)."""
    written = jnp.where(finished_PC, -1, token_PC)
    tokens_PCT = jax.lax.dynamic_update_slice_in_dim(tokens_PCT, written[..., None], t, axis=2)
    ended = jnp.any(token_PC[..., None] == eos_ids[None, None], axis=-1)
    return t + 1, jnp.where(finished_PC, 0, token_PC), tokens_PCT, finished_PC | ended


def candidate_keys(key: jax.Array, hash_P2: jax.Array, candidates: int) -> jax.Array:
    """[P, C] keys: the iteration's key folded by both halves of the prompt's hash, then by the candidate's number."""

    def of_prompt(hash_2: jax.Array) -> jax.Array:
        prompt_key = jax.random.fold_in(jax.random.fold_in(key, hash_2[0]), hash_2[1])
        return jax.vmap(lambda c: jax.random.fold_in(prompt_key, c))(jnp.arange(candidates))

    return jax.vmap(of_prompt)(hash_P2)


# --- prompts in, candidates out: the host's part ----------------------------------------------------------------------


def seeded(seed: int) -> jax.Array:
    """The run's key: threefry, whatever JAX's default is, because it gives the same noise on every device count."""
    return jax.random.key(seed, impl="threefry2x32")


def prompt_hash(tokens: np.ndarray) -> np.ndarray:
    """uint32 [2]: a 64-bit hash of a prompt's tokens."""
    digest = hashlib.blake2b(np.asarray(tokens, "<i4").tobytes(), digest_size=8).digest()
    return np.frombuffer(digest, "<u4").copy()


def bucket(length: int) -> int:
    """The padded length of a prompt: the next power of two from 32 on. Depends on the prompt alone."""
    return max(32, 1 << (length - 1).bit_length())


def sampling_batches(lengths: Sequence[int], prompts: int) -> list[tuple[int, np.ndarray]]:
    """(bucket, prompt indices) of each sampling batch: at most `prompts` of one bucket, in order of their index."""
    buckets = np.array([bucket(n) for n in lengths])
    return [
        (int(size), members[i : i + prompts])
        for size in np.unique(buckets)
        for members in (np.flatnonzero(buckets == size),)
        for i in range(0, len(members), prompts)
    ]


def run_batches(
    run: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    prompts: Sequence[np.ndarray],
    batches: Sequence[tuple[int, np.ndarray]],
    slots: int,
) -> Iterator[tuple[np.ndarray, list[tuple[np.ndarray, ...]], np.ndarray]]:
    """Runs sampling batches one after the other.

    Args:
        run: (tokens_PJ, length_P, hash_P2) → (tokens_PCT, finished_PC) on the host; P is always `slots`.
        prompts: token ids. batches: from `sampling_batches`. slots: prompts of a batch, padding included.

    Yields:
        indices of the batch's prompts, their candidates' tokens (int32 [r] each, EOS included), finished_PC.

    Raises:
        ValueError: an empty prompt.
    """
    for size, members in batches:
        tokens = np.zeros((slots, size), np.int32)
        length = np.zeros(slots, np.int32)
        hashes = np.zeros((slots, 2), np.uint32)
        for row, index in enumerate(members):
            if not len(prompts[index]):
                raise ValueError(f"prompt {index} has no token; expected at least one (a BOS, say) to sample from.")
            tokens[row, : len(prompts[index])] = prompts[index]
            length[row] = len(prompts[index])
            hashes[row] = prompt_hash(prompts[index])
        out, finished = run(tokens, length, hashes)
        responses = [tuple(c[c >= 0] for c in out[row]) for row in range(len(members))]
        yield members, responses, finished[: len(members)]


def sampling(
    *, temperature: float, top_k: int, top_p: float, min_p: float, eos_ids: Sequence[int], most_eos: int = 8
) -> Sampling:
    """Plain values as the arrays that `decode` takes.

    Raises:
        ValueError: no EOS id, or more than `most_eos`.
    """
    if not 1 <= len(eos_ids) <= most_eos:
        raise ValueError(f"got {len(eos_ids)} end-of-text ids ({list(eos_ids)}), expected 1 to {most_eos}.")
    ids = np.full(most_eos, -1, np.int32)
    ids[: len(eos_ids)] = eos_ids
    return Sampling(np.float32(temperature), np.int32(top_k), np.float32(top_p), np.float32(min_p), ids)
