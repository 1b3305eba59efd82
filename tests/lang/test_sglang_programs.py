"""Programs as SGLang's public documentation describes them (its front-end tutorial and its README), rewritten from
that description: with a changed import they run, and give what the documentation says."""

from __future__ import annotations

import re
from typing import Any

import kvist.lang as kv
from kvist.execution.fake_server import FakeServer
from kvist.lang import (
    assistant,
    assistant_begin,
    assistant_end,
    function,
    gen,
    select,
    system,
    user,
    user_begin,
    user_end,
)


@function
def basic_qa(s: Any, question: str) -> None:
    s += system("You answer questions helpfully.")
    s += user(question)
    s += assistant(gen("answer", max_tokens=64))


def test_a_question_is_answered_by_calling_the_function(endpoint: kv.Endpoint) -> None:
    kv.set_default_backend(endpoint)
    state = basic_qa("Name three countries and their capitals.")
    assert state["answer"] == state.messages()[-1]["content"]


@function
def multi_turn_qa(s: Any) -> Any:
    s += system("You answer questions helpfully.")
    s += user("Name three countries.")
    s += assistant(gen("first_answer", max_tokens=64))
    s += user("Name three more.")
    s += assistant(gen("second_answer", max_tokens=64))
    return s


def test_a_second_turn_sees_the_first_answer(endpoint: kv.Endpoint, server: FakeServer) -> None:
    state = multi_turn_qa.run(backend=endpoint)
    assert [each["role"] for each in state.messages()] == ["system", "user", "assistant", "user", "assistant"]
    second = server.seen.generated[1].prompt.messages()
    assert second[2].text == state["first_answer"]
    assert state.ret_value is state


@function
def tip_suggestion(s: Any) -> None:
    s += assistant("Two tips for health: 1. Balanced diet. 2. Regular exercise.\n\n")
    forks = s.fork(2)
    for number, branch in enumerate(forks):
        branch += assistant(f"Now tip {number + 1} as a paragraph:\n" + gen("detailed_tip", max_tokens=64, stop="\n\n"))
    s += assistant("Tip 1:" + forks[0]["detailed_tip"] + "\n")
    s += assistant("Tip 2:" + forks[1]["detailed_tip"] + "\n")
    s += assistant("To summarise both tips:\n" + gen("summary", max_tokens=64))


def test_two_tips_are_expanded_at_the_same_time_and_summarised(endpoint: kv.Endpoint) -> None:
    state = tip_suggestion.run(backend=endpoint)
    texts = [each["content"] for each in state.messages()]
    assert texts[1].startswith("Tip 1:")
    assert texts[2].startswith("Tip 2:")
    assert texts[1][6:] != texts[2][6:]
    assert state["summary"]


@function
def regular_expression_gen(s: Any) -> None:
    s += user("What is the IP address of the DNS server?")
    s += assistant(gen("answer", temperature=0, regex="(127.0.0.1|8.8.8.8|1.1.1.1)"))


def test_an_answer_matches_its_regular_expression(endpoint: kv.Endpoint) -> None:
    assert re.fullmatch("(127.0.0.1|8.8.8.8|1.1.1.1)", str(regular_expression_gen.run(backend=endpoint)["answer"]))


@function
def text_qa(s: Any, question: str) -> None:
    s += user(question)
    s += assistant(gen("answer", stop="\n"))


def test_a_batch_is_run_with_a_progress_bar_and_a_run_is_streamed(endpoint: kv.Endpoint) -> None:
    batch = [{"question": f"What is the capital of country {number}?"} for number in range(3)]
    states = text_qa.run_batch(batch, backend=endpoint, progress_bar=True)
    assert len({state["answer"] for state in states}) == 3
    state = text_qa.run(question="What is the capital of France?", backend=endpoint, temperature=0.1, stream=True)
    pieces = list(state.text_iter())
    assert "".join(pieces) == f"user: What is the capital of France?\nassistant: {state['answer']}"


@function
def chat_example(s: Any) -> None:
    s += system("You answer questions helpfully.")
    with s.user():
        s += "Question: What is the capital of France?"
    s += assistant_begin()
    s += "Answer: " + gen("answer", max_tokens=64, stop="\n")
    s += assistant_end()
    s += user_begin() + "Thank you." + user_end()


def test_roles_are_written_in_three_ways(endpoint: kv.Endpoint) -> None:
    messages = chat_example.run(backend=endpoint).messages()
    assert messages[1]["content"] == "Question: What is the capital of France?"
    assert messages[2]["content"].startswith("Answer: ")
    assert messages[3] == {"role": "user", "content": "Thank you."}


@function
def essay_judge(s: Any, essay: str) -> None:
    s += system("You judge essays.")
    s += user("Essay: " + essay)
    s += user("Is the essay about its topic?")
    s += assistant(select("related", choices=["yes", "no"]))
    forks = s.fork(3)
    forks += [user(f"Judge its {dimension}.") for dimension in ("clarity", "originality", "evidence")]
    forks += assistant("Judgment: " + gen("judgment", max_tokens=32, stop="END"))
    forks.join()
    judgments = "\n".join(s["judgment"])
    s += user("A summary of the judgments:\n" + judgments)
    s += assistant(gen("summary", max_tokens=32))
    s += user("The grade:")
    s += assistant(gen("grade", choices=["A", "B", "C", "D"]))


def test_an_essay_is_judged_in_parallel_dimensions(endpoint: kv.Endpoint, server: FakeServer) -> None:
    state = essay_judge.run(essay="Trees are good. " * 40, backend=endpoint)
    assert state["related"] in ("yes", "no")
    judgments: Any = state["judgment"]
    assert len(judgments) == 3
    assert state["grade"] in ("A", "B", "C", "D")
    assert len(server.seen.scored) == 2


@function
def few_shot_qa(s: Any, question: str) -> None:
    s += "The following are questions with answers.\n\n"
    s += "Q: What is the capital of France?\nA: Paris\n"
    s += "Q: " + question + "\n"
    s += "A:" + gen("answer", stop="\n", temperature=0)


def test_a_program_without_roles_is_a_plain_prompt(endpoint: kv.Endpoint, server: FakeServer) -> None:
    state = few_shot_qa.run(question="What is the capital of Italy?", backend=endpoint)
    assert state.text().endswith(f"\nA:{state['answer']}")
    assert not server.seen.generated[0].prompt.is_chat


@function
def expression_chain(s: Any) -> None:
    s += "The number is " + gen("number", dtype=int) + ", the word is " + gen("word", regex="[a-z]+") + "."


def test_several_generations_stand_in_one_expression(endpoint: kv.Endpoint) -> None:
    state = expression_chain.run(backend=endpoint)
    assert state.text() == f"The number is {state['number']}, the word is {state['word']}."
