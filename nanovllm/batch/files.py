"""A batch in files: OpenAI's JSON Lines of requests, and of what came of them. Knows nothing of engines or bodies.

A line of requests is known by its custom_id, one that has none of its own by its number. What was written before is
found by that, so that a run that was killed goes on where it stopped. In memory, a line takes two bytes while a batch
runs, and some forty while it starts.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import xxhash

ID_PREFIX = "batch_req_"  # then the number of the line of requests
BLANK = 0  # stands for the name of a line without a request


class Todo(NamedTuple):
    """What is to be done of a file of requests, for each of its L lines.

    Attributes:
        is_done: bool [L], whether nothing need be done about it: it is blank, or its result is there.
        is_repeated: bool [L], whether an earlier line has its custom_id.
        num_requests: lines that are not blank.
        num_done: those of them whose results are there.
    """

    is_done: np.ndarray
    is_repeated: np.ndarray
    num_requests: int
    num_done: int


class ResultFile:
    """The file of results, to which whole lines are added.

    Attributes:
        path: of the file.
        done: names of the lines of requests whose results were there when it was opened, uint64.
        size: bytes of its whole lines.
    """

    def __init__(self, path: str | os.PathLike[str], resumes: bool) -> None:
        """Opens or makes the file; `resumes` what a killed run has written, whose last line may be torn.

        Raises:
            ValueError: there are results, and they are not to be resumed; or there is something else in the file.
            OSError: the file cannot be read or written.
        """
        self.path = os.fspath(path)
        self.done = np.zeros(0, dtype=np.uint64)
        self.size = 0
        self.file = open(path, "ab+", buffering=0)  # noqa: SIM115
        try:
            if os.path.getsize(path) and not resumes:
                raise ValueError(f"{self.path} has something in it: resume the batch (--resume), or name another file")
            if resumes:
                self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file, all of whose lines have been written."""
        self.file.close()

    def write(self, record: dict[str, Any]) -> None:
        """Adds a line.

        Raises:
            OSError: the disk is full, or fails; what was written before is whole.
        """
        line = memoryview(json.dumps(record).encode() + b"\n")
        rest = line
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            with suppress(OSError):  # else the line is torn, which resuming copes with
                self.file.truncate(self.size)
            hint = f"{error.strerror}; the lines before are whole: make room and resume the batch (--resume)"
            raise OSError(error.errno, hint, self.path) from error
        self.size += len(line)

    def _read(self) -> None:
        """Finds what is done, and removes a torn last line."""
        done = array("Q")
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                done.append(self._name(number, line))
                self.size += len(line)
        self.done = np.frombuffer(done, dtype=np.uint64)
        self.file.truncate(self.size)

    def _name(self, number: int, line: bytes) -> int:
        """The name of the line of requests of which a line tells the result."""
        try:
            record = json.loads(line)
            if "response" in record and record["custom_id"] is not None:
                return custom_name(record["custom_id"])
            return line_name(int(record["id"].removeprefix(ID_PREFIX)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"line {number} of {self.path} is no result of a batch: {line!r:.200}") from error


def read_requests(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """The lines of a file of requests with their numbers from 1 on, blank ones too."""
    with open(path, "rb") as lines:
        yield from enumerate(lines, start=1)


def parse_request(line: bytes) -> dict[str, Any]:
    """The request of a line, which has a custom_id; the rest of it is not checked.

    Raises:
        TypeError, ValueError: it is no JSON object that has one.
    """
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON: {error}") from error
    if not isinstance(request, dict):
        raise TypeError(f"it must be a JSON object, got {request!r:.200}")
    if not isinstance(request.get("custom_id"), str):
        raise TypeError(f"custom_id must be a string, got {request.get('custom_id')!r:.200}")
    return request


def find_todo(path: str | os.PathLike[str], done: np.ndarray) -> Todo:
    """What is to be done of a file of requests; `done` are the names of those whose results are there."""
    gathered = array("Q")
    for number, line in read_requests(path):
        if not line.strip():
            gathered.append(BLANK)
            continue
        try:
            gathered.append(custom_name(parse_request(line)["custom_id"]))
        except (TypeError, ValueError):
            gathered.append(line_name(number))
    names = np.frombuffer(gathered, dtype=np.uint64)
    is_blank = names == BLANK
    order = np.argsort(names, kind="stable")  # so that of equal names the first comes first
    is_repeated = np.zeros(len(names), dtype=bool)
    is_repeated[order[1:]] = names[order[1:]] == names[order[:-1]]
    is_repeated &= ~is_blank
    for index in np.flatnonzero(is_repeated).tolist():
        names[index] = line_name(index + 1)
    done = np.append(np.sort(done), np.uint64(BLANK))  # found where a name stands behind all others
    is_written = (done[np.searchsorted(done[:-1], names)] == names) & ~is_blank
    return Todo(is_written | is_blank, is_repeated, int((~is_blank).sum()), int(is_written.sum()))


def custom_name(custom_id: str) -> int:
    """What a line with a custom_id is known by: 64 bits of a hash, by which 10 million lines hardly ever meet."""
    return xxhash.xxh64_intdigest(b"id " + custom_id.encode(errors="surrogatepass"))


def line_name(number: int) -> int:
    """What a line without a custom_id of its own is known by."""
    return xxhash.xxh64_intdigest(b"line %d" % number)
