"""What pages of methods say of claims: their own, and those of others in which they are an arm."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from claims.__main__ import all_claims
from generators.claims import measured_elsewhere, read_claims
from generators.methods import method_page

from limbeck import listing
from limbeck.core import catalogue


def test_a_method_that_is_an_arm_shows_its_own_figures():
    claims = read_claims()
    page = method_page("dm", catalogue.entry("dm"), claims)
    section = page.partition("## Claim")[2]
    assert "Not measured yet" not in section
    assert "arm *dm* of the claim of [`datadam`](datadam.md)" in section
    mean = sum(claims["datadam"]["arms"]["dm"]) / 3
    (row,) = [line for line in section.splitlines() if line.startswith("| dm (this method)")]
    assert f"{mean:.4f} ±" in row
    assert "| random |" in section
    assert "five a class" not in section


def test_a_claim_of_its_own_comes_first_and_others_say_nothing():
    claims = read_claims()
    page = method_page("datadam", catalogue.entry("datadam"), claims)
    assert "The claim **holds**" in page
    assert "Measured as the arm" not in page
    assert measured_elsewhere("datadam", claims) == ""
    assert "Not measured yet." in method_page("supervised", catalogue.entry("supervised"), claims)


def test_every_arm_that_is_named_was_measured_and_is_a_method():
    stored = read_claims()
    for slug, claim in all_claims().items():
        for method, arm in claim.methods.items():
            assert method in catalogue.read()
            assert method != slug
            assert arm in stored[slug]["arms"]
            assert stored[slug]["methods"] == dict(claim.methods)


@pytest.mark.parametrize("own", [True, False])
def test_the_list_of_methods_says_so_too(own, tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "_CLAIMS", tmp_path)
    (tmp_path / "other.json").write_text(json.dumps({"slug": "other", "holds": False, "methods": {"mine": "arm"}}))
    (tmp_path / "torn.json").write_text('{"slug": "to')
    if own:
        (tmp_path / "mine.json").write_text(json.dumps({"slug": "mine", "holds": True}))
    assert listing.claim_status("mine") == ("holds" if own else "arm of other")
    assert listing.claim_status("other") == "does not hold"
    assert listing.claim_status("nobody") == "not measured"
