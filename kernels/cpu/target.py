"""Numba's CPU target: compile flags, and the parts that `kernels.jets` installs its rules with."""

from functools import cache, partial
from types import SimpleNamespace
from typing import Any

from numba import njit, types
from numba.core import cgutils
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.errors import TypingError
from numba.core.imputils import lower_cast
from numba.extending import intrinsic, models, overload, register_model

from .. import jets, math


class Unfinished(JITCodeLibrary):
    """Code that is optimised, and turned into machine code, in the libraries that it is linked into only."""

    def finalize(self):
        for library in dict.fromkeys(self._linking_libraries):
            self._reload_init.update(library._reload_init)
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._final_module.verify()
        self._finalized = True


class Linked(Compiler):
    """Compile a function as a part of compiled functions that call it, and not by itself before.

    Numba optimises and emits a function again in each that calls it, and in those that call these.
    """

    def define_pipelines(self):
        self.state.flags.no_compile = True
        self.state.library = Unfinished(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        return super().define_pipelines()

    def _compile_core(self):
        # Numba knows a function by its entry point, a builtin. This one has none: another stands for it.
        result = super()._compile_core()._replace(entry_point=[].append)
        result.target_context.insert_user_function(result.entry_point, result.fndesc, [result.library])
        return result


# Nobody calls a helper from Python: without these two flags Numba compiles two more functions for each.
INTERNAL: dict[str, Any] = dict(no_cpython_wrapper=True, no_cfunc_wrapper=True)
# Scalars keep IEEE semantics but for fused multiply-add and the sign of zero: reassociation would cancel the
# rounding tricks of `kernels.math`, and `nnan`/`ninf` would delete the handling of NaN and infinity. Flags
# travel with the instruction, so both sets hold after inlining.
PUBLIC: dict[str, Any] = dict(forceinline=True, fastmath={"contract", "nsz"}, error_model="numpy")
SCALAR: dict[str, Any] = PUBLIC | INTERNAL
# A function of loops, each element by itself.
BLOCK: dict[str, Any] = dict(nogil=True, fastmath=SCALAR["fastmath"], error_model="numpy")
# A loop that sums may also reassociate: that is what lets it vectorise. Nothing else should, or
# ``(s - 1) + e`` loses e's digits, and the same source in two kernels rounds in two ways.
LOOP: dict[str, Any] = dict(nogil=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")


class DistinctArrays(Compiler):
    """Compile a function whose array arguments never share memory.

    LLVM then needs no checks at run time before it vectorises a loop. Numba has the flag, and no option
    that sets it.
    """

    def define_pipelines(self):
        self.state.flags.noalias = True
        return super().define_pipelines()


@intrinsic
def prefer_widest_vectors(typingctx):
    """Let LLVM use 512-bit vectors in the function that calls this, where the processor has them.

    Its own choice of 256 bits spares old processors a drop in frequency; the losses that compute most gain a
    quarter.
    """

    def codegen(context, builder, sig, args):
        # llvmlite's `add` knows the plain attributes only.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), codegen


@cache
def derivatives() -> SimpleNamespace:
    """The jets, installed for the CPU when the first kernel is made."""
    return jets.install(
        SimpleNamespace(
            types=types,
            TypingError=TypingError,
            cgutils=cgutils,
            intrinsic=intrinsic,
            models=models,
            register_model=register_model,
            lower_cast=lower_cast,
            overload=partial(overload, jit_options=SCALAR),
            jit=njit(**SCALAR),
            powers=math.powers,
        )
    )
