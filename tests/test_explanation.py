"""The explanations: their code prints what they say."""

import pages
import pytest

import fastbn


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = fastbn.get_num_threads()
    yield
    fastbn.set_num_threads(before)


@pytest.mark.parametrize("page", ["algorithm", "statistics", "gradients"])
def test_code_of(page):
    pages.check(f"explanation/{page}.md")
