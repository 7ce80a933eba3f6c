"""Gives every parser hostile inputs, and holds it to its promise: it takes them, or raises UserError.

    python tests/faults/fuzz.py --inputs 100000
    python tests/faults/fuzz.py --inputs 1000 --seed 7 bin tokenizers

Each parser runs in a process of its own, which the kernel ends at its bounds of memory and time: so a crash, a hang or
an allocation inside a library is found like an exception. The first input that breaks a parser is shown.
"""

import argparse
import faulthandler
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

import hypothesis
from fuzz_parsers import PARSERS
from hypothesis import strategies as st

from lm2_jax.common.errors import UserError

MEMORY = 1 << 30  # bytes of address space, beyond what a process has before its first input
SECONDS = 5  # of a processor, for an input
PATIENCE = 60  # seconds of a clock, for an input: it may wait for nothing
_ROUND = 5000  # inputs; hypothesis remembers those of a round


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parsers", nargs="*", metavar="PARSER", help=f"some of {', '.join(PARSERS)}; default: all")
    parser.add_argument("--inputs", type=int, default=100_000, help="for each parser")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    broken = 0
    for name in arguments.parsers or PARSERS:
        with tempfile.TemporaryDirectory() as directory:
            broken += not _in_a_process(name, arguments.inputs, arguments.seed, Path(directory))
    sys.exit(1 if broken else 0)


def _in_a_process(name, inputs, seed, directory):
    """Whether a parser kept its promise; says so."""
    child = os.fork()  # jax has no threads yet
    if child == 0:
        try:
            _campaign(name, inputs, seed, directory)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        print((directory / "told").read_text(), flush=True)
        return True
    ends = {-signal.SIGPROF: f"took more than {SECONDS} s", -signal.SIGALRM: f"did not end within {PATIENCE} s"}
    print(f"{name}: {ends.get(code, f'exit code {code}')}")
    print((directory / "input").read_text(errors="replace")[:2000])
    print((directory / "told").read_text(errors="replace")[-4000:], flush=True)
    return False


def _campaign(name, inputs, seed, directory):
    parser = PARSERS[name]
    (directory / "files").mkdir()
    told = (directory / "told").open("w")
    os.dup2(told.fileno(), 1)  # libraries talk
    os.dup2(told.fileno(), 2)
    faulthandler.enable(told)
    faulthandler.register(signal.SIGPROF, told, all_threads=False, chain=True)
    note = os.open(directory / "input", os.O_RDWR | os.O_CREAT)
    done = taken = 0
    slowest = 0.0

    def read(random):
        nonlocal done, taken, slowest
        value = parser.make(random)
        text = repr(value).encode(errors="backslashreplace")
        os.pwrite(note, text, 0)
        os.ftruncate(note, len(text))
        began = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        try:
            parser.read(directory / "files", value)
            taken += 1
        except UserError:
            pass
        except BaseException:  # also what Rust panics with; the first one will do, as inputs are small
            traceback.print_exc(file=told)
            told.flush()
            os._exit(1)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        slowest = max(slowest, time.process_time() - began)
        done += 1

    parser.prepare(directory / "files")
    most = _address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    began = time.monotonic()
    while done < inputs:
        settings = hypothesis.settings(
            max_examples=min(inputs - done, _ROUND),
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        run = hypothesis.given(st.randoms(use_true_random=True))(read)
        hypothesis.seed(seed * 1_000_003 + done)(settings(run))()
    seconds, peak = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    told.truncate(0)
    told.seek(0)
    told.write(
        f"{name}: {done:,} inputs, {taken:,} taken, the others refused; {seconds:,.0f} s, "
        f"the slowest {slowest:.2f} s; at most {peak} MiB"
    )
    told.flush()


def _address_space():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
