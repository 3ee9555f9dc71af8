"""What a refusal of a bad call must look like."""

import re

import pytest

FOREIGN = r"numba|llvm|nopython|prange|lowering|ufunc|traceback"
PATH = r"(^|[\s'\"(])(/|[A-Za-z]:\\)\w|\.py\b|site-packages|\bat 0x"


def refused(call, fn, argument, error):
    """The message of a refusal: of this type (or one of them), naming function and argument, and what was expected.

    `fn` and `argument` are patterns. No word of Numba, no path; nothing behind it but what a stranger's object raised;
    raised before Numba was entered.
    """
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) in (error if isinstance(error, tuple) else (error,)), message
    assert re.match(rf"({fn}): ", message), message
    assert re.search(rf"\b({argument})\b", message.partition(": ")[2]), message
    assert "expected" in message, message
    assert len(message) < 600, message
    behind = caught.value
    while behind is not None:
        for text in (str(behind), type(behind).__module__):
            assert not re.search(FOREIGN, text, re.IGNORECASE), text
            assert not re.search(PATH, text), text
        behind = behind.__cause__ or (None if behind.__suppress_context__ else behind.__context__)
    entered = [str(entry.path) for entry in caught.traceback if re.search(r"numba|llvmlite", str(entry.path))]
    assert not entered, entered
    return message
