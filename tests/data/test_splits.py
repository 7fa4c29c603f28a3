"""Which files belong to which split: by the README, else by words in their names."""

from __future__ import annotations

import pytest

from carrara.data.splits import files_of_split, split_of_name
from tests.errors import refused

FILES = ["[v1]/a.parquet", "data/eval/b.parquet", "data/train-0.parquet", "data/train-1.parquet"]


def readme(configs: str) -> str:
    return f"---\nlicense: mit\nconfigs:\n{configs}---\n# mine\n"


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000.tar", "train"),
        ("cifar10-train-000.tar", "train"),
        ("cifar10_test.tar", "test"),
        ("validation/000.tar", "validation"),
        ("train/dev-3.tar", "validation"),
        ("trainer-0.tar", None),
        ("contest/0.tar", None),
        ("mine.evaluation.parquet", "test"),
    ],
)
def test_a_word_in_the_name(name: str, split: str | None) -> None:
    assert split_of_name(name) == split


def test_words_with_their_other_spellings() -> None:
    part = files_of_split(FILES, "train", "mine")
    assert part.own == FILES[2:]
    assert part.others == [FILES[1]]
    assert "1 of 4 files, the first is [v1]/a.parquet" in part.notices[0]
    assert files_of_split(FILES, "test", "mine").own == [FILES[1]]
    with refused("unknown", key="data.split"):
        files_of_split(FILES, "validation", "mine")


@pytest.mark.parametrize(
    ("configs", "own"),
    [
        ("- config_name: default\n  data_files: data/*.parquet\n", FILES[2:]),
        ("- config_name: default\n  data_files: '**/*.parquet'\n", FILES),
        ("- config_name: default\n  data_files: ['data/train-1.parquet', 'data/train-[01].parquet']\n", FILES[:1:-1]),
        ("- config_name: default\n  data_files:\n  - split: train\n    path: '[v1]/a.parquet'\n", FILES[:1]),
        ("- config_name: a\n  default: true\n  data_files: {train: './data/eval/*'}\n- config_name: b\n", FILES[1:2]),
        ("- config_name: a\n  data_dir: data/eval\n", FILES[1:2]),
    ],
)
def test_patterns_of_the_readme(configs: str, own: list[str]) -> None:
    assert files_of_split(FILES, "train", "mine", readme(configs)).own == own


@pytest.mark.parametrize(
    "text", ["---\na: [1\n---\n", "---\na: 2024-13-45\n---\n", readme("- 3\n"), readme("- data_files: [{split: a}]\n")]
)
def test_a_broken_header_is_named(text: str) -> None:
    with refused("damaged", key="mine/README.md"):
        files_of_split(FILES, "train", "mine", text)


def test_a_readme_that_does_not_fit_the_files() -> None:
    with refused("missing", key="mine/README.md"):
        files_of_split(FILES, "train", "mine", readme("- data_files: {train: a/*, test: data/*}\n"))
    with refused("invalid", key="mine/README.md"):
        files_of_split(FILES, "train", "mine", readme("- config_name: a\n- config_name: b\n"))


@pytest.mark.parametrize("text", ["", "# no header", "---\nlicense: mit\n---\n", "---\n---\n"])
def test_a_readme_without_configurations(text: str) -> None:
    assert files_of_split(["0.tar"], "train", "mine", text).own == ["0.tar"]
    with refused("unknown", key="data.split"):
        files_of_split(["0.tar"], "test", "mine", text)
