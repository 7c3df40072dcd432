"""The architecture as a test: who may import whom, and how long a file and a function may be.

A file imports from its own floor or from lower ones, and never in a circle. A file that is not
named below has its folder's floor.
"""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70

FOLDERS = ("engine", "backends", "native", "bench", "tests")
FLOORS = {
    "native": 0,
    "engine/__init__.py": 0,
    "engine/policies/__init__.py": 0,
    "backends/__init__.py": 0,
    "backends/store.py": 1,
    "backends/grammar.py": 1,
    "engine/errors.py": 1,
    "backends": 2,
    "engine/policies": 2,
    "engine/movers.py": 2,
    "engine/page_table.py": 2,
    "engine/probe.py": 2,
    "engine/stats.py": 2,
    "engine/client.py": 3,
    "engine/control.py": 3,
    "engine/visitor.py": 4,
    "engine/gate.py": 3,
    "engine/keeper.py": 3,
    "engine/objects.py": 3,
    "engine/region.py": 3,
    "engine/budget.py": 2,
    "engine/notify.py": 2,
    "engine/listening.py": 3,
    "engine/evictor.py": 4,
    "engine/fault_loop.py": 4,
    "engine/isolation.py": 5,
    "engine/connection.py": 5,
    "engine/daemon.py": 5,
    "engine/desk.py": 5,
    "engine/drain.py": 5,
    "engine/pager.py": 5,
    "engine/simulation.py": 3,
    "engine/traces.py": 3,
    "engine/policy_conformance.py": 5,
    "engine/stores.py": 5,
    "engine/served.py": 5,
    "backends/conformance.py": 5,
    "backends/conformance_failures.py": 5,
    "backends/harness.py": 5,
    "backends/registry.py": 5,
    "backends/volume.py": 5,
    "backends/window.py": 5,
    "engine/userswap": 5,
    "engine/userswap/__main__.py": 6,
    "engine": 6,
    "bench": 6,
}
# What everybody may know of backends/: the interface, the grammar, who finds the rest, volumes.
SEAM = {f"userswap.backends{name}" for name in ("", ".store", ".grammar", ".registry", ".volume")}
# What commands may know beside it: an extent as a store; who exports stores, and finds them.
COMMANDS = {f"userswap.backends.{name}" for name in ("window", "nvme_tcp")}
COMMANDS |= {
    f"userswap.backends.nvme_tcp.{name}"
    for name in ("discovery", "identify", "pdu", "server", "url")
}
# What stores may know of each other: how values are encoded, where filters keep bytes per page;
# and the parts of volumes, and of one store, of each other.
SHARED = {"userswap.backends.values"}
SHARED |= {f"userswap.backends.filters.{name}" for name in ("sealed", "tail")}
SHARED |= {f"userswap.backends.filters.{name}" for name in ("placement", "traffic")}
SHARED |= {"userswap.backends.filters"}
SHARED |= {f"userswap.backends.{name}" for name in ("medium", "ranges", "superblock")}
SHARED |= {f"userswap.backends.{name}" for name in ("lmdb_file", "lmdb_writer", "redis_server")}
SHARED |= {f"userswap.backends.nvme_tcp.{name}" for name in ("pdu", "command", "identify", "wire")}
SHARED |= {f"userswap.backends.nvme_tcp.{name}" for name in ("qpair", "controller", "target")}
SHARED |= {f"userswap.backends.nvme_tcp.{name}" for name in ("native_queue", "direct")}
SHARED |= {
    f"userswap.backends.nvme_tcp.target_{name}" for name in ("queue", "controller", "blocks")
}
SHARED |= {
    f"userswap.backends.nvme_tcp.{name}"
    for name in ("host", "reconnect", "url", "lease", "namespace")
}
SHARED |= {"userswap.backends.nvme_tcp", "userswap.backends.nvme_tcp.unflushed"}
IMPURE = {"asyncio", "os", "random", "socket", "subprocess", "threading", "time"}


def sources(*suffixes: str) -> list[Path]:
    return [
        path
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in suffixes
    ]


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """The import name of a file of the package, as pyproject.toml maps it."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[2:] if parts[:2] == ("engine", "userswap") else parts
    parts = parts[:-1] if parts[-1:] == ("__init__",) else parts
    return ".".join(("userswap", *parts))


def floor(path: Path) -> int:
    """That of the file, or of the nearest folder that has one."""
    inside = path.relative_to(ROOT)
    for name in (inside, *inside.parents):
        if name.as_posix() in FLOORS:
            return FLOORS[name.as_posix()]
    raise AssertionError(f"{place(path)} has no floor")


MODULES = {
    module_name(path): path for path in sources(".py") if not path.is_relative_to(ROOT / "tests")
}


def imports(path: Path, *, deferred: bool = True) -> set[str]:
    """What a file imports; without `deferred`, only what it imports as it is loaded."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(path)}:{node.lineno}: a relative import"
            base = node.module or ""
            modules = {f"{base}.{name.name}" for name in node.names} & MODULES.keys()
            found.update(modules)
            if len(modules) < len(node.names):
                found.add(base)
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if deferred or not (function or typing_only):
            pending.extend(ast.iter_child_nodes(node))
    return found


def package_imports() -> Iterator[tuple[Path, str]]:
    for path in MODULES.values():
        for name in sorted(imports(path)):
            yield path, name


def test_no_file_imports_from_a_higher_floor() -> None:
    assert [
        f"{place(path)} (floor {floor(path)}) imports {name} (floor {floor(MODULES[name])})"
        for path, name in package_imports()
        if name in MODULES and floor(MODULES[name]) > floor(path)
    ] == []


def test_nothing_is_imported_in_a_circle() -> None:
    graph = {name: imports(path, deferred=False) & MODULES.keys() for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_the_engine_knows_no_concrete_backend() -> None:
    assert [
        f"{place(path)} imports {name}"
        for path, name in package_imports()
        if path.is_relative_to(ROOT / "engine")
        and name.startswith("userswap.backends")
        and name not in (SEAM | COMMANDS if floor(path) == 6 else SEAM)
    ] == []


def test_backends_know_neither_the_engine_nor_each_other() -> None:
    assert [
        f"{place(path)} imports {name}"
        for path, name in package_imports()
        if path.is_relative_to(ROOT / "backends")
        and not path.name.startswith(("registry.", "harness.", "conformance", "window."))
        and name.startswith(("userswap.engine", "userswap.bench", "userswap.backends"))
        and name not in SEAM | SHARED - {"userswap.backends.registry", "userswap.backends.volume"}
    ] == []


def test_the_interface_needs_the_standard_library_alone() -> None:
    assert [
        f"{place(path)} imports {name}"
        for path, name in package_imports()
        if floor(path) == 1
        and name.partition(".")[0] not in sys.stdlib_module_names
        and name not in SEAM
    ] == []


def test_policies_are_pure() -> None:
    # The built-in ones may be in C, which is as pure.
    assert [
        f"{place(path)} imports {name}"
        for path, name in package_imports()
        if path.is_relative_to(ROOT / "engine" / "policies") and name.partition(".")[0] in IMPURE
    ] == []


def test_protocols_are_pure() -> None:
    # All of the package but the modules that give it sockets and stores.
    shell = {
        "direct.py",
        "host.py",
        "lease.py",
        "namespace.py",
        "reconnect.py",
        "store.py",
        "server.py",
        "target_blocks.py",
    }
    assert [
        f"{place(path)} imports {name}"
        for path, name in package_imports()
        if path.is_relative_to(ROOT / "backends" / "nvme_tcp")
        and path.name not in shell
        and name.partition(".")[0] in IMPURE
    ] == []


def test_only_native_knows_cffi() -> None:
    assert [
        f"{place(path)} imports {name}"
        for path, name in package_imports()
        if not path.is_relative_to(ROOT / "native")
        and (name.partition(".")[0] in ("cffi", "_cffi_backend") or name.endswith("._core"))
    ] == []


# --- lengths ---


def python_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """Name, first line and number of lines of every function."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1


NOT_CODE = re.compile(
    r"""/\*.*?\*/ | //[^\n]* | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*'
      | ^[ \t]*\#(?:\\\n|[^\n])*""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
C_HEADER = re.compile(r"([A-Za-z_]\w*)\s*\((?:[^;{}]|\n)*\)\s*$")


def c_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """The same for C: whatever stands outside all braces, ends with `)` and then opens one."""
    code = NOT_CODE.sub(lambda match: "\n" * match[0].count("\n"), text)
    depths = list(accumulate((c == "{") - (c == "}") for c in code))
    header_start = 0
    start: tuple[str, int] | None = None
    for at, character in enumerate(code):
        if character == "{" and depths[at] == 1:
            header = code[header_start:at]
            match = C_HEADER.search(header)
            first = header_start + len(header) - len(header.lstrip())
            start = (match[1], code.count("\n", 0, first) + 1) if match else None
        elif character == "}" and depths[at] == 0 and start:
            name, line = start
            yield name, line, code.count("\n", 0, at) + 2 - line
            start = None
        if character in ";}" and depths[at] == 0:
            header_start = at + 1


def test_functions_are_found_and_counted() -> None:
    python = "def f():\n    def g():\n        return 1\n    return g\n"
    assert list(python_functions(python)) == [("f", 1, 4), ("g", 2, 2)]
    c = """
#define BRACE(x) \\
    do { x; } while (0)
struct pair { int a, b; }; // {
static const char *names[] = { "{", "}" };
/* a comment ( ) { */
static int
add(struct pair *p, int (*scale)(int))
{
    if (p) { return '{'; }
    return 0;
}
static inline int one(void) { return 1; }
"""
    assert list(c_functions(c)) == [("add", 7, 6), ("one", 13, 1)]


def test_no_file_is_too_long() -> None:
    lengths = {
        place(path): path.read_text().count("\n")
        for path in sources(".py", ".pyi", ".c", ".h", ".sh")
    }
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES_MAX} == {}


def test_no_function_is_too_long() -> None:
    found = [
        (path, function)
        for suffix, functions in ((".py", python_functions), (".c", c_functions))
        for path in sources(suffix, ".h" if suffix == ".c" else suffix)
        for function in functions(path.read_text())
    ]
    assert found
    assert [
        f"{place(path)}:{line}: {name} has {lines} lines"
        for path, (name, line, lines) in found
        if lines > FUNCTION_LINES_MAX
    ] == []
