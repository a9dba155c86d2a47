"""Exclusive turns for threads, and Ctrl-C that waits for the end of what must not be cut. Knows nothing of engines."""

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POLL_SECONDS = 0.05  # how soon a Ctrl-C ends waiting for a turn


@contextmanager
def deferred_interrupt(breaks: Callable[[], bool] | None = None) -> Iterator[list[int]]:
    """Lets Ctrl-C take effect only behind the block; from the second one on at once, where `breaks` says so.

    Yields a list that holds something once Ctrl-C was pressed. Only the main thread gets any.
    """
    received: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield received
        return

    def defer(number: int, frame: object) -> None:
        received.append(number)
        if len(received) >= 2 and breaks is not None and breaks():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, defer)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, handler)
    if received:
        signal.raise_signal(signal.SIGINT)


class Turns:
    """Threads have a turn one after the other, in the order in which they asked; within its turn one may ask again.

    A plain lock would not do: a thread that steps in a loop takes it back before one that waits has woken up.

    Attributes:
        is_breakable: whether whoever has the turn is where a second Ctrl-C may take effect at once. To be set where
            all that an exception can leave undone is cleared up, and for what may take long.
        asked: what whoever has the turn does at its end.
    """

    def __init__(self) -> None:
        self.is_breakable = False
        self.asked: list[Callable[[], None]] = []
        # Of what follows, held for a few instructions; the garbage collector may ask in the middle of them.
        self._guard = threading.RLock()
        self._owner: int | None = None
        self._waiting: deque[tuple[int, threading.Lock]] = deque()  # threads, and the gates that let them go on

    def is_mine(self) -> bool:
        """Whether the calling thread has the turn."""
        return self._owner == threading.get_ident()

    @contextmanager
    def take(self) -> Iterator[None]:
        """Waits for a turn, which lasts as long as the block.

        Ctrl-C ends the waiting, but takes effect only behind the block; a second one at once where `is_breakable`.
        """
        if self.is_mine():
            yield
            return
        while True:
            with deferred_interrupt(lambda: self.is_breakable and self.is_mine()) as interrupts:
                if self._acquire(interrupts):
                    try:
                        yield
                    finally:
                        try:
                            while self.asked:
                                self.asked.pop()()
                        finally:
                            self._release()
                    return
            # Whoever handles Ctrl-C here has decided to go on.

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """Lets a second Ctrl-C take effect within the block, in this thread's turn."""
        try:
            self.is_breakable = True
            yield
        finally:
            self.is_breakable = False

    def ask(self, task: Callable[[], None]) -> None:
        """Has something done in a turn: now if nobody has it, else at the end of the one that a thread has.

        So nobody waits here, where the garbage collector may have ended a stream: this thread may have the turn, or
        be about to get it.
        """
        self.asked.append(task)
        self._do_asked()

    def _do_asked(self) -> None:
        """Does what was asked for, unless a thread has the turn, which will."""
        with self._guard:
            is_free = self._owner is None
        if is_free:
            with self.take():
                pass

    def _acquire(self, interrupts: list[int]) -> bool:
        """Waits for the turn; returns False if an interrupt came before it."""
        with self._guard:
            if self._owner is None:
                self._owner = threading.get_ident()
                return True
            gate = threading.Lock()
            gate.acquire()
            entry = (threading.get_ident(), gate)
            self._waiting.append(entry)
        has_turn = False
        try:
            while not has_turn and not interrupts:
                has_turn = gate.acquire(timeout=POLL_SECONDS)
        finally:
            if not has_turn:
                self._give_up(entry)
        return has_turn

    def _give_up(self, entry: tuple[int, threading.Lock]) -> None:
        """Waits no longer; passes on a turn that has come meanwhile."""
        with self._guard:
            was_waiting = entry in self._waiting
            if was_waiting:
                self._waiting.remove(entry)
        if not was_waiting:  # the turn came at this moment
            self._release()

    def _release(self) -> None:
        """Ends the turn; the thread that waits longest has the next one."""
        with self._guard:
            # At once, lest the garbage collector take a turn in between.
            self._owner, gate = self._waiting.popleft() if self._waiting else (None, None)
            if gate is not None:
                gate.release()
        if self.asked:  # at the last moment
            self._do_asked()
