"""The network: embed, layers, norm, head. One decoder for every family; the difference is data.

Shapes: tokens of all rows lie one after another, [tokens, hidden]; a step needs no padding.
`see(place, layer, value) -> value` lets `watch` look at, or replace, what passes a named place:

    embedding   what the first layer reads            query, key, value   before positions
    residual    the stream after a layer              attention           what heads found
    neurons     input of an MLP's down projection     attended, fed       what a branch adds
    normed      input of the head                     experts             the experts chosen
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from kernels.activation import activate, gate
from kernels.attention import attention, dense_attention
from kernels.experts import experts
from kernels.linear import Weight, linear
from kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from kernels.pages import rotate, store
from model.cache import Cache, Rows
from model.config import ModelConfig, Rope
from model.positions import alibi_slopes, rope_table, sinusoid_table

Watch = Callable[[str, int, Tensor], Tensor]
# All layers and the norm after them in one call, where `pack.py` has one
Whole = Callable[[Tensor, Rows, Cache], Tensor]


def _pass(_place: str, _layer: int, value: Tensor) -> Tensor:
    return value


class Linear(nn.Module):
    """y = x Wᵀ + b. `model/quantize.py` may put a smaller format in the weight's place."""

    weight: Weight

    def __init__(self, inner: int, out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, inner))
        self.bias = nn.Parameter(torch.empty(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """RMS or layer norm; its weights stay in float32, where Gemma's 1 + w is exact."""

    def __init__(
        self, config: ModelConfig, *shape: int, kind: str = "", bias: bool = False
    ) -> None:
        super().__init__()
        self.eps, self.rms = config.norm_eps, (kind or config.norm) == "rms"
        self.weight = nn.Parameter(torch.empty(*shape, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(*shape, dtype=torch.float32)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.ndim > 1:  # one weight a head, [heads, dim]
            ones = torch.ones_like(self.weight[0])
            plain = rms_norm(x, ones, self.eps) if self.rms else layer_norm(x, ones, None, self.eps)
            return plain * self.weight.to(x.dtype)
        if self.rms:
            return rms_norm(x, self.weight, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, added: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stream with what the last branch adds, normed and as it is."""
        if added is None:
            return self(x), x
        if self.rms:
            return add_rms_norm(added, x, self.weight, self.eps)
        return add_layer_norm(added, x, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
        self.config, self.index = config, index
        self.rope = config.rope(index)
        self.shares = (heads * dim, kv_heads * dim, kv_heads * dim)
        self.qkv = Linear(config.hidden, sum(self.shares), config.qkv_bias)
        self.out = Linear(heads * dim, config.hidden, config.out_bias)
        self.sinks = nn.Parameter(torch.empty(heads)) if config.sinks else None
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            shapes: dict[str, Callable[[int], tuple[int, ...]]] = {
                "head": lambda _: (dim,),
                "heads": lambda count: (count, dim),
                "full": lambda count: (count * dim,),
            }
            kind, bias = config.qk_norm_kind, config.qk_norm_bias
            shape = shapes[config.qk_norm]
            self.q_norm = Norm(config, *shape(heads), kind=kind, bias=bias)
            self.k_norm = Norm(config, *shape(kv_heads), kind=kind, bias=bias)
        # The one kind that `store` norms itself, on the way to the pages.
        self.fused = config.qk_norm == "head" and config.qk_norm_kind == "rms"

    def forward(
        self, x: Tensor, rows: Rows, cache: Cache | None, place: "Places", see: Watch
    ) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]"""
        query, key, value = (
            see(name, self.index, part.unflatten(-1, (-1, self.config.head_dim)))
            for name, part in zip(("query", "key", "value"), self.qkv(x).split(self.shares, -1))
        )
        if self.q_norm is not None and self.k_norm is not None and not (self.fused and cache):
            query, key = self._norm(self.q_norm, query), self._norm(self.k_norm, key)
        attend = self._within if cache is None else partial(self._paged, cache)
        found = see("attention", self.index, attend(query, key, value, rows, place))
        return self.out(found.flatten(1))

    def _within(
        self, query: Tensor, key: Tensor, value: Tensor, rows: Rows, place: "Places"
    ) -> Tensor:
        """Attention over this step's own tokens: training and explanations, with gradients."""
        config = self.config
        if self.rope is not None:
            table, turned = place.table(self.rope), self.rope.interleaved
            query = rotate(query, table, rows.positions, turned)
            key = rotate(key, table, rows.positions, turned)
        return dense_attention(
            query,
            key,
            value,
            starts=rows.starts,
            scale=config.scale,
            window=config.window(self.index),
            softcap=config.attention_softcap,
            sinks=self.sinks,
            slopes=place.slopes,
        )

    def _paged(
        self, cache: Cache, query: Tensor, key: Tensor, value: Tensor, rows: Rows, place: "Places"
    ) -> Tensor:
        """Attention over pages, after this step's keys and values are written there."""
        config, rope = self.config, self.rope
        keys, values = cache.layer(self.index)
        scales = cache.layer_scales(self.index)
        query = store(
            query,
            key,
            value,
            keys,
            values,
            rows.slots,
            table=None if rope is None else place.table(rope),
            at=rows.positions,
            interleaved=rope is not None and rope.interleaved,
            query_norm=self.q_norm.weight if self.fused and self.q_norm else None,
            key_norm=self.k_norm.weight if self.fused and self.k_norm else None,
            eps=config.norm_eps,
            **scales,
        )
        return attention(
            query,
            keys,
            values,
            starts=rows.starts,
            lengths=rows.lengths,
            page_table=rows.page_table,
            scale=config.scale,
            longest_query=rows.longest_query,
            longest_context=rows.longest_context,
            window=config.window(self.index),
            softcap=config.attention_softcap,
            sinks=self.sinks,
            slopes=place.slopes,
            shared=rows.shared,
            **scales,
        )

    def _norm(self, norm: Norm, x: Tensor) -> Tensor:
        return norm(x.flatten(1)).view_as(x) if self.config.qk_norm == "full" else norm(x)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, index: int, width: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.up = Linear(config.hidden, width * (1 + config.gated), config.mlp_bias)
        self.down = Linear(width, config.hidden, config.mlp_bias)

    def forward(self, x: Tensor, see: Watch) -> Tensor:
        config = self.config
        x = self.up(x)
        if config.gated:
            x = gate(x, config.activation, config.activation_limit)
        else:
            x = activate(x, config.activation)
        return self.down(see("neurons", self.index, x))


class Experts(nn.Module):
    """Each token is fed to the few experts that its router likes best, and to the shared one."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        kind = config.experts
        assert kind is not None
        self.config, self.kind, self.index = config, kind, index
        width, hidden = kind.feed_forward, config.hidden
        self.router = Linear(hidden, kind.count, kind.router_bias)
        self.up = nn.Parameter(torch.empty(kind.count, 2 * width, hidden))
        self.down = nn.Parameter(torch.empty(kind.count, hidden, width))
        self.up_bias = nn.Parameter(torch.empty(kind.count, 2 * width)) if kind.bias else None
        self.down_bias = nn.Parameter(torch.empty(kind.count, hidden)) if kind.bias else None
        shared = kind.shared_feed_forward
        self.shared = MLP(config, index, shared) if shared else None
        self.shared_gate = Linear(hidden, 1, False) if kind.shared_gate else None

    def forward(self, x: Tensor, see: Watch) -> Tensor:
        kind, config = self.kind, self.config
        liking = self.router(x).float()
        if kind.softmax_first:
            best, chosen = liking.softmax(-1).topk(kind.per_token)
            shares = best / best.sum(-1, keepdim=True) if kind.renormalise else best
        else:
            best, chosen = liking.topk(kind.per_token)
            shares = best.softmax(-1)
        chosen = see("experts", self.index, chosen)
        found = experts(
            x,
            chosen,
            shares,
            self.up,
            self.down,
            self.up_bias,
            self.down_bias,
            config.activation,
            config.activation_limit,
        )
        if self.shared is None:
            return found
        common = self.shared(x, see)
        if self.shared_gate is not None:
            common = common * self.shared_gate(x).sigmoid()
        return found + common


class Layer(nn.Module):
    """Attention and MLP, each a branch off the residual stream.

    A branch's output is handed on unadded, because adding it and norming the sum is one kernel.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.attention = Attention(config, index)
        self.mlp = (
            Experts(config, index)
            if config.has_experts(index)
            else MLP(config, index, config.feed_forward)
        )

        def norm() -> Norm:
            return Norm(config, config.hidden, bias=config.norm_bias)

        before, after = config.norms != "output", config.norms in ("output", "both")
        self.attention_norm = norm() if before else None
        self.mlp_norm = norm() if before and not config.shared_norm else None
        self.attention_out_norm = norm() if after else None
        self.mlp_out_norm = norm() if after else None

    def forward(
        self,
        x: Tensor,
        added: Tensor | None,
        rows: Rows,
        cache: Cache | None,
        place: "Places",
        see: Watch,
    ) -> tuple[Tensor, Tensor | None]:
        config = self.config
        if config.norms == "post":
            return self._post(x, rows, cache, place, see), None
        h, x = self._before(self.attention_norm, added, x)
        found = self._after(
            "attended", self.attention_out_norm, see, self.attention(h, rows, cache, place, see)
        )
        if config.parallel:
            h = h if self.mlp_norm is None else self.mlp_norm(x)
        else:
            h, x = self._before(self.mlp_norm, found, x)
        fed = self._after("fed", self.mlp_out_norm, see, self.mlp(h, see))
        return x, found + fed if config.parallel else fed

    def _before(self, norm: Norm | None, added: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        if norm is not None:
            return norm.add(added, x)
        x = x if added is None else x + added
        return x, x

    def _after(self, place: str, norm: Norm | None, see: Watch, x: Tensor) -> Tensor:
        x = x if norm is None else norm(x)
        scale = self.config.residual_scale
        return see(place, self.index, x if scale == 1 else x * scale)

    def _post(
        self, x: Tensor, rows: Rows, cache: Cache | None, place: "Places", see: Watch
    ) -> Tensor:
        """The first transformers: the sum itself is normed."""
        assert self.attention_norm is not None
        assert self.mlp_norm is not None
        found = self._after("attended", None, see, self.attention(x, rows, cache, place, see))
        x = self.attention_norm(x + found)
        return self.mlp_norm(x + self._after("fed", None, see, self.mlp(x, see)))


class Places(nn.Module):
    """What the kinds of positions need: a table per kind of rotation, or slopes."""

    slopes: Tensor | None

    def __init__(self, config: ModelConfig, context: int) -> None:
        super().__init__()
        self.kinds = list(dict.fromkeys(rope for rope in config.ropes if rope is not None))
        for number, rope in enumerate(self.kinds):
            self.register_buffer(f"rope{number}", rope_table(rope, context), persistent=False)
        slopes = None
        if config.positions == "alibi":
            slopes = alibi_slopes(config.heads) * config.alibi_scale
        self.register_buffer("slopes", slopes, persistent=False)

    def table(self, rope: Rope) -> Tensor:
        return self.get_buffer(f"rope{self.kinds.index(rope)}")


class Decoder(nn.Module):
    waves: Tensor | None

    def __init__(self, config: ModelConfig, context: int = 0) -> None:
        """`context` is the longest text that will be served; the model's own by default."""
        super().__init__()
        self.config = config
        context = context or config.context
        width = config.embed_dim or config.hidden
        self.embed: nn.Module = nn.Embedding(config.vocabulary, width)
        self.project_in = Linear(width, config.hidden, False) if config.embed_dim else None
        self.project_out = Linear(config.hidden, width, False) if config.embed_dim else None
        size = config.context + config.position_offset
        waves = None
        if config.positions.startswith("sinusoidal"):
            interleaved = config.positions == "sinusoidal_interleaved"
            waves = sinusoid_table(size, config.hidden, interleaved)
        self.positions = (
            nn.Embedding(size, config.hidden) if config.positions == "learned" else None
        )
        self.register_buffer("waves", waves, persistent=False)

        def norm() -> Norm:
            return Norm(config, config.hidden, bias=config.norm_bias)

        self.embed_norm = norm() if config.embed_norm else None
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.layers))
        self.norm = norm() if config.final_norm else None
        self.head: nn.Module | None = None  # tied: the embedding's own weight
        if not config.tied:
            self.head = Linear(width, config.vocabulary, config.head_bias)
        self.place = Places(config, context)
        self.whole: Whole | None = None

    def forward(
        self, tokens: Tensor, rows: Rows, cache: Cache | None = None, watch: Watch | None = None
    ) -> Tensor:
        """tokens [tokens] -> what the head reads, [tokens, hidden]"""
        see = watch or _pass
        x = see("embedding", -1, self._embed(tokens, rows.positions))
        if self.whole is not None and watch is None and cache is not None and cache.scales is None:
            return self.whole(x, rows, cache)
        added: Tensor | None = None
        for index, layer in enumerate(self.layers):
            x, added = layer(x, added, rows, cache, self.place, see)
            if watch is not None:
                x, added = watch("residual", index, x if added is None else x + added), None
        if self.norm is not None:
            x, _ = self.norm.add(added, x)
        elif added is not None:
            x = x + added
        return see("normed", -1, x)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        config = self.config
        x = self.embed(tokens)
        if self.project_in is not None:
            x = self.project_in(x)
        if config.embed_scale != 1:  # rounded first, as the reference implementations do
            x = x * float(torch.tensor(config.embed_scale, dtype=x.dtype))
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if self.positions is not None:
            x = x + self.positions(positions + config.position_offset)
        elif self.waves is not None:
            x = x + self.waves[positions + config.position_offset].to(x.dtype)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocabulary] float32"""
        config = self.config
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        if self.head is None:
            logits = linear(hidden, self.embed.get_parameter("weight")).float()
        else:
            logits = self.head(hidden).float()
        if config.logit_scale != 1:
            logits = logits * config.logit_scale
        if config.logit_softcap:
            logits = torch.tanh(logits / config.logit_softcap) * config.logit_softcap
        return logits
