"""A trainer with text and a tokenizer of its owner's: what it says, what it refuses, and what a resume takes along."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from processes import READY_S, RUN, peer_spec, start_coordinator, trainer_spec

from moe_coordinator.supervisor import Supervisor
from moe_net.checkpoint_folder import TOKENIZER, checkpoints_of, newest_in
from moe_net.data.corpus import load_corpus
from moe_net.data.vocabulary import make_tokenizer
from moe_peer.metrics import Event, StepMetrics, read_metrics


async def test_a_trainer_with_own_text_says_what_it_reads_and_belongs_to_the_runs_tokenizer(tmp_path: Path) -> None:
    text, bad = tmp_path / "text", tmp_path / "bad"
    for folder in (text, bad):
        folder.mkdir()
    for number in range(20):
        rows = (json.dumps({"text": f"record {number} {row}: the quick brown fox\n"}) for row in range(60))
        (text / f"{number}.jsonl").write_text("\n".join(rows))
    (text / "old.txt").write_bytes(b"caf\xe9\n" * 100)
    (bad / "old.txt").write_bytes(b"caf\xe9\n" * 1000)
    file, other = tmp_path / TOKENIZER, tmp_path / "other.json"
    _, sha256 = make_tokenizer(load_corpus(text), file, vocab_size=300)
    _, other_sha256 = make_tokenizer(load_corpus(text), other, vocab_size=310)
    run = replace(RUN, tokenizer="bpe", tokenizer_sha256=sha256, model=replace(RUN.model, vocab_size=320))
    out = tmp_path / "out"
    async with Supervisor(tmp_path / "logs") as supervisor:
        _, join = await start_coordinator(supervisor, tmp_path, run)
        peer = await supervisor.start(peer_spec("peer", join, "--experts", "*.*"))
        await peer.ready(READY_S)

        async def train(name: str, steps: int, *more: object) -> tuple[int, str]:
            trainer = await supervisor.start(trainer_spec(join, out, steps, *more, name=name))
            code = await trainer.wait()
            return code, trainer.log_path.read_text()

        code, said = await train("refused-text", 2, "--data", bad, "--tokenizer", file)
        assert code == 2, said
        assert "most of the text cannot be used: read 0 of 1 file, 0 of 5 KB; left out: old.txt (not UTF-8 at" in said
        code, said = await train("refused-tokenizer", 2, "--data", text, "--tokenizer", other)
        assert code == 2, said
        assert sha256 in said
        assert other_sha256 in said
        assert "Traceback" not in said
        code, said = await train("first", 2, "--data", text, "--tokenizer", file)
        assert code == 0, said
        summary = "read 20 of 21 files, "
        assert f"text: {summary}" in said
        assert '{"event": "text", "summary": "' + summary in said
        assert "left out: old.txt (not UTF-8 at byte 3)" in said
        saved = newest_in(checkpoints_of(out))
        assert saved is not None
        assert (saved / TOKENIZER).read_bytes() == file.read_bytes()
        # Without the file: it is in the checkpoint.
        code, said = await train("second", 4, "--data", text, "--go-on")
        assert code == 0, said
    records = read_metrics(out / "metrics.jsonl")
    assert [r.step for r in records if isinstance(r, StepMetrics)] == [0, 1, 2, 3]
    assert not [r for r in records if isinstance(r, Event) and r.what in ("run_changed", "experts_differ")]
