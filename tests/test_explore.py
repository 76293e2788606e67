"""Γ against float64 transcriptions and closed forms, on one device and on many; the enhancer against a search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import explore, programs
from sera_jax import mesh as meshes


def sigma_of(dphi_ND: np.ndarray, lam: float) -> np.ndarray:
    """float64: λI + Σ Δφ Δφᵀ, pair by pair."""
    sigma = lam * np.eye(dphi_ND.shape[1])
    for dphi in dphi_ND.astype(np.float64):
        sigma += np.outer(dphi, dphi)
    return sigma


def norms_of(sigma_DD: np.ndarray, vector_ND: np.ndarray) -> np.ndarray:
    inverse = np.linalg.inv(sigma_DD)
    return np.array([np.sqrt(v @ inverse @ v) for v in vector_ND.astype(np.float64)])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("dimension, pairs, lam", [(1, 3, 1.0), (5, 40, 0.5), (32, 200, 1.0), (24, 7, 0.1)])
def test_covariance_and_norms_equal_numpy(dimension, pairs, lam):
    """In blocks as at once, and where fewer pairs than dimensions leave directions of which nothing is known."""
    dphi, vectors = normal(pairs, dimension), normal(50, dimension, seed=1)
    want = sigma_of(dphi, lam)
    sigma = explore.prior(lam, dimension)
    for block in (dphi[: pairs // 2], dphi[pairs // 2 :], np.zeros((4, dimension), np.float32)):
        sigma = explore.observed(sigma, block)
    np.testing.assert_allclose(sigma, want, rtol=1e-5, atol=1e-5 * pairs)
    factor = explore.factor(sigma)
    np.testing.assert_allclose(factor, np.linalg.cholesky(want), atol=1e-4)
    np.testing.assert_allclose(explore.norms(factor, vectors), norms_of(want, vectors), rtol=1e-4)


def test_closed_form_of_two_policies():
    """Γ of two policies is that of their expected features; n pairs along an axis leave 1/√(λ + n) of it, and 1/√λ of
    another one; a label more of the same pair takes what Sherman and Morrison say."""
    sigma = explore.observed(explore.prior(2.0, 3), np.tile([[1.0, 0, 0]], (7, 1)))
    factor = explore.factor(sigma)
    np.testing.assert_allclose(explore.norms(factor, np.eye(3)), [1 / 3, 2**-0.5, 2**-0.5], rtol=1e-6)
    phi, one, other = normal(6, 4), np.array([0.5, 0.3, 0.2, 0, 0, 0]), np.array([0, 0, 0.1, 0.2, 0.3, 0.4])
    dphi = normal(30, 4, seed=2)
    sigma = explore.observed(explore.prior(1.0, 4), dphi)
    apart = (one - other) @ phi
    got = float(explore.norms(explore.factor(sigma), apart[None].astype(np.float32))[0])
    assert got == pytest.approx(norms_of(sigma_of(dphi, 1.0), apart[None])[0], rel=1e-5)
    more = explore.observed(sigma, apart[None].astype(np.float32))
    after = float(explore.norms(explore.factor(more), apart[None].astype(np.float32))[0])
    assert after == pytest.approx(got / np.sqrt(1 + got**2), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 10.0, 30.0, 100.0])
def test_how_exact_float32_is(scale):
    """As the module says: 1e-7 of (largest eigenvalue) / λ at most, and the error grows so that a λ is needed at all.
    The pairs span half of the directions; vectors lie across."""
    rng = np.random.default_rng(3)
    axes = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    dphi = (scale * axes[:, :32] @ rng.normal(size=(32, 200))).T.astype(np.float32)
    vectors = normal(200, 64, seed=4)
    want = sigma_of(dphi, 1.0)
    got = explore.norms(explore.factor(explore.observed(explore.prior(1.0, 64), dphi)), vectors)
    error, largest = np.abs(np.asarray(got) / norms_of(want, vectors) - 1).max(), np.linalg.eigvalsh(want)[-1]
    assert error < max(1e-7 * largest, 2e-6), (error, largest)
    assert error > 1e-9 * largest or scale == 1


@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 2, 2), (8, 1, 1)])
def test_split_over_devices(shape):
    """Σ lies in pieces, where a piece divides it; the sums are those of one device."""
    mesh = meshes.make(*shape)
    dphi, vectors = normal(64, 16), normal(32, 16, seed=1)
    where = programs.covariance_sharding(mesh, 16)
    pieces = {s.data.shape for s in meshes.put(np.zeros((16, 16)), where).addressable_shards}
    assert pieces == {(16 // shape[1], 16 // shape[2])}
    assert programs.covariance_sharding(mesh, 15).is_fully_replicated
    rows = meshes.rows_sharding(mesh)
    sigma = meshes.put(np.asarray(explore.prior(1.0, 16)), where)
    grown = programs.covariance_update(mesh, 16)(sigma, meshes.put(dphi, rows))
    assert sigma.is_deleted() and grown.sharding == where
    factor = programs.covariance_factor(mesh, 16)(grown)
    got = programs.covariance_norms(mesh)(factor, meshes.put(vectors, rows))
    np.testing.assert_allclose(meshes.get(got), norms_of(sigma_of(dphi, 1.0), vectors), rtol=1e-5)


def test_projection_keeps_lengths():
    onto = np.asarray(explore.projection(7, 300, 100))
    vectors = normal(400, 300)
    ratio = np.linalg.norm(vectors @ onto, axis=1) / np.linalg.norm(vectors, axis=1)
    assert abs(np.mean(ratio**2) - 1) < 0.02 and ratio.std() < 0.1
    assert (np.asarray(explore.projection(7, 300, 100)) == onto).all()
    assert (np.asarray(explore.projection(8, 300, 100)) != onto).all()


# --- the pair ---------------------------------------------------------------------------------------------------------


def searched(rewards, valid, gamma, eta) -> tuple[int, int] | None:
    """The pair of one prompt by the definition: over every n, whether the best of n is paid for."""
    live = [c for c in range(len(rewards)) if valid[c]]
    if not live:
        return None
    best = max(live, key=lambda c: (rewards[c], -c))
    others = [c for c in live if rewards[c] < rewards[best]]
    found = None
    for n in range(1, len(others) + 1):
        top = max(others[:n], key=lambda c: (gamma[c], -c))
        if eta * (np.log(n) - (n - 1) / n) <= gamma[top]:
            found = best, top
    return found


def test_the_enhancer_equals_a_search():
    rng = np.random.default_rng(0)
    first_taken, more_taken = set(), set()
    for eta in (1e-3, 0.3, 1.0, 30.0):
        rewards = rng.integers(0, 6, (60, 7)).astype(np.float32)
        gamma, valid = rng.exponential(0.4, (60, 7)).astype(np.float32), rng.random((60, 7)) < 0.7
        valid[0] = False
        pairs, ok = explore.enhancer(rewards, valid, jax.random.key(0), gamma, eta=eta)
        assert pairs.shape == (60, 1, 2) and ok.shape == (60, 1) and pairs.dtype == jnp.int32
        for p in range(60):
            want = searched(rewards[p], valid[p], gamma[p], eta)
            assert bool(ok[p, 0]) == (want is not None)
            if want is not None:
                assert tuple(map(int, pairs[p, 0])) == want
                first = next(c for c in range(7) if valid[p, c] and rewards[p, c] < rewards[p, want[0]])
                (first_taken if want[1] == first else more_taken).add(eta)
    assert first_taken == {1e-3, 0.3, 1.0, 30.0} > more_taken >= {1e-3, 0.3}


def test_the_budget():
    """For nothing the most uncertain one is taken; where a nat costs more than Γ is worth, the first other sample; the
    price is that of the best of n."""
    rewards, valid = np.array([[9.0, 1, 2, 3, 4]], np.float32), np.ones((1, 5), bool)
    gamma = np.array([[0.0, 0.1, 0.2, 0.3, 0.4]], np.float32)
    other = lambda eta: int(explore.enhancer(rewards, valid, jax.random.key(0), gamma, eta=eta)[0][0, 0, 1])
    kl = lambda n: np.log(n) - (n - 1) / n
    np.testing.assert_allclose(explore.best_of_kl(jnp.arange(1.0, 9.0)), kl(np.arange(1, 9)), rtol=1e-5, atol=1e-7)
    assert other(1e-6) == 4 and other(1e6) == 1
    # Γ of the best of n is 0.1·n. One that costs more per nat than Γ is worth is not taken, but a larger n may be.
    rising = [0.1 * n / kl(n) for n in (2, 3, 4)]
    assert rising == sorted(rising, reverse=True)
    for n, price in zip((2, 3, 4), rising):
        assert other(price * 1.001) == n - 1 and other(price * 0.999) >= n


def test_kl_of_the_best_of_n():
    """By a score that is no reward: n samples of a policy of ten responses, against the exact law of their best one."""
    rng = np.random.default_rng(0)
    policy, score = rng.dirichlet(np.ones(10)), rng.normal(size=10)
    order = np.argsort(score)
    for n in (1, 2, 5):
        up_to = np.cumsum(policy[order]) ** n
        best = np.diff(np.concatenate(([0], up_to)))
        kl = np.sum(best * np.log(best / policy[order]))
        assert kl <= float(explore.best_of_kl(jnp.float32(n))) + 1e-6
