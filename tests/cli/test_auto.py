"""`megatron_ep_v2.auto`, and `python -m megatron_ep_v2 auto enable|disable|status`: processes that bind Megatron by
themselves. This is about how interpreters start and import, so most of them are real ones; with an empty Megatron where
Megatron's own, which takes seconds to import, adds nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_ep_v2 import settings
from megatron_ep_v2.cli import auto as command
from megatron_ep_v2.errors import SettingsError
from megatron_ep_v2.megatron.symbols import TOKEN_DISPATCHER
from tests.helpers.commands import python
from tests.helpers.harness import HANG
from tests.helpers.paths import ROOT

LAYER = "megatron.core.transformer.moe.moe_layer"


def start(*arguments: str, interpreter: Path | str = sys.executable, **variables: str) -> subprocess.Popen[str]:
    """A new interpreter with the suite's settings, on the CPU; it finds nothing but what its site-packages have."""
    environment = {name: value for name, value in os.environ.items() if name not in (settings.AUTO, "PYTHONPATH")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(interpreter), "-W", "ignore", *arguments], env=environment, cwd="/", **pipes)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """(status, stdout, stderr)."""
    try:
        stdout, stderr = process.communicate(timeout=HANG)
    finally:
        process.kill()
    return process.returncode, stdout, stderr


def run(*arguments: str, **more: Any) -> tuple[int, str, str]:
    return finish(start(*arguments, **more))


def last_json(done: tuple[int, str, str]) -> Any:
    status, stdout, stderr = done
    assert status == 0, stderr
    return json.loads(stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------- the hook of the import

# A Megatron: what each module does when it is executed.
MEGATRON = {
    "megatron/core/__init__.py": "from megatron.core import parallel_state",
    "megatron/core/parallel_state.py": "",
    "megatron/core/optimizer.py": "",
    "megatron/core/transformer/__init__.py": "",
    "megatron/core/transformer/moe/__init__.py": "",
    "megatron/core/transformer/moe/token_dispatcher.py": "loaders = __loader__, __spec__.loader",
    "megatron/core/transformer/moe/moe_layer.py": (
        "from megatron.core.transformer.moe import token_dispatcher\nimport witness\n"
        "witness.seen('in moe_layer')\nif witness.broken: raise ImportError(witness.broken)\nMoELayer = 'whole'"
    ),
}
# Instead of megatron_ep_v2.megatron.binding, which imports torch.
WITNESS = """
import sys, types
import megatron_ep_v2.megatron
from megatron_ep_v2.errors import SettingsError

MOE = "megatron.core.transformer.moe"
events, broken, refused = [], "", ""
seen = events.append

def install_automatically(by, executed):
    if MOE + ".moe_layer" in sys.modules:  # as install() imports what it binds
        from megatron.core.transformer.moe.moe_layer import MoELayer
    import megatron.core.parallel_state, megatron.core.optimizer
    if refused:
        raise SettingsError(refused, fix="correct it")
    events.append("install")

binding = types.ModuleType("megatron_ep_v2.megatron.binding")
binding.install_automatically = install_automatically
sys.modules[binding.__name__] = megatron_ep_v2.megatron.binding = binding
"""


@pytest.fixture
def hooked(tmp_path: Path) -> Any:
    """Run a script with that Megatron; what it leaves in `result`."""
    for name, text in {**MEGATRON, "witness.py": WITNESS}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def script(source: str) -> Any:
        head = "import importlib, importlib.util, json, sys\nimport witness\nfrom witness import MOE, events\n"
        (tmp_path / "script.py").write_text(f"{head}{source}\nprint(json.dumps(result))\n")
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        return last_json(run(str(tmp_path / "script.py"), PYTHONPATH=path))

    return script


def test_it_binds_when_the_outermost_import_has_ended(hooked: Any) -> None:
    """Not before, where moe_layer is half executed; and loaders are the modules' own again."""
    source = """
import megatron_ep_v2.auto
import megatron.core
events.append("megatron.core")
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe import token_dispatcher
events.append("imported")
importlib.reload(megatron_ep_v2.auto)
hooks = [type(finder).__module__ for finder in sys.meta_path].count("megatron_ep_v2.auto")
loaders = [*token_dispatcher.loaders, token_dispatcher.__loader__, token_dispatcher.__spec__.loader]
result = [events, hooks, sorted({type(loader).__name__ for loader in loaders}), "torch" in sys.modules]
"""
    events = ["megatron.core", "in moe_layer", "install", "imported", "install"]  # the last one from auto's reload
    assert hooked(source) == [events, 1, ["SourceFileLoader"], False]


def test_it_binds_at_once_where_megatron_is_there(hooked: Any) -> None:
    source = "import megatron.core.transformer.moe.moe_layer\nimport megatron_ep_v2.auto\nresult = events"
    assert hooked(source) == ["in moe_layer", "install"]


def test_probes_and_copies_do_not_bind(hooked: Any) -> None:
    source = """
import megatron_ep_v2.auto
spec = importlib.util.find_spec(MOE + ".token_dispatcher")
spec.loader.exec_module(importlib.util.module_from_spec(spec))
assert spec.loader.get_code(spec.name)
assert importlib.util.find_spec("megatron") and importlib.util.find_spec(MOE + ".nothing") is None
result = [list(events), spec.name in sys.modules]
import megatron.core.transformer.moe.token_dispatcher
result.append(events)
"""
    assert hooked(source) == [[], False, ["install"]]


# As wrapt's and others': it asks the finders, in one of two ways, and wraps the loader that it gets.
ANOTHER_HOOK = """
class Loader:
    def __init__(self, loader):
        self.loader = loader
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        self.loader.exec_module(module)
        if "other" not in events:
            events.append("other")

class Finder:
    busy = False
    def find_spec(self, name, path=None, target=None):
        if name != MOE + ".token_dispatcher" or self.busy:
            return None
        {find}
        spec.loader = Loader(spec.loader)
        return spec

sys.meta_path.insert(0, Finder())
"""
WAYS = {
    "all of them": "self.busy = True; spec = importlib.util.find_spec(name); self.busy = False",
    "the others": "spec = next(filter(None, (f.find_spec(name, path) for f in sys.meta_path if f is not self)))",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_hooks_of_others_work_too(hooked: Any, first: str, way: str) -> None:
    hooks = ["import megatron_ep_v2.auto", ANOTHER_HOOK.format(find=WAYS[way])]
    source = "\n".join(hooks if first == "ours" else reversed(hooks))
    source += "\nimport megatron.core.transformer.moe.moe_layer\nresult = events"
    assert hooked(source) == ["other", "in moe_layer", "install"]


def test_a_lazy_module_is_bound_when_it_is_executed(hooked: Any) -> None:
    source = """
import megatron_ep_v2.auto
spec = importlib.util.find_spec(MOE + ".token_dispatcher")
spec.loader = importlib.util.LazyLoader(spec.loader)
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
result = [list(events), len(module.loaders), events]
"""
    assert hooked(source) == [[], 2, ["install"]]


def test_a_reload_is_reported_by_name(hooked: Any) -> None:
    source = """
import megatron_ep_v2.auto
witness.binding.install_automatically = lambda by, executed: events.append([by, *executed])
import megatron.core.transformer.moe.moe_layer
from megatron.core.transformer.moe import token_dispatcher
importlib.reload(token_dispatcher)
result = events[1:]
"""
    by = "import megatron_ep_v2.auto"
    assert hooked(source) == [[by, TOKEN_DISPATCHER, LAYER], [by, TOKEN_DISPATCHER]]


def test_an_error_comes_out_of_the_import_and_comes_again(hooked: Any) -> None:
    """Never as an ImportError: frameworks catch those and go on without what could not be imported."""
    source = """
import megatron_ep_v2.auto

def importing(name):
    try:
        importlib.import_module(name)
    except Exception as error:
        return [type(error).__name__, str(error)]

def missing(by, executed):
    import megatron_ep_v2.nothing

LAYER = MOE + ".moe_layer"
witness.broken = "Megatron's own"
result = [importing(LAYER)]
witness.broken, witness.refused = "", "refused"
result += [importing(LAYER), importing(LAYER), importing("megatron.core.optimizer")]
del sys.modules["megatron_ep_v2.auto"]
result += [importing("megatron_ep_v2.auto"), importing("megatron_ep_v2.auto")]
witness.binding.install_automatically = missing
result.append(importing(LAYER)[0])
witness.refused, witness.binding.install_automatically = "", witness.install_automatically
result.append(importing(LAYER))
"""
    refused = ["SettingsError", "refused\n  fix: correct it"]
    theirs, *ours = hooked(source)
    assert theirs == ["ImportError", "Megatron's own"]
    # The optimizer's module was imported before, as part of what was refused: its import is not seen.
    assert ours == [refused, refused, None, refused, refused, "UnavailableError", None]


def test_children_threads_and_an_import_that_has_begun(hooked: Any) -> None:
    source = """
import concurrent.futures, multiprocessing
import megatron_ep_v2.auto

def child(queue):
    import megatron.core.transformer.moe.moe_layer
    queue.put(list(events))

result = []
if __name__ == "__main__":
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        result.append(queue.get())
        process.join()
    import megatron.core.transformer.moe  # Python itself may refuse to import a package and a module of it at one time
    sys.setswitchinterval(1e-4)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(importlib.import_module, [MOE + ".moe_layer", "megatron.core.optimizer"] * 4))
    result.append("install" in events)
    SeamError = megatron_ep_v2.auto.SeamError
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "megatron_ep_v2.auto"]
    for name in ("megatron_ep_v2.auto", MOE + ".moe_layer"):
        del sys.modules[name]
    witness.seen = lambda event: importlib.import_module("megatron_ep_v2.auto")
    try:
        importlib.import_module(MOE + ".moe_layer")
    except SeamError as error:
        result.append(error.found)
"""
    bound = ["in moe_layer", "install"]
    assert hooked(source) == [bound, bound, True, f"{LAYER} has not been executed to its end"]


# ------------------------------------------------------------------------------------ with Megatron: the script decides

STATE = """
import importlib, json, sys
import megatron_ep_v2
from megatron_ep_v2.errors import EPError

def auto():
    import megatron_ep_v2.auto
    importlib.reload(megatron_ep_v2.auto)

def refusal(function, *arguments, **more):
    try:
        function(*arguments, **more)
    except EPError as error:
        return [type(error).__name__, *getattr(error, "__notes__", [])]

def state():
    from megatron.core.transformer.moe import token_dispatcher
    status = megatron_ep_v2.status()
    owner = token_dispatcher._DeepepManager.__module__.partition(".")[0]
    return [status.get("installed_by"), status.get("layout"), owner]
"""
AUTO, OURS = "import megatron_ep_v2.auto", "megatron_ep_v2"
BOUND, SCRIPTS, STOCK = [AUTO, "expanded", OURS], ["install()", "compact", OURS], [None, None, "megatron"]
DECISIONS = {
    "install() afterwards": ("auto(); seen += [state()]; install(layout='compact')", [BOUND, SCRIPTS]),
    "install() before": ("install(layout='compact'); auto()", [SCRIPTS]),
    "uninstall() afterwards": ("auto(); megatron_ep_v2.uninstall(); auto()", [STOCK]),
    "uninstall() before": ("megatron_ep_v2.uninstall(); auto()", [STOCK]),
    "install() that failed": ("refusal(install, layout='sorted'); auto()", [STOCK]),
    "a reload": ("auto(); importlib.reload(dispatcher); importlib.reload(dispatcher)", [BOUND]),
    "a reload after install()": ("auto(); install(); importlib.reload(dispatcher)", [[AUTO, "expanded", "megatron"]]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DECISIONS)
def test_the_script_decides(name: str, tmp_path: Path) -> None:
    body, expected = DECISIONS[name]
    names = "from megatron.core.transformer.moe import token_dispatcher as dispatcher\ninstall = megatron_ep_v2.install"
    end = "print(json.dumps([*seen, state()]))"
    (tmp_path / "script.py").write_text("\n".join([STATE, names, "seen = []", body, end]))
    done = python("script.py", cwd=tmp_path, **{settings.AUTO: "1"})
    assert last_json((done.returncode, done.stdout, done.stderr)) == expected


def test_what_install_refuses_comes_out_of_the_import(tmp_path: Path) -> None:
    """Each time; Megatron is untouched. A value of the variable that is neither on nor off is refused like others."""
    body = "from megatron.core.transformer.moe import token_dispatcher\n"
    body += "print(json.dumps([refusal(auto), refusal(auto), token_dispatcher._DeepepManager.__module__]))"
    (tmp_path / "script.py").write_text(STATE + body)
    notes = [f"  install() was called by {AUTO}"] if sys.version_info >= (3, 11) else []
    for variables in ({"MCORE_DEEPEP_V2_LAYOUT": "sorted"}, {settings.AUTO: "yes"}):
        done = python("script.py", cwd=tmp_path, **variables)
        refused = ["SettingsError", *notes]
        assert last_json((done.returncode, done.stdout, done.stderr)) == [refused, refused, TOKEN_DISPATCHER]


@pytest.mark.slow
def test_an_install_that_imports_megatron_itself_is_not_interrupted() -> None:
    """Its arguments count, and what it binds over is Megatron's: uninstall() gives that back."""
    body = "auto(); megatron_ep_v2.install(layout='compact'); seen = [state()]; megatron_ep_v2.uninstall()"
    assert last_json(run("-c", f"{STATE}{body}\nprint(json.dumps([*seen, state()]))", PYTHONPATH=str(ROOT))) == [
        SCRIPTS,
        STOCK,
    ]


# -------------------------------------------------------------------------------------- an environment of its own


@pytest.fixture
def environment(tmp_path: Path) -> tuple[Path, Path]:
    """A virtual environment with this package and what is installed here: (its Python, its site-packages)."""
    venv.create(tmp_path / "venv", symlinks=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    installed = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    (packages / "installed.pth").write_text("\n".join(installed))
    (packages / "_source.pth").write_text(str(ROOT))
    return tmp_path / "venv" / "bin" / "python", packages


def ep(interpreter: Path, *arguments: str, **variables: str) -> tuple[int, str, str]:
    return run("-m", "megatron_ep_v2", *arguments, interpreter=interpreter, **variables)


NAMES = (
    "import sys; print([n for n in ('megatron_ep_v2', 'megatron_ep_v2.auto', 'torch', 'megatron') if n in sys.modules])"
)


def test_what_a_start_imports(environment: tuple[Path, Path]) -> None:
    """Nothing, where the variable is off; never torch. A wrong value counts as on, so that `install()` refuses it."""
    interpreter, _ = environment
    assert ep(interpreter, "auto", "enable")[0] == 0
    nothing = [{}, {settings.AUTO: ""}, {settings.AUTO: "0"}, {settings.AUTO: " Off "}, {settings.AUTO: "false"}]
    for variables in nothing:
        assert run("-c", NAMES, interpreter=interpreter, **variables) == (0, "[]\n", "")
    for value in ("1", " true", "ON", "yes"):
        done = run("-c", NAMES, interpreter=interpreter, **{settings.AUTO: value})
        assert done == (0, "['megatron_ep_v2', 'megatron_ep_v2.auto']\n", "")
    on = {settings.AUTO: "1", "interpreter": str(interpreter)}
    assert run("-I", "-c", NAMES, **on)[1] == "['megatron_ep_v2', 'megatron_ep_v2.auto']\n"
    assert run("-S", "-c", NAMES, **on)[1] == "[]\n"


def test_status_and_every_trace(environment: tuple[Path, Path]) -> None:
    interpreter, packages = environment
    before = sorted(packages.iterdir())
    off, on = {}, {settings.AUTO: "1"}

    def conclusion(**variables: str) -> tuple[int, str]:
        status, stdout, stderr = ep(interpreter, "auto", "status", **variables)
        assert stderr == "" and str(packages / command.NAME) in stdout
        return status, stdout.splitlines()[-1]

    assert conclusion(**on) == (1, "binds now: no: python -m megatron_ep_v2 auto enable")
    assert ep(interpreter, "auto", "enable")[:2] == ep(interpreter, "auto", "enable")[:2]
    assert sorted(packages.iterdir()) == sorted([*before, packages / command.NAME])
    assert conclusion(**off) == (1, f"binds now: no: set {settings.AUTO}=1")
    assert conclusion(**{settings.AUTO: "yes"}) == (1, f"binds now: no: set {settings.AUTO}=1")
    assert conclusion(**on) == (0, "binds now: yes, once Megatron's dispatcher is imported")
    assert ep(interpreter, "auto", "disable") == (0, f"removed {packages / command.NAME}\n", "")
    assert sorted(packages.iterdir()) == before
    assert run("-c", NAMES, interpreter=interpreter, **on) == (0, "[]\n", "")
    assert ep(interpreter, "auto", "disable") == (0, f"there is no {packages / command.NAME}\n", "")


def test_the_file_outlives_the_package(environment: tuple[Path, Path]) -> None:
    """One message and no traceback where it was to bind; nothing elsewhere. Without the package, it is not enabled."""
    interpreter, packages = environment
    assert ep(interpreter, "auto", "enable")[0] == 0
    (packages / "_source.pth").unlink()
    assert run("-c", NAMES, interpreter=interpreter) == (0, "[]\n", "")
    status, stdout, stderr = run("-c", NAMES, interpreter=interpreter, **{settings.AUTO: "1"})
    assert (status, stdout) == (0, "[]\n")
    what, found, fix = stderr.splitlines()
    assert settings.AUTO in what and found == "  found: ModuleNotFoundError: No module named 'megatron_ep_v2'"
    assert command.NAME in fix
    source = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['-', 'auto', 'enable']\n"
    source += "from megatron_ep_v2.__main__ import main; main()"  # found in a current folder, so to speak
    status, stdout, stderr = run("-c", source, interpreter=interpreter)
    assert (status, stdout) == (1, "") and not (packages / command.NAME).exists()
    for part in ("SettingsError: ", "No module named 'megatron_ep_v2'", f"installed for {interpreter}", "fix: "):
        assert part in stderr


def test_files_that_cannot_be_written_or_are_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.sysconfig, "get_path", lambda name: str(tmp_path))
    file = tmp_path / command.NAME
    file.write_text("import something_else\n")
    for action in ("enable", "disable"):
        with pytest.raises(SettingsError, match="was not written by this command"):
            command.auto([action])
    assert file.read_text() == "import something_else\n"
    monkeypatch.setattr(command.sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    with pytest.raises(SettingsError, match=r"cannot write .*nowhere") as caught:
        command.auto(["enable"])
    assert "virtual environment" in str(caught.value.fix)
    for arguments in ([], ["on"], ["enable", "disable"]):
        with pytest.raises(SettingsError, match="needed: enable, disable or status"):
            command.auto(arguments)


# ------------------------------------------------------------------------------------------------- a start as Ray's

TRAIN = """
import json, os, sys
{first}
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tests.helpers.megatron_layer import build_layer, hidden_states
from tests.helpers.shapes import CPU
import megatron_ep_v2

store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
ranks = dist.get_world_size()
parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks, expert_tensor_parallel_size=1)
with torch.compiler.set_stance("force_eager"):  # Megatron compiles small functions
    layer = build_layer(CPU, "flex")
    optimizer = torch.optim.Adam(layer.experts.parameters(), lr=0.01)
    tokens, losses = hidden_states(CPU, CPU.tokens, 1), []
    for _ in range(5):
        loss = (layer(tokens)[0] - tokens).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
status, manager = megatron_ep_v2.status(), layer.token_dispatcher._comm_manager
result = {{"losses": losses, "manager": type(manager).__module__, "by": status["installed_by"]}}
result["buffers"] = [buffer["class"] for buffer in status["buffers"]]
dist.barrier()
dist.destroy_process_group()
print(json.dumps(result))
"""
UNTOUCHED = """
import json, sys
from megatron.core.transformer.moe import fused_a2a, moe_layer, token_dispatcher
names = ["_DeepepManager", "MoEFlexTokenDispatcher", "fused_dispatch", "fused_combine", "set_deepep_num_sms"]
objects = [getattr(token_dispatcher, name) for name in names] + [moe_layer.MoELayer.__init__]
owners = {getattr(each, "__module__", "megatron").partition(".")[0] for each in objects if each is not None}
print(json.dumps([sorted(owners), [name for name in sys.modules if name.startswith("megatron_ep_v2")]]))
"""


@pytest.mark.slow
def test_plain_processes_train_each_bound_in_its_own_way(environment: tuple[Path, Path]) -> None:
    """Two processes, which know of each other what Ray's workers know. One has the file and the variable, the other an
    import; without either, Megatron in that environment is its own."""
    interpreter, _ = environment
    assert ep(interpreter, "auto", "enable")[0] == 0
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    head = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    by_file = start("-c", TRAIN.format(first=""), interpreter=interpreter, RANK="0", **head, **{settings.AUTO: "1"})
    by_import = start("-c", TRAIN.format(first=AUTO), interpreter=interpreter, RANK="1", **head)
    for process, by in ((by_file, settings.AUTO), (by_import, AUTO)):
        seen = last_json(finish(process))
        losses = seen.pop("losses")
        assert losses == sorted(losses, reverse=True) and losses[-1] < 0.99 * losses[0], losses
        assert seen == {"manager": "megatron_ep_v2.megatron.managers", "by": by, "buffers": ["ReferenceBuffer"]}
    assert last_json(run("-c", UNTOUCHED, interpreter=interpreter)) == [["megatron"], []]
