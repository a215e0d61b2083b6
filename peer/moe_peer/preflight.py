"""What can be known of a command's options before it joins a run. Neither torch nor grpc, and nothing is written."""

from __future__ import annotations

from collections.abc import Sequence

from moe_net.discovery.listen import check_join, check_unused
from moe_net.preflight import (
    must_be_folder,
    must_hold_checkpoint,
    must_read_file,
    must_read_text,
    must_write_folder,
)
from moe_peer.config import ServeConfig, TokenizerConfig, TrainConfig


def check_serve(config: ServeConfig) -> None:
    """ValueError or OSError names the first option with which `moe-peer serve` could not begin."""
    _check_join(config.join)
    if config.load is not None:
        must_be_folder("--load", config.load)
    if config.identity is not None:
        if config.identity.exists():
            must_read_file("--identity", config.identity)
            from moe_net.discovery.record import Identity

            try:
                Identity.load(config.identity)
            except ValueError as error:
                raise ValueError(f"--identity {error}") from error
        else:
            must_write_folder("--identity", config.identity.parent)
    if config.listen is not None:
        check_unused(config.listen)


def check_train(config: TrainConfig) -> None:
    """ValueError or OSError names the first option with which a training could not begin."""
    _check_join(config.join)
    if config.data is not None:
        must_read_text("--data", config.data)
    must_write_folder("--out", config.out)
    if config.resume is not None:
        must_hold_checkpoint("--resume", config.resume)


def _check_join(addresses: Sequence[str]) -> None:
    if not addresses:
        raise ValueError(
            "--join: give an address to join by: a coordinator's host:port, or the multiaddr of a DHT member"
        )
    for address in addresses:
        check_join(address)


def check_tokenizer(config: TokenizerConfig) -> None:
    """ValueError or OSError names the option with which no tokenizer could be made."""
    if config.data is not None:
        must_read_text("--data", config.data)
