"""The command as a process sees it: streams, exit codes, help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from tests.report.test_record import a_report

from auto_round import __version__
from auto_round.cli.dispatch import dispatch
from auto_round.cli.quantise import show
from auto_round.cli.screen import exit_codes
from auto_round.errors import SpecError
from auto_round.report.record import RunReport


def exits(*words: str, program: str = "auto-round", recipe: str = "default") -> int:
    with pytest.raises(SystemExit) as stop:
        dispatch(program, recipe, words)
    return int(stop.value.code or 0)


def test_help_groups_flags_and_states_the_recipes_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits("--help") == 0
    text = capsys.readouterr().out
    for heading in ("Model", "Scheme", "Tuning", "Calibration", "Output", "Machine", "Examples", "Recipes"):
        assert f"\n{heading}\n" in text
    for fact in ("(default 200)", "(default 128)", "auto-round demo", "auto-round-best", "--iters 1000", "--iters 50"):
        assert fact in text
    assert max(len(line) for line in text.splitlines() if "auto-round " not in line) <= 80


@pytest.mark.parametrize(
    ("recipe", "stated"),
    [
        ("best", "(default 400)"),
        ("best", "(default 128)"),
        ("best", "(default 512)"),
        ("light", "(default 50)"),
        ("rtn", "(default plain)"),
    ],
)
def test_each_entry_point_states_its_own_defaults(capsys: pytest.CaptureFixture[str], recipe: str, stated: str) -> None:
    assert exits("-h", program=f"auto-round-{recipe}", recipe=recipe) == 0
    assert stated in " ".join(capsys.readouterr().out.split())


def test_help_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits("demo", "--help") == 0
    text = capsys.readouterr().out
    assert "Usage: auto-round demo" in text
    assert "(default tmp_autoround_demo)" in " ".join(text.split())


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, auto_round.cli as c\nsys.argv[1:] = ['--help']\ntry:\n    c.main()\nexcept SystemExit:\n    pass\n"
    )
    code += "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Usage" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits("--version") == 0
    assert capsys.readouterr().out == f"auto-round {__version__}\n"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "no model"),
        (["m", "--model", "n"], "named twice"),
        (["m", "--bits", "four"], "--bits"),
        (["m", "--iter"], "--iters"),
        (["m", "--no-such-flag"], "--no_such_flag"),
        (["m", "n"], "n"),
    ],
)
def test_usage_errors_exit_2(capsys: pytest.CaptureFixture[str], words: list[str], named: str) -> None:
    assert exits(*words) == 2
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["no/such/folder"], "no/such/folder"),
        (["m", "--bits", "5"], "bits=5"),
        (["m", "--group_size", "0"], "group_size=0"),
        (["m", "--start", "middle"], "middle"),
        (["m", "--layer_config", "{"], "line 1"),
        (["m", "--format", "no_such"], "no_such"),
        (["m", "--device", "toaster"], "toaster"),
    ],
)
def test_what_cannot_be_done_exits_2_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exits(*words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert named in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_module_runs_as_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "auto_round", "--version"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, f"auto-round {__version__}\n")


def test_interrupts_and_errors_become_exit_codes_and_bugs_stay_bugs(capsys: pytest.CaptureFixture[str]) -> None:
    for error, code in ((KeyboardInterrupt(), 130), (SpecError("bits=5 [red]is wrong\nsee here"), 2)):
        with pytest.raises(typer.Exit) as stop, exit_codes():
            raise error
        assert stop.value.exit_code == code
    assert capsys.readouterr().err == "interrupted\nerror: bits=5 [red]is wrong\nsee here\n"
    with pytest.raises(ZeroDivisionError), exit_codes():
        _ = 1 / 0


def test_results_go_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    report = a_report()
    show(report, as_json=True, quiet=True)
    assert RunReport.from_json(capsys.readouterr().out) == report
    show(report, as_json=False, quiet=True)
    assert capsys.readouterr().out == "/somewhere/out\n"
    show(report, as_json=False, quiet=False)
    captured = capsys.readouterr()
    assert "2.7 times smaller" in captured.out
    assert captured.err == ""
