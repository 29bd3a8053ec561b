"""The console of the commands: what it cannot show it escapes, and a reader that left ends it."""

from __future__ import annotations

from rich.console import Console
from rich.status import Status
from rich.text import Text

from stateful_kv.apps.printable import printable


class SafeConsole(Console):
    """A console that leaves a broken pipe to the command, which then ends without a message."""

    def on_broken_pipe(self) -> None:
        """Raises what `rich` caught."""
        raise BrokenPipeError

    def say(self, text: str, style: str = "") -> None:
        """Prints one line as it is: no markup, no emoji codes, no colours for numbers."""
        self.print(
            printable(text), style=style, markup=False, highlight=False, emoji=False, soft_wrap=True
        )

    def waiting(self, text: str) -> Status:
        """Shows that something takes time, in a terminal."""
        has_dots = self.encoding.lower().startswith("utf")
        return self.status(Text(printable(text)), spinner="dots" if has_dots else "line")
