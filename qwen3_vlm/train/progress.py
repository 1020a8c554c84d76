"""How far a run is: a bar with loss, real tokens per second and time left, or plain lines off a terminal."""

import sys
import time
from typing import Any

SECONDS_BETWEEN_LINES = 15.0  # off a terminal


class Progress:
    """Shows the optimizer steps of a run; `active=False` shows nothing (ranks other than the first)."""

    def __init__(self, *, active: bool) -> None:
        self._active = active
        self._bar: Any = None
        self._total = 0
        self._rate = StepRate()
        self._last_line = 0.0

    def start(self, step: int, total: int) -> None:
        """Begin at `step` of `total`."""
        self._total = total
        self._rate.start(step)
        if self._active and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05)

    def step(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """One optimizer step is done; `tokens_per_second` counts real tokens on all processes."""
        left = self._rate.seconds_left(step, self._total)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._active and (step == self._total or time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES):
            self._last_line = time.monotonic()
            print(
                f"step {step:,}/{self._total:,}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  "
                f"{format_seconds(left)} left",
                flush=True,
            )

    def say(self, text: str) -> None:
        """Print above the bar."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._active:
            print(text, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class StepRate:
    """Seconds per step since the start of this process, evaluations included, for an honest time left."""

    def start(self, step: int) -> None:
        """Count from `step`, now."""
        self._first, self._since = step, time.monotonic()

    def seconds_left(self, step: int, total: int) -> float:
        """At the rate so far."""
        done = max(step - self._first, 1)
        return (time.monotonic() - self._since) / done * (total - step)


def format_seconds(seconds: float) -> str:
    """ "1:02:03" or "2:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
