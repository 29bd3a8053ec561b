"""Who may work on an engine's state: one thread at a time, and which one that is.

As long as a single thread calls, it does the work itself: a script needs no other thread. After
`Owner.start`, or from the first call of a second thread on, a thread of the engine's own does all
of it. Others hand it operations through a queue and wait for their results.

The state must survive an interrupt (Ctrl-C, or whatever a signal handler raises) between any two
operations of the calling thread. Such an error is raised where the interpreter looks for signals:
after a call, when a loop jumps back, at the start of a function; never between a plain assignment
and the `try` behind it. So flags are set right before `try` and cleared first thing in `finally`,
and a `with` on a lock is safe. What an interrupt leaves half done is made whole by `recover`, at
once or, if that is interrupted too, before the next operation.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import get_ident
from typing import Any, Protocol, TypeVar

from stateful_kv.errors import SessionBusyError

T = TypeVar("T")
_log = logging.getLogger(__name__)
_owners: weakref.WeakSet[Owner] = weakref.WeakSet()


class Worker(Protocol):
    """What works on the state when it is its owner's turn."""

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        ...

    def step(self) -> bool:
        """Runs one step; False when there was nothing to compute."""
        ...

    def recover(self, error: BaseException | None) -> None:
        """Makes the state whole after an operation that was cut off by `error`, if it is known.

        May itself be interrupted and called again.
        """
        ...

    def tidy(self) -> None:
        """Ends what nobody waits for any more; called before every operation."""
        ...

    def fail_all(self, error: Exception) -> None:
        """Ends all running turns: a step cannot be taken."""
        ...


class _Posted:
    """An operation on its way to the owner, and the result on its way back."""

    def __init__(self, operation: Callable[[], Any], future: Future[Any] | None) -> None:
        self._operation = operation
        self._future = future

    def run(self) -> None:
        """Runs the operation; an exception goes to who waits for it."""
        try:
            result = self._operation()
        except Exception as error:
            if self._future is None:
                _log.exception("an operation that nobody waits for failed")
            else:
                self._future.set_exception(error)
        except BaseException as error:
            if self._future is not None:
                self._future.set_exception(error)
            raise
        else:
            if self._future is not None:
                self._future.set_result(result)


class Owner:
    """Runs every operation on an engine's state, one after the other."""

    def __init__(self, worker: Worker) -> None:
        """Begins without a thread."""
        self._worker_ref = weakref.ref(worker)  # it owns this: a cycle would keep the pools
        self._inbox: SimpleQueue[_Posted | None] = SimpleQueue()
        self._start_lock = threading.Lock()
        self._lock = threading.Lock()
        self._inside = 0  # the thread that runs an operation
        self._home = 0  # the thread that does the work itself as long as no other calls
        self._thread: threading.Thread | None = None
        self._is_dirty = False  # an operation was cut off and nobody has recovered yet
        weakref.finalize(self, self._inbox.put, None)
        _owners.add(self)

    @property
    def _worker(self) -> Worker:
        worker = self._worker_ref()
        assert worker is not None, "whoever calls an engine keeps it"
        return worker

    @property
    def is_threaded(self) -> bool:
        """True once the engine has a thread of its own."""
        return self._thread is not None

    def is_inline(self) -> bool:
        """Whether the calling thread does the work itself; a second thread starts the engine's."""
        if self._thread is not None:
            return False
        with self._start_lock:
            if self._home == 0:
                self._home = get_ident()
        if self._home == get_ident():
            return self._thread is None
        self.start()
        return False

    def start(self) -> None:
        """Gives the engine a thread of its own; does nothing if it has one."""
        with self._start_lock:
            if self._thread is not None:
                return
            thread = threading.Thread(
                target=_serve,
                args=(weakref.ref(self), self._inbox),
                name="stateful-kv engine",
                daemon=True,
            )
            thread.start()
            self._thread = thread
        self.post(lambda: None)  # streams that are open go on

    def stop(self) -> None:
        """Ends the engine's thread, if it has one, after the operation that it is in."""
        # Under the lock: what is handed over before is done, and what comes after sees no thread.
        with self._start_lock:
            thread, self._thread = self._thread, None
            if thread is not None and thread is not threading.current_thread():
                self._inbox.put(None)
                thread.join()

    def post(self, operation: Callable[[], Any]) -> None:
        """Leaves an operation for the owner and returns at once.

        For destructors, which may run anywhere, also in the middle of an operation: without a
        thread it is run when the next operation begins.
        """
        self._inbox.put(_Posted(operation, None))

    def catch_up(self) -> None:
        """Runs what was left for the owner, if the calling thread can do that now."""
        is_free = self._thread is None and self._inside == 0
        if is_free and self._home == get_ident() and not self._inbox.empty():
            self.run(lambda: None)

    def submit(self, operation: Callable[[], T]) -> Future[T]:
        """Hands an operation to the engine's thread, which is started if need be."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # it runs, whoever gives up waiting
        posted = _Posted(operation, future)
        while not self._hand_over(posted):
            self.start()
        return future

    def perform(self, operation: Callable[[], T]) -> T:
        """Runs an operation when its turn comes; returns or raises what it does.

        Raises:
            SessionBusyError: called from within an operation, which cannot wait for itself.
        """
        if self._inside == get_ident():
            raise SessionBusyError("the engine is in the middle of a step, which called it again")
        return self.run(operation) if self.is_inline() else self.submit(operation).result()

    def _hand_over(self, posted: _Posted) -> bool:
        """False if there is no thread to take it."""
        with self._start_lock:
            if self._thread is None:
                return False
            self._inbox.put(posted)
            return True

    def run(self, operation: Callable[[], T]) -> T:
        """Runs an operation in the calling thread, which must be the one that does the work."""
        if self._inside == get_ident():
            raise SessionBusyError("the engine is in the middle of a step, which called it again")
        with self._lock:
            self._inside = get_ident()
            try:
                if self._is_dirty:
                    self._worker.recover(None)
                self._is_dirty = True
                self._run_posted()
                self._worker.tidy()
                result = operation()
                self._is_dirty = False
                return result
            except Exception:
                self._is_dirty = False
                raise
            except BaseException as error:
                self._worker.recover(error)
                self._is_dirty = False
                raise
            finally:
                self._inside = 0

    def _run_posted(self) -> None:
        """Runs what was left for the owner; the engine's thread takes its operations one by one."""
        while self._thread is None and not self._inbox.empty():
            try:
                posted = self._inbox.get_nowait()
            except Empty:
                return
            if posted is not None:
                posted.run()

    def _serve(self, posted: _Posted) -> None:
        """The engine's thread: runs an operation, then steps as long as there is work."""
        next_posted: _Posted | None = posted
        while True:
            try:
                if next_posted is not None:
                    self.run(next_posted.run)
                elif self._worker.has_work and self._thread is not None:
                    self.run(self._worker.step)
                else:
                    return
            except Exception as error:
                self.run(lambda error=error: self._worker.fail_all(error))  # type: ignore[misc]
            except BaseException:
                _log.exception("the engine's thread goes on after")
            try:
                next_posted = self._inbox.get_nowait()
                if next_posted is None:  # `stop`: again, for the loop that waits for it
                    self._inbox.put(None)
                    return
            except Empty:
                next_posted = None

    def _after_fork(self) -> None:
        """In a child process: of all threads only the one that forked is there."""
        self._start_lock = threading.Lock()
        self._lock = threading.Lock()
        self._is_dirty = self._is_dirty or self._inside != 0
        self._inside, self._home, self._thread = 0, 0, None


def _serve(owner: weakref.ref[Owner], inbox: SimpleQueue[_Posted | None]) -> None:
    """What the engine's thread runs; while it waits, it does not keep the engine alive."""
    while True:
        posted = inbox.get()
        alive = owner()
        worker = None if alive is None else alive._worker_ref()
        if posted is None or alive is None or worker is None:
            return
        alive._serve(posted)
        del posted, alive, worker


@atexit.register
def _stop_all() -> None:
    """A thread in the middle of a step must not outlive what the interpreter tears down."""
    for owner in list(_owners):
        owner.stop()


def _after_fork_in_child() -> None:
    for owner in list(_owners):
        owner._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
