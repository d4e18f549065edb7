"""Object code of kernels and routines, made by Numba for `native`."""

# pyright: basic, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import config
from numba.core.compiler import Flags, compile_extra
from numba.core.compiler_lock import global_compiler_lock

from . import native
from .fingerprint import SETTINGS_FILE, settings

__all__ = ["of_functions", "of_module"]

_INTEGER = ir.IntType(64)
_PLAIN = {
    "OPT": (3, {"NUMBA_OPT"}),
    "CPU_NAME": (None, {"NUMBA_CPU_NAME"}),
    "CPU_FEATURES": (None, {"NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"}),
    "BOUNDSCHECK": (None, {"NUMBA_BOUNDSCHECK"}),
    "LOOP_VECTORIZE": (1, {"NUMBA_LOOP_VECTORIZE"}),
    "SLP_VECTORIZE": (0, {"NUMBA_SLP_VECTORIZE"}),
    "DEBUGINFO_DEFAULT": (0, {"NUMBA_DEBUGINFO", "NUMBA_ENABLE_PROFILING"}),
}  # what Numba's settings are where nobody changes them, and the environment's names for that
_OF_C = ["memcpy", "memmove", "memset"]  # what LLVM may call for instructions
_INTRINSICS = {"ceil", "copysign", "exp", "floor", "fma", "log", "nearbyint", "pow", "rint", "round", "sqrt", "trunc"}

_libraries: list[Any] = []  # code goes with its library


def _target() -> tuple[Any, Any]:
    """Numba's typing and target contexts for this machine."""
    from numba.core.registry import cpu_target

    return cpu_target.typing_context, cpu_target.target_context


def of_functions(dispatchers: Mapping[str, Any], parameters: Mapping[str, int], kind: str = "") -> native.Code:
    """Compile functions of integers, each with an entry for C.

    Parameters
    ----------
    dispatchers : mapping
        What ``@njit`` gave, by name.
    parameters : mapping
        Of each function that is wanted, how many integers it takes.
    kind : str, optional
        "float32" or "float64", if they take a zero of that kind before.
    """
    with global_compiler_lock:
        library = _library("tinytape")
        symbols = {name: _add(library, dispatchers[name], n, kind) for name, n in parameters.items()}
        return _code(library, symbols)


def of_module(module: ir.Module, symbols: Iterable[str]) -> native.Code:
    """Compile a module of LLVM's functions, which are called by their symbols; Numba's own code finds them too."""
    with global_compiler_lock:
        library = _library(module.name)
        like = library.create_ir_module(module.name)
        module.triple, module.data_layout = like.triple, like.data_layout
        library.add_ir_module(module)
        native.count()
        _libraries.append(library)
        return _code(library, {symbol: symbol for symbol in symbols})


def _library(name: str) -> Any:
    library = _target()[1].codegen().create_library(name)
    library.enable_object_caching()
    return library


def _add(library: Any, dispatcher: Any, parameters: int, kind: str) -> str:
    """Compile a function into a library, with an entry, whose symbol is returned."""
    typing, context = _target()
    flags = Flags()
    dispatcher.targetdescr.options.parse_as_flags(flags, dispatcher.targetoptions)
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    zero = (getattr(types, kind),) if kind else ()
    arguments = (*zero, *[types.int64] * parameters)
    result = compile_extra(typing, context, dispatcher.py_func, arguments, None, flags, {}, library)
    native.count()
    described = result.fndesc
    module = context.create_module("entry")
    callee_type = context.call_conv.get_function_type(described.restype, described.argtypes)
    callee = ir.Function(module, callee_type, described.llvm_func_name)
    symbol = f"tinytape.{described.llvm_func_name}"
    entry = ir.Function(module, ir.FunctionType(_INTEGER, [_INTEGER] * parameters), symbol)
    builder = ir.IRBuilder(entry.append_basic_block())
    values = [*(ir.Constant(context.get_value_type(t), 0.0) for t in zero), *entry.args]
    _, value = context.call_conv.call_function(builder, callee, described.restype, described.argtypes, values)
    builder.ret(_integer(context, builder, value, described.restype))
    library.add_ir_module(module)
    library.get_function(described.llvm_func_name).linkage = "internal"
    return symbol


def _integer(context: Any, builder: ir.IRBuilder, value: Any, kind: types.Type) -> Any:
    """What a function gives, as its entry returns it."""
    if kind == types.none:
        return ir.Constant(_INTEGER, 0)
    if not isinstance(kind, types.Integer | types.Boolean):
        raise TypeError(f"a kernel gives {kind}")
    return context.cast(builder, value, kind, types.int64)


def _code(library: Any, symbols: dict[str, str]) -> native.Code:
    library.finalize()
    final = library._final_module
    outside = [v.name for v in (*final.functions, *final.global_variables) if v.is_declaration]
    needs = {name for name in outside if not name.startswith("llvm.")}
    for name in {name.split(".")[1] for name in outside if name.startswith("llvm.")} & _INTRINSICS:
        needs |= {name, f"{name}f"}  # where the machine has no instruction for it
    lasting = not library.has_dynamic_globals and _as_told()
    return native.Code(symbols, sorted(needs.union(_OF_C)), library._get_compiled_object(), lasting)


def _as_told() -> bool:
    """Whether Numba makes code as the environment says, and not as this program set it: others shall not find that."""
    told = {name for name, _ in settings()}
    if SETTINGS_FILE.name in told:
        return True
    return all(getattr(config, name, plain) == plain or told & names for name, (plain, names) in _PLAIN.items())
