#include "kernels.h"

#define FASTGEN_STRING_OF(name) #name
#define FASTGEN_STRING(name) FASTGEN_STRING_OF(name)

namespace fastgen::FASTGEN_ISA {

const CpuKernels kernels = {FASTGEN_STRING(FASTGEN_ISA),
                            step,
                            reparameterize,
                            reparameterize_backward,
                            rescale,
                            conv_transpose,
                            conv_transpose_pack,
                            channel_epilogue,
                            &multiplier,
                            &multiplier};

}  // namespace fastgen::FASTGEN_ISA
