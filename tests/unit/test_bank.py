"""A bank of experts against an ordinary autograd loop, its state, and its snapshots."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from bank_calls import OneTrainersBank
from torch import Tensor

from moe_net.errors import CheckpointError
from moe_net.experts.bank import ExpertBank, memory_bytes
from moe_net.experts.calls import BankCall
from moe_net.experts.init import init_expert
from moe_net.experts.lineage import Lineage
from moe_net.kernels.reference import moe_ffn_reference
from moe_net.kernels.types import ExpertWeights
from moe_net.optim import OptimizerConfig
from moe_net.types import Activation, ExpertId, ExpertShape
from moe_net.wire import snapshot
from moe_net.wire.state import LINEAGE_FIELD, STATE_FIELDS, SUM_FIELDS

SHAPE = ExpertShape(d_model=12, d_ff=9)
R, K = 20, 3


def make_bank(
    indices: tuple[int, ...] = (2, 5, 7),
    batch: int = R,
    clip_norm: float = 1.0,
    compute_dtype: torch.dtype = torch.float32,
) -> OneTrainersBank:
    bank = ExpertBank(
        layer=3,
        indices=indices,
        shape=SHAPE,
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=2, clip_norm=clip_norm),
        global_batch_tokens=batch,
        run="demo",
        seed=1,
        init_std=0.2,
        compute_dtype=compute_dtype,
    )
    return OneTrainersBank(bank)


def make_rows(seed: int, n_slots: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dy, x, slots, gates)"""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(R, SHAPE.d_model, generator=generator),
        torch.randn(R, SHAPE.d_model, generator=generator),
        torch.randint(-1, n_slots, (R, K), generator=generator),
        torch.rand(R, K, generator=generator),
    )


def assert_same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_slots_are_local_places_and_minus_one_for_strangers() -> None:
    bank = make_bank(indices=(7, 2, 5))
    assert bank.indices == (2, 5, 7)
    index = torch.tensor([[2, 5, 7], [0, 6, 8], [-1, 2**31 - 1, 5]], dtype=torch.int32)
    assert bank.slots(index).tolist() == [[0, 1, 2], [-1, -1, -1], [-1, -1, 1]]


def test_fresh_weights_are_those_of_the_generator() -> None:
    state = make_bank().state()
    w_in, w_out = init_expert(ExpertId(3, 5), SHAPE, run="demo", seed=1, init_std=0.2)
    assert torch.equal(state["3.5.w_in"], w_in)
    assert torch.equal(state["3.5.w_out"], w_out)


@pytest.mark.parametrize("parts", [1, 4])
def test_twelve_steps_equal_autograd_and_torch_adamw(parts: int) -> None:
    """Also when the batch comes in parts, each with its own commit."""
    bank = make_bank()
    state = bank.state()
    stacks = [torch.stack([state[f"3.{i}.{name}"] for i in bank.indices]) for name in ("w_in", "w_out")]
    experts = [[torch.nn.Parameter(stack[e].clone()) for stack in stacks] for e in range(3)]
    config = OptimizerConfig(learning_rate=0.01, warmup_steps=2)
    adamws = [
        torch.optim.AdamW(pair, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay)
        for pair in experts
    ]
    for step in range(12):
        dy, x, slots, gates = make_rows(step)
        slots[slots == 1] = -1 if step % 3 == 0 else 1  # expert 5 has no rows in every third step
        x_ref, gates_ref = x.clone().requires_grad_(), gates.clone().requires_grad_()
        w_in, w_out = (torch.stack([pair[which] for pair in experts]) for which in range(2))
        y_ref = moe_ffn_reference(x_ref, slots, gates_ref, ExpertWeights(w_in, w_out, Activation.SWIGLU))
        (y_ref * dy).sum().div(R).backward()
        for expert, adamw in zip(experts, adamws, strict=True):
            torch.nn.utils.clip_grad_norm_(expert, config.clip_norm)
            adamw.param_groups[0]["lr"] = config.lr_at(step)
            adamw.step()
            adamw.zero_grad()
        stepped = [False]
        for part in torch.arange(R).chunk(parts):
            assert not stepped[-1]
            y, saved = bank.forward(x[part], slots[part], gates[part], keep=True)
            dx, dgates = bank.backward(dy[part], x[part], slots[part], gates[part], saved)
            torch.testing.assert_close(y, y_ref.detach()[part], rtol=1e-5, atol=1e-5)
            assert x_ref.grad is not None
            assert gates_ref.grad is not None
            torch.testing.assert_close(dx, R * x_ref.grad[part], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(dgates, R * gates_ref.grad[part], rtol=1e-5, atol=1e-5)
            stepped.append(bank.commit(len(part)))
        assert stepped[-1]
        state = bank.state()
        for index, pair in zip(bank.indices, experts, strict=True):
            torch.testing.assert_close(state[f"3.{index}.w_in"], pair[0].detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(state[f"3.{index}.w_out"], pair[1].detach(), rtol=1e-5, atol=1e-6)
    assert bank.versions == {2: 12, 5: 12, 7: 12}


def test_the_step_comes_when_the_batch_is_complete_and_not_before() -> None:
    bank = make_bank(batch=100)
    assert not bank.commit(99)
    assert (bank.committed_tokens, bank.versions[2]) == (99, 0)
    assert bank.commit(31)
    assert (bank.committed_tokens, bank.versions[2]) == (0, 1)


def test_the_step_divides_by_the_tokens_that_were_committed() -> None:
    """Clipping off, Adam's first moment shows the mean gradient."""
    dy, x, slots, gates = make_rows(0)
    moments: list[Tensor] = []
    for tokens in (R, 2 * R):
        bank = make_bank(clip_norm=0)
        bank.backward(dy, x, slots, gates, None)
        assert bank.commit(tokens)
        moments.append(bank.state()["3.5.m_in"])
    torch.testing.assert_close(moments[0], 2 * moments[1])


def test_backward_of_a_forward_before_the_step_belongs_to_the_weights_after_it() -> None:
    bank = make_bank()
    dy, x, slots, gates = make_rows(0)
    _, stale = bank.forward(x, slots, gates, keep=True)
    bank.backward(dy, x, slots, gates, stale)
    assert bank.commit(R)
    late = bank.backward(dy, x, slots, gates, stale)
    fresh = bank.backward(dy, x, slots, gates, None)
    assert all(torch.equal(a, b) for a, b in zip(late, fresh, strict=True))


def test_backward_of_a_forward_before_a_load_belongs_to_the_loaded_weights() -> None:
    bank, other = make_bank(), make_bank()
    dy, x, slots, gates = make_rows(0)
    other.backward(dy, x, slots, gates, None)
    other.commit(R)
    _, stale = bank.forward(x, slots, gates, keep=True)
    bank.load_state(other.state())
    late = bank.backward(dy, x, slots, gates, stale)
    expected = other.backward(dy, x, slots, gates, None)
    assert all(torch.equal(a, b) for a, b in zip(late, expected, strict=True))


def test_backward_alone_changes_nothing() -> None:
    bank, untouched = make_bank(), make_bank()
    dy, x, slots, gates = make_rows(0)
    bank.backward(dy, x, slots, gates, None)
    bank.staged.clear()
    bank.commit(R)
    untouched.commit(R)
    assert_same_state(bank.state(), untouched.state())


def test_gradients_have_the_same_bits_whatever_is_left_of_the_backward() -> None:
    bank = make_bank()
    rows = [make_rows(seed) for seed in range(3)]
    for dy, x, slots, gates in rows:
        _, saved = bank.forward(x, slots, gates, keep=True)
        bank.backward(dy, x, slots, gates, saved)
    kept = bank.gradients([bank.staged])
    again = bank.gradients([[BankCall(*call) for call in rows]])
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_what_is_left_of_a_backward_at_other_weights_is_not_used() -> None:
    bank = make_bank()
    dy, x, slots, gates = make_rows(0)
    bank.backward(dy, x, slots, gates, None)
    call = bank.staged[0]
    bank.staged.clear()
    bank.commit(R)
    fresh = bank.gradients([[BankCall(dy, x, slots, gates)]])
    assert all(torch.equal(a, b) for a, b in zip(bank.gradients([[call]]), fresh, strict=True))


def test_saved_counts_its_bytes() -> None:
    bank = make_bank()
    _, x, slots, gates = make_rows(0)
    _, saved = bank.forward(x, slots, gates, keep=True)
    assert saved is not None
    needed = int((slots >= 0).sum()) * SHAPE.d_hidden * 4
    assert needed <= saved.nbytes <= 1.5 * needed, "what it is filled up with counts as well"
    assert bank.forward(x, slots, gates, keep=False)[1] is None


def run_steps(bank: OneTrainersBank, first: int, end: int) -> None:
    for step in range(first, end):
        dy, x, slots, gates = make_rows(step)
        _, saved = bank.forward(x, slots, gates, keep=True)
        bank.backward(dy, x, slots, gates, saved)
        bank.commit(R)


def test_the_same_calls_give_the_same_bits() -> None:
    first, second = make_bank(), make_bank()
    run_steps(first, 0, 5)
    run_steps(second, 0, 5)
    assert_same_state(first.state(), second.state())


def test_a_bank_resumed_through_a_snapshot_continues_to_the_bit() -> None:
    whole, before, after = make_bank(), make_bank(), make_bank()
    run_steps(whole, 0, 6)
    run_steps(before, 0, 3)
    data = snapshot.pack(before.state(), run="demo", shape=SHAPE)
    after.backward(*make_rows(9), None)  # half a step that the resume must forget
    after.commit(R - 1)
    after.load_state(snapshot.unpack(data, run="demo", shape=SHAPE))
    assert after.committed_tokens == 0
    run_steps(after, 3, 6)
    assert_same_state(whole.state(), after.state())
    assert after.versions == {2: 6, 5: 6, 7: 6}


def test_one_expert_can_come_from_another_peer() -> None:
    donor, joiner = make_bank(indices=(1, 5)), make_bank()
    donor.commit(R)
    joiner.load_state(donor.state([5]))
    assert joiner.versions == {2: 0, 5: 1, 7: 0}
    assert_same_state(joiner.state([5]), donor.state([5]))
    with pytest.raises(KeyError):
        donor.state([6])


def test_a_bank_resumed_between_two_steps_makes_the_next_one_to_the_bit() -> None:
    whole, after = make_bank(batch=2 * R), make_bank(batch=2 * R)
    run_steps(whole, 0, 3)
    assert whole.committed_tokens == R
    state = whole.state(with_sums=True)
    fields = (*STATE_FIELDS, *SUM_FIELDS, LINEAGE_FIELD)
    assert set(state) == {f"3.{index}.{field}" for index in (2, 5, 7) for field in fields}
    after.load_state(snapshot.unpack(snapshot.pack(state, run="demo", shape=SHAPE), run="demo", shape=SHAPE))
    assert after.committed_tokens == R
    run_steps(whole, 3, 4)
    run_steps(after, 3, 4)
    whole_state, after_state = whole.state(with_sums=True), after.state(with_sums=True)
    # Of how many rows the sums were that it took over is not written down: it claims less than it has learned.
    for state in (whole_state, after_state):
        for index in (2, 5, 7):
            del state[f"3.{index}.lineage"]
    assert_same_state(whole_state, after_state)
    assert after.versions == {2: 2, 5: 2, 7: 2}


def test_sums_that_nobody_has_committed_or_that_are_not_finite_stay_behind() -> None:
    bank = make_bank(batch=2 * R)
    dy, x, slots, gates = make_rows(0)
    bank.backward(dy, x, slots, gates, None)
    assert set(bank.state(with_sums=True)) == set(bank.state())
    bank.backward(torch.full_like(dy, torch.inf), x, torch.zeros_like(slots), gates, None)
    bank.commit(R)
    with_sums = {name.split(".")[1] for name in bank.state(with_sums=True) if name.endswith("g_in")}
    assert with_sums == {"5", "7"}


def test_the_sums_of_one_expert_come_along_where_as_many_tokens_are_committed() -> None:
    donor = make_bank(indices=(1, 5, 6), batch=2 * R)
    run_steps(donor, 0, 1)
    for already, kept in ((0, True), (R, True), (R - 1, False)):
        joiner = make_bank(batch=2 * R)
        joiner.commit(already)
        joiner.load_state(donor.state([5], with_sums=True))
        assert joiner.committed_tokens == (already or R)
        loaded = joiner.state([5], with_sums=True)
        assert loaded["3.5.g_in"].equal(donor.state([5], with_sums=True)["3.5.g_in"]) is kept
        assert bool(loaded["3.5.g_in"].any()) is kept


def test_state_is_a_copy() -> None:
    bank = make_bank()
    state = bank.state()
    assert set(state) == {f"3.{index}.{field}" for index in (2, 5, 7) for field in STATE_FIELDS}
    for value in state.values():
        value.zero_()
    assert bank.state()["3.2.w_in"].any()


def damaged(name: str, value: Tensor | None) -> dict[str, Tensor]:
    state = make_bank().state()
    del state[name]
    return state if value is None else state | {name: value}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (damaged("3.5.v_in", None), "3.5.v_in is missing"),
        (
            damaged("3.5.w_in", torch.zeros(12, 17)),
            r"3.5.w_in is torch.float32 \[12, 17\], not torch.float32 \[12, 18\]",
        ),
        (damaged("3.5.w_in", torch.zeros(12, 18, dtype=torch.float64)), "3.5.w_in is torch.float64"),
        (damaged("3.5.version", torch.tensor(1.0)), "3.5.version is torch.float32"),
        (damaged("3.5.version", torch.tensor(-1)), "3.5.version is negative"),
        (damaged("3.5.v_out", torch.full((9, 12), -1.0)), "3.5.v_out is negative"),
        (damaged("3.5.m_out", torch.full((9, 12), torch.nan)), "3.5.m_out holds values that are not finite"),
        (make_bank().state() | {"3.5.g_in": torch.zeros(12, 18)}, "3.5.g_out is missing"),
        ({"3.6.w_in": torch.zeros(12, 18)}, "3.6.w_in is no expert of this bank"),
        ({"2.5.w_in": torch.zeros(12, 18)}, "2.5.w_in is no expert of this bank"),
        ({"nonsense": torch.zeros(1)}, "nonsense is no expert of this bank"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(state: dict[str, Tensor], message: str) -> None:
    bank, untouched = make_bank(), make_bank()
    run_steps(bank, 0, 1)
    run_steps(untouched, 0, 1)
    with pytest.raises(CheckpointError, match=message):
        bank.load_state(state)
    assert_same_state(bank.state(), untouched.state())


@pytest.mark.parametrize("indices", [(), (1, 1), (-1, 2)])
def test_indices_must_make_sense(indices: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be distinct, not negative and at least one"):
        make_bank(indices=indices)


def test_memory_is_sixteen_bytes_a_parameter() -> None:
    parameters = sum(value.numel() for name, value in make_bank().state().items() if ".w_" in name)
    assert memory_bytes(3, SHAPE) == 16 * parameters


def test_a_snapshot_gives_back_the_state_and_the_same_bytes_again() -> None:
    bank = make_bank()
    run_steps(bank, 0, 2)
    data = snapshot.pack(bank.state(), run="demo", shape=SHAPE)
    assert snapshot.pack(bank.state(), run="demo", shape=SHAPE) == data
    assert_same_state(snapshot.unpack(data, run="demo", shape=SHAPE), bank.state())
    assert_same_state(safetensors.torch.load(data), bank.state())


def test_a_flipped_bit_or_a_cut_anywhere_is_found() -> None:
    data = snapshot.pack(make_bank(indices=(5,)).state(), run="demo", shape=SHAPE)
    for place in range(0, len(data), 37):
        flipped = bytearray(data)
        flipped[place] ^= 1
        with pytest.raises(CheckpointError):
            snapshot.unpack(bytes(flipped), run="demo", shape=SHAPE)
        with pytest.raises(CheckpointError):
            snapshot.unpack(data[:place], run="demo", shape=SHAPE)
    with pytest.raises(CheckpointError):
        snapshot.unpack(data + b"\0", run="demo", shape=SHAPE)


def test_a_snapshot_of_another_run_or_shape_is_refused() -> None:
    data = snapshot.pack(make_bank().state(), run="demo", shape=SHAPE)
    with pytest.raises(CheckpointError, match="run 'demo', this run 'other'"):
        snapshot.unpack(data, run="other", shape=SHAPE)
    with pytest.raises(CheckpointError, match="d_model 12, this run 16"):
        snapshot.unpack(data, run="demo", shape=ExpertShape(d_model=16, d_ff=9))
    with pytest.raises(CheckpointError, match="no snapshot of experts"):
        snapshot.unpack(safetensors.torch.save({"w": torch.zeros(1)}), run="demo", shape=SHAPE)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"\xff",
        b"[" * 100_000,
        json.dumps({"__metadata__": 3}).encode(),
        json.dumps({"__metadata__": {"moe-net": 3}}).encode(),
        json.dumps({"__metadata__": {"moe-net": "3"}}).encode(),
    ],
)
def test_a_header_that_is_none_is_refused(header: bytes) -> None:
    with pytest.raises(CheckpointError):
        snapshot.unpack(len(header).to_bytes(8, "little") + header, run="demo", shape=SHAPE)


def learned_rows(bank: OneTrainersBank) -> dict[int, int]:
    return {index: lineage.unseen_by(Lineage()) for index, lineage in bank.lineages.items()}


def test_rows_count_for_an_expert_once_it_has_stepped_on_them() -> None:
    bank = make_bank()
    dy, x, slots, gates = make_rows(1)
    expected = dict(zip(bank.indices, [int((slots == slot).sum()) for slot in range(3)], strict=True))
    bank.backward(dy, x, slots, gates, None)
    assert learned_rows(bank) == dict.fromkeys(bank.indices, 0)
    bank.commit(R)
    assert learned_rows(bank) == expected
    bank.backward(dy, x, slots, gates, None)
    of_one = torch.where(slots == 1, slots, -1)
    bank.backward(torch.full_like(dy, torch.inf), x, of_one, gates, None)
    bank.commit(R)
    twice = {index: 2 * rows for index, rows in expected.items()}
    assert learned_rows(bank) == twice | {5: expected[5]}, "one whose sum is not finite has learned nothing"


def test_a_replaced_state_leaves_sums_and_commits_and_ends_what_was_saved() -> None:
    bank, other = make_bank(), make_bank()
    rows = make_rows(1)
    other.backward(*rows, None)
    other.commit(R)
    dy, x, slots, gates = make_rows(2)
    _, saved = bank.forward(x, slots, gates, keep=True)
    bank.backward(*rows, None)
    bank.commit(R - 1)
    bank.replace_state(other.state())
    assert_same_state(bank.state(), other.state())
    assert bank.committed_tokens == R - 1
    assert saved is not None
    dx, _ = bank.backward(dy, x, slots, gates, saved)
    assert torch.equal(dx, other.backward(dy, x, slots, gates, None)[0])


def test_commits_that_come_after_a_replicas_state_do_not_make_its_steps_again() -> None:
    """A peer that was away takes over a replica's state, and only then hears what it has missed. Each of those commits
    was a step more for it, and by the next meeting for all: learning rates ran ahead of the run."""
    away, there = make_bank(), make_bank()
    for step in range(5):
        there.backward(*make_rows(step), None)
        there.commit(R)
    away.replace_state(there.state())
    for _ in range(5):
        assert away.commit(R)
    assert_same_state(away.state(), there.state())
    # From here on it keeps up: an expert without rows follows its momentum, as everywhere.
    away.commit(R)
    there.commit(R)
    assert_same_state(away.state(), there.state())
    assert away.versions == {2: 6, 5: 6, 7: 6}


def test_rows_count_also_for_an_expert_that_a_replica_has_brought_ahead_but_its_version_waits() -> None:
    away, there = make_bank(), make_bank()
    for step in range(3):
        there.backward(*make_rows(step), None)
        there.commit(R)
    away.replace_state(there.state())
    dy, x, slots, gates = make_rows(9)
    away.backward(dy, x, torch.where(slots == 1, slots, -1), gates, None)
    before = away.state()
    away.commit(R)
    assert away.versions == {2: 3, 5: 3, 7: 3}
    assert [torch.equal(away.state()[f"3.{i}.w_in"], before[f"3.{i}.w_in"]) for i in (2, 5, 7)] == [True, False, True]


def test_a_bank_that_begins_with_loaded_experts_counts_on_from_their_steps() -> None:
    whole, joined = make_bank(), make_bank()
    run_steps(whole, 0, 4)
    joined.load_state(whole.state())
    whole.commit(R)
    joined.commit(R)
    assert_same_state(whole.state(), joined.state())


def test_a_bank_that_computes_in_bf16_learns_what_one_in_fp32_does_within_bf16() -> None:
    exact, rounded = make_bank(), make_bank(compute_dtype=torch.bfloat16)
    for step in range(5):
        dy, x, slots, gates = make_rows(step)
        results = []
        for bank in (exact, rounded):
            y, saved = bank.forward(x, slots, gates, keep=True)
            dx, dgates = bank.backward(dy, x, slots, gates, saved)
            assert bank.commit(R)
            results.append((y, dx, dgates))
        for right, got in zip(*results, strict=True):
            assert got.dtype is torch.float32
            torch.testing.assert_close(got, right, rtol=0.05, atol=0.03 * float(right.abs().max()))
    for name, value in exact.state().items():
        if name.endswith(("w_in", "w_out")):  # AdamW turns a gradient's rounding into as much of a step
            torch.testing.assert_close(rounded.state()[name], value, rtol=0, atol=0.02)


@pytest.mark.parametrize("size", [[0, 2**63], [0, 2**62, 2**62], [0, 2**40, 2**40], [0, 0]])
def test_a_snapshot_with_impossible_shapes_is_damaged_and_nothing_else(size: list[int]) -> None:
    """No bytes, so safetensors finds the size right; torch cannot make such a tensor."""
    data = snapshot.pack(make_bank().state(), run="demo", shape=SHAPE)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    header["3.2.more"] = {"dtype": "F32", "shape": size, "data_offsets": [end, end]}
    packed = json.dumps(header).encode()
    with pytest.raises(CheckpointError):
        snapshot.unpack(len(packed).to_bytes(8, "little") + packed + data[8 + length :], run="demo", shape=SHAPE)
