"""The collator that a config asks for, checked against the corpora that it is to read."""

from __future__ import annotations

from collections.abc import Sequence

from megamup.config import Config
from megamup.data.corpus import Corpus
from megamup.data.objectives.base import Objective
from megamup.data.objectives.causal import Causal, Prefix
from megamup.data.objectives.draws import Draws
from megamup.data.objectives.masked import Masked, MaskedPairs, Masking
from megamup.data.objectives.spans import Denoised, Denoising
from megamup.data.objectives.words import no_text, tokenizer_of, words_of
from megamup.data.samples import eod_of
from megamup.errors import MegamupError
from megamup.objective import MODES, denoised, special_ids


def open_objective(config: Config, corpora: Sequence[Corpus], *, held_out: bool = False) -> Objective:
    """The objective of a run.

    Args:
        config: of the run.
        corpora: all that it reads, held-out ones too.
        held_out: for evaluation, which draws the same for every `run.seed`, so that losses of seeds can be compared.

    Raises:
        MegamupError: a special id is one that text of the corpora holds; they end documents with different tokens;
            `whole_word` and no tokenizer that tells words.
    """
    objective, seq_len = config.objective, config.seq_len
    check_special_ids(config, corpora)
    if objective.kind == "causal" and not config.data.documents:
        return Causal(seq_len)
    eod_id, draws = common_eod(corpora), Draws("held-out" if held_out else f"seed {config.run.seed}")
    of_documents = eod_id if config.data.documents else None
    if objective.kind == "causal":
        return Causal(seq_len, of_documents)
    if objective.kind == "mlm":
        return masked(config, corpora, draws, eod_id)
    if objective.kind == "prefix" and config.model.arch != "t5":
        return Prefix(seq_len, draws, of_documents)
    start_id = eod_id if objective.start_id is None else objective.start_id
    denoisers = denoisings(config, eod_id)
    return Denoised(seq_len, config.decoder_len, denoisers, draws, start_id, config.data.documents)


def masked(config: Config, corpora: Sequence[Corpus], draws: Draws, eod_id: int) -> Objective:
    objective, vocab_size, seq_len = config.objective, config.model.vocab_size, config.seq_len
    special = special_ids(objective, vocab_size, seq_len)
    words = words_of(tokenizer_of(corpora), vocab_size) if objective.whole_word else None
    masking = Masking(
        objective.mask_share,
        objective.replace,
        objective.ngram,
        special["mask_id"],
        tuple(special.values()),
        vocab_size,
        words,
    )
    if objective.pairs == "none":
        return Masked(seq_len, masking, draws, eod_id, config.data.documents)
    return MaskedPairs(seq_len, objective.pairs, masking, draws, special["cls_id"], special["sep_id"], eod_id)


def denoisings(config: Config, eod_id: int) -> tuple[Denoising, ...]:
    objective = config.objective
    special = special_ids(objective, config.model.vocab_size, config.seq_len)
    found, first = denoised(objective, config.seq_len), special.get("sentinel 0", 0)
    if objective.kind != "ul2":
        return tuple(Denoising(lengths, eod_id, first) for lengths in found)
    modes = {mode: special[f"mode {mode}"] for mode in MODES}
    return tuple(
        Denoising(lengths, eod_id, first, modes[each.mode], each.weight)
        for lengths, each in zip(found, objective.denoisers, strict=True)
    )


def common_eod(corpora: Sequence[Corpus]) -> int:
    """The end-of-document token of all corpora.

    Raises:
        MegamupError: they have different ones.
    """
    found = [eod_of(corpus) for corpus in corpora]
    for corpus, eod_id in zip(corpora, found, strict=True):
        if eod_id != found[0]:
            raise MegamupError(
                f"data: documents of {corpora[0].prefix!r} end with token {found[0]}, those of {corpus.prefix!r} with "
                f"{eod_id}; expected one end-of-document token: preprocess one of them again"
            )
    return found[0]


def check_special_ids(config: Config, corpora: Sequence[Corpus]) -> None:
    """Special ids are above every id of the corpora, or a special token of their tokenizer, where a manifest tells."""
    special = special_ids(config.objective, config.model.vocab_size, config.seq_len)
    for corpus in corpora:
        if corpus.manifest is None or not special:
            continue
        used = {name: found for name, found in special.items() if found <= corpus.manifest.max_id}
        if used and corpus.manifest.tokenizer.folder:
            free = no_text(tokenizer_of([corpus]))
            used = {name: found for name, found in used.items() if found not in free}
        if used:
            name, found = next(iter(used.items()))
            raise MegamupError(
                f"objective: {name} is id {found:,}, which text of {corpus.prefix!r} may hold (its largest id is "
                f"{corpus.manifest.max_id:,}); expected {len(special)} ids above it: raise model.vocab_size="
                f"{config.model.vocab_size:,} to {corpus.manifest.max_id + 1 + len(special):,} or more, or name "
                "special tokens of its tokenizer"
            )
