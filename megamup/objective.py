"""The ``objective`` section: what a model learns to predict, and the lengths and special ids that follow from it.

What becomes of token shards is in megamup/data/objectives/; a plan needs the lengths only, so they stand here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megamup.fields import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section

Kind = Literal["causal", "mlm", "span_corruption", "prefix", "ul2"]
KINDS: dict[str, tuple[Kind, ...]] = {
    "gpt": ("causal", "prefix"),
    "llama": ("causal", "prefix"),
    "bert": ("mlm",),
    "t5": ("span_corruption", "prefix", "ul2"),
}
"""What each architecture can learn; the first is its default."""
USED_BY: dict[str, tuple[Kind, ...]] = {
    **dict.fromkeys(("mask_share", "replace", "ngram", "whole_word", "mask_id", "cls_id", "sep_id", "pairs"), ("mlm",)),
    **dict.fromkeys(("noise_density", "mean_span"), ("span_corruption",)),
    **dict.fromkeys(("sentinels", "first_sentinel"), ("span_corruption", "ul2")),
    **dict.fromkeys(("start_id", "decoder_len"), ("span_corruption", "prefix", "ul2")),
    "prefix_share": ("prefix",),
    "denoisers": ("ul2",),
}
"""Key -> the kinds that it has a say in; the others have no effect anywhere else."""
T5_SENTINELS = 100
MODES = ("R", "S", "X")

Density = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class Denoiser(Section):
    """One of the tasks that ``ul2`` mixes."""

    mode: Literal["R", "S", "X"]
    """Regular, sequential or extreme: which token stands first in the encoder's input."""
    noise_density: Density
    """Share of the text that is the target."""
    mean_span: Annotated[float, Field(ge=1)] | None = None
    """Tokens of a span on average; of ``S``, whose target is the end of the text, none."""
    weight: PositiveFloat = 1.0
    """Share of the samples, relative to the others' weights."""

    @model_validator(mode="after")
    def check_span(self) -> Denoiser:
        if (self.mode == "S") != (self.mean_span is None):
            raise ValueError(f"mode={self.mode}, mean_span={self.mean_span}: R and X need a mean_span, S has none")
        return self


UL2 = tuple(
    Denoiser(mode=mode, noise_density=density, mean_span=span)
    for mode, density, span in (
        ("R", 0.15, 3.0),
        ("R", 0.15, 8.0),
        ("S", 0.25, None),
        ("X", 0.5, 3.0),
        ("X", 0.5, 8.0),
        ("X", 0.15, 64.0),
        ("X", 0.5, 64.0),
    )
)
"""The seven of Tay et al. 2022, table 1, in equal shares."""


class Objective(Section):
    kind: Kind | None = None
    """``causal``: the next token (default for gpt and llama). ``mlm``: masked tokens (Devlin et al. 2018; bert).
    ``span_corruption``: spans that sentinels stand for (Raffel et al. 2020; t5). ``prefix``: what comes after a prefix
    (of t5 the encoder's input; a decoder is as causal as ever, its targets begin after it). ``ul2``: a mixture of
    denoisers, with a token that tells which (Tay et al. 2022; t5)."""
    mask_share: Density = 0.15
    """mlm: share of the tokens that are targets."""
    replace: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """mlm: shares of the targets that become the mask, a random token, and stay as they are."""
    ngram: Annotated[int, Field(ge=1, le=16, strict=True)] = 1
    """mlm: up to so many words in a row are masked together, n of them in proportion to 1/n (Lan et al. 2019)."""
    whole_word: bool = False
    """mlm: a word is masked with all its tokens or none; what a word is follows from the corpus's tokenizer."""
    mask_id: NonNegative | None = None
    """mlm: default the highest id of ``model.vocab_size``."""
    pairs: Literal["none", "next_sentence", "sentence_order"] = "none"
    """mlm: a sample is two stretches of text in a row, and half of the time not: ``next_sentence``: the second is of
    another sample (Devlin et al. 2018); ``sentence_order``: they are swapped (Lan et al. 2019). With
    ``model.pair_head``."""
    cls_id: NonNegative | None = None
    """pairs: stands first; default ``mask_id - 2``."""
    sep_id: NonNegative | None = None
    """pairs: ends each stretch; default ``mask_id - 1``."""
    noise_density: Density = 0.15
    """span_corruption: share of the text that is the target."""
    mean_span: Annotated[float, Field(ge=1)] = 3.0
    """span_corruption: tokens of a span on average."""
    sentinels: Positive | None = None
    """Ids that stand for spans, from ``first_sentinel`` downwards; default 100, or as many as a sample needs."""
    first_sentinel: NonNegative | None = None
    """Stands for the first span; default the highest id of ``model.vocab_size`` (T5's own: 32099 of 32128). The modes
    of ``ul2`` are the ids below the sentinels."""
    start_id: NonNegative | None = None
    """The decoder's first input; default the end-of-document token (T5's own: 0)."""
    decoder_len: Positive | None = None
    """Length of t5's targets; default as short as holds every sample's. A longer one is padding, up to a multiple of 8,
    say."""
    prefix_share: Density = 0.5
    """prefix, t5: share of the text that the encoder reads (Raffel et al. 2020: half on average)."""
    denoisers: Annotated[tuple[Denoiser, ...], Field(min_length=1)] = UL2
    """ul2: default its seven."""
    z_loss: NonNegativeFloat = 0.0
    """Factor on the square of the logits' log-partition function, added to what is optimized (Chowdhery et al. 2022:
    1e-4); the loss in the metrics is without it."""

    @model_validator(mode="after")
    def check_effect(self) -> Objective:
        """Keys that would have no effect, or contradict each other."""
        for key, kinds in USED_BY.items():
            if self.kind not in (None, *kinds) and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect with kind={self.kind}; it is for {', '.join(kinds)}")
        if min(self.replace) < 0 or abs(sum(self.replace) - 1) > 1e-6:
            raise ValueError(f"replace={list(self.replace)}: expected shares of mask, random and kept that sum to 1")
        for key in ("cls_id", "sep_id"):
            if getattr(self, key) is not None and self.pairs == "none":
                raise ValueError(f"{key} has no effect with pairs=none")
        return self


@dataclass(frozen=True)
class Lengths:
    """Of one sample of an encoder and a decoder, in tokens."""

    raw: int
    """Text."""
    noise: int
    """Text that is in the targets."""
    spans: int
    """0 where the target is the end of the text."""
    inputs: int
    """What the encoder reads: text, sentinels, end, mode."""
    targets: int


@lru_cache
def span_lengths(inputs: int, noise_density: float, mean_span: float, extra: int = 1) -> Lengths:
    """Of the longest text whose corrupted form is at most ``inputs`` tokens.

    T5's ``random_spans_helper`` (Raffel et al. 2020), without its exception for a density of 1/2, which would leave the
    inputs one token short.

    Args:
        inputs: of the encoder.
        extra: tokens of the inputs that are neither text nor sentinels: the end, a mode.
    """

    def of(raw: int) -> Lengths:
        noise = min(max(round(raw * noise_density), 1), raw - 1)
        spans = max(round(noise / mean_span), 1)
        return Lengths(raw, noise, spans, raw - noise + spans + extra, noise + spans + 1)

    found = of(2)
    while (longer := of(found.raw + 1)).inputs <= inputs:
        found = longer
    return found


def prefix_lengths(inputs: int, noise_density: float, extra: int = 1) -> Lengths:
    """Of a text whose first part fills the encoder's ``inputs``; ``noise_density`` of it, the last, are the target."""
    prefix = inputs - extra
    suffix = max(round(prefix * noise_density / (1 - noise_density)), 1)
    return Lengths(prefix + suffix, suffix, 0, inputs, suffix + 1)


def denoised(objective: Objective, seq_len: int) -> tuple[Lengths, ...]:
    """Of each denoiser of t5's objective, in order; one where it is no mixture."""
    if objective.kind == "ul2":
        return tuple(
            prefix_lengths(seq_len, each.noise_density, extra=2)
            if each.mean_span is None
            else span_lengths(seq_len, each.noise_density, each.mean_span, extra=2)
            for each in objective.denoisers
        )
    if objective.kind == "prefix":
        return (prefix_lengths(seq_len, 1 - objective.prefix_share),)
    return (span_lengths(seq_len, objective.noise_density, objective.mean_span),)


def raw_len(objective: Objective, arch: str, seq_len: int) -> int:
    """Tokens of a corpus that a sample is made of."""
    if arch == "t5":
        return max(each.raw for each in denoised(objective, seq_len))
    return seq_len - 3 if objective.pairs != "none" else seq_len


def decoder_len(objective: Objective, arch: str, seq_len: int) -> int:
    """Length of the targets of t5; 0 of architectures whose targets are as long as what they read."""
    if arch != "t5":
        return 0
    return objective.decoder_len or max(each.targets for each in denoised(objective, seq_len))


def special_ids(objective: Objective, vocab_size: int, seq_len: int) -> dict[str, int]:
    """The ids that no text may hold, by name: keys of the section, `sentinel 0`, `sentinel 1`, ..., `mode R`, ..."""
    if objective.kind == "mlm":
        mask = vocab_size - 1 if objective.mask_id is None else objective.mask_id
        if objective.pairs == "none":
            return {"mask_id": mask}
        sep = mask - 1 if objective.sep_id is None else objective.sep_id
        cls = mask - 2 if objective.cls_id is None else objective.cls_id
        return {"mask_id": mask, "sep_id": sep, "cls_id": cls}
    if objective.kind not in ("span_corruption", "ul2"):
        return {}
    first = vocab_size - 1 if objective.first_sentinel is None else objective.first_sentinel
    needed = max(each.spans for each in denoised(objective, seq_len))
    count = objective.sentinels or max(T5_SENTINELS, needed)
    found = {f"sentinel {number}": first - number for number in range(count)}
    if objective.kind == "ul2":
        found |= {f"mode {mode}": first - count - number for number, mode in enumerate(MODES)}
    return found


def check_objective(
    objective: Objective, arch: str, vocab_size: int, seq_len: int, pair_head: bool, documents: bool
) -> None:
    """Raises ValueError where the objective doesn't go with the model, or with the way in which data is read."""
    kinds = KINDS[arch]
    if objective.kind not in kinds:
        raise ValueError(f"objective.kind={objective.kind} is not for model.arch={arch}; expected {' or '.join(kinds)}")
    if pair_head != (objective.pairs != "none"):
        raise ValueError(
            f"objective.pairs={objective.pairs}, but model.pair_head={str(pair_head).lower()}: expected both or neither"
        )
    if documents and (
        objective.pairs != "none" or objective.kind == "ul2" or (arch, objective.kind) == ("t5", "prefix")
    ):
        what = f"pairs={objective.pairs}" if objective.pairs != "none" else f"kind={objective.kind} of t5"
        raise ValueError(
            f"data.documents=true doesn't go with objective.{what}: documents would not see the token that stands for "
            "the whole input, or the prefix; set data.documents=false"
        )
    check_lengths(objective, arch, seq_len)
    if outside := [name for name, found in special_ids(objective, vocab_size, seq_len).items() if found < 0]:
        raise ValueError(
            f"objective: {len(outside)} special ids, the first {outside[0]!r}, would be below 0; expected more ids: "
            f"raise model.vocab_size={vocab_size} or lower objective.sentinels"
        )
    check_ids(objective, vocab_size, seq_len)


def check_lengths(objective: Objective, arch: str, seq_len: int) -> None:
    """Raises ValueError where samples of this length can't be made."""
    if raw_len(objective, arch, seq_len) < 2:
        raise ValueError(
            f"data.seq_len={seq_len} is too short for objective.kind={objective.kind}, pairs={objective.pairs}: a "
            "sample needs two tokens of text beside its special ones"
        )
    if arch != "t5":
        if objective.decoder_len or objective.start_id is not None or objective.prefix_share != 0.5:
            raise ValueError(
                f"objective.decoder_len, start_id and prefix_share have no effect with model.arch={arch}: it has no "
                "encoder and decoder"
            )
        return
    for each in denoised(objective, seq_len):
        if each.inputs != seq_len or each.noise < 1 or each.spans > min(each.noise, each.raw - each.noise):
            raise ValueError(
                f"data.seq_len={seq_len}: no text fills it with {each.spans} spans of {each.noise} noise tokens in "
                f"{each.raw}; expected a longer one, a lower density or longer spans"
            )
        if objective.decoder_len and objective.decoder_len < each.targets:
            raise ValueError(
                f"objective.decoder_len={objective.decoder_len} is shorter than targets of data.seq_len={seq_len}: "
                f"expected {each.targets} or more"
            )
        if objective.sentinels and objective.sentinels < each.spans:
            raise ValueError(
                f"objective.sentinels={objective.sentinels}: a sample of data.seq_len={seq_len} has {each.spans} "
                "spans, each with a sentinel of its own"
            )


def check_ids(objective: Objective, vocab_size: int, seq_len: int) -> None:
    """Raises ValueError where an id is outside the vocabulary, or there twice."""
    found = special_ids(objective, vocab_size, seq_len)
    started = {} if objective.start_id is None else {"start_id": objective.start_id}
    for name, value in (found | started).items():
        if value >= vocab_size:
            raise ValueError(f"objective: {name}={value} is outside model.vocab_size={vocab_size}")
    if len(set(found.values())) < len(found):
        raise ValueError(f"objective: {found} holds an id twice; expected ids of their own")
