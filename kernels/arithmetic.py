"""Float32 arithmetic that has the same bits everywhere: the twin of csrc/math.

Only add, subtract, multiply, correctly rounded divide and root, in the written order. Kernels that
call these functions must be compiled with `enable_fp_fusion=False`.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _floats(text: str) -> tl.constexpr:
    return tl.constexpr(tuple(float.fromhex(word) for word in text.split()))


# Elements of one leaf of the reduction tree, and of one program.
CHUNK = tl.constexpr(1024)

# 1.5 * 2^23: adding and subtracting it rounds to the nearest integer, which its low bits then hold.
ROUND_MAGIC = tl.constexpr(12582912.0)

# Highest power first.
LOG = _floats("""-0x1.38b58p-4 0x1.055b6ap-3 -0x1.0d8542p-3 0x1.22da1cp-3 -0x1.547244p-3
                 0x1.99a008p-3 -0x1.000226p-2 0x1.555554p-2""")
EXP = _floats("0x1.6a244cp-10 0x1.1239d4p-7 0x1.5558f2p-5 0x1.555492p-3 0x1.fffffcp-2")
SIN = _floats("-0x1.2d9302p-8 0x1.465e92p-4 -0x1.4abbbap-1 0x1.921fb6p+0")
COS = _floats("0x1.d9d57ep-11 -0x1.55c5e0p-6 0x1.03c1dep-2 -0x1.3bd3ccp+0 1.0")

# ln 2 in two parts: the first is so short that its product with the exponent is exact.
LOG_LN2_HIGH = tl.constexpr(float.fromhex("0x1.63p-1"))
LOG_LN2_LOW = tl.constexpr(float.fromhex("-0x1.bd0106p-13"))
EXP_LN2_HIGH = tl.constexpr(float.fromhex("0x1.62e4p-1"))
EXP_LN2_LOW = tl.constexpr(float.fromhex("0x1.7f7d1cp-20"))
LOG2_E = tl.constexpr(float.fromhex("0x1.715476p+0"))


@triton.jit
def bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def from_bits(x):
    return x.to(tl.float32, bitcast=True)


@triton.jit
def polynomial(x, COEFFICIENTS: tl.constexpr, COUNT: tl.constexpr):
    p = x * COEFFICIENTS[0] + COEFFICIENTS[1]
    for i in tl.static_range(2, COUNT):
        p = p * x + COEFFICIENTS[i]
    return p


@triton.jit
def log_positive(x):
    """Of a normal x > 0 = 2^k m with m in [sqrt(1/2), sqrt(2))."""
    k = (bits(x) - 0x3F3504F3).to(tl.int32, bitcast=True) >> 23
    f = from_bits(bits(x) - (k.to(tl.uint32, bitcast=True) << 23)) - 1.0
    square = f * f
    exponent = k.to(tl.float32)
    tail = square * f * polynomial(f, LOG, 8) - 0.5 * square
    tail = exponent * LOG_LN2_LOW + tail
    return exponent * LOG_LN2_HIGH + (f + tail)


@triton.jit
def exp_any(x):
    """0 and infinity beyond the range, NaN passed on, denormal results kept."""
    x = tl.where(x > 89.0, 89.0, x)
    x = tl.where(x < -104.0, -104.0, x)
    shifted = x * LOG2_E + ROUND_MAGIC
    n = shifted - ROUND_MAGIC
    k = (bits(shifted) - 0x4B400000).to(tl.int32, bitcast=True)
    r = (x - n * EXP_LN2_HIGH) - n * EXP_LN2_LOW
    p = 1.0 + (r + r * r * polynomial(r, EXP, 5))
    # 2^k in two factors: k reaches past the range of normal exponents on both sides.
    half = k >> 1
    first = from_bits((half + 127).to(tl.uint32, bitcast=True) << 23)
    second = from_bits((k - half + 127).to(tl.uint32, bitcast=True) << 23)
    return p * first * second


@triton.jit
def cos_sin_turn(u):
    """cos and sin of 2 pi u for u in [0, 1]."""
    t = 4.0 * u
    shifted = t + ROUND_MAGIC
    quadrant = bits(shifted)
    f = t - (shifted - ROUND_MAGIC)  # exact, in [-1/2, 1/2] quarter turns
    y = f * f
    s = polynomial(y, SIN, 4) * f
    c = polynomial(y, COS, 5)
    odd = (quadrant & 1) != 0
    cosine = from_bits(bits(tl.where(odd, s, c)) ^ (((quadrant + 1) & 2) << 30))
    sine = from_bits(bits(tl.where(odd, c, s)) ^ ((quadrant & 2) << 30))
    return cosine, sine


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011)."""
    M0: tl.constexpr = 0xD2511F53
    M1: tl.constexpr = 0xCD9E8D57
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, tl.full(c0.shape, M0, tl.uint32)), c0 * M0
        high1, low1 = tl.umulhi(c2, tl.full(c2.shape, M1, tl.uint32)), c2 * M1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform_open_closed(word):
    SCALE: tl.constexpr = 2.0**-32
    return word.to(tl.float32) * SCALE + SCALE / 2


@triton.jit
def box_muller(radius_word, angle_word):
    """Two words to two normals: Box & Muller (1958)."""
    radius = tl.sqrt_rn(-2.0 * log_positive(uniform_open_closed(radius_word)))
    cosine, sine = cos_sin_turn(uniform_open_closed(angle_word))
    return radius * cosine, radius * sine


@triton.jit
def _normals_of(block, c1, c2, c3, k0, k1):
    zero = tl.zeros(block.shape, tl.uint32)
    w0, w1, w2, w3 = philox4x32(block, zero + c1, zero + c2, zero + c3, k0, k1)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return tl.join(tl.join(z0, z2), tl.join(z1, z3))  # [block, i, j] is z_(2i + j)


@triton.jit
def normals(block, c1, c2, c3, k0, k1, VECTOR: tl.constexpr):
    """CHUNK normals of consecutive elements, from the Philox block `block` (uint32) on.

    VECTOR: 4 or 8 neighbours a thread, as it has them in 16 bytes of memory.
    """
    if VECTOR == 4:
        z = _normals_of(tl.arange(0, CHUNK // 4).to(tl.uint32) + block, c1, c2, c3, k0, k1)
    else:
        first = 2 * tl.arange(0, CHUNK // 8).to(tl.uint32) + block
        even = _normals_of(first, c1, c2, c3, k0, k1)
        odd = _normals_of(first + 1, c1, c2, c3, k0, k1)
        z = tl.permute(tl.join(even, odd), (0, 3, 1, 2))
    return tl.reshape(z, (CHUNK,))


# bfloat16 by integers: the interpreter's own conversions truncate, and lose denormals.
@triton.jit
def from_bfloat16(x):
    return from_bits(x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)


@triton.jit
def to_bfloat16(x):
    b = bits(x)
    rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16
    result = tl.where((b & 0x7FFFFFFF) > 0x7F800000, (b >> 16) | 0x40, rounded)
    return result.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def sum_chunk(x):
    """The sum of CHUNK values by halves, x[i] + x[i + half]: the leaf of the reduction tree."""
    # Each level adds two numbers only, so that the order within tl.sum cannot matter.
    for _ in tl.static_range(9):
        x = tl.sum(tl.reshape(x, (2, x.shape[0] // 2)), axis=0)
    return tl.sum(x)


@triton.jit
def sum_tree(values, count):
    """The tree above the leaves, over `count` floats in memory, which are overwritten.

    The program that calls it must be the only one to touch them.
    """
    lane = tl.arange(0, CHUNK)
    while count > CHUNK:
        chunks = tl.cdiv(count, CHUNK)
        for c in range(chunks):
            first = c * CHUNK
            total = sum_chunk(tl.load(values + first + lane, mask=lane < count - first, other=0.0))
            tl.debug_barrier()
            tl.store(values + c, total)
        tl.debug_barrier()
        count = chunks
    return sum_chunk(tl.load(values + lane, mask=lane < count, other=0.0))
