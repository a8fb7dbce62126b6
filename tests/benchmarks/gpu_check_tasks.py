"""What the tests of gpu_check let a process do: answer, fail, die, hang."""

import os
import sys
import time


def answer(value):
    print("this is no answer")
    return {"rows": [{"value": value, "process": os.getpid()}]}


def fail(text):
    raise ValueError(text)


def abort():
    print("first words\nlast words", file=sys.stderr, flush=True)
    os.abort()


def leave(status):
    os._exit(status)


def sleep(seconds):
    time.sleep(seconds)
    return {}
