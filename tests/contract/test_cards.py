"""What every method says of itself: card, docstring, options."""

import importlib
import inspect
import math
import re

import pytest
from pydantic import ValidationError

from limbeck.core.errors import RecipeError
from limbeck.core.explain import check_schema
from limbeck.core.options import OptionsBase
from limbeck.core.registry import MethodClass, all_methods, method_class
from tests.contract.bad_values import bad_values, bounded, numeric, properties

METHODS = all_methods()


@pytest.fixture(params=METHODS)
def kind(request: pytest.FixtureRequest) -> MethodClass:
    """Every registered method in turn."""
    return METHODS[request.param]


def test_there_are_methods():
    assert len(METHODS) >= 19


def test_the_card_is_complete(kind):
    card = kind.card
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", card.slug)
    assert re.fullmatch(r"(\d{4}\.\d{4,5})?", card.arxiv)
    assert 1980 <= card.year <= 2100
    if card.arxiv:  # conferences may come a year before the preprint, and preprints years before them
        assert abs(card.year - (2000 + int(card.arxiv[:2]))) <= 1
    assert len(card.title) > 10
    assert card.title == card.title.strip()
    assert len(card.use) > 20
    assert card.use.endswith(".")
    assert "student" in card.needs or card.family in ("scenes", "datasets")
    assert len(set(card.needs)) == len(card.needs)


def test_the_file_is_named_after_the_slug(kind):
    slug = kind.card.slug.replace("-", "_")
    assert kind.__module__ == f"limbeck.methods.{kind.card.family}.{slug}"
    module = importlib.import_module(kind.__module__)
    here = [m for m in METHODS.values() if m.__module__ == kind.__module__]
    assert here == [kind], "one system a file"
    assert module.__doc__
    assert method_class(kind.card.slug) is kind


def test_the_docstring_says_what_it_does_and_how(kind):
    text = inspect.cleandoc(kind.__dict__.get("__doc__") or "")
    first = text.split("\n\n")[0]
    assert len(first) > 30, "one sentence first"
    assert ":math:" in text or ".. math::" in text, "an equation"
    assert text.count("{") == text.count("}")


def test_coupling_of_the_batch_is_documented(kind):
    if kind.card.couples_batch:
        assert "couple" in kind.__doc__
        assert "accumulation" in kind.__doc__


def test_every_option_is_described_and_every_number_has_its_range(kind):
    assert issubclass(kind.Options, OptionsBase)
    assert kind.Options.__doc__
    for name, entry in properties(kind.Options.model_json_schema()).items():
        assert len(entry.get("description", "")) > 5, f"{name} has no description"
        for branch in numeric(entry):
            assert bounded(branch), f"{name} has no range"


def test_defaults_and_tiny_options_are_allowed(kind):
    kind.Options()
    tiny = kind.Options(**kind.card.tiny)
    check_schema(dict(kind.card.tiny), kind.Options.model_json_schema(), kind.card.slug)
    assert not tiny.model_dump().keys() - kind.Options.model_fields.keys()


def test_an_unknown_option_is_refused_by_both_checks(kind):
    schema = kind.Options.model_json_schema()
    unknown = {"no_such_option": 1}
    with pytest.raises(ValidationError, match="no_such_option"):
        kind.Options(**unknown)
    with pytest.raises(RecipeError, match=r"stage\.options\.no_such_option: there is no such option"):
        check_schema(unknown, schema, "stage.options")


def test_values_out_of_range_are_refused_by_both_checks(kind):
    schema = kind.Options.model_json_schema()
    for name, entry in properties(schema).items():
        wrong = list(bad_values(entry))
        assert wrong, f"{name} allows anything"
        for value in wrong:
            with pytest.raises(ValidationError, match=name):
                kind.Options(**{name: value})
            with pytest.raises(RecipeError, match=rf"stage\.options\.{name}"):
                check_schema({name: value}, schema, "stage.options")


def test_infinities_and_nan_are_refused(kind):
    for name, entry in properties(kind.Options.model_json_schema()).items():
        if numeric(entry):
            for value in (math.inf, -math.inf, math.nan):
                with pytest.raises(ValidationError, match=name):
                    kind.Options(**{name: value})


def test_options_are_frozen(kind):
    options = kind.Options()
    for name in kind.Options.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(options, name, getattr(options, name))
