"""Packaging, links in documents, and rules for the source that the linter does not check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tree import ROOT, module_name, sources, tracked

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".json", ".csv", ".cfg", ".sh", ""}
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "jinja2",
    "joblib",
}

files = pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))


@pytest.mark.parametrize("folder", ["kernels", "reference"])
def test_a_linked_folder_never_shadows_a_published_package(folder):
    link = ROOT / "zimage_core" / folder
    assert not list((ROOT / folder).rglob("__init__.py")), f"{folder}/ must stay a namespace"
    assert link.is_symlink(), f"{link.name} must be a link to ../{folder}"
    assert link.readlink() == Path("..", folder)
    assert link.is_dir()


def test_packages_in_pyproject_are_the_folders_with_code():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    on_disk = {module_name(path.parent / "__init__.py") for path in sources()}
    assert sorted(set(listed)) == sorted(listed), "a package is listed twice"
    assert set(listed) == on_disk


def test_only_linked_folders_go_without_init():
    for path in sources():
        if path.relative_to(ROOT).parts[0] == "zimage_core":
            assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py"


def test_package_data_exists():
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        folder = ROOT / package.replace(".", "/")
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: nothing matches {pattern}"


def test_versions_agree():
    import zimage_core

    assert zimage_core.__version__ == PROJECT["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"## [{zimage_core.__version__}]" in changelog or "## [Unreleased]" in changelog


def test_every_dependency_has_a_known_good_version():
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [
        *PROJECT["project"]["dependencies"],
        *(d for name in extras if name != "gpu" for d in extras[name]),
    ]
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text("utf-8"), re.M))
    canonical = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    for line in wanted:
        name = re.match(r"[\w.-]+", line)[0]
        bounded = "<" in line.partition(";")[0]  # triton: the right version depends on the build of torch
        if "python_version <" not in line and not bounded:
            assert re.sub(r"[-_.]+", "-", name).lower() in canonical, f"{name} has no line in constraints.txt"


@files
def test_no_code_is_run_from_data_and_no_assert_guards_an_argument(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{where}: an assert vanishes under -O, raise an error"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not FORBIDDEN_MODULES & {n.partition(".")[0] for n in names}, where
        if isinstance(node, ast.Call):
            assert forbidden_call(node) is None, f"{where}: {forbidden_call(node)}"


def forbidden_call(node: ast.Call) -> str | None:
    """The name of a call that runs code from data; `model.eval()` is a method and fine."""
    if isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec", "compile", "__import__"}:
        return node.func.id
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        name = f"{node.func.value.id}.{node.func.attr}"
        if name in {"torch.load", "os.system", "os.popen", "builtins.exec", "builtins.eval"}:
            return name
    if any(k.arg in {"allow_pickle", "shell"} for k in node.keywords):
        return "allow_pickle or shell"
    return None


@pytest.mark.parametrize(
    "line", ["eval('1')", "exec(x)", "torch.load(f)", "np.load(f, allow_pickle=True)", "run(c, shell=True)"]
)
def test_a_planted_call_is_found(line):
    assert forbidden_call(ast.parse(line).body[0].value) is not None


def test_model_eval_is_not_mistaken():
    assert forbidden_call(ast.parse("model.eval()").body[0].value) is None


MOST_LINES = 450
LONGER = {"codebooks": "tables of numbers", "pipeline": "the public calls with their documentation"}


@files
def test_a_file_stays_readable(path):
    lines = path.read_text("utf-8").count("\n")
    assert lines <= MOST_LINES or path.stem in LONGER, (
        f"{path.relative_to(ROOT)} has {lines} lines, {MOST_LINES} are enough"
    )


FRAGMENT = re.compile(r"Of |Likewise\b|See there\b|The same\.|The same for\b|Passed already\b|And ")
BARE_REFERENCE = re.compile(r"See [^.;:,]*\.?")
DESCRIPTION = re.compile(r"\s+\*{0,2}\w+(?:, \*{0,2}\w+)*: (.*)")


def fragments(tree: ast.AST) -> list[str]:
    """Docstrings and argument descriptions that only make sense after the text before them."""
    # a string that stands alone documents its module, class, function or the attribute before it
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))
    found = []
    for text in (c.value for c in constants if isinstance(c, ast.Constant) and isinstance(c.value, str)):
        described = [match[1] for line in text.splitlines() if (match := DESCRIPTION.fullmatch(line))]
        found += [text.strip()] if FRAGMENT.match(text.strip()) else []
        found += [text for text in described if FRAGMENT.match(text) or BARE_REFERENCE.fullmatch(text)]
    return found


@files
def test_descriptions_are_not_fragments(path):
    assert not fragments(ast.parse(path.read_text("utf-8"))), "begin with the thing that is described"


@pytest.mark.parametrize(
    "text",
    [
        "Of the transformer.", "Likewise.", "See there.", "The same.", "The same for the other side.",
        "Passed already.", "And the bias.",
    ],
)  # fmt: skip
def test_a_planted_fragment_is_found(text):
    for source in (
        f'"""{text}"""',
        f'X = 1\n"""{text}"""',
        f'"""Do it.\n\n    Args:\n        x: {text}\n"""',
    ):
        assert fragments(ast.parse(source)) == [text]


def test_a_reference_needs_words_of_its_own():
    for text, expected in (("See `record`.", ["See `record`."]), ("Size in bytes; see `record`.", [])):
        assert fragments(ast.parse(f'"""Do it.\n\n    Args:\n        x: {text}\n"""')) == expected


def texts() -> list[Path]:
    return [
        p
        for p in tracked()
        if p.suffix in TEXT and p.is_file() and not p.is_symlink() and p.name != "LICENSE"
    ]


def test_no_tracked_file_names_a_machine():
    # the words are split so that this file passes its own test
    users = "|".join(("ho" + "me", "Us" + "ers"))
    tops = "|".join(("wo" + "rk", "ro" + "ot"))
    hosts = "|".join(("pypi" + r"\.org", "python" + "hosted", "download" + r"\.pytorch"))
    pattern = re.compile(rf"(?<![\w.])/({users})/\w|(?<![\w./])/({tops})/\w|{hosts}")
    for path in texts():
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            assert not pattern.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"


def test_links_in_the_docs_resolve():
    broken = []
    for path in (p for p in tracked() if p.suffix == ".md" and p.is_file()):
        text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not re.match(r"[a-z]+:", target):
                place = target.partition("#")[0]
                if place and not (path.parent / place).exists():
                    broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert not broken


def test_continuous_integration_runs_what_the_readme_promises():
    """.ci/run extracts the commands from README.md; this checks that they are there."""
    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"<!-- command: (\w+) -->\n```sh\n(.*?)\n```", readme, re.S)
    commands = dict(blocks)
    assert set(commands) == {"generate", "test"}
    for command in commands.values():
        assert "-c constraints.txt" in command
        assert len(command.splitlines()) == 1
    # run the script's own function on the real file
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    function = re.search(r"^readme_command\(\).*?^}$", script, re.S | re.M)[0]
    for name, command in commands.items():
        shell = ["bash", "-c", f"{function}\nreadme_command {name}"]
        found = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert found == f"{command}\n"
