"""A shell completes verbs, flags and values as the parser has them."""

import argparse
import shutil
import subprocess
from pathlib import Path

import pytest

from elastic.cli import main, make_parser
from elastic.completion import script, verbs_of

VERBS = {verb.name: verb for verb in verbs_of(make_parser())}


def completed(words: list[str]) -> list[str]:
    """What bash offers for the last of some words, by the script that the verb prints."""
    bash = shutil.which("bash")
    assert bash is not None, "bash is needed to know what bash does"
    code = 'eval "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _restage; '
    code += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        [bash, "--norc", "-euc", code, "bash", script(make_parser(), "bash"), *words],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_every_verb() -> None:
    assert completed(["restage", ""]) == list(VERBS)
    assert completed(["restage", "st"]) == [name for name in VERBS if name.startswith("st")]
    assert "status" in VERBS


@pytest.mark.parametrize("verb", ["train", "plan", "doctor"])
def test_bash_completes_the_flags_of_a_verb_and_no_others(verb: str) -> None:
    flags = [flag.name for flag in VERBS[verb].flags]
    assert completed(["restage", verb, "--"]) == flags
    assert completed(["restage", verb, "file.py", "--sto"]) == ["--storage"]


def test_bash_completes_values_of_which_there_are_few() -> None:
    assert completed(["restage", "export", "--dtype", ""]) == ["bf16", "fp32"]
    assert completed(["restage", "train", "--log-level", "d"]) == ["debug"]
    assert completed(["restage", "completion", "b"]) == ["bash"]


def test_bash_is_registered_and_falls_back_to_files() -> None:
    code = 'eval "$1"; complete -p restage'
    shown = subprocess.run(
        ["bash", "--norc", "-ec", code, "bash", script(make_parser(), "bash")],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert shown.stdout.strip() == "complete -o default -F _restage restage"


def test_fish_is_told_every_verb_flag_and_value() -> None:
    lines = script(make_parser(), "fish").splitlines()
    for verb in VERBS.values():
        assert any(f"-a {verb.name} -d" in line for line in lines)
        own = [line for line in lines if f"__fish_seen_subcommand_from {verb.name}'" in line]
        for flag in verb.flags:
            (line,) = [line for line in own if f" -l {flag.name[2:]} " in line]
            assert all(choice in line for choice in flag.choices)


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("restage st", ["status", "stop"]),
        ("restage train --ray", ["--ray-address"]),
        ("restage completion ", ["bash", "fish", "zsh"]),
        ("restage export --dtype ", ["bf16", "fp32"]),
    ],
)
def test_fish_itself_offers_them(typed: str, offered: list[str], tmp_path: Path) -> None:
    file = tmp_path / "restage.fish"
    file.write_text(script(make_parser(), "fish"))
    code = f"source {file}; complete -C '{typed}'"
    assert [line.split("\t")[0] for line in _said_by("fish", "--no-config", "-c", code)] == offered


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_itself_takes_the_script(tmp_path: Path) -> None:
    file = tmp_path / "restage.zsh"
    file.write_text(script(make_parser(), "zsh"))
    code = f'ZDOTDIR={tmp_path}; source {file}; print "${{_comps[restage]}}"'
    assert _said_by("zsh", "-f", "-c", code) == ["_bash_complete -o default -F _restage"]


def _said_by(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_words_that_a_shell_would_read_are_quoted() -> None:
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers()
    verbs.add_parser("go", help="it's $(touch here)").add_argument("--to", choices=["a;b", "$(x)"])
    assert "-d 'it\\'s $(touch here)'" in script(parser, "fish")
    assert "words='a;b $(x)' ;;" in script(parser, "bash")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_verb_prints_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "restage" in capsys.readouterr().out
    assert main_refuses("tcsh")


def main_refuses(shell: str) -> bool:
    with pytest.raises(SystemExit) as caught:
        main(["completion", shell])
    return caught.value.code == 2
