from pathlib import Path

import changed_packages as changed
import neutral_lock as lock
import pytest

FULL = """\
version = 1
requires-python = ">=3.11"

[options]
exclude-newer = "2026-01-01T00:00:00Z"

[options.exclude-newer-package]
torch = "2026-02-01T00:00:00Z"

[manifest]
members = ["core"]

[[package]]
name = "core"
version = "0.1.0"
source = { editable = "shared" }
dependencies = [
    { name = "np", version = "2.0", source = { registry = "https://mirror.invalid/simple" } },
]

[[package]]
name = "np"
version = "2.0"
source = { registry = "https://mirror.invalid/simple" }
sdist = { url = "https://files.invalid/a/b/np-2.0.tar.gz", hash = "sha256:aa", size = 1 }
wheels = [
    { url = "https://files.invalid/c/np-2.0-py3-none-any.whl#sha256=bb", hash = "sha256:bb" },
]
"""
NEUTRAL = """\
version = 1
requires-python = ">=3.11"

[manifest]
members = ["core"]

[[package]]
name = "core"
version = "0.1.0"
source = { editable = "shared" }
dependencies = [
    { name = "np", version = "2.0", source = { registry = "default" } },
]

[[package]]
name = "np"
version = "2.0"
source = { registry = "default" }
sdist = { path = "np-2.0.tar.gz", hash = "sha256:aa", size = 1 }
wheels = [
    { path = "np-2.0-py3-none-any.whl", hash = "sha256:bb" },
]
"""


def test_lock_becomes_neutral_and_stays_so():
    assert lock.neutral(FULL) == NEUTRAL
    assert lock.neutral(NEUTRAL) == NEUTRAL


def test_neutral_lock_passes_beside_a_filled_working_copy():
    assert lock.complaint(NEUTRAL, FULL) is None


@pytest.mark.parametrize(
    ("staged", "said"),
    [
        (FULL, "line 18 holds an address"),
        (NEUTRAL.replace("[manifest]", '[options]\nfork = "x"\n\n[manifest]'), "[options] block"),
        (NEUTRAL.replace('"default"', '"../mirror"', 1), "a registry"),
        (
            NEUTRAL.replace("editable", "git").replace('"shared"', '"ssh://git.invalid/x"'),
            "line 10",
        ),
        (NEUTRAL.replace('version = "2.0"\nsource', 'version = "1.9"\nsource'), "out of date"),
    ],
)
def test_check_says_in_one_line_what_is_wrong(staged, said):
    problem = lock.complaint(staged, FULL)
    assert said in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["packages/b/README.md", "packages/b/src/b/model.py"], ["packages/b"]),
        (["packages/b/x.py", "packages/a/y.py"], ["packages/a", "packages/b"]),
        (["packages/b/x.py", "shared/src/tenfold/cli.py"], ["shared", "packages/a", "packages/b"]),
        (["uv.lock"], ["shared", "packages/a", "packages/b"]),
        (["packages/removed/x.py"], ["shared", "packages/a", "packages/b"]),
        ([], ["shared", "packages/a", "packages/b"]),
    ],
)
def test_change_calls_for_the_packages_it_touches(paths, expected):
    assert changed.touched(paths, ["shared", "packages/a", "packages/b"]) == expected


def test_folders_are_found_by_their_pyproject(tmp_path):
    for name in ("b", "a"):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "pyproject.toml").touch()
    (tmp_path / "packages" / "leftover").mkdir()
    assert changed.all_folders(tmp_path) == ["shared", "packages/a", "packages/b"]


def test_filter_in_a_clone_commits_neutral_and_checks_out(tmp_path, monkeypatch):
    scripts = tmp_path / ".github" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "neutral_lock.py").write_bytes(Path(lock.__file__).read_bytes())
    (tmp_path / ".gitattributes").write_text("uv.lock filter=neutral-lock\n")
    (tmp_path / "uv.lock").write_text(FULL)
    monkeypatch.chdir(tmp_path)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@b.invalid")
    lock.git("init", "-q")
    lock.main(["--install"])
    lock.git("config", "core.hooksPath", "none")
    lock.git("add", "-A")
    lock.git("commit", "-qm", "first")
    assert lock.git("show", "HEAD:uv.lock") == NEUTRAL
    (tmp_path / "uv.lock").unlink()
    lock.git("checkout", "-q", "uv.lock")
    assert (tmp_path / "uv.lock").read_text() == NEUTRAL
