"""Runs the programs of tests/scripts on vLLM and on this package, and says what differs in their results.

    python -m tools.compare_scripts [MODEL] [SCRIPT ...]

A program that imports vLLM is run as it is, and once more with `nanovllm` in its import lines and no other change.
Each prints what its results are made of: types, names of fields, lengths. Values are not compared, as texts are
random. Where vLLM is not installed, and for programs that import nanovllm, only this package is run. The exit status
is 1 if a program fails, or if a result lacks what vLLM's has.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tests" / "scripts"
HELPER = "shapes"  # a module of the programs, no program
DEMO = ROOT / "nanovllm" / "demo"
PROBE = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
NO_SUCH_NAME = "ImportError: cannot import name"

NO_LORA = "there are no adapters"
TEXT_ONLY = "there are no images, sounds or videos"
ONE_ENGINE = "KV is not handed to other engines"
NO_ENCODER = "the models have no encoder"
NO_EXPERTS = "no experts are reported"
KNOWN: dict[tuple[str, str], str] = {  # fields that are missing here, or of another shape, by type and name; and why
    ("RequestOutput", "metrics"): "vLLM measures only with disable_log_stats=False, and under other names",
    ("RequestOutput", "lora_request"): NO_LORA,
    ("RequestOutput", "encoder_prompt"): NO_ENCODER,
    ("RequestOutput", "encoder_prompt_token_ids"): NO_ENCODER,
    ("RequestOutput", "multi_modal_placeholders"): TEXT_ONLY,
    ("RequestOutput", "kv_transfer_params"): ONE_ENGINE,
    ("RequestOutput", "kv_transfer_params_list"): ONE_ENGINE,
    ("RequestOutput", "prompt_routed_experts"): NO_EXPERTS,
    ("CompletionOutput", "lora_request"): NO_LORA,
    ("CompletionOutput", "kv_transfer_params"): ONE_ENGINE,
    ("CompletionOutput", "routed_experts"): NO_EXPERTS,
    ("BeamSearchSequence", "orig_prompt"): "it is vLLM's own form of the prompt, whose tokens are in `tokens`",
    ("BeamSearchSequence", "lora_request"): NO_LORA,
    ("BeamSearchSequence", "multi_modal_data"): TEXT_ONLY,
    ("BeamSearchSequence", "mm_processor_kwargs"): TEXT_ONLY,
    ("BeamSearchSequence", "logprobs"): "vLLM looks at twice the beam's width, here at what can be chosen",
    ("BeamSearchSequence", "finish_reason"): "vLLM does not say why a beam ended",
    ("BeamSearchSequence", "stop_reason"): "vLLM does not say why a beam ended",
}


class Outcome(NamedTuple):
    """What a program reported of its results, None if it failed, and what it printed then."""

    shapes: Any
    error: str


def names() -> list[str]:
    """The programs that there are."""
    return sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem != HELPER)


def adapt(source: str) -> str:
    """A program with `nanovllm` in its import lines, where they have `vllm`; nothing else is changed."""
    return re.sub(r"^(\s*(?:from|import) )vllm\b", r"\1nanovllm", source, flags=re.MULTILINE)


def is_for_vllm(name: str) -> bool:
    """Whether a program imports vLLM."""
    source = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
    return adapt(source) != source


def run(python: str, program: Path, model: str) -> Outcome:
    """Runs a program in a process of its own, which finds this package and the programs' helper."""
    paths = [str(ROOT), str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.run([python, str(program), model], env=env, capture_output=True, encoding="utf-8")
    # The last such line: an engine may print something of its own when it ends.
    lines = [line for line in process.stdout.splitlines() if line.startswith('{"type": ')]
    if process.returncode != 0 or not lines:
        return Outcome(None, process.stderr or f"exit status {process.returncode}, and no results")
    return Outcome(json.loads(lines[-1]), "")


def run_ours(name: str, model: str) -> Outcome:
    """Runs a program on this package."""
    source = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, f"{name}.py")
        program.write_text(adapt(source), encoding="utf-8")
        return run(sys.executable, program, model)


def differences(theirs: Any, ours: Any, where: str = "results") -> Iterator[str]:
    """Says where our description lacks what vLLM's has; more fields than it has are no difference."""
    kinds = [described if isinstance(described, str) else described["type"] for described in (theirs, ours)]
    if kinds[0] != kinds[1]:
        yield f"{where}: {kinds[0]} in vLLM, {kinds[1]} here"
    if isinstance(theirs, str) or isinstance(ours, str):
        return
    if "fields" in theirs and "fields" in ours:
        for name, field in theirs["fields"].items():
            if (theirs["type"], name) in KNOWN:
                continue
            if name in ours["fields"]:
                yield from differences(field, ours["fields"][name], f"{where}.{name}")
            else:
                yield f"{where}: no {name!r} here"
    elif "fields" in theirs or "fields" in ours:
        yield f"{where}: fields in {'vLLM' if 'fields' in theirs else 'ours'}, a collection in the other"
    else:
        for name in ("length", "keys"):
            if theirs.get(name) != ours.get(name):
                yield f"{where}: {name} {theirs.get(name)} in vLLM, {ours.get(name)} here"
        for index, (their_item, our_item) in enumerate(paired(theirs["items"], ours["items"])):
            yield from differences(their_item, our_item, f"{where}[{index}]")


def paired(theirs: list[Any], ours: list[Any]) -> Iterator[tuple[Any, Any]]:
    """The items of two collections side by side, where one may stand for all, as far as both go."""
    num_items = max(len(theirs), len(ours))
    spread = [items * num_items if len(items) == 1 else items for items in (theirs, ours)]
    return zip(*spread, strict=False)


def compare(name: str, model: str, vllm_python: str | None) -> bool:
    """Runs a program, on vLLM too if its interpreter is given, and prints how that went; True if all is well."""
    ours = run_ours(name, model)
    if ours.shapes is None:
        print(f"{name}: fails here\n{ours.error}")
        return False
    if vllm_python is None or not is_for_vllm(name):
        print(f"{name}: runs here" + ("" if is_for_vllm(name) else ", and is for this package alone"))
        return True
    theirs = run(vllm_python, SCRIPTS / f"{name}.py", model)
    if theirs.shapes is None:
        is_other_version = NO_SUCH_NAME in theirs.error
        print(f"{name}: runs here; fails on vLLM" + (", whose version lacks a name" if is_other_version else ""))
        print(theirs.error.splitlines()[-1] if is_other_version else theirs.error)
        return is_other_version
    found = list(differences(theirs.shapes, ours.shapes))
    print(f"{name}: {'differs' if found else 'the same'}", *found, sep="\n    ")
    return not found


def main() -> int:
    """Compares what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="folder or hub name, or demo: the bundled one")
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help=f"of {', '.join(names())} (default: all)")
    parser.add_argument(
        "--vllm-python", default=sys.executable, help="an interpreter that has vLLM, if another has it"
    )
    args = parser.parse_args()
    unknown = sorted(set(args.scripts) - set(names()))
    if unknown:
        parser.error(f"there is no script {', '.join(unknown)}")
    model = str(DEMO) if args.model == "demo" else args.model
    has_vllm = subprocess.run([args.vllm_python, "-c", PROBE]).returncode == 0
    if not has_vllm:
        print("vLLM is not installed: the programs run on nanovllm alone", file=sys.stderr)
    outcomes = [compare(name, model, args.vllm_python if has_vllm else None) for name in args.scripts or names()]
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
