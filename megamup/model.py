"""The ``model`` section: which transformer is built. Its traits have defaults by architecture, each of them a key."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megamup.fields import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section

Arch = Literal["gpt", "llama", "bert", "t5"]
TRAITS: dict[str, dict[str, Any]] = {
    "gpt": {"norm": "layer", "positions": "learned", "activation": "gelu", "bias": True, "tie_embeddings": True},
    "llama": {"norm": "rms", "positions": "rotary", "activation": "swiglu", "bias": False, "tie_embeddings": False},
    "bert": {"norm": "layer", "positions": "learned", "activation": "gelu", "bias": True, "tie_embeddings": True}
    | {"norm_place": "after", "token_types": 2},
    "t5": {"norm": "rms", "positions": "relative", "activation": "geglu_tanh", "bias": False, "tie_embeddings": False},
}
GATED = ("swiglu", "geglu", "geglu_tanh")


class RopeScaling(Section):
    """How rotary positions reach beyond the length that a model was trained on."""

    kind: Literal["linear", "ntk", "yarn", "llama3"]
    """``linear``: positions over ``factor`` (Chen et al. 2023); ``ntk``: a larger base (bloc97 2023); ``yarn``: slow
    pairs over ``factor``, fast ones as they are, with a temperature (Peng et al. 2023); ``llama3``: Llama 3.1's."""
    factor: Annotated[float, Field(ge=1)]
    original_max_seq_len: Positive
    """The length that the frequencies were made for."""
    beta_fast: PositiveFloat = 32.0
    """yarn: pairs that turn more often than this within the original length stay as they are."""
    beta_slow: PositiveFloat = 1.0
    """yarn: pairs that turn less often are interpolated wholly."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: as ``beta_slow``."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: as ``beta_fast``."""

    @model_validator(mode="after")
    def check_ends(self) -> RopeScaling:
        if self.kind == "yarn" and self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast={self.beta_fast:g} is no more than beta_slow={self.beta_slow:g}")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor:g} is no more than low_freq_factor={self.low_freq_factor:g}"
            )
        return self


class Moe(Section):
    """Mixture of experts in place of the MLP (Shazeer et al. 2017): each token goes to a few of many MLPs."""

    experts: Annotated[int, Field(ge=2, strict=True)]
    top_k: Positive = 2
    """Experts of a token."""
    shared: NonNegative = 0
    """Experts that every token goes to besides (Dai et al. 2024, DeepSeekMoE)."""
    d_expert: Positive | None = None
    """Inner width of one expert; default ``model.d_ff``. Its growth over the base's is taken to be ``d_ff``'s."""
    every: Positive = 1
    """Every k-th block has experts, the last of each k; the others an MLP."""
    normalize: bool = True
    """The weights of a token's experts sum to one (Mixtral); else they are the router's probabilities."""
    balance: NonNegativeFloat = 0.01
    """Factor on the load-balancing loss, per sequence (Fedus et al. 2021; DeepSeek-AI 2024, equation 17)."""
    router_z: NonNegativeFloat = 0.001
    """Factor on the router's z-loss (Zoph et al. 2022, ST-MoE, equation 5)."""

    @model_validator(mode="after")
    def check_top_k(self) -> Moe:
        if self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} is more than experts={self.experts}")
        if self.top_k == 1 and self.normalize:
            raise ValueError(
                "top_k=1 with normalize=true: the weight of a single expert would be 1 whatever the router says, which "
                "would learn nothing of the loss; set normalize=false"
            )
        return self


class Model(Section):
    arch: Arch
    """``gpt``: learned positions, LayerNorm, GELU, biases, tied. ``llama``: RoPE, RMSNorm, SwiGLU, GQA, untied.
    ``bert``: an encoder, norms after the residual sums, token types. ``t5``: encoder and decoder, relative positions,
    RMSNorm, gated GELU."""
    d_model: Positive
    n_layers: Positive
    """Blocks; of ``t5`` in the encoder."""
    n_heads: Positive
    vocab_size: Positive
    """Rows of the embedding; at least the tokenizer's vocabulary, and divisible by ``parallel.tensor``."""
    max_seq_len: Positive
    """Longest sequence; the number of learned positions."""
    n_decoder_layers: Positive | None = None
    """Blocks of ``t5``'s decoder; default ``n_layers``."""
    n_kv_heads: Positive = None  # type: ignore[assignment]
    """Key and value heads (grouped-query attention; 1: multi-query); default ``n_heads``."""
    d_head: Positive = None  # type: ignore[assignment]
    """Default ``d_model / n_heads``."""
    d_ff: Positive = None  # type: ignore[assignment]
    """Default ``4 d_model``, or, where the activation is gated, ``8/3 d_model`` rounded up to a multiple of 16."""
    tie_embeddings: bool = None  # type: ignore[assignment]
    """Readout shares the token embedding; default true for gpt and bert, false for llama and t5."""
    bias: bool = None  # type: ignore[assignment]
    """Biases of the linear layers and of LayerNorm; default true for gpt and bert."""
    norm: Literal["layer", "rms"] = None  # type: ignore[assignment]
    norm_place: Literal["before", "after"] = "before"
    """Of what a residual branch computes (pre-norm), or after the sum (post-norm); default before, of bert after."""
    norm_eps: PositiveFloat = 1e-5
    positions: Literal["learned", "rotary", "relative", "none"] = None  # type: ignore[assignment]
    """``relative``: T5's learned biases on the attention logits, by distance, shared by a stack's blocks."""
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "swiglu", "geglu", "geglu_tanh"] = None  # type: ignore[assignment]
    """``_tanh``: GELU's approximation (GPT-2's and T5 v1.1's own). ``relu2``: ReLU squared (So et al. 2021)."""
    qk_norm: bool = False
    """RMSNorm with a gain over each query and key head (Dehghani et al. 2023; Qwen 3)."""
    parallel_block: bool = False
    """Attention and MLP read the same norm, and their outputs are added together (Wang & Komatsuzaki 2021, GPT-J)."""
    attention_soft_cap: PositiveFloat | None = None
    """Attention logits become c·tanh(logits/c) (Gemma 2)."""
    logit_soft_cap: PositiveFloat | None = None
    """The readout's likewise."""
    window: Positive | None = None
    """A token sees this many of the latest positions, its own among them (Beltagy et al. 2020)."""
    global_every: Positive | None = None
    """With ``window``: every k-th block, the last of each k, sees all (Gemma 2: 2, Gemma 3: 6)."""
    rope_theta: Annotated[float, Field(gt=1)] = 10_000.0
    rope_scaling: RopeScaling | None = None
    relative_buckets: Annotated[int, Field(ge=4, strict=True)] = 32
    """Distances that relative positions tell apart; far ones share a bucket."""
    relative_distance: Positive = 128
    """Distances from here on are alike."""
    token_types: NonNegative = 0
    """Rows of a second embedding, of which of two texts a token is in; default 2 for bert."""
    pair_head: bool = False
    """bert: a pooled classifier of two texts' order, for ``objective.pairs``."""
    moe: Moe | None = None

    @model_validator(mode="before")
    @classmethod
    def fill_defaults(cls, values: Any) -> Any:
        """Fill what follows from other keys; a missing required key is left for pydantic to name."""
        if not isinstance(values, dict):
            return values
        filled = {key: value for key, value in values.items() if value is not None}
        filled = TRAITS.get(str(filled.get("arch")), {}) | filled
        d_model, n_heads = filled.get("d_model"), filled.get("n_heads")
        if filled.get("arch") == "t5" and "n_layers" in filled:
            filled.setdefault("n_decoder_layers", filled["n_layers"])
        if isinstance(n_heads, int):
            filled.setdefault("n_kv_heads", n_heads)
        if isinstance(d_model, int):
            gated = filled.get("activation") in GATED
            filled.setdefault("d_ff", -(-8 * d_model // 48) * 16 if gated else 4 * d_model)
        if isinstance(d_model, int) and isinstance(n_heads, int) and n_heads > 0 and "d_head" not in filled:
            if d_model % n_heads:
                raise ValueError(f"d_model={d_model} is not divisible by n_heads={n_heads}; change one or set d_head")
            filled["d_head"] = d_model // n_heads
        return filled

    @model_validator(mode="after")
    def check_heads(self) -> Model:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}")
        if self.positions == "rotary" and self.d_head % 2:
            raise ValueError(f"d_head={self.d_head} is odd; rotary positions turn pairs: use an even d_head")
        return self

    @model_validator(mode="after")
    def check_traits(self) -> Model:
        """Keys that would have no effect, or contradict each other."""
        encoder_only = {"token_types": self.token_types, "pair_head": self.pair_head}
        for key, value in encoder_only.items():
            if value and self.arch != "bert":
                raise ValueError(f"{key}={value} has no effect with arch={self.arch}; it is bert's")
        if self.n_decoder_layers is not None and self.arch != "t5":
            raise ValueError(f"n_decoder_layers={self.n_decoder_layers} has no effect with arch={self.arch}")
        if self.pair_head and self.token_types < 2:
            raise ValueError(f"pair_head=true needs two token types, token_types is {self.token_types}")
        if self.rope_theta != 10_000 and self.positions != "rotary":
            raise ValueError(
                f"rope_theta={self.rope_theta:g} has no effect with positions={self.positions}; set positions=rotary"
            )
        if self.rope_scaling and self.positions != "rotary":
            raise ValueError(f"rope_scaling has no effect with positions={self.positions}; set positions=rotary")
        if self.global_every and not self.window:
            raise ValueError(f"global_every={self.global_every} has no effect without window")
        for key in ("relative_buckets", "relative_distance"):
            if self.positions != "relative" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect with positions={self.positions}; set positions=relative")
        if self.window and not self.causal:
            raise ValueError(
                f"window={self.window} counts the latest positions, but an encoder sees later ones too; leave it out "
                f"with arch={self.arch}"
            )
        if self.moe is not None and self.moe.every > max(self.n_layers, self.n_decoder_layers or 0):
            raise ValueError(f"moe.every={self.moe.every} is more than the blocks of a stack: none would have experts")
        if self.positions == "relative" and self.relative_distance <= self.relative_buckets // 2:
            raise ValueError(
                f"relative_distance={self.relative_distance} is within the {self.relative_buckets // 2} distances that "
                f"have one of relative_buckets={self.relative_buckets} each; expected a longer one, or fewer buckets"
            )
        if self.arch == "t5" and (self.norm_place == "after" or self.positions not in ("relative", "none")):
            raise ValueError(
                f"arch=t5 with norm_place={self.norm_place}, positions={self.positions}: expected norm_place=before "
                "and positions=relative or none (cross-attention has no common positions)"
            )
        if self.parallel_block and (self.norm_place == "after" or self.arch == "t5"):
            raise ValueError("parallel_block=true needs norm_place=before, and a stack without cross-attention")
        return self

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    @property
    def causal(self) -> bool:
        """A token sees what came before it; t5's decoder does too."""
        return self.arch in ("gpt", "llama")

    def sees(self, layer: int) -> int | None:
        """The window of block ``layer`` (0-based); None: all."""
        everything = self.global_every is not None and (layer + 1) % self.global_every == 0
        return None if everything else self.window

    def has_experts(self, layer: int) -> bool:
        return self.moe is not None and (layer + 1) % self.moe.every == 0
