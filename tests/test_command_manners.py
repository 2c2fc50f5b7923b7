"""How the command behaves among others: in shells, pipes, terminals and encodings."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import wnsurgery as wn
from wnsurgery.cli import cli, main

Capture = pytest.CaptureFixture[str]
COMMANDS = sorted(cli.commands)
COMMAND = [sys.executable, "-m", "wnsurgery"]
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7])[;m]")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A converted state dict."""
    torch.manual_seed(0)
    save_file(
        wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))).state_dict(), tmp_path / "n.safetensors"
    )
    return tmp_path / "n.safetensors"


def call(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TERM")} | environment
    return subprocess.run(
        [*COMMAND, *map(str, words)], capture_output=True, text=True, check=False, env=settings,
        encoding=environment.get("PYTHONIOENCODING", "utf-8"), errors="strict",
    )  # fmt: skip


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(w) for w in words])
    return int(stop.value.code or 0)


# Completion ----------------------------------------------------------------------------------------------


def complete(shell: str, words: str, at: int) -> list[str]:
    done = call(_WNSURGERY_COMPLETE=f"{shell}_complete", COMP_WORDS=words, COMP_CWORD=str(at))
    return [line.rpartition(",")[2] for line in done.stdout.split()]


def test_completion_knows_commands_options_and_values() -> None:
    """Tab completes all three, from the command itself, so that it cannot be out of date."""
    assert complete("bash", "wnsurgery ", 1) == COMMANDS
    assert "--zero-norm" in complete("bash", "wnsurgery fold --z", 2)
    assert complete("bash", "wnsurgery convert --init ", 3) == ["preserve", "data", "fan"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The script for each shell asks this command; a shell that is there accepts it."""
    assert run("completion", shell) == 0
    text = capsys.readouterr().out
    assert f"_WNSURGERY_COMPLETE={shell}_complete" in text
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_completion_in_bash(tmp_path: Path) -> None:
    """Loaded in a shell, the script offers what begins as the word does."""
    (tmp_path / "wnsurgery").write_text(f'#!/bin/sh\nexec {sys.executable} -m wnsurgery "$@"\n')
    (tmp_path / "wnsurgery").chmod(0o755)
    script = (
        'eval "$(wnsurgery completion bash)"; COMP_WORDS=(wnsurgery con); COMP_CWORD=1; '
        '_wnsurgery_completion wnsurgery con wnsurgery; echo "${COMPREPLY[@]}"'
    )
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["convert"]


# Help ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_examples_and_describes_every_option(name: str) -> None:
    """`--help` ends the description with commands to copy (run by tests/test_readme.py); no option is without help."""
    command = cli.commands[name]
    assert "Examples:" in (command.help or "")
    assert re.search(rf"^ *(.* )?wnsurgery {name} ", command.help or "", flags=re.MULTILINE)
    for option in command.params:
        assert not isinstance(option, click.Option) or option.help, option.opts


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["flod", "x"], "Did you mean fold?"),
        (["fold", "x", "--outptu", "y"], "Did you mean --output?"),
        (["convert", "x", "--init", "dta"], "preserve, data, fan"),
        (["fold", "{folder}/n.safetensor"], "near names: {folder}/n.safetensors"),
        (["inspect", "{folder}/m.safetensors"], "near names: {folder}/n.safetensors"),
    ],
)
def test_did_you_mean(words: list[str], said: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A slip in a command, an option, a value or a file's name is answered with what is like it."""
    code = run(*(word.format(folder=file.parent) for word in words))
    assert code == (3 if "near" in said else 2)
    plain = capsys.readouterr().err.replace("'", "")  # which names click puts in quotes differs from version to version
    assert said.format(folder=file.parent) in plain


def test_a_name_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two halves of a pair are one name."""
    net = wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    torch.save(net.state_dict(), tmp_path / "step9000.pt")
    assert run("convert", tmp_path / "step9000.pt", "--dim", "ups.*=1") == 2
    assert "hint: near names: 0.weight, 2.weight\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench", "GRAPH"], "hint: wnsurgery run GRAPH --input FILE -o OUTPUT --time N times a graph"),
        (["bench", "none.onnx", "--input-shape", "1x3"], "no such file"),
        (["convert", "GRAPH", "-o", "x.pt"], "hint: fold_onnx (wnsurgery fold) takes graphs"),
        (["export", "GRAPH", "-o", "x.onnx", "--input-shape", "1x3"], "hint: fold_onnx (wnsurgery fold) takes graphs"),
        (
            ["run", "GRAPH", "--input", "x.npy", "-o", "y.npz", "--provider", "gpu"],
            "hint: providers (--provider): cpu, ",
        ),
    ],
)
def test_hints_speak_of_the_command(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a command does not take is answered with the command that does."""
    monkeypatch.chdir(tmp_path)
    wn.export_onnx(nn.Linear(3, 4), torch.ones(1, 3), "graph.onnx")
    np.save("x.npy", np.ones((1, 3), np.float32))
    assert run(*(word.replace("GRAPH", "graph.onnx") for word in words)) in (2, 3)
    err = capsys.readouterr().err
    assert said in err
    assert "provider=" not in err


@pytest.mark.parametrize("command", ["fold", "convert", "inspect", "verify"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("to_nothing.pt", "a link to nothing (to_nothing.pt leads to gone.pt)"),
        ("loop.pt", "loop.pt leads to pool.pt"),
        ("gone/n.pt", "a link to nothing (gone leads to nowhere)"),
    ],
)
def test_broken_links_are_told(
    command: str, name: str, said: str, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An input that is a link to nothing, or one of a loop, is told as that, with what it leads to."""
    monkeypatch.chdir(file.parent)
    for link, target in (
        ("to_nothing.pt", "gone.pt"),
        ("loop.pt", "pool.pt"),
        ("pool.pt", "loop.pt"),
        ("gone", "nowhere"),
    ):
        Path(link).symlink_to(target)
    assert run(command, name, *([file] if command == "verify" else [])) == 3
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """The command alone shows its whole help, line by line, and no error."""
    code = run()
    out, err = capsys.readouterr()
    shown = out + err
    assert code == (2 if err else 0)
    assert shown.startswith("Usage: wnsurgery")
    assert len(shown.splitlines()) > 20
    assert "\\n" not in shown


# Loud and quiet ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_quiet(first: bool, file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`-q` before or after the command: the work done without a word; JSON that was asked for; errors as ever."""

    def quietly(*words: object) -> int:
        return run("-q", *words) if first else run(words[0], "--quiet", *words[1:])

    assert quietly("fold", file, "-o", tmp_path / "o.pt") == 0
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "o.pt").exists()
    assert quietly("convert", tmp_path / "o.pt", "-o", tmp_path / "c.pt") == 0  # which has a warning about kept axes
    assert capfd.readouterr() == ("", "")
    assert quietly("inspect", file, "--json") == 0
    assert json.loads(capfd.readouterr().out)
    assert quietly("fold", tmp_path / "none.pt") == 3
    out, err = capfd.readouterr()
    assert (out, err.splitlines()[0]) == ("", f"wnsurgery: error: {tmp_path / 'none.pt'}: no such file")
    assert run("convert", tmp_path / "o.pt", "-o", tmp_path / "d.pt") == 0  # quiet is forgotten
    assert capfd.readouterr().out


def test_verbose(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`-v` tells on stderr what was done, with which versions, in how much time and memory; stdout stays as it is."""
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    assert run("convert", tmp_path / "m.pt", "-o", tmp_path / "a.pt", "--json") == 0
    plain = json.loads(capfd.readouterr().out)
    assert run("convert", tmp_path / "m.pt", "-v", "-o", tmp_path / "b.pt", "--json") == 0
    out, err = capfd.readouterr()
    assert json.loads(out).keys() == plain.keys()
    assert "weight norm applied to 1 weights" in err
    assert f"torch {torch.__version__}" in err
    assert re.search(r"\d\.\d s", err)
    assert run("convert", tmp_path / "m.pt", "-q", "-v", "-o", tmp_path / "c.pt") == 0
    assert "applied" not in capfd.readouterr().err


# Terminals and encodings ---------------------------------------------------------------------------------


def on_a_terminal(words: list[str], **environment: str) -> str:
    """What a command writes to a terminal of 100 columns."""
    pty = pytest.importorskip("pty")
    import fcntl
    import struct
    import termios

    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    settings = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    process = subprocess.Popen([*COMMAND, *words], stdout=inner, stderr=inner, env=settings | environment)
    os.close(inner)
    written = b""
    while True:
        try:
            part = os.read(outer, 65536)
        except OSError:  # Linux, when the other end is closed
            part = b""
        if not part:
            break
        written += part
    os.close(outer)
    assert process.wait() == 0
    return written.decode()


def large(folder: Path) -> Path:
    """Enough work for a bar to be drawn."""
    save_file(
        {f"{i}.weight_{h}": torch.rand(400, 400 if h == "v" else 1) for i in range(30) for h in "gv"},
        folder / "l.safetensors",
    )
    return folder / "l.safetensors"


def test_progress_and_colours_are_for_terminals(tmp_path: Path) -> None:
    """A bar with speed and time left on a terminal; no colour with NO_COLOR, nothing that moves on a dumb one, with -q
    or into a pipe."""
    words = ["fold", str(large(tmp_path)), "--force"]
    shown = on_a_terminal(words, TERM="xterm-256color")
    assert "MB/s" in shown or "left:" in shown
    assert "left:" in shown
    assert COLOUR.search(shown)
    assert not COLOUR.search(on_a_terminal(words, TERM="xterm-256color", NO_COLOR="1"))
    assert not COLOUR.search(on_a_terminal(["inspect", words[1]], TERM="xterm-256color", NO_COLOR="1"))
    for silent in (on_a_terminal(words, TERM="dumb"), on_a_terminal(["-q", *words], TERM="xterm"), call(*words).stderr):
        assert "left:" not in silent
        assert "\x1b" not in silent


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_stdout_closed_before_the_start(file: Path) -> None:
    """Results have nowhere to go: an output error, said in one line."""
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *COMMAND, "inspect", str(file)], stderr=subprocess.PIPE, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (5, "wnsurgery: error: stdout: closed\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_a_stderr_that_takes_nothing(stderr: str, file: Path) -> None:
    """Messages that go nowhere change no exit code, and reach neither stdout nor the file that is written."""
    if "full" in stderr and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    plain = file.with_name("n.folded.safetensors")
    for words, code in ((["fold", file, "-v", "--json"], 0), (["convert", plain, "--json"], 0), (["fold", "none"], 3)):
        shell = ["sh", "-c", f'"$@" {stderr}', "sh", *COMMAND, *map(str, words)]
        done = subprocess.run(shell, stdout=subprocess.PIPE, text=True, check=False)
        assert done.returncode == code
        assert not done.stdout if code else json.loads(done.stdout)
    assert load_file(plain).keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}


_STRUCK = """
import os, signal, sys
import wnsurgery.stores as stores
from wnsurgery.cli import main
write = stores.write_safetensors
def struck(*given):
    os.kill(os.getpid(), int(sys.argv[1]))
    write(*given)
stores.write_safetensors = struck
main(sys.argv[2:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has other signals")
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGXCPU"])
def test_signals_leave_nothing_behind(name: str, ignored: bool, file: Path) -> None:
    """In the middle of writing each of them ends the command without a trace; a hang-up that is ignored does not."""
    number = getattr(signal, name)
    if ignored and name != "SIGHUP":
        pytest.skip("nobody ignores these")
    words = [sys.executable, "-c", _STRUCK, str(int(number)), "fold", str(file)]
    handling = signal.SIG_IGN if ignored else signal.SIG_DFL
    done = subprocess.run(words, check=False, capture_output=True, preexec_fn=lambda: signal.signal(number, handling))
    output = file.with_name("n.folded.safetensors")
    assert done.returncode == (0 if ignored else 128 + number)
    assert sorted(path.name for path in file.parent.iterdir()) == sorted(
        [file.name, *([output.name] if ignored else [])]
    )


LONG, SECRET = "x" * 300, "secret/x.npz"
_NOBODY = 65534


@contextmanager
def as_nobody() -> Iterator[None]:
    """As somebody to whom things are forbidden, which nothing is to root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(_NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.skipif(sys.platform == "win32", reason="other limits, other permissions")
@pytest.mark.parametrize("name", [LONG, SECRET, "unread.npz", "unread.onnx"])
@pytest.mark.parametrize(
    "words",
    [
        "fold {}",
        "convert {}",
        "inspect {}",
        "inspect m.pt --against {}",
        "inspect m.pt --reference {}",
        "verify {} m.pt",
        "verify m.pt {}",
        "export {} --input-shape 1x3",
        "export m.pt --input {}",
        "run {} --input x.npz -o y.npz",
        "run m.onnx --input {} -o y.npz",
        "convert m.pt --init data --data {}",
    ],
)
def test_what_the_system_refuses_is_no_bug(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An input whose name is too long, or that may not be read or looked at, is told in a line, with exit code 3."""
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    torch.save(nn.Sequential(nn.Linear(3, 2)), "m.pt")
    Path("secret").mkdir(mode=0o000)
    for forbidden in ("unread.npz", "unread.onnx"):
        Path(forbidden).touch(mode=0o000)
    np.savez("x.npz", np.ones(3, "f4"))
    Path("m.onnx").touch()
    for module in ("export", "graph", "inspection", "parity", "verification"):  # while importing is not forbidden
        importlib.import_module(f"wnsurgery.{module}")
    run(*words.format("none.npz").split())
    capsys.readouterr()
    try:
        with as_nobody():
            assert run(*words.format(name).split()) == 3
    finally:
        Path("secret").chmod(0o700)
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith(f"wnsurgery: error: {name}: ")
    assert line.endswith(("File name too long", "Permission denied"))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "utf-8"])
def test_no_encoding_fails(encoding: str, tmp_path: Path) -> None:
    """What the terminal's encoding lacks is spelled out: names from files, paths, and signs of ours."""
    names = ["层.weight", "größe.weight", "a\u2192b.weight", "\U0001f600.weight"]
    path = tmp_path / "модель.safetensors"
    save_file({name: torch.ones(2, 2) for name in names}, path)
    outputs = {}
    for words in (
        ["inspect", path],
        ["convert", path, "--force"],
        ["inspect", path, "--csv"],
        ["fold", path, "--force"],
    ):
        done = call(*words, PYTHONIOENCODING=encoding)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        outputs[words[0]] = done.stdout
    assert ("größe" in outputs["inspect"]) == (encoding != "ascii")
    assert ("层" in outputs["inspect"]) == (encoding == "utf-8")
    missing = call("fold", tmp_path / "нет.pt", PYTHONIOENCODING=encoding)
    assert missing.returncode == 3
    assert len(missing.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["a b.pt", "-dash.pt", "[brackets].pt", "semi;colon.pt", "C:\\dir\\w.pt", "%n$x.pt"])
def test_any_file_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with blanks, brackets, drive letters, backslashes and leading dashes are names."""
    monkeypatch.chdir(tmp_path)
    with Path(name).open("wb") as opened:
        torch.save(nn.Linear(2, 2).state_dict(), opened)
    before = Path(name).read_bytes()
    assert run("convert", "-o", "out.pt", "--", name) == 0
    assert run("inspect", "--", name) == 0
    assert Path(name).read_bytes() == before
    assert run("fold", "-o", name, "--force", "out.pt") == 0 if not name.startswith("-") else True
    assert torch.load(name, weights_only=True).keys() == {"weight", "bias"}


# What was asked for, and what was done ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inspect", "GRAPH", "--arch", "a:b"], "does not apply to ONNX files"),
        (["inspect", "FILE", "--reference", "OTHER"], "the reference is another net: 0.weight is 4x3 here, 6x5 there"),
        (["fold", "MODULE", "-o", "x.pt", "--dim", "0"], "there are none here"),
        (["convert", "OTHER", "-o", "x.pt", "--dry-run", "--manifest", "m.json"], "a dry run writes nothing"),
        (["inspect", "FILE", "--against", "FILE", "--lr", "0.5"], "--lr does not apply to --against without --html"),
        (["inspect", "FILE", "--against", "FILE", "--all"], "--all does not apply to --against"),
        (["inspect", "FILE", "--force"], "--force needs --html"),
        (["inspect", "DIRECTORY", "--trust-pickle"], "--trust-pickle does not apply to directories and ONNX files"),
        (["inspect", "DIRECTORY", "--against", "DIRECTORY", "--trust-pickle"], "--trust-pickle does not apply to dir"),
        (["verify", "DIRECTORY", "DIRECTORY", "--trust-pickle"], "--trust-pickle does not apply to directories and"),
        (["verify", "DIRECTORY", "GRAPH", "--trust-pickle"], "--trust-pickle does not apply to directories and ONNX"),
        (["verify", "FILE", "FILE", "--random", "50"], "--random does not apply to two checkpoints without --input-sh"),
        (["verify", "GRAPH", "GRAPH", "--magnitude", "log"], "--magnitude does not apply to ONNX files"),
        (["verify", "GRAPH", "GRAPH", "--arch", "a:b"], "--arch does not apply to ONNX files"),
        (["verify", "GRAPH", "GRAPH", "--entry", "ema"], "--entry does not apply to ONNX files"),
        (["verify", "GRAPH", "GRAPH", "--input", "x.npy", "--random", "3"], "--random does not apply to --input"),
        (["bench", "--suite", "nothing"], "matches no net of the suite"),
    ],
)
def test_options_without_effect_are_refused(
    words: list[str], said: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    other = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 2))
    torch.save(other.state_dict(), tmp_path / "other.pt")
    torch.save(wn.apply_weight_norm(other), tmp_path / "module.pt")
    wn.export_onnx(nn.Linear(3, 4), torch.ones(1, 3), tmp_path / "graph.onnx")
    (tmp_path / "sharded").mkdir()
    wn.save_model(other, tmp_path / "sharded" / "model.safetensors")
    places = {"GRAPH": "graph.onnx", "FILE": str(file), "OTHER": "other.pt", "MODULE": "module.pt"}
    places["DIRECTORY"] = "sharded"
    assert run(*(places.get(word, word) for word in words)) in (2, 3)
    out, err = capfd.readouterr()
    assert not out
    assert said in err
    assert not (tmp_path / "x.pt").exists()


def test_where_it_was_written(file: Path, capfd: Capture) -> None:
    assert run("fold", file) == 0
    written = file.with_name("n.folded.safetensors")
    assert re.search(rf"^ +output +{re.escape(str(written))}$", capfd.readouterr().out, re.MULTILINE)
    assert run("convert", written, "--json") == 0
    assert json.loads(capfd.readouterr().out)["proof"]["output"] == str(file.with_name("n.folded.wn.safetensors"))
    assert run("fold", file, "--force", "--dry-run", "--json") == 0
    assert not json.loads(capfd.readouterr().out)["proof"]["output"]
