"""The explanations: their code prints what they say."""

import pages
import pytest

import fastbn
from fastbn.kernels.grid import SEGMENT, TERMS
from fastbn.kernels.plain import LANES


@pytest.fixture(autouse=True)
def _threads_as_by_default():
    yield
    fastbn.set_num_threads(None)


@pytest.mark.parametrize("page", ["algorithm", "statistics", "gradients"])
def test_code_of(page):
    pages.check(f"explanation/{page}.md")


def test_the_picture_of_the_sums_has_the_numbers_of_the_kernels():
    piece = TERMS * LANES
    picture = (pages.DOCS / "explanation" / "sums.svg").read_text()
    sizes = f"{SEGMENT:,} elements", f"{piece} elements", f">{piece - 1}<"
    for text in (*sizes, f"{LANES} lanes, {TERMS} terms", f"other {SEGMENT // piece - 1} pieces"):
        assert text in picture
