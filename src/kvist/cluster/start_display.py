"""Shows the start of several processes: on a terminal one changing line for each, elsewhere a few lines.

On a terminal, INFO and DEBUG log lines of the start are hidden (unless `--log-level debug`); warnings and errors are
printed above the changing lines. If a start fails, its error quotes the last lines.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from kvist.clock import MonotonicClock
from kvist.progress import REPORT_INTERVAL_S, with_bar
from kvist.supervisor.child import Child, ChildState

if TYPE_CHECKING:
    from rich.live import Live

Show = Callable[[str], None]

MAX_DOING_CHARS = 60
_ROUTINE = re.compile(r'^(\S+ \S+ (INFO|DEBUG) |\{"time": "[^"]*", "level": "(info|debug)")')


def is_routine(line: str) -> bool:
    """Return whether `line` is a log line of level INFO or DEBUG."""
    return _ROUTINE.match(line) is not None


class StartLines:
    """Shows a line for each process that becomes ready, and every `REPORT_INTERVAL_S` one for the others."""

    def __init__(self, children: Mapping[str, Child], show: Show) -> None:
        self._children = children
        self._show_line = show
        self._clock = MonotonicClock()
        self._start_s = self._clock.now_s()
        self._next_s = self._start_s + REPORT_INTERVAL_S
        self._reported: set[str] = set()

    def __call__(self) -> None:
        after_s = self._clock.now_s() - self._start_s
        for name, child in self._children.items():
            if child.state is ChildState.READY and name not in self._reported:
                self._reported.add(name)
                self._show_line(f"{name} is ready after {after_s:.1f} s")
        if self._clock.now_s() >= self._next_s:
            self._next_s = self._clock.now_s() + REPORT_INTERVAL_S
            left = [child for name, child in self._children.items() if name not in self._reported]
            if left:
                self._show_line(
                    f"after {after_s:.0f} s: " + ", ".join(f"{child.plan.name} {describe(child)}" for child in left)
                )


class StartBlock:
    """The changing lines of a terminal, redrawn at each call; made by `start_display`."""

    def __init__(self, children: Mapping[str, Child], live: Live, *, show_all: bool) -> None:
        self._children = children
        self._live = live
        self._shows_all = show_all
        self._clock = MonotonicClock()
        self._start_s = self._clock.now_s()

    def __call__(self) -> None:
        from rich.text import Text

        width = max(map(len, self._children))
        after_s = self._clock.now_s() - self._start_s
        lines = [f"{name:<{width}}  {with_bar(describe(child))}" for name, child in self._children.items()]
        self._live.update(Text("\n".join([*lines, f"{'':<{width}}  {after_s:.0f} s"])), refresh=True)

    def pass_on(self, line: str) -> None:
        """Print a line of output above the changing lines."""
        if self._shows_all or not is_routine(line.partition(" | ")[2]):
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def start_display(
    children: Mapping[str, Child], show_line: Callable[[str], None], *, show_all: bool = False
) -> Iterator[StartBlock | StartLines]:
    """Yield the display of a start, valid until the body ends: changing lines if standard output is a terminal, else
    lines for `show_line`."""
    if not sys.stdout.isatty():
        yield StartLines(children, show_line)
        return
    from rich.console import Console  # slow to import, and not needed by `kvist serve`
    from rich.live import Live

    with Live(console=Console(), auto_refresh=False, transient=True) as live:
        yield StartBlock(children, live, show_all=show_all)


def describe(child: Child) -> str:
    """Return the state and progress of a child, such as "starting: loading weights 40%" or "ready"."""
    if child.state is not ChildState.STARTING or not child.doing:
        return child.state.value
    text = child.doing if len(child.doing) <= MAX_DOING_CHARS else child.doing[: MAX_DOING_CHARS - 1] + "…"
    return f"{child.state.value}: {text}"
