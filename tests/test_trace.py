"""Recorded runs: that they say what the engine did, that engines without a recorder are left alone; their pictures."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from checkpoints import mixed_prompts
from engines import GREEDY, Trace, check_idle, engine, expected, generate, tokens

from nanovllm import SamplingParams
from nanovllm.engine.sequence import Sequence
from nanovllm.timeline.chrome import chrome_events
from nanovllm.timeline.states import State, states_of
from nanovllm.timeline.svg import draw_svg, num_computed
from nanovllm.trace import Recorder
from nanovllm.trace import recorder as recorder_module
from nanovllm.trace.show import ranges, show_run, slots_of

SMALL = {"num_kvcache_blocks": 19, "max_num_batched_tokens": 40, "max_num_seqs": 7}


@pytest.fixture(scope="module")
def recorded(checkpoint):
    """A run with chunks, preemptions and hits: its record, what the tests' own trace saw, and the results."""
    with engine(checkpoint("qwen3").path, **SMALL) as llm:
        trace, recorder = Trace(llm), Recorder(llm)
        results = generate(llm, mixed_prompts())
    return recorder.run, trace, results


def test_a_record_leaves_the_tokens_as_they_are(checkpoint, recorded):
    assert tokens(recorded[2]) == expected(checkpoint("qwen3"), mixed_prompts())


def test_a_record_tells_what_was_computed(recorded):
    run, trace, results = recorded
    assert len(run["steps"]) == len(trace.batches)
    for step, batch in zip(run["steps"], trace.batches, strict=True):
        want = zip(batch.seqs, batch.starts, batch.num_tokens, strict=True)
        assert [part[:3] for part in step["parts"]] == [[seq.seq_id, start, n] for seq, start, n in want]
        assert step["joined"] == [seq.seq_id for seq in batch.joined]
    assert sum(len(step["preempted"]) for step in run["steps"]) == trace.num_preemptions > 0
    told = {seq_id: [] for seq_id in range(len(results))}
    for step in run["steps"]:
        for seq_id, new in step.get("tokens", []):
            told[seq_id] += new
    assert list(told.values()) == [result["token_ids"] for result in results]
    for seq_id, result in enumerate(results):
        seq = run["sequences"][str(seq_id)]
        assert seq["finish_reason"] == result["finish_reason"]
        assert seq["prompt_token_ids"] == result["prompt_token_ids"]
        joined_at = next(step for step in run["steps"] if seq_id in step["joined"])
        assert next(start for i, start, *_ in joined_at["parts"] if i == seq_id) == result["num_cached_tokens"]


def test_block_tables_made_of_a_record_hold_every_position_once(recorded):
    """In each step, no two tokens are stored in one slot."""
    run = recorded[0]
    tables = {}
    for step in run["steps"]:
        for seq_id in step["joined"]:
            tables[seq_id] = []
        for seq_id, index, block in step["new_blocks"]:
            assert index == len(tables[seq_id])
            tables[seq_id].append(block)
        slots = [slot for i, start, n, _ in step["parts"] for slot in slots_of(tables[i], start, start + n, 16)]
        assert len(slots) == len(set(slots))
        assert 0 < step["blocks_in_use"] <= 19


def test_times_are_in_order(recorded):
    steps = recorded[0]["steps"]
    for step in steps:
        assert step["scheduling"] <= step["launched"]
        if "seen" in step:
            assert step["launched"] <= step["awaiting"] <= step["seen"]
    assert all("seen" in step for step in steps[:-1])
    pairs = itertools.pairwise([step for step in steps if "seen" in step])
    overlapped = [after["launched"] <= before["seen"] for before, after in pairs]
    assert any(overlapped), "steps are launched before the ones before them are seen"


def test_a_surplus_token_is_not_taken_in(checkpoint):
    """With overlapped steps an EOS is seen one step late, without them at once."""
    prompts = mixed_prompts()
    num_surplus = {}
    for is_async in (True, False):
        with engine(checkpoint("qwen3").path, async_scheduling=is_async) as llm:
            recorder = Recorder(llm)
            results = generate(llm, prompts)
        cells = [cell for row in states_of(recorder.run).values() for cell in row.values()]
        num_surplus[is_async] = sum(cell.state is State.SURPLUS for cell in cells)
        num_eos = sum(result["finish_reason"] == "stop" for result in results)
    assert num_surplus == {True: num_eos, False: 0}
    assert num_eos > 0


def test_states(recorded):
    run, trace, _ = recorded
    states = states_of(run)
    seen = {cell.state for row in states.values() for cell in row.values()}
    assert seen >= {State.WAITING, State.PREEMPTED, State.PREFILL, State.CACHED, State.DECODE, State.SURPLUS}
    for number, batch in enumerate(trace.batches):
        computing = {i for i, row in states.items() if number in row and row[number].num_tokens}
        assert computing == {seq.seq_id for seq in batch.seqs}
    for seq_id, row in states.items():
        assert list(row) == list(range(min(row), max(row) + 1)), f"sequence {seq_id} is there without a gap"


def test_what_is_dropped_has_an_end(checkpoint):
    """A request that was aborted while it waited is drawn as far as it was there."""
    with engine(checkpoint("qwen3").path, max_num_seqs=1) as llm:
        recorder = Recorder(llm)
        first, second = (llm.add_request(list(prompt), GREEDY) for prompt in mixed_prompts()[:2])
        llm.step()
        llm.step()
        llm.abort_request(second)
        while llm.has_unfinished_requests():
            llm.step()
        llm.scheduler.finish(Sequence(2, [5, 6], GREEDY, seed=0))  # as of a request whose grammar is not compiled yet
        check_idle(llm)
    assert list(recorder.run["sequences"]) == [str(first), str(second)]
    assert recorder.run["sequences"][str(second)]["ended"] == 2
    states = states_of(recorder.run)
    assert [cell.state for cell in states[second].values()] == [State.WAITING] * 2
    assert len(states[first]) > 2


def test_the_run_in_words(recorded):
    lines = list(show_run(recorded[0], lambda ids: " ".join(map(str, ids))))
    text = "\n".join(lines)
    assert text.count("is preempted: it loses its blocks [") == recorded[1].num_preemptions
    assert text.count("\nstep ") == len(recorded[1].batches)
    assert "out nothing: the prompt goes on" in text
    assert "more are cached" in text
    assert "out nothing: the sequence had ended when this was seen" in text


def test_ranges_and_slots():
    assert slots_of([4, 2], 14, 18, 16) == [78, 79, 32, 33]
    assert ranges([78, 79, 32, 33, 40]) == "78-79, 32-33, 40"
    assert ranges([]) == ""


def test_the_svg_needs_no_other_file(recorded):
    svg = draw_svg(recorded[0], "mixed <prompts> & more")
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert "mixed &lt;prompts&gt; &amp; more" in svg
    assert not any(key.endswith(("href", "src")) for element in root.iter() for key in element.attrib)
    drawn = {element.get("fill") for element in root.iter() if element.tag.endswith("rect")}
    assert drawn >= {state.value for state in State if state is not State.IDLE}


def test_a_run_without_steps_is_refused():
    with pytest.raises(ValueError, match="no steps"):
        draw_svg({"engine": {}, "sequences": {}, "steps": []}, "nothing")


def test_chrome_events(recorded):
    run = recorded[0]
    events = chrome_events(run)["traceEvents"]
    launches = [event for event in events if event["name"].startswith("launch step ")]
    assert len(launches) == len(run["steps"])
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")
    for kind in range(2):  # one behind the other on each of the two tracks of steps
        track = [event for event in events if event["pid"] == 2 and event.get("tid") == kind and event["ph"] == "X"]
        for before, after in itertools.pairwise(track):
            assert before["ts"] + before["dur"] <= after["ts"] + 1


def test_an_engine_has_no_recorder_unless_asked(checkpoint, monkeypatch, tmp_path):
    path = checkpoint("qwen3").path
    monkeypatch.delenv("NANOVLLM_TRACE", raising=False)
    with engine(path) as llm:
        assert "schedule" not in vars(llm.scheduler)
    monkeypatch.setenv("NANOVLLM_TRACE", str(tmp_path / "missing" / "run.json"))
    with pytest.raises(FileNotFoundError, match="missing"):
        engine(path)


def test_a_busy_engine_is_refused(checkpoint):
    with engine(checkpoint("qwen3").path) as llm:
        llm.add_request([5, 6, 7], GREEDY)
        with pytest.raises(ValueError, match="unfinished requests, got 1"):
            Recorder(llm)
        assert "schedule" not in vars(llm.scheduler)


def test_a_run_that_failed_can_be_drawn(checkpoint, monkeypatch, tmp_path):
    """What was recorded until then is written, and the step that failed is shown."""
    monkeypatch.setattr(recorder_module, "_numbers", itertools.count(1))
    monkeypatch.setenv("NANOVLLM_TRACE", str(tmp_path / "run.json"))
    llm = engine(checkpoint("qwen3").path)
    call, calls = llm.ranks.call, []

    def failing_call(method, *args):
        calls.append(method)
        if len(calls) == 3:
            raise OSError("the third step fails")
        return call(method, *args)

    monkeypatch.setattr(llm.ranks, "call", failing_call)
    with pytest.raises(RuntimeError, match="the third step fails"):
        llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)
    run = json.loads((tmp_path / "run.json").read_text())
    assert ["launched" in step for step in run["steps"]] == [True, True, False]
    assert run["sequences"]["0"]["ended"] is None
    assert len(states_of(run)[0]) == 3
    draw_svg(run, "failed")
    assert len(chrome_events(run)["traceEvents"]) > 6


SCRIPT = """
import sys
from nanovllm import LLM, SamplingParams
params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
with LLM(sys.argv[1], device="cpu", max_model_len=64) as llm:
    llm.generate([[5, 6, 7]], params, use_tqdm=False)
other = LLM(sys.argv[1], device="cpu", max_model_len=64)  # never closed
other.generate([[5, 6, 7], [8]], params, use_tqdm=False)
"""


def test_the_switch_and_the_command(checkpoint, monkeypatch, tmp_path):
    """A script that knows nothing of it writes a run for each engine, and `nanovllm.timeline` draws it."""
    monkeypatch.setenv("NANOVLLM_TRACE", str(tmp_path / "run.json"))
    subprocess.run([sys.executable, "-c", SCRIPT, checkpoint("qwen3").path], check=True, timeout=200)
    runs = [json.loads((tmp_path / name).read_text()) for name in ("run.json", "run-2.json")]
    assert [len(run["sequences"]) for run in runs] == [1, 2]
    assert [[len(part) for _, part in run["steps"][0]["tokens"]] for run in runs] == [[1], [1, 1]]
    draw = [sys.executable, "-m", "nanovllm.timeline", str(tmp_path / "run.json")]
    for options, suffix in ([], ".svg"), (["--chrome"], ".chrome.json"):
        done = subprocess.run(draw + options, check=True, capture_output=True, text=True, timeout=200)
        assert Path(done.stdout.strip()) == tmp_path / f"run{suffix}"
        assert (tmp_path / f"run{suffix}").stat().st_size > 500


def test_several_samples_and_drafts_are_recorded(checkpoint):
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    with engine(checkpoint("qwen3").path, speculative_config=speculation) as llm:
        recorder = Recorder(llm)
        (result,) = generate(llm, [(5, 6, 7, 8) * 4], params)
        several = llm.generate(
            [[9, 10, 11]], SamplingParams(n=3, max_tokens=3, seed=1, ignore_eos=True), use_tqdm=False
        )
    told = [new for step in recorder.steps for seq_id, new in step.get("tokens", []) if seq_id == 0]
    assert [token for new in told for token in new] == result["token_ids"]
    checking = [step for step in recorder.steps if step["num_drafts"]]
    assert checking
    assert all(num_computed(step) == 1 + step["num_drafts"] for step in checking)
    ids = [seq_id for seq_id, seq in recorder.run["sequences"].items() if len(seq["prompt_token_ids"]) == 3]
    assert len(ids) == len(several[0]["outputs"]) == 3
