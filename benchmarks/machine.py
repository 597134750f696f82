"""The machine while a step is measured: seconds of this process and of other work, and the peak of memory."""
import ctypes
import gc
import resource
import time
from pathlib import Path

# a run is disturbed if other work had more processors than OTHERS and fewer than IDLE were idle, or if it has fewer
# CPU seconds a second than this part (USUAL) of the most in a run of the same work
OTHERS, IDLE = 0.1, 0.2
USUAL = 0.9


def cpu_seconds():
    """CPU seconds of this process and its threads, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def machine_seconds():
    """(busy, idle) seconds of all processors since the machine started; what the host gave to others counts as busy."""
    user, nice, system, idle, iowait, irq, softirq, steal = map(
        int, Path('/proc/stat').read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq + steal) / 100, (idle + iowait) / 100


def timed(work, times, wait):
    """Run `work` so many times, then `wait` for what it started: {'wall', 'cpu': seconds of one, 'others', 'idle'}.

    others, idle: processors that other work had, and that nobody had, on average.
    """
    (busy, idle), cpu, start = machine_seconds(), cpu_seconds(), time.perf_counter()
    for _ in range(times):
        work()
    wait()
    wall, cpu, (busy_now, idle_now) = time.perf_counter() - start, cpu_seconds() - cpu, machine_seconds()
    return {'wall': wall / times, 'cpu': cpu / times, 'others': (busy_now - busy - cpu) / wall,
            'idle': (idle_now - idle) / wall}


def mark_disturbed(runs):
    """Say of each of an implementation's runs whether other work disturbed it: run['disturbed'].

    Either others had processors while hardly one was idle, or it got fewer than it uses when it is alone.
    """
    usual = max(run['cpu'] / run['wall'] for run in runs)
    for run in runs:
        run['disturbed'] = (run['others'] > OTHERS and run['idle'] < IDLE) or run['cpu'] / run['wall'] < USUAL * usual


class Memory:
    """Peak bytes above what was held when it was made."""

    def __init__(self, device):
        import torch
        self.device = device
        gc.collect()
        if device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return
        trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
        if trim:  # freed memory from building the network would hide the first step's
            trim(0)
        Path('/proc/self/clear_refs').write_text('5')
        self.start = self._status('VmRSS')

    def peak(self):
        import torch
        return (torch.cuda.max_memory_allocated() if self.device.type == 'cuda' else self._status('VmHWM')) - self.start

    def _status(self, key):
        line = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024
