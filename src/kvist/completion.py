"""`kvist completion SHELL`: a script that completes commands, options and their values, for bash, zsh and fish.

The scripts hold all words, from the tables that `--help-all` shows: completing a word starts no Python. bash and zsh
run one function (zsh with the `compgen` of its `bashcompinit`); fish has a list of rules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kvist.errors import ConfigError
from kvist.options import Option
from kvist.settings import SHORTHANDS, options_for

SHELLS = ("bash", "zsh", "fish")
USAGE = """\
usage: kvist completion bash|zsh|fish

Prints a script that completes commands, options and their values.

  bash  source <(kvist completion bash)          in ~/.bashrc
  zsh   source <(kvist completion zsh)           in ~/.zshrc
  fish  kvist completion fish > ~/.config/fish/completions/kvist.fish"""
_HELP = ("--help", "--help-all")
_PATHS = ("model_path", "target", "file", "chat_template", "program", "ssl_certfile", "ssl_keyfile")  # texts
_FILES, _FREE = "<files>", "<any>"  # classes of values beside lists of words

_BASH = """\
_kvist() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} verb=${{COMP_WORDS[1]}} flags= values=
    if [[ $cur == = ]]; then
        cur=  # bash splits --flag=value at the sign
    elif [[ $prev == = ]]; then
        prev=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W '{first_words}' -- "$cur"))
        return
    fi
    if ((COMP_CWORD == 2)); then
        case $verb in
{second_words}
        esac
    else
        case "$verb ${{COMP_WORDS[2]}}" in {two_words}) verb="$verb ${{COMP_WORDS[2]}}" ;; esac
    fi
    case $verb in
{flags}
    esac
    [[ $prev != -* ]] || case "$verb $prev" in
{values}
    esac
    case $values in
        '{free}') ;;
        '{files}') COMPREPLY=($(compgen -f -- "$cur")) ;;
        '')
            COMPREPLY+=($(compgen -W "$flags" -- "$cur"))
            [[ $cur == -* || -z $flags ]] || COMPREPLY+=($(compgen -f -- "$cur"))
            ;;
        *) COMPREPLY=($(compgen -W "$values" -- "$cur")) ;;
    esac
}}
"""
_FOR_BASH = "complete -o filenames -F _kvist kvist\n"
_FOR_ZSH = """\
(($+functions[compdef])) || { autoload -Uz compinit && compinit -u; }
(($+functions[compgen])) || { autoload -Uz bashcompinit && bashcompinit; }
_kvist_zsh() {
    local -a COMP_WORDS COMPREPLY words_found files_found
    local each
    integer COMP_CWORD=$((CURRENT - 1)) ret=1
    COMP_WORDS=("${words[@]}")
    if [[ $PREFIX == -*=* ]]; then  # zsh does not split --flag=value
        COMP_WORDS=("${words[@]:0:$COMP_CWORD}" "${PREFIX%%=*}" = "${PREFIX#*=}")
        ((COMP_CWORD += 2))
        compset -P 1 '*='
    fi
    () { emulate -L sh; setopt kshglob noshglob braceexpand; _kvist }
    for each in "${COMPREPLY[@]}"; do
        if [[ -e $each ]]; then files_found+=("$each"); else words_found+=("$each"); fi
    done
    (($#words_found)) && compadd -- "${words_found[@]}" && ret=0
    (($#files_found)) && _files && ret=0
    return ret
}
compdef _kvist_zsh kvist
"""
_FISH = """\
function __kvist_verb
    set -l words (commandline -opc)
    set -l two "$words[2] $words[3]"
    if contains -- $two {two_words}
        echo $two
    else
        echo $words[2]
    end
end
function __kvist_is
    contains -- (__kvist_verb) $argv
end
"""


def completion(shell: str | None, verbs: Mapping[str, str]) -> str:
    """Return the script. `verbs` has the summary of each command. Raises `ConfigError` for an unknown shell."""
    if shell not in SHELLS:
        raise ConfigError(f"name your shell, one of {', '.join(SHELLS)}: kvist completion bash", param="shell")
    if shell == "fish":
        return "\n".join(_fish(verbs)) + "\n"
    return _bash(verbs) + (_FOR_ZSH if shell == "zsh" else _FOR_BASH)


def _bash(verbs: Iterable[str]) -> str:
    flags_of = {verb: _flags(verb) for verb in verbs}
    two_words = [verb for verb in flags_of if " " in verb]
    seconds: dict[str, list[str]] = defaultdict(list)
    for verb in two_words:
        first, second = verb.split()
        seconds[first].append(second)
    return _BASH.format(
        first_words=" ".join(dict.fromkeys(verb.split()[0] for verb in flags_of)),
        second_words="\n".join(
            f"            {first}) COMPREPLY=($(compgen -W '{' '.join(words)}' -- \"$cur\")) ;;"
            for first, words in seconds.items()
        ),
        two_words="|".join(f"'{verb}'" for verb in two_words),
        flags="\n".join(f"        '{verb}') flags='{' '.join(flags)}' ;;" for verb, flags in flags_of.items()),
        values="\n".join(
            f"        {'|'.join(patterns)}) values='{values}' ;;" for values, patterns in _patterns(flags_of).items()
        ),
        files=_FILES,
        free=_FREE,
    )


def _flags(verb: str) -> dict[str, str]:
    """Return what follows each flag of a verb: words, `_FILES`, `_FREE`, or nothing."""
    options = options_for(verb)
    found = dict.fromkeys(_HELP, "")
    for option in options:
        for flag in option.flags:
            found[flag] = _values(option)
            if option.is_switch and flag.startswith("--"):
                found["--no-" + flag[2:]] = ""
    for short in SHORTHANDS:
        if short.key in {option.key for option in options}:
            words = " ".join(ours for ours, _ in short.renamed)
            found[short.flag] = words if short.value is None else ""
    return found


def _values(option: Option) -> str:
    if option.is_switch:
        return ""
    if option.choices:
        return " ".join(str(choice) for choice in option.choices)
    return _FILES if Path in option.kinds or option.key in _PATHS else _FREE


def _patterns(flags_of: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """Return the patterns of "VERB FLAG" by what follows; a flag with one meaning has one pattern for all verbs."""
    meanings: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for verb, flags in flags_of.items():
        for flag, values in flags.items():
            meanings[flag][values].append(verb)
    found: dict[str, list[str]] = defaultdict(list)
    for flag, by_values in meanings.items():
        for values, verbs in by_values.items():
            if values:
                found[values] += [f"*' {flag}'"] if len(by_values) == 1 else [f"'{verb} {flag}'" for verb in verbs]
    return found


def _fish(verbs: Mapping[str, str]) -> Iterable[str]:
    yield _FISH.format(two_words=" ".join(_quoted(verb) for verb in verbs if " " in verb)) + "complete -c kvist -f"
    for verb, summary in verbs.items():
        first, _, second = verb.partition(" ")
        condition = f"test (count (commandline -opc)) -eq {2 if second else 1}"
        condition += f"; and __kvist_is {first}" if second else ""
        yield f"complete -c kvist -n {_quoted(condition)} -a {second or first} -d {_quoted(summary)}"
    rules: dict[tuple[str, ...], list[str]] = defaultdict(list)  # arguments of `complete` -> verbs
    for verb in verbs:
        texts = {flag: option.help.text for option in options_for(verb) for flag in option.flags}
        for flag, values in _flags(verb).items():
            rules[tuple(_fish_rule(flag, values, texts.get(flag, "")))].append(verb)
    for rule, of_verbs in rules.items():
        condition = "__kvist_is " + " ".join(_quoted(verb) for verb in of_verbs)
        yield f"complete -c kvist -n {_quoted(condition)} {' '.join(rule)}"


def _fish_rule(flag: str, values: str, text: str) -> Sequence[str]:
    kind = {"": [], _FREE: ["-x"], _FILES: ["-r", "-F"]}.get(values, ["-x", "-a", _quoted(values)])
    name = ["-l", flag[2:]] if flag.startswith("--") else ["-o", flag[1:]]
    return [*name, *kind, *(["-d", _quoted(text)] if text else [])]


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
