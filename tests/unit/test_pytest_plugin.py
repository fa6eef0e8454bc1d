"""The marker ``needs_model`` in front of somebody else's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.calibrations import made_up, store_of

pytest_plugins = ["pytester"]
TESTS = """
    import pytest

    @pytest.fixture
    def model():
        raise AssertionError("a fixture was set up before the question was asked")

    @pytest.mark.needs_model("made-up", ctx=65536)
    def test_slow(model): ...

    @pytest.mark.needs_model("made-up@4096")
    def test_fast(): ...

    @pytest.mark.needs_model("nobody", ctx=8192)
    def test_unknown(): ...
"""


class Suite:
    def __init__(self, pytester: pytest.Pytester) -> None:
        self._pytester = pytester

    def run(self, *options: str, tests: str = TESTS) -> pytest.RunResult:
        self._pytester.makepyfile(tests)
        return self._pytester.runpytest_inprocess("-p", "harness.pytest_plugin", "-rs", "-Wdefault", *options)


@pytest.fixture
def suite(pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    store_of(tmp_path / "store", made_up(), made_up("second"))
    monkeypatch.setenv("HARNESS_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("HARNESS_AVAILABLE", "5632")
    return Suite(pytester)


def test_a_test_whose_model_would_spill_is_skipped_with_the_sentence(suite: Suite) -> None:
    done = suite.run()
    done.assert_outcomes(passed=2, skipped=1, warnings=1)
    done.stdout.fnmatch_lines(
        ["*UNCALIBRATED*harness calibrate nobody*", "SKIPPED * test_*CPU OFFLOAD LIKELY: needs 6,331.0 MiB*"]
    )


def test_an_empty_variable_is_not_this_machines_memory(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_AVAILABLE", "")
    done = suite.run()
    done.assert_outcomes(errors=3)
    done.stdout.fnmatch_lines(["*needs_model: HARNESS_AVAILABLE is empty (give it a value, or unset it)*"])


@pytest.mark.parametrize("where", ["variable", "file"])
def test_settings_count_as_for_the_command_line(
    suite: Suite, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """What fits with one slot does not with eight; what the marker says comes first."""
    tests = """
        import pytest

        @pytest.mark.needs_model("made-up@4096")
        def test_as_it_is_set(): ...

        @pytest.mark.needs_model("made-up@4096", num_parallel=1)
        def test_as_it_is_marked(): ...
    """
    suite.run(tests=tests).assert_outcomes(passed=2)
    if where == "variable":
        monkeypatch.setenv("HARNESS_NUM_PARALLEL", "32")
    else:
        (pytester.path / "harness.toml").write_text("num_parallel = 32\n")
    suite.run(tests=tests).assert_outcomes(passed=1, skipped=1)


def test_a_setting_that_cannot_be_is_no_answer(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_KV_CACHE_TYPE", "q8")
    done = suite.run()
    done.assert_outcomes(errors=3)
    done.stdout.fnmatch_lines(["*needs_model: HARNESS_KV_CACHE_TYPE or kv_cache_type of harness.toml*q8*"])


def test_options_choose_and_come_before_the_ini_file(suite: Suite, pytester: pytest.Pytester) -> None:
    done = suite.run("--model-offload", "fail", "--model-unknown", "fail")
    done.assert_outcomes(passed=1, errors=2)
    pytester.makeini("[pytest]\nmodel_offload = warn\nmodel_unknown = skip\n")
    done = suite.run()
    done.assert_outcomes(passed=1, errors=1, skipped=1, warnings=1)  # the fixture, as nothing held the test back
    suite.run("--model-offload", "skip").assert_outcomes(passed=1, skipped=2)


def test_models_of_one_test_are_judged_together_and_the_nearest_marker_wins(suite: Suite) -> None:
    tests = """
        import pytest
        pytestmark = pytest.mark.needs_model("made-up", ctx=65536)

        @pytest.mark.needs_model("made-up", ctx=2048)
        def test_near(): ...

        @pytest.mark.needs_model("second", ctx=2048)
        @pytest.mark.needs_model("made-up", ctx=2048)
        def test_both(): ...
    """
    done = suite.run(tests=tests)
    done.assert_outcomes(passed=1, skipped=1)
    done.stdout.fnmatch_lines(["SKIPPED *second at 2,048 tokens*"])


def test_a_model_that_is_served_in_front_of_the_tests_is_not_asked_about_again(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_MODEL", "made-up")
    monkeypatch.setenv("HARNESS_CONTEXT", "65536")
    served = """
        import pytest

        @pytest.mark.needs_model("made-up", ctx=65536)
        def test_there(): ...

        @pytest.mark.needs_model("made-up", ctx=65537)
        def test_more_than_there(): ...

        @pytest.mark.needs_model("made-up", ctx=65536, num_parallel=4)
        def test_other_slots(): ...
    """
    suite.run(tests=served).assert_outcomes(passed=1, skipped=2)


@pytest.mark.parametrize(
    ("mark", "says"),
    [
        ('needs_model("made-up")', "missing context"),
        ('needs_model("made-up", ctx=0)', "a number of tokens is expected"),
        ("needs_model()", "names no model"),
        ('needs_model("made-up", ctx=8, num_parallel=8)\n@pytest.mark.needs_model("second", ctx=8)', "the same for each"),
    ],
)
def test_a_marker_that_asks_nothing_is_an_error(suite: Suite, mark: str, says: str) -> None:
    done = suite.run(tests=f"import pytest\n@pytest.mark.{mark}\ndef test_it(): ...\n")
    assert done.ret != 0
    done.stdout.fnmatch_lines([f"*{says}*"])


def test_a_value_of_the_ini_file_that_means_nothing_is_an_error(suite: Suite, pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmodel_offload = explode\n")
    assert suite.run().ret != 0
