import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache, partial

import numpy as np
import pytest
import torch
from torch import nn

from metaicl.description import describe, differences, shortened
from metaicl.inner_loop.adaptive import Adam
from metaicl.inner_loop.optimizers import SGD
from metaicl.inner_loop.rates import Rate
from metaicl.learners.gradient.maml import MAML
from metaicl.objectives import query_loss, squared_error
from metaicl.tasks.functions import Sinusoid


class Color(Enum):
    RED = 1
    BLUE = 2


@dataclass
class Settings:
    rate: float
    names: frozenset[str] = frozenset()


class Plain:
    def __init__(self, value):
        self.value = value

    @cached_property
    def filled_later(self):
        return 3

    def method(self):
        return self.value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Holder(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value


def scaled(factor):
    def inner(x, shift=0.0):
        return factor * x + shift

    return inner


def with_buffer(value):
    module = nn.Module()
    module.register_buffer("constant", torch.tensor(value), persistent=False)
    return module


def frozen(module):
    return module.requires_grad_(False)


def net(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), *layers)


def filled(value):
    layer = nn.Linear(2, 2)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, value)
    return layer


def tied(same):
    layers = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    layers[1].weight = layers[0].weight if same else nn.Parameter(layers[0].weight.detach().clone())
    with torch.no_grad():
        layers[0].weight.fill_(1.0)
        layers[1].weight.fill_(1.0)
    return nn.Sequential(*layers)


def hooked(hook):
    module = nn.Identity()
    if hook is not None:
        module.register_forward_hook(hook)
    return module


def array(last):
    values = np.zeros(1000)
    values[-1] = last
    return values


DIFFERENT = {
    "numbers": lambda: (1.0, 2.0),
    "not finite": lambda: (float("nan"), float("inf")),
    "none": lambda: (None, 0),
    "long texts": lambda: ("a" * 5000, "a" * 4999 + "b"),
    "bytes": lambda: (b"a", b"b"),
    "tuples": lambda: ((1.0, 2.0), (2.0, 1.0)),
    "long lists": lambda: (list(range(1000)), [*range(999), 0]),
    "sets": lambda: (frozenset("ab"), frozenset("ac")),
    "dicts": lambda: ({"a": 1}, {"a": 2}),
    "keys": lambda: ({("a", 1): 1}, {("a", 2): 1}),
    "kinds of numbers": lambda: (torch.float32, torch.float64),
    "enums": lambda: (Color.RED, Color.BLUE),
    "dataclasses": lambda: (Settings(0.1), Settings(0.2)),
    "classes": lambda: (Plain, Slotted),
    "objects": lambda: (Plain(1), Plain(2)),
    "slots": lambda: (Slotted(1), Slotted(2)),
    "queues": lambda: (deque([1]), deque([2])),
    "tensors": lambda: (torch.tensor([1.0]), torch.tensor([2.0])),
    "arrays": lambda: (array(0.0), array(1.0)),
    "functions": lambda: (query_loss, squared_error),
    "functions of torch": lambda: (torch.relu, torch.tanh),
    "arguments": lambda: (partial(scaled, factor=1), partial(scaled, factor=2)),
    "closures": lambda: (scaled(1), scaled(2)),
    "lambdas": lambda: (lambda x: x + 1, lambda x: x + 2),
    "methods": lambda: (Plain(1).method, Plain(2).method),
    "cached functions": lambda: (lru_cache(query_loss), lru_cache(squared_error)),
    "generators": lambda: (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
    "activations": lambda: (net(nn.Tanh()), net(nn.ReLU())),
    "settings of layers": lambda: (net(nn.Dropout(0.1)), net(nn.Dropout(0.2))),
    "weights": lambda: (filled(0.0), filled(1.0)),
    "weights out of sight": lambda: (Holder((nn.Linear(1, 1),)), Holder((nn.Linear(1, 1),))),
    "buffers": lambda: (with_buffer(1.0), with_buffer(2.0)),
    "what is trained": lambda: (net(), frozen(net())),
    "what is shared": lambda: (tied(True), tied(False)),
    "hooks": lambda: (hooked(None), hooked(print)),
    "inner optimizers": lambda: (SGD(0.1), Adam(0.1)),
    "momentum": lambda: (SGD(0.1), SGD(0.1, momentum=0.9)),
    "rates": lambda: (SGD(Rate(0.1, "tensor")), SGD(Rate(0.1, "element"))),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_told_apart(name):
    one, other = DIFFERENT[name]()
    assert describe(one) != describe(other)
    assert describe(Plain([one])) != describe(Plain([other]))
    assert describe(Holder(one)) != describe(Holder(other))
    json.dumps([describe(one), describe(other)], allow_nan=False)


@pytest.mark.parametrize("name", [name for name in DIFFERENT if name != "weights out of sight"])
def test_what_is_made_alike_is_the_same(name):
    (one, other), (again, other_again) = DIFFERENT[name](), DIFFERENT[name]()
    assert describe(one) == describe(again)
    assert describe(Holder(other)) == describe(Holder(other_again))


def test_cycles_end_and_caches_do_not_count():
    one, other = Plain({}), Plain({})
    assert other.filled_later == 3
    assert describe(one) == describe(other)
    for item in (one, other):
        item.value["self"] = [item]
    module = Holder(None)
    object.__setattr__(module, "value", module)
    assert describe(one) == describe(other) != describe(Plain(1))
    assert describe(module)["attributes"]["value"] == "the same as the whole"


def test_train_mode_and_foreign_handles_do_not_count():
    assert describe(net().eval()) == describe(net())
    assert describe(threading.Lock()) == describe(threading.Lock()) == {"class": "_thread.lock"}
    assert describe(OrderedDict(a=1, b=2)) == describe({"b": 2, "a": 1})


def test_weights_are_left_out_on_request():
    assert describe(nn.Linear(2, 2), weights=False) == describe(nn.Linear(2, 2), weights=False)
    assert describe(nn.Linear(2, 2), weights=False) != describe(nn.Linear(2, 3), weights=False)
    assert describe(frozen(nn.Linear(2, 2)), weights=False) != describe(nn.Linear(2, 2), weights=False)


def test_differences_are_the_innermost():
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": {}}) == [
        ("a.c", 2, 4),
        ("d", 3, None),
        ("e", None, {}),
    ]
    assert len(shortened("x" * 5000)) < 300


def test_an_inner_optimizer_is_told_by_its_settings_alone():
    # What follows from them may be worked out in another way tomorrow; stored comparisons have to stay what they are.
    told = describe(SGD(0.1, momentum=0.9))
    assert set(told["attributes"]) == {"rates", "clip_norm", "precondition", "nesterov"}


def make_learner():
    torch.manual_seed(0)
    learner = MAML(Sinusoid().spec, adapt=["head.*", "encoder.*"], optimizer=SGD(0.1, momentum=0.9), inner_steps=2)
    learner.words = {"some", "words", "in", "a", "set", *map(str, range(20))}
    learner.by_name = {name: frozenset({name, "x", "y"}) for name in learner.words}
    learner.choose = lambda x: x in {"p", "q", "r"}
    return learner


def test_any_process_gives_the_same():
    program = "import json, test_description as t; print(json.dumps(t.describe(t.make_learner())))"
    paths = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    printed = []
    for seed in ("1", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
        command = [sys.executable, "-c", program]
        printed.append(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    one, other = map(json.loads, printed)
    assert differences(one, other) == []
    assert one["attributes"]["words"][-1] == "words"
