"""A bank as one trainer uses it whose calls all count."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_net.experts.bank import ExpertBank
from moe_net.experts.calls import BankCall, Reusable


class OneTrainersBank:
    """An ExpertBank whose backwards all are in the next commit; everything else is the bank's."""

    def __init__(self, bank: ExpertBank) -> None:
        self.bank = bank
        self.staged: list[BankCall] = []
        self.committed: list[list[BankCall]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bank, name)

    def backward(
        self, dy_RD: Tensor, x_RD: Tensor, slots_RK: Tensor, gates_RK: Tensor, saved: Reusable | None
    ) -> tuple[Tensor, Tensor]:
        dx_RD, dgates_RK, work, _ = self.bank.backward(dy_RD, x_RD, slots_RK, gates_RK, saved)
        self.staged.append(BankCall(dy_RD, x_RD, slots_RK, gates_RK, work))
        return dx_RD, dgates_RK

    def commit(self, tokens: int) -> bool:
        """Whether the experts made their step."""
        self.committed.append(self.staged)
        self.staged = []
        self.bank.committed_tokens += tokens
        if self.bank.committed_tokens < self.bank.global_batch_tokens:
            return False
        self.bank.step(self.bank.close(self.committed, self.bank.committed_tokens))
        self.committed = []
        return True

    def state(self, indices: list[int] | None = None, *, with_sums: bool = False) -> dict[str, Tensor]:
        return self.bank.state(indices, committed=self.committed if with_sums else None)

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.bank.fold(self.committed)
        self.committed = []
        self.staged = []
        self.bank.load_state(state)
