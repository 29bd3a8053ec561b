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

An interrupt in a destructor or in a callback written in Python is lost, and with it what was to be
done there. So nothing hangs on those: C code notices that an object was dropped, see `Owner.watch`.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from threading import get_ident
from typing import Any, Protocol, TypeVar

from stateful_kv.errors import SessionBusyError
from stateful_kv.system.promise import Promise

T = TypeVar("T")
_log = logging.getLogger(__name__)
_owners: weakref.WeakSet[Owner] = weakref.WeakSet()
_exiting_thread = 0  # the one that ends the interpreter; no other may begin an operation then
_FORK_TIMEOUT = 60.0  # seconds that a fork waits for the operation that another thread runs


class Worker(Protocol):
    """What works on the state when it is its owner's turn."""

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        ...

    def step(self) -> bool:
        """Runs one step; False when there was nothing to compute."""
        ...

    def recover(self, error: BaseException | None, *, is_interrupt: bool) -> None:
        """Makes the state whole after an operation that was cut off. May be repeated.

        Args:
            error: what cut it off, if that is known.
            is_interrupt: turns that wait in the calling thread are given up.
        """
        ...

    def tidy(self) -> None:
        """Ends what nobody waits for any more; called before every operation."""
        ...

    @property
    def is_tidy(self) -> bool:
        """Whether `tidy` would change nothing."""
        ...

    def abandon(self, subject: object) -> None:
        """Ends what belonged to an object that is gone; see `Owner.watch`. May be repeated."""
        ...

    def fail_all(self, error: BaseException) -> None:
        """Ends all running turns: a step cannot be taken."""
        ...


class _Posted:
    """An operation on its way to the owner, and the result on its way back."""

    def __init__(self, operation: Callable[[], Any], promise: Promise[Any] | None) -> None:
        self._parts: tuple[Callable[[], Any], Promise[Any] | None] | None = operation, promise

    @property
    def has_caller(self) -> bool:
        """Whether somebody waits for the result."""
        return self._parts is not None and self._parts[1] is not None

    def run(self) -> None:
        """Runs the operation; an exception goes to who waits for it."""
        assert self._parts is not None, "an operation runs once"
        operation, promise = self._parts
        self._parts = None  # it must not keep a session alive as long as steps follow
        try:
            result = operation()
        except Exception as error:
            if promise is None:
                _log.exception("an operation that nobody waits for failed")
            else:
                promise.set_exception(error)
        except BaseException as error:
            if promise is not None:
                promise.set_exception(error)
            raise
        else:
            if promise is not None:
                promise.set_result(result)


class _Watch(weakref.ref[object]):
    """Knows what is to be ended once nobody has an object any more."""

    __slots__ = ("subject",)
    subject: object


class Owner:
    """Runs every operation on an engine's state, one after the other.

    Attributes:
        num_waiting: calls of the thread that does the work itself which wait for turns.
    """

    def __init__(self, worker: Worker) -> None:
        """Begins without a thread."""
        self._worker_ref = weakref.ref(worker)  # it owns this: a cycle would keep the pools
        self._inbox: SimpleQueue[_Posted | _Watch | None] = SimpleQueue()
        self._watches: dict[int, _Watch] = {}
        self._start_lock = threading.Lock()
        self._lock = threading.Lock()
        self._inside = 0  # the thread that runs an operation
        self._home = 0  # the thread that does the work itself as long as no other calls
        self._thread: threading.Thread | None = None
        self._is_stopped = False  # no thread is started any more
        self._is_dirty = False  # an operation was cut off and nobody has recovered yet
        self.num_waiting = 0
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
        """Whether the calling thread does the work itself; a second thread starts the engine's.

        Raises:
            SessionBusyError: called from within an operation, which cannot wait for itself.
        """
        self._refuse_within()
        if self._thread is not None:
            return False
        with self._start_lock:
            if self._home == 0:
                self._home = get_ident()
        if self._home != get_ident():
            self.start()
        return self._thread is None

    def start(self) -> None:
        """Gives the engine a thread of its own; does nothing if it has one, or was stopped."""
        if self._is_stopped or self._thread is not None:
            return
        is_up: Promise[None] = Promise()
        threading.Thread(
            target=_serve,
            args=(weakref.ref(self), self._inbox, is_up),
            name="stateful-kv engine",
            daemon=True,
        ).start()
        is_up.wait()

    def _take_over(self) -> bool:
        """Makes the calling thread the engine's; False if there is one, or none is wanted.

        The new thread itself says so, since who starts it may be interrupted at any time.
        """
        with self._start_lock:
            if self._is_stopped or self._thread is not None:
                return False
            self._thread = threading.current_thread()
        # When Python ends, `_stop_all` ends the thread: it also waits for it.
        weakref.finalize(self, self._inbox.put, None).atexit = False
        self.post(lambda: None)  # streams that are open go on
        return True

    def stop(self) -> None:
        """Ends the engine's thread, if it has one, after the operation that it is in; for good.

        What was submitted before is still run. Later operations are run by whoever calls, which is
        enough for an engine that is closed. May be interrupted and called again.
        """
        self._refuse_within()
        with self._start_lock:  # nobody submits anything behind the word that ends the thread
            self._is_stopped = True
            thread = self._thread
            if thread is not None:
                self._inbox.put(None)
        if thread is not None:
            thread.join()
        self._thread = None

    def post(self, operation: Callable[[], Any]) -> None:
        """Leaves an operation for the owner and returns at once.

        Without a thread it is run when the next operation begins.
        """
        self._inbox.put(_Posted(operation, None))

    def watch(self, user: object, subject: object) -> None:
        """Has the worker abandon `subject` soon after the last reference to `user` is gone.

        The reference that notices it is put into the inbox by C code, which may run anywhere,
        also in the middle of an operation, and cannot be interrupted.
        """
        watch = _Watch(user, self._inbox.put)
        watch.subject = subject
        self._watches[id(watch)] = watch

    def catch_up(self) -> None:
        """Runs what was left for the owner, if the calling thread can do that now."""
        is_free = self._thread is None and self._inside == 0 and self._home in (0, get_ident())
        is_done = not self._is_dirty and self._inbox.empty()
        if is_free and not (is_done and self._worker.is_tidy):
            self.run(lambda: None)

    def submit(self, operation: Callable[[], T]) -> Promise[T]:
        """Hands an operation to the engine's thread, which is started if need be.

        Raises:
            SessionBusyError: called from within an operation, which cannot wait for itself.
        """
        self._refuse_within()
        promise: Promise[T] = Promise()
        posted = _Posted(operation, promise)
        while not self._is_stopped:
            with self._start_lock:
                if self._thread is not None and not self._is_stopped:
                    self._inbox.put(posted)
                    return promise
            self.start()
        self.run(posted.run)
        return promise

    def perform(self, operation: Callable[[], T]) -> T:
        """Runs an operation when its turn comes; returns or raises what it does.

        Raises:
            SessionBusyError: called from within an operation, which cannot wait for itself.
        """
        if not self.is_inline():
            return self.submit(operation).result()
        result = self.run(operation)
        if self._thread is not None:  # started meanwhile, and perhaps asleep: there may be work
            self.post(lambda: None)
        return result

    def run(self, operation: Callable[[], T]) -> T:
        """Runs an operation in the calling thread, which must be the one that does the work."""
        self._refuse_within()
        with self._lock:
            if _exiting_thread and _exiting_thread != get_ident():
                raise SystemExit  # ends a daemon thread without a word
            self._inside = get_ident()
            try:
                if self._is_dirty:
                    self._recover(None, is_interrupt=True)
                self._is_dirty = True
                self._run_posted()
                self._worker.tidy()
                result = operation()
                self._is_dirty = False
                return result
            except Exception as error:
                # A signal handler may have raised it in the middle of anything.
                self._recover(error, is_interrupt=False)
                self._is_dirty = False
                raise
            except BaseException as error:
                self._recover(error, is_interrupt=True)
                self._is_dirty = False
                raise
            finally:
                self._inside = 0

    def _recover(self, error: BaseException | None, *, is_interrupt: bool) -> None:
        """Makes the state whole; what was dropped and perhaps not ended yet is left again."""
        self._worker.recover(error, is_interrupt=is_interrupt)
        for watch in tuple(self._watches.values()):
            if watch() is None:
                self._inbox.put(watch)

    def _run_posted(self) -> None:
        """Runs what was left for the owner; the engine's thread takes its operations one by one."""
        while self._thread is None and not self._inbox.empty():
            try:
                posted = self._inbox.get_nowait()
            except Empty:
                return
            if posted is not None:
                self._run_one(posted)

    def _run_one(self, posted: _Posted | _Watch) -> None:
        if isinstance(posted, _Posted):
            posted.run()
            return
        try:
            self._worker.abandon(posted.subject)
        except Exception:
            _log.exception("what was dropped could not be ended")
        self._watches.pop(id(posted), None)

    def _refuse_within(self) -> None:
        if self._inside == get_ident():
            raise SessionBusyError("the engine is in the middle of a step, which called it again")

    def _serve(self, posted: _Posted | _Watch) -> None:
        """The engine's thread: runs an operation, then steps as long as there is work."""
        self._run_in_thread(partial(self._run_one, posted))
        while True:
            # Only what is there already: callers that never pause must not keep turns from going on
            for _ in range(self._inbox.qsize()):
                try:
                    next_posted = self._inbox.get_nowait()
                except Empty:
                    break
                if next_posted is None:  # `stop`: again, for the loop that waits for it
                    self._inbox.put(None)
                    return
                self._run_in_thread(partial(self._run_one, next_posted))
            if not self._worker.has_work:
                return
            self._run_in_thread(self._worker.step)

    def _run_in_thread(self, operation: Callable[[], object]) -> None:
        """Runs an operation; whatever it raises, the thread goes on, or nobody would be served.

        No signal reaches this thread: also a SystemExit comes from the model or the tokenizer.
        """
        try:
            try:
                self.run(operation)
            except BaseException as error:
                if _exiting_thread:
                    raise
                failure = error
                self.run(lambda: self._worker.fail_all(failure))
        except BaseException:
            if _exiting_thread:
                raise
            _log.exception("an operation failed; the engine's thread continues")

    def _hold_for_fork(self) -> bool:
        """Waits until no other thread is in an operation: a child could not end it."""
        return self._inside != get_ident() and self._lock.acquire(timeout=_FORK_TIMEOUT)

    def _after_fork(self) -> None:
        """In a child process: of all threads only the one that forked is there."""
        self._start_lock = threading.Lock()
        self._thread = None
        left, self._inbox = self._inbox, SimpleQueue()
        while not left.empty():
            posted = left.get_nowait()
            if isinstance(posted, _Posted) and not posted.has_caller:
                self._inbox.put(posted)
        for watch in tuple(self._watches.values()):
            user = watch()
            if user is not None:  # what it leaves behind goes into the new inbox
                self.watch(user, watch.subject)
                del self._watches[id(watch)]
            else:
                self._inbox.put(watch)
        if self._inside != get_ident():  # else the child goes on with the operation
            self._lock = threading.Lock()
            self._is_dirty = self._is_dirty or self._inside != 0
            self._inside = 0
        if self._home != get_ident():
            self._home = self.num_waiting = 0


def _serve(
    owner: weakref.ref[Owner],
    inbox: SimpleQueue[_Posted | _Watch | None],
    is_up: Promise[None],
) -> None:
    """What the engine's thread runs; while it waits, it does not keep the engine alive."""
    alive = owner()
    is_wanted = alive is not None and alive._take_over()
    del alive
    is_up.set_result(None)
    while is_wanted:
        posted = inbox.get()
        alive = owner()
        worker = None if alive is None else alive._worker_ref()
        if posted is None or alive is None or worker is None:
            return
        alive._serve(posted)
        del posted, alive, worker


@atexit.register
def _stop_all() -> None:
    """No thread may be in a step when the interpreter ends: it is ended in the middle of C++.

    That holds for the threads of engines, and for daemon threads that do the work themselves.
    """
    global _exiting_thread
    _exiting_thread = get_ident()
    for owner in list(_owners):
        owner.stop()
        with owner._lock:
            pass


class _Forks:
    """Lets a process fork only between operations, so that the child's copy of a state is whole."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: list[Owner] = []

    def before(self) -> None:
        self._lock.acquire()
        for owner in list(_owners):
            if owner._hold_for_fork():
                self._held.append(owner)

    def after_in_parent(self) -> None:
        while self._held:
            self._held.pop()._lock.release()
        self._lock.release()

    def after_in_child(self) -> None:
        self._lock, self._held = threading.Lock(), []
        for owner in list(_owners):
            owner._after_fork()


if hasattr(os, "register_at_fork"):
    _forks = _Forks()
    os.register_at_fork(
        before=_forks.before,
        after_in_parent=_forks.after_in_parent,
        after_in_child=_forks.after_in_child,
    )
