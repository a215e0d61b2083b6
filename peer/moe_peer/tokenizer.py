"""`moe-peer tokenizer`: makes the vocabulary of a run, once, for all of its trainers."""

from __future__ import annotations

import sys

from moe_net.data.corpus import load_corpus
from moe_net.data.vocabulary import make_tokenizer
from moe_peer.config import TokenizerConfig


def run_tokenizer(config: TokenizerConfig) -> int:
    """Exit code 0. ValueError when there is a file already: a run may depend on it."""
    if config.out.exists():
        raise ValueError(f"out: {config.out} exists, and a run may depend on it: remove it first, or write to another")
    corpus = load_corpus(config.data, max_bytes=config.max_data_mib * 2**20, text_field=config.text_field)
    print(f"text: {corpus.summary}", file=sys.stderr)
    tokenizer, sha256 = make_tokenizer(corpus, config.out, vocab_size=config.vocab_size)
    if tokenizer.vocab_size < config.vocab_size:
        print(f"the text has pairs for {tokenizer.vocab_size} tokens only", file=sys.stderr)
    print(
        f"{config.out} has {tokenizer.vocab_size} tokens. Put these lines at the top of the run's TOML, a vocab_size "
        f"of no less into [model]; give the file to every trainer by --tokenizer {config.out}",
        file=sys.stderr,
    )
    print(f'tokenizer = "bpe"\ntokenizer_sha256 = "{sha256}"')
    return 0
