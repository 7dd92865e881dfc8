"""What a network is, as data: two decoders differ by their `ModelConfig` and by nothing else."""

from dataclasses import dataclass, field
from typing import Literal

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "swigluoai"]
Norms = Literal["pre", "post", "output", "both"]
Positions = Literal["none", "learned", "sinusoidal", "sinusoidal_interleaved", "alibi"]
QKNorm = Literal["none", "head", "heads", "full"]
RopeScaling = Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions of one kind of layer."""

    theta: float = 10_000.0  # base of the wavelengths
    dim: int  # how many of a head's channels turn; the rest pass
    interleaved: bool = False  # pairs are (0,1),(2,3)… (GPT-J) instead of (0,d/2),(1,d/2+1)…
    scaling: RopeScaling = "none"
    factor: float = 1.0  # how much longer than trained
    trained_context: int = 0  # the context before scaling; 0: the config's own
    low_frequency: float = 1.0  # llama3: wavelengths longer than trained/low are divided
    high_frequency: float = 4.0  # llama3: shorter than trained/high are kept
    beta_fast: float = 32.0  # yarn: rotations above which a channel is kept
    beta_slow: float = 1.0  # yarn: rotations below which a channel is divided
    truncate: bool = True  # yarn: round the channels found with the betas
    attention_factor: float = 1.0  # multiplies cos and sin
    short_factors: tuple[float, ...] = ()  # longrope: a divisor a channel, within trained_context
    long_factors: tuple[float, ...] = ()  # longrope: the same, beyond it


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in the place of an MLP."""

    count: int
    per_token: int
    feed_forward: int  # inner width of one expert
    shared_feed_forward: int = 0  # inner width of the expert that every token visits
    shared_gate: bool = False  # the shared expert's output is multiplied by a learned sigmoid
    softmax_first: bool = True  # probabilities over all experts, then top-k; else over the chosen
    renormalise: bool = True  # the chosen probabilities sum to one
    router_bias: bool = False
    bias: bool = False  # biases inside the experts


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that `Decoder` needs to be built. Made by `families.py`, changed by nobody."""

    family: str  # the entry of families.py that made it
    vocabulary: int  # rows of the embedding
    hidden: int  # width of the residual stream
    layers: int
    heads: int  # query heads
    kv_heads: int  # key and value heads; heads must be a multiple
    head_dim: int
    feed_forward: int  # inner width of the MLP
    context: int  # the most positions it was made for

    activation: Activation = "silu"
    activation_limit: float = 0.0  # swigluoai: clamp of gate and up
    gated: bool = True  # down(act(gate(x)) · up(x)) instead of down(act(up(x)))

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    norms: Norms = "pre"  # before a branch, after the sum, on its output, before and on output
    final_norm: bool = True
    embed_norm: bool = False  # BLOOM normalises the embedding
    parallel: bool = False  # attention and MLP read the same residual
    shared_norm: bool = False  # parallel: … and the same norm of it
    qk_norm: QKNorm = "none"  # one weight for all heads, one a head, over all heads at once
    qk_norm_kind: Literal["rms", "layer"] = "rms"
    qk_norm_bias: bool = False

    positions: Positions = "none"
    position_offset: int = 0  # OPT's table begins two rows late
    alibi_scale: float = 1.0  # Falcon divides its slopes with q·k
    ropes: tuple[Rope | None, ...] = ()  # a layer; empty: no layer turns
    windows: tuple[int, ...] = ()  # a layer sees this many last positions, itself included; 0: all
    sinks: bool = False  # a learned logit a head in the softmax's denominator

    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output
    mlp_bias: bool = False
    head_bias: bool = False
    tied: bool = False  # the head is the embedding

    embed_dim: int = 0  # OPT-350m: the embedding is narrower and projected; 0: hidden
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # multiplies what a branch adds
    attention_scale: float = 0.0  # multiplies q·k; 0: head_dim ** -0.5
    attention_softcap: float = 0.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    experts: Experts | None = None
    expert_layers: tuple[bool, ...] = ()  # which layers hold experts; empty: all, if there are any

    eos: tuple[int, ...] = field(default=())  # ids that end a text
    bos: int | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly"
            )
        for name in ("ropes", "windows", "expert_layers"):
            if len(getattr(self, name)) not in (0, self.layers):
                raise ValueError(f"{name} must have one entry for each of {self.layers} layers")

    @property
    def scale(self) -> float:
        return self.attention_scale or self.head_dim**-0.5

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0

    def rope(self, layer: int) -> Rope | None:
        return self.ropes[layer] if self.ropes else None

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and (not self.expert_layers or self.expert_layers[layer])
