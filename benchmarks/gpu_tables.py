"""Everything that is to be measured on a host with 4 or 8 GPUs, in order of value: one command, which may be cut off.

    python benchmarks/gpu_tables.py runs/h200x8 --budget 25     # starts nothing that does not fit into 25 minutes
    python benchmarks/gpu_tables.py runs/h200x8                 # again: what is done is not run again
    python benchmarks/gpu_tables.py runs/h200x8 --list          # the order; what would be skipped, and why
    python benchmarks/gpu_tables.py runs/rehearsal --cpu        # what has a CPU form, on two ranks, with tiny sizes

DeepEP 2.1, DeepEP 2.5 and HybridEP need an environment each: call it with the interpreter of each, one after the other
and with the same folder. It runs those of `PARTS` that fit the deep_ep that is installed there. The folder gets
`state.json` and, for each environment, NAME.log, written as the part goes on, and NAME.jsonl, an environment header and
rows.

A part that is done runs again after another commit, with another command, on other hardware, or with --again. One that
was interrupted runs again; one that failed, too, after those that did not. One that takes longer than its limit hangs:
its processes write their stacks to the log and are ended, and the next part runs. Exit status 1: a part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = "EP_GPU_TABLES"  # the folder of results, in the environment of all processes that a part starts
GRACE = 10.0  # seconds to end after a signal
CARRIERS = {
    "v2": "DeepEP 2.1 or 2.5",
    "moves experts": "DeepEP 2.5",
    "legacy": "deep_ep's legacy Buffer",
    "hybridep": "HybridEP",
}


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        answers: The question that it answers.
        command: Words as for a shell, with what `Call.command` knows in braces.
        cpu: The same with tiny sizes, for two ranks of the CPU; "" = it has no such form.
        limit: Seconds after which it hangs.
        variables: Environment variables.
        carrier: A key of `CARRIERS` that has to be there; "" = nothing of DeepEP.
        packages: Modules that have to be there on a GPU host.
        ranks: The fewest that it can use.
        times: Its figures are times, which mean nothing where ranks share a GPU.
        megatron_lm: It runs in the folder of --megatron-lm.
    """

    name: str
    answers: str
    command: str
    cpu: str = ""
    limit: float = 300
    variables: dict[str, str] = field(default_factory=dict)
    carrier: str = "v2"
    packages: tuple[str, ...] = ()
    ranks: int = 2
    times: bool = False
    megatron_lm: bool = False


def gpu_tests(name: str, answers: str, tests: str, **more: Any) -> Part:
    """Of tests/gpu. On the CPU they are collected and skipped."""
    command = "{python} -m pytest -m gpu -s -p no:cacheprovider " + tests.replace("test_", "tests/gpu/test_")
    return Part(name, answers, command, command, packages=("pytest",), **more)


BENCH = "{python} -m megatron_ep_v2 bench --ranks {ranks} --out {rows} "
SHAPES = {"30b": "qwen3-30b-a3b", "v3": "deepseek-v3", "235b": "qwen3-235b-a22b"}
LAYERS = BENCH + "--tokens 4096 --repeats 12 --shapes "
STEPS = BENCH + "--step --tokens 4096 --repeats 12 --shapes "
# As many layers, and of DeepSeek-V3 experts, as leave room on two GPUs.
MODELS = {
    "30b": "qwen3-30b-a3b --layers 4",
    "235b": "qwen3-235b-a22b --layers 2",
    "v3": "deepseek-v3 --layers 2 --experts-per-rank 32",
}
TINY = BENCH + "--shapes custom --hidden 256 --experts 8 --topk 3 --tokens 64 --repeats 2 "
TINY_STEPS = TINY + "--step --expert-ffn 64 --layers 1 "
OVERLAP = BENCH + "--tune --overlap --shapes deepseek-v3 --experts-per-rank 32 --layers 2 --repeats 12 --no-optimizer "
OVERLAP += "--variants {ours}expanded --expert-backends grouped "
SOAK = "{python} benchmarks/gpu_soak.py --ranks {ranks} --out {rows} "
TRAIN = "{python} -m megatron_ep_v2 train --nproc {ranks} --out {out} --eval-every 0 "
# As the lab notebook's on 4 GPUs.
REDUCED = TRAIN + "--preset 30b-a3b --num-layers 12 --steps 100 --seq-length 2048 --global-batch-size {ranks} "
REDUCED += "--no-recompute --max-data-mb 32 "
FEW_STEPS = TRAIN + "--device cpu --steps 3 --max-data-mb 1 --eval-samples 4 "
PLOT = "{python} benchmarks/compare_training.py {runs} --caption '{machine}' --out {rows}"
DOCTOR = "{python} -m megatron_ep_v2 doctor --ranks {ranks}"
MEGATRONS = "{python} -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node {ranks} "
MEGATRONS += "-m megatron_ep_v2 run -m pytest -p no:cacheprovider -k 'TestFlexDispatcher and deepep' "
MEGATRONS += "tests/unit_tests/transformer/moe/test_token_dispatcher.py"

MODEL: dict[str, Any] = {"times": True, "packages": ("transformer_engine",)}
QUEUES = MODEL | {"variables": {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}}
TRAINING: dict[str, Any] = {"packages": ("matplotlib", "tqdm"), "variables": {"TORCHDYNAMO_DISABLE": "1"}}
STALLS: dict[str, Any] = {
    "variables": {"MCORE_DEEPEP_V2_TEST_ROUNDS": "20", "MCORE_DEEPEP_V2_TEST_FRESH_ROUNDS": "20"},
    "limit": 540,
}

# fmt: off
PARTS = [
    Part("doctor", "Is this environment usable? With a dispatch on every rank", DOCTOR, DOCTOR, carrier=""),
    *(Part(f"dispatchers-{short}", f"How far is expanded from its raw calls, at {shape}?",
           LAYERS + shape + " --sms 0,24,32 --variants alltoall+fused-permute raw-{ours}expanded {ours}expanded",
           TINY + "--variants alltoall raw-{ours}expanded {ours}expanded" if short == "30b" else "", times=True)
      for short, shape in SHAPES.items()),
    *(Part(f"hybridep-{short}", "HybridEP; alltoall is the row in common with `dispatchers`",
           LAYERS + shape + " --sms 0,24,32 --variants alltoall+fused-permute hybridep hybridep+fused-permute "
           "hybridep+permute-inside", times=True, carrier="hybridep")
      for short, shape in SHAPES.items()),
    *(Part(f"step-{short}", "Whole steps: alltoall, expanded, sync-free, in a CUDA graph; two kinds of experts",
           STEPS + model + " --variants alltoall+fused-permute {ours}expanded {ours}sync-free {ours}sync-free+graph",
           TINY_STEPS + "--variants alltoall {ours}expanded {ours}sync-free" if short == "30b" else "", **MODEL)
      for short, model in MODELS.items()),
    *(Part(f"overlap-{tokens}", "V3-like layers: shared experts next to communication; without, with, calls started",
           OVERLAP + f"--tokens {tokens} --sms 0,24,32", **QUEUES)
      for tokens in (16384, 4096)),
    Part("overlap-1-queue", "The same where all streams share one hardware queue",
         OVERLAP + "--tokens 16384", **MODEL | {"variables": {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}}),
    *(Part(f"overload-{short}", "What one rank's overload costs, and what redundant experts bring back of it",
           STEPS + MODELS[short] + " --experts-per-rank 16 --variants {ours}expanded --expert-backends grouped "
           "--overload 1.0 1.2 1.5 2.0 --redundant-experts 1 2 8",
           TINY_STEPS + "--variants {ours}expanded --expert-backends grouped --overload 1.0 1.5 --redundant-experts 1"
           if short == "30b" else "", carrier="moves experts", limit=420, **MODEL)
      for short in ("30b", "235b")),
    gpu_tests("conformance", "All buffers, on all ranks and on fewer", "test_buffers.py test_fused.py"),
    gpu_tests("lifecycle", "Rounds of create and destroy, mismatches, ranks that fail", "test_lifecycle.py"),
    Part("megatron-tests", "Megatron's own TestFlexDispatcher, each pair of tensor and expert parallelism",
         MEGATRONS, packages=("pytest", "transformer_engine"), ranks=8, megatron_lm=True),
    Part("soak", "Memory and compiled kernels over 1,000 uneven steps", SOAK, SOAK + "--cpu"),
    Part("train-expanded", "100 steps of the reduced 30B: expanded",
         REDUCED + "--layout expanded", FEW_STEPS + "--layout expanded", **TRAINING),
    Part("train-alltoall", "The same with Megatron's alltoall dispatcher",
         REDUCED + "--dispatcher alltoall --permute-fusion", FEW_STEPS + "--dispatcher alltoall", **TRAINING),
    Part("train-legacy", "The same on the legacy Buffer",
         REDUCED + "--buffer legacy --permute-fusion", carrier="legacy", **TRAINING),
    Part("train-plot", "The losses of these runs, of all environments, in one plot",
         PLOT, PLOT, carrier="", packages=("matplotlib",)),
    *(Part(f"all-{short}", "Every dispatcher that is installed",
           LAYERS + shape, TINY if short == "30b" else "", times=True)
      for short, shape in SHAPES.items()),
    gpu_tests("stalls", "The watchdog names a late rank, 20 of 20 times", "test_stalls.py -k late_rank", **STALLS),
    gpu_tests("stalls-fresh", "Ranks that exit or go another way, 20 of 20 times in new processes",
              "test_stalls.py -k 'not late_rank'", **STALLS),
    Part("step-deep", "Whole steps of as many layers as fit",
         STEPS + "qwen3-30b-a3b --variants alltoall+fused-permute {ours}expanded", limit=420, **MODEL),
    gpu_tests("plan", "Megatron's 1F1B plan: training as without it, also where a stream is late", "test_plan_gpu.py",
              limit=420),
    Part("overlap-1f1b", "Micro-batches next to each other by Megatron's 1F1B plan",
         "{python} benchmarks/gpu_overlap.py --ranks {ranks} --out {rows} --experts grouped --tokens 16384", **QUEUES),
    gpu_tests("started", "Calls that are started and finished later", "test_started_gpu.py"),
    gpu_tests("step-graph", "The example's step in a CUDA graph, bit for bit", "test_step_graph.py"),
    gpu_tests("graphs", "Megatron's CUDA graphs, sync-free layers in one", "test_megatron_graphs.py test_sync_free.py"),
    gpu_tests("layers", "Each feature next to alltoall, redundant experts, recomputation, repeats bit by bit, fp8",
              "test_moe_layer_gpu.py test_redundant_gpu.py test_recompute.py test_deterministic.py test_fp8.py"),
]
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Here:
    """This environment and its hardware.

    Attributes:
        name: Of its folder.
        header: The environment header of rows.
        ranks, gpus: Ranks that the GPUs hold, and GPUs; on the CPU 2 and 0.
        carriers: Those of `CARRIERS` that are installed; on the CPU those that the reference stands in for.
        ours: Goes before a layout in the names of the bench's variants.
        packages: Modules that are there, of those that parts need.
    """

    name: str
    header: dict[str, Any]
    ranks: int
    gpus: int
    carriers: Sequence[str]
    ours: str
    packages: Sequence[str]

    @property
    def machine(self) -> str:
        names = ("driver", "torch", "nccl", "deep_ep", "megatron_core", "transformer_engine")
        versions = (f"{name} {self.header[name]}" for name in names if self.header.get(name))
        return ", ".join([str(self.header.get("gpu") or self.header.get("cpu")), *versions])


LOOK = """
import importlib.util, json, sys
import torch
from megatron_ep_v2.bench import report
from megatron_ep_v2.buffers.carriers import CARRIERS, REFERENCE
from megatron_ep_v2.gpus import gpu_ranks
from megatron_ep_v2.probe import probe

found, gpus = probe(), torch.cuda.device_count() if torch.cuda.is_available() else 0
hybridep = hasattr(sys.modules.get("deep_ep"), "HybridEPBuffer")
ours = CARRIERS[gpus and found.v2_carrier or REFERENCE]
has = {"v2": found.v2_carrier or not gpus, "legacy": found.v2_carrier and found.have_deep_ep, "hybridep": hybridep}
has["moves experts"] = ours.moves_experts and (found.v2_carrier or not gpus)
name = f"deepep-{ours.generation}" if ours.is_v2 else "hybridep" if hybridep else "without-deepep"
print(json.dumps({
    "name": name if gpus else "cpu", "header": report.environment(""), "ranks": gpu_ranks() if gpus else 2,
    "gpus": gpus, "carriers": [each for each in has if has[each]], "ours": ours.row_prefix,
    "packages": [each for each in sys.argv[1:] if importlib.util.find_spec(each)],
}))
"""


def look(parts: Sequence[Part], cpu: bool) -> Here:
    """In a process of its own: this one imports nothing, and holds no GPU."""
    packages = sorted({package for part in parts for package in part.packages})
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if cpu else {}
    command = [sys.executable, "-c", LOOK, *packages]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | hidden, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(2)
    here = Here(**json.loads(done.stdout.splitlines()[-1]))
    if not here.gpus and not cpu:
        sys.exit("error: this measures GPUs, and there are none here\n  fix: --cpu rehearses it")
    return here


def sources(commit: str) -> str:
    """The commit; where the tree differs from it, or there is no repository, with a digest of the sources."""
    if (ROOT / ".git").exists() and not commit.endswith("-dirty"):
        return commit
    folders = ("megatron_ep_v2", "benchmarks", "examples", "tests")
    files = sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return f"{commit}+{hashlib.sha1(b''.join(file.read_bytes() for file in files)).hexdigest()[:8]}"


class Call:
    """One call of this script.

    Attributes:
        folder: Of results, as seen from ROOT.
        state: By "environment/part": status, command, commit, machine, seconds, and the usual ones: those when it was
            last done.
        outcomes: (status, part, seconds or None, why) of each part so far.
    """

    def __init__(self, parts: Sequence[Part], here: Here, options: argparse.Namespace):
        self.here, self.options, self.commit = here, options, sources(here.header["commit"])
        self.ranks = options.ranks or here.ranks
        folder = options.results.resolve()
        self.folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
        self.mark, self._file = f"{MARK}={folder}", folder / "state.json"
        self.state: dict[str, dict[str, Any]] = {}
        if self._file.exists():
            self.state = json.loads(self._file.read_text())
        self.parts = sorted(parts, key=lambda part: self._is("failed", part))
        self.deadline = time.monotonic() + 60 * options.budget
        self.outcomes: list[tuple[str, str, float | None, str]] = []

    def _entry(self, part: Part) -> dict[str, Any]:
        return self.state.setdefault(f"{self.here.name}/{part.name}", {})

    def _path(self, part: Part, suffix: str) -> Path:
        return self.folder / self.here.name / f"{part.name}{suffix}"

    def _runs(self) -> list[str]:
        """NAME=FOLDER of all training that is done; that on the CPU and that on GPUs apart."""
        return [
            f"{key.replace('train-', '')}={self.folder / key}"
            for key, entry in self.state.items()
            if "/train-" in key and not key.endswith("-plot") and entry.get("status") == "done"
            if key.startswith("cpu/") == (self.here.gpus == 0)
        ]

    def command(self, part: Part) -> list[str]:
        """The words of a part's command."""
        words = {"python": sys.executable, "ranks": self.ranks, "ours": self.here.ours}
        words |= {"rows": self._path(part, ".jsonl"), "out": self._path(part, "")}
        words |= {"machine": f"{self.here.machine}, {self.commit}"}
        command: list[str] = []
        for word in shlex.split(part.command if self.here.gpus else part.cpu):
            command += self._runs() if word == "{runs}" else [word.format(**words)]
        return command

    def _identity(self, part: Part) -> dict[str, str]:
        """What has to be equal for a run to be the same as another."""
        variables = [f"{name}={value}" for name, value in part.variables.items()]
        words = ["python" if word == sys.executable else word for word in self.command(part)]
        return {"command": shlex.join([*variables, *words]), "commit": self.commit, "machine": self.here.machine}

    def _is(self, status: str, part: Part) -> bool:
        return (self._identity(part) | {"status": status}).items() <= self._entry(part).items()

    def reason_to_skip(self, part: Part) -> str:
        """Empty where it runs."""
        here, entry, left = self.here, self._entry(part), self.deadline - time.monotonic()
        missing = [package for package in part.packages if package not in here.packages]
        usual = entry.get("usual", part.limit)
        if not here.gpus and not part.cpu:
            return "has no CPU form"
        if part.carrier and part.carrier not in here.carriers:
            return f"needs {CARRIERS[part.carrier]}; here: {here.header.get('deep_ep')}"
        if missing and here.gpus:
            return f"needs {' and '.join(missing)}"
        if self.ranks < part.ranks:
            return f"needs {part.ranks} ranks; here: {self.ranks}"
        if part.times and self.ranks > here.gpus > 0 and not self.options.share:
            return "ranks share a GPU, and times mean nothing (--share: run it all the same)"
        if part.megatron_lm and not (self.options.megatron_lm and (self.options.megatron_lm / "tests").is_dir()):
            return "needs --megatron-lm FOLDER, a source tree of Megatron-LM"
        if "{runs}" in part.command and not self._runs():
            return "needs a run of train-expanded or another, and none is done"
        if self._is("done", part) and part.name not in self.options.again:
            return f"done at {entry['commit']} in {entry['seconds']} s"
        return f"takes {usual:.0f} s, and {left:.0f} s of the budget are left" if usual > left else ""

    def run(self) -> None:
        for part in self.parts:
            if why := self.reason_to_skip(part):
                self.outcomes.append(("skipped", part.name, None, why))
                continue
            print(f"{part.name}: at most {part.limit:.0f} s; {self._path(part, '.log')}", flush=True)
            entry, start = self._entry(part), time.monotonic()
            status, why = "interrupted", "runs again in the next call"
            entry |= self._identity(part) | {"status": status}
            self._save()
            try:
                status, why = self._run(part)
            finally:
                seconds = round(time.monotonic() - start, 1)
                entry |= {"status": status, "seconds": seconds, **({"usual": seconds} if status == "done" else {})}
                self._save()
                self.outcomes.append((status, part.name, seconds, why))
            rows = ROOT / self._path(part, ".jsonl")
            if not rows.exists():  # the command writes none
                header = self.here.header | {"command": entry["command"], "commit": self.commit}
                row = {"part": part.name, "status": status, "seconds": seconds, "says": why}
                rows.write_text(f"{json.dumps(header)}\n{json.dumps(row)}\n")
            print(f"    {status} in {seconds} s", flush=True)

    def _save(self) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(self.state, indent=1))
        new.replace(self._file)

    def _run(self, part: Part) -> tuple[str, str]:
        """Status, and what to say of it."""
        log, rows = ROOT / self._path(part, ".log"), ROOT / self._path(part, ".jsonl")
        log.parent.mkdir(parents=True, exist_ok=True)
        if rows.exists():  # no row of another run may stand for this one
            rows.replace(rows.with_suffix(".before.jsonl"))
        # Environments have different versions of torch: no compiled kernel of one for another.
        caches = Path.home() / ".cache" / "gpu_tables" / self.here.name
        variables = {"TRITON_CACHE_DIR": f"{caches}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}
        variables |= {"EP_JIT_CACHE_DIR": f"{caches}/deep_ep"} | os.environ | part.variables
        variables |= {"NO_VCS_VERSION": "1", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        variables |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
        variables |= {} if self.here.gpus else {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        name, _, value = self.mark.partition("=")
        variables[name] = value
        where = self.options.megatron_lm if part.megatron_lm else ROOT
        with log.open("w") as output:
            output.write(f"$ {self._entry(part)['command']}\n")
            output.flush()
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(self.command(part), cwd=where, env=variables, **streams)
            hangs = False
            try:
                process.wait(part.limit)
            except subprocess.TimeoutExpired:
                hangs = True  # Python's fault handler writes the stacks when it is aborted
            finally:
                end(self.mark, signal.SIGABRT if hangs else signal.SIGTERM, signal.SIGKILL)
                process.wait()
        lines = [line.strip(" =")[:200] for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if hangs:
            return "failed", f"hangs: it takes longer than {part.limit:.0f} s; the stacks are in {log}"
        if process.returncode:
            return "failed", "\n".join([f"exit status {process.returncode}; {log}", *lines[-6:]])
        if self.here.gpus and "pytest" in part.packages and not any(" passed" in line for line in lines):
            return "failed", f"no test has run; {log}"
        return "done", "" if lines[-1].startswith("{") else lines[-1]

    def summary(self) -> str:
        lines = []
        for status in ("done", "skipped", "interrupted", "failed"):
            for _, name, seconds, why in (each for each in self.outcomes if each[0] == status):
                says = why.replace("\n", "\n    | ")
                lines.append(f"{status:<12} {name:<16} {'' if seconds is None else f'{seconds:.0f} s':>6}  {says}")
        return "\n".join(lines)

    def listing(self) -> str:
        lines = [f"{self.here.name}: {self.here.machine}, {self.ranks} ranks, {self.commit}"]
        for part in self.parts:
            usual = self._entry(part).get("usual")
            time_needed = f"{usual:.0f} s the last time" if usual else f"at most {part.limit:.0f} s"
            lines += [
                f"{part.name:<17}{part.answers}",
                f"{'':<17}{self.reason_to_skip(part) or f'runs, {time_needed}'}",
            ]
        return "\n".join(lines)


def marked(mark: str) -> set[int]:
    """Processes that were started with `NAME=VALUE` in their environment, in whatever session."""
    pids = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes().split(b"\0"):
                pids.add(int(path.parent.name))
    return pids


def end(mark: str, *signals: int) -> None:
    """Send signals to all marked processes, each GRACE seconds after the one before, as long as one runs."""
    for number in signals:
        deadline, sent = time.monotonic() + GRACE, set[int]()
        while (running := marked(mark)) and time.monotonic() < deadline:
            for pid in running - sent:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            sent |= running
            time.sleep(0.05)


def prepare() -> None:
    """This process: signals end it as Ctrl-C does, and an aborted rank leaves its stacks, but no core file."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def main(
    parts: Sequence[Part] = PARTS,
    look: Callable[[Sequence[Part], bool], Here] = look,
    arguments: Sequence[str] | None = None,
) -> int:
    """The exit status."""
    names = [part.name for part in parts]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder; with the same one, what is done is not run again")
    parser.add_argument("--list", action="store_true", help="print the order, and run nothing")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="run no others")
    parser.add_argument("--again", nargs="+", choices=names, default=[], metavar="NAME", help="though they are done")
    parser.add_argument("--budget", type=float, default=1e6, metavar="MINUTES", help="start no part that needs longer")
    parser.add_argument("--ranks", type=int, metavar="N", help="default one per GPU, or 2 on the CPU")
    parser.add_argument("--share", action="store_true", help="measure times though ranks share a GPU: a rehearsal")
    parser.add_argument("--cpu", action="store_true", help="a rehearsal on the CPU: no figures")
    parser.add_argument("--megatron-lm", type=Path, metavar="FOLDER", help="source tree, for its own tests")
    options = parser.parse_args(arguments)
    here = look(parts, options.cpu)
    options.results.mkdir(parents=True, exist_ok=True)
    with (options.results / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"error: another call works in {options.results}\n  fix: wait for it, or name another folder")
        call = Call([part for part in parts if part.name in options.only], here, options)
        if options.list:
            print(call.listing())
            return 0
        end(call.mark, signal.SIGTERM, signal.SIGKILL)  # what a call that was killed has left
        try:
            call.run()
        except KeyboardInterrupt:
            return 130
        finally:
            print(f"\n{call.summary()}", flush=True)
    return int(any(status == "failed" for status, *_ in call.outcomes))


if __name__ == "__main__":
    prepare()
    sys.exit(main())
