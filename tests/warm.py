"""What the processes of `tests.runs.on_ranks` have imported when they are forked."""

import deepspeed  # noqa: F401

import tests.ranks  # noqa: F401
