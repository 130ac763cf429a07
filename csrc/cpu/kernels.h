// The CPU kernels as a table of functions; each instruction set fills one, dispatch.cpp chooses.
#pragma once

#include "../params.h"
#include "multiply.h"

namespace fastgen {

struct CpuKernels {
    const char* isa;
    void (*step)(const StepParams&, int threads);
    void (*reparameterize)(const ReparameterizeParams&, int threads);
    void (*reparameterize_backward)(const ReparameterizeParams&, int threads);
    void (*rescale)(const RescaleParams&, int threads);
    void (*conv_transpose)(const ConvTransposeParams&, int threads);
    void (*conv_transpose_pack)(const PackParams&, int threads);
    void (*channel_epilogue)(const ChannelEpilogueParams&, int threads);
    const Multiplier *multiplier, *multiplier_bf16;  // of float32, and of bfloat16 operands
};

// One table an instruction set; FASTGEN_ISA is the one a file is being compiled for.
namespace baseline {
extern const CpuKernels kernels;
}
#if defined(FASTGEN_X86)
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}
namespace avx512_bf16 {
extern const Multiplier multiplier;
}
namespace amx {
extern const Multiplier multiplier;
bool is_permitted();
}  // namespace amx
#endif

#if defined(FASTGEN_ISA)
namespace FASTGEN_ISA {
void step(const StepParams&, int threads);
void reparameterize(const ReparameterizeParams&, int threads);
void reparameterize_backward(const ReparameterizeParams&, int threads);
void rescale(const RescaleParams&, int threads);
void conv_transpose(const ConvTransposeParams&, int threads);
void conv_transpose_pack(const PackParams&, int threads);
void channel_epilogue(const ChannelEpilogueParams&, int threads);
extern const Multiplier multiplier;
}  // namespace FASTGEN_ISA
#endif

// The table in use: the widest set that this processor has, unless another was chosen.
const CpuKernels& cpu_kernels();
// "baseline", "avx2", "avx512", "avx512_bf16", "amx" (the last two as the one before, but for
// products of bfloat16): false where this processor or build lacks it.
bool choose_cpu_kernels(const char* isa);
// Whether this processor and build have it.
bool has_cpu_kernels(const char* isa);

}  // namespace fastgen
