"""When to fold, and one fold at a time: in a thread of its own, or by whoever asks for one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from engram_client.errors import DataCorrupt, StorageError
from tierstore.updates.fold import FoldBatch, FoldParts, fold
from tierstore.updates.scan import Committed
from tierstore.updates.steps import Steps

log = logging.getLogger(__name__)


class Folding:
    """The log's `changed` guards everything here. `finish` is called when a fold is where it was to go."""

    def __init__(
        self,
        parts: FoldParts,
        steps: Steps,
        finish: Callable[[Committed], None],
        *,
        fold_bytes: int,
        background: bool,
    ) -> None:
        self._parts, self._steps, self._finish, self._fold_bytes = parts, steps, finish, fold_bytes
        self._changed = parts.log.changed
        self._active: Iterator[int] | None = None
        self._number = 0  # of the last attempt
        self._working = False  # a batch is being folded just now
        self._pauses = 0  # how many want no fold now
        self._urgent = self._stopping = False
        self.failure: StorageError | None = None
        self.folds = self.pages_written = 0
        self._thread: threading.Thread | None = None
        self._writer: ThreadPoolExecutor | None = None
        if background:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="tierstore-fold-write")
            self._thread = threading.Thread(target=self._run, name="tierstore-fold", daemon=True)
            self._thread.start()

    def step(self) -> bool:
        """Fold one batch, of a new fold where none is under way; False where there is nothing to fold.

        Raises StorageError; the fold is given up then, and the next begins anew.
        """
        with self._changed:
            if self._working or self._pauses or self._stopping or not self._begin():
                return False
            self._working, active = True, self._active
            assert active is not None
        try:
            pages = next(active, None)
        except OSError as error:
            raise self._fail(self._told(error)) from error
        except StorageError as error:
            raise self._fail(error) from error
        except BaseException:
            self._end()
            raise
        with self._changed:
            self._working, self.failure = False, None
            if pages is None:
                self._active, self.folds = None, self.folds + 1
            else:
                self.pages_written += pages
            self._changed.notify_all()
        return True

    def run(self) -> bool:
        """Fold all that can be folded now; False where there was nothing. Raises StorageError."""
        done = False
        while True:
            if self.step():
                done = True
                continue
            with self._changed:
                if self.failure:
                    raise self.failure
                if not self._working:
                    return done
                self._changed.wait()  # for the thread, which is at it

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No fold is under way within; one that was is given up between two batches."""
        with self._changed:
            self._pauses += 1
            while self._working:
                self._changed.wait()
            self._active = None
        try:
            yield
        finally:
            with self._changed:
                self._pauses -= 1
                self._changed.notify_all()

    @property
    def under_way(self) -> bool:
        """Whether a fold has begun and not ended; `changed` is held."""
        return self._active is not None

    def can_help(self) -> bool:
        """Whether folding can make room in the log, now or when it goes on; `changed` is held."""
        possible = self.failure is None and (
            self._active is not None or self._steps.fold_target() is not None
        )
        if possible and not self._urgent:
            self._urgent = True
            self._changed.notify_all()
        return possible

    def try_again(self) -> None:
        """Room may have been made, which mends everything but damage; `changed` is held."""
        if self.failure is not None and not isinstance(self.failure, DataCorrupt):
            self.failure = None
            self._changed.notify_all()

    def stop(self) -> None:
        """Give up the fold under way, between two batches."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()
        with self._changed:
            while self._working:  # whoever folds by hand
                self._changed.wait()
        if self._writer:
            self._writer.shutdown()
        self._active = None

    def _begin(self) -> bool:
        if self._active is None:
            target = self._steps.fold_target()
            if target is None:
                return False
            self._steps.floor = max(self._steps.floor, target.start)
            self._number = max(self._number, self._parts.superblock.folded.folds) + 1
            finish = partial(self._finish, target)
            self._active = fold(self._parts, self._number, target, finish, self._beside)
        return True

    def _beside(self, write: Callable[[], None], prepare: Callable[[], FoldBatch | None]) -> FoldBatch | None:
        """A batch is written while the next is made, where there may be threads."""
        if self._writer is None:
            write()
            return prepare()
        writing = self._writer.submit(write)
        try:
            return prepare()
        finally:
            writing.result()

    def _due(self) -> bool:
        if self._working or self._pauses or self.failure is not None:
            return False  # whoever works tells when a batch is done
        log_bytes = self._parts.log.end - self._parts.log.start
        wanted = self._active is not None or self._urgent or log_bytes >= self._fold_bytes
        return wanted and (self._active is not None or self._steps.fold_target() is not None)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopping and not self._due():
                    self._urgent = False
                    self._changed.wait()
                if self._stopping:
                    return
            try:
                self.step()
            except StorageError as error:
                log.error("folding stopped: %s", error)
            except Exception as error:  # nobody waits for a thread that has died
                log.exception("folding stopped")
                self._fail(StorageError(f"folding the update log into pages failed: {error!r}"))

    def _end(self) -> None:
        with self._changed:
            self._working, self._active = False, None
            self._changed.notify_all()

    def _fail(self, error: StorageError) -> StorageError:
        with self._changed:
            self.failure = error
        self._end()
        return error

    def _told(self, error: OSError) -> StorageError:
        folder = self._parts.log.segments.folder.parent
        return StorageError(
            f"{folder}: folding the update log into pages failed: {error.strerror}; nothing is lost, the log "
            "keeps what was to be folded and takes updates up to training.log_bytes_max: make room or check "
            "the disk, and the next commit tries again"
        )
