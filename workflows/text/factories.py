"""Model and data of the text workflow."""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

PACKAGES = ("matplotlib", "networkx", "numpy", "sklearn")
MIN_CHARACTERS = 40

# Tokens are the bytes of the text in UTF-8, and three more.
PAD, START, END = 256, 257, 258
NUM_TOKENS = 259


def data(
    num_train: int = 2000,
    num_test: int = 400,
    length: int = 128,
    packages: Sequence[str] = PACKAGES,
    seed: int = 0,
) -> dict[str, Any]:
    """First paragraphs of docstrings of installed packages; the target is the package that they come from.

    The sources are parsed, not imported. Paragraphs of at least 40 characters count, each once; those that occur in
    several packages are left out. Classes take turns, in every split, so that each has as many samples as the others
    and fewer samples are the first of more. Train and test samples have no paragraph in common, and the test samples
    do not depend on the number of train samples. Other versions of the packages have other docstrings.

    Parameters
    ----------
    num_train, num_test
        Samples.
    length
        Tokens of a sample: longer texts are cut, shorter ones padded, and the attention mask says which are padding.
    packages
        The classes, in this order; installed packages.
    seed
        Of the shuffle.

    Raises
    ------
    ModuleNotFoundError
        If a package is not installed.
    ValueError
        If there are fewer paragraphs than samples asked for, or a sample has no room for a byte.
    """
    if length < 3:
        raise ValueError(f"length={length}; needed at least 3 tokens: start, one byte, end")
    rng = np.random.default_rng(seed)
    found = _paragraphs(packages)
    shuffled = [[texts[i] for i in rng.permutation(len(texts))] for texts in found]
    needed = -(-num_train // len(packages)) + -(-num_test // len(packages))
    for package, texts in zip(packages, shuffled, strict=True):
        if len(texts) < needed:
            raise ValueError(f"{package} has {len(texts):,} paragraphs; needed {needed:,} for its share of the samples")
    train = _take_turns(shuffled, num_train)
    test = _take_turns([texts[::-1] for texts in shuffled], num_test)
    made = {"inputs": tokenize(train, length), "targets": np.arange(num_train) % len(packages)}
    if num_test:
        made |= {"test_inputs": tokenize(test, length), "test_targets": np.arange(num_test) % len(packages)}
    return made


def tokenize(texts: Sequence[str], length: int) -> dict[str, NDArray[np.int64]]:
    """``input_ids`` and ``attention_mask``, shape (texts, length): start, bytes, end, padding."""
    ids = np.full((len(texts), length), PAD, np.int64)
    for row, text in zip(ids, texts, strict=True):
        tokens = [START, *text.encode()[: length - 2], END]
        row[: len(tokens)] = tokens
    return {"input_ids": ids, "attention_mask": (ids != PAD).astype(np.int64)}


def _take_turns(texts: Sequence[Sequence[str]], count: int) -> list[str]:
    return [texts[i % len(texts)][i // len(texts)] for i in range(count)]


def _paragraphs(packages: Sequence[str]) -> list[list[str]]:
    """For each package, its paragraphs that no other has, each once, in the order of files and lines."""
    every = [dict.fromkeys(_package_paragraphs(package)) for package in packages]
    counts = Counter(text for texts in every for text in texts)
    return [[text for text in texts if counts[text] == 1] for texts in every]


def _package_paragraphs(package: str) -> Iterator[str]:
    spec = find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"the package {package!r} is not installed; its docstrings are the data")
    if not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package!r} is no package but a single module; needed a folder of sources")
    root = Path(spec.submodule_search_locations[0])
    files = {file.relative_to(root): file for file in root.rglob("*.py")}
    for relative in sorted(files):
        if not {"tests", "testing"} & set(relative.parts):
            for docstring in _docstrings(ast.parse(files[relative].read_bytes())):
                paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
                if len(paragraph) >= MIN_CHARACTERS:
                    yield paragraph


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Docstrings of a module or class, its functions and classes, and theirs; not of those within a function."""
    docstring = ast.get_docstring(node)
    if docstring:
        yield docstring
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(child)


def bert(
    width: int = 128, num_layers: int = 2, num_heads: int = 2, length: int = 128, num_labels: int = 4, seed: int = 0
) -> nn.Module:
    """A small BERT over bytes with a classification head, at initialisation, in eval mode.

    Weights are drawn with standard deviation 1 / √width. The 0.02 of ``transformers`` is meant for width 768: at 128
    hardly anything of the text reaches the output, and the kernel is constant to five digits.

    Parameters
    ----------
    width
        Of the hidden states; the feed-forward layers are four times as wide.
    num_layers, num_heads
        Of the encoder.
    length
        The most tokens of a sample.
    num_labels
        Classes: the number of packages.
    seed
        Of the initialisation.
    """
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=4 * width,
        max_position_embeddings=length,
        pad_token_id=PAD,
        num_labels=num_labels,
        initializer_range=width**-0.5,
    )
    return BertForSequenceClassification(config).eval()
