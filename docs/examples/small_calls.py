"""What a call costs where there is next to nothing to compute, and where that time goes.

calls   µs of a call on small arrays; (2, 1) has nothing to compute, what it takes is the call itself. Beside it the
        barest call of PyTorch for the work, and what stands for it in a network: training recorded for the backward
        (which `batch_norm_train` prepares too), and a layer for a layer
parts   the same µs by module and by function of fastbn: a timer interrupts the running program and notes the function
        it is in, down to a few instructions, without the overhead of a profiler that follows every call. Numba's
        dispatch and the kernel belong to `_threads.run`
idle    µs of a call after 20 ms without any, above one right after another

All in one process, in turn. It takes about half a minute.

    python docs/examples/small_calls.py
"""

import os
import signal
import time
from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np
import report

import fastbn
from fastbn._measure import best_of

SHAPES = ((2, 1), (32, 128), (1, 64, 4, 4))
PARALLEL_SHAPE = (8, 64, 28, 28)
PROFILED = (1, 64, 4, 4)
CALL_GOAL, IDLE_GOAL = 0.3, 300  # times PyTorch; µs
PAUSE = 0.02
PERIOD = 0.001  # seconds between two looks at the running program
PACKAGE = Path(fastbn.__file__).parent
SHOWN = 0.02  # functions with less than this share of every call are added up


# -------------------------------------------------------------------------------------------------------------- calls


def fastbn_calls(shape, out):
    """A dict of fastbn's calls on arrays of one shape, with `out=` or without."""
    x, dy = np.random.default_rng(0).standard_normal((2, *shape), dtype="float32")
    y = np.empty_like(x) if out else None
    gamma, beta = np.ones(shape[1], "float32"), np.zeros(shape[1], "float32")
    _, saved = fastbn.batch_norm_train(x, gamma, beta)
    mean, var = saved.mean.astype("float32"), saved.var.astype("float32")
    training, frozen = fastbn.BatchNorm(shape[1]), fastbn.BatchNorm(shape[1]).eval()
    return {
        "batch_norm_train": lambda: fastbn.batch_norm_train(x, gamma, beta, out=y),
        "batch_norm": lambda: fastbn.batch_norm(x, mean, var, gamma, beta, out=y),
        "batch_norm_backward": lambda: fastbn.batch_norm_backward(dy, saved, out=y),
        "BatchNorm, train": lambda: training(x, out=y),
        "BatchNorm, eval": lambda: frozen(x, out=y),
    }


# PyTorch's barest call for the same work, and what a network has for it.
PEERS = {
    "batch_norm_train": ("train", "train, recorded"),
    "batch_norm": ("eval", "eval"),
    "batch_norm_backward": ("backward", "backward"),
    "BatchNorm, train": ("train", "layer, train"),
    "BatchNorm, eval": ("eval", "layer, eval"),
}


def torch_calls(torch, shape):
    """A dict of PyTorch's calls; those of training that say so record for autograd."""
    x, dy = torch.from_numpy(np.random.default_rng(0).standard_normal((2, *shape), dtype="float32"))
    gamma, beta = torch.ones(shape[1]), torch.zeros(shape[1])
    parameters = [torch.nn.Parameter(p) for p in (gamma, beta)]
    layer = torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d
    training, frozen = layer(shape[1]), layer(shape[1]).eval().requires_grad_(False)
    _, mean, invstd = torch.ops.aten.native_batch_norm.default(x, gamma, beta, None, None, True, 0.1, 1e-5)
    var = invstd**-2 - 1e-5
    backward = torch.ops.aten.native_batch_norm_backward.default
    f = torch.nn.functional.batch_norm
    return {
        "train": lambda: f(x, None, None, gamma, beta, training=True),
        "train, recorded": lambda: f(x, None, None, *parameters, training=True),
        "eval": lambda: f(x, mean, var, gamma, beta),
        "backward": lambda: backward(dy, x, gamma, None, None, mean, invstd, True, 1e-5, [True] * 3),
        "layer, train": lambda: training(x),
        "layer, eval": lambda: frozen(x),
    }


def optional_torch():
    """PyTorch, or None."""
    try:
        import torch
    except ImportError:
        return None
    return torch


def thread_counts():
    """One thread, and all of them."""
    return sorted({1, fastbn.get_num_threads()})


def call_seconds(shape, number, rounds):
    """{(call, how): seconds}: how is "fresh", "out", or a number of PyTorch's threads."""
    torch = optional_torch()

    def repeated(call, threads=None):
        def calls():
            if threads:
                torch.set_num_threads(threads)
            for _ in range(number):
                call()

        return calls

    timed = {
        (what, how): repeated(call)
        for how in ("fresh", "out")
        for what, call in fastbn_calls(shape, how == "out").items()
    }
    if torch:
        for what, call in torch_calls(torch, shape).items():
            timed.update({(what, threads): repeated(call, threads) for threads in thread_counts()})
    return {key: s / number for key, s in best_of(timed, rounds).items()}


def print_calls(timed, markdown):
    """µs of each call, beside PyTorch's; `timed` is {shape: what `call_seconds` found}."""
    counts = thread_counts() if optional_torch() else []
    head = ["call", "fresh, µs", "out=, µs", *(f"PyTorch, {t} thread{'s' if t > 1 else ''}, µs" for t in counts)]
    head += ["fresh / PyTorch", "goal", "PyTorch in a network, µs", "fresh / that"] if counts else []
    for shape, s in timed.items():
        rows = []
        for what, (bare, network) in PEERS.items():
            row = [what, _us(s[what, "fresh"]), _us(s[what, "out"]), *(_us(s[bare, t]) for t in counts)]
            if counts:
                least, usual = (min(s[name, t] for t in counts) for name in (bare, network))
                goal = "" if bare == "backward" else f"{CALL_GOAL:.2f}"
                row += [f"{s[what, 'fresh'] / least:.2f}", goal, _us(usual), f"{s[what, 'fresh'] / usual:.2f}"]
            rows.append(row)
        print(f"{shape} float32{', ratios to the better number of threads' if len(counts) > 1 else ''}:\n")
        report.table(head, rows, markdown)


def _us(seconds):
    return f"{seconds * 1e6:.1f}"


# -------------------------------------------------------------------------------------------------------------- parts


def samples(call, seconds):
    """How often the timer met each function of fastbn while `call` ran again and again; "" is outside of fastbn."""
    met = Counter()
    inside = f"{PACKAGE}{os.sep}"

    def note(_, frame):
        while frame and not frame.f_code.co_filename.startswith(inside):
            frame = frame.f_back
        met[_name(frame.f_code) if frame else ""] += 1

    before = signal.signal(signal.SIGALRM, note)
    signal.setitimer(signal.ITIMER_REAL, PERIOD, PERIOD)
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(100):
                call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return met


def _name(code):
    module = ".".join(Path(code.co_filename).relative_to(PACKAGE).with_suffix("").parts)
    return f"{module}.{code.co_qualname.partition('.<locals>')[0]}"


def print_parts(calls, total, seconds, markdown):
    """Where the µs of `total` go, {call: seconds}, by module and by function."""
    if not hasattr(signal, "setitimer"):
        print("Parts: this system has no timer that interrupts a program.\n")
        return
    functions = {}
    for what, call in calls.items():
        met = samples(call, seconds)
        functions[what] = Counter({name: n / met.total() * total[what] * 1e6 for name, n in met.items()})
    modules = {what: _added(parts, lambda name: name.partition(".")[0]) for what, parts in functions.items()}
    small = {
        name
        for name in set().union(*functions.values())
        if name and all(parts[name] < SHOWN * parts.total() for parts in functions.values())
    }
    functions = {
        what: _added(parts, lambda name: "all others" if name in small else name) for what, parts in functions.items()
    }
    for kind, parts in ("module", modules), ("function", functions):
        print(f"{PROFILED} float32 without out=, µs by {kind}, in itself and in what it calls outside of fastbn:\n")
        names = sum(parts.values(), Counter()).most_common()
        rows = [[name or "outside of fastbn", *(f"{p[name]:.2f}" for p in parts.values())] for name, _ in names]
        rows.append(["the call", *(f"{p.total():.2f}" for p in parts.values())])
        report.table([kind, *parts], rows, markdown)


def _added(parts, name_of):
    """The same µs under coarser names."""
    added = Counter()
    for name, us in parts.items():
        added[name_of(name)] += us
    return added


# --------------------------------------------------------------------------------------------------------------- idle


def idle_seconds(calls, rounds):
    """{call: (hot, after a pause)}: median seconds."""
    found = {}
    for what, call in calls.items():
        hot, idle = [], []
        for _ in range(rounds):
            time.sleep(PAUSE)
            idle.append(_once(call))
            for _ in range(3):
                call()
            hot.append(_once(call))
        found[what] = median(hot), median(idle)
    return found


def _once(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def print_idle(rounds, markdown):
    """What a pause costs the next call."""
    head = ["call", "shape", "hot, µs", f"after {PAUSE * 1e3:.0f} ms, µs", "above hot, µs", "goal"]
    torch = optional_torch()
    rows = []
    for shape in (PROFILED, PARALLEL_SHAPE):
        calls = {what: (call, str(IDLE_GOAL)) for what, call in fastbn_calls(shape, out=True).items()}
        if torch:
            torch.set_num_threads(fastbn.get_num_threads())
            calls.update({f"PyTorch, {what}": (call, "") for what, call in torch_calls(torch, shape).items()})
        found = idle_seconds({what: call for what, (call, _) in calls.items()}, rounds)
        for what, (hot, idle) in found.items():
            us = [f"{s * 1e6:.0f}" for s in (hot, idle, idle - hot)]
            rows.append([what, str(shape), *us, calls[what][1]])
    print(f"A call after {PAUSE * 1e3:.0f} ms of idling (median of {rounds}), out= given:\n")
    report.table(head, rows, markdown)


def main(argv=None):
    """Measure and print."""
    options = report.parser(__doc__).parse_args(argv)
    number, rounds, seconds, pauses = (20, 1, 0.2, 3) if options.quick else (1000, 10, 3, 50)
    timed = {shape: call_seconds(shape, number, rounds) for shape in SHAPES}
    fresh = {what: s for (what, how), s in timed[PROFILED].items() if how == "fresh"}
    print_calls(timed, options.markdown)
    print_parts(fastbn_calls(PROFILED, out=False), fresh, seconds, options.markdown)
    print_idle(pauses, options.markdown)
    print(report.environment())


if __name__ == "__main__":
    main()
