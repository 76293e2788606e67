"""What is said of a policy that goes astray: each warning by its measure, and the measures by hand."""

import types

import numpy as np
import pytest

from sera_jax.records import Candidates, Tree
from sera_jax.train import watch

FINE = {
    "iteration": 2,
    "watch/logp_per_token": -1.0,
    "watch/logp_per_token_start": -1.0,
    "watch/margin_size": 0.5,
    "gen/length": 10.0,
    "gen/length_ratio": 1.0,
    "gen/finished": 1.0,
    "gen/distinct_2": 0.4,
    "gen/identical": 0.1,
}
PLAIN = {k: v for k, v in FINE.items() if not k.startswith("gen/")}  # an iteration that samples nothing


@pytest.mark.parametrize(
    "change, before, words",
    [
        ({}, [FINE], None),
        ({"watch/logp_per_token": -1.09}, [FINE | {"watch/logp_per_token": -1.05}], None),
        (
            {"watch/logp_per_token": -1.11},
            [FINE | {"watch/logp_per_token": -1.08}],
            "logps/chosen falls: the given chosen responses have -0.110 nats a token since the start, -0.030 in this",
        ),
        ({"watch/logp_per_token": -1.06}, [], "-0.060 nats a token since the start, -0.060 in this iteration."),
        ({"watch/logp_per_token": -0.9}, [FINE | {"watch/logp_per_token": -0.8}], "+0.100 nats a token since"),
        ({"gen/length_ratio": 1.49}, [], None),
        ({"gen/length_ratio": 1.51}, [], "length drifts: samples have 1.51 times the tokens of the given chosen"),
        ({"gen/length_ratio": 0.5}, [], "length drifts: samples have 0.50 times"),
        ({"gen/distinct_2": 0.29}, [FINE], None),
        ({"gen/distinct_2": 0.27}, [PLAIN, FINE, FINE | {"gen/distinct_2": 0.1}], "distinct-2 is 0.270, it was 0.400"),
        ({"gen/identical": 0.6}, [], "samples collapse: 60 % of the candidates repeat another one of"),
        ({"watch/margin_size": 10.1}, [], "margins blow up: their median size is 10.1 on the given pairs"),
        ({"gen/finished": 0.74}, [], "26 % of the candidates are unfinished. Raise bootstrap.max_new_tokens"),
    ],
)
def test_a_warning_for_each_way_to_go_astray(change, before, words, capsys):
    told = watch.warnings(FINE | change, before)
    assert len(told) == (words is not None)
    if words:
        assert words in told[0]
        assert capsys.readouterr().out == f"iteration 2, warning: {told[0]}\n"


def test_an_iteration_that_samples_nothing_has_nothing_to_say_of_samples():
    assert watch.warnings(PLAIN, [PLAIN]) == []


def test_several_at_once():
    told = watch.warnings(FINE | {"watch/margin_size": 99.0, "gen/finished": 0.0, "gen/length_ratio": 3.0}, [])
    assert [said.split()[0] for said in told] == ["length", "margins", "100"]


def test_samples_by_hand():
    ids = lambda *tokens: np.array(tokens, np.int32)
    tokens = ((ids(1, 2, 0), ids(1, 2, 0), ids(3)), (ids(4, 0), ids(), ids()))  # a repetition; a row of one
    texts = (("a b", "a b", "c d e"), ("f", "", ""))
    done = np.array([[True, True, False], [True, False, False]])
    candidates = Candidates(("p", "q"), (ids(9), ids(8)), texts, tokens, done)
    tree = lambda n: Tree("t", ids(1), (np.zeros(n, np.int32), ids(1)))
    world = types.SimpleNamespace(given=types.SimpleNamespace(trees=(tree(4), tree(6))))
    got = watch.of_samples(world, candidates)
    assert got == {
        "gen/length": 9 / 4,
        "gen/length_ratio": 9 / 4 / 5,
        "gen/finished": 3 / 4,
        "gen/distinct_2": 3 / 4,  # ab, ab, cd, de
        "gen/identical": 1 / 4,
    }
    assert watch.of_samples(world, None) == {}
