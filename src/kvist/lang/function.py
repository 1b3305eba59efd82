"""Functions of the language: `@function`, and the ways to run one."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from kvist.errors import ProgramError, ProgramTimeout
from kvist.execution.job import ExecutionConfig
from kvist.execution.sampling import Sampling
from kvist.flags import nearest
from kvist.lang.endpoint import Endpoint, endpoint_of
from kvist.lang.positions import here
from kvist.lang.program_state import ProgramState
from kvist.lang.running import Batch, Call
from kvist.lang.state import State
from kvist.lang.tracing import trace_calls
from kvist.planning.explanation import Explanation, planned
from kvist.planning.fleet import Fleet, Running
from kvist.planning.graph import Graph
from kvist.planning.planner import plan

_SAMPLING = {each.name for each in fields(Sampling)}
_RENAMED = {"max_new_tokens": "max_tokens"}  # SGLang's name for it
_FLEET_TIMEOUT_S = 30.0


class Function:
    """A program. Immutable; `bind` returns another one with some arguments set."""

    def __init__(self, body: Callable[..., Any], bound: Mapping[str, object] | None = None) -> None:
        self._body = body
        self._bound = dict(bound or {})
        functools.update_wrapper(self, body)
        self._parameters = inspect.signature(body).parameters
        if not self._parameters:
            raise ProgramError(
                f"{here()}: {body.__name__} needs a state as its first argument: def {body.__name__}(s, ...)"
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program, as `run`; with a state as the first argument, add the program to that state."""
        if args and isinstance(args[0], State):
            return self._body(*args, **{**self._bound, **kwargs})
        return self.run(*args, **kwargs)

    def bind(self, **arguments: object) -> Function:
        """Return the function with these arguments set. Raises `ProgramError` for an unknown name."""
        for name in arguments:
            if name not in self._parameters:
                raise ProgramError(f"{here()}: {self._body.__name__} has no argument {name!r}")
        return Function(self._body, {**self._bound, **arguments})

    def run(
        self,
        *args: Any,
        backend: str | Endpoint | None = None,
        stream: bool = False,
        plan: bool = True,
        seed: int | None = None,
        timeout_s: float = 600.0,
        **kwargs: Any,
    ) -> ProgramState:
        """Run the program and return its state; with `stream`, return at once and read the state while it grows.

        Arguments that the function does not have are parameters of its generations (`temperature=0`, `max_tokens`...).
        `seed` decides all random choices; without one it is drawn. `plan=False` sends the requests one by one.
        `timeout_s` bounds each request and each wait. Raises `ProgramError` naming a line of the program, and what the
        function raises.
        """
        call, sampling = self._call(args, kwargs)
        batch = self._batch(
            [call], sampling, backend, plan=plan, seed=seed, timeout_s=timeout_s, width=None, stream=stream
        )
        if stream:
            return batch.start()[0]
        batch.run()
        return batch.states[0]

    async def run_async(
        self,
        *args: Any,
        backend: str | Endpoint | None = None,
        plan: bool = True,
        seed: int | None = None,
        timeout_s: float = 600.0,
        **kwargs: Any,
    ) -> ProgramState:
        """The twin of `run` for coroutines. An `async def` program runs in the caller's event loop, another one in a
        thread. Cancelling the task ends the program's requests."""
        call, sampling = self._call(args, kwargs)
        batch = self._batch(
            [call], sampling, backend, plan=plan, seed=seed, timeout_s=timeout_s, width=None, stream=False
        )
        await batch.run_async()
        return batch.states[0]

    def run_batch(
        self,
        batch_kwargs: Sequence[Mapping[str, Any]],
        *,
        backend: str | Endpoint | None = None,
        num_threads: int | str = "auto",
        progress_bar: bool = False,
        plan: bool = True,
        seed: int | None = None,
        timeout_s: float = 600.0,
        **sampling: Any,
    ) -> list[ProgramState]:
        """Run the program once for each mapping of arguments and return the states in their order.

        `num_threads` bounds the programs that run and the requests that are out at once; "auto" follows the cluster. If
        programs fail, the others end first; then the first error is raised.
        """
        batch = self._checked_batch(batch_kwargs, num_threads, backend, plan, seed, timeout_s, sampling)
        if batch_kwargs:
            batch.run(progress_bar=progress_bar)
        return batch.states

    async def run_batch_async(
        self,
        batch_kwargs: Sequence[Mapping[str, Any]],
        *,
        backend: str | Endpoint | None = None,
        num_threads: int | str = "auto",
        progress_bar: bool = False,
        plan: bool = True,
        seed: int | None = None,
        timeout_s: float = 600.0,
        **sampling: Any,
    ) -> list[ProgramState]:
        """The twin of `run_batch` for coroutines."""
        batch = self._checked_batch(batch_kwargs, num_threads, backend, plan, seed, timeout_s, sampling)
        if batch_kwargs:
            await asyncio.to_thread(batch.run, progress_bar=progress_bar)
        return batch.states

    def trace(self, *args: Any, **kwargs: Any) -> Graph:
        """Return the operations that are known before the program runs: up to its first decision about a result."""
        call, sampling = self._call(args, kwargs)
        return trace_calls(self._body, [(call.args, call.kwargs)], sampling)

    def explain(
        self,
        *args: Any,
        batch: Sequence[Mapping[str, Any]] | None = None,
        backend: str | Endpoint | None = None,
        fleet: Fleet | None = None,
        **kwargs: Any,
    ) -> Explanation:
        """Return the plan of one run, or of a batch, in the part that is known ahead. Nothing is generated.

        The plan is for `fleet`, else for the cluster of the backend."""
        return self._explained(self._all_calls(args, kwargs, batch), backend, fleet)

    async def explain_async(
        self,
        *args: Any,
        batch: Sequence[Mapping[str, Any]] | None = None,
        backend: str | Endpoint | None = None,
        fleet: Fleet | None = None,
        **kwargs: Any,
    ) -> Explanation:
        """The twin of `explain` for coroutines."""
        return await asyncio.to_thread(self._explained, self._all_calls(args, kwargs, batch), backend, fleet)

    def _all_calls(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], batch: Sequence[Mapping[str, Any]] | None
    ) -> list[tuple[Call, Sampling]]:
        return [self._call(args, kwargs)] if batch is None else [self._call((), each) for each in batch]

    def _explained(
        self, calls: Sequence[tuple[Call, Sampling]], backend: str | Endpoint | None, fleet: Fleet | None
    ) -> Explanation:
        graph = trace_calls(
            self._body, [(call.args, call.kwargs) for call, _ in calls], calls[0][1] if calls else Sampling()
        )
        if fleet is None:
            thread, server = endpoint_of(backend).open()
            try:
                fleet = thread.start(server.fleet()).result(_FLEET_TIMEOUT_S)
            except TimeoutError:
                raise ProgramTimeout(f"the server has not answered within {_FLEET_TIMEOUT_S:g} s") from None
        return planned(graph, plan(graph, fleet, Running()))

    def _call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Call, Sampling]:
        """Split the keywords into the function's arguments and parameters of generations, and check both."""
        try:
            own, chosen = self.checked(args, kwargs)
        except ValueError as error:
            raise ProgramError(f"{here()}: {error}") from error
        return Call(body=self._body, args=tuple(args), kwargs=own, position=here()), chosen

    def checked(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Sampling]:
        """Return the function's keyword arguments, and the sampling. Raises `ValueError` that names a wrong one."""
        name_of_function = self._body.__name__
        takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in self._parameters.values())
        own: dict[str, Any] = dict(self._bound)
        sampling: dict[str, Any] = {}
        for name, value in kwargs.items():
            short = _RENAMED.get(name, name)
            if name in self._parameters or (takes_any and short not in _SAMPLING):
                own[name] = value
            elif short in _SAMPLING:
                sampling[short] = value
            else:
                known = list(self._parameters)[1:]
                hint = nearest(name, [*known, *_SAMPLING])
                raise ValueError(
                    f"{name_of_function} has no argument {name!r}{hint or '; '}"
                    f"{' Its' if hint else 'its'} arguments are {', '.join(known) or 'none'}"
                )
        chosen = Sampling(**sampling)
        if problem := chosen.problem():
            raise ValueError(problem)
        try:
            inspect.signature(self._body).bind(None, *args, **own)
        except TypeError as error:
            raise ValueError(f"{name_of_function}: {error}") from error
        return own, chosen

    def _placeholders(self) -> dict[str, object]:
        """Return a value for each argument, to check other keywords on their own."""
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return {name: None for name, each in list(self._parameters.items())[1:] if each.kind in kinds}

    def _checked_batch(
        self,
        batch_kwargs: Sequence[Mapping[str, Any]],
        num_threads: int | str,
        backend: str | Endpoint | None,
        plan: bool,
        seed: int | None,
        timeout_s: float,
        sampling: Mapping[str, Any],
    ) -> Batch:
        if num_threads != "auto" and (not isinstance(num_threads, int) or num_threads < 1):
            raise ProgramError(f"{here()}: `num_threads` must be 'auto' or at least 1, not {num_threads!r}")
        if isinstance(batch_kwargs, Mapping) or not all(isinstance(each, Mapping) for each in batch_kwargs):
            raise ProgramError(f"{here()}: run_batch() needs a list of mappings, one for each run: [{{...}}, {{...}}]")
        calls = [self._call((), arguments)[0] for arguments in batch_kwargs]
        width = None if isinstance(num_threads, str) else num_threads
        defaults = self._call((), {**self._placeholders(), **sampling})[1]
        return self._batch(
            calls, defaults, backend, plan=plan, seed=seed, timeout_s=timeout_s, width=width, stream=False
        )

    def _batch(
        self,
        calls: Sequence[Call],
        sampling: Sampling,
        backend: str | Endpoint | None,
        *,
        plan: bool,
        seed: int | None,
        timeout_s: float,
        width: int | None,
        stream: bool,
    ) -> Batch:
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not timeout_s > 0:
            raise ProgramError(f"{here()}: `timeout_s` must be over 0, not {timeout_s!r}")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise ProgramError(f"{here()}: `seed` must be a whole number, not {seed!r}")
        config = ExecutionConfig(planned=plan, width=width, request_timeout_s=timeout_s)
        return Batch(calls, sampling=sampling, endpoint=endpoint_of(backend), config=config, seed=seed, streams=stream)


def function(body: Callable[..., Any]) -> Function:
    """Make a Python function, whose first argument is a state, a program. `async def` functions work, too."""
    return Function(body)
