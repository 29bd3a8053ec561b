"""The errors of this package are one family, and all of it is exported."""

from __future__ import annotations

import inspect

import stateful_kv
from stateful_kv import errors
from stateful_kv.apps import workflow


def test_every_error_is_exported() -> None:
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, Exception):
            assert issubclass(value, stateful_kv.StatefulKVError)
            assert getattr(stateful_kv, name) is value and name in stateful_kv.__all__
    assert workflow.WorkflowError is stateful_kv.WorkflowError
