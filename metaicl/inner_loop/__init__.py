"""The meta-gradient engine, by name for users; inside the package its parts are imported from their modules."""

from metaicl.inner_loop.adaptive import Adam, AdamW, RMSprop
from metaicl.inner_loop.answering import call_tasks
from metaicl.inner_loop.loop import Loss
from metaicl.inner_loop.optimizers import SGD, InnerOptimizer
from metaicl.inner_loop.parameters import (
    Params,
    check_inner_loop_module,
    check_no_running_statistics,
    select_parameters,
)
from metaicl.inner_loop.rates import Rate
from metaicl.inner_loop.unrolling import unroll, unroll_path, unroll_tasks

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "InnerOptimizer",
    "Loss",
    "Params",
    "RMSprop",
    "Rate",
    "call_tasks",
    "check_inner_loop_module",
    "check_no_running_statistics",
    "select_parameters",
    "unroll",
    "unroll_path",
    "unroll_tasks",
]
