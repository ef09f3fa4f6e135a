"""What ends a command in order: what it holds is given back, the embedded database stopped."""

import signal


def signals() -> list[signal.Signals]:
    """Ctrl-C, SIGTERM, and the end of the terminal where that is not to be ignored, as under nohup."""
    closed = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *closed]
