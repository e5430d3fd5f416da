"""How a program ends: one clear sentence and exit code 2 for what its user can mend, 130 after
Ctrl-C, never a traceback."""
import argparse
import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from data import DataError
from lab.folders import Stopped


MEMORY = (MemoryError, torch.OutOfMemoryError)
# Of a CPU, and of a loading process that the operating system has ended.
LACKING = ("can't allocate memory", "not enough memory", "exited unexpectedly")


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one sentence, without the list of all flags."""

    def __init__(self, text):
        super().__init__(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise DataError(f"{message}; --help explains all flags")


@contextmanager
def one_sentence(program):
    """Turns the errors inside into `PROGRAM: sentence` on stderr and an exit code."""
    code = 2
    try:
        yield
        return
    except DataError as e:
        # An error of a loading process arrives inside a traceback; its last line is the sentence.
        text = str(e).strip().splitlines()[-1].removeprefix("data.DataError: ")
    except OSError as e:
        remedy = "correct the path, or make room on the disk"
        text = f"{e.filename}: {e.strerror}; {remedy}" if e.filename else f"{e}; {remedy}"
    except Stopped as e:
        text, code = str(e), 128 + e.number
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MEMORY) and not any(words in str(e) for words in LACKING):
            raise
        text = ("too little memory: raise fit.accumulate, to what python -m lab.bench memory "
                "says, or lower crops.size; to evaluate or predict, set crops.short_side")
    except KeyboardInterrupt:
        text, code = "stopped", 130
    print(f"{program}:", text, file=sys.stderr)
    tell_torchrun(text)
    sys.exit(code)


def tell_torchrun(text):
    """Writes the sentence where torchrun looks for the cause, so that its own report names it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": {
            "py_callstack": text, "timestamp": str(int(time.time()))}}}))
