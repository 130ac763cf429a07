// As many floats as a register of the instruction set holds, wherever they lie.
#pragma once

namespace fastgen::FASTGEN_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

}  // namespace fastgen::FASTGEN_ISA
