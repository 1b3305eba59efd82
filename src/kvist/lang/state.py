"""The state of a program: a prompt that grows, and the variables of its generations.

`state += ...` records operations and returns at once. `state[name]` waits for the result. The prompt holds a hole for
each result that is not known yet, so that everything around it can be recorded, planned and sent without waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from kvist.errors import ProgramError
from kvist.execution.choices import ChoicesMethod
from kvist.execution.results import Result
from kvist.execution.sampling import Sampling
from kvist.lang.expressions import Expression, Gen, Part, RoleBegin, RoleEnd, Select, joined
from kvist.lang.positions import here
from kvist.lang.program import DecodedValue, Program, ScopeText, Stored, Variable
from kvist.planning.graph import Constrain, Extend, Fork, Generate, Join, Operation, Place, Position, Score
from kvist.planning.prompt import Prompt, PromptError, hole, holes_of, unsendable


class State:
    """Mutable; owned by the thread or coroutine of its program."""

    def __init__(
        self,
        program: Program,
        *,
        path: tuple[int, ...] = (),
        prompt: Prompt = Prompt(),
        after: int | None = None,
        variables: dict[str, Stored] | None = None,
    ) -> None:
        self._program = program
        self._path = path
        self._prompt = prompt
        self._after = after
        self._variables = dict(variables or {})
        self._own: list[Variable] = []
        self._forks: list[Forks] = []
        self.is_read = False

    # -- adding

    def __iadd__(  # type: ignore[misc]  # `s + x` is refused
        self, other: str | Expression | Callable[[State], object]
    ) -> State:
        if callable(other) and not isinstance(other, Expression):
            other(self)
            return self
        position = here()
        for part in joined((other,)).parts():
            self._add(part, position)
        return self

    def __add__(self, other: object) -> State:
        raise ProgramError(f"{here()}: a state is extended in place: write s += ... instead of s = s + ...")

    def _add(self, part: Part, position: Position) -> None:
        self._program.check_open(position)
        self._program.current = self
        try:
            match part:
                case str():
                    self._extend(part, self._prompt.with_text(part), position)
                case RoleBegin():
                    self._prompt = self._prompt.with_open(part.role)
                case RoleEnd():
                    self._prompt = self._prompt.with_close(part.role)
                case Gen():
                    self._generate(part, position)
                case Select():
                    self._select(part, position)
        except PromptError as error:
            raise ProgramError(f"{position}: {error}") from error

    def _extend(self, text: str, prompt: Prompt, position: Position) -> None:
        if bad := unsendable(text):
            raise ProgramError(f"{position}: the text contains {bad!r}, which UTF-8 cannot encode: remove it")
        if not self._program.knows(holes_of(text)):
            raise ProgramError(
                f"{position}: the text refers to a result that this program does not have: a ref() of another run, or "
                "of another program of the batch. Read its value with state[name] there, and add that"
            )
        self._prompt = prompt
        if text:
            self._record(Extend(text=text, place=self._place(position)))

    def _place(self, position: Position) -> Place:
        return self._program.place(self._path, position, self._after)

    def _record(self, operation: Operation) -> None:
        self._after = self._program.record(operation)

    def _generate(self, part: Gen, position: Position) -> None:
        self._check_place(position)
        sampling = part.sampling.over(self._program.sampling)
        constraint = None
        if part.answer_type.kind:
            wanted = part.answer_type
            self._record(Constrain(kind=wanted.kind, source=wanted.source, place=self._place(position)))
            constraint = self._after
        operation = Generate(
            name=part.name,
            prompt=self._prompt,
            max_tokens=sampling.max_tokens or 1,
            num_answers=sampling.n or 1,
            constraint=constraint,
            place=self._place(position),
        )
        variable = Variable(operation=operation, result=Result(position), answer_type=part.answer_type)
        self._request(variable, part.sampling)

    def _select(self, part: Select, position: Position) -> None:
        self._check_place(position)
        operation = Score(
            name=part.name,
            prompt=self._prompt,
            choices=part.choices,
            scores_without_prompt=part.method.needs_unconditional,
            place=self._place(position),
        )
        variable = Variable(operation=operation, result=Result(position))
        self._request(variable, Sampling(temperature=part.temperature, seed=part.seed), part.method)

    def _request(
        self, variable: Variable, sampling: Sampling, method: ChoicesMethod = ChoicesMethod.TOKEN_LENGTH_NORMALIZED
    ) -> None:
        self._own.append(variable)
        if variable.operation.name:
            self._variables[variable.operation.name] = variable
        self._record(variable.operation)
        self._prompt = Prompt(self._prompt.outline + hole(variable.operation.operation_id))
        self._program.submit(variable, sampling=sampling, method=method)

    def _check_place(self, position: Position) -> None:
        if not self._prompt.outline:
            raise ProgramError(f"{position}: there is no prompt yet: add a text before the first generation")
        if self._prompt.is_chat and self._prompt.open_role is None:
            raise ProgramError(f"{position}: a generation between messages: write assistant(gen(...))")

    # -- roles as methods: `s.user("...")`, or `with s.user(): s += ...`

    def system(self, content: str | Expression | None = None) -> _RoleScope:
        return self._role("system", content)

    def user(self, content: str | Expression | None = None) -> _RoleScope:
        return self._role("user", content)

    def assistant(self, content: str | Expression | None = None) -> _RoleScope:
        return self._role("assistant", content)

    def _role(self, name: str, content: str | Expression | None) -> _RoleScope:
        if content is not None:
            self.__iadd__(joined((RoleBegin(name), content, RoleEnd(name))))
        return _RoleScope(self, name, closed=content is not None)

    @contextmanager
    def var_scope(self, name: str) -> Iterator[None]:
        """Make everything that is added inside of the `with` block the variable `name`."""
        start = len(self._prompt.outline)
        yield
        self._variables[name] = ScopeText(self._prompt.outline[start:])

    # -- reading

    def __contains__(self, name: object) -> bool:
        return name in self._variables

    def __getitem__(self, name: str) -> object:
        """Wait for the variable and return it: a text, with `n` over 1 a list, or the type that was asked for."""
        return self._program.value(self._find(name))

    def get_var(self, name: str) -> object:
        return self[name]

    async def get(self, name: str) -> object:
        """The twin of `state[name]` for coroutines."""
        return await self._program.value_async(self._find(name))

    def set_var(self, name: str, value: object) -> None:
        """Make `value` the variable `name`, for code that reads the state later."""
        self._variables[name] = DecodedValue(value)

    def ref(self, name: str) -> str:
        """Return a text that stands for the variable until its result is known. Any state of the same program takes it,
        alone or inside of another text, without waiting."""
        found = self._find(name)
        if not isinstance(found, Variable):
            raise ProgramError(f"{here()}: {name!r} is not the result of one generation: read it with state[{name!r}]")
        return hole(found.operation.operation_id)

    def get_meta_info(self, name: str) -> dict[str, object]:
        """Wait for the generation or choice and return its figures: tokens, `finish_reason`, logprobs or scores."""
        return dict(self._program.answer(self._find_result(name)).meta)

    async def get_meta_info_async(self, name: str) -> dict[str, object]:
        return dict((await self._program.answer_async(self._find_result(name))).meta)

    def _find_result(self, name: str) -> Variable:
        found = self._find(name)
        if not isinstance(found, Variable):
            raise ProgramError(f"{here()}: {name!r} is not the result of one generation")
        return found

    def _find(self, name: str) -> Stored:
        self.is_read = True
        found = self._variables.get(name)
        if found is None:
            forked = next((f for f in self._forks if any(name in branch for branch in f)), None)
            hint = "" if forked is None else f" (a branch of the fork at {forked.position} has it: join() the branches)"
            known = ", ".join(map(repr, self._variables)) or "none"
            raise ProgramError(
                f"{here()}: there is no variable {name!r} yet{hint}: add gen({name!r}) to the state before its result "
                f"is read. Known: {known}"
            )
        return found

    def text(self) -> str:
        """Wait for all results and return the whole text, with the roles of a chat."""
        self.is_read = True
        return Prompt(self._program.text(self._prompt.outline)).transcript()

    async def text_async(self) -> str:
        await self._known_async()
        return self.text()

    def messages(self) -> list[dict[str, str]]:
        """Wait for all results and return the chat's messages in OpenAI's format."""
        self.is_read = True
        prompt = Prompt(self._program.text(self._prompt.outline))
        if not prompt.is_chat and prompt.outline:
            raise ProgramError(f"{here()}: the state is a text without roles, and has no messages: use state.text()")
        return [{"role": message.role, "content": message.text} for message in prompt.messages()]

    async def messages_async(self) -> list[dict[str, str]]:
        await self._known_async()
        return self.messages()

    async def _known_async(self) -> None:
        """Wait for all results in the prompt, without blocking the loop."""
        for operation_id in self._prompt.holes:
            await self._program.answer_async(self._program.variables[operation_id])

    def sync(self) -> None:
        """Wait for all results of this state. Raises the first error."""
        for variable in self._own:
            self._program.answer(variable)

    async def sync_async(self) -> None:
        for variable in self._own:
            await self._program.answer_async(variable)

    @property
    def seed(self) -> int:
        """Of the program: the same seed gives the same answers."""
        return self._program.seed

    # -- forks

    def fork(self, size: int = 1, position_ids_offset: Sequence[int] | None = None) -> Forks:
        """Return `size` states that continue this one, each on its own. They share the prefix and run at the same time.

        Raises `ProgramError` for `position_ids_offset` other than zeros: positions of tokens cannot be shifted.
        """
        position = here()
        if not isinstance(size, int) or size < 1:
            raise ProgramError(f"{position}: fork() needs a number of branches of at least 1, not {size!r}")
        if position_ids_offset is not None and any(position_ids_offset):
            raise ProgramError(f"{position}: `position_ids_offset` is not supported: omit it")
        number = len(self._forks)
        self._record(Fork(prompt=self._prompt, num_branches=size, place=self._place(position)))
        branches = [
            State(
                self._program,
                path=(*self._path, number, index),
                prompt=self._prompt,
                after=self._after,
                variables=self._variables,
            )
            for index in range(size)
        ]
        forks = Forks(self, branches, position)
        self._forks.append(forks)
        self._program.forked(forks)
        return forks

    @contextmanager
    def copy(self) -> Iterator[State]:
        """Give a copy of the state for the `with` block."""
        with self.fork(1) as forks:
            yield forks[0]

    def gather(self, branches: Sequence[State], position: Position) -> None:
        """Take over the variables of joined branches, as lists."""
        last = tuple(one._after for one in branches if one._after is not None and one._own)
        self._record(Join(last_operations=last, place=self._place(position)))
        names = dict.fromkeys(name for branch in branches for name in branch._variables if name not in self._variables)
        for name in names:
            self._variables[name] = tuple(b._variables[name] for b in branches if name in b._variables)

    @property
    def has_requests(self) -> bool:
        return bool(self._own) or any(branch.has_requests for forks in self._forks for branch in forks)

    @property
    def prompt(self) -> Prompt:
        """The prompt so far, with holes."""
        return self._prompt

    @property
    def path(self) -> tuple[int, ...]:
        return self._path

    @property
    def last(self) -> int | None:
        """The last operation of the state."""
        return self._after


class _RoleScope:
    def __init__(self, state: State, role: str, *, closed: bool) -> None:
        self._state, self._role, self._closed = state, role, closed

    def __enter__(self) -> None:
        if self._closed:
            raise ProgramError(f"{here()}: `with` needs {self._role}() without content")
        self._state += RoleBegin(self._role)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self._state += RoleEnd(self._role)


class Forks(Sequence[State]):
    """The branches of a fork. `forks += x` adds to each of them; a function gets the branch's number."""

    def __init__(self, parent: State, branches: Sequence[State], position: Position) -> None:
        self._parent, self._branches, self.position = parent, tuple(branches), position
        self.is_joined = False

    def __len__(self) -> int:
        return len(self._branches)

    def __getitem__(self, index: int) -> State:  # type: ignore[override]  # no slices
        return self._branches[index]

    def __iadd__(self, other: str | Expression | Sequence[str | Expression] | Callable[[int], object]) -> Forks:
        position = here()
        if callable(other) and not isinstance(other, Expression):
            items: Sequence[object] = [other(index) for index in range(len(self))]
        elif isinstance(other, str | Expression):
            items = [other] * len(self)
        else:
            items = other
        if len(items) != len(self):
            raise ProgramError(f"{position}: {len(items)} items for {len(self)} branches: give one for each")
        for branch, item in zip(self._branches, items, strict=True):
            for part in joined((item,)).parts():
                branch._add(part, position)
        return self

    def join(self, mode: str = "gather_variable") -> None:
        """End the branches: the parent has their variables as lists, one value for each branch that has it.

        Results are not waited for. Raises `ProgramError` for another mode, and for a second join."""
        position = here()
        if mode != "gather_variable":
            raise ProgramError(f"{position}: join() has the mode gather_variable only, not {mode!r}")
        if self.is_joined:
            raise ProgramError(f"{position}: the fork at {self.position} is joined already")
        self.is_joined = True
        self._parent.gather(self._branches, position)

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None and not self.is_joined:
            self.join()

    @property
    def is_used(self) -> bool:
        """Whether the branches are joined, or each branch with a request is read."""
        return self.is_joined or all(branch.is_read or not branch.has_requests for branch in self._branches)
