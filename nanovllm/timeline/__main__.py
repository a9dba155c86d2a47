"""Draws a run that was recorded with NANOVLLM_TRACE=run.json, as an SVG or for chrome://tracing."""

import argparse
import json
from pathlib import Path

from nanovllm.timeline.chrome import chrome_events
from nanovllm.timeline.svg import draw_svg


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m nanovllm.timeline", description=__doc__)
    parser.add_argument("run", type=Path, help="the recorded run")
    parser.add_argument(
        "--output", type=Path, help="file to write (default: the run's name with .svg, or .chrome.json)"
    )
    parser.add_argument("--title", help="of the picture (default: the file's name)")
    parser.add_argument("--chrome", action="store_true", help="write the form of chrome://tracing instead of an SVG")
    args = parser.parse_args()
    run = json.loads(args.run.read_text())
    output = args.output or args.run.with_suffix(".chrome.json" if args.chrome else ".svg")
    if args.chrome:
        output.write_text(json.dumps(chrome_events(run)) + "\n")
    else:
        try:
            picture = draw_svg(run, args.title or args.run.name)
        except ValueError as error:
            parser.error(str(error))
        output.write_text(picture, encoding="utf-8")
    print(output)


if __name__ == "__main__":
    main()
