"""Makes the tables that a benchmark prints, and that its page shows."""

from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Grid:
    """A table, for the terminal and for the page."""

    title: str
    head: list[str]
    rows: list[list[str]]

    def rich(self) -> Table:
        """Returns the table for the terminal."""
        table = Table(*self.head, title=self.title, title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Returns the table for the page."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
