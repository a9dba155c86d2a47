"""tools/worst_gap.py, on the demo."""

from __future__ import annotations

import sys

import pytest

from nanovllm import LLM
from tools import worst_gap

ARGUMENTS = ["worst_gap.py", "--model", "demo", "--max-model-len", "1024", "--num-decodes", "3", "--prompt-len", "600"]


def test_each_threshold_has_a_line(monkeypatch, capsys):
    """The prompt is computed in as many steps as the threshold says, while all others decode."""
    steps, step = [], LLM.step

    def counted_step(self: LLM) -> list:
        outputs = step(self)
        steps.append((self.config.long_prefill_token_threshold, {output.request_id for output in outputs}))
        return outputs

    monkeypatch.setattr(LLM, "step", counted_step)
    monkeypatch.setattr(sys, "argv", [*ARGUMENTS, "--thresholds", "100", "1000"])
    worst_gap.main()
    lines = capsys.readouterr().out.splitlines()[2:]
    figures = [[float(text) for text in line.split()] for line in lines]
    assert [line[0] for line in figures] == [100, 1000]
    for _, decodes, median, second, worst, first_token in figures:
        assert decodes > 0 and 0 < median <= worst <= first_token and second <= worst
    num_steps = {}
    for threshold in (100, 1000):
        of_threshold = [ids for of, ids in steps if of == threshold]
        (end,) = (index for index, ids in enumerate(of_threshold) if len(ids) == 4)
        num_steps[threshold] = sum(ids == {"0", "1", "2"} for ids in of_threshold[:end])
        assert num_steps[threshold] > worst_gap.NUM_WARM
        assert of_threshold[end - num_steps[threshold] : end] == [{"0", "1", "2"}] * num_steps[threshold]
    assert num_steps[100] - num_steps[1000] == 6 - 1


def test_bad_lengths(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*ARGUMENTS, "--max-model-len", "601"])
    with pytest.raises(SystemExit):
        worst_gap.main()
    assert "--prompt-len must be less than --max-model-len=601, got 600" in capsys.readouterr().err
