"""The kernel of one decoding step, interpreted, against the XLA form that copies each slot's prompt beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import attention, decode_kernel

LAYERS, PROMPTS = 2, 3


def case(*, slots=4, heads=4, kv=2, h=16, j=40, t=24, dtype=jnp.float32, seed=0):
    """Caches with garbage wherever there is no token, and slots at all stages."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    q, new = draw(slots, heads, h), (draw(slots, kv, h), draw(slots, kv, h))
    prompts = draw(LAYERS, PROMPTS, kv, j, h), draw(LAYERS, PROMPTS, kv, j, h)
    own = draw(LAYERS, slots, kv, t, h), draw(LAYERS, slots, kv, t, h)
    of_prompt = np.array([1, j, j // 2 + 1])
    prompt_R = np.array([1, 0, 2, 1, 2, 0][:slots])
    own_R = np.array([0, t - 1, t // 2, 3, 1, 0][:slots])
    return q, new, prompts, own, *(jnp.asarray(x, jnp.int32) for x in (prompt_R, of_prompt[prompt_R], own_R))


def by_copy(q, new, prompts, own, layer, prompt_R, length_R, own_R, window, *, scale, cap=None):
    """attention.attend_decode, each slot a prompt of its own."""
    slots, j, t = q.shape[0], prompts[1].shape[3], own[1].shape[3]
    side = lambda a: a[:, None]
    prompt_mask = jnp.arange(j)[None, None] < length_R[:, None, None]
    own_mask = jnp.arange(t)[None, None] < own_R[:, None, None]
    position = side(length_R + own_R)
    prompt_position = jnp.broadcast_to(jnp.arange(j)[None], (slots, j))
    own_position = side(length_R) + jnp.arange(t)[None]
    return attention.attend_decode(
        side(q),
        jax.tree.map(side, new),
        tuple(side(cache[layer][prompt_R]) for cache in prompts),
        tuple(side(cache[layer]) for cache in own),
        attention.within(prompt_mask, position, prompt_position, window),
        attention.within(own_mask, position, own_position, window),
        scale=scale,
        cap=cap,
    )[:, 0]


def both(given, *, window=None, cap=None, layer=1):
    q, new, prompts, own, *numbers = given
    window = None if window is None else jnp.int32(window)
    words = (q, new, prompts, own, jnp.int32(layer), *numbers, window)
    how = {"scale": q.shape[-1] ** -0.5, "cap": cap}
    got = jax.jit(lambda *words: decode_kernel.attend(*words, **how, interpret=True))(*words)
    return got, by_copy(q, new, prompts, own, layer, *numbers, window, **how)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"heads": 4, "kv": 4},
        {"heads": 6, "kv": 1, "slots": 6},
        {"h": 64, "heads": 2, "kv": 1},
        {"h": 80},
        {"h": 128, "j": 300, "t": 140},
        {"h": 256, "kv": 4},
        {"j": 1, "t": 1, "slots": 1},
    ],
    ids=str,
)
def test_the_kernel_is_attention_over_prompt_own_tokens_and_the_newest(shape):
    got, want = both(case(**shape))
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("window", [1, 5, 23, 41, 1000])
def test_windows_count_positions_across_both_caches(window):
    got, want = both(case(slots=6), window=window)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_caps_and_layers():
    given = case(seed=1)
    for layer in range(LAYERS):
        got, want = both(given, cap=0.7, layer=layer)
        np.testing.assert_allclose(got, want, atol=2e-6)
    assert np.abs(both(given, layer=0)[0] - both(given, layer=1)[0]).max() > 0.1


def test_bfloat16_rounds_as_the_xla_form_does():
    got, want = both(case(dtype=jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=2e-2)


def test_several_blocks_of_each_cache(monkeypatch):
    """Blocks of 128 tokens: lengths on, before and behind their edges; with a window, blocks before it are left out."""
    monkeypatch.setattr(decode_kernel, "BLOCKS", (128,))
    given = list(case(slots=6, j=384, t=300, seed=2))
    given[5] = jnp.asarray([128, 129, 384, 127, 1, 256], jnp.int32)
    given[6] = jnp.asarray([299, 128, 0, 129, 127, 256], jnp.int32)
    call = decode_kernel._plan(2, 16, 384, 300, jnp.float32, 1.0, None)
    assert (call.prompt, call.own) == (128, 128)
    for window in (None, 60, 200, 300):
        got, want = both(given, window=window)
        np.testing.assert_allclose(got, want, atol=2e-6)
    last = given[5] + given[6]
    first_p, count_p, first_o, count_o = decode_kernel._blocks(call, given[5], given[6], jnp.maximum(0, last - 59))
    assert first_p.tolist() == [0, 1, 2, 0, 0, 1] and count_p.tolist() == [0, 0, 1, 0, 0, 0]
    assert first_o.tolist() == [1, 0, 0, 0, 0, 1] and count_o.tolist() == [2, 1, 0, 2, 1, 1]


def test_garbage_beyond_the_tokens_is_not_read():
    given = list(case())
    q, new, prompts, own, prompt_R, length_R, own_R = given
    bad = lambda cache, at: jnp.where(at[None, :, None, :, None], cache, jnp.nan)
    t, j = own[1].shape[3], prompts[1].shape[3]
    of_prompt = jnp.zeros(PROMPTS, jnp.int32).at[prompt_R].set(length_R)
    mine = jnp.arange(t)[None] < own_R[:, None]
    theirs = jnp.arange(j)[None] < of_prompt[:, None]
    given[2] = tuple(bad(cache, theirs) for cache in prompts)
    given[3] = tuple(bad(cache, mine) for cache in own)
    got, _ = both(given)
    np.testing.assert_allclose(got, both(case())[1], atol=2e-6)


@pytest.mark.parametrize("kv", [4, 2, 1])
def test_groups_of_slots_on_eight_devices(eight_devices, kv):
    """Two groups along data; heads over the others, as far as there are key/value heads."""
    parts = [case(kv=kv, seed=seed) for seed in (3, 4)]
    together = lambda axis, at: jax.tree.map(lambda *a: jnp.stack(a, axis), *(part[at] for part in parts))
    got = attention.attend_slots(
        together(0, 0),
        together(0, 1),
        together(1, 2),
        together(1, 3),
        jnp.int32(1),
        *(together(0, at) for at in (4, 5, 6)),
        None,
        mesh=eight_devices,
    )
    for group, part in enumerate(parts):
        np.testing.assert_allclose(got[group], both(part)[1], atol=2e-6)
