"""Exit codes, messages, signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capfilt import __version__
from capfilt.cli.main import report
from capfilt.errors import (
    CapfiltError,
    CorruptionError,
    FingerprintMismatchError,
    MissingPackageError,
    RunLockedError,
    UsageError,
)
from capfilt.world.site import SiteSettings, WorldSite
from tests.cli.conftest import capfilt, capfilt_process


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (CapfiltError("two shards failed"), 1, "capfilt: two shards failed"),
        (UsageError("no"), 2, "capfilt: no"),
        (MissingPackageError("ray", "ray", "Ray"), 2, "pip install 'capfilt[ray]'"),
        (FingerprintMismatchError("top_p"), 3, "top_p"),
        (RunLockedError("by 7"), 4, "by 7"),
        (CorruptionError("00000"), 5, "00000"),
        (FileNotFoundError(2, "No such file", "x"), 2, "Check the path"),
        (PermissionError(13, "Denied", "x"), 1, "No permission"),
        (OSError(28, "No space left on device"), 1, "run the same command again"),
        (MemoryError(), 1, "--batch-size"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (ZeroDivisionError("x"), 1, "a defect of capfilt: ZeroDivisionError: x"),
    ],
)
def test_every_failure_has_a_message_and_a_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(error) == code
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CAPFILT_DEBUG", "1")
    report(UsageError("no"))
    shown = capsys.readouterr().err
    assert "UsageError: no" in shown
    monkeypatch.delenv("CAPFILT_DEBUG")
    report(UsageError("no"))
    assert capsys.readouterr().err == "capfilt: no\n"


def test_messages_keep_their_lines_and_lose_their_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    report(CapfiltError("first \x1b[31mred\nsecond"))
    assert capsys.readouterr().err == "capfilt: first \\x1b[31mred\nsecond\n"


def test_version_and_help() -> None:
    assert capfilt("--version").out.startswith(f"capfilt {__version__}\n  python 3.")
    assert "CAPFILT_DEBUG" in capfilt("--help").out
    assert "stage2" in capfilt("train", "--help").out
    assert capfilt("captoin").code == 2
    assert capfilt("stats", "x", "--jsno").code == 2


@pytest.mark.parametrize(
    ("number", "code", "moment"),
    [(signal.SIGINT, 130, "*"), (signal.SIGTERM, 143, "*/00000-0")],
    ids=["interrupt while the workers start", "terminate while a shard is downloaded"],
)
def test_signals_end_a_download(number: signal.Signals, code: int, moment: str, tmp_path: Path) -> None:
    """A site that never answers: the command ends at once, says how to go on, and leaves no attempt behind."""
    with WorldSite(SiteSettings(num_urls=20, behaviour_shares={"hang": 1.0})) as site:
        table = site.write_table(tmp_path / "urls.csv")
        run = tmp_path / "run"
        process = capfilt_process(
            "download", table, run, "--allow-private-addresses", "--timeout", 60, "--num-processes", 1
        )
        deadline = time.monotonic() + 90
        while not list((run / ".staging").glob(moment)) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "the same command goes on" in err
    assert "Traceback" not in err
    assert list((run / ".staging").glob("*")) == []


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As a shell has it for what it runs in the background."""
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    code += "from capfilt.cli.interrupts import handle_interrupts; handle_interrupts(); "
    code += "signal.raise_signal(signal.SIGINT); print('goes on'); signal.raise_signal(signal.SIGTERM)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("goes on\n", 143)


def test_a_signal_amid_an_import_waits_for_its_end(tmp_path: Path) -> None:
    """Extension modules drop an exception while they start; one that a module lets pass is not lost here."""
    (tmp_path / "deaf.py").write_text(
        "import signal, time\ntry:\n    signal.raise_signal(NUMBER)\n    time.sleep(0.2)\n"
        "except BaseException:\n    pass\nprint('imported', flush=True)\n"
    )
    code = "import signal, time; from capfilt.cli.interrupts import handle_interrupts; handle_interrupts(); "
    code += "import builtins; builtins.NUMBER = signal.{}; import deaf; time.sleep(30); print('lost')"
    for name, ending in (("SIGINT", "KeyboardInterrupt\n"), ("SIGTERM", "")):
        done = subprocess.run(
            [sys.executable, "-c", code.format(name)], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.stdout == "imported\n"
        assert done.returncode == {"SIGINT": -signal.SIGINT, "SIGTERM": 143}[name]
        assert done.stderr.endswith(ending)


def test_a_long_import_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import signal, time\ntry:\n    signal.raise_signal(NUMBER)\n    time.sleep(60)\n"
        "finally:\n    print('too late')\n"
    )
    code = "from capfilt.cli.interrupts import handle_interrupts; handle_interrupts(); "
    code += "import builtins, signal; builtins.NUMBER = signal.{}; import slow; print('lost')"
    for name, ending in (("SIGINT", 130), ("SIGTERM", 143)):
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code.format(name)], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert (done.stdout, done.returncode) == ("", ending)
        assert "What is done is kept; the same command goes on." in done.stderr
        assert time.monotonic() - began < 30


def test_output_that_is_not_utf_8_shows_what_it_cannot_write_by_its_number() -> None:
    process = capfilt_process("recipe", "show", "capfilt", PYTHONIOENCODING="ascii")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "\\u2192" in out


def test_an_error_that_others_make_of_a_signal_is_the_signal() -> None:
    """As safetensors does, amid the reading of weights: the file was said to be damaged."""
    code = "import signal, sys; from capfilt.cli import main, interrupts; interrupts.handle_interrupts()\n"
    code += (
        "def app():\n    try: signal.raise_signal(signal.{})\n    except BaseException: raise ValueError('no shape')\n"
    )
    code += "main.app = app; main.main()"
    for name, expected in (("SIGINT", 130), ("SIGTERM", 143)):
        done = subprocess.run([sys.executable, "-c", code.format(name)], capture_output=True, text=True, check=False)
        assert done.returncode == expected
        assert "the same command goes on. On the way out: no shape" in done.stderr


def test_a_reader_that_goes_away_is_no_error(downloaded: Path) -> None:
    process = capfilt_process("stats", downloaded)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    assert "defect" not in err
