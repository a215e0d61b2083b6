"""One trainer's step where something is missing; its arithmetic is compared in tests/numerics."""

from __future__ import annotations

import pytest
from swarms import make_trainer, small_run
from torch import Tensor

from moe_net.client import host_here
from moe_net.errors import NoLiveExpertsError
from moe_net.model.transformer import Transformer


class Losing:
    """The model, whose experts are all gone at the calls given by their numbers."""

    def __init__(self, model: Transformer, *lost: int) -> None:
        self._forward, self._lost, self._calls = model.forward, lost, 0

    def __call__(self, tokens_BS: Tensor, **more: object) -> object:
        self._calls += 1
        if self._calls in self._lost:
            raise NoLiveExpertsError("no live expert")
        return self._forward(tokens_BS, **more)  # type: ignore[arg-type]


def test_a_step_without_experts_changes_nothing_and_can_be_made_again() -> None:
    run = small_run()
    with host_here(run) as link:
        expected = [make_trainer(run, link).train_step().loss]
    with host_here(run) as link:
        trainer = make_trainer(run, link)
        trainer.model.forward = Losing(trainer.model, 1)  # type: ignore[method-assign,assignment]
        with pytest.raises(NoLiveExpertsError):
            trainer.train_step()
        assert trainer.step == 0
        assert [trainer.train_step().loss] == expected


def test_a_step_that_loses_its_experts_half_way_is_made_of_what_was_done() -> None:
    run = small_run()
    with host_here(run) as link:
        trainer = make_trainer(run, link, n_micro=2)
        trainer.model.forward = Losing(trainer.model, 2)  # type: ignore[method-assign,assignment]
        result = trainer.train_step()
        assert result.tokens == run.global_batch_tokens // 2
        assert trainer.step == 1
        # Its first half was committed: the next step's gradients come on top of no leftover.
        assert trainer.train_step().tokens == run.global_batch_tokens
