"""float16 and bfloat16, which Numba has not: how lanes convert them.

An array of them goes to a kernel as one of records (`plain.CARRIERS`), whose only field is named after the dtype. They
are computed with in float64, which is rounded once: to float32 to odd (the last bit set if anything is cut off), and
from there to nearest even, which is then the rounding of the first value (Boldo, Melquiond 2008, "Emulation of FMA and
correctly rounded sums: proved algorithms using rounding to odd", theorem 3); but for a bfloat16 below 1.2e-38, where
float32 has fewer bits than it takes: there a value within 2**-24 of the middle between two may go to the other one.

float16 is converted by the processor where it has instructions for that, else by arithmetic on the bits.

Where float32 is sure to lead to the same half it is faster: sixteen lanes are half as many registers, and the rounding
to odd falls away. Sure it is if a float32 value and the bound of its error has the same half at both ends (Ziv 1991,
"Fast evaluation of elementary mathematical functions with correctly rounded last bit"). Of float16, one piece of
sixteen in thirty is not.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target

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


def _call(builder, verb, result, arguments):
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(
        cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.avx512.mask.{verb}.512"), arguments
    )


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
        return _call(builder, "vcvtph2ps", single, [bits, ir.Constant(single, ir.Undefined), _ALL, ir.IntType(32)(4)])
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
        return _call(builder, "vcvtps2ph", half, [value, ir.IntType(32)(0), ir.Constant(half, ir.Undefined), _ALL])
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


def sure_half(builder, value, bound, name):
    """The bits of the halves nearest to float32, and whether each lane's is the same wherever it lies in its bounds."""
    ends = builder.fsub(value, bound), builder.fadd(value, bound)
    if name == "float16":
        low, high = (to_half(builder, v, name) for v in ends)
    else:  # half up: between two ends with one half there is no middle of two, which would go to the even one
        do = _Bits(builder, _kind(value, ir.IntType(32)))
        low, high = (do.lshr(do.add(builder.bitcast(v, do.kind), 0x8000), 16) for v in ends)
    every = ir.IntType(value.type.count)
    same = builder.bitcast(builder.icmp_unsigned("==", low, high), every)
    half = low if name == "float16" else builder.trunc(low, _kind(value, ir.IntType(16)))
    return half, builder.icmp_unsigned("==", same, every(-1))


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
