"""float16 and bfloat16, which Numba has not: how lanes convert them.

An array of them goes to a kernel as one of records (`plain.CARRIERS`), whose only field is named after the dtype. They
are computed with in float64, which is rounded once: to float32 to odd (the last bit set if anything is cut off), and
from there to nearest even, which is then the rounding of the first value (Boldo, Melquiond 2008, "Emulation of FMA and
correctly rounded sums: proved algorithms using rounding to odd", theorem 3); but for a bfloat16 below 1.2e-38, where
float32 has fewer bits than it takes: there a value within 2**-24 of the middle between two may go to the other one.

float16 is converted by the processor where it has instructions for that, else by arithmetic on the bits.

Where float32 is sure to lead to the same half it is faster: sixteen lanes are half as many registers, and the rounding
to odd falls away. Sure it is if both ends of the interval in which float32 is certain have the same half (Ziv 1991,
"Fast evaluation of elementary mathematical functions with correctly rounded last bit"). Of float16, one piece of
sixteen in fifty is not.
"""

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target

from .llvm import absolute, call, fmuladd, splat

HALF_DIGITS = {"float16": 11, "bfloat16": 8}

# 2 to this power and below is stored as 0.
_VANISHES = {"float16": -25, "bfloat16": -134}


def half_of(dtype):
    """The name of a half precision dtype of an array, else None."""
    return dtype.fields and next(iter(dtype.fields)) if isinstance(dtype, types.Record) else None


def vanishes(dtype):
    """The largest value that is stored as 0 in an array of this dtype, though it may be computed as more."""
    return 2.0 ** _VANISHES.get(half_of(dtype), -150 if dtype == types.float32 else -2000)


def _kind(value, one):
    """The type of `one` for a scalar, of as many for a vector."""
    return ir.VectorType(one, value.type.count) if isinstance(value.type, ir.VectorType) else one


def _constant(kind, number):
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


class _Bits:
    """Arithmetic on integers of one width, scalars or vectors, with plain numbers as constants."""

    def __init__(self, builder, kind):
        self.builder, self.kind = builder, kind

    def __getattr__(self, name):
        verb = getattr(self.builder, name)
        return lambda a, b: verb(a, _constant(self.kind, b) if isinstance(b, int) else b)

    def less(self, a, b):
        return self.builder.icmp_unsigned("<", a, _constant(self.kind, b))

    def choose(self, condition, a, b):
        return self.builder.select(condition, *(_constant(self.kind, v) if isinstance(v, int) else v for v in (a, b)))


def _converts():
    """Whether the processor that is compiled for converts float16."""
    return _has("+f16c")


_ALL = ir.IntType(16)(-1)


def _vectors(value):
    """Whether lanes are one register: LLVM is told the instruction, because it likes slower ones of AVX512-FP16."""
    return isinstance(value.type, ir.VectorType) and _has("+avx512f")


def single_pays(name):
    """Whether float32 may be computed with first: multiplying and adding is one rounding, and converting is cheap."""
    return _has("+fma") and (name != "float16" or _converts())


def _has(feature):
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return not triple.startswith(("x86", "i386", "i686")) or feature in features.split(",")


def from_half(builder, bits, name):
    """float32 from the bits of halves; exact."""
    single, word = _kind(bits, ir.FloatType()), _kind(bits, ir.IntType(32))
    if name == "float16" and _vectors(bits):
        given = [bits, ir.Constant(single, ir.Undefined), _ALL, ir.IntType(32)(4)]
        return call(builder, "llvm.x86.avx512.mask.vcvtph2ps.512", single, given)
    if name == "float16" and _converts():
        return builder.fpext(builder.bitcast(bits, _kind(bits, ir.HalfType())), single)
    do = _Bits(builder, word)
    wide = builder.zext(bits, word)
    if name == "bfloat16":
        return builder.bitcast(do.shl(wide, 16), single)
    sign, size = do.shl(do.and_(wide, 0x8000), 16), do.and_(wide, 0x7FFF)
    # Its bits in float32's places are those of a float 2**112 times as small; infinity and NaN keep their exponent.
    small = builder.bitcast(do.shl(size, 13), single)
    value = builder.bitcast(builder.fmul(small, _constant(single, 2.0**112)), word)
    value = do.choose(do.less(size, 0x7C00), value, do.or_(do.shl(size, 13), 0x7F800000))
    return builder.bitcast(do.or_(value, sign), single)


def to_half(builder, value, name):
    """The bits of halves nearest to float32 or float64."""
    single, word = _kind(value, ir.FloatType()), _kind(value, ir.IntType(32))
    if value.type != single:
        value = to_single(builder, value)
    half = _kind(value, ir.IntType(16))
    if name == "float16" and _vectors(value):
        given = [value, ir.IntType(32)(0), ir.Constant(half, ir.Undefined), _ALL]
        return call(builder, "llvm.x86.avx512.mask.vcvtps2ph.512", half, given)
    if name == "float16" and _converts():
        return builder.bitcast(builder.fptrunc(value, _kind(value, ir.HalfType())), half)
    do = _Bits(builder, word)
    bits = builder.bitcast(value, word)
    size = do.and_(bits, 0x7FFFFFFF)
    if name == "bfloat16":
        even = do.lshr(do.add(do.add(bits, 0x7FFF), do.and_(do.lshr(bits, 16), 1)), 16)
        number = do.less(size, 0x7F800001)
        return builder.trunc(do.choose(number, even, do.or_(do.lshr(bits, 16), 0x40)), half)
    sign = do.lshr(do.and_(bits, 0x80000000), 16)
    even = do.lshr(do.add(do.add(do.sub(size, 112 << 23), 0xFFF), do.and_(do.lshr(size, 13), 1)), 13)
    # Adding 0.5 rounds a subnormal at the place of its last bit, which is then the last one of the sum.
    small = builder.fadd(builder.bitcast(size, single), _constant(single, 0.5))
    small = do.sub(builder.bitcast(small, word), 0x3F000000)
    large = do.choose(do.less(size, 0x7F800001), 0x7C00, 0x7E00)
    finite = do.choose(do.less(size, 113 << 23), small, even)
    return builder.trunc(do.or_(do.choose(do.less(size, 0x47800000), finite, large), sign), half)


def likely_half(builder, x, digits, coefficients, z, name):
    """The halves nearest to (x - centre) * scale + shift + z (None: 0), from float32, and whether all are sure.

    `coefficients` are float64; x, whose values have so many binary `digits`, and z are lanes of float32. With m the
    centre - shift / scale rounded to as many digits,

        y = (x - m) * scale + rest        rest = (m - centre) * scale + shift

    x is m, or so far from it that rest is at most half of the product: no digit cancels, and float32 comes within 6
    roundings of y, relative to y. Both ends of that interval are computed; they cost one operation more than y alone.
    Beside x's spacing, what float64 itself rounds is small if the centre is not 2**(28 - digits) times as large as m.
    """
    single, double = ir.FloatType(), ir.DoubleType()
    centre, scale, shift = coefficients

    exact = builder.fsub(centre, builder.fdiv(shift, scale))
    high = builder.fmul(exact, double(2.0 ** (53 - digits) + 1))  # Dekker's splitting
    m = builder.fsub(high, builder.fsub(high, exact))
    rest = fmuladd(builder, builder.fsub(m, centre), scale, shift)
    d = builder.fsub(x, splat(builder, builder.fptrunc(m, single), x.type.count))

    def end(error):
        factors = (builder.fptrunc(builder.fmul(v, double(1 + error)), single) for v in (scale, rest))
        return fmuladd(builder, d, *(splat(builder, v, x.type.count) for v in factors))

    if z is None:
        low, high = end(-(2.0**-21)), end(2.0**-21)
    else:
        before = end(0)
        value = builder.fadd(before, z)
        bound = _constant(x.type, 2.0**-120)
        for v, error in ((before, 2.0**-21), (value, 2.0**-23)):
            bound = fmuladd(builder, absolute(builder, v), _constant(x.type, error), bound)
        low, high = builder.fsub(value, bound), builder.fadd(value, bound)
    half, is_sure = _half_of_both(builder, low, high, name)
    # float32 has these coefficients, so that NaN comes of x and z alone, and no product is subnormal.
    for v, least in ((centre, -1.0), (exact, -1.0), (scale, 2.0**-100), (shift, -1.0)):
        size = absolute(builder, v)
        is_sure = builder.and_(is_sure, builder.fcmp_ordered(">", size, double(least)))
        is_sure = builder.and_(is_sure, builder.fcmp_ordered("<", size, double(2.0**100)))
    far = builder.fmul(absolute(builder, exact), double(2.0 ** (28 - digits)))
    return half, builder.and_(is_sure, builder.fcmp_ordered("<=", absolute(builder, centre), far))


def _half_of_both(builder, low, high, name):
    """The halves nearest to `low`, and whether those nearest to `high` are the same ones."""
    count = low.type.count
    if name == "float16":
        a, b = (to_half(builder, v, name) for v in (low, high))
        same = builder.icmp_unsigned("==", a, b)
    else:  # half up: between two ends with one half there is no middle of two, which would go to the even one
        do = _Bits(builder, _kind(low, ir.IntType(32)))
        a, b = (do.lshr(do.add(builder.bitcast(v, do.kind), 0x8000), 16) for v in (low, high))
        large = builder.fcmp_ordered(">", absolute(builder, low), _constant(low.type, 2.0**-100))  # and no NaN
        same = builder.and_(builder.icmp_unsigned("==", a, b), large)
        a = builder.trunc(a, _kind(low, ir.IntType(16)))
    every = ir.IntType(count)
    return a, builder.icmp_unsigned("==", builder.bitcast(same, every), every(-1))


def rectified_half(builder, bits, name):
    """ReLU of the bits of halves, and whether they are above 0; NaN stays NaN and is not."""
    do, infinite = _Bits(builder, bits.type), 0x7C00 if name == "float16" else 0x7F80
    negative = do.less(do.sub(bits, 0x8000), infinite + 1)
    return do.choose(negative, 0, bits), do.less(do.sub(bits, 1), infinite)


def to_single(builder, value):
    """float32 from float64, rounded to odd: cut, and the last bit set if anything was cut off."""
    do = _Bits(builder, _kind(value, ir.IntType(64)))
    bits = builder.bitcast(value, do.kind)
    rest = (1 << 29) - 1
    odd = do.and_(do.add(do.and_(bits, rest), rest), rest + 1)
    return builder.fptrunc(builder.bitcast(do.and_(do.or_(bits, odd), ~rest), value.type), _kind(value, ir.FloatType()))
