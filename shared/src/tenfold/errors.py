"""The one exception that means: the person's input, not our code."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, told in one line: what is wrong, where, and how to mend it.

    The command line prints the line and exits with status 2, without a traceback.

    >>> str(UserError("no such route: 14", where="--route", fix="choose 0 to 13"))
    'no such route: 14 (--route): choose 0 to 13'
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        """Keep the three parts and join them to "what (where): fix"."""
        # A DataLoader worker hands its exception over as a new one, whose message is the whole
        # traceback of the old one: only the last line was meant for the person.
        what = what.rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")[2]
        self.what, self.where, self.fix = what, where, fix
        line = what + (f" ({where})" if where else "") + (f": {fix}" if fix else "")
        super().__init__(" ".join(line.split()))


def first_line(error: BaseException) -> str:
    """What an error says, in one line without its full stop; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
