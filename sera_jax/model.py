"""One decoder, described by `Arch`. The only room that knows Flax.

Outside, a model is a plain nested dict of arrays with the layers stacked on a leading axis:

    embed.table [V, D] · final_norm · head.table [V, D] unless tied, head.bias [V] · layers.{
        attention_norm, attention.{query [D, N, H], key, value [D, K, H], out [N, H, D], query_bias [N, H], key_bias,
        value_bias [K, H], out_bias [D]}, query_norm, key_norm, mlp_norm, mlp.{gate, up [D, F], down [F, D], gate_bias,
        up_bias [F], down_bias [D]}, attention_post_norm, mlp_post_norm}

where a norm is {scale [D]} or {scale, bias [D]}, and an architecture has the parts that its `Arch` speaks of. A policy
with LoRA has beside these (its base) adapters.{<target>.{a [in.., R], b [R, out..]}, head.{a [D, R], b [V, R]}}, those
of layers stacked; without them the same weights are the base again, which is its reference. A reward model has in the
place of the head score.head [1, D], whose product with a hidden state is a reward.

Letters: B rows, L tokens, D width, N heads, K key/value heads, H head size, F hidden units, V vocabulary, R rank.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from sera_jax import rope
from sera_jax.mesh import Placement

_ONLY_NAMED = jax.checkpoint_policies.save_only_these_names
_NAMED_TO_HOST = jax.checkpoint_policies.save_and_offload_only_these_names
REMAT: dict[str, Callable[..., Callable]] = {
    "none": lambda body, prevent_cse=False: body,
    "dots": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=False
    ),
    "attention": functools.partial(jax.checkpoint, policy=_ONLY_NAMED("attended"), prevent_cse=False),
    "full": functools.partial(jax.checkpoint, prevent_cse=False),
    "host": functools.partial(
        jax.checkpoint,
        policy=_NAMED_TO_HOST(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["input"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
        prevent_cse=False,
    ),
}
"""What the backward pass keeps of each layer: everything; matrix products; its input, and what its attention gave (the
dearest part to compute again in long rows); its input; its input, in the machine's memory."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside frozen weights: W + (α/R)·A·B (Hu et al. 2021, arXiv 2106.09685).

    rank R; alpha α. targets: keys of LINEAR, or "head". dropout: share of what A reads that is dropped, in updates
    alone; the noise is that of a row, so packed and unpacked examples differ under it.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Arch:
    """A decoder's shape. Every number comes from a config.json (`hf`); frozen and hashable, so it can be a static
    argument.

    vocab V, width D, layers, heads N, kv_heads K (divides N), head_dim H (even), mlp F, norm_eps, rope_theta,
    tied: the head is the embedding table. family: the row of `hf.FAMILIES` it came from.

    rotary: dimensions of a head that turn, None = all. rope: a key of rope.ROPES; rope_keys: its own, with values.
    norm, activation, block: keys of NORMS, ACTIVATIONS, BLOCKS. gated: the MLP has a gate.
    biases: names among "attention" (query, key, value), "out", "mlp", "head". qk_norm: queries and keys of each head
    are normalised. windows: how many positions each layer looks back, the token's own included; None in it = all; () =
    all layers all.
    score_scale: of q·k, None = 1/√H. score_cap, logit_cap: c·tanh(x/c) of scores, of logits; None = not.
    scaled_embedding: the embedding is multiplied by √D.
    scored: a reward model: it has a scalar head, and none over the vocabulary.
    lora: the adapters that train in the place of all weights, None = all weights train. Of no config.json.
    unrolled: layers are written out one by one in place of a loop, for those who read compiled programs. Likewise.
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
    rotary: int | None = None
    rope: str = "default"
    rope_keys: tuple[tuple[str, float], ...] = ()
    norm: str = "rms"
    activation: str = "silu"
    block: str = "sequential"
    gated: bool = True
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    score_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    scaled_embedding: bool = False
    scored: bool = False
    lora: Lora | None = None
    unrolled: bool = False


# --- the parts that architectures differ in ---------------------------------------------------------------------------


def _rms(x: jax.Array, weights: Mapping[str, jax.Array], eps: float) -> jax.Array:
    """RMSNorm; statistics in float32."""
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * _along(weights["scale"], x)).astype(x.dtype)


def _rms_plus_one(x: jax.Array, weights: Mapping[str, jax.Array], eps: float) -> jax.Array:
    """RMSNorm whose scale is stored less one (Gemma)."""
    return _rms(x, {"scale": weights["scale"].astype(jnp.float32) + 1}, eps)


def _layer_norm(x: jax.Array, weights: Mapping[str, jax.Array], eps: float) -> jax.Array:
    """LayerNorm; statistics in float32."""
    wide = x.astype(jnp.float32)
    wide -= jnp.mean(wide, axis=-1, keepdims=True)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * _along(weights["scale"], x) + _along(weights["bias"], x)).astype(x.dtype)


def _along(weight: jax.Array, x: jax.Array) -> jax.Array:
    """A vector along the last axis of x, float32."""
    return weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))


NORMS: dict[str, tuple[Callable[[jax.Array, Mapping[str, jax.Array], float], jax.Array], dict[str, float]]] = {
    "rms": (_rms, {"scale": 1.0}),
    "rms_plus_one": (_rms_plus_one, {"scale": 0.0}),
    "layer": (_layer_norm, {"scale": 1.0, "bias": 0.0}),
}
"""Name → (x, weights, ε) → x, and its weights with their first values."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
"""hidden_act of config.json."""


def _sequential(layer: Any, x: jax.Array, attend: Callable, mlp: Callable) -> tuple[jax.Array, Any]:
    out, kept = attend(layer.attention_norm(x))
    x = x + out
    return x + mlp(layer.mlp_norm(x)), kept


def _sandwich(layer: Any, x: jax.Array, attend: Callable, mlp: Callable) -> tuple[jax.Array, Any]:
    out, kept = attend(layer.attention_norm(x))
    x = x + layer.attention_post_norm(out)
    return x + layer.mlp_post_norm(mlp(layer.mlp_norm(x))), kept


def _parallel(layer: Any, x: jax.Array, attend: Callable, mlp: Callable) -> tuple[jax.Array, Any]:
    out, kept = attend(layer.attention_norm(x))
    return x + out + mlp(layer.mlp_norm(x)), kept


def _parallel_shared(layer: Any, x: jax.Array, attend: Callable, mlp: Callable) -> tuple[jax.Array, Any]:
    normal = layer.attention_norm(x)
    out, kept = attend(normal)
    return x + out + mlp(normal), kept


BLOCKS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "sequential": (_sequential, ("attention_norm", "mlp_norm")),
    "sandwich": (_sandwich, ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")),
    "parallel": (_parallel, ("attention_norm", "mlp_norm")),
    "parallel_shared": (_parallel_shared, ("attention_norm",)),
}
"""How a layer joins attention and MLP to the residual stream, and the norms that it has: Llama, Gemma 2, NeoX, Phi."""


# --- the modules ------------------------------------------------------------------------------------------------------


class _Norm(nnx.Module):
    def __init__(self, arch: Arch, size: int):
        for name, first in NORMS[arch.norm][1].items():
            setattr(self, name, nnx.Param(jnp.full((size,), first, jnp.float32), dims=(None,)))
        self.kind, self.eps = arch.norm, arch.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        run, names = NORMS[self.kind]
        return run(x, {name: getattr(self, name)[...] for name in names}, self.eps)


class _Weights(nnx.Module):
    """Named weight arrays with their logical dimensions as metadata: matrices from N(0, init_std²), biases zero."""

    def __init__(self, arch: Arch, rngs: nnx.Rngs, **shapes: tuple[tuple[int, ...], tuple[str | None, ...]]):
        for name, (shape, dims) in shapes.items():
            bias = name.endswith("bias")
            first = jnp.zeros(shape) if bias else arch.init_std * jax.random.normal(rngs.params(), shape)
            setattr(self, name, nnx.Param(first, dims=dims))


class _Layer(nnx.Module):
    """Attention and MLP, joined to the residual stream as arch.block says."""

    def __init__(self, arch: Arch, rngs: nnx.Rngs):
        d, n, k, h, f = arch.width, arch.heads, arch.kv_heads, arch.head_dim, arch.mlp
        self.arch = arch
        for name in BLOCKS[arch.block][1]:
            setattr(self, name, _Norm(arch, d))
        shapes = {
            "query": ((d, n, h), ("embed", "heads", None)),
            "key": ((d, k, h), ("embed", "heads", None)),
            "value": ((d, k, h), ("embed", "heads", None)),
            "out": ((n, h, d), ("heads", None, "embed")),
        }
        if "attention" in arch.biases:
            shapes["query_bias"] = ((n, h), ("heads", None))
            shapes["key_bias"] = shapes["value_bias"] = ((k, h), ("heads", None))
        if "out" in arch.biases:
            shapes["out_bias"] = ((d,), (None,))
        self.attention = _Weights(arch, rngs, **shapes)
        if arch.qk_norm:
            self.query_norm, self.key_norm = _Norm(arch, h), _Norm(arch, h)
        into = ("gate", "up") if arch.gated else ("up",)
        shapes = {name: ((d, f), ("embed", "mlp")) for name in into} | {"down": ((f, d), ("mlp", "embed"))}
        if "mlp" in arch.biases:
            shapes |= {f"{name}_bias": ((f,), ("mlp",)) for name in into} | {"down_bias": ((d,), (None,))}
        self.mlp = _Weights(arch, rngs, **shapes)

    def __call__(
        self, x_BLD: jax.Array, turns: tuple[jax.Array, jax.Array], attend: Callable, adapted: Callable
    ) -> tuple[jax.Array, Any]:
        """adapted: (target, what the linear layer reads) → what its adapter adds, None where it has none."""
        return BLOCKS[self.arch.block][0](
            self,
            x_BLD,
            lambda y: self.attended(y, turns, attend, adapted),
            lambda y: self.fed_forward(y, adapted),
        )

    def attended(
        self, y: jax.Array, turns: tuple[jax.Array, jax.Array], attend: Callable, adapted: Callable
    ) -> tuple[jax.Array, Any]:
        linear = functools.partial(_linear, self.attention, adapted)
        q, k, v = linear("query", y), linear("key", y), linear("value", y)
        if self.arch.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        out, kept = attend(rope.rotate(q, *turns), rope.rotate(k, *turns), v)
        return linear("out", checkpoint_name(out, "attended")), kept

    def fed_forward(self, y: jax.Array, adapted: Callable) -> jax.Array:
        linear, act = functools.partial(_linear, self.mlp, adapted), ACTIVATIONS[self.arch.activation]
        up = linear("up", y)
        return linear("down", act(linear("gate", y)) * up if self.arch.gated else act(up))


LINEAR: dict[str, tuple[str, int]] = {
    "query": ("attention", 1),
    "key": ("attention", 1),
    "value": ("attention", 1),
    "out": ("attention", 2),
    "gate": ("mlp", 1),
    "up": ("mlp", 1),
    "down": ("mlp", 1),
}
"""The linear layers of a layer: their part of it, and how many leading axes of the weight the input has."""


def _linear(weights: nnx.Module, adapted: Callable, name: str, x: jax.Array) -> jax.Array:
    """x times a weight, plus what an adapter adds, plus the bias, where there are any."""
    out = jnp.tensordot(x, getattr(weights, name)[...], LINEAR[name][1])
    more, bias = adapted(name, x), getattr(weights, f"{name}_bias", None)
    out = out if more is None else out + more
    return out if bias is None else out + bias[...].reshape((1,) * (out.ndim - bias[...].ndim) + bias[...].shape)


class _Decoder(nnx.Module):
    def __init__(self, arch: Arch, rngs: nnx.Rngs):
        table = {"table": ((arch.vocab, arch.width), ("vocab", "embed"))}
        bias = {"bias": ((arch.vocab,), ("vocab",))} if "head" in arch.biases else {}
        self.embed = _Weights(arch, rngs, **table)
        self.layers = nnx.vmap(lambda r: _Layer(arch, r))(rngs.split(arch.layers))
        self.final_norm = _Norm(arch, arch.width)
        if arch.scored:
            self.score = _Weights(arch, rngs, head=((1, arch.width), (None, None)))
        elif bias or not arch.tied:
            self.head = _Weights(arch, rngs, **({} if arch.tied else table), **bias)


def init(arch: Arch, key: jax.Array) -> dict:
    """Random float32 weights; call it under `jax.jit(..., out_shardings=...)` so that no whole copy ever exists."""
    return nnx.to_pure_dict(nnx.state(_Decoder(arch, nnx.Rngs(params=key)), nnx.Param))


def with_score(params: dict, head_1D: jax.Array) -> dict:
    """A policy's weights as those of a reward model with this head."""
    return {**{name: part for name, part in params.items() if name != "head"}, "score": {"head": head_1D}}


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


# --- adapters ---------------------------------------------------------------------------------------------------------

SCORE = "score"  # among the adapters: what is added to a reward model's scalar head


def targeted(arch: Arch, lora: Lora) -> Lora:
    """Adapters for an architecture: no targets become all linear layers but the head.

    Raises:
        ValueError: a target that the architecture does not have.
    """
    layers = tuple(name for name, (part, _) in LINEAR.items() if name in abstract(arch)["layers"][part])
    known = (*layers, "head") if not arch.tied else layers
    for target in lora.targets:
        if target not in known:
            tied = " (its head is the embedding table)" if target == "head" else ""
            raise ValueError(
                f"lora.targets names {target!r}, which this {arch.family} does not have{tied}; expected some of "
                f"{', '.join(known)}."
            )
    return dataclasses.replace(lora, targets=lora.targets or layers)


@functools.cache
def _adapter_parts(arch: Arch) -> dict[str, tuple[tuple, tuple, tuple, tuple]]:
    """Of every adapter: shape and logical dimensions of A, shape and logical dimensions of B."""
    lora, shapes, names = arch.lora, abstract(arch)["layers"], dims(arch)["layers"]
    parts = {}
    for target in lora.targets:
        if target == "head":
            parts[target] = (arch.width, lora.rank), (None, None), (arch.vocab, lora.rank), ("vocab", None)
            continue
        part, inputs = LINEAR[target]
        shape, name, cut = shapes[part][target].shape, names[part][target], 1 + inputs
        a, b = (*shape[:cut], lora.rank), (shape[0], lora.rank, *shape[cut:])
        parts[target] = a, (*name[:cut], None), b, (None, None, *name[cut:])
    return parts


def init_adapters(arch: Arch, key: jax.Array) -> dict:
    """float32 adapters that add nothing yet: A from U(-1/√in, 1/√in) as in PEFT, B zero. Of a reward model also what is
    added to its scalar head, which trains whole: it is a row, and may be new."""
    keys = jax.random.split(key, len(arch.lora.targets))
    made = {SCORE: {"plus": jnp.zeros((1, arch.width))}} if arch.scored else {}
    for one, (target, (a, _, b, _)) in zip(keys, _adapter_parts(arch).items()):
        bound = math.prod(a[(target != "head") : -1]) ** -0.5
        made[target] = {"a": jax.random.uniform(one, a, minval=-bound, maxval=bound), "b": jnp.zeros(b)}
    return made


@functools.cache
def trainable(arch: Arch) -> tuple[dict, dict]:
    """What trains, as ShapeDtypeStructs, and its logical dimensions: all weights, or the adapters."""
    if arch.lora is None:
        return abstract(arch), dims(arch)
    parts = _adapter_parts(arch)
    names = {target: {"a": a, "b": b} for target, (_, a, _, b) in parts.items()}
    if arch.scored:
        names[SCORE] = {"plus": (None, None)}
    return jax.eval_shape(lambda: init_adapters(arch, jax.random.key(0))), names


def join(arch: Arch, trained: dict, frozen: dict) -> dict:
    """The whole policy, of what trains and what does not ({} without LoRA)."""
    return trained if arch.lora is None else {**frozen, "adapters": trained}


def split(arch: Arch, params: dict) -> tuple[dict, dict]:
    """The inverse of `join`."""
    if arch.lora is None:
        return params, {}
    return params["adapters"], {name: part for name, part in params.items() if name != "adapters"}


def merged(arch: Arch, params: dict) -> dict:
    """The same policy without adapters: W + (α/R)·A·B, added in float32."""
    trained, base = split(arch, params) if "adapters" in params else ({}, params)
    if not trained:
        return base
    scale, layers = arch.lora.alpha / arch.lora.rank, dict(base["layers"])

    def plus(weight: jax.Array, low_rank: jax.Array) -> jax.Array:
        return weight.astype(jnp.float32) + scale * low_rank.reshape(weight.shape)

    for target, low in jax.tree.map(lambda w: w.astype(jnp.float32), trained).items():
        if target == SCORE:
            base = {**base, "score": {"head": base["score"]["head"].astype(jnp.float32) + low["plus"]}}
            continue
        if target == "head":
            base = {**base, "head": {**base["head"], "table": plus(base["head"]["table"], low["b"] @ low["a"].T)}}
            continue
        part, count = LINEAR[target][0], arch.layers
        a, b = low["a"].reshape(count, -1, arch.lora.rank), low["b"].reshape(count, arch.lora.rank, -1)
        layers[part] = {**layers[part], target: plus(layers[part][target], a @ b)}
    return {**base, "layers": layers}


def _adapter(lora: Lora, low: dict, name: str, x: jax.Array, key: jax.Array | None) -> jax.Array:
    """(α/R)·x·A·B; with a key, of an x that has lost its share of entries."""
    if key is not None and lora.dropout:
        kept = jax.random.bernoulli(jax.random.fold_in(key, lora.targets.index(name)), 1 - lora.dropout, x.shape)
        x = jnp.where(kept, x / (1 - lora.dropout), 0).astype(x.dtype)
    return jnp.tensordot(jnp.tensordot(x, low["a"], low["a"].ndim - 1), low["b"], 1) * (lora.alpha / lora.rank)


# --- running it -------------------------------------------------------------------------------------------------------


def hidden(
    arch: Arch,
    params: dict,
    tokens_BL: jax.Array,
    position_BL: jax.Array,
    attend: Callable[[jax.Array, jax.Array, jax.Array, Any, jax.Array | None], tuple[jax.Array, Any]],
    *,
    longest: int,
    dtype: Any,
    remat: str = "none",
    placement: Placement = Placement(),
    cache: Any = None,
    key: jax.Array | None = None,
    turns: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, Any]:
    """The residual stream after the final norm.

    Args:
        params: weights, those that train float32, cast to `dtype` layer by layer. Weights that were stored in `dtype`
            give the same bits.
        attend: (q_BLNH, k_BLKH, v_BLKH, the layer's slice of `cache`, the layer's window) → (out_BLNH, what to keep of
            this layer). The caller owns masks and caches; keys arrive rotated. The window is an int32 scalar: how many
            positions back to look, the token itself included; None where no layer looks at less than everything.
        longest: more than every position; windows that are no shorter are left out.
        dtype: of the matrix products.
        remat: a key of REMAT.
        placement: pins activations and gathered weights to the mesh.
        cache: tree with a leading layer axis, or a list of each layer's; read-only here. Where params["layers"] is such
            a list (`unstacked`), layers are written out one by one, and what `attend` kept comes as a list too.
        key: of the adapters' dropout; None = none is dropped.
        turns: `turns_of` the positions, where the caller has them.

    Returns:
        hidden_BLD in `dtype`, and what `attend` kept, stacked over layers.
    """
    layer_graph, layer_state, layer_dims = _layer_graph(arch)
    turns = turns_of(arch, position_BL) if turns is None else turns

    adapters = {target: low for target, low in params.get("adapters", {}).items() if target in LINEAR}
    adapter_dims = {t: {n: d[1:] for n, d in trainable(arch)[1][t].items()} for t in adapters}
    keys = jax.random.split(key, arch.layers) if adapters and key is not None and arch.lora.dropout else None

    def body(x_BLD: jax.Array, layer: tuple[Any, ...]) -> tuple[jax.Array, Any]:
        weights, low, cache_slice, window, layer_key, index = layer
        x_BLD = checkpoint_name(x_BLD, "input")
        weights = placement.weights(_cast_here(weights, dtype, index), layer_dims)
        low = placement.weights(_cast(low, dtype), adapter_dims)

        def adapted(name: str, y: jax.Array) -> jax.Array | None:
            return _adapter(arch.lora, low[name], name, y, layer_key) if name in low else None

        module = nnx.merge(layer_graph, _with_values(layer_state, weights))
        x_BLD, kept = module(x_BLD, turns, lambda q, k, v: attend(q, k, v, cache_slice, window), adapted)
        return placement.activations(x_BLD), kept

    x_BLD = placement.activations(placement.looked_up(params["embed"]["table"], tokens_BL, dtype))
    if arch.scaled_embedding:
        x_BLD = x_BLD * jnp.asarray(arch.width**0.5, dtype)
    stacked = (params["layers"], adapters, cache, _windows(arch, longest), keys, np.arange(arch.layers))
    # In a loop nothing is shared between the passes over a layer; without one, it has to be forbidden.
    body = REMAT[remat](body, prevent_cse=arch.unrolled)
    if isinstance(params["layers"], list):
        kept = []
        for parts in zip(*(unstacked(arch, part) for part in stacked)):
            x_BLD, its = body(x_BLD, parts)
            kept.append(its)
    else:
        x_BLD, kept = jax.lax.scan(body, x_BLD, stacked, unroll=arch.layers if arch.unrolled else 1)
    return NORMS[arch.norm][0](x_BLD, _cast(params["final_norm"], dtype), arch.norm_eps), kept


def unstacked(arch: Arch, tree: Any) -> list:
    """Each layer's part of a tree with a leading layer axis; a list is one already."""
    if isinstance(tree, list):
        return tree
    leaves, kind = jax.tree.flatten(tree)
    return [kind.unflatten([leaf[i] for leaf in leaves]) for i in range(arch.layers)]


def turns_of(arch: Arch, position_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of positions, as in `rope.turns`."""
    return rope.turns(position_BL, arch.rotary or arch.head_dim, arch.rope_theta, arch.rope, dict(arch.rope_keys))


def _windows(arch: Arch, longest: int) -> np.ndarray | None:
    """int32 [layers], None where every layer sees everything."""
    windows = [longest if window is None else window for window in arch.windows]
    return np.array(windows, np.int32) if any(window < longest for window in windows) else None


def head_table(arch: Arch, params: dict) -> jax.Array:
    """[V, D], without an adapter."""
    return params["embed" if arch.tied else "head"]["table"]


def head(
    arch: Arch, params: dict, hidden: jax.Array, dtype: Any, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Hidden states [..., D'] in `dtype` and table [V, D']: logits are hidden · tableᵀ (+ head_bias), capped by
    arch.logit_cap. D' is D, and R more where the head has an adapter: h·Wᵀ + s·(h·A)·Bᵀ = [h, s·h·A]·[W, B]ᵀ, with the
    table in `dtype`; else it comes as it is stored, so that its gradient need not be rounded.

    key: as in `hidden`.
    """
    table = head_table(arch, params)
    low = params.get("adapters", {}).get("head")
    if low is None:
        return hidden, table
    low = _cast(low, dtype)
    more = _adapter(arch.lora, {"a": low["a"], "b": jnp.eye(arch.lora.rank, dtype=dtype)}, "head", hidden, key)
    return jnp.concatenate((hidden, more), axis=-1), jnp.concatenate((table.astype(dtype), low["b"]), axis=-1)


def head_bias(arch: Arch, params: dict) -> jax.Array | None:
    """[V], or None where the head has none."""
    return params["head"]["bias"] if "head" in arch.biases else None


def logits(arch: Arch, params: dict, hidden: jax.Array, dtype: Any) -> jax.Array:
    """float32 [..., V] of hidden states [..., D]; `score` has its own form of this, which keeps no logits."""
    hidden, table = head(arch, params, hidden, dtype)
    out = jnp.einsum("...d,vd->...v", hidden, table.astype(dtype), preferred_element_type=jnp.float32)
    bias = head_bias(arch, params)
    if bias is not None:
        out += _along(bias.astype(dtype), out)
    return capped(out, arch.logit_cap)


def reward(params: dict, hidden: jax.Array) -> jax.Array:
    """float32 [...] of hidden states [..., D]: their product with the scalar head, in float32 on every device."""
    head_D = params["score"]["head"][0].astype(jnp.float32)
    if SCORE in params.get("adapters", {}):
        head_D += params["adapters"][SCORE]["plus"][0]
    return jnp.sum(hidden.astype(jnp.float32) * _along(head_D, hidden), axis=-1)


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """cap·tanh(x/cap), x where there is none."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda w: w.astype(dtype), tree)


def _cast_here(tree: Any, dtype: Any, index: jax.Array) -> Any:
    """`_cast` within the loop over layers. XLA would cast the weights of all layers before the loop and keep them, half
    as much memory again as the weights take; a factor of one that it cannot see through holds it off (a barrier does
    not).

    index: of the layer.
    """
    one = (jnp.minimum(index, 0) + 1).astype(jnp.float32)
    return jax.tree.map(lambda w: w if w.dtype == dtype else (w * one.astype(w.dtype)).astype(dtype), tree)


def _with_values(state: Any, values: dict) -> Any:
    state = jax.tree.map(lambda p: p, state)
    nnx.replace_by_pure_dict(state, values)
    return state
