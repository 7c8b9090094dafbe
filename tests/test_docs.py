"""What the documents say is run, or looked up."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from moe_dist.cli.main import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    """The code blocks of a language in all documents."""
    for document in DOCUMENTS:
        for block in re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL):
            yield pytest.param(block, id=f"{document.name}: {block.splitlines()[0][:40]}")


def moe_dist_commands():
    """The arguments of each `moe-dist` line, those with placeholders in capitals left out."""
    for block in blocks("bash"):
        for line in block.values[0].splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["moe-dist"] and not {"CONFIG", "DIR"} & set(words):
                yield words[1:]


@pytest.mark.parametrize("code", list(blocks("python")))
def test_python_blocks_run(code):
    exec(compile(code, "block", "exec"), {})


@pytest.mark.parametrize("words", list(moe_dist_commands()), ids=" ".join)
def test_commands_are_valid(words, monkeypatch, tmp_path):
    # `train` means what `config` shows of the same arguments; the training itself is tested elsewhere.
    monkeypatch.chdir(ROOT)
    words = [word for word in words if word != "--resume"]
    for option in {"--output", "--steps"} & set(words):
        place = words.index(option)
        del words[place : place + 2]
    command = ["compare", "--list", "--output", str(tmp_path)] if words[0] == "compare" else ["config"]
    result = CliRunner().invoke(app, [*command, *words[1:]])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document):
    text = document.read_text()
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (document.parent / name).exists(), name
    for name in re.findall(r"`((?:moe_dist|launch|configs|docs|tests|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_key_of_a_config_has_a_comment(path):
    tree = yaml.safe_load(path.read_text())
    for line in path.read_text().splitlines():
        is_value = re.match(r"\s*[\w]+: *[^#\s]", line)
        assert not is_value or "#" in line, line
    assert tree
