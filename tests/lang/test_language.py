"""The words of the language: what a program gets, and which requests it causes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import msgspec
import pydantic
import pytest

import kvist.lang as kv
from kvist.execution.fake_server import FakeServer
from kvist.execution.sampling import DEFAULT_MAX_TOKENS
from kvist.lang.program import seed_of


@kv.function
def chat(s: kv.State, question: str) -> None:
    s += kv.system("You are brief.")
    s += kv.user(question)
    s += kv.assistant("Well, " + kv.gen("answer", max_tokens=16, stop=".") + "!")


def test_a_chat_has_its_messages_text_and_variables(endpoint: kv.Endpoint, server: FakeServer) -> None:
    state = chat.run(question="Why?", backend=endpoint)
    answer = state["answer"]
    assert isinstance(answer, str)
    assert answer
    assert state.messages() == [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": f"Well, {answer}!"},
    ]
    assert state.text() == f"system: You are brief.\nuser: Why?\nassistant: Well, {answer}!"
    (request,) = server.seen.generated
    assert request.prompt.messages()[-1].text == "Well, "
    assert request.sampling.stops() == (".",)
    assert state.get_meta_info("answer")["finish_reason"] in ("stop", "length")


def test_parameters_of_a_generation_come_before_those_of_the_run_and_those_before_the_defaults(
    endpoint: kv.Endpoint, server: FakeServer
) -> None:
    @kv.function
    def program(s: kv.State) -> None:
        s += "a" + kv.gen("x", temperature=0.5) + kv.gen("y", max_tokens=3)

    program.run(backend=endpoint, temperature=0.9, max_new_tokens=7, top_p=0.8)
    x, y = (each.sampling for each in server.seen.generated)
    assert (x.temperature, x.max_tokens, x.top_p) == (0.5, 7, 0.8)
    assert (y.temperature, y.max_tokens, y.top_p) == (0.9, 3, 0.8)
    program.run(backend=endpoint)
    assert server.seen.generated[2].sampling.max_tokens == DEFAULT_MAX_TOKENS


@pytest.mark.parametrize("method", list(kv.ChoicesMethod))
def test_a_select_gives_a_choice_and_its_scores(
    endpoint: kv.Endpoint, server: FakeServer, method: kv.ChoicesMethod
) -> None:
    @kv.function
    def judge(s: kv.State) -> None:
        s += kv.user("Is the sky blue?")
        s += kv.assistant(kv.select("verdict", ["yes", "no", "not sure"], choices_method=method))

    state = judge.run(backend=endpoint)
    assert state["verdict"] in ("yes", "no", "not sure")
    scores: Any = state.get_meta_info("verdict")["scores"]
    assert scores[state["verdict"]] == max(scores.values())
    (request,) = server.seen.scored
    assert request.choices == ("yes", "no", "not sure")
    assert request.unconditional == (method is kv.unconditional_likelihood_normalized)
    assert not server.seen.generated


def test_choices_of_gen_are_a_select(endpoint: kv.Endpoint, server: FakeServer) -> None:
    @kv.function
    def tool_use(s: kv.State, question: str) -> None:
        s += kv.assistant(f"For {question} I use a " + kv.gen("tool", choices=["calculator", "search engine"]) + ". ")
        if s["tool"] == "calculator":
            s += kv.assistant("The expression is: " + kv.gen("expression"))
        else:
            s += kv.assistant("The keyword is: " + kv.gen("keyword"))

    state = tool_use.run(question="2 + 2", backend=endpoint)
    assert ("expression" in state) == (state["tool"] == "calculator")
    assert ("keyword" in state) == (state["tool"] == "search engine")
    assert len(server.seen.scored) == 1


def test_a_select_with_a_temperature_is_drawn_by_the_seed(endpoint: kv.Endpoint) -> None:
    @kv.function
    def draw(s: kv.State) -> None:
        s += "x" + kv.select("side", ["heads", "tails"], temperature=5.0)

    sides = [draw.run(backend=endpoint, seed=seed)["side"] for seed in range(30)]
    assert set(sides) == {"heads", "tails"}
    assert sides == [draw.run(backend=endpoint, seed=seed)["side"] for seed in range(30)]


def test_the_branches_of_a_fork_share_the_prefix_and_have_seeds_of_their_own(
    endpoint: kv.Endpoint, server: FakeServer
) -> None:
    @kv.function
    def consistency(s: kv.State) -> object:
        s += kv.user("Think.")
        forks = s.fork(4)
        forks += kv.assistant(kv.gen("thought", temperature=1.0))
        forks.join()
        return s["thought"]

    state = consistency.run(backend=endpoint, seed=7)
    thoughts = state.ret_value
    assert isinstance(thoughts, list)
    assert len(set(thoughts)) == 4
    seeds = [each.sampling.seed for each in server.seen.generated]
    assert set(seeds) == {seed_of(7, (0, branch)) for branch in range(4)}
    assert consistency.run(backend=endpoint, seed=7).ret_value == thoughts
    assert consistency.run(backend=endpoint, seed=8).ret_value != thoughts


def test_forks_take_one_item_for_each_branch_or_a_function_of_its_number(endpoint: kv.Endpoint) -> None:
    @kv.function
    def program(s: kv.State) -> None:
        s += kv.user("Go.")
        with s.fork(2) as forks:
            forks += [kv.user("first"), kv.user("second")]
            forks += lambda number: kv.user(f"number {number}")
        s += kv.user(forks[0].messages()[-1]["content"] + forks[1].messages()[-2]["content"])
        with s.copy() as copied:
            copied += kv.user("only here")
        s += kv.user("nested " + str(len(s.fork(3))))

    state = program.run(backend=endpoint)
    assert [each["content"] for each in state.messages()] == ["Go.", "number 0second", "nested 3"]


def test_a_reference_is_text_before_the_result_is_there(endpoint: kv.Endpoint, server: FakeServer) -> None:
    @kv.function
    def expand(s: kv.State) -> None:
        s += kv.user("Two tips.")
        forks = s.fork(2)
        forks += kv.assistant(kv.gen("tip"))
        s += kv.user(f"1: {forks[0].ref('tip')} 2: {forks[1].ref('tip')}")
        s += kv.assistant(kv.gen("summary"))

    state = expand.run(backend=endpoint)
    last = max(server.seen.generated, key=lambda one: len(one.prompt.outline))
    assert "\udc04" not in last.prompt.outline
    assert state.messages()[1]["content"].startswith("1: ")
    assert state["summary"]


@dataclasses.dataclass
class Point:
    x: int
    y: int


class City(msgspec.Struct):
    name: str
    people: int


class Country(pydantic.BaseModel):
    name: str
    area: float


@pytest.mark.parametrize("wanted", [Point, City, Country])
def test_a_typed_generation_gives_a_value_of_its_type(endpoint: kv.Endpoint, server: FakeServer, wanted: type) -> None:
    @kv.function
    def extract(s: kv.State) -> None:
        s += kv.user("Extract.")
        s += kv.assistant(kv.gen("found", type=wanted))

    assert isinstance(extract.run(backend=endpoint)["found"], wanted)
    (request,) = server.seen.generated
    assert request.form == "json_schema"


@pytest.mark.parametrize("dtype", [int, float, bool, str])
def test_a_scalar_type_gives_a_value_of_python(endpoint: kv.Endpoint, dtype: type[int]) -> None:
    @kv.function
    def ask(s: kv.State) -> None:
        s += "How many? " + kv.gen("number", dtype=dtype)

    assert type(ask.run(backend=endpoint)["number"]) is dtype


def test_gen_int_and_gen_string_are_scalars(endpoint: kv.Endpoint) -> None:
    @kv.function
    def ask(s: kv.State) -> None:
        s += "n " + kv.gen_int("number") + " s " + kv.gen_string("text")

    state = ask.run(backend=endpoint)
    assert isinstance(state["number"], int)
    assert isinstance(state["text"], str)


def test_several_answers_are_a_list_and_the_first_one_continues(endpoint: kv.Endpoint) -> None:
    @kv.function
    def several(s: kv.State) -> None:
        s += "Names: " + kv.gen("names", n=3, temperature=1.0)

    state = several.run(backend=endpoint)
    names: Any = state["names"]
    assert len(names) == 3
    assert state.text() == f"Names: {names[0]}"


def test_roles_begin_and_end_apart_and_as_blocks(endpoint: kv.Endpoint) -> None:
    @kv.function
    def program(s: kv.State) -> None:
        s.system("Be kind.")
        with s.user():
            s += "Question: "
            s += "why?"
        s += kv.assistant_begin()
        with s.var_scope("whole"):
            s += "Answer: " + kv.gen("answer", max_tokens=4)
        s += kv.assistant_end()

    state = program.run(backend=endpoint)
    assert state["whole"] == f"Answer: {state['answer']}"
    assert [each["role"] for each in state.messages()] == ["system", "user", "assistant"]


def test_a_function_adds_itself_to_a_state_and_keeps_bound_arguments(endpoint: kv.Endpoint) -> None:
    @kv.function
    def greet(s: kv.State, name: str, mood: str = "good") -> None:
        s += f"Hello {name}, {mood} day. "

    @kv.function
    def twice(s: kv.State) -> None:
        greet(s, "Ann")
        s += lambda state: greet(state, "Bob", mood="bad")

    assert twice.run(backend=endpoint).text() == "Hello Ann, good day. Hello Bob, bad day. "
    assert greet.bind(mood="fine").run(name="Cy", backend=endpoint).text() == "Hello Cy, fine day. "
    assert greet("Di", backend=endpoint).text() == "Hello Di, good day. "


def test_variables_that_the_program_sets_are_read_like_others(endpoint: kv.Endpoint) -> None:
    @kv.function
    def program(s: kv.State) -> None:
        s.set_var("score", 3)

    state = program.run(backend=endpoint)
    assert (state["score"], state.get_var("score"), "score" in state, "other" in state) == (3, 3, True, False)


def test_stop_patterns_logprobs_and_stop_tokens_reach_the_server(endpoint: kv.Endpoint, server: FakeServer) -> None:
    @kv.function
    def program(s: kv.State) -> None:
        s += "x" + kv.gen(
            "a", stop_regex=r"e\w", return_logprob=True, top_logprobs_num=2, logprob_start_len=0, stop_token_ids=[7]
        )

    state = program.run(backend=endpoint)
    (request,) = server.seen.generated
    assert request.sampling.stop_patterns() == (r"e\w",)
    assert request.sampling.stop_token_ids == [7]
    assert "logprobs" in state.get_meta_info("a")


def test_a_batch_gives_states_in_order_with_different_seeds(endpoint: kv.Endpoint) -> None:
    @kv.function
    def draw(s: kv.State, topic: str) -> None:
        s += f"About {topic}: " + kv.gen("text", temperature=1.0)

    batch = [{"topic": topic} for topic in ("cats", "dogs", "cats")]
    states = draw.run_batch(batch, backend=endpoint, seed=3, num_threads=2)
    texts = [state["text"] for state in states]
    assert states[1].text().startswith("About dogs: ")
    assert texts[0] != texts[2]
    again = draw.run_batch(batch, backend=endpoint, seed=3, progress_bar=True, temperature=1.0)
    assert [state["text"] for state in again] == texts
    assert draw.run_batch([], backend=endpoint) == []


def test_the_default_backend_is_used_by_runs_that_name_none(endpoint: kv.Endpoint) -> None:
    kv.set_default_backend(endpoint)
    assert chat("Why?")["answer"]


def test_the_language_is_imported_without_torch_and_without_an_http_client() -> None:
    code = "import sys, kvist.lang; sys.exit(str([m for m in ('torch', 'httpx', 'rich', 'numpy') if m in sys.modules]))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert found.stderr.strip() == "[]"
