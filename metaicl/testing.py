"""The public exam: does a learner, or a task distribution, keep its contract?

`check_learner(MyLearner, tasks)` and `check_tasks(my_tasks)` are for the tests of your own subclasses.
"""

from collections.abc import Callable, Iterable, Mapping

import pytest
