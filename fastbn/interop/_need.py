"""Packages that only one module here needs."""

import importlib
from typing import Any


def need(package: str, extra: str, what: str) -> Any:
    """Import `package`, for `what` (a module or function of fastbn).

    Raises
    ------
    ImportError
        It is not installed: the message says how to.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == package.split(".")[0]:
            message = f'{what} needs {package.split(".")[0]}: pip install "fastbn[{extra}]"'
            raise ImportError(message, name=error.name) from error
        raise
