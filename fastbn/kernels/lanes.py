"""Sixteen lanes: explicit vectors, for loops that must add in one order whoever compiles them.

LLVM vectorizes a sum only where it may regroup it (`reassoc`), and it regroups one loop differently in different
callers, builds and processes: the last bits then depend on which copy of the code runs. Here the sixteen partial sums
are spelled out. A processor with shorter vectors uses several registers for one value; the bits are the same. Nor does
LLVM have to prove that an output overlaps no input: an array that is both works at full speed.

What a call has not (a residual, weights, an activation) is None, and so are its lanes: added, multiplied or stored,
they leave everything as it is. One loop serves all formulas, and what it compiles to has no trace of the absent parts.

A piece is n <= 16 elements from an array's element i on; where n is LANES itself, it needs no mask.

Each function below is an intrinsic for Numba; with the JIT off, its namesake in `plain` takes its place. The last lines
of this file give them the names that leaves call, and say what each does.
"""

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from .halves import HALF_DIGITS, from_half, half_of, likely_half, rectified_half, single_pays, to_half, vanishes
from .llvm import call, fmuladd, masked, splat
from .plain import LANES

__all__ = [
    "LANES",
    "apart",
    "compact",
    "element",
    "guarded",
    "inlined",
    "inside",
    "like",
    "load",
    "load64",
    "load_weights",
    "minus",
    "move",
    "muladd",
    "of_channel",
    "only",
    "passed",
    "plus",
    "prefetch",
    "rectified",
    "repeat",
    "row",
    "rows_like",
    "store",
    "times",
    "total",
    "transformed",
    "zeros",
]

LINE = 64  # bytes of a cache line
WORD, INDEX = ir.IntType(32), ir.IntType(64)

# Sees a literal LANES as one.
literally = intrinsic(prefer_literal=True)


class Lanes(types.Type):
    """The type of sixteen float32 or float64 values, of the bits of halves that are done, or of a mask (uint8)."""

    def __init__(self, dtype):
        super().__init__(name=f"Lanes({dtype})")
        self.dtype = dtype


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes):
        super().__init__(manager, lanes, _vector(lanes.dtype))


def _float(dtype):
    floats = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
    return floats.get(dtype) or ir.IntType(16 if half_of(dtype) else 8)


def _vector(dtype):
    return ir.VectorType(_float(dtype), LANES)


def _computed(x, y=types.float32):
    """The dtype in which y is computed from x: float32 where y is and that holds every value of x, else float64."""
    exact = x == types.float32 or (isinstance(x, (types.Integer, types.Boolean)) and getattr(x, "bitwidth", 8) <= 16)
    return types.float32 if exact and y == types.float32 else types.float64


def _absent(given):
    return isinstance(given, types.NoneType)


def _nothing(*given):
    """What comes of an absent part."""
    return types.none(*given), lambda context, builder, signature, arguments: context.get_dummy_value()


def _count(given, value):
    """How many elements a piece has; None where it is known to be whole."""
    return None if isinstance(given, types.IntegerLiteral) and given.literal_value == LANES else value


# ------------------------------------------------------------------------------------------------------------ vectors


def _mask(builder, count):
    """True in the first `count` lanes."""
    counts = splat(builder, builder.trunc(count, WORD), LANES)
    return builder.icmp_unsigned("<", ir.Constant(counts.type, list(range(LANES))), counts)


def _to(builder, value, dtype):
    """Convert floats, lanes or one of them, to `dtype`."""
    target = _vector(dtype) if isinstance(value.type, ir.VectorType) else _float(dtype)
    if value.type == target:
        return value
    return builder.fpext(value, target) if dtype == types.float64 else builder.fptrunc(value, target)


def _operand(context, builder, value, given, dtype):
    """Lanes of `dtype` from lanes or from a number, which goes to all of them."""
    if isinstance(given, Lanes):
        return _to(builder, value, dtype)
    return splat(builder, context.cast(builder, value, given, dtype), LANES)


# --------------------------------------------------------------------------------------------------- loads and stores


def _address(context, builder, array_type, array, index):
    """The address of an element; of a half precision one as that of an int."""
    data = context.make_array(array_type)(context, builder, array).data
    address = builder.gep(data, [index])
    return builder.bitcast(address, ir.IntType(16).as_pointer()) if half_of(array_type.dtype) else address


def _raw(context, builder, address, count):
    """The elements that lie at an address, as they are stored, and zeros after `count` of them."""
    stored = address.type.pointee
    lanes = ir.VectorType(stored, LANES)
    whole = builder.bitcast(address, lanes.as_pointer())
    align = context.get_abi_sizeof(stored)
    if count is None:
        return builder.load(whole, align=align)
    given = [whole, WORD(align), _mask(builder, count), ir.Constant(lanes, None)]
    return masked(builder, "load", lanes, lanes, given)


def _raw_apart(builder, address, step, count):
    """The same of elements that lie `step` apart; after `count` of them the last one again."""
    value = ir.Constant(ir.VectorType(address.type.pointee, LANES), ir.Undefined)
    last = INDEX(LANES - 1) if count is None else builder.sub(count, INDEX(1))
    for lane in range(LANES):
        near = builder.icmp_signed("<", INDEX(lane), last)
        at = builder.mul(builder.select(near, INDEX(lane), last), step)
        value = builder.insert_element(value, builder.load(builder.gep(address, [at])), WORD(lane))
    return value


def _floats(builder, value, dtype, target):
    """Stored elements of a `dtype`, lanes or one of them, as floats of the dtype `target`."""
    if name := half_of(dtype):
        return _to(builder, from_half(builder, value, name), target)
    if isinstance(dtype, types.Float):
        return _to(builder, value, target)
    kind = _vector(target) if isinstance(value.type, ir.VectorType) else _float(target)
    return (builder.sitofp if getattr(dtype, "signed", False) else builder.uitofp)(value, kind)


def _load(x, target, n, *given):
    """A load from x as lanes of the dtype `target`."""
    if _absent(x):
        return _nothing(x, types.intp, n, *given)

    def codegen(context, builder, signature, arguments):
        address = _address(context, builder, x, *arguments[:2])
        value = _raw(context, builder, address, _count(n, arguments[2]))
        return _floats(builder, value, x.dtype, target)

    return Lanes(target)(x, types.intp, n, *given), codegen


@literally
def _load_computed(context, x, i, n, y):
    return _load(x, None if _absent(x) else _computed(x.dtype, y.dtype), n, y)


@literally
def _load_float64(context, x, i, n):
    return _load(x, types.float64, n)


@literally
def _load_weights(context, w, i, n):
    if _absent(w) or isinstance(w.dtype, types.Float):
        return _load(w, types.float64, n)

    def codegen(context, builder, signature, arguments):
        return _raw(context, builder, _address(context, builder, w, *arguments[:2]), _count(n, arguments[2]))

    return Lanes(types.uint8)(w, types.intp, n), codegen


@intrinsic
def _element(context, x, i):
    def codegen(context, builder, signature, arguments):
        value = builder.load(_address(context, builder, x, *arguments))
        return _floats(builder, value, x.dtype, types.float64)

    return types.float64(x, types.intp), codegen


@literally
def _store(context, y, i, n, value):
    given = y, types.intp, n, value
    if _absent(y):
        return _nothing(*given)

    def codegen(context, builder, signature, arguments):
        address = _address(context, builder, y, *arguments[:2])
        lanes, stored = arguments[3], address.type.pointee
        if value.dtype != y.dtype:
            name = half_of(y.dtype)
            lanes = to_half(builder, lanes, name) if name else _to(builder, lanes, y.dtype)
        whole = builder.bitcast(address, lanes.type.as_pointer())
        align, count = context.get_abi_sizeof(stored), _count(n, arguments[2])
        if count is None:
            builder.store(lanes, whole, align=align)
        else:
            given = [lanes, whole, WORD(align), _mask(builder, count)]
            masked(builder, "store", lanes.type, ir.VoidType(), given)
        return context.get_dummy_value()

    return types.void(*given), codegen


@intrinsic
def _move(context, to, j, a, i):
    def codegen(context, builder, signature, arguments):
        target, source = _address(context, builder, to, *arguments[:2]), _address(context, builder, a, *arguments[2:])
        value = _raw(context, builder, source, None)
        whole = builder.bitcast(target, value.type.as_pointer())
        builder.store(value, whole, align=context.get_abi_sizeof(target.type.pointee))
        return context.get_dummy_value()

    return types.void(to, types.intp, a, types.intp), codegen


@intrinsic
def _repeat(context, to, j, a, i):
    def codegen(context, builder, signature, arguments):
        target, source = _address(context, builder, to, *arguments[:2]), _address(context, builder, a, *arguments[2:])
        value = splat(builder, builder.load(source), LANES)
        whole = builder.bitcast(target, value.type.as_pointer())
        builder.store(value, whole, align=context.get_abi_sizeof(target.type.pointee))
        return context.get_dummy_value()

    return types.void(to, types.intp, a, types.intp), codegen


@intrinsic
def _prefetch(context, x, i):
    if _absent(x):
        return _nothing(x, i)

    def codegen(context, builder, signature, arguments):
        byte = ir.IntType(8).as_pointer()
        address = _address(context, builder, x, *arguments)
        size = context.get_abi_sizeof(address.type.pointee)
        for lane in range(0, LANES, max(1, LINE // size)):
            line = builder.bitcast(builder.gep(address, [WORD(lane)]), byte)
            how = WORD(0), WORD(3), WORD(1)  # to read, into the first level, data
            call(builder, "llvm.prefetch.p0", ir.VoidType(), [line, *how])
        return context.get_dummy_value()

    return types.void(x, types.intp), codegen


# --------------------------------------------------------------------------------------------------------- arithmetic


def _elementwise(operation, *given):
    """float64 if any lanes are; a number takes the dtype of the lanes."""
    dtypes = [g.dtype for g in given if isinstance(g, Lanes)]
    dtype = types.float64 if types.float64 in dtypes else types.float32

    def codegen(context, builder, signature, arguments):
        pairs = zip(arguments, given, strict=True)
        return operation(builder, *(_operand(context, builder, a, g, dtype) for a, g in pairs))

    return Lanes(dtype)(*given), codegen


def _unchanged(a, *others, at=0):
    return a(*others), lambda context, builder, signature, arguments: arguments[at]


@intrinsic
def _minus(context, a, b):
    return _elementwise(lambda builder, a, b: builder.fsub(a, b), a, b)


@intrinsic
def _plus(context, a, b):
    return _elementwise(lambda builder, a, b: builder.fadd(a, b), a, b)


@intrinsic
def _times(context, a, b):
    if _absent(b) or _is_mask(b):
        return _unchanged(a, a, b)
    return _elementwise(lambda builder, a, b: builder.fmul(a, b), a, b)


@intrinsic
def _muladd(context, a, b, c):
    return _elementwise(fmuladd, a, b, c)


@literally
def _only(context, value, n):
    def codegen(context, builder, signature, arguments):
        lanes, count = arguments[0], _count(n, arguments[1])
        return lanes if count is None else builder.select(_mask(builder, count), lanes, ir.Constant(lanes.type, None))

    return value(value, n), codegen


@intrinsic
def _zeros(context):
    return Lanes(types.float64)(), lambda context, builder, signature, arguments: ir.Constant(
        _vector(types.float64), [0.0] * LANES
    )


@intrinsic
def _total(context, a):
    def codegen(context, builder, signature, arguments):
        parts = [builder.extract_element(arguments[0], WORD(k)) for k in range(LANES)]
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [builder.fadd(parts[k], parts[k + half]) for k in range(half)]
        return parts[0]

    return a.dtype(a), codegen


# ------------------------------------------------------------------------------------------------------ the affine map


def _digits(dtype):
    """The bits that numbers of a dtype have at most."""
    return HALF_DIGITS.get(half_of(dtype)) or (24 if isinstance(dtype, types.Float) else getattr(dtype, "bitwidth", 8))


@literally
def _transformed(context, x, i, step, y, j, n, centre, scale, shift, z):
    given = x, types.intp, step if _absent(step) else types.intp, y, types.intp, n, centre, scale, shift, z
    half = half_of(y.dtype)
    dtypes = [_computed(x.dtype, y.dtype), *(k.dtype for k in (centre, scale, shift) if isinstance(k, Lanes))]
    dtype = types.float64 if types.float64 in dtypes else types.float32
    # Where half precision comes of numbers for all lanes: see `halves`.
    quick = half and len(dtypes) == 1 and _computed(types.uint8 if half_of(x.dtype) else x.dtype) == types.float32
    quick = quick and single_pays(half)

    def codegen(context, builder, signature, arguments):
        array, at, far, _, to, count, *k, other = arguments
        address, count = _address(context, builder, x, array, at), _count(n, count)
        raw = _raw(context, builder, address, count) if _absent(step) else _raw_apart(builder, address, far, count)
        residual = None if _absent(z) else _raw(context, builder, _address(context, builder, z, other, to), count)

        def compute(dtype, values):
            kinds = centre, scale, shift
            a, b, c = (_operand(context, builder, v, g, dtype) for v, g in zip(values, kinds, strict=True))
            value = fmuladd(builder, builder.fsub(_floats(builder, raw, x.dtype, dtype), a), b, c)
            return value if residual is None else builder.fadd(value, _floats(builder, residual, z.dtype, dtype))

        if not quick:
            return compute(dtype, k)
        values = _floats(builder, raw, x.dtype, types.float32)
        added = None if residual is None else _floats(builder, residual, z.dtype, types.float32)
        likely, is_sure = likely_half(builder, values, _digits(x.dtype), k, added, half)
        start = builder.block
        with cgutils.if_unlikely(builder, builder.not_(is_sure)):
            exact = to_half(builder, compute(types.float64, k), half)
            end = builder.block
        result = builder.phi(likely.type)
        result.add_incoming(likely, start)
        result.add_incoming(exact, end)
        return result

    return Lanes(y.dtype if quick else dtype)(*given), codegen


# ------------------------------------------------------------------------------------------------- weights, activation


def _zero(value):
    return ir.Constant(value.type, [0.0] * LANES)


def _is_mask(given):
    return isinstance(given, Lanes) and given.dtype == types.uint8


def _counts(builder, value, given):
    """Where weights are not 0."""
    if _is_mask(given):
        return builder.icmp_unsigned("!=", value, ir.Constant(value.type, [0] * LANES))
    return builder.fcmp_unordered("!=", value, _zero(value))


@intrinsic
def _inside(context, value, weight):
    if _absent(weight):
        return _unchanged(value, value, weight)

    def codegen(context, builder, signature, arguments):
        lanes, w = arguments
        return builder.select(_counts(builder, w, weight), lanes, _zero(lanes))

    return value(value, weight), codegen


@intrinsic
def _guarded(context, value, other, weight):
    if _absent(weight):
        return _unchanged(value, value, other, weight)

    def codegen(context, builder, signature, arguments):
        a, b, w = arguments
        nothing = builder.fadd(builder.fsub(a, a), builder.fsub(b, b))  # inf - inf is NaN
        finite = builder.fcmp_ordered("==", nothing, _zero(a))
        counts = builder.or_(finite, _counts(builder, w, weight))
        return builder.select(counts, a, _zero(a))

    return value(value, other, weight), codegen


def _bits(context, builder, array_type, array, index):
    """Where the sixteen bits of a piece lie."""
    lanes = ir.VectorType(ir.IntType(1), LANES)
    return builder.bitcast(_address(context, builder, array_type, array, index), lanes.as_pointer())


@intrinsic
def _rectified(context, value, relu, word, y):
    given = value, relu, types.intp, y
    if _absent(relu):
        return _unchanged(value, *given)

    def codegen(context, builder, signature, arguments):
        lanes, bits, at, _ = arguments
        if half_of(value.dtype):
            new, positive = rectified_half(builder, lanes, half_of(value.dtype))
        else:
            least = ir.Constant(lanes.type, [vanishes(y.dtype) if value.dtype != y.dtype else 0.0] * LANES)
            new = builder.select(builder.fcmp_ordered("<=", lanes, _zero(lanes)), _zero(lanes), lanes)  # NaN stays
            positive = builder.fcmp_ordered(">", lanes, least)
        if isinstance(relu, types.Array):
            builder.store(positive, _bits(context, builder, relu, bits, at), align=2)
        return new

    return value(*given), codegen


@intrinsic
def _passed(context, value, relu, word):
    given = value, relu, types.intp
    if _absent(relu):
        return _unchanged(value, *given)

    def codegen(context, builder, signature, arguments):
        lanes, bits, at = arguments
        positive = builder.load(_bits(context, builder, relu, bits, at), align=2)
        return builder.select(positive, lanes, _zero(lanes))

    return value(*given), codegen


# ---------------------------------------------------------------------------------------------------- for the compiler


@intrinsic
def _of_channel(context, count, c):
    if isinstance(count, (types.Float, types.NoneType)):
        return _unchanged(count, count, types.intp)

    def codegen(context, builder, signature, arguments):
        return builder.load(_address(context, builder, count, *arguments))

    return count.dtype(count, types.intp), codegen


@intrinsic
def _row(context, a, t):
    if _absent(a):
        return _nothing(a, types.intp)
    kind = types.Array(a.dtype, 1, "C")(a, types.intp)
    return kind, lambda context, builder, signature, arguments: context.compile_internal(
        builder, lambda a, t: a[t], signature, arguments
    )


@intrinsic
def _rows_like(context, a, rows, columns):
    if _absent(a):
        return _nothing(a, types.intp, types.intp)
    kind = types.Array(a.dtype, 2, "C")(a, types.intp, types.intp)
    return kind, lambda context, builder, signature, arguments: context.compile_internal(
        builder, lambda a, rows, columns: np.empty((rows, columns), a.dtype), signature, arguments
    )


@intrinsic
def _like(context, y):
    dtype = types.float32 if y.dtype == types.float32 else types.float64
    return dtype(y), lambda context, builder, signature, arguments: context.get_constant(dtype, 0.0)


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
def _inlined(context):
    return _attribute("alwaysinline")


@intrinsic
def _apart(context):
    return _attribute("noinline")


if config.DISABLE_JIT:
    from .plain import (
        apart,
        compact,
        element,
        guarded,
        inlined,
        inside,
        like,
        load,
        load64,
        load_weights,
        minus,
        move,
        muladd,
        of_channel,
        only,
        passed,
        plus,
        prefetch,
        rectified,
        repeat,
        row,
        rows_like,
        store,
        times,
        total,
        transformed,
        zeros,
    )
else:
    #: load(x, i, n, y): n elements, then zeros, in the dtype in which y is computed from x: float32 if y is float32 and
    #: that holds every value of x's dtype, else float64.
    load = _load_computed
    #: load64(x, i, n): in float64.
    load64 = _load_float64
    #: load_weights(w, i, n): the same of weights; of booleans (uint8) a mask, by which to multiply changes nothing:
    #: `inside` has set the others to 0.
    load_weights = _load_weights
    #: element(x, i): one element, in float64.
    element = _element
    #: store(y, i, n, value): the first n lanes, rounded to y's dtype once.
    store = _store
    #: move(to, j, a, i): to[j : j + 16] = a[i : i + 16]; repeat(to, j, a, i): ... = a[i]; both of one dtype.
    move, repeat = _move, _repeat
    #: only(value, n): the first n lanes, and 0 in the others.
    only = _only
    #: prefetch(x, i): bring a piece into the cache. Any i will do: an address outside of the array has no effect.
    prefetch = _prefetch
    #: a - b, a + b, a * b, a * b + c (in one rounding where the processor can). A number stands for sixteen of it;
    #: a * b is a where b is None.
    minus, plus, times, muladd = _minus, _plus, _times, _muladd
    #: transformed(x, i, step, y, j, n, centre, scale, shift, z): (x - centre) * scale + shift + z of what becomes y
    #: from j on; the elements of x lie `step` apart from i on, side by side if that is None.
    transformed = _transformed
    #: Sixteen float64 zeros.
    zeros = _zeros
    #: The sum of the lanes, halves upon halves.
    total = _total
    #: inside(value, weight): 0 where the weight is 0, even if the value is NaN.
    inside = _inside
    #: guarded(value, other, weight): 0 where the weight is 0 and the one or the other is not finite.
    guarded = _guarded
    #: rectified(value, relu, word, y): ReLU, unless relu is None; NaN stays NaN. Where relu is an array of words, its
    #: element `word` receives a bit for each lane: whether it is above 0 in y's dtype.
    rectified = _rectified
    #: passed(value, relu, word): the lanes whose bits are set, and 0 in the others: the gradient of `rectified`.
    passed = _passed
    #: of_channel(count, c): count[c] of an array; a number is that of every channel.
    of_channel = _of_channel
    #: row(a, t): a[t]; rows_like(a, rows, columns): new, of a's dtype.
    row, rows_like = _row, _rows_like
    #: like(y): a zero of the dtype in which y's coefficients are kept: float32 if y is, else float64.
    like = _like
    #: Called by a function of which there is to be one copy, not one in each caller. Numba has a parallel kernel
    #: optimized and translated four times, with all that it calls: compile time goes by their size.
    apart = _apart
    #: Called by a function that is to be part of every caller, even of a compact one.
    inlined = _inlined
    #: As `apart`, and its loops are to stay as they are written, not to be turned into vectors.
    compact = _compact
