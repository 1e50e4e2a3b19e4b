"""The one table of legal moves."""

from core.states import ACTIONS, MOVES, ON_A_HOST, TERMINAL, JobState, may_move, sources_of


def test_terminal_states_never_change() -> None:
    assert not [move for move in MOVES if move[0] in TERMINAL]


def test_every_state_can_be_reached_from_queued_and_can_end() -> None:
    reached, frontier = {JobState.QUEUED}, {JobState.QUEUED}
    while frontier:
        frontier = {target for source, target in MOVES if source in frontier} - reached
        reached |= frontier
    assert reached == set(JobState)
    for state in set(JobState) - TERMINAL:
        ends, frontier = {state}, {state}
        while frontier:
            frontier = {target for source, target in MOVES if source in frontier} - ends
            ends |= frontier
        assert TERMINAL & ends, state


def test_a_user_moves_nothing_that_a_host_must_report() -> None:
    assert sources_of(JobState.SUCCEEDED, "user") == ()
    assert not may_move(JobState.RUNNING, JobState.CANCELLED, "user"), "it stops first"
    assert may_move(JobState.QUEUED, JobState.CANCELLED, "user")
    assert set(sources_of(JobState.FAILED, "worker")) == ON_A_HOST


def test_every_state_offers_its_actions() -> None:
    assert set(ACTIONS) == set(JobState)
    for state, actions in ACTIONS.items():
        assert "clone" in actions
        assert ("cancel" in actions) == (state not in TERMINAL)
        assert ("retry" in actions) == (state in {JobState.FAILED, JobState.CANCELLED})
