"""Processes that make packs ahead of the step, in order.

Each worker computes the whole plan and makes every n-th pack of it, so nothing has to be handed out; it may be two
packs ahead of what has been consumed, no further. Messages go through pipes: the length of a head in MessagePack, the
head, then the bytes of each array as they lie in memory; whoever waits for any part of one can give up. There is no
shared memory that a killed process could leave behind, and a worker whose pipe ends (its parent is gone, however it
went) ends itself. Workers start afresh (`spawn`), take no notice of Ctrl-C and SIGTERM, which are their parent's to
handle, and are killed when the parent closes them or exits.
"""

import atexit
import math
import multiprocessing
import multiprocessing.process
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any, Generic, cast

import msgspec
import numpy as np
import numpy.typing as npt

from .errors import DataError, StoppedWaiting, WorkerError
from .making import Encoded, Made, Maker, Packed, Retried, decode_events, encode_events, sendable
from .samples import Size

_PACKS_AHEAD = 2
"""Packs that a worker may have made, or be making, and nobody has consumed."""
_ANSWER_S = 5.0
"""How long a worker that lets us wait has to say what it is reading, and one that was killed to be gone."""
_GLANCE_S = 0.2
"""How often whoever waits asks whether to go on: a wait in the system goes on behind a signal's handler."""
_LENGTH_BYTES = 8
_ARRAY = 1
_ONE_MORE, _WHERE = b"+", b"?"


class _Message(msgspec.Struct, array_like=True):
    """What a worker says. The arrays of `body` follow, `sizes` bytes each."""

    kind: str
    """pack, end, error or reading."""
    body: msgspec.Raw
    sizes: list[int]


class _Body(msgspec.Struct, array_like=True):
    """A `Made` as it travels. Strings that a file gave may be no UTF-8, so ids travel as bytes."""

    number: int
    data: Any
    ids: list[bytes]
    size: tuple[int, int]
    events: msgspec.Raw
    """See `making.encode_events`."""
    state: dict[str, Any]
    retried: list[tuple[str, int, str]]


class _Fault(msgspec.Struct, array_like=True):
    """An error that ended a worker."""

    type: str
    text: str
    trace: str


def _send(connection: Connection, lock: threading.Lock, kind: str, body: object) -> None:
    arrays: list[npt.NDArray[Any]] = []

    def hook(value: object) -> msgspec.msgpack.Ext:
        if not isinstance(value, np.ndarray) or value.dtype.hasobject:
            raise TypeError(
                f"collate: expected numbers, strings, lists, dictionaries and arrays, got {type(value).__name__}; "
                "with workers a batch is sent from one process to another"
            )
        # ascontiguousarray would make one entry of a number.
        array = cast("npt.NDArray[Any]", np.asarray(value, order="C"))
        arrays.append(array)
        return msgspec.msgpack.Ext(_ARRAY, msgspec.msgpack.encode([len(arrays) - 1, array.dtype.str, array.shape]))

    raw = msgspec.Raw(msgspec.msgpack.encode(body, enc_hook=hook))
    head = msgspec.msgpack.encode(_Message(kind, raw, [array.nbytes for array in arrays]))
    with lock:
        _write(connection, memoryview(len(head).to_bytes(_LENGTH_BYTES, "little") + head))
        for array in arrays:
            _write(connection, array.reshape(-1).view(np.uint8).data)


def _write(connection: Connection, data: memoryview) -> None:
    while data:
        data = data[os.write(connection.fileno(), data) :]


def _body_of(made: Made[Any]) -> _Body:
    return _Body(
        number=made.number,
        data=made.data,
        ids=[name.encode("utf-8", "surrogatepass") for name in made.ids],
        size=(made.size.tokens, made.size.tiles),
        events=msgspec.Raw(encode_events(made.events)),
        state=dict(made.state),
        retried=[(source, count, sendable(last)) for source, count, last in made.retried],
    )


def _made_of(message: _Message, buffers: list[bytearray]) -> Made[Any]:
    def hook(code: int, data: memoryview) -> object:
        assert code == _ARRAY
        place, dtype, shape = msgspec.msgpack.decode(data, type=tuple[int, str, tuple[int, ...]])
        return np.frombuffer(buffers[place], dtype=dtype, count=math.prod(shape)).reshape(shape)

    body = msgspec.msgpack.decode(message.body, type=_Body, ext_hook=hook)
    return Made(
        number=body.number,
        data=body.data,
        ids=tuple(name.decode("utf-8", "surrogatepass") for name in body.ids),
        size=Size(*body.size),
        events=tuple(decode_events(bytes(body.events))),
        state=body.state,
        retried=tuple(Retried(*one) for one in body.retried),
    )


class WorkerPool(Generic[Encoded, Packed]):
    """Workers that go on from one state of the plan; iterating gives their packs in the plan's order.

    The states in what it gives belong to that pack, so whoever saves the state of what was consumed loses nothing.
    """

    def __init__(
        self,
        maker: Maker[Encoded, Packed],
        state: Mapping[str, object],
        num_workers: int,
        timeout_s: float,
        should_stop: Callable[[], bool],
    ) -> None:
        """Start the processes. `timeout_s`: longest wait for one pack; `should_stop` is asked while it lasts."""
        context = multiprocessing.get_context("spawn")
        self._timeout_s, self._should_stop = timeout_s, should_stop
        self._turn = 0
        self._connections: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        for number in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(maker, dict(state), number, num_workers, theirs),
                name=f"data worker {number}",
                daemon=True,
            )
            process.start()
            # Else this end would stay open when the worker dies, and we would wait for ever.
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        # Before multiprocessing's own clean-up, which asks by SIGTERM and waits.
        atexit.register(self.close)

    def __iter__(self) -> Iterator[Made[Packed]]:
        return self

    def __next__(self) -> Made[Packed]:
        """Wait for the next pack.

        Raises:
            WorkerError: the worker has died, met an error of the program, or lets us wait for longer than allowed.
            StoppedWaiting: the pack is not there, and `should_stop` says so.
            DataError, ValueError: what a worker raised as such.
        """
        worker = self._turn % len(self._connections)
        connection = self._connections[worker]
        try:
            message, buffers = self._message(worker)
            if message.kind == "pack":
                connection.send_bytes(_ONE_MORE)
        except (EOFError, OSError) as error:
            raise self._died(worker) from error
        if message.kind == "end":
            raise StopIteration
        if message.kind == "error":
            raise _error_of(msgspec.msgpack.decode(message.body, type=_Fault), worker)
        self._turn += 1
        return cast(Made[Packed], _made_of(message, buffers))

    def close(self) -> None:
        """End the workers; what they made ahead is forgotten."""
        atexit.unregister(self.close)
        for process in self._processes:
            process.kill()
        deadline_s = time.monotonic() + _ANSWER_S
        for process in self._processes:
            # One that hangs in a disk's driver is gone only when that answers; what waits behind us must not.
            process.join(max(0.0, deadline_s - time.monotonic()))
        for connection in self._connections:
            connection.close()

    def _message(self, worker: int) -> tuple[_Message, list[bytearray]]:
        connection = self._connections[worker]
        if self._has_come(connection, self._timeout_s):
            message, buffers = self._receive(worker)
            # A late answer to a question from before.
            return self._message(worker) if message.kind == "reading" else (message, buffers)
        connection.send_bytes(_WHERE)
        reading = "nothing that it could name"
        if self._has_come(connection, _ANSWER_S):
            message, buffers = self._receive(worker)
            if message.kind != "reading":
                return message, buffers
            reading = msgspec.msgpack.decode(message.body, type=str)
        raise WorkerError(
            f"data worker {worker}: expected pack {self._turn} from here within {self._timeout_s:g} s, got none; it is "
            f"reading {reading or 'nothing yet'}; check that file and its disk, or raise data_timeout_s"
        )

    def _receive(self, worker: int) -> tuple[_Message, list[bytearray]]:
        """Read a message that has begun to come."""
        connection = self._connections[worker]

        def read(num_bytes: int) -> bytearray:
            buffer = bytearray(num_bytes)
            left = memoryview(buffer)
            while left:
                if not self._has_come(connection, self._timeout_s):
                    raise WorkerError(
                        f"data worker {worker}: expected all of pack {self._turn} from here within "
                        f"{self._timeout_s:g} s, got a part; see whether it was suspended, and resume the run"
                    )
                num_read = os.readv(connection.fileno(), [left])
                if num_read == 0:
                    raise EOFError
                left = left[num_read:]
            return buffer

        message = msgspec.msgpack.decode(read(int.from_bytes(read(_LENGTH_BYTES), "little")), type=_Message)
        return message, [read(size) for size in message.sizes]

    def _has_come(self, connection: Connection, within_s: float) -> bool:
        """Wait until something has come, for so long at most.

        Raises:
            StoppedWaiting: nothing has yet, and somebody wants to stop.
        """
        deadline_s = time.monotonic() + within_s
        while not connection.poll(max(0.0, min(_GLANCE_S, deadline_s - time.monotonic()))):
            if self._should_stop():
                raise StoppedWaiting(f"pack {self._turn} from here was waited for")
            if time.monotonic() >= deadline_s:
                return False
        return True

    def _died(self, worker: int) -> WorkerError:
        process = self._processes[worker]
        process.join(_ANSWER_S)
        status = process.exitcode
        how = f"exit status {status}" if status is None or status >= 0 else f"signal {signal.Signals(-status).name}"
        return WorkerError(
            f"data worker {worker}: expected pack {self._turn} from here, got the worker's end ({how}); what it wrote "
            "stands above; if it was killed, look at the machine's memory, or use fewer workers"
        )


def _error_of(fault: _Fault, worker: int) -> Exception:
    """What a worker's error is raised as here: the same for what users can mend, with the worker's trace as a note."""
    known: dict[str, type[Exception]] = {"DataError": DataError, "ValueError": ValueError}
    error = (
        known[fault.type](fault.text)
        if fault.type in known
        else WorkerError(f"data worker {worker}: {fault.type}: {fault.text}")
    )
    error.add_note(fault.trace)
    return error


def _work(
    maker: Maker[Any, Any], state: Mapping[str, object], number: int, num_workers: int, connection: Connection
) -> None:
    """Be a worker: make every n-th pack, and answer when asked what is being read."""
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    lock, allowed = threading.Lock(), threading.Semaphore(_PACKS_AHEAD - 1)
    # Sent by a thread, so that a pack that waits to be fetched does not keep the next one from being made.
    outbox: queue.Queue[tuple[str, object]] = queue.Queue()

    def listen() -> None:
        while True:
            try:
                if connection.recv_bytes() == _ONE_MORE:
                    allowed.release()
                else:
                    _send(connection, lock, "reading", sendable(maker.plan.reading))
            except (EOFError, OSError):
                os._exit(0)

    def deliver() -> None:
        while True:
            try:
                _send(connection, lock, *outbox.get())
            except OSError:
                os._exit(0)
            except Exception as error:  # noqa: BLE001  (the edge of a process: the parent raises it)
                _send(connection, lock, "error", _fault_of(error))
            finally:
                outbox.task_done()

    for target in (listen, deliver):
        threading.Thread(target=target, daemon=True).start()
    try:
        maker.encoder.start_worker()
        for made in maker.make(state, number, num_workers):
            outbox.put(("pack", _body_of(made)))
            del made
            # One is allowed from the start, so this asks for the next.
            allowed.acquire()
        outbox.put(("end", None))
    except Exception as error:  # noqa: BLE001  (the edge of a process: the parent raises it)
        outbox.put(("error", _fault_of(error)))
    outbox.join()
    # The parent ends us, or its pipe does.
    threading.Event().wait()


def _fault_of(error: Exception) -> _Fault:
    # A subclass may take other arguments than a text; only these two themselves are made again.
    is_value_error = isinstance(error, ValueError) and not isinstance(error, UnicodeError)
    kind = "DataError" if isinstance(error, DataError) else "ValueError" if is_value_error else type(error).__name__
    trace = "".join(traceback.format_exception(error))
    return _Fault(kind, sendable(str(error)), sendable(trace))
