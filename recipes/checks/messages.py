"""Errors as one line."""

from __future__ import annotations

import errno


def sentence(error: ValueError | OSError) -> str:
    """One line for the user. An error that is not about a file is raised again: it is a defect or a network error."""
    if isinstance(error, ValueError):
        return " ".join(str(error).split("\n"))
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space left for {error.filename or 'the files of the run'}: free some, or choose another directory"
    if isinstance(error, FileNotFoundError) and error.filename is None:
        return str(error)  # ours, a sentence already
    if error.filename is None:
        raise error
    return f"{error.filename}: {error.strerror}"
