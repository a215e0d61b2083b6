"""The text of a training, as tokens: what is trained on, what is held out, and how well a bigram model does on that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_net.config import RunConfig
from moe_net.data.batches import IdsBatch, eval_batches
from moe_net.data.corpus import Corpus, join, load_corpus
from moe_net.data.ngram import BigramModel
from moe_net.data.tokenizer import BpeTokenizer, ByteTokenizer, Ids, Tokenizer, load_tokenizer
from moe_peer.config import TrainConfig

EVAL_SEQUENCES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """The corpus as the trainer uses it."""

    corpus: Corpus
    tokenizer: Tokenizer
    train: Ids
    held_out: Ids
    bigram_nats_per_byte: float


def load_text(config: TrainConfig, run: RunConfig, tokenizer_file: Path) -> Text:
    """Corpus and tokenizer; a BPE is trained on the training split and kept in `tokenizer_file` for a resume."""
    corpus = load_corpus(config.data, max_bytes=config.max_data_mib * 2**20, text_field=config.text_field)
    train, held_out = join(corpus.train), join(corpus.held_out)
    tokenizer: Tokenizer
    if run.tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    elif config.resume is not None and tokenizer_file.exists():
        tokenizer = load_tokenizer(tokenizer_file)
    else:
        texts = (document.text for document in corpus.train)
        tokenizer = BpeTokenizer.train(texts, vocab_size=run.model.vocab_size)
        tokenizer_file.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(tokenizer_file)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, model.vocab_size is {run.model.vocab_size}")
    held_out_ids = tokenizer.encode(held_out)
    return Text(
        corpus=corpus,
        tokenizer=tokenizer,
        train=tokenizer.encode(train),
        held_out=held_out_ids,
        bigram_nats_per_byte=_bigram(train, held_out, held_out_ids, run, config),
    )


def _bigram(train: bytes, held_out: bytes, held_out_ids: Ids, run: RunConfig, config: TrainConfig) -> float:
    """Loss of a bigram model of bytes, on the very windows of the evaluation where those are of bytes."""
    bigram = BigramModel.fit(train)
    if run.tokenizer != "bytes":
        return bigram.nats_per_byte(held_out)
    windows = np.concatenate(list(evaluation(held_out_ids, run, config)))
    return float(bigram.pair_nats(windows[:, :-1], windows[:, 1:]).mean())


def evaluation(held_out: Ids, run: RunConfig, config: TrainConfig) -> Iterator[IdsBatch]:
    """The held-out windows that every evaluation uses."""
    return eval_batches(held_out, config.eval_batches, seq_len=run.model.seq_len, sequences=EVAL_SEQUENCES)
