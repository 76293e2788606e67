"""C candidate responses to each prompt, on device. The only room that knows the cache's layout and writes to it.

A prompt is computed once; its cache is shared by its candidates. Slots decode side by side, one candidate each at a
time; the loop leaves when every candidate has emitted an end-of-text token or has as many tokens as it may have.
Prompts are padded on the right, as everywhere. The log-probs of this room are never used as rewards: candidates are
rescored by the training forward pass (`score`).

Noise: threefry, two numbers a token (`draw`), folded by (iteration: the caller's key) → 64-bit hash of the prompt →
candidate → response position. The number of slots is constant and the padded length of a prompt depends on the prompt
alone, so on one kind of machine and device count a candidate is the same bit for bit whatever prompts it shares a batch
with.

Letters: P prompts, C candidates, T response positions, J prompt positions, K key/value heads, H head size, V
vocabulary; G groups, each of S slots with a queue of Q candidates.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sera_jax import attention, draw, model
from sera_jax import mesh as meshes
from sera_jax.model import Arch
from sera_jax.records import Sampling

SMALL_HEAD = 16  # of smaller heads CPUs multiply values [H, T] faster
LAYERS_APART = 8  # so many layers at most are written out on CPUs: each of them is compiled once a length of `stages`


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beside:
    """The second model of a mixture, of the first one's architecture: tokens come from π^(1-α)·π₂^α / Z, normalised
    token by token, as in Nash-MD (Munos et al. 2023, sec. 7).

    params: weights on the decode layout; start: the prompts under it; alpha: float32.
    """

    params: dict
    start: Prefilled
    alpha: jax.Array


def mixed(logits: Sequence[jax.Array], beside: Beside | None) -> jax.Array:
    """Logits of the mixture, from those of each model; of one model its own."""
    if beside is None:
        return logits[0]
    one, other = map(jax.nn.log_softmax, logits)
    return (1 - beside.alpha) * one + beside.alpha * other


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Slots:
    """Where decoding stands. G groups of S slots each, whose candidates come from a queue of Q of their own.

    steps int32: passes so far. head_G: next candidate of the queue. Of each slot [G, S]: item, its candidate's place in
    the queue; t, tokens that it has; last, the newest, which is in no cache yet; done. owns: of each model, keys
    and values of what the slots have emitted, [layers, G, S, K, T, H], or a list of each layer's; [..., H, T] where
    they are turned. Of each candidate: tokens_GQT, -1 where there is none; finished_GQ.
    """

    steps: jax.Array
    head_G: jax.Array
    item_GS: jax.Array
    t_GS: jax.Array
    last_GS: jax.Array
    done_GS: jax.Array
    owns: tuple[Any, ...]
    tokens_GQT: jax.Array
    finished_GQ: jax.Array


def decode(
    arch: Arch,
    params: dict,
    start: Prefilled,
    hash_P2: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    limit_PC: jax.Array | None = None,
    beside: Beside | None = None,
    *,
    candidates: int,
    max_new_tokens: int,
    slots: int | None = None,
    mesh: Mesh,
    dtype: Any,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Samples until every candidate is finished or has as many tokens as it may have.

    Where there is a slot for every candidate, those of a prompt are decoded side by side and read its cache once.
    Otherwise a slot whose candidate has ended takes the next one, so that short responses do not wait for long ones.

    Args:
        hash_P2: uint32, `prompt_hash` of each prompt (a prompt of length 0 is padding and starts finished).
        key: of the iteration; not consumed, only folded. sampling: arrays, any change of value reuses the program; its
            temperature is one for all, or [candidates].
        limit_PC: int32, tokens that each candidate may have, 1 to max_new_tokens; None = max_new_tokens.
        beside: the second model of a mixture, with a cache of its own; temperature and filters act on the mixture.
        slots: candidates decoded at a time; None = all.
        backend: key of attention.ATTENTION, or "auto": whether refilled slots read their prompts by our kernel.

    Returns:
        tokens_PCT int32: the response with its EOS, then -1; finished_PC bool: ended by an EOS.
    """
    p, c, t_max = start.length_P.shape[0], candidates, max_new_tokens
    shared = slots is None or p * c <= slots
    # A slot takes prompts of its own group alone: their caches lie where it does.
    groups = p if shared else math.gcd(p, slots, *(mesh.shape[a] for a in meshes.LAYOUTS["decode"]["rows"]))
    queue, width = p // groups * c, c if shared else slots // groups
    by_candidate = lambda of_P: jnp.repeat(of_P.reshape(groups, -1), c, axis=1)
    length_GQ = by_candidate(start.length_P)
    limit_GQ = jnp.full((groups, queue), t_max) if limit_PC is None else limit_PC.reshape(groups, queue)
    keys_GQ = candidate_keys(key, hash_P2, c).reshape(groups, queue)
    each = sampling.temperature.ndim > 0  # each candidate has a temperature of its own
    temperature_PC = jnp.broadcast_to(sampling.temperature[None], (p, c)) if each else None

    def at(temperature: jax.Array | None) -> Sampling:
        return sampling if temperature is None else dataclasses.replace(sampling, temperature=temperature)

    layers, _, heads, j_max, h = start.cache[1].shape
    models = [(params, start), *([(beside.params, beside.start)] if beside else [])]
    caches = [jax.tree.map(lambda a: a.reshape(layers, groups, -1, *a.shape[2:]), its.cache) for _, its in models]
    in_place = not shared and attention.reads_in_place(backend, mesh)
    on_cpu = attention.platform(mesh) == "cpu" and not in_place
    # CPUs multiply one query by keys [H, T] faster, and small heads' values; TPUs would turn the cache for every token.
    turned = (on_cpu, on_cpu and h < SMALL_HEAD)
    turn = lambda cache: tuple(a.swapaxes(-1, -2) if its else a for a, its in zip(cache, turned))
    caches = [turn(cache) for cache in caches]
    # A loop over layers copies each one's weights and caches out of the stacks; written out, they are read in place.
    apart = on_cpu and shared and layers <= LAYERS_APART
    split = functools.partial(model.unstacked, arch) if apart else lambda tree: tree
    caches = [split(cache) for cache in caches]
    models = [({**weights, "layers": split(weights["layers"])}, its) for weights, its in models]
    turns = model.turns_of(arch, jnp.arange(j_max + t_max)[None]) if apart else None
    uniform_GQT2 = jax.vmap(jax.vmap(jax.vmap(draw.uniforms, (None, 0)), (0, None)), (0, None))(
        keys_GQ, jnp.arange(t_max)
    )

    def reads(s: _Slots, m: int, length_GS: jax.Array, most: int) -> tuple[Callable, Any]:
        if in_place:
            return _in_place(arch, s, length_GS, caches[m], s.owns[m], c, mesh)
        return _by_copy(arch, s, length_GS, caches[m], s.owns[m], c, most, shared, turned, mesh)

    def forward(s: _Slots, m: int, length_GS: jax.Array, most: int) -> tuple[jax.Array, tuple]:
        attend, cache = reads(s, m, length_GS, most)
        position_GS = length_GS + s.t_GS - 1
        hidden_GSD, new = model.hidden(
            arch,
            models[m][0],
            s.last_GS,
            position_GS,
            attend,
            longest=j_max + t_max,
            dtype=dtype,
            placement=meshes.placement(mesh, "decode"),
            cache=cache,
            turns=tuple(jnp.take(a[0], position_GS, axis=0) for a in turns) if apart else None,
        )
        own = new if apart else _stored(s.owns[m], new, s.steps if shared else s.t_GS - 1, turned, mesh)
        return model.logits(arch, models[m][0], hidden_GSD, dtype), own

    def step(s: _Slots, most: int) -> _Slots:
        s = s if shared else _refilled(s, limit_GQ)
        of_slot = lambda of_GQ: _each(of_GQ, s.item_GS)
        length_GS = of_slot(length_GQ)
        logits, owns = zip(*(forward(s, m, length_GS, most) for m in range(len(models))))
        own_sampling = at(of_slot(temperature_PC.reshape(groups, queue)) if each else None)
        uniform_GS2 = jax.vmap(lambda of_QT2, item_S, t_S: of_QT2[item_S, t_S])(uniform_GQT2, s.item_GS, s.t_GS)
        token_GS = draw.pick(mixed(logits, beside), uniform_GS2, own_sampling)
        return _emitted(dataclasses.replace(s, owns=owns), token_GS, of_slot(limit_GQ), sampling.eos_ids)

    first_PV = mixed([its.logits_PV for _, its in models], beside)

    def of_candidate(values: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        uniform_P2, temperature_P = values
        own_sampling = at(temperature_P[:, None] if each else None)
        return draw.pick(first_PV[:, None], uniform_P2[:, None], own_sampling)[:, 0]

    first_PC2 = uniform_GQT2[:, :, 0].reshape(p, c, 2)
    by_number = (first_PC2.swapaxes(0, 1), temperature_PC.swapaxes(0, 1) if each else None)
    first_GQ = jax.lax.map(of_candidate, by_number).swapaxes(0, 1).reshape(groups, queue)
    real_GQ = length_GQ > 0
    tokens_GQT = jnp.full((groups, queue, t_max), -1, jnp.int32).at[:, :, 0].set(jnp.where(real_GQ, first_GQ, -1))
    finished_GQ = _ends(first_GQ, sampling.eos_ids) | ~real_GQ
    lengths = stages(t_max, 4 if apart else 2) if shared else [t_max]
    empty = turn((jnp.zeros((layers, groups, width, heads, lengths[0] if apart else t_max, h), dtype),) * 2)
    item_GS = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], (groups, width))
    state = _Slots(
        steps=jnp.int32(0),
        head_G=jnp.full(groups, width, jnp.int32),
        item_GS=item_GS,
        t_GS=jnp.ones((groups, width), jnp.int32),
        last_GS=first_GQ[:, :width],
        done_GS=(finished_GQ | (limit_GQ <= 1))[:, :width],
        owns=tuple(split(empty) for _ in models),
        tokens_GQT=tokens_GQT,
        finished_GQ=finished_GQ,
    )
    unfinished = lambda s: jnp.any(~s.done_GS) | jnp.any(s.head_G < queue)

    def while_shorter(s: _Slots, stage: tuple[int, int]) -> _Slots:
        before, length = stage
        if apart:
            longer = tuple([_longer(cache, turned, length) for cache in own] for own in s.owns)
            s = dataclasses.replace(s, owns=longer)
        within = lambda at: (at[0] < length - before) & unfinished(at[1])  # counted anew, so that its end is a constant
        return jax.lax.while_loop(within, lambda at: (at[0] + 1, step(at[1], length)), (jnp.int32(0), s))[1]

    if shared:  # and in step: what is read of the caches grows with the responses
        state = functools.reduce(while_shorter, zip([0, *lengths], lengths), state)
    else:
        state = jax.lax.while_loop(unfinished, functools.partial(step, most=t_max), state)
    return state.tokens_GQT.reshape(p, c, t_max), state.finished_GQ.reshape(p, c)


def _by_copy(
    arch: Arch,
    s: _Slots,
    length_GS: jax.Array,
    prompts: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    candidates: int,
    most: int,
    shared: bool,
    turned: tuple[bool, bool],
    mesh: Mesh,
) -> tuple[Callable, Any]:
    """Attention of the newest token of every slot on XLA, as model.hidden takes it, and its cache.

    Args:
        prompts: caches [layers, G, prompts of a group, ...]; own: of the slots; or lists of each layer's. Then the
            newest key and value are written before the cache is read: the other way round XLA copies it for the write,
            since nothing orders that behind the read. most: tokens of the own caches that are read. shared: a group's
            slots have the same prompt; else each slot's prompt is copied beside its own tokens, layer by layer.
    """
    apart = isinstance(own, list)
    groups, width = s.t_GS.shape
    values = prompts[0][1] if apart else prompts[1]
    j_max = values.shape[_time(values, turned[1])]
    # Slots as attend_decode takes them: candidates of one prompt side by side, or each on its own.
    rows = (groups, width) if shared else (groups * width, 1)
    position, length, t = (a.reshape(rows) for a in (length_GS + s.t_GS - 1, length_GS, s.t_GS))
    prompt_mask = jnp.arange(j_max)[None, None] < length[..., None]
    own_mask = jnp.arange(most)[None, None] < t[..., None] - (0 if apart else 1)
    prompt_position = jnp.broadcast_to(jnp.arange(j_max)[None], (rows[0], j_max))
    own_position = length[:, :1] + jnp.arange(most)[None]
    as_rows = lambda a: a.reshape(*rows, *a.shape[2:])

    def prompt_of(cache: jax.Array) -> jax.Array:
        return cache[:, 0] if shared else as_rows(_each(cache, s.item_GS // candidates))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, window: jax.Array | None) -> tuple:
        prompt, emitted = cache
        if apart:
            emitted = _stored(emitted, (k, v), s.steps, turned, mesh)
        else:  # a layer's number: of its caches no more is cut out of the stack than is read
            emitted = tuple(_cut(a, emitted, _time(a, its), most) for a, its in zip(own, turned))
        out = attention.attend_decode(
            as_rows(q),
            None if apart else (as_rows(k), as_rows(v)),
            jax.tree.map(prompt_of, prompt),
            jax.tree.map(as_rows, emitted),
            attention.within(prompt_mask, position, prompt_position, window),
            attention.within(own_mask, position, own_position, window),
            turned=turned,
            scale=arch.score_scale,
            cap=arch.score_cap,
        )
        return out.reshape(q.shape), emitted if apart else (k, v)

    return attend, list(zip(prompts, own)) if apart else (prompts, jnp.arange(arch.layers))


def _cut(stack: jax.Array, layer: jax.Array, axis: int, most: int) -> jax.Array:
    """Of the stacked caches those of a layer, and of its tokens (`axis` of the stack) so many."""
    sizes = [1, *stack.shape[1:]]
    sizes[axis] = most
    return jax.lax.dynamic_slice(stack, (layer, *[0] * (stack.ndim - 1)), sizes)[0]


def _in_place(
    arch: Arch,
    s: _Slots,
    length_GS: jax.Array,
    prompts: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    candidates: int,
    mesh: Mesh,
) -> tuple[Callable, jax.Array]:
    """The same by our kernel, which reads the caches of all layers where they lie: a layer is told by its number."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, window: jax.Array | None) -> tuple:
        out = attention.attend_slots(
            q,
            (k, v),
            prompts,
            own,
            layer,
            s.item_GS // candidates,
            length_GS,
            s.t_GS - 1,
            window,
            mesh=mesh,
            scale=arch.score_scale,
            cap=arch.score_cap,
        )
        return out, (k, v)

    return attend, jnp.arange(arch.layers)


def _time(cache: jax.Array, turned: bool) -> int:
    """The axis of tokens."""
    return cache.ndim - (1 if turned else 2)


def _longer(own: tuple, turned: tuple[bool, bool], length: int) -> tuple[jax.Array, ...]:
    """Caches with room for so many tokens."""

    def one(cache: jax.Array, turned: bool) -> jax.Array:
        time = _time(cache, turned)
        return jnp.pad(cache, [(0, length - n if axis == time else 0) for axis, n in enumerate(cache.shape)])

    return tuple(map(one, own, turned))


def _stored(own: tuple, new: tuple, place: jax.Array, turned: tuple[bool, bool], mesh: Mesh) -> tuple[jax.Array, ...]:
    """Keys and values [layers, G, S, K, H] into the slots' caches, at one place of all, or at each slot's own; without
    the axis of layers those of one."""
    time = tuple(map(_time, own, turned))
    if place.ndim == 0:
        update = jax.lax.dynamic_update_slice_in_dim
        return tuple(update(cache, jnp.expand_dims(n, axis), place, axis) for cache, n, axis in zip(own, new, time))

    def here(own: tuple, new: tuple, place_GS: jax.Array) -> tuple:
        new = tuple(map(jnp.expand_dims, new, time))

        # Slot by slot: CPUs and TPUs update in place, which they do not for a scatter.
        def one(i: jax.Array, own: tuple) -> tuple:
            g, slot = i // place_GS.shape[1], i % place_GS.shape[1]

            def update(cache: jax.Array, n: jax.Array, axis: int) -> jax.Array:
                taken = jax.lax.dynamic_slice(n, (0, g, slot, 0, 0, 0), (n.shape[0], 1, 1, *n.shape[3:]))
                at = [0, g, slot, 0, 0, 0]
                at[axis] = place_GS[g, slot]
                return jax.lax.dynamic_update_slice(cache, taken, at)

            return tuple(map(update, own, new, time))

        return jax.lax.fori_loop(0, place_GS.size, one, own)

    where = lambda array, *dims: meshes.spec(mesh, "decode", dims, array.shape)
    caches = tuple(where(cache, None, "rows", None, "heads", None, None) for cache in own)
    specs = (caches, tuple(where(n, None, "rows", None, "heads", None) for n in new), where(place, "rows", None))
    return jax.shard_map(here, mesh=mesh, in_specs=specs, out_specs=caches, check_vma=False)(own, new, place)


def stages(most: int, parts: int) -> list[int]:
    """Tokens of the slots' own caches that are read one after the other where all go in step: up to so many lengths,
    each a loop of its own, which is compiled."""
    step = 32 * -(-most // (32 * parts))
    return [*range(max(step, 64), most, step), most]


def _refilled(s: _Slots, limit_GQ: jax.Array) -> _Slots:
    """Slots that are done take the next candidates of their group's queue, in order, with their first token."""
    next_GS = s.head_G[:, None] + jnp.cumsum(s.done_GS, axis=1) - 1
    taken_GS = s.done_GS & (next_GS < limit_GQ.shape[1])
    item_GS = jnp.where(taken_GS, next_GS, s.item_GS)
    at_once_GS = _each(s.finished_GQ | (limit_GQ <= 1), item_GS)  # or padding
    return dataclasses.replace(
        s,
        head_G=s.head_G + jnp.sum(taken_GS, axis=1),
        item_GS=item_GS,
        t_GS=jnp.where(taken_GS, 1, s.t_GS),
        last_GS=jnp.where(taken_GS, jnp.maximum(_each(s.tokens_GQT[:, :, 0], item_GS), 0), s.last_GS),
        done_GS=jnp.where(taken_GS, at_once_GS, s.done_GS),
    )


def _emitted(s: _Slots, token_GS: jax.Array, limit_GS: jax.Array, eos_ids: jax.Array) -> _Slots:
    """The slots that are not done have one token more."""
    # Each candidate looks for the slot that has it: comparisons, since a scatter takes one element after the other.
    queue, t_max = s.tokens_GQT.shape[1:]
    has_GQS = (jnp.arange(queue)[None, :, None] == s.item_GS[:, None]) & ~s.done_GS[:, None]
    of_candidate = lambda of_GS: jnp.sum(jnp.where(has_GQS, of_GS[:, None], 0), axis=2)
    now_GQT = jnp.arange(t_max)[None, None] == of_candidate(s.t_GS)[..., None]
    now_GQT &= jnp.any(has_GQS, axis=2)[..., None]
    ended_GS, t_GS = _ends(token_GS, eos_ids), s.t_GS + ~s.done_GS
    return dataclasses.replace(
        s,
        steps=s.steps + 1,
        t_GS=t_GS,
        last_GS=jnp.where(s.done_GS, 0, token_GS),
        done_GS=s.done_GS | ended_GS | (t_GS >= limit_GS),
        tokens_GQT=jnp.where(now_GQT, of_candidate(token_GS)[..., None], s.tokens_GQT),
        finished_GQ=s.finished_GQ | jnp.any(has_GQS & ended_GS[:, None], axis=2),
    )


def _each(of_GQ: jax.Array, item_GS: jax.Array) -> jax.Array:
    """[G, S, ...]: what the slots' items have, group by group."""
    return jax.vmap(lambda of_Q, item_S: of_Q[item_S])(of_GQ, item_GS)


def _ends(token: jax.Array, eos_ids: jax.Array) -> jax.Array:
    return jnp.any(token[..., None] == eos_ids[None, None], axis=-1)


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
    *,
    temperature: float | np.ndarray,
    top_k: int,
    top_p: float,
    min_p: float,
    eos_ids: Sequence[int],
    most_eos: int = 8,
) -> Sampling:
    """Plain values as the arrays that `decode` takes. temperature: one, or of each candidate (`temperatures`).

    Raises:
        ValueError: no EOS id, or more than `most_eos`.
    """
    if not 1 <= len(eos_ids) <= most_eos:
        raise ValueError(f"got {len(eos_ids)} end-of-text ids ({list(eos_ids)}), expected 1 to {most_eos}.")
    ids = np.full(most_eos, -1, np.int32)
    ids[: len(eos_ids)] = eos_ids
    return Sampling(np.asarray(temperature, np.float32), np.int32(top_k), np.float32(top_p), np.float32(min_p), ids)


def temperatures(value: float | Sequence[float], candidates: int) -> float | np.ndarray:
    """A temperature, or of several that of each candidate, float32 [C]: runs of equal size, in their order (RLHF
    Workflow: n/2 at 1.0, n/2 at 0.7); where C is no multiple of their number, runs differ by one.
    """
    if isinstance(value, (int, float)):
        return value
    return np.array([value[c * len(value) // candidates] for c in range(candidates)], np.float32)
