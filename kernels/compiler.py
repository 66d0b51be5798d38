"""Numba's compiler for kernels: those of its passes that kernels need, and quicker ones in place of some.

A function whose variables count no references, as nearly all of kernels, has nothing to release. Numba says
anew after most passes where each variable lives, to release it there; here nothing asks for it.
"""

import operator
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import partial
from types import BuiltinFunctionType
from typing import Any, ClassVar

from llvmlite import binding as llvm
from llvmlite.ir import Undefined
from numba import types
from numba.core import cgutils, config, interpreter, ir, ir_utils, lowering, ssa, transforms, utils
from numba.core.analysis import compute_cfg_from_blocks
from numba.core.codegen import CodeLibrary, JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.errors import (  # type: ignore[attr-defined]  # the last is not in Numba's own list
    ForceLiteralArg,
    LoweringError,
    TypingError,
    new_error_context,
)
from numba.core.rewrites import rewrite_registry
from numba.core.typed_passes import (
    AnnotateTypes,
    DumpParforDiagnostics,
    InlineOverloads,
    IRLegalization,
    NativeLowering,
    NopythonRewrites,
    NoPythonSupportedFeatureValidation,
    NopythonTypeInference,
    PreLowerStripPhis,
)
from numba.core.typeinfer import ConstraintNetwork, TypeInferer, TypeVarMap
from numba.core.untyped_passes import (
    FindLiterallyCalls,
    GenericRewrites,
    InlineClosureLikes,
    InlineInlinables,
    IRProcessing,
    LiteralPropagationSubPipelinePass,
    LiteralUnroll,
    MakeFunctionToJitFunction,
    ReconstructSSA,
    RewriteDynamicRaises,
    TranslateByteCode,
    WithLifting,
)

# ---- types -------------------------------------------------------------------------------------------------

APART = operator.pow, operator.ipow, pow  # have rules for literals


class Remembering:
    """Numba's typing context, which finds the signature of an operator, or of a function with rules, once.

    Numba tries some ten rules, those of arrays among them, for each operator in a function's source.
    """

    # With the function, which knows its signatures: rules that are added to one make it another.
    found: ClassVar[dict[Any, tuple[types.Function, Any]]] = {}

    def __init__(self, context: Any) -> None:
        self.context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self.context, name)

    def resolve_function_type(self, function, args, kws):
        resolve, known = self.context.resolve_function_type, function
        if isinstance(function, BuiltinFunctionType) and function not in APART:
            known = self.context._lookup_global(function)
            args = tuple(types.unliteral(a) for a in args)
        is_known = isinstance(known, (types.Function, types.NumberClass))
        if kws or not is_known or any(isinstance(a, types.Callable) for a in args):
            return resolve(function, args, kws)  # a function that is an argument may be gone one day
        key = id(known), args
        if key not in self.found:
            self.found[key] = known, resolve(function, args, kws)
        return self.found[key][1]


class Unspecialised(Remembering):
    """A typing context in which a compiled function is compiled once for all integers.

    Numba compiles a function that is called with a literal for this literal too.
    """

    def resolve_function_type(self, function, args, kws):
        if isinstance(function, types.Dispatcher):
            args = tuple(types.unliteral(a) for a in args)
        return super().resolve_function_type(function, args, kws)


class Variables(TypeVarMap):
    """A function's variables, which notes those that are asked for, and of which type they were."""

    def __init__(self, context: Any) -> None:
        super().__init__()
        self.set_context(context)
        self.asked: dict[Any, Any] = {}

    def __getitem__(self, name):
        variable = super().__getitem__(name)
        self.asked.setdefault(variable, variable.type)
        return variable


class Constraints(ConstraintNetwork):
    """A function's statements about types, each looked at again where a type that it reads has changed.

    Numba looks at all of them again until nothing changes: at the least twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.settled: dict[Any, list[tuple[Any, Any]]] = {}

    def propagate(self, typeinfer):
        variables, errors = typeinfer.typevars, []
        for constraint in self.constraints:
            read = self.settled.get(constraint)
            if read is not None and all(variable.type is kind for variable, kind in read):
                continue
            variables.asked = {}
            try:
                constraint(typeinfer)
            except ForceLiteralArg as error:
                errors.append(error)
            except TypingError as error:
                said = TypingError(str(error), loc=constraint.loc, highlighting=False)
                errors.append(utils.chain_exception(said, error))
            else:
                # The variable that it settles may become more by others, and not by it again.
                settles = getattr(constraint, "dst", None) or getattr(constraint, "target", None)
                read = (r for r in variables.asked.items() if r[0].var != settles)
                self.settled[constraint] = list(read)
        return errors


# ---- passes ------------------------------------------------------------------------------------------------

# Numba's passes over closures, `with`, errors made of variables, loops over tuples of different types,
# literals that are asked for, expressions of arrays, and functions that are inlined by their source; and
# those that look for what Numba does not support, and write types or parallel loops down for people. Kernels
# have none of these, and each pass looks at every statement.
NEEDLESS = (
    WithLifting,
    InlineClosureLikes,
    MakeFunctionToJitFunction,
    RewriteDynamicRaises,
    LiteralUnroll,
    FindLiterallyCalls,
    LiteralPropagationSubPipelinePass,
    InlineInlinables,
    InlineOverloads,
    NopythonRewrites,
    NoPythonSupportedFeatureValidation,
    AnnotateTypes,
    DumpParforDiagnostics,
)
# And what Numba looks for when it has read bytecode: `with`, and dictionaries.
UNREAD = interpreter.peep_hole_delete_with_exit, interpreter.peep_hole_fuse_dict_add_updates


class Reader(interpreter.Interpreter):
    """Numba's reader of bytecode."""

    def post_process(self, peepholes, func_ir):
        return super().post_process([look for look in peepholes if look not in UNREAD], func_ir)


def names(statement: Any) -> list[str]:
    """Return the names of a statement's variables, that of an assigned one first."""
    if type(statement) is not ir.Assign:
        return [variable.name for variable in statement.list_vars()]
    found, value = [statement.target.name], statement.value
    if type(value) is ir.Var:
        found.append(value.name)
    elif type(value) is ir.Expr:
        for part in value._kws.values():
            if type(part) is ir.Var:
                found.append(part.name)
            elif isinstance(part, (list, tuple, dict, ir.Inst)):
                found += (variable.name for variable in value._rec_list_vars(part))
    elif isinstance(value, ir.Inst):
        found += (variable.name for variable in value.list_vars())
    return found


@register_pass(mutates_CFG=True, analysis_only=False)
class Read(TranslateByteCode):
    """Read a function's bytecode."""

    def run_pass(self, state):
        state.func_ir = Reader(state.func_id).interpret(state.bc)
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class Canonical(IRProcessing):
    """Put a function's blocks in a canonical form."""

    def run_pass(self, state):
        state.func_ir.blocks = transforms.canonicalize_cfg(state.func_ir.blocks)
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class Rewritten(GenericRewrites):
    """Numba's rewrites before types are known."""

    def run_pass(self, state):
        blocks = state.func_ir.blocks
        for kind in rewrite_registry.rewrites["before-inference"]:
            rewrite = kind(state)
            for label in blocks:
                while rewrite.match(state.func_ir, blocks[label], state.typemap, state.calltypes):
                    blocks[label] = rewrite.apply()
        return True


@register_pass(mutates_CFG=False, analysis_only=False)
class Versions(ReconstructSSA):
    """Give each assignment of a variable a name of its own.

    Numba looks through all blocks for each variable; this looks where it is.
    """

    def run_pass(self, state):
        blocks = state.func_ir.blocks
        graph = compute_cfg_from_blocks(blocks)
        fronts, used = ssa._iterated_domfronts(graph), ssa._CacheListVars()
        assigned_in, used_in, where = defaultdict(list), defaultdict(set), defaultdict(set)
        for label, block in blocks.items():
            for statement in block.body:
                target = statement.target.name if type(statement) is ir.Assign else None
                for name in names(statement):
                    where[name].add(label)
                    if name != target:
                        used_in[name].add(label)
                if target:
                    assigned_in[target].append(label)
        # Those assigned more than once, or used where it is not certain that they are assigned before.
        before = graph.dominators()
        several = [name for name, labels in assigned_in.items() if len(labels) > 1]
        several += (
            name
            for name, labels in used_in.items()
            if len(assigned_in[name]) < 2
            and not all(before[label].intersection(assigned_in[name]) for label in labels)
        )
        for name in several:
            some = {label: block for label, block in blocks.items() if label in where[name]}
            renamed, assigned = ssa._fresh_vars(some, name)
            blocks.update(renamed)
            joins = where[name] | ssa._compute_phi_locations(fronts, assigned)
            some = {label: block for label, block in blocks.items() if label in joins}
            blocks.update(ssa._fix_ssa_vars(some, name, assigned, graph, fronts, used))
        self._patch_locals(state)
        state.func_ir._definitions = ir_utils.build_definitions(blocks)
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class Joined(PreLowerStripPhis):
    """Turn the places where versions of a variable meet into assignments."""

    def run_pass(self, state):
        state.func_ir = self._strip_phi_nodes(state.func_ir)
        state.func_ir._definitions = ir_utils.build_definitions(state.func_ir.blocks)
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class Typed(NopythonTypeInference):
    """Find the variables' types."""

    def run_pass(self, state):
        function, arguments = state.func_ir, state.func_ir.arg_names
        infer = TypeInferer(state.typingctx, function, None)
        infer.typevars, infer.constraints = Variables(state.typingctx), Constraints()
        calls = state.typingctx.callstack
        with calls.register(state.targetctx.target, infer, function.func_id, state.args):
            for index, (name, kind) in enumerate(zip(arguments, state.args, strict=True)):
                infer.seed_argument(name, index, kind)
            if state.return_type is not None:
                infer.seed_return(state.return_type)
            infer.build_constraint()
            infer.propagate()
            state.typemap, state.return_type, state.calltypes = infer.unify()
        return True


def counts(context: Any, typemap: dict[str, Any]) -> bool:
    """Return whether any variable's objects count who refers to them."""
    models = context.data_model_manager
    return any(models[kind].contains_nrt_meminfo() for kind in set(typemap.values()))


@register_pass(mutates_CFG=False, analysis_only=True)
class Legal(IRLegalization):
    """Numba's last look at a function; it says where variables end, if any counts references."""

    def run_pass(self, state):
        return counts(state.targetctx, state.typemap) and super().run_pass(state)


class Uncounted(lowering.Lower):
    """Numba's lowering, which counts no references where there are none, and types an operator once."""

    def __init__(self, context, library, fndesc, func_ir, metadata=None):
        super().__init__(context, library, fndesc, func_ir, metadata)
        self.uncounted = not counts(context, fndesc.typemap)
        if self.uncounted:
            self.incref = self.decref = lambda kind, value: None
        self.operators = {}

    def _find_singly_assigned_variable(self):
        if self.generator_info:
            return super()._find_singly_assigned_variable()
        assigned, where = Counter(), defaultdict(set)
        for label, block in self.blocks.items():
            for statement in block.body:
                for name in names(statement):
                    where[name].add(label)
                if type(statement) is ir.Assign:
                    assigned[statement.target.name] += 1
        self._singly_assigned_vars = {n for n, k in assigned.items() if k == 1 and len(where[n]) == 1}
        self._blk_local_varmap = {}
        return None

    def lower_block(self, block):
        self.pre_block(block)
        try:
            for inst in block.body:
                self.loc = inst.loc
                self.lower_inst(inst)
        except Exception:  # said again, with the statement
            wrong = partial(LoweringError, loc=self.loc)
            with new_error_context('lowering "{inst}" at {loc}', inst=inst, loc=self.loc, errcls_=wrong):
                raise
        self.post_block(block)

    def alloca_lltype(self, name, lltype, datamodel=None):
        if self.flags.debuginfo:
            return super().alloca_lltype(name, lltype, datamodel)
        return cgutils.alloca_once(self.builder, lltype, name=name)

    def operate(self, op, variables, signature):
        """Generate an operator's code; its result is of the signature's type."""
        key = op, signature.args
        if key not in self.operators:
            typing = Remembering(self.context.typing_context)
            found = typing.resolve_function_type(op, signature.args, {})
            self.operators[key] = found.args, self.context.get_function(typing.resolve_value_type(op), found)
        kinds, generate = self.operators[key]
        given = [
            self.context.cast(self.builder, self.loadvar(variable.name), self.typeof(variable.name), kind)
            for variable, kind in zip(variables, kinds, strict=True)
        ]
        return generate(self.builder, given)

    def lower_binop(self, resty, expr, op):
        signature = self.fndesc.calltypes[expr]
        if op in APART:
            return super().lower_binop(resty, expr, op)
        result = self.operate(op, (expr.lhs, expr.rhs), signature)
        return self.context.cast(self.builder, result, signature.return_type, resty)

    def defined(self, variable):
        """A variable's definition, if it has one only."""
        return ir_utils.guard(ir_utils.get_definition, self.func_ir, variable)

    def constant(self, variable):
        """The object that a variable stands for, if it is known."""
        found = self.defined(variable)
        return found.value if isinstance(found, (ir.Const, ir.Global, ir.FreeVar)) else None

    def makes_range(self, made):
        """Whether an expression is a call that makes a range, of arguments that are there one by one."""
        calls = isinstance(made, ir.Expr) and made.op == "call" and not made.kws and not made.vararg
        return calls and self.constant(made.func) is range

    def step_of(self, variable):
        """The step of a variable that is a range, if that is known and above 0; else None."""
        made = self.defined(variable)
        if not self.makes_range(made) or not self.typeof(variable.name).dtype.signed:
            return None
        step = 1 if len(made.args) < 3 else self.constant(made.args[2])
        return step if type(step) is int and step > 0 else None

    def range_of(self, resty, arguments):
        """Generate a range of one, two or three numbers."""
        whole = self.context.get_value_type(resty.dtype)
        given = [
            self.context.cast(self.builder, self.loadvar(a.name), self.typeof(a.name), resty.dtype)
            for a in arguments
        ]
        given = given if given[1:] else [whole(0), *given]
        return self.together(resty, given if given[2:] else [*given, whole(1)])

    def count_up(self, resty, variable, step):
        """Generate a range's iterator; Numba's code, for any step, is four times as long."""
        builder, state = self.builder, self.loadvar(variable.name)
        start, stop = (builder.extract_value(state, k) for k in range(2))
        whole = start.type
        far = builder.add(builder.sub(stop, start), whole(step - 1))
        count = builder.select(builder.icmp_signed(">", far, whole(0)), far, whole(0))
        if step > 1:
            count = builder.sdiv(count, whole(step))
        places = [cgutils.alloca_once(builder, whole) for _ in range(2)]
        for place, x in zip(places, (start, count), strict=True):
            builder.store(x, place)
        return self.together(resty, (places[0], stop, whole(step), places[1]))

    def next_number(self, resty, variable):
        """Generate the pair of a range's next number, and whether there is one."""
        builder, iterator = self.builder, self.loadvar(variable.name)
        place, step, left_at = (builder.extract_value(iterator, k) for k in (0, 2, 3))
        left, number = builder.load(left_at), builder.load(place)
        builder.store(builder.sub(left, left.type(1), flags=["nsw"]), left_at)
        builder.store(builder.add(number, step), place)
        return self.together(resty, (number, builder.icmp_signed(">", left, left.type(0))))

    def together(self, kind, values):
        """Generate a structure."""
        made = self.context.get_value_type(kind)(Undefined)
        for k, value in enumerate(values):
            made = self.builder.insert_value(made, value, k)
        return made

    def lower_expr(self, resty, expr):
        if self.makes_range(expr):
            return self.range_of(resty, expr.args)
        ranges = expr.op == "getiter" and isinstance(resty, types.RangeIteratorType)
        if ranges and (step := self.step_of(expr.value)):
            return self.count_up(resty, expr.value, step)
        if expr.op == "iternext" and isinstance(self.typeof(expr.value.name), types.RangeIteratorType):
            return self.next_number(resty, expr.value)
        if expr.op in ("pair_first", "pair_second") and self.uncounted:
            return self.builder.extract_value(self.loadvar(expr.value.name), int(expr.op == "pair_second"))
        if expr.op not in ("getitem", "static_getitem") or not self.is_pointer(expr.value):
            return super().lower_expr(resty, expr)
        signature = self.fndesc.calltypes[expr]
        index = expr.index if expr.op == "getitem" else expr.index_var
        result = self.operate(operator.getitem, (expr.value, index), signature)
        return self.context.cast(self.builder, result, signature.return_type, resty)

    def lower_inst(self, inst):
        if isinstance(inst, ir.Assign) and not self.flags.debuginfo and not self._loc_notify_registry:
            # As Numba does, but for telling debuggers, and for putting the statement in words.
            name = inst.target.name
            value = self.lower_assign(self.typeof(name), inst)
            if name in self._singly_assigned_vars or not self.uncounted:
                return self.storevar(value, name)
            self._alloca_var(name, self.typeof(name))
            return self.builder.store(value, self.getvar(name))
        if not isinstance(inst, (ir.SetItem, ir.StaticSetItem)) or not self.is_pointer(inst.target):
            return super().lower_inst(inst)
        index = inst.index if isinstance(inst, ir.SetItem) else inst.index_var
        variables = inst.target, index, inst.value
        return self.operate(operator.setitem, variables, self.fndesc.calltypes[inst])

    def is_pointer(self, variable):
        return isinstance(self.typeof(variable.name), types.CPointer)


@register_pass(mutates_CFG=True, analysis_only=False)
class Lowered(NativeLowering):
    """Numba's code generation, by `Uncounted`."""

    lowering_class = Uncounted


INSTEAD: dict[Any, Any] = {
    GenericRewrites: Rewritten,
    ReconstructSSA: Versions,
    PreLowerStripPhis: Joined,
    IRLegalization: Legal,
    NativeLowering: Lowered,
}
BRIEFLY: dict[Any, Any] = {
    TranslateByteCode: Read,
    IRProcessing: Canonical,
    NopythonTypeInference: Typed,
}


# ---- compilers ---------------------------------------------------------------------------------------------


class Passes(PassManager):
    """A pipeline that runs passes, and no more: Numba also times each, and tells listeners of it."""

    def _runPass(self, index, pss, state):
        pss.analysis = self._analysis
        pss.run_pass(state)


class Whole(Compiler):
    """Compile a function that may be of any form, as definitions are."""

    typing: ClassVar[type[Remembering]] = Remembering
    pipelines: ClassVar[dict[type, Passes]] = {}

    def define_pipelines(self):
        context = self.state.typingctx
        while isinstance(context, Remembering):
            context = context.context
        self.state.typingctx = self.typing(context)
        if type(self) not in self.pipelines:
            (manager,) = super().define_pipelines()
            passes = Passes(type(self).__name__)
            passes.passes = self.choose(manager.passes)
            passes.finalize()
            self.pipelines[type(self)] = passes
        return [self.pipelines[type(self)]]

    def choose(self, passes):
        """Return the passes to run, of Numba's and their descriptions."""
        return [(INSTEAD.get(p, p), text) for p, text in passes]


def link(module: Any, libraries: Iterable[CodeLibrary]) -> None:
    """Link libraries into a module of LLVM's, and those that unfinished ones are linked to."""
    left, seen = list(libraries), set()
    for library in left:
        if library in seen:
            continue
        seen.add(library)
        if isinstance(library, Unfinished):
            for text in library.texts:
                module.link_in(llvm.parse_assembly(text))
            left.extend(library.linked)
        else:
            module.link_in(library._get_module_for_linking(), preserve=True)


class OnceOptimised(JITCodeLibrary):
    """Code that LLVM optimises once.

    Numba does it three times: each function by itself, and twice all together, for the sake of counted
    references, of which kernels have none. And it looks for vectors in straight code, beside those in loops,
    which takes a third of the time in a block of many loops, and finds next to nothing.
    """

    turns: ClassVar[bool] = True  # whether LLVM may do several turns of a loop at once

    def _optimize_functions(self, ll_module):
        pass

    def finalize(self):
        for library in self._linking_libraries:
            self._reload_init.update(library._reload_init)
        link(self._final_module, self._linking_libraries)
        self._linking_libraries = []
        super().finalize()

    def _optimize_final_module(self):
        self._final_module.verify()
        options = llvm.create_pipeline_tuning_options(config.OPT)
        options.loop_vectorization, options.slp_vectorization = True, False
        options.loop_unrolling = options.loop_interleaving = self.turns
        builder = llvm.create_pass_builder(self._codegen._tm, options)
        passes = builder.getModulePassManager()
        passes.add_refprune_pass()  # it tidies, too: without it a loop that is inlined later may stay scalar
        passes.run(self._final_module, builder)


class TurnByTurn(OnceOptimised):
    """Code whose loops LLVM does one turn, or one vector of turns, at a time: a third less to optimise."""

    turns = False


class Brief(Whole):
    """Compile a kernel, or a part of one, in fewer passes."""

    typing = Unspecialised
    library: ClassVar[type[OnceOptimised]] = OnceOptimised

    def define_pipelines(self):
        if self.state.library is None:
            name = self.state.func_id.func_qualname
            self.state.library = self.library(self.state.targetctx.codegen(), name)
            self.state.library.enable_object_caching()
        return super().define_pipelines()

    def choose(self, passes):
        kept = ((p, text) for p, text in super().choose(passes) if p not in NEEDLESS)
        return [(BRIEFLY.get(p, p), text) for p, text in kept]


class Unfinished(CodeLibrary):
    """A function's code as text, which LLVM reads in the libraries that it is linked into only."""

    def __init__(self, codegen, name):
        super().__init__(codegen, name)
        self.texts: list[str] = []
        self.linked: dict[CodeLibrary, None] = {}  # in order

    def add_ir_module(self, module):
        for function in module.functions:
            if not function.is_declaration:
                function.linkage = "linkonce_odr"  # there may be others, and none is kept for its own sake
        self.texts.append(cgutils.normalize_ir_text(str(module)))

    def add_linking_library(self, library):
        library._ensure_finalized()
        self.linked[library] = None

    def finalize(self):
        for library in self.linked:
            self._reload_init.update(library._reload_init)
        self._finalized = True

    def _get_module_for_linking(self):
        module, *more = map(llvm.parse_assembly, self.texts)  # LLVM links what is called by what is there
        for other in more:
            module.link_in(other)
        link(module, self.linked)
        return module

    def get_function(self, name):
        return self._get_module_for_linking().get_function(name)

    def get_llvm_str(self):
        return "\n".join(self.texts)

    def get_asm_str(self):
        return ""  # there is none


class Part(Whole):
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


class Linked(Part, Brief):
    """The same in fewer passes."""


class Rolled(Brief):
    """Compile a kernel whose loops gain nothing if several turns of one are done at once."""

    library = TurnByTurn


class DistinctArrays(Brief):
    """Compile a function whose array arguments never share memory.

    LLVM then needs no checks at run time before it vectorises a loop. Numba has the flag, and no option
    that sets it.
    """

    def define_pipelines(self):
        self.state.flags.noalias = True
        return super().define_pipelines()
