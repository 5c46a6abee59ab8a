"""A rotating sample of the mutants: each seeded bug must be found. `python tests/mutants.py` tries all of them."""

from __future__ import annotations

import datetime

import emulator
import mutants
import pytest

SAMPLE = 3  # a day


def todays_sample() -> list[str]:
    names = mutants.all_names()
    first = datetime.date.today().toordinal() * SAMPLE
    return [names[(first + i) % len(names)] for i in range(min(SAMPLE, len(names)))]


@pytest.mark.parametrize("name", mutants.all_names())
def test_edits_fit_the_sources(name):
    mutants.write_overlay(name)


@pytest.mark.skipif(emulator.missing() is not None, reason=f"no emulator: {emulator.missing()}")
@pytest.mark.parametrize("name", todays_sample())
def test_is_found(name):
    assert mutants.found_by(name), f"{name} survives: {mutants.lookup(name)[1].what}"
