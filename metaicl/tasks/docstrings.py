"""Real text that every Python installation holds: the documentation strings of its standard library."""

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from metaicl.task import Split
from metaicl.tasks.text import TextClasses
from metaicl.tasks.tokenizer import split_words

# Modules of one package stand in one split. Only such as are part of every installation and of Python 3.10 and later.
_MODULES: dict[Split, str] = {
    "train": """
        asyncio bdb concurrent contextlib ctypes decimal dis doctest http.client http.cookiejar http.server
        imaplib importlib inspect io locale multiprocessing numbers optparse pdb pickletools pydoc shutil socket
        symtable threading traceback typing urllib.parse urllib.request wsgiref xmlrpc
        """,
    "validation": """
        ast codecs difflib ftplib functools os platform socketserver statistics unittest zipfile
        """,
    "test": """
        calendar collections configparser datetime email enum ipaddress logging mailbox pathlib random smtplib ssl
        subprocess tarfile xml.dom xml.etree xml.sax
        """,
}
_FEWEST_ROWS = 20  # a module with fewer docstrings is no class
_FEWEST_WORDS = 4  # "See above." says nothing about its module


class Docstrings(TextClasses):
    """Which module does this documentation come from? N-way tasks over Python's own standard library, no download.

    A row is the docstring of a module, class, function or method; its class is the module or package. The source is
    parsed, never imported. The words of the module's own name are taken out, so that the task is about content:
    "Open a tarfile" loses "tarfile" in `tarfile`, and keeps it in `shutil`. Docstrings of fewer than four words are
    left out, as are modules with fewer than 20 and docstrings that two modules share.

    The rows depend on the Python version and on nothing else of the machine. Packages are kept whole within a split:
    all of `http` is in meta-training, all of `xml` in meta-test.

    Args:
        n_way: Classes per task.
        max_tokens: Words kept of each docstring.
        vocabulary: See `TextClasses`.
        words: See `TextClasses`.

    Raises:
        FileNotFoundError: If the standard library lies here without its source.
    """

    def __init__(self, *, n_way: int = 5, max_tokens: int = 32, vocabulary: int = 8192, words: str = "hashed") -> None:
        """Read and parse some 70 modules, one to two seconds."""
        root = Path(sysconfig.get_path("stdlib"))
        texts: list[str] = []
        labels: list[str] = []
        class_splits: dict[Split, list[str]] = {split: [] for split in _MODULES}
        for split, names in _MODULES.items():
            for name in names.split():
                found = module_docstrings(root, name)
                if len(found) >= _FEWEST_ROWS:
                    texts += found
                    labels += [name] * len(found)
                    class_splits[split].append(name)
        if not texts:
            raise FileNotFoundError(f"the standard library in {root} has no source files to read docstrings from")
        super().__init__(
            texts,
            labels,
            n_way=n_way,
            class_splits=class_splits,
            max_tokens=max_tokens,
            vocabulary=vocabulary,
            words=words,
            duplicates="drop",
        )


def module_docstrings(root: Path, name: str) -> list[str]:
    """The different docstrings of module `name` below `root`, its own name taken out; none if it has no source."""
    own_name = re.compile(rf"\b(?:{'|'.join(map(re.escape, name.split('.')))})\b", re.IGNORECASE)
    texts: dict[str, None] = {}
    for path in _sources(root, name):
        for doc in _docstrings(ast.parse(path.read_bytes())):
            text = " ".join(own_name.sub("", doc).split())
            if len(split_words(text)) >= _FEWEST_WORDS:
                texts[text] = None
    return list(texts)


def _sources(root: Path, name: str) -> list[Path]:
    """The files of a module or package, and those of the pure Python twin of a module written in C."""
    place = root.joinpath(*name.split("."))
    files = [place.with_name(f"{place.name}.py"), place.with_name(f"_py{place.name}.py"), *sorted(place.rglob("*.py"))]
    return [path for path in files if path.is_file() and not {"test", "tests"} & set(path.relative_to(root).parts)]


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    doc = ast.get_docstring(node)
    if doc:
        yield doc
    pending = list(node.body)
    for child in pending:  # grows: definitions also stand below `if` and `try`
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child)
        elif isinstance(child, (ast.If, ast.Try)):
            pending += [*child.body, *child.orelse]
