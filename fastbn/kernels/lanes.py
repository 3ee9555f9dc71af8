"""Sixteen lanes: explicit vectors, for loops that must add in one order whoever compiles them.

LLVM vectorizes a sum only where it may regroup it (`reassoc`), and it regroups one loop differently in different
callers, builds and processes: the last bits then depend on which copy of the code runs. Here the sixteen partial sums
are spelled out. A processor with shorter vectors uses several registers for one value; the bits are the same. Nor does
LLVM have to prove that an output overlaps no input: an array that is both works at full speed.

Each function below is an intrinsic for Numba; with the JIT off, its namesake in `plain` takes its place.
"""

from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from .plain import LANES

__all__ = [
    "LANES",
    "apart",
    "compact",
    "load",
    "load64",
    "load64_part",
    "load_part",
    "minus",
    "muladd",
    "only",
    "plus",
    "prefetch",
    "store",
    "store_part",
    "times",
    "total",
    "zeros",
]

LINE = 64  # bytes of a cache line


class Lanes(types.Type):
    """The type of sixteen float32 or float64 values."""

    def __init__(self, dtype):
        super().__init__(name=f"Lanes({dtype})")
        self.dtype = dtype


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes):
        super().__init__(manager, lanes, _vector(lanes.dtype))


def _vector(dtype):
    return ir.VectorType(ir.DoubleType() if dtype == types.float64 else ir.FloatType(), LANES)


def _computed(dtype):
    """The dtype to compute in: float32 where it holds every value, else float64. As Numba's own promotion."""
    exact = dtype == types.float32 or (not isinstance(dtype, types.Float) and getattr(dtype, "bitwidth", 8) <= 16)
    return types.float32 if exact else types.float64


def _to(builder, value, dtype):
    """Convert a vector of floats to lanes of `dtype`."""
    target = _vector(dtype)
    if value.type == target:
        return value
    return builder.fpext(value, target) if dtype == types.float64 else builder.fptrunc(value, target)


def _operand(context, builder, value, given, dtype):
    """Lanes of `dtype` from lanes or from a number, which goes to all of them."""
    if isinstance(given, Lanes):
        return _to(builder, value, dtype)
    number = context.cast(builder, value, given, dtype)
    one = builder.insert_element(ir.Constant(_vector(dtype), ir.Undefined), number, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
    return builder.shuffle_vector(one, ir.Constant(_vector(dtype), ir.Undefined), zeros)


def _address(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _mask(builder, count):
    """True in the first `count` lanes."""
    word = ir.IntType(32)
    number = builder.trunc(count, word)
    lanes = ir.VectorType(word, LANES)
    one = builder.insert_element(ir.Constant(lanes, ir.Undefined), number, word(0))
    numbers = builder.shuffle_vector(one, ir.Constant(lanes, ir.Undefined), ir.Constant(lanes, None))
    return builder.icmp_unsigned("<", ir.Constant(lanes, list(range(LANES))), numbers)


def _masked(builder, verb, stored, result, arguments):
    """Call llvm.masked.load or llvm.masked.store for lanes of the type `stored`."""
    names = {ir.FloatType(): "f32", ir.DoubleType(): "f64"}
    element = names.get(stored) or f"i{stored.width}"
    kind = ir.FunctionType(result, [a.type for a in arguments])
    name = f"llvm.masked.{verb}.v{LANES}{element}.p0"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _load(array_type, dtype, part=False):
    def codegen(context, builder, signature, arguments):
        address = _address(context, builder, array_type, *arguments[:2])
        stored = address.type.pointee
        lanes = ir.VectorType(stored, LANES)
        whole = builder.bitcast(address, lanes.as_pointer())
        align = context.get_abi_sizeof(stored)
        if part:
            mask = _mask(builder, arguments[2])
            given = [whole, ir.IntType(32)(align), mask, ir.Constant(lanes, None)]
            value = _masked(builder, "load", stored, lanes, given)
        else:
            value = builder.load(whole, align=align)
        if isinstance(array_type.dtype, types.Float):
            return _to(builder, value, dtype)
        signed = getattr(array_type.dtype, "signed", False)
        return (builder.sitofp if signed else builder.uitofp)(value, _vector(dtype))

    return Lanes(dtype)(array_type, *[types.intp] * (1 + part)), codegen


@intrinsic
def _load_computed(context, x, i):
    return _load(x, _computed(x.dtype))


@intrinsic
def _load_float64(context, x, i):
    return _load(x, types.float64)


@intrinsic
def _load_computed_part(context, x, i, n):
    return _load(x, _computed(x.dtype), part=True)


@intrinsic
def _load_float64_part(context, x, i, n):
    return _load(x, types.float64, part=True)


@intrinsic
def _only(context, value, n):
    def codegen(context, builder, signature, arguments):
        lanes, count = arguments
        return builder.select(_mask(builder, count), lanes, ir.Constant(lanes.type, None))

    return value(value, types.intp), codegen


@intrinsic
def _store(context, y, i, value):
    def codegen(context, builder, signature, arguments):
        array, index, lanes = arguments
        address = _address(context, builder, y, array, index)
        whole = builder.bitcast(address, _vector(y.dtype).as_pointer())
        builder.store(_to(builder, lanes, y.dtype), whole, align=context.get_abi_sizeof(address.type.pointee))
        return context.get_dummy_value()

    return types.void(y, types.intp, value), codegen


@intrinsic
def _store_part(context, y, i, n, value):
    def codegen(context, builder, signature, arguments):
        array, index, count, lanes = arguments
        address = _address(context, builder, y, array, index)
        stored = address.type.pointee
        whole = builder.bitcast(address, _vector(y.dtype).as_pointer())
        align = ir.IntType(32)(context.get_abi_sizeof(stored))
        given = [_to(builder, lanes, y.dtype), whole, align, _mask(builder, count)]
        _masked(builder, "store", stored, ir.VoidType(), given)
        return context.get_dummy_value()

    return types.void(y, types.intp, types.intp, value), codegen


@intrinsic
def _prefetch(context, x, i):
    def codegen(context, builder, signature, arguments):
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        address = _address(context, builder, x, *arguments)
        size = context.get_abi_sizeof(address.type.pointee)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        for lane in range(0, LANES, max(1, LINE // size)):
            line = builder.bitcast(builder.gep(address, [word(lane)]), byte)
            builder.call(function, [line, word(0), word(3), word(1)])  # to read, into the first level, data
        return context.get_dummy_value()

    return types.void(x, types.intp), codegen


def _attribute(*names):
    def codegen(context, builder, signature, arguments):
        for name in names:
            builder.function.attributes.add(name)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _compact(context):
    return _attribute("noinline", "optsize")


@intrinsic
def _apart(context):
    return _attribute("noinline")


def _dtype_of(*given):
    """float64 if any lanes are; a number takes the dtype of the lanes."""
    dtypes = [g.dtype for g in given if isinstance(g, Lanes)]
    return types.float64 if types.float64 in dtypes else types.float32


def _elementwise(operation, *given):
    dtype = _dtype_of(*given)

    def codegen(context, builder, signature, arguments):
        pairs = zip(arguments, given, strict=True)
        return operation(builder, *(_operand(context, builder, a, g, dtype) for a, g in pairs))

    return Lanes(dtype)(*given), codegen


@intrinsic
def _minus(context, a, b):
    return _elementwise(lambda builder, a, b: builder.fsub(a, b), a, b)


@intrinsic
def _plus(context, a, b):
    return _elementwise(lambda builder, a, b: builder.fadd(a, b), a, b)


@intrinsic
def _times(context, a, b):
    return _elementwise(lambda builder, a, b: builder.fmul(a, b), a, b)


@intrinsic
def _muladd(context, a, b, c):
    def fmuladd(builder, a, b, c):
        element = "f64" if isinstance(a.type.element, ir.DoubleType) else "f32"
        kind = ir.FunctionType(a.type, [a.type] * 3)
        name = f"llvm.fmuladd.v{LANES}{element}"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])

    return _elementwise(fmuladd, a, b, c)


@intrinsic
def _zeros(context):
    return Lanes(types.float64)(), lambda context, builder, signature, arguments: ir.Constant(
        _vector(types.float64), [0.0] * LANES
    )


@intrinsic
def _total(context, a):
    def codegen(context, builder, signature, arguments):
        parts = [builder.extract_element(arguments[0], ir.IntType(32)(k)) for k in range(LANES)]
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [builder.fadd(parts[k], parts[k + half]) for k in range(half)]
        return parts[0]

    return a.dtype(a), codegen


if config.DISABLE_JIT:
    from .plain import (
        apart,
        compact,
        load,
        load64,
        load64_part,
        load_part,
        minus,
        muladd,
        only,
        plus,
        prefetch,
        store,
        store_part,
        times,
        total,
        zeros,
    )
else:
    #: x[i : i + 16], in float32 where that holds every value of x's dtype, else in float64.
    load = _load_computed
    #: x[i : i + 16] in float64.
    load64 = _load_float64
    #: y[i : i + 16] = value, rounded to y's dtype.
    store = _store
    #: The same for a last, shorter piece of n < 16 elements: no other is read or written; other lanes are 0.
    load_part, load64_part, store_part = _load_computed_part, _load_float64_part, _store_part
    #: The first n lanes, and 0 in the others.
    only = _only
    #: Bring x[i : i + 16] into the cache. Any i will do: an address outside of the array has no effect.
    prefetch = _prefetch
    #: a - b, a + b, a * b, a * b + c (in one rounding where the processor can). A number stands for sixteen of it.
    minus, plus, times, muladd = _minus, _plus, _times, _muladd
    #: Called by a function of which there is to be one copy, not one in each caller. Numba has a parallel kernel
    #: optimized and translated four times, with all that it calls: compile time goes by their size.
    apart = _apart
    #: The same, and its loops are to stay as they are written, not to be turned into vectors.
    compact = _compact
    #: Sixteen float64 zeros.
    zeros = _zeros
    #: The sum of the lanes, halves upon halves.
    total = _total
