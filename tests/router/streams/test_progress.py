"""What a worker is asked to go on with, by property: whatever it is cut into, the answer has no gap and no repeat."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlm.chassis.errors import MeshError, Reason
from meshlm.router.streams.progress import Progress, ask_to_go_on
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2

Request = worker_pb2.RunGenerationRequest
Response = worker_pb2.RunGenerationResponse


def told(request: Request, answers: list[list[int]], data: st.DataObject) -> list[Response]:
    """What an honest worker says of these answers until it is lost: some of its chunks, in any order of choices."""
    several = len(answers) > 1
    so_far = list(request.so_far) or [worker_pb2.ChoiceSoFar() for _ in answers]
    if not several:
        so_far = [worker_pb2.ChoiceSoFar(resume_from=request.resume_from, generated=request.generated)]
    places = [choice.resume_from for choice in so_far]
    ended = [choice.ended for choice in so_far]
    for choice, answer in zip(so_far, answers, strict=True):
        assert list(choice.generated) == answer[: len(choice.generated)]  # it was told nothing that is not so
    messages, first = [], [True] * len(answers)
    for _ in range(data.draw(st.integers(0, 12))):
        if all(ended):
            break
        index = data.draw(st.sampled_from([n for n, end in enumerate(ended) if not end]))
        answer, place = answers[index], places[index]
        count = data.draw(st.integers(0, 3))
        chunk = pb.Chunk(choice=index, token_offset=place, token_ids=answer[place : place + count])
        chunk.token_count = len(chunk.token_ids)
        places[index] += chunk.token_count
        if places[index] == len(answer) and data.draw(st.booleans()):
            ended[index] = True
            chunk.finish_reason = pb.FINISH_REASON_LENGTH
        message = Response(chunk=chunk)
        if first[index]:
            message.skipped_token_ids.extend(answer[:place])
            message.skipped_text = "x" * place
        first[index] = False
        messages.append(message)
    return messages


@given(st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=4), st.data())
def test_an_answer_cut_anywhere_goes_on_where_it_was(answers: list[list[int]], data: st.DataObject) -> None:
    has = [data.draw(st.integers(0, len(answer))) for answer in answers]
    kept = data.draw(st.booleans())  # whether the store knew what had been made
    progress = [
        Progress(resume_from=count, made=array("I", answer if kept else ()))
        for count, answer in zip(has, answers, strict=True)
    ]
    got = [answer[:count] for count, answer in zip(has, answers, strict=True)]
    seen = [0] * len(answers)
    for _ in range(data.draw(st.integers(1, 5))):
        if all(choice.ended for choice in progress):
            break
        request = Request()
        ask_to_go_on(request, progress)
        for message in told(request, answers, data):
            index = message.chunk.choice
            assert not progress[index].ended
            progress[index].take(message)
            got[index].extend(message.chunk.token_ids)
            seen[index] += bool(message.skipped_text)
            assert got[index] == answers[index][: progress[index].offset]
            assert progress[index].known
            assert list(progress[index].made) == got[index]
    assert all(count <= 1 for count in seen)  # a guard reads what went before once


def test_what_a_worker_did_not_tell_is_asked_for_again_from_the_seed() -> None:
    [untold] = progress = [Progress()]
    untold.take(Response(chunk=pb.Chunk(token_count=2)))  # without ids
    ask_to_go_on(request := Request(), progress)
    assert (request.resume_from, list(request.generated)) == (2, [])


def test_a_choice_that_the_guard_stopped_is_made_by_nobody() -> None:
    progress = [Progress(made=array("I", [1]), offset=1), Progress(made=array("I", [2]), offset=1)]
    ask_to_go_on(request := Request(), progress, unwanted=[1])
    assert [(c.resume_from, list(c.generated), c.ended) for c in request.so_far] == [(1, [1], False), (1, [], True)]


def test_several_choices_that_begin_are_asked_for_as_before() -> None:
    ask_to_go_on(request := Request(), [Progress(), Progress()])
    assert request == Request()


def test_a_gap_in_one_choice_is_not_believed() -> None:
    with pytest.raises(MeshError) as caught:
        Progress(resume_from=3).take(Response(chunk=pb.Chunk(token_offset=4, token_count=1)))
    assert caught.value.reason == Reason.INTERNAL
