"""Mistakes in programs and failures under them: each error names the line of the program."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import kvist.lang as kv
from kvist.errors import ConfigError, EngineError, KvistError, ProgramError, ProgramTimeout, RequestError
from kvist.execution.backend import Hints
from kvist.execution.fake_server import FakeServer
from kvist.planning.prompt import Prompt

MakeEndpoint = Callable[[FakeServer], kv.Endpoint]


def _line_of(text: str) -> str:
    """Return "test_bad_input.py:N" for the line with the mark `text`."""
    with open(__file__, encoding="utf-8") as source:
        numbers = [number for number, line in enumerate(source, 1) if line.rstrip().endswith(f"# {text}")]
    assert len(numbers) == 1, text
    return f"test_bad_input.py:{numbers[0]}"


def _read_too_early(s: kv.State) -> None:
    s += "Q"
    s += str(s["answer"])  # read too early


def _read_from_branch(s: kv.State) -> None:
    s += "Q"
    s.fork(2).__iadd__(kv.gen("x"))
    s["x"]  # read before the join


def _no_prompt(s: kv.State) -> None:
    s += kv.gen("x")  # no prompt


def _between_messages(s: kv.State) -> None:
    s += kv.user("Q")
    s += kv.gen("x")  # between messages


def _text_between_messages(s: kv.State) -> None:
    s += kv.user("Q")
    s += "loose"  # loose text


def _number_in_state(s: kv.State) -> None:
    s += 3  # type: ignore[arg-type]  # a number


def _empty_choices(s: kv.State) -> None:
    s += "Q" + kv.select("x", [])  # no choices


def _equal_choices(s: kv.State) -> None:
    s += "Q" + kv.select("x", ["a", "a"])  # equal choices


def _two_forms(s: kv.State) -> None:
    s += "Q" + kv.gen("x", regex="a", json_schema="{}")  # two forms


def _bad_pattern(s: kv.State) -> None:
    s += "Q" + kv.gen("x", regex="(")  # bad pattern


def _bad_schema(s: kv.State) -> None:
    s += "Q" + kv.gen("x", json_schema="[1]")  # bad schema


def _bad_type(s: kv.State) -> None:
    s += "Q" + kv.gen("x", type=int)  # bad type


def _bad_temperature(s: kv.State) -> None:
    s += "Q" + kv.gen("x", temperature=-1)  # bad temperature


def _bad_stop(s: kv.State) -> None:
    s += "Q" + kv.gen("x", stop=5)  # type: ignore[arg-type]  # bad stop


def _bad_method(s: kv.State) -> None:
    s += "Q" + kv.select("x", ["a", "b"], choices_method="best")  # type: ignore[arg-type]  # bad method


def _not_in_place(s: kv.State) -> None:
    s = s + kv.user("Q")  # not in place


def _useless_parameter(s: kv.State) -> None:
    s += "Q" + kv.gen("x", top_logprobs_num=3)  # useless parameter


def _no_branches(s: kv.State) -> None:
    s.fork(0)  # no branches


def _shifted_positions(s: kv.State) -> None:
    s.fork(2, position_ids_offset=[0, 1])  # shifted positions


def _joined_twice(s: kv.State) -> None:
    forks = s.fork(2)
    forks.join()
    forks.join()  # joined twice


def _other_join(s: kv.State) -> None:
    s.fork(2).join("concate_and_append")  # other join


def _too_few_items(s: kv.State) -> None:
    forks = s.fork(3)
    forks += ["a", "b"]  # too few items


def _never_joined(s: kv.State) -> None:
    s += "Q"
    forks = s.fork(2)  # never joined
    forks += "A" + kv.gen("x")


def _lone_surrogate(s: kv.State) -> None:
    s += "bad \ud800"  # lone surrogate


def _unsendable_choice(s: kv.State) -> None:
    s += "Q" + kv.select("x", ["a", "\ud800"])  # unsendable choice


def _unsendable_pattern(s: kv.State) -> None:
    s += "Q" + kv.gen("x", regex="\ud800")  # unsendable pattern


def _unsendable_schema(s: kv.State) -> None:
    s += "Q" + kv.gen("x", json_schema={"const": "\ud800"})  # unsendable schema


def _empty_pattern(s: kv.State) -> None:
    s += "Q" + kv.gen("x", regex="")  # empty pattern


def _schema_without_end(s: kv.State) -> None:
    s += "Q" + kv.gen("x", json_schema={"maximum": float("inf")})  # schema with infinity


def _drawn_seed(s: kv.State) -> None:
    s += "Q" + kv.gen("x", seed=-1)  # drawn seed


@pytest.mark.parametrize(
    ("body", "mark", "message"),
    [
        (_read_too_early, "read too early", r"no variable 'answer' yet: add gen\('answer'\)"),
        (_read_from_branch, "read before the join", r"a branch of the fork .* has it: join\(\)"),
        (_no_prompt, "no prompt", "no prompt yet"),
        (_between_messages, "between messages", r"write assistant\(gen"),
        (_text_between_messages, "loose text", "has no role"),
        (_number_in_state, "type: ignore[arg-type]  # a number", "not int: use str"),
        (_empty_choices, "no choices", "needs `choices`"),
        (_equal_choices, "equal choices", "are equal"),
        (_two_forms, "two forms", "only one of regex and json_schema"),
        (_bad_pattern, "bad pattern", "not a regular expression"),
        (_bad_schema, "bad schema", "must be a JSON object"),
        (_bad_type, "bad type", "use `dtype`"),
        (_bad_temperature, "bad temperature", "`temperature` must be a number of at least 0"),
        (_bad_stop, "type: ignore[arg-type]  # bad stop", "`stop` must be a text or a list of texts"),
        (_bad_method, "type: ignore[arg-type]  # bad method", "one of kv.token_length_normalized, .* not 'best'"),
        (_not_in_place, "not in place", r"write s \+= \.\.\."),
        (_useless_parameter, "useless parameter", "has no effect without `return_logprob"),
        (_no_branches, "no branches", "at least 1, not 0"),
        (_shifted_positions, "shifted positions", "not supported"),
        (_joined_twice, "joined twice", "is joined already"),
        (_other_join, "other join", "gather_variable only"),
        (_too_few_items, "too few items", "2 items for 3 branches"),
        (_never_joined, "never joined", "is never joined"),
        (_lone_surrogate, "lone surrogate", "UTF-8 cannot encode"),
        (_unsendable_choice, "unsendable choice", "`choices` contain .* UTF-8 cannot encode"),
        (_unsendable_pattern, "unsendable pattern", "`regex` contains .* UTF-8 cannot encode"),
        (_unsendable_schema, "unsendable schema", "`json_schema` contains .* UTF-8 cannot encode"),
        (_empty_pattern, "empty pattern", "`regex` must be a text that is not empty"),
        (_schema_without_end, "schema with infinity", "`json_schema` is not JSON"),
        (_drawn_seed, "drawn seed", "`seed` must be between 0 and"),
    ],
)
def test_a_mistake_in_a_program_is_an_error_with_its_line(
    endpoint: kv.Endpoint, server: FakeServer, body: Callable[..., None], mark: str, message: str
) -> None:
    with pytest.raises(ProgramError, match=message) as raised:
        kv.function(body).run(backend=endpoint)
    assert str(raised.value).startswith(f"{_line_of(mark)}: ")
    assert not server.leases


def test_a_reference_to_a_result_of_another_program_is_an_error_with_its_line(endpoint: kv.Endpoint) -> None:
    seen: list[str] = []

    @kv.function
    def give(s: kv.State) -> None:
        s += "Q" + kv.gen("x")
        seen.append(s.ref("x"))

    @kv.function
    def take(s: kv.State, text: str) -> None:
        s += "Q" + kv.gen("x")
        s += f"I heard {text}."  # of another run

    give.run(backend=endpoint)
    with pytest.raises(ProgramError, match="refers to a result that this program does not have") as raised:
        take.run(backend=endpoint, text=seen[0])
    assert str(raised.value).startswith(_line_of("of another run"))
    assert take.trace(text="nothing").operations, "the program itself is in order"


def test_a_refused_argument_of_the_run_is_an_error_that_says_so(endpoint_for: MakeEndpoint) -> None:
    refused = RequestError("`stop` may have at most 16 strings, not 17", param="stop")
    endpoint = endpoint_for(FakeServer(failures=lambda _: refused))

    @kv.function
    def ask(s: kv.State, own: list[str] | None) -> None:
        s += "Q" + kv.gen("x", stop=own)  # refused

    with pytest.raises(ProgramError) as of_run:
        ask.run(own=None, stop=["a"] * 17, backend=endpoint)
    with pytest.raises(ProgramError) as of_generation:
        ask.run(own=["a"] * 17, backend=endpoint)
    assert str(of_generation.value) == f"{_line_of('refused')}: {refused.message}"
    more = " (`stop` is not given here, but to the run, or has its default)"
    assert str(of_run.value) == str(of_generation.value) + more


def test_wrong_arguments_are_errors_that_name_them(endpoint: kv.Endpoint) -> None:
    @kv.function
    def ask(s: kv.State, question: str) -> None:
        s += question

    for arguments, message in (
        ({"quesion": "a"}, "no argument 'quesion'; did you mean question? Its arguments are question"),
        ({"question": "a", "temprature": 0}, "did you mean temperature?"),
        ({}, "missing a required argument: 'question'"),
        ({"question": "a", "timeout_s": 0}, "`timeout_s` must be over 0"),
        ({"question": "a", "seed": "1"}, "`seed` must be a whole number"),
        ({"question": "a", "temperature": float("inf")}, "`temperature` must be a number of at least 0, not inf"),
        ({"question": "a", "frequency_penalty": "2"}, "`frequency_penalty` must be a number between -2 and 2, not '2'"),
        ({"question": "a", "ignore_eos": 1}, "`ignore_eos` must be True or False"),
        ({"question": "a", "stop": ["a", "\udc80"]}, "`stop` contains '\\udc80', which UTF-8 cannot encode"),
        ({"question": "a", "temperature": -1}, "`temperature` must be a number of at least 0"),
    ):
        with pytest.raises(ProgramError, match=re.escape(message)):
            ask.run(backend=endpoint, **arguments)
    with pytest.raises(ProgramError, match="no argument 'answer'"):
        ask.bind(answer=1)
    with pytest.raises(ProgramError, match="num_threads"):
        ask.run_batch([{"question": "a"}], backend=endpoint, num_threads=0)
    with pytest.raises(ProgramError, match="needs a list of mappings"):
        ask.run_batch({"question": "a"}, backend=endpoint)  # type: ignore[arg-type]
    with pytest.raises(ProgramError, match="needs a state"):
        kv.function(lambda: None)


def test_the_address_of_a_server_must_be_a_url() -> None:
    @kv.function
    def ask(s: kv.State) -> None:
        s += "Q"

    for url in ("localhost:30000", "http://", "http://host:99999", "ftp://host", "http://[::1"):
        with pytest.raises(ConfigError, match="is not the URL of a server"):
            ask.run(backend=url)
    with pytest.raises(ConfigError, match="a backend is a URL"):
        ask.run(backend=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs the URL of a server"):
        kv.set_default_backend(None)  # type: ignore[arg-type]


def test_a_server_that_is_not_there_is_an_error_with_the_line_of_the_run() -> None:
    @kv.function
    def ask(s: kv.State) -> None:
        s += "Q"

    with pytest.raises(ProgramError, match=r"does not answer .* check that it runs") as raised:
        ask.run(backend="http://127.0.0.1:1")  # no server
    assert str(raised.value).startswith(_line_of("no server"))


def test_a_bug_while_a_request_is_sent_ends_the_program(endpoint_for: MakeEndpoint) -> None:
    class Broken(FakeServer):
        async def generate(self, request: Any, push: Any) -> Any:
            del request, push
            raise TypeError("a bug")

    @kv.function
    def ask(s: kv.State) -> None:
        s += "Q" + kv.gen("x")  # a bug of the client

    with pytest.raises(TypeError, match="a bug") as raised:
        ask.run(backend=endpoint_for(Broken()))
    assert any(_line_of("a bug of the client") in note for note in raised.value.__notes__)


def test_an_error_of_the_server_names_the_line_of_the_generation(endpoint_for: MakeEndpoint) -> None:
    def fail(prompt: Prompt) -> KvistError | None:
        return RequestError("the prompt is too long") if "long" in prompt.outline else None

    @kv.function
    def ask(s: kv.State) -> None:
        s += "Q" + kv.gen("short")
        s += "long" + kv.gen("x")  # refused by the server
        s += kv.gen("y")

    with pytest.raises(ProgramError, match="the prompt is too long") as raised:
        ask.run(backend=endpoint_for(FakeServer(failures=fail)))
    assert str(raised.value).startswith(_line_of("refused by the server"))


def test_a_failing_branch_lets_the_others_finish_and_nothing_stays_leased(endpoint_for: MakeEndpoint) -> None:
    def fail(prompt: Prompt) -> KvistError | None:
        return EngineError("a broken device") if "branch 1" in prompt.outline else None

    server = FakeServer(failures=fail)
    outcomes: list[object] = []

    @kv.function
    def branches(s: kv.State) -> None:
        s += kv.user("shared words " * 50)
        forks = s.fork(3)
        for index, branch in enumerate(forks):
            branch += kv.user(f"branch {index}") + kv.assistant(kv.gen("x"))
        for branch in forks:
            try:
                outcomes.append(branch["x"])
            except ProgramError as error:
                outcomes.append(error.message)

    with pytest.raises(ProgramError, match="a broken device"):
        branches.run(backend=endpoint_for(server))
    assert isinstance(outcomes[0], str)
    assert "a broken device" in str(outcomes[1])
    assert "a broken device" not in str(outcomes[2])
    assert not server.leases


def test_an_exception_in_a_program_cancels_its_requests_and_keeps_its_type(endpoint_for: MakeEndpoint) -> None:
    server = FakeServer(time_scale=100.0)  # answers would take minutes

    @kv.function
    def broken(s: kv.State) -> None:
        s += kv.user("shared words " * 50)
        forks = s.fork(2)
        forks += kv.assistant(kv.gen("x"))
        raise ValueError("a bug of the program")

    start_s = time.monotonic()
    with pytest.raises(ValueError, match="a bug of the program"):
        broken.run(backend=endpoint_for(server))
    assert time.monotonic() - start_s < 60
    assert not server.leases


def test_a_failed_program_of_a_batch_lets_the_others_end(endpoint: kv.Endpoint) -> None:
    done: list[int] = []

    @kv.function
    def program(s: kv.State, number: int) -> None:
        s += f"Q{number}" + kv.gen("x")
        if number == 1:
            raise ValueError("number one")
        s["x"]
        done.append(number)

    with pytest.raises(ValueError, match="number one") as raised:
        program.run_batch([{"number": number} for number in range(4)], backend=endpoint)
    assert sorted(done) == [0, 2, 3]
    assert "1 of 4 programs failed; this is the first" in raised.value.__notes__


def test_an_answer_that_takes_too_long_is_a_timeout_with_the_line(endpoint_for: MakeEndpoint) -> None:
    @kv.function
    def slow(s: kv.State) -> None:
        s += "Q" + kv.gen("x")  # too slow

    with pytest.raises(ProgramTimeout, match=r"within 0\.05 s") as raised:
        slow.run(backend=endpoint_for(FakeServer(time_scale=1000.0)), timeout_s=0.05)
    assert _line_of("too slow") in str(raised.value)


def test_a_tool_that_hangs_is_a_timeout_with_the_line(endpoint: kv.Endpoint) -> None:
    release = threading.Event()

    @kv.tool(timeout_s=0.05)
    def search(query: str) -> str:
        release.wait(30)
        return query

    @kv.function
    def program(s: kv.State) -> None:
        s += "Q" + kv.gen("x")
        s += search(str(s["x"]))  # a hanging tool

    with pytest.raises(ProgramTimeout, match="the tool search has not returned") as raised:
        program.run(backend=endpoint)
    release.set()
    assert str(raised.value).startswith(_line_of("a hanging tool"))


def test_an_error_in_a_tool_keeps_its_type_and_names_the_line(endpoint: kv.Endpoint) -> None:
    @kv.tool
    def divide(number: int) -> float:
        return 1 / number

    @kv.function
    def program(s: kv.State) -> None:
        s += "Q"
        divide(0)  # a failing tool

    with pytest.raises(ZeroDivisionError) as raised:
        program.run(backend=endpoint)
    assert any(_line_of("a failing tool") in note for note in raised.value.__notes__)


def test_a_lease_ends_without_its_client() -> None:
    async def check() -> None:
        server = FakeServer()
        assert await server.lease(Prompt("prefix"), None, 0.01, Hints()) is not None
        await asyncio.sleep(0.02)
        server.expire()
        assert not server.leases

    asyncio.run(check())


def test_states_of_an_ended_program_take_nothing_more(endpoint: kv.Endpoint) -> None:
    @kv.function
    def program(s: kv.State) -> None:
        s += "Q"

    state: Any = program.run(backend=endpoint)
    with pytest.raises(ProgramError, match="the program has ended"):
        state += "more"


def test_an_answer_without_the_asked_form_is_an_error_with_the_line(endpoint_for: MakeEndpoint) -> None:
    class Cut(FakeServer):
        async def generate(self, request: Any, push: Any) -> Any:

            found = await super().generate(request, push)
            return replace(found, texts=(found.texts[0][:1],), meta={"finish_reason": "length"})

    @kv.function
    def program(s: kv.State) -> object:
        s += "Q" + kv.gen("x", type=dict[str, int])  # cut off
        return s["x"]

    with pytest.raises(ProgramError, match="max_tokens cut it off") as raised:
        program.run(backend=endpoint_for(Cut()))
    assert str(raised.value).startswith(_line_of("cut off"))
