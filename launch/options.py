"""`key=value` arguments of the small programs, checked against a dataclass. train.py uses Hydra instead."""

import dataclasses
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar, get_type_hints

T = TypeVar("T")
WORDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "text"}


def parse(kind: type[T], arguments: Sequence[str]) -> T:
    """An instance of the dataclass `kind` (fields int, float or str, all with defaults) from `name=value` arguments.

    Raises ValueError, one line, for an argument without "=", an unknown name (told with the nearest known one), or a value of
    another type.
    """
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"{argument}: must be written name=value")
        if name not in hints:
            nearest = difflib.get_close_matches(name, hints, n=1)
            raise ValueError(
                f"{name}: unknown; " + (f"nearest: {nearest[0]}" if nearest else f"known: {', '.join(hints)}")
            )
        try:
            values[name] = hints[name](value)
        except ValueError:
            raise ValueError(f"{name}={value}: must be {WORDS[hints[name]]}") from None
    return kind(**values)


def run(main: Callable[[Any], None], kind: type, usage: str | None, arguments: Sequence[str] | None = None) -> NoReturn:
    """The whole of a small program: `main` with options of `kind` from the command line, or from `arguments`. A ValueError or
    OSError becomes one line and exit code 2; `--help` prints `usage` and the options with their defaults."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(usage)
        for field in dataclasses.fields(kind):
            print(f"  {field.name}={field.default}")
        sys.exit(0)
    try:
        main(parse(kind, arguments))
    except (ValueError, OSError) as error:
        named = isinstance(error, OSError) and error.filename is not None and error.strerror is not None
        print(f"error: {f'{error.filename}: {error.strerror}' if named else error}", file=sys.stderr)  # type: ignore[union-attr]
        sys.exit(2)
    sys.exit(0)
