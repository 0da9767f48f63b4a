"""A vLLM engine in a separate process: a process can hold only one engine, and patches stay in it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from skyrl_spec.rollout.engine import RolloutEngine
from skyrl_spec.rollout.engine_settings import EngineSettings, engine_environment


class EngineProcess:
    """An ``engine_class(settings, *args)`` in a forked process (tests/conftest.py), with the same methods.

    Exceptions of a method are raised here. A call that takes longer than ``timeout_s`` raises TimeoutError; the engine
    cannot be used afterwards.
    """

    def __init__(
        self,
        engine_class: type[RolloutEngine],
        settings: EngineSettings,
        *args: Any,
        timeout_s: float = 300.0,
    ):
        context = multiprocessing.get_context("forkserver")
        self._connection, theirs = context.Pipe()
        self._timeout_s = timeout_s
        self._process = context.Process(target=_serve, args=(theirs, engine_class, settings, args), daemon=True)
        self._process.start()
        theirs.close()
        self._receive("__init__")

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._connection.send((method, args, kwargs))
            return self._receive(method)

        return call

    def end(self) -> None:
        self._process.kill()
        self._process.join()

    def _receive(self, method: str) -> Any:
        deadline = time.monotonic() + self._timeout_s
        while not self._connection.poll(1.0):
            if not self._process.is_alive():
                raise RuntimeError(f"the engine died in {method}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{method} was not done after {self._timeout_s:.0f} s")
        value, error = self._connection.recv()
        if error is not None:
            raise error
        return value


def _serve(
    connection: Connection, engine_class: type[RolloutEngine], settings: EngineSettings, args: tuple[Any, ...]
) -> None:
    environment = engine_environment(settings)
    os.environ.update(environment)
    # torch read the environment when it was imported, before this process started.
    torch._dynamo.config.disable = environment.get("TORCH_COMPILE_DISABLE") == "1"
    engine = None

    def build() -> None:
        nonlocal engine
        engine = engine_class(settings, *args)

    _answer(connection, build)
    while True:
        method, args, kwargs = connection.recv()
        _answer(connection, getattr(engine, method), *args, **kwargs)


def _answer(connection: Connection, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        connection.send((call(*args, **kwargs), None))
    except Exception as error:
        connection.send((None, _picklable(error)))


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
