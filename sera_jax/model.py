"""One decoder, described by `Arch`. The only room that knows Flax.

Outside, a model is a plain nested dict of arrays with the layers stacked on a leading axis:

    embed.table [V, D] · final_norm.scale [D] · head.table [V, D] unless tied · layers.{
        attention_norm.scale [D], attention.{query [D, N, H], key, value [D, K, H], out [N, H, D]},
        mlp_norm.scale [D], mlp.{gate, up [D, F], down [F, D]}}

Letters: B rows, L tokens, D width, N heads, K key/value heads, H head size, F hidden units, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sera_jax.mesh import Placement

REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda body: body,
    "dots": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=False
    ),
    "full": functools.partial(jax.checkpoint, prevent_cse=False),
}
"""What the backward pass keeps of each layer."""


@dataclasses.dataclass(frozen=True)
class Arch:
    """A decoder's shape. Every number comes from a config.json (`hf`); frozen and hashable, so it can be a static
    argument.

    vocab V, width D, layers, heads N, kv_heads K (divides N), head_dim H (even), mlp F, norm_eps, rope_theta,
    tied: the head is the embedding table. family: the row of `hf.FAMILIES` it came from.
    """

    family: str
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    norm_eps: float
    rope_theta: float
    tied: bool
    init_std: float = 0.02


class _Norm(nnx.Module):
    def __init__(self, arch: Arch):
        self.scale = nnx.Param(jnp.ones((arch.width,)), dims=(None,))
        self.eps = arch.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return _norm(x, self.scale[...], self.eps)


class _Weights(nnx.Module):
    """Named weight arrays, drawn from N(0, init_std²), with their logical dimensions as metadata."""

    def __init__(self, arch: Arch, rngs: nnx.Rngs, **shapes: tuple[tuple[int, ...], tuple[str | None, ...]]):
        for name, (shape, dims) in shapes.items():
            setattr(self, name, nnx.Param(arch.init_std * jax.random.normal(rngs.params(), shape), dims=dims))


class _Layer(nnx.Module):
    """Pre-norm attention and gated MLP, each added to the residual stream."""

    def __init__(self, arch: Arch, rngs: nnx.Rngs):
        d, n, k, h, f = arch.width, arch.heads, arch.kv_heads, arch.head_dim, arch.mlp
        self.attention_norm = _Norm(arch)
        self.attention = _Weights(
            arch,
            rngs,
            query=((d, n, h), ("embed", "heads", None)),
            key=((d, k, h), ("embed", "heads", None)),
            value=((d, k, h), ("embed", "heads", None)),
            out=((n, h, d), ("heads", None, "embed")),
        )
        self.mlp_norm = _Norm(arch)
        self.mlp = _Weights(
            arch,
            rngs,
            gate=((d, f), ("embed", "mlp")),
            up=((d, f), ("embed", "mlp")),
            down=((f, d), ("mlp", "embed")),
        )

    def __call__(self, x_BLD: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Callable) -> tuple[jax.Array, Any]:
        w = self.attention
        y = self.attention_norm(x_BLD)
        q = _rotate(jnp.einsum("bld,dnh->blnh", y, w.query[...]), *rope)
        k = _rotate(jnp.einsum("bld,dkh->blkh", y, w.key[...]), *rope)
        v = jnp.einsum("bld,dkh->blkh", y, w.value[...])
        out, kept = attend(q, k, v)
        x_BLD = x_BLD + jnp.einsum("blnh,nhd->bld", out, w.out[...])
        w = self.mlp
        y = self.mlp_norm(x_BLD)
        return x_BLD + (jax.nn.silu(y @ w.gate[...]) * (y @ w.up[...])) @ w.down[...], kept


class _Decoder(nnx.Module):
    def __init__(self, arch: Arch, rngs: nnx.Rngs):
        table = {"table": ((arch.vocab, arch.width), ("vocab", "embed"))}
        self.embed = _Weights(arch, rngs, **table)
        self.layers = nnx.vmap(lambda r: _Layer(arch, r))(rngs.split(arch.layers))
        self.final_norm = _Norm(arch)
        if not arch.tied:
            self.head = _Weights(arch, rngs, **table)


def init(arch: Arch, key: jax.Array) -> dict:
    """Random float32 weights; call it under `jax.jit(..., out_shardings=...)` so that no whole copy ever exists."""
    return nnx.to_pure_dict(nnx.state(_Decoder(arch, nnx.Rngs(params=key)), nnx.Param))


@functools.cache
def abstract(arch: Arch) -> dict:
    """`init`'s result as ShapeDtypeStructs."""
    return jax.eval_shape(lambda: init(arch, jax.random.key(0)))


@functools.cache
def dims(arch: Arch) -> dict:
    """The logical dimensions of every weight, read off the initialisers: a tree like `abstract`, tuples as leaves."""
    state = nnx.state(nnx.eval_shape(lambda: _Decoder(arch, nnx.Rngs(0))), nnx.Param)
    names = nnx.to_pure_dict(
        jax.tree.map(lambda p: p.get_metadata()["dims"], state, is_leaf=lambda p: isinstance(p, nnx.Variable))
    )
    names["layers"] = jax.tree.map(lambda d: (None, *d), names["layers"], is_leaf=lambda d: isinstance(d, tuple))
    return names


@functools.cache
def _layer_graph(arch: Arch) -> tuple[Any, Any, Any]:
    """Graph definition and abstract state of one layer, and its weights' dimensions without the stack axis."""
    graph, state = nnx.split(nnx.eval_shape(lambda: _Layer(arch, nnx.Rngs(0))))
    names = jax.tree.map(lambda d: d[1:], dims(arch)["layers"], is_leaf=lambda d: isinstance(d, tuple))
    return graph, state, names


def hidden(
    arch: Arch,
    params: dict,
    tokens_BL: jax.Array,
    position_BL: jax.Array,
    attend: Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
    *,
    dtype: Any,
    remat: str = "none",
    placement: Placement = Placement(),
    cache: Any = None,
) -> tuple[jax.Array, Any]:
    """The residual stream after the final norm.

    Args:
        params: float32 weights, cast to `dtype` layer by layer. Weights that were stored in `dtype` give the same bits.
        attend: (q_BLNH, k_BLKH, v_BLKH, the layer's slice of `cache`) → (out_BLNH, what to keep of this layer). The
            caller owns masks and caches; keys arrive rotated.
        dtype: of the matrix products.
        remat: a key of REMAT.
        placement: pins activations and gathered weights to the mesh.
        cache: tree with a leading layer axis, read-only here.

    Returns:
        hidden_BLD in `dtype`, and what `attend` kept, stacked over layers.
    """
    layer_graph, layer_state, layer_dims = _layer_graph(arch)
    rope = _rope(position_BL, arch.head_dim, arch.rope_theta)

    def body(x_BLD: jax.Array, layer: tuple[Any, Any]) -> tuple[jax.Array, Any]:
        weights, cache_slice = layer
        weights = placement.weights(_cast(weights, dtype), layer_dims)
        module = nnx.merge(layer_graph, _with_values(layer_state, weights))
        x_BLD, kept = module(x_BLD, rope, lambda q, k, v: attend(q, k, v, cache_slice))
        return placement.activations(x_BLD), kept

    # In training the table is gathered for the look-up: weights and their gradients cross devices, activations do not.
    table = placement.weights(params["embed"]["table"].astype(dtype), ("vocab", "embed"))
    x_BLD = placement.activations(jnp.take(table, tokens_BL, axis=0))
    x_BLD, kept = jax.lax.scan(REMAT[remat](body), x_BLD, (params["layers"], cache))
    return _norm(x_BLD, params["final_norm"]["scale"].astype(dtype), arch.norm_eps), kept


def head_table(arch: Arch, params: dict) -> jax.Array:
    """[V, D]: logits are hidden · head_tableᵀ."""
    return params["embed" if arch.tied else "head"]["table"]


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda w: w.astype(dtype), tree)


def _with_values(state: Any, values: dict) -> Any:
    state = jax.tree.map(lambda p: p, state)
    nnx.replace_by_pure_dict(state, values)
    return state


def _norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm; statistics in float32."""
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale.astype(jnp.float32)[None, None]).astype(x.dtype)


def _rope(position_BL: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, L, 1, H/2]."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = position_BL[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x_BLNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding on halves (the Hugging Face layout), in float32."""
    a, b = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1).astype(x_BLNH.dtype)
