"""Aging evolution and random search on spaces whose best architecture is known."""

import itertools
import random
from collections import Counter

import pytest

from limbeck.core.errors import IncompatibleError
from limbeck.search.evolution import Scored, aging_evolution, random_search, ranked

GENES, VALUES = 6, 4
BEST = (2, 0, 3, 1, 1, 2)


class Genes:
    """All strings of six genes with four values each."""

    def sample(self, draws):
        return tuple(draws.randrange(VALUES) for _ in range(GENES))

    def mutate(self, architecture, draws):
        place = draws.randrange(GENES)
        other = draws.choice([value for value in range(VALUES) if value != architecture[place]])
        return (*architecture[:place], other, *architecture[place + 1 :])


def matching(architecture):
    return float(sum(one == other for one, other in zip(architecture, BEST, strict=True)))


def course(seed, count, score=matching, **settings):
    return list(itertools.islice(aging_evolution(Genes(), score, random.Random(seed), **settings), count))


@pytest.mark.parametrize("seed", range(20))
def test_the_optimum_of_a_4_to_the_6_space_is_found_in_under_a_thousand_evaluations(seed):
    assert ranked(course(seed, 999))[0].architecture == BEST


def test_evolution_finds_it_sooner_than_chance():
    def first(history):
        return next((n for n, found in enumerate(history) if found.architecture == BEST), 999)

    evolved = [first(course(seed, 999)) for seed in range(10)]
    drawn = [first(itertools.islice(random_search(Genes(), matching, random.Random(s)), 999)) for s in range(10)]
    assert sum(evolved) < 0.6 * sum(drawn)


def test_the_same_draws_take_the_same_course():
    assert course(3, 200) == course(3, 200)
    assert course(3, 200) != course(4, 200)


def test_without_mutation_it_never_leaves_its_start_population():
    history = course(0, 300, mutation_rate=0.0, population=10)
    start = {found.architecture for found in history[:10]}
    assert {found.architecture for found in history} <= start
    assert len({found.architecture for found in history[-10:]}) < len(start)  # selection goes on


def test_every_child_differs_in_one_gene_from_someone_alive_who_was_among_the_best():
    history, population = course(1, 120, population=12, sample=6, parents=2), 12
    for place in range(population, len(history)):
        alive = [found.architecture for found in history[place - population : place]]
        child = history[place].architecture
        assert any(sum(a != b for a, b in zip(child, parent, strict=True)) == 1 for parent in alive)


def test_the_oldest_dies_even_if_it_is_the_best():
    """The youngest of the first population scores most: four children come of it, and then it is gone."""
    seen: list = []

    def score(architecture):
        seen.append(architecture)
        return 1.0 if architecture == seen[min(3, len(seen) - 1)] and len(seen) > 3 else 0.0

    history = course(0, 40, population=4, sample=50, parents=1, score=score)
    distance = [sum(a != b for a, b in zip(found.architecture, seen[3], strict=True)) for found in history]
    assert distance[3:8] == [0, 1, 1, 1, 1]
    assert max(distance[8:]) > 1


def test_parents_are_the_best_of_the_sample():
    greedy = course(5, 300, sample=30, parents=1, population=10)
    loose = course(5, 300, sample=30, parents=30, population=10)
    mean = {name: sum(one.score for one in found[-100:]) / 100 for name, found in (("g", greedy), ("l", loose))}
    assert mean["g"] > mean["l"] + 1


def test_what_is_refused_is_never_yielded_and_the_search_goes_on():
    def even(architecture):
        return None if sum(architecture) % 2 else matching(architecture)

    history = course(0, 400, score=even)
    assert all(sum(found.architecture) % 2 == 0 for found in history)
    # One gene changes by an odd number or an even one: neighbours that are admitted exist.
    assert ranked(history)[0].score >= 5


def test_a_parent_without_admitted_neighbours_is_its_own_child():
    only = (0, 0, 0, 0, 0, 0)

    class Lonely(Genes):
        def sample(self, draws):
            return only

    score = {only: 1.0}.get
    found = list(itertools.islice(aging_evolution(Lonely(), score, random.Random(0), population=2), 5))
    assert found == [Scored(only, 1.0)] * 5


def test_a_space_that_is_refused_as_a_whole_is_an_error():
    with pytest.raises(IncompatibleError, match="none was admitted"):
        next(aging_evolution(Genes(), lambda architecture: None, random.Random(0)))


def test_random_search_draws_evenly():
    found = itertools.islice(random_search(Genes(), matching, random.Random(0)), 4000)
    counts = Counter(one.architecture[0] for one in found)
    assert set(counts) == set(range(VALUES))
    assert all(850 < count < 1150 for count in counts.values())


def test_ranking_holds_each_once_and_keeps_the_order_of_equals():
    history = [Scored("b", 1.0), Scored("a", 2.0), Scored("c", 1.0), Scored("a", 2.0), Scored("b", 1.0)]
    assert ranked(history) == [Scored("a", 2.0), Scored("b", 1.0), Scored("c", 1.0)]
