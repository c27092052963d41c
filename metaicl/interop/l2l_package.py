"""The learn2learn package, imported quietly."""

import contextlib
import importlib
import io
import sys
import warnings
from types import ModuleType

import torch

INSTALL = (
    "learn2learn 0.2.0 is needed; it does not build on Python 3.11 and later as it is; these commands install it:\n"
    '  pip install "cython" "setuptools" "wheel" requests scipy pillow cloudpickle gym-notices\n'
    "  pip install --no-build-isolation --use-pep517 -C--global-option=build_ext --no-deps learn2learn==0.2.0\n"
    "  pip install --no-deps gym==0.26.2 torchvision"
)
_MISSING_OPERATORS = ("nms", "qnms")
_declarations: list[torch.library.Library] = []  # a declaration lives as long as its Library object


def import_learn2learn() -> ModuleType:
    """The `learn2learn` package, without the noise that its import makes.

    learn2learn imports torchvision and gym for things that are not used here. A CUDA build of torchvision beside a
    CPU build of torch fails for two undeclared operators, which are then declared; gym prints a banner to stderr,
    which is dropped, as are deprecation warnings of old packages.

    Returns:
        The package.

    Raises:
        ImportError: If it, or something it needs, is missing; with the commands that install it.
    """
    if "learn2learn" in sys.modules:
        return sys.modules["learn2learn"]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            _import_torchvision()
            return importlib.import_module("learn2learn")
        except ImportError as error:
            raise ImportError(f"{INSTALL}\n(import learn2learn failed: {error})") from error


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in _MISSING_OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declarations.append(library)
        importlib.import_module("torchvision")
