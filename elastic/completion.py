"""The verbs as the parser has them: which one was meant, and scripts by which shells complete."""

import argparse
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from stages.explain import nearest

Shell = Literal["bash", "zsh", "fish"]
SHELLS: tuple[Shell, ...] = ("bash", "zsh", "fish")
# zsh runs what is written for bash.
_BASH = """\
# {how}
_restage() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words
    case "${{COMP_WORDS[1]}} $before" in
{values}
        *)
            case "${{COMP_WORDS[1]}}" in
{flags}
            esac
            [ "$COMP_CWORD" -eq 1 ] && words={verbs} ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _restage restage
"""
_ZSH = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"


class Flag(NamedTuple):
    """A flag of a verb, and the words that its value may be; empty if any."""

    name: str
    text: str
    choices: tuple[str, ...]


class Verb(NamedTuple):
    """A verb with what it takes; `choices` are words that may stand without a flag."""

    name: str
    text: str
    flags: tuple[Flag, ...]
    choices: tuple[str, ...]


def script(parser: argparse.ArgumentParser, shell: Shell) -> str:
    """The script that a shell reads to complete what this parser takes."""
    verbs = list(verbs_of(parser))
    if shell == "fish":
        return "\n".join(_fish(verbs)) + "\n"
    return (_ZSH if shell == "zsh" else "") + _bash(verbs, shell)


def verbs_of(parser: argparse.ArgumentParser) -> Iterator[Verb]:
    """The verbs of a parser."""
    (found,) = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    texts = {one.dest: one.help or "" for one in found._choices_actions}
    for name, one in found.choices.items():
        flags = [
            Flag(flag, action.help or "", tuple(map(str, action.choices or ())))
            for action in one._actions
            for flag in action.option_strings
            if flag.startswith("--")
        ]
        free = [action for action in one._actions if not action.option_strings]
        words = [str(word) for action in free for word in action.choices or ()]
        yield Verb(name, texts[name], tuple(flags), tuple(words))


def check_verb(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Leave as the parser does, with the nearest verb, if the first word is none."""
    known = [verb.name for verb in verbs_of(parser)]
    if words and not words[0].startswith("-") and words[0] not in known:
        parser.error(f"there is no verb {words[0]!r}{nearest(words[0], known)}")


def _bash(verbs: list[Verb], shell: Shell) -> str:
    values = [
        f"        {shlex.quote(f'{verb.name} {flag.name}')}) words={_words(flag.choices)} ;;"
        for verb in verbs
        for flag in verb.flags
        if flag.choices
    ]
    flags = [
        f"                {verb.name}) words="
        f"{_words((*verb.choices, *(flag.name for flag in verb.flags)))} ;;"
        for verb in verbs
    ]
    return _BASH.format(
        how=f'eval "$(restage completion {shell})" in ~/.{shell}rc',
        values="\n".join(values),
        flags="\n".join(flags),
        verbs=_words([verb.name for verb in verbs]),
    )


def _words(words: tuple[str, ...] | list[str]) -> str:
    return shlex.quote(" ".join(words))


def _fish(verbs: list[Verb]) -> Iterator[str]:
    yield "# restage completion fish > ~/.config/fish/completions/restage.fish"
    for verb in verbs:
        yield (
            "complete -c restage -n __fish_use_subcommand -f "
            f"-a {verb.name} -d {_fish_word(verb.text)}"
        )
        here = f"complete -c restage -n '__fish_seen_subcommand_from {verb.name}'"
        if verb.choices:
            yield f"{here} -f -a {_fish_word(' '.join(verb.choices))}"
        for flag in verb.flags:
            words = f" -x -a {_fish_word(' '.join(flag.choices))}" if flag.choices else ""
            yield f"{here} -l {flag.name[2:]}{words} -d {_fish_word(flag.text)}"


def _fish_word(text: str) -> str:
    """Quoted as fish does, where a backslash is one inside of quotes too."""
    return "'" + re.sub(r"([\\'])", r"\\\1", text) + "'"
