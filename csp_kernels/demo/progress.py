"""A progress bar on stderr: one line on a terminal, a line every tenth otherwise."""

from __future__ import annotations

import sys
import time

WIDTH = 24


class Progress:
    """Counts steps and shows loss, images a second and the time left."""

    def __init__(self, total: int, images_per_step: int) -> None:
        self.total, self.images, self.done = total, images_per_step, 0
        self.start = time.perf_counter()
        self.live = sys.stderr.isatty()

    def step(self, text: str, rates: str) -> None:
        """One more step is done; `text` holds the losses, `rates` the images a second."""
        self.done += 1
        if not self.live and self.done % max(1, self.total // 10) and self.done != self.total:
            return
        left = (time.perf_counter() - self.start) / self.done * (self.total - self.done)
        full = WIDTH * self.done // self.total
        bar = "#" * full + "." * (WIDTH - full)
        line = f"[{bar}] {self.done}/{self.total}  {text}  {rates}  {int(left) // 60}:{int(left) % 60:02d} left"
        sys.stderr.write(f"\r\x1b[K{line}" if self.live else f"{line}\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Ends the line."""
        if self.live:
            sys.stderr.write("\n")
