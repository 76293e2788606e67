"""Sampling: against forward passes without a cache, softmax frequencies, transformers' filters; the promise of bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import attention, draw, model, programs, sample
from sera_jax import mesh as meshes
from sera_jax.model import Arch
from sera_jax.programs import Compute

ARCH = Arch("LlamaForCausalLM", 64, 32, 2, 8, 4, 8, 48, 1e-5, 1e4, tied=False, init_std=0.4)
SLOTS, CANDIDATES, TOKENS = 4, 3, 12
F32 = Compute(jnp.float32)


def prompts(lengths, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, ARCH.vocab, n).astype(np.int32) for n in lengths]


@pytest.fixture(scope="module")
def params():
    return jax.device_get(jax.jit(lambda key: model.init(ARCH, key))(jax.random.key(0)))


def values(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, eos_ids=(ARCH.vocab,)):
    """An EOS id outside of the vocabulary never comes."""
    return sample.sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, eos_ids=eos_ids)


def placed(params, mesh):
    return meshes.put(params, programs.param_shardings(ARCH, mesh, "decode"))


def runner(params, mesh, candidates=CANDIDATES, tokens=TOKENS, slots=None, compute=F32):
    """(sampling values, key) → the `run` of sample.run_batches; programs and weights are shared by its calls."""
    weights = placed(params, mesh)
    prefill = programs.prefiller(ARCH, mesh, F32)
    decode = programs.decoder(ARCH, mesh, compute, candidates=candidates, max_new_tokens=tokens, slots=slots)

    def with_values(sampling, key=None, limit_PC=None):
        key = jax.random.key(0) if key is None else key

        def run(tokens_PJ, length_P, hash_P2):
            start = prefill(weights, tokens_PJ, length_P)
            return tuple(np.asarray(a) for a in decode(weights, start, hash_P2, key, sampling, limit_PC))

        return run

    with_values.programs = prefill, decode
    return with_values


@pytest.fixture(scope="module")
def one(params, one_device):
    return runner(params, one_device)


def responses(run, prompts, slots=SLOTS, batches=None) -> list[tuple[np.ndarray, ...]]:
    """Candidates of each prompt, in the order of the prompts."""
    batches = sample.sampling_batches([len(p) for p in prompts], slots) if batches is None else batches
    out: dict[int, tuple] = {}
    for members, tokens, _ in sample.run_batches(run, prompts, batches, slots):
        out |= dict(zip(members.tolist(), tokens))
    return [out[i] for i in sorted(out)]


@pytest.fixture(scope="module")
def full_logits(params):
    return logits_of(params)


def logits_of(params):
    """(ids) → logits [V] of the next token, from a forward pass over all of them, without a cache."""

    @jax.jit
    def run(tokens_1L, length):
        index = jnp.arange(tokens_1L.shape[1])[None]
        mask = attention.tree_mask((index < length).astype(jnp.int32), jnp.zeros_like(index))
        attend = lambda q, k, v, *_: (attention.attend(q, k, v, mask), ())
        hidden, _ = model.hidden(ARCH, params, tokens_1L, index, attend, longest=1 << 20, dtype=jnp.float32)
        return (hidden @ jnp.asarray(model.head_table(ARCH, params)).T)[0, length - 1]

    def logits(ids):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(run(padded, len(ids)))

    return logits


# --- mixtures of two models -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def second():
    return jax.device_get(jax.jit(lambda key: model.init(ARCH, key))(jax.random.key(1)))


def mixture_of(params, second, mesh, slots=None):
    """(α, sampling, key) → the `run` of sample.run_batches."""
    weights, other = placed(params, mesh), placed(second, mesh)
    prefill = programs.prefiller(ARCH, mesh, F32)
    decode = programs.decoder(ARCH, mesh, F32, candidates=CANDIDATES, max_new_tokens=TOKENS, slots=slots)
    return lambda alpha, sampling, key: programs.sample_prompts(
        prefill, decode, weights, key, sampling, mesh, beside=(other, alpha)
    )


@pytest.mark.parametrize("slots", [None, 4])
def test_tokens_of_a_mixture_are_what_both_models_logits_give(params, second, one_device, full_logits, slots):
    """π^(1-α)·π₂^α token by token, at a temperature, side by side and in slots that are filled again."""
    given, key, temperature, alpha = prompts([5, 9], seed=1), jax.random.key(7), 0.7, 0.3
    run = mixture_of(params, second, one_device, slots)(alpha, values(temperature=temperature), key)
    got, other_logits = responses(run, given, slots=2), logits_of(second)
    keys = sample.candidate_keys(key, np.stack([sample.prompt_hash(p) for p in given]), CANDIDATES)
    log_softmax = lambda x: x - np.log(np.exp(x - x.max()).sum()) - x.max()
    alone = 0
    for p, c in np.ndindex(2, CANDIDATES):
        ids = list(given[p])
        for t in range(TOKENS):
            one, other = (log_softmax(logits(ids).astype(np.float64)) for logits in (full_logits, other_logits))
            token, near = drawn((1 - alpha) * one + alpha * other, temperature, keys[p, c], t)
            alone += token != drawn(one, temperature, keys[p, c], t)[0]
            ids.append(token)
            assert near > 1e-5  # the test is not one of luck
        assert got[p][c].tolist() == ids[len(given[p]) :]
    assert alone > 10  # the first model alone says something else


def test_a_mixture_with_nothing_of_one_model_is_the_other(params, second, one_device):
    given, key = prompts([5, 9], seed=1), jax.random.key(3)
    mixed = mixture_of(params, second, one_device)
    same = lambda a, b: all(x.tolist() == y.tolist() for row, other in zip(a, b) for x, y in zip(row, other))
    for alpha, weights in ((0.0, params), (1.0, second)):
        want = responses(runner(weights, one_device)(values(), key), given)
        assert same(responses(mixed(alpha, values(), key), given), want)


# --- against the forward pass -----------------------------------------------------------------------------------------


def test_greedy_decoding_is_the_arg_max_of_full_forward_passes(one, full_logits):
    """Prompts of different lengths in one batch, a bucket's full length among them."""
    given = prompts([1, 2, 17, 32])
    got = responses(one(values(temperature=0.0)), given)
    closest = np.inf
    for prompt, candidates in zip(given, got):
        ids = list(prompt)
        for _ in range(TOKENS):
            logits = full_logits(ids)
            top = np.sort(logits)[-2:]
            closest = min(closest, top[1] - top[0])
            ids.append(int(logits.argmax()))
        for candidate in candidates:
            assert candidate.tolist() == ids[len(prompt) :]
    assert closest > 1e-4  # measured: 6e-4: no near-tie, so the test is not one of luck


def inverse(mass, u) -> tuple[int, float]:
    """The first place at which the cumulative mass exceeds u, in float64; how far u is from the nearest edge."""
    upto = np.cumsum(mass) / mass.sum()
    return int(np.searchsorted(upto, u, side="right")), np.abs(upto - u).min()


def drawn(logits, temperature, key, t) -> tuple[int, float]:
    """The token of that key and position, from the definition: a block of the vocabulary, then a token of the block."""
    u = np.asarray(draw.uniforms(key, t), np.float64)
    mass = np.exp((logits - logits.max()).astype(np.float64) / temperature).reshape(-1, draw.block(len(logits)))
    b, near_b = inverse(mass.sum(1), u[0])
    i, near_i = inverse(mass[b], u[1])
    return b * mass.shape[1] + i, min(near_b, near_i)


def test_a_sampled_response_is_what_its_key_and_full_logits_give(one, full_logits):
    """Every token of a sampled candidate, from the numbers that its key gives and logits without a cache."""
    given, key, temperature = prompts([5, 9], seed=1), jax.random.key(7), 0.7
    got = responses(one(values(temperature=temperature), key), given)
    hashes = np.stack([sample.prompt_hash(p) for p in given])
    keys = sample.candidate_keys(key, hashes, CANDIDATES)
    assert draw.block(ARCH.vocab) < ARCH.vocab  # so that there are blocks to choose from
    for p, c in np.ndindex(2, CANDIDATES):
        ids = list(given[p])
        for t in range(TOKENS):
            token, near = drawn(full_logits(ids), temperature, keys[p, c], t)
            ids.append(token)
            assert near > 1e-5  # measured: 1.5e-3; the test is not one of luck
        assert got[p][c].tolist() == ids[len(given[p]) :]
    assert len({c.tobytes() for p in got for c in p}) == 2 * CANDIDATES


def test_bfloat16_decoding_follows_bfloat16_forward_passes(params, one_device):
    """The cache is in the compute dtype; each token is as likely as the best one of a full pass, to rounding."""
    compute = Compute(jnp.bfloat16)
    weights = programs.to_decode(ARCH, one_device, jnp.bfloat16)(params)
    start = programs.prefiller(ARCH, one_device, compute)(
        weights, *(np.array(x) for x in ([[3, 1, 4, 1, 5, 0, 0, 0]], [5]))
    )
    assert start.cache[0].dtype == jnp.bfloat16 and start.logits_PV.dtype == jnp.float32
    decode = programs.decoder(ARCH, one_device, compute, candidates=1, max_new_tokens=TOKENS)
    greedy = values(temperature=0.0)
    out = np.asarray(decode(weights, start, np.zeros((1, 2), np.uint32), jax.random.key(0), greedy)[0])[0, 0]
    ids = np.array([3, 1, 4, 1, 5, *out[:-1]])[None]
    index = jnp.arange(ids.shape[1])[None]
    mask = attention.tree_mask(jnp.ones_like(index), jnp.zeros_like(index))
    attend = lambda q, k, v, *_: (attention.attend(q, k, v, mask), ())
    hidden, _ = model.hidden(ARCH, weights, jnp.asarray(ids), index, attend, longest=1 << 20, dtype=jnp.bfloat16)
    logits = np.asarray((hidden @ model.head_table(ARCH, weights).T)[0, 4:], np.float32)
    regret = logits.max(-1) - logits[np.arange(TOKENS), out]
    assert regret.max() < 0.05 * logits.std()  # measured: 0


# --- the promise of bits ----------------------------------------------------------------------------------------------


def test_a_candidate_does_not_depend_on_its_company(one):
    """Bit-equal whatever prompts share the batch, in whichever row, however the prompts are split into batches."""
    given = prompts([3, 11, 20, 32, 7, 1, 2], seed=2)
    run = one(values(temperature=1.3, top_p=0.9))
    want = responses(run, given)
    alone = [responses(run, [p])[0] for p in given]
    order = [4, 6, 0, 5, 3, 1, 2]
    shuffled = responses(run, [given[i] for i in order])
    reverse = responses(run, given, batches=[(32, np.array(b)) for b in ([6], [5, 1, 0], [4, 2], [3])])
    for i in range(len(given)):
        for other in (alone[i], shuffled[order.index(i)], reverse[i]):
            for a, b in zip(want[i], other):
                assert a.tobytes() == b.tobytes()


def test_layers_written_out_with_caches_that_grow_give_the_tokens_of_a_loop(params, one_device, monkeypatch):
    """More tokens than the first caches hold, so that they grow; and company makes no difference there either."""
    given, key, tokens = prompts([5, 9, 20], seed=4), jax.random.key(2), 70
    assert [sample.stages(n, 4) for n in (tokens, 12, 64, 128)] == [[64, 70], [12], [64], [64, 96, 128]]
    assert sample.stages(1000, 4) == [256, 512, 768, 1000] and sample.stages(1000, 2) == [512, 1000]
    lengths, original = [], attention.attend_decode

    def noting(q, new, prompt, own, *args, **keys):
        lengths.append((new is None, own[1].shape[-1]))
        return original(q, new, prompt, own, *args, **keys)

    monkeypatch.setattr(attention, "attend_decode", noting)
    run = runner(params, one_device, tokens=tokens)(values(), key)
    got, alone = responses(run, given), responses(run, given[1:2])
    assert sorted(set(lengths)) == [(True, length) for length in sample.stages(tokens, 4)]
    monkeypatch.setattr(sample, "LAYERS_APART", 1)
    loop = runner(params, one_device, tokens=tokens, slots=SLOTS * CANDIDATES)  # as many as there are: in step too
    looped = responses(loop(values(), key), given)
    # The loop over layers reads of its caches as much, and never makes them longer.
    assert {length for length in lengths if not length[0]} == {(False, length) for length in sample.stages(tokens, 2)}
    same = lambda one, other: all(a.tolist() == b.tolist() for a, b in zip(one, other, strict=True))
    assert all(len(c) == tokens for row in got for c in row) and same(alone[0], got[1])
    assert all(same(one, other) for one, other in zip(got, looped, strict=True))


def test_buckets_depend_on_the_prompt_alone(one):
    assert [sample.bucket(n) for n in (1, 31, 32, 33, 64, 65, 1000)] == [32, 32, 32, 64, 64, 128, 1024]
    lengths = [40, 3, 5, 90, 32, 33, 2, 1]
    batches = sample.sampling_batches(lengths, 2)
    assert [(size, members.tolist()) for size, members in batches] == [
        (32, [1, 2]), (32, [4, 6]), (32, [7]), (64, [0, 5]), (128, [3]),
    ]  # fmt: skip


def test_the_noise_is_of_iteration_prompt_candidate_and_position(one):
    given = prompts([6, 6], seed=3)
    first = responses(one(values(), jax.random.key(0)), given)
    again = responses(one(values(), jax.random.key(0)), given)
    other = responses(one(values(), jax.random.key(1)), given)
    flat = lambda r: [c.tobytes() for candidates in r for c in candidates]
    assert flat(first) == flat(again)
    assert len(set(flat(first) + flat(other))) == 2 * 2 * CANDIDATES
    keys = sample.candidate_keys(jax.random.key(0), np.array([[1, 2], [2, 1], [1, 3]], np.uint32), 2)
    assert len({k.tobytes() for k in np.asarray(jax.random.key_data(keys)).reshape(6, -1)}) == 6
    more = sample.candidate_keys(jax.random.key(0), np.array([[1, 2]], np.uint32), 5)
    np.testing.assert_array_equal(jax.random.key_data(more)[0, :2], jax.random.key_data(keys)[0])
    # A prompt's hash is of its tokens, whatever integer type holds them.
    assert (sample.prompt_hash(given[0]) == sample.prompt_hash(given[0].astype(np.int64))).all()
    assert (sample.prompt_hash(given[0]) != sample.prompt_hash(given[0][::-1])).any()


def test_eight_devices_give_equal_noise_and_tokens_up_to_a_near_tie(params, one, full_logits, eight_devices):
    """float32: logits within 1e-4; tokens are equal up to the first position whose number is that near to an edge."""
    given, key = prompts([3, 11, 20, 32, 7, 1, 2, 30], seed=4), jax.random.key(5)
    hashes = np.stack([sample.prompt_hash(p) for p in given])

    @functools.partial(jax.jit, static_argnums=2)
    def noise(key, hashes, candidates):
        keys = sample.candidate_keys(key, hashes, candidates)
        return jax.vmap(jax.vmap(lambda k: draw.uniforms(k, 3)))(keys)

    there = noise(key, meshes.put(hashes, meshes.rows_sharding(eight_devices)), CANDIDATES)
    assert len(there.sharding.device_set) == 8
    np.testing.assert_array_equal(there, noise(key, hashes, CANDIDATES))

    eight = runner(params, eight_devices)
    tokens, length = np.zeros((len(given), 32), np.int32), np.array([len(p) for p in given], np.int32)
    for row, p in enumerate(given):
        tokens[row, : len(p)] = p
    logits = np.asarray(eight.programs[0](placed(params, eight_devices), tokens, length).logits_PV)
    want_logits = np.stack([full_logits(p) for p in given])
    assert np.abs(logits - want_logits).max() < 1e-4  # measured: 9e-6, standard deviation 2.3

    sampling = values(temperature=0.9)
    got, want = responses(eight(sampling, key), given), responses(one(sampling, key), given)
    keys, differ = sample.candidate_keys(key, hashes, CANDIDATES), 0
    for p, c in np.ndindex(len(given), CANDIDATES):
        a, b = got[p][c], want[p][c]
        unequal = np.flatnonzero(a != b)
        if len(unequal):  # only a near-tie excuses it
            t, differ = unequal[0], differ + 1
            assert drawn(full_logits([*given[p], *a[:t]]), 0.9, keys[p, c], t)[1] < 1e-4
    assert differ <= 1  # measured: 0


# --- what is sampled --------------------------------------------------------------------------------------------------


@jax.jit
def picked(logits_PCV, keys_PC, t, sampling):
    """`draw.pick` with the numbers of response position t."""
    uniform_PC2 = jax.vmap(jax.vmap(lambda key: draw.uniforms(key, t)))(keys_PC)
    return draw.pick(logits_PCV, uniform_PC2, sampling)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_softmax(temperature):
    """Chi-square over 20000 draws of 12 tokens: 11 degrees of freedom, above 31.3 one time in 1000."""
    logits, draws = np.random.default_rng(0).normal(size=12).astype(np.float32), 20000
    keys = sample.candidate_keys(jax.random.key(0), np.array([[3, 4]], np.uint32), draws)
    tokens = picked(jnp.broadcast_to(logits, (1, draws, 12)), keys, jnp.int32(0), values(temperature=temperature))
    wide = np.exp(logits.astype(np.float64) / temperature)
    expected = draws * wide / wide.sum()
    counts = np.bincount(np.asarray(tokens)[0], minlength=12)
    assert ((counts - expected) ** 2 / expected).sum() < 31.3
    # Positions are independent draws: the same keys at the next one.
    after = np.asarray(
        picked(jnp.broadcast_to(logits, (1, draws, 12)), keys, jnp.int32(1), values(temperature=temperature))
    )[0]
    together = (after == np.asarray(tokens)[0]).mean()
    p = expected / draws
    assert abs(together - (p**2).sum()) < 5 * np.sqrt((p**2).sum() / draws)


def test_frequencies_of_the_first_sampled_token(params, one_device, full_logits):
    """The same through prefill and decode: 2048 candidates of one prompt."""
    prompt, draws = prompts([9], seed=5)[0], 2048
    run = runner(params, one_device, candidates=draws, tokens=1)(values(temperature=2.0))
    first = np.array([c[0] for c in responses(run, [prompt], slots=1)[0]])
    wide = np.exp(full_logits(prompt).astype(np.float64) / 2)
    expected = draws * wide / wide.sum()
    counts = np.bincount(first, minlength=ARCH.vocab)
    often = expected >= 5
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum() + (
        counts[~often].sum() - expected[~often].sum()
    ) ** 2 / expected[~often].sum()
    freedom = often.sum()
    assert freedom > 5 and chi2 < freedom + 4 * np.sqrt(2 * freedom)


def filtered(logits, temperature, top_k, top_p, min_p) -> np.ndarray:
    """Which tokens may be drawn, in float64 NumPy, from the definitions (temperature, top-k, nucleus, min-p)."""
    keep = np.zeros(logits.shape, bool)
    for row, x in enumerate(logits.astype(np.float64) / temperature):
        order = np.argsort(-x, kind="stable")[: top_k or None]
        p = np.exp(x[order] - x[order[0]])
        p /= p.sum()
        order = order[: np.searchsorted(np.cumsum(p), top_p) + 1] if top_p < 1 else order
        keep[row, [i for i in order if np.exp(x[i] - x[order[0]]) >= min_p]] = True
    return keep


# temperature, top_k, top_p, min_p
FILTERS = [
    (1.0, 5, 1.0, 0.0), (1.0, 0, 0.7, 0.0), (1.0, 0, 1.0, 0.2), (0.5, 8, 0.9, 0.0), (2.0, 10, 0.8, 0.05),
    (1.0, 1, 1.0, 0.0), (1.0, 0, 1e-6, 0.0), (0.7, 100, 0.95, 0.1), (1.0, 64, 0.5, 0.0),
]  # fmt: skip


@pytest.fixture(scope="module")
def allowed():
    """(logits [n, V], sampling) → bool [n, V]: what the filters leave."""
    run = jax.jit(lambda x, s: jnp.isfinite(draw.filtered(x / s.temperature, s)))
    return lambda logits, sampling: np.asarray(run(jnp.asarray(logits)[:, None], sampling))[:, 0]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_against_their_definitions(allowed, filters):
    logits = np.random.default_rng(1).normal(size=(200, 64)).astype(np.float32) * 2
    np.testing.assert_array_equal(allowed(logits, values(*filters)), filtered(logits, *filters))


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_against_transformers(allowed, filters):
    torch = pytest.importorskip(
        "torch", reason="transformers' logits processors need torch: install the `parity` extra"
    )
    from transformers.generation import logits_process as processors

    temperature, top_k, top_p, min_p = filters
    chain = [processors.TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    chain += [processors.TopKLogitsWarper(top_k)] if top_k else []
    chain += [processors.TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [processors.MinPLogitsWarper(min_p)] if min_p else []
    logits = np.random.default_rng(2).normal(size=(200, 64)).astype(np.float32) * 2
    scores = torch.tensor(logits)
    for processor in chain:
        scores = processor(None, scores)
    np.testing.assert_array_equal(allowed(logits, values(*filters)), np.isfinite(scores.numpy()))


def test_what_is_filtered_is_never_drawn_and_the_rest_is():
    """Through `pick`, whose shortcut for "all off" must not take these; and the frequencies are renormalised ones."""
    logits, draws = np.linspace(2, 0, 8).astype(np.float32), 20000
    keys = sample.candidate_keys(jax.random.key(1), np.array([[1, 1]], np.uint32), draws)
    for filters in [(1.0, 3, 1.0, 0.0), (1.0, 0, 0.6, 0.0), (1.0, 0, 1.0, 0.5), (0.8, 5, 0.9, 0.3)]:
        tokens = picked(jnp.broadcast_to(logits, (1, draws, 8)), keys, jnp.int32(0), values(*filters))
        keep = filtered(logits[None], *filters)[0]
        expected = draws * np.where(keep, np.exp(logits / filters[0]), 0) / np.exp(logits / filters[0])[keep].sum()
        counts = np.bincount(np.asarray(tokens)[0], minlength=8)
        assert not counts[~keep].any() and keep.sum() in range(2, 6)
        assert ((counts - expected)[keep] ** 2 / expected[keep]).sum() < 25


def test_filters_that_are_off_cut_nothing(allowed):
    """Rounding in the cumulative sum must not cost a tail token its chance, and ties at the edge stay together."""
    logits = np.random.default_rng(3).normal(size=(20, 4096)).astype(np.float32) * 5
    assert allowed(logits, values(1.0, 4096, 1.0, 0.0)).all()
    tied = np.array([[3.0, 1.0, 1.0, 1.0, 0.0]], np.float32)
    assert allowed(tied, values(1.0, 2, 1.0, 0.0)).tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("slots", [None, 2], ids=["side by side", "refilled"])
def test_a_temperature_for_each_candidate(params, one_device, slots):
    """Each candidate is, bit for bit, the one that its temperature gives when all have it; a list compiles once."""
    run, given = runner(params, one_device, slots=slots), prompts([3, 11, 20], seed=5)
    of = lambda temperature: responses(run(values(temperature, eos_ids=[1, 2])), given)
    alike = {t: of(t) for t in (0.0, 0.7, 1.5)}
    mixed, size = of(np.array([1.5, 0.0, 0.7], np.float32)), run.programs[1]._cache_size()
    for p in range(len(given)):
        for c, t in enumerate((1.5, 0.0, 0.7)):
            assert mixed[p][c].tolist() == alike[t][p][c].tolist()
    assert {c.tobytes() for p in alike[0.7] for c in p} != {c.tobytes() for p in alike[1.5] for c in p}
    same = of(np.full(3, 0.7, np.float32))
    assert all(np.array_equal(a, b) for x, y in zip(same, alike[0.7]) for a, b in zip(x, y))
    assert run.programs[1]._cache_size() == size


def test_temperatures_are_split_over_the_candidates():
    of = lambda value, candidates: np.asarray(sample.temperatures(value, candidates)).tolist()
    half = lambda values: [round(v, 6) for v in values]
    assert half(of((1.0, 0.7), 8)) == [1.0] * 4 + [0.7] * 4
    assert half(of((1.0, 0.7), 5)) == [1.0] * 3 + [0.7] * 2 and half(of((1.0, 0.5, 0.0), 3)) == [1.0, 0.5, 0.0]
    assert of(0.8, 4) == 0.8 and of((0.8,), 2) == [np.float32(0.8)] * 2


# --- slots that are filled again --------------------------------------------------------------------------------------

LIMITS = np.array([[12, 1, 2], [3, 12, 1], [1, 1, 5], [7, 4, 12]], np.int32)


@pytest.fixture(scope="module")
def refilled(params, one_device):
    """Two slots for the twelve candidates of SLOTS prompts."""
    return runner(params, one_device, slots=2)


@pytest.mark.parametrize("limit_PC", [None, LIMITS], ids=["free", "limits"])
def test_refilled_slots_give_the_same_tokens(one, refilled, limit_PC):
    """As with a slot for every candidate; ends and limits of many lengths, 1 and an end at once among them."""
    given = prompts([3, 11, 20, 7], seed=6)
    free = responses(one(values(temperature=1.5)), given)
    eos = [int(free[0][0][0]), int(free[2][1][4])]
    seen = []
    for sampling in (values(temperature=1.5), values(temperature=1.5, eos_ids=eos), values(temperature=0.0)):
        key, batches = jax.random.key(3), sample.sampling_batches([len(p) for p in given], 4)
        got, want = (
            list(sample.run_batches(run(sampling, key, limit_PC), given, batches, 4)) for run in (refilled, one)
        )
        for (_, a, done), (_, b, wanted) in zip(got, want, strict=True):
            np.testing.assert_array_equal(done, wanted)
            for p, c in np.ndindex(4, CANDIDATES):
                assert a[p][c].tolist() == b[p][c].tolist()
                assert len(a[p][c]) <= (TOKENS if limit_PC is None else limit_PC[p, c])
                seen.append(len(a[p][c]))
    assert {1, TOKENS} <= set(seen) and len(set(seen)) > 3


def test_in_a_refilled_slot_a_candidate_does_not_depend_on_its_company(params, one_device):
    """Bit-equal whatever stands before it in the queue and beside it in the slots; padding prompts in between."""
    given = prompts([3, 11, 20, 32], seed=2)
    run = runner(params, one_device, slots=2)(values(temperature=1.3, top_p=0.9, eos_ids=range(6)))
    want = responses(run, given)
    reverse = responses(run, given, batches=[(32, np.array([3, 2, 1, 0]))])
    alone = [responses(run, [p])[0] for p in given]
    assert len({len(c) for p in want for c in p}) > 3
    for i in range(len(given)):
        for other in (reverse[i], alone[i]):
            assert [c.tobytes() for c in want[i]] == [c.tobytes() for c in other]


@pytest.mark.parametrize("slots", [2, 4, 5])
def test_refilled_slots_on_eight_devices(params, one, eight_devices, slots):
    """Two groups of slots along data, each with its own queue; an odd number is one group, on all devices."""
    given, key = prompts([3, 11, 20, 7], seed=6), jax.random.key(4)
    sampling = values(temperature=0.9, eos_ids=range(6))
    got = responses(runner(params, eight_devices, slots=slots)(sampling, key), given)
    for a, b in zip(got, responses(one(sampling, key), given), strict=True):
        assert [c.tolist() for c in a] == [c.tolist() for c in b]  # measured: no near-tie among them


@pytest.mark.parametrize("devices", ["one", "eight"])
def test_slots_that_read_their_prompts_by_the_kernel_give_the_same_tokens(params, one, request, devices):
    mesh = request.getfixturevalue(f"{devices}_device" + "s" * (devices == "eight"))
    given, key = prompts([3, 11, 20, 7], seed=6), jax.random.key(4)
    sampling = values(temperature=0.9, eos_ids=range(6))
    by_kernel = runner(params, mesh, slots=4, compute=Compute(jnp.float32, attention="tree"))
    for a, b in zip(responses(by_kernel(sampling, key), given), responses(one(sampling, key), given), strict=True):
        assert [c.tolist() for c in a] == [c.tolist() for c in b]


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_a_slot_is_never_idle_while_somebody_waits(params, one_device, slots):
    """Passes counted: those of a list of jobs, each given to the first slot that is free."""
    given = prompts([3, 11, 20, 7], seed=6)
    free = [0] * slots
    for number, length in enumerate(LIMITS.reshape(-1)):
        # The first token comes from the prompt; to take a candidate needs a pass, but the first ones are there.
        free[int(np.argmin(free))] += max(length - 1, int(number >= slots))
    passes, original = [], attention.attend_decode

    def counting(*args, **keys):
        jax.debug.callback(lambda: passes.append(1))
        return original(*args, **keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "attend_decode", counting)
        run = runner(params, one_device, tokens=13, slots=slots)  # 13: a program of its own, traced with the callback
        responses(run(values(), limit_PC=LIMITS), given)
    jax.effects_barrier()
    assert len(passes) / ARCH.layers == max(free)


# --- the end ----------------------------------------------------------------------------------------------------------


def test_any_of_several_eos_ids_ends_a_candidate(one):
    """With the EOS ids named, each response is the one without them, cut after the first of them; then -1."""
    given = prompts([3, 11, 20, 7], seed=6)
    free = responses(one(values(temperature=1.5)), given)
    eos = sorted({int(free[p][c][4]) for p, c in ((0, 0), (2, 1))})
    run = one(values(temperature=1.5, eos_ids=eos))
    seen = set()
    for members, got, finished in sample.run_batches(
        run, given, sample.sampling_batches([len(p) for p in given], 4), 4
    ):
        for p, c in np.ndindex(4, CANDIDATES):
            want = free[members[p]][c]
            ends = np.flatnonzero(np.isin(want, eos))
            want = want[: ends[0] + 1] if len(ends) else want
            assert got[p][c].tolist() == want.tolist()
            assert finished[p, c] == bool(len(ends))
            seen |= set(want.tolist()) & set(eos)
    assert len(seen) == len(eos) == 2 and not finished.all()


def test_after_the_end_only_minus_one(one):
    given = prompts([3, 11, 20, 7], seed=6)
    tokens, length = np.zeros((4, 32), np.int32), np.array([len(p) for p in given], np.int32)
    for row, p in enumerate(given):
        tokens[row, : len(p)] = p
    hashes = np.stack([sample.prompt_hash(p) for p in given])
    eos = list(range(8))
    out, finished = one(values(temperature=2.0, eos_ids=eos))(tokens, length, hashes)
    assert finished.any() and out.dtype == np.int32
    for p, c in np.ndindex(4, CANDIDATES):
        count = (out[p, c] >= 0).sum()
        assert (out[p, c, count:] == -1).all() and (out[p, c, : count - 1] >= 8).all()
        assert (out[p, c, count - 1] < 8) == finished[p, c] and (finished[p, c] or count == TOKENS)


def test_the_loop_stops_when_all_are_finished(params, one_device, full_logits):
    """Counted: each pass through the loop looks at the cache once a layer, by a callback in the attention rule."""
    passes = []
    prompt = prompts([5], seed=10)[0]
    ids = list(prompt)
    for _ in range(3):
        ids.append(int(full_logits(ids).argmax()))
    greedy = ids[len(prompt) :]
    original = attention.attend_decode

    def counting(*args, **keys):
        jax.debug.callback(lambda: passes.append(1))
        return original(*args, **keys)

    def count(eos_ids, padding):
        del passes[:]
        weights = placed(params, one_device)
        tokens, length = np.zeros((1 + padding, 32), np.int32), np.zeros(1 + padding, np.int32)
        tokens[0, :5], length[0] = prompt, 5
        start = programs.prefiller(ARCH, one_device, F32)(weights, tokens, length)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "attend_decode", counting)
            run = programs.decoder(ARCH, one_device, F32, candidates=2, max_new_tokens=4096)
            sampling = values(temperature=0.0, eos_ids=eos_ids)
            out, finished = run(weights, start, np.zeros((1 + padding, 2), np.uint32), jax.random.key(0), sampling)
        jax.effects_barrier()
        assert np.asarray(finished).all()
        return np.asarray(out)[0, 0], len(passes) / ARCH.layers

    assert len(set(greedy)) == 3  # so that each can be made the end
    for end in range(3):
        out, loops = count([greedy[end]], padding=3)
        assert out[: end + 2].tolist() == [*greedy[: end + 1], -1]
        assert loops == end  # the first token comes from the prompt's own pass


def test_new_sampling_values_compile_nothing(one):
    prefill, decode = one.programs
    given = prompts([3, 11], seed=7)
    responses(one(values()), given)
    before = prefill._cache_size(), decode._cache_size()
    results = set()
    for sampling in (
        values(0.0),
        values(0.3),
        values(1.0, 5),
        values(1.0, 0, 0.5),
        values(1.0, 0, 1.0, 0.1, eos_ids=[1, 2]),
    ):
        got = responses(one(sampling, jax.random.key(9)), given)
        results.add(b"".join(c.tobytes() for candidates in got for c in candidates))
    responses(one(values()), prompts([1, 2, 3], seed=8))
    assert (prefill._cache_size(), decode._cache_size()) == before
    assert len(results) > 3


def test_padding_prompts_start_finished(one):
    """A prompt of length 0 emits nothing, disturbs nobody, and does not keep the loop alive."""
    given = prompts([5], seed=9)
    tokens, length, hashes = np.zeros((4, 32), np.int32), np.zeros(4, np.int32), np.zeros((4, 2), np.uint32)
    tokens[2, :5], length[2], hashes[2] = given[0], 5, sample.prompt_hash(given[0])
    out, finished = one(values())(tokens, length, hashes)
    assert (out[[0, 1, 3]] == -1).all() and finished[[0, 1, 3]].all()
    for a, b in zip(out[2], responses(one(values()), given)[0]):
        assert a.tolist() == b.tolist()
    assert not finished[2].any()


def test_errors():
    with pytest.raises(ValueError, match=r"prompt 1 has no token; expected at least one \(a BOS, say\)"):
        list(sample.run_batches(None, [np.ones(1), np.ones(0)], [(32, np.array([1]))], 2))
    with pytest.raises(ValueError, match=r"got 0 end-of-text ids \(\[\]\), expected 1 to 8"):
        values(eos_ids=[])
    with pytest.raises(ValueError, match="got 9 end-of-text ids"):
        values(eos_ids=range(9))
