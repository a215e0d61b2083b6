"""The text of a training, as tokens: what is trained on, what is held out, and how well a bigram model does on that."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_net.checkpoint_folder import TOKENIZER
from moe_net.config import RunConfig
from moe_net.data.batches import IdsBatch, eval_batches
from moe_net.data.corpus import Corpus, join, load_corpus
from moe_net.data.ngram import BigramModel
from moe_net.data.tokenizer import ByteTokenizer, Ids, Tokenizer
from moe_net.data.vocabulary import MAKE, make_tokenizer, tokenizer_of_run
from moe_peer.config import TrainConfig

EVAL_SEQUENCES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """The corpus as the trainer uses it."""

    corpus: Corpus
    tokenizer: Tokenizer
    tokenizer_file: bytes | None
    """The file of a BPE, to the byte: its SHA-256 is the run's."""
    train: Ids
    held_out: Ids
    bigram_nats_per_byte: float


def read_corpus(config: TrainConfig) -> Corpus:
    """What the options name, as bytes; ValueError when too much of it is no text."""
    return load_corpus(config.data, max_bytes=config.max_data_mib * 2**20, text_field=config.text_field)


def load_text(config: TrainConfig, corpus: Corpus, run: RunConfig, resumed: Path | None) -> Text:
    """The corpus as the run's tokens. A BPE is that of the file given, or of the checkpoint `resumed`; a run of one
    trainer that names none has one of the training split. ValueError when it is not the run's.
    """
    file = _tokenizer_file(config, run, resumed)
    tokenizer: Tokenizer = ByteTokenizer()
    data: bytes | None = None
    if file is not None:
        tokenizer, data = tokenizer_of_run(file, run.tokenizer_sha256)
    train, held_out = join(corpus.train), join(corpus.held_out)
    kept = config.out / TOKENIZER
    if run.tokenizer == "bpe" and data is None:
        tokenizer, sha256 = make_tokenizer(corpus, kept, vocab_size=run.model.vocab_size)
        data = kept.read_bytes()
        print(
            f"tokenizer: made of this trainer's text, {tokenizer.vocab_size} tokens, in {kept}; for more trainers put "
            f'tokenizer_sha256 = "{sha256}" into the run\'s TOML, and give them the file',
            file=sys.stderr,
        )
    elif data is not None:
        kept.write_bytes(data)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, model.vocab_size is {run.model.vocab_size}")
    held_out_ids = tokenizer.encode(held_out)
    return Text(
        corpus=corpus,
        tokenizer=tokenizer,
        tokenizer_file=data,
        train=tokenizer.encode(train),
        held_out=held_out_ids,
        bigram_nats_per_byte=_bigram(train, held_out, held_out_ids, run, config),
    )


def _tokenizer_file(config: TrainConfig, run: RunConfig, resumed: Path | None) -> Path | None:
    """Where the run's BPE is; None when this trainer makes it, or the run has none."""
    if run.tokenizer == "bytes":
        if config.tokenizer is not None:
            raise ValueError(f"tokenizer: the run's tokens are bytes; {config.tokenizer} has no place in it")
        return None
    if config.tokenizer is not None:
        return config.tokenizer
    if resumed is not None and (resumed / TOKENIZER).exists():
        return resumed / TOKENIZER
    if run.tokenizer_sha256 is not None:
        raise ValueError(
            f"the run's tokenizer has the SHA-256 {run.tokenizer_sha256}: give its file by --tokenizer FILE"
        )
    if config.trainers > 1:
        raise ValueError(
            f"the run names no tokenizer, and each of its {config.trainers} trainers would make its own, over the same "
            f"experts: make one by `{MAKE}`, and put what that prints into the run's TOML"
        )
    return None


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
