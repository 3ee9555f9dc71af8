"""LLVM operations on numbers and on vectors of them for which its builder has no verb."""

from llvmlite import ir
from numba.core import cgutils


def _suffix(kind):
    """How LLVM names a type in the names of its functions."""
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{_suffix(kind.element)}"
    return kind.intrinsic_name if hasattr(kind, "intrinsic_name") else f"i{kind.width}"


def call(builder, name, result, arguments):
    """Call a function of LLVM by its name."""
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def splat(builder, number, count):
    """As many of one number."""
    lanes = ir.VectorType(number.type, count)
    one = builder.insert_element(ir.Constant(lanes, ir.Undefined), number, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), count), None)
    return builder.shuffle_vector(one, ir.Constant(lanes, ir.Undefined), zeros)


def fmuladd(builder, a, b, c):
    """a * b + c, in one rounding where the processor can."""
    return call(builder, f"llvm.fmuladd.{_suffix(a.type)}", a.type, [a, b, c])


def absolute(builder, value):
    """Without sign; of NaN too."""
    return call(builder, f"llvm.fabs.{_suffix(value.type)}", value.type, [value])


def masked(builder, verb, lanes, result, arguments):
    """Call llvm.masked.load or llvm.masked.store for lanes of the type `lanes`."""
    return call(builder, f"llvm.masked.{verb}.{_suffix(lanes)}.p0", result, arguments)
