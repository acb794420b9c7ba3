"""Time of the processor: what a command costs while other tests run beside it."""

import resource
import subprocess


def processor_seconds(command, **options):
    """(seconds of user and system, what ``subprocess.run`` gives)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, **options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done
