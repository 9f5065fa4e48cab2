"""The readers of model files against files with a few changes: a short version of `make fuzz`, and
every input that it once kept.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

import fuzzing

#: Inputs for each reader: one to two seconds of processor time.
EXAMPLES = 150


@pytest.mark.parametrize("name", fuzzing.READERS)
def test_a_reader_raises_only_what_it_documents(name, tmp_path):
    tried = []

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,  # the same inputs in every run
        suppress_health_check=list(HealthCheck),
    )
    @given(fuzzing.READERS[name].cases())
    def once(case):
        tried.append(fuzzing.check(name, case, tmp_path))

    once()
    # some are accepted and some refused, else nothing beyond the first check was tried
    assert EXAMPLES // 20 <= sum(tried) <= len(tried) - EXAMPLES // 5


@pytest.mark.parametrize("name", fuzzing.READERS)
def test_unchanged_files_are_accepted(name, tmp_path):
    read = [fuzzing.check(name, case, tmp_path) for case in fuzzing.unchanged(name)]
    refused = 0
    if name == "config":  # the published ones that are refused on purpose
        refused = sum("refused" in entry for entry in fuzzing.PUBLISHED.values())
    assert len(read) > 4 and read.count(False) == refused


def test_what_was_once_found(tmp_path):
    for file, name, case in fuzzing.kept():
        try:
            fuzzing.check(name, case, tmp_path)
        except BaseException as error:
            error.add_note(f"reading {file}")
            raise
