"""Policy-optimisation methods as data: a record names its choice on every axis, with its numbers.

A choice that is not implemented cannot be named, so a method never trains a different loss than it
says; what a published method has beyond its loss and we lack is in the record and refused.
"""

from fastrl.errors import InputError
from fastrl.methods.axes import AXES
from fastrl.methods.checks import check_method
from fastrl.methods.record import Choice, Method, Penalty, use
from fastrl.methods.resolve import resolve_method
from fastrl.methods.table import FAMILIES, METHODS

__all__ = [
    "AXES",
    "FAMILIES",
    "METHODS",
    "Choice",
    "Method",
    "Penalty",
    "check_method",
    "register",
    "resolve_method",
    "use",
]


def register(method: Method) -> None:
    """Make a method of one's own known by its name, to `resolve_method` and the config's `method`.

    Raises InputError for a record that no step can train and for a name that is taken.
    """
    if method.name in METHODS:
        raise InputError(
            f"there is a method {method.name!r} already ({METHODS[method.name].source}); choose "
            "another name"
        )
    check_method(method)
    METHODS[method.name] = method
