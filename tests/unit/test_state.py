"""Names of the tensors in a state of experts."""

from __future__ import annotations

import pytest

from moe_net.types import ExpertId
from moe_net.wire.state import expert_id, experts_in, split_name, tensor_name


def test_a_name_gives_back_its_expert_and_its_field() -> None:
    name = tensor_name(ExpertId(3, 17), "w_in")
    assert name == tensor_name("3.17", "w_in") == "3.17.w_in"
    assert expert_id(name) == ExpertId(3, 17)
    assert split_name(name) == ("3.17", "w_in")


@pytest.mark.parametrize("name", ["", "w_in", "3.w_in", "3.17.w_in.more", ".3.17.w_in", "a.b.w_in"])
def test_a_name_that_is_none_is_of_no_expert(name: str) -> None:
    with pytest.raises(ValueError, match=r"invalid literal|unpack"):
        expert_id(name)
    assert experts_in([name, "0.1.w_in"]) != {"0.1"}
