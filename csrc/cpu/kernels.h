// The CPU kernels as a table of functions; each instruction set fills one, dispatch.cpp chooses.
#pragma once

#include "../params.h"

namespace fastgen {

struct CpuKernels {
    const char* isa;
    void (*step)(const StepParams&, int threads);
    void (*reparameterize)(const ReparameterizeParams&, int threads);
    void (*reparameterize_backward)(const ReparameterizeParams&, int threads);
    void (*rescale)(const RescaleParams&, int threads);
    void (*conv_transpose_product)(const ProductParams&, int threads);
    void (*conv_transpose_fold)(const FoldParams&, int threads);
    void (*channel_epilogue)(const ChannelEpilogueParams&, int threads);
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
#endif

#if defined(FASTGEN_ISA)
namespace FASTGEN_ISA {
void step(const StepParams&, int threads);
void reparameterize(const ReparameterizeParams&, int threads);
void reparameterize_backward(const ReparameterizeParams&, int threads);
void rescale(const RescaleParams&, int threads);
void conv_transpose_product(const ProductParams&, int threads);
void conv_transpose_fold(const FoldParams&, int threads);
void channel_epilogue(const ChannelEpilogueParams&, int threads);
}  // namespace FASTGEN_ISA
#endif

// The table in use: the widest set that this processor has, unless another was chosen.
const CpuKernels& cpu_kernels();
// "baseline", "avx2", "avx512": false where this processor or build lacks it.
bool choose_cpu_kernels(const char* isa);
// Whether this processor and build have it.
bool has_cpu_kernels(const char* isa);

}  // namespace fastgen
