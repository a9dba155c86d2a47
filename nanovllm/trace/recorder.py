"""Records the steps of an engine by wrapping its methods.

The cost is some microseconds a step and part, and memory that grows with every step. An engine without a recorder pays
nothing.
"""

import itertools
import json
import os
import time
import weakref
from pathlib import Path
from typing import Any

from nanovllm.engine.llm_engine import LaunchedStep, LLMEngine
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.sequence import Sequence

_numbers = itertools.count(1)  # of the process's engines that are recorded into files


class Recorder:
    """The steps of one engine from now on, in `run`, which goes through `json.dumps` as it is.

    `run["engine"]` has the options that bound a step, and `num_blocks`. `run["sequences"]` has of each, by its
    id as a string: `prompt_token_ids`; `added` and `ended`, the numbers of steps launched when it came and when it
    ended, None if it has not; `finish_reason`. `run["steps"]` has of each launched step:

        parts: [id, start, num_tokens, is_sampled] for each sequence: which of its tokens the step computes, and
            whether it samples one. If `start` of a sequence that joins is not 0, so many tokens were in the cache.
        joined: ids of the sequences that were admitted in this step.
        preempted: ids of those that were preempted when it was scheduled.
        new_blocks: [id, index, block]: the entries that block tables got.
        num_drafts: the drafts that it checks of each sequence.
        num_waiting, blocks_in_use: when it was scheduled.
        tokens: [id, tokens] of each sequence that took in what was sampled; not of one that had ended, whose token is
            surplus. Absent if nobody waited for the step.
        finished: ids of the sequences that these ended; may be absent too.
        scheduling, launched, awaiting, seen: times in seconds since the recorder began: when its scheduling began,
            when it was launched, when the host began to wait for its tokens, and when it had them. Absent is what did
            not happen: a step may have failed, or have nobody who waits for its tokens.
    """

    def __init__(self, engine: LLMEngine) -> None:
        """Wraps an engine.

        Raises:
            ValueError: the engine has unfinished requests, of which the record would lack the beginning.
        """
        if not engine.is_finished():
            raise ValueError(f"engine must have no unfinished requests, got {engine.get_num_unfinished_requests()}")
        config, scheduler = engine.config, engine.scheduler
        self.began = time.perf_counter()
        self.preempted: list[int] = []
        self.most_in_flight = config.max_unseen_steps + 1
        self.unseen: list[tuple[Batch, dict[str, Any]]] = []
        self.scheduler = weakref.proxy(scheduler)  # lest a recorder that is kept keep the engine
        self.run: dict[str, Any] = {
            "engine": {
                "model": str(config.model),
                "device": config.device,
                "max_num_batched_tokens": config.max_num_batched_tokens,
                "max_num_seqs": config.max_num_seqs,
                "block_size": config.kvcache_block_size,
                "num_blocks": len(scheduler.block_manager.blocks),
                "enable_prefix_caching": config.enable_prefix_caching,
                "async_scheduling": config.async_scheduling,
            },
            "sequences": {},
            "steps": [],
        }
        self._wrap(engine)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The steps launched so far."""
        return self.run["steps"]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the run as JSON."""
        Path(path).write_text(json.dumps(self.run, separators=(",", ":")) + "\n")

    def _wrap(self, engine: LLMEngine) -> None:
        scheduler = engine.scheduler
        add, schedule, preempt = scheduler.add, scheduler.schedule, scheduler.preempt
        finish, postprocess = scheduler.finish, scheduler.postprocess
        launch, take_in = engine._launch, engine._take_in

        def recorded_add(seq: Sequence) -> None:
            self._added(seq)
            add(seq)

        def recorded_schedule() -> Batch:
            began = self._now()
            batch = schedule()
            if batch.seqs:
                self._scheduled(batch, began)
            return batch

        def recorded_preempt(seq: Sequence) -> None:
            self.preempted.append(seq.seq_id)
            preempt(seq)

        def recorded_finish(seq: Sequence) -> None:
            record = self.run["sequences"].get(str(seq.seq_id))
            if record is not None:  # else it was not added yet: it waits for its grammar
                record |= {"ended": len(self.steps), "finish_reason": seq.finish_reason}
            finish(seq)

        def recorded_postprocess(batch: Batch, token_ids: list[list[int]]) -> list[Sequence]:
            step = self._step_of(batch)
            step["seen"] = self._now()
            num_known = [len(seq.token_ids) for seq in batch.seqs]
            finished = postprocess(batch, token_ids)
            took = [(seq.seq_id, seq.token_ids[n:]) for seq, n in zip(batch.seqs, num_known, strict=True)]
            step["tokens"] = [[seq_id, tokens] for seq_id, tokens in took if tokens]
            step["finished"] = [seq.seq_id for seq in finished]
            self.unseen = [(other, record) for other, record in self.unseen if other is not batch]
            return finished

        def recorded_launch() -> LaunchedStep | None:
            launched = launch()
            if launched is not None:
                self._step_of(launched.batch)["launched"] = self._now()
            return launched

        def recorded_take_in(step: LaunchedStep) -> None:
            self._step_of(step.batch)["awaiting"] = self._now()
            take_in(step)

        scheduler.add, scheduler.schedule, scheduler.preempt = recorded_add, recorded_schedule, recorded_preempt
        scheduler.finish, scheduler.postprocess = recorded_finish, recorded_postprocess
        engine._launch, engine._take_in = recorded_launch, recorded_take_in

    def _now(self) -> float:
        return round(time.perf_counter() - self.began, 6)

    def _step_of(self, batch: Batch) -> dict[str, Any]:
        return next(record for other, record in self.unseen if other is batch)

    def _added(self, seq: Sequence) -> None:
        self.run["sequences"][str(seq.seq_id)] = {
            "prompt_token_ids": seq.token_ids[: seq.num_prompt_tokens],
            "added": len(self.steps),
            "ended": None,
            "finish_reason": None,
        }

    def _scheduled(self, batch: Batch, began: float) -> None:
        manager = self.scheduler.block_manager
        ids = [seq.seq_id for seq in batch.seqs]
        id_of_row = dict(zip(batch.rows, ids, strict=True))
        record = {
            "parts": [
                [seq_id, start, num_tokens, index < batch.num_samples]
                for index, (seq_id, start, num_tokens) in enumerate(
                    zip(ids, batch.starts, batch.num_tokens, strict=True)
                )
            ],
            "joined": [seq.seq_id for seq in batch.joined],
            "preempted": self.preempted,
            "new_blocks": [[id_of_row[row], index, block] for row, index, block in batch.new_blocks],
            "num_drafts": batch.num_drafts,
            "num_waiting": len(self.scheduler.waiting),
            "blocks_in_use": len(manager.blocks) - len(manager.free_block_ids),
            "scheduling": began,
        }
        self.preempted = []
        self.steps.append(record)
        # A step whose tokens nobody wanted is never seen.
        self.unseen = [*self.unseen, (batch, record)][-self.most_in_flight :]


def record_engine(engine: LLMEngine, path: str) -> None:
    """Has an engine recorded, and the run written when it ends: closed, given up, or with the interpreter.

    The second engine of a process writes to `run-2.json` where the first one writes to `run.json`, and so on.
    """
    number = next(_numbers)
    file = Path(path)
    if number > 1:
        file = file.with_stem(f"{file.stem}-{number}")
    recorder = Recorder(engine)
    recorder.save(file)  # so that a path that cannot be written is refused now
    save = weakref.finalize(engine, recorder.save, file)  # called once, whoever comes first
    close = engine.ranks.close

    def recorded_close() -> None:
        save()
        close()

    engine.ranks.close = recorded_close
